"""Several sets of images as one, and the files that its images are."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from imagesets.checking import Chosen
from imagesets.decode import Reduction
from imagesets.sources import Images


class Joined:
    """The images of several sets, one after the other, as a set of images (`sources.Images`).

    Labels are numbered by the names of the classes over all sets; there are none if one set has none.
    """

    def __init__(self, parts: Sequence[Images]) -> None:
        self.parts, self.starts = list(parts), np.cumsum([0, *map(len, parts)])
        self.classes: list[str] = []
        self.labels: Tensor | None = None
        if all(part.labels is not None for part in parts):
            self.classes = sorted({name for part in parts for name in part.classes})
            number = {name: i for i, name in enumerate(self.classes)}
            self.labels = torch.cat([torch.tensor([number[name] for name in part.classes])[part.labels]
                                     for part in parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def origin(self, i: int) -> tuple[Images, int]:
        """The set that image i comes from, and its number there."""
        part = int(np.searchsorted(self.starts, i, "right")) - 1
        images, number = self.parts[part], int(i - self.starts[part])
        while isinstance(images, Chosen):
            images, number = images.images, int(images.index[number])
        return images, number

    def load(self, i: int, reduction: Reduction | None = None) -> Tensor:
        images, number = self.origin(i)
        return images.load(number, reduction)

    def name(self, i: int) -> str:
        images, number = self.origin(i)
        return images.name(number)

    def content(self, i: int) -> str | bytes | None:
        """The path of the image's file, or its bytes where it is packed with others; None for other images."""
        images, number = self.origin(i)
        return images.content(number) if hasattr(images, "content") else None

    def path(self, i: int) -> bytes | None:
        """The absolute path of the image's file; None where it has none of its own."""
        content = self.content(i)
        return os.path.abspath(os.fsencode(content)) if isinstance(content, str) else None
