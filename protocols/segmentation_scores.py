"""Scores of masks: region similarity J, contour accuracy F, and their statistics over the frames of a video; scores of
maps that need no threshold.

J and F are the measures of the DAVIS challenges (Perazzi et al. 2016, section 5; Pont-Tuset et al. 2017, section 3).

Shapes: masks are bool (height, width), maps are floats (height, width), not negative; n frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

TOLERANCE = 0.008  # distance at which contours match, as a share of the image's diagonal


def jaccard(predicted: np.ndarray, truth: np.ndarray, ignored: np.ndarray | None = None) -> float:
    """Region similarity J = |predicted & truth| / |predicted | truth| over pixels not ignored; 1 if both are empty."""
    if ignored is not None:
        predicted, truth = predicted & ~ignored, truth & ~ignored
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def energy_ratio(heat: np.ndarray, truth: np.ndarray, ignored: np.ndarray | None = None) -> float:
    """Share of a map's mass on the object over the object's share of the area, both of pixels not ignored.

    (sum of heat on truth / sum of heat) / (mean of truth): 1 for a map without preference, at most 1 over the object's
    share. A map of zeros counts as uniform. The numerator is the energy-based pointing game of Wang et al. 2020
    (Score-CAM, section 4.2). NaN without an object.
    """
    heat, truth = judged(heat, truth, ignored)
    share = heat[truth].sum() / heat.sum() if heat.any() else truth.mean()
    return float(share / truth.mean())


def pointing(heat: np.ndarray, truth: np.ndarray, ignored: np.ndarray | None = None) -> float:
    """Pointing game (Zhang et al. 2016, section 4.2): whether the map's maximum lies on truth, over pixels not ignored.

    Of several equal maxima, such as the pixels of a patch or of a mask, the share that does.
    """
    heat, truth = judged(heat, truth, ignored)
    return float(truth[heat == heat.max()].mean())


def judged(heat: np.ndarray, truth: np.ndarray, ignored: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of a map and of the truth that are not ignored, one after the other; the map as float64."""
    kept = np.ones(truth.shape, bool) if ignored is None else ~ignored
    return heat[kept].astype(np.float64), truth[kept]


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour: bool (height, width).

    The image is padded with its edge values, so a mask that the image's edge cuts has no contour there.
    """
    around = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != around[:-1, 1:]) | (mask != around[1:, :-1]) | (mask != around[1:, 1:])


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels within `radius` of a pixel of the mask: bool (height, width)."""
    height, width = mask.shape
    rows, columns = mask.nonzero()
    dilated = np.zeros((height + 2 * radius, width + 2 * radius), bool)
    for down in range(2 * radius + 1):
        for right in range(2 * radius + 1):
            if (down - radius) ** 2 + (right - radius) ** 2 <= radius**2:
                dilated[rows + down, columns + right] = True  # a contour has few pixels, a disk has many
    return dilated[radius : radius + height, radius : radius + width]


def contour_accuracy(
    predicted: np.ndarray, truth: np.ndarray, ignored: np.ndarray | None = None, tolerance: float = TOLERANCE
) -> float:
    """F = 2 P R / (P + R): P is the share of the predicted contour near the true one, R the share of the true contour
    near the predicted one.

    Near: within `tolerance` times the image's diagonal, rounded up to pixels (a tolerance of 1 or more is in pixels).
    F is 1 where neither mask has a contour and 0 where only one has.
    """
    if ignored is not None:
        predicted, truth = predicted & ~ignored, truth & ~ignored
    radius = math.ceil(tolerance if tolerance >= 1 else tolerance * math.hypot(*truth.shape))
    predicted, truth = contour(predicted), contour(truth)
    if not predicted.any() or not truth.any():
        return float(predicted.any() == truth.any())
    precision = np.count_nonzero(predicted & dilate(truth, radius)) / np.count_nonzero(predicted)
    recall = np.count_nonzero(truth & dilate(predicted, radius)) / np.count_nonzero(truth)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def statistics(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, recall (share of the frames above 0.5) and decay (first quarter's mean minus last quarter's) of n frames.

    Quarters are those of the challenge's own code: they end at frames 1 + k (n - 1) / 4, rounded half up, and
    adjacent ones share a frame.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError("there are no frames to average over")
    ends = np.floor(np.linspace(0, len(values) - 1, 5) + 0.5 + 1e-10).astype(int)
    first, last = values[: ends[1] + 1], values[ends[3] :]
    return float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean())
