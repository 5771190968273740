"""Hierarchical k-means against scikit-learn and loops, and balanced sampling against a slow version of the paper's."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from protocols import clustering, sampling


def blobs(sizes, width=8, spread=0.6, seed=0):
    """Points around centres, and the number of each one's centre."""
    g = torch.Generator().manual_seed(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centers = 3 * torch.randn(len(sizes), width, generator=g)
    return centers[labels] + spread * torch.randn(len(labels), width, generator=g), labels


def loop_inertia(points, centroids):
    return sum(min(float(((x - c) ** 2).sum()) for c in centroids.double()) for x in points.double())


# ---- k-means ----


def test_inertia_falls_and_is_that_of_a_loop():
    points, _ = blobs([60, 40, 20])
    start = points[torch.randperm(120, generator=torch.Generator().manual_seed(1))[:9]]
    clusters, inertias = clustering.kmeans(points, start, 30)
    assert inertias[0] == pytest.approx(loop_inertia(points, start), rel=1e-5)
    assert inertias[-1] == pytest.approx(loop_inertia(points, clusters.centroids), rel=1e-5)
    assert all(after <= before * (1 + 1e-6) for before, after in zip(inertias, inertias[1:], strict=False))
    assert inertias[-1] < 0.8 * inertias[0]


@pytest.mark.parametrize("iterations", [1, 5, 100])
def test_scikit_learn_finds_the_same_from_the_same_start(iterations):
    points, _ = blobs([200, 100, 50, 30], spread=2.0)
    start = points[::50][:7].clone()
    clusters, inertias = clustering.kmeans(points, start, iterations)
    reference = KMeans(7, init=start.numpy(), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    reference.fit(points.numpy())
    assert inertias[-1] == pytest.approx(reference.inertia_, rel=1e-5)
    assert clusters.labels.tolist() == reference.labels_.tolist()
    np.testing.assert_allclose(clusters.centroids, reference.cluster_centers_, atol=1e-4)


def test_a_cluster_without_points_gets_the_farthest():
    points = torch.tensor([[50.0], [51.0], [52.0], [80.0], [150.0]])
    clusters, inertias = clustering.kmeans(points, torch.tensor([[50.0], [51.0], [-500.0]]), 20)
    assert len(clusters.centroids) == 3 and clusters.labels[4] != clusters.labels[3] != clusters.labels[0]
    assert all(after <= before for before, after in zip(inertias, inertias[1:], strict=False))


def test_fewer_different_points_than_clusters():
    points = torch.ones(6, 3)
    points[4:] = 2
    rng = np.random.default_rng(0)
    clusters, _ = clustering.kmeans(points, clustering.first_centroids(points, 4, rng), 10)
    assert len(clusters.centroids) == 2 and clusters.labels.unique().tolist() == [0, 1]
    assert len(clustering.resampled_kmeans(points, 4, 10, 3, rng).centroids) == 2


def test_first_centroids_are_spread():
    """k-means++ finds all of six small far blobs beside a large one, which uniform draws would miss."""
    points, labels = blobs([2000, 5, 5, 5, 5, 5, 5], spread=0.005)
    chosen = clustering.first_centroids(points, 7, np.random.default_rng(0))
    assert sorted(labels[torch.cdist(chosen, points).argmin(1)]) == list(range(7))


# ---- Resampling ----


def test_the_closest_members_are_those_of_a_loop():
    points, _ = blobs([30, 12, 3], spread=1.5)
    clusters, _ = clustering.kmeans(points, points[[0, 31, 43, 5]], 10)
    distances = clustering.squared_distances(points, clusters.centroids, clusters.labels)
    expected = []
    for c in range(len(clusters.centroids)):
        members = [i for i in range(45) if clusters.labels[i] == c]
        expected += sorted(members, key=lambda i: (float(distances[i]), i))[:4]
    assert clustering.closest_members(clusters, distances, 4).tolist() == sorted(expected)


def test_resampling_covers_a_sparse_region_better():
    """Uniform points on [0, 1] and [1, 2], ten times as dense on the first: the paper's figure in one dimension."""
    rng = np.random.default_rng(0)
    points = torch.from_numpy(np.concatenate([rng.random(4000), 1 + rng.random(400)])[:, None]).float()
    plain = clustering.resampled_kmeans(points, 60, 30, 0, np.random.default_rng(1))
    resampled = clustering.resampled_kmeans(points, 60, 30, 10, np.random.default_rng(1))
    in_sparse = [int((c.centroids > 1).sum()) for c in (plain, resampled)]
    assert in_sparse[0] < 0.4 * 60 < in_sparse[1], in_sparse


def test_levels_evens_out_what_one_level_does_not():
    points, labels = blobs([800, 80, 40, 16, 8], width=16, spread=1.0)
    levels = clustering.hierarchy(points, [94, 31, 10, 5], 30, 5)
    assert [len(level.labels) for level in levels] == [944, *(len(level.centroids) for level in levels[:-1])]
    evened = np.bincount(labels[sampling.balanced_sample(levels, 60)], minlength=5)
    flat = np.bincount(labels[sampling.balanced_sample(levels[:1], 60)], minlength=5)
    assert evened.max() < 30 < flat.max() and evened.min() >= 6 > flat.min()


def test_all_levels_but_the_finest_are_resampled():
    points, _ = blobs([100, 30, 10], spread=2.0)
    with_steps, without = (clustering.hierarchy(points, [30, 8, 3], 10, steps) for steps in (3, 0))
    same = [torch.equal(a.centroids, b.centroids) for a, b in zip(with_steps, without, strict=True)]
    assert same == [True, False, False]


def test_a_seed_is_a_result():
    points, _ = blobs([100, 30, 10])
    runs = [clustering.hierarchy(points, [14, 4, 2], 10, 2, seed) for seed in (0, 0, 1)]
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0].labels, runs[2][0].labels)
    drawn = [sampling.balanced_sample(runs[0], 20, seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_default_sizes():
    assert clustering.default_sizes(2700) == [270, 90, 30, 10]
    assert clustering.default_sizes(3) == [1, 1, 1, 1]


# ---- Balanced sampling ----


def slow_allot(sizes, total):
    """The largest n with sum min(n, size) <= total, by trying all, and what is left."""
    n = max(n for n in range(total + 1) if sum(min(n, s) for s in sizes) <= total)
    return n, total - sum(min(n, s) for s in sizes)


@pytest.mark.parametrize("seed", range(30))
def test_shares_are_the_papers(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 30, int(rng.integers(1, 12)))
    total = int(rng.integers(0, sizes.sum() + 1))
    shares = sampling.allot(sizes, total, rng.permutation(len(sizes)))
    assert shares.sum() == total and (shares <= sizes).all() and (shares >= 0).all()
    n, rest = slow_allot(sizes.tolist(), total)
    extra = shares - np.minimum(sizes, n)
    if total < sizes.sum():
        assert set(extra.tolist()) <= {0, 1} and extra.sum() == rest < max(1, (sizes > n).sum())
    else:
        assert shares.tolist() == sizes.tolist()


def test_what_is_left_goes_by_priority():
    assert sampling.allot(np.array([9, 9, 1, 9]), 12, np.array([2, 0, 1, 3])).tolist() == [4, 4, 1, 3]
    assert sampling.allot(np.array([2, 5]), 100, np.array([0, 1])).tolist() == [2, 5]


def slow_sample(parents, cluster, level, total):
    """Images of a cluster, recursively: an equal share of each child, as far as it has them, the rest to the first."""
    if level < 0:
        return [cluster]
    children = [i for i, parent in enumerate(parents[level]) if parent == cluster]
    sizes = [count_below(parents, child, level - 1) for child in children]
    n, rest = slow_allot(sizes, total)
    images = []
    for child, size in zip(children, sizes, strict=True):
        share = min(n, size)
        if rest and size > n:
            share, rest = share + 1, rest - 1
        images += slow_sample(parents, child, level - 1, share) if share else []
    return images


def count_below(parents, cluster, level):
    if level < 0:
        return 1
    return sum(count_below(parents, i, level - 1) for i, parent in enumerate(parents[level]) if parent == cluster)


@pytest.mark.parametrize("total", [1, 7, 30, 64, 150, 200])
def test_sampling_is_that_of_the_paper(total, monkeypatch):
    """With the first image or cluster first where one is to be drawn, the same images as a recursive version."""
    rng = np.random.default_rng(3)
    parents, n = [], 150
    for k in (24, 8, 3):
        parents.append(np.unique(rng.integers(k, size=n), return_inverse=True)[1])  # no empty cluster
        n = parents[-1].max() + 1
    levels = [clustering.Clusters(torch.zeros(p.max() + 1, 1), torch.from_numpy(p)) for p in parents]
    monkeypatch.setattr(np.random, "default_rng", lambda seed: type("Ordered", (), {"permutation": np.arange})())
    sampled = sampling.balanced_sample(levels, total)
    top = [np.zeros(len(levels[-1].centroids), np.int64)]  # one cluster above all
    expected = slow_sample([*parents, *top], 0, 3, min(total, 150))
    assert sampled.tolist() == sorted(expected) and len(sampled) == min(total, 150)


def test_images_are_drawn_from_clusters_with_enough_votes():
    labels, votes = np.array([0, 1, 1, 2, 2, 2, 1, 3]), np.array([1, 1, 2, 3, 3])
    drawn = sampling.draw_from_clusters(labels, votes, 2, 2, seed=0)
    assert np.bincount(labels[drawn], minlength=4).tolist() == [0, 2, 0, 1]
    assert sampling.draw_from_clusters(labels, votes, 9, 1, seed=0).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert not len(sampling.draw_from_clusters(labels, votes, 9, 5, seed=0))
