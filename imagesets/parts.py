"""How folders, archives and tables name the parts of a set (training and test) and its labels.

Shapes: N images in all.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

import parallel
from imagesets.decode import printable
from parallel import Refused

PARTS = {"train": ("train", "training"), "val": ("val", "test", "valid", "validation", "testing")}  # preferred first
PUBLISHED = {"train", "val", "test"}  # names that are parts whatever lies beside them

LABEL_COLUMNS = ("label", "labels", "class", "target", "category")  # columns of tables with these names are labels
SPLIT_COLUMNS = ("split", "subset", "partition", "set")  # and with these, the part of each row


def is_part(name: str) -> bool:
    return any(name.lower() in names for names in PARTS.values())


def part_named(where: str, names: Iterable[str], split: str | None) -> str | None:
    """Which of the names stands for a split ('train' or 'val'); None if none does, or `split` is None.

    Other names than the published ones, such as Train and validation, may be classes. They are parts where names of
    both parts are there.

    Raises:
        Refused: two names differ in case only, or there is a test part and no training part.
    """
    if split is None:
        return None
    names = set(names)
    for name in PARTS[split]:
        if name in names & PUBLISHED:
            return name
    lower = {name.lower() for name in names}
    if not all(lower.intersection(part) for part in PARTS.values()):
        if split == "train" and (tests := sorted(names & PUBLISHED)):
            raise Refused(f"{where}: it has the part {tests[0]!r} for testing and no 'train', so test images would be "
                          "trained on; move the others to train, or rename the part if it is a class")
        return None
    name = next(name for name in PARTS[split] if name in lower)
    alike = sorted(other for other in names if other.lower() == name)
    if len(alike) > 1:
        raise Refused(f"{where}: {' and '.join(alike)} may both be the part {name!r}; rename one")
    return alike[0]


def class_folders(
    where: str, paths: Sequence[bytes], labels: np.ndarray, classes: list[str], then: str = "",
) -> tuple[np.ndarray | None, list[str]]:
    """Labels and classes of images whose first-level folders are numbered by `labels`; (None, []) if these folders are
    no classes. Where they could be taken for classes, the reason is printed.

    Args:
        labels: (N,), -1 for images outside of the folders.
        classes: names of the folders.
        then: what else is to do after images were moved.
    """
    strays, numbers = np.flatnonzero(labels < 0), np.unique(labels[labels >= 0])
    reason, used = "", [classes[number] for number in numbers]
    if all(map(is_part, used)):
        reason = (f"its folders ({', '.join(used)}) are named like parts of a data set; give one of them, or rename "
                  "them if they are classes")
    elif len(strays):
        reason = (f"{len(strays)} of {len(labels)} images lie beside the class folders (the first: "
                  f"{printable(paths[strays[0]])!r}); for labels move them into these{then}")
    elif alike := same_names(classes):
        reason = f"the folders {' and '.join(map(ascii, alike))} have the same name in two Unicode forms; join them"
    if len(numbers) > 1 and reason:
        parallel.say(f"{where}: no labels, because {reason}")
    return (None, []) if len(numbers) < 2 or reason else (labels, classes)


def same_names(names: Sequence[str]) -> list[str]:
    """The first two of the names that are one text in different Unicode forms, as macOS and Linux write é; else []."""
    before: dict[str, str] = {}
    for name in names:
        if (other := before.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            return [other, name]
    return []
