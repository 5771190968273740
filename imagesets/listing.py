"""Listings: the names of millions of images in little memory, and an index that saves searching them at every start.

A listing is a table of arrays. Names in it are packed: stored end to end, each terminated by a zero byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import atomic
import parallel
from imagesets import dicom, heif
from imagesets.decode import printable

VERSION = 1  # of the content of an index
WORTH_AN_INDEX = 10_000  # images; searching for fewer takes no time
SETTLED = 3_000_000_000  # ns; no file system's timestamps are coarser

# Thumbnails of a NAS, resource forks and recycle bins; hidden folders are passed over too.
PASSED_FOLDERS = (b"@eaDir", b"__MACOSX", b"#recycle", b"@Recycle", b"$RECYCLE.BIN")

Table = dict[str, np.ndarray]  # paths, watched, stamps (see `listed`), and other columns of the kind of listing


class Texts:
    """A sequence of byte strings, stored in two tensors.

    Workers share the memory of tensors. A list of a million `bytes` would be copied into every forked worker page by
    page, as reference counts change.
    """

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
    """Strings without zero bytes -> one uint8 array; see `Texts`."""
    text = bytearray()
    for string in strings:
        text += string + b"\0"
    return np.frombuffer(text, np.uint8)


def numbered(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    """Labels as text -> class numbers, and the names of the classes.

    Labels are numbered in the order of their names; those that are all integers in numeric order, and 07 is 7. Spaces
    around a label, and the Unicode form that it is written in, do not tell classes apart.
    """
    labels = [unicodedata.normalize("NFC", label.strip()) for label in labels]
    if all(re.fullmatch(r"[0-9]{1,18}", label) for label in labels):
        labels = [int(label) for label in labels]
    names = sorted(set(labels))
    number = {name: i for i, name in enumerate(names)}
    return [number[label] for label in labels], list(map(str, names))


# ---- Folders ----


def images_below(
    folder: bytes, prefix: bytes, known: frozenset[bytes], stamps: list[tuple], others: Counter[bytes],
    own: list[bytes], above: tuple = (),
) -> Iterator[bytes]:
    """Paths of the images below a folder, each preceded by `prefix`: its files, then recursively those of its folders.

    Names are sorted by their bytes, which is also the order of Python's strings and the same on all file systems.

    Args:
        known: lower-case suffixes of images.
        stamps: (path, time of change in ns, 0) of every folder is appended.
        others: counts files of other suffixes, by suffix.
        own: paths of what the project itself wrote there (`atomic.mark_output`) are appended; they are left out.
        above: (device, inode) of the folders above this one; a link back to one of them is not followed.

    Raises:
        OSError: a folder can't be read.
    """
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:
        return
    above += ((status.st_dev, status.st_ino),)
    stamps.append((folder, status.st_mtime_ns, 0))
    files, folders, outputs = [], [], atomic.outputs_in(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(b".") or entry.name in PASSED_FOLDERS:
                continue
            if entry.name in outputs:
                own.append(os.path.join(folder, entry.name))
            elif entry.is_dir():
                folders.append(entry.name)
            elif suffix not in known:
                others[suffix] += 1
            elif entry.is_file() or entry.is_symlink():
                files.append(entry.name)  # a broken link counts, as a bad image to be reported; a pipe does not
    yield from (prefix + name for name in sorted(files))
    for name in sorted(folders):
        yield from images_below(os.path.join(folder, name), prefix + name + b"/", known, stamps, others, own, above)


def passed_over(others: Counter[bytes], what: str) -> str:
    """How many files of other suffixes there are: "53 files of other suffixes are passed over (50 .dcm, 3 .txt)"."""
    if not others:
        return ""
    counts = [f"{count} {printable(suffix) or 'without suffix'}" for suffix, count in others.most_common(5)]
    more = ", ..." if len(others) > 5 else ""
    remedies = [f"; {way.REMEDY}" for way in (dicom, heif)
                if any(os.fsencode(suffix) in others for suffix in way.SUFFIXES)]
    return f"{others.total()} {what} are passed over ({', '.join(counts)}{more}){''.join(remedies)}"


def own_outputs(own: Sequence[bytes]) -> str:
    """What of the project's own outputs is left out: "2 outputs of these scripts are left out (curves.png, ...)"."""
    if not own:
        return ""
    names = ", ".join(sorted(printable(os.path.basename(path)) for path in own)[:3]) + (", ..." if len(own) > 3 else "")
    return (f"{len(own)} outputs of these scripts are left out ({names}), as {atomic.OUTPUTS} in their folder tells; "
            "to read one, move it elsewhere")


# ---- The index ----


def listed(
    what: str, known: frozenset[bytes], search: Callable[[list[tuple]], Table], columns: Iterable[str] = (),
) -> Table:
    """`search(stamps)`, or its result from an earlier start if nothing has changed since. All processes call this.

    Only rank 0 searches; the others receive its table, so that all have the same listing.

    Args:
        what: absolute paths of the folder or of the shards, one per line.
        known: suffixes that are searched for.
        columns: an index of an older version that lacks one of these is not used.
        search: makes the table, of which "paths" is required. It appends to `stamps` the (path, time of change in ns,
            size in bytes) of every folder or shard as it was *before* reading it. The size of folders is 0, and their
            time changes with the names in them, not with the content of their files.

    Returns:
        the table with two more columns: "watched", the packed paths of `stamps`, and "stamps", the numbers (n, 2).
    """
    return parallel.on_main(lambda: searched_or_read(what, known, search, set(columns)))


def searched_or_read(
    what: str, known: frozenset[bytes], search: Callable[[list[tuple]], Table], columns: set[str]
) -> Table:
    path = index_path(what, known)
    table = read_index(path) if path else None
    if table is not None and columns <= table.keys() and settled(table, time.time_ns()) and unchanged(table):
        report(what, f"{number_of_images(table)} images from the index {path}; delete it to search again")
        return table
    stamps: list[tuple] = []
    began = time.time_ns()
    table = search(stamps)
    table["watched"] = pack(path for path, *_ in stamps)
    table["stamps"] = np.array([numbers for _, *numbers in stamps], np.int64).reshape(-1, 2)
    if path and number_of_images(table) >= WORTH_AN_INDEX and settled(table, began):
        try:
            write_index(path, table)
            report(what, f"{number_of_images(table)} images, saved in the index {path}; delete it to search again")
        except OSError as error:
            report(what, f"no index is saved ({error.strerror}); set DINO_CACHE to a folder that can be written to")
    return table


def settled(table: Table, now: int) -> bool:
    """Whether the times of all folders or shards can show a later change.

    The time 0, as on mounts without times, never changes. A second change within one tick of the clock leaves no trace,
    so what was just written, or has a time in the future, gets no index.
    """
    times = table["stamps"][:, 0]
    return times.min(initial=now) > 0 and times.max(initial=0) < now - SETTLED


def report(what: str, line: str) -> None:
    first, *others = what.split("\n")
    print(printable(os.fsencode(first)) + (f" and {len(others)} more" if others else "") + f": {line}", flush=True)


def number_of_images(table: Table) -> int:
    return int(np.count_nonzero(table["paths"] == 0))


def stamp(path: str | bytes | os.PathLike) -> tuple[int, int]:
    """Time of change in ns, and size in bytes (0 for a folder)."""
    status = os.stat(path)
    return status.st_mtime_ns, 0 if os.path.isdir(path) else status.st_size


def unchanged(table: Table) -> bool:
    """Whether every folder or shard of the listing still has the time and size that it had when it was read."""
    watched = table["watched"].tobytes()
    if any(b"/" + name + b"\0" in watched for name in PASSED_FOLDERS):  # by an older version
        return False
    try:
        return all(stamp(path) == tuple(then) for path, then in
                   zip(Texts(table["watched"]), table["stamps"].tolist(), strict=True))
    except OSError:
        return False


def table_hash(table: Table) -> str:
    """Changes when a folder or shard of the listing does."""
    return hashlib.sha256(table["watched"].tobytes() + table["stamps"].tobytes()).hexdigest()


def natural_order(name: str) -> list[str | int]:
    """Sort key that puts frame2 before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def files_hash(paths: Iterable[str | bytes | os.PathLike]) -> str:
    """Changes when the path, size or time of a file does; of a file that can't be read, only the path counts."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            numbers = stamp(path)
        except OSError:
            numbers = None
        digest.update(os.fsencode(path) + f" {numbers}\n".encode())
    return digest.hexdigest()


def cache_dir() -> Path | None:
    """$DINO_CACHE, or dino in $XDG_CACHE_HOME or ~/.cache; None where DINO_CACHE is empty: then no index is saved."""
    if "DINO_CACHE" in os.environ:
        return Path(os.environ["DINO_CACHE"]).expanduser() if os.environ["DINO_CACHE"] else None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "dino"


def index_path(what: str, known: frozenset[bytes]) -> Path | None:
    key = json.dumps([VERSION, what, sorted(map(os.fsdecode, known))])
    folder = cache_dir()
    return folder and folder / f"index_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def read_index(path: Path) -> Table | None:
    """The table in an index; None if there is no index, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            table = dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return table if {"paths", "watched", "stamps"} <= table.keys() else None


def write_index(path: Path, table: Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **table)
