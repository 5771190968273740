"""Two real gloo processes against one, on the same global batch."""

import sys

import pytest
import torch
from forks import SMALLEST, Started
from processes import json_lines, launch


def test_three_steps_in_float64_equal_one_process(tmp_path):
    for n in (1, 2):
        done = launch("tests/three_steps.py", tmp_path / f"{n}.pt", processes=n)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert one.keys() == two.keys() and any(k.startswith("grad/") for k in one)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("accum", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_twenty_steps_of_the_script_equal_one_process(tmp_path, accum):
    """The real loader and augmentation; two processes of 4, or micro-batches of 4, against one batch of 8."""
    args = [*SMALLEST, "--steps", 20, "--drop_path_rate", 0, "--log_every", 1, "--norm_last_layer", "false"]
    split = ["--batch_size_per_gpu", 4, "--output_dir", tmp_path / "two", "--grad_accum_steps", accum, "--cache_images"]
    alone = Started(*args, "--output_dir", tmp_path / "one")
    both = Started(*args, *split, processes=2 // accum)
    assert not any(alone.wait() + both.wait()), alone.output() + both.output()
    one, two = (json_lines(tmp_path / name / "log_steps.txt") for name in ("one", "two"))
    assert len(one) == len(two) == 20
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
    assert one[0]["loss"] != one[1]["loss"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at its threads in /proc")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_late_threads_of_the_collectives_do_not_end_the_process(kind):
    """One that still holds a tensor when Python is taken down would end a finished run with SIGABRT."""
    done = launch("tests/late_threads.py", kind, processes=2, real=True)
    assert done.returncode == 0, done.stderr
