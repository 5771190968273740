"""One run per output folder: two would mix their checkpoints and logs."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import parallel
from parallel import Refused

NAME = ".owner.json"
SIGN_SECONDS, SILENCE_SECONDS = 10, 60  # between signs of life; after which another host's run counts as dead


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder belongs to this run until the block ends; every process calls it, the first one holds the file.

    A file left behind by this very job (requeued) or by a dead process of this host is taken over at once; one of
    another host when its owner has given no sign of life for a minute.

    Raises:
        Refused: another run writes to the folder.
    """
    parallel.on_main(lambda: take(folder / NAME))
    if not parallel.is_main():
        yield
        return
    ended = threading.Event()
    threading.Thread(target=give_signs, args=(folder / NAME, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if read(folder / NAME) == myself():
            (folder / NAME).unlink(missing_ok=True)


def myself() -> dict:
    return {"host": socket.gethostname(), "process": os.getpid(), "started": start_of(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID", "")}


def start_of(process: int) -> str:
    """When a process of this host started, "" where that can't be known: numbers of processes are used again."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def take(path: Path) -> None:
    while True:
        with suppress(FileExistsError):
            with open(path, "x") as file:
                json.dump(myself(), file)
            time.sleep(0.2)  # another run may have found the same dead owner, and replaced this file
            if read(path) == myself():
                return
        owner = read(path)
        if owner is not None and lives(owner, path):
            raise Refused(f"--output_dir {path.parent}: process {owner['process']} on {owner['host']} trains in this "
                          "folder; stop it, or choose another folder")
        path.unlink(missing_ok=True)


def read(path: Path) -> dict | None:
    """The owner in the file; None where there is no such file, or a kill has cut it short."""
    try:
        owner = json.loads(path.read_text())
        return owner if myself().keys() <= owner.keys() else None
    except (OSError, json.JSONDecodeError, AttributeError):
        return None


def lives(owner: dict, path: Path) -> bool:
    me = myself()
    if owner["job"] and owner["job"] == me["job"]:
        return False
    if owner["host"] == me["host"] and os.name == "posix":
        with suppress(PermissionError):  # the process of another user, which lives
            try:
                os.kill(owner["process"], 0)
            except ProcessLookupError:
                return False
        return owner["started"] == start_of(owner["process"])
    parallel.say(f"{path}: waiting for a sign of life of {owner['host']}")
    then, end = sign(path), time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < end:  # by the file's own times: clocks of hosts differ
        if sign(path) != then:
            return path.exists()
        time.sleep(1)
    return False


def sign(path: Path) -> int | None:
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return None


def give_signs(path: Path, ended: threading.Event) -> None:
    while not ended.wait(SIGN_SECONDS):
        with suppress(OSError):  # a file system that is away for a while; the run itself will tell
            os.utime(path)
