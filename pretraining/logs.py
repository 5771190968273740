"""Output of a run: console lines, log files, figures, TensorBoard and Weights & Biases."""

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


class Log:
    """Writes console lines, log.txt (one JSON line per epoch), log_steps.txt (one JSON line per logged step) and
    figures, and optionally logs to TensorBoard and Weights & Biases. Rank 0 only.

    log.txt contains no timings, so it is the same whether or not a run was interrupted; speed and waiting times are in
    log_steps.txt. Every number in the values is logged under its own name.
    """

    def __init__(
        self, folder: Path, first_step: int, steps: int, *, tensorboard: bool = False, wandb_config: dict | None = None
    ) -> None:
        """`first_step`: where the run starts or resumes. `wandb_config`: sent to W&B; None: off."""
        self.folder = folder
        self.writer = self.wandb = None
        if not parallel.is_main():
            return
        self.lines = Lines(steps)
        # A line of log.txt holds the number of steps done, one of log_steps.txt the number of its step, from 0.
        for name, first in (("log.txt", first_step + 1), ("log_steps.txt", first_step)):
            drop_lines_from(self.folder / name, first)
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
        """Write figures, uint8 (height, width, 3), as pictures/NAME_WHEN.png."""

        for name, figure in named.items():
            save_picture(figure, self.folder / "pictures" / f"{name}_{when}.png")
            if self.writer is not None:
                self.writer.add_image(f"pictures/{name}", figure, step, dataformats="HWC")
        if self.writer is not None:
            self.writer.flush()
        if self.wandb is not None:
            from wandb import Image

            self.wandb.log({f"pictures/{k}": Image(v) for k, v in named.items()} | {"step": step})

    def close(self) -> None:
        if parallel.is_main():
            self.lines.close()
            for receiver, end in ((self.writer, "close"), (self.wandb, "finish")):
                if receiver is not None:
                    getattr(receiver, end)()

    def _write(self, name: str, values: dict) -> None:
        with open(self.folder / name, "a") as f:
            f.write(json.dumps(values) + "\n")
            if name == "log.txt":  # must be on disk before the checkpoint of this epoch
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
    return spec is not None and spec.origin is not None  # origin is None for a folder of that name without a module


def start_wandb(folder: Path, config: dict):
    """Start a run of Weights & Biases, or continue it if training resumes; its id is stored in wandb_run.txt.

    Raises:
        Stopped: not logged in, or no connection.
    """
    import wandb

    name = folder / "wandb_run.txt"
    known = name.read_text().strip() if name.exists() else None
    atomic.mark_output(folder / "wandb")  # where it keeps copies of the figures
    try:
        run = wandb.init(project=os.environ.get("WANDB_PROJECT", "dino"), name=folder.resolve().name, dir=str(folder),
                         config=config, id=known, resume="allow")
    except wandb.Error as error:
        raise parallel.Stopped(f"--wandb: {error}; `wandb login`, WANDB_MODE=offline, or leave the flag out") from error
    name.write_text(f"{run.id}\n")
    run.define_metric("*", step_metric="step")  # W&B's own step can't go back, but a resumed run repeats a few steps
    return run


def drop_lines_from(path: Path, first: int) -> None:
    """Remove lines with "step" >= `first`, which a killed run wrote after its last checkpoint and will write again."""
    def kept(line: str) -> bool:
        try:
            return json.loads(line)["step"] < first
        except (ValueError, KeyError, TypeError):  # truncated, or not a line of a run
            return False

    if path.exists():
        lines = [x for x in path.read_text(errors="replace").splitlines() if kept(x)]
        atomic.write_text(path, "".join(x + "\n" for x in lines))
