"""main_dinov2.py in real processes: what holds for runs of DINO holds for it."""

import importlib
import json
import math
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from forks import SMALLEST_DINOV2, Started, make_small_in
from PIL import Image
from processes import json_lines, launch
from test_faults import slow_steps, stepping
from test_fsdp import assert_same_state
from test_kills import differences
from test_video_segmentation import draw_video

import main_dinov2
import utils
import vision_transformer
from imagesets import loaders, shapes
from method import dinov2, fused, masking
from method.targets import Targets
from parallel import Refused
from pretraining import compiling, networks, replay
from pretraining import state as state_of_runs
from pretraining.health import health_dinov2
from pretraining.plan import LONGEST, long_warmups
from weights import checkpoints

ARGS = [*SMALLEST_DINOV2, "--saveckp_freq", 1]
Run = partial(Started, script="main_dinov2.py")
CENTERING = ["--centering", "centering", "--ibot_separate_head", "false", "--ibot_out_dim", 0, "--ibot_head_hidden_dim",
             2048, "--ibot_head_bottleneck_dim", 256]
QUICK = ["--steps", 1, "--warmup_epochs", 0, "--warmup_teacher_temp_epochs", 0, "--num_workers", 0]


@pytest.fixture
def run_here(monkeypatch):
    """Runs in this process: flags -> exit code."""
    make_small_in(monkeypatch)
    parse = main_dinov2.get_args_parser().parse_args
    return lambda *argv: main_dinov2.main(parse([str(a) for a in (*ARGS, *QUICK, *argv)]))


def state(folder, name: str = checkpoints.NAME) -> dict:
    loaded = checkpoints.read(folder / name)
    loaded["args"] = {k: v for k, v in loaded["args"].items() if k not in ("output_dir", "num_workers")}
    return loaded


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run = Run(*ARGS, "--output_dir", folder, "--eval_knn_every", 3, "--pictures_every", 2)
    assert run.wait() == [0], run.output()
    return folder, run.output()


@pytest.mark.parametrize("extra, processes", [
    ([], 1), ([*CENTERING, "--grad_accum_steps", 2, "--batch_size_per_gpu", 4], 1), (["--batch_size_per_gpu", 4], 2),
    (["--drop_path_rate", 0, "--distill_from"], 1),
], ids=["sinkhorn", "tied, centred, accumulated", "two processes", "distillation"])  # fmt: skip
def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path, finished, extra, processes):
    file = [finished[0] / checkpoints.NAME] if "--distill_from" in extra else []
    args = [*ARGS, *extra, *file, "--saveckp_every_steps", 1]
    whole = Run(*args, "--output_dir", tmp_path / "whole", processes=processes)
    assert whole.wait() == [0] * processes, whole.output()
    for steps, workers in ((5, 0), (13, 2)):
        run = Run(*args, "--num_workers", workers, "--output_dir", tmp_path / "killed", processes=processes,
                  before=slow_steps)
        stepping(run, tmp_path / "killed", steps)
        run.kill()
    done = Run(*args, "--output_dir", tmp_path / "killed", processes=processes)
    assert done.wait() == [0] * processes, done.output()
    assert (tmp_path / "killed" / "log.txt").read_text() == (tmp_path / "whole" / "log.txt").read_text()
    for name in (checkpoints.NAME, "checkpoint0001.pth"):
        assert differences(state(tmp_path / "whole", name), state(tmp_path / "killed", name)) == []


def test_a_signal_saves_and_stops(tmp_path):
    run = Run(*ARGS, "--output_dir", tmp_path, before=slow_steps)
    stepping(run, tmp_path, 3)
    run.signal(signal.SIGTERM)
    assert run.wait() == [main_dinov2.TO_BE_CONTINUED], run.output()
    assert "main_dinov2.py" not in run.output() and 3 <= state(tmp_path)["step"] < 24


@pytest.mark.parametrize("extra", [
    ["--koleo_loss_weight", 0], ["--koleo_all_processes"],
], ids=["sinkhorn", "koleo"])
def test_two_processes_equal_one(tmp_path, extra):
    args = [*ARGS, *extra, "--drop_path_rate", 0, "--steps", 12, "--log_every", 1, "--lr", 0.001]
    one = Run(*args, "--output_dir", tmp_path / "one")
    two = Run(*args, "--batch_size_per_gpu", 4, "--output_dir", tmp_path / "two", processes=2)
    assert one.wait() == [0] and two.wait() == [0, 0], one.output() + two.output()
    a, b = (json_lines(tmp_path / name / "log_steps.txt") for name in ("one", "two"))
    for x, y in zip(a, b, strict=True):
        for key in ("loss", "dino_local", "dino_global", "ibot"):
            assert y[key] == pytest.approx(x[key], abs=2e-4), (x["step"], key)
    assert a[0]["loss"] != a[1]["loss"]


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_steps_in_float64_equal_one_process(tmp_path, centering):
    """With centring, where all crops have equally many masked patches: its patch centre is a mean of means."""
    for n in (1, 2):
        done = launch("tests/dinov2_steps.py", tmp_path / f"{n}.pt", centering, processes=n)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert one.keys() == two.keys() and any(k.startswith("grad/") for k in one)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("extra, steps", [
    ([], 12), (CENTERING, 12), (["--drop_path_rate", 0, "--distill_from"], 4), (["--init_heads", "--init_from"], 4),
], ids=["sinkhorn", "centring", "distillation", "heads"])  # fmt: skip
def test_sharded_equals_replicated(tmp_path, finished, extra, steps):
    file = [finished[0] / checkpoints.NAME, "--warmup_epochs", 0, "--warmup_teacher_temp_epochs", 0]
    args = [*ARGS, *extra, *(file if steps == 4 else []), "--batch_size_per_gpu", 4, "--steps", steps]
    runs = {kind: Run(*args, "--parallel", kind, "--output_dir", tmp_path / kind, processes=2)
            for kind in ("ddp", "fsdp")}
    for kind, run in runs.items():
        assert run.wait() == [0, 0], run.output()
        assert ("networks sharded" in run.output()) == (kind == "fsdp")
    assert_same_state(*(checkpoints.read(tmp_path / kind / checkpoints.NAME) for kind in runs))


def nan_in_the_sixth_koleo() -> None:
    then, calls = dinov2.koleo, []

    def koleo(*args):
        calls.append(1)
        return then(*args) * (float("nan") if len(calls) == 11 else 1)

    dinov2.koleo = koleo


def test_a_term_that_is_not_finite_is_named_and_the_step_replayed(tmp_path):
    """Step 5 fails, and is found out at step 8: the checkpoint before step 5 has what must have been kept."""
    run = Run(*ARGS, *CENTERING, "--log_every", 8, "--saveckp_every_steps", 5, "--output_dir", tmp_path,
              before=nan_in_the_sixth_koleo)
    assert run.wait() == [1], run.output()
    path, last = tmp_path / replay.NAME, run.output().strip().splitlines()[-1]
    assert "step 5" in last and "not finite: koleo" in last and f"main_dinov2.py --replay {path}" in last
    failure, before = checkpoints.read(path), checkpoints.read(tmp_path / checkpoints.NAME)
    assert before["step"] == failure["step"] == 5
    for key, value in before["student"].items():
        assert torch.equal(value, failure["student"][key]), key
    for key, value in before["dino_loss"].items():
        assert torch.equal(value, failure["dino_loss"][key]) and value.any(), key
    assert failure["masks"][0].shape == (16, 16) and failure["masks"][0].any()
    again = Run("--replay", path, "--device", "cpu")
    assert again.wait() == [0] and "in float32 the step is finite" in again.output(), again.output()
    assert "koleo" in again.output() and "ibot" in again.output()


def test_masks_depend_on_seed_epoch_and_step_alone():
    """However the images of a step are shared: rows of `batch_masks`, in the order of the global batch."""
    options = {"seed": 3, "images": 8, "grid": (4, 4), "ratio": (0.1, 0.5), "probability": 0.5}
    whole = masking.batch_masks(3, 1, 6, 16, (4, 4)).unflatten(0, (8, 2))
    for micro_batches in (1, 2, 4):
        size = 8 // micro_batches
        rows = [masking.image_masks(1, 6 * micro_batches + part, row, micro_batches=micro_batches, **options)
                for part in range(micro_batches) for row in range(size)]
        assert torch.equal(torch.stack(rows), whole)
    order = [list(loaders.GlobalBatches(64, 4, 0, rank, 2, numbered=True, last_batch=3)) for rank in (0, 1)]
    for m in range(3):
        both = order[0][m] + order[1][m]
        assert [(key[2], key[3]) for key in both] == [(m, row) for row in range(8)]
        assert [key[:2] for key in both] == list(loaders.GlobalBatches(64, 8, 0, last_batch=3))[m]


@pytest.mark.parametrize("extra, processes, absent", [
    (["--batch_size_per_gpu", 1], 2, {"neighbour_distance"}),
    (["--batch_size_per_gpu", 1, "--grad_accum_steps", 3, "--koleo_all_processes"], 1, {"neighbour_distance"}),
    ([*CENTERING, "--mask_probability", 0], 1, {"ibot_left", "patch_kl", "patch_entropy"}),
    ([*CENTERING, "--dino_loss_weight", 0, "--ibot_loss_weight", 0], 1, {"dino_left", "kl", "ibot_left", "patch_kl"}),
], ids=["on one of two processes", "in one of three micro-batches", "anywhere", "weights of 0"])  # fmt: skip
def test_steps_without_masked_patches(tmp_path, extra, processes, absent):
    """With few images some processes and micro-batches have none; figures that mean nothing are left out."""
    run = Run(*ARGS, *extra, "--steps", 12, "--log_every", 1, "--warmup_epochs", 0, "--warmup_teacher_temp_epochs", 0,
              "--output_dir", tmp_path, processes=processes)
    assert run.wait() == [0] * processes, run.output()
    for logged in json_lines(tmp_path / "log_steps.txt"):
        assert all(math.isfinite(value) for value in logged.values()) and not absent & logged.keys()
        assert (logged["koleo"] == 0) == ("neighbour_distance" in absent)
        if "patch_entropy" not in absent and "patch_entropy" in logged:
            assert 0 < logged["patch_entropy"] <= math.log(32) + 1e-3 and logged["patch_prototypes_used"] >= 1


def test_patch_figures_are_means_over_processes_that_have_patches(monkeypatch):
    """Two processes, one with patches and one without: the mean of what they return is the figure of the first."""
    q = torch.softmax(torch.randn(6, 8, dtype=torch.float64), 1)
    targets = Targets(q.log(), 1.0, torch.zeros(8, dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
    none = Targets(targets.scores[:0], 1.0, targets.prototypes, targets.samples[:0])
    parts = {name: torch.tensor(1.0) for name in ("dino_global", "dino_local", "ibot")}
    parts |= {"class_targets": targets, "features": torch.randn(4, 3), "patch_features": torch.randn(4, 3)}
    monkeypatch.setattr("parallel.mean_over_processes", lambda x: torch.full_like(x, 0.5))
    start = {"dino": 2.0, "ibot": 1.0}
    here, there = (health_dinov2(parts | {"patch_targets": t}, start) for t in (targets, none))
    assert here.keys() == there.keys()
    entropy = -(q * q.log()).sum(1).mean()
    assert (here["patch_entropy"] + there["patch_entropy"]) / 2 == pytest.approx(entropy.item())
    used = (here["patch_prototypes_used"] + there["patch_prototypes_used"]) / 2
    assert used == len(q.argmax(1).unique())


def test_what_a_run_leaves(finished):
    folder, said = finished
    loaded = checkpoints.read(folder / checkpoints.NAME)
    assert loaded["args"]["method"] == "dinov2" and loaded["epoch"] == 3
    assert {"dino_loss.center", "ibot_patch_loss.center"} == loaded["dino_loss"].keys()
    names = {k.split(".")[0] for k in loaded["teacher"]}
    assert names == {"backbone", "dino_head", "ibot_head"} and "backbone.mask_token" in loaded["teacher"]
    logged = json_lines(folder / "log_steps.txt")[-1]
    assert {"dino_local", "dino_global", "ibot", "koleo", "dino_left", "ibot_left", "entropy", "patch_entropy",
            "neighbour_distance", "prototypes_used", "patch_prototypes_used", "feature_rank",
            "patch_rank"} <= logged.keys()
    terms = [logged[k] for k in ("dino_local", "dino_global", "ibot", "koleo")]
    assert logged["loss"] == pytest.approx(sum(terms), rel=1e-5)
    assert "memory" in said and "untrained" in said and (folder / "pictures" / "attention_epoch0001.png").exists()
    assert 0 <= json_lines(folder / "log.txt")[-1]["knn_top1"] <= 100  # of 16 images: chance decides


def test_continue_with_heads_and_with_another_size(finished, tmp_path, monkeypatch):
    folder, _ = finished
    for extra in ([], ["--global_crops_size", 24, "--local_crops_size", 12]):
        out = tmp_path / str(len(extra))
        args = [*ARGS, *extra, "--steps", 2, "--freeze_backbone_epochs", 1, "--warmup_epochs", 0,
                "--warmup_teacher_temp_epochs", 0, "--eval_knn_every", 3, "--output_dir", out]
        run = Run(*args, "--init_from", folder / checkpoints.NAME, "--init_heads")
        assert run.wait() == [0], run.output()
        before, after = checkpoints.read(folder / checkpoints.NAME)["teacher"], checkpoints.read(out / "checkpoint.pth")
        assert torch.equal(before["backbone.mask_token"], after["student"]["backbone.mask_token"])  # frozen
        same = torch.equal(before["backbone.blocks.0.mlp.fc1.weight"],
                           after["student"]["backbone.blocks.0.mlp.fc1.weight"])
        assert same and not torch.equal(before["dino_head.mlp.0.weight"], after["student"]["dino_head.mlp.0.weight"])
        assert "weights it starts from" in run.output() and "starting weights" in run.output()
        size = int(extra[1]) if extra else 16
        assert after["student"]["backbone.pos_embed"].shape[1] == 1 + (size // 4) ** 2
    again = Run(*args)  # not needed any more
    assert again.wait() == [0] and "resuming" in again.output(), again.output()


def test_heads_are_trained_before_the_backbone():
    """10 steps per epoch: frozen to step 20, the backbone's warm-up to 50, prototypes fixed from 20 to 30."""
    flags = ["--epochs", 10, "--freeze_backbone_epochs", 2, "--warmup_epochs", 3, "--lr", 0.01]
    plan = main_dinov2.make_plan(parsed(*flags), 80)
    peak, steps = 0.01 * math.sqrt(8 / 1024), range(100)
    assert plan.lr.max() == pytest.approx(peak) and plan.warmup in (49, 50)
    assert not plan.backbone_lr[:21].any() and all(plan.backbone_lr[21:])
    assert plan.backbone_lr[20:50] == pytest.approx([peak * i / 29 for i in range(30)])
    assert plan.lr[0] == 0 and plan.lr[2:50] == pytest.approx([peak] * 48)  # a ramp of a tenth
    assert (plan.lr[50:] == plan.backbone_lr[50:]).all() and plan.lr[-1] < 0.01 * peak
    assert [plan.last_layer_lr[i] for i in steps] == [0 if 20 <= i < 30 else plan.lr[i] for i in steps]
    whole = main_dinov2.make_plan(parsed(*flags, "--freeze_backbone_epochs", 10), 80)  # to train heads alone
    assert not whole.backbone_lr.any() and (whole.last_layer_lr == whole.lr).all() and whole.warmup in (29, 30)
    with pytest.raises(Refused, match="^--freeze_backbone_epochs 8 and --warmup_epochs 3, .* 10 epochs; lower"):
        main_dinov2.make_plan(parsed(*flags, "--freeze_backbone_epochs", 8), 80)


def test_a_frozen_epoch_trains_the_heads(finished, tmp_path, run_here, monkeypatch):
    """The first of 20 epochs, with a long warm-up and prototypes that are fixed for an epoch, as by default."""
    monkeypatch.setattr(main_dinov2.Requests, "agreed", lambda self, step: (step == 8, False))
    assert run_here("--steps", 0, "--epochs", 20, "--freeze_backbone_epochs", 1, "--warmup_epochs", 10, "--lr", 0.01,
                    "--log_every", 1, "--init_from", finished[0] / checkpoints.NAME,
                    "--output_dir", tmp_path) == main_dinov2.TO_BE_CONTINUED
    first, *_, last = json_lines(tmp_path / "log_steps.txt")
    assert all(last[name] < 0.8 * first[name] for name in ("dino_left", "ibot_left"))


def test_a_run_whose_warm_up_began_with_the_freeze_is_not_resumed(finished, tmp_path, run_here, capsys):
    flags = ["--steps", 3, "--freeze_backbone_epochs", 0.2, "--init_from", finished[0] / checkpoints.NAME,
             "--output_dir", tmp_path]
    assert run_here(*flags) == 0 and run_here(*flags) == 0
    written = checkpoints.read(tmp_path / checkpoints.NAME)
    del written["args"][state_of_runs.WARMUP_AFTER_FREEZE]
    checkpoints.save(written, tmp_path / checkpoints.NAME)
    capsys.readouterr()
    assert run_here(*flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--freeze_backbone_epochs" in said and "--init_from" in said


EQUAL = ["--koleo_loss_weight", 0, "--drop_path_rate", 0, *CENTERING]


@pytest.mark.parametrize("flags, words, absent", [
    ([], ["KoLeo", "Sinkhorn-Knopp", "drop path"], ["rounding", "centre of patches"]),
    ([*EQUAL, "--drop_path_rate", 0.3], ["drop path", "centre of patches"], ["KoLeo", "Sinkhorn"]),
    ([*EQUAL, "--ibot_loss_weight", 0], ["rounding"], ["KoLeo", "Sinkhorn", "drop path", "centre of patches"]),
    (["--koleo_all_processes"], ["drop path"], ["KoLeo", "Sinkhorn", "rounding"]),
], ids=["accumulated", "centring", "equal", "processes"])  # fmt: skip
def test_a_resume_says_what_another_split_of_the_images_changes(tmp_path, run_here, capsys, flags, words, absent):
    args = [*flags, "--output_dir", tmp_path]
    assert run_here(*args) == 0 and run_here(*args) == 0
    assert "rounding" not in capsys.readouterr().out
    if "--koleo_all_processes" in flags:  # as if two processes had written it
        written = checkpoints.read(tmp_path / checkpoints.NAME)
        written["args"] |= {"batch_size_per_gpu": 4, "world_size": 2}
        checkpoints.save(written | {key: 2 * written[key] for key in ("rng", "meters")}, tmp_path / checkpoints.NAME)
        change = ["2 -> 1 processes", "batch_size_per_gpu 4 -> 8"]
    else:
        args += ["--batch_size_per_gpu", 4, "--grad_accum_steps", 2]
        change = ["batch_size_per_gpu 8 -> 4", "grad_accum_steps 1 -> 2"]
    assert run_here(*args) == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if change[0] in line)
    assert all(word in line for word in (*change, *words)) and not any(word in line for word in absent)


def test_start_from_weights_of_other_channels(tmp_path):
    """Both networks start from the file, its patch embedding averaged over the three channels."""
    old = vision_transformer.build_backbone(
        "vit_nano", 4, img_size=16, method="dinov2", init_values=0.1, num_register_tokens=2)[0].state_dict()
    torch.save(old, tmp_path / "w.pth")
    args = main_dinov2.get_args_parser().parse_args([str(a) for a in (
        *ARGS, "--in_chans", 2, "--mean", 0, 0, "--std", 1, 1, "--init_from", tmp_path / "w.pth", "--init_in_chans",
        "mean", "--interpolate_antialias", "true", "--interpolate_offset", 0)])  # of published weights with registers
    name = "patch_embed.proj.weight"
    for network in main_dinov2.make_networks(args):
        new = network.backbone.state_dict()
        torch.testing.assert_close(new[name], old[name].sum(1, keepdim=True).expand(-1, 2, -1, -1) / 2)
        assert all(torch.equal(v, old[k]) for k, v in new.items() if k != name)


def test_distillation(finished, tmp_path):
    """The frozen teacher is of another architecture; the result is the student's moving average."""
    folder, _ = finished
    args = [*ARGS, "--arch", "vit_tiny", "--drop_path_rate", 0, "--distill_from", folder / checkpoints.NAME]
    for tokens in ("all", "masked"):
        run = Run(*args, "--ibot_tokens", tokens, "--steps", 3, "--warmup_epochs", 0, "--warmup_teacher_temp_epochs",
                  0, "--output_dir", tmp_path / tokens)  # fmt: skip
        assert run.wait() == [0], run.output()
        made = checkpoints.read(tmp_path / tokens / checkpoints.NAME)
        assert made["teacher"]["backbone.cls_token"].shape[-1] == 192
        assert not made["student"]["backbone.mask_token"].any()  # nothing is masked
    refused = Run(*args, "--out_dim", 48, "--output_dir", tmp_path / "other")
    assert refused.wait() == [2] and "--out_dim 32" in refused.output() and not (tmp_path / "other").exists()


@pytest.mark.parametrize("distilled", [False, True], ids=["own targets", "distillation"])
def test_the_networks_of_a_step_are_compiled(finished, tmp_path, run_here, monkeypatch, distilled):
    """The student's backbone, and that of the targets."""
    of_the_step, used = [], []
    make_teacher, compile_module = main_dinov2.make_teacher, torch.nn.Module.compile

    def record_networks(args, run):
        teacher = make_teacher(args, run)
        of_the_step.extend([teacher.backbone, run.student.backbone])
        return teacher

    def record_calls(module, mode, dynamic):
        def backend(graph, inputs):
            return lambda *args: used.append(module) or graph.forward(*args)
        compile_module(module, backend=backend, dynamic=dynamic, fullgraph=True)

    monkeypatch.setattr(main_dinov2, "make_teacher", record_networks)
    monkeypatch.setattr(torch.nn.Module, "compile", record_calls)
    monkeypatch.setattr(compiling, "prepare", lambda: None)
    monkeypatch.setattr(fused, "compiled", lambda function: function)
    flags = ["--drop_path_rate", 0, "--distill_from", finished[0] / checkpoints.NAME] if distilled else []
    assert run_here("--compile", *flags, "--output_dir", tmp_path) == 0
    assert len(used) == 2 and all(a is b for a, b in zip(used, of_the_step, strict=True))


@pytest.mark.parametrize("stored, extra, words", [
    ({}, ["--mean", 0.5, 0.5, 0.5], ["--mean 0.5 0.5 0.5", "--mean 0.485 0.456 0.406"]),
    ({"std": [0.2] * 3, "value_range": [0.0, 1000.0]}, [], ["--std 0.2 0.2 0.2 --value_range 0 1000"]),
    ({}, ["--value_range", 0, 1000], ["--value_range 0 1000", "no --value_range", "give the former"]),
    ({"mean": 0.5}, ["--mean", 0.1, 0.1, 0.1], ["--mean 0.1 0.1 0.1", "--mean 0.5,"]),
    ({"args": {"arch": "vit_nano"}}, ["--mean", 0.5, 0.5, 0.5, "--value_range", 0, 1000], []),
], ids=["mean", "std and range", "no range", "one number", "not stored"])  # fmt: skip
def test_the_frozen_network_must_see_images_as_it_was_trained_on(finished, tmp_path, monkeypatch, stored, extra, words):
    make_small_in(monkeypatch)
    loaded = checkpoints.read(finished[0] / checkpoints.NAME)
    loaded["args"] = stored["args"] if "args" in stored else loaded["args"] | stored
    torch.save(loaded, tmp_path / "teacher.pth")
    argv = [*ARGS, "--distill_from", tmp_path / "teacher.pth", *extra]
    args = main_dinov2.get_args_parser().parse_args([str(a) for a in argv])
    if not words:
        assert main_dinov2.matching_teacher(args)
        return
    with pytest.raises(Refused) as refused:
        main_dinov2.matching_teacher(args)
    assert all(word in str(refused.value) for word in ("--distill_from", *words))


def test_the_frozen_network_is_known_by_its_weights(finished, tmp_path, run_here, capsys):
    """Its file may move, and nothing else: other weights there are refused."""
    loaded, out = checkpoints.read(finished[0] / checkpoints.NAME), tmp_path / "out"

    def resumed(name: str) -> tuple[int, str]:
        return run_here("--distill_from", tmp_path / name, "--output_dir", out), capsys.readouterr().err

    for name in ("one.pth", "two.pth", "other.pth"):
        torch.save(loaded, tmp_path / name)
        loaded["teacher"]["dino_head.mlp.0.bias"] += name == "two.pth"
    assert resumed("one.pth")[0] == resumed("two.pth")[0] == 0
    code, said = resumed("other.pth")
    assert code == 2 and "weights of --distill_from" in said and "other.pth" not in said
    assert run_here("--output_dir", out) == 2 and "weights of --distill_from" in capsys.readouterr().err  # none
    written = checkpoints.read(out / checkpoints.NAME)
    del written["args"]["distill_from_weights"]  # as older versions wrote it: the path decides
    for name, expected in (("one.pth", 0), ("two.pth", 2)):
        checkpoints.save(written, out / checkpoints.NAME)
        code, said = resumed(name)
        assert code == expected and ("distill_from" in said) == (code == 2)


@pytest.mark.parametrize("stored, given, changed", [
    ({"ibot_tokens": "masked"}, {"ibot_tokens": "all", "distill_from": ""}, set()),  # of no effect
    ({"ibot_tokens": "masked"}, {"ibot_tokens": "all", "distill_from": "x"}, {"ibot_tokens", "distill_from"}),
    ({"init_heads": True, "init_from": "x"}, {"init_heads": False, "init_from": ""}, set()),
])  # fmt: skip
def test_flags_that_may_differ_on_a_resume(stored, given, changed):
    assert state_of_runs.Run.changed(SimpleNamespace(settings=given), {"args": stored}).keys() == changed


def test_a_resume_needs_no_file_of_weights(finished, tmp_path, run_here):
    assert run_here("--init_from", finished[0] / checkpoints.NAME, "--init_heads", "--output_dir", tmp_path) == 0
    assert run_here("--output_dir", tmp_path) == 0


def test_a_student_that_collapses_in_distillation_is_named(monkeypatch):
    """The targets of a frozen network stay as they are, so only what the student makes of the images tells."""
    make_small_in(monkeypatch)
    torch.manual_seed(0)
    args = main_dinov2.get_args_parser().parse_args([str(a) for a in (*ARGS, "--distill_from", "x")])
    student, frozen = (main_dinov2.make_network(args) for _ in range(2))
    objective = main_dinov2.make_loss(args)
    crops = [torch.randn(16, 3, 16, 16), torch.randn(16, 3, 8, 8)]
    for collapsed in (False, True):
        if collapsed:
            student.backbone.norm.weight.data.zero_()  # all tokens are equal
        parts = dinov2.losses(student, frozen, crops, torch.zeros(16, 16, dtype=torch.bool), objective, 0.02)[1]
        figures = {k: v.item() for k, v in health_dinov2(parts, main_dinov2.losses_at_start(args)).items()}
        line = main_dinov2.warning(figures, objective, 16, False, {})
        assert "student" in line and "directions" in line if collapsed else line is None
        assert (figures["patch_rank"] < 2.5) == collapsed and parts["patch_features"].shape == (16, 32)


@pytest.mark.parametrize("flags, step, words", [
    (["--layerscale", "1e-5"], 0, None),
    (["--layerscale", "1e-5", "--centering", "centering"], 9, ["uniform", "--centering sinkhorn_knopp"]),
    (["--layerscale", "1e-5"], 9, ["uniform", "--lr"]),
], ids=["new", "centring", "sinkhorn"])
def test_uniform_outputs_of_a_new_network_are_no_collapse(flags, step, words):
    """LayerScale of 1e-5 makes the class tokens of a new network almost equal. The warm-up has 8 steps."""
    args = main_dinov2.get_args_parser().parse_args([str(a) for a in (*ARGS, *flags)])
    plan, objective = main_dinov2.make_plan(args, 64), main_dinov2.make_loss(args)
    means = {"entropy": math.log(32), "prototypes_used": 8.0, "feature_rank": 5.0}
    line = main_dinov2.warning(means, objective, 16, step <= plan.warmup, {"dino_left": 0.9})
    assert line is None if words is None else all(word in line for word in words)
    assert not line or ("--centering" in line) == ("centering" in flags)


def test_a_loss_that_never_left_its_start_is_no_collapse(tmp_path, run_here, capsys, monkeypatch):
    """Uniform outputs to the end; the same after a term that has fallen is a collapse, also after a resume."""
    means = {"entropy": math.log(32), "prototypes_used": 8.0, "feature_rank": 5.0}
    objective = main_dinov2.make_loss(parsed())
    line = main_dinov2.warning(means, objective, 16, False, {"dino_left": 0.999, "ibot_left": 0.5})
    assert all(word in line for word in ("dino_left", "98%", "--grad_accum_steps", "--out_dim", "--layerscale 0"))
    assert "uniform" in main_dinov2.warning(means, objective, 16, False, {"dino_left": 0.9})
    one = means | {"entropy": 0.0, "prototypes_used": 1.0}  # a collapse is named first
    assert "one prototype" in main_dinov2.warning(one, objective, 16, False, {"dino_left": 0.3, "ibot_left": 0.99})
    flags = ["--layerscale", 1e-5, "--lr", 1e-4, "--warmup_teacher_temp", 1, "--teacher_temp", 1, "--log_every", 1,
             "--output_dir", tmp_path]
    assert run_here("--steps", 3, *flags) == 0 and "WARNING at step 2: dino_left" in capsys.readouterr().out
    written = checkpoints.read(tmp_path / checkpoints.NAME)
    assert written["lowest_left"]["dino_left"] > 0.98
    del written["lowest_left"]  # as older versions wrote it
    checkpoints.save(written, tmp_path / checkpoints.NAME)
    assert run_here("--steps", 5, "--extend", *flags) == 0
    said = capsys.readouterr().out
    assert "WARNING at step 4" not in said or "dino_left never" not in said


@pytest.mark.parametrize("flags, images, words", [
    (["@presets/dinov2_shapes.txt"], 3000, []), (["@presets/dinov2_imagenette_cpu.txt"], 9469, []),
    (["@presets/dinov2_imagenette.txt"], 9469, []),
    ([], 100_000, ["--out_dim 65536", "64 images per step", "4096 or less", "--grad_accum_steps"]),
    (["--batch_size_per_gpu", 2048], 5000, ["--out_dim 65536", "of 5000", "2500 or less"]),
    (["--ibot_separate_head", "true", "--out_dim", 64, "--ibot_out_dim", 65536], 9999, ["--ibot_out_dim 65536"]),
    (["--ibot_separate_head", "true", "--ibot_out_dim", 60000], 9999, ["--out_dim 65536", "--ibot_out_dim 60000"]),
    (["--distill_from", "x"], 100, []), (["--init_heads"], 100, []),
], ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else str(x))  # fmt: skip
def test_prototypes_that_so_few_images_cannot_use_are_told(flags, images, words):
    args = main_dinov2.get_args_parser().parse_args([str(a) for a in flags])
    lines = main_dinov2.many_prototypes(args, images)
    assert bool(lines) == bool(words) and all(word in "\n".join(lines) for word in words)


def test_what_a_run_says_of_few_images_and_of_masks_that_never_happen(tmp_path, run_here, capsys):
    assert run_here(*CENTERING, "--mask_ratio", 0.01, 0.02, "--batch_size_per_gpu", 2, "--eval_data_path", "x",
                    "--output_dir", tmp_path) == 0
    said = capsys.readouterr().out
    assert "WARNING: --eval_data_path x" in said
    assert said.count("directions") == 1 and "--batch_size_per_gpu 2" in said
    assert "WARNING: --mask_ratio 0.01 0.02" in said and "ibot left" not in said
    assert "loss of uniform outputs: 3.47 on class tokens, 0.00 on patches" in said


def test_replay_of_a_distillation_looks_into_the_frozen_network(finished, tmp_path, run_here, monkeypatch, capsys):
    teacher = checkpoints.read(finished[0] / checkpoints.NAME)
    torch.save(teacher, tmp_path / "teacher.pth")
    with monkeypatch.context() as patch:
        patch.setattr(dinov2, "koleo", lambda tokens, *args: tokens.sum() * float("nan"))
        assert run_here("--distill_from", tmp_path / "teacher.pth", "--output_dir", tmp_path) == 1
    assert run_here("--replay", tmp_path / replay.NAME) == 0
    said = capsys.readouterr().out
    assert "WARNING: --drop_path_rate 0.3" in said
    assert "frozen network: all outputs are finite" in said and "in float32 the step is finite" in said
    teacher["teacher"]["dino_head.mlp.0.bias"] += 1
    torch.save(teacher, tmp_path / "teacher.pth")
    assert run_here("--replay", tmp_path / replay.NAME) == 2 and "other weights" in capsys.readouterr().err


def draw_sets(folder) -> None:
    """The smallest data sets of videos, of copies (copies/), and of landmarks (toy/)."""
    draw_video(folder / "davis", "ant", frames=2, size=(16, 32))
    truth = {"bbx": [0, 0, 16, 16], "easy": [0], "hard": [1], "junk": []}
    for name, files in {"copies/database": ["0", "1"], "copies/queries": ["0"], "toy/jpg": ["a", "b", "q"]}.items():
        (folder / name).mkdir(parents=True)
        for i, file in enumerate(files):
            image = Image.fromarray(shapes.draw(i, 16)[0])
            image.save(folder / name / f"{file}.{'jpg' if 'toy' in name else 'png'}")
    (folder / "copies" / "ground_truth.csv").write_text("query,match,attack\n0.png,0.png,none\n")
    (folder / "toy" / "gnd_toy.json").write_text(json.dumps({"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [truth]}))


@pytest.mark.parametrize("script, extra", [
    ("eval_knn", "--data_path shapes:64x16 --nb_knn 5 --num_workers 0"),
    ("eval_linear", "--data_path shapes:64x16 --epochs 1 --num_workers 0 --batch_size_per_gpu 16 --n_last_blocks 2"),
    ("extract_features", "--data_path shapes:20x16 --num_workers 0"),
    ("visualize_attention", "--image_path FOLDER/copies/queries/0.png --image_size 16"),
    ("eval_segmentation", "--data_path shapes:10x16 --image_size 16"),
    ("eval_depth", "--data_path scenes:8x16 --steps 2 --batch_size 4 --num_workers 0"),
    ("eval_semantic", "--data_path shapes:8x16 --crop_size 16 --steps 2 --batch_size 4 --num_workers 0"),
    ("eval_video_segmentation", "--data_path FOLDER/davis --image_size 32"),
    ("eval_image_retrieval", "--data_path FOLDER --dataset toy --imsize 16 --num_workers 0"),
    ("eval_copy_detection", "--data_path FOLDER/copies --image_size 16 --num_workers 0"),
    ("evaluate", "--data_path shapes:40x16 --linear_epochs 1 --linear_views 1 --num_workers 0 --crop_size 16"),
    ("curate", "--data_path FOLDER/copies/database --num_workers 0"),
    ("export", "--format safetensors"),
])
def test_every_script_reads_its_checkpoints(finished, tmp_path, monkeypatch, script, extra):
    folder, _ = finished
    make_small_in(monkeypatch)
    module = importlib.import_module(script)
    flag = "--output" if script in ("export", "extract_features") else "--output_dir"
    out = tmp_path / {"export": "model.safetensors", "extract_features": "features.npy"}.get(script, "out")
    draw_sets(tmp_path)
    extra = extra.replace("FOLDER", str(tmp_path))
    argv = ["--pretrained_weights", str(folder / checkpoints.NAME), *extra.split(), flag, str(out)]
    parser = module.get_args_parser()
    argv += [] if script == "export" else ["--device", "cpu"]
    assert module.main(parser.parse_args(argv)) == 0


BAD = [
    (["--arch", "resnet50"], ["--arch resnet50", "main_dino.py"]),
    (["--compile", "reduce-overhead"], ["--compile reduce-overhead", "--compile default"]),
    (["--compile", "auto"], ["--compile auto", "--compile on"]),
    (["--ibot_out_dim", "7", "--ibot_separate_head", "false"], ["--ibot_out_dim 7", "--ibot_separate_head true"]),
    ([*CENTERING, "--ibot_head_hidden_dim", "24"], ["--ibot_head_hidden_dim 24", "--head_hidden_dim 32",
                                                    "--ibot_separate_head true"]),
    ([*CENTERING, "--ibot_head_bottleneck_dim", "8"], ["--ibot_head_bottleneck_dim 8", "--ibot_separate_head true"]),
    ([*CENTERING, "--ibot_head_nlayers", "2"], ["--ibot_head_nlayers 2", "--ibot_separate_head true"]),
    (["--freeze_backbone_epochs", "1"], ["--freeze_backbone_epochs 1", "--init_from"]),
    (["--init_heads"], ["--init_heads", "--init_from"]),
    (["--init_in_chans", "tile"], ["--init_in_chans tile", "--init_from"]),
    (["--mask_ratio", "0.5", "0.1"], ["--mask_ratio 0.5 0.1", "low <= high"]),
    (["--mask_probability", "0"], ["--mask_probability 0", "--ibot_separate_head false"]),
    (["--distill_from", "/absent"], ["--distill_from /absent", "no such file"]),
    (["--warmup_epochs", "9"], ["--warmup_epochs 9", "--epochs 3"]),
    (["--adamw_beta1", "1"], ["--adamw_beta1", "1 is out of range", "at most 0.999999"]),
    (["--adamw_beta2", "1"], ["--adamw_beta2", "1 is out of range", "at most 0.999999"]),
    (["--interpolate_offset", "1"], ["--interpolate_offset", "1 is out of range", "at most 0.99"]),
    (["--interpolate_offset", "1e-17"], ["--interpolate_offset 1e-17", "give 0"]),
    (["--layerscale", "1e300"], ["--layerscale", "1e300 is out of range", "at most 1e+30"]),
    (["--head_nlayers", "9" * 30], ["memory ran out"]), (["--num_register_tokens", "9" * 30], ["memory ran out"]),
    (["--ibot_tokens", "masked"], ["--ibot_tokens masked", "--distill_from"]),
    (["--lr", "5e-6"], ["--min_lr 1e-06", "--lr 5e-06", "8 images", "lower"]),
    (["--mask_probability", "0.05"], ["--mask_probability 0.05", "16 global crops", "0.063 or more",
                                      "--ibot_separate_head false"]),
    (["--mask_ratio", "0.01", "0.02"], ["--mask_ratio 0.01 0.02", "16 patches", "0.125 or more",
                                        "--ibot_separate_head false"]),
    (["--global_crops_size", "4", "--local_crops_number", "0"],
     ["--global_crops_size 4", "--patch_size 4", "make it larger"]),
]


def parsed(*extra):
    return main_dinov2.get_args_parser().parse_args([str(a) for a in (*ARGS, *extra)])


@pytest.mark.parametrize("extra, words", BAD, ids=lambda x: " ".join(map(str, x)))
def test_bad_input(tmp_path, capsys, extra, words):
    try:
        code = main_dinov2.main(parsed(*extra, "--output_dir", tmp_path / "out"))
    except SystemExit as error:
        code = error.code
    assert code == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and all(word in said for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra", [[*CENTERING, "--ibot_head_nlayers", 2], ["--freeze_backbone_epochs", 1]])
def test_a_begun_run_keeps_flags_that_a_new_one_may_not_have(tmp_path, extra):
    args = parsed(*extra, "--output_dir", tmp_path)
    with pytest.raises(Refused):
        main_dinov2.check_args(args)
    (tmp_path / checkpoints.NAME).touch()
    main_dinov2.check_args(args)


@pytest.mark.parametrize("extra, words", [
    (["--mask_ratio", 0.1, 0.4, "--distill_from", "x"], ["--mask_ratio 0.1 0.4", "--ibot_tokens all"]),
    (["--mask_probability", 0.3, "--distill_from", "x"], ["--mask_probability 0.3", "--ibot_tokens all"]),
    (["--mask_ratio", 0.1, 0.4, "--mask_probability", 0], ["--mask_ratio 0.1 0.4", "--mask_probability 0"]),
    (["--koleo_all_processes", "--koleo_loss_weight", 0], ["--koleo_all_processes", "--koleo_loss_weight 0"]),
    (["--warmup_teacher_temp", 0.03, "--warmup_teacher_temp_epochs", 0],
     ["--warmup_teacher_temp 0.03", "--warmup_teacher_temp_epochs 0"]),
    (["--eval_data_path", "x"], ["--eval_data_path x", "--eval_knn_every 0"]),
    (["--mask_ratio", 0.1, 0.4, "--distill_from", "x", "--ibot_tokens", "masked"], []),
    (["--mask_ratio", 0.1, 0.5, "--mask_probability", 0, "--koleo_loss_weight", 0, "--warmup_teacher_temp_epochs", 0],
     []),
], ids=lambda x: " ".join(map(str, x)))  # fmt: skip
def test_flags_that_others_make_void_are_warned_of(extra, words):
    lines = main_dinov2.without_effect(parsed(*extra))
    assert len(lines) == bool(words) and all(word in line for line in lines for word in ("WARNING", *words))


@pytest.mark.parametrize("theirs, ours, words", [
    ([], CENTERING, ["ibot_head.", "nothing in the network", "--ibot_separate_head true", "--ibot_out_dim 24"]),
    (CENTERING, [], ["ibot_head.", "nothing there", "--ibot_separate_head false"]),
    (["--head_hidden_dim", 16], ["--head_hidden_dim", 16, "--head_nlayers", 2],
     ["dino_head.mlp.4", "--head_nlayers 3"]),
    ([], ["--out_dim", 16], ["dino_head.last_layer", "(32, ", "(16, ", "--out_dim 32"]),
])
@pytest.mark.parametrize("stored", [True, False])
def test_heads_of_other_shapes_are_refused(tmp_path, monkeypatch, theirs, ours, words, stored):
    """No trained layer is left out in silence."""
    make_small_in(monkeypatch)
    args, file = parsed(*theirs), tmp_path / "w.pth"
    flags = {"args": vars(args) | {"method": "dinov2"}} if stored else {}
    torch.save({"teacher": main_dinov2.make_network(args).state_dict()} | flags, file)
    with pytest.raises(Refused) as raised:
        main_dinov2.make_networks(parsed(*ours, "--init_from", file, "--init_heads"))
    assert all(word in str(raised.value) for word in ("--init_heads", str(file), *words)), raised.value


@pytest.mark.parametrize("flags", [["--init_heads", "--init_from"], ["--drop_path_rate", 0, "--distill_from"]])
@pytest.mark.parametrize("centres", ["of a run", "unused", "absent"])
def test_centres_come_with_the_heads(tmp_path, monkeypatch, capsys, flags, centres):
    make_small_in(monkeypatch)
    args, file = parsed(*CENTERING), tmp_path / "w.pth"
    old = main_dinov2.make_loss(args).state_dict()
    if centres == "of a run":
        old = {k: torch.randn(v.shape) for k, v in old.items()}
    stored = {} if centres == "absent" else {"dino_loss": old, "args": vars(args) | {"method": "dinov2"}}
    torch.save({"teacher": main_dinov2.make_network(args).state_dict()} | stored, file)
    args = parsed(*CENTERING, *flags, file)
    new = main_dinov2.make_run(args, main_dinov2.make_plan(args, 64), 64, torch.device("cpu")).dino_loss.state_dict()
    assert all(torch.equal(v, old[k]) for k, v in new.items()) and len(new) == 2
    assert ("starts at zero" in capsys.readouterr().out) == (centres != "of a run")


@pytest.mark.parametrize("stored", [None, {}, {"interpolate_antialias": True, "interpolate_offset": 0.0}])
def test_a_frozen_teacher_interpolates_as_it_was_trained(tmp_path, stored):
    """Tensors of a run with registers have the names of the published weights, which were trained in another way."""
    flags = {} if stored is None else {"args": {"arch": "vit_nano", "method": "dinov2"} | stored}
    torch.save({"teacher": main_dinov2.make_network(parsed()).state_dict()} | flags, tmp_path / "w.pth")
    network, _ = main_dinov2.read_teacher(parsed("--distill_from", tmp_path / "w.pth"))
    assert network.backbone.num_register_tokens == 2
    assert (network.backbone.interpolate_antialias, network.backbone.interpolate_offset) == (
        (True, 0.0) if stored else (False, 0.1))


def test_heads_of_a_plain_backbone_are_refused(finished, tmp_path, capsys):
    folder, _ = finished
    teacher = checkpoints.read(folder / checkpoints.NAME)["teacher"]
    backbone = {k.removeprefix("backbone."): v for k, v in teacher.items() if k.startswith("backbone.")}
    torch.save(backbone, tmp_path / "backbone.pth")
    for flag in (["--init_heads", "--init_from"], ["--distill_from"]):
        run = Run(*ARGS, "--interpolate_antialias", "true", "--interpolate_offset", 0, *flag, tmp_path / "backbone.pth",
                  "--output_dir", tmp_path / "out")
        assert run.wait() == [2], run.output()
        assert "no heads" in run.output() and "--freeze_backbone_epochs" in run.output()


def test_a_head_of_dino_is_named(tmp_path):
    backbone, width = vision_transformer.build_backbone("vit_nano", 8, img_size=16, depth=1)
    dino = utils.MultiCropWrapper(backbone, vision_transformer.DINOHead(width, 8, nlayers=1))
    for head, message in ((dino, "a head of DINO, which has none for patches; train"), (dino.backbone, "no heads")):
        torch.save({"teacher": head.state_dict()}, tmp_path / "w.pth")
        with pytest.raises(Refused, match=f"^--distill_from .*w.pth: it has {message}.* --freeze_backbone_epochs"):
            networks.read_heads(str(tmp_path / "w.pth"), "--distill_from")


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("operands could not be broadcast")

    make_small_in(monkeypatch)
    monkeypatch.setattr(dinov2, "class_loss", broken)
    args = main_dinov2.get_args_parser().parse_args([str(a) for a in (*ARGS, "--output_dir", tmp_path / "out")])
    with pytest.raises(ValueError, match="broadcast"):
        main_dinov2.main(args)


def test_only_warmups_longer_than_published_ones_are_warned_of():
    def warned(*argv, images):
        args = main_dinov2.get_args_parser().parse_args(argv)
        plan = main_dinov2.make_plan(args, images)
        return long_warmups(plan.steps, args.epoch_steps or plan.steps_per_epoch,
                            **{flag: getattr(args, flag) for flag in LONGEST})

    for recipe in ("dinov2_vitl16_short", "dinov2_vitl14", "dinov2_vitg14"):
        assert warned(f"@presets/{recipe}.txt", "--data_path", "x", images=1_281_167) == []
    line, = warned("--epochs", "10", "--warmup_epochs", "3", "--warmup_teacher_temp_epochs", "3", images=6400)
    assert "--warmup_epochs 3" in line and "30%" in line
