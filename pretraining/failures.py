"""Detects a step whose loss or gradient is not finite, without a synchronization, and saves it in failure.pt.

From that step on, the optimizer skips its updates (`found_inf`; with a gradient scaler only if gradients overflow), so
the student still has the weights from before the step when the host checks the next time. The EMA updates of the
teacher since then are reversed; the other inputs of the step (random state, centre) were recorded when it began.
`replay` recomputes the step.

A gradient scaler may skip a few updates, until its scale fits. MOST_SKIPPED in a row are a failure of the last of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import parallel
from pretraining import sharding
from weights import checkpoints

NAME = "failure.pt"
KEPT = ("crops", "params", "index", "masks", "kept")  # what is stored of a micro-batch
# Updates that a gradient scaler may skip in a row: it halves its scale each time, which starts at 2^16.
MOST_SKIPPED = 20
STEADIER = {"torch.float16": ", or --precision bf16", "torch.bfloat16": ", or --precision fp32"}  # by the run's dtype


class NonFinite(parallel.Stopped):
    """The loss or a gradient is not finite; `step` and `rank` are the first at which this happened.

    With a gradient scaler, `step` may be the last of too many whose updates were skipped.
    """

    def __init__(
        self, step: int, rank: int, losses: Mapping[str, list[float]], last_good: str, path: str, script: str,
        dtype: str, skipped: int = 0,
    ) -> None:
        """`losses`: {term: its value on each rank}. `dtype`: of autocast. `skipped`: updates in a row, if too many."""
        self.step, self.rank = step, rank
        terms = [name for name, values in losses.items() if name != "loss" and not all(map(math.isfinite, values))]
        what = (f"the gradient is not finite, as in the {skipped - 1} steps before, whose updates were skipped"
                if skipped else "loss or gradient is not finite")
        super().__init__(
            f"step {step}: {what} (loss {', '.join(f'{x:g}' for x in losses['loss'])} by rank"
            + (f"; not finite: {', '.join(terms)}" if terms else "") + "); the "
            f"last good checkpoint is {last_good}; try a lower --lr or --clip_grad{STEADIER.get(dtype, '')}; to find "
            f"the cause: python {script} --replay {path}", parallel.is_main())


class Beginning(NamedTuple):
    """State at the beginning of a step, without the networks."""

    rng: dict[str, Tensor]
    dino_loss: dict[str, Tensor]


class Watch:
    """Records the first step that is not finite: on the device that it happened, on the host how the step began.

    Args:
        student, teacher, dino_loss: modules whose state is saved in failure.pt.
        optimizer: skips all updates from that step on; None if a gradient scaler skips overflows.
        momentum: (steps,), momentum of the teacher's EMA.
        load: step -> its micro-batches on this process. They depend on the step only, so they are not recorded.
        about: plain values to store in failure.pt.
        path: path of failure.pt.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, dino_loss: nn.Module, optimizer: torch.optim.Optimizer | None,
        momentum: np.ndarray, load: Callable[[int], Iterable[dict]], about: dict, path: str | os.PathLike,
        device: torch.device, script: str = "main_dino.py",
    ) -> None:
        self.student, self.teacher, self.dino_loss, self.script = student, teacher, dino_loss, script
        self.momentum, self.load, self.about, self.path, self.device = momentum, load, about, os.fspath(path), device
        self.first = torch.full((), -1, dtype=torch.int64, device=device)
        self.losses: dict[str, Tensor] = {}  # at that step, until then at the current one
        self.found = torch.zeros((), device=device)  # 1 from the first step on that is not finite
        self.scaled = optimizer is None
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # last updates in a row, by the scaler
        if optimizer is not None:
            optimizer.found_inf = self.found  # read by PyTorch's fused optimizers and by method.optimizers
        self.beginnings: dict[int, Beginning] = {}  # of the steps since the last check
        self.step = 0

    def begin(self, step: int) -> None:
        self.step = step
        # No copy is needed: updates replace the centre, and never change it in place.
        self.beginnings[step] = Beginning(checkpoints.torch_rng_state(self.device), self.dino_loss.state_dict())

    def judge(self, losses: Mapping[str, Tensor], grad_norms: Sequence[Tensor]) -> dict[str, Tensor]:
        """Test the current step, before its update.

        Args:
            losses: the loss and its terms, scalars.
            grad_norms: of unscaled gradients. With a gradient scaler, which skips the update if they are not finite,
                only such steps in a row are counted.

        Returns:
            With a gradient scaler `skipped`, 1 if it will skip the update, else 0; without one nothing.
        """
        bad = ~torch.isfinite(losses["loss"].detach())
        overflow = torch.zeros_like(bad)
        if len(grad_norms):
            overflow = ~torch.isfinite(torch.stack(list(grad_norms))).all()
        if self.scaled:
            self.skipped = torch.where(overflow, self.skipped + 1, 0)
        else:
            bad = bad | overflow
        none_before = self.first < 0
        self.first = torch.where(bad & none_before, self.step, self.first)
        self.losses = {name: torch.where(none_before, value.detach().float(), self.losses.get(name, 0.0))
                       for name, value in losses.items()}
        self.found.logical_or_(bad)
        return {"skipped": overflow.float()} if self.scaled else {}

    def check(self, last_good: str) -> None:
        """Synchronize with the device and stop if a step was not finite. Call on all processes, after the EMA update.

        Raises:
            NonFinite: on all processes, if any of them had such a step; failure.pt has been written.
        """
        stuck = self.skipped >= MOST_SKIPPED
        # The student has not changed since before the current step, and is the same on all processes.
        self.first = torch.where(stuck & (self.first < 0), self.step, self.first)
        if parallel.max_over_processes(self.first).item() >= 0:
            steps = parallel.gather(self.first[None]).tolist()
            losses = {name: parallel.gather(value[None]).tolist() for name, value in self.losses.items()}
            step = min(s for s in steps if s >= 0)
            ranks = [rank for rank, s in enumerate(steps) if s == step]
            # All ranks share a gradient that is not finite; prefer a rank whose own loss is not.
            rank = next((r for r in ranks if not math.isfinite(losses["loss"][r])), ranks[0])
            self.save(step, rank)
            skipped = int(self.skipped) if stuck and all(map(math.isfinite, losses["loss"])) else 0
            raise NonFinite(step, rank, losses, last_good, self.path, self.script, self.about["dtype"], skipped)
        self.beginnings.clear()

    def save(self, step: int, rank: int) -> None:
        """Write what recomputing the step needs. Call on all processes; `rank` writes."""
        student, teacher = (sharding.whole(network.state_dict()) for network in (self.student, self.teacher))
        if parallel.rank() == rank:
            batches, began = list(self.load(step)), self.beginnings[step]
            names = [name for name, _ in self.teacher.named_parameters()]
            checkpoints.save(self.about | {
                "step": step, "epoch": step // self.about["steps_per_epoch"], "rank": rank, "student": student,
                "teacher": without_updates(teacher, student, names, self.momentum[step : self.step + 1]),
                "dino_loss": began.dino_loss, "rng": began.rng,
                **{key: [b[key] for b in batches] for key in KEPT if batches and key in batches[0]},
            }, self.path)  # fmt: skip
        parallel.barrier()


def without_updates(teacher: dict, student: dict, names: list[str], momenta: np.ndarray) -> dict:
    """Reverses EMA updates of the parameters `names`: solves t' = m t + (1 - m) s for t, in float64.

    s was the same in all updates, so m is the product of their momenta.
    """
    m = float(np.prod(momenta))
    if m == 0:  # t' = s: t can't be recovered
        return teacher
    before = {k: (student[k].double() + (teacher[k].double() - student[k].double()) / m).to(teacher[k].dtype)
              for k in names}
    return teacher | before
