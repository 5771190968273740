"""Zip archives of images, with random access as to files: an index of the members' positions is made once."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections import Counter

import numpy as np
import torch
from torch import Tensor

import parallel
from imagesets import listing
from imagesets.decode import Reading, Reduction, Undecodable, decode, printable, suffixes
from parallel import Refused

LOCAL_HEADER = 30  # bytes, without the name and the extra field, whose lengths are its last two numbers


class Zip:
    """The images of a zip archive. A worker opens it for each read, so that no file position is shared."""

    def __init__(self, path: str, table: listing.Table, reading: Reading) -> None:
        self.path, self.paths, self.reading = path, listing.Texts(table["paths"]), reading
        self.offset, self.size, self.packed = (torch.from_numpy(table[k]) for k in ("offset", "size", "packed"))
        self.labels = torch.from_numpy(table["labels"]) if len(table["labels"]) else None
        self.classes = [printable(name) for name in listing.Texts(table["classes"])]
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
    if split == "val":
        raise Refused(f"{where}: an archive has no validation part; give the validation images one of their own")
    known, real = frozenset(map(os.fsencode, suffixes(reading.in_chans))), os.path.realpath(path)
    table = listing.listed(real, known, lambda stamps: zip_table(where, real, known, stamps))
    if note := printable(table["note"].tobytes()):
        parallel.say(f"{where}: {note}")
    if not len(table["paths"]):
        raise Refused(f"{where}: no images in the archive; give one that holds some")
    return Zip(path, table, reading)


def zip_table(where: str, path: str, known: frozenset[bytes], stamps: list[tuple]) -> listing.Table:
    """Columns: paths, offset, size and packed (1: deflated) of the images, in the order of their names; labels, if all
    images lie in two or more first-level folders; classes, their names; note, which other files there are.

    A folder that holds the whole archive doesn't count as the first level.

    Raises:
        Refused: not a zip archive, or members that are encrypted or packed in another way than deflate.
    """
    stamps.append((os.fsencode(path), *listing.stamp(path)))
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir() and not passed(member.filename)]
    except (zipfile.BadZipFile, OSError) as error:
        raise Refused(f"{where}: {error}; make or fetch this archive again") from error
    others = Counter(suffix for m in members if (suffix := suffix_of(m.filename)) not in known)
    members = sorted((m for m in members if suffix_of(m.filename) in known), key=lambda m: os.fsencode(m.filename))
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Refused(f"{where}: {member.filename!r} is encrypted or not packed by deflate; unpack the archive and "
                          "give the folder")
    names = [os.fsencode(member.filename) for member in members]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise Refused(f"{where}: {printable(repeated[0])!r} is in the archive twice; pack it again")
    labels, classes = folder_labels(names)
    return {
        "paths": listing.pack(names), "labels": np.array(labels, np.int64), "classes": listing.pack(classes),
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
    """The number of each image's first-level folder, and the folders' names; ([], []) where these are no classes."""
    parts = [name.split(b"/") for name in names]
    while parts and len({p[0] for p in parts}) == 1 and all(len(p) > 1 for p in parts):
        parts = [p[1:] for p in parts]
    classes = sorted({p[0] for p in parts if len(p) > 1})
    if len(classes) < 2 or any(len(p) == 1 for p in parts):
        return [], []
    number = {name: i for i, name in enumerate(classes)}
    return [number[p[0]] for p in parts], classes
