"""Augmentations of single Pillow images under their published names; training computes them on batches (photometric).

Randomness comes from Python's `random`, as in the published classes.
"""

from __future__ import annotations

import random

from PIL import Image, ImageFilter, ImageOps


class GaussianBlur:
    """With probability `p`, blurs an image with a radius drawn uniformly from [radius_min, radius_max] pixels."""

    def __init__(self, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0) -> None:
        self.prob, self.radius_min, self.radius_max = p, radius_min, radius_max

    def __call__(self, img: Image.Image) -> Image.Image:
        if random.random() > self.prob:
            return img
        return img.filter(ImageFilter.GaussianBlur(random.uniform(self.radius_min, self.radius_max)))


class Solarization:
    """With probability `p`, inverts the values of 128 and more."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, img: Image.Image) -> Image.Image:
        return ImageOps.solarize(img) if random.random() < self.p else img
