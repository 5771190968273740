"""Masks in files: read as labels of pixels, written with a palette, and paired with their images.

Shapes: C channels; label maps are integers (height, width), masks bool (height, width).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

import atomic
from imagesets import decode, deep, lists, shapes, sources
from parallel import Refused

VOID = 255  # the label of pixels that are not judged, in palette images of VOC and DAVIS
SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")  # JPEG changes labels
LAYOUTS = (("images", "masks"), ("JPEGImages", "SegmentationClass"))
VOC_LIST = Path("ImageSets", "Segmentation", "val.txt")


# ---- One file ----


def read_values(path: str | os.PathLike) -> np.ndarray:
    """The values that a mask's file stores: (height, width), or (height, width, channels) for a colour image.

    Of 16-bit colour they are 255 where the stored values aren't 0.

    Raises:
        Undecodable: the file isn't an image, or is one that can't be read to its last bit.
    """
    return read_stored(path)[0]


def read_stored(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """The values, and the colours of palette indices: uint8 (colours, 3), or None for a file without a palette."""
    try:
        with decode.pillow_limits(decode.MAX_PIXELS), Image.open(path) as mask:
            step, file = deep.grey_step(mask), deep.declared(mask, (0, 1))
            if file.deep_colour:  # of which Pillow reads the high byte
                if "LA" in (mask.mode, str(mask.tile[0][3])[:2]):  # Pillow's mode of 16-bit grey with alpha is RGBA
                    raise decode.Undecodable("16 bits and transparency; save it without transparency")
                return np.asarray(deep.eight_bit(mask, file, (0, 1)))[..., :3], None
            if file.inverted and mask.mode != "1":
                raise decode.Undecodable("grey TIFF whose white is 0 (WhiteIsZero): it is uncertain whether 0 or black "
                                         "is the background; save it as PNG")
            if mask.mode in ("RGBA", "LA", "La", "RGBa"):  # the colour of transparent pixels is arbitrary
                mask = mask.convert("RGB" if mask.mode.startswith("RGB") else "L")
            if mask.mode not in ("P", "PA"):
                values = np.asarray(mask)
                if values.dtype.kind == "f" and not (values == np.floor(values)).all():
                    raise decode.Undecodable("values that are not whole numbers; round them")
                return values // step if step > 1 else values, None
            colours = np.array(mask.getpalette(), np.uint8).reshape(-1, 3)
            return np.asarray(mask.getchannel("P")), colours
    except Exception as error:  # on broken bytes, decoders raise nearly anything
        raise decode.Undecodable(f"{path}: {decode.reason(error)}") from error


def read_labels(path: str | os.PathLike) -> np.ndarray:
    """Integers (height, width): palette indices, grey values, or for a colour image 1 where it isn't black.

    Raises:
        Refused: the file isn't an image, or by the colours of its palette another part than index 0 is black, as a
            reduction to few colours leaves it, so that the background is uncertain.
    """
    try:
        values, colours = read_stored(path)
    except decode.Undecodable as error:
        raise Refused(f"{error}; replace the file") from error
    if colours is not None and colours[:1].any():
        indices = np.unique(values)
        black = indices[indices < len(colours)]
        black = black[~colours[black].any(axis=-1)]
        if 0 in indices or black.size:
            raise Refused(f"{path}: index 0 of its palette is the colour {tuple(colours[0].tolist())}, so it is "
                          "uncertain whether index 0 or black is the background; save it as grey, with 0 there, or "
                          "with black as the palette's first colour")
    return values.any(axis=-1).astype(np.uint8) if values.ndim == 3 else values.astype(np.int32)


def read_image(path: Path, reading: decode.Reading, where: str) -> Tensor:
    """uint8 (C, height, width). Raises Refused, with `where`, for a file that can't be decoded."""
    try:
        return decode.decode(path, **reading.decoding())
    except decode.Undecodable as error:
        raise Refused(f"{where}: {error}; replace the file") from error


def palette() -> list[int]:
    """Colours of the labels 0 to 255 as in VOC and DAVIS: 256 triples (red, green, blue), flattened.

    Bits 3 s, 3 s + 1 and 3 s + 2 of a label are bit 7 - s of its red, green and blue.
    """
    labels, channels, steps = np.ogrid[:256, :3, :8]
    bits = labels >> (3 * steps + channels) & 1
    return (bits << (7 - steps)).sum(axis=-1).ravel().tolist()


def write_labels(labels: np.ndarray, path: str | os.PathLike) -> None:
    """Write labels 0 to 255 (height, width) as a PNG with the palette; makes the folder."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(palette())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic.mark_output(path)
    with atomic.replacing(path) as temporary:
        image.save(temporary, format="PNG")


def size(path: str | os.PathLike, turned: bool = False) -> tuple[int, int]:
    """Height and width of an image, from its header.

    Args:
        turned: apply the EXIF orientation, as is done with images and not with masks.

    Raises:
        Refused: the file isn't an image.
    """
    try:
        with decode.pillow_limits(decode.MAX_PIXELS), Image.open(path) as image:
            width, height = image.size
            turned = turned and image.format != "TIFF"  # Pillow itself turns TIFF files, masks too, as it opens them
            return (width, height) if turned and decode.orientation(image) >= 5 else (height, width)
    except Exception as error:
        raise Refused(f"{path}: {decode.reason(error)}; replace the file") from error


def check_size(image: Path, mask: Path, where: str, what: str = "masks", measure: Callable = size) -> None:
    """Raises Refused if a mask, or another map that `measure` measures, has another size than its image."""
    expected, actual = size(image, turned=True), measure(mask)
    if expected != actual:
        raise Refused(f"{where}: {mask} is {actual[1]} x {actual[0]} pixels and its image {expected[1]} x "
                      f"{expected[0]}; give {what} of the images' own size")


# ---- Images with masks of their foreground ----


class MaskedImages(NamedTuple):
    """Item i: its name, its (height, width), and load(i) -> (image uint8 (C, height, width), foreground, ignored
    pixels)."""

    names: list[str]
    sizes: list[tuple[int, int]]
    load: Callable[[int], tuple[Tensor, np.ndarray, np.ndarray]]
    notes: list[str]


def is_drawn(data_path: str, kinds: Iterable[str] = ("shapes",)) -> bool:
    """Whether it names drawn images of one of these kinds, correctly or not, rather than a folder."""
    return data_path.partition(":")[0] in kinds


def open_masked(data_path: str, reading: decode.Reading = decode.PLAIN, flag: str = "--data_path") -> MaskedImages:
    """The images and masks that `data_path` names.

    shapes[:COUNT[xPIXELS]]     drawn images that no training set contains
    folder with images/, masks/ all values of a mask but 0 are foreground, of a colour image all but black; a palette
                                has to begin with black
    folder of VOC               JPEGImages/ and SegmentationClass/: all classes are foreground, 255 is ignored; the
                                images of ImageSets/Segmentation/val.txt if that file exists

    A mask has its image's name, with its own suffix. Without a list, images without a mask are left out; so are
    images without foreground, whose Jaccard index is undefined. All masks are read once to find them.

    Raises:
        Refused: no such images and masks, a file that can't be read, or a mask of another size than its image.
    """
    where = f"{flag} {data_path!r}"
    if is_drawn(data_path):
        drawn = sources.open_images(data_path, flag=flag, **reading.decoding())
        held_out = sources.Shapes(sources.VAL_START, len(drawn), drawn.size, reading.in_chans)
        names, sizes = [held_out.name(i) for i in range(len(drawn))], [(drawn.size, drawn.size)] * len(drawn)
        return MaskedImages(names, sizes, partial(load_drawn, held_out), [])
    folder = Path(os.path.expanduser(data_path))
    layout = next((names for names in LAYOUTS if all((folder / name).is_dir() for name in names)), None)
    if layout is None:
        raise Refused(f"{where}: give a folder with images/ and masks/, or JPEGImages/ and SegmentationClass/, or "
                      "shapes[:COUNT[xPIXELS]]")
    voc = layout != LAYOUTS[0]
    pairs, notes = pair(where, folder, layout, folder / VOC_LIST if voc else None, decode.suffixes(reading.in_chans))
    shown, sizes = [], []
    for image, mask in pairs:
        check_size(image, mask, where)
        foreground, _ = read_foreground(mask, voc)
        if foreground.any():
            shown.append((image, mask))
            sizes.append(foreground.shape)
    if not shown:
        raise Refused(f"{where}: every mask is empty; give images with a foreground")
    if empty := len(pairs) - len(shown):
        notes.append(f"{empty} of {len(pairs)} images have no foreground, so no Jaccard index: left out")

    def load(i: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
        image, mask = shown[i]
        return read_image(image, reading, where), *read_foreground(mask, voc)

    return MaskedImages([str(image) for image, _ in shown], sizes, load, notes)


def pair(
    where: str, folder: Path, layout: tuple[str, str], names: Path | None, suffixes: Iterable[str]
) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Images and masks of the same name, all or those that the file `names` lists; and notes for the report."""
    images, masks = by_stem(where, folder / layout[0], suffixes), by_stem(where, folder / layout[1], SUFFIXES)
    both, notes = [stem for stem in images if stem in masks], []
    if names and names.is_file():
        both = list(dict.fromkeys(lists.read_text(names).split()))
        for stem in both:
            if stem not in images or stem not in masks:
                missing = Path(layout[stem in images], stem)
                raise Refused(f"{where}: {names} lists {stem}, but there is no {missing}.*; add the file or take the "
                              "name out")
    elif len(both) < len(images):
        notes.append(f"{len(images) - len(both)} of {len(images)} images have no mask and are left out")
    if not both:
        raise Refused(f"{where}: no image of {layout[0]}/ has a mask of its name in {layout[1]}/; masks are files of "
                      f"{', '.join(SUFFIXES)}")
    return [(images[stem], masks[stem]) for stem in both], notes


def by_stem(
    where: str, folder: Path, suffixes: Iterable[str], left_out: Container[bytes] = ()
) -> dict[str, Path]:
    """A folder's files with one of the suffixes, by name without suffix, in the order of the names.

    Raises:
        Refused: two of them have one name.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and path.name[0] != "." and os.fsencode(path.name) not in left_out:
            if files.setdefault(path.stem, path) != path:
                raise Refused(f"{where}: {files[path.stem]} and {path.name} have the same name but for the suffix, by "
                              "which images and masks are matched; remove one")
    return files


def read_foreground(path: Path, voc: bool) -> tuple[np.ndarray, np.ndarray]:
    """Foreground and ignored pixels of a mask: bool (height, width) each."""
    labels = read_labels(path)
    ignored = (labels == VOID) & voc
    return (labels != 0) & ~ignored, ignored


def load_drawn(drawn: sources.Shapes, i: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    image, _, mask = shapes.draw(drawn.start + i, drawn.size)
    return decode.from_array(image, drawn.in_chans), mask, np.zeros_like(mask)
