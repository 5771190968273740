"""Shards: images packed in tar files by WebDataset's convention, read at random like files.

Members of one sample follow each other and share their name up to its first dot: a/0007.jpg, a/0007.cls, a/0007.json.
An index of where the pictures lie in the shards, made once, gives any of them at one read. So shards are shuffled,
shared out and resumed as folders are. What has no random access, a pipe or a URL, is copied into a local file first.

Shapes: N images in all.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import parallel
from imagesets import listing
from imagesets.decode import Reduction, decode, printable, suffixes

BLOCK = 512  # bytes, of tar files


class Member(NamedTuple):
    """A plain file in a tar file; `label` is the text of one that holds a label."""

    name: str
    offset: int
    size: int
    label: str | None


class Shards:
    """Pictures in local tar files. A worker opens a shard for each read and seeks in no shared handle."""

    def __init__(self, files: Sequence[bytes], found: listing.Found, in_chans: int, max_pixels: int) -> None:
        self.files, self.paths = listing.Texts(listing.pack(files)), listing.Texts(found["paths"])
        self.shard, self.offset, self.size = (torch.from_numpy(found[k]) for k in ("shard", "offset", "size"))
        self.labels = torch.from_numpy(found["labels"]) if len(found["labels"]) else None
        self.classes = [printable(name) for name in listing.Texts(found["classes"])]
        self.fingerprint = listing.fingerprint(found)
        self.in_chans, self.max_pixels = in_chans, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return printable(os.path.join(self.files[self.shard[i].item()], self.paths[i]))

    def load(self, i: int, reduction: Reduction | None = None) -> Tensor:
        try:
            with open(self.files[self.shard[i].item()], "rb", buffering=0) as file:
                content = os.pread(file.fileno(), self.size[i].item(), self.offset[i].item())
        except OSError as error:
            raise ValueError(f"{self.name(i)}: {error.strerror}") from error
        return decode(content, self.in_chans, self.max_pixels, self.name(i), reduction)


# ---- Opening ----


def named_by(data_path: str) -> bool:
    return data_path.startswith("pipe:") or data_path.endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst"))


def open_shards(where: str, data_path: str, split: str | None, in_chans: int, max_pixels: int) -> Shards:
    """The shards of `name-{000..099}.tar`, `pipe:command` or a URL."""
    if split == "val":
        raise ValueError(f"{where}: shards have no part for validation; give a folder with train/ and val/ of them")
    paths = expand(data_path)
    if not paths:
        raise ValueError(f"{where}: a range that holds no number; write it upwards, as in {{000..099}}")
    paths = [copied(where, path) if "://" in path or path.startswith("pipe:") else os.path.expanduser(path)
             for path in paths]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(f"{where}: {missing[0]!r} isn't there ({len(missing)} of {len(paths)} shards are "
                                "missing); correct the name")
    return read_shards(where, [os.fsencode(path) for path in paths], in_chans, max_pixels)


def open_folder_of_shards(where: str, folder: str, in_chans: int, max_pixels: int) -> Shards | None:
    """The folder's .tar files, in the order of their names; None where it has none."""
    names = sorted(name for name in os.listdir(os.fsencode(folder)) if name.endswith(b".tar") and name[:1] != b".")
    paths = [os.path.join(os.fsencode(folder), name) for name in names]
    return read_shards(where, paths, in_chans, max_pixels) if paths else None


def expand(pattern: str) -> list[str]:
    """`{08..10}` and `{a,b}` written out, the first ones varying slowest; other braces stay."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{},]*(?:,[^{},]*)+)\}", pattern)
    if not match:
        return [pattern]
    if match[3] is not None:
        choices = match[3].split(",")
    else:
        choices = [f"{n:0{len(match[1])}d}" for n in range(int(match[1]), int(match[2]) + 1)]
    return [pattern[: match.start()] + c + rest for c in choices for rest in expand(pattern[match.end() :])]


def copied(where: str, url: str) -> str:
    """A local copy of what a pipe or URL gives, made once on a host; processes wait for the one that makes it."""
    try:
        from webdataset import gopen
    except ImportError as error:
        raise ValueError(f"{where}: pipes and URLs need webdataset: pip install webdataset") from error
    folder = listing.cache_dir()
    if folder is None:
        raise ValueError(f"{where}: DINO_CACHE is empty; set it to a folder with room for a copy of the shards")
    path = folder / f"copy_{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"
    temporary = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of by the system, however the process ends
            if not path.exists():
                print(f"copying {url} to {path}; delete that to copy anew", flush=True)
                with gopen(url, "rb") as source, open(temporary, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                tarfile.open(temporary, "r:").close()  # a page that says why there is none is not kept
                os.replace(temporary, path)
    except Exception as error:  # gopen's are of many kinds
        temporary.unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{where}: {url!r} could not be copied to {folder} ({reason}); correct it, or set DINO_CACHE to "
                      "a folder with room") from error
    return str(path)


# ---- What the shards hold ----


def read_shards(where: str, paths: Sequence[bytes], in_chans: int, max_pixels: int) -> Shards:
    known = frozenset(map(os.fsencode, suffixes(in_chans)))
    real = [os.path.realpath(path) for path in paths]
    what = "\n".join(map(os.fsdecode, real))
    found = listing.listed(what, known, lambda stamps: find(where, real, known, stamps))
    if not found["left_out"] and not len(found["paths"]):
        raise FileNotFoundError(f"{where}: no images in {len(paths)} shard(s); give shards that hold some, as key.jpg")
    if found["left_out"] and parallel.is_main():
        print(f"{where}: {found['left_out']} pictures are left out: their sample has another one before them",
              flush=True)
    return Shards(paths, found, in_chans, max_pixels)


def find(where: str, paths: Sequence[bytes], known: frozenset[bytes], stamps: list[tuple]) -> listing.Found:
    members, labels, left_out = bytearray(), [], 0
    rows = {"shard": array("i"), "offset": array("q"), "size": array("q")}
    for number, path in enumerate(paths):
        stamps.append((path, *listing.stamp(path)))
        try:
            for sample in samples(path):
                pictures = [m for m in sample if os.path.splitext(os.fsencode(m.name))[1].lower() in known]
                left_out += len(pictures[1:])
                for picture in pictures[:1]:
                    members += os.fsencode(picture.name) + b"\0"
                    rows["shard"].append(number)
                    rows["offset"].append(picture.offset)
                    rows["size"].append(picture.size)
                    labels.append(next((m.label for m in sample if m.label is not None), None))
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"{where}: {printable(path)}: {error}; make or fetch this shard again") from error
    numbers, classes = listing.numbered(labels) if None not in labels else ([], [])
    return {k: np.array(v) for k, v in rows.items()} | {
        "paths": np.frombuffer(members, np.uint8), "left_out": np.array(left_out),
        "labels": np.array(numbers, np.int64), "classes": listing.pack(name.encode() for name in classes),
    }


def samples(path: bytes) -> Iterator[list[Member]]:
    """The plain files of a shard, sample by sample.

    Raises:
        tarfile.TarError, ValueError: not an uncompressed tar file, or one that is cut short.
    """
    with tarfile.open(os.fsdecode(path), "r:") as tar:
        yield from (list(group) for _, group in itertools.groupby(plain_files(tar), key))
        # tarfile takes a file that ends early for one that is complete
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(BLOCK) != bytes(BLOCK):
            raise ValueError("it is cut short or broken")


def plain_files(tar: tarfile.TarFile) -> Iterator[Member]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # a shard may hold millions
        if member.isreg() and not member.issparse() and not os.path.basename(member.name).startswith("."):
            yield Member(member.name, member.offset_data, member.size, label(tar, member))


def key(member: Member) -> str:
    folder, name = os.path.split(member.name)
    return os.path.join(folder, name.partition(".")[0])


def label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    """The text of a .cls member, or `label` or `cls` of a .json one."""
    suffix = os.path.splitext(member.name)[1].lower()
    if suffix == ".cls":
        return tar.extractfile(member).read().decode().strip()
    if suffix != ".json":
        return None
    about = json.loads(tar.extractfile(member).read())
    value = next((about[k] for k in ("label", "cls") if k in about), None) if isinstance(about, dict) else None
    return str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else None
