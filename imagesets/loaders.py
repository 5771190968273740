"""Data: the two ways in which a set of images is read, for pretraining and for evaluation.

Pretraining is a pure function of the seed. Which images step after step holds follows from (seed, epoch), and an
image's views from (seed, epoch, image): neither depends on workers, processes, or where a run was resumed.

Shapes: B images a process and batch, G = B x processes, N images in all, L local crops, C channels.
"""

import itertools
import math
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

import parallel
from imagesets.decode import MAX_PIXELS, jpeg_decoder
from imagesets.sources import Images, open_images

__all__ = [
    "MAX_PIXELS", "BadImages", "Images", "TooManyBadImages", "Unreadable", "batches", "on_device",
    "open_images",
]  # fmt: skip

Bad = tuple[str, str]  # name of an image that can't be decoded, and the reason


# ---- Pretraining ----


class GlobalBatches(Sampler):
    """This process's part of every global batch of a run: lists of B (epoch, index).

    Micro-batches are numbered through the whole run, so that workers live on from epoch to epoch. Number m is batch
    s of epoch e, (e, s) = divmod(m, batches_per_epoch). With p_e the permutation of (seed, e), and G = B world_size,

        global batch = p_e[s G : (s + 1) G],   of which rank r holds rows r B ... (r + 1) B - 1.

    So a global batch is the same for any number of processes that share it. The N % G images left over are others
    in each epoch.

    Args:
        images: N.
        batch_size: B.
        batches_per_epoch: N // G or less; by default N // G.
        first_batch, last_batch: m runs from the first up to, not including, the last; None is for ever.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        batches_per_epoch: int | None = None,
        first_batch: int = 0,
        last_batch: int | None = None,
    ) -> None:
        most = images // (batch_size * world_size)
        if most < 1:
            remedy = f"lower it to {images // world_size} or give more images" if images >= world_size else "give more"
            raise ValueError(
                f"--batch_size_per_gpu {batch_size} times {world_size} process(es) is more than the {images} images; "
                f"{remedy}"
            )
        if batches_per_epoch is not None and not 1 <= batches_per_epoch <= most:
            raise ValueError(f"{batches_per_epoch} batches an epoch: {images} images make 1 to {most}")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.batches_per_epoch = batches_per_epoch or most
        self.first_batch, self.last_batch = first_batch, last_batch

    def __len__(self) -> int:
        if self.last_batch is None:
            raise TypeError("a run without a last batch has no length")
        return max(0, self.last_batch - self.first_batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        permutation = lru_cache(1)(self.permutation)
        numbers = itertools.count(self.first_batch)
        for m in numbers if self.last_batch is None else range(self.first_batch, self.last_batch):
            epoch, s = divmod(m, self.batches_per_epoch)
            start = (s * self.world_size + self.rank) * self.batch_size
            yield [(epoch, i) for i in permutation(epoch)[start : start + self.batch_size].tolist()]

    def permutation(self, epoch: int) -> np.ndarray:
        # NumPy pads seeds with zeros: without the 1 at the end, the images' order would come from the same numbers as
        # the views of image 0.
        return np.random.default_rng([self.seed, epoch, 0, 1]).permutation(self.images)


class MultiCrop(Dataset):
    """(epoch, index) -> the crops of image `index`: (crops, params, index, bad), a pure function of its arguments.

    crops and params are `augmentation.cut`'s. An image that can't be decoded is replaced by another one, drawn from
    the same random numbers; bad lists the (name, reason) of those tried in vain, and index stays what was asked for.

    Raises:
        Unreadable: after TRIES such images in a row.
    """

    TRIES = 100

    def __init__(self, images: Images, augmentation: Any, seed: int) -> None:
        self.images, self.augmentation, self.seed = images, augmentation, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], Tensor, int, list[Bad]]:
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        bad, chosen = [], index
        while len(bad) < self.TRIES:
            try:
                image = self.images.load(chosen, self.augmentation.reduction)
            except (ValueError, OSError) as error:
                name = self.images.name(chosen)
                bad.append((name, str(error).removeprefix(f"{name}: ")))
                chosen = int(rng.integers(len(self.images)))
            else:
                crops, params = self.augmentation.cut(image, rng)
                return crops, params, index, bad
        name, reason = bad[-1]
        raise Unreadable(
            f"--data_path: {self.TRIES} images in a row can't be decoded; remove such. The last: {name}: {reason}"
        )


def collate(items: Sequence[tuple[list[Tensor], Tensor, int, list[Bad]]]) -> dict[str, Any]:
    """B items of MultiCrop -> one batch.

    Returns:
        crops: [global (2B, C, g, g), local (LB, C, l, l)] uint8, channels last in memory as `cut` leaves them; all
            images' crop 0, then all images' crop 1, ...; the second is left out when L = 0. params: float32
            ((2 + L)B, 8) in this order. index: int64 (B,). bad: list of (name, reason).
    """
    crops, params, indices, bad = zip(*items, strict=True)
    views = list(zip(*crops, strict=True))  # [view][image]
    groups = [[crop.permute(1, 2, 0) for view in group for crop in view] for group in (views[:2], views[2:])]
    return {
        # default_collate stacks; in a worker, at once into the memory that is shared with the parent
        "crops": [default_collate(group).permute(0, 3, 1, 2) for group in groups if group],
        "params": torch.stack(params, 1).flatten(0, 1),
        "index": torch.tensor(indices),
        "bad": [one for some in bad for one in some],
    }


def batches(
    images: Images,
    augmentation: Any,
    batch_size: int,
    num_workers: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    batches_per_epoch: int | None = None,
    first_batch: int = 0,
    last_batch: int | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """The micro-batches of a whole run on one process, as `collate` makes them; see GlobalBatches for the arguments.

    A worker that dies ends the iteration with DataLoader's RuntimeError (flags.worker_death).
    """
    return DataLoader(
        MultiCrop(images, augmentation, seed),
        batch_sampler=GlobalBatches(
            len(images), batch_size, seed, rank, world_size, batches_per_epoch, first_batch, last_batch
        ),
        **worker_options(num_workers),
        collate_fn=collate,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its draw of a seed for workers must not move the run's own random numbers
    )


def on_device(batches: Iterable[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """The batches with their crops on the device.

    On CUDA they travel on a stream of their own. The host is ahead of the device, so that the crops of a step are
    copied while the step before is computed; on the stream of the step they would queue up behind it.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(stream):  # None: as it is
            crops = [c.to(device, non_blocking=True) for c in batch["crops"]]
        if stream is not None:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(stream)
            for crop in crops:
                crop.record_stream(computing)  # its memory is not given away before the step has read it
        yield batch | {"crops": crops}


def worker_options(n: int) -> dict[str, Any]:
    """DataLoader's arguments for n workers.

    On Linux they are forked, whatever Python's default is (forkserver from 3.14 on): they start at once, share the
    listing's memory, and no server between stands to be hit by a signal that is for the process that trains.
    """
    if n:
        jpeg_decoder()  # imported here, not by each of them
    fork = "fork" if n and sys.platform == "linux" else None
    return {"num_workers": n, "worker_init_fn": init_worker, "multiprocessing_context": fork}


def init_worker(worker: int) -> None:
    """Workers compute on one thread, and leave signals to the process that trains.

    Ctrl-C and Slurm's warnings reach every process of a run. The one that trains then finishes its step and saves,
    for which its workers must go on; so a worker heeds SIGTERM only from its parent, which may end it by that.
    """
    torch.set_num_threads(1)
    sys.excepthook = say_unless_disconnected
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=heed_parent, daemon=True).start()


def say_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A worker's sys.excepthook. Its own errors travel to the parent; the thread that hands tensors over ends up here.

    That is when the parent, which says why, leaves in the middle of it, because another worker has died.
    """
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def heed_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class TooManyBadImages(RuntimeError):
    """More images than --max_bad_images allows can't be decoded; all processes agree on it."""


class Unreadable(RuntimeError):
    """One process can't go on for want of an image."""

    def __init__(self, message: str) -> None:  # raised in a worker, it comes behind that one's traceback
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.Unreadable: "))


class BadImages:
    """Counts the images that can't be decoded, each once, and stops a run that has too many.

    With several processes, each counts its own, and `share` makes the counts one: then all of them stop together.
    The limit is max_bad_images x N rounded up, so that a small set of images may have one unless the share is 0. The
    first ten are printed.

    Args:
        images: N.
        max_bad_images: share of them, 0 to 1.
    """

    PRINTED = 10

    def __init__(self, images: int, max_bad_images: float) -> None:
        if not 0 <= max_bad_images <= 1:
            raise ValueError(f"--max_bad_images {max_bad_images}: give a share of the images, 0 to 1")
        self.images, self.max_bad_images = images, max_bad_images
        self.limit = math.ceil(round(max_bad_images * images, 6))  # 0.07 x 100 is 7.000000000000001
        self.reasons: dict[str, str] = {}  # name -> reason

    def add(self, bad: Iterable[Bad]) -> None:
        """Counts a batch's `bad`. One process raises TooManyBadImages here when there are more than the limit."""
        for name, reason in bad:
            if name in self.reasons:
                continue
            self.reasons[name] = reason
            if len(self.reasons) <= self.PRINTED and parallel.is_main():
                last = "; further ones are only counted" if len(self.reasons) == self.PRINTED else ""
                print(f"bad image, replaced by another: {name}: {reason}{last}", flush=True)
        if parallel.world_size() == 1:
            self.check()

    def share(self) -> None:
        """Brings the processes' counts together; all of them call it, now and then."""
        if parallel.world_size() > 1:
            for reasons in parallel.gather_objects(list(self.reasons.items())):
                self.add(reasons)
            self.check()

    def check(self) -> None:
        if len(self.reasons) > self.limit:
            name, reason = list(self.reasons.items())[-1]
            raise TooManyBadImages(
                f"{len(self.reasons)} of {self.images} images can't be decoded, more than --max_bad_images "
                f"{self.max_bad_images:g} allows; remove them or raise it. The last: {name}: {reason}"
            )
