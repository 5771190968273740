"""Names of the published main_dino.py and utils.py, for code that imports them: a few lines on top of this project.

This project doesn't call them itself. docs/published_names.md lists what differs, and the names that are left out.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

import parallel
import utils
from parallel import Stopped
from pretraining.meters import Meters
from pretraining.state import seed_everything
from protocols.progress import duration
from weights import layouts

# ---- A process of a run ----


def init_distributed_mode(args: argparse.Namespace) -> None:
    """Start the process group and set args.rank, args.world_size and args.gpu; args.dist_url is read if it is there.

    A single process gets a group of one, so that `dist.get_rank()` and DistributedDataParallel work afterwards.

    Raises:
        Refused: see `parallel.start`.
    """
    device = parallel.start("auto", getattr(args, "dist_url", "env://"))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                                world_size=1)
    args.rank, args.world_size, args.gpu = parallel.rank(), parallel.world_size(), device.index or 0


def fix_random_seeds(seed: int = 31) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    seed_everything(seed)


def has_batchnorms(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def restart_from_checkpoint(ckp_path: str | os.PathLike, run_variables: dict | None = None, **kwargs) -> None:
    """Load a checkpoint into what is given by name (student=..., optimizer=...); without such a file, do nothing.

    Names that the checkpoint doesn't have are printed. Wrappers (DistributedDataParallel) are looked through.

    Args:
        run_variables: its keys that the checkpoint has (epoch, ...) get the checkpoint's values.

    Raises:
        weights.layouts.BadFile: not a readable checkpoint.
        RuntimeError: tensors of another network.
    """
    if not os.path.isfile(ckp_path):
        return
    checkpoint = layouts.read(ckp_path)
    for name, target in kwargs.items():
        if target is None:
            continue
        if name not in checkpoint:
            parallel.say(f"{ckp_path}: no {name} in it; it stays as it is")
            continue
        state = checkpoint[name]
        if isinstance(target, nn.parallel.DistributedDataParallel):
            target = target.module
        if isinstance(target, nn.Module):
            state = {key.removeprefix("module."): value for key, value in state.items()}
        target.load_state_dict(state)
    for name in run_variables or {}:
        if name in checkpoint:
            run_variables[name] = checkpoint[name]


# ---- Figures of a run ----


class SmoothedValue:
    """The last `window_size` values of a figure, and the mean of all: value, median, avg, max; global_avg."""

    def __init__(self, window_size: int = 20, fmt: str = "{median:.6f} ({global_avg:.6f})") -> None:
        self.deque: deque[float] = deque(maxlen=window_size)
        self.total, self.count, self.fmt = 0.0, 0, fmt

    def update(self, value: float, n: int = 1) -> None:
        self.deque.append(value)
        self.total, self.count = self.total + value * n, self.count + n

    def synchronize_between_processes(self) -> None:
        """Make global_avg the mean over all processes."""
        sums = parallel.gather_objects((self.total, self.count))
        self.total, self.count = sum(total for total, _ in sums), sum(count for _, count in sums)

    @property
    def value(self) -> float:
        return self.deque[-1]

    @property
    def median(self) -> float:
        return torch.tensor(list(self.deque)).median().item()  # the lower one of two in the middle

    @property
    def avg(self) -> float:
        return sum(self.deque) / len(self.deque)

    @property
    def max(self) -> float:
        return max(self.deque)

    @property
    def global_avg(self) -> float:
        return self.total / max(self.count, 1)

    def __str__(self) -> str:
        return self.fmt.format(median=self.median, avg=self.avg, global_avg=self.global_avg, max=self.max,
                               value=self.value)


class MetricLogger:
    """Figures by name, and a loop that prints them. Reading a tensor waits for the device; `Meters` doesn't."""

    def __init__(self, delimiter: str = "\t") -> None:
        self.meters: dict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.delimiter = delimiter

    def update(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.meters[name].update(float(value))

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self.meters[name] = meter

    def synchronize_between_processes(self) -> None:
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def __getattr__(self, name: str) -> SmoothedValue:
        if name in self.__dict__.get("meters", {}):
            return self.meters[name]
        raise AttributeError(f"MetricLogger has no {name}")

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def log_every(self, iterable: Iterable, print_freq: int, header: str = "") -> Iterator:
        """Yield the items of a sized iterable, and print a line before every `print_freq` of them and at the end."""
        started, n = time.perf_counter(), len(iterable)
        for i, item in enumerate(iterable):
            yield item
            if i % print_freq == 0 or i + 1 == n:
                eta = duration((time.perf_counter() - started) / (i + 1) * (n - i - 1))
                parallel.say(self.delimiter.join([f"{header} [{i + 1}/{n}]".strip(), f"eta: {eta}", str(self)]))


# ---- An epoch ----


def train_one_epoch(
    student: nn.Module, teacher: nn.Module, teacher_without_ddp: nn.Module, dino_loss: utils.DINOLoss,
    data_loader: Iterable, optimizer: torch.optim.Optimizer, lr_schedule: Sequence[float],
    wd_schedule: Sequence[float], momentum_schedule: Sequence[float], epoch: int,
    fp16_scaler: torch.amp.GradScaler | None, args: argparse.Namespace,
) -> dict[str, float]:
    """One epoch on batches (list of crops (B, C, h, w), labels), which are ignored. `main_dino.train` is the loop here.

    Args:
        data_loader: has a length; the schedules are indexed by step, len(data_loader) * epoch + i.
        fp16_scaler: None trains in float32.
        args: clip_grad and freeze_last_layer are read.

    Returns:
        Means of loss, lr and wd over the epoch and the processes.

    Raises:
        Stopped: the loss is not finite.
    """
    device, meters = next(student.parameters()).device, Meters()
    for i, (images, _) in enumerate(data_loader):
        step = len(data_loader) * epoch + i
        utils.set_lr_and_wd(optimizer, float(lr_schedule[step]), float(wd_schedule[step]))
        images = [crops.to(device, non_blocking=True) for crops in images]
        with torch.autocast(device.type, enabled=fp16_scaler is not None):
            loss = dino_loss(student(images), teacher(images[:2]), epoch)
        if not math.isfinite(loss.item()):
            raise Stopped(f"step {step}: the loss is {loss.item()}; try a lower --lr or --clip_grad")
        optimizer.zero_grad()
        (fp16_scaler.scale(loss) if fp16_scaler else loss).backward()
        if fp16_scaler:
            fp16_scaler.unscale_(optimizer)
        if args.clip_grad:
            utils.clip_gradients(student, args.clip_grad)
        utils.cancel_gradients_last_layer(epoch, student, args.freeze_last_layer)
        if fp16_scaler:
            fp16_scaler.step(optimizer)
            fp16_scaler.update()
        else:
            optimizer.step()
        utils.ema_update(student, teacher_without_ddp, float(momentum_schedule[step]))
        meters.update(loss=loss, lr=optimizer.param_groups[0]["lr"], wd=optimizer.param_groups[0]["weight_decay"])
    return meters.means()
