"""A square of Gaussian noise in a crop ("Patch Gaussian", arXiv 1906.02611; in the second stage of 2507.03779)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LARGEST = 255.0  # standard deviation, in the values of uint8


def with_noise(crop: Tensor, rng: np.random.Generator) -> Tensor:
    """A copy of a uint8 crop (C, height, width) with noise added in a square, clipped to 0 ... 255.

    The square's side is drawn uniformly from 1 to the crop's shorter one, its centre from all pixels, so that it may
    extend beyond the crop, and the noise's standard deviation from 0 to LARGEST.
    """
    height, width = crop.shape[-2:]
    side, centre = int(rng.integers(1, min(height, width) + 1)), (int(rng.integers(height)), int(rng.integers(width)))
    rows, columns = (slice(max(c - side // 2, 0), c - side // 2 + side) for c in centre)
    crop = crop.clone()  # keeps the layout in memory
    square = crop[:, rows, columns]
    noise = rng.standard_normal(tuple(square.shape), np.float32) * np.float32(LARGEST * rng.random())
    square.copy_((square + torch.from_numpy(noise)).round_().clamp_(0, 255))
    return crop
