"""Linear layers on frozen patch tokens: training crops, the layers of all settings, and their training in one pass.

What the layers predict is the caller's: `new_layer` makes one for a width, and `loss` compares its maps with the truth.

Shapes: B images, C channels, D width, K outputs per pixel, h x w patches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import parallel
from imagesets.annotated import Annotated
from imagesets.loaders import worker_options
from parallel import Refused
from protocols import tokens, transforms
from protocols.features import Network, images_refused
from protocols.linear import loss_range, unfinished
from protocols.progress import progress
from utils import cosine_scheduler
from weights import checkpoints

# (network, images uint8 (B, C, height, width), numbers of blocks) -> {number: float32 (B, D, h, w)}
Read = Callable[[Network, Tensor, Sequence[int]], dict[int, Tensor]]
SAVE_SECONDS = 300  # between two writes of an unfinished run
PROGRESS = 10  # lines on the console, and the share of the steps that a training loss is averaged over


class Setting(NamedTuple):
    """One linear layer of a sweep."""

    features: str  # the network's name in the table
    blocks: int  # whose tokens are concatenated
    lr: float


class Recipe(NamedTuple):
    """How the layers are trained. Every lr x number of blocks is a setting."""

    lrs: Sequence[float] = (1e-2,)
    blocks: Sequence[int] = (1,)  # numbers of blocks
    steps: int = 400
    batch_size: int = 16  # of all processes
    warmup_steps: int = 0
    weight_decay: float = 1e-3
    dropout: float = 0.0  # of whole channels
    scale: tuple[float, float] = (0.5, 2.0)  # of the image's size in training
    seed: int = 0
    num_workers: int = 10  # per process


# ---- Training crops ----


def random_crop(
    image: Tensor, truth: np.ndarray, image_size: int, crop: int, scale: tuple[float, float], fill: Sequence[int],
    void: float, rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """A crop of `crop` x `crop` pixels of the image at a random scale, flipped with probability 0.5, and its truth.

    Args:
        image: uint8 (C, height, width).
        truth: (height, width) of any type; a resized pixel takes the nearest one's.
        image_size: shorter side of the image at scale 1, in pixels.
        fill: colour of what lies beyond the image, whose truth is `void`.
    """
    factor = rng.uniform(*scale) * image_size / min(truth.shape)
    size = [max(1, round(side * factor)) for side in truth.shape]
    image = transforms.resize(image, size)
    truth = F.interpolate(torch.from_numpy(truth)[None, None], size=size, mode="nearest-exact")[0, 0]
    top, left = (int(rng.integers(max(side - crop, 0) + 1)) for side in size)
    image, truth = image[:, top : top + crop, left : left + crop], truth[top : top + crop, left : left + crop]
    whole = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, crop, crop)
    whole_truth = torch.full((crop, crop), void, dtype=truth.dtype)
    height, width = truth.shape
    whole[:, :height, :width], whole_truth[:height, :width] = image, truth
    return (whole.flip(-1), whole_truth.flip(-1)) if rng.random() < 0.5 else (whole, whole_truth)


class TrainingCrops(Dataset):
    """Item i, of a run that goes through the images again and again, is a function of (seed, i) alone."""

    def __init__(self, images: Annotated, image_size: int, crop: int, fill: Sequence[int], recipe: Recipe) -> None:
        self.images, self.image_size, self.crop, self.fill, self.recipe = images, image_size, crop, fill, recipe

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        epoch, row = divmod(i, len(self.images.items))
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self.images.items))
        image, truth = self.images.load(order[row])
        rng = np.random.default_rng((self.recipe.seed, 1, i))
        return random_crop(image, truth, self.image_size, self.crop, self.recipe.scale, self.fill, self.images.void,
                           rng)


def batches(
    crops: TrainingCrops, steps: int, batch_size: int, num_workers: int, first: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of the batches `first` to `steps`: images uint8 (B / W, C, side, side), truth
    (B / W, side, side)."""
    rank, world_size = parallel.rank(), parallel.world_size()
    mine = [i for step in range(first, steps)
            for i in range(step * batch_size + rank, (step + 1) * batch_size, world_size)]
    workers = min(num_workers, steps)
    loader = DataLoader(Subset(crops, mine), batch_size // world_size, **worker_options(workers))
    with images_refused():
        yield from loader


# ---- Training ----


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, in the order of the global batch (see `batches`)."""
    world_size = parallel.world_size()
    return parallel.gather(x).unflatten(0, (world_size, -1)).transpose(0, 1).flatten(0, 1) if world_size > 1 else x


def train(
    networks: Mapping[str, Network], settings: Sequence[Setting], crops: TrainingCrops, recipe: Recipe, read: Read,
    new_layer: Callable[[int], nn.Module], loss: Callable[[Tensor, Tensor, int], Tensor], path: Path | None = None,
    run: Mapping | None = None,
) -> tuple[list[nn.Module], list[float]]:
    """One layer per setting, all trained on the same batches, whose features are computed once.

    The processes share the images of a batch; each of them trains all layers on the features of all its images, so
    that the result doesn't depend on their number.

    Args:
        read: the tokens that a layer sees.
        new_layer: width -> a layer (B, width, h, w) -> (B, K, ...), whose maps are upsampled to the pixels.
        loss: of maps (B, K, side, side), truth (B, side, side) and the step, from 0.
        path: file for the state of the unfinished run, from which it is resumed.
        run: plain values that the stopped run and the one that resumes it must have in common.

    Returns:
        The layers, in eval mode, and their training losses, averaged over the last tenth of the steps.

    Raises:
        Refused: no loss of the first network is finite, an image can't be decoded, or `path` is unreadable or belongs
            to another run.
    """
    state = unfinished(path, run, "step") if path else {}
    device = next(iter(networks.values())).device
    schedule = cosine_scheduler(1, 0, recipe.steps, 1, recipe.warmup_steps)
    every, losses = max(1, recipe.steps // PROGRESS), torch.zeros(len(settings), device=device)
    layers, optimizer, last, first, saved = [], None, state.get("last"), state.get("step", 0), time.monotonic()
    if state:
        layers, optimizer = new_layers(state["widths"], settings, new_layer, recipe, device)
        for layer, weights in zip(layers, state["layers"], strict=True):
            layer.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        losses.copy_(state["losses"])
    loader = batches(crops, recipe.steps, recipe.batch_size, recipe.num_workers, first)
    for step, (images, truth) in enumerate(progress(loader, recipe.steps - first, "training steps"), first):
        images, truth = images.to(device, non_blocking=True), gathered(truth.to(device, non_blocking=True))
        features = read_settings(networks, settings, images, read)
        if optimizer is None:  # the first features tell the widths
            torch.manual_seed(recipe.seed)  # here: the loader has drawn numbers
            widths = [features[s.features, s.blocks].shape[1] for s in settings]
            layers, optimizer = new_layers(widths, settings, new_layer, recipe, device)
        elif step == first:
            checkpoints.set_rng_state(state["rng"], device)  # of dropout; here for the same reason
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * float(schedule[step])
        optimizer.zero_grad(set_to_none=True)
        if step % every == 0:
            losses.zero_()
        for i, (s, layer) in enumerate(zip(settings, layers, strict=True)):  # one at a time: K maps at all pixels
            maps = layer(features[s.features, s.blocks])
            value = loss(tokens.upsample(maps, *truth.shape[-2:], tokens.patch_size(networks[s.features])), truth, step)
            value.backward()
            losses[i] += value.detach()
        optimizer.step()
        if (step + 1) % every == 0:
            mean = losses / every
            first_network = torch.tensor([s.features == settings[0].features for s in settings])
            check_finite(mean.cpu()[first_network].isfinite().tolist(), recipe)
            parallel.say(f"step {step + 1}/{recipe.steps}: training loss {loss_range(mean)}")
            last = mean.tolist()
        if path and parallel.is_main() and ((step + 1) % every == 0 or time.monotonic() - saved > SAVE_SECONDS):
            saved = time.monotonic()
            checkpoints.save({
                "run": run, "step": step + 1, "losses": losses, "last": last, "rng": checkpoints.rng_state(device),
                "widths": [features[s.features, s.blocks].shape[1] for s in settings],
                "optimizer": optimizer.state_dict(), "layers": [layer.state_dict() for layer in layers]}, path)
    parallel.barrier()
    return [layer.eval().requires_grad_(False) for layer in layers], last


def check_finite(finite: Sequence[bool], recipe: Recipe) -> None:
    """Raises Refused where all settings have diverged; a sweep continues without those that have."""
    if not any(finite):
        raise Refused(f"--lr {min(recipe.lrs):g}: the loss is no longer finite; lower it")


def new_layers(
    widths: Sequence[int], settings: Sequence[Setting], new_layer: Callable[[int], nn.Module], recipe: Recipe,
    device: torch.device,
) -> tuple[list[nn.Module], torch.optim.Optimizer]:
    """An untrained layer per setting, and the optimizer of them all."""
    layers = [new_layer(width).to(device) for width in widths]
    groups = [{"params": layer.parameters(), "peak": s.lr} for layer, s in zip(layers, settings, strict=True)]
    return layers, torch.optim.AdamW(groups, lr=0, weight_decay=recipe.weight_decay)


def read_settings(
    networks: Mapping[str, Network], settings: Sequence[Setting], images: Tensor, read: Read
) -> dict[tuple[str, int], Tensor]:
    """Tokens of the images of all processes, by network and number of blocks, for each pair that a setting has."""
    pairs = dict.fromkeys((s.features, s.blocks) for s in settings)
    features = {}
    for name in dict.fromkeys(name for name, _ in pairs):
        outputs = read(networks[name], images, [blocks for other, blocks in pairs if other == name])
        features |= {(name, blocks): gathered(x) for blocks, x in outputs.items()}
    return features
