"""Predictions of linear layers at the pixels of whole images: sliding windows, several scales, mirrored images.

Shapes: N images, C channels, K outputs per pixel, S layers. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagesets.annotated import Annotated
from parallel import Refused
from protocols import tokens, transforms
from protocols.dense_training import Read, Setting
from protocols.features import Network, images_refused
from protocols.progress import map_shared

LARGEST_CROP = 512  # pixels, unless a flag says otherwise
MEASURED = 100  # training images whose sizes decide the crop
WINDOWS = 8  # windows of an image per forward pass


class Geometry(NamedTuple):
    """Sizes in pixels; 0 follows from the others, or from the data (see `fitted_to`)."""

    image_size: int = 0  # shorter side of the images at scale 1; 0: crop
    crop: int = 0  # side of the training crops; 0: LARGEST_CROP, or the images' own shorter side where that is less
    window: int = 0  # side of the windows of the test; 0: crop, or the whole image
    stride: int = 0  # between windows; 0: two thirds of the window
    scales: Sequence[float] = (1.0,)  # of the images in the test
    flip: bool = False  # also test the mirrored image


def fitted_to(geometry: Geometry, images: Annotated, patch: int, whole: bool = False) -> Geometry:
    """Replaces zeros by values for these images. With `whole`, a window of 0 stays, as the whole image.

    Raises:
        Refused: sizes that contradict each other.
    """
    sides = [min(images.size(item)) for item in images.items[:MEASURED]]
    crop = geometry.crop or max(patch, min(LARGEST_CROP, int(np.median(sides))) // patch * patch)
    window = geometry.window or (0 if whole else crop)
    stride = geometry.stride or (max(1, window * 2 // 3) if window else 0)
    if stride > window:
        raise Refused(f"--stride {stride}: leaves pixels out between windows of {window}; lower it or raise "
                      "--window_size")
    return geometry._replace(image_size=geometry.image_size or crop, crop=crop, window=window, stride=stride)


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows that cover a side; the last one ends at its end. Window 0 is the whole side."""
    if not window:
        return [0]
    count = max(0, math.ceil((side - window) / stride)) + 1
    return [max(0, min(i * stride, side - window)) for i in range(count)]


class Predictor(NamedTuple):
    """Linear layers on the tokens of networks. Each layer has a setting, which names its network."""

    networks: Mapping[str, Network]
    settings: Sequence[Setting]
    layers: Sequence[nn.Module]
    geometry: Geometry
    read: Read

    def sliding(self, image: Tensor) -> list[Tensor]:
        """Outputs of the layers at the pixels of an image uint8 (C, height, width), the mean of all windows that see a
        pixel: S of (K, height, width)."""
        height, width = image.shape[-2:]
        window, stride = self.geometry.window, self.geometry.stride
        corners = [(top, left) for top in window_starts(height, window, stride)
                   for left in window_starts(width, window, stride)]
        window = window or max(height, width)
        totals: list[Tensor | None] = [None] * len(self.layers)
        seen = torch.zeros(height, width)
        for first in range(0, len(corners), WINDOWS):
            places = [(slice(top, top + window), slice(left, left + window))
                      for top, left in corners[first : first + WINDOWS]]
            crops = torch.stack([image[:, rows, columns] for rows, columns in places])
            for rows, columns in places:
                seen[rows, columns] += 1
            for name, network in self.networks.items():
                mine = [i for i, s in enumerate(self.settings) if s.features == name]
                if not mine:
                    continue
                features = self.read(network, crops, list(dict.fromkeys(self.settings[i].blocks for i in mine)))
                for i in mine:
                    maps = self.layers[i](features[self.settings[i].blocks])
                    maps = tokens.upsample(maps, *crops.shape[-2:], tokens.patch_size(network))
                    if totals[i] is None:
                        totals[i] = maps.new_zeros(maps.shape[1], height, width)
                    for part, (rows, columns) in zip(maps, places, strict=True):
                        totals[i][:, rows, columns] += part
        return [total / seen.to(total.device) for total in totals]

    @torch.no_grad()
    def maps(self, image: Tensor, averaged: Callable[[Tensor], Tensor] = lambda x: x) -> list[Tensor]:
        """Outputs at the pixels of an image uint8 (C, height, width) of any size: S of (K, height, width).

        Over several scales, and the mirrored image, the mean of `averaged` outputs (K, height, width).
        """
        size, geometry = image.shape[-2:], self.geometry
        views = [(scale, flip) for scale in geometry.scales for flip in ((False, True) if geometry.flip else (False,))]
        totals: list[Tensor] = []
        for scale, flip in views:
            factor = scale * geometry.image_size / min(size)
            view = transforms.resize(image, [max(1, round(side * factor)) for side in size])
            maps = self.sliding(view.flip(-1) if flip else view)
            maps = [F.interpolate((x.flip(-1) if flip else x)[None], size=size, mode="bilinear")[0] for x in maps]
            if len(views) > 1:
                maps = [averaged(x) / len(views) for x in maps]
            totals = [a + b for a, b in zip(totals, maps, strict=True)] if totals else maps
        return totals


def per_image(images: Annotated, measure: Callable[[Tensor, np.ndarray], np.ndarray], what: str) -> np.ndarray:
    """`measure(image, truth)` of every image, (N, ...); the processes share the images.

    Args:
        what: the name of the work on progress lines.

    Raises:
        Refused: an image can't be decoded.
    """
    with images_refused():
        return np.stack(map_shared(lambda i: measure(*images.load(i)), len(images.items), what))
