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

import data


def has_test_part(data_path: str) -> bool:
    if re.fullmatch(r"(shapes|torchvision)(:.*)?", data_path):
        return True
    names = ("validation", "val", "test") if data_path.startswith("hf:") else ("val", "test")
    folder = os.path.expanduser(data_path.removeprefix("hf:"))
    return any(os.path.isdir(os.path.join(folder, name)) for name in names)


def open_parts(args: argparse.Namespace, in_chans: int) -> list[data.Images]:
    """The training images, and the test images where there are some."""
    if args.val_data_path:
        test = data.open_images(args.val_data_path, None, in_chans, flag="--val_data_path")
        return [data.open_images(args.data_path, None, in_chans), test]
    names = ("train", "val") if has_test_part(args.data_path) else ("train",)
    return [data.open_images(args.data_path, name, in_chans) for name in names]


def check_labels(where: str, labels: Sequence[Tensor | None]) -> None:
    if len({part is None for part in labels}) > 1:
        raise ValueError(f"{where}: one of its parts has labels and the other has none; give both labels, or neither")


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
