"""Sources: what can be opened as a set of images.

A set of images is any object with

    len(images), images.load(i) -> uint8 (C, H, W), images.name(i) -> str,
    images.labels -> int64 (N,) or None, images.classes -> list of names ([] without labels)

Shapes: N images in all, C channels.
"""

import difflib
import inspect
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import shapes
from images import MAX_PIXELS, MODES, decode, from_pil, printable, suffixes


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
