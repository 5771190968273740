"""Images with depth maps: folders of images and depths, NYU Depth v2, KITTI, and drawn scenes.

Shapes: C channels; depth maps are float32 (height, width) in metres, 0 where there is no depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from imagesets import decode, lists, masks, scenes, sources
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
from imagesets.decode import Undecodable
from parallel import Refused

PLAIN = ("images", "depth")  # the folders of images and of depth maps, also in train/ and val/
SUFFIXES = (".png", ".npy")
MILLIMETRES = 1000.0  # units per metre of depth maps in integers, unless a flag says otherwise
MIN_DEPTH = 0.001  # metres
LARGEST_MEASURED = 50_000.0  # metres; above it lie marks of the sky such as 65504 (float16's largest value) and 1e10
NYU_MAX, NYU_SCALE, NYU_LISTS = 10.0, 1000.0, ("nyu_train.txt", "nyu_test.txt")
KITTI_MAX, KITTI_SCALE, KITTI_LISTS = 80.0, 256.0, ("kitti_eigen_train.txt", "kitti_eigen_test.txt")
CAMERAS = ("image_02", "image_03")  # KITTI's left and right colour camera
MISSING = "None"  # in the lists: an image without depth


class Limits(NamedTuple):
    """How depth is read. 0 takes the layout's own value, or for the largest depth of a folder the data's."""

    scale: float = 0.0  # units per metre of integer files
    least: float = MIN_DEPTH  # metres; depths of exactly this and less are left out
    largest: float = 0.0  # metres; depths of exactly this and more are left out


@dataclass(frozen=True)
class DepthMaps(Annotated):
    """Item i: `load(i)` -> (image uint8 (C, height, width), depth float32 (height, width))."""

    limits: Limits
    void: ClassVar[int] = 0

    def load(self, i: int) -> tuple[Tensor, np.ndarray]:
        """Depths outside of the limits are 0. Raises Undecodable, with the file's name, if that is all of them."""
        image, depth = super().load(i)
        return image, within(depth, self.limits, self.items[i])


def open_depth_maps(
    data_path: str, val_data_path: str = "", reading: decode.Reading = decode.PLAIN, limits: Limits | None = None,
    flag: str = "--data_path",
) -> list[DepthMaps]:
    """Training images and, if the data have any, test images.

    scenes[:COUNT[xPIXELS]]      COUNT drawn scenes, and COUNT / 4 others; the sky has no depth
    folder with train/, val/     each with images/ and depth/; or a folder with these two and no test images. A depth
                                 map has its image's name and size. It is a 16-bit PNG file of integers, 1000 per metre
                                 unless the limits say otherwise, or a .npy file of floats in metres. 0, and in .npy
                                 files what is not finite in float32, is no depth
    NYU Depth v2                 nyu_train.txt and nyu_test.txt with a line "image depth focal_length" per image; or
                                 sync/ for training and official_splits/test/ for the test, with folders of
                                 rgb_NUMBER.jpg and sync_depth_NUMBER.png. 1000 per metre, up to 10 m
    KITTI                        DATE/DRIVE/image_02/data/ of the raw data, and train/DRIVE/ and val/DRIVE/ of the
                                 annotated depth, each with proj_depth/groundtruth/image_02/; image_03 likewise. With
                                 kitti_eigen_train.txt and kitti_eigen_test.txt, lines "image depth focal_length", these
                                 images. 256 per metre, up to 80 m

    Args:
        val_data_path: test images from elsewhere.
        flag: how errors name `data_path`.

    Raises:
        Refused: no such data; images and depth maps that don't fit; no depth within the limits.
    """
    limits = limits or Limits()
    parts = open_parts(data_path, reading, limits, flag)
    if val_data_path:
        parts = [parts[0], *open_parts(val_data_path, reading, limits, "--val_data_path")[-1:]]
    common = parts[0].limits
    if not common.least < common.largest:
        raise Refused(f"--min_depth {common.least:g}: not less than the largest depth, {common.largest:g} m; lower it")
    return [replace(part, limits=common) for part in parts]


def open_parts(data_path: str, reading: decode.Reading, limits: Limits, flag: str = "--data_path") -> list[DepthMaps]:
    """Training and test images, or one part that is both, as `data_path` has them."""
    where = f"{flag} {data_path!r}"
    if masks.is_drawn(data_path, ("scenes",)):
        return [drawn(data_path, split, reading, limits, flag) for split in ("train", "val")]
    return open_layout(where, data_path, LAYOUTS, "scenes", reading, limits)


# ---- Drawn scenes ----


def drawn(data_path: str, split: str, reading: decode.Reading, limits: Limits, flag: str) -> DepthMaps:
    images = sources.open_images(data_path, split, flag=flag, **reading.decoding())
    draw = draw_kept if images.size <= KEPT_SIDE else draw_depth
    return DepthMaps(range(images.start, images.start + len(images)), partial(draw, images.size, reading.in_chans),
                     partial(drawn_size, images.size), limits._replace(largest=limits.largest or scenes.SKY))


def draw_depth(size: int, in_chans: int, index: int) -> tuple[Tensor, np.ndarray]:
    scene = scenes.draw(index, size)
    return decode.from_array(scene.image, in_chans), scene.depth


@lru_cache(maxsize=KEPT)  # at most 224 MiB
def draw_kept(size: int, in_chans: int, index: int) -> tuple[Tensor, np.ndarray]:
    return draw_depth(size, in_chans, index)


# ---- Files ----


def within(depth: np.ndarray, limits: Limits, item: Any) -> np.ndarray:
    valid = (depth > limits.least) & (depth < limits.largest)
    if not valid.any():
        name = item[1] if isinstance(item, tuple) else f"scenes[{item}]"
        stored = depth[depth > 0]
        if not stored.size:
            raise Undecodable(f"{name}: no depth at any pixel; remove the image")
        raise Undecodable(f"{name}: depths of {stored.min():g} to {stored.max():g} m, none between --min_depth "
                          f"{limits.least:g} and --max_depth {limits.largest:g}; correct these or --depth_scale")
    return np.where(valid, depth, np.float32(0))


def read_depth(path: Path, scale: float) -> np.ndarray:
    """Metres, float32 (height, width), 0 where there is no depth.

    Raises:
        Undecodable: not a 16-bit image of one channel, nor an array of floats; negative depths.
    """
    if path.suffix.lower() == ".npy":
        with decode.decoding(str(path)):
            values = np.load(path, allow_pickle=False)
        if values.ndim != 2 or values.dtype.kind != "f":
            raise Undecodable(f"{path}: {values.dtype} array {values.shape}; give floats (height, width) in metres, or "
                              "a 16-bit PNG file")
        with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite
            values = values.astype(np.float32)
        values, scale = np.where(np.isfinite(values), values, 0), 1.0
    else:
        values = masks.read_values(path)
        if values.ndim != 2 or values.dtype.itemsize < 2:
            kind = "a colour image" if values.ndim == 3 else f"of {8 * values.dtype.itemsize} bits"
            raise Undecodable(f"{path}: {kind}; give a 16-bit PNG file, or .npy in metres")
    if values.min() < 0:
        raise Undecodable(f"{path}: a depth of {values.min() / scale:g} m; store 0 where there is no depth")
    return (values / scale).astype(np.float32)


def read_pair(reading: decode.Reading, scale: float, item: tuple[Path, Path]) -> tuple[Tensor, np.ndarray]:
    return decode.decode(item[0], **reading.decoding()), read_depth(item[1], scale)


def depth_size(path: Path) -> tuple[int, ...]:
    """Height and width, from the file's head. Raises Refused for a file that can't be read."""
    if path.suffix.lower() != ".npy":
        return masks.size(path)
    try:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except Exception as error:  # on broken bytes, NumPy raises nearly anything
        raise Refused(f"{path}: {decode.reason(error)}; replace the file") from error
    return shape if len(shape) == 2 else (*shape, 0)[:2]


def pairs_of_files(where: str, pairs: list[tuple[Path, Path]], reading: decode.Reading, limits: Limits) -> DepthMaps:
    if not pairs:
        raise Refused(f"{where}: no images with depth in it; give a folder as its publisher packed it")
    for image, depth in pairs:
        masks.check_size(image, depth, where, "depth maps", depth_size)
    return DepthMaps(pairs, partial(read_pair, reading, limits.scale), size_of_pair, limits)


# ---- Layouts ----


def open_plain(where: str, folder: Path, reading: decode.Reading, limits: Limits) -> list[DepthMaps]:
    """images/ and depth/, or train/ and val/ with both. All depth maps are read once to check them."""
    limits = limits._replace(scale=limits.scale or MILLIMETRES)
    listed = [matched(where, *part, reading, SUFFIXES, "depth map") for part in plain_parts(where, folder, PLAIN)]
    parts = [pairs_of_files(where, pairs, reading, limits) for pairs in listed]
    try:
        largest = limits.largest or largest_depth(listed[0], limits.scale)
        limits = limits._replace(largest=largest)
        for pair in (pair for pairs in listed for pair in pairs):
            within(read_depth(pair[1], limits.scale), limits, pair)
    except Undecodable as error:
        raise Refused(f"{where}: {error}") from error
    return [replace(part, limits=limits) for part in parts]


def largest_depth(pairs: list[tuple[Path, Path]], scale: float) -> float:
    """The largest depth in metres, rounded up to the next centimetre, so that it is itself within the limits.

    Raises:
        Undecodable: it is more than LARGEST_MEASURED, and more likely a mark of pixels without depth.
    """
    largest = 0.0
    for _, path in pairs:
        depth = float(read_depth(path, scale).max())
        if depth > LARGEST_MEASURED:
            raise Undecodable(f"{path}: a depth of {depth:g} m; store 0 where there is no depth, or give --max_depth "
                              "METRES, from which on pixels are left out")
        largest = max(largest, depth)
    return (math.floor(100 * largest) + 1) / 100


def open_nyu(where: str, folder: Path, reading: decode.Reading, limits: Limits) -> list[DepthMaps]:
    limits = limits._replace(scale=limits.scale or NYU_SCALE, largest=limits.largest or NYU_MAX)
    if (folder / NYU_LISTS[0]).is_file():
        parts = [listed_pairs(where, folder / name, lambda image, depth: (folder / image, folder / depth))
                 for name in NYU_LISTS]
    else:
        parts = [nyu_folders(where, folder / part) for part in ("sync", "official_splits/test")]
    return [pairs_of_files(where, pairs, reading, limits) for pairs in parts]


def nyu_folders(where: str, folder: Path) -> list[tuple[Path, Path]]:
    pairs = []
    for image in sorted(folder.glob("*/rgb_*.jpg")):
        depth = image.with_name(image.stem.replace("rgb_", "sync_depth_") + ".png")
        if not depth.is_file():
            raise Refused(f"{where}: {image} has no depth map {depth}; add it or remove the image")
        pairs.append((image, depth))
    return pairs


def open_kitti(where: str, folder: Path, reading: decode.Reading, limits: Limits) -> list[DepthMaps]:
    limits = limits._replace(scale=limits.scale or KITTI_SCALE, largest=limits.largest or KITTI_MAX)
    if (folder / KITTI_LISTS[0]).is_file():
        depths = {path.name: path for part in ("train", "val") for path in (folder / part).glob("*")}

        def locate(image: str, depth: str) -> tuple[Path, Path]:
            drive, _, rest = depth.partition("/")
            return folder / image, depths.get(drive, folder / drive) / rest

        parts = [listed_pairs(where, folder / name, locate) for name in KITTI_LISTS]
    else:
        parts = [[pair for drive in sorted((folder / part).glob("*")) for camera in CAMERAS
                  for pair in kitti_drive(where, folder, drive, camera)] for part in ("train", "val")]
    return [pairs_of_files(where, pairs, reading, limits) for pairs in parts]


def kitti_drive(where: str, folder: Path, drive: Path, camera: str) -> list[tuple[Path, Path]]:
    """The frames of a drive that have annotated depth: the first and last ones don't."""
    date = drive.name[: len("2011_09_26")]
    pairs = []
    for depth in sorted((drive / "proj_depth" / "groundtruth" / camera).glob("*.png")):
        frame = folder / date / drive.name / camera / "data" / depth.name
        image = frame if frame.is_file() else frame.with_suffix(".jpg")
        if not image.is_file():
            raise Refused(f"{where}: {depth} has no image {frame}; unpack that drive of the raw data, or remove the "
                          "depth")
        pairs.append((image, depth))
    return pairs


def listed_pairs(
    where: str, path: Path, locate: Callable[[str, str], tuple[Path, Path]]
) -> list[tuple[Path, Path]]:
    """The pairs of a list with lines "image depth" or "image depth focal_length", without those whose depth is None."""
    if not path.is_file():
        raise Refused(f"{where}: no list {path}; add it, or remove the other one to use the folders")
    pairs = []
    for line in lists.read_text(path).splitlines():
        image, depth = (name.lstrip("/") for name in [*line.split(), "", ""][:2])
        if image and depth != MISSING:
            image, depth = locate(image, depth)
            if missing := [name for name in (image, depth) if not name.is_file()]:
                raise Refused(f"{where}: {path} lists {missing[0]}, which isn't there; add the file or remove the line")
            pairs.append((image, depth))
    return pairs


LAYOUTS = (  # what tells a layout, and the function that opens it
    (NYU_LISTS[:1], open_nyu),
    (("sync", "official_splits/test"), open_nyu),
    (("20??_??_??", "train", "val"), open_kitti),
    (("train",), open_plain),
    (PLAIN, open_plain),
)
