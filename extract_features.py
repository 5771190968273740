"""Embeddings of a folder of images in one file, with the images' names; a run that was killed goes on where it stopped.

    python extract_features.py --pretrained_weights output/run/checkpoint.pth --data_path photos --output photos.npy
    torchrun --nproc_per_node=8 extract_features.py --pretrained_weights output/run/checkpoint.pth ...

The suffix of --output says the format, .npy, .safetensors or .parquet; `protocols/embeddings.py` describes and
reads them.

Shapes: N images, D width, P patches: (N, D) for --tokens cls, (N, P, D) for patch, (N, 1 + P, D) for both, the class
token first. Patches are in reading order.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import flags
import parallel
from imagesets import loaders
from protocols import embeddings, features, transforms
from vision_transformer import VisionTransformer


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Embeddings of a folder of images in one file.")
    add = parser.add_argument
    add("--data_path", required=True, help="folder of images, .txt list, torchvision:NAME or shapes")
    add("--output", required=True, help=f"file to write: {', '.join(embeddings.FORMATS)}")
    add("--tokens", choices=("cls", "patch", "both"), default="cls", help="class token, patch tokens, or both")
    add("--half", action="store_true", help="float16 instead of float32")
    flags.add_network_flags(parser)
    add("--images_per_part", type=flags.positive_int, default=1024, help="a killed run loses no more than these")
    add("--seed", type=flags.count, default=0, help="of an untrained network")
    flags.add_launch_flags(parser)
    return parser


# ---- Tokens ----


def token_forward(model: nn.Module, tokens: str) -> Callable[[Tensor], Tensor]:
    """(B, C, h, w) -> (B, D), (B, P, D) or (B, 1 + P, D).

    Raises:
        ValueError: patch tokens of a network that has none.
    """
    if tokens == "cls":
        return model
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"--tokens {tokens}: this network has no patch tokens; give --tokens cls, or a Vision "
                         "Transformer of this project")

    def forward(images: Tensor) -> Tensor:
        found = model.forward_features(images)
        patches = found.patch_tokens.flatten(1, 2)  # (B, P, D)
        return patches if tokens == "patch" else torch.cat([found.cls_token[:, None], patches], dim=1)

    return forward


# ---- Parts: what a killed run leaves ----


class Part(Dataset):
    """Items start ... stop - 1 of a data set, numbered from 0."""

    def __init__(self, dataset: Dataset, start: int, stop: int) -> None:
        self.dataset, self.start, self.stop = dataset, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.dataset[self.start + i][0], i


class Job(NamedTuple):
    """A file to write: where, how many images in parts of which size, and all that its content depends on."""

    output: Path
    images: int
    per_part: int
    fingerprint: dict

    @property
    def parts(self) -> Path:
        return self.output.with_name(self.output.name + ".parts")

    def part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.npy"

    def numbers(self) -> range:
        return range(-(-self.images // self.per_part))


def missing_parts(job: Job) -> list[int] | None:
    """Numbers of the parts that are still to be computed; None where the whole file is there already.

    Raises:
        ValueError: the file, or its parts, are of other weights, images or settings.
    """
    remedy = "remove it, or give another --output"
    if job.output.exists():
        if differing := differences(embeddings.about_of(job.output).get("fingerprint", {}), job.fingerprint):
            raise ValueError(f"--output {job.output}: the file there holds something else ({differing}); {remedy}")
        remove_parts(job)
        return None
    record, own = job.parts / "fingerprint.json", job.fingerprint | {"images_per_part": job.per_part}
    try:
        if not record.exists():
            job.parts.mkdir(parents=True, exist_ok=True)
            embeddings.write_text(record, json.dumps(own))
        found = json.loads(record.read_text())
    except (ValueError, FileExistsError) as error:
        raise ValueError(f"--output {job.output}: {job.parts} is not what a killed run left; {remedy}") from error
    if differing := differences(found, own):
        raise ValueError(f"--output {job.output}: {job.parts} was begun with something else ({differing}); {remedy}")
    return [number for number in job.numbers() if not job.part(number).exists()]


def differences(one: Mapping, other: Mapping) -> str:
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return "another " + ", ".join(names) if names else ""


def compute_part(job: Job, number: int, forward: Callable, dataset: Dataset, args: argparse.Namespace, device) -> int:
    """Write the part of this number; the number of its images."""
    start = number * job.per_part
    dtype = features.PRECISIONS[args.precision]
    shape = []

    def flat(images: Tensor) -> Tensor:
        found = forward(images)
        shape[:] = found.shape[1:]
        return found.flatten(1)

    found = features.extract_features(
        flat, Part(dataset, start, min(start + job.per_part, job.images)), args.batch_size_per_gpu, args.num_workers,
        device, torch.autocast(device.type, dtype) if dtype else None)
    if parallel.is_main():
        found = found.unflatten(1, shape).numpy().astype(np.float16 if args.half else np.float32)
        embeddings.replace(job.part(number), lambda file: np.save(file, found))
    return len(found)


def finish(job: Job, names: list[str], about: Mapping) -> None:
    """All parts as one file; then they go."""
    parts = [np.load(job.part(number), mmap_mode="r") for number in job.numbers()]
    embeddings.write(job.output, parts, names, dict(about, fingerprint=job.fingerprint))
    remove_parts(job)


def remove_parts(job: Job) -> None:
    for path in (*job.parts.glob("*.npy"), *job.parts.glob(".*.tmp"), job.parts / "fingerprint.json"):
        path.unlink(missing_ok=True)
    if job.parts.exists():
        job.parts.rmdir()


# ---- The run ----


def on_main(work: Callable):
    """What `work` returns on the main process, on all of them; the ValueError or OSError it raises there, too."""
    found = error = None
    if parallel.is_main():
        try:
            found = work()
        except (ValueError, OSError) as raised:
            error = raised
    found, error = parallel.gather_objects((found, error))[0]
    if error is not None:
        raise error
    return found


def extract(args: argparse.Namespace) -> None:
    """The whole run: writes --output.

    Raises:
        flags.Refused: bad input, in one line.
    """
    try:
        output = Path(args.output).expanduser()
        embeddings.check_package("--output", output)
        embeddings.check_output(output)
        device = parallel.start(args.device, args.dist_url, args.dist_timeout)
        network = features.load_network(
            args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key, device, args.crop_size,
            args.resize_size, args.precision, args.seed)
        images = loaders.open_images(args.data_path, None, network.info["in_chans"])
        job, about, dataset = plan(args, network, images, output)
        forward = token_forward(network.forward, args.tokens)
        missing = on_main(lambda: missing_parts(job))
        if missing is None:
            parallel.say(f"{output} is there already, of the same weights, images and settings: nothing to do")
            return
        if len(missing) < len(job.numbers()):
            parallel.say(f"going on with {len(missing)} of {len(job.numbers())} parts that {job.parts} has not yet")
        for i, number in enumerate(missing):
            began = time.perf_counter()
            try:
                count = compute_part(job, number, forward, dataset, args, device)
            except ValueError as error:  # a picture that can't be decoded
                raise ValueError(f"--data_path {args.data_path}: {error}; mend or remove that file, then start again: "
                                 "what is computed is kept") from error
            parallel.say(f"part {i + 1} of {len(missing)}: {count / (time.perf_counter() - began):.0f} images/s")
        on_main(lambda: finish(job, [images.name(i) for i in range(len(images))], about))
        parallel.say(f"wrote {output}: {len(images)} images")
    except (ValueError, OSError) as error:
        raise flags.Refused(error) from error


def plan(args: argparse.Namespace, network: features.Network, images: loaders.Images, output: Path) -> tuple:
    """The job, what its file will say of itself, and the data set of the pictures as the network takes them."""
    about, mean, std = network.about, network.info["mean"], network.info["std"]
    if about["arch"] == features.PIXELS:
        dataset = features.SmallPictures(images)
    else:
        dataset = transforms.EvalImages(images, about["resize_size"], about["crop_size"], mean, std)
    path = os.path.expanduser(args.data_path)
    about = about | {  # paths are absolute, for search.py to find them from another folder
        "data_path": os.path.abspath(path) if os.path.exists(path) else args.data_path, "tokens": args.tokens,
        "weights": about["weights"] and os.path.abspath(about["weights"]),
        "seed": args.seed, "precision": args.precision, "in_chans": network.info["in_chans"],
    }
    fingerprint = {
        "weights": str(about["weights_sha256"]), "images": features.images_hash(images),
        "transform": f"{about.get('resize_size')} {about['crop_size']} {mean} {std}",
        "network": f"{about['arch']} {args.precision}", "tokens": args.tokens, "half": args.half,
    }
    return Job(output, len(images), args.images_per_part, fingerprint), about, dataset


def main(args: argparse.Namespace) -> int:
    return flags.exit_code("extract_features.py", extract, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
