"""Decoded images on the device, where their crops are cut: for small data, fast steps and few cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel import Refused

PART = 2**26  # values of the images that are resized at once, which bounds the float32 temporaries


class Pixels:
    """uint8 images (N, H, W, C) on a device, zero beyond the size of each.

    Args:
        images: whole images (h, w, C) in any sizes; an image that can't be decoded has no pixels.

    Raises:
        Refused: they do not fit the free memory of the GPU.
    """

    def __init__(self, images: Sequence[Tensor], device: torch.device) -> None:
        height, width, channels = (max(sizes) for sizes in zip(*(image.shape for image in images), strict=True))
        size = len(images) * height * width * channels
        if device.type == "cuda" and size > (free := torch.cuda.mem_get_info(device)[0]):
            raise Refused(f"--crop_on_device: {len(images)} images of up to {width} x {height} pixels take "
                          f"{size / 1e9:.3g} GB, and {free / 1e9:.3g} GB of the GPU are free; leave it out, or store "
                          "smaller images")
        self.pixels = torch.zeros(len(images), height, width, channels, dtype=torch.uint8, device=device)
        for place, image in zip(self.pixels, images, strict=True):
            if image.numel():
                place[: image.shape[0], : image.shape[1]] = image.to(device)

    def crops(self, rows: Tensor) -> Tensor:
        """Rows (M, 7) on the CPU, all of one crop size -> uint8 crops (M, C, size, size).

        A row has the image's index and what `DataAugmentationDINO.places` gives. The crops are those of its `cut`, up
        to rounding: bicubic with antialiasing (a = -0.5), as a product with a matrix for each axis.
        """
        size, (_, *sides, channels) = int(rows[0, 1]), self.pixels.shape
        out = self.pixels.new_empty(len(rows), channels, size, size)
        rows = rows.to(self.pixels.device, non_blocking=True)
        step = max(1, PART // self.pixels[0].numel())
        for first in range(0, len(rows), step):
            index, _, top, left, height, width, flipped = rows[first : first + step].unbind(1)
            down, across = resizing(top, height, size, sides[0]), resizing(left, width, size, sides[1])
            across = torch.where(flipped.view(-1, 1, 1) > 0, across.flip(1), across)
            images = self.pixels[index].float()  # (m, H, W, C)
            resized = torch.einsum("mth,mhwc,msw->mcts", down, images, across)
            out[first : first + step] = resized.round_().clamp_(0, 255)
        return out


def resizing(start: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """Matrices (M, size, side) that resize the pixels start ... start + length - 1 of an axis to `size`.

    Weight of pixel j for output i: cubic((j + 1/2 - start - (i + 1/2) s) / max(s, 1)) with s = length / size, within
    the box, normalized to the sum 1.
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / size
    i, j = torch.arange(size, device=start.device).view(-1, 1), torch.arange(side, device=start.device)
    distance = ((j + 0.5 - start - (i + 0.5) * scale) / scale.clamp(min=1)).abs()
    weights = torch.where((j >= start) & (j < start + length), cubic(distance), 0)
    return weights / weights.sum(-1, keepdim=True)


def cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys's convolution kernel at the distances x >= 0."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
