"""Evaluation transforms: how a network sees an image, resized, cropped and normalized.

Shapes: C channels; an image is uint8 (C, height, width).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from imagesets.sources import Images
from parallel import Refused
from utils import random_resized_crop_box

PIXELS_SIDE = 32
MAX_PATCHES = 2**17  # per image: a frame of 3840 x 2160 pixels in patches of 8 has 129,600
VIEW_SCALE = (0.25, 1.0)  # share of the image's area in a random view


class Transformed(Dataset):
    """index -> (float32 (C, h, w), index): `transform(image, index)`, normalized as (x / 255 - mean) / std.

    A subclass defines `transform`. Images of different sizes need crops of one size, or a batch size of 1.

    Args:
        mean, std: per channel, of intensities in [0, 1].

    Raises:
        Undecodable: an image can't be decoded. It is not replaced by another one: its features would be wrong.
    """

    def __init__(self, images: Images, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images = images
        self.mean, self.std = (255 * torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))

    def transform(self, image: Tensor, index: int) -> Tensor:
        """uint8 (C, H, W) -> (C, h, w), intensities still in [0, 255]."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.transform(self.images.load(index), index)
        return (image.float() - self.mean) / self.std, index


class EvalImages(Transformed):
    """The shorter side resized to `size` pixels, then the central `crop` x `crop` pixels.

    Resized as uint8, bicubic with antialiasing, which differs from Pillow by at most two levels.

    Args:
        size, crop: pixels, size >= crop.
    """

    def __init__(self, images: Images, size: int, crop: int, mean: Sequence[float], std: Sequence[float]) -> None:
        if not 1 <= crop <= size:
            raise ValueError(f"images resized to {size} pixels can't be cropped to {crop}: make the crop smaller")
        super().__init__(images, mean, std)
        self.size, self.crop = size, crop

    def transform(self, image: Tensor, index: int) -> Tensor:
        return center_crop(resized(image, self.size), self.crop, self.crop)


LONGEST = 16  # times the shorter side


def resized(image: Tensor, size: int) -> Tensor:
    """uint8 (C, H, W) with its shorter side resized to `size` pixels; only the middle of a very long strip is kept.

    A whole strip could exhaust the memory, and a centre crop drops its ends anyway.
    """
    image = center_crop(image, *(min(n, LONGEST * min(image.shape[1:])) for n in image.shape[1:]))
    sides = [size * n // min(image.shape[1:]) for n in image.shape[1:]]
    return resize(image, sides)


def resize(image: Tensor, size: Sequence[int], interpolation: str = "bicubic") -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, *size): with antialiasing, without regard to the aspect ratio."""
    return F.interpolate(image[None], size=tuple(size), mode=interpolation, antialias=True)[0]


def resize_as_opencv(image: Tensor, size: Sequence[int]) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, *size): bilinear without antialiasing, equal to the default of OpenCV's `resize`.

    Pixel i of n is at (i + 1/2) N / n - 1/2 of the N before. OpenCV computes in whole numbers: weights are multiples
    of 1 / 2048, and the last four bits of the sums along rows are dropped.
    """
    (rows, row_weights), (columns, column_weights) = (
        opencv_neighbours(n, m, device=image.device) for n, m in zip(image.shape[1:], size, strict=True))
    along = sum(image[:, :, i].int() * w for i, w in zip(columns, column_weights, strict=True)) >> 4
    both = sum(along[:, i] * w[:, None] >> 16 for i, w in zip(rows, row_weights, strict=True))
    return ((both + 2) >> 2).to(torch.uint8)


def opencv_neighbours(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a side of n pixels resized to m: numbers of each pixel's two neighbours, and their int32 weights; (2, m)."""
    place = ((torch.arange(m, dtype=torch.float64, device=device) + 0.5) * (1 / (m / n)) - 0.5).float()
    first = place.floor()
    share = torch.stack([1 - (place - first), place - first])
    return torch.stack([first, first + 1]).clamp(0, n - 1).long(), (share * 2048).round().int()


class TooManyPatches(Refused):
    """An image whose patches would exhaust the memory, most often a very long strip."""


def check_patches(height: int, width: int, patch: int, subject: str, remedy: str) -> None:
    """Refuse an input of height x width pixels with more than MAX_PATCHES patches.

    Args:
        subject: the flag, its value and what it makes so large.
    """
    rows, columns = height // patch, width // patch
    if rows * columns > MAX_PATCHES:
        raise TooManyPatches(f"{subject} makes {columns} x {rows} patches, more than {MAX_PATCHES}; {remedy}")


def center_crop(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (round((n - m) / 2) for n, m in zip(image.shape[1:], (height, width), strict=True))
    return image[:, top : top + height, left : left + width]


class SmallPictures(Transformed):
    """The whole image at 32 x 32 pixels, whatever its aspect ratio: the raw-pixel baseline, by default in [0, 1]."""

    def __init__(self, images: Images, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> None:
        super().__init__(images, mean, std)

    def transform(self, image: Tensor, index: int) -> Tensor:
        return F.interpolate(image[None].float(), size=(PIXELS_SIDE, PIXELS_SIDE), mode="bilinear", antialias=True)[0]


class RandomViews(Transformed):
    """A random resized crop of `crop` x `crop` pixels, flipped with probability 0.5.

    Args:
        view: number of the view; the crop is a function of (index, view) alone.
        scale: bounds of the crop's share of the image's area.
        interpolation: bicubic or bilinear, with antialiasing.
    """

    def __init__(
        self, images: Images, crop: int, mean: Sequence[float], std: Sequence[float], view: int,
        scale: tuple[float, float] = VIEW_SCALE, interpolation: str = "bicubic",
    ) -> None:
        super().__init__(images, mean, std)
        self.crop, self.view, self.scale, self.interpolation = crop, view, scale, interpolation

    def transform(self, image: Tensor, index: int) -> Tensor:
        rng = np.random.default_rng((index, self.view))
        top, left, height, width = random_resized_crop_box(*image.shape[1:], self.scale, rng)
        image = image[:, top : top + height, left : left + width]
        image = resize(image, (self.crop, self.crop), self.interpolation)
        return image.flip(-1) if rng.random() < 0.5 else image
