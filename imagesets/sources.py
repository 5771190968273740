"""Sources: what can be opened as a set of images.

A set of images is any object with

    len(images), images.load(i, reduction) -> uint8 (C, H, W), images.name(i) -> str,
    images.labels -> int64 (N,) or None, images.classes -> list of names ([] without labels)

where `reduction` is that of decode.decode. Where names and file times don't show that images have changed, also

    images.fingerprint -> str, which does: caches of features depend on it

Shapes: N images in all, C channels.
"""

import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import parallel
from imagesets import scenes, shapes
from imagesets.decode import MAX_PIXELS, MODES, Reading, Reduction, decode, from_pil, printable, suffixes
from imagesets.deep import Range
from imagesets.listing import (
    PASSED_FOLDERS,
    Table,
    Texts,
    files_hash,
    images_below,
    listed,
    numbered,
    own_outputs,
    pack,
    passed_over,
)
from imagesets.lists import parts_in, read_rows
from imagesets.packages import SPLITS, open_hugging_face, open_parquet, open_torchvision
from imagesets.parts import class_folders, part_named
from imagesets.shards import expand, named_by, open_folder_of_shards, open_shards
from imagesets.zipped import open_zip, zip_folders
from parallel import Refused


class Images(Protocol):
    labels: Tensor | None
    classes: list[str]

    def __len__(self) -> int: ...
    def load(self, i: int, reduction: Reduction | None = None) -> Tensor: ...
    def name(self, i: int) -> str: ...


# ---- Sets of images ----


def open_images(
    data_path: str | os.PathLike,
    split: str | None = None,
    in_chans: int = 3,
    max_pixels: int = MAX_PIXELS,
    flag: str = "--data_path",
    value_range: Range | None = None,
) -> Images:
    """Open the images that `data_path` names.

    folder              every image in it, at any depth, sorted by name; symbolic links are followed, hidden files and
                        folders are not. If all images lie in two or more first-level folders, these are the classes,
                        numbered in the order of their names (empty ones too, so that the numbers of train and val
                        agree); otherwise there are no labels.
    file.txt            one path per line, relative to the file's folder, or in all lines "path<TAB>label" or "path
                        label". The labels are numbered in the order of their names, integers in numeric order.
    file.csv            the same in columns that a header names: path, and label if there are labels.
    file.zip            as a folder, of the archive's members.
    name.parquet        a column of images, and label if there are labels; name-{00..09}.parquet for several files.
    torchvision:NAME    the class of torchvision.datasets, in ./data or in the folder of `torchvision:NAME:FOLDER`;
                        downloaded if it isn't there.
    name-{000..099}.tar tar files by WebDataset's convention, whose samples are key.jpg and the like, with key.cls or
                        key.json for a label; a folder of such files and no images; `pipe:command` and URLs of such
                        files, which are copied once (shards.py).
    hf:FOLDER           a data set written by Hugging Face's `save_to_disk`.
    shapes              drawn images: `shapes`, `shapes:COUNT` or `shapes:COUNTxPIXELS`, by default 10000x96. A folder
                        of that name is `./shapes`. `scenes`: the same with several objects per image and no labels.

    Args:
        split: None takes the path as it is. 'train' takes the folder's train/ if it has one. 'val' takes its val/ or
            test/, one of which must exist: k-NN accuracy of a set on itself would mean nothing. For torchvision, the
            split of that name or the closest to it; for shapes, 'val' is COUNT / 4 images that no training set
            contains.
        in_chans: C; values other than 1, 3 or 4 only for folders and lists of .npy arrays.
        max_pixels: larger images can't be decoded (a guard against decompression bombs).
        flag: the flag to name in errors.
        value_range: values of black and of white, for images of more than 8 bits; None: as the files declare.

    Raises:
        Refused: nothing is there, or it can't be read or used.
    """
    data_path = os.fspath(data_path)
    reading = Reading(in_chans, max_pixels, tuple(value_range) if value_range else None)
    where = f"{flag} {data_path!r}"
    if split not in (None, "train", "val"):
        raise ValueError(f"split is {split!r}: give None, 'train' or 'val'")
    kind = re.fullmatch(r"(shapes|scenes|torchvision|hf)(?::(.*))?", data_path)
    if kind and in_chans not in MODES:
        raise Refused(f"--in_chans {in_chans} with {where}: its images have 1, 3 or 4 channels")
    if kind and kind[1] in DRAWN:
        return open_drawn(where, DRAWN[kind[1]], kind[2], split, reading)
    if kind:
        openers = {"torchvision": open_torchvision, "hf": open_hugging_face}
        return openers[kind[1]](where, kind[2], split, reading)
    path = os.path.expanduser(data_path)
    try:
        if os.path.isdir(path):
            return open_folder(where, path, split, reading)
        if os.path.isfile(path) and path.lower().endswith((".txt", ".csv")):
            return open_list(where, path, split, reading)
        if os.path.isfile(path) and path.lower().endswith(".zip"):
            return open_zip(where, path, split, reading)
        if data_path.lower().endswith(".parquet"):
            return open_parquet(where, expand(path), split, reading)
        if named_by(data_path):
            return open_shards(where, data_path, split, reading)
    except OSError as error:
        name = printable(os.fsencode(error.filename or path))
        raise Refused(f"{where}: {name!r}: {error.strerror or error}; make it readable or remove it") from error
    raise Refused(f"{where}: {what_is_there(path)}; give a folder or .txt list, a .csv or .zip, .tar shards, .parquet "
                  "files, torchvision:NAME, hf:FOLDER, or shapes or scenes[:COUNT[xPIXELS]]")


def what_is_there(path: str) -> str:
    """Where a path is no source of images, what it is instead."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode) and not os.path.exists(path):
            return f"it is a link to {os.readlink(path)!r}, which isn't there"
        mode = os.stat(path).st_mode
    except OSError:
        return "no folder or .txt list has this name"
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return f"it is {kinds.get(stat.S_IFMT(mode), 'a file of another kind')}, not a folder or .txt list"


class Files:
    """Image files, their paths relative to a folder."""

    def __init__(
        self, folder: str, paths: Texts, labels: Sequence[int] | None, classes: list[str], reading: Reading,
    ) -> None:
        self.folder, self.paths, self.reading = os.fsencode(folder), paths, reading
        self.labels = None if labels is None else torch.from_numpy(np.array(labels, np.int64))
        self.classes = classes

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> bytes:
        return os.path.join(self.folder, self.paths[i])

    def name(self, i: int) -> str:
        return printable(self.path(i))

    @property
    def fingerprint(self) -> str:
        """Where a path is not valid UTF-8, so that `name` only describes it, a hash of the files; else ""."""
        try:
            (self.folder + self.paths.text.numpy().tobytes()).decode()
            return ""
        except UnicodeDecodeError:
            return files_hash(map(self.path, range(len(self))))

    def content(self, i: int) -> str:
        """The file, as `decode` takes it."""
        return os.fsdecode(self.path(i))

    def load(self, i: int, reduction: Reduction | None = None) -> Tensor:
        return decode(self.content(i), reduction=reduction, **self.reading.decoding())


def open_files(folder: str | os.PathLike, names: Iterable[str], reading: Reading) -> Files:
    """Files without labels, whose names are relative to `folder`."""
    return Files(os.fspath(folder), Texts(pack(map(os.fsencode, names))), None, [], reading)


def open_folder(where: str, folder: str, split: str | None, reading: Reading) -> Images:
    folder = split_folder(where, folder, split)
    known = frozenset(map(os.fsencode, suffixes(reading.in_chans)))
    real = os.path.realpath(folder)
    table = listed(real, known, lambda stamps: folder_table(os.fsencode(real), known, stamps))
    paths, labels = Texts(table["paths"]), table["labels"]
    note = printable(table.get("note", np.empty(0, np.uint8)).tobytes())  # absent in an index of an older version
    if not len(paths):
        if shards := open_folder_of_shards(where, folder, reading):
            return shards
        chans = reading.in_chans
        kinds = "formats that Pillow reads, .npy, .tar" if chans in MODES else f".npy, as --in_chans is {chans}"
        raise Refused(f"{where}: no images in {folder!r}; give a folder that holds some ({kinds})"
                      + (f". {note}" if note else ""))
    if note:
        parallel.say(f"{where}: {note}")
    labels, classes = class_folders(where, paths, labels, [printable(name) for name in Texts(table["classes"])])
    return Files(folder, paths, labels, classes, reading)


def folder_table(folder: bytes, known: frozenset[bytes], stamps: list[tuple]) -> Table:
    """Columns: paths; labels, the number of the first-level folder, or -1 outside of them; classes, their names; note,
    which other files there are. A folder that holds outputs of the project and no images is not a class."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries
                       if e.is_dir() and not e.name.startswith(b".") and e.name not in PASSED_FOLDERS)
    numbers = {name: number for number, name in enumerate(names)}
    labels, others, own = array("q"), Counter(), []

    def paths() -> Iterator[bytes]:
        for path in images_below(folder, b"", known, stamps, others, own):
            first, slash, _ = path.partition(b"/")
            labels.append(numbers[first] if slash else -1)
            yield path

    table = {"paths": pack(paths())}
    written_to = {os.path.relpath(path, folder).partition(b"/")[0] for path in own}
    kept = np.array([name not in written_to or numbers[name] in labels for name in names], bool)
    order = np.append(np.cumsum(kept) - 1, -1)  # new number of each folder; the last stays -1
    table |= {"labels": order[np.array(labels, np.int64)], "classes": pack(np.array(names, object)[kept])}
    notes = [passed_over(others, "files of other suffixes"), own_outputs(own)]
    return table | {"note": np.frombuffer(os.fsencode("; ".join(filter(None, notes))), np.uint8)}


def split_folder(where: str, folder: str, split: str | None) -> str:
    part = part_named(where, folders_in(folder) if split else (), split)
    if split == "val" and part is None:
        raise Refused(f"{where}: no folder val or test in it; give a folder that has one")
    return folder if part is None else os.path.join(folder, part)


def folders_in(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def has_test_part(data_path: str) -> bool:
    """Whether `open_images` finds a validation part in it."""
    if re.fullmatch(r"(shapes|scenes|torchvision)(:.*)?", data_path):
        return True
    where, path = f"--data_path {data_path!r}", os.path.expanduser(data_path.removeprefix("hf:"))
    if data_path.startswith("hf:"):
        return any(os.path.isdir(os.path.join(path, name)) for name in SPLITS["val"])
    with parallel.refusing(where, "make it readable"):
        if os.path.isdir(path):
            names = folders_in(path)
        elif os.path.isfile(path) and path.lower().endswith(".zip"):
            names = zip_folders(where, path)
        elif os.path.isfile(path) and path.lower().endswith((".txt", ".csv")):
            names = parts_in(where, path)
        else:
            names = ()
    return part_named(where, names, "val") is not None


def open_list(where: str, path: str, split: str | None, reading: Reading) -> Files:
    folder = os.path.dirname(path)
    rows = read_rows(where, path, split)
    labels, classes = numbered([printable(row[1]) for row in rows]) if len(rows[0]) == 2 else (None, [])
    files = Files(folder, Texts(pack(row[0] for row in rows)), labels, classes, reading)
    if not os.path.isfile(files.path(0)):  # catches the usual mistake; checking all would take long
        raise Refused(f"{where}: {files.name(0)!r} isn't there; paths are relative to the list's folder")
    return files


class Shapes:
    """Images start, start + 1, ... of `shapes.draw`."""

    kind, smallest = "shapes", 8  # pixels per side

    def __init__(self, start: int, count: int, size: int, in_chans: int) -> None:
        self.start, self.count, self.size, self.in_chans = start, count, size, in_chans
        self.classes = list(shapes.KINDS)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def labels(self) -> Tensor | None:
        return torch.arange(self.start, self.start + self.count) % len(self.classes)  # see `draw`

    def name(self, i: int) -> str:
        return f"{self.kind}[{self.start + i}]"

    def pixels(self, i: int) -> np.ndarray:
        return shapes.draw(self.start + i, self.size)[0]

    def load(self, i: int, reduction: Reduction | None = None) -> Tensor:
        return from_pil(Image.fromarray(self.pixels(i)), self.in_chans)


class Scenes(Shapes):
    """Images start, start + 1, ... of `scenes.draw`. With several objects, an image has no label."""

    kind, smallest = "scenes", 16

    def __init__(self, start: int, count: int, size: int, in_chans: int) -> None:
        super().__init__(start, count, size, in_chans)
        self.classes = []

    @property
    def labels(self) -> None:
        return None

    def pixels(self, i: int) -> np.ndarray:
        return scenes.draw(self.start + i, self.size).image


DRAWN = {"shapes": Shapes, "scenes": Scenes}
VAL_START = 1_000_000_000  # images from here on are for validation


def open_drawn(where: str, images: type[Shapes], size: str | None, split: str | None, reading: Reading) -> Shapes:
    match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", "10000x96" if size is None else size)
    count, pixels = (int(match[1]), int(match[2] or 96)) if match else (0, 0)
    if not 1 <= count <= VAL_START or not images.smallest <= pixels <= 8192:
        name = images.kind
        raise Refused(f"{where}: give {name}:COUNT or {name}:COUNTxPIXELS, as in {name}:2000x96, of {images.smallest} "
                      "pixels or more")
    start, count = (VAL_START, max(1, count // 4)) if split == "val" else (0, count)
    return images(start, count, pixels, reading.in_chans)
