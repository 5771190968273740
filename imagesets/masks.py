"""Masks in files: read as labels of pixels, written with a palette, and paired with their pictures.

Shapes: C channels; label maps are integers (height, width), masks bool (height, width).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from imagesets import decode, shapes, sources

VOID = 255  # the label of pixels that nobody judges, in palette images of VOC and DAVIS
SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")  # JPEG changes labels
LAYOUTS = (("images", "masks"), ("JPEGImages", "SegmentationClass"))
VOC_LIST = Path("ImageSets", "Segmentation", "val.txt")


# ---- One file ----


def read_labels(path: str | os.PathLike) -> np.ndarray:
    """Integers (height, width): numbers of the palette, grey values, or for a colour image 1 where it isn't black.

    Raises:
        ValueError: "<name>: <reason>", for every file that isn't an image.
    """
    try:
        with decode.pillow_limits(decode.MAX_PIXELS), Image.open(path) as picture:
            if picture.mode in ("RGBA", "LA", "La", "RGBa"):  # where nothing is painted, colour says nothing
                picture = picture.convert("RGB" if picture.mode.startswith("RGB") else "L")
            labels = np.asarray(picture)
    except Exception as error:  # decoders raise all sorts
        raise ValueError(f"{path}: {decode.reason(error)}") from error
    return labels.any(axis=-1).astype(np.uint8) if labels.ndim == 3 else labels.astype(np.int32)


def palette() -> list[int]:
    """Colours of the labels 0 to 255, as VOC and DAVIS have them: red, green, blue one after the other.

    Bit k of a label's three lowest bits, three bits on after each step, is bit 7 - step of a colour.
    """
    colors = np.zeros((256, 3), int)
    for label in range(256):
        for step in range(8):
            for channel in range(3):
                colors[label, channel] |= (label >> (3 * step + channel) & 1) << (7 - step)
    return colors.ravel().tolist()


def write_labels(labels: np.ndarray, path: str | os.PathLike) -> None:
    """Labels 0 to 255 as a PNG with the palette; the folder is made when it isn't there."""
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(palette())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def size(path: str | os.PathLike, turned: bool = False) -> tuple[int, int]:
    """Height and width of an image, from its header; `turned` as its EXIF data say, which pictures are and masks not.

    Raises:
        ValueError: "<name>: <reason>".
    """
    try:
        with decode.pillow_limits(decode.MAX_PIXELS), Image.open(path) as picture:
            width, height = picture.size
            return (width, height) if turned and decode.orientation(picture) >= 5 else (height, width)
    except Exception as error:
        raise ValueError(f"{path}: {decode.reason(error)}") from error


def check_size(picture: Path, mask: Path, where: str) -> None:
    expected, found = size(picture, turned=True), size(mask)
    if expected != found:
        raise ValueError(f"{where}: {mask} is {found[1]} x {found[0]} pixels and its picture {expected[1]} x "
                         f"{expected[0]}; give masks of the pictures' own size")


# ---- Pictures with the masks of their foreground ----


class MaskedPictures(NamedTuple):
    """Item i: its name, and load(i) -> (picture uint8 (C, height, width), foreground, ignored pixels)."""

    names: list[str]
    load: Callable[[int], tuple[Tensor, np.ndarray, np.ndarray]]
    notes: list[str]


def is_drawn(data_path: str) -> bool:
    """Whether it names drawn pictures, well or badly, and no folder."""
    return re.fullmatch(r"shapes(:.*)?", data_path) is not None


def open_masked(data_path: str, in_chans: int = 3, flag: str = "--data_path") -> MaskedPictures:
    """The pictures and masks that `data_path` names.

    shapes[:COUNT[xPIXELS]]     drawn pictures that no training set contains
    folder with images/, masks/ every value of a mask but 0 is foreground
    folder of VOC               JPEGImages/ and SegmentationClass/: all classes are foreground, 255 is ignored; the
                                pictures of ImageSets/Segmentation/val.txt where that is there

    A mask has its picture's name, with a suffix of its own. Without a list, pictures without a mask are left out; so
    are those without foreground, of which there is no Jaccard index. All masks are read once for that.

    Raises:
        ValueError, OSError: one line that names the flag, the value and the remedy; a file that can't be read or is of
            another size is named.
    """
    where = f"{flag} {data_path!r}"
    if is_drawn(data_path):
        drawn = sources.open_images(data_path, in_chans=in_chans, flag=flag)
        held_out = sources.Shapes(sources.VAL_START, len(drawn), drawn.size, in_chans)
        return MaskedPictures([held_out.name(i) for i in range(len(drawn))], partial(load_drawn, held_out), [])
    folder = Path(os.path.expanduser(data_path))
    layout = next((names for names in LAYOUTS if all((folder / name).is_dir() for name in names)), None)
    if layout is None:
        raise FileNotFoundError(f"{where}: give a folder with images/ and masks/, or JPEGImages/ and "
                                "SegmentationClass/, or shapes[:COUNT[xPIXELS]]")
    voc = layout != LAYOUTS[0]
    pairs, notes = pair(where, folder, layout, folder / VOC_LIST if voc else None, decode.suffixes(in_chans))
    for picture, mask in pairs:
        check_size(picture, mask, where)
    shown = [(picture, mask) for picture, mask in pairs if read_foreground(mask, voc)[0].any()]
    if not shown:
        raise ValueError(f"{where}: every mask is empty; give images with a foreground")
    if empty := len(pairs) - len(shown):
        notes.append(f"{empty} of {len(pairs)} images have no foreground, so no Jaccard index: left out")
    return MaskedPictures([str(p) for p, _ in shown], partial(load_pair, shown, voc, in_chans), notes)


def pair(where: str, folder: Path, layout: tuple[str, str], names: Path | None, suffixes: Iterable[str]
         ) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Pictures and masks of one name: those that the file `names` lists, or all there are; and what to know of them."""
    pictures, masks = (by_stem(folder / name, kinds) for name, kinds in zip(layout, (suffixes, SUFFIXES), strict=True))
    both, notes = [stem for stem in pictures if stem in masks], []
    if names and names.is_file():
        both = names.read_text().split()
        for stem in both:
            if stem not in pictures or stem not in masks:
                missing = Path(layout[stem in pictures], stem)
                raise FileNotFoundError(f"{where}: {names} lists {stem}, but there is no {missing}.*; add the file or "
                                        "take the name out")
    elif len(both) < len(pictures):
        notes.append(f"{len(pictures) - len(both)} of {len(pictures)} pictures have no mask and are left out")
    if not both:
        raise FileNotFoundError(f"{where}: no picture of {layout[0]}/ has a mask of its name in {layout[1]}/; masks "
                                f"are files of {', '.join(SUFFIXES)}")
    return [(pictures[stem], masks[stem]) for stem in both], notes


def by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """A folder's files of some suffixes by their names without suffix, in the order of the names."""
    return {path.stem: path for path in sorted(folder.iterdir())
            if path.suffix.lower() in suffixes and not path.name.startswith(".")}


def load_pair(pairs: list[tuple[Path, Path]], voc: bool, in_chans: int, i: int
              ) -> tuple[Tensor, np.ndarray, np.ndarray]:
    picture, mask = pairs[i]
    return decode.decode(picture, in_chans), *read_foreground(mask, voc)


def read_foreground(path: Path, voc: bool) -> tuple[np.ndarray, np.ndarray]:
    """Foreground and ignored pixels of a mask: bool (height, width) each."""
    labels = read_labels(path)
    ignored = (labels == VOID) & voc
    return (labels != 0) & ~ignored, ignored


def load_drawn(drawn: sources.Shapes, i: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    picture, _, mask = shapes.draw(drawn.start + i, drawn.size)
    return decode.from_array(picture, drawn.in_chans), mask, np.zeros_like(mask)
