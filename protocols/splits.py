"""The labelled parts of an evaluation: training and test images, their classes matched by name.

Shapes: N images, D width.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import parallel
from imagesets.sources import Images, open_images


def has_test_part(data_path: str) -> bool:
    if re.fullmatch(r"(shapes|torchvision)(:.*)?", data_path):
        return True
    names = ("validation", "val", "test") if data_path.startswith("hf:") else ("val", "test")
    folder = os.path.expanduser(data_path.removeprefix("hf:"))
    return any(os.path.isdir(os.path.join(folder, name)) for name in names)


def open_parts(data_path: str, val_data_path: str = "", in_chans: int = 3) -> list[Images]:
    """The training images, and the test images where there are some."""
    if val_data_path:
        test = open_images(val_data_path, None, in_chans, flag="--val_data_path")
        return [open_images(data_path, None, in_chans), test]
    names = ("train", "val") if has_test_part(data_path) else ("train",)
    return [open_images(data_path, name, in_chans) for name in names]


def check_labels(where: str, labels: Sequence[Tensor | None]) -> None:
    if len({part is None for part in labels}) > 1:
        raise ValueError(f"{where}: one of its parts has labels and the other has none; give both labels, or neither")


class Subset:
    """The images whose rows are in `index`, as a set of images."""

    def __init__(self, images: Images, index: Tensor) -> None:
        self.images, self.index, self.classes = images, index, images.classes
        self.labels = None if images.labels is None else images.labels[index]

    def __len__(self) -> int:
        return len(self.index)

    def load(self, i: int) -> Tensor:
        return self.images.load(int(self.index[i]))

    def name(self, i: int) -> str:
        return self.images.name(int(self.index[i]))


class Part(NamedTuple):
    """Training or test images: (N, D) features, (N,) labels or None, and the names of the classes."""

    features: Tensor
    labels: Tensor | None
    classes: list[str]


def match_classes(train: Part, test: Part) -> list[Part]:
    """Both parts' labels as numbers of one list of classes, matched by name: the training set's, then the others.

    Raises:
        ValueError: the lists differ and a name stands twice in one of them.
    """
    if train.classes == test.classes:
        return [train, test]
    for part in (train, test):
        if len(set(part.classes)) < len(part.classes):
            raise ValueError("the classes of the two parts differ, and a name stands for two of them; rename one")
    classes = train.classes + [name for name in test.classes if name not in set(train.classes)]
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[name] for name in test.classes])[test.labels]
    return [train._replace(classes=classes), test._replace(labels=labels, classes=classes)]


def notes_on_classes(train: Part, test: Part) -> list[str]:
    """What a reader of the accuracies must know of the classes."""

    def named(classes: list[int]) -> str:
        return ", ".join(train.classes[c] for c in classes[:5]) + (", ..." if len(classes) > 5 else "")

    of_train, of_test = set(train.labels.tolist()), set(test.labels.tolist())
    notes = []
    if unknown := sorted(of_test - of_train):
        count = int(torch.isin(test.labels, torch.tensor(unknown)).sum())
        notes.append(f"{len(unknown)} class(es) have no training images ({named(unknown)}): their {count} test images "
                     "count as errors")
    if untested := sorted(of_train - of_test):
        notes.append(f"{len(untested)} class(es) have no test images ({named(untested)}): they can be voted for only")
    if len(train.classes) <= 5:
        notes.append(f"top-5 of {len(train.classes)} class(es) says nothing and is left out")
    return notes


def draw_support(labels: Tensor, n: int, seed: int) -> Tensor:
    """Rows of n images of each class, or all it has, drawn without replacement; ascending."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    drawn = [order[labels[order] == c][:n] for c in labels.unique()]
    return torch.cat(drawn).sort()[0]


def draw_share(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (drawn, left), ascending: `share` of each class's images, rounded, never its last."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        rows = order[labels[order] == c]
        drawn[rows[: min(round(share * len(rows)), len(rows) - 1)]] = True
    return drawn.nonzero().squeeze(1), (~drawn).nonzero().squeeze(1)


# ---- What a classifier is trained, chosen and tested on ----


class Labelled(NamedTuple):
    """Images and their (N,) labels, numbers of the task's classes."""

    images: Subset
    labels: Tensor


class Task(NamedTuple):
    train: Labelled
    held: Labelled | None  # a part of the training set, to choose by
    test: Labelled
    classes: list[str]
    notes: list[str]


def open_task(args: argparse.Namespace, in_chans: int, hold_out: bool) -> Task:
    """The task of --data_path and --val_data_path; --low_shot, --val_share and --seed say how it is divided.

    One folder without a test part gives a fifth of each class for testing.

    Raises:
        ValueError, OSError: no such data, no labels, nothing to hold out; in one line.
    """
    images = open_parts(args.data_path, args.val_data_path, in_chans)
    check_labels(f"--data_path {args.data_path}", [i.labels for i in images])
    if images[0].labels is None:
        raise ValueError(f"--data_path {args.data_path}: no labels; give train/ and val/ with a folder for each class")
    notes = []
    if len(images) == 1:
        tested, trained = draw_share(images[0].labels, 0.2, args.seed)
        notes.append(f"one set of images: {len(tested)} of them, a fifth of each class, are kept for testing")
        parts = [Subset(images[0], trained), Subset(images[0], tested)]
        if not len(tested):
            raise ValueError(f"--data_path {args.data_path}: too few images to keep some for testing; give a val/ part")
    else:
        parts = [Subset(i, torch.arange(len(i))) for i in images]
    train, test = match_classes(*(Part(torch.empty(len(p), 0), p.labels, p.classes) for p in parts))
    rows = torch.arange(len(train.labels))
    if args.low_shot:
        rows = draw_share(train.labels, 1 - args.low_shot, args.seed)[1]  # what is left: at least one of each class
        notes.append(f"--low_shot {args.low_shot:g}: {len(rows)} of {len(train.labels)} training images")
    held = None
    if hold_out:
        drawn, left = draw_share(train.labels[rows], args.val_share, args.seed + 1)
        if not len(drawn):
            raise ValueError(f"--val_share {args.val_share:g}: leaves no image to choose by; raise it, or give one "
                             "setting to train")
        notes.append(f"{len(drawn)} of {len(rows)} training images are held out to choose by")
        held, rows = labelled(parts[0], train.labels, rows[drawn]), rows[left]
    notes += notes_on_classes(train._replace(labels=train.labels[rows]), test)
    whole = torch.arange(len(test.labels))
    trained, tested = labelled(parts[0], train.labels, rows), labelled(parts[1], test.labels, whole)
    return Task(trained, held, tested, train.classes, notes)


def run_of(args: argparse.Namespace, network, task: Task) -> dict:
    """What a stopped run has to share with one that goes on with it, whatever it trains; plain values."""
    seen = {k: network.about.get(k) for k in ("weights_sha256", "resize_size", "crop_size", "precision")}
    return seen | {"epochs": args.epochs, "seed": args.seed, "images": len(task.train.labels),
                   "classes": list(task.classes), "batch": args.batch_size_per_gpu * parallel.world_size()}


def labelled(images: Subset, labels: Tensor, rows: Tensor) -> Labelled:
    return Labelled(Subset(images, rows), labels[rows])
