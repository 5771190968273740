"""The method against the reference figures and against oracles written from the paper's equations, loop by loop."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from golden_weights import GOLDEN, fill, rs
from PIL import Image
from torch import nn

import utils
from method import photometric
from vision_transformer import DINOHead, VisionTransformer


def naive_loss(student, teacher, center, ncrops, student_temp, teacher_temp):
    """Equations 2 to 4 for each image, pair and prototype."""
    views = student.chunk(ncrops)
    globals_ = teacher.chunk(2)
    total, terms = 0.0, 0
    for i, t in enumerate(globals_):
        for v, s in enumerate(views):
            if i == v:
                continue
            for b in range(len(s)):
                q = torch.exp((t[b] - center[0]) / teacher_temp)
                p = torch.exp(s[b] / student_temp)
                total = total - (q / q.sum() * torch.log(p / p.sum())).sum()
                terms += 1
    return total / terms


@pytest.mark.parametrize("ncrops", [2, 3, 10])
@pytest.mark.parametrize("temps", [(0.1, 0.04), (0.1, 0.07), (0.3, 0.5)])
@pytest.mark.parametrize("batch", [1, 4])
def test_loss_equals_the_loop_over_pairs(ncrops, temps, batch):
    K = 7
    loss = utils.DINOLoss(K, ncrops, temps[1], temps[1], 0, 1, student_temp=temps[0])
    center = rs(5, 1, K)
    loss.center = center.clone()
    student, teacher = rs(1, ncrops * batch, K).requires_grad_(), rs(2, 2 * batch, K)
    ours = loss(student, teacher, 0)
    oracle = naive_loss(student, teacher, center, ncrops, *temps)
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
    ours_grad, oracle_grad = torch.autograd.grad(ours, student), torch.autograd.grad(oracle, student)
    torch.testing.assert_close(ours_grad, oracle_grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(loss.center, 0.9 * center + 0.1 * teacher.mean(0, keepdim=True), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "name, args, seed, batch",
    [
        ("dino_loss_10crops", (64, 10, 0.04, 0.04, 0, 3), 31, 4),
        ("dino_loss_2crops_warmup", (32, 2, 0.02, 0.07, 3, 5), 41, 6),
    ],
)
def test_loss_figures(name, args, seed, batch):
    golden = np.load(GOLDEN / f"{name}.npz")
    K, ncrops = args[:2]
    loss = utils.DINOLoss(*args)
    np.testing.assert_allclose(loss.teacher_temp_schedule, golden["temps"], rtol=1e-12)
    for epoch in range(args[-1]):
        student = rs(seed + 2 * epoch, ncrops * batch, K).requires_grad_()
        value = loss(student, rs(seed + 1 + 2 * epoch, 2 * batch, K), epoch)
        value.backward()
        np.testing.assert_allclose(value.item(), golden["loss"][epoch], rtol=1e-9)
        np.testing.assert_allclose(student.grad[:3, :5], golden["grad"][epoch], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(loss.center.squeeze(), golden["center"].squeeze(), rtol=1e-9)


def test_loss_is_float32_whatever_autocast_says():
    loss = utils.DINOLoss(64, 4, 0.04, 0.04, 0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(torch.randn(8, 64).bfloat16(), torch.randn(4, 64).bfloat16(), 0)
    assert value.dtype == torch.float32 and loss.center.dtype == torch.float32


def test_schedule_figures():
    golden = np.load(GOLDEN / "cosine_scheduler.npz")
    for name, args in {
        "lr": (5e-4, 1e-6, 5, 7, 2),
        "wd": (0.04, 0.4, 5, 7),
        "momentum": (0.996, 1, 5, 7),
        "warm_start": (1.0, 0.1, 4, 5, 1, 0.2),
    }.items():
        np.testing.assert_allclose(utils.cosine_scheduler(*args), golden[name], rtol=1e-12)


def test_schedule_of_fractional_epochs():
    assert len(utils.cosine_scheduler(1.0, 0.0, 23 / 7, 7, warmup_epochs=0.5)) == 23
    with pytest.raises(ValueError, match="warm-up of 3 epochs is longer"):
        utils.cosine_scheduler(1.0, 0.0, 2, 7, warmup_epochs=3)


# ---- six whole steps ----


def golden_networks():
    def build(prefix_norm):
        backbone = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, mlp_ratio=4,
                                     qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        return utils.MultiCropWrapper(backbone, DINOHead(48, 64, hidden_dim=96, bottleneck_dim=32))

    student = fill(build(True))
    student.head.last_layer.weight_g.data.fill_(1)
    return student, copy.deepcopy(student).requires_grad_(False)


def golden_crops(seed, it, n_local, rows=slice(None)):
    crops = [rs(1000 * seed + 10 * it + c, 4, 3, 32, 32)[rows] for c in range(2)]
    return crops + [rs(1000 * seed + 10 * it + 2 + c, 4, 3, 16, 16)[rows] for c in range(n_local)]


OPTIMIZERS = {
    "train_adamw": (lambda g: torch.optim.AdamW(g, fused=True), 2e-3, 7, 3),
    "train_sgd_no_local_crops": (utils.SGD, 0.1, 8, 0),
    "train_lars": (utils.LARS, 0.5, 9, 3),
}


OPTIONS = {  # of main_dino.py, which must not change a figure
    "plain": lambda student: None,
    "checkpointed": lambda student: student.backbone.set_grad_checkpointing(),
    "checkpointed layers": lambda student: student.backbone.set_grad_checkpointing(layers=True),
    "compiled": lambda student: student.compile(backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_six_steps_figures(name, option):
    golden = np.load(GOLDEN / f"{name}.npz")
    make, base_lr, seed, n_local = OPTIMIZERS[name]
    student, teacher = golden_networks()
    OPTIONS[option](student)
    loss_fn = utils.DINOLoss(64, 2 + n_local, 0.04, 0.04, 0, 2)
    optimizer = make(utils.get_params_groups(student))
    lr = utils.cosine_scheduler(base_lr, 1e-5, 2, 3, warmup_epochs=1)
    wd, momentum = utils.cosine_scheduler(0.04, 0.4, 2, 3), utils.cosine_scheduler(0.9, 1, 2, 3)
    losses, norms = [], []
    for it in range(6):
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = lr[it]
            if i == 0:
                group["weight_decay"] = wd[it]
        crops = golden_crops(seed, it, n_local)
        loss = loss_fn(student(crops), teacher(crops[:2]), it // 3)
        optimizer.zero_grad()
        loss.backward()
        norms.append(math.hypot(*map(float, utils.clip_gradients(student, 0.3))))
        utils.cancel_gradients_last_layer(it // 3, student, 1)
        optimizer.step()
        utils.ema_update(student, teacher, momentum[it])
        losses.append(loss.item())
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-9)
    np.testing.assert_allclose(norms, golden["grad_norm_l2_per_step"], rtol=1e-9)
    np.testing.assert_allclose(loss_fn.center.squeeze(), golden["center"].squeeze(), rtol=1e-9)
    for role, network in (("student", student), ("teacher", teacher)):
        for key, p in network.named_parameters():
            figures = torch.cat([torch.stack([p.sum(), p.norm()]), p.flatten()[:4]]).detach()
            np.testing.assert_allclose(figures, golden[f"{role}/{key}"], rtol=1e-9, atol=1e-12, err_msg=f"{role}/{key}")


@pytest.mark.parametrize("kind", [utils.SGD, utils.LARS])
def test_nothing_changes_where_a_gradient_was_not_finite(kind):
    p, q = (torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2))
    optimizer = kind([p, q], lr=0.5, weight_decay=0.1)
    optimizer.found_inf = torch.zeros(())
    before = p.detach().clone()
    for found in (0.0, 0.0, 1.0):
        p.grad, q.grad = torch.randn(3, 4), torch.full((3, 4), math.nan if found else 1.0)
        optimizer.found_inf.fill_(found)
        kept = [x.clone() for x in (p, q, optimizer.state[p].get("mu", p), optimizer.state[q].get("mu", q))]
        optimizer.step()
    assert not torch.equal(p, before)
    assert all(torch.equal(a, b) for a, b in zip(kept, (p, q, optimizer.state[p]["mu"], optimizer.state[q]["mu"]),
                                                 strict=True))


def test_sgd_is_torchs():
    torch.manual_seed(0)
    start = torch.randn(3, 4, dtype=torch.float64)
    found = []
    for kind in (utils.SGD, torch.optim.SGD):
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([p], lr=0.3, weight_decay=0.1, momentum=0.9)
        for step in range(4):
            p.grad = (p.detach() * (step + 1)).sin()
            optimizer.step()
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_compiled_student_is_one_graph_for_all_sizes_of_crops():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    student = golden_networks()[0].float()
    student.compile(backend=count, fullgraph=True)
    for _ in range(2):
        student([torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)])
    assert len(graphs) == 1


# ---- pieces ----


def test_wrapper_groups_by_height_and_width_and_keeps_the_order():
    class Count(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x.mean((2, 3))

    backbone = Count()
    wrapper = utils.MultiCropWrapper(backbone, nn.Identity())
    crops = [torch.randn(2, 3, *size) for size in ((8, 8), (8, 4), (8, 8), (4, 8))]
    torch.testing.assert_close(wrapper(crops), torch.cat([c.mean((2, 3)) for c in crops]))
    assert backbone.calls == 3  # (8, 4) and (4, 8) are not the same shape
    torch.testing.assert_close(wrapper(crops[0]), crops[0].mean((2, 3)))


@pytest.mark.parametrize("per_tensor", [True, False])
def test_clipping_against_a_loop(per_tensor):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).double()
    for i, p in enumerate(model.parameters()):
        p.grad = rs(i, *p.shape) * (i + 0.1)
    before = [p.grad.clone() for p in model.parameters()]
    norms = utils.clip_gradients(model, 1.5, per_tensor)
    assert isinstance(norms, list) and all(norm.ndim == 0 for norm in norms)
    whole = math.sqrt(sum(g.square().sum().item() for g in before))
    for g, p, norm in zip(before, model.parameters(), norms, strict=True):
        assert norm.item() == pytest.approx(g.norm().item())
        reference = g.norm().item() if per_tensor else whole
        torch.testing.assert_close(p.grad, g * min(1.0, 1.5 / (reference + 1e-6)))


def test_ema_moves_parameters_and_buffers():
    student, teacher = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    student.running_mean.fill_(1.0)
    student.num_batches_tracked.fill_(7)
    student.weight.data.fill_(3.0)
    utils.ema_update(student, teacher, 0.75)
    assert torch.all(teacher.running_mean == 0.25) and teacher.num_batches_tracked == 7
    assert torch.all(teacher.weight == 1.5)


def test_parameter_groups_spare_biases_and_norms():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    decayed, spared = utils.get_params_groups(model)
    assert [p.shape for p in decayed["params"]] == [(4, 4)] and len(spared["params"]) == 3
    assert spared["weight_decay"] == 0.0


def test_last_layer_is_frozen_in_its_epochs_only():
    head = DINOHead(4, 8, hidden_dim=4, bottleneck_dim=4)
    head(torch.randn(2, 4)).sum().backward()
    utils.cancel_gradients_last_layer(1, head, 1)
    assert head.last_layer.weight_v.grad is not None
    utils.cancel_gradients_last_layer(0, head, 1)
    assert head.last_layer.weight_v.grad is None and head.mlp[0].weight.grad is not None


# ---- augmentation ----


def picture(height=80, width=120):
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 2, y * 3, (x * y) % 255], -1) % 256
    return Image.fromarray(rgb.astype(np.uint8))


def test_drawn_parameters_have_the_published_distributions():
    n = 6000
    aug = utils.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 2)
    rng = np.random.default_rng(0)
    rows = np.stack([[aug.draw_photometric(v, rng) for v in range(4)] for _ in range(n)])  # (n, views, 8)
    tolerance = 4 * 0.5 / math.sqrt(n)
    jittered = rows[..., photometric.ORDER] >= 0
    assert np.allclose(jittered.mean(0), 0.8, atol=tolerance)
    assert np.allclose(rows[..., photometric.GREY].mean(0), 0.2, atol=tolerance)
    assert np.allclose((rows[..., photometric.SIGMA] > 0).mean(0), [1.0, 0.1, 0.5, 0.5], atol=tolerance)
    assert np.allclose(rows[..., photometric.SOLARIZE].mean(0), [0, 0.2, 0, 0], atol=tolerance)
    for column, low, high in (
        (photometric.BRIGHTNESS, 0.6, 1.4), (photometric.CONTRAST, 0.6, 1.4), (photometric.SATURATION, 0.8, 1.2),
        (photometric.HUE, -0.1, 0.1),
    ):  # fmt: skip
        values = rows[..., column][jittered]
        assert low <= values.min() < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * len(values))
        assert abs(values.std() - (high - low) / math.sqrt(12)) < 0.03 * (high - low)
    sigma = rows[:, 0, photometric.SIGMA]
    assert 0.1 <= sigma.min() and sigma.max() <= 2.0 and abs(sigma.mean() - 1.05) < 0.04
    orders = np.bincount(rows[..., photometric.ORDER][jittered].astype(int), minlength=24)
    assert len(orders) == 24 and orders.min() > 0.8 * orders.mean()


def test_crop_boxes_have_the_published_distribution():
    from torchvision.transforms import RandomResizedCrop

    rng, n = np.random.default_rng(0), 4000
    torch.manual_seed(0)
    blank = torch.zeros(1, 90, 140)
    for scale in ((0.4, 1.0), (0.05, 0.4)):
        ours = np.array([utils.random_resized_crop_box(90, 140, scale, rng) for _ in range(n)], float)
        theirs = np.array([RandomResizedCrop.get_params(blank, scale, (3 / 4, 4 / 3)) for _ in range(n)], float)
        assert (ours[:, 0] + ours[:, 2]).max() <= 90 and (ours[:, 1] + ours[:, 3]).max() <= 140 and ours.min() >= 0
        error = np.sqrt((ours.var(0) + theirs.var(0)) / n)
        assert np.all(abs(ours.mean(0) - theirs.mean(0)) < 4.5 * error)
        assert np.allclose(ours.std(0), theirs.std(0), rtol=0.08)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 2), (7, 7)])
def test_any_picture_can_be_cut(size):
    aug = utils.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 3, global_crops_size=32, local_crops_size=16)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    crops, params = aug.cut(image, np.random.default_rng(0))
    assert [tuple(c.shape) for c in crops] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3 and params.shape == (5, 8)


@pytest.mark.parametrize("height, width, expected", [(375, 500, 1), (3000, 4000, 4), (4000, 3000, 4), (600, 600, 1),
                                                     (1000, 1000, 2), (9000, 9000, 8), (120, 9000, 1), (5, 5, 1)])
def test_reduction_leaves_every_crop_its_pixels(height, width, expected):
    aug = utils.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)
    r = aug.reduction(height, width)
    assert r == expected
    rng = np.random.default_rng(0)
    for scale, size in zip(aug.scales, aug.sizes, strict=True):
        for _ in range(300 if r > 1 else 0):
            assert min(utils.random_resized_crop_box(height, width, scale, rng)[2:]) >= r * size - 1


def test_crops_equal_pillows_resize():
    """Pillow rounds each of its two passes to 8 bits: within two levels, and half a level on average."""
    image = picture()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    aug = utils.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 4, global_crops_size=48, local_crops_size=24)
    crops, _ = aug.cut(pixels, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    for v, crop in enumerate(crops):
        top, left, h, w = utils.random_resized_crop_box(80, 120, aug.scales[v], rng)
        expected = image.crop((left, top, left + w, top + h)).resize((aug.sizes[v],) * 2, Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        aug.draw_photometric(v, rng)
        difference = np.abs(crop.permute(1, 2, 0).numpy().astype(int) - np.array(expected).astype(int))
        assert difference.mean() < 0.5 and np.quantile(difference, 0.99) <= 2


def test_called_on_a_picture_gives_normalized_crops_through_the_same_code():
    aug = utils.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 2, global_crops_size=32, local_crops_size=16)
    views = aug(picture(), np.random.default_rng(1))
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    crops, params = aug.cut(pixels, np.random.default_rng(1))
    batch = aug.finish([torch.stack(crops[:2]), torch.stack(crops[2:])], params)
    torch.testing.assert_close(torch.stack(views[:2]), batch[0])
    torch.testing.assert_close(torch.stack(views[2:]), batch[1])
    torch.manual_seed(3)
    first = aug(picture())
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, aug(picture()), strict=True))


def test_grey_pictures_of_one_channel():
    aug = utils.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 1, 32, 16, mean=(0.5,), std=(0.2,))
    assert [tuple(v.shape) for v in aug(picture())] == [(1, 32, 32), (1, 32, 32), (1, 16, 16)]


def test_networks_of_convolutions_get_channels_last_in_memory():
    class Seen(torch.nn.Module):
        def forward(self, x):
            self.last = x.is_contiguous(memory_format=torch.channels_last)
            return x.mean((2, 3))

    backbone, crops = Seen(), [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 4, 4)]
    found = utils.MultiCropWrapper(backbone, torch.nn.Identity())(crops)
    assert backbone.last and torch.allclose(found, torch.cat([c.mean((2, 3)) for c in crops]))
