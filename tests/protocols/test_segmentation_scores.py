"""J, F and their statistics: against loops written from the protocol, and cases counted by hand."""

import math

import numpy as np
import pytest

from protocols import segmentation_scores as ss


def blobs(seed, height=23, width=31):
    """Two masks that overlap in part, and a strip that is ignored."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    made = []
    for _ in range(2):
        cy, cx, r = rng.uniform(5, 18), rng.uniform(8, 24), rng.uniform(3, 9)
        made.append((y - cy) ** 2 + 0.6 * (x - cx) ** 2 < r**2)
    return *made, (x + y) % 11 == 0


def naive_contour(mask):
    height, width = mask.shape
    found = set()
    for y in range(height):
        for x in range(width):
            for v, u in ((y, x + 1), (y + 1, x), (y + 1, x + 1)):
                if min(v, height - 1) == y and min(u, width - 1) == x:
                    continue
                if mask[y, x] != mask[min(v, height - 1), min(u, width - 1)]:
                    found.add((y, x))
    return found


def naive_f(found, truth, radius):
    a, b = naive_contour(found), naive_contour(truth)
    if not a or not b:
        return float(not a and not b)
    near = lambda p, others: any(math.dist(p, q) <= radius for q in others)  # noqa: E731
    precision, recall = sum(near(p, b) for p in a) / len(a), sum(near(p, a) for p in b) / len(b)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_measures_are_those_of_loops(seed):
    found, truth, ignored = blobs(seed)
    for a, b, given in ((found, truth, None), (found & ~ignored, truth & ~ignored, ignored)):
        pairs = list(zip(a.ravel(), b.ravel(), strict=True))
        both, either = sum(p and q for p, q in pairs), sum(p or q for p, q in pairs)
        assert ss.jaccard(found, truth, given) == pytest.approx(both / either)
        for tolerance in (1, 3, 0.05, 0.008):
            radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.sqrt(23**2 + 31**2))
            assert ss.contour_accuracy(found, truth, given, tolerance) == pytest.approx(naive_f(a, b, radius))


def test_a_contour_by_hand():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:3] = True
    assert ss.contour(mask).astype(int).tolist() == [
        [1, 1, 1, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0]]
    mask = np.zeros((3, 4), bool)
    mask[:, 2:] = True  # cut by the border: only the straight edge is a contour
    assert ss.contour(mask).astype(int).tolist() == [[0, 1, 0, 0]] * 3


def half(edge, size=100):
    """The columns left of an edge: its contour is the column edge - 1."""
    return np.broadcast_to(np.arange(size) < edge, (size, size))


def test_contours_by_hand():
    assert ss.contour_accuracy(half(20), half(20)) == 1
    assert ss.contour_accuracy(half(22), half(20)) == 1  # 0.008 x 141.4 is 1.13, so 2 pixels
    assert ss.contour_accuracy(half(23), half(20)) == 0
    two_edges = half(20) | ~half(60)  # all of the true contour is found, half of what is found is true
    assert ss.contour_accuracy(two_edges, half(20)) == pytest.approx(2 / 3)
    assert ss.contour_accuracy(half(20), two_edges) == pytest.approx(2 / 3)


def test_empty_masks():
    none, some = np.zeros((9, 9), bool), np.eye(9) > 0
    for measure in (ss.jaccard, ss.contour_accuracy):
        assert (measure(none, none), measure(some, none), measure(none, some), measure(some, some)) == (1, 0, 0, 1)
        assert measure(some, none, ignored=some) == 1
    full = ~none  # no contour, but not the same
    assert ss.contour_accuracy(full, some) == 0 and ss.jaccard(full, some) == pytest.approx(1 / 9)


def test_statistics_by_hand():
    """Eight frames: the first quarter is frames 0 to 2, the last 5 to 7."""
    assert ss.statistics([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]) == pytest.approx((0.55, 0.5, 0.5))
    assert ss.statistics([0.5]) == (0.5, 0, 0)
    assert ss.statistics([1, 0]) == (0.5, 0.5, 1)
    rising = np.arange(28) / 28  # quarters meet at 6.75, 13.5 and 20.25: 7, 14 and 20
    assert ss.statistics(rising)[2] == pytest.approx(np.mean(rising[:8]) - np.mean(rising[20:]))
    with pytest.raises(ValueError, match="no frames"):
        ss.statistics([])


# ---- Maps without a threshold


def naive_map_scores(heat, truth, ignored):
    """Energy ratio and pointing game, pixel by pixel."""
    on, total, area, pixels, hits, largest = 0.0, 0.0, 0, 0, [], -1.0
    for y in range(len(heat)):
        for x in range(len(heat[0])):
            if ignored[y, x]:
                continue
            pixels, total = pixels + 1, total + heat[y, x]
            if truth[y, x]:
                area, on = area + 1, on + heat[y, x]
            if heat[y, x] > largest:
                largest, hits = heat[y, x], []
            if heat[y, x] == largest:
                hits.append(bool(truth[y, x]))
    return (on / total) / (area / pixels), sum(hits) / len(hits)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [2, 5, 10**9])  # few levels: many equal maxima
def test_map_scores_equal_the_loop(seed, levels):
    truth, _, ignored = blobs(seed)
    heat = np.random.default_rng(seed).integers(0, levels, truth.shape) * 0.25
    for out in (ignored, np.zeros_like(ignored)):
        energy, hit = naive_map_scores(heat, truth, out)
        assert ss.energy_ratio(heat, truth, out) == pytest.approx(energy, rel=1e-12)
        assert ss.pointing(heat, truth, out) == pytest.approx(hit, rel=1e-12)


def test_map_scores_by_hand():
    truth = np.array([[True, False, False, False]])
    assert ss.energy_ratio(np.array([[0.7, 0.1, 0.1, 0.1]]), truth) == pytest.approx(2.8)  # 70 % on a quarter
    assert ss.energy_ratio(np.ones((1, 4)), truth) == ss.energy_ratio(np.zeros((1, 4)), truth) == 1
    assert ss.pointing(np.array([[0.4, 0.4, 0.1, 0.1]]), truth) == 0.5
    assert ss.pointing(np.array([[0.4, 0.5, 0.1, 0.1]]), truth, np.array([[False, True, False, False]])) == 1
    mask = np.array([[True, True, False, False]])  # of a mask both are its precision, one over the object's share
    assert ss.energy_ratio(mask, truth) == 2 and ss.pointing(mask, truth) == 0.5
