"""A lock between the processes of a host."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Wait until no other process has `path` locked, and hold the lock during the block; the file is made if needed.

    The system releases the lock when the process ends, however it ends.

    Raises:
        OSError: the file can't be written.
    """
    with open(path, "a") as file:
        lock(file.fileno())
        yield


def lock(descriptor: int) -> None:
    """Lock an open file for this process alone, until it is closed."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    os.lseek(descriptor, 0, os.SEEK_SET)  # the lock is of one byte, from the position on
    while True:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            return
        except PermissionError:  # another process has it; LK_LOCK would give up after ten tries
            time.sleep(0.2)
