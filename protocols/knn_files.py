"""Features in the published script's files: trainfeat.pth, trainlabels.pth, testfeat.pth, testlabels.pth.

As published, the features have an L2 norm of 1. Beside them, trainnorms.pth and testnorms.pth hold the norms as the
network computed them, without which a Euclidean metric and RankMe would differ, and features.json holds the names of
the classes, what a report says about the network, and hashes of the files of features that the norms belong to. A set
without labels has no file of labels, and there is no test set where training images are classified leave-one-out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import atomic
from parallel import Refused
from protocols.splits import Part, check_common_class, check_labels
from weights import checkpoints
from weights.layouts import BadFile
from weights.published import sha256

FILES = tuple(tuple(f"{part}{name}.pth" for name in ("feat", "labels", "norms")) for part in ("train", "test"))
ABOUT = "features.json"


def dump(folder: str | Path, parts: Sequence[Part], about: Mapping) -> None:
    """Write the normalized features, labels, norms, and features.json; remove files that don't apply.

    Args:
        parts: the training set, and the test set if there is one.
        about: the network's, plain values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, names in enumerate(FILES):
        values = (None, None, None)
        if i < len(parts):
            features, labels, _ = parts[i]
            values = F.normalize(features, dim=1), labels, features.norm(dim=1)
        for value, name in zip(values, names, strict=True):
            if value is None:
                (folder / name).unlink(missing_ok=True)
            else:
                checkpoints.save(value, folder / name)
    atomic.write_text(folder / ABOUT, json.dumps(
        {"classes": parts[0].classes, "normalized": True, "about": dict(about),
         "sha256": {names[0]: sha256(folder / names[0]) for names in FILES[: len(parts)]}}, indent=2))


def load(folder: str | Path) -> tuple[list[Part], dict]:
    """The parts and `about` that `dump` wrote, or the parts that the published script wrote.

    Features without a file of norms are returned as they are, normalized or not.

    Raises:
        Refused: the files are missing or damaged, or contradict each other.
    """
    where, folder = f"--load_features {folder}", Path(folder)
    if not (folder / "trainfeat.pth").is_file():
        raise Refused(f"{where}: no trainfeat.pth in it; write one with --dump_features")
    classes, about, hashes = read_about(folder / ABOUT, where)
    parts = []
    for names in FILES:
        features, labels, norms = (read_tensor(folder / name, where) for name in names)
        if features is None:
            continue
        check_loaded(where, features, labels)
        if norms is not None:
            if not isinstance(norms, Tensor) or norms.shape != features.shape[:1]:
                raise Refused(f"{where}: {names[2]} does not hold a norm per image; remove it, or write all files with "
                              "--dump_features")
            check_belongs(folder, names, hashes, where)
            features = features * norms[:, None]
        parts.append(Part(features, None if labels is None else labels.long(), classes))
    if len({part.features.shape[1] for part in parts}) > 1:
        raise Refused(f"{where}: training features have width {parts[0].features.shape[1]}, test features "
                      f"{parts[1].features.shape[1]}; write both with one network")
    check_labels(where, [part.labels for part in parts])
    parts = number_classes(parts, classes)
    if len(parts) == 2 and parts[0].labels is not None:
        check_common_class(*parts, where)
    return parts, about


def number_classes(parts: Sequence[Part], classes: list[str]) -> list[Part]:
    """The parts with labels that number one list of classes: `classes`, then the distinct labels beyond that list."""
    if parts[0].labels is None:
        return [part._replace(classes=classes) for part in parts]
    labels = torch.cat([torch.arange(len(classes)), *(part.labels for part in parts)]).unique()
    names = classes + list(map(str, labels[len(classes) :].tolist()))
    return [part._replace(labels=torch.searchsorted(labels, part.labels), classes=names) for part in parts]


def read_tensor(path: Path, where: str) -> object:
    """What the file holds; None where there is none."""
    if not path.is_file():
        return None
    try:
        return checkpoints.read(path, object)
    except (BadFile, OSError) as error:
        raise Refused(f"{where}: {error}; write it again with --dump_features") from error


def check_belongs(folder: Path, names: Sequence[str], hashes: Mapping, where: str) -> None:
    """Refuses norms of other features, which another program has overwritten since.

    An older version wrote no hashes: it wrote the norms after the features.
    """
    file, norms = folder / names[0], folder / names[2]
    belongs = (hashes[names[0]] == sha256(file) if names[0] in hashes
               else norms.stat().st_mtime_ns >= file.stat().st_mtime_ns)
    if not belongs:
        raise Refused(f"{where}: {names[2]} and {ABOUT} belong to other features than {names[0]}; remove the norms and "
                      f"{ABOUT} to use the features as they are, or write all files with --dump_features")


def read_about(path: Path, where: str) -> tuple[list[str], dict, dict]:
    """Classes, `about` and hashes in features.json; empty without the file, which the published script does not write.
    """
    if not path.is_file():
        return [], {}, {}
    try:
        content = json.loads(path.read_text())
        return list(content["classes"]), dict(content["about"]), dict(content.get("sha256", {}))
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
