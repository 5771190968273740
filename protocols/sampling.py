"""Balanced sampling from a hierarchy of clusters, from the top down (Vo et al. 2024, arXiv 2405.15613, section 3).

Shapes: N images, K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocols.clustering import Clusters


def allot(sizes: np.ndarray, total: int, priority: np.ndarray) -> np.ndarray:
    """(K,) images to take of each cluster: min(n, size) with the largest n for which they are at most `total`.

    What is left of `total`, less than one image per cluster, goes to the clusters that have more than n images, one
    each, by ascending priority. A total of more than all images means all.

    Args:
        sizes: (K,) images per cluster. priority: (K,), all different.
    """
    ascending = np.sort(sizes)
    # With n = ascending[i], clusters up to i give all they have and the others n each.
    taken = np.cumsum(ascending) + ascending * np.arange(len(sizes) - 1, -1, -1)
    i = int(np.searchsorted(taken, total, "right"))
    if i == len(sizes):
        return sizes.copy()
    below = int(ascending[:i].sum())
    n, rest = divmod(total - below, len(sizes) - i)
    allotted = np.minimum(sizes, n)
    larger = np.flatnonzero(sizes > n)
    allotted[larger[np.argsort(priority[larger])[:rest]]] += 1
    return allotted


def balanced_sample(levels: Sequence[Clusters], total: int, seed: int = 0) -> np.ndarray:
    """Numbers of `total` images, ascending; all images if there are fewer.

    At the top level each cluster is allotted equally many images, as far as it has them (`allot`); each cluster's
    images are allotted to the clusters below it in the same way; of a cluster of the finest level, images are drawn at
    random.

    Args:
        levels: from the finest to the coarsest (`clustering.hierarchy`).
        seed: draws one order of the images and of each level's clusters, by which they are taken.
    """
    rng = np.random.default_rng(seed)
    parents = [level.labels.numpy() for level in levels]
    orders = [rng.permutation(len(labels)) for labels in (*parents, levels[-1].centroids)]
    sizes = [np.ones(len(parents[0]), np.int64)]  # images below each image, cluster of the first level, ...
    for labels in parents:
        sizes.append(np.bincount(labels, weights=sizes[-1]).astype(np.int64))
    allotted = allot(sizes[-1], total, orders[-1])
    for labels, size, order in reversed(list(zip(parents, sizes[:-1], orders[:-1], strict=True))):
        below = np.zeros(len(size), np.int64)
        children = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
        for members, share in zip(children, allotted, strict=True):
            below[members] = allot(size[members], int(share), order[members])
        allotted = below
    return np.flatnonzero(allotted)


def draw_from_clusters(labels: np.ndarray, votes: np.ndarray, per_cluster: int, fewest: int, seed: int) -> np.ndarray:
    """Numbers of the images drawn from each cluster with enough votes, ascending (DINOv2, arXiv 2304.07193, section 3).

    Args:
        labels: (N,) cluster of each image of the pile. votes: clusters of the trusted images.
        per_cluster: images per cluster; all of a smaller one. fewest: votes a cluster needs.
    """
    chosen = np.flatnonzero(np.bincount(votes) >= max(1, fewest))
    order = np.random.default_rng(seed).permutation(len(labels))
    drawn = [order[labels[order] == c][:per_cluster] for c in chosen]
    return np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, np.int64)
