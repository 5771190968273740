"""Training and test sets of an evaluation: their images, labels, and classes, which are matched by name.

Shapes: N images, D width.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from imagesets.checking import Chosen, open_checked
from imagesets.decode import PLAIN, Reading
from imagesets.sources import Images, has_test_part
from parallel import Refused


def open_parts(data_path: str, val_data_path: str = "", reading: Reading = PLAIN) -> list[Images]:
    """The training images and, if the data have any, the test images.

    Raises:
        Refused: no such data, or one of the two sets has labels and the other has none.
    """
    if val_data_path:
        images = [open_checked(data_path, None, reading), open_checked(val_data_path, None, reading, "--val_data_path")]
    else:
        names = ("train", "val") if has_test_part(data_path) else ("train",)
        images = [open_checked(data_path, name, reading) for name in names]
    check_labels(f"--data_path {data_path}", [part.labels for part in images])
    return images


def check_labels(where: str, labels: Sequence[Tensor | None]) -> None:
    if len({part is None for part in labels}) > 1:
        raise Refused(f"{where}: one of its parts has labels and the other has none; give labels for both, or neither")


class Part(NamedTuple):
    """Training or test images: (N, D) features, (N,) labels or None, and the names of the classes."""

    features: Tensor
    labels: Tensor | None
    classes: list[str]


def match_classes(train: Part, test: Part, flag: str = "--data_path") -> list[Part]:
    """Renumber the labels of both parts by one list of classes: the training set's, then those of the test set alone.

    Names are compared in Unicode's form NFC, as macOS writes accents in another form than Linux.

    Args:
        flag: the flag that names the data, for messages.

    Raises:
        Refused: the lists differ, and one of them has two classes of the same name; or no class occurs in both parts.
    """
    train, test = (part._replace(classes=[unicodedata.normalize("NFC", name) for name in part.classes])
                   for part in (train, test))
    if train.classes != test.classes:
        for part in (train, test):
            if len(set(part.classes)) < len(part.classes):
                name = next(name for name in part.classes if part.classes.count(name) > 1)
                raise Refused(f"{flag}: training and test set have different classes, and {name!r} stands for two of "
                              "them; rename one")
        classes = train.classes + [name for name in test.classes if name not in set(train.classes)]
        number = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number[name] for name in test.classes])[test.labels]
        train, test = train._replace(classes=classes), test._replace(labels=labels, classes=classes)
    check_common_class(train, test, flag)
    return [train, test]


def check_common_class(train: Part, test: Part, flag: str) -> None:
    """Refuses parts without a class that occurs in both; their `classes` are one list."""
    trained, tested = set(train.labels.tolist()), set(test.labels.tolist())
    if not trained & tested:
        raise Refused(f"{flag}: no class of the test set has training images (training: "
                      f"{class_names(train.classes, trained)}; test: {class_names(train.classes, tested)}), so every "
                      "answer would be wrong; give both sets the same names of classes")


def class_names(classes: Sequence[str], numbers: Iterable[int]) -> str:
    """The names of the first five of the classes."""
    numbers = sorted(numbers)
    return ", ".join(classes[c] for c in numbers[:5]) + (", ..." if len(numbers) > 5 else "")


def notes_on_classes(train: Part, test: Part) -> list[str]:
    """Remarks on classes that affect how the accuracies are to be read."""
    trained, tested = set(train.labels.tolist()), set(test.labels.tolist())
    notes = []
    if unknown := sorted(tested - trained):
        count = int(torch.isin(test.labels, torch.tensor(unknown)).sum())
        notes.append(f"{len(unknown)} class(es) have no training images ({class_names(train.classes, unknown)}): their "
                     f"{count} test images count as errors")
    if untested := sorted(trained - tested):
        notes.append(f"{len(untested)} class(es) have no test images ({class_names(train.classes, untested)}): they "
                     "only add wrong answers")
    if len(train.classes) <= 5:
        notes.append(f"top-5 of {len(train.classes)} class(es) is always right and is left out")
    return notes


def draw_support(labels: Tensor, n: int, seed: int) -> Tensor:
    """Indices of n images per class (all of a smaller class), drawn without replacement; ascending."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    drawn = [order[labels[order] == c][:n] for c in labels.unique()]
    return torch.cat(drawn).sort()[0]


def draw_share(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (drawn, rest), each ascending: `share` of each class's images, rounded, but never all of a class."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        rows = order[labels[order] == c]
        drawn[rows[: min(round(share * len(rows)), len(rows) - 1)]] = True
    return drawn.nonzero().squeeze(1), (~drawn).nonzero().squeeze(1)


# ---- Training, held-out and test set of a classifier ----


class Task(NamedTuple):
    train: Chosen
    held: Chosen | None  # part of the training set, to choose a setting by
    test: Chosen
    classes: list[str]  # which the labels of all three number
    notes: list[str]


def open_task(
    data_path: str, val_data_path: str = "", reading: Reading = PLAIN, low_shot: float = 0.0,
    val_share: float | None = None, seed: int = 0,
) -> Task:
    """Open labelled data and split them into training, held-out and test images.

    Without a test set, a fifth of each class becomes the test set.

    Args:
        low_shot: share of each class's training images to train on, at least one image per class; 0: all.
        val_share: share of those to hold out; None: hold out none.
        seed: of all three splits.

    Raises:
        Refused: no such data, no labels, or too few images to split.
    """
    images = open_parts(data_path, val_data_path, reading)
    if images[0].labels is None:
        raise Refused(f"--data_path {data_path}: no labels; give train/ and val/ with a folder for each class")
    notes = []
    if len(images) == 1:
        drawn, rest = draw_share(images[0].labels, 0.2, seed)
        notes.append(f"no test set: {len(drawn)} of the images, a fifth of each class, are used for testing")
        if not len(drawn):
            raise Refused(f"--data_path {data_path}: too few images to keep a fifth for testing; give a val/ part")
        images = [Chosen(images[0], rest), Chosen(images[0], drawn)]
    train, test = match_classes(*(Part(torch.empty(len(i), 0), i.labels, i.classes) for i in images))
    rows = torch.arange(len(train.labels))
    if low_shot:
        rows = draw_share(train.labels, 1 - low_shot, seed)[1]  # the rest: at least one image per class
        notes.append(f"--low_shot {low_shot:g}: {len(rows)} of {len(train.labels)} training images")
    held = None
    if val_share is not None:
        drawn, rest = draw_share(train.labels[rows], val_share, seed + 1)
        if not len(drawn):
            raise Refused(f"--val_share {val_share:g}: leaves no image to choose by; raise it, or give one setting to "
                          "train")
        notes.append(f"{len(drawn)} of {len(rows)} training images are held out to choose by")
        held, rows = Chosen(images[0], rows[drawn]), rows[rest]
    notes += notes_on_classes(train._replace(labels=train.labels[rows]), test)
    tested = Chosen(images[1], torch.arange(len(test.labels)), test.labels)
    return Task(Chosen(images[0], rows), held, tested, train.classes, notes)
