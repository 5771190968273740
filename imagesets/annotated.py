"""Images with a truth at every pixel, such as classes or depth: matched files, drawn images, and parts of a set."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from imagesets import decode, masks
from parallel import Refused

KEPT_SIDE = 128  # pixels; larger drawn images are drawn again at each use
KEPT = 2048  # drawn images


@dataclasses.dataclass(frozen=True)
class Annotated:
    """Item i: `load(i)` -> (image uint8 (C, height, width), truth (height, width))."""

    items: Sequence[Any]  # (image, truth) paths, or numbers of drawn images
    read: Callable[[Any], tuple[Tensor, np.ndarray]]
    size: Callable[[Any], tuple[int, int]]  # height and width of an item, without decoding it
    void: ClassVar[int]  # the truth of a pixel that is not judged

    def load(self, i: int) -> tuple[Tensor, np.ndarray]:
        """Raises Undecodable, with the file's name, for a broken file or an impossible truth."""
        return self.read(self.items[i])

    def subset(self, rows: Sequence[int]) -> Annotated:
        return dataclasses.replace(self, items=[self.items[i] for i in rows])


def drawn_size(side: int, item: Any) -> tuple[int, int]:
    return side, side


def size_of_pair(item: tuple[Path, Path]) -> tuple[int, int]:
    return masks.size(item[0], turned=True)


def open_layout(where: str, data_path: str, layouts: Sequence[tuple[Sequence[str], Callable]], drawn: str,
                *arguments: Any) -> list:
    """What the first layout makes of the folder that has all its files: `layout(where, folder, *arguments)`.

    Args:
        layouts: (patterns of the files and folders that tell a layout, the function that opens it).
        drawn: how drawn images are asked for, in the error.

    Raises:
        Refused: no layout fits.
    """
    folder = Path(os.path.expanduser(data_path))
    for has, layout in layouts:
        if all(any(folder.glob(name)) for name in has):
            return layout(where, folder, *arguments)
    known = ", ".join(" and ".join(name if "." in name else f"{name}/" for name in has) for has, _ in layouts)
    raise Refused(f"{where}: not a folder that this script knows; it needs {known}, or give {drawn}[:COUNT[xPIXELS]]")


def matched(
    where: str, images: Path, truths: Path, reading: decode.Reading, suffixes: Iterable[str] = masks.SUFFIXES,
    what: str = "mask",
) -> list[tuple[Path, Path]]:
    """Each image of a folder with the truth of its name."""
    by_name = masks.by_stem(where, truths, suffixes) if truths.is_dir() else {}
    listed = masks.by_stem(where, images, decode.suffixes(reading.in_chans))
    for stem, path in listed.items():
        if stem not in by_name:
            raise Refused(f"{where}: {path} has no {what} {truths / stem}.*; add it or remove the image")
    return [(path, by_name[stem]) for stem, path in listed.items()]


def plain_parts(where: str, folder: Path, names: tuple[str, str]) -> list[tuple[Path, Path]]:
    """The two folders `names` of train/ and of val/, or of the folder itself if it has neither."""
    parts = [folder / name for name in ("train", "val") if (folder / name).is_dir()] or [folder]
    for part in parts:
        if missing := [name for name in names if not (part / name).is_dir()]:
            raise Refused(f"{where}: no folder {part / missing[0]}; give {names[0]}/ and {names[1]}/ in train/ and in "
                          "val/")
    return [(part / names[0], part / names[1]) for part in parts]
