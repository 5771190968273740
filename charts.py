"""Charts of an evaluation: accuracy against k, a map of the features, neighbours. Pictures for report.html.

Shapes: N images, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import plots

MOST_COLOURS = 20  # classes told apart by colour; further ones are grey
RIGHT, WRONG = (46, 125, 50), (198, 40, 40)


def sweep_chart(rows: Sequence[Mapping], path: str | Path) -> None:
    """Top-1 accuracy in % against k, with its interval; `rows` of eval_knn.json."""
    ks = [row["k"] for row in rows]
    values = np.array([row["top1"]["value"] for row in rows])
    low, high = np.array([row["top1"]["interval"] for row in rows]).T
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(ks, values, (np.maximum(values - low, 0), np.maximum(high - values, 0)), marker="o", capsize=3)
    axes.set(xscale="log", xticks=ks, xticklabels=ks, xlabel="neighbours k", ylabel="top-1 accuracy, %")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def feature_map(features: np.ndarray, labels: np.ndarray, classes: Sequence[str], path: str | Path, seed: int = 0
                ) -> None:
    """t-SNE of (N, D) features in the plane, coloured by class (van der Maaten and Hinton 2008; scikit-learn).

    The 20 largest classes have colours, the others are grey.
    """
    from sklearn.manifold import TSNE

    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(unit)
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    largest = np.argsort(-np.bincount(labels, minlength=len(classes)), kind="stable")[:MOST_COLOURS]
    rest = ~np.isin(labels, largest)
    axes.scatter(*points[rest].T, s=6, color="0.7", label="other classes" if rest.any() else None)
    for i, c in enumerate(sorted(largest.tolist())):
        if (labels == c).any():
            axes.scatter(*points[labels == c].T, s=8, color=f"C{i}" if len(largest) <= 10 else colour(i),
                         label=classes[c])
    axes.set_axis_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def colour(i: int):
    import matplotlib

    return matplotlib.colormaps["tab20"](i)


def neighbour_sheet(queries: Sequence[np.ndarray], found: Sequence[Sequence[np.ndarray]],
                    right: Sequence[Sequence[bool]], path: str | Path, cell: int = 96) -> None:
    """One row a query: the picture, then its nearest ones, framed green where the class is the query's and red where
    it is not."""
    rows = []
    for query, near, same in zip(queries, found, right, strict=True):
        rows.append([query, *(framed(plots._fit(n, cell), RIGHT if s else WRONG)
                              for n, s in zip(near, same, strict=True))])
    k = len(found[0])
    titles = ["picture", *("nearest" if i == 0 else str(i + 1) for i in range(k))]
    plots.save_picture(plots.contact_sheet(rows, titles, cell), path)


def framed(picture: np.ndarray, color: Sequence[int], width: int = 4) -> np.ndarray:
    picture = picture.copy()
    for edge in (picture[:width], picture[-width:], picture[:, :width], picture[:, -width:]):
        edge[...] = color
    return picture
