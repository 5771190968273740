"""Length and schedules of a run; every duration becomes a number of optimizer steps, or of whole epochs, here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parallel import Refused
from weights import checkpoints

# Warm-ups and frozen parts, as shares of the run, above which a run is warned.
LONGEST = {"warmup_epochs": 0.2, "warmup_teacher_temp_epochs": 0.3, "freeze_last_layer": 0.2,
           "freeze_backbone_epochs": 0.2}
DROP_LEVELS = 4  # of the share of dropped patches: each makes torch.compile build another graph


class Plan(NamedTuple):
    """Length of a run in steps, and the schedules, which the training loop indexes by step."""

    steps_per_epoch: int
    steps: int
    lr: np.ndarray  # (steps,), with backbone_lr that of the heads
    wd: np.ndarray  # (steps,)
    momentum: np.ndarray  # (steps,), of the teacher's EMA
    # DINOv2's, each (steps,)
    teacher_temp: np.ndarray | None = None
    last_layer_lr: np.ndarray | None = None
    backbone_lr: np.ndarray | None = None
    early_epochs: int = 0  # the first ones, on crops of low resolution
    token_drop: Sequence[float] = ()  # by epoch, share of the patches dropped from the student's global crops; (): none

    @property
    def epochs(self) -> int:
        """Number of epochs; the last one may be partial."""
        return math.ceil(self.steps / self.steps_per_epoch)

    @property
    def warmup(self) -> int:
        """The step at which the learning rate's warm-up ends, where it is highest; the backbone's, unless it is frozen
        for the whole run."""
        lr = self.lr if self.backbone_lr is None or not self.backbone_lr.any() else self.backbone_lr
        return int(lr.argmax())

    def patch_counts(self, patches: int, early_patches: int) -> list[tuple[int, int]]:
        """By epoch: patches of a global crop, and how many of them the student keeps."""
        if not self.token_drop:
            return []
        totals = [early_patches] * self.early_epochs + [patches] * (self.epochs - self.early_epochs)
        return [(n, n - int(n * share)) for n, share in zip(totals, self.token_drop, strict=True)]

    def less_work(self, sizes: tuple[int, int], early_sizes: tuple[int, int]) -> list[str]:
        """What the first epochs save, in words. Args: sides of global and local crops in pixels."""
        lines = []
        if self.early_epochs:
            lines.append(f"crops of {early_sizes[0]} and {early_sizes[1]} pixels in {named(range(self.early_epochs))}, "
                         f"of {sizes[0]} and {sizes[1]} in {named(range(self.early_epochs, self.epochs))}")
        if self.token_drop:
            levels = [(share, [e for e, _ in group])
                      for share, group in groupby(enumerate(self.token_drop), key=lambda item: item[1])]
            lines.append("patches dropped from the student's global crops: "
                         + ", ".join(f"{share:.0%} in {named(epochs)}" for share, epochs in levels))
        return lines


def named(epochs: Sequence[int]) -> str:
    return f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"


def early_epochs(share: float, epochs: int) -> int:
    """Epochs on crops of low resolution: `share` of them, rounded.

    Raises:
        Refused: these are none, or all.
    """
    early = round(share * epochs)
    if share and early in (0, epochs):
        raise Refused(f"--low_resolution_epochs {share:g} is {'none' if not early else 'all'} of the run's {epochs} "
                      "epoch(s); give another share, or a longer run")
    return early


def drop_by_epoch(start_end: Sequence[float] | None, epochs: int) -> tuple[float, ...]:
    """Share of dropped patches by epoch: from `start` to `end` in up to DROP_LEVELS equal parts of the run."""
    if start_end is None or not any(start_end):
        return ()
    levels = min(DROP_LEVELS, epochs)
    return tuple(float(share) for share in np.linspace(*start_end, levels)[np.arange(epochs) * levels // epochs])


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


def long_warmups(steps: int, unit: int, **durations: float) -> list[str]:
    """A warning for each of the `durations` ({flag: epochs of `unit` steps}) that is a larger share of the run than in
    any published recipe."""
    shares = {flag: length * unit / steps for flag, length in durations.items()}
    return [f"WARNING: --{flag} {durations[flag]:g} is {share:.0%} of the run; lower it, unless you mean it"
            for flag, share in shares.items() if share > LONGEST[flag]]


def begun(folder: str) -> bool:
    """Whether a run in `folder` has left a checkpoint. It keeps flags that a new run may not have."""
    return any((Path(folder) / name).exists() for name in (checkpoints.NAME, checkpoints.PREVIOUS))


def check_min_lr(min_lr: float, peak: float, lr: float, images: int, folder: str) -> None:
    """Refuses a learning rate that would rise to its end, unless a run with it has begun in `folder`.

    Args:
        peak: of `lr`, scaled to `images` per step.
    """
    if min_lr > peak and not begun(folder):
        raise Refused(f"--min_lr {min_lr:g} is above the peak learning rate {peak:.3g}, which is --lr {lr:g} scaled to "
                      f"{images} images per step; lower it, or raise --lr")
