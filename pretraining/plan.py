"""The plan of a run: every duration as a number of optimizer steps, worked out once."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from parallel import Refused


class Plan(NamedTuple):
    """How long a run is, and the schedules that the loop indexes by step."""

    steps_per_epoch: int
    steps: int
    lr: np.ndarray  # (steps,), as the other two
    wd: np.ndarray
    momentum: np.ndarray  # of the teacher's moving average

    @property
    def epochs(self) -> int:
        """The last epoch may be a partial one."""
        return math.ceil(self.steps / self.steps_per_epoch)


def steps_per_epoch(n_images: int, batch_size_per_gpu: int, grad_accum_steps: int, world_size: int) -> int:
    """Optimizer steps in a pass over the images; images that fill no batch are left out.

    Raises:
        Refused: there are fewer images than one step takes.
    """
    global_batch = batch_size_per_gpu * world_size * grad_accum_steps
    if n_images < global_batch:
        most = n_images // (world_size * grad_accum_steps)
        remedy = f"lower it to {most} or less" if most else "start fewer processes or lower --grad_accum_steps"
        raise Refused(
            f"--batch_size_per_gpu {batch_size_per_gpu}: {n_images} images are less than one step of {global_batch} "
            f"({world_size} processes x --grad_accum_steps {grad_accum_steps}), so an epoch would have no step; "
            f"{remedy}"
        )
    return n_images // global_batch


def check_warmups(epochs: float, steps: int, **warmups: float) -> None:
    """Refuses a warm-up, named by its flag, that is longer than the run of `epochs`, shortened by --steps."""
    for flag, length in warmups.items():
        if length > epochs:
            raise Refused(f"--{flag} {length:g} is longer than the run of {epochs:g} epochs (--steps {steps}); "
                          "lower it")
