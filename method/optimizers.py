"""SGD and LARS that skip non-finite updates without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class SGD(torch.optim.Optimizer):
    """Stochastic gradient descent with momentum: mu <- momentum mu + d, p <- p - lr mu, where d = g + weight_decay p.

    A step changes nothing if the attribute `found_inf`, a float32 scalar on the device, is set and is 1; the host
    doesn't have to read it. torch.optim.SGD can't replace this class: with foreach=True it refuses `found_inf`, and
    with fused=True it doesn't work on sharded tensors (DTensor).
    """

    def __init__(self, params: Iterable, lr: float = 0, weight_decay: float = 0, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def direction(self, p: Tensor, group: dict) -> Tensor:
        """d of a parameter."""
        return p.grad.add(p, alpha=group["weight_decay"])

    @torch.no_grad()
    def step(self) -> None:
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, lr = self.state[p], group["lr"]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                mu = group["momentum"] * state["mu"] + self.direction(p, group)
                if found_inf is not None:
                    mu, lr = torch.where(found_inf > 0, state["mu"], mu), torch.where(found_inf > 0, 0.0, lr)
                state["mu"].copy_(mu)
                p.sub_(lr * mu)


class LARS(SGD):
    """Layer-wise adaptive rate scaling (You et al. 2017), with momentum.

    d of a matrix is scaled by eta |p| / |d|. For vectors (biases, norms), d is the gradient, without weight decay.

    Args:
        weight_decay_filter, lars_adaptation_filter: functions of a parameter; where they are true, it gets no weight
            decay, or its d is not scaled, like a vector.
    """

    filters: tuple[Callable | None, ...] = (None, None)  # not kept in copies and checkpoints

    def __init__(
        self, params: Iterable, lr: float = 0, weight_decay: float = 0, momentum: float = 0.9, eta: float = 0.001,
        weight_decay_filter: Callable[[Tensor], bool] | None = None,
        lars_adaptation_filter: Callable[[Tensor], bool] | None = None,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        torch.optim.Optimizer.__init__(self, params, defaults)
        self.filters = weight_decay_filter, lars_adaptation_filter

    def direction(self, p: Tensor, group: dict) -> Tensor:
        undecayed, unscaled = (p.ndim == 1 or bool(spares and spares(p)) for spares in self.filters)
        d = p.grad if undecayed else super().direction(p, group)
        if unscaled:
            return d
        p_norm, d_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(d)
        return d * torch.where((p_norm > 0) & (d_norm > 0), group["eta"] * p_norm / d_norm, 1.0)
