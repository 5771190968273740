"""Shards: images packed in tar files by WebDataset's convention, with random access as to files.

Members of one sample follow each other and share their name up to its first dot: a/0007.jpg, a/0007.cls, a/0007.json.
An index of the images' positions in the shards, made once, lets any image be loaded with one read. So shards are
shuffled, distributed and resumed like folders. Pipes and URLs, which have no random access, are first copied to a file.

Shapes: N images in all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

import atomic
import parallel
from imagesets import listing
from imagesets.decode import Reading, Reduction, Undecodable, decode, printable, suffixes
from parallel import Refused, import_optional

BLOCK = 512  # bytes; tar files consist of such blocks


class Member(NamedTuple):
    """A plain file in a tar file, and its label if it is the member that holds one."""

    name: str
    offset: int
    size: int
    label: str | None


class Shards:
    """The images of local tar files. A worker opens the shard for each read, so that no file position is shared."""

    def __init__(self, files: Sequence[bytes], table: listing.Table, reading: Reading) -> None:
        self.files, self.paths = listing.Texts(listing.pack(files)), listing.Texts(table["paths"])
        self.shard, self.offset, self.size = (torch.from_numpy(table[k]) for k in ("shard", "offset", "size"))
        self.labels = torch.from_numpy(table["labels"]) if len(table["labels"]) else None
        self.classes = [printable(name) for name in listing.Texts(table["classes"])]
        self.fingerprint = listing.table_hash(table)
        self.reading = reading

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return printable(os.path.join(self.files[self.shard[i].item()], self.paths[i]))

    def content(self, i: int) -> bytes:
        """The file, as `decode` takes it."""
        try:
            with open(self.files[self.shard[i].item()], "rb", buffering=0) as file:
                file.seek(self.offset[i].item())
                return file.read(self.size[i].item())
        except OSError as error:
            raise Undecodable(f"{self.name(i)}: {error.strerror}") from error

    def load(self, i: int, reduction: Reduction | None = None) -> Tensor:
        return decode(self.content(i), name=self.name(i), reduction=reduction, **self.reading.decoding())


# ---- Opening ----


def named_by(data_path: str) -> bool:
    return data_path.startswith("pipe:") or data_path.endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst"))


def open_shards(where: str, data_path: str, split: str | None, reading: Reading) -> Shards:
    """The shards of `name-{000..099}.tar`, `pipe:command` or a URL."""
    if split == "val":
        raise Refused(f"{where}: shards have no validation part; give a folder with shards in train/ and val/")
    paths = expand(data_path)
    if not paths:
        raise Refused(f"{where}: the range is empty; write it in rising order, as in {{000..099}}")
    paths = [copied(where, path) if "://" in path or path.startswith("pipe:") else os.path.expanduser(path)
             for path in paths]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise Refused(f"{where}: {missing[0]!r} isn't there ({len(missing)} of {len(paths)} shards are missing); "
                      "correct the name")
    return read_shards(where, [os.fsencode(path) for path in paths], reading)


def open_folder_of_shards(where: str, folder: str, reading: Reading) -> Shards | None:
    """The folder's .tar files, in the order of their names; None if it has none."""
    own = atomic.outputs_in(folder)
    names = sorted(name for name in os.listdir(os.fsencode(folder))
                   if name.endswith(b".tar") and name[:1] != b"." and name not in own)
    paths = [os.path.join(os.fsencode(folder), name) for name in names]
    return read_shards(where, paths, reading) if paths else None


def expand(pattern: str) -> list[str]:
    """Expand `{08..10}` and `{a,b}`, the first ones varying slowest; other braces are kept."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{},]*(?:,[^{},]*)+)\}", pattern)
    if not match:
        return [pattern]
    if match[3] is not None:
        choices = match[3].split(",")
    else:
        choices = [f"{n:0{len(match[1])}d}" for n in range(int(match[1]), int(match[2]) + 1)]
    return [pattern[: match.start()] + c + rest for c in choices for rest in expand(pattern[match.end() :])]


def copied(where: str, url: str) -> str:
    """Path of a local copy of a pipe's or URL's content. One process of each host makes it, the others wait."""
    gopen = import_optional("webdataset", f"{where}: a pipe or URL", "webdataset").gopen
    folder = listing.cache_dir()
    if folder is None:
        raise Refused(f"{where}: DINO_CACHE is empty; set it to a folder with room for a copy of the shards")
    path = folder / f"copy_{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                print(f"copying {url} to {path}; delete that file to copy it again", flush=True)
                for part in folder.glob(f".{path.name}.*.tmp"):  # of a process that was killed while it copied
                    part.unlink()
                with atomic.replacing(path) as temporary:
                    copy(url, gopen, temporary)
                    atomic.mark_output(path)
    except OSError as error:
        raise Refused(f"{where}: {url!r} could not be copied to {folder} ({str(error)[:200]}); correct it, or set "
                      "DINO_CACHE to a folder with room") from error
    return str(path)


def copy(url: str, gopen: Callable, path: Path) -> None:
    """Write a pipe's or URL's content to a file, which must be an uncompressed tar file. Raises OSError."""
    try:
        with gopen(url, "rb") as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        tarfile.open(path, "r:").close()  # an error page of a server is no tar file, and is not kept
    except Exception as error:  # gopen's programs and protocols raise many types
        raise OSError(str(error)) from error


# ---- What the shards hold ----


def read_shards(where: str, paths: Sequence[bytes], reading: Reading) -> Shards:
    known = frozenset(map(os.fsencode, suffixes(reading.in_chans)))
    real = [os.path.realpath(path) for path in paths]
    what = "\n".join(map(os.fsdecode, real))
    table = listing.listed(what, known, lambda stamps: shards_table(where, real, known, stamps), ["note", "unlabelled"])
    if not table["left_out"] and not len(table["paths"]):
        raise Refused(f"{where}: no images in {len(paths)} shard(s); give shards that hold some, named key.jpg")
    if table["left_out"] and parallel.is_main():
        print(f"{where}: {table['left_out']} images are left out: only the first image of a sample is used", flush=True)
    if note := printable(table["note"].tobytes()):
        parallel.say(f"{where}: {note}")
    images = Shards(paths, table, reading)
    count, first = table["unlabelled"].tolist()
    if 0 < count < len(images):
        parallel.say(f"{where}: no labels, because {count} of {len(images)} samples have none (the first: "
                     f"{images.name(first)!r}); for labels add key.cls to these samples, or leave them out")
    return images


def shards_table(where: str, paths: Sequence[bytes], known: frozenset[bytes], stamps: list[tuple]) -> listing.Table:
    """Columns: paths, shard, offset, size and (if all have one) labels of the images; classes; left_out, a count; note,
    which samples have no image; unlabelled, the number of images without a label and the first of them.

    Raises:
        Refused: a shard can't be read, or the members of a sample don't follow each other.
    """
    names, labels, left_out = bytearray(), [], 0
    rows = {"shard": array("i"), "offset": array("q"), "size": array("q")}
    others = Counter()
    for number, path in enumerate(paths):
        keys = set()
        stamps.append((path, *listing.stamp(path)))
        for sample in samples(where, path):
            images = [m for m in sample if os.path.splitext(os.fsencode(m.name))[1].lower() in known]
            left_out += len(images[1:])
            if (name := key(sample[0])) in keys:
                raise Refused(f"{where}: {printable(path)}: the members of sample {name!r} don't follow each other; "
                              "make this shard again, as with tar --sort=name")
            keys.add(name)
            if not images:
                others[os.path.splitext(os.fsencode(sample[0].name))[1].lower()] += 1
            for image in images[:1]:
                names += os.fsencode(image.name) + b"\0"
                rows["shard"].append(number)
                rows["offset"].append(image.offset)
                rows["size"].append(image.size)
                labels.append(label_of(where, path, sample))
    missing = [i for i, label in enumerate(labels) if label is None]
    numbers, classes = ([], []) if missing else listing.numbered(labels)
    note = listing.passed_over(others, "samples without an image")
    return {k: np.array(v) for k, v in rows.items()} | {
        "note": np.frombuffer(os.fsencode(note), np.uint8),
        "paths": np.frombuffer(names, np.uint8), "left_out": np.array(left_out),
        "unlabelled": np.array([len(missing), missing[0] if missing else 0], np.int64),
        "labels": np.array(numbers, np.int64), "classes": listing.pack(name.encode() for name in classes),
    }


def label_of(where: str, path: bytes, sample: list[Member]) -> str | None:
    """The label of a sample, if it has one. Raises Refused if it has two."""
    labels = sorted({m.label for m in sample if m.label is not None})
    if len(labels) > 1:
        raise Refused(f"{where}: {printable(path)}: sample {key(sample[0])!r} has the labels {' and '.join(labels)}; "
                      "make this shard again with one")
    return labels[0] if labels else None


def samples(where: str, path: bytes) -> Iterator[list[Member]]:
    """The plain files of a shard, sample by sample.

    Raises:
        Refused: not an uncompressed tar file, one that is cut short, or one with labels that can't be read.
    """
    try:
        with tarfile.open(os.fsdecode(path), "r:") as tar:
            yield from (list(group) for _, group in itertools.groupby(plain_files(tar), key))
            # tarfile takes a file that ends early for a complete one
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError("it is cut short or broken")
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Refused(f"{where}: {printable(path)}: {error}; make or fetch this shard again") from error


def plain_files(tar: tarfile.TarFile) -> Iterator[Member]:
    """A link has the content of the member that it leads to, or none, as an empty file, where there is no such member.
    """
    every = None
    while (member := next_member(tar)) is not None:
        tar.members.clear()  # a shard may hold millions
        name = member.name
        if os.path.basename(name).startswith("."):
            continue
        if member.issym() or member.islnk():
            every = every or members_by_name(tar.name)
            member = link_target(member, every)
            if member is None:
                yield Member(name, 0, 0, None)
                continue
        if member.isreg() and not member.issparse():
            yield Member(name, member.offset_data, member.size, label(tar, name, member))


def members_by_name(path: str) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path, "r:") as tar:
        return {os.path.normpath(member.name): member for member in tar}


def link_target(link: tarfile.TarInfo, every: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The member that a link leads to, through other links if need be."""
    for _ in range(40):  # as many as Linux follows
        folder = os.path.dirname(link.name) if link.issym() else ""  # hard links name members from the top
        target = every.get(os.path.normpath(os.path.join(folder, link.linkname)))
        if target is None or not (target.issym() or target.islnk()):
            return target
        link = target
    return None


def next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except ValueError as error:  # a number in a broken extended header
        raise tarfile.ReadError(str(error)) from error


def key(member: Member) -> str:
    folder, name = os.path.split(member.name)
    return os.path.join(folder, name.partition(".")[0])


def label(tar: tarfile.TarFile, name: str, member: tarfile.TarInfo) -> str | None:
    """The text of a .cls member, or the field `label` or `cls` of a .json member; None for all others."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".cls":
        return tar.extractfile(member).read().decode().strip() or None
    if suffix != ".json":
        return None
    fields = json.loads(tar.extractfile(member).read())
    value = next((fields[k] for k in ("label", "cls") if k in fields), None) if isinstance(fields, dict) else None
    if isinstance(value, float) and value.is_integer():  # as tools write that know no integers
        value = int(value)
    return str(value).strip() or None if isinstance(value, (int, str)) and not isinstance(value, bool) else None
