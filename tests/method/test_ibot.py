"""The losses on patches and on class tokens, from both kinds of targets: figures, gradients, and what is kept."""

import pytest
import torch
from dinov2_figures import figures, files, mask, rs

from method.ibot import patch_loss
from method.masking import masks_weight
from method.pairs import class_loss
from method.sinkhorn import sinkhorn_knopp
from method.targets import PART, Targets, centred

TEMP = 0.1  # of the student; of the teacher in the figures


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def softmax_targets(scores: torch.Tensor, kind: str):
    """The same probabilities as a matrix and as scaling vectors."""
    return (scores / TEMP).softmax(-1) if kind == "matrix" else centred(scores, torch.zeros(1, scores.shape[1]), TEMP)


@pytest.mark.parametrize("part", [1, 2**20], ids=["a row at a time", "all at once"])
@pytest.mark.parametrize("kind", ["matrix", "vectors"])
@pytest.mark.parametrize("file", files("losses*.npz"))
def test_figures_of_class_tokens(monkeypatch, file, kind, part):
    """The figures have no factor 1 / (2 + 2 L), and their global one compares row j with row j, here its swap."""
    monkeypatch.setitem(PART, "cpu", part)
    config, expected = figures(file)
    seed, K, B, L = (config[key] for key in ("seed", "prototypes", "images", "local_crops"))
    teacher = rs(seed + 1, 2, B, K)
    local = rs(seed, L * B, K)
    student = torch.cat([torch.zeros(2 * B, K).double(), local]).requires_grad_()
    loss, parts = class_loss(student, softmax_targets(teacher.flatten(0, 1), kind), TEMP)
    pairs = 2 + 2 * L
    close(pairs * parts["local"], expected["dino_local"])
    close(parts["local"] + parts["global"], loss.detach())
    assert not any(x.requires_grad for x in parts.values())
    close(pairs * torch.autograd.grad(loss, student)[0][2 * B : 2 * B + 3], expected["dino_local_grad"])

    student = torch.cat([rs(seed + 2, 2 * B, K), local]).requires_grad_()
    swapped = teacher.flip(0).flatten(0, 1)
    loss, parts = class_loss(student, softmax_targets(swapped, kind), TEMP)
    close(pairs / 2 * parts["global"], expected["dino_global"])
    close(pairs / 2 * torch.autograd.grad(loss, student)[0][:3], expected["dino_global_grad"])


@pytest.mark.parametrize("part", [1, 5 * 16, 2**20], ids=["a row", "five rows", "all"])
@pytest.mark.parametrize("kind", ["matrix", "vectors"])
@pytest.mark.parametrize("file", files("losses*.npz"))
def test_figures_of_patches(monkeypatch, file, kind, part):
    monkeypatch.setitem(PART, "cpu", part)
    config, expected = figures(file)
    seed, K, B, N = (config[key] for key in ("seed", "prototypes", "images", "tokens"))
    masks = mask(seed + 3, 2 * B, N, config["mask_share"])
    masks[0] = False
    assert torch.equal(masks, expected["masks"])
    weights = masks_weight(masks, torch.float64)
    close(weights, expected["weights"])
    n = len(weights)
    student = rs(seed + 4, n, K).requires_grad_()
    loss = patch_loss(student, softmax_targets(rs(seed + 5, n, K), kind), weights, 2 * B, TEMP)
    close(loss, expected["ibot_masked"])
    close(torch.autograd.grad(loss, student)[0][:: n // 6], expected["ibot_masked_grad"])

    dense = rs(seed + 6, 2 * B, N, K).requires_grad_()
    targets = softmax_targets(rs(seed + 7, 2 * B, N, K).flatten(0, 1), kind)
    weights = masks / masks.sum(1, keepdim=True).clamp(min=1).double()
    loss = patch_loss(dense.flatten(0, 1), targets, weights.flatten(), 2 * B, TEMP)
    close(loss, expected["ibot_dense"])
    close(torch.autograd.grad(loss, dense)[0].abs().sum(-1), expected["ibot_dense_grad_sums"])


def naive_patch_loss(student, q, weights, n_crops, temp):
    return -(weights[:, None] * q * (student / temp).log_softmax(1)).sum() / n_crops


@pytest.mark.parametrize("assign", [lambda t: sinkhorn_knopp(t, 0.07), lambda t: centred(t, rs(6, 1, 30), 0.05)],
                         ids=["sinkhorn", "centred"])
def test_gradients_against_autograd(monkeypatch, assign):
    monkeypatch.setitem(PART, "cpu", 7 * 30)
    student, targets, weights = rs(1, 40, 30).requires_grad_(), assign(rs(2, 40, 30).tanh()), rs(3, 40).abs()
    q = targets.rows(0, 40)
    for found, expected in (
        (patch_loss(student, targets, weights, 6, 0.2), naive_patch_loss(student, q, weights, 6, 0.2)),
        (class_loss(student, Targets(targets.scores[:16], targets.temp, targets.prototypes, targets.samples[:16]))[0],
         class_loss(student, q[:16])[0]),
    ):
        close(found, expected)
        close(*(torch.autograd.grad(1000 * x, student)[0] for x in (found, expected)))


def test_no_masked_patch_is_a_loss_of_zero_with_a_gradient():
    student = torch.zeros(0, 8, requires_grad=True)
    loss = patch_loss(student, sinkhorn_knopp(torch.zeros(0, 8), 0.1), torch.zeros(0), 4)
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 8)


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 logits, 2 targets and 3 weights"):
        patch_loss(torch.zeros(3, 8), sinkhorn_knopp(torch.zeros(2, 8), 0.1), torch.zeros(3), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_precision(dtype):
    """Logits of any type: float32 inside, also where autocast is on; gradients in the type of the logits."""
    student, scores, weights = rs(1, 20, 64).to(dtype), rs(2, 20, 64).tanh().to(dtype), rs(3, 20).abs().float()
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = patch_loss(student, sinkhorn_knopp(scores, 0.07), weights, 4)
    loss.backward()
    exact = student.detach().double().requires_grad_()
    q = sinkhorn_knopp(scores.double(), 0.07).rows(0, 20)
    expected = naive_patch_loss(exact, q, weights.double(), 4, 0.1)
    expected.backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    error = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=error, atol=1e-5 * exact.grad.abs().max().item())


def test_no_matrix_but_the_logits_is_kept(monkeypatch):
    """Between forward and backward autograd holds the two matrices of logits, of both losses; in backward no tensor is
    made that is as large, but for the gradient."""
    n, k, part = 64, 512, 4 * 512
    monkeypatch.setitem(PART, "cpu", part)
    student = rs(1, n, k).bfloat16().requires_grad_()
    scores = rs(2, n, k).tanh().bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        targets = sinkhorn_knopp(scores, 0.07)
        loss = patch_loss(student, targets, torch.ones(n), 4) + class_loss(student, targets, 0.1)[0]
    matrices = {x.data_ptr() for x in kept if x.numel() >= part}
    assert matrices == {student.data_ptr(), scores.data_ptr()}

    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    allocated = sorted(event.cpu_memory_usage for event in profile.events() if event.name == "aten::empty_like")
    assert allocated and allocated[-1] == n * k * student.element_size()  # the gradient
    assert max(event.self_cpu_memory_usage for event in profile.events()) < n * k * 4
