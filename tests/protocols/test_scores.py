"""Intervals against sampling theory, measures without labels against loops, tables and files."""

import json
import math

import numpy as np
import pytest
import torch

from parallel import Refused
from protocols import scores


def test_interval_of_right_and_wrong_is_the_binomials():
    low, high = scores.bootstrap_interval([1] * 700 + [0] * 300, n=20_000)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert low == pytest.approx(0.7 - half, abs=0.002) and high == pytest.approx(0.7 + half, abs=0.002)


def test_interval_is_that_of_resampling():
    x = np.random.RandomState(0).gamma(1.0, size=80)
    random = np.random.RandomState(1)
    means = [x[random.randint(80, size=80)].mean() for _ in range(5000)]
    np.testing.assert_allclose(scores.bootstrap_interval(x, n=5000), np.percentile(means, [2.5, 97.5]), atol=0.03)
    assert scores.bootstrap_interval(x) == scores.bootstrap_interval(torch.from_numpy(x)) != \
        scores.bootstrap_interval(x, seed=1)


def test_interval_of_one_score_and_of_none():
    assert scores.bootstrap_interval([0.25]) == (0.25, 0.25)
    with pytest.raises(ValueError, match="no scores"):
        scores.bootstrap_interval([])


def test_uniformity_and_alignment_are_the_papers():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(50, 6, generator=g, dtype=torch.float64), dim=1) for _ in "xy")
    pairs = [math.exp(-2 * ((a - b) ** 2).sum()) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    found = scores.label_free(3 * x, (2 * x, y))
    assert found["uniformity"]["value"] == pytest.approx(math.log(np.mean(pairs)))
    assert scores.uniformity(x, rows=7)["value"] == pytest.approx(found["uniformity"]["value"])
    distances = [((a - b) ** 2).sum().item() for a, b in zip(x, y, strict=True)]
    assert found["alignment"]["value"] == pytest.approx(np.mean(distances))
    for measure in ("uniformity", "alignment"):
        low, high = found[measure]["interval"]
        assert low < found[measure]["value"] < high


def test_interval_of_uniformity_is_as_wide_as_it_varies():
    g = torch.Generator().manual_seed(0)

    def found():  # more in one direction than in others: on an even sphere the first order vanishes
        return scores.uniformity(torch.randn(200, 8, generator=g) + torch.eye(8)[0])

    spread = np.std([found()["value"] for _ in range(60)])
    low, high = found()["interval"]
    assert high - low == pytest.approx(4 * spread, rel=0.3)


@pytest.mark.parametrize("kind", ["spread", "few", "almost all equal", "two"])
def test_interval_of_uniformity_is_that_of_resampling(kind):
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn({"few": 8, "two": 2}.get(kind, 30), 4, generator=g).double(), dim=1)
    if kind == "almost all equal":
        x[2:] = x[2]
    random, resampled = np.random.RandomState(1), []
    for _ in range(3000):
        drawn = random.randint(len(x), size=len(x))
        pairs = [(i, j) for i in drawn for j in drawn if i != j]
        if pairs:
            i, j = np.array(pairs).T
            resampled.append(math.log(np.exp(-2 * ((x[i] - x[j]) ** 2).sum(1).numpy()).mean()))
    interval = scores.uniformity(x, rows=7, n=3000)["interval"]
    np.testing.assert_allclose(interval, np.percentile(resampled, [2.5, 97.5]), atol=0.1)
    assert interval[1] <= 1e-6


def ranked_by(right, labels):
    """One draw's ranking over six classes in which exactly the images in `right` are right."""
    return torch.where(right, labels, (labels + 1) % 6)[:, None]


def test_macro_accuracy_when_all_are_right():
    labels = torch.tensor([0] * 150 + [1] * 2 + [2])
    macro = scores.accuracy([ranked_by(labels >= 0, labels)] * 3, labels, list("abcdef"))["macro"]
    assert macro == {"value": 100, "interval": [100, 100]}


@pytest.mark.parametrize("draws", [1, 3])
def test_interval_of_macro_accuracy_is_that_of_resampling_each_class(draws):
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 150 + [1] * 30 + [2] * 20)
    right = torch.rand(draws, len(labels), generator=g) < torch.tensor([0.9, 0.5, 0.5])[labels]
    macro = scores.accuracy([ranked_by(r, labels) for r in right], labels, list("abcdef"))["macro"]
    mean, random = right.double().mean(0).numpy(), np.random.RandomState(1)
    parts = [mean[labels.numpy() == c] for c in range(3)]
    resampled = [np.mean([part[random.randint(len(part), size=len(part))].mean() for part in parts])
                 for _ in range(5000)]
    assert macro["value"] == pytest.approx(100 * np.mean([part.mean() for part in parts]))
    np.testing.assert_allclose(macro["interval"], 100 * np.percentile(resampled, [2.5, 97.5]), atol=1)
    assert 0 <= macro["interval"][0] and macro["interval"][1] <= 100


@pytest.mark.parametrize("low", [0, -1])  # accuracies, Jaccard, precisions; the decay of J and F may be negative
def test_interval_in_percent_is_that_of_resampling(low):
    x = np.random.RandomState(0).uniform(low, 1, size=60) ** 3
    random = np.random.RandomState(1)
    resampled = [100 * x[random.randint(60, size=60)].mean() for _ in range(5000)]
    figure = scores.percent(x)
    assert figure["value"] == pytest.approx(100 * x.mean())
    np.testing.assert_allclose(figure["interval"], np.percentile(resampled, [2.5, 97.5]), atol=1.5)


def test_interval_of_alignment_is_that_of_resampling():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(50, 4, generator=g).double(), dim=1) for _ in "xy")
    distances, random = (x - y).square().sum(1).numpy(), np.random.RandomState(1)
    resampled = [distances[random.randint(50, size=50)].mean() for _ in range(5000)]
    np.testing.assert_allclose(scores.alignment(x, y)["interval"], np.percentile(resampled, [2.5, 97.5]), atol=0.05)


def test_rank_of_features():
    g = torch.Generator().manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(100, 7, generator=g))[0]
    assert scores.label_free(orthogonal)["rank_me"]["value"] == pytest.approx(7, rel=1e-3)
    assert scores.label_free(torch.ones(30, 5))["rank_me"]["value"] == pytest.approx(1, abs=1e-3)


def test_one_image_without_labels():
    found = scores.label_free(torch.ones(1, 4))
    assert found["uniformity"]["value"] is None and found["alignment"] is None
    assert "-" in scores.table([found])


@pytest.mark.parametrize("zeros", [6, 3])
def test_uniformity_of_features_of_zeros(zeros):
    """Black images as raw pixels: equal features are 0 apart, however they are normalized."""
    x = torch.cat([torch.zeros(zeros, 4), torch.eye(4)[: 6 - zeros]])
    kernel = [math.exp(-2 * (x[i] - x[j]).square().sum().item()) for i in range(6) for j in range(6) if i != j]
    assert scores.uniformity(x)["value"] == pytest.approx(math.log(np.mean(kernel)), abs=1e-12)
    low, high = scores.uniformity(x)["interval"]
    assert low <= math.log(np.mean(kernel)) + 1e-6 and high <= 1e-6


def test_many_images_are_thinned_out(monkeypatch):
    monkeypatch.setattr(scores, "MOST_PAIRED", 10)
    x = torch.randn(95, 3)
    chosen = x[[round(i * 94 / 9) for i in range(10)]]
    assert scores.label_free(x)["uniformity"] == scores.uniformity(chosen)


def test_table():
    row = {"k": 10, "T": 0.07, "top1": {"value": 74.5, "interval": [73.0, 76.126]}, "top5": None}
    lines = [" k     T                  top1  top5", "10  0.07  74.50 [73.00, 76.13]     -"]
    assert scores.table([row]).splitlines() == lines


def test_results_of_other_data_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "eval_knn.json"
    for i, data in enumerate(("a", "b", "a", "c")):
        monkeypatch.setattr("sys.argv", ["eval.py", data, str(i)])
        scores.write_results(path, [{"k": 1, "top1": i}], data_path=data, weights_sha256="ab", label_free={"x": i},
                             images=[3, 2], size=(4, 4))
    found = json.loads(path.read_text())
    assert (found["data_path"], found["results"]) == ("c", [{"k": 1, "top1": 3}])
    assert [(one["data_path"], one["results"][0]["top1"], one["command"]) for one in found["earlier"]] == [
        ("a", 2, "eval.py a 2"), ("b", 1, "eval.py b 1")]  # the first of a is replaced
    assert not any("earlier" in one for one in found["earlier"])
    path.write_text("{damaged")
    scores.write_results(path, [], data_path="a")
    assert json.loads(path.read_text()) == {"command": "eval.py c 3", "data_path": "a", "results": []}


@pytest.mark.parametrize("content", ['{"earlier": 5}', '{"earlier": ["x", {"data_path": "b"}]}', "[1]", "null"])
def test_what_another_program_wrote_costs_no_results(tmp_path, content):
    path = tmp_path / "eval_knn.json"
    path.write_text(content)
    scores.write_results(path, [{"k": 1}], data_path="a")
    assert json.loads(path.read_text())["results"] == [{"k": 1}]


def test_results_are_json_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval.py", "--data_path", "a b"])
    scores.write_results(tmp_path / "new" / "file.json", [{"k": 1}], weights_sha256="ab")
    assert json.loads((tmp_path / "new" / "file.json").read_text()) == {
        "command": "eval.py --data_path 'a b'", "weights_sha256": "ab", "results": [{"k": 1}]}
    with pytest.raises(ValueError):
        scores.write_results(tmp_path / "nan.json", [{"k": float("nan")}])
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="--output_dir .*file: .*; choose a folder"):
        scores.write_results(tmp_path / "file" / "results.json", [])
