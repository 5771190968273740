"""Loaders: the batches of pretraining, and the data-loading workers that evaluation shares.

The data of pretraining are a pure function of the seed. The images of each step follow from (seed, epoch), and the
views of an image from (seed, epoch, image index). Neither depends on the number of workers or processes, nor on where
a run was resumed.

Shapes: B images per process and batch, G = B x processes, N images in all, L local crops, C channels.
"""

import itertools
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from multiprocessing.queues import Queue
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

import parallel
from imagesets import remarks
from imagesets.bad_images import Unreadable
from imagesets.decode import Undecodable, jpeg_decoder
from imagesets.pixels import Pixels
from imagesets.sources import Images
from parallel import Refused

Masks = Callable[[int, int, int], Tensor]  # (epoch, micro-batch, row) -> masks of an image's global crops
# (epoch, index, masks) -> the patches of the image's global crops that the student sees; None: all of them
Kept = Callable[[int, int, Tensor | None], Tensor | None]


class Early(NamedTuple):
    """Another augmentation in the first epochs of a run."""

    epochs: int
    augmentation: Any

# ---- Batches ----


class GlobalBatches(Sampler):
    """This process's part of every global batch of a run: lists of B (epoch, index), or (epoch, index, m, row).

    Micro-batches are numbered through the whole run, so that workers are kept from epoch to epoch. Micro-batch m is
    batch s of epoch e, where (e, s) = divmod(m, batches_per_epoch). With p_e the permutation drawn from (seed, e), and
    G = B world_size,

        global batch = p_e[s G : (s + 1) G],   of which rank r gets rows r B ... (r + 1) B - 1.

    So a global batch is the same for any number of processes that share it. The N % G images that are left out differ
    from epoch to epoch.

    Args:
        images: N.
        batch_size: B.
        batches_per_epoch: at most N // G, the default.
        first_batch, last_batch: m runs from first_batch to last_batch - 1; by default, without end.
        numbered: also yield the number m of the micro-batch and the image's row in it, 0 ... G - 1.

    Raises:
        Refused: B world_size > N.
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
        last_batch: int = sys.maxsize,
        numbered: bool = False,
    ) -> None:
        most = images // (batch_size * world_size)
        if most < 1:
            remedy = f"lower it to {images // world_size} or give more images" if images >= world_size else "give more"
            raise Refused(
                f"--batch_size_per_gpu {batch_size} times {world_size} process(es) is more than the {images} images; "
                f"{remedy}"
            )
        if batches_per_epoch is not None and not 1 <= batches_per_epoch <= most:
            raise ValueError(f"{batches_per_epoch} batches per epoch: {images} images make 1 to {most}")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.batches_per_epoch = batches_per_epoch or most
        self.first_batch, self.last_batch, self.numbered = first_batch, last_batch, numbered

    def __len__(self) -> int:
        return max(0, self.last_batch - self.first_batch)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        permutation = lru_cache(1)(self.permutation)
        for m in range(self.first_batch, self.last_batch):
            epoch, s = divmod(m, self.batches_per_epoch)
            start, row = (s * self.world_size + self.rank) * self.batch_size, self.rank * self.batch_size
            indices = permutation(epoch)[start : start + self.batch_size].tolist()
            yield [(epoch, i, m, row + j) if self.numbered else (epoch, i) for j, i in enumerate(indices)]

    def permutation(self, epoch: int) -> np.ndarray:
        # NumPy pads seeds with zeros: without the 1 at the end, the permutation would be drawn from the same stream as
        # the views of image 0.
        return np.random.default_rng([self.seed, epoch, 0, 1]).permutation(self.images)


class MultiCrop(Dataset):
    """(epoch, index) -> the crops of image `index`: (crops, params, index, bad), a pure function of its arguments.

    crops and params are those of `augmentation.cut`. An image that can't be decoded is replaced by another one, drawn
    from the same random stream. bad lists the (name, reason) of images that could not be decoded; index remains the
    one that was asked for.

    With `masks` or `kept`, (epoch, index, m, row) -> the same and a dict: `masks` (2, N) of the image's global crops,
    and `kept` (2, n), unless the epoch keeps all patches.

    With `places`, crops are instead the rows of `augmentation.places`, which `Pixels.crops` takes.

    Raises:
        Unreadable: TRIES images in a row can't be decoded.
    """

    TRIES = 100

    def __init__(
        self, images: Images, augmentation: Any, seed: int, masks: Masks | None = None, kept: Kept | None = None,
        early: Early | None = None, places: bool = False,
    ) -> None:
        self.images, self.augmentation, self.seed = images, augmentation, seed
        self.masks, self.kept, self.early, self.places = masks, kept, early, places

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, ...]) -> tuple:
        epoch, index, *place = key
        rng = np.random.default_rng([self.seed, epoch, index])
        augmentation = self.early.augmentation if self.early and epoch < self.early.epochs else self.augmentation
        bad, chosen = [], index
        while len(bad) < self.TRIES:
            try:
                # Also in early epochs: decoded images that are kept in memory are these.
                image = self.images.load(chosen, self.augmentation.reduction)
            except Undecodable as error:
                name = self.images.name(chosen)
                bad.append((name, str(error).removeprefix(f"{name}: ")))
                chosen = int(rng.integers(len(self.images)))
            else:
                if self.places:
                    crops, params = augmentation.places(chosen, *image.shape[-2:], rng)
                else:
                    crops, params = augmentation.cut(image, rng)
                tokens = [self.tokens(epoch, index, *place)] if self.masks or self.kept else []
                return crops, params, index, bad, *tokens
        name, reason = bad[-1]
        raise Unreadable(f"--data_path: {self.TRIES} images in a row can't be decoded; remove such images. The last: "
                         f"{name}: {reason}")

    def tokens(self, epoch: int, index: int, *place: int) -> dict[str, Tensor]:
        """What becomes of the patches of the image's global crops."""
        masks = self.masks(epoch, *place) if self.masks else None
        kept = self.kept(epoch, index, masks) if self.kept else None
        return {name: value for name, value in (("masks", masks), ("kept", kept)) if value is not None}


def collate(items: Sequence[tuple]) -> dict[str, Any]:
    """B items of MultiCrop -> one batch.

    Returns:
        crops: [global (2B, C, g, g), local (LB, C, l, l)] uint8, channels last in memory as `cut` leaves them: crop 0
            of all images, then crop 1 of all images, ...; no second tensor if L = 0.
        params: float32 ((2 + L)B, 8), in the same order.
        index: int64 (B,).
        bad: list of (name, reason).
        masks: bool (2B, N), kept: int64 (2B, n), in the order of the global crops; only where the items have them.
    """
    crops, params, indices, bad, *tokens = zip(*items, strict=True)
    views = list(zip(*crops, strict=True))  # [view][image]
    groups = [[crop for view in group for crop in view] for group in (views[:2], views[2:])]
    return {
        "crops": [stacked(group) for group in groups if group],
        "params": torch.stack(params, 1).flatten(0, 1),
        "index": torch.tensor(indices),
        "bad": list(itertools.chain.from_iterable(bad)),
    } | {name: torch.stack([of_image[name] for of_image in tokens[0]], 1).flatten(0, 1)
         for name in (tokens[0][0] if tokens else ())}


def stacked(crops: Sequence[Tensor]) -> Tensor:
    """Crops (C, H, W), or rows that describe them; in a worker directly into memory shared with the parent."""
    if crops[0].ndim == 1:
        return default_collate(crops)
    return default_collate([crop.permute(1, 2, 0) for crop in crops]).permute(0, 3, 1, 2)


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
    last_batch: int = sys.maxsize,
    pin_memory: bool = False,
    masks: Masks | None = None,
    kept: Kept | None = None,
    early: Early | None = None,
    places: bool = False,
) -> DataLoader:
    """One process's micro-batches of a whole run, made by `collate`; see GlobalBatches and MultiCrop for the arguments.

    When a worker dies, the iteration ends with DataLoader's RuntimeError (see parallel.worker_death).
    """
    return DataLoader(
        MultiCrop(images, augmentation, seed, masks, kept, early, places),
        batch_sampler=GlobalBatches(
            len(images), batch_size, seed, rank, world_size, batches_per_epoch, first_batch, last_batch,
            masks is not None
        ),
        **worker_options(num_workers),
        collate_fn=collate,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # drawing the workers' seed must not advance the run's own random stream
    )


def steps(
    images: Images, augmentation: Any, batch_size: int, num_workers: int, seed: int, micro_batches: int,
    steps_per_epoch: int, device: torch.device, masks: Masks | None = None, kept: Kept | None = None,
    early: Early | None = None, pixels: Pixels | None = None,
) -> Callable[[int, int], Iterator[dict[str, Any]]]:
    """(first, last) -> this process's micro-batches of steps first ... last - 1, on the device; see `batches`.

    Args:
        micro_batches: of a step.
        pixels: cuts the crops on the device, from all images there; None: the workers cut them.
    """
    def load(first: int, last: int) -> Iterator[dict[str, Any]]:
        return on_device(batches(
            images, augmentation, batch_size, num_workers, seed, parallel.rank(), parallel.world_size(),
            steps_per_epoch * micro_batches, first * micro_batches, last * micro_batches, device.type == "cuda", masks,
            kept, early, pixels is not None,
        ), device, pixels)

    return load


def on_device(
    batches: Iterable[dict[str, Any]], device: torch.device, pixels: Pixels | None = None
) -> Iterator[dict[str, Any]]:
    """The batches with their crops on the device.

    On CUDA the crops are copied, or cut from `pixels`, on a separate stream. The host runs ahead of the device, so the
    crops of a step arrive while the previous step is computed; on the same stream, they would wait for that step.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(stream):  # None: the current stream
            crops = [c.to(device, non_blocking=True) if pixels is None else pixels.crops(c) for c in batch["crops"]]
        if stream is not None:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(stream)
            for crop in crops:
                crop.record_stream(computing)  # its memory is not reused before the step has read it
        yield batch | {"crops": crops}


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_options(n: int) -> dict[str, Any]:
    """DataLoader's arguments for n workers, or as many as there are cores: more would only take turns.

    On Linux workers are forked, whatever Python's default is (forkserver from 3.14 on): they start at once, share the
    listing's memory, and no server process stands in between, which a signal meant for the training process could end.
    """
    n = min(n, available_cores())
    if n:
        remarks.share()
        jpeg_decoder()  # imported once here instead of in each worker
    fork = "fork" if n and sys.platform == "linux" else None
    return {"num_workers": n, "worker_init_fn": init_worker, "multiprocessing_context": fork}


# A worker hands tensors over through a socket TMPDIR/pymp-xxxxxxxx/listener-xxxxxxxx, whose path Linux limits to 107
# bytes. With a longer one the batch is lost, and the run waits for it forever.
LONGEST_TEMPORARY_FOLDER = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")


def init_worker(worker: int) -> None:
    """Run a worker on one thread, and let it ignore signals that are meant for the training process.

    Ctrl-C and Slurm's warnings reach every process of a run. The training process then finishes its step and saves,
    for which its workers must go on. So a worker ends on SIGTERM only if its parent sends it.
    """
    torch.set_num_threads(1)
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPORARY_FOLDER and os.access("/tmp", os.W_OK):
        tempfile.tempdir = "/tmp"
    sys.excepthook = print_unless_disconnected
    Queue._on_queue_feeder_error = staticmethod(end_with_lost_batch)  # where Python would go on without it
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows has SIGINT only
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=end_with_parent, daemon=True).start()


def print_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A worker's sys.excepthook: prints no traceback when the parent has closed the connection.

    A worker's own exceptions travel to the parent. What arrives here comes from the thread that hands tensors over,
    interrupted because another worker has died and the parent, which reports that, has left.
    """
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def end_with_lost_batch(error: Exception, batch: Any) -> NoReturn:
    """End a worker that can't hand over a batch, for which the parent would wait forever."""
    sys.excepthook(type(error), error, error.__traceback__)
    sys.stderr.flush()
    os._exit(1)


def end_with_parent() -> None:
    """Wait for a SIGTERM of the parent, and end the worker."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
