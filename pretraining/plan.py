"""Length and schedules of a run; every duration becomes a number of optimizer steps here."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from parallel import Refused


class Plan(NamedTuple):
    """Length of a run in steps, and the schedules, which the training loop indexes by step."""

    steps_per_epoch: int
    steps: int
    lr: np.ndarray  # (steps,)
    wd: np.ndarray  # (steps,)
    momentum: np.ndarray  # (steps,), of the teacher's EMA
    # DINOv2's, each (steps,)
    teacher_temp: np.ndarray | None = None
    last_layer_lr: np.ndarray | None = None
    backbone_lr: np.ndarray | None = None

    @property
    def epochs(self) -> int:
        """Number of epochs; the last one may be partial."""
        return math.ceil(self.steps / self.steps_per_epoch)


def steps_per_epoch(n_images: int, batch_size_per_gpu: int, grad_accum_steps: int, world_size: int) -> int:
    """Optimizer steps per pass over the images; the last, incomplete batch is dropped.

    Raises:
        Refused: there are fewer images than the global batch size.
    """
    global_batch = batch_size_per_gpu * world_size * grad_accum_steps
    if n_images < global_batch:
        most = n_images // (world_size * grad_accum_steps)
        remedy = f"lower it to {most} or less" if most else "start fewer processes or lower --grad_accum_steps"
        raise Refused(
            f"--batch_size_per_gpu {batch_size_per_gpu}: {n_images} images are fewer than one step of {global_batch} "
            f"({world_size} processes x --grad_accum_steps {grad_accum_steps}); {remedy}"
        )
    return n_images // global_batch


def check_warmups(epochs: float, steps: int, **warmups: float) -> None:
    """Refuses warm-ups ({flag: epochs}) that are longer than the run of `epochs`, which --steps may have set."""
    for flag, length in warmups.items():
        if length > epochs:
            raise Refused(f"--{flag} {length:g} is longer than the run of {epochs:g} epochs (--steps {steps}); "
                          "lower it")
