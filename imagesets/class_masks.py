"""Images whose pixels have classes: folders of images and masks, VOC 2012, ADE20K, Cityscapes, and drawn images.

Shapes: C channels; labels are uint8 (height, width): the number of a class, or 255 where a pixel is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from imagesets import decode, lists, masks, scenes, shapes, sources
from imagesets.annotated import (
    KEPT,
    KEPT_SIDE,
    Annotated,
    drawn_size,
    matched,
    open_layout,
    plain_parts,
    size_of_pair,
)
from imagesets.masks import VOID
from parallel import Refused

UNKNOWN = -1  # a value that a mask of this layout must not have
PLAIN = ("images", "masks")  # the folders of images and of masks, also in train/ and val/
NAMES = "classes.txt"  # one name per line, class 0 first

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
ADE_CLASSES = 150
ADE_NAMES = "objectInfo150.txt"
CITYSCAPES_CLASSES = {  # the 19 classes that are evaluated, by their number in *_labelIds.png; all others are ignored
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}


@dataclass(frozen=True)
class ClassMasks(Annotated):
    """Item i: `load(i)` -> (image uint8 (C, height, width), labels uint8 (height, width))."""

    classes: list[str]
    zero: str = "background"  # what is not an object: the meaning of class 0, "" if it is a class like the others
    void: ClassVar[int] = VOID


def open_class_masks(
    data_path: str, val_data_path: str = "", reading: decode.Reading = decode.PLAIN, foreground: bool = False,
    flag: str = "--data_path",
) -> list[ClassMasks]:
    """Training images and, if the data have any, test images.

    shapes[:COUNT[xPIXELS]]      COUNT drawn images, and COUNT / 4 others: class 0 is background, the others are the
                                 kinds of objects; scenes[:COUNT[xPIXELS]]: the same with several objects per image
    folder with train/, val/     each with images/ and masks/; or a folder with these two and no test images. A mask has
                                 its image's name, and is a palette or grey image of class numbers, 255 where a pixel is
                                 ignored. classes.txt names the classes; without it there are as many as the largest
                                 number says
    VOC 2012                     JPEGImages/, SegmentationClass/ and the lists in ImageSets/Segmentation/
    ADE20K                       ADEChallengeData2016 with images/training/ and annotations/training/: 0 is ignored, 1
                                 to 150 are the classes
    Cityscapes                   leftImg8bit/train/CITY/ and gtFine/train/CITY/*_gtFine_labelIds.png: 19 classes

    Args:
        val_data_path: a folder with images/ and masks/, or drawn images: test images from elsewhere.
        foreground: two classes, background (0) and object (all others).
        flag: how errors name `data_path`.

    Raises:
        Refused: no such data; images and masks that don't fit; classes out of range.
    """
    if val_data_path:
        parts = [open_parts(data_path, reading, flag)[0], *open_parts(val_data_path, reading, "--val_data_path")[-1:]]
    else:
        parts = open_parts(data_path, reading, flag)
    classes = max((part.classes for part in parts), key=len)
    if any(part.classes != classes[: len(part.classes)] for part in parts):
        raise Refused(f"--val_data_path {val_data_path!r}: its classes differ from those of {flag}; give images "
                      "with the same classes")
    if foreground and not parts[0].zero:
        raise Refused(f"--foreground with {flag} {data_path!r}: its class 0 is not the background; leave the flag "
                      "out")
    if foreground:
        parts = [replace(part, read=partial(read_foreground, part.read)) for part in parts]
        classes = ["background", "object"]
    if len(classes) < 2:
        raise Refused(f"{flag} {data_path!r}: its masks hold one class, {classes[0]!r} ({VOID} is ignored); give masks "
                      "with the number of a class in each pixel, 0 and 1 for two classes")
    return [replace(part, classes=list(classes)) for part in parts]


def open_parts(data_path: str, reading: decode.Reading, flag: str = "--data_path") -> list[ClassMasks]:
    """Training and test images, or one part that is both, as `data_path` has them."""
    where = f"{flag} {data_path!r}"
    if masks.is_drawn(data_path, DRAW):
        return [drawn(data_path, split, reading, flag) for split in ("train", "val")]
    return open_layout(where, data_path, LAYOUTS, "shapes or scenes", reading)


def read_foreground(read: Callable, item: Any) -> tuple[Tensor, np.ndarray]:
    image, labels = read(item)
    return image, np.where(labels == VOID, labels, labels > 0).astype(np.uint8)


# ---- Drawn images ----


def drawn(data_path: str, split: str, reading: decode.Reading, flag: str) -> ClassMasks:
    images = sources.open_images(data_path, split, flag=flag, **reading.decoding())
    draw = draw_kept if images.size <= KEPT_SIDE else draw_classes
    return ClassMasks(range(images.start, images.start + len(images)),
                      partial(draw, images.kind, images.size, reading.in_chans), partial(drawn_size, images.size),
                      ["background", *shapes.KINDS])


def draw_classes(kind: str, size: int, in_chans: int, index: int) -> tuple[Tensor, np.ndarray]:
    image, labels = DRAW[kind](index, size)
    return decode.from_array(image, in_chans), labels.astype(np.uint8)


@lru_cache(maxsize=KEPT)  # at most 128 MiB
def draw_kept(kind: str, size: int, in_chans: int, index: int) -> tuple[Tensor, np.ndarray]:
    return draw_classes(kind, size, in_chans, index)


def shape_classes(index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of the object have the image's class + 1."""
    image, label, mask = shapes.draw(index, size)
    return image, mask * (label + 1)


def scene_classes(index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of an object have its kind + 1."""
    scene = scenes.draw(index, size)
    kinds = np.array([*(thing.kind + 1 for thing in scene.objects), 0])  # the owner -1 is the background
    return scene.image, kinds[scene.owner]


DRAW = {"shapes": shape_classes, "scenes": scene_classes}


# ---- Files ----


def read_pair(numbers: np.ndarray, reading: decode.Reading, item: tuple[Path, Path]) -> tuple[Tensor, np.ndarray]:
    """An image and its labels; `numbers` (256,) are the classes that the values of its mask stand for."""
    return decode.decode(item[0], **reading.decoding()), read_classes(item[1], numbers)


def read_classes(path: Path, numbers: np.ndarray) -> np.ndarray:
    values = masks.read_values(path)
    if values.ndim != 2:
        raise decode.Undecodable(f"{path}: a colour image; give a palette or grey image of class numbers")
    values = values.astype(np.int64)
    labels = numbers[np.clip(values, 0, 255)]
    wrong = (values < 0) | (values > 255) | (labels == UNKNOWN)
    if wrong.any():
        raise decode.Undecodable(f"{path}: value {values[wrong][0]} is none of the {numbers[numbers != VOID].max() + 1}"
                                 f" classes, from 0, and not {VOID} for ignored")
    return labels.astype(np.uint8)


def class_numbers(count: int) -> np.ndarray:
    """Masks that store the classes 0 to count - 1 themselves, and VOID."""
    numbers = np.full(256, UNKNOWN)
    numbers[:count] = range(count)
    numbers[VOID] = VOID
    return numbers


def pairs_of_files(
    where: str, pairs: list[tuple[Path, Path]], classes: Sequence[str], numbers: np.ndarray, reading: decode.Reading,
    zero: str = "background",
) -> ClassMasks:
    if not pairs:
        raise Refused(f"{where}: no images with masks in it; give a folder as its publisher packed it")
    for image, mask in pairs:
        masks.check_size(image, mask, where)
    return ClassMasks(pairs, partial(read_pair, numbers, reading), size_of_pair, list(classes), zero)


# ---- Layouts ----


def open_plain(where: str, folder: Path, reading: decode.Reading) -> list[ClassMasks]:
    """images/ and masks/, or train/ and val/ with both."""
    pairs = [matched(where, *part, reading) for part in plain_parts(where, folder, PLAIN)]
    named = lists.read_text(folder / NAMES).split("\n") if (folder / NAMES).is_file() else []
    names = [line.strip() for line in named if line.strip()]
    if len(names) > VOID:
        raise Refused(f"{where}: {NAMES} names {len(names)} classes; at most {VOID} are possible")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise Refused(f"{where}: {NAMES} names two classes {twice[0]!r}; give them different names")
    numbers, largest = class_numbers(len(names) or VOID), 0
    for _, mask in (pair for part in pairs for pair in part):
        try:
            labels = read_classes(mask, numbers)
        except decode.Undecodable as error:
            raise Refused(f"{where}: {error}; replace the file") from error
        largest = max(largest, int(labels[labels != VOID].max(initial=0)))
    names = names or ["background", *(f"class {i}" for i in range(1, largest + 1))]
    return [pairs_of_files(where, part, names, numbers, reading) for part in pairs]


def open_voc(where: str, folder: Path, reading: decode.Reading) -> list[ClassMasks]:
    parts = []
    for split in ("train", "val"):
        names = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not names.is_file():
            raise Refused(f"{where}: no list {names}; give the folder VOC2012 as it was unpacked")
        pairs, _ = masks.pair(where, folder, masks.LAYOUTS[1], names, decode.suffixes(reading.in_chans))
        parts.append(pairs_of_files(where, pairs, VOC_CLASSES, class_numbers(len(VOC_CLASSES)), reading))
    return parts


def open_ade(where: str, folder: Path, reading: decode.Reading) -> list[ClassMasks]:
    """Files store 0 for other objects, which are ignored, and class + 1."""
    numbers = np.full(256, UNKNOWN)
    numbers[0], numbers[1 : ADE_CLASSES + 1] = VOID, range(ADE_CLASSES)
    names = [f"class {i + 1}" for i in range(ADE_CLASSES)]
    if (folder / ADE_NAMES).is_file():  # a head line, then columns, of which the last is the name
        lines = [line for line in lists.read_text(folder / ADE_NAMES).splitlines()[1:] if line.strip()]
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
        if len(names) != ADE_CLASSES:
            raise Refused(f"{where}: {ADE_NAMES} names {len(names)} classes, not {ADE_CLASSES}; restore or remove it")
        names = [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return [pairs_of_files(where, matched(where, folder / "images" / part, folder / "annotations" / part, reading),
                           names, numbers, reading, zero="") for part in ("training", "validation")]


def open_cityscapes(where: str, folder: Path, reading: decode.Reading) -> list[ClassMasks]:
    numbers = np.full(256, VOID)
    numbers[list(CITYSCAPES_CLASSES)] = range(len(CITYSCAPES_CLASSES))
    parts = []
    for split in ("train", "val"):
        pairs = []
        for image in sorted((folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")):
            name = image.name.replace("_leftImg8bit", "_gtFine_labelIds")
            mask = folder / "gtFine" / split / image.parent.name / name
            if not mask.is_file():
                raise Refused(f"{where}: {image} has no mask {mask}; add it or remove the image")
            pairs.append((image, mask))
        parts.append(pairs_of_files(where, pairs, CITYSCAPES_CLASSES.values(), numbers, reading, zero=""))
    return parts


LAYOUTS = (  # the folders that tell a layout, and the function that opens it
    (("leftImg8bit", "gtFine"), open_cityscapes),
    (("images/training", "annotations/training"), open_ade),
    (masks.LAYOUTS[1], open_voc),
    (("train",), open_plain),
    (PLAIN, open_plain),
)
