"""When a run is compiled: a function of what there is, and what an earlier part of the run decided."""

import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from processes import ENV

from imagesets import listing
from pretraining import compiling

GPU = {"setting": "auto", "stored": None, "device": "cuda", "arch": "vit_small", "sharded": False,
       "flop": lambda: 1e18}


@pytest.mark.parametrize("text, expected", [
    ("auto", "auto"), ("on", "default"), ("true", "default"), ("True", "default"), ("default", "default"),
    ("off", "off"), ("false", "off"), ("reduce-overhead", "reduce-overhead"), ("max-autotune", "max-autotune")])
def test_spellings(text, expected):
    import main_dino

    args = main_dino.get_args_parser().parse_args(["--compile", text])
    assert args.compile == expected
    assert compiling.mode(args.compile) == (expected if expected not in ("auto", "off") else None)


def test_the_flag_alone_and_its_absence():
    import main_dino
    import main_dinov2

    assert main_dino.get_args_parser().parse_args(["--compile", "--epochs", "3"]).compile == "default"
    assert main_dino.get_args_parser().parse_args([]).compile == "auto"
    assert main_dinov2.get_args_parser().parse_args([]).compile == "off"


@pytest.mark.parametrize("case, expected", [
    ({}, "default"), ({"flop": lambda: 6e16}, "off"), ({"device": "cpu"}, "off"), ({"device": "mps"}, "off"),
    ({"sharded": True}, "off"), ({"arch": "resnet50", "flop": lambda: 6e16}, "default"),
    ({"arch": "resnet50", "flop": lambda: 1e16}, "off"), ({"arch": "xcit_small_12_p16"}, "off"),
    ({"triton": False}, "off"),
    # What the run did before counts, and what the user says counts more.
    ({"stored": "off"}, "off"), ({"stored": "default", "flop": lambda: 0.0}, "default"),
    ({"stored": "default", "sharded": True}, "off"), ({"stored": "default", "device": "cpu"}, "off"),
    ({"setting": "off", "stored": "default"}, "off"), ({"setting": "default", "stored": "off"}, "default"),
    ({"setting": "default", "device": "cpu", "flop": lambda: 0.0}, "default")])
def test_decision(case, expected):
    value, why = compiling.decided(**GPU | case)
    assert value == expected
    said = {**GPU, **case}["setting"] == "auto" and {**GPU, **case}["device"] == "cuda"
    assert bool(why) == said and ("--compile" in why or not said)


@pytest.mark.parametrize("flags, steps", [
    ("", 5_000), ("--batch_size_per_gpu 512", 1_250), ("--batch_size_per_gpu 64 --grad_accum_steps 2", 5_000),
    ("--arch resnet18 --batch_size_per_gpu 256 --global_crops_size 160 --local_crops_size 80 --local_crops_number 6",
     3_000),
    ("--arch vit_nano --patch_size 8 --batch_size_per_gpu 32 --global_crops_size 48 --local_crops_size 24 "
     "--local_crops_number 4", 1_450_000)])
def test_a_run_is_compiled_from_so_many_steps_on(monkeypatch, tmp_path, flags, steps):
    """The more, the smaller a step. ViT-S takes 112 GFLOP per image, ViT-nano 1.54."""
    import argparse

    import main_dino

    monkeypatch.setattr(compiling, "prepare", lambda: None)
    monkeypatch.setattr(compiling, "installed", lambda name: True)
    args = main_dino.get_args_parser().parse_args(["--batch_size_per_gpu", "128", *flags.split(), "--output_dir",
                                                   str(tmp_path)])
    for count, expected in ((steps, "default"), (0.95 * steps, "off")):
        plan = argparse.Namespace(steps=count)
        assert main_dino.with_compile(args, torch.device("cuda"), plan).compile == expected


def test_code_is_kept_in_the_projects_cache_unless_the_user_named_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    compiling.keep_on_disk()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiling.keep_on_disk()
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == str(listing.cache_dir() / "compiled")


def test_what_a_run_decided_is_stored_and_kept(tmp_path):
    """On a CPU the decision is off; the checkpoint says so, and not what the flag said."""
    import main_dino
    from weights.layouts import read

    argv = ("--arch vit_nano --patch_size 16 --data_path shapes:8x32 --global_crops_size 32 --local_crops_number 0 "
            "--out_dim 16 --batch_size_per_gpu 4 --num_workers 0 --steps 1 --warmup_epochs 0 --device cpu "
            "--precision fp32 --cache_images").split()
    args = main_dino.get_args_parser().parse_args([*argv, "--output_dir", str(tmp_path)])
    assert main_dino.main(args) == 0
    assert read(tmp_path / "checkpoint.pth")["args"]["compile"] == "off" and args.compile == "auto"


def test_evaluation_makes_no_graph():
    """Neither for its batches, which differ from those of training, nor for the last, smaller one."""
    from torch._dynamo.testing import CompileCounter

    from imagesets.decode import Reading
    from pretraining.evaluation import open_evaluation
    from vision_transformer import build_backbone

    torch._dynamo.reset()
    backbone, counter = build_backbone("vit_nano", 16, img_size=32)[0], CompileCounter()
    evaluation = open_evaluation("shapes:13x32", "--eval", Reading(), 32, *([0.5] * 3,) * 2, 4, 0, torch.device("cpu"))
    expected = evaluation.features(backbone, evaluation.parts[0], None)
    backbone.compile(backend=counter, dynamic=False)
    backbone(torch.zeros(2, 3, 32, 32))
    assert counter.frame_count == 1
    assert torch.equal(evaluation.features(backbone, evaluation.parts[0], None), expected)
    assert counter.frame_count == 1 and backbone.training
    backbone(torch.zeros(2, 3, 32, 32))
    assert counter.frame_count == 1


GROUP = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
from pretraining import compiling
if sys.argv[1] == "shielded":
    compiling.start_workers()
    assert callable(signal.getsignal(signal.SIGTERM))
from torch._inductor.async_compile import AsyncCompile
AsyncCompile.warm_pool()
worker = AsyncCompile.process_pool().process
time.sleep(3)  # it has begun
os.killpg(0, signal.SIGTERM)
time.sleep(1)
print("lives" if worker.poll() is None else "ended", worker.pid, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals to groups of processes")
@pytest.mark.parametrize("what, expected", [("shielded", "lives"), ("as torch starts them", "ended")])
def test_signals_for_the_run_do_not_end_compile_workers(what, expected):
    done = subprocess.run([sys.executable, "-c", GROUP, what], cwd=ROOT, start_new_session=True, capture_output=True,
                          text=True, env=ENV | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}, timeout=120)
    assert done.returncode == 0, done.stderr
    state, pid = done.stdout.split()
    assert state == expected
    for _ in range(100):  # it ends with the run
        if not os.path.exists(f"/proc/{pid}"):
            break
        time.sleep(0.1)
    else:
        pytest.fail("a compile worker outlives the run")
