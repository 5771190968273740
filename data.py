"""Data: what can be opened as a set of images, and the two ways in which it is read, for pretraining and evaluation.

A set of images is any object with

    len(images), images.load(i) -> uint8 (C, H, W), images.name(i) -> str,
    images.labels -> int64 (N,) or None, images.classes -> list of names ([] without labels)

Pretraining is a pure function of the seed. Which images step after step holds follows from (seed, epoch), and an
image's views from (seed, epoch, image): neither depends on workers, processes, or where a run was resumed.

Shapes: B images a process and batch, G = B x processes, N images in all, L local crops, C channels.
"""

import difflib
import inspect
import itertools
import math
import os
import re
import signal
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import shapes
from images import MAX_PIXELS, MODES, decode, from_pil, printable, suffixes

Bad = tuple[str, str]  # name of an image that can't be decoded, and the reason


class Images(Protocol):
    labels: Tensor | None
    classes: list[str]

    def __len__(self) -> int: ...
    def load(self, i: int) -> Tensor: ...
    def name(self, i: int) -> str: ...


# ---- Sets of images ----


def open_images(
    data_path: str | os.PathLike,
    split: str | None = None,
    in_chans: int = 3,
    max_pixels: int = MAX_PIXELS,
    flag: str = "--data_path",
) -> Images:
    """The images that `data_path` names.

    folder              every picture in it, at any depth, in the order of the names; symbolic links are followed,
                        hidden files and folders aren't. When all lie in first-level folders, two or more of them,
                        the first-level folders are the classes, numbered in the order of their names (an empty one
                        too, so that the numbers of train and val agree); else there are no labels.
    file.txt            a path a line, relative to the file's folder, or all lines "path<TAB>label". Labels that are
                        integers are taken as they are, others are numbered in the order of their names.
    torchvision:NAME    the class of torchvision.datasets, in ./data or in the folder of `torchvision:NAME:FOLDER`;
                        downloaded if it isn't there.
    shapes              drawn pictures: `shapes`, `shapes:COUNT` or `shapes:COUNTxPIXELS`, by default 10000x96. A
                        folder of that name is `./shapes`.

    Args:
        split: None takes the path as it is. 'train' takes the folder's train/ when it has one. 'val' takes its val/
            or test/, one of which must be there: k-NN of a set with itself would be a fine figure without meaning.
            For torchvision, the split of that name or the nearest to it; for shapes, 'val' is COUNT / 4 pictures
            that no training set contains.
        in_chans: C; other than 1, 3 or 4 for folders and lists of .npy arrays only.
        max_pixels: larger files can't be decoded (a guard against decompression bombs).
        flag: the flag that errors name.

    Raises:
        ValueError, OSError: one line that names the flag, the value and the remedy.
    """
    data_path = os.fspath(data_path)
    where = f"{flag} {data_path!r}"
    if split not in (None, "train", "val"):
        raise ValueError(f"split is {split!r}: give None, 'train' or 'val'")
    drawn = re.fullmatch(r"(shapes|torchvision)(?::(.*))?", data_path)
    if drawn and in_chans not in MODES:
        raise ValueError(f"--in_chans {in_chans} with {where}: it has pictures of 1, 3 or 4 channels")
    if drawn:
        return (open_shapes if drawn[1] == "shapes" else open_torchvision)(where, drawn[2], split, in_chans)
    path = os.path.expanduser(data_path)
    try:
        if os.path.isdir(path):
            return open_folder(where, path, split, in_chans, max_pixels)
        if os.path.isfile(path) and path.lower().endswith(".txt"):
            return open_list(where, path, split, in_chans, max_pixels)
    except OSError as error:
        if error.errno is None:  # raised below, with its line
            raise
        name = printable(os.fsencode(error.filename or path))
        raise OSError(f"{where}: {name!r}: {error.strerror}; make it readable or take it out") from error
    raise FileNotFoundError(
        f"{where}: no folder or .txt list has this name; give one, or torchvision:NAME, or shapes[:COUNT[xPIXELS]]"
    )


class Files:
    """Picture files. The paths lie end to end in one tensor, which workers share: a million `str` would be copied
    into every worker, little by little, as their reference counts change."""

    def __init__(
        self,
        folder: str,
        paths: Iterable[bytes],
        labels: Sequence[int] | None,
        classes: list[str],
        in_chans: int,
        max_pixels: int,
    ) -> None:
        """`paths` are relative to `folder`; `labels` may be filled while `paths` is consumed."""
        text, ends = bytearray(), array("q", [0])
        for path in paths:
            text += path
            ends.append(len(text))
        self.text = torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        self.ends = torch.frombuffer(ends, dtype=torch.int64)
        self.folder, self.in_chans, self.max_pixels = os.fsencode(folder), in_chans, max_pixels
        self.labels = None if labels is None else torch.from_numpy(np.array(labels, np.int64))
        self.classes = classes

    def __len__(self) -> int:
        return len(self.ends) - 1

    def path(self, i: int) -> bytes:
        start, end = self.ends[i].item(), self.ends[i + 1].item()
        return os.path.join(self.folder, self.text[start:end].numpy().tobytes())

    def name(self, i: int) -> str:
        return printable(self.path(i))

    def load(self, i: int) -> Tensor:
        return decode(os.fsdecode(self.path(i)), self.in_chans, self.max_pixels)


def open_folder(where: str, folder: str, split: str | None, in_chans: int, max_pixels: int) -> Files:
    folder = split_folder(where, folder, split)
    with os.scandir(os.fsencode(folder)) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(b"."))
    numbers = {name: number for number, name in enumerate(names)}
    labels = array("q")

    def paths() -> Iterator[bytes]:
        for path in pictures_below(os.fsencode(folder), b"", frozenset(map(os.fsencode, suffixes(in_chans)))):
            first, slash, _ = path.partition(b"/")
            labels.append(numbers[first] if slash else -1)
            yield path

    files = Files(folder, paths(), labels, [printable(name) for name in names], in_chans, max_pixels)
    if not len(files):
        known = "pictures that Pillow reads, or .npy" if in_chans in MODES else f".npy, as --in_chans is {in_chans}"
        raise FileNotFoundError(f"{where}: no images in {folder!r}; give a folder that holds some ({known})")
    if (files.labels < 0).any() or len(files.labels.unique()) < 2:
        files.labels, files.classes = None, []
    return files


def split_folder(where: str, folder: str, split: str | None) -> str:
    names = {None: (), "train": ("train",), "val": ("val", "test")}[split]
    for name in names:
        if os.path.isdir(os.path.join(folder, name)):
            return os.path.join(folder, name)
    if split == "val":
        raise FileNotFoundError(f"{where}: no folder val or test in it; give a folder that has one")
    return folder


def pictures_below(folder: bytes, prefix: bytes, known: frozenset[bytes], above: tuple = ()) -> Iterator[bytes]:
    """Paths of pictures, each behind `prefix`: a folder's files, then its folders', in the order of their bytes.

    That is the order of Python's strings too, and the same on all file systems. `above` holds the folders on the
    way here: a link back to one of them is not followed.
    """
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:
        return
    above += ((status.st_dev, status.st_ino),)
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in known and (entry.is_file() or entry.is_symlink()):
                files.append(entry.name)  # a broken link too: a bad image, to be reported; a pipe is none
    yield from (prefix + name for name in sorted(files))
    for name in sorted(folders):
        yield from pictures_below(os.path.join(folder, name), prefix + name + b"/", known, above)


def open_list(where: str, path: str, split: str | None, in_chans: int, max_pixels: int) -> Files:
    if split == "val":
        raise ValueError(f"{where}: a list has no part for validation; give that a list of its own")
    with open(path, "rb") as file:
        lines = [line.rstrip(b"\r\n") for line in file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    rows = [line.split(b"\t") for line in lines if line]
    if not rows:
        raise ValueError(f"{where}: the list is empty; write a path a line")
    if len({len(row) for row in rows}) > 1 or len(rows[0]) > 2:
        raise ValueError(f"{where}: some lines have a label and some don't; write 'path' or 'path<TAB>label' in all")
    labels, classes = numbered([printable(row[1]) for row in rows]) if len(rows[0]) == 2 else (None, [])
    files = Files(os.path.dirname(path), (row[0] for row in rows), labels, classes, in_chans, max_pixels)
    if not os.path.isfile(files.path(0)):  # one look, for the usual mistake
        raise FileNotFoundError(f"{where}: {files.name(0)!r} isn't there; paths are relative to the list's folder")
    return files


def numbered(labels: list[str]) -> tuple[list[int], list[str]]:
    """Labels as text -> as integers, and the classes' names."""
    if all(re.fullmatch(r"[0-9]{1,6}", label) for label in labels):
        numbers = [int(label) for label in labels]
        return numbers, [str(number) for number in range(max(numbers) + 1)]
    names = sorted(set(labels))
    number = {name: i for i, name in enumerate(names)}
    return [number[label] for label in labels], names


class Shapes:
    """Pictures start, start + 1, ... of `shapes.draw`."""

    def __init__(self, start: int, count: int, size: int, in_chans: int) -> None:
        self.start, self.count, self.size, self.in_chans = start, count, size, in_chans
        self.classes = list(shapes.KINDS)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def labels(self) -> Tensor:
        return torch.arange(self.start, self.start + self.count) % len(self.classes)  # as `draw` says

    def name(self, i: int) -> str:
        return f"shapes[{self.start + i}]"

    def load(self, i: int) -> Tensor:
        return from_pil(Image.fromarray(shapes.draw(self.start + i, self.size)[0]), self.in_chans)


VAL_START = 1_000_000_000  # pictures from here on are for validation


def open_shapes(where: str, size: str | None, split: str | None, in_chans: int) -> Shapes:
    match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", "10000x96" if size is None else size)
    count, pixels = (int(match[1]), int(match[2] or 96)) if match else (0, 0)
    if not 1 <= count <= VAL_START or not 8 <= pixels <= 8192:
        raise ValueError(
            f"{where}: give shapes:COUNT or shapes:COUNTxPIXELS, as in shapes:2000x96, of 8 pixels or more"
        )
    start, count = (VAL_START, max(1, count // 4)) if split == "val" else (0, count)
    return Shapes(start, count, pixels, in_chans)


class Torchvision:
    """A data set of torchvision whose items are (PIL image, target)."""

    def __init__(self, name: str, dataset: Any, in_chans: int) -> None:
        self.dataset, self.in_chans, self._name = dataset, in_chans, name

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, i: int) -> str:
        return f"{self._name}[{i}]"

    def load(self, i: int) -> Tensor:
        try:
            return from_pil(self.dataset[i][0], self.in_chans)
        except Exception as error:  # what decoders raise on broken files
            raise ValueError(f"{self.name(i)}: {error}") from error

    @cached_property
    def labels(self) -> Tensor | None:
        """The targets, where they are one non-negative integer an image."""
        samples = getattr(self.dataset, "samples", None) or getattr(self.dataset, "_samples", None)
        targets = [target for _, target in samples] if samples else None
        for attribute in ("targets", "labels", "_labels"):  # torchvision has no one name for it
            targets = getattr(self.dataset, attribute, None) if targets is None else targets
        try:
            labels = torch.as_tensor([self.dataset[i][1] for i in range(len(self))] if targets is None else targets)
        except (TypeError, ValueError, RuntimeError):  # targets of boxes, masks, text ...
            return None
        whole = labels.shape == (len(self),) and not labels.is_floating_point() and labels.min() >= 0
        return labels.long() if whole else None

    @cached_property
    def classes(self) -> list[str]:
        if self.labels is None:
            return []
        names = getattr(self.dataset, "classes", None)
        return list(map(str, names or range(int(self.labels.max()) + 1)))


def open_torchvision(where: str, value: str | None, split: str | None, in_chans: int) -> Torchvision:
    from torchvision import datasets

    name, _, root = (value or "").partition(":")
    known = {n: d for n, d in vars(datasets).items() if isinstance(d, type) and issubclass(d, Dataset)}
    if name not in known:
        lower = {n.lower(): n for n in known}
        near = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, 5, 0.5)] or ["CIFAR10", "Flowers102"]
        raise ValueError(f"{where}: torchvision has no such data set; near names: {', '.join(near)}")
    takes = inspect.signature(known[name]).parameters
    folder = {"root": os.path.expanduser(root or "data")} if "root" in takes else {}
    for choice in split_choices(where, takes, split):
        try:
            dataset = construct(partial(known[name], **folder, **choice), folder.get("root"), "download" in takes)
            if not isinstance(dataset[0][0], Image.Image):
                raise TypeError("its items aren't (picture, target)")
            return Torchvision(f"torchvision:{name}", dataset, in_chans)
        except Exception as error:  # not found, no network, no such split, arguments missing, no package to read it ...
            last = error
            if not isinstance(error, ValueError):  # which says that there is no such split
                break
    reason = (str(last) or type(last).__name__).splitlines()[0]
    raise OSError(f"{where}: {reason}; give the folder that holds it as torchvision:{name}:FOLDER") from last


def split_choices(where: str, takes: Iterable[str], split: str | None) -> list[dict[str, Any]]:
    """Arguments that choose a split in a class of torchvision, to be tried in this order."""
    if "train" in takes:
        return [{"train": split != "val"}]
    if split is None:
        return [{}]
    if "split" not in takes:
        raise ValueError(f"{where}: it has no splits, so none for {split!r}; give another data set")
    names = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "test")}[split]
    return [{"split": name} for name in names]


def construct(make: partial, root: str | None, downloadable: bool) -> Any:
    """`make()`; where files are missing, with download=True, one process of the machine after the other."""
    try:
        return make()
    except (RuntimeError, OSError):
        if not downloadable or root is None:
            raise
    import fcntl

    os.makedirs(root, exist_ok=True)
    with open(os.path.join(root, ".download.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go of by the system, however the process ends
        return make(download=True)


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
            raise ValueError(
                f"--batch_size_per_gpu {batch_size} times {world_size} process(es) is more than the {images} images; "
                f"lower it to {images // world_size} or give more images"
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
        RuntimeError: after TRIES such images in a row.
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
                image = self.images.load(chosen)
            except (ValueError, OSError) as error:
                name = self.images.name(chosen)
                bad.append((name, str(error).removeprefix(f"{name}: ")))
                chosen = int(rng.integers(len(self.images)))
            else:
                crops, params = self.augmentation.cut(image, rng)
                return crops, params, index, bad
        name, reason = bad[-1]
        raise RuntimeError(f"--data_path: {self.TRIES} images in a row can't be decoded; the last: {name}: {reason}")


def collate(items: Sequence[tuple[list[Tensor], Tensor, int, list[Bad]]]) -> dict[str, Any]:
    """B items of MultiCrop -> one batch.

    Returns:
        crops: [global (2B, C, g, g), local (LB, C, l, l)] uint8, all images' crop 0, then all images' crop 1, ...;
            the second is left out when L = 0. params: float32 ((2 + L)B, 8) in this order. index: int64 (B,).
            bad: list of (name, reason).
    """
    crops, params, indices, bad = zip(*items, strict=True)
    views = list(zip(*crops, strict=True))  # [view][image]
    groups = [[crop for view in group for crop in view] for group in (views[:2], views[2:])]
    return {
        "crops": [torch.stack(group) for group in groups if group],
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

    A worker that dies ends the iteration with DataLoader's RuntimeError.
    """
    return DataLoader(
        MultiCrop(images, augmentation, seed),
        batch_sampler=GlobalBatches(
            len(images), batch_size, seed, rank, world_size, batches_per_epoch, first_batch, last_batch
        ),
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=init_worker,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pin_memory,
    )


def init_worker(worker: int) -> None:
    """Workers compute on one thread, and leave signals to the process that trains.

    Ctrl-C and Slurm's warnings reach every process of a run. The one that trains then finishes its step and saves,
    for which its workers must go on; so a worker heeds SIGTERM only from its parent, which may end it by that.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=heed_parent, daemon=True).start()


def heed_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class BadImages:
    """Counts the images that can't be decoded, each once, and stops a run that has too many.

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
        """Counts a batch's `bad`.

        Raises:
            RuntimeError: when there are more than the limit.
        """
        for name, reason in bad:
            if name in self.reasons:
                continue
            self.reasons[name] = reason
            if len(self.reasons) <= self.PRINTED:
                last = "; further ones are only counted" if len(self.reasons) == self.PRINTED else ""
                print(f"bad image, replaced by another: {name}: {reason}{last}", flush=True)
        if len(self.reasons) > self.limit:
            name, reason = list(self.reasons.items())[-1]
            raise RuntimeError(
                f"{len(self.reasons)} of {self.images} images can't be decoded, more than --max_bad_images "
                f"{self.max_bad_images:g} allows; remove them or raise it. The last: {name}: {reason}"
            )


# ---- Evaluation ----


class EvalImages(Dataset):
    """index -> (float32 (C, crop, crop), index): the shorter side resized to `size`, centre crop, normalized.

    Resized as uint8, bicubic with antialiasing, which is within two levels of Pillow's.

    Args:
        size, crop: pixels, size >= crop.
        mean, std: one value a channel, of intensities in [0, 1].

    Raises:
        ValueError: for an image that can't be decoded, with its name: features of another one would be wrong.
    """

    LONGEST = 16  # times the shorter side

    def __init__(self, images: Images, size: int, crop: int, mean: Sequence[float], std: Sequence[float]) -> None:
        if not 1 <= crop <= size:
            raise ValueError(f"images resized to {size} pixels can't be cropped to {crop}: make the crop smaller")
        self.images, self.size, self.crop = images, size, crop
        self.mean, self.std = (255 * torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images.load(index)
        # of a strip, only the middle is resized: all of it could fill the memory, and the crop drops it
        image = center_crop(image, *(min(n, self.LONGEST * min(image.shape[1:])) for n in image.shape[1:]))
        shorter = min(image.shape[1:])
        size = [self.size * n // shorter for n in image.shape[1:]]
        image = F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]
        return (center_crop(image, self.crop, self.crop).float() - self.mean) / self.std, index


def center_crop(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (round((n - m) / 2) for n, m in zip(image.shape[1:], (height, width), strict=True))
    return image[:, top : top + height, left : left + width]
