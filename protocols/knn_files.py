"""Features in the published script's files: trainfeat.pth, trainlabels.pth, testfeat.pth, testlabels.pth.

Beside them, features.json holds the names of the classes and what a report says about the network. A set without
labels has no file of labels, and there is no test set where training images are classified leave-one-out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

import atomic
from parallel import Refused
from protocols.splits import Part, check_labels
from weights import checkpoints
from weights.layouts import BadFile

FILES = (("trainfeat.pth", "trainlabels.pth"), ("testfeat.pth", "testlabels.pth"))
ABOUT = "features.json"


def dump(folder: str | Path, parts: Sequence[Part], about: Mapping) -> None:
    """Write the features as the network computed them, the labels, and features.json; remove files that don't apply.

    Args:
        parts: the training set, and the test set if there is one.
        about: the network's, plain values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, names in enumerate(FILES):
        for value, name in zip(parts[i][:2] if i < len(parts) else (None, None), names, strict=True):
            if value is None:
                (folder / name).unlink(missing_ok=True)
            else:
                checkpoints.save(value, folder / name)
    atomic.write_text(folder / ABOUT, json.dumps({"classes": parts[0].classes, "about": dict(about)}, indent=2))


def load(folder: str | Path) -> tuple[list[Part], dict]:
    """The parts and `about` that `dump` wrote, or the parts that the published script wrote.

    Raises:
        Refused: the files are missing or damaged, or contradict each other.
    """
    where, folder = f"--load_features {folder}", Path(folder)
    if not (folder / "trainfeat.pth").is_file():
        raise Refused(f"{where}: no trainfeat.pth in it; write one with --dump_features")
    classes, about = read_about(folder / ABOUT, where)
    parts = []
    for names in FILES:
        features, labels = (read_tensor(folder / name, where) for name in names)
        if features is None:
            continue
        check_loaded(where, features, labels)
        parts.append(Part(features, None if labels is None else labels.long(), classes))
    if len({part.features.shape[1] for part in parts}) > 1:
        raise Refused(f"{where}: training features have width {parts[0].features.shape[1]}, test features "
                      f"{parts[1].features.shape[1]}; write both with one network")
    count = max([int(p.labels.max()) + 1 for p in parts if p.labels is not None], default=0)
    classes = classes + [str(c) for c in range(len(classes), count)]
    check_labels(where, [part.labels for part in parts])
    return [part._replace(classes=classes) for part in parts], about


def read_tensor(path: Path, where: str) -> object:
    """What the file holds; None where there is none."""
    if not path.is_file():
        return None
    try:
        return checkpoints.read(path, object)
    except (BadFile, OSError) as error:
        raise Refused(f"{where}: {error}; write it again with --dump_features") from error


def read_about(path: Path, where: str) -> tuple[list[str], dict]:
    """Classes and `about` in features.json; empty without the file, which the published script does not write."""
    if not path.is_file():
        return [], {}
    try:
        content = json.loads(path.read_text())
        return list(content["classes"]), dict(content["about"])
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{where}: {path.name} is damaged; remove it to do without names of classes") from error


def check_loaded(where: str, features: object, labels: object) -> None:
    if not isinstance(features, Tensor) or features.ndim != 2 or not len(features) or not features.is_floating_point():
        raise Refused(f"{where}: features are not an (images, width) tensor; write them with --dump_features")
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.shape != features.shape[:1]:
        raise Refused(f"{where}: {len(features)} features with labels for another number of images; write both with "
                      "--dump_features")
    if labels.is_floating_point() or labels.min() < 0:
        raise Refused(f"{where}: labels are not whole numbers from 0; write them with --dump_features")
