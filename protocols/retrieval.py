"""Image retrieval: rankings, their average precision, and pooling and whitening of the features that are ranked.

Ties rank in the order of their rows: by database image for one query; by query, then database image, where all scores
are in one ranking. Ranks count from 0.

Shapes: Q queries, M database images, R relevant images of a query, P relevant pairs, N images, D width, B images per
batch, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parallel import Refused

# ---- Rankings ----


def similarities(queries: Tensor, database: Tensor) -> np.ndarray:
    """Cosine similarities of (Q, D) and (M, D) features: (Q, M) float64.

    Rounded to 1e-9, so that copies of one image tie even if a blocked matrix product rounded them differently.
    """
    x, y = (torch.nn.functional.normalize(f.double(), dim=1) for f in (queries, database))
    return (x @ y.T).numpy().round(9)


def ranking(scores: np.ndarray) -> np.ndarray:
    """(..., M) scores -> (..., M) rows of the database, the highest score first."""
    return np.argsort(-scores, axis=-1, kind="stable")


def relevant_ranks(ranked: np.ndarray, relevant: Sequence[int], junk: Sequence[int] = ()) -> np.ndarray:
    """(R,) ranks of the relevant rows in (M,) `ranked`, ascending, after removing the junk rows."""
    kept = ranked[~np.isin(ranked, junk)]
    return np.flatnonzero(np.isin(kept, relevant))


# ---- One query ----


def average_precision(ranks: np.ndarray) -> float:
    """Mean over the R relevant images of the precision at each one's rank, given the output of `relevant_ranks`."""
    return float(np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1)))


def average_precision_trapezoid(ranks: np.ndarray, n_relevant: int | None = None) -> float:
    """Area under precision over recall by the trapezoid rule, as Oxford's own code computes it (Philbin et al. 2007).

    Relevant image number j, at rank r, contributes (p + p') / 2R, where p = j / r is the precision just before it (1 at
    r = 0) and p' = (j + 1) / (r + 1) the precision including it.

    Args:
        ranks: of the relevant images that were retrieved, ascending.
        n_relevant: R; by default all of them were retrieved.
    """
    ranks = np.asarray(ranks, np.int64)
    j = np.arange(len(ranks))
    before = np.where(ranks > 0, j / np.maximum(ranks, 1), 1.0)
    return float(((before + (j + 1) / (ranks + 1)) / 2).sum() / (n_relevant or len(ranks)))


def precision_at(ranks: np.ndarray, k: int) -> float:
    """Share of relevant images among the first k, or up to the last relevant one if that comes earlier."""
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
    """Average precision of all Q M pairs in one ranking, as in challenges of copy detection (Douze et al. 2021).

    Queries without a relevant image are included: their scores should be low.
    """
    return average_precision(positives_among_all(scores, relevant)[0])


def micro_interval(
    scores: np.ndarray, relevant: np.ndarray, n: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of `micro_average_precision` from `n` resamples of the queries, with all their pairs.

    A query drawn twice contributes its pairs twice, at equal scores. Resamples without a relevant pair have no
    precision and are left out; None if no other is left.
    """
    n_queries = len(scores)
    ranks, queries = positives_among_all(scores, relevant)
    if not len(ranks):
        return None
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n_queries, np.full(n_queries, 1 / n_queries), n).astype(np.float64)  # (n, Q): counts
    # Between two relevant pairs only the number of pairs of each query matters, so sorting once is enough.
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

    p = 1 is the mean; a large p approaches the maximum. Values are clamped to `smallest`, because powers need x > 0.
    """
    return patch_tokens.float().clamp(min=smallest).pow(p).mean(dim=(1, 2)).pow(1 / p)


class Whitening(NamedTuple):
    mean: Tensor  # (D,)
    transform: Tensor  # (D, d), d <= D
    on_sphere: bool  # features are normalized before the mean is subtracted


def fit_whitening(features: Tensor, regularizer: float = 1e-3) -> Whitening:
    """PCA whitening of (N, D) features on the unit sphere: (x - mean) V / sqrt(variance), V the principal directions.

    Args:
        regularizer: added to each variance, as a share of their mean, so that directions of little variance are not
            amplified. Directions without variance are left out: N features span at most N - 1.

    Raises:
        Refused: fewer than two different features.
    """
    x = torch.nn.functional.normalize(features.double(), dim=1)
    mean = x.mean(0)
    variances, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    varies = variances > 1e-10 * variances[-1].clamp(min=1e-10)
    if len(x) < 2 or not varies.any():
        raise Refused(f"--whitening_path: {len(x)} feature(s), all equal, give no whitening; give more images")
    variances, directions = variances[varies], directions[:, varies]
    scale = (variances + regularizer * variances.mean()).rsqrt()
    return Whitening(mean, directions * scale, on_sphere=True)


def fit_published_whitening(features: Tensor, floor: float = 1e-5) -> Whitening:
    """Whitening of (N, D) features as the published script computes it: (x - mean) V / sqrt(eigenvalues).

    V and the eigenvalues are those of the second moment x^T x / N, which is not centred, of features that are not
    normalized. The first direction is therefore near the mean, whose square its eigenvalue contains.

    Args:
        floor: smallest eigenvalue, as a share of the largest; no direction is left out.

    Raises:
        Refused: all features are 0.
    """
    x = features.double()
    eigenvalues, directions = torch.linalg.eigh(x.T @ x / len(x))
    if not eigenvalues[-1] > 0:
        raise Refused(f"--whitening_path: {len(x)} feature(s), all of them 0, give no whitening; give other images")
    return Whitening(x.mean(0), directions * eigenvalues.clamp(min=floor * eigenvalues[-1]).rsqrt(), on_sphere=False)


def whiten(features: Tensor, whitening: Whitening) -> Tensor:
    """(N, D) -> (N, d) float64, not normalized."""
    x = features.double()
    if whitening.on_sphere:
        x = torch.nn.functional.normalize(x, dim=1)
    return (x - whitening.mean) @ whitening.transform
