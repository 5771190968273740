"""Faults made on purpose: full disks, signals, lost processes, losses that are not numbers, other machines."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from forks import SMALLEST, Started, lines, make_small_in
from processes import ENV, json_lines, start

import main_dino
import utils
from pretraining import evaluation, failures
from weights import checkpoints

# ---- Hooks that run in the processes of a run, before it starts ----


def slow_steps() -> None:
    then = utils.set_lr_and_wd
    utils.set_lr_and_wd = lambda *args: (time.sleep(0.3), then(*args))


def endless_step() -> None:
    """The first step says that it has begun, and never ends."""
    utils.set_lr_and_wd = lambda *args: (print("in a step", flush=True), time.sleep(1000))


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def nan_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        then, calls = utils.cross_entropy, []

        def cross_entropy(*args):
            calls.append(1)
            return then(*args) * (float("nan") if len(calls) == 6 else 1)

        utils.cross_entropy = cross_entropy


def run(*argv, out: Path, **kwargs) -> Started:
    return Started(*SMALLEST, *argv, "--output_dir", out, **kwargs)


def stepping(started: Started, out: Path, steps: int = 2) -> None:
    """Until some steps are logged."""
    assert started.wait_for(lambda: lines(out / "log_steps.txt") >= steps), started.output()


# ---- Saving ----


def save_for_ever(path: str) -> None:
    step = 0
    while True:
        step += 1
        checkpoints.save({"step": step, "tensors": [torch.full((250_000,), float(step)) for _ in range(4)]}, path)


def kill_while_saving(folder: Path, times: int, seed: int) -> None:
    rng, path = random.Random(seed), folder / checkpoints.NAME
    checkpoints.save({"step": 0, "tensors": [torch.zeros(1)]}, path)
    for _ in range(times):
        before = path.stat().st_mtime_ns
        process = start(save_for_ever, str(path))
        while path.stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for name in (checkpoints.NAME, checkpoints.PREVIOUS):
            if (folder / name).exists():  # what stands under a final name is whole
                state = checkpoints.read(folder / name)
                assert all((t == state["step"]).all() for t in state["tensors"])
        assert checkpoints.read_latest(folder) is not None
    checkpoints.remove_temporary(folder)
    assert {p.name for p in folder.iterdir()} <= {checkpoints.NAME, checkpoints.PREVIOUS}


def test_killed_while_saving(tmp_path):
    kill_while_saving(tmp_path, 5, seed=0)


@pytest.mark.slow
def test_killed_while_saving_fifty_times(tmp_path):
    kill_while_saving(tmp_path, 50, seed=1)


def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        path = tmp_path / checkpoints.NAME
        checkpoints.save({"x": torch.ones(500_000)}, path)
        with pytest.raises(OSError, match="could not be written .*the one before it is intact; free space"):
            checkpoints.save({"x": torch.zeros(800_000)}, path)
        assert checkpoints.read_latest(tmp_path)[0]["x"].all() and [p.name for p in tmp_path.iterdir()] == [path.name]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_run_on_a_full_disk_says_so_in_one_line(tmp_path):
    started = run("--epochs", 1, "--warmup_epochs", 0, out=tmp_path, before=small_files_only)
    assert started.wait() == [1]
    last = started.output().strip().splitlines()[-1]
    assert last.startswith("main_dino.py: stopped:") and "checkpoint.pth" in last and "free space" in last
    assert "there is none before it" in last and "inline_container" not in last and "Writer" not in last
    assert "Traceback" not in started.output() and not list(tmp_path.glob("*.pth"))


def test_only_the_newest_numbered_checkpoints_are_kept(tmp_path):
    for name in ("checkpoint.pth", "checkpoint_best.pth", "checkpoint_prev.pth", "checkpoint0009.pth",
                 "checkpoint0019.pth", "checkpoint10029.pth", "checkpoint0039.pth.bak"):  # fmt: skip
        (tmp_path / name).write_text("")
    checkpoints.remove_numbered(tmp_path, keep=2)
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint.pth", "checkpoint_best.pth", "checkpoint_prev.pth", "checkpoint0019.pth", "checkpoint10029.pth",
        "checkpoint0039.pth.bak"}  # fmt: skip


# ---- Signals ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops(tmp_path, number):
    started = run(out=tmp_path, before=slow_steps)
    stepping(started, tmp_path)
    started.signal(number)
    assert started.wait() == [main_dino.TO_BE_CONTINUED]
    assert "start again to continue" in started.output()
    assert 2 < checkpoints.read(tmp_path / checkpoints.NAME)["step"] < 24


def test_a_second_interrupt_stops_at_once(tmp_path):
    started = run(out=tmp_path, before=endless_step)
    assert started.wait_for(lambda: "in a step" in started.output())
    for _ in range(20):  # two that come before the process looks are one
        started.signal(signal.SIGINT)
        time.sleep(0.1)
    assert started.wait(1) == [-signal.SIGINT]
    assert not (tmp_path / checkpoints.NAME).exists()


def test_a_signal_to_one_of_two_processes_stops_both_within_seconds(tmp_path):
    """Logging is rare here: the processes compare notes by the clock, not by logged steps."""
    started = run("--log_every", 1000, "--batch_size_per_gpu", 4, out=tmp_path, processes=2, before=slow_steps)
    stepping(started, tmp_path, 1)
    then = time.monotonic()
    started.signal(signal.SIGTERM, 1)
    assert started.wait() == [main_dino.TO_BE_CONTINUED] * 2, started.output()
    assert time.monotonic() - then < 10
    assert started.output().count("stopped by a signal") == 1
    assert 1 <= checkpoints.read(tmp_path / checkpoints.NAME)["step"] < 24


def test_the_clock_asks_for_checkpoints(tmp_path):
    started = run("--saveckp_every_minutes", 0.01, "--batch_size_per_gpu", 4, out=tmp_path, processes=2,
                  before=slow_steps)  # fmt: skip
    assert started.wait_for((tmp_path / checkpoints.NAME).exists), started.output()
    started.kill()
    assert 0 < checkpoints.read_latest(tmp_path)[0]["step"] < 8


# ---- Lost processes ----


@pytest.mark.parametrize("lost", [0, 1])
def test_the_others_end_when_one_is_killed(tmp_path, lost):
    started = run("--batch_size_per_gpu", 4, out=tmp_path, processes=2, before=slow_steps)
    stepping(started, tmp_path)
    started.signal(signal.SIGKILL, lost)
    codes = started.wait(240)
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 1
    said = started.output(1 - lost)
    assert said.count("another process of the run has ended") == 1 and "start again to continue" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("held", [0, 1])
def test_the_other_ends_within_the_time_out_when_one_hangs(tmp_path, held):
    started = run("--batch_size_per_gpu", 4, "--dist_timeout", 0.1, out=tmp_path, processes=2, before=slow_steps)
    stepping(started, tmp_path)
    started.signal(signal.SIGSTOP, held)
    then, other = time.monotonic(), started.all[1 - held]
    other.join(240)
    said = started.output(1 - held)
    started.kill()
    assert other.exitcode == 1 and 3 < time.monotonic() - then < 30  # 6 s, and what a loaded machine needs to end
    assert said.count("another process of the run does not answer") == 1 and "longer --dist_timeout" in said
    assert "Traceback" not in said and "start again to continue" in said.splitlines()[-1]


def test_a_loss_that_is_no_number_on_one_process_ends_all(tmp_path):
    started = run("--batch_size_per_gpu", 4, out=tmp_path, processes=2, before=nan_on_rank_1)
    assert started.wait() == [1, 1], started.output()
    assert "stopped: step 5: loss or gradient is not finite" in started.output(0)
    assert "stopped" not in started.output(1) and "Traceback" not in started.output()
    failure = checkpoints.read(tmp_path / failures.NAME)
    assert (failure["rank"], failure["step"], len(failure["index"][0])) == (1, 5, 4)


def torchrun(*argv, out: Path, options=()) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options,
               str(ROOT / "tests" / "forks.py"), *SMALLEST,
               "--batch_size_per_gpu", "4", "--saveckp_every_steps", "1", *argv, "--output_dir", str(out)]  # fmt: skip
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def worker(agent: subprocess.Popen, rank: int) -> int:
    """Process id of a rank that torchrun has started."""
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


def wait_for_step(agent: subprocess.Popen, out: Path, steps: int) -> None:
    while lines(out / "log_steps.txt") < steps:
        assert agent.poll() is None, agent.communicate()[0]
        time.sleep(0.01)


def test_a_run_whose_updates_are_all_skipped_stops(tmp_path, monkeypatch, capsys):
    """A loss that is finite in fp16, and a gradient that is not at any scale."""
    make_small_in(monkeypatch)
    then = utils.cross_entropy
    monkeypatch.setattr(utils, "cross_entropy", lambda x, *args: then(x, *args) + (0 * x.float().sum()).sqrt())
    args = main_dino.get_args_parser().parse_args([
        *SMALLEST, "--precision", "fp16", "--batch_size_per_gpu", "2", "--local_crops_number", "0", "--warmup_epochs",
        "0", "--num_workers", "0", "--steps", "24", "--log_every", "11", "--output_dir", str(tmp_path)])  # fmt: skip
    assert main_dino.main(args) == 1
    assert "step 22: the gradient is not finite" in capsys.readouterr().err and (tmp_path / "failure.pt").exists()
    line = json_lines(tmp_path / "log_steps.txt")[1]
    assert line["skipped"] == 1 and line["loss_scale"] == 2.0 ** (16 - 12)


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_process(tmp_path):
    agent = torchrun(out=tmp_path / "lost", options=["--max_restarts=2"])
    whole = run("--batch_size_per_gpu", 4, out=tmp_path / "whole", processes=2)
    wait_for_step(agent, tmp_path / "lost", 4)
    os.kill(worker(agent, 1), signal.SIGKILL)
    said = agent.communicate(timeout=120)[0]
    assert whole.wait() == [0, 0]
    assert agent.returncode == 0 and "resuming from" in said, said
    assert (tmp_path / "lost" / "log.txt").read_text() == (tmp_path / "whole" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGTERM", "killed"])
def test_torchrun_without_restarts(tmp_path, fault):
    agent = torchrun("--epochs", "100", out=tmp_path)
    wait_for_step(agent, tmp_path, 4)
    if fault == "SIGTERM":
        agent.terminate()
    else:
        os.kill(worker(agent, 1), signal.SIGKILL)
    said = agent.communicate(timeout=240)[0]
    assert agent.returncode != 0
    assert ("stopped by a signal and saved" if fault == "SIGTERM" else "another process of the run has ended") in said
    assert checkpoints.read_latest(tmp_path)[0]["step"] >= 4


# ---- Elsewhere ----


def test_evaluation_switched_on_later_changes_nothing_else(tmp_path):
    """k-NN moves no random number of the run, and the baselines are the same."""
    moving = ["--lr", 0.3, "--momentum_teacher", 0.5]  # far enough to move the figures
    whole = run(*moving, "--eval_knn_every", 3, out=tmp_path / "whole")
    late = run(*moving, out=tmp_path / "late", before=slow_steps)
    stepping(late, tmp_path / "late", 4)
    late.signal(signal.SIGTERM)
    assert late.wait() == [main_dino.TO_BE_CONTINUED], late.output()
    late = run(*moving, "--eval_knn_every", 3, out=tmp_path / "late")
    assert late.wait() == [0] and whole.wait() == [0], late.output()
    assert "at step" in late.output() and "20-NN before training" in late.output()
    assert (tmp_path / "late" / "log.txt").read_text() == (tmp_path / "whole" / "log.txt").read_text()


def no_room_for_pixels() -> None:
    evaluation.MOST_PIXELS = 0


def test_many_images_are_evaluated_without_raw_pixels(tmp_path):
    done = run("--eval_knn_every", 1, out=tmp_path, before=no_room_for_pixels)
    assert done.wait() == [0] and "raw pixels" not in done.output()
    assert done.output().count("on this network's features\n") == 1 and "(untrained " in done.output()


SGD = ["--optimizer", "sgd", "--lr", 3, "--drop_path_rate", 0, "--freeze_last_layer", 0]


@pytest.mark.parametrize("first, then", [((2, 4, 1), (1, 8, 1)), ((1, 4, 2), (2, 4, 1))])
def test_a_run_goes_on_with_other_processes(tmp_path, first, then):
    """(processes, images a process, accumulation): the same images a step, so equal to rounding."""

    def part(shape, out, **kwargs):
        processes, batch, accum = shape
        shared = ["--batch_size_per_gpu", batch, "--grad_accum_steps", accum]
        return run(*SGD, *shared, out=out, processes=processes, **kwargs)

    whole, moved = part((1, 8, 1), tmp_path / "whole"), part(first, tmp_path / "moved", before=slow_steps)
    stepping(moved, tmp_path / "moved", 6)
    moved.signal(signal.SIGTERM)
    assert moved.wait() == [main_dino.TO_BE_CONTINUED] * first[0], moved.output()
    assert whole.wait() == [0], whole.output()
    moved = part(then, tmp_path / "moved")
    assert moved.wait() == [0] * then[0], moved.output()
    assert f"{first[0]} -> {then[0]} processes: equal up to rounding" in moved.output()
    one, two = (checkpoints.read(tmp_path / name / checkpoints.NAME) for name in ("whole", "moved"))
    for part_ in ("student", "teacher"):
        for key, value in one[part_].items():
            torch.testing.assert_close(two[part_][key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    start = checkpoints.read(tmp_path / "whole" / checkpoints.NAME)["student"]["head.mlp.0.weight"]
    assert start.std() > 0.02  # it has moved
    other = run(*SGD, "--batch_size_per_gpu", 4, out=tmp_path / "whole")
    assert other.wait() == [2] and "global_batch 8 -> 4" in other.output()
    assert len(other.output().strip().splitlines()) == 1


def test_a_resume_with_another_split_of_the_images_names_batch_norm(tmp_path, monkeypatch, capsys):
    make_small_in(monkeypatch)
    args = [*SMALLEST, "--use_bn_in_head", "true", "--steps", 1, "--warmup_epochs", 0, "--num_workers", 0,
            "--output_dir", tmp_path]
    for split in ([], ["--batch_size_per_gpu", 4, "--grad_accum_steps", 2]):
        assert main_dino.main(main_dino.get_args_parser().parse_args([str(a) for a in (*args, *split)])) == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if "batch_size_per_gpu 8 -> 4" in line)
    assert "grad_accum_steps 1 -> 2" in line and "batch norm" in line and "rounding" not in line
