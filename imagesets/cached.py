"""Images that were decoded once and stay in memory, in a file that all processes and workers of a host map."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import parallel
from imagesets.decode import Reduction, Undecodable
from imagesets.loaders import worker_options
from imagesets.sources import Images
from parallel import Refused

SAMPLE = 64  # images that are decoded to estimate the size of all


class Cached:
    """A set of images whose `load` reads a file of pixels, (H, W, C) after (H, W, C), mapped into memory.

    It was made with one `reduction`, which `load` takes for granted. Images that can't be decoded raise the same
    Undecodable as before.

    Args:
        offsets: int64 (N + 1,), where each image begins in the file.
        sizes: int32 (N, 3), height, width and channels; zeros where the image can't be decoded.
        errors: {index: message} of these.
    """

    def __init__(self, images: Images, path: str, offsets: np.ndarray, sizes: np.ndarray, errors: dict[int, str]):
        self.images, self.path, self.offsets, self.sizes, self.errors = images, path, offsets, sizes, errors
        self.map()

    def map(self) -> None:
        # Copy-on-write: torch warns of memory that it can't write to.
        self.pixels = np.memmap(self.path, np.uint8, "c") if self.offsets[-1] else np.empty(0, np.uint8)

    def __getstate__(self) -> dict:
        return vars(self) | {"pixels": None}  # workers that are not forked map the file themselves

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.map()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return self.images.name(i)

    @property
    def labels(self) -> Tensor | None:
        return self.images.labels

    @property
    def classes(self) -> list[str]:
        return self.images.classes

    def images_in_memory(self) -> list[Tensor]:
        """All images, (H, W, C); no pixels of those that can't be decoded."""
        return [torch.from_numpy(self.pixels[first:last].reshape(size)) for first, last, size
                in zip(self.offsets[:-1], self.offsets[1:], self.sizes, strict=True)]

    def load(self, i: int, reduction: Reduction | None = None) -> Tensor:
        if i in self.errors:
            raise Undecodable(self.errors[i])
        pixels = self.pixels[self.offsets[i] : self.offsets[i + 1]].reshape(self.sizes[i])
        return torch.from_numpy(pixels).permute(2, 0, 1)


def cached(images: Images, reduction: Reduction | None, num_workers: int) -> Cached:
    """Decode all images once, on the first process of each host, and share them. Says before how much memory it takes.

    The file lies in the temporary folder ($TMPDIR). On Linux it has no name once all processes have mapped it, and is
    gone when they end, however they do.

    Raises:
        Refused: that is more than the host's free memory, or than the temporary folder's free space.
    """
    size, folder = estimated_bytes(images, reduction), tempfile.gettempdir()
    parallel.say(f"--cache_images: {len(images)} decoded images take about {size / 1e9:.3g} GB of each host's memory")
    free, what = min((free_memory(), "of memory"), (shutil.disk_usage(folder).free, f"in {folder}"))
    agree(f"--cache_images: {size / 1e9:.3g} GB are needed, and {free / 1e9:.3g} GB {what} are free; leave it out, or "
          "store smaller images" if size > free else "")
    hosts = parallel.gather_objects(socket.gethostname())
    first = hosts.index(hosts[parallel.rank()])
    shared, reason = None, ""
    if first == parallel.rank():
        try:
            shared = write(images, reduction, num_workers)
        except OSError as error:
            reason = (f"--cache_images: {folder}: {error.strerror or error}; set TMPDIR to another folder, or leave it "
                      "out")
    agree(reason)
    shared = parallel.gather_objects(shared)[first]
    result = Cached(images, *shared)
    parallel.barrier()
    if first == parallel.rank():
        discard(shared[0])
    return result


def agree(reason: str) -> None:
    """Raise Refused on all processes if one has a reason."""
    if reasons := [reason for reason in parallel.gather_objects(reason) if reason]:
        raise Refused(reasons[0])


def write(
    images: Images, reduction: Reduction | None, num_workers: int
) -> tuple[str, np.ndarray, np.ndarray, dict[int, str]]:
    """Write the pixels of all images into a new temporary file; returns the arguments of `Cached` after the first."""
    sizes, errors = np.zeros((len(images), 3), np.int32), {}
    handle, path = tempfile.mkstemp(prefix="decoded_images_")
    try:
        with os.fdopen(handle, "wb") as file:
            for i, pixels in enumerate(decoded(images, reduction, num_workers)):
                if isinstance(pixels, str):
                    errors[i] = pixels
                else:
                    sizes[i] = pixels.shape
                    file.write(pixels.numpy().data)
    except BaseException:
        os.unlink(path)
        raise
    return path, np.concatenate([[0], np.cumsum(sizes.prod(1, dtype=np.int64))]), sizes, errors


def discard(path: str) -> None:
    """Remove the file: at once on Linux, where it lives on while it is mapped, elsewhere when this process ends."""
    if sys.platform == "linux":
        os.unlink(path)
    else:
        atexit.register(lambda: Path(path).unlink(missing_ok=True))


class Decoded(Dataset):
    """i -> contiguous (H, W, C) pixels, or the message of the error."""

    def __init__(self, images: Images, reduction: Reduction | None) -> None:
        self.images, self.reduction = images, reduction

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor | str:
        try:
            return self.images.load(i, self.reduction).permute(1, 2, 0).contiguous()
        except Undecodable as error:
            return str(error)


def decoded(images: Images, reduction: Reduction | None, num_workers: int) -> Iterator[Tensor | str]:
    return iter(DataLoader(Decoded(images, reduction), batch_size=None, generator=torch.Generator(),
                           **worker_options(num_workers)))


def estimated_bytes(images: Images, reduction: Reduction | None) -> int:
    """From images at equal distances."""
    chosen = np.unique(np.linspace(0, len(images) - 1, SAMPLE).astype(int))
    sizes = [x.numel() for x in (Decoded(images, reduction)[int(i)] for i in chosen) if not isinstance(x, str)]
    return round(len(images) * np.mean(sizes)) if sizes else 0


def free_memory() -> float:
    """Bytes of the host's memory that can be had, as far as the system says; infinite elsewhere."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return float("inf")
