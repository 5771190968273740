"""Linear layers on frozen patch tokens: training crops, the layers of all settings, and their training in one pass.

Shapes: B images, C channels, D width, n blocks, K classes, h x w patches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import parallel
from imagesets.class_masks import ClassMasks
from imagesets.decode import Undecodable
from imagesets.loaders import worker_options
from imagesets.masks import VOID
from parallel import Refused
from protocols import tokens, transforms
from protocols.features import Network, refused_image
from protocols.linear import unfinished
from protocols.progress import progress
from protocols.segmentation import import_kmeans
from utils import cosine_scheduler
from weights import checkpoints

SAVE_SECONDS = 300  # between two writes of an unfinished run
PROGRESS = 10  # lines on the console, and the share of the steps that a training loss is averaged over


class Setting(NamedTuple):
    """One linear layer of a sweep."""

    features: str  # the network's name in the table
    n_last_blocks: int
    lr: float


class Recipe(NamedTuple):
    """How the layers are trained. Every lr x n_last_blocks is a setting."""

    lrs: Sequence[float] = (1e-2,)
    n_last_blocks: Sequence[int] = (1,)
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
    image: Tensor, labels: np.ndarray, image_size: int, crop: int, scale: tuple[float, float], fill: Sequence[int],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """A crop of `crop` x `crop` pixels of the image at a random scale, flipped with probability 0.5, and its labels.

    Args:
        image: uint8 (C, height, width).
        labels: uint8 (height, width).
        image_size: shorter side of the image at scale 1, in pixels.
        fill: colour of what lies beyond the image, whose label is VOID.
    """
    factor = rng.uniform(*scale) * image_size / min(labels.shape)
    size = [max(1, round(side * factor)) for side in labels.shape]
    image = transforms.resize(image, size)
    labels = F.interpolate(torch.from_numpy(labels)[None, None], size=size, mode="nearest-exact")[0, 0]
    top, left = (int(rng.integers(max(side - crop, 0) + 1)) for side in size)
    image, labels = image[:, top : top + crop, left : left + crop], labels[top : top + crop, left : left + crop]
    whole = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, crop, crop)
    whole_labels = torch.full((crop, crop), VOID, dtype=torch.uint8)
    height, width = labels.shape
    whole[:, :height, :width], whole_labels[:height, :width] = image, labels
    return (whole.flip(-1), whole_labels.flip(-1)) if rng.random() < 0.5 else (whole, whole_labels)


class TrainingCrops(Dataset):
    """Item i, of a run that goes through the images again and again, is a function of (seed, i) alone."""

    def __init__(self, images: ClassMasks, image_size: int, crop: int, fill: Sequence[int], recipe: Recipe) -> None:
        self.images, self.image_size, self.crop, self.fill, self.recipe = images, image_size, crop, fill, recipe

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        epoch, row = divmod(i, len(self.images.items))
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self.images.items))
        image, labels = self.images.load(order[row])
        rng = np.random.default_rng((self.recipe.seed, 1, i))
        return random_crop(image, labels, self.image_size, self.crop, self.recipe.scale, self.fill, rng)


def batches(
    crops: TrainingCrops, steps: int, batch_size: int, num_workers: int, first: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of the batches `first` to `steps`: images uint8 (B / W, C, side, side) and labels
    (B / W, side, side)."""
    rank, world_size = parallel.rank(), parallel.world_size()
    mine = [i for step in range(first, steps)
            for i in range(step * batch_size + rank, (step + 1) * batch_size, world_size)]
    workers = min(num_workers, steps)
    loader = DataLoader(Subset(crops, mine), batch_size // world_size, **worker_options(workers))
    try:
        yield from loader
    except Undecodable as error:
        raise refused_image(error) from error


# ---- Linear layers ----


def linear_layer(width: int, n_classes: int, dropout: float = 0.0) -> nn.Sequential:
    """Batch norm and a 1 x 1 convolution: (B, width, h, w) -> (B, K, h, w). Weights from N(0, 0.01^2), biases 0."""
    layer = nn.Sequential(nn.BatchNorm2d(width), nn.Dropout2d(dropout), nn.Conv2d(width, n_classes, 1))
    nn.init.normal_(layer[-1].weight, std=0.01)
    nn.init.zeros_(layer[-1].bias)
    return layer


def last_blocks(outputs: Sequence[Tensor], n: int) -> Tensor:
    """Tokens of the last n blocks, concatenated: (B, n D, h, w)."""
    return torch.cat(list(outputs[-n:]), 1)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not VOID; 0 without any.

    Args:
        logits: (B, K, height, width).
        labels: (B, height, width).
    """
    labels = labels.long()
    total = F.cross_entropy(logits, labels, ignore_index=VOID, reduction="sum")
    return total / (labels != VOID).sum().clamp(min=1)


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, in the order of the global batch (see `batches`)."""
    world_size = parallel.world_size()
    return parallel.gather(x).unflatten(0, (world_size, -1)).transpose(0, 1).flatten(0, 1) if world_size > 1 else x


def train(
    networks: Mapping[str, Network], settings: Sequence[Setting], crops: TrainingCrops, n_classes: int, recipe: Recipe,
    path: Path | None = None, run: Mapping | None = None,
) -> tuple[list[nn.Module], list[float]]:
    """One linear layer per setting, all trained on the same batches, whose features are computed once.

    The processes share the images of a batch; each of them trains all layers on the features of all its images, so
    that the result doesn't depend on their number.

    Args:
        path: file for the state of the unfinished run, from which it is resumed.
        run: plain values that the stopped run and the one that resumes it must have in common.

    Returns:
        The layers, in eval mode, and their training losses, averaged over the last tenth of the steps.

    Raises:
        Refused: no loss is finite, an image can't be decoded, or `path` is unreadable or belongs to another run.
    """
    state = unfinished(path, run, "step") if path else {}
    device = next(iter(networks.values())).device
    most = {name: max(s.n_last_blocks for s in settings if s.features == name) for name in networks}
    schedule = cosine_scheduler(1, 0, recipe.steps, 1, recipe.warmup_steps)
    every, losses = max(1, recipe.steps // PROGRESS), torch.zeros(len(settings), device=device)
    layers, optimizer, last, first, saved = [], None, state.get("last"), state.get("step", 0), time.monotonic()
    if state:
        layers, optimizer = new_layers(state["widths"], settings, n_classes, recipe, device)
        for layer, weights in zip(layers, state["layers"], strict=True):
            layer.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        losses.copy_(state["losses"])
    loader = batches(crops, recipe.steps, recipe.batch_size, recipe.num_workers, first)
    for step, (images, labels) in enumerate(progress(loader, recipe.steps - first, "training steps"), first):
        images, labels = images.to(device, non_blocking=True), gathered(labels.to(device, non_blocking=True))
        outputs = {name: [gathered(x) for x in tokens.patch_tokens(network, images, most[name])]
                   for name, network in networks.items()}
        if optimizer is None:  # the first features tell the widths
            torch.manual_seed(recipe.seed)  # here: the loader has drawn numbers
            widths = [sum(x.shape[1] for x in outputs[s.features][-s.n_last_blocks :]) for s in settings]
            layers, optimizer = new_layers(widths, settings, n_classes, recipe, device)
        elif step == first:
            checkpoints.set_rng_state(state["rng"], device)  # of dropout; here for the same reason
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * float(schedule[step])
        optimizer.zero_grad(set_to_none=True)
        if step % every == 0:
            losses.zero_()
        for i, (s, layer) in enumerate(zip(settings, layers, strict=True)):  # one at a time: K maps at all pixels
            logits = layer(last_blocks(outputs[s.features], s.n_last_blocks))
            loss = pixel_loss(
                tokens.upsample(logits, *labels.shape[-2:], tokens.patch_size(networks[s.features])), labels)
            loss.backward()
            losses[i] += loss.detach()
        optimizer.step()
        if (step + 1) % every == 0:
            mean = losses / every
            if not mean.isfinite().any():  # a sweep continues without the settings that diverged
                raise Refused(f"--lr {min(recipe.lrs):g}: the loss is no longer finite; lower it")
            parallel.say(f"step {step + 1}/{recipe.steps}: training loss {mean.min():.4f}"
                         + (f" to {mean.max():.4f}" if len(mean) > 1 else ""))
            last = mean.tolist()
        if path and parallel.is_main() and ((step + 1) % every == 0 or time.monotonic() - saved > SAVE_SECONDS):
            saved = time.monotonic()
            checkpoints.save({
                "run": run, "step": step + 1, "losses": losses, "last": last, "rng": checkpoints.rng_state(device),
                "widths": [layer[0].num_features for layer in layers], "optimizer": optimizer.state_dict(),
                "layers": [layer.state_dict() for layer in layers]}, path)
    parallel.barrier()
    return [layer.eval().requires_grad_(False) for layer in layers], last


def new_layers(
    widths: Sequence[int], settings: Sequence[Setting], n_classes: int, recipe: Recipe, device: torch.device
) -> tuple[list[nn.Module], torch.optim.Optimizer]:
    """An untrained layer per setting, and the optimizer of them all."""
    layers = [linear_layer(width, n_classes, recipe.dropout).to(device) for width in widths]
    groups = [{"params": layer.parameters(), "peak": s.lr} for layer, s in zip(layers, settings, strict=True)]
    return layers, torch.optim.AdamW(groups, lr=0, weight_decay=recipe.weight_decay)


# ---- k-means ----


@torch.no_grad()
def kmeans_layer(
    network: Network, crops: TrainingCrops, n_classes: int, batch_size: int, num_workers: int, images: int = 512,
    most_tokens: int = 20_000, seed: int = 0,
) -> nn.Conv2d:
    """k-means of patch tokens as a layer: clusters in place of classes, of which each gets the class it overlaps most.

    There are as many clusters as classes, matched one to one so that the sum of their IoU on the training images is
    largest. The score of a cluster with centre c is 2 c x - |c|^2, which is largest for the nearest centre.
    """
    from scipy.optimize import linear_sum_assignment  # scikit-learn needs scipy too

    steps = -(-min(images, len(crops.images.items)) // batch_size)
    maps, labels = [], []
    for image, label in batches(crops, steps, batch_size, num_workers):
        maps.append(gathered(tokens.patch_tokens(network, image.to(network.device))[0]))
        labels.append(gathered(label.to(network.device)))
    flat = torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2).cpu() for x in maps])
    rows = np.random.default_rng(seed).permutation(len(flat))[:most_tokens]
    fitted = import_kmeans()(n_classes, n_init=3, random_state=seed).fit(flat[rows].numpy())
    centres = torch.from_numpy(fitted.cluster_centers_).float().to(network.device)
    layer = nn.Conv2d(centres.shape[1], n_classes, 1).to(network.device).requires_grad_(False)
    layer.weight.copy_(2 * centres[:, :, None, None])
    layer.bias.copy_(-centres.square().sum(1))
    overlap = torch.zeros(n_classes, VOID + 1, device=network.device)
    for x, label in zip(maps, labels, strict=True):
        clusters = tokens.upsample(layer(x), *label.shape[-2:], tokens.patch_size(network)).argmax(1)
        pairs = clusters.flatten() * (VOID + 1) + label.flatten().long()
        overlap += pairs.bincount(minlength=overlap.numel()).view_as(overlap)
    overlap = overlap[:, :n_classes].cpu().numpy()
    union = overlap.sum(1, keepdims=True) + overlap.sum(0) - overlap
    _, classes = linear_sum_assignment(-overlap / np.maximum(union, 1))
    order = torch.from_numpy(np.argsort(classes)).to(network.device)  # the cluster of class 0, 1, ...
    layer.weight.copy_(layer.weight[order])
    layer.bias.copy_(layer.bias[order])
    return layer
