"""KoLeo against the reference figures and a loop over rows; over two processes against one with all rows."""

import pytest
import torch
from dinov2_figures import figures, files, rs, two_processes
from processes import launch

from method.koleo import koleo, nearest_distances


def loop(features: torch.Tensor) -> torch.Tensor:
    x = features / features.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(len(x)):
        distances = [((x[i] - x[j] + 1e-8) ** 2).sum().sqrt() for j in range(len(x)) if j != i]
        total = total - torch.log(min(distances) + 1e-8)
    return total / len(x)


def value_and_grad(function, features):
    features = features.clone().requires_grad_()
    value = function(features)
    return value.detach(), torch.autograd.grad(value, features)[0]


def inputs(config: dict) -> dict[str, torch.Tensor]:
    seed, rows, width = config["seed"], config["rows"], config["width"]
    plain, equal = rs(seed, rows, width), rs(seed + 1, rows, width)
    equal[1] = equal[0]
    return {"plain": plain, "two_equal_rows": equal, "one_row": rs(seed + 2, 1, width), "scaled": 7 * plain}


@pytest.mark.parametrize("name", ["plain", "two_equal_rows", "one_row", "scaled"])
@pytest.mark.parametrize("file", files("koleo*.npz"))
def test_figures(file, name):
    config, expected = figures(file)
    value, grad = value_and_grad(koleo, inputs(config)[name])
    torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=0)
    # Distances of 1e-8 make the gradients of equal rows differences of large numbers.
    torch.testing.assert_close(grad, expected[f"{name}_grad"], rtol=1e-9, atol=1e-9 * grad.abs().max().item() + 1e-15)


def test_it_is_the_loop_over_rows():
    features = rs(3, 9, 5)
    for found, expected in zip(value_and_grad(koleo, features), value_and_grad(loop, features), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equal_rows_are_finite_in_half_precision_and_under_autocast(dtype):
    features = torch.ones(4, 48, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = koleo(features)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and features.grad.isfinite().all()


def test_autocast_does_not_choose_the_neighbours():
    """Inner products that differ by 1e-4 are equal in bfloat16."""
    angles = torch.tensor([0.0, 0.02, 0.035, 0.6, 0.62, 0.645])
    features = torch.stack([angles.cos(), angles.sin()], 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_distances(features)
    gaps = torch.tensor([0.02, 0.015, 0.015, 0.02, 0.02, 0.025])
    torch.testing.assert_close(found, 2 * (gaps / 2).sin(), rtol=1e-3, atol=1e-6)


def test_two_processes_are_one_with_all_rows(tmp_path):
    done = launch("tests/method/on_two_processes.py", tmp_path / "out", two_processes()[0], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"out{rank}") for rank in range(2)]
    value, grad = value_and_grad(koleo, rs(12, 10, 6))
    torch.testing.assert_close((found[0]["koleo"] + found[1]["koleo"]) / 2, value, rtol=1e-9, atol=0)
    # Data-parallel training takes the mean of the processes' gradients.
    torch.testing.assert_close(torch.cat([f["koleo_grad"] for f in found]) / 2, grad, rtol=1e-9, atol=1e-12)
