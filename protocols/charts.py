"""Figures by matplotlib: curves of a run, accuracy against k, a map of features, results of a search.

Shapes: N images, D width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

import atomic
from imagesets.decode import printable
from parallel import Refused, refusing
from protocols import sheets

if TYPE_CHECKING:  # imported where it is used: it takes a tenth of a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#4d4d4d")
INK, GREY, GRID = "#333333", "#888888", "#dddddd"
MOST_COLORS = 20  # classes with a colour of their own on a map; others are grey
CELL = 224  # pixels of an image's longer side on a sheet

# ---------------------------------------------------------------- curves of training

# title, unit, {key of log.txt: (label, line style)}; a panel none of whose keys is logged is left out
LARGE_PANELS = (
    ("Loss", "nats", {
        "train_loss": ("loss", "-"), "train_entropy": ("teacher entropy", "--"), "train_ln_k": ("ln K", ":")}),
    ("k-NN on held-out images", "top-1 %", {
        "knn_top1": ("teacher", "-"), "knn_untrained": ("untrained network", "--"),
        "knn_start": ("starting weights", "--"), "knn_pixels": ("raw pixels", ":")}),
)
SMALL_PANELS = (
    ("Learning rate", "per step", {"train_lr": ("", "-")}),
    ("Weight decay", "coefficient", {"train_wd": ("", "-")}),
    ("Teacher momentum", "per step", {"train_momentum": ("", "-")}),
    ("Effective rank of features", "dimensions", {"train_feature_rank": ("", "-")}),
    ("Std of features", "1: even on the sphere", {"train_feature_std": ("", "-")}),
    ("Prototypes in use", "of a step's images", {"train_prototypes_used": ("", "-")}),
    ("KL teacher to student", "nats", {"train_kl": ("", "-")}),
    ("Loss left", "share of ln K", {"train_dino_left": ("class tokens", "-"), "train_ibot_left": ("patches", "--")}),
    ("KoLeo term", "nats", {"train_koleo": ("", "-")}),
    ("Entropy of patches", "nats", {"train_patch_entropy": ("", "-")}),
    ("Prototypes in use by patches", "of a step's patches", {"train_patch_prototypes_used": ("", "-")}),
    ("Norm of the centre", "L2", {"train_center_norm": ("", "-")}),
)
LEVELS = {"knn_untrained", "knn_start", "knn_pixels", "train_ln_k"}  # one value per run, a horizontal line
STARTS = {"knn_top1": ("knn_untrained", "knn_start")}  # curves that begin before training, with another key's value
FORMATS = (".png", ".svg", ".pdf")
COLUMNS = 4  # small panels per row; the large ones share the same width


def read_log(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the JSON lines of a `log.txt`: {key: (epochs, values)}, by ascending epoch.

    Where an epoch occurs twice, in a resumed run, the last line counts. Lines cut short by a crash and values that
    are not numbers are skipped.

    Raises:
        Refused: no such file, or no line with an epoch.
    """
    path = Path(path)
    path = path / "log.txt" if path.is_dir() else path
    if not path.is_file():
        raise Refused(f"log {path}: no such file; give the log.txt of a run, or its folder")
    with open(path, "rb") as file:
        if b"\0" in file.read(4096):
            raise Refused(f"log {path}: not a text file; give the log.txt of a run, or its folder")
    epochs = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and _is_number(record.get("epoch")):
            epochs[record["epoch"]] = record
    if not epochs:
        raise Refused(f"log {path}: no line with an epoch in it; give the log.txt that main_dino.py writes")
    series: dict[str, list] = {}
    for epoch in sorted(epochs):
        for key, value in epochs[epoch].items():
            if _is_number(value):
                series.setdefault(key, []).append((epoch, value))
    return {key: tuple(np.array(points, dtype=float).T) for key, points in series.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def run_names(paths: Sequence[str | Path]) -> list[str]:
    """A short name for each log: the last folders of its path, as many as are needed to tell the logs apart."""
    parts = [Path(os.path.abspath(path)) for path in paths]
    parts = [tuple(printable(os.fsencode(part)) for part in (path if path.is_dir() else path.parent).parts)
             for path in parts]
    for length in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-length:]).lstrip("/") for p in parts]
        if len(set(names)) == len(names):
            return names
    return names


def training_curves(logs: Sequence[str | Path], out: str | Path) -> None:
    """Draw the curves of one or several runs in one figure, one colour per run. Values of an epoch stand at its end.

    Args:
        logs: log.txt files, or folders that hold one. Keys that are not logged are left out.
        out: file to write; its suffix chooses the format, one of FORMATS.

    Raises:
        Refused: a log is missing or empty, there is nothing to draw, or `out` can't be written.
    """
    from matplotlib.figure import Figure

    check_format("--out", out)
    runs = [read_log(path) for path in logs]
    large, small = ([p for p in panels if any(key in run for run in runs for key in p[2])]
                    for panels in (LARGE_PANELS, SMALL_PANELS))
    if not large and not small:
        raise Refused(f"log {logs[0]}: nothing to draw but epochs; give the log.txt that main_dino.py writes")
    heights = [3.8] * bool(large) + [2.1] * -(-len(small) // COLUMNS)
    figure = Figure(figsize=(11, sum(heights) + 0.6), dpi=130)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08, wspace=0.02, hspace=0.03)
    cells = figure.add_gridspec(len(heights), COLUMNS, height_ratios=heights)
    for i, panel in enumerate(large):
        span = COLUMNS // len(large)
        _draw_panel(figure.add_subplot(cells[0, i * span:(i + 1) * span]), panel, runs, 10)
    for i, panel in enumerate(small):
        _draw_panel(figure.add_subplot(cells[bool(large) + i // COLUMNS, i % COLUMNS]), panel, runs, 8)
    names = run_names(logs)
    if len(runs) == 1:
        figure.suptitle(names[0], fontsize=12, color=INK)
    else:
        handles = [_line(COLORS[i % len(COLORS)], "-") for i in range(len(runs))]
        figure.legend(handles, names, loc="outside upper left", ncols=min(len(names), 4), frameon=False, fontsize=10)
    save(figure, out, "--out")


def check_format(flag: str, path: str | Path) -> None:
    if Path(path).suffix.lower() not in FORMATS:
        raise Refused(f"{flag} {path}: the name of a figure has to end in {', '.join(FORMATS)}")


def save(figure: Figure, path: str | Path, flag: str) -> None:
    with refusing(f"{flag} {path}", "give a file that can be written"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic.mark_output(path)
        figure.savefig(path)


def _draw_panel(axes: Axes, panel: tuple, runs: list[dict], font: int) -> None:
    title, unit, keys = panel
    for key, (_, style) in keys.items():
        shared = len({run[key][1][-1] for run in runs if key in run}) == 1
        for color, run in zip(cycle(COLORS), runs, strict=False):
            if key in run and key in LEVELS:
                axes.axhline(run[key][1][-1], linestyle=style, color=GREY if shared else color, linewidth=1.6)
            elif key in run:
                axes.plot(*curve(run, key), style, color=color, linewidth=1.6, clip_on=False,
                          marker="o" if len(run[key][0]) <= 30 else None, markersize=font / 4)
    axes.set_title(title, fontsize=font + 1, color=INK, loc="left", pad=22 if len(keys) > 1 else None)
    axes.set_ylabel(unit, fontsize=font, color=INK)
    axes.set_xlabel("epochs done", fontsize=font, color=INK)
    axes.tick_params(labelsize=font - 1, colors=INK, length=0)
    axes.set_xlim(0, max(run["epoch"][0][-1] for run in runs) + 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[:].set_visible(False)
    drawn = [(key, *entry) for key, entry in keys.items() if any(key in run for run in runs)]
    if len(keys) > 1:  # with several runs, colours stand for runs and line styles for keys
        plain = COLORS[0] if len(runs) == 1 else INK
        handles = [_line(GREY if key in LEVELS else plain, style) for key, _, style in drawn]
        axes.legend(handles, [label for _, label, _ in drawn], fontsize=font - 1, frameon=False, labelcolor=INK,
                    loc="lower left", bbox_to_anchor=(0, 1), ncols=len(drawn), borderpad=0, borderaxespad=0.3)


def curve(run: Mapping, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs done and values of a key of a `read_log`; with the value before training, if the log has it."""
    epochs, values = run[key]
    for start in STARTS.get(key, ()):
        if start in run:
            return np.append(0, epochs + 1), np.append(run[start][1][0], values)
    return epochs + 1, values


def _line(color: str, style: str) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=style, linewidth=1.6)


# ---------------------------------------------------------------- charts of an evaluation


def sweep_chart(networks: Mapping[str, Sequence[Mapping]], path: str | Path) -> None:
    """Top-1 accuracy in % against k, with its interval, from each network's results in eval_knn.json."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for (name, rows), color in zip(networks.items(), cycle(COLORS), strict=False):
        ks = [row["k"] for row in rows]
        values = np.array([row["top1"]["value"] for row in rows])
        low, high = np.array([row["top1"]["interval"] for row in rows]).T
        axes.errorbar(ks, values, (np.maximum(values - low, 0), np.maximum(high - values, 0)), marker="o", capsize=3,
                      color=color, label=name)
    ks = sorted({row["k"] for rows in networks.values() for row in rows})
    axes.set(xscale="log", xticks=ks, xticklabels=ks, xlabel="neighbours k", ylabel="top-1 accuracy, %")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if len(networks) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(networks), frameon=False)
    atomic.mark_output(path)
    figure.savefig(path, dpi=120)


def feature_map(features: np.ndarray, labels: np.ndarray, classes: Sequence[str], path: str | Path, seed: int = 0
                ) -> None:
    """scikit-learn's t-SNE of (N, D) features in two dimensions (van der Maaten and Hinton 2008), coloured by class.

    The 20 largest classes have colours, the others are grey. The map, whose axes mean nothing, is turned so that it is
    widest from left to right.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(unit)
    points = points - points.mean(axis=0)
    points = points @ np.linalg.svd(points, full_matrices=False)[2].T
    size = float(np.clip(8000 / len(points), 8, 50))  # of a point, in square points
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots()
    largest = np.argsort(-np.bincount(labels, minlength=len(classes)), kind="stable")[:MOST_COLORS]
    rest = ~np.isin(labels, largest)
    axes.scatter(*points[rest].T, s=size, color="0.7", label="other classes" if rest.any() else None)
    colors = colormaps["tab10" if len(largest) <= 10 else "tab20"]
    for i, c in enumerate(sorted(largest.tolist())):
        if (labels == c).any():
            axes.scatter(*points[labels == c].T, s=size, color=colors(i), label=classes[c])
    axes.set_axis_off()
    axes.margins(0.01)
    figure.legend(loc="outside right center", markerscale=(40 / size) ** 0.5, frameon=False, fontsize=9)
    atomic.mark_output(path)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- results of a search


def draw_sheet(rows: Sequence[Sequence[tuple[Tensor, str]]], path: str | Path) -> None:
    """Draw rows of (uint8 (C, H, W) image, title) in one figure; the first image of a row, the query, is framed."""
    from matplotlib.figure import Figure

    columns = max(map(len, rows))
    figure = Figure(figsize=(1.7 * columns, 2.1 * len(rows)), dpi=130, layout="constrained")
    for row, cells in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axes in row:
            axes.axis("off")
        for i, (axes, (image, title)) in enumerate(zip(row, cells, strict=False)):
            axes.imshow(sheets.fit(sheets.as_picture(image), CELL))
            axes.set_title(title, fontsize=7, color=INK)
            if i == 0:
                axes.axis("on")
                axes.set(xticks=[], yticks=[])
                for spine in axes.spines.values():
                    spine.set(color=COLORS[1], linewidth=2.5)
    save(figure, path, "--output")
