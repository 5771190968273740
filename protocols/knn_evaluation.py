"""The k-NN evaluation of a frozen network: accuracy for every k, temperature and number of images per class.

Data with a training and a test set: test images are classified by their nearest training images. One labelled set:
each image is classified by all others (leave-one-out). Without labels: RankMe, uniformity and alignment.

Shapes: N training images, M test images, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import flags
from protocols import scores
from protocols.features import Network, network_features
from protocols.knn import knn_predict
from protocols.splits import Part, draw_support, match_classes, notes_on_classes, open_parts

MOST_CLASSES_SHOWN = 20  # per-class accuracies on the console; the report holds all


class KnnSettings(NamedTuple):
    """The settings whose accuracies are reported: every n_per_class x temperature x k."""

    ks: Sequence[int] = (10, 20, 100, 200)
    temperatures: Sequence[float] = (0.07,)
    metric: str = "cosine"  # or "l2", see knn.nearest
    n_per_class: Sequence[int] = ()  # few-shot: images per class, drawn `draws` times; empty: all images
    draws: int = 10
    seed: int = 0  # of the draws


Views = tuple[Tensor, Tensor]  # (N, D) features each, of two random views of the training images


# ---- The evaluation ----


def compute_features(
    network: Network, data_path: str, val_data_path: str, output_dir: Path, label_free: bool = False,
    batch_size: int = 128, num_workers: int = 10,
) -> tuple[list[Part], Views | None]:
    """Features of the training and test images, and of two views where `label_free` or unlabelled data need them.

    All processes call this.

    Args:
        output_dir: its folder features/ caches them.
        batch_size, num_workers: per process.

    Returns:
        The training set and, if there is one, the test set, their classes matched; and the views.

    Raises:
        Refused: no such data, an image that can't be decoded, or an unusable output folder.
    """
    images = open_parts(data_path, val_data_path, network.reading)
    cache, labelled = output_dir / "features", images[0].labels is not None
    parts = [Part(torch.empty(0), i.labels, i.classes) for i in images]
    if len(parts) == 2 and labelled:
        parts = match_classes(*parts)
    flags.prepare_output(output_dir)
    parts = [part._replace(features=network_features(network, i, batch_size, num_workers, cache))
             for part, i in zip(parts, images, strict=True)]
    views = None
    if label_free or not labelled:
        views = tuple(network_features(network, images[0], batch_size, num_workers, cache, view) for view in (0, 1))
    return parts, views


def evaluate_knn(
    parts: list[Part], views: Views | None, about: dict, output_dir: Path, settings: KnnSettings,
    label_free: bool = False, device: torch.device | str = "cpu",
) -> dict:
    """Evaluate features and write eval_knn.json. All processes call this.

    Args:
        parts, views: as `compute_features` returns them.
        about: for the report, plain values: of the network, and where the images come from.
        output_dir: for eval_knn.json.
        device: where neighbours are searched.

    Returns:
        `about` and images (per part), metric, notes, label_free (None, or see `scores.label_free`), results (a row per
        setting, see `accuracies`; [] without labels).

    Raises:
        Refused: features that are not finite, leave-one-out of a single image, or an unusable output folder.
    """
    labelled = parts[0].labels is not None
    results, notes = classify(parts, settings, device) if labelled else ([], ["no labels: measures that need none"])
    free = scores.label_free(parts[0].features, views) if label_free or not labelled else None
    report = about | {
        "images": [len(part.features) for part in parts], "metric": settings.metric, "notes": notes,
        "label_free": free, "results": results,
    }
    flags.prepare_output(output_dir)
    return scores.write_results(output_dir / "eval_knn.json", **report)


def show_knn(report: dict) -> None:
    """Print the tables of a report."""
    for note in report["notes"]:
        print(note)
    if results := report["results"]:
        print("accuracy in %, with its 95 % bootstrap interval")
        print(scores.table([{k: v for k, v in row.items() if k != "per_class"} for row in results]))
        per_class = results[0]["per_class"]
        if 1 < len(per_class) <= MOST_CLASSES_SHOWN:
            print("\ntop-1 by class, for the first row above")
            print(scores.table([{"class": name, "top1": value} for name, value in per_class.items()]))
    if report["label_free"]:
        print("\n" + scores.table([report["label_free"]]))


# ---- Accuracies ----


def classify(parts: Sequence[Part], settings: KnnSettings, device: torch.device | str) -> tuple[list[dict], list[str]]:
    """Accuracies for all settings, and notes on how to read them. A single part is classified leave-one-out."""
    train, test = parts[0], parts[-1]
    exclude = torch.arange(len(test.features)) if len(parts) == 1 else None
    notes = notes_on_classes(train, test)
    if exclude is not None:
        notes.insert(0, "no test set: each image is classified by all others (leave-one-out)")
    smallest = int(torch.bincount(train.labels)[train.labels.unique()].min())
    if settings.n_per_class and max(settings.n_per_class) > smallest:
        notes.append(f"--n_per_class {max(settings.n_per_class)}: a class has only {smallest} images, and all are used")
    results = accuracies(train, test, settings, device, exclude)
    for n in settings.n_per_class or [None]:
        largest = max(row["k"] for row in results if row.get("n_per_class") == n)
        if largest < max(settings.ks):
            notes.append(f"--nb_knn {max(settings.ks)}: k is at most the number of training images, {largest}"
                         + (f" with {n} per class" if n else ""))
    return results, notes


def accuracies(
    train: Part, test: Part, settings: KnnSettings, device: torch.device | str, exclude: Tensor | None = None
) -> list[dict]:
    """A row per setting: n_per_class (few-shot only), k, temperature, and `scores.accuracy`.

    Args:
        exclude: as in `knn.nearest`.
    """
    rows = []
    for n in settings.n_per_class or [None]:
        draws = [draw_support(train.labels, n, settings.seed + d) for d in range(settings.draws)] if n else [None]
        fewest = min(len(train.labels) if s is None else len(s) for s in draws) - (exclude is not None)
        ks = sorted({min(k, max(fewest, 1)) for k in settings.ks})
        ranked = []  # per draw: (T, ks, M, 5)
        for support in draws:
            bank, excluded = restrict(train, support, exclude)
            ranked.append(knn_predict(bank.features, bank.labels, test.features, ks, settings.temperatures,
                                      len(train.classes), metric=settings.metric, exclude=excluded, device=device))
        for t, temperature in enumerate(settings.temperatures):
            for i, k in enumerate(ks):
                setting = ({"n_per_class": n} if n else {}) | {"k": k, "temperature": temperature}
                rows.append(setting | scores.accuracy([r[t, i] for r in ranked], test.labels, test.classes, k))
    return rows


def restrict(train: Part, support: Tensor | None, exclude: Tensor | None) -> tuple[Part, Tensor | None]:
    """The training images numbered by `support` (None: all), and `exclude` renumbered accordingly, -1 for none."""
    if support is None:
        return train, exclude
    if exclude is not None:
        place = torch.full((len(train.labels),), -1).index_copy(0, support, torch.arange(len(support)))
        exclude = place[exclude]
    return train._replace(features=train.features[support], labels=train.labels[support]), exclude
