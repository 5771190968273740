"""HEIF files (.heic of phones), where pillow-heif is installed: the primary image of each, turned as the file says."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import BinaryIO

SUFFIXES = (".heic", ".heif", ".hif")
REMEDY = "pip install pillow-heif to read HEIF files"
BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # ISO/IEC 23008-12, 10


def installed() -> bool:
    return find_spec("pillow_heif") is not None


@cache
def register() -> None:
    """Let Pillow read HEIF files in this process, if pillow-heif is installed."""
    if installed():
        import pillow_heif

        pillow_heif.register_heif_opener()


def is_heif(file: BinaryIO) -> bool:
    """Whether it starts as a HEIF file that is no AVIF file. Goes back to the start."""
    start = file.read(64)
    file.seek(0)
    return start[4:8] == b"ftyp" and start[8:12] in BRANDS and b"avif" not in start
