"""Remarks on files that are read, each printed once by a process and its data-loading workers.

Decoders written in C print to stderr and know no file names: their remarks get them here.
"""

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

MOST = 10  # remarks on single files that a process and its workers print

_full: list[bool] = []  # not empty once MOST are printed
_printed: set[str] = set()  # keys of this process
_shared: list[BinaryIO] = []  # a file that workers inherit: "<key> <process>" of all remarks, one per line
_sinks: dict[int, BinaryIO] = {}  # by process, as a forked one would share its parent's position in the file


def share() -> None:
    """Let the workers that are forked from now on know each other's remarks."""
    if not _shared and hasattr(os, "fork"):
        number, path = tempfile.mkstemp()
        _shared.append(open(path, "ab+", buffering=0))
        os.close(number)
        os.unlink(path)


def say(name: str, remark: str) -> None:
    """Print a decoder's remark on a file."""
    if _full or not (number := first(f"file {name}")):
        return
    if number >= MOST:
        _full.append(True)
    if number <= MOST:
        last = "; remarks on further files are not shown" if number == MOST else ""
        print(f"{name}: {remark}{last}", file=sys.stderr, flush=True)


def say_kind(kind: str, line: str) -> None:
    """Print a remark that holds for all files of a kind, of the first one."""
    if first(f"kind {kind}"):
        print(line, file=sys.stderr, flush=True)


def first(key: str) -> int:
    """0 if the key was asked for before, by this process or a worker; else how many keys of its sort there are now."""
    key = key.replace("\n", " ")
    if key in _printed:
        return 0
    _printed.add(key)
    if not _shared:
        return sum(other.split()[0] == key.split()[0] for other in _printed)
    # Appending is atomic: of several processes that come with one key at a time, the first line is one process's.
    file = _shared[0].fileno()
    os.write(file, f"{os.getpid()} {key}\n".encode("utf-8", "replace"))
    lines = os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace").splitlines()
    owners: dict[str, str] = {}
    for line in lines:
        process, _, other = line.partition(" ")
        owners.setdefault(other, process)
    if owners.get(key.encode("utf-8", "replace").decode()) != str(os.getpid()):
        return 0
    return sum(other.split()[0] == key.split()[0] for other in owners)


@contextmanager
def captured() -> Iterator[list[str]]:
    """What C code prints to stderr in the block: a list that is filled when the block ends, with one line or nothing.

    In other threads than the main one, and without a stderr, nothing is captured.
    """
    lines: list[str] = []
    try:
        saved = os.dup(2) if threading.current_thread() is threading.main_thread() else None
    except OSError:
        saved = None
    if saved is None:
        yield lines
        return
    sink = _sinks.get(os.getpid()) or _sinks.setdefault(os.getpid(), tempfile.TemporaryFile(buffering=0))
    os.dup2(sink.fileno(), 2)
    try:
        yield lines
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        if os.fstat(sink.fileno()).st_size:
            sink.seek(0)
            text = sink.read().decode("utf-8", "replace")
            sink.seek(0)  # for the next text too: both names of the file share one position
            sink.truncate()
            lines.append("; ".join(dict.fromkeys(filter(None, map(str.strip, text.splitlines())))))
