"""Duplicates: groups against a naive union-find, pairs against a double loop, equal files, the image that is kept."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from imagesets import shapes
from imagesets.decode import PLAIN
from imagesets.joined import Joined
from imagesets.sources import open_images
from parallel import Refused
from protocols import duplicates, neighbours


def union_find(n, pairs):
    """Groups of n images, one pair at a time, without ranks or path compression: the first member of each."""
    parent = list(range(n))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for i, j in pairs:
        a, b = root(int(i)), root(int(j))
        parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(n)]


def loop_pairs(x, threshold):
    unit = [row / np.sqrt(row @ row) for row in x.double().numpy()]
    return {(i, j) for i in range(len(unit)) for j in range(i + 1, len(unit)) if unit[i] @ unit[j] >= threshold}


def clumped(n, width, seed=0, spread=0.7):
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(n // 4 + 1, width, generator=g)
    return centers[torch.arange(n) // 4] + spread * torch.randn(n, width, generator=g)


@pytest.mark.parametrize("n, pairs", [(1, 0), (30, 0), (30, 12), (200, 90), (200, 400), (50, 3000)])
def test_groups_are_those_of_union_find(n, pairs, monkeypatch):
    rng = np.random.default_rng(n + pairs)
    drawn = rng.integers(n, size=(pairs, 2))
    expected = union_find(n, drawn)
    assert duplicates.join(n, [drawn]).tolist() == expected
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 7)  # joined again and again
    assert duplicates.join(n, np.array_split(drawn, 9)).tolist() == expected


@pytest.mark.parametrize("engine", ["exact", "faiss"])
@pytest.mark.parametrize("rows, columns", [(512, 65_536), (64, 64), (7, 13), (1, 1000)])
def test_similar_pairs_are_those_of_a_double_loop(engine, rows, columns):
    if engine == "faiss":
        pytest.importorskip("faiss")
    x = clumped(150, 12)
    blocks = list(neighbours.similar_pairs(x, 0.7, engine, rows=rows, columns=columns))
    pairs = [tuple(pair) for block in blocks for pair in block.tolist()]
    assert len(pairs) == len(set(pairs)) and set(pairs) == loop_pairs(x, 0.7) and len(pairs) > 20
    assert duplicates.near_groups(x, 0.7, engine).tolist() == union_find(150, sorted(loop_pairs(x, 0.7)))


def test_all_images_alike_are_one_group_in_little_memory(monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 100)
    x = torch.ones(300, 4)
    assert not duplicates.near_groups(x, 0.99).any()
    assert max(len(block) for block in neighbours.similar_pairs(x, 0.99)) <= neighbours.ROWS * 300


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_nearest_rows_are_those_of_a_sort(engine):
    if engine == "faiss":
        pytest.importorskip("faiss")
    bank, queries = clumped(400, 10, 1), clumped(30, 10, 2)
    bank[7] = bank[3]  # a tie: by row
    queries[0] = bank[3]
    cosines, rows = neighbours.nearest_rows(queries, bank, 5, engine)
    x, y = (z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1, keepdims=True) for z in (queries, bank))
    expected = np.argsort(-(x @ y.T).round(7), axis=1, kind="stable")[:, :5]
    assert rows.tolist() == expected.tolist()
    np.testing.assert_allclose(cosines, np.take_along_axis(x @ y.T, expected, 1), atol=2e-6)
    assert neighbours.nearest_rows(queries, bank[:3], 5, engine)[1].shape == (30, 3)


def test_features_that_are_not_finite_are_refused():
    x = torch.ones(4, 3)
    x[2, 1] = torch.nan
    with pytest.raises(Refused, match="not finite"):
        list(neighbours.similar_pairs(x, 0.5))


def test_engines(monkeypatch):
    cpu = torch.device("cpu")
    assert neighbours.pick_engine("exact", cpu) == "exact"
    with pytest.raises(Refused, match="--search faiss.*--search exact"):
        neighbours.pick_engine("faiss", torch.device("cuda"))
    assert neighbours.pick_engine("auto", torch.device("cuda")) == "exact"
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)  # not installed
    assert neighbours.pick_engine("auto", cpu) == "exact"
    with pytest.raises(Refused, match="--search faiss.*pip install faiss-cpu"):
        neighbours.pick_engine("faiss", cpu)


# ---- Files ----


@pytest.fixture
def pile(tmp_path):
    """Folders of images: 0 and 3 are equal files, 1 and 2 are of one size in bytes and differ, 4 is larger."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for i in range(3):
        Image.fromarray(shapes.draw(i, 24)[0]).save(tmp_path / "a" / f"{i}.bmp")
    (tmp_path / "b" / "0.bmp").write_bytes((tmp_path / "a" / "0.bmp").read_bytes())
    Image.fromarray(shapes.draw(1, 24)[0]).resize((48, 48)).save(tmp_path / "b" / "1.bmp")
    return Joined([open_images(tmp_path / name) for name in ("a", "b")])


def test_equal_files_are_found(pile):
    assert duplicates.exact_groups(pile).tolist() == [0, 1, 2, 0, 4]


def test_files_that_equal_images_in_a_shard_are_found(pile, tmp_path):
    """Whatever their size: 2 and 4 have sizes that no other file has, and are in the shard."""
    (tmp_path / "a" / "2.bmp").write_bytes((tmp_path / "a" / "2.bmp").read_bytes() + b"end")
    with tarfile.open(tmp_path / "x-000.tar", "w") as shard:
        shard.add(tmp_path / "b" / "1.bmp", "0.bmp")
        shard.add(tmp_path / "a" / "2.bmp", "1.bmp")
    images = Joined([*pile.parts, open_images(tmp_path / "x-000.tar")])
    assert duplicates.exact_groups(images).tolist() == [0, 1, 2, 0, 4, 4, 2]


def test_equal_drawn_images_are_found():
    images = Joined([open_images("shapes:3x16"), open_images("shapes:4x16"), open_images("shapes:2x17")])
    assert duplicates.exact_groups(images).tolist() == [0, 1, 2, 0, 1, 2, 6, 7, 8]


def test_the_largest_image_is_kept(pile):
    among = np.arange(5)
    assert duplicates.largest(pile, np.array([0, 1, 2, 0, 1]), among) == {0: 0, 1: 4}
    assert duplicates.largest(pile, np.array([0, 0, 0, 0, 0]), among) == {0: 4}
    assert duplicates.largest(pile, np.array([0, 0, 0, 0, 0]), np.array([1, 2, 3])) == {0: 1}
    assert duplicates.largest(pile, among, among) == {}
    assert duplicates.pixels(Joined([open_images("shapes:1x20", **PLAIN.decoding())]), 0) == 400


# ---- The curve ----


def test_precision_and_recall_against_loops():
    x, source = clumped(40, 6, spread=0.9), np.repeat(np.arange(10), 4)
    source[5] = source[6] = -1  # images without duplicates
    for row in duplicates.threshold_curve(x, source, [0.95, 0.8, 0.5, 1.0]):
        pairs = loop_pairs(x, row["threshold"])
        group = union_find(40, sorted(pairs))
        joint = {(i, j) for i in range(40) for j in range(i + 1, 40) if group[i] == group[j]}
        true = {(i, j) for i in range(40) for j in range(i + 1, 40) if source[i] == source[j] >= 0}
        assert row["pairs"] == len(pairs) and row["kept"] == len(set(group))
        for name, chosen in (("", pairs), ("group_", joint)):
            assert row[f"{name}recall"] == pytest.approx(100 * len(chosen & true) / len(true))
            expected = 100 * len(chosen & true) / len(chosen) if chosen else None
            assert row[f"{name}precision"] == (expected if expected is None else pytest.approx(expected))


def test_average_precision_is_that_of_scikit_learn():
    from sklearn.metrics import average_precision_score

    x, source = clumped(60, 6, spread=0.9), np.repeat(np.arange(15), 4)
    source[5] = source[6] = -1
    one, other = np.triu_indices(60, 1)
    unit = torch.nn.functional.normalize(x, dim=1)
    right = (source[one] == source[other]) & (source[one] >= 0)
    area, (low, high) = duplicates.average_precision(x, source)
    assert area == pytest.approx(100 * average_precision_score(right, (unit[one] * unit[other]).sum(1)), abs=1e-4)
    assert 0 < low < area < high < 100
    assert duplicates.average_precision(x, source)[1] == [low, high]
    assert duplicates.average_precision(torch.eye(4)[[0, 0, 1, 1]], np.array([0, 0, 1, 1])) == (100, [100, 100])


@pytest.mark.parametrize("engine", ["exact", "faiss"])
@pytest.mark.parametrize("x", [torch.eye(8), *(torch.randn(100, width, generator=torch.Generator().manual_seed(width))
                                               for width in (7, 384, 3072))], ids=lambda x: f"{x.shape[1]}")
def test_a_cosine_at_the_threshold_counts(x, engine):
    """That of two copies is below 1 by rounding, for most directions."""
    if engine == "faiss":
        pytest.importorskip("faiss")
    n = len(x)
    pairs = np.concatenate(list(neighbours.similar_pairs(torch.cat([x, x]), 1.0, engine)))
    assert sorted(map(tuple, pairs.tolist())) == [(i, i + n) for i in range(n)]
