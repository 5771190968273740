"""How well masks fit: region similarity J, contour accuracy F, and both over the frames of a video.

The measures of the DAVIS challenges (Perazzi et al. 2016, section 5; Pont-Tuset et al. 2017, section 3).

Shapes: masks are bool (height, width); n frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

TOLERANCE = 0.008  # of the contours' match, as a share of the picture's diagonal


def jaccard(found: np.ndarray, truth: np.ndarray, ignored: np.ndarray | None = None) -> float:
    """Region similarity J: |found and truth| / |found or truth| over the pixels not ignored; 1 where both are empty."""
    if ignored is not None:
        found, truth = found & ~ignored, truth & ~ignored
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else 1.0


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour: bool (height, width).

    What lies beyond the picture is what lies at its border, so a mask that the border cuts has no contour there.
    """
    around = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != around[:-1, 1:]) | (mask != around[1:, :-1]) | (mask != around[1:, 1:])


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels no farther than `radius` from one of the mask's: bool (height, width)."""
    height, width = mask.shape
    rows, columns = mask.nonzero()
    dilated = np.zeros((height + 2 * radius, width + 2 * radius), bool)
    for down in range(2 * radius + 1):
        for right in range(2 * radius + 1):
            if (down - radius) ** 2 + (right - radius) ** 2 <= radius**2:
                dilated[rows + down, columns + right] = True  # a contour is few pixels, a disk is many
    return dilated[radius : radius + height, radius : radius + width]


def contour_accuracy(found: np.ndarray, truth: np.ndarray, ignored: np.ndarray | None = None,
                     tolerance: float = TOLERANCE) -> float:
    """F: harmonic mean of the shares of the found contour that is near a true one, and of the true one that is found.

    Near: within `tolerance` of the picture's diagonal, rounded up to pixels (a tolerance of 1 or more is in pixels).
    Without any contour in both F is 1; without one in either, 0.
    """
    if ignored is not None:
        found, truth = found & ~ignored, truth & ~ignored
    radius = math.ceil(tolerance if tolerance >= 1 else tolerance * math.hypot(*truth.shape))
    found, truth = contour(found), contour(truth)
    if not found.any() or not truth.any():
        return float(found.any() == truth.any())
    precision = np.count_nonzero(found & dilate(truth, radius)) / np.count_nonzero(found)
    recall = np.count_nonzero(truth & dilate(found, radius)) / np.count_nonzero(truth)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def statistics(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, recall (share of the frames above 0.5) and decay (first quarter's mean minus last quarter's) of n frames.

    Quarters are those of the challenge's own tool: they end at frames 1 + k (n - 1) / 4, rounded half up, and
    neighbours share the frame at which they meet.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError("no frames: there is nothing to take the mean of")
    ends = np.floor(np.linspace(0, len(values) - 1, 5) + 0.5 + 1e-10).astype(int)
    first, last = values[: ends[1] + 1], values[ends[3] :]
    return float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean())
