"""Crops of low resolution in the first epochs, and dropped patches of the student's global crops."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forks import SMALLEST, SMALLEST_DINOV2, Started
from processes import json_lines
from test_dinov2 import state
from test_faults import slow_steps, stepping
from test_kills import differences
from torch import nn

import main_dino
import main_dinov2
import utils
from imagesets import loaders
from imagesets.sources import open_images
from method import dinov2, masking
from method.noise import with_noise
from parallel import Refused
from pretraining import failures
from pretraining.plan import Plan, drop_by_epoch, early_epochs
from vision_transformer import DINOHead, build_backbone
from weights import checkpoints

LESS = ("--patch_size 4 --low_resolution_epochs 0.34 --low_resolution_sizes 8 4 --token_drop 0.4 0 "
        "--noise_patches 0.5").split()
RUNS = {"main_dino.py": [*SMALLEST, *LESS], "main_dinov2.py": [*SMALLEST_DINOV2, *LESS]}
SCRIPTS = {"main_dino.py": main_dino, "main_dinov2.py": main_dinov2}


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("vit_nano", 4, img_size=16, **options)[0].double()


def kept_of(n: int, count: int, patches: int = 16) -> torch.Tensor:
    return torch.stack([torch.randperm(patches)[:count].sort().values for _ in range(n)])


# ---- Dropped patches ----


@pytest.mark.parametrize("registers", [0, 2])
def test_kept_tokens_are_those_of_a_naive_gather(registers):
    network, images, kept = vit(num_register_tokens=registers), torch.randn(3, 3, 16, 16).double(), kept_of(3, 5)
    tokens, first = network.prepare_tokens(images), 1 + registers
    chosen = torch.stack([torch.stack([*row[:first], *(row[first + i] for i in indices.tolist())])
                          for row, indices in zip(tokens, kept, strict=True)])
    for block in network.blocks:
        chosen = block(chosen)
    want = network.norm(chosen)
    torch.testing.assert_close(network(images, all_tokens=True, kept=kept), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network(images, class_token_only=True, kept=kept), want[:, 0], rtol=1e-12, atol=1e-12)
    local = torch.randn(2, 3, 8, 8).double()
    both = network([images, local], all_tokens=True, kept=kept)
    torch.testing.assert_close(both[0], want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both[1], network(local, all_tokens=True), rtol=1e-12, atol=1e-12)


def test_only_the_students_global_crops_lose_patches():
    """Also where local crops have the same size, and would share their pass; the teacher sees all patches."""
    student, teacher = (utils.MultiCropWrapper(vit(), DINOHead(192, 8, hidden_dim=8, bottleneck_dim=4).double())
                        for _ in range(2))
    crops, kept = [torch.randn(4, 3, 16, 16).double(), torch.randn(2, 3, 16, 16).double()], kept_of(4, 6)
    want = torch.cat([student.head(student.backbone(crops[0], kept=kept)), student.head(student.backbone(crops[1]))])
    torch.testing.assert_close(student(crops, kept), want, rtol=1e-12, atol=1e-12)
    objective = utils.DINOLoss(8, 3, 0.04, 0.04, 0, 1).double()
    loss, parts = utils.losses(student, teacher, crops, objective, 0, kept)
    assert torch.equal(parts["teacher_output"], teacher(crops[:1]))
    torch.testing.assert_close(loss, utils.cross_entropy(want, objective.targets(teacher(crops[:1]), 0), 0.1))
    whole = utils.losses(student, teacher, crops, objective, 0)[0]
    assert whole != loss
    torch.testing.assert_close(utils.losses(student, teacher, crops, objective, 0, kept_of(4, 16))[0], whole)


def test_the_patch_loss_is_taken_on_the_same_patches():
    """Its student rows are the masked patches of the kept sequence, its targets those patches in the whole crop."""
    def build() -> dinov2.BackboneAndHeads:
        heads = [DINOHead(192, k, hidden_dim=8, bottleneck_dim=4).double() for k in (8, 6)]
        return dinov2.BackboneAndHeads(vit(method="dinov2", num_register_tokens=1), *heads)

    student, teacher = build(), build().requires_grad_(False)
    crops = [torch.randn(4, 3, 16, 16).double(), torch.randn(4, 3, 8, 8).double()]
    masks = masking.batch_masks(0, 0, 0, 4, (4, 4), (0.2, 0.4), 0.75)
    kept = torch.cat([masking.kept_patches(0, i, masks[2 * i : 2 * i + 2], seed=0, counts=[(16, 9)])
                      for i in range(2)])
    objective = dinov2.DINOv2Loss(8, 6).double()
    seen = []
    student.register_forward_hook(lambda module, inputs, output: seen.append(output))
    loss, parts = dinov2.losses(student, teacher, crops, masks, objective, 0.05, kept)
    rows = []
    for image, mask, indices in zip(crops[0], masks, kept, strict=True):
        tokens = student.backbone(image[None], mask[None], all_tokens=True, kept=indices[None])[0, 2:]
        rows += [student.ibot_head(token[None]) for i, token in zip(indices.tolist(), tokens, strict=True) if mask[i]]
    assert len(rows) == masks.sum() > 0
    torch.testing.assert_close(seen[0].patch_scores, torch.cat(rows), rtol=1e-9, atol=1e-12)
    whole, its_parts = dinov2.losses(student, teacher, crops, masks, objective, 0.05)
    assert torch.equal(parts["patch_mean"], its_parts["patch_mean"]) and loss != whole
    everything = torch.arange(16).expand(4, -1)
    torch.testing.assert_close(dinov2.losses(student, teacher, crops, masks, objective, 0.05, everything)[0], whole)


def test_kept_patches_are_drawn_from_seed_epoch_and_image():
    draw = partial(masking.kept_patches, counts=[(16, 6), (16, 16), (9, 4)])
    assert draw(1, 3, None, seed=0) is None  # an epoch that drops nothing
    assert torch.equal(draw(0, 3, None, seed=0), draw(0, 3, None, seed=0))
    others = [draw(0, 4, None, seed=0), draw(0, 3, None, seed=1), draw(2, 3, None, seed=0)[:, :4]]
    assert all(not torch.equal(draw(0, 3, None, seed=0)[:, : x.shape[1]], x) for x in others)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, [0, 5, 15]], masks[1, 2:8] = True, True
    counts = torch.zeros(16)
    for index in range(400):
        kept = draw(0, index, masks, seed=0)
        assert kept.shape == (2, 6) and (kept.diff(dim=1) > 0).all()
        assert torch.zeros(2, 16, dtype=torch.bool).scatter(1, kept, True)[masks].all()
        counts[kept[0]] += 1
    share = counts[~masks[0]] / 400  # three of thirteen
    assert (share - 3 / 13).abs().max() < 0.1


# ---- By epoch ----


def test_epochs_of_low_resolution_and_shares_of_dropped_patches():
    assert [early_epochs(0.75, n) for n in (4, 5, 8, 100)] == [3, 4, 6, 75] and early_epochs(0, 1) == 0
    assert drop_by_epoch(None, 8) == drop_by_epoch((0, 0), 8) == ()
    assert drop_by_epoch((0.6, 0), 8) == pytest.approx((0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0, 0), abs=1e-12)
    assert drop_by_epoch((0.5, 0.2), 2) == (0.5, 0.2) and drop_by_epoch((0.5, 0.2), 1) == (0.5,)
    one = np.ones(8)
    plan = Plan(2, 8, one, one, one, early_epochs=3, token_drop=drop_by_epoch((0.6, 0), 4))
    assert plan.patch_counts(16, 4) == [(4, 2), (4, 3), (4, 4), (16, 16)]
    for share, epochs, what in ((0.75, 1, "all"), (0.1, 3, "none"), (1.0, 8, "all")):
        with pytest.raises(Refused, match=f"--low_resolution_epochs {share:g} is {what}"):
            early_epochs(share, epochs)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_changes_sizes_between_epochs(workers):
    images, augmentation = open_images("shapes:8x32"), utils.DataAugmentationDINO((0.4, 1), (0.1, 0.4), 2, 16, 8)
    kept = partial(masking.kept_patches, seed=0, counts=[(4, 3), (16, 12), (16, 16)])
    load = loaders.steps(images, augmentation, 4, workers, 0, 1, 2, torch.device("cpu"), None, kept,
                         loaders.Early(1, augmentation.resized(8, 4)))
    batches = list(load(0, 6))
    sizes = [[tuple(c.shape[-2:]) for c in b["crops"]] for b in batches]
    assert sizes == [[(8, 8), (4, 4)]] * 2 + [[(16, 16), (8, 8)]] * 4
    assert [b["kept"].shape if "kept" in b else None for b in batches] == [(8, 3)] * 2 + [(8, 12)] * 2 + [None] * 2
    for first in (1, 3):  # as when a run is resumed
        again = next(load(first, 6))
        assert torch.equal(again["kept"], batches[first]["kept"])
        assert all(torch.equal(a, b) for a, b in zip(again["crops"], batches[first]["crops"], strict=True))
    plain = loaders.steps(images, augmentation, 4, workers, 0, 1, 2, torch.device("cpu"))
    for ours, theirs in zip(batches[2:], plain(2, 6), strict=True):  # full size: the views of any run
        assert all(torch.equal(a, b) for a, b in zip(ours["crops"], theirs["crops"], strict=True))


def test_small_crops_are_the_same_views_downsampled():
    augmentation = utils.DataAugmentationDINO((0.4, 1), (0.1, 0.4), 2, 64, 32, blur=(1, 1, 1), noise=1.0)
    small = augmentation.resized(32, 16)
    plain = utils.DataAugmentationDINO((0.4, 1), (0.1, 0.4), 2, 64, 32, blur=(1, 1, 1))
    image = F.interpolate(torch.rand(1, 3, 9, 9), size=(200, 300), mode="bicubic").clamp(0, 1).mul(255).byte()[0]
    (crops, params), (low, its_params) = (a.cut(image, np.random.default_rng(0)) for a in (plain, small))
    for crop, little in zip(crops, low, strict=True):
        want = F.interpolate(crop[None].float(), scale_factor=0.5, mode="bicubic", antialias=True)[0]
        assert (want - little).abs().max() < 8
    sigma = params[:, 6].clone()
    assert (sigma > 0).all() and torch.allclose(its_params[:, 6], sigma / 2)
    params[:, 6] = its_params[:, 6]
    assert torch.equal(params, its_params)


def test_noise_is_a_square_in_a_copy():
    crop, rng = torch.full((3, 12, 12), 128, dtype=torch.uint8), np.random.default_rng(2)
    sizes = set()
    for _ in range(50):
        noisy = with_noise(crop, rng)
        rows, columns = (noisy != crop).any(0).nonzero().T
        if len(rows):
            height, width = (int(x.max() - x.min()) + 1 for x in (rows, columns))
            inside = noisy[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (inside != 128).float().mean() > 0.5 or height * width < 9 or noisy.float().std() < 3
            sizes.add((height, width))
    assert len(sizes) > 10 and (crop == 128).all()


# ---- Runs ----


@pytest.mark.parametrize("script", RUNS)
def test_a_run_killed_before_and_after_the_change_ends_like_an_uninterrupted_one(tmp_path, script):
    """Bit for bit, with 1, 0, 2 and 1 workers."""
    Run, args = partial(Started, script=script), [*RUNS[script], "--saveckp_every_steps", 1, "--saveckp_freq", 1]
    whole = Run(*args, "--output_dir", tmp_path / "whole")
    assert whole.wait() == [0], whole.output()
    assert "crops of 8 and 4 pixels in epoch 0, of 16 and 8 in epochs 1 to 2" in whole.output()
    for steps, workers in ((5, 0), (13, 2)):
        run = Run(*args, "--num_workers", workers, "--output_dir", tmp_path / "killed", before=slow_steps)
        stepping(run, tmp_path / "killed", steps)
        run.kill()
    done = Run(*args, "--output_dir", tmp_path / "killed")
    assert done.wait() == [0], done.output()
    assert (tmp_path / "killed" / "log.txt").read_text() == (tmp_path / "whole" / "log.txt").read_text()
    assert differences(state(tmp_path / "whole"), state(tmp_path / "killed")) == []
    stored = checkpoints.read(tmp_path / "whole" / checkpoints.NAME)["args"]
    assert stored["low_resolution_sizes"] == [8, 4] and stored["token_drop"] == [0.4, 0]
    assert stored["global_crops_size"] == 16
    other = Run(*args, "--token_drop", 0.2, 0, "--output_dir", tmp_path / "whole")
    assert other.wait() == [2] and "token_drop [0.4, 0.0] -> [0.2, 0.0]" in other.output(), other.output()
    longer = Run(*args, "--epochs", 4, "--extend", "--output_dir", tmp_path / "whole")
    assert longer.wait() == [0] and "dropped patches are from here on" in longer.output(), longer.output()


@pytest.mark.parametrize("script", RUNS)
def test_two_processes_equal_one(tmp_path, script):
    args = [*RUNS[script], "--drop_path_rate", 0, "--log_every", 1, "--lr", 0.001]
    one = Started(*args, "--output_dir", tmp_path / "one", script=script)
    two = Started(*args, "--batch_size_per_gpu", 4, "--output_dir", tmp_path / "two", processes=2, script=script)
    assert one.wait() == [0] and two.wait() == [0, 0], one.output() + two.output()
    a, b = (json_lines(tmp_path / name / "log_steps.txt") for name in ("one", "two"))
    # KoLeo compares the images of a process only.
    keys = ("loss",) if script == "main_dino.py" else ("dino_local", "dino_global", "ibot")
    for x, y in zip(a[:12], b[:12], strict=True):  # across the change after step 8
        for key in keys:
            assert y[key] == pytest.approx(x[key], abs=1e-3), (x["step"], key)


def nan_in_the_sixth_step() -> None:
    then, calls = dinov2.koleo, []

    def koleo(*args):
        calls.append(1)
        return then(*args) * (float("nan") if len(calls) == 11 else 1)

    dinov2.koleo = koleo


def test_a_step_with_dropped_patches_is_replayed(tmp_path):
    run = Started(*RUNS["main_dinov2.py"], "--log_every", 8, "--output_dir", tmp_path, before=nan_in_the_sixth_step,
                  script="main_dinov2.py")
    assert run.wait() == [1], run.output()
    failure = checkpoints.read(tmp_path / failures.NAME)
    assert failure["kept"][0].shape == (16, 3) and failure["crops"][0][0].shape == (16, 3, 8, 8)
    again = Started("--replay", tmp_path / failures.NAME, "--device", "cpu", script="main_dinov2.py")
    assert again.wait() == [0] and "in float32 the step is finite" in again.output(), again.output()


@pytest.mark.parametrize("script, flags, words", [
    ("main_dino.py", "--low_resolution_epochs 1.5", ("--low_resolution_epochs", "1.5", "at most 1")),
    ("main_dino.py", "--low_resolution_epochs 0.75 --epochs 1", ("--low_resolution_epochs 0.75", "all", "longer run")),
    ("main_dino.py", "--low_resolution_sizes 8 4", ("--low_resolution_sizes 8 4", "give --low_resolution_epochs")),
    ("main_dino.py", "--low_resolution_epochs 0.5 --low_resolution_sizes 9 4",
     ("--low_resolution_sizes 9 4", "--patch_size 4", "give --low_resolution_sizes 8 4")),
    ("main_dino.py", "--low_resolution_epochs 0.5 --local_crops_size 12",
     ("--low_resolution_sizes 8 6 .half", "--patch_size 4", "give --low_resolution_sizes 8 8")),
    ("main_dino.py", "--low_resolution_epochs 0.5 --low_resolution_sizes 32 8",
     ("--low_resolution_sizes 32 8", "at most the full sizes 16 8")),
    ("main_dino.py", "--token_drop 0.95 0", ("--token_drop", "0.95", "at most 0.9")),
    ("main_dino.py", "--token_drop 0 0.5", ("--token_drop 0 0.5", "START >= END")),
    ("main_dino.py", "--token_drop 0.5 0 --arch resnet18", ("--token_drop 0.5 0", "resnet18", "vit_nano")),
    ("main_dino.py", "--noise_patches -1", ("--noise_patches", "-1", "at least 0")),
    ("main_dinov2.py", "--token_drop 0.5 0", ("--token_drop 0.5 0", "--mask_ratio 0.1 0.5", "lower either")),
    ("main_dinov2.py", "--token_drop 0.4 0 --distill_from {file}", ("--token_drop 0.4 0", "--ibot_tokens masked")),
])  # fmt: skip
def test_bad_input(tmp_path, capsys, script, flags, words):
    (tmp_path / "file").touch()
    argv = [*map(str, RUNS[script][: -len(LESS)]), "--patch_size", "4", "--output_dir", str(tmp_path / "out"),
            *flags.format(file=tmp_path / "file").split()]
    try:
        code = SCRIPTS[script].main(SCRIPTS[script].get_args_parser().parse_args(argv))
    except SystemExit as error:
        code = error.code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and not (tmp_path / "out").exists()
    for word in words:
        assert word.replace(" .", " (") in line, (word, line)


@pytest.mark.parametrize("script, preset", [
    (name, preset) for name, presets in (
        ("main_dino.py", ("shapes", "imagenette", "imagenet_vits16_100ep", "imagenet_vits16_small_batch")),
        ("main_dinov2.py", ("dinov2_shapes", "dinov2_vitl16_short"))) for preset in presets])
def test_presets_take_the_flags(script, preset):
    sizes = {"shapes": "32 16", "dinov2_shapes": "32 16"}.get(preset, "")
    argv = [f"@presets/{preset}.txt", "--data_path", "shapes:64x32", "--low_resolution_epochs", "0.75", "--token_drop",
            "0.4", "0", *(["--low_resolution_sizes", *sizes.split()] if sizes else [])]
    SCRIPTS[script].check_args(SCRIPTS[script].get_args_parser().parse_args(argv))
