"""Two real gloo processes against one, on the same global batch."""

import sys
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from forks import SMALLEST, Started
from processes import json_lines, launch, together
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import utils
from pretraining import networks


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


def train_with_buckets(rank: int, folder: str) -> None:
    """As the loop does: accumulation, clipping, a frozen last layer, and fresh gradients in each step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    weights = []
    for wrap in (DistributedDataParallel, lambda network: networks.distributed(network, torch.device("cpu"))):
        torch.manual_seed(0)
        network = nn.Sequential(OrderedDict(body=nn.Linear(8, 8), last_layer=nn.Linear(8, 4, bias=False)))
        student, optimizer = wrap(network), utils.build_optimizer("adamw", network)
        torch.manual_seed(rank)
        for step in range(4):
            with student.no_sync():
                student(torch.randn(5, 8)).square().mean().backward()
            student(torch.randn(5, 8)).square().mean().backward()
            views = {p.grad.untyped_storage().nbytes() > p.grad.nbytes for p in network.parameters()}
            utils.clip_gradients(network, 0.01)
            utils.cancel_gradients_last_layer(step, network, 2)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weights.append(network.state_dict())
    assert views == {True}
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    dist.destroy_process_group()


def test_gradients_in_the_buckets_are_the_same_bit_for_bit(tmp_path):
    together(train_with_buckets, 2, str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at its threads in /proc")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_late_threads_of_the_collectives_do_not_end_the_process(kind):
    """One that still holds a tensor when Python is taken down would end a finished run with SIGABRT."""
    done = launch("tests/late_threads.py", kind, processes=2, real=True)
    assert done.returncode == 0, done.stderr
