"""Image retrieval: rankings and what they are worth, and the pooling and whitening of the features that are ranked.

Equal scores rank in the order of their rows: database images for one query; queries, then database images, where all
scores are in one ranking. Ranks count from 0.

Shapes: Q queries, M database images, R relevant images of a query, P relevant pairs, N images, D width, B images a
batch, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# ---- Rankings ----


def similarities(queries: Tensor, database: Tensor) -> np.ndarray:
    """Cosines of (Q, D) and (M, D) features: (Q, M) float64.

    Rounded to 1e-9: copies of one picture tie, in whatever block of the product each was computed.
    """
    x, y = (torch.nn.functional.normalize(f.double(), dim=1) for f in (queries, database))
    return (x @ y.T).numpy().round(9)


def ranking(scores: np.ndarray) -> np.ndarray:
    """(..., M) scores -> (..., M) rows of the database, the highest score first."""
    return np.argsort(-scores, axis=-1, kind="stable")


def relevant_ranks(ranked: np.ndarray, relevant: Sequence[int], junk: Sequence[int] = ()) -> np.ndarray:
    """(R,) ranks of the relevant rows in (M,) `ranked`, ascending, once the junk rows are taken out of it."""
    kept = ranked[~np.isin(ranked, junk)]
    return np.flatnonzero(np.isin(kept, relevant))


# ---- One query ----


def average_precision(ranks: np.ndarray) -> float:
    """Mean over the R relevant images of the precision at each one's rank; `ranks` as `relevant_ranks` gives them."""
    return float(np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1)))


def average_precision_trapezoid(ranks: np.ndarray) -> float:
    """Area under precision over recall by the trapezoid rule, as Oxford's evaluation has it (Philbin et al. 2007).

    A relevant image, number j at rank r, adds (p + p') / 2R: p is the precision just before it, j / r (1 at r = 0),
    and p' the precision with it, (j + 1) / (r + 1).
    """
    j = np.arange(len(ranks))
    before = np.where(ranks > 0, j / np.maximum(ranks, 1), 1.0)
    return float(np.mean((before + (j + 1) / (ranks + 1)) / 2))


def precision_at(ranks: np.ndarray, k: int) -> float:
    """Share of relevant images among the first k, or up to the last relevant one where that comes earlier."""
    k = min(k, int(ranks.max()) + 1)
    return float((ranks < k).sum() / k)


# ---- All queries in one ranking ----


def positives_among_all(scores: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The P relevant pairs in the ranking of all Q M scores: (P,) ranks and (P,) queries, best first.

    Args:
        scores: (Q, M).
        relevant: (Q, M) bool.
    """
    order = ranking(scores.ravel())
    ranks = np.flatnonzero(relevant.ravel()[order])
    return ranks, order[ranks] // scores.shape[1]


def micro_average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Average precision of all Q M pairs in one ranking, as challenges of copy detection have it (Douze et al. 2021).

    Queries without a relevant image take part: their scores should be low.
    """
    return average_precision(positives_among_all(scores, relevant)[0])


def micro_interval(
    scores: np.ndarray, relevant: np.ndarray, n: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of `micro_average_precision` from `n` resamples of the queries, each with all its pairs.

    A query drawn twice has its pairs twice, at equal scores. A resample without a relevant pair has no precision and
    is left out; None where all are.
    """
    n_queries = len(scores)
    ranks, queries = positives_among_all(scores, relevant)
    if not len(ranks):
        return None
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n_queries, np.full(n_queries, 1 / n_queries), n).astype(np.float64)  # (n, Q): how often
    # Between one relevant pair and the next, only the number of pairs of each query counts: sorting once is enough.
    order = ranking(scores.ravel())[: ranks[-1] + 1]
    segment = np.searchsorted(ranks, np.arange(len(order)))
    pairs = np.bincount(segment * n_queries + order // scores.shape[1], minlength=len(ranks) * n_queries)
    above = np.cumsum(drawn @ pairs.reshape(len(ranks), n_queries).T, axis=1)  # (n, P): pairs down to each relevant one
    weights = drawn[:, queries]
    precision = np.cumsum(weights, axis=1) / np.maximum(above, 1)
    total = weights.sum(axis=1)
    values = (weights * precision).sum(axis=1)[total > 0] / total[total > 0]
    return tuple(np.percentile(values, [2.5, 97.5]).tolist()) if len(values) else None


# ---- Features ----


def gem(patch_tokens: Tensor, p: float = 4.0, smallest: float = 1e-6) -> Tensor:
    """Generalized mean over patches (Radenovic et al. 2018): (B, h, w, D) -> (B, D), (mean x^p)^(1/p).

    p = 1 is the mean, a large p nears the maximum. Values below `smallest` count as that: powers want x > 0.
    """
    return patch_tokens.float().clamp(min=smallest).pow(p).mean(dim=(1, 2)).pow(1 / p)


class Whitening(NamedTuple):
    mean: Tensor  # (D,)
    transform: Tensor  # (D, d), d <= D


def fit_whitening(features: Tensor, regularizer: float = 1e-3) -> Whitening:
    """PCA whitening learned from (N, D) features, taken on the unit sphere: centred, of equal variance everywhere.

    Args:
        regularizer: added to each variance, as a share of their mean, so that directions in which the features
            hardly vary are not blown up. Directions in which they do not vary at all are left out: N features have
            N - 1 directions at most.

    Raises:
        ValueError: fewer than two different features.
    """
    x = torch.nn.functional.normalize(features.double(), dim=1)
    mean = x.mean(0)
    variances, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    varies = variances > 1e-10 * variances[-1].clamp(min=1e-10)
    if len(x) < 2 or not varies.any():
        raise ValueError(f"--distractors: {len(x)} feature(s), all alike, give no whitening; give more pictures")
    variances, directions = variances[varies], directions[:, varies]
    scale = (variances + regularizer * variances.mean()).rsqrt()
    return Whitening(mean, directions * scale)


def whiten(features: Tensor, whitening: Whitening) -> Tensor:
    """(N, D) -> (N, d) float32 on the unit sphere."""
    x = torch.nn.functional.normalize(features.double(), dim=1)
    return torch.nn.functional.normalize((x - whitening.mean) @ whitening.transform, dim=1).float()
