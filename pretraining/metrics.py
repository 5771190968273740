"""What a run says of itself: meters that stay on the device, health of the training, console and log files.

Shapes: B images, V views, K prototypes, D width.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import parallel
from method.rank import effective_rank
from pretraining.progress import Lines


class Meters:
    """Means over steps that stay on the device until they are read, so that no step waits for the host."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def update(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64 if not isinstance(value, Tensor) else None).detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean of each value over its updates and over the processes: one wait for the device."""
        if not self.sums:
            return {}
        device = next((s.device for s in self.sums.values() if s.device.type != "cpu"), torch.device("cpu"))
        sums = torch.stack([s.to(device, torch.float32) for s in self.sums.values()])
        means = parallel.mean_over_processes(sums / torch.tensor(list(self.counts.values()), device=device))
        return dict(zip(self.sums, means.tolist(), strict=True))

    def state_dict(self) -> dict:
        return {"sums": {k: v.cpu() for k, v in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.sums = {k: v.to(device) for k, v in state["sums"].items()}
        self.counts = dict(state["counts"])


def averaged(states: list[dict]) -> dict:
    """One state of Meters for each of several processes that go on where others stopped: their mean stays the same."""
    sums = {k: sum(state["sums"][k] for state in states) / len(states) for k in states[0]["sums"]}
    return {"sums": sums, "counts": states[0]["counts"]}


class NonFinite(RuntimeError):
    """A loss or gradient that is not a finite number: the first such step, and the first rank that had one."""

    def __init__(self, step: int, rank: int, losses: list[float], last_good: str) -> None:
        self.step, self.rank = step, rank
        super().__init__(f"step {step}: loss or gradient is not finite (loss {', '.join(f'{x:g}' for x in losses)} by "
                         f"rank); the last good checkpoint is {last_good}; try a lower --lr or --clip_grad, or "
                         "--precision bf16")


class FiniteWatch:
    """Remembers, on the device, the first step whose loss or gradient was not finite.

    Attributes:
        found: float32 scalar, 1 from that step on: what PyTorch's fused optimizers call found_inf. Given to one, it
            leaves the weights as they were before that step, and no step waits for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.step = torch.full((), -1, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.found = torch.zeros((), device=device)

    def update(self, step: int, loss: Tensor, grad_norms: Tensor | None = None) -> None:
        """`grad_norms`: None where a gradient scaler expects an overflow now and then."""
        bad = ~torch.isfinite(loss.detach())
        if grad_norms is not None:
            bad = bad | ~torch.isfinite(grad_norms).all()
        first = bad & (self.step < 0)
        self.step = torch.where(first, step, self.step)
        self.loss = torch.where(first, loss.detach().float(), self.loss)
        self.found.logical_or_(bad)

    def check(self, last_good: str) -> None:
        """Raise NonFinite on all processes if any of them saw one: waits for the device once."""
        if parallel.max_over_processes(self.step).item() < 0:
            return
        losses, steps = parallel.gather(self.loss[None]).tolist(), parallel.gather(self.step[None]).tolist()
        step = min(s for s in steps if s >= 0)
        those = [rank for rank, s in enumerate(steps) if s == step]
        # A gradient is everyone's; a loss that is no number is the rank's own.
        rank = next((r for r in those if not math.isfinite(losses[r])), those[0])
        raise NonFinite(step, rank, losses, last_good)


# ---- Health of the training ----


@torch.no_grad()
def health(
    teacher_output: Tensor, features: Tensor, loss: Tensor, dino_loss: nn.Module, epoch: int
) -> dict[str, Tensor]:
    """How the training is doing, from tensors of one step; this process's images only.

    Args:
        teacher_output: (2 B, K), before centring. features: (2 B, D), the teacher's, of the same crops.
        loss: the step's loss. dino_loss: for its centre and temperature.

    Returns:
        entropy: mean entropy of the teacher's output in nats: ln K when it is uniform, 0 when one-hot.
        kl: loss - entropy, the mean divergence of the student from the teacher.
        center_norm: L2 norm of the centre.
        feature_std: standard deviation over the images of the L2-normalized features, times sqrt(D): 1 when they
            are spread evenly over the sphere, 0 when they are all the same.
        feature_rank: RankMe of the centred features, at most min(2 B, D).
        prototypes_used: number of prototypes that are some image's first choice, at most 2 B.
    """
    q = dino_loss.teacher_probabilities(teacher_output, epoch)
    entropy = -(q * q.clamp_min(1e-30).log()).sum(-1).mean()
    x = features.float()
    unit = nn.functional.normalize(x, dim=-1)
    first_choice = torch.zeros(q.shape[1], device=q.device).index_fill_(0, q.argmax(-1), 1.0)
    return {
        "entropy": entropy,
        "kl": loss.detach() - entropy,
        "center_norm": dino_loss.center.norm(),
        "feature_std": unit.std(0).mean() * math.sqrt(x.shape[1]),
        "feature_rank": effective_rank(x - x.mean(0)),
        "prototypes_used": first_choice.sum(),
    }


def collapse(entropy: float, ln_k: float, prototypes_used: float) -> str | None:
    """Name of the collapse that these figures of `health` show, with the flags to try; None when there is none.

    DINO avoids both by balance (section 5.3): centring alone drifts to the uniform output, sharpening alone to a
    single prototype. A sharp output is healthy as long as images choose different prototypes.
    """
    if entropy > 0.995 * ln_k:
        return ("collapse to the uniform output (entropy = ln K): the teacher says the same of every picture; try a "
                "lower --teacher_temp and --warmup_teacher_temp, or --norm_last_layer true")
    if entropy < 0.01 * ln_k and prototypes_used < 1.5:
        return ("collapse to one prototype (entropy = 0): the teacher names the same one for every picture; try a "
                "higher --teacher_temp, a lower --lr, or --freeze_last_layer 1 or more")
    return None


# ---- Console and files ----


def duration(seconds: float) -> str:
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class Log:
    """Console, log.txt (one JSON line an epoch), log_steps.txt (one a logged step), pictures, and on request
    TensorBoard and Weights & Biases; on rank 0.

    log.txt holds nothing that depends on the clock, so that an interrupted run's equals an uninterrupted one's;
    speed and waiting stand in log_steps.txt.
    """

    def __init__(self, args: argparse.Namespace, first_epoch: int, first_step: int, steps: int) -> None:
        self.folder = Path(args.output_dir)
        self.writer = self.wandb = None
        if not parallel.is_main():
            return
        self.lines = Lines(steps)
        for name, key, first in (("log.txt", "epoch", first_epoch), ("log_steps.txt", "step", first_step)):
            drop_lines_from(self.folder / name, key, first)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=first_step)
        if args.wandb:
            self.wandb = start_wandb(self.folder, vars(args))

    def step(self, console: str, values: dict) -> None:
        if parallel.is_main():
            self._write("log_steps.txt", values)
            self.lines.passing(console, values["step"] + 1)

    def epoch(self, console: str, values: dict) -> None:
        if parallel.is_main():
            self._write("log.txt", values)
            self.lines.lasting(console)

    def pictures(self, named: dict[str, np.ndarray], when: str, step: int) -> None:
        """Write pictures uint8 (height, width, 3) as pictures/NAME_WHEN.png."""
        from protocols.sheets import save_picture

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
    """A run of Weights & Biases that goes on when the training does; its id lies in wandb_run.txt.

    Raises OSError in one line where there is no account or no connection.
    """
    import wandb

    name = folder / "wandb_run.txt"
    found = name.read_text().strip() if name.exists() else None
    try:
        run = wandb.init(project=os.environ.get("WANDB_PROJECT", "dino"), name=folder.resolve().name, dir=str(folder),
                         config=config, id=found, resume="allow")
    except wandb.Error as error:
        raise OSError(f"--wandb: {error}; `wandb login`, WANDB_MODE=offline, or leave the flag out") from error
    name.write_text(f"{run.id}\n")
    run.define_metric("*", step_metric="step")  # a resumed run says a few steps again
    return run


def drop_lines_from(path: Path, key: str, first: int) -> None:
    """Keep the lines before `first`: a run killed after its last checkpoint had gone further, and will say so again."""
    def kept(line: str) -> bool:
        try:
            return json.loads(line)[key] < first
        except (ValueError, KeyError, TypeError):  # cut short, or not of a run
            return False

    if path.exists():
        lines = [x for x in path.read_text(errors="replace").splitlines() if kept(x)]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(x + "\n" for x in lines))
        os.replace(temporary, path)  # a kill leaves the old file or the new one, never a part


class Clock:
    """Speed since the last reading: seconds a step, and the share of them spent waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def next(self, iterator):
        """next(iterator), timed as waiting."""
        started = time.perf_counter()
        item = next(iterator)
        self.waited += time.perf_counter() - started
        return item

    def read(self) -> tuple[float, float]:
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        seconds, waiting = elapsed / max(self.steps, 1), self.waited / elapsed
        self.reset()
        return seconds, waiting
