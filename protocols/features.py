"""Frozen features: loading a network, extracting features on any number of processes, and caching them.

Shapes: N images, D width, b images per process and batch, W processes, C channels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import parallel
from imagesets.decode import MAX_PIXELS, PLAIN, Reading, Undecodable
from imagesets.deep import Range
from imagesets.loaders import worker_options
from imagesets.sources import Images
from parallel import Refused
from protocols.progress import progress
from protocols.transforms import (
    PIXELS_SIDE,
    VIEW_SCALE,
    EvalImages,
    RandomViews,
    SmallPictures,
    Transformed,
    check_patches,
)
from vision_transformer import VITS, build_backbone
from weights import checkpoints, load_backbone, preprocessing
from weights.layouts import STORED_OPTIONS, BadFile
from weights.preprocessing import Found

PIXELS = "pixels"  # --arch of the baseline without a network: images of 32 x 32 pixels, flattened
TRAINING_SCALE = (0.08, 1.0)  # VIEW_SCALE of the crops that classifiers are trained on
NO_TIME = 315_705_600  # 1980-01-03, in seconds: archives without times have 0, 1, or 1980-01-01 in any time zone
PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def extract_features(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    batch_size: int = 128,
    num_workers: int = 10,
    device: torch.device | str = "cpu",
    autocast: AbstractContextManager | None = None,
    what: str = "features",
) -> Tensor:
    """Features of every image. The processes share the work, and each of them returns all features.

    Process r computes images r, r + W, r + 2 W, ... All processes go through the same number of batches of the same
    size, so that batches can be gathered one by one: besides the result, only W batches are in memory. Where W does
    not divide N, some processes compute the last image a second time, and the copy is dropped.

    Args:
        forward: (b, C, h, w) on `device` -> (b, D), or any shape (b, ...), of any floating type; a module should be in
            eval mode.
        dataset: item i is (float32 (C, h, w), i).
        batch_size: images per process and batch.
        num_workers: data-loading workers per process, capped at the number of cores and of batches.
        autocast: context for the forward pass; none by default.
        what: the name of the work on progress lines; "" prints none.

    Returns:
        (N, D), or (N, ...), float32 on the CPU; row i belongs to item i.

    Raises:
        Refused: there are no images, or one can't be decoded.
    """
    n = len(dataset)
    if n == 0:
        raise Refused("no images to extract features from; give a --data_path that holds some")
    features, first = None, 0
    batches = feature_batches(forward, dataset, range(n), batch_size, num_workers, device, autocast)
    for part in progress(batches, n, what, batch_size * parallel.world_size()):
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
    """Features of the items `order` lists, in that order: (W batch_size, ...) float32, the last batch may be smaller.

    Arguments as in `extract_features`. Every process gets all rows, on `device`.
    """
    n, rank, world_size = len(order), parallel.rank(), parallel.world_size()
    mine = [order[min(rank + j * world_size, n - 1)] for j in range(-(-n // world_size))]
    first = 0
    for images in image_batches(dataset, mine, batch_size, num_workers, torch.device(device)):
        with torch.no_grad(), autocast or nullcontext():
            part = forward(images).float()  # (b, ...)
            part = parallel.gather(part).unflatten(0, (world_size, -1))  # (W, b, ...)
        # Outside of the contexts, which would otherwise stay active in the caller.
        yield part.transpose(0, 1).flatten(0, 1)[: n - first]
        first += world_size * len(images)


def image_batches(
    dataset: Dataset, order: Sequence[int], batch_size: int, num_workers: int, device: torch.device
) -> Iterator[Tensor]:
    """(b, C, h, w) images of the items `order` lists, on `device`; the last batch may be smaller.

    Raises:
        Refused: an image can't be decoded; the line names it.
    """
    workers = min(num_workers, -(-len(order) // batch_size))
    loader = DataLoader(
        Subset(dataset, order), batch_size, pin_memory=device.type == "cuda", **worker_options(workers))
    with images_refused():
        for images, _ in loader:
            yield images.to(device, non_blocking=True)


@contextmanager
def images_refused() -> Iterator[None]:
    """Turns an image that can't be decoded in the block, or in one of its workers, into Refused."""
    try:
        yield
    except Undecodable as error:
        # torch raises a worker's exception with the traceback as its message, which ends in this name.
        reason = str(error).rpartition(f"{Undecodable.__module__}.{Undecodable.__qualname__}: ")[2].strip()
        raise Refused(f"{reason}; repair or remove that file, then start again") from error


# ---- Raw pixels, the baseline ----


def pixel_features(images: Images, num_workers: int = 0) -> Tensor:
    """(N, C 32 32) float32 in [0, 1]: images resized to 32 x 32 (bilinear, antialiased) and flattened."""
    return extract_features(lambda x: x.flatten(1), SmallPictures(images), num_workers=num_workers)


# ---- Cache ----


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a network's tensors.

    Unlike a hash of the file, it differs between student and teacher of one checkpoint, is the same for one backbone
    stored in two files, and is defined for random weights. DINOv2's mask token, which has no effect on features, does
    not count: other libraries' files lack it.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor) or name == "mask_token":  # no tensor: extra state that a module adds
            continue
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def images_hash(images: Images, numbers: Sequence[int] | None = None) -> str:
    """SHA-256 over the names of the images, sizes and times of their files where they are files, and the first image.

    The first image's pixels cover what names do not tell: channels, the size of drawn images, a changed decoder. Sets
    whose names are not files have a `fingerprint` of their content (`imagesets.sources`). Times up to NO_TIME say
    nothing, as on mounts without times and from reproducible archives: the content of such files is hashed.

    Args:
        numbers: of the images whose names and files are hashed; all by default.

    Raises:
        Refused: the first image can't be decoded.
    """
    digest = hashlib.sha256()
    for i in range(len(images)) if numbers is None else numbers:
        name = images.name(i)
        digest.update(name.encode())
        try:
            status = os.stat(name)
            digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
            if status.st_mtime < NO_TIME:
                digest.update(Path(name).read_bytes())
        except OSError:  # no file of its own: drawn, or packed with others in one file
            digest.update(b"\n")
    whole = images
    while hasattr(whole, "images"):  # a subset, or crops
        whole = whole.images
    digest.update(getattr(whole, "fingerprint", "").encode())
    if value_range := getattr(getattr(whole, "reading", None), "value_range", None):  # the first image may have 8 bits
        digest.update("value_range {:g} {:g}".format(*value_range).encode())
    if len(images):
        with images_refused():
            first = images.load(0)
        digest.update(f"{tuple(first.shape)}".encode() + first.numpy().tobytes())
    return digest.hexdigest()


def cached_features(
    folder: str | os.PathLike | None, fingerprint: Mapping[str, str], extract: Callable[[], Tensor]
) -> Tensor:
    """`extract()`, or its earlier result where `folder` holds one with the same fingerprint.

    The fingerprint holds everything the features depend on: weights (`weights_hash`), images (`images_hash`),
    transform, ... The file name is a hash of everything but the weights, so that features of new weights replace those
    of the old, and the folder does not fill up during training. All processes must call this; either all of them read
    the file or all compute.

    Args:
        folder: None or "" disables the cache.
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
    parallel.barrier()  # the next call must find the file, in every process
    return features


def read_features(path: Path, fingerprint: Mapping[str, str]) -> Tensor | None:
    try:
        stored = checkpoints.read(path)
    except (OSError, BadFile):  # missing or damaged: computed again
        return None
    return stored["features"] if stored.get("fingerprint") == dict(fingerprint) else None


# ---- Networks ----


class Network(NamedTuple):
    """A frozen network on its device, with the properties that transforms and reports need."""

    forward: Callable[[Tensor], Tensor]  # nn.Module, or a function on top of one
    info: dict  # as weights.load_backbone returns it
    about: dict  # for reports, plain values: arch, weights, weights_sha256, crop_size, precision ...
    device: torch.device

    @property
    def reading(self) -> Reading:
        """How images for the network are decoded."""
        return Reading(self.info["in_chans"], self.info.get("max_pixels", MAX_PIXELS), self.info.get("value_range"),
                       self.info.get("skip_bad", ""))

    def autocast(self) -> AbstractContextManager:
        """A context that computes in the network's precision."""
        dtype = PRECISIONS[self.about["precision"]]
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()


def load_network(
    weights: str, arch: str | None = None, patch_size: int | None = None, checkpoint_key: str = "teacher",
    device: torch.device | str = "cpu", crop_size: int = 0, resize_size: int | None = None, precision: str = "fp32",
    seed: int = 0, size_flag: str = "--crop_size", mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, in_chans: int | None = None, max_pixels: int = MAX_PIXELS,
    value_range: Range | None = None, skip_bad: str = "",
) -> Network:
    """Load a frozen network.

    Args:
        weights: path; "" builds an untrained network from `seed`.
        arch, patch_size: see `load_backbone`. `pixels` is the baseline of raw 32 x 32 pixels.
        crop_size: pixels; 0 means the image size stored with the weights, or 224.
        resize_size: pixels of the shorter side before the crop; 0 means crop_size x 256 / 224, None that images are not
            resized and cropped so.
        precision: fp32, fp16 or bf16.
        size_flag: the flag that errors about `crop_size` name.
        mean, std, in_chans: instead of the stored ones, see `load_backbone`.
        max_pixels, value_range, skip_bad: see `decode.Reading`; no value_range is that of the weights' training.

    Raises:
        Refused: missing weights, weights of another architecture, or sizes that contradict each other.
    """
    device, value_range = torch.device(device), tuple(value_range) if value_range else None
    if arch == PIXELS:
        if weights:
            raise Refused(f"--pretrained_weights {weights}: --arch {PIXELS} has no weights; leave one of them out")
        return pixel_network(device, Reading(in_chans or 3, max_pixels, value_range, skip_bad), mean, std)
    torch.manual_seed(seed)
    model, info = load_backbone(weights, arch, patch_size, checkpoint_key, mean=mean, std=std, in_chans=in_chans)
    info |= {"max_pixels": max_pixels, "value_range": value_range or info.get("value_range"), "skip_bad": skip_bad}
    crop = crop_size or info["global_crops_size"]
    if info["arch"] in VITS and crop < info["patch_size"]:
        raise Refused(f"{size_flag} {crop}: smaller than a patch of {info['patch_size']}; raise it")
    if info["arch"] in VITS:
        check_patches(crop, crop, info["patch_size"], f"{size_flag} {crop}: an image of {crop} x {crop} pixels",
                      f"lower {size_flag}")
    if resize_size and resize_size < crop:
        raise Refused(f"--resize_size {resize_size} is smaller than --crop_size {crop}; make it larger")
    if info["arch"] in VITS and crop % info["patch_size"]:
        whole = crop // info["patch_size"] * info["patch_size"]
        parallel.say(f"{size_flag} {crop} is not a multiple of the patch size {info['patch_size']}, so that not every "
                     f"pixel is used as it is; give {whole} or {whole + info['patch_size']}")
    about = {
        "arch": info["arch"], "patch_size": info["patch_size"], "weights": weights or None,
        "checkpoint_key": checkpoint_key, "weights_sha256": weights_hash(model),
        "resize_size": resize_size or round(crop * 256 / 224), "crop_size": crop, "precision": precision,
        "mean": list(info["mean"]), "std": list(info["std"]), "normalization": info["sources"],
    }
    if options := unseen_options(info["options"]):
        about["network_options"] = options
    if resize_size == 0:
        say_stored_resize(info, crop, about["resize_size"])
    return Network(model.to(device), info, about, device)


def unseen_options(options: Mapping) -> dict:
    """Of the options of `build_backbone`, those that change features, not tensors, where they are not the default."""
    registers = bool(options.get("num_register_tokens"))  # for networks with which these are other defaults
    default = {"interpolate_antialias": registers, "interpolate_offset": 0.0 if registers else 0.1}
    return {k: options[k] for k in STORED_OPTIONS if k in options and options[k] != default.get(k)}


def say_stored_resize(info: Mapping[str, Any], crop: int, size: int) -> None:
    """Tell that the weights' configuration resizes images to another size than the protocol's `size`, or otherwise than
    bicubically."""
    ratio, interpolation = info.get("resize_ratio"), info.get("interpolation")
    if interpolation and interpolation.value not in ("bicubic", "random"):  # random: in training
        parallel.say(f"images are resized by bicubic interpolation, as in the published evaluations; "
                     f"{interpolation.source} says {interpolation.value}")
    if ratio and abs((stored := int(crop * ratio.value + 1e-6)) - size) > 1:  # programs round differently
        parallel.say(f"images are resized to {size} pixels and cropped to {crop}, as in the published evaluations; "
                     f"{ratio.source} says {stored}, which --resize_size {stored} follows")


def pixel_network(
    device: torch.device, reading: Reading = PLAIN, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """The baseline without a network: images of 32 x 32 pixels, flattened, in [0, 1] unless mean and std are given.

    Raises:
        Refused: mean or std with another number of values than channels.
    """
    plain = {"mean": Found(0.0, "default of raw pixels"), "std": Found(1.0, "default of raw pixels")}
    chosen = preprocessing.normalization(plain, reading.in_chans, f"--arch {PIXELS}", mean, std)
    info = {"embed_dim": reading.in_chans * PIXELS_SIDE**2} | reading._asdict() | {
        key: value for key, (value, _) in chosen.items()}
    about = {"arch": PIXELS, "weights": None, "weights_sha256": None, "crop_size": PIXELS_SIDE, "precision": "fp32",
             "mean": list(info["mean"]), "std": list(info["std"])}
    return Network(nn.Flatten(), info, about, device)


def untrained(network: Network, seed: int) -> Network:
    """The same network with random weights, which sees the same images: the baseline of training."""
    torch.manual_seed(seed)
    model, _ = build_backbone(network.info["arch"], **network.info["options"])
    about = network.about | {"weights": None, "weights_sha256": weights_hash(model)}
    return network._replace(forward=model.eval().requires_grad_(False).to(network.device), about=about)


def network_features(
    network: Network, images: Images, batch_size: int = 128, num_workers: int = 10,
    cache: str | os.PathLike | None = None, view: int | None = None, scale: tuple[float, float] = VIEW_SCALE,
    interpolation: str = "bicubic",
) -> Tensor:
    """(N, D) features of the images' centre crops, or of random view number `view`; see `cached_features`."""
    about, mean, std = network.about, network.info["mean"], network.info["std"]
    scaled = "" if view is None or scale == VIEW_SCALE else f" scale {scale}"
    resampled = "" if view is None or interpolation == "bicubic" else f" {interpolation}"
    transform = f"{about.get('resize_size')} {about['crop_size']} {mean} {std} view {view}{scaled}{resampled}"
    return dataset_features(network, input_dataset(network, images, view, scale, interpolation), transform, batch_size,
                            num_workers, cache, output=about.get("output", ""))


def input_dataset(
    network: Network, images: Images, view: int | None = None, scale: tuple[float, float] = VIEW_SCALE,
    interpolation: str = "bicubic",
) -> Dataset:
    """The images as the network sees them: centre crops (always bicubic), or random view number `view`."""
    about, mean, std = network.about, network.info["mean"], network.info["std"]
    if view is not None:
        return RandomViews(images, about["crop_size"], mean, std, view, scale, interpolation)
    if about["arch"] == PIXELS:
        return SmallPictures(images, mean, std)
    return EvalImages(images, about["resize_size"], about["crop_size"], mean, std)


def dataset_features(
    network: Network, dataset: Transformed, transform: str, batch_size: int, num_workers: int,
    cache: str | os.PathLike | None, forward: Callable[[Tensor], Tensor] | None = None, output: str = "",
) -> Tensor:
    """(N, D) features of images transformed in any way; see `cached_features`.

    Args:
        transform: names what `dataset` does with its images, in the cache's fingerprint.
        forward: computes something else than the network's output, on top of it; `output` names what.
    """
    about = network.about
    fingerprint = {
        "weights": str(about["weights_sha256"]), "images": images_hash(dataset.images), "transform": transform,
        "network": f"{about['arch']} {about['precision']}{output}{about.get('network_options', '')}",
    }
    return cached_features(cache, fingerprint, lambda: extract_features(
        forward or network.forward, dataset, batch_size, num_workers, network.device, network.autocast()))
