"""Errors of predicted depth over the pixels that have a depth, and the parts of an image that are judged.

Shapes: N images, F figures; depth maps are (height, width) in metres.
"""

from __future__ import annotations

import numpy as np

from parallel import Refused
from protocols import scores

FIGURES = ("rmse", "abs_rel", "delta1", "log10", "silog")
DELTA = 1.25  # delta1 counts the pixels whose ratio of depths, or its inverse, is below it
NYU_SIZE, NYU_CROP = (480, 640), (45, 471, 41, 601)  # top, bottom, left, right
CROPS = {  # top, bottom, left, right, as shares of height and width; of NYU Depth v2 in pixels, NYU_CROP
    "none": (0.0, 1.0, 0.0, 1.0),
    "eigen_nyu": (),
    "eigen_kitti": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}


def judged(depth: np.ndarray, crop: str) -> np.ndarray:
    """The depth map with 0 outside of the part that is judged, one of CROPS (Eigen et al. 2014, Garg et al. 2016).

    Raises:
        Refused: the crop of NYU Depth v2 on maps of another size.
    """
    height, width = depth.shape
    if crop == "eigen_nyu" and depth.shape != NYU_SIZE:
        raise Refused(f"--eval_crop {crop}: is for depth maps of 640 x 480 pixels, not {width} x {height}; choose "
                      "another one")
    top, bottom, left, right = NYU_CROP if crop == "eigen_nyu" else (
        int(share * side) for share, side in zip(CROPS[crop], (height, height, width, width), strict=True))
    inside = np.zeros_like(depth)
    inside[top:bottom, left:right] = depth[top:bottom, left:right]
    return inside


def errors(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """FIGURES of an image, (F,), over the pixels with a true depth d > 0 and their prediction p > 0, one at least.

        rmse     sqrt(mean((p - d)^2)), metres
        abs_rel  mean(|p - d| / d)
        delta1   share with max(p / d, d / p) < 1.25
        log10    mean(|log10 p - log10 d|)
        silog    sqrt(mean(e^2) - mean(e)^2) with e = log p - log d
    """
    valid = truth > 0
    p, d = predicted[valid].astype(np.float64), truth[valid].astype(np.float64)
    e = np.log(p) - np.log(d)
    return np.array([np.sqrt(np.mean((p - d) ** 2)), np.mean(np.abs(p - d) / d),
                     np.mean(np.maximum(p / d, d / p) < DELTA), np.mean(np.abs(e)) / np.log(10), e.std()])


def summarize(per_image: np.ndarray) -> dict[str, dict]:
    """{figure: {"value", "interval", "digits"}}: means over the images (N, F), as published, and 95 % intervals."""
    return {name: scores.summary(column) | {"digits": 3} for name, column in zip(FIGURES, per_image.T, strict=True)}
