"""Extraction of embeddings into one file, in parts, so that a run that was stopped can be resumed.

Shapes: B images per batch, D width, P patches.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

import atomic
import parallel
from imagesets.checking import Chosen
from imagesets.sources import Images
from parallel import Refused
from protocols import embeddings
from protocols.features import Network, extract_features, images_hash, input_dataset
from protocols.progress import duration
from protocols.tokens import has_patch_tokens, model_tokens, patch_size, refusing_size


@torch.no_grad()
def token_forward(network: Network, tokens: str) -> Callable[[Tensor], Tensor]:
    """A function images -> (B, D) for "cls", (B, P, D) for "patch", (B, 1 + P, D) for "both".

    Raises:
        Refused: the network has no such tokens, or doesn't take images of this size.
    """
    model, arch, crop = network.forward, network.about["arch"], network.about["crop_size"]
    if tokens == "cls":
        return model
    if not has_patch_tokens(network):
        raise Refused(f"--tokens {tokens}: {arch} has no patch tokens; give --tokens cls, or a Vision Transformer, of "
                      "this project or of timm")
    with refusing_size(network, f"--crop_size {crop}"):
        image = torch.zeros(1, network.info["in_chans"], crop, crop, device=network.device)
        ((_, class_token),) = model_tokens(model, image)
    if tokens == "both" and class_token is None:
        raise Refused(f"--tokens both: no class token is read beside the patch tokens of {arch}; give --tokens patch")

    def forward(images: Tensor) -> Tensor:
        ((maps, class_token),) = model_tokens(model, images)
        patches = maps.flatten(2).transpose(1, 2)  # (B, P, D)
        return patches if tokens == "patch" else torch.cat([class_token[:, None], patches], dim=1)

    return forward


# ---- Parts ----


class Job(NamedTuple):
    """A file to write, in parts of `per_part` images."""

    output: Path
    images: int
    per_part: int
    fingerprint: dict  # everything the content depends on
    flag: str = "--output"  # the flag that names the file or its folder, for messages

    @property
    def parts(self) -> Path:
        return self.output.with_name(self.output.name + ".parts")

    def part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.npy"

    def numbers(self) -> range:
        return range(-(-self.images // self.per_part))


def missing_parts(job: Job, images: Images) -> list[int] | None:
    """Numbers of the parts that are still to be computed; None where the whole file exists.

    After some images have been removed or repaired, the parts before them are kept and the others removed.

    Raises:
        Refused: the file or its parts come from other weights, images or settings, or can't be written.
    """
    remedy = f"remove it, or give another {job.flag}"
    if job.output.exists():
        if differing := differences(embeddings.about_of(job.output).get("fingerprint", {}), job.fingerprint):
            raise Refused(f"{job.flag} {job.output}: the existing file holds something else ({differing}); {remedy}")
        remove_parts(job)
        return None
    record, own = job.parts / "fingerprint.json", job.fingerprint | {"images_per_part": job.per_part}
    hashes = part_hashes(job, images)
    written = json.dumps(own | {"images_of_parts": hashes})
    try:
        if not record.exists():
            job.parts.mkdir(parents=True, exist_ok=True)
            atomic.mark_output(job.parts)
            atomic.write_text(record, written)
        before = dict(json.loads(record.read_text()))
        old = before.pop("images_of_parts", [])  # an older version wrote none
        if differences(before, own) == "different images" and keep_unchanged(job, old, hashes):
            atomic.write_text(record, written)
            before = own
    except (ValueError, TypeError, FileExistsError) as error:
        raise Refused(f"{job.flag} {job.output}: {job.parts} is not what a stopped run leaves; {remedy}") from error
    except OSError as error:
        raise Refused(f"{job.flag} {job.output}: {error.strerror or error}; give a file that can be written") from error
    if differing := differences(before, own):
        raise Refused(f"{job.flag} {job.output}: {job.parts} was begun with something else ({differing}); {remedy}")
    return [number for number in job.numbers() if not job.part(number).exists()]


def part_hashes(job: Job, images: Images) -> list[str]:
    """A hash of the images of each part."""
    first = range(0, job.images, job.per_part)
    return [images_hash(images, range(start, min(start + job.per_part, job.images))) for start in first]


def keep_unchanged(job: Job, before: list[str], now: list[str]) -> bool:
    """Remove the parts whose hashes differ; where this would remove all that is computed, return False instead."""
    kept = {job.part(number) for number, (old, new) in enumerate(zip(before, now, strict=False)) if old == new}
    computed = set(job.parts.glob("*.npy"))
    if not before or computed and not computed & kept:
        return False
    for path in computed - kept:
        path.unlink()
    return True


def differences(one: Mapping, other: Mapping) -> str:
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return "different " + ", ".join(names) if names else ""


def compute_part(
    job: Job, number: int, forward: Callable[[Tensor], Tensor], dataset: Dataset, network: Network,
    dtype: type[np.floating], batch_size: int, num_workers: int, what: str,
) -> int:
    """Compute and write one part. Returns its number of images."""
    start = number * job.per_part
    part = Subset(dataset, range(start, min(start + job.per_part, job.images)))
    features = extract_features(forward, part, batch_size, num_workers, network.device, network.autocast(), what)
    parallel.on_main(lambda: save_part(job, number, features.numpy().astype(dtype)))
    return len(part)


def save_part(job: Job, number: int, array: np.ndarray) -> None:
    if not job.parts.exists() and job.output.exists():
        raise Refused(f"{job.flag} {job.output}: another process has written it meanwhile; start again to compare it")
    with parallel.refusing(f"{job.flag} {job.output}", f"the parts in {job.parts} are kept: make room and start again"):
        with atomic.replacing(job.part(number)) as temporary, open(temporary, "wb") as file:
            np.save(file, array)


def finish(job: Job, names: list[str], about: Mapping) -> None:
    """Join the parts in one file, then remove them."""
    parts = [np.load(job.part(number), mmap_mode="r") for number in job.numbers()]
    embeddings.write(job.output, parts, names, dict(about, fingerprint=job.fingerprint))
    remove_parts(job)


def remove_parts(job: Job) -> None:
    for path in (*job.parts.glob("*.npy"), *job.parts.glob(".*.tmp"), job.parts / "fingerprint.json"):
        path.unlink(missing_ok=True)
    if job.parts.exists():
        job.parts.rmdir()


# ---- The run ----


def extract(
    network: Network, images: Images, output: Path, about: Mapping, half: bool = False, per_part: int = 1024,
    batch_size: int = 128, num_workers: int = 10, flag: str = "--output",
) -> None:
    """Write the embeddings of all images to `output`, or resume a stopped run. All processes call this.

    Args:
        about: what the file says about itself, see `describe`.
        half: float16 instead of float32.
        per_part: images per part; a run that is stopped loses at most one part.
        flag: the flag that messages name.

    Raises:
        Refused: `output` exists with other content or can't be written, or an image can't be decoded.
    """
    forward = token_forward(network, about["tokens"])
    if about["tokens"] != "cls":
        about = dict(about, patch_size=patch_size(network))
    if isinstance(images, Chosen):
        about = dict(about, left_out=images.left_out())
    job = Job(output, len(images), per_part, fingerprint(network, images, about, half), flag)
    missing = parallel.on_main(lambda: missing_parts(job, images))
    if missing is None:
        parallel.say(f"{output} exists, with the same weights, images and settings: nothing to do")
        return
    if len(missing) < len(job.numbers()):
        parallel.say(f"resuming: {len(missing)} of {len(job.numbers())} parts are missing in {job.parts}")
    dataset, dtype = input_dataset(network, images), np.float16 if half else np.float32
    began = time.perf_counter()
    for i, number in enumerate(missing, 1):
        started = time.perf_counter()
        count = compute_part(job, number, forward, dataset, network, dtype, batch_size, num_workers,
                             "first part" if i == 1 else "")
        now = time.perf_counter()
        parallel.say(f"part {i} of {len(missing)}: {count / (now - started):.0f} images/s, "
                     f"eta {duration((now - began) / i * (len(missing) - i))}")
    parallel.on_main(lambda: finish(job, [images.name(i) for i in range(len(images))], about))
    parallel.say(f"wrote {output}: {len(images)} images")


def describe(network: Network, data_path: str, tokens: str, seed: int, precision: str) -> dict:
    """The network's `about`, and what search.py needs to read the images and the network again."""
    path, weights = os.path.expanduser(data_path), network.about["weights"]
    return network.about | {  # absolute paths, so that search.py may run in another folder
        "data_path": os.path.abspath(path) if os.path.exists(path) else data_path, "tokens": tokens,
        "weights": weights and os.path.abspath(weights), "seed": seed, "precision": precision,
        "in_chans": network.info["in_chans"], "reading": network.reading.decoding(),
    }


def fingerprint(network: Network, images: Images, about: Mapping, half: bool) -> dict:
    return {
        "weights": str(about["weights_sha256"]), "images": images_hash(images),
        "transform": f"{about.get('resize_size')} {about['crop_size']} {network.info['mean']} {network.info['std']}",
        "network": f"{about['arch']} {about['precision']}{about.get('network_options', '')}",
        "tokens": about["tokens"], "half": half,
    }
