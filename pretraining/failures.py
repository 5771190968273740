"""A step whose loss or gradient is not finite: found without waiting for the device, and kept in failure.pt.

From that step on the optimizer changes nothing (its `found_inf`; with a gradient scaler only where gradients overflow),
so the student's weights at the next look are those before the step. The teacher has followed them in vain, which is
taken back, and everything else that the step depends on is remembered from its beginning. `replay` computes it again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import parallel
from pretraining import sharding
from utils import DINOLoss
from weights import checkpoints

NAME = "failure.pt"


class NonFinite(parallel.Stopped):
    """A loss or gradient that is not a finite number: the first such step, and the first rank that had one."""

    def __init__(self, step: int, rank: int, losses: list[float], last_good: str, path: str) -> None:
        self.step, self.rank = step, rank
        super().__init__(
            f"step {step}: loss or gradient is not finite (loss {', '.join(f'{x:g}' for x in losses)} by rank); the "
            f"last good checkpoint is {last_good}; try a lower --lr or --clip_grad, or --precision bf16; to look into "
            f"it: python main_dino.py --replay {path}", parallel.is_main())


class Beginning(NamedTuple):
    """What a step starts from, apart from the networks."""

    rng: dict[str, Tensor]
    dino_loss: dict[str, Tensor]


class Watch:
    """Remembers, on the device, the first step that was not finite, and on the host how it began.

    Args:
        student, teacher, dino_loss: the state whose part before that step is kept.
        optimizer: changes nothing from that step on; None where a gradient scaler skips overflows.
        momentum: (steps,), of the teacher's moving average.
        load: step -> its micro-batches on this process; they are a function of the step, so they are not kept.
        about: plain values for failure.pt.
        path: of failure.pt.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, dino_loss: DINOLoss, optimizer: torch.optim.Optimizer | None,
        momentum: np.ndarray, load: Callable[[int], Iterable[dict]], about: dict, path: str | os.PathLike,
        device: torch.device,
    ) -> None:
        self.student, self.teacher, self.dino_loss = student, teacher, dino_loss
        self.momentum, self.load, self.about, self.path, self.device = momentum, load, about, os.fspath(path), device
        self.first = torch.full((), -1, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.found = torch.zeros((), device=device)  # 1 from the first such step on
        self.scaled = optimizer is None
        if optimizer is not None:
            optimizer.found_inf = self.found  # PyTorch's fused optimizers, and ours, read it
        self.beginnings: dict[int, Beginning] = {}  # of the steps since the last look
        self.step = 0

    def begin(self, step: int) -> None:
        self.step = step
        # The centre is replaced by each update, never changed in place: this keeps it without a copy.
        self.beginnings[step] = Beginning(torch_rng(self.device), self.dino_loss.state_dict())

    def judge(self, loss: Tensor, grad_norms: Tensor) -> None:
        """Of the step that has begun, before its update. Its gradients count unless a scaler expects overflows."""
        bad = ~torch.isfinite(loss.detach())
        if not self.scaled:
            bad = bad | ~torch.isfinite(grad_norms).all()
        now = bad & (self.first < 0)
        self.first = torch.where(now, self.step, self.first)
        self.loss = torch.where(now, loss.detach().float(), self.loss)
        self.found.logical_or_(bad)

    def check(self, last_good: str) -> None:
        """Waits for the device once; all processes call it, after the teacher's update.

        Raises:
            NonFinite: on all processes, if any of them had such a step; failure.pt is written.
        """
        if parallel.max_over_processes(self.first).item() >= 0:
            losses, steps = parallel.gather(self.loss[None]).tolist(), parallel.gather(self.first[None]).tolist()
            step = min(s for s in steps if s >= 0)
            ranks = [rank for rank, s in enumerate(steps) if s == step]
            # A gradient is everyone's; a loss that is not finite is the rank's own.
            rank = next((r for r in ranks if not math.isfinite(losses[r])), ranks[0])
            self.save(step, rank)
            raise NonFinite(step, rank, losses, last_good, self.path)
        self.beginnings.clear()

    def save(self, step: int, rank: int) -> None:
        """Write what computing the step again needs; every process calls it, `rank` writes."""
        student, teacher = (sharding.whole(network.state_dict()) for network in (self.student, self.teacher))
        if parallel.rank() == rank:
            batches, began = list(self.load(step)), self.beginnings[step]
            names = [name for name, _ in self.teacher.named_parameters()]
            checkpoints.save(self.about | {
                "step": step, "epoch": step // self.about["steps_per_epoch"], "rank": rank, "student": student,
                "teacher": without_updates(teacher, student, names, self.momentum[step : self.step + 1]),
                "dino_loss": began.dino_loss, "rng": began.rng,
                "crops": [b["crops"] for b in batches], "params": [b["params"] for b in batches],
                "index": [b["index"] for b in batches],
            }, self.path)  # fmt: skip
        parallel.barrier()


def without_updates(teacher: dict, student: dict, names: list[str], momenta: np.ndarray) -> dict:
    """The parameters t of t' = m t + (1 - m) s, in float64: n updates with one s have the product of their m."""
    m = float(np.prod(momenta))
    if m == 0:  # nothing of the old teacher is left
        return teacher
    before = {k: (student[k].double() + (teacher[k].double() - student[k].double()) / m).to(teacher[k].dtype)
              for k in names}
    return teacher | before


def torch_rng(device: torch.device) -> dict[str, Tensor]:
    """torch's random state on the CPU and this device: stochastic depth and dropout follow from it."""
    state = {"torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})
