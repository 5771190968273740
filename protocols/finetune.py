"""Fine-tuning of a backbone on labels (DINO, arXiv 2104.14294, section 4.4; recipe of DeiT, Touvron et al. 2021).

Layer-wise learning rates, mixup and cutmix, stochastic depth, label smoothing, and a moving average of the weights.

Shapes: B images per process and batch, C classes, L blocks, M test images.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import parallel
import utils
from method.photometric import to_device
from parallel import Refused
from protocols.features import TRAINING_SCALE, Network, extract_features, image_batches, input_dataset
from protocols.linear import Training, run_of, train
from protocols.progress import FIRST, MOST, progress
from protocols.splits import Task
from vision_transformer import DropPath, VisionTransformer, build_backbone
from weights import checkpoints
from weights.backbones import normalizes_single_values
from weights.layouts import STORED_OPTIONS

UNFINISHED, TUNED = "checkpoint_finetune.pth", "finetuned.pth"


class Recipe(NamedTuple):
    """How a backbone is tuned, besides what `linear.Training` holds."""

    layer_decay: float = 0.75  # factor of the learning rate from a layer to the one before it
    warmup_epochs: float = 5
    weight_decay: float = 0.05
    mixup: float = 0.8  # parameter of the Beta distribution; 0: no mixup
    cutmix: float = 1.0  # the same for cutmix
    smoothing: float = 0.1  # of the labels
    drop_path_rate: float = 0.1
    ema_decay: float = 0.999  # of the averaged weights, which are evaluated; 0: no averaging


class Classifier(nn.Module):
    """A backbone and a linear layer: images -> (B, C) logits."""

    def __init__(self, backbone: nn.Module, width: int, n_classes: int) -> None:
        super().__init__()
        self.backbone, self.linear = backbone, nn.Linear(width, n_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.backbone(x))


def trainable(network: Network, drop_path_rate: float) -> nn.Module:
    """A trainable copy of the network's backbone, with stochastic depth."""
    model, info = copy.deepcopy(network.forward), network.info
    if isinstance(model, VisionTransformer):
        for i, block in enumerate(model.blocks):  # increasing with the depth (Huang et al. 2016)
            block.drop_path = DropPath(drop_path_rate * i / max(len(model.blocks) - 1, 1))
    elif drop_path_rate:
        model, _ = build_backbone(info["arch"], info["patch_size"], drop_path_rate, in_chans=info["in_chans"])
        model.load_state_dict(network.forward.state_dict())
    return model.requires_grad_(True)


# ---- Layer-wise learning rates ----


def depths(names: list[str]) -> dict[str, int]:
    """Layer of each backbone parameter: 0 before the first block, 1 ... L in the blocks, L + 1 after them.

    Blocks are recognized by the number in a parameter's name: blocks.3, layer2.1.
    """
    block_of = {name: match[1] for name in names if (match := re.match(r"([a-z_]+\d*\.\d+)\.", name))}
    order = {block: i + 1 for i, block in enumerate(dict.fromkeys(block_of.values()))}
    depth, outside = {}, 0
    for name in names:
        if name in block_of:
            outside = len(order) + 1  # of parameters after the first block that belong to none
        depth[name] = order[block_of[name]] if name in block_of else outside
    return depth


def param_groups(model: Classifier, lr: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups of the optimizer with learning rate lr x layer_decay^(layers above); no weight decay of vectors."""
    depth_of = depths([name for name, _ in model.backbone.named_parameters()])
    top = max(depth_of.values())
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        depth = depth_of.get(name.removeprefix("backbone."), top)
        decayed = parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
        group = groups.setdefault((depth, decayed), {
            "params": [], "peak": lr * layer_decay ** (top - depth), "weight_decay": weight_decay if decayed else 0.0})
        group["params"].append(parameter)
    return list(groups.values())


# ---- Training ----


def mixing(mixup: float, cutmix: float, n_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels (B,)) -> (mixed images, soft labels (B, C)); each batch by one of the two, drawn at random."""
    from torchvision.transforms import v2  # takes a second to import

    chosen = [v2.MixUp(alpha=mixup, num_classes=n_classes)] if mixup else []
    chosen += [v2.CutMix(alpha=cutmix, num_classes=n_classes)] if cutmix else []
    return v2.RandomChoice(chosen) if chosen else lambda x, y: (x, F.one_hot(y, n_classes).float())


def batches(network: Network, task: Task, training: Training, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of an epoch, this process's share of each global batch; an incomplete last batch is dropped."""
    order = torch.from_numpy(np.random.default_rng((training.seed, epoch)).permutation(len(task.train)))
    used = len(order) - len(order) % (training.batch_size * parallel.world_size())
    mine = order[:used][parallel.rank() :: parallel.world_size()]
    dataset = input_dataset(network, task.train, epoch, TRAINING_SCALE)
    images = image_batches(dataset, mine.tolist(), training.batch_size, training.num_workers, network.device)
    for x, rows in zip(images, mine.split(training.batch_size), strict=True):
        yield x, to_device(task.train.labels[rows], network.device)


def tune_epoch(
    network: Network, wrapped: nn.Module, averaged: Classifier, optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]], schedule: np.ndarray, recipe: Recipe, epoch: int, seed: int,
) -> Tensor:
    """One epoch over (images, labels); returns the (1,) mean loss over processes.

    Mixing and stochastic depth draw from (seed, epoch, process): a resumed run draws the same.

    Args:
        wrapped: the classifier, in DistributedDataParallel if there are several processes.
        averaged: its moving average, updated here.
        schedule: factor of the peak learning rates for each step of the epoch.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch, parallel.rank())).generate_state(1)[0]))
    mix = mixing(recipe.mixup, recipe.cutmix, averaged.linear.out_features)
    autocast = network.autocast()
    model = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    wrapped.train()
    total = torch.zeros(1, device=network.device)
    for i, ((x, y), factor) in enumerate(zip(batches, schedule, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * float(factor)
        x, y = mix(x, y)
        with autocast:
            logits = wrapped(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=recipe.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step = epoch * len(schedule) + i
        # Early averages follow the weights faster; otherwise a short run would return its initial weights.
        decay = min(recipe.ema_decay, (1 + step) / (10 + step)) if recipe.ema_decay else 0.0
        utils.ema_update(model, averaged, decay)
        total += loss.detach()
    return parallel.mean_over_processes(total) / len(schedule)


def tune(network: Network, task: Task, training: Training, recipe: Recipe, folder: Path) -> tuple[list[dict], Tensor]:
    """Fine-tune, or resume a stopped run; write finetuned.pth; classify the test images once.

    Args:
        training: its first learning rate, epochs, num_labels, val_freq, seed, batch_size and num_workers are used.

    Returns:
        A row for the table, and (M, min(5, C)) classes of the test images, best first.

    Raises:
        Refused: fewer images than a batch, a batch too small for batch norm, a stopped run of other settings, or a loss
            that is not finite.
    """
    device, epochs = network.device, training.epochs
    batch, n_classes = training.batch_size * parallel.world_size(), max(training.num_labels, len(task.classes))
    if not (steps := len(task.train) // batch):
        raise Refused(f"--batch_size_per_gpu {training.batch_size}: {len(task.train)} training images are less than "
                      "one batch; lower it")
    crop = network.about["crop_size"]
    if training.batch_size == 1 and normalizes_single_values(network.forward, network.info["in_chans"], crop):
        raise Refused(f"--batch_size_per_gpu 1: batch norm in --arch {network.info['arch']} needs more than one value "
                      f"per channel, and one crop of {crop} pixels gives one; raise it, or --crop_size")
    torch.manual_seed(training.seed)
    model = Classifier(trainable(network, recipe.drop_path_rate), network.info["embed_dim"], n_classes).to(device)
    averaged = copy.deepcopy(model).requires_grad_(False)
    lr = training.lrs[0] * batch / 256
    optimizer = torch.optim.AdamW(param_groups(model, lr, recipe.weight_decay, recipe.layer_decay), lr=lr)
    schedule = utils.cosine_scheduler(1.0, 0.0, epochs, steps, warmup_epochs=recipe.warmup_epochs)
    wrapped = model if parallel.world_size() == 1 else DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None)

    def epoch_losses(epoch: int) -> Tensor:
        images = progress(batches(network, task, training, epoch), steps * batch, f"epoch {epoch + 1}", batch,
                          MOST if epoch else FIRST)
        return tune_epoch(network, wrapped, averaged, optimizer, images,
                          schedule[epoch * steps : (epoch + 1) * steps], recipe, epoch, training.seed)

    run = run_of(network.about, task, training) | recipe._asdict() | {"lr": list(training.lrs)}
    train(folder / UNFINISHED, run, {"model": model, "averaged": averaged, "optimizer": optimizer}, epoch_losses,
          training)
    averaged.eval()
    if parallel.is_main():
        save(averaged, network, task.classes, folder)
    logits = extract_features(averaged, input_dataset(network, task.test), training.batch_size, training.num_workers,
                              device, network.autocast())
    row = {"lr": training.lrs[0], "epochs": epochs, "layer_decay": recipe.layer_decay}
    return [row], logits.topk(min(5, n_classes)).indices


def save(model: Classifier, network: Network, classes: Sequence[str], folder: Path) -> None:
    """finetuned.pth: the backbone under `teacher`, where evaluation scripts look for it, and the classifier."""
    info = network.info
    args = {k: list(info[k]) if isinstance(info[k], tuple) else info[k]
            for k in ("arch", "patch_size", "in_chans", "mean", "std", "value_range") if k in info} | {
        "global_crops_size": network.about["crop_size"]} | {
        k: info["options"][k] for k in STORED_OPTIONS if k in info["options"]}
    linear = {f"linear.{k}": v.cpu() for k, v in model.linear.state_dict().items()}
    checkpoints.save({"teacher": model.backbone.state_dict(), "state_dict": linear, "classes": list(classes),
                      "args": args}, folder / TUNED)
    (folder / UNFINISHED).unlink(missing_ok=True)
