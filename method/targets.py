"""The teacher's targets: probabilities of the prototypes for every sample, kept as two scaling vectors.

Shapes: n samples (class tokens of global crops, or masked patches), K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import parallel

# Logits of a part: fits the cache of a CPU; bounds the float32 temporaries on a GPU (benchmarks/loss.py).
PART = {"cpu": 2**20, "cuda": 2**26}


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def parts(rows: int, logits_per_row: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yields (first, last) for parts of at most PART logits, at least one row each, that cover `rows` rows."""
    size = max(1, PART.get(device.type, PART["cuda"]) // logits_per_row)
    for first in range(0, rows, size):
        yield first, min(first + size, rows)


class Targets(NamedTuple):
    """q[n, k] = exp(scores[n, k] / temp + prototypes[k] + samples[n]), whose rows sum to one.

    Both assignments have this form: the softmax after centring, and Sinkhorn-Knopp. The losses compute q part by part,
    forward and backward, so that no (n, K) matrix in float32 is kept: with n = 2,500 and K = 131,072 it has 1.3 GB.
    """

    scores: Tensor  # (n, K), output of the teacher's head
    temp: float
    prototypes: Tensor  # (K,), in float32 or float64
    samples: Tensor  # (n,)

    def rows(self, first: int, last: int) -> Tensor:
        """Probabilities (last - first, K) of the samples `first` to `last`, in float32 or float64."""
        x = at_least_float32(self.scores[first:last]) / self.temp
        return x.add_(self.prototypes).add_(self.samples[first:last, None]).exp_()


def rows_of(targets: Tensor | Targets) -> int:
    return len(targets.scores if isinstance(targets, Targets) else targets)


def save(ctx, student: Tensor, targets: Tensor | Targets) -> None:
    """Keeps logits and targets for `saved`, in backward."""
    if isinstance(targets, Targets):
        ctx.target_temp = targets.temp
        ctx.save_for_backward(student, targets.scores, targets.prototypes, targets.samples)
    else:
        ctx.save_for_backward(student, targets)


def saved(ctx) -> tuple[Tensor, Tensor | Targets]:
    student, *kept = ctx.saved_tensors
    return student, kept[0] if len(kept) == 1 else Targets(kept[0], ctx.target_temp, *kept[1:])


@torch.no_grad()
def with_samples(scores: Tensor, temp: float, prototypes: Tensor) -> Targets:
    """Targets of given `prototypes`: samples[n] = -log sum_k exp(scores[n, k] / temp + prototypes[k])."""
    samples = torch.empty(len(scores), dtype=prototypes.dtype, device=scores.device)
    for first, last in parts(*scores.shape, scores.device):
        x = at_least_float32(scores[first:last]) / temp
        samples[first:last] = -x.add_(prototypes).logsumexp(1)
    return Targets(scores, float(temp), prototypes, samples)


@torch.no_grad()
def centred(scores: Tensor, center: Tensor, temp: float) -> Targets:
    """softmax((scores - center) / temp) of scores (n, K), with a center of K elements in any shape."""
    scores = scores.detach()
    return with_samples(scores, temp, -center.flatten().to(at_least_float32(scores[:0]).dtype) / temp)


class Center(nn.Module):
    """Running mean of the teacher's scores (DINO, equation 4): center <- m center + (1 - m) mean.

    The mean of a batch must be applied after the batch's targets are computed. `shape` is as published: (1, K) for
    class tokens, (1, 1, K) for patches.
    """

    def __init__(self, *shape: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(shape))

    @torch.no_grad()
    def update(self, mean: Tensor | None) -> None:
        """`mean`: of this process's rows, K elements; None if it has no rows (all processes must call it).

        The update is by the mean of the processes' means. For class tokens that is the mean of all rows; for patches,
        whose number differs between processes, it is not, as published. A process without rows does not count.
        """
        if mean is None:
            means = at_least_float32(self.center.new_zeros(self.center.numel() + 1))
        else:
            means = torch.cat([at_least_float32(mean).flatten(), mean.new_ones(1, dtype=torch.float32)])
        means = parallel.mean_over_processes(means)
        center, share = self.center.flatten(), means[-1]  # share of the processes that have rows
        moved = center * self.momentum + means[:-1] / share * (1 - self.momentum)
        self.center = torch.where(share > 0, moved, center).view_as(self.center)
