"""Sinkhorn-Knopp and centring against the reference figures and the algorithm as written, on one and two processes."""

import re

import pytest
import torch
from dinov2_figures import figures, files, rs, two_processes
from processes import launch

from method.sinkhorn import sinkhorn_knopp
from method.targets import PART, Center, Targets, centred


def probabilities(targets: Targets) -> torch.Tensor:
    return targets.rows(0, len(targets.scores))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


def published(scores: torch.Tensor, temp: float, iterations: int) -> torch.Tensor:
    """The algorithm of the paper on (n, K), with all its divisions."""
    n, k = scores.shape
    q = (scores / temp).exp().T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * k
        q /= q.sum(0, keepdim=True) * n
    return (q * n).T


@pytest.mark.parametrize("part", [1, 16 * 5, 2**20], ids=["a row", "five rows", "all"])
@pytest.mark.parametrize("file", [name for name in files("sinkhorn*.npz") if name not in two_processes()])
def test_figures(monkeypatch, file, part):
    monkeypatch.setitem(PART, "cpu", part)
    config, expected = figures(file)
    k = config["prototypes"]
    for i, kind in enumerate(("cls", "patch")):
        scores = rs(config["seed"] + i, config[f"{kind}_rows"], k).tanh()
        for temp in config["temps"]:
            for n in config["iterations"]:
                name = f"{'cls' if kind == 'cls' else 'patches'}_t{temp}_n{n}"
                close(probabilities(sinkhorn_knopp(scores, temp, n)), expected[name])


@pytest.mark.parametrize("n, k", [(1, 5), (2, 64), (40, 3)])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_any_shape_is_the_paper_algorithm(n, k, iterations):
    scores = rs(7, n, k)
    close(probabilities(sinkhorn_knopp(scores, 0.3, iterations)), published(scores, 0.3, iterations))


def test_float32_of_large_scores():
    """exp(scores / temp) overflows even float64 here, and some samples are at e^-800 of others."""
    scores = (10 * rs(8, 30, 20).tanh() - 20 * (torch.arange(30) % 2)[:, None]).float()
    q = probabilities(sinkhorn_knopp(scores, 0.04))
    assert q.dtype == torch.float32 and q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(30), rtol=0, atol=1e-4)
    exact = scores.double() / 0.04
    for _ in range(3):
        exact = exact - exact.logsumexp(0)
        exact = exact - exact.logsumexp(1, keepdim=True)
    torch.testing.assert_close(q.double(), exact.exp(), rtol=1e-3, atol=1e-4)


def test_a_prototype_is_used_as_much_as_any_other():
    scores = torch.zeros(64, 8)
    scores[:, 0] = 1  # the favourite of all samples
    q = probabilities(sinkhorn_knopp(scores + 0.1 * rs(9, 64, 8).float(), 0.1, 10))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_computed_in_float32(dtype):
    scores = rs(10, 12, 16).tanh().to(dtype)
    for targets in (sinkhorn_knopp(scores, 0.07), centred(scores, torch.zeros(1, 16), 0.07)):
        q = probabilities(targets)
        assert targets.scores.dtype == dtype and q.dtype == torch.float32
        torch.testing.assert_close(q.sum(1), torch.ones(12), rtol=0, atol=1e-5)


def test_no_iterations_are_refused():
    with pytest.raises(ValueError, match="iterations: 0"):
        sinkhorn_knopp(torch.zeros(2, 3), 0.1, 0)


# ---- Centring ----


@pytest.mark.parametrize("file", files("centring*.npz"))
def test_centring_figures(file):
    config, expected = figures(file)
    k, momentum = config["prototypes"], config.get("center_momentum", 0.9)
    centers = {"cls": Center(1, k, momentum=momentum), "patch": Center(1, 1, k, momentum=momentum)}
    for i, temp in enumerate(config["temps"]):
        rows = {"cls": config["cls_rows"], "patch": config["patch_rows"][i]}
        for j, (kind, center) in enumerate(centers.items()):
            scores = rs(config["seed"] + 2 * i + j, rows[kind], k)
            close(center.center.double(), expected[f"{kind}_center_used{i}"])
            close(probabilities(centred(scores, center.center, temp)), expected[f"{'cls' if j == 0 else 'patches'}{i}"])
            center.update(scores.mean(0))
    for kind, center in centers.items():
        assert center.center.shape == expected[f"{kind}_center"].shape
        close(center.center, expected[f"{kind}_center"])


def test_a_center_without_rows_stays():
    center = Center(1, 4)
    center.update(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    before = center.center.clone()
    center.update(None)
    assert torch.equal(center.center, before) and center.center.dtype == torch.float32
    assert list(center.state_dict()) == ["center"]


# ---- Two processes ----


@pytest.mark.parametrize("file", two_processes())
def test_two_processes(tmp_path, file):
    """Figures; then unequal numbers of rows, none on one process, against one process with all rows."""
    done = launch("tests/method/on_two_processes.py", tmp_path / "out", file, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    config, expected = figures(file)
    found = [torch.load(tmp_path / f"out{rank}") for rank in range(2)]
    for name, figure in expected.items():
        rank, key = re.fullmatch(r"rank(\d)/(\w+)", name).groups()
        close(found[int(rank)][key], figure)
    scores = rs(11, 9, config["prototypes"])
    expected = published(scores, config["temp"], config.get("sinkhorn_iterations", 3))
    close(torch.cat([part["none_on_one"] for part in found]), expected)
    center = 0.1 * scores.mean(0)  # the process without rows doesn't count
    for part in found:
        close(part["center_none_on_one"].flatten(), center)
