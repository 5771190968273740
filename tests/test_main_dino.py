"""The training script as a user runs it."""

import math
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import ENV, SMALL, json_lines, launch

import main_dino
import utils
from imagesets import loaders
from parallel import Refused
from pretraining import networks, options, plan
from pretraining.state import Run
from vision_transformer import build_backbone
from weights import backbones, checkpoints

pytestmark = pytest.mark.usefixtures("small_heads")  # of runs in this process
NANO = [*SMALL, "--arch", "vit_nano"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole small run with k-NN, whose folder the tests below look at."""
    out = tmp_path_factory.mktemp("run")
    extra = ["--eval_knn_every", 1, "--saveckp_freq", 1, "--tensorboard"]
    done = launch("main_dino.py", *SMALL, *extra, "--output_dir", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_leaves_checkpoint_log_curve_and_attention_picture(finished):
    out, stdout = finished
    names = {p.name for p in out.iterdir()}
    assert {"checkpoint.pth", "checkpoint_best.pth", "checkpoint0000.pth", "checkpoint0001.pth", "log.txt",
            "log_steps.txt", "curves.png", "attention.png", "pca.png"} <= names  # fmt: skip
    assert any(name.startswith("events.out") for name in names)
    lines = json_lines(out / "log.txt")
    assert [line["epoch"] for line in lines] == [0, 1]
    for key in ("train_loss", "train_lr", "train_wd", "train_entropy", "train_kl", "train_ln_k", "train_center_norm",
                "train_feature_std", "train_feature_rank", "train_prototypes_used", "knn_top1", "knn_top5",
                "knn_untrained", "knn_pixels"):  # fmt: skip
        assert isinstance(lines[-1][key], float), key
    assert "20-NN before training" in stdout and "images/s" in stdout and "eta" in stdout


def test_checkpoint_has_the_published_keys_and_plain_types(finished):
    state = torch.load(finished[0] / "checkpoint.pth", weights_only=True)
    assert {"student", "teacher", "optimizer", "fp16_scaler", "dino_loss", "epoch", "args"} <= state.keys()
    assert state["epoch"] == 2 and state["args"]["arch"] == "vit_tiny"
    for name in ("backbone.blocks.0.attn.qkv.weight", "head.last_layer.weight_g", "head.mlp.0.bias"):
        assert name in state["teacher"] and name in state["student"]
    backbone, info = backbones.load_backbone(str(finished[0] / "checkpoint.pth"))
    assert info["global_crops_size"] == 32 and backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


def test_starting_again_after_the_end_changes_nothing(finished):
    before = (finished[0] / "log.txt").read_text()
    again = launch("main_dino.py", *SMALL, "--eval_knn_every", 1, "--output_dir", finished[0])
    assert again.returncode == 0 and "resuming from" in again.stdout, again.stderr
    assert (finished[0] / "log.txt").read_text() == before


def test_other_hyperparameters_are_refused_with_the_differences(finished):
    done = launch("main_dino.py", *SMALL, "--lr", 0.01, "--out_dim", 32, "--output_dir", finished[0])
    assert done.returncode == 2
    assert "lr 0.0005 -> 0.01" in done.stderr and "out_dim 64 -> 32" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow  # pretraining/test_kills.py kills runs at other moments, of smaller networks
def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    args = [*SMALL, "--saveckp_freq", 0, "--saveckp_every_steps", 3]
    for name in ("whole", "stopped"):
        stop = ["--epochs", 2] if name == "whole" else []
        done = launch("main_dino.py", *args, *stop, "--output_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    # Put the second run back to its previous checkpoint, in the middle of the last epoch, and let it go on.
    (tmp_path / "stopped" / "checkpoint.pth").unlink()
    assert torch.load(tmp_path / "stopped" / "checkpoint_prev.pth", weights_only=True)["step"] == 15
    done = launch("main_dino.py", *args, "--output_dir", tmp_path / "stopped")
    assert done.returncode == 0 and "at step 15 of 16" in done.stdout, done.stderr
    whole, resumed = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True) for n in ("whole", "stopped"))
    assert (tmp_path / "whole" / "log.txt").read_text() == (tmp_path / "stopped" / "log.txt").read_text()
    for part in ("student", "teacher", "dino_loss"):
        for key, value in whole[part].items():
            assert torch.equal(value, resumed[part][key]), (part, key)


def test_start_from_weights_is_not_a_resume(finished, tmp_path):
    done = launch("main_dino.py", *SMALL, "--init_from", finished[0] / "checkpoint.pth", "--steps", 1, "--out_dim", 32,
                  "--output_dir", tmp_path)  # fmt: skip
    assert done.returncode == 0 and "150 of 150 tensors matched" in done.stdout, done.stderr


def test_start_from_weights_of_other_channels(tmp_path):
    """Both networks start from the file, its patch embedding averaged over the three channels."""
    old = build_backbone("vit_nano", 8, img_size=32)[0].state_dict()
    torch.save(old, tmp_path / "w.pth")
    networks = main_dino.make_networks(main_dino.get_args_parser().parse_args(
        ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--out_dim", "8", "--in_chans", "2",
         "--mean", "0", "0", "--std", "1", "1", "--init_from", str(tmp_path / "w.pth"), "--init_in_chans", "mean"]))
    name = "patch_embed.proj.weight"
    for network in networks:
        new = network.backbone.state_dict()
        torch.testing.assert_close(new[name], old[name].sum(1, keepdim=True).expand(-1, 2, -1, -1) / 2)
        assert all(torch.equal(v, old[k]) for k, v in new.items() if k != name)


@pytest.mark.parametrize("extra", [["--precision", "bf16"], ["--precision", "fp16"], ["--optimizer", "sgd"],
                                   ["--optimizer", "lars"], ["--clip_mode", "global"], ["--local_crops_number", "0"],
                                   ["--arch", "resnet18"], ["--grad_checkpointing"], ["--use_bn_in_head", "true"],
                                   ["--grad_checkpointing", "layers"],
                                   ["--in_chans", "1", "--mean", "0.5", "--std", "0.2"],
                                   pytest.param(["--compile"], marks=pytest.mark.slow)],
                         ids=" ".join)  # fmt: skip
def test_variants_run(tmp_path, extra):
    """In this process, for speed: two steps each."""
    args = main_dino.get_args_parser().parse_args([*NANO, *extra, "--steps", "2", "--output_dir", str(tmp_path)])
    assert main_dino.main(args) == 0
    losses = [line["loss"] for line in json_lines(tmp_path / "log_steps.txt")]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


def test_flags_that_others_make_void_are_warned_of(tmp_path, capsys):
    flags = ["--warmup_teacher_temp", "0.03", "--eval_data_path", "x", "--steps", "1", "--output_dir", str(tmp_path)]
    assert main_dino.main(main_dino.get_args_parser().parse_args([*NANO, *flags])) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if "WARNING: --" in line and "effect" in line]
    for flag, other in (("--warmup_teacher_temp 0.03", "--warmup_teacher_temp_epochs 0"),
                        ("--eval_data_path x", "--eval_knn_every 0")):
        assert sum(flag in line and other in line for line in warned) == 1
    assert len(warned) == 2


def run_of(args):
    return main_dino.make_run(args, main_dino.make_plan(args, 64), 64, torch.device("cpu"))


def test_auto_precision_is_kept_over_a_resume(tmp_path, monkeypatch):
    """Another machine might choose another one, and the run would change."""
    argv = [*NANO, "--precision", "auto", "--output_dir", str(tmp_path)]
    args = main_dino.get_args_parser().parse_args(argv)
    monkeypatch.setattr(networks, "bf16_is_faster", lambda: True)
    run_of(args).save(checkpoints.NAME)
    monkeypatch.setattr(networks, "bf16_is_faster", lambda: False)
    again = run_of(args)
    assert again.dtype is None
    again.resume(*checkpoints.read_latest(tmp_path))
    assert again.dtype is torch.bfloat16


def start_again(folder, *flags):
    """Exit code of a run in this process."""
    return main_dino.main(main_dino.get_args_parser().parse_args([*NANO, *flags, "--output_dir", str(folder)]))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    assert start_again(folder, "--epochs", "1") == 0
    return folder


@pytest.fixture
def one_epoch(short, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    return tmp_path / "run"


def half_cosine(first, last, t):
    return last + (first - last) * (1 + math.cos(math.pi * t)) / 2


def test_a_longer_run_continues_on_its_own_schedules(one_epoch, capsys):
    assert start_again(one_epoch, "--epochs", "2") == 2
    said = capsys.readouterr().err
    assert "epochs 1 -> 2" in said and "add --extend" in said and said.count("\n") == 1
    before, steps = torch.load(one_epoch / "checkpoint.pth", weights_only=True), json_lines(one_epoch / "log_steps.txt")
    assert start_again(one_epoch, "--epochs", "2", "--extend") == 0
    said = capsys.readouterr().out
    assert "--extend: epochs 1 -> 2" in said and "not the run" in said and "at step 8 of 16" in said
    lines = json_lines(one_epoch / "log_steps.txt")
    assert lines[:8] == steps and [line["step"] for line in lines] == list(range(16))
    for line in lines[8:]:
        assert line["lr"] == pytest.approx(half_cosine(0.0005 * 8 / 256, 1e-6, line["step"] / 16))
    assert [line["epoch"] for line in json_lines(one_epoch / "log.txt")] == [0, 1]
    after = torch.load(one_epoch / "checkpoint.pth", weights_only=True)
    assert (after["step"], after["args"]["epochs"], before["args"]["epochs"]) == (16, 2, 1)
    for flags in (["--epochs", "2"], ["--epochs", "2", "--extend"]):  # requeued: an ordinary resume, of the longer run
        assert start_again(one_epoch, *flags) == 0
        assert "not the run" not in capsys.readouterr().out
    assert json_lines(one_epoch / "log_steps.txt") == lines


@pytest.mark.parametrize("flags, step, steps_per_epoch", [(["--epochs", "3"], 8, 8), (["--steps", "9"], 8, 8),
                         (["--epochs", "2", "--data_path", "shapes:160x32"], 20, 20),
                         (["--steps", "9", "--data_path", "shapes:160x32"], 8, 20)])  # fmt: skip
def test_an_extension_keeps_weights_optimizer_and_centre(one_epoch, flags, step, steps_per_epoch, capsys):
    argv = [*NANO, *flags, "--extend", "--output_dir", str(one_epoch)]
    args = main_dino.get_args_parser().parse_args(argv)
    images = 160 if "shapes:160x32" in flags else 64
    plan = main_dino.make_plan(args, images)
    run = main_dino.make_run(args, plan, images, torch.device("cpu"))
    state, path = run.find_checkpoint(extend=True)
    run.resume(state, path)
    assert (run.step, run.steps_per_epoch) == (step, steps_per_epoch)
    for name, module in (("student", run.student), ("teacher", run.teacher), ("dino_loss", run.dino_loss)):
        for key, value in module.state_dict().items():
            assert torch.equal(value, state[name][key]), (name, key)
    for number, kept in state["optimizer"]["state"].items():
        assert torch.equal(run.optimizer.state_dict()["state"][number]["exp_avg"], kept["exp_avg"])
    said = capsys.readouterr().out
    assert ("images 64 -> 160" in said) == (images == 160)
    assert ("step 8 is now counted as step 20" in said) == (step == 20)
    assert ("step 8 is kept" in said and "8 of the 20 steps of pass 0" in said) == (step == 8 and images == 160)


@pytest.mark.parametrize("flags, words", [
    (["--epochs", "1", "--steps", "7"], ("--extend", "--steps 7", "8 done", "raise")),
    (["--epochs", "2", "--lr", "0.01"], ("lr 0.0005 -> 0.01", "choose another folder")),
    (["--epochs", "2", "--data_path", "shapes:40x32"], ("40 images are fewer than the 64", "--init_from")),
])  # fmt: skip
def test_extensions_that_are_refused(one_epoch, flags, words, capsys):
    before = (one_epoch / "log_steps.txt").read_text()
    assert start_again(one_epoch, *flags, "--extend") == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("\n") == 1
    assert (one_epoch / "log_steps.txt").read_text() == before


def test_an_extension_counts_epochs_as_the_flags_do():
    """Epochs of 4 steps (--epoch_steps), of which 3 make no more than the 16 steps done, where a pass has 8."""
    state = {"args": {"images": 64, "global_batch": 8}, "step": 16}
    run = SimpleNamespace(settings={"steps": 0, "epochs": 5, "epoch_steps": 4, "images": 64}, steps_per_epoch=8,
                          step_after=lambda state: state["step"])
    Run.check_extension(run, state, {"epochs": (4, 5)})
    run.settings["epochs"] = 3
    with pytest.raises(Refused, match="--epochs 3 .*4 done"):
        Run.check_extension(run, state, {"epochs": (4, 3)})
    run.steps_per_epoch = 20  # of more images: the schedules by step, and their step, stay
    assert Run.step_after(run, state) == 16


def test_an_extension_of_nothing_is_refused(tmp_path, capsys):
    assert start_again(tmp_path / "none", "--extend") == 2
    said = capsys.readouterr().err
    assert "--extend" in said and "leave --extend out" in said and not (tmp_path / "none").exists()


def test_a_run_of_some_steps_keeps_its_last_line(tmp_path):
    """It ends within an epoch, whose line is of a step that is done."""
    assert start_again(tmp_path, "--steps", "9") == 0
    before = (tmp_path / "log.txt").read_text()
    assert [line["step"] for line in json_lines(tmp_path / "log.txt")] == [8, 9]
    assert start_again(tmp_path, "--steps", "9") == 0
    assert (tmp_path / "log.txt").read_text() == before


def write_images(folder, seed, n=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 40, 40, 3), np.uint8)
    for i in range(n):
        path = folder / f"{'ab'[i % 2]}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(path)
    return folder


def test_a_run_does_not_go_on_with_other_images(tmp_path, capsys):
    """A folder may move, be packed, and have a file repaired; as many images of another set are refused."""
    def resumed(data, *flags):
        code = start_again(tmp_path / "run", "--steps", "2", "--data_path", str(data), *flags)
        return code, capsys.readouterr()

    assert resumed(write_images(tmp_path / "first", 0))[0] == 0
    (tmp_path / "first").rename(tmp_path / "moved")
    (tmp_path / "moved" / "a").rename(tmp_path / "moved" / "ant")
    assert resumed(tmp_path / "moved")[0] == 0
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for path in sorted((tmp_path / "moved").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path))
    code, said = resumed(tmp_path / "packed.zip")
    assert code == 0 and "compared" not in said.out
    Image.new("RGB", (40, 40)).save(tmp_path / "moved" / "ant" / "0.png")
    code, said = resumed(tmp_path / "moved")
    assert code == 0 and "1 of 16 images that were compared" in said.out

    for data in (write_images(tmp_path / "other", 1), "shapes:16x32"):
        code, said = resumed(data)
        assert code == 2 and said.err.count("\n") == 1 and f"--data_path {data}" in said.err and "16 of 16" in said.err
        assert "--init_from" in said.err and "--extend" in said.err

    path = tmp_path / "run" / "checkpoint.pth"
    state = torch.load(path, weights_only=True)
    assert len(state.pop("image_sample")) == 16
    torch.save(state, path)  # as older versions wrote it
    assert resumed(tmp_path / "other")[0] == 0
    state["image_sample"] = ["0"] * 16
    torch.save(state, path)
    code, said = resumed(tmp_path / "other", "--steps", "3", "--extend")
    assert code == 0 and "16 of 16 images that were compared" in said.out


def test_a_part_of_a_checkpoint_is_no_resume(tmp_path):
    args = main_dino.get_args_parser().parse_args([*NANO, "--output_dir", str(tmp_path)])
    with pytest.raises(Refused, match="--output_dir .*checkpoint.pth .*resume.*--init_from"):
        run_of(args).check_resumable({"rng": [], "student": {}}, tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("module, name", [(utils, "clip_gradients"), (loaders, "collate")])
def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch, module, name):
    def bug(*args, **kwargs):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(module, name, bug)
    args = main_dino.get_args_parser().parse_args([*NANO, "--num_workers", "0", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="operands could not be broadcast"):
        main_dino.main(args)


def test_images_left_out_are_told(tmp_path, capsys):
    argv = [*NANO, "--data_path", "shapes:20x32", "--steps", "1", "--output_dir", str(tmp_path)]
    assert main_dino.main(main_dino.get_args_parser().parse_args(argv)) == 0
    said = capsys.readouterr().out
    assert "4 of 20 images are left out of each epoch" in said and "--batch_size_per_gpu that divides 20" in said


@pytest.mark.parametrize("accum, remedy", [(1, "lower it to 7 or less"), (8, "lower --grad_accum_steps")])
def test_an_epoch_without_a_step_is_refused(tmp_path, capsys, accum, remedy):
    argv = [*NANO, "--data_path", "shapes:7x32", "--grad_accum_steps", str(accum), "--output_dir", str(tmp_path / "o")]
    assert main_dino.main(main_dino.get_args_parser().parse_args(argv)) == 2
    said = capsys.readouterr().err
    assert "--batch_size_per_gpu 8: 7 images" in said and remedy in said and not (tmp_path / "o").exists()


CONVOLUTIONAL = ("--data_path", "shapes:8x64", "--device", "cpu", "--num_workers", 0, "--steps", 1, "--out_dim", 64,
                 "--warmup_epochs", 0, "--local_crops_number", 1, "--global_crops_size", 64, "--local_crops_size", 32)


@pytest.mark.parametrize("batch, code", [(1, 2), (2, 0)])
def test_a_crop_too_small_for_batch_norm_is_refused_before_training(batch, code, tmp_path, capsys):
    flags = (*CONVOLUTIONAL, "--arch", "resnet18", "--batch_size_per_gpu", batch, "--output_dir", tmp_path / "out")
    assert main_dino.main(main_dino.get_args_parser().parse_args([*map(str, flags)])) == code
    error = capsys.readouterr().err
    assert (tmp_path / "out").exists() == (code == 0)
    if code:
        assert error.count("\n") == 1 and "resnet18" in error and "32 pixels" in error
        assert "--batch_size_per_gpu 1" in error and "raise" in error and "--local_crops_size" in error


def test_the_default_rate_of_stochastic_depth_gives_way(tmp_path, capsys):
    flags = (*CONVOLUTIONAL, "--arch", "dla46x_c", "--batch_size_per_gpu", 2, "--output_dir", tmp_path / "out")
    parse = main_dino.get_args_parser().parse_args
    assert main_dino.main(parse([*map(str, flags), "--drop_path_rate", "0.1"])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--drop_path_rate 0.1" in error and "give 0" in error
    assert not (tmp_path / "out").exists()
    assert main_dino.main(parse([*map(str, flags)])) == 0
    assert "--drop_path_rate 0 instead of the default 0.1" in capsys.readouterr().out
    stored = checkpoints.read(tmp_path / "out" / "checkpoint.pth")["args"]["drop_path_rate"]
    assert stored == 0 and type(stored) is float


def test_non_finite_loss_stops_the_run(tmp_path):
    extra = ["--lr", 1e30, "--clip_grad", 0, "--freeze_last_layer", 0]
    done = launch("main_dino.py", *SMALL, *extra, "--output_dir", tmp_path)
    assert done.returncode == 1
    assert "stopped: step" in done.stderr and "not finite" in done.stderr and "--lr" in done.stderr
    assert "Traceback" not in done.stderr


def test_classes_of_evaluation_are_matched_by_name(tmp_path):
    for part, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "x.png")
    args = main_dino.get_args_parser().parse_args(
        ["--eval_knn_every", "1", "--data_path", str(tmp_path), "--eval_data_path", str(tmp_path)])
    train, val = options.open_data(args, torch.device("cpu")).evaluation.labels
    assert train.tolist() == [0, 1, 2] and val.tolist() == [0, 2]


PUBLISHED = (
    "--arch vit_small --patch_size 16 --out_dim 65536 --norm_last_layer false --momentum_teacher 0.996 "
    "--use_bn_in_head false --warmup_teacher_temp 0.04 --teacher_temp 0.07 --warmup_teacher_temp_epochs 30 "
    "--use_fp16 false --weight_decay 0.04 --weight_decay_end 0.4 --clip_grad 0 --batch_size_per_gpu 64 --epochs 800 "
    "--freeze_last_layer 1 --lr 0.0005 --warmup_epochs 10 --min_lr 1e-05 --optimizer adamw --drop_path_rate 0.1 "
    "--global_crops_scale 0.25 1.0 --local_crops_number 8 --local_crops_scale 0.05 0.25 --data_path /images "
    "--output_dir /out --saveckp_freq 20 --seed 0 --num_workers 10 --dist_url env:// --local_rank 0"
)


def test_published_command_line_and_defaults():
    args = main_dino.get_args_parser().parse_args(PUBLISHED.split())
    assert args.norm_last_layer is False and args.global_crops_scale == [0.25, 1.0]
    main_dino.check_args(args)
    defaults = vars(main_dino.get_args_parser().parse_args([]))
    published = dict(
        arch="vit_small", patch_size=16, out_dim=65536, norm_last_layer=True, momentum_teacher=0.996,
        use_bn_in_head=False, warmup_teacher_temp=0.04, teacher_temp=0.04, warmup_teacher_temp_epochs=0, use_fp16=True,
        weight_decay=0.04, weight_decay_end=0.4, clip_grad=3.0, batch_size_per_gpu=64, epochs=100, freeze_last_layer=1,
        lr=0.0005, warmup_epochs=10, min_lr=1e-6, optimizer="adamw", drop_path_rate=0.1, global_crops_scale=(0.4, 1.0),
        local_crops_number=8, local_crops_scale=(0.05, 0.4), saveckp_freq=20, seed=0, num_workers=10, dist_url="env://",
        output_dir=".",
    )  # fmt: skip
    assert {k: defaults[k] for k in published} == published
    assert main_dino.get_args_parser().parse_args(["--local-rank", "3"]).local_rank == 3


def test_presets_are_read_with_comments(tmp_path):
    (tmp_path / "p.txt").write_text("# what it costs\n--arch vit_tiny  # small\n\n--epochs 7\n")
    args = main_dino.get_args_parser().parse_args([f"@{tmp_path / 'p.txt'}", "--epochs", "8"])
    assert args.arch == "vit_tiny" and args.epochs == 8


def test_importing_the_script_is_light():
    heavy = "timm", "torchvision", "matplotlib", "sklearn"
    code = f"import sys, main_dino; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_begun_run_whose_learning_rate_rises_goes_on(tmp_path):
    """As its flags can't be changed; a new run is refused."""
    rising = (1e-6, 7.8e-7, 1e-4, 2, str(tmp_path))
    with pytest.raises(Refused, match="^--min_lr 1e-06 is above the peak learning rate 7.8e-07, .* --lr 0.0001 .*2 im"):
        plan.check_min_lr(*rising)
    (tmp_path / checkpoints.PREVIOUS).touch()
    plan.check_min_lr(*rising)
