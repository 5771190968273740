"""Block-wise masks of the student's global crops (BEiT, arXiv 2106.08254; iBOT, arXiv 2111.07832).

Shapes: n global crops of a step, N = rows x columns patches of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALLEST_BLOCK = 4  # patches
LARGEST_ASPECT = 1 / 0.3  # height / width of a block, and width / height
TRIES = 10


def batch_masks(
    seed: int,
    epoch: int,
    step: int,
    n: int,
    grid: tuple[int, int],
    ratio: tuple[float, float] = (0.1, 0.5),
    probability: float = 0.5,
    rows: slice = slice(None),
) -> Tensor:
    """Masks (n, N) of the global crops of a step, bool, True where masked; or only those of `rows`.

    m = int(n probability) of the crops are masked. `ratio` is divided into m equal intervals, one for each of them, in
    random order: a crop's share of masked patches is drawn from its interval, so that the total varies little.

    n counts the crops of all processes and micro-batches. A crop's mask is a function of (seed, epoch, step, its
    number): it does not depend on the number of processes or on `rows`.
    """
    masked = int(n * probability)
    limits = np.linspace(*ratio, masked + 1)
    # Longer than the seeds of imagesets.loaders, [seed, epoch, ...] with 0 or 1 in the fourth place.
    intervals = np.random.default_rng([seed, epoch, step, 2]).permutation(n)
    numbers = range(n)[rows]
    masks = np.zeros((len(numbers), *grid), bool)
    for mask, number in zip(masks, numbers, strict=True):
        if (i := intervals[number]) < masked:
            rng = np.random.default_rng([seed, epoch, step, 3, number])
            mask[:] = block_mask(rng, *grid, int(mask.size * rng.uniform(limits[i], limits[i + 1])))
    return torch.from_numpy(masks).flatten(1)


def masked_share(n: int, grid: tuple[int, int], ratio: tuple[float, float], probability: float) -> float:
    """Expected share of the n global crops of a step that get a mask of one patch or more; 0: none ever does.

    Each of the int(n probability) crops to be masked draws from its interval of `ratio`, all of which have the same
    length, and rounds down. Masks for which no block is found, some of those of one or two patches, are not left out.
    """
    (low, high), least = ratio, 1 / (grid[0] * grid[1])  # the share that is one patch
    if min(grid) < 2:  # a block is lower than the grid and narrower
        return 0.0
    drawn = float(low >= least) if low == high else min(max((high - least) / (high - low), 0.0), 1.0)
    return int(n * probability) / n * drawn


def image_masks(
    epoch: int, micro: int, row: int, *, seed: int, images: int, micro_batches: int, grid: tuple[int, int],
    ratio: tuple[float, float] = (0.1, 0.5), probability: float = 0.5, early: tuple[int, tuple[int, int]] = (0, (0, 0)),
) -> Tensor:
    """Masks (2, N) of the global crops of one image: rows 2 i and 2 i + 1 of `batch_masks`, for image i of its step.

    Args:
        micro, row: number of the micro-batch in the run, and the image's row in it, over all processes.
        images: images of a step, over all processes and its `micro_batches`.
        early: (epochs, grid): the grid of the first epochs, where it is another one.
    """
    step, part = divmod(micro, micro_batches)
    first = 2 * (part * images // micro_batches + row)
    grid = early[1] if epoch < early[0] else grid
    return batch_masks(seed, epoch, step, 2 * images, grid, ratio, probability, slice(first, first + 2))


def kept_patches(epoch: int, index: int, masks: Tensor | None, *, seed: int, counts: Sequence[tuple[int, int]]
                 ) -> Tensor | None:
    """Indices (2, n), ascending, of the patches of an image's global crops that the student sees; None: all of them.

    Masked patches are kept, because the loss on patches needs their tokens, then others, drawn from (seed, epoch,
    index).

    Args:
        masks: (2, N) bool, at most n patches of a crop; None: no masks.
        counts: (N, n) by epoch: the patches of a global crop, and how many of them are kept.
    """
    patches, n = counts[epoch]
    if n == patches:
        return None
    order = np.random.default_rng([seed, epoch, index, 4]).random((2, patches))
    if masks is not None:
        order -= masks.numpy()  # first, as other numbers are at least 0
    return torch.from_numpy(np.sort(np.argsort(order, 1)[:, :n], 1))


def block_mask(rng: np.random.Generator, rows: int, columns: int, count: int) -> np.ndarray:
    """A mask (rows, columns), bool, of at most `count` patches: rectangles are added until there are `count`.

    It ends when no rectangle was found in ten tries; one or two patches are missing then, in 5 to 25 % of the masks.
    """
    mask = np.zeros((rows, columns), bool)
    missing, largest = count, rows // 2 * columns
    while missing > 0 and (added := add_block(rng, mask, min(missing, largest))):
        missing -= added
    return mask


def add_block(rng: np.random.Generator, mask: np.ndarray, limit: int) -> int:
    """Mask a random rectangle that adds from 1 to `limit` patches, if one of ten has that; returns the number added.

    A rectangle is lower than the grid and narrower. Its area is drawn uniformly between 4 patches and `limit`, which
    may be less than 4, the logarithm of its height / width uniformly, and then its place.
    """
    rows, columns = mask.shape
    for area, log_aspect, top, left in rng.random((TRIES, 4)).tolist():
        area = SMALLEST_BLOCK + area * (limit - SMALLEST_BLOCK)
        aspect = math.exp((2 * log_aspect - 1) * math.log(LARGEST_ASPECT))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = int(top * (rows - height + 1)), int(left * (columns - width + 1))
        block = mask[top : top + height, left : left + width]
        added = height * width - int(np.count_nonzero(block))
        if 0 < added <= limit:
            block[:] = True
            return added
    return 0


def masks_weight(masks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n_masked,) one over the number of masked patches of the crop, for each masked patch of (n, N), row by row."""
    weights = 1 / masks.sum(1, keepdim=True).clamp(min=1).to(dtype)
    return weights.expand(masks.shape)[masks]
