"""Whether a run resumes on the images that it began with: some of them are compared.

Their names and places are not: a folder may be moved, renamed, or packed into an archive or shards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

import parallel
from imagesets.decode import Undecodable
from imagesets.sources import Images

COUNT = 32  # images that are compared
HEAD = 1 << 16  # bytes of each


def sample(images: Images) -> list[str]:
    """Hashes of images at equal distances, "" where one can't be read. Call on all processes; rank 0 reads."""
    numbers = np.unique(np.linspace(0, len(images) - 1, COUNT).astype(int))
    return parallel.on_main(lambda: [image_hash(images, int(i)) for i in numbers])


def image_hash(images: Images, i: int) -> str:
    """Of the size and the first bytes of an image's file; of its name and shape where it has no file."""
    try:
        if not hasattr(images, "content"):  # drawn, or of torchvision
            size, head = tuple(images.load(i).shape), images.name(i).encode()
        elif isinstance(content := images.content(i), bytes):
            size, head = len(content), content[:HEAD]
        else:
            size = os.path.getsize(content)
            with open(content, "rb") as file:
                head = file.read(HEAD)
    except (OSError, Undecodable):
        return ""
    return hashlib.sha256(f"{size} ".encode() + head).hexdigest()[:12]


def differing(before: Sequence[str], now: Sequence[str]) -> tuple[int, int]:
    """How many images differ between two samples of as many images, and how many could be compared."""
    pairs = [(one, other) for one, other in zip(before, now, strict=False) if one and other]
    return sum(one != other for one, other in pairs), len(pairs)
