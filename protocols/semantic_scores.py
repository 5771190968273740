"""Scores of semantic segmentation: IoU per class and pixel accuracy over a whole set, with intervals over its images.

Shapes: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from imagesets.masks import VOID
from protocols import scores


def pixel_counts(predicted: np.ndarray, truth: np.ndarray, n_classes: int) -> np.ndarray:
    """(3, K): per class, pixels that are predicted and true, that are predicted, and that are true.

    Args:
        predicted, truth: classes (height, width); pixels whose truth is VOID don't count.
    """
    judged = truth != VOID
    predicted, truth = predicted[judged].astype(np.int64), truth[judged].astype(np.int64)
    return np.stack([np.bincount(values, minlength=n_classes)
                     for values in (truth[predicted == truth], predicted, truth)])


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union (..., K) of counts (..., 3, K); NaN for a class neither predicted nor true."""
    both, predicted, true = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    union = predicted + true - both
    return np.divide(both, union, out=np.full_like(both, np.nan), where=union > 0)


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """Share of the pixels whose class is right, (...) of counts (..., 3, K)."""
    counts = np.asarray(counts, np.float64)
    return counts[..., 0, :].sum(-1) / np.maximum(counts[..., 2, :].sum(-1), 1)


def summarize(per_image: np.ndarray, classes: Sequence[str], n: int = 1000, seed: int = 0) -> dict:
    """Figures in % of the counts (N, 3, K) of a set's images, and 95 % bootstrap intervals over the images.

    All pixels of the set are counted together: mIoU is not a mean over images. Classes that are neither predicted nor
    true anywhere are left out of the mean, in each resample too.

    Returns:
        miou and pixel_accuracy {"value", "interval"}; per_class {name: IoU, None where it is undefined}.
    """
    per_image = np.asarray(per_image, np.float64)
    total = per_image.sum(0)
    drawn = np.random.default_rng(seed).multinomial(len(per_image), np.full(len(per_image), 1 / len(per_image)), n)
    resampled = (drawn @ per_image.reshape(len(per_image), -1)).reshape(n, *total.shape)
    iou = class_iou(total)

    def figure(value: np.ndarray, values: np.ndarray) -> dict:
        return {"value": 100 * float(value), "interval": [100 * bound for bound in scores.percentiles(values)]}

    return {
        "miou": figure(np.nanmean(iou), np.nanmean(class_iou(resampled), axis=-1)),
        "pixel_accuracy": figure(pixel_accuracy(total), pixel_accuracy(resampled)),
        "per_class": {name: None if np.isnan(value) else 100 * float(value)
                      for name, value in zip(classes, iou, strict=True)},
    }
