"""Two gloo processes that share the networks (FSDP2) against two that each hold them (DistributedDataParallel)."""

import signal

import pytest
import torch
import torch.distributed as dist
from forks import SMALLEST, Started, make_small_in
from test_faults import slow_steps, stepping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import eval_knn
import main_dino
from pretraining import sharding
from weights import checkpoints

ARGS = [*SMALLEST, "--batch_size_per_gpu", 4, "--norm_last_layer", "false"]


def run(kind: str, out, *argv, **kwargs) -> Started:
    return Started(*ARGS, *argv, "--parallel", kind, "--output_dir", out, processes=2, **kwargs)


def assert_same_state(one, two) -> None:
    assert one.keys() == two.keys()
    for part in ("student", "teacher", "dino_loss"):
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            assert type(two[part][key]) is torch.Tensor
            torch.testing.assert_close(two[part][key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    for index, values in one["optimizer"]["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(two["optimizer"]["state"][index][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("extra", [
    ["--optimizer", "adamw", "--lr", 0.02, "--clip_grad", 0.05, "--eval_knn_every", 3],
    ["--optimizer", "sgd", "--lr", 3, "--clip_grad", 0.05, "--clip_mode", "global", "--grad_accum_steps", 2,
     "--batch_size_per_gpu", 2],
    ["--optimizer", "lars", "--lr", 3],
], ids=lambda extra: extra[1])  # fmt: skip
def test_sharded_equals_replicated(tmp_path, extra):
    runs = {kind: run(kind, tmp_path / kind, *extra, "--steps", 12) for kind in ("ddp", "fsdp")}
    for kind, started in runs.items():
        assert started.wait() == [0, 0], started.output()
        assert ("networks sharded" in started.output()) == (kind == "fsdp")
    assert_same_state(*(checkpoints.read(tmp_path / kind / checkpoints.NAME) for kind in runs))


@pytest.mark.parametrize("first, then", [("ddp", "fsdp"), pytest.param("fsdp", "ddp", marks=pytest.mark.slow)])
def test_a_run_goes_on_sharded_or_not(tmp_path, first, then, monkeypatch):
    extra = ["--optimizer", "sgd", "--lr", 3]
    whole, moved = run("ddp", tmp_path / "whole", *extra), run(first, tmp_path / "moved", *extra, before=slow_steps)
    stepping(moved, tmp_path / "moved", 6)
    moved.signal(signal.SIGTERM)
    assert moved.wait() == [main_dino.TO_BE_CONTINUED] * 2, moved.output()
    moved = run(then, tmp_path / "moved", *extra)
    assert moved.wait() == [0, 0] and "resuming" in moved.output(), moved.output()
    assert whole.wait() == [0, 0]
    path = tmp_path / "moved" / checkpoints.NAME
    assert_same_state(checkpoints.read(tmp_path / "whole" / checkpoints.NAME), checkpoints.read(path))
    if then == "fsdp":
        make_small_in(monkeypatch)
        argv = ["--pretrained_weights", str(path), "--data_path", "shapes:64x16", "--device", "cpu", "--nb_knn", "5",
                "--num_workers", "0", "--output_dir", str(tmp_path)]  # fmt: skip
        assert eval_knn.main(eval_knn.get_args_parser().parse_args(argv)) == 0


def test_moments_are_cut_before_they_are_loaded(monkeypatch):
    """In a mesh of one process: torch gets DTensors, and in any case copies, as the checkpoint may be mapped."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parameters = [torch.nn.Parameter(torch.ones(2)),
                      torch.nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)]))]
        optimizer = torch.optim.AdamW(parameters)
        moments = [{"step": torch.tensor(5.0), "exp_avg": torch.randn(p.shape), "exp_avg_sq": torch.rand(p.shape)}
                   for p in parameters]
        state = {"state": dict(enumerate(moments)), "param_groups": optimizer.state_dict()["param_groups"]}
        given, then = [], optimizer.load_state_dict
        monkeypatch.setattr(optimizer, "load_state_dict", lambda state: (given.append(state), then(state)))
        sharding.load_optimizer(optimizer, state)
        assert isinstance(given[0]["state"][1]["exp_avg"], DTensor)
        for parameter, before in zip(parameters, moments, strict=True):
            for name, value in optimizer.state[parameter].items():
                own = sharding.whole(value)
                assert torch.equal(own, before[name]) and own.data_ptr() != before[name].data_ptr()
                assert isinstance(value, DTensor) == (parameter is parameters[1] and name != "step")
    finally:
        dist.destroy_process_group()


def test_half_precision_of_a_narrow_range_is_refused(tmp_path):
    started = run("fsdp", tmp_path / "out", "--precision", "fp16")
    assert started.wait() == [2, 2] and "--parallel fsdp" in started.output() and not (tmp_path / "out").exists()
