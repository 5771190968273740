"""Figures of the evaluation scripts: confidence intervals, what features are worth without labels, results' files.

Shapes: N images, M test images, D width.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from method.rank import effective_rank

MOST_PAIRED = 10_000  # images that RankMe and uniformity look at: the second is quadratic


def bootstrap_interval(scores: Tensor | np.ndarray | Sequence[float], n: int = 1000, seed: int = 0
                       ) -> tuple[float, float]:
    """95 % percentile interval of a mean, from `n` resamples with replacement (Efron 1979).

    Args:
        scores: one a example, such as 1 for right and 0 for wrong.

    Returns:
        (low, high) in the scores' unit.

    Raises:
        ValueError: there are no scores.
    """
    scores = np.asarray(scores, np.float64).ravel()
    if not scores.size:
        raise ValueError("no scores: there is nothing to give an interval of")
    # How often each distinct value is drawn follows a multinomial law: for right and wrong that is one binomial
    # number a resample, however many examples there are.
    values, counts = np.unique(scores, return_counts=True)
    rng = np.random.default_rng(seed)
    means = [rng.multinomial(scores.size, counts / scores.size) @ values / scores.size for _ in range(n)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def percent(scores: Tensor | np.ndarray) -> dict:
    """Mean of scores in [0, 1] with its 95 % interval, both in %: {"value", "interval"}."""
    scores = 100 * np.asarray(scores, np.float64)
    return {"value": float(scores.mean()), "interval": list(bootstrap_interval(scores))}


# ---- Classification ----


def hits(ranked: Tensor, labels: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """(M, ranks) classes -> whether the first, and one of the first five, is right: (M,) bool each.

    As published, k neighbours give at most k of the five.
    """
    right = ranked == labels.cpu()[:, None]
    return right[:, 0], right[:, : min(5, k)].any(1)


def accuracy(ranked: Sequence[Tensor], labels: Tensor, classes: Sequence[str], k: int = 5) -> dict:
    """Top-1, top-5 and macro top-1 (the mean over classes) over the draws, each with its interval over test images.

    `spread` is the standard deviation over draws, in points; the macro interval takes the class sizes as given.

    Args:
        ranked: of each draw, (M, ranks) classes, the best first. labels: (M,). k: as in `hits`.
    """
    both = [hits(r, labels, k) for r in ranked]
    top1, top5 = (torch.stack([b[i] for b in both]).double() for i in (0, 1))  # (draws, M)
    counts = torch.bincount(labels, minlength=len(classes))
    share = len(labels) / (counts.count_nonzero() * counts[labels])  # weights whose mean is the macro one
    right = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, labels, top1.mean(0))
    per_class = {classes[c]: 100 * (right[c] / counts[c]).item() for c in counts.nonzero().squeeze(1).tolist()}
    found = {
        "top1": percent(top1.mean(0)),
        "top5": percent(top5.mean(0)) if len(classes) > 5 else None,
        "macro": percent(top1.mean(0) * share),
    }
    if len(ranked) > 1:
        found["spread"] = 100 * top1.mean(1).std().item()
    return found | {"per_class": per_class}


# ---- Without labels ----


def label_free(features: Tensor, views: tuple[Tensor, Tensor] | None = None) -> dict[str, dict]:
    """What (N, D) features are worth without labels: {name: {"value", "interval"}}, an interval where there is one.

    rank_me: effective number of dimensions, at most min(N, D) (Garrido et al. 2023). It is no mean over images, and
        drawing images twice would lower it: no interval.
    uniformity: how evenly the features lie on the sphere; lower is better (Wang and Isola 2020).
    alignment: mean squared distance of two views' features, lower is better (the same paper); None without `views`.

    The first two look at no more than 10,000 images, evenly spaced.
    """
    some = features[torch.linspace(0, len(features) - 1, min(len(features), MOST_PAIRED)).round().long()]
    return {
        "rank_me": {"value": effective_rank(some).item(), "interval": None},
        "uniformity": uniformity(some),
        "alignment": None if views is None else alignment(*views),
    }


def uniformity(features: Tensor, t: float = 2.0, rows: int = 1024) -> dict:
    """log of the mean of exp(-t |x - y|^2) over pairs of different images, x and y on the unit sphere.

    0 is the worst, all features in one point; evenly spread ones of many dimensions come to about -2 t.
    """
    x = torch.nn.functional.normalize(features.double(), dim=1)
    if len(x) < 2:
        return {"value": None, "interval": None}
    sums = torch.cat([(t * (2 * part @ x.T - 2)).exp().sum(1) for part in x.split(rows)])
    potentials = (sums - 1) / (len(x) - 1)  # each image's mean over the others
    mean = potentials.mean().item()
    # Every image is in a pair on both sides: to first order, the mean over pairs varies twice as much as the mean of
    # the potentials does (Hajek's projection of a U-statistic of order two).
    bounds = [max(mean + 2 * (bound - mean), sys.float_info.min) for bound in bootstrap_interval(potentials)]
    return {"value": math.log(mean), "interval": [math.log(bound) for bound in bounds]}


def alignment(view1: Tensor, view2: Tensor) -> dict:
    """Mean of |x - y|^2 over two views of each image, on the unit sphere: 0 is best, 2 is chance."""
    x, y = (torch.nn.functional.normalize(view.double(), dim=1) for view in (view1, view2))
    distances = (x - y).square().sum(1)
    return {"value": distances.mean().item(), "interval": list(bootstrap_interval(distances))}


# ---- Results ----


def table(rows: Sequence[Mapping]) -> str:
    """Rows of one set of columns as aligned text; {"value", "interval"} becomes `value [low, high]`."""
    lines = [list(rows[0])] + [[cell_text(cell) for cell in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def cell_text(cell) -> str:
    if cell is None or cell == {"value": None, "interval": None}:
        return "-"
    if isinstance(cell, Mapping):
        interval = " [{:.2f}, {:.2f}]".format(*cell["interval"]) if cell["interval"] else ""
        return f"{cell['value']:.2f}{interval}"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def write_results(path: str | os.PathLike, results: Sequence[Mapping], **about) -> None:
    """JSON file with the command, what `about` says (weights, their hash, data ...) and the results.

    NaN has no place in JSON: absent figures are None.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"command": shlex.join(sys.argv), **about, "results": list(results)}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)
