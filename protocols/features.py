"""Frozen features of a set of images: in order, on any number of processes, computed once; and what gives them.

Shapes: N images, D width, B images a batch, W processes, C channels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import parallel
from imagesets.loaders import worker_options
from imagesets.sources import Images
from parallel import Refused
from protocols.transforms import PIXELS_SIDE, EvalImages, RandomViews, SmallPictures
from vision_transformer import VITS
from weights import checkpoints, load_backbone

PIXELS = "pixels"  # the arch that is no network: raw pictures of 32 x 32
TRAINING_SCALE = (0.08, 1.0)  # share of the area of the crops that classifiers are trained on
PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def extract_features(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    batch_size: int = 128,
    num_workers: int = 10,
    device: torch.device | str = "cpu",
    autocast: AbstractContextManager | None = None,
) -> Tensor:
    """Features of every image, each computed by one of the processes; all of them get all features.

    Process r takes images r, r + W, r + 2 W, ...; every process works through the same number of batches of the same
    size, so that the batches can be gathered one by one: beside the result, no more than W batches are held. Where W
    does not divide N, some processes compute the last image again, which is cut off.

    Args:
        forward: (b, C, h, w) on `device` -> (b, D), any floating type; a module should be in eval mode.
        dataset: item i is (float32 (C, h, w), i).
        batch_size: images a process and batch.
        num_workers: processes a process that load images; no more are started than there are cores or batches.
        autocast: context to compute in; none by default.

    Returns:
        (N, D) float32 on the CPU, row i that of item i.

    Raises:
        ValueError: no images, or one that can't be read, with its name.
    """
    n = len(dataset)
    if n == 0:
        raise ValueError("there are no images to compute features of")
    features, first = None, 0
    for part in feature_batches(forward, dataset, range(n), batch_size, num_workers, device, autocast):
        if features is None:
            features = torch.empty(n, *part.shape[1:])
        features[first : first + len(part)] = part.cpu()
        first += len(part)
    return features


def feature_batches(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    order: Sequence[int],
    batch_size: int,
    num_workers: int,
    device: torch.device | str,
    autocast: AbstractContextManager | None = None,
) -> Iterator[Tensor]:
    """Features (W batch_size, ...) float32 of the images `order` names, in that order; the last batch may be smaller.

    Arguments as in `extract_features`; every process gets all rows, on `device`.
    """
    n, rank, world_size = len(order), parallel.rank(), parallel.world_size()
    device, share = torch.device(device), -(-n // world_size)
    mine = Subset(dataset, [order[min(rank + j * world_size, n - 1)] for j in range(share)])
    loader = DataLoader(
        mine, batch_size, pin_memory=device.type == "cuda",
        **worker_options(min(num_workers, available_cores(), -(-share // batch_size))),
    )
    first = 0
    for images in readable(loader):
        with torch.no_grad(), autocast or nullcontext():
            part = forward(images.to(device, non_blocking=True)).float()  # (b, ...)
            part = parallel.gather(part).unflatten(0, (world_size, -1))  # (W, b, ...)
        yield part.transpose(0, 1).flatten(0, 1)[: n - first]  # outside: contexts would reach into the caller
        first += world_size * len(images)


def readable(loader: DataLoader):
    """The loader's images. A worker's ValueError comes as its traceback: only its last line is for the user."""
    batches = iter(loader)
    while True:
        try:
            images, _ = next(batches)
        except StopIteration:
            return
        except ValueError as error:
            line = str(error).strip().splitlines()[-1]
            raise ValueError(line.removeprefix("ValueError: ")) from error
        yield images


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- Raw pixels: the baseline that features must beat ----


def pixel_features(images: Images, num_workers: int = 0) -> Tensor:
    """(N, C 32 32) float32: pictures resized to 32 x 32 (bilinear, antialiased) and flattened."""
    return extract_features(lambda x: x.flatten(1), SmallPictures(images), num_workers=num_workers)


# ---- Computed once ----


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a network's tensors.

    It tells student from teacher in one file, is the same for one backbone in two files, and exists for random
    weights, which are in no file.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):  # a module's own extra state
            continue
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def images_hash(images: Images) -> str:
    """SHA-256 over the names of the images, the files' sizes and times where they are files, and the first picture.

    The picture stands for what names do not say: channels, the size of drawn ones, a decoder that changed.
    """
    digest = hashlib.sha256()
    for i in range(len(images)):
        name = images.name(i)
        digest.update(name.encode())
        try:
            status = os.stat(name)
            digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError:  # drawn, or packed in one file
            digest.update(b"\n")
    digest.update(getattr(images, "fingerprint", "").encode())  # of what is packed in shards
    if len(images):
        first = images.load(0)
        digest.update(f"{tuple(first.shape)}".encode() + first.numpy().tobytes())
    return digest.hexdigest()


def cached_features(
    folder: str | os.PathLike | None, fingerprint: Mapping[str, str], extract: Callable[[], Tensor]
) -> Tensor:
    """`extract()`, or what it gave before: read from `folder` when the fingerprint is the same, and else left there.

    The fingerprint says all that the features depend on, under names such as weights (`weights_hash`), images
    (`images_hash`), transform. The file is named after all but the weights: the next weights replace it, so a folder
    does not fill up while a network trains. All processes must call it, and all read or all compute.

    Args:
        folder: None or "" keeps nothing.
    """
    if not folder:
        return extract()
    rest = "\n".join(f"{k}={fingerprint[k]}" for k in sorted(fingerprint) if k != "weights")
    path = Path(folder) / f"features_{hashlib.sha256(rest.encode()).hexdigest()[:16]}.pth"
    features = read_features(path, fingerprint)
    if all(parallel.gather_objects(features is not None)):
        return features
    features = extract()
    if parallel.is_main():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoints.save({"fingerprint": dict(fingerprint), "features": features}, path)
        except OSError as error:
            print(f"the features are not kept: {error}", flush=True)
    parallel.barrier()  # else another process could ask for the file before it is there
    return features


def read_features(path: Path, fingerprint: Mapping[str, str]) -> Tensor | None:
    try:
        stored = checkpoints.read(path)
    except (OSError, ValueError):  # none yet, or a broken one: computed anew
        return None
    return stored["features"] if stored.get("fingerprint") == dict(fingerprint) else None


# ---- A network and how it sees images ----


class Network(NamedTuple):
    """A frozen network on its device, how its images are made, and what a report says about it."""

    forward: Callable[[Tensor], Tensor]  # nn.Module, or a function on top of one
    info: dict  # of weights.load_backbone
    about: dict  # plain values: arch, weights, weights_sha256, crop_size, precision ...
    device: torch.device

    def autocast(self) -> AbstractContextManager:
        """The precision that the network computes in."""
        dtype = PRECISIONS[self.about["precision"]]
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()


def load_network(
    weights: str,
    arch: str = "vit_small",
    patch_size: int = 16,
    checkpoint_key: str = "teacher",
    device: torch.device | str = "cpu",
    crop_size: int = 0,
    resize_size: int = 0,
    precision: str = "fp32",
    seed: int = 0,
    size_flag: str = "--crop_size",
) -> Network:
    """The frozen network of a file of weights.

    Args:
        weights: a file; "" makes an untrained network from `seed`.
        arch, patch_size: where the weights don't say. `pixels` is the baseline of raw 32 x 32 pixels.
        crop_size: 0 is the size of the weights' global crops, or 224.
        resize_size: shorter side before the crop; 0 is crop_size x 256 / 224.
        precision: fp32, fp16 or bf16.
        size_flag: what the calling script names `crop_size` in its errors.

    Raises:
        Refused: no such weights, weights of another architecture, or sizes that don't fit each other.
    """
    device = torch.device(device)
    if arch == PIXELS:
        refuse_weights(weights)
        info = {"in_chans": 3, "mean": (0.0,) * 3, "std": (1.0,) * 3}
        about = {"arch": PIXELS, "weights": None, "weights_sha256": None, "crop_size": PIXELS_SIDE, "precision": "fp32"}
        return Network(nn.Flatten(), info, about, device)
    torch.manual_seed(seed)
    model, info = load_backbone(weights, arch, patch_size, checkpoint_key)
    crop = crop_size or info["global_crops_size"]
    if info["arch"] in VITS and crop < info["patch_size"]:
        raise Refused(f"{size_flag} {crop}: smaller than a patch of {info['patch_size']}; raise it")
    if resize_size and resize_size < crop:
        raise Refused(f"--resize_size {resize_size} is smaller than --crop_size {crop}; make it larger")
    about = {
        "arch": info["arch"], "patch_size": info["patch_size"], "weights": weights or None,
        "checkpoint_key": checkpoint_key, "weights_sha256": weights_hash(model),
        "resize_size": resize_size or round(crop * 256 / 224), "crop_size": crop, "precision": precision,
    }
    return Network(model.to(device), info, about, device)


def refuse_weights(weights: str) -> None:
    if weights:
        raise Refused(f"--pretrained_weights {weights}: --arch {PIXELS} has no weights; leave one of them out")


def network_features(
    network: Network,
    images: Images,
    batch_size: int = 128,
    num_workers: int = 10,
    cache: str | os.PathLike | None = None,
    view: int | None = None,
    scale: tuple[float, float] = (0.25, 1.0),
) -> Tensor:
    """(N, D) features of the images' centre crops, or of random view number `view`; from `cache` where it has them."""
    about, mean, std = network.about, network.info["mean"], network.info["std"]
    shown = "" if view is None or scale == (0.25, 1.0) else f" scale {scale}"
    fingerprint = {
        "weights": str(about["weights_sha256"]), "images": images_hash(images),
        "transform": f"{about.get('resize_size')} {about['crop_size']} {mean} {std} view {view}{shown}",
        "network": f"{about['arch']} {about['precision']}" + about.get("output", ""),
    }
    return cached_features(cache, fingerprint, lambda: extract_features(
        network.forward, input_dataset(network, images, view, scale), batch_size, num_workers, network.device,
        network.autocast()))


def input_dataset(
    network: Network, images: Images, view: int | None = None, scale: tuple[float, float] = (0.25, 1.0)
) -> Dataset:
    """The images as the network sees them: centre crops, or random view number `view`."""
    about, mean, std = network.about, network.info["mean"], network.info["std"]
    if view is not None:
        return RandomViews(images, about["crop_size"], mean, std, view, scale)
    if about["arch"] == PIXELS:
        return SmallPictures(images)
    return EvalImages(images, about["resize_size"], about["crop_size"], mean, std)
