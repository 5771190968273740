"""Hierarchical k-means with resampling (Vo et al. 2024, arXiv 2405.15613, section 3).

k-means puts most of its centroids where most of the points are. The centroids are nevertheless spread more evenly than
the points, so clusters of the centroids, and clusters of those, come ever closer to an even covering of what the data
contain. Resampling brings each level closer still: it repeats k-means on the few points next to each centroid, of which
there are equally many in dense and in sparse regions.

Everything is a function of the points and the seed; blocks have a size that no flag changes.

Shapes: N points, K clusters, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from protocols.knn import COLUMNS, GROUP, ROWS, nearest
from protocols.progress import progress

SAMPLE, FEWEST = 16, 4096  # points per centroid, at least, that k-means++ chooses the first centroids from
BLOCK = 8192  # points that are summed at a time, in float64


class Clusters(NamedTuple):
    centroids: Tensor  # (K, D) float32
    labels: Tensor  # (N,) int64, the cluster of each point; every cluster has one


# ---- k-means ----


def assign(points: Tensor, centroids: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """(N,) number of the nearest centroid, ties by number; exhaustive, see `knn.nearest`."""
    rows = max(ROWS, ROWS * COLUMNS // (len(centroids) + GROUP))  # in less memory than `nearest` takes by default
    return nearest(points, centroids, 1, "l2", device=device, rows=min(rows, COLUMNS), what="")[1][:, 0]


def squared_distances(points: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """(N,) float64, |x - centroid of x|^2."""
    parts = zip(points.split(BLOCK), labels.split(BLOCK), strict=True)
    return torch.cat([(x.double() - centroids[c].double()).square().sum(1) for x, c in parts])


def means(points: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(K, D) float64 mean and (K,) number of each cluster's points; an empty cluster's mean is 0."""
    sums = torch.zeros(k, points.shape[1], dtype=torch.float64)
    for x, c in zip(points.split(BLOCK), labels.split(BLOCK), strict=True):
        sums.index_add_(0, c, x.double())
    counts = torch.bincount(labels, minlength=k)
    return sums / counts.clamp(min=1)[:, None], counts


def kmeans(
    points: Tensor, centroids: Tensor, iterations: int, device: torch.device | str = "cpu"
) -> tuple[Clusters, list[float]]:
    """Lloyd's algorithm from the given centroids, until no point moves or `iterations` are done.

    A cluster that has lost all points gets the point that is farthest from its centroid. Clusters that are empty at the
    end, of more centroids than different points, are dropped.

    Returns:
        the clusters, and the inertia, the sum of squared distances, of each iteration's assignment; it never rises.
    """
    labels, inertias = assign(points, centroids, device), []
    for _ in range(iterations):
        new, counts = means(points, labels, len(centroids))
        empty = (counts == 0).nonzero().squeeze(1)
        distances = squared_distances(points, centroids, labels)
        inertias.append(float(distances.sum()))
        if len(empty):
            farthest = distances.sort(descending=True, stable=True)[1][: len(empty)]
            new[empty] = points[farthest].double()
        centroids, before = new.to(centroids.dtype), labels
        labels = assign(points, centroids, device)
        if torch.equal(labels, before):
            break
    inertias.append(float(squared_distances(points, centroids, labels).sum()))
    used, labels = labels.unique(return_inverse=True)
    return Clusters(centroids[used], labels), inertias


def first_centroids(points: Tensor, k: int, rng: np.random.Generator) -> Tensor:
    """(k, D) k-means++ (Arthur and Vassilvitskii 2007): points drawn in proportion to their squared distance from the
    nearest one drawn before. Of more than SAMPLE k points, a random sample is considered."""
    sample = rng.permutation(len(points))[: max(FEWEST, SAMPLE * k)]
    x = points.float() if len(sample) == len(points) else points[np.sort(sample)].float()  # without a copy of all
    chosen, squares = [int(rng.integers(len(x)))], torch.cat([part.square().sum(1) for part in x.split(BLOCK)])
    closest = torch.full((len(x),), torch.inf)
    for _ in range(k - 1):
        last = x[chosen[-1]]
        closest = torch.minimum(closest, (squares + last.square().sum() - 2 * (x @ last)).clamp(min=0))
        closest[chosen[-1]] = 0
        sums = closest.double().cumsum(0)
        at = int(torch.searchsorted(sums, rng.random() * sums[-1], right=True)) if sums[-1] > 0 else len(chosen)
        chosen.append(min(at, len(x) - 1))
    return x[chosen]


# ---- Resampling and levels ----


def closest_members(clusters: Clusters, distances: Tensor, r: int) -> Tensor:
    """Numbers of the r points of each cluster that are nearest to its centroid, ascending; all of a smaller cluster."""
    order = np.lexsort((distances.numpy(), clusters.labels.numpy()))  # by cluster, then distance, then number
    labels = clusters.labels.numpy()[order]
    rank = np.arange(len(order)) - np.searchsorted(labels, labels)  # within the cluster
    return torch.from_numpy(np.sort(order[rank < r]))


def resampled_kmeans(
    points: Tensor, k: int, iterations: int, steps: int, rng: np.random.Generator, device: torch.device | str = "cpu",
) -> Clusters:
    """k-means, then `steps` times: k-means of the r points nearest to each centroid, whose centroids are used further.

    In the end all points go to their nearest centroid. r is half the mean size of a cluster.
    """
    clusters, _ = kmeans(points, first_centroids(points, k, rng), iterations, device)
    r = max(1, round(len(points) / k / 2))
    for _ in range(steps):
        distances = squared_distances(points, clusters.centroids, clusters.labels)
        sample = points[closest_members(clusters, distances, r)]
        if len(sample) < k:  # of fewer than k different points
            break
        centroids = kmeans(sample, first_centroids(sample, k, rng), iterations, device)[0].centroids
        used, labels = assign(points, centroids, device).unique(return_inverse=True)
        clusters = Clusters(centroids[used], labels)
    return clusters


def hierarchy(
    features: Tensor, sizes: Sequence[int], iterations: int = 50, resampling_steps: int = 10, seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Clusters]:
    """Clusters of the features, scaled to length 1, then of their centroids, and so on: one level per size.

    Args:
        sizes: number of clusters per level, from the finest, falling. The first level is plain k-means; the others are
            resampled.

    Returns:
        from the finest to the coarsest; the points of a level are the clusters of the level before.
    """
    rng, levels = np.random.default_rng(seed), []
    points = torch.nn.functional.normalize(features.float(), dim=1)
    for number, k in enumerate(progress(sizes, len(sizes), "levels of clusters")):
        steps = resampling_steps if number else 0
        levels.append(resampled_kmeans(points, min(k, len(points)), iterations, steps, rng, device))
        points = levels[-1].centroids
    return levels


def default_sizes(n: int) -> list[int]:
    """Four levels for n images: ten images per cluster of the first level, three clusters per cluster above it."""
    return [max(1, n // 10 // 3**level) for level in range(4)]
