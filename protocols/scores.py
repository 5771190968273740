"""Scores of evaluations: accuracies with confidence intervals, measures without labels, tables, result files.

Shapes: N images, M test images, D width.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import atomic
import parallel
from method.rank import effective_rank

MOST_PAIRED = 10_000  # images for RankMe and uniformity, which compares all pairs
MOST_COUNTS = 1 << 22  # counts of values in resamples at a time, 32 MiB


def bootstrap_interval(scores: Tensor | np.ndarray | Sequence[float], n: int = 1000, seed: int = 0
                       ) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean, from `n` resamples with replacement (Efron 1979).

    Args:
        scores: one per example, such as 1 for right and 0 for wrong.

    Returns:
        (low, high) in the unit of the scores.

    Raises:
        ValueError: there are no scores.
    """
    scores = np.asarray(scores, np.float64).ravel()
    if not scores.size:
        raise ValueError("no scores to compute an interval of")
    return percentiles(resampled_means(scores, n, np.random.default_rng(seed)))


def resampled_means(scores: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `n` resamples with replacement, (n,)."""
    # The counts of the distinct values in a resample are multinomial: for right and wrong, a resample is one binomial
    # number however many examples there are.
    values, counts = np.unique(scores, return_counts=True)
    at_once = max(1, MOST_COUNTS // values.size)
    sums = [rng.multinomial(scores.size, counts / scores.size, min(at_once, n - done)) @ values
            for done in range(0, n, at_once)]
    return np.concatenate(sums) / scores.size


def percentiles(resampled: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a statistic, given its values in resamples."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def percent(scores: Tensor | np.ndarray) -> dict:
    """Mean of scores in [0, 1] and its 95 % interval, in %: {"value", "interval"}."""
    return summary(100 * np.asarray(scores, np.float64))


def summary(scores: np.ndarray) -> dict:
    """Mean of scores and its 95 % bootstrap interval: {"value", "interval"}."""
    return {"value": float(scores.mean()), "interval": list(bootstrap_interval(scores))}


# ---- Classification ----


def hits(ranked: Tensor, labels: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Top-1 and top-5 hits, (M,) bool each, of (M, ranks) classes, best first.

    As in the published script, only the first min(5, k) classes count for top-5.
    """
    right = ranked == labels.cpu()[:, None]
    return right[:, 0], right[:, : min(5, k)].any(1)


def accuracy(ranked: Sequence[Tensor], labels: Tensor, classes: Sequence[str], k: int = 5) -> dict:
    """Accuracies in %, averaged over draws, with bootstrap intervals over the test images.

    Args:
        ranked: per draw, (M, ranks) classes, best first.
        labels: (M,).
        k: as in `hits`.

    Returns:
        top1; top5 (None for up to five classes); macro, the mean of the classes' top-1, see `macro_percent`; spread,
        the standard deviation over draws in points, if there are several; per_class {name: top-1}.
    """
    both = zip(*(hits(r, labels, k) for r in ranked), strict=True)
    top1, top5 = (torch.stack(right).double() for right in both)  # (draws, M)
    mean = top1.mean(0).numpy()
    labels = labels.numpy()
    tested, sizes = np.unique(labels, return_counts=True)
    by_class = np.split(mean[np.argsort(labels, kind="stable")], np.cumsum(sizes)[:-1])
    accuracies = {
        "top1": percent(mean),
        "top5": percent(top5.mean(0)) if len(classes) > 5 else None,
        "macro": macro_percent(by_class),
    }
    if len(ranked) > 1:
        accuracies["spread"] = 100 * top1.mean(1).std().item()
    per_class = {classes[c]: 100 * float(right.mean()) for c, right in zip(tested, by_class, strict=True)}
    return accuracies | {"per_class": per_class}


def macro_percent(by_class: Sequence[np.ndarray], n: int = 1000, seed: int = 0) -> dict:
    """Mean over classes of each class's mean score, and its 95 % interval, in %: {"value", "interval"}.

    The bootstrap is stratified: the images of each class are resampled by themselves, and class sizes stay. A class of
    one image therefore adds nothing to the interval.
    """
    rng = np.random.default_rng(seed)
    resampled = np.mean([resampled_means(scores, n, rng) for scores in by_class], axis=0)
    value = np.mean([scores.mean() for scores in by_class])
    return {"value": 100 * float(value), "interval": [100 * bound for bound in percentiles(resampled)]}


# ---- Without labels ----


def label_free(features: Tensor, views: tuple[Tensor, Tensor] | None = None) -> dict[str, dict]:
    """Measures of (N, D) features that need no labels: {name: {"value", "interval"}}.

    rank_me: effective number of dimensions, at most min(N, D); higher is better (Garrido et al. 2023). Not a mean over
        images, and lowered by repeated ones: it has no bootstrap interval.
    uniformity: how evenly the features cover the sphere; lower is better (Wang and Isola 2020).
    alignment: mean squared distance between features of two views; lower is better (the same paper); None without
        `views`.

    rank_me and uniformity are computed on at most MOST_PAIRED images, evenly spaced.
    """
    sample = features[torch.linspace(0, len(features) - 1, min(len(features), MOST_PAIRED)).round().long()]
    return {
        "rank_me": {"value": effective_rank(sample).item(), "interval": None},
        "uniformity": uniformity(sample),
        "alignment": None if views is None else alignment(*views),
    }


def uniformity(features: Tensor, t: float = 2.0, rows: int = 1024, n: int = 1000, seed: int = 0) -> dict:
    """log mean exp(-t |x - y|^2) over pairs of different images, x and y on the unit sphere.

    0 if all features are equal, the worst case; about -2 t if they are spread evenly over many dimensions.

    The 95 % interval is that of `n` resamples of the images. An image drawn several times is not paired with itself,
    whose distance of 0 would make every resample look less uniform than the images are.
    """
    x = torch.nn.functional.normalize(features.double(), dim=1)
    if len(x) < 2:
        return {"value": None, "interval": None}
    drawn = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), n)
    weights = torch.from_numpy(drawn).to(x.device, torch.float32)  # (n, N): how often an image is in a resample
    norms = x.square().sum(1)  # 1, or 0 for a feature of zeros, such as the pixels of a black image
    total, resampled = 0.0, torch.zeros(n, dtype=torch.float64, device=x.device)
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        kernel = (t * (2 * part @ x.T - norms[first : first + rows, None] - norms)).exp()  # (rows, N)
        kernel.diagonal(first).zero_()
        total += kernel.sum().item()
        resampled += (weights[:, first : first + rows] * (weights @ kernel.float().T)).sum(1, dtype=torch.float64)
    pairs = len(x) ** 2 - weights.double().square().sum(1)
    resampled = (resampled / pairs)[pairs > 0]
    value = math.log(total / (len(x) * (len(x) - 1)))
    return {"value": value, "interval": list(percentiles(resampled.log().cpu().numpy()))}


def alignment(view1: Tensor, view2: Tensor) -> dict:
    """Mean of |x - y|^2 over the images' two views x and y, on the unit sphere: 0 is best, 2 is chance."""
    x, y = (torch.nn.functional.normalize(view.double(), dim=1) for view in (view1, view2))
    distances = (x - y).square().sum(1)
    return {"value": distances.mean().item(), "interval": list(bootstrap_interval(distances))}


# ---- Results ----


def table(rows: Sequence[Mapping]) -> str:
    """Rows with the same columns as aligned text; {"value", "interval"} becomes `value [low, high]`, with two decimals
    or with "digits" of them."""
    lines = [list(rows[0])] + [[cell_text(cell) for cell in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def cell_text(cell) -> str:
    if cell is None or cell == {"value": None, "interval": None}:
        return "-"
    if isinstance(cell, Mapping):
        digits = cell.get("digits", 2)
        interval = " [{:.{n}f}, {:.{n}f}]".format(*cell["interval"], n=digits) if cell["interval"] else ""
        return f"{cell['value']:.{digits}f}{interval}"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def write_results(path: str | Path, results: Sequence[Mapping], **about) -> dict:
    """Write a JSON file with the command, `about` (weights, their hash, data ...) and the results.

    Where the file holds the results of other weights, data or settings, they are kept under "earlier", the newest
    first. Every process may call it; the first one writes.

    Returns:
        What the file holds, without the command.

    Raises:
        Refused: the file can't be written.
        ValueError: a NaN, which JSON does not have; give None for a missing figure.
    """
    path, report = Path(path), about | {"results": list(results)}
    json.dumps(report, allow_nan=False)  # on every process
    if not parallel.is_main():
        return report
    earlier = [one for one in read_results(path) if settings_of(one) != settings_of(json.loads(json.dumps(report)))]
    content = {"command": shlex.join(sys.argv)} | report | ({"earlier": earlier} if earlier else {})
    text = json.dumps(content, indent=2) + "\n"
    with parallel.refusing(f"--output_dir {path.parent}", "choose a folder you can write to"):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.mark_output(path)
        atomic.write_text(path, text)
    return report


def read_results(path: Path) -> list[dict]:
    """The reports in a file of `write_results`, the newest first; [] if there is none that can be read."""
    try:
        newest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(newest, dict):
        return []
    earlier = newest.pop("earlier", [])
    return [newest, *(one for one in earlier if isinstance(one, dict))] if isinstance(earlier, list) else [newest]


def settings_of(report: Mapping) -> dict:
    """What tells a report from another: weights, data and settings, which are plain values or lists of them."""
    def plain(value: object) -> bool:
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or isinstance(value, str | int | float)

    return {k: v for k, v in report.items() if k not in ("command", "notes", "results") and plain(v)}
