"""A run killed at any moment and started again ends as if nothing had happened, bit for bit."""

import random
import time
from functools import lru_cache

import pytest
import torch
from forks import SMALLEST, Started, lines

from weights import checkpoints


def test_equal_notices_the_last_bit():
    one = {"a": [torch.ones(2), 1.0], "b": None}
    two = {"a": [torch.tensor([1.0, 1.0 + 2**-23]), 1.0], "b": None}
    assert differences(one, one) == [] and differences(one, two) == ["/a/0"]
    assert differences(one, {"a": one["a"]}) == [""] and differences(1.0, 1.0 + 2**-52) == [""]


def differences(one, two, path: str = "") -> list[str]:
    """Where two checkpoints differ, in any bit of any value."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape and one.numpy().tobytes() == two.numpy().tobytes()
    elif isinstance(one, dict) and one.keys() == two.keys():
        return [d for k in one for d in differences(one[k], two[k], f"{path}/{k}")]
    elif isinstance(one, list | tuple) and len(one) == len(two):
        return [d for i, (a, b) in enumerate(zip(one, two, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    else:
        same = one == two
    return [] if same else [path]


@lru_cache
def uninterrupted(folder, accum: int, processes: int):
    out, started = folder / f"whole_{accum}_{processes}", time.monotonic()
    whole = Started(*flags(accum, processes), "--output_dir", out, processes=processes)
    assert whole.wait() == [0] * processes, whole.output()
    return out, time.monotonic() - started


def flags(accum: int, processes: int) -> list:
    """24 steps of 8 images, however they are shared, 8 an epoch; k-NN where it costs least."""
    shared = ["--grad_accum_steps", accum, "--batch_size_per_gpu", 8 // accum // processes]
    return [*SMALLEST, *shared, "--saveckp_freq", 1,
            "--saveckp_every_steps", 1 if processes > 1 else 3, "--eval_knn_every", 2 * (accum == 2)]


def moment_reached(run: Started, out, rng: random.Random, seconds: float) -> str:
    """Waits for a random moment of a run: a time, a step, or one in the middle of saving. Returns its kind."""
    kind = rng.choice(("time", "step", "saving"))
    if kind == "time":
        end = time.monotonic() + rng.uniform(0, seconds)
        run.wait_for(lambda: time.monotonic() > end)
    elif kind == "step":
        log, more = out / "log_steps.txt", rng.randint(1, 5)
        first = lines(log)
        run.wait_for(lambda: lines(log) >= first + more)
    else:
        for _ in range(rng.randint(1, 3)):
            run.wait_for(lambda: any(out.glob(".checkpoint*.tmp")))
            run.wait_for(lambda: not any(out.glob(".checkpoint*.tmp")))
        run.wait_for(lambda: any(out.glob(".checkpoint*.tmp")))
        time.sleep(rng.uniform(0, 0.003))
    return kind


def kill_and_compare(folder, seed: int, accum: int, processes: int, kills: int) -> None:
    whole, seconds = uninterrupted(folder, accum, processes)
    rng, out, done, killed = random.Random(seed), folder / f"killed_{seed}_{accum}_{processes}", None, 0
    out.mkdir()
    for _ in range(kills):
        workers = rng.choice((0, 1, 2))
        run = Started(*flags(accum, processes), "--num_workers", workers, "--output_dir", out, processes=processes)
        moment_reached(run, out, rng, seconds)
        killed += run.running()
        run.kill()
    done = Started(*flags(accum, processes), "--output_dir", out, processes=processes)
    assert done.wait() == [0] * processes, done.output()
    print(f"seed {seed}, accumulation {accum}, {processes} processes: killed {killed} times")
    assert (out / "log.txt").read_text() == (whole / "log.txt").read_text()
    names = sorted(p.name for p in whole.glob("*.pth") if p.name != checkpoints.PREVIOUS)
    assert len(names) == 4 + (accum == 2)  # the newest, one an epoch, and the best
    for name in names:
        one, two = checkpoints.read(whole / name), checkpoints.read(out / name)
        for state in (one, two):
            state["args"] = {k: v for k, v in state["args"].items() if k not in ("output_dir", "num_workers")}
        assert differences(one, two) == [], name
    assert not any(out.glob(".*.tmp"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kills")


@pytest.mark.parametrize("seed, accum, processes", [(0, 1, 1), (1, 2, 1), (2, 1, 2)])
def test_a_killed_run_ends_like_an_uninterrupted_one(folder, seed, accum, processes):
    kill_and_compare(folder, seed, accum, processes, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 124))
def test_killed_many_times(folder, seed):
    """Half of the seeds accumulate gradients, a third run on two processes."""
    kill_and_compare(folder, seed, accum=1 + seed % 2, processes=2 if seed % 3 == 0 else 1, kills=5)
