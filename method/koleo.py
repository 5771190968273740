"""KoLeo: spreads the class tokens of a batch over the sphere (arXiv 1806.03198; DINOv2, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import parallel


def koleo(features: Tensor, all_processes: bool = False) -> Tensor:
    """- mean_i log(d_i + 1e-8), with d_i the distance of row i to its nearest neighbour (`nearest_distances`).

    The rows must be of different images: call it once for each global crop. As published, with one row the neighbour is
    the row itself, and the result a constant; skip the term then. exp(-koleo) is the geometric mean of the distances.
    With gradient accumulation, neighbours are looked for within a micro-batch: among fewer images, they are farther.
    """
    return -(nearest_distances(features, all_processes) + 1e-8).log().mean()


def nearest_distances(features: Tensor, all_processes: bool = False) -> Tensor:
    """Distances (B,) of L2-normalized rows (B, D) to their nearest neighbours: || x_i - x_j + 1e-8 ||, 0 to 2.

    j, the row with the largest inner product, is a constant for the gradient, which flows to x_i and x_j. Computed in
    float32, or in float64 for float64 inputs, also under autocast: both 1e-8 are 0 in float16, and equal rows infinite.

    Args:
        all_processes: look for neighbours in the rows of all processes, each of which must pass the same number. The
            gradient flows to the neighbours on other processes too: the mean of the processes' gradients is that of one
            process with all rows. By default, as published, each process has only its own rows.
    """
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1, eps=1e-8)
        others = Gather.apply(x) if all_processes and parallel.world_size() > 1 else x
        first = parallel.rank() * len(x) if others is not x else 0
        with torch.no_grad():
            similarity = x @ others.T
            similarity.diagonal(first).fill_(-1)
            nearest = similarity.argmax(1)
        return F.pairwise_distance(x, others[nearest], eps=1e-8)


class Gather(torch.autograd.Function):
    """The rows of all processes, of an equal number each; the gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return parallel.gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return parallel.sum_over_processes(grad.contiguous()).chunk(parallel.world_size())[parallel.rank()]
