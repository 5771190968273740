"""Measures of retrieval: against loops written from the definitions, scikit-learn, and cases computed by hand."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score

from protocols import retrieval


def walk(scores, relevant, junk=()):
    """(rank, is relevant) of one query's images from the best on, junk passed over; equal scores in order of rows."""
    order = sorted(range(len(scores)), key=lambda m: (-scores[m], m))
    return [(rank, m in relevant) for rank, m in enumerate(m for m in order if m not in junk)]


def oracle_ap(scores, relevant, junk=()):
    """Area under precision over recall as a staircase."""
    hits, area = 0, 0.0
    for rank, right in walk(scores, relevant, junk):
        if right:
            hits += 1
            area += hits / (rank + 1) * (1 / len(relevant))
    return area


def oracle_trapezoid(scores, relevant, junk=()):
    """The same with straight lines: recall and precision after every image, from (0, 1) on."""
    hits, area, recall, precision = 0, 0.0, 0.0, 1.0
    for rank, right in walk(scores, relevant, junk):
        hits += right
        new_recall, new_precision = hits / len(relevant), hits / (rank + 1)
        area += (new_recall - recall) * (precision + new_precision) / 2
        recall, precision = new_recall, new_precision
    return area


def oracle_precision_at(scores, relevant, k, junk=()):
    images = walk(scores, relevant, junk)
    last = max(rank for rank, right in images if right) + 1
    k = min(k, last)
    return sum(right for rank, right in images if rank < k) / k


def random_query(rng, levels=None):
    m = int(rng.integers(3, 40))
    scores = rng.standard_normal(m) if levels is None else rng.integers(levels, size=m) / 4
    rows = rng.permutation(m)
    r = int(rng.integers(1, m))
    return scores, set(rows[:r].tolist()), set(rows[r : r + int(rng.integers(0, m - r + 1))].tolist())


@pytest.mark.parametrize("levels", [None, 3])  # 3: most scores are equal
def test_measures_of_one_query(levels):
    rng = np.random.default_rng(0)
    for _ in range(300):
        scores, relevant, junk = random_query(rng, levels)
        ranks = retrieval.relevant_ranks(retrieval.ranking(scores), list(relevant), list(junk))
        assert retrieval.average_precision(ranks) == pytest.approx(oracle_ap(scores, relevant, junk))
        assert retrieval.average_precision_trapezoid(ranks) == pytest.approx(oracle_trapezoid(scores, relevant, junk))
        for k in (1, 5, 10):
            assert retrieval.precision_at(ranks, k) == pytest.approx(oracle_precision_at(scores, relevant, k, junk))


def test_by_hand():
    # rows from the best on: 3 (relevant), 0, 1 (junk), 2 (relevant)
    ranks = retrieval.relevant_ranks(retrieval.ranking(np.array([0.8, 0.7, 0.1, 0.9])), [2, 3], [1])
    assert ranks.tolist() == [0, 2]
    assert retrieval.average_precision(ranks) == pytest.approx((1 + 2 / 3) / 2)
    assert retrieval.average_precision_trapezoid(ranks) == pytest.approx(((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    assert [retrieval.precision_at(ranks, k) for k in (1, 2, 3, 10)] == pytest.approx([1, 1 / 2, 2 / 3, 2 / 3])


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(1)
    for _ in range(50):
        scores, relevant, _ = random_query(rng)
        ranks = retrieval.relevant_ranks(retrieval.ranking(scores), list(relevant))
        truth = [m in relevant for m in range(len(scores))]
        assert retrieval.average_precision(ranks) == pytest.approx(average_precision_score(truth, scores))


# ---- All queries in one ranking ----


def oracle_micro(scores, relevant, times=None):
    """All pairs by their scores; a query counts `times`, and its copies stand at one place."""
    q, m = scores.shape
    times = [1] * q if times is None else times
    pairs = sorted((-scores[i, j], i, j) for i in range(q) for j in range(m))
    total = sum(times[i] * relevant[i, j] for i in range(q) for j in range(m))
    seen = hits = area = 0
    for _, i, j in pairs:
        seen += times[i]
        if relevant[i, j]:
            hits += times[i]
            area += times[i] * hits / max(seen, 1)
    return area / total if total else None


def pairs(seed=0, q=9, m=12, levels=None):
    rng = np.random.default_rng(seed)
    relevant = rng.random((q, m)) < 0.15
    relevant[:2] = False  # queries without a match
    scores = rng.standard_normal((q, m)) + 2 * relevant
    return (scores if levels is None else np.round(scores * levels) / levels), relevant


@pytest.mark.parametrize("levels", [None, 1])
def test_micro_average_precision(levels):
    for seed in range(20):
        scores, relevant = pairs(seed, levels=levels)
        found = retrieval.micro_average_precision(scores, relevant)
        assert found == pytest.approx(oracle_micro(scores, relevant))
        if levels is None:
            assert found == pytest.approx(average_precision_score(relevant.ravel(), scores.ravel()))


@pytest.mark.parametrize("levels", [None, 1])
def test_interval_of_micro_average_precision(levels):
    scores, relevant = pairs(3, levels=levels)
    rng = np.random.default_rng(0)
    values = []
    for _ in range(200):
        times = rng.multinomial(9, np.full(9, 1 / 9))
        value = oracle_micro(scores, relevant, times.tolist())
        if value is not None:
            values.append(value)
            if levels is None:
                weights = np.repeat(times, 12)
                assert value == pytest.approx(
                    average_precision_score(relevant.ravel(), scores.ravel(), sample_weight=weights))
    assert retrieval.micro_interval(scores, relevant, n=200) == pytest.approx(np.percentile(values, [2.5, 97.5]))


def test_intervals_of_little():
    scores, relevant = pairs()
    assert retrieval.micro_interval(scores, np.zeros_like(relevant)) is None
    assert retrieval.micro_interval(np.array([[0.5]]), np.array([[True]]), n=10) == (1, 1)
    one = np.zeros((3, 2), bool)
    one[1, 1] = True
    low, high = retrieval.micro_interval(np.arange(6.0).reshape(3, 2), one)  # many resamples have no relevant pair
    assert 0 < low < high <= 1


def test_similarities_of_copies_are_equal():
    x = torch.randn(700, 33, generator=torch.Generator().manual_seed(0))
    scores = retrieval.similarities(torch.randn(5, 33), torch.cat([x, x]))
    assert (scores[:, :700] == scores[:, 700:]).all() and scores.dtype == np.float64
    assert retrieval.ranking(scores)[:, ::2].max() < 700  # of two copies the first row comes first
    assert retrieval.similarities(2 * x[:1], x[:1]) == pytest.approx(1)
    assert (retrieval.similarities(torch.zeros(1, 33), x) == 0).all()


# ---- Features ----


@pytest.mark.parametrize("p", [1.0, 3.0, 4.0])
def test_gem(p):
    tokens = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    found = retrieval.gem(tokens, p)
    for b in range(2):
        for d in range(4):
            values = [max(tokens[b, r, c, d].item(), 1e-6) for r in range(3) for c in range(5)]
            assert found[b, d].item() == pytest.approx((sum(v**p for v in values) / 15) ** (1 / p), rel=1e-4)


def test_gem_goes_from_the_mean_to_the_maximum():
    tokens = torch.rand(1, 4, 4, 8) + 0.1
    torch.testing.assert_close(retrieval.gem(tokens, 1.0), tokens.mean((1, 2)))
    torch.testing.assert_close(retrieval.gem(tokens, 60.0), tokens.amax((1, 2)), rtol=0.06, atol=0)
    assert retrieval.gem(tokens.half(), 4.0).dtype == torch.float32


def correlated(n, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) + torch.randn(d, generator=g)


def test_whitening_is_scikit_learns():
    train, test = correlated(200, 6), correlated(20, 6, seed=1)
    whitening = retrieval.fit_whitening(train, regularizer=0)
    unit = [torch.nn.functional.normalize(x.double(), dim=1).numpy() for x in (train, test)]
    expected = PCA(whiten=True).fit(unit[0]).transform(unit[1])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = torch.nn.functional.normalize(retrieval.whiten(test, whitening), dim=1).numpy()
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)  # directions have no sign
    centred = (torch.from_numpy(unit[0]) - whitening.mean) @ whitening.transform
    torch.testing.assert_close(centred.T @ centred / 200, torch.eye(6, dtype=torch.float64))


def test_the_regularizer_holds_directions_of_little_variance_down():
    train = correlated(200, 6) * torch.tensor([1, 1, 1, 1, 1, 1e-4])
    variances = []
    for regularizer in (0.0, 1e-3):
        w = retrieval.fit_whitening(train, regularizer)
        x = (torch.nn.functional.normalize(train.double(), dim=1) - w.mean) @ w.transform
        variances.append(x.var(0, unbiased=False).sort()[0])
    assert variances[0][0] == pytest.approx(1) and variances[1][0] < 1e-2 and variances[1][-1] > 0.95


@pytest.mark.parametrize("n", [200, 4])
def test_published_whitening_against_a_loop_over_directions(n):
    train, test = correlated(n, 6).double(), correlated(20, 6, seed=1).double()
    moment = sum(np.outer(x, x) for x in train.numpy()) / n  # neither centred nor normalized
    directions, values, _ = np.linalg.svd(moment)
    expected = np.array([[(x - train.mean(0).numpy()) @ v / np.sqrt(max(value, 1e-5 * values[0]))
                          for v, value in zip(directions.T, values, strict=True)] for x in test.numpy()])
    found = retrieval.whiten(test, retrieval.fit_published_whitening(train)).numpy()
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, rtol=1e-8)
    with pytest.raises(ValueError, match="--whitening_path: .* give other images"):
        retrieval.fit_published_whitening(torch.zeros(n, 6))


def test_whitening_of_few_or_equal_features():
    whitening = retrieval.fit_whitening(correlated(5, 16))
    assert whitening.transform.shape == (16, 4)  # five points have four directions
    assert retrieval.whiten(correlated(3, 16), whitening).isfinite().all()
    for features in (torch.ones(1, 4), torch.ones(7, 4)):
        with pytest.raises(ValueError, match="give more images"):
            retrieval.fit_whitening(features)
