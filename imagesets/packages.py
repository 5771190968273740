"""Data sets of other packages: torchvision's, and those that Hugging Face's datasets saved to disk.

Shapes: N images in all.
"""

import difflib
import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import parallel
from imagesets.decode import Reading, Reduction, Undecodable, decode, from_pil
from imagesets.listing import files_hash, numbered
from imagesets.parts import LABEL_COLUMNS, SPLIT_COLUMNS, is_part
from parallel import Refused, import_optional

# ---- torchvision ----

FILE_LISTS = ("samples", "imgs", "_samples", "_image_files", "_images", "images", "data")  # paths, or (path, ...)


class Torchvision:
    """A torchvision data set whose items are (PIL image, target)."""

    def __init__(
        self, name: str, dataset: Any, reading: Reading, arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.dataset, self.reading, self._name, self.arguments = dataset, reading, name, dict(arguments)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the class, its arguments, and its images' files or, of images in memory, their pixels."""
        root, data = os.path.realpath(self.arguments.get("root", "")), getattr(self.dataset, "data", None)
        digest = hashlib.sha256(f"{self._name} {self.arguments | {'root': root}} {len(self)}\n".encode())
        if isinstance(data, np.ndarray | Tensor):
            data = np.ascontiguousarray(data)
            digest.update(f"{data.dtype} {data.shape}\n".encode() + data.tobytes())
        else:
            digest.update(files_hash(image_files(self.dataset) or files_below(self.arguments.get("root"))).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, i: int) -> str:
        return f"{self._name}[{i}]"

    def load(self, i: int, reduction: Reduction | None = None) -> Tensor:
        try:
            return from_pil(self.dataset[i][0], self.reading.in_chans, self.reading.value_range, self.name(i))
        except Exception as error:  # on broken files, decoders raise many types
            raise Undecodable(f"{self.name(i)}: {error}") from error

    @cached_property
    def labels_and_classes(self) -> tuple[Tensor | None, list[str]]:
        """The targets, if they are one non-negative integer per image, and the names of the classes."""
        samples = getattr(self.dataset, "samples", None) or getattr(self.dataset, "_samples", None)
        targets = [target for _, target in samples] if samples else None
        for attribute in ("targets", "labels", "_labels"):  # torchvision has no single name for them
            targets = getattr(self.dataset, attribute, None) if targets is None else targets
        try:
            labels = torch.as_tensor([self.dataset[i][1] for i in range(len(self))] if targets is None else targets)
        except (TypeError, ValueError, RuntimeError):  # targets such as boxes, masks or text
            return None, []
        if labels.shape != (len(self),) or labels.is_floating_point():
            return None, []
        if (missing := labels < 0).any():  # not known
            if not missing.all():
                parallel.say(f"{self._name}: no labels, because {int(missing.sum())} of {len(labels)} targets are "
                             f"negative (the first: image {int(missing.int().argmax())}, counted from 0); for labels "
                             "choose a labelled part")
            return None, []
        return with_names(labels, getattr(self.dataset, "classes", None))

    @property
    def labels(self) -> Tensor | None:
        return self.labels_and_classes[0]

    @property
    def classes(self) -> list[str]:
        return self.labels_and_classes[1]


def with_names(labels: Tensor, names: Iterable | None) -> tuple[Tensor, list[str]]:
    """Labels and the names of their classes; without names, the classes are the distinct labels, in numeric order."""
    if names:
        return labels.long(), list(map(str, names))
    numbers, labels = labels.unique(return_inverse=True)
    return labels, list(map(str, numbers.tolist()))


def image_files(dataset: Any) -> list[str | os.PathLike]:
    """The files of a torchvision data set's images, if it lists them in an attribute; else []."""
    for attribute in FILE_LISTS:
        items = getattr(dataset, attribute, None)
        if isinstance(items, list) and items:
            paths = [item[0] if isinstance(item, tuple) else item for item in items]
            if all(isinstance(path, str | os.PathLike) and os.path.isfile(path) for path in paths):
                return paths
    return []


def files_below(folder: str | None) -> list[str]:
    """All files of a folder, at any depth, in the order of their paths; hidden ones are left out."""
    walk = os.walk(folder, followlinks=True) if folder else ()
    return sorted(os.path.join(top, name) for top, _, names in walk for name in names if not name.startswith("."))


def open_torchvision(where: str, value: str | None, split: str | None, reading: Reading) -> Torchvision:
    from torchvision import datasets

    name, _, root = (value or "").partition(":")
    known = {n: d for n, d in vars(datasets).items() if isinstance(d, type) and issubclass(d, Dataset)}
    if name not in known:
        lower = {n.lower(): n for n in known}
        near = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, 5, 0.5)] or ["CIFAR10", "Flowers102"]
        raise Refused(f"{where}: torchvision has no such data set; similar names: {', '.join(near)}")
    takes = inspect.signature(known[name]).parameters
    folder = {"root": os.path.expanduser(root or "data")} if "root" in takes else {}
    for choice in split_choices(where, takes, split):
        try:
            dataset = construct(partial(known[name], **folder, **choice), folder.get("root"), "download" in takes)
            if not isinstance(dataset[0][0], Image.Image):
                raise TypeError("its items aren't (image, target)")
            return Torchvision(f"torchvision:{name}", dataset, reading, folder | choice)
        except Exception as error:  # files or packages are missing, no network, no such split, more arguments needed
            last = error
            if not isinstance(error, ValueError):  # torchvision raises ValueError for a split that it does not have
                break
    reason = (str(last) or type(last).__name__).splitlines()[0]
    raise Refused(f"{where}: {reason}; give the folder that holds it as torchvision:{name}:FOLDER") from last


def split_choices(where: str, takes: Iterable[str], split: str | None) -> list[dict[str, Any]]:
    """Arguments that may select the split in a torchvision class, to be tried in this order."""
    if "train" in takes:
        return [{"train": split != "val"}]
    if split is None:
        return [{}]
    if "split" not in takes:
        raise Refused(f"{where}: it has no splits, so no {split!r}; give another data set")
    names = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "test")}[split]
    return [{"split": name} for name in names]


def construct(make: partial, root: str | None, downloadable: bool) -> Any:
    """`make()`; if files are missing, `make(download=True)` in one process of this host after the other."""
    try:
        return make()
    except (RuntimeError, OSError):
        if not downloadable or root is None:
            raise
    os.makedirs(root, exist_ok=True)
    with FileLock(os.path.join(root, ".download.lock")):
        return make(download=True)


# ---- Hugging Face ----

SPLITS = {None: ("train",), "train": ("train",), "val": ("validation", "val", "valid", "test")}


class HuggingFace:
    """A data set with a column of images, which are decoded like files."""

    def __init__(self, where: str, folder: str, dataset: Any, column: str, reading: Reading) -> None:
        from datasets import Image as ImageFeature

        self.rows = dataset.select_columns([column]).cast_column(column, ImageFeature(decode=False))
        self.folder, self.column, self.reading = folder, column, reading
        self.labels, self.classes = labels_of(where, dataset)
        self.fingerprint = dataset._fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return f"hf:{self.folder}[{i}]"

    def content(self, i: int) -> str | bytes:
        """The file, as `decode` takes it."""
        cell = self.rows[i][self.column] or {"bytes": None, "path": None}
        source = cell["path"] if cell["bytes"] is None else cell["bytes"]
        if source is None:
            raise Undecodable(f"{self.name(i)}: the cell is empty")
        return source

    def load(self, i: int, reduction: Reduction | None = None) -> Tensor:
        return decode(self.content(i), name=self.name(i), reduction=reduction, **self.reading.decoding())


def labels_of(where: str, dataset: Any) -> tuple[Tensor | None, list[str]]:
    """Labels and names of classes, of the `label_column`. Where only some rows have a label, there are none."""
    column = label_column(where, dataset.features)
    if column is None:
        return None, []
    if "string" in str(dataset.features[column].dtype):
        texts = [(text or "").strip() for text in dataset.select_columns([column])[:][column]]
        missing = np.array([not text for text in texts])
    else:
        values = dataset.with_format("numpy", columns=[column])[:][column]
        missing = np.isnan(values) | (values < 0)  # null or -1: not known
        if not missing.all() and (values[~missing] % 1).any():
            parallel.say(f"{where}: no labels, because the column {column!r} holds fractions")
            return None, []
    if missing.any():
        if not missing.all():
            parallel.say(f"{where}: no labels, because {missing.sum()} of {len(missing)} rows have none in the column "
                         f"{column!r} (the first: row {missing.argmax()}, counted from 0); for labels complete these "
                         "rows or leave them out")
        return None, []
    if "string" in str(dataset.features[column].dtype):
        numbers, classes = numbered(texts)
        return torch.tensor(numbers), classes
    return with_names(torch.as_tensor(values.astype(np.int64)), getattr(dataset.features[column], "names", None))


def label_column(where: str, features: Mapping) -> str | None:
    """The first column of numbers, text or ClassLabel that is named as in LABEL_COLUMNS, else the only ClassLabel."""
    from datasets import ClassLabel

    named = [name for known in LABEL_COLUMNS for name, kind in features.items()
             if name.lower() == known and re.fullmatch(r"u?int\d+|float\d+|(large_)?string", str(dtype(kind)))]
    coded = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    remedy = "rename a column to 'label' (rename_column of datasets)"
    if not named and len(coded) > 1:
        parallel.say(f"{where}: no labels, because each of the columns {', '.join(coded)} could hold them; for labels "
                     f"{remedy}")
        return None
    column, *others = dict.fromkeys(named + coded) or [None]
    if others:
        parallel.say(f"{where}: the labels are those of the column {column!r}, not of {', '.join(others)}; for others "
                     f"{remedy}")
    return column


def check_parts(where: str, dataset: Any, split: str | None) -> None:
    """Refuses an evaluation of rows of which a column says that they are training and test images."""
    for name in SPLIT_COLUMNS if split else ():
        if "string" in str(dtype(dataset.features.get(name))):
            parts = sorted(filter(None, dataset.unique(name)))
            if len(parts) > 1 and all(map(is_part, parts)):
                raise Refused(f"{where}: its column {name!r} holds several parts ({', '.join(parts)}), which would be "
                              "mixed; write each to a data set of its own, for --data_path and --val_data_path")


def dtype(kind: Any) -> Any:
    return getattr(kind, "dtype", "")


def open_parquet(where: str, files: list[str], split: str | None, reading: Reading) -> HuggingFace:
    """The rows of parquet files, which Hugging Face's datasets copies once to its cache."""
    datasets = import_optional("datasets", f"{where}: a parquet file", "datasets")
    if split == "val":
        raise Refused(f"{where}: parquet files have no validation part; give the validation images files of their own")
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise Refused(f"{where}: {missing[0]!r} isn't there ({len(missing)} of {len(files)} files are missing); "
                      "correct the name")
    try:
        dataset = datasets.Dataset.from_parquet(files)
    except Exception as error:  # of Arrow, of datasets itself, of the file system
        raise Refused(f"{where}: {str(error)[:200]}; give parquet files that can be read") from error
    check_parts(where, dataset, split)
    column = first_column(dataset, lambda kind: isinstance(kind, datasets.Image)) or first_column(dataset, holds_files)
    if column is None:
        raise Refused(f"{where}: no column of images among {', '.join(dataset.features)}; it has to hold the bytes of "
                      "image files, or {'bytes', 'path'}")
    images = HuggingFace(where, files[0], dataset, column, reading)
    images.fingerprint = files_hash(files)
    return images


def first_column(dataset: Any, fits: Callable[[Any], bool]) -> str | None:
    """The name of the first column whose type fits."""
    return next((name for name, kind in dataset.features.items() if fits(kind)), None)


def holds_files(kind: Any) -> bool:
    """Whether a column holds the bytes of files, or dicts of bytes and path."""
    return "binary" in str(dtype(kind)) or isinstance(kind, dict) and "bytes" in kind


def open_hugging_face(where: str, folder: str | None, split: str | None, reading: Reading) -> HuggingFace:
    datasets = import_optional("datasets", where, "datasets")
    folder = os.path.expanduser(folder or "")
    if not os.path.isdir(folder):
        raise Refused(f"{where}: no folder {folder!r}; give hf:FOLDER, a folder that save_to_disk wrote")
    try:
        dataset = datasets.load_from_disk(folder)
    except Exception as error:  # of Arrow, of JSON, of datasets itself
        raise Refused(f"{where}: {str(error)[:200]}; give hf:FOLDER, a folder that save_to_disk wrote") from error
    if isinstance(dataset, datasets.DatasetDict):
        name = next((name for name in SPLITS[split] if name in dataset), None)
        if name is None:
            raise Refused(f"{where}: it has none of the splits {', '.join(SPLITS[split])}, but {', '.join(dataset)}; "
                          f"give hf:{folder}/NAME")
        dataset = dataset[name]
    elif split == "val":
        raise Refused(f"{where}: it has no splits, so none for validation; give a DatasetDict")
    else:
        check_parts(where, dataset, split)
    column = first_column(dataset, lambda kind: isinstance(kind, datasets.Image))
    if column is None:
        raise Refused(f"{where}: no column of datasets.Image among {', '.join(dataset.features)}; cast one to it")
    return HuggingFace(where, folder, dataset, column, reading)
