"""Cross-entropy of class tokens over pairs of views: the loss of DINO, and DINOv2's on class tokens.

Shapes: B images, two global and L local crops, V = 2 + L views, K prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from method.targets import Targets, at_least_float32, parts, rows_of, save, saved


def class_loss(student: Tensor, targets: Tensor | Targets, temp: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over images and pairs of views (i, v), v != i, of  - sum_k q_i[k] log softmax(student_v / temp)[k].

    Args:
        student: (V B, K) logits, crop-major, the two global crops first.
        targets: q of the global crops (2 B rows), in the same order. The other crop's q is compared with each global
            crop here; the caller must not exchange them.

    Returns:
        The loss to differentiate, and its two summands, detached: `global`, of the 2 pairs of global crops, and
        `local`, of the 2 L pairs with a local crop; each has the factor 1 / (2 + 2 L).
    """
    loss, of_global, of_local = PairsOfViews.apply(student, targets, temp)
    return loss, {"global": of_global, "local": of_local}


class PairsOfViews(torch.autograd.Function):
    """`class_loss`, computed on parts of the batch. Saves only the logits and the targets for the backward pass.

    The gradient with respect to the student's logits in view v is (n_v p_v - t_v) / (temp B pairs), where t_v is the
    sum of the q_i that v is compared with and n_v their number; backward recomputes p.
    """

    @staticmethod
    def forward(ctx, student: Tensor, targets: Tensor | Targets, temp: float) -> tuple[Tensor, Tensor, Tensor]:
        save(ctx, student, targets)
        ctx.temp = temp
        loss = torch.zeros((), dtype=at_least_float32(student[:0]).dtype, device=student.device)
        of_global, of_local = loss.clone(), loss.clone()
        for _, x, q in PairsOfViews.parts(student, targets, temp):
            log_p = F.log_softmax(x, dim=-1)
            # Global view 0 is compared with q_1, global view 1 with q_0, and each local view with both.
            with_global, with_local = (q.flip(0) * log_p[:2]).sum(), (q.sum(0) * log_p[2:].sum(0)).sum()
            loss -= with_global + with_local
            of_global -= with_global
            of_local -= with_local
        terms = tuple(x / PairsOfViews.count(student, targets) for x in (loss, of_global, of_local))
        ctx.mark_non_differentiable(*terms[1:])
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor, *_) -> tuple[Tensor | None, ...]:
        student, targets = saved(ctx)
        grad = torch.empty_like(student)
        views = grad.unflatten(0, (-1, rows_of(targets) // 2))  # (V, B, K)
        scale = grad_output / (ctx.temp * PairsOfViews.count(student, targets))
        for rows, x, q in PairsOfViews.parts(student, targets, ctx.temp):
            p = F.softmax(x, dim=-1)
            p[:2] -= q.flip(0)
            p[2:].mul_(2).sub_(q.sum(0))
            views[:, rows] = p.mul_(scale)
        return grad, None, None

    @staticmethod
    def count(student: Tensor, targets: Tensor | Targets) -> int:
        """Pairs of views times images: 2 (V - 1) B."""
        return 2 * len(student) - rows_of(targets)

    @staticmethod
    def parts(student: Tensor, targets: Tensor | Targets, temp: float):
        """Yields (slice of the images, student logits / temp (V, b, K), q (2, b, K)) for each part."""
        images = rows_of(targets) // 2
        student = student.unflatten(0, (-1, images))
        for first, last in parts(images, len(student) * student.shape[-1], student.device):
            if isinstance(targets, Targets):
                q = torch.stack([targets.rows(first, last), targets.rows(images + first, images + last)])
            else:
                q = targets.unflatten(0, (2, images))[:, first:last]
            yield slice(first, last), at_least_float32(student[:, first:last]) / temp, q
