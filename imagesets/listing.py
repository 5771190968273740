"""Listings: the names of millions of images in little memory, and an index that saves looking for them at every start.

What a listing found is a table of arrays. Names in it are packed: bytes that each end with a zero byte, end to end.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import parallel
from imagesets.decode import printable

VERSION = 1  # of what an index holds
WORTH_AN_INDEX = 10_000  # images; fewer are found in no time
SETTLED = 3_000_000_000  # ns: no file system's clock is coarser

Found = dict[str, np.ndarray]  # paths, watched, and whatever else the listing is made of


class Texts:
    """Byte strings in two tensors, which workers share: a million `bytes` would be copied into every worker, little by
    little, as their reference counts change."""

    def __init__(self, packed: np.ndarray) -> None:
        ends = np.flatnonzero(packed == 0) + 1
        self.text = torch.from_numpy(packed)
        self.ends = torch.from_numpy(np.concatenate([np.zeros(1, np.int64), ends]))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> bytes:
        start, end = self.ends[i].item(), self.ends[i + 1].item()
        return self.text[start : end - 1].numpy().tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))


def pack(strings: Iterable[bytes]) -> np.ndarray:
    """The strings, which hold no zero byte, as one uint8 array."""
    text = bytearray()
    for string in strings:
        text += string + b"\0"
    return np.frombuffer(text, np.uint8)


def numbered(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    """Labels as text -> as integers, and the classes' names."""
    if all(re.fullmatch(r"[0-9]{1,6}", label) for label in labels):
        numbers = [int(label) for label in labels]
        return numbers, [str(number) for number in range(max(numbers, default=-1) + 1)]
    names = sorted(set(labels))
    number = {name: i for i, name in enumerate(names)}
    return [number[label] for label in labels], names


# ---- Folders ----


def pictures_below(
    folder: bytes, prefix: bytes, known: frozenset[bytes], stamps: list[tuple], above: tuple = ()
) -> Iterator[bytes]:
    """Paths of pictures, each behind `prefix`: a folder's files, then its folders', in the order of their bytes.

    That is the order of Python's strings too, and the same on all file systems. `above` holds the folders on the
    way here: a link back to one of them is not followed. Adds to `stamps` what `stamp` says of every folder.
    """
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:
        return
    above += ((status.st_dev, status.st_ino),)
    stamps.append((folder, status.st_mtime_ns, 0))
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in known and (entry.is_file() or entry.is_symlink()):
                files.append(entry.name)  # a broken link too: a bad image, to be reported; a pipe is none
    yield from (prefix + name for name in sorted(files))
    for name in sorted(folders):
        yield from pictures_below(os.path.join(folder, name), prefix + name + b"/", known, stamps, above)


# ---- The index ----


def listed(what: str, known: frozenset[bytes], find: Callable[[list[tuple]], Found]) -> Found:
    """`find(stamps)`, or what it gave at an earlier start if nothing has changed since; all processes call it.

    Only the first process looks; the others get what it found, so that all have the same listing. `find` adds to
    `stamps` the (path, time of change in ns, bytes) of every folder or shard as it was *before* reading it; of
    folders the size is 0. A folder's time changes with the names in it, not with the content of its files.

    Args:
        what: the absolute paths of the folder or shards, one a line.
        known: suffixes that were looked for.
    """
    return parallel.on_main(lambda: find_or_read(what, known, find))


def find_or_read(what: str, known: frozenset[bytes], find: Callable[[list[tuple]], Found]) -> Found:
    path = index_path(what, known)
    found = read(path) if path else None
    if found is not None and unchanged(found):
        say(what, f"{count(found)} images by the index {path}; delete it to look anew")
        return found
    stamps: list[tuple] = []
    began = time.time_ns()
    found = find(stamps)
    found["watched"] = pack(path for path, *_ in stamps)
    found["stamps"] = np.array([numbers for _, *numbers in stamps], np.int64).reshape(-1, 2)
    # A change within one tick of the clock would leave no trace: what has just been written is not trusted.
    settled = found["stamps"][:, 0].max(initial=0) < began - SETTLED
    if path and count(found) >= WORTH_AN_INDEX and settled:
        try:
            write(path, found)
            say(what, f"{count(found)} images, kept in the index {path}; delete it to look anew")
        except OSError as error:
            say(what, f"no index is kept ({error.strerror}); DINO_CACHE names a folder for it")
    return found


def say(what: str, line: str) -> None:
    first, *others = what.split("\n")
    print(printable(os.fsencode(first)) + (f" and {len(others)} more" if others else "") + f": {line}", flush=True)


def count(found: Found) -> int:
    return int(np.count_nonzero(found["paths"] == 0))


def stamp(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, 0 if os.path.isdir(path) else status.st_size


def unchanged(found: Found) -> bool:
    try:
        return all(stamp(path) == tuple(then) for path, then in
                   zip(Texts(found["watched"]), found["stamps"].tolist(), strict=True))
    except OSError:
        return False


def fingerprint(found: Found) -> str:
    """Changes with the folders or shards that the listing was made of."""
    return hashlib.sha256(found["watched"].tobytes() + found["stamps"].tobytes()).hexdigest()


def cache_dir() -> Path | None:
    """$DINO_CACHE, or dino in $XDG_CACHE_HOME or ~/.cache; None where DINO_CACHE is empty: no index is kept."""
    if "DINO_CACHE" in os.environ:
        return Path(os.environ["DINO_CACHE"]).expanduser() if os.environ["DINO_CACHE"] else None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "dino"


def index_path(what: str, known: frozenset[bytes]) -> Path | None:
    key = json.dumps([VERSION, what, sorted(map(os.fsdecode, known))])
    folder = cache_dir()
    return folder and folder / f"index_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def read(path: Path) -> Found | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # none yet, or a broken one
        return None
    return found if {"paths", "watched", "stamps"} <= found.keys() else None


def write(path: Path, found: Found) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **found)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
