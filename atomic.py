"""Write files atomically, beside their final name, flushed to disk, then renamed, so that they are complete or absent;
and record which files of a folder the project wrote, so that it does not read them as data.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OUTPUTS = ".outputs"  # in each folder: names of what the project wrote there and could take for data, one per line


@contextmanager
def replacing(path: str | os.PathLike, previous: str | os.PathLike | None = None) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; the file written there becomes `path` when the block ends.

    If the block raises, `path` keeps its content and the temporary file is removed. If the process is killed, `path`
    is complete, old or new, and a temporary file `.<name>.<process>.tmp` may be left.

    Args:
        previous: path in the same folder under which the replaced file is kept, as a hard link.

    Raises:
        OSError: the disk is full, or the folder is not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            Path(previous).unlink(missing_ok=True)
            os.link(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # other systems cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a small text file in UTF-8; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def mark_output(path: str | os.PathLike) -> None:
    """Note in the folder of `path`, which exists, that the project writes this file or folder there.

    Call it before writing: a file that a killed process leaves behind is then marked too.

    Raises:
        OSError: the folder is not writable.
    """
    folder, name = os.path.split(os.path.abspath(path))
    if os.fsencode(name) not in outputs_in(folder):
        with open(os.path.join(folder, OUTPUTS), "ab") as file:
            file.write(os.fsencode(name) + b"\n")


def outputs_in(folder: str | bytes | os.PathLike) -> set[bytes]:
    """Names of the files and folders in `folder` that `mark_output` was called for."""
    try:
        return set((Path(os.fsdecode(folder)) / OUTPUTS).read_bytes().splitlines())
    except OSError:
        return set()


def check_own(path: str | os.PathLike) -> None:
    """Raise FileExistsError for a file that isn't known to be the project's: an input, or somebody's only copy."""
    folder, name = os.path.split(os.path.abspath(path))
    if os.path.isfile(path) and os.fsencode(name) not in outputs_in(folder):
        raise FileExistsError(errno.EEXIST, "exists, and is not known to be written by this project")
