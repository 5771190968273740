"""The loss on masked patches (iBOT, arXiv 2111.07832; DINOv2, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from method.targets import Targets, at_least_float32, parts, rows_of, save, saved


def patch_loss(
    student: Tensor, targets: Tensor | Targets, weights: Tensor, n_crops: int, temp: float = 0.1
) -> Tensor:
    """- sum_j weights[j] sum_k q[j, k] log softmax(student[j] / temp)[k] / n_crops

    Computed in float32, or in float64 for float64 inputs, part by part; saves only the logits and the targets for the
    backward pass, which recomputes both softmaxes.

    Args:
        student: logits (n, K) of the student's masked patches, or of all patches.
        targets: q of the same patches in the teacher's unmasked crop.
        weights: (n,) one over the number of masked patches of the crop (`masking.masks_weight`); 0 where not masked.
        n_crops: all global crops of the batch, 2 B, including those without a mask, as published.
    """
    if not len(student) == rows_of(targets) == len(weights):
        raise ValueError(f"{len(student)} logits, {rows_of(targets)} targets and {len(weights)} weights")
    return WeightedRows.apply(student, targets, weights / n_crops, temp)


class WeightedRows(torch.autograd.Function):
    """- sum_j weights[j] <q[j], log p[j]> with p = softmax(student / temp); its gradient is weights (p - q) / temp."""

    @staticmethod
    def forward(ctx, student: Tensor, targets: Tensor | Targets, weights: Tensor, temp: float) -> Tensor:
        save(ctx, student, targets)
        ctx.weights, ctx.temp = weights, temp
        loss = torch.zeros((), dtype=at_least_float32(student[:0]).dtype, device=student.device)
        for first, last, x, q in WeightedRows.parts(student, targets, temp):
            loss -= (F.log_softmax(x, dim=1).mul_(q).sum(1) * weights[first:last]).sum()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        student, targets = saved(ctx)
        grad = torch.empty_like(student)
        weights = ctx.weights * (grad_output / ctx.temp)
        for first, last, x, q in WeightedRows.parts(student, targets, ctx.temp):
            grad[first:last] = F.softmax(x, dim=1).sub_(q).mul_(weights[first:last, None])
        return grad, None, None, None

    @staticmethod
    def parts(student: Tensor, targets: Tensor | Targets, temp: float):
        """Yields (first row, last row, student logits / temp, q) for each part."""
        for first, last in parts(*student.shape, student.device):
            q = targets.rows(first, last) if isinstance(targets, Targets) else targets[first:last]
            yield first, last, at_least_float32(student[first:last]) / temp, q
