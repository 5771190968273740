"""What a run writes: lines on the console, log files, figures, TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np

import atomic
import parallel
from pretraining.progress import Lines
from protocols.sheets import save_picture


def duration(seconds: float) -> str:
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class Log:
    """Console, log.txt (one JSON line per epoch), log_steps.txt (one per logged step), figures, and on request
    TensorBoard and Weights & Biases; on rank 0.

    log.txt holds nothing that depends on the clock, so an interrupted run's equals an uninterrupted run's; speed and
    waiting are in log_steps.txt. Every number that the values hold is logged, under its own name.
    """

    def __init__(
        self, folder: Path, first_epoch: int, first_step: int, steps: int, tensorboard: bool = False,
        wandb_config: dict | None = None,
    ) -> None:
        """`first_epoch`, `first_step`: where the run starts or resumes; `wandb_config`: flags to send, or None."""
        self.folder = folder
        self.writer = self.wandb = None
        if not parallel.is_main():
            return
        self.lines = Lines(steps)
        for name, key, first in (("log.txt", "epoch", first_epoch), ("log_steps.txt", "step", first_step)):
            drop_lines_from(self.folder / name, key, first)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=first_step)
        if wandb_config is not None:
            self.wandb = start_wandb(self.folder, wandb_config)

    def step(self, console: str, values: dict) -> None:
        if parallel.is_main():
            self._write("log_steps.txt", values)
            self.lines.passing(console, values["step"] + 1)

    def epoch(self, console: str, values: dict) -> None:
        if parallel.is_main():
            self._write("log.txt", values)
            self.lines.lasting(console)

    def pictures(self, named: dict[str, np.ndarray], when: str, step: int) -> None:
        """Write figures uint8 (height, width, 3) as pictures/NAME_WHEN.png."""

        for name, picture in named.items():
            save_picture(picture, self.folder / "pictures" / f"{name}_{when}.png")
            if self.writer is not None:
                self.writer.add_image(f"pictures/{name}", picture, step, dataformats="HWC")
        if self.writer is not None:
            self.writer.flush()
        if self.wandb is not None:
            from wandb import Image as Shown

            self.wandb.log({f"pictures/{k}": Shown(v) for k, v in named.items()} | {"step": step})

    def close(self) -> None:
        if parallel.is_main():
            self.lines.close()
            for receiver, end in ((self.writer, "close"), (self.wandb, "finish")):
                if receiver is not None:
                    getattr(receiver, end)()

    def _write(self, name: str, values: dict) -> None:
        with open(self.folder / name, "a") as f:
            f.write(json.dumps(values) + "\n")
            if name == "log.txt":  # on the disk before the checkpoint that counts on it
                f.flush()
                os.fsync(f.fileno())
        scalars = {f"{name.removesuffix('.txt')}/{k}": v for k, v in values.items()
                   if isinstance(v, (int, float)) and k not in ("step", "epoch")}
        if self.writer is not None:
            for key, value in scalars.items():
                self.writer.add_scalar(key, value, values["step"])
            self.writer.flush()
        if self.wandb is not None:
            self.wandb.log(scalars | {"step": values["step"], "epoch": values["epoch"]})


def installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # None: a mere folder of that name


def start_wandb(folder: Path, config: dict):
    """A run of Weights & Biases that continues when the training is resumed; its id is kept in wandb_run.txt.

    Raises:
        Stopped: no account, or no connection.
    """
    import wandb

    name = folder / "wandb_run.txt"
    known = name.read_text().strip() if name.exists() else None
    try:
        run = wandb.init(project=os.environ.get("WANDB_PROJECT", "dino"), name=folder.resolve().name, dir=str(folder),
                         config=config, id=known, resume="allow")
    except wandb.Error as error:
        raise parallel.Stopped(f"--wandb: {error}; `wandb login`, WANDB_MODE=offline, or leave the flag out") from error
    name.write_text(f"{run.id}\n")
    run.define_metric("*", step_metric="step")  # a resumed run repeats a few steps
    return run


def drop_lines_from(path: Path, key: str, first: int) -> None:
    """Keep the lines before `first`: a run killed after its last checkpoint had gone further, and will repeat it."""
    def kept(line: str) -> bool:
        try:
            return json.loads(line)[key] < first
        except (ValueError, KeyError, TypeError):  # cut short, or not of a run
            return False

    if path.exists():
        lines = [x for x in path.read_text(errors="replace").splitlines() if kept(x)]
        atomic.write_text(path, "".join(x + "\n" for x in lines))
