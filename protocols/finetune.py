"""Fine-tuning of a whole backbone with labels (DINO, arXiv 2104.14294, section 4.4; the recipe of DeiT, Touvron et al.
2021): layer-wise learning rates, mixup and cutmix, stochastic depth, label smoothing, averaged weights.

Shapes: B images a process, C classes, L blocks.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

import parallel
import utils
from imagesets import loaders
from method.photometric import to_device
from protocols.features import (
    TRAINING_SCALE,
    Network,
    available_cores,
    extract_features,
    input_dataset,
    readable,
)
from protocols.linear import unfinished
from protocols.splits import Task, run_of
from vision_transformer import DropPath, VisionTransformer, build_backbone
from weights import checkpoints

UNFINISHED, TUNED = "checkpoint_finetune.pth", "finetuned.pth"
RECIPE = ("lr", "layer_decay", "warmup_epochs", "weight_decay", "mixup", "cutmix", "smoothing", "drop_path_rate",
          "ema_decay")


class Classifier(nn.Module):
    """A backbone and a linear layer on its features."""

    def __init__(self, backbone: nn.Module, width: int, n_classes: int) -> None:
        super().__init__()
        self.backbone, self.linear = backbone, nn.Linear(width, n_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.backbone(x))


def trainable(network: Network, drop_path_rate: float) -> nn.Module:
    """The network's backbone with stochastic depth, which a frozen one has no use for."""
    model, info = copy.deepcopy(network.forward), network.info
    if isinstance(model, VisionTransformer):
        for i, block in enumerate(model.blocks):  # rising with the depth (Huang et al. 2016)
            block.drop_path = DropPath(drop_path_rate * i / max(len(model.blocks) - 1, 1))
    elif drop_path_rate:
        model, _ = build_backbone(info["arch"], info["patch_size"], drop_path_rate, in_chans=info["in_chans"])
        model.load_state_dict(network.forward.state_dict())
    return model.requires_grad_(True)


# ---- Layer-wise learning rates ----


def depths(names: list[str]) -> dict[str, int]:
    """Each backbone parameter's layer: 0 before the first block, 1 ... L in the blocks, L + 1 behind them.

    A block is what a number in a parameter's name counts: blocks.3, layer2.1.
    """
    of_block = {name: match[1] for name in names if (match := re.match(r"([a-z_]+\d*\.\d+)\.", name))}
    order = {block: i + 1 for i, block in enumerate(dict.fromkeys(of_block.values()))}
    seen, found = False, {}
    for name in names:
        seen = seen or name in of_block
        found[name] = order[of_block[name]] if name in of_block else (len(order) + 1 if seen else 0)
    return found


def param_groups(model: Classifier, lr: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups with the learning rate lr x layer_decay^(layers above); biases and norms are not decayed."""
    of = depths([name for name, _ in model.backbone.named_parameters()])
    top = max(of.values())
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        depth = of.get(name.removeprefix("backbone."), top)
        decayed = parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
        group = groups.setdefault((depth, decayed), {
            "params": [], "peak": lr * layer_decay ** (top - depth), "weight_decay": weight_decay if decayed else 0.0})
        group["params"].append(parameter)
    return list(groups.values())


# ---- Training ----


def mixing(mixup: float, cutmix: float, n_classes: int):
    """(pictures, labels (B,)) -> (mixed pictures, soft labels (B, C)), each batch by one of the two."""
    chosen = [v2.MixUp(alpha=mixup, num_classes=n_classes)] if mixup else []
    chosen += [v2.CutMix(alpha=cutmix, num_classes=n_classes)] if cutmix else []
    return v2.RandomChoice(chosen) if chosen else lambda x, y: (x, F.one_hot(y, n_classes).float())


def batches(
    args: argparse.Namespace, network: Network, task: Task, epoch: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of an epoch's global batches; what fills no batch is left out."""
    order = np.random.default_rng((args.seed, epoch)).permutation(len(task.train.labels))
    whole = steps_per_epoch(args, task) * args.batch_size_per_gpu * parallel.world_size()
    mine = order[:whole][parallel.rank() :: parallel.world_size()].tolist()
    loader = DataLoader(
        Subset(input_dataset(network, task.train.images, epoch, TRAINING_SCALE), mine), args.batch_size_per_gpu,
        pin_memory=device.type == "cuda", **loaders.worker_options(min(args.num_workers, available_cores())),
    )
    first = 0
    for x in readable(loader):
        y = task.train.labels[mine[first : first + len(x)]]
        first += len(x)
        yield x.to(device, non_blocking=True), to_device(y, device)


def steps_per_epoch(args: argparse.Namespace, task: Task) -> int:
    steps = len(task.train.labels) // (args.batch_size_per_gpu * parallel.world_size())
    if not steps:
        raise ValueError(f"--batch_size_per_gpu {args.batch_size_per_gpu}: {len(task.train.labels)} training images "
                         "are less than one batch; lower it")
    return steps


def tune_epoch(
    args: argparse.Namespace, network: Network, wrapped: nn.Module, averaged: Classifier,
    optimizer: torch.optim.Optimizer, batches: Iterator[tuple[Tensor, Tensor]], epoch: int, schedule: np.ndarray,
    device: torch.device,
) -> float:
    """One epoch over (pictures, labels), whose mean loss it returns; `schedule` are its steps' factors of the rates.

    Mixing and stochastic depth are a function of the seed, the epoch and the process: a resumed run draws the same.
    """
    torch.manual_seed(int(np.random.SeedSequence((args.seed, epoch, parallel.rank())).generate_state(1)[0]))
    mix, half = mixing(args.mixup, args.cutmix, averaged.linear.out_features), network.autocast()
    model = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    wrapped.train()
    total = torch.zeros((), device=device)
    for i, ((x, y), factor) in enumerate(zip(batches, schedule, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * float(factor)
        x, y = mix(x, y)
        with half:
            logits = wrapped(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=args.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step = epoch * len(schedule) + i
        # Young averages follow the weights faster: else a short run would end with its start.
        utils.ema_update(model, averaged, min(args.ema_decay, (1 + step) / (10 + step)) if args.ema_decay else 0.0)
        total += loss.detach()
    return float(parallel.mean_over_processes(total)) / len(schedule)


def tune(
    args: argparse.Namespace, network: Network, task: Task, device: torch.device, folder: Path
) -> tuple[list[dict], Tensor]:
    """Fine-tune, or go on where a run was stopped; write finetuned.pth; the test set is used once.

    Returns:
        A row for the table, and (M, min(5, C)) classes of the test images, the best first.
    """
    steps, n_classes = steps_per_epoch(args, task), max(args.num_labels, len(task.classes))
    torch.manual_seed(args.seed)
    model = Classifier(trainable(network, args.drop_path_rate), network.info["embed_dim"], n_classes).to(device)
    averaged = copy.deepcopy(model).requires_grad_(False)
    lr = args.lr[0] * args.batch_size_per_gpu * parallel.world_size() / 256
    optimizer = torch.optim.AdamW(param_groups(model, lr, args.weight_decay, args.layer_decay), lr=lr)
    schedule = utils.cosine_scheduler(1.0, 0.0, args.epochs, steps, warmup_epochs=args.warmup_epochs)
    run = run_of(args, network, task) | {name: getattr(args, name) for name in RECIPE}
    state, first = unfinished(folder / UNFINISHED, run), 0
    if state:
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    wrapped = model if parallel.world_size() == 1 else DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None)
    for epoch in range(first, args.epochs):
        shown = batches(args, network, task, epoch, device)
        mean = tune_epoch(args, network, wrapped, averaged, optimizer, shown, epoch,
                          schedule[epoch * steps : (epoch + 1) * steps], device)
        if not math.isfinite(mean):
            raise ValueError(f"--lr {args.lr[0]:g}: the loss is no longer finite; lower it")
        if (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs:
            parallel.say(f"epoch {epoch + 1}/{args.epochs}: training loss {mean:.4f}")
        if parallel.is_main():
            checkpoints.save({"run": run, "epoch": epoch + 1, "model": model.state_dict(),
                             "averaged": averaged.state_dict(), "optimizer": optimizer.state_dict()},
                            folder / UNFINISHED)
    averaged.eval()
    keep(folder, averaged, network, task.classes)
    dataset = input_dataset(network, task.test.images)
    logits = extract_features(averaged, dataset, args.batch_size_per_gpu, args.num_workers, device,
                              network.autocast())
    ranked = logits.topk(min(5, n_classes)).indices
    return [{"lr": args.lr[0], "epochs": args.epochs, "layer_decay": args.layer_decay}], ranked


def keep(folder: Path, model: Classifier, network: Network, classes: list[str]) -> None:
    """finetuned.pth: the backbone under `teacher`, as evaluation scripts read it, and the classifier."""
    if not parallel.is_main():
        return
    info = network.info
    args = {k: list(info[k]) if isinstance(info[k], tuple) else info[k]
            for k in ("arch", "patch_size", "in_chans", "mean", "std")} | {
        "global_crops_size": network.about["crop_size"]}
    linear = {f"linear.{k}": v.cpu() for k, v in model.linear.state_dict().items()}
    checkpoints.save({"teacher": model.backbone.state_dict(), "state_dict": linear, "classes": list(classes),
                     "args": args}, folder / TUNED)
    (folder / UNFINISHED).unlink(missing_ok=True)
