"""How protocols see an image: resized, cropped and normalized, or as raw pixels.

Shapes: C channels; images are uint8 (C, height, width).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from imagesets.sources import Images
from utils import random_resized_crop_box

PIXELS_SIDE = 32


class EvalImages(Dataset):
    """index -> (float32 (C, crop, crop), index): the shorter side resized to `size`, centre crop, normalized.

    Resized as uint8, bicubic with antialiasing, which is within two levels of Pillow's.

    Args:
        size, crop: pixels, size >= crop.
        mean, std: one value a channel, of intensities in [0, 1].

    Raises:
        ValueError: for an image that can't be decoded, with its name: features of another one would be wrong.
    """

    def __init__(self, images: Images, size: int, crop: int, mean: Sequence[float], std: Sequence[float]) -> None:
        if not 1 <= crop <= size:
            raise ValueError(f"images resized to {size} pixels can't be cropped to {crop}: make the crop smaller")
        self.images, self.size, self.crop = images, size, crop
        self.mean, self.std = (255 * torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = center_crop(resized(self.images.load(index), self.size), self.crop, self.crop)
        return (image.float() - self.mean) / self.std, index


LONGEST = 16  # times the shorter side


def resized(image: Tensor, size: int) -> Tensor:
    """uint8 (C, H, W) with its shorter side brought to `size` pixels; of a longer strip, its middle.

    All of a strip could fill the memory, and a centre crop drops its ends.
    """
    image = center_crop(image, *(min(n, LONGEST * min(image.shape[1:])) for n in image.shape[1:]))
    sides = [size * n // min(image.shape[1:]) for n in image.shape[1:]]
    return F.interpolate(image[None], size=sides, mode="bicubic", antialias=True)[0]


def center_crop(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (round((n - m) / 2) for n, m in zip(image.shape[1:], (height, width), strict=True))
    return image[:, top : top + height, left : left + width]


class SmallPictures(Dataset):
    """index -> (float32 (C, side, side) in [0, 1], index): the whole picture, whatever its proportions."""

    def __init__(self, images: Images, side: int = PIXELS_SIDE) -> None:
        self.images, self.side = images, side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images.load(index)[None].float() / 255
        size = (self.side, self.side)
        return F.interpolate(image, size=size, mode="bilinear", antialias=True)[0], index


class RandomViews(Dataset):
    """index -> (float32 (C, crop, crop), index): a random resized crop, flipped half the time, normalized.

    The crop covers a share in `scale` of the area. A view is a function of (index, view) alone.
    """

    def __init__(
        self, images: Images, crop: int, mean: Sequence[float], std: Sequence[float], view: int,
        scale: tuple[float, float] = (0.25, 1.0),
    ) -> None:
        self.images, self.crop, self.view, self.scale = images, crop, view, scale
        self.mean, self.std = (255 * torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng((index, self.view))
        image = self.images.load(index)
        top, left, height, width = random_resized_crop_box(*image.shape[1:], self.scale, rng)
        image = image[None, :, top : top + height, left : left + width]
        image = F.interpolate(image, size=(self.crop, self.crop), mode="bicubic", antialias=True)[0]
        image = image.flip(-1) if rng.random() < 0.5 else image
        return (image.float() - self.mean) / self.std, index
