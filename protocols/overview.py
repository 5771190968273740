"""The page that shows all evaluations of a network: its figures, the pages' tables and the drawings between them.

Shapes: N images, D width.
"""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from imagesets.decode import Undecodable
from imagesets.sources import Images
from parallel import Refused
from protocols import attention, charts, dense, report, sheets
from protocols.features import Network
from protocols.knn import knn_predict, nearest
from protocols.splits import Part

VOTERS, TEMPERATURE = 20, 0.07  # of the k-NN whose errors are shown
MAPPED, SHOWN, QUERIES, NEIGHBOURS = 2000, 12, 10, 6  # images of the map, of the sheets, and of the neighbours
# shown as tables alone
OTHERS = ("semantic segmentation", "depth", "video segmentation", "copy detection", "retrieval")
FACTS = ("arch", "patch_size", "weights", "checkpoint_key", "weights_sha256", "crop_size")


# ---- Figures of the reports ----


def knn_figures(knn: Mapping) -> dict:
    """{measure: {"value", "interval"}} of a k-NN report."""
    rows = [r for r in knn["results"] if r["k"] == VOTERS] or knn["results"][-1:]
    figures = {f"top-1, k = {rows[0]['k']}": rows[0]["top1"]} if rows else {}
    return figures | {name: value for name, value in (knn["label_free"] or {}).items() if value}


def segmentation_figures(segmentation: Mapping) -> dict:
    first = segmentation["results"][0]["network"]
    return {f"Jaccard, {row['mask']}": row["jaccard"] or row["jaccard_held_out"]
            for row in segmentation["results"] if row["network"] == first}


def semantic_figures(semantic: Mapping) -> dict:
    return {"mIoU": semantic["results"][0]["miou"], "pixel accuracy": semantic["results"][0]["pixel_accuracy"]}


def depth_figures(depth: Mapping) -> dict:
    return {f"depth, {name}": depth["results"][0][name] for name in ("rmse", "abs_rel", "delta1")}


def confusions(parts: Sequence[Part], most: int = 10) -> list[dict]:
    """The pairs of classes that 20-NN confuses most often, of one part (leave-one-out) or a training and a test set."""
    train, test = parts[0], parts[-1]
    hidden = torch.arange(len(test.features)) if len(parts) == 1 else None
    predicted = knn_predict(train.features, train.labels, test.features, [VOTERS], [TEMPERATURE], len(train.classes),
                            exclude=hidden)[0, 0][:, 0]
    wrong = predicted != test.labels
    pairs, counts = torch.stack([test.labels[wrong], predicted[wrong]], 1).unique(dim=0, return_counts=True)
    sizes = torch.bincount(test.labels, minlength=len(test.classes))
    return [{"class": test.classes[a], "taken for": test.classes[b], "images": int(counts[i]),
             "of the class, %": 100 * float(counts[i] / sizes[a])}
            for i in counts.argsort(descending=True, stable=True)[:most].tolist() for a, b in [pairs[i].tolist()]]


# ---- Drawings ----


def draw_neighbours(images: Sequence[Images], parts: Sequence[Part], path: Path) -> None:
    """Ten evenly spaced test images and their nearest training images."""
    train, test = parts[0], parts[-1]
    rows = torch.linspace(0, len(test.features) - 1, min(QUERIES, len(test.features))).round().long()
    _, near = nearest(test.features[rows], train.features, NEIGHBOURS, exclude=rows if len(parts) == 1 else None)
    queries = [sheets.as_picture(images[-1].load(i)) for i in rows.tolist()]
    neighbours = [[sheets.as_picture(images[0].load(j)) for j in row] for row in near.tolist()]
    same = [[train.labels is None or bool(train.labels[j] == test.labels[i]) for j in row]
            for i, row in zip(rows.tolist(), near.tolist(), strict=True)]
    names = [[Path(images[-1].name(i)).name, *(Path(images[0].name(j)).name for j in row)]
             for i, row in zip(rows.tolist(), near.tolist(), strict=True)]
    sheets.save_picture(sheets.neighbour_sheet(queries, neighbours, same, names=names), path)


def draw_map(parts: Sequence[Part], path: Path, seed: int) -> None:
    """The features of at most 2,000 evenly spaced test images."""
    test = parts[-1]
    rows = torch.linspace(0, len(test.features) - 1, min(MAPPED, len(test.features))).round().long()
    labels = torch.zeros(len(rows), dtype=torch.long) if test.labels is None else test.labels[rows]
    charts.feature_map(test.features[rows].numpy(), labels.numpy(), test.classes or ["no labels"], path, seed)


def draw(
    folder: Path, network: Network, images: Sequence[Images], parts: Sequence[Part],
    sweeps: Mapping[str, Sequence[Mapping]], image_size: int, seed: int, skipped: dict[str, str],
) -> dict[str, list[str]]:
    """Draw into `folder` what the evaluations allow; what can't be drawn is added to `skipped`, with the reason.

    Args:
        images, parts: training and test images, and their features; `parts` is empty where there is no k-NN.
        sweeps: by network, the results of its k-NN report; {} without labels.
        image_size: see `attention.draw_sheets`; 0: its default.

    Returns:
        The drawings as parts of the page, by section.
    """
    drawn: dict[str, list[str]] = {}

    def add(name: str, make: Callable[[], object], *files: tuple[str, str]) -> None:
        try:
            make()
        except (Refused, Undecodable, ImportError) as error:
            skipped[name] = str(error)
        else:
            drawn[name] = [report.figure(folder / file, caption) for file, caption in files]

    if sweeps:
        add("sweep", lambda: charts.sweep_chart(sweeps, folder / "k_sweep.png"),
            ("k_sweep.png", "top-1 accuracy for every k, with its 95 % interval"))
    if parts and len(parts[-1].features) >= 5:
        add("map of the features", lambda: draw_map(parts, folder / "tsne.png", seed),
            ("tsne.png", f"t-SNE of the features of {min(MAPPED, len(parts[-1].features))} test images by class"))
    elif parts:
        skipped["map of the features"] = f"{len(parts[-1].features)} images are too few"
    if parts and len(parts[0].features) > 1:
        add("neighbours", lambda: draw_neighbours(images, parts, folder / "neighbours.png"),
            ("neighbours.png", "test images and the training images nearest to them; green: the same class, red: "
                               "another"))

    def draw_sheets() -> None:
        size = [image_size] if image_size else []
        dense.check_look(network, size, -1)
        attention.draw_sheets(network, images[-1], size, folder, max_images=SHOWN, threshold=0.6, pca=True,
                              flag="--data_path")

    pca = ("pca_sheet.png", "the first three principal components of the patch tokens as red, green and blue")
    heads = ("attention_sheet.png", "image, the patches that hold 60 % of the attention, mean of the heads, each head")
    add("attention and PCA", draw_sheets, *((pca, heads) if dense.has_attention(network) else (pca,)))
    if "attention and PCA" in drawn and not dense.has_attention(network):
        skipped["attention"] = f"the attention of {network.about['arch']}, a network of timm, isn't read"
    return drawn


# ---- The page ----


def circumstances() -> dict[str, str]:
    """The date and the versions that figures depend on."""
    versions = [f"{name} {version(name)}" for name in ("torch", "torchvision", "numpy")]
    return {"date": time.strftime("%Y-%m-%d %H:%M %Z"),
            "versions": ", ".join([f"Python {platform.python_version()}", *versions])}


def notes(evaluated: Mapping) -> list[str]:
    """The notes of a protocol's report, as parts of the page."""
    return [report.note(text) for text in evaluated.get("notes", [])]


def page(
    about: Mapping, data_path: str, table: Sequence[Mapping], reports: Mapping[str, Mapping], skipped: Mapping,
    drawn: Mapping[str, list[str]], parts: Sequence[Part], masks: Path,
) -> str:
    """The HTML page.

    Args:
        about: of the network. table: of all figures. reports: by protocol. drawn: of `draw`.
        parts: features, for the confusions of labelled ones. masks: the sheet of the segmentation, if it was drawn.
    """
    knn, segmented = reports.get("k-NN", {}), reports.get("segmentation")
    lines = [{k: v for k, v in row.items() if k != "per_class"} for row in knn.get("results", [])]
    wrong = confusions(parts) if lines else []
    facts = {k: about[k] for k in FACTS if about.get(k) is not None}
    facts |= {"data": data_path, "command": shlex.join(sys.argv)} | circumstances()
    return report.page("Evaluation of frozen features", [
        ("What was evaluated", [report.facts(facts)]),
        ("Figures, with 95 % bootstrap intervals", [report.table(table), report.note(
            "Accuracies, Jaccard indices, J&F and average precisions in %; the RMSE of depth in metres, its other "
            "errors as shares. Segmentation: best head chooses with the ground truth of each image; one head was "
            "chosen on other images.")]),
        ("k-NN", drawn.get("sweep", []) + [report.table(lines)] + notes(knn)),
        ("Confused classes", [report.table(wrong)] if wrong else []),
        ("Linear classifiers", [report.table(reports["linear"]["results"]), report.note(
            "Only the chosen one was evaluated on the test set."), *notes(reports["linear"])]
         if "linear" in reports else []),
        ("Map of the features", drawn.get("map of the features", [])),
        ("Nearest neighbours", drawn.get("neighbours", [])),
        ("Patch tokens and attention", drawn.get("attention and PCA", [])),
        ("Foreground masks", [report.table(segmented["results"])] + (
            [report.figure(masks, "images, their foreground, and masks from the attention")] if masks.is_file() else []
        ) + notes(segmented) if segmented else []),
        *((name.capitalize(), [report.table(reports[name]["results"])] + notes(reports[name]))
          for name in OTHERS if name in reports),
        ("Skipped", [report.facts(skipped)] if skipped else []),
    ])
