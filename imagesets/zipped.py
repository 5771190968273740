"""Zip archives of images, with random access as to files: an index of the members' positions is made once."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections import Counter
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

import parallel
from imagesets import listing
from imagesets.decode import Reading, Reduction, Undecodable, decode, printable, suffixes
from imagesets.parts import class_folders, part_named
from parallel import Refused

LOCAL_HEADER = 30  # bytes, without the name and the extra field, whose lengths are its last two numbers


class Zip:
    """The images of a zip archive. A worker opens it for each read, so that no file position is shared."""

    def __init__(
        self, path: str, table: listing.Table, paths: listing.Texts, labels: np.ndarray | None, classes: list[str],
        reading: Reading,
    ) -> None:
        self.path, self.paths, self.reading = path, paths, reading
        self.offset, self.size, self.packed = (torch.from_numpy(table[k]) for k in ("offset", "size", "packed"))
        self.labels, self.classes = None if labels is None else torch.from_numpy(labels), classes
        self.fingerprint = listing.table_hash(table)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return os.path.join(self.path, printable(self.paths[i]))

    def content(self, i: int) -> bytes:
        """The file, as `decode` takes it."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                start = self.offset[i].item()
                file.seek(start)
                name, extra = struct.unpack("<HH", file.read(LOCAL_HEADER)[-4:])
                file.seek(start + LOCAL_HEADER + name + extra)
                content = file.read(self.size[i].item())
            return zlib.decompress(content, -zlib.MAX_WBITS) if self.packed[i] else content
        except (OSError, zlib.error, struct.error) as error:
            raise Undecodable(f"{self.name(i)}: {getattr(error, 'strerror', None) or error}") from error

    def load(self, i: int, reduction: Reduction | None = None) -> Tensor:
        return decode(self.content(i), name=self.name(i), reduction=reduction, **self.reading.decoding())


def open_zip(where: str, path: str, split: str | None, reading: Reading) -> Zip:
    table = zip_listing(where, path, frozenset(map(os.fsencode, suffixes(reading.in_chans))))
    if note := printable(table["note"].tobytes()):
        parallel.say(f"{where}: {note}")
    if not len(table["paths"]):
        raise Refused(f"{where}: no images in the archive; give one that holds some")
    part = part_named(where, classes := folder_names(table), split)
    if split == "val" and part is None:
        raise Refused(f"{where}: no folder val or test in the archive; give the validation images one of their own")
    if part is not None:
        table = part_of(table, classes.index(part))
    paths = listing.Texts(table["paths"])
    labels, classes = class_folders(where, paths, table["labels"], folder_names(table), " and pack the archive again")
    return Zip(path, table, paths, labels, classes, reading)


def zip_listing(where: str, path: str, known: frozenset[bytes]) -> listing.Table:
    real = os.path.realpath(path)
    return listing.listed(real, known, lambda stamps: zip_table(where, real, known, stamps), ["folders"])


def folder_names(table: listing.Table) -> list[str]:
    return [printable(name) for name in listing.Texts(table["folders"])]


def zip_folders(where: str, path: str) -> list[str]:
    """The first-level folders of the images that Pillow reads."""
    return folder_names(zip_listing(where, path, frozenset(map(os.fsencode, suffixes(3)))))


def part_of(table: listing.Table, number: int) -> listing.Table:
    """The table of the images in one of the first-level folders, whose folders become the classes."""
    rows, texts = np.flatnonzero(table["labels"] == number), table["paths"].tobytes().split(b"\0")
    names = [texts[i] for i in rows]
    labels, folders = folder_labels(names)
    return table | {k: table[k][rows] for k in ("offset", "size", "packed")} | {
        "paths": listing.pack(names), "labels": np.array(labels, np.int64), "folders": listing.pack(folders)}


def zip_table(where: str, path: str, known: frozenset[bytes], stamps: list[tuple]) -> listing.Table:
    """Columns: paths, offset, size and packed (1: deflated) of the images, in the order of their names; labels, the
    number of the first-level folder, or -1 outside of them; folders, their names; note, which other files there are.

    A folder that holds the whole archive doesn't count as the first level.

    Raises:
        Refused: not a zip archive, or members that are encrypted or packed in another way than deflate.
    """
    stamps.append((os.fsencode(path), *listing.stamp(path)))
    try:
        with zipfile.ZipFile(path) as archive:
            every = [(member.filename.replace("\\", "/"), member) for member in archive.infolist()]  # as Windows packs
    except (zipfile.BadZipFile, OSError) as error:
        raise Refused(f"{where}: {error}; make or fetch this archive again") from error
    every = [(name, member) for name, member in every if not name.endswith("/") and not passed(name)]
    others = Counter(suffix for name, _ in every if (suffix := suffix_of(name)) not in known)
    images = sorted(((os.fsencode(name), member) for name, member in every if suffix_of(name) in known),
                    key=itemgetter(0))
    names, members = [name for name, _ in images], [member for _, member in images]
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Refused(f"{where}: {member.filename!r} is encrypted or not packed by deflate; unpack the archive and "
                          "give the folder")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise Refused(f"{where}: {printable(repeated[0])!r} is in the archive twice; pack it again")
    labels, folders = folder_labels(names)
    return {
        "paths": listing.pack(names), "labels": np.array(labels, np.int64), "folders": listing.pack(folders),
        "offset": np.array([m.header_offset for m in members], np.int64),
        "size": np.array([m.compress_size for m in members], np.int64),
        "packed": np.array([m.compress_type == zipfile.ZIP_DEFLATED for m in members], np.int64),
        "note": np.frombuffer(os.fsencode(listing.passed_over(others, "files of other suffixes")), np.uint8),
    }


def passed(name: str) -> bool:
    return any(part.startswith(".") or os.fsencode(part) in listing.PASSED_FOLDERS for part in name.split("/"))


def suffix_of(name: str) -> bytes:
    return os.path.splitext(os.fsencode(name))[1].lower()


def folder_labels(names: list[bytes]) -> tuple[list[int], list[bytes]]:
    """The number of each image's first-level folder, -1 outside of them, and the folders' names."""
    parts = [name.split(b"/") for name in names]
    while parts and len({p[0] for p in parts}) == 1 and all(len(p) > 1 for p in parts):
        parts = [p[1:] for p in parts]
    classes = sorted({p[0] for p in parts if len(p) > 1})
    number = {name: i for i, name in enumerate(classes)}
    return [number[p[0]] if len(p) > 1 else -1 for p in parts], classes
