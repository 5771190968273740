"""Submission: what Slurm is asked for, what is refused before, and who hears of a signal when."""

import argparse
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from conftest import ROOT
from processes import ENV, SMALL, launch

import main_dino
import run_with_submitit

CPU = [*SMALL, "--arch", "vit_nano", "--batch_size_per_gpu", "4", "--epochs", "6", "--saveckp_freq", "0"]


def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """An sbatch that keeps the script it is given; returns a function that reads its options."""
    kept = tmp_path / "script.sh"
    program(tmp_path / "bin", "srun", "exit 1")
    program(tmp_path / "bin", "sbatch", f'cp "$1" {kept}; echo Submitted batch job 123')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def options():
        lines = [line.removeprefix("#SBATCH --") for line in kept.read_text().splitlines()]
        return kept.exists() and {line.split("=")[0]: line.partition("=")[2] for line in lines}

    options.kept = kept
    return options


def run(*words):
    """Exit code of a command line, in this process; on drawn images unless it names others."""
    try:
        return run_with_submitit.main(run_with_submitit.parse(["--data_path", "shapes", *map(str, words)]))
    except SystemExit as error:
        return error.code


def test_published_command_line_asks_slurm_for_what_it_says(sbatch, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    out = tmp_path / "out"
    words = ["--nodes", 3, "--ngpus", 4, "--timeout", 600, "--partition", "gpu", "--comment", "for a deadline",
             "--use_volta32", "--arch", "vit_tiny", "--data_path", tmp_path, "--output_dir", out]  # fmt: skip
    assert run(*words) == 0
    found = sbatch()
    expected = {"nodes": "3", "ntasks-per-node": "4", "gpus-per-node": "4", "time": "600", "partition": "gpu",
                "comment": "'for a deadline'", "constraint": "volta32gb", "mem": "160GB", "cpus-per-task": "10",
                "signal": "USR2@120"}  # fmt: skip
    assert expected.items() <= found.items() and not {"qos", "account", "array"} & found.keys()
    assert "--cpus-per-task=10" in sbatch.kept.read_text().splitlines()[-1]  # of srun
    said = capsys.readouterr().out
    assert f"job 123: checkpoints in {out}, logs in {out}/jobs/123_0_log.out" in said
    with open(out / "jobs" / "123_submitted.pkl", "rb") as f:
        job = pickle.load(f)
    assert job._timeout_countdown == 30
    assert vars(job.args[0]).keys() == vars(main_dino.get_args_parser().parse_args([])).keys()
    assert job.args[0].arch == "vit_tiny" and job.args[0].output_dir == str(out)


def test_further_options_of_sbatch(sbatch, tmp_path):
    (tmp_path / "preset").write_text("--arch vit_tiny # small\n--epochs 20\n")
    words = [f"@{tmp_path / 'preset'}", "--device", "cpu", "--ngpus", 2, "--mem", 0, "--account", "lab", "--qos", "low",
             "--constraint", "fast&big", "--slurm", "exclude=n[1-2]", "exclusive", "cpu_freq=high", "time=5",
             "--output_dir", tmp_path / "%j", "--job_dir", tmp_path / "logs" / "%j"]  # fmt: skip
    assert run(*words) == 0
    found = sbatch()
    expected = {"exclude": "'n[1-2]'", "exclusive": "", "cpu-freq": "high", "time": "5", "mem": "0GB", "qos": "low",
                "account": "lab", "constraint": "'fast&big'", "ntasks-per-node": "2"}  # fmt: skip
    assert expected.items() <= found.items() and "gpus-per-node" not in found
    assert (tmp_path / "logs" / "123" / "123_submitted.pkl").exists()


def test_job_array_has_a_run_for_each_task(sbatch, tmp_path):
    words = ["--device", "cpu", "--seed", "%a", "--slurm", "array=0-2%2", "--output_dir", tmp_path / "seed%a"]
    assert run(*words) == 0
    assert sbatch()["array"] == "0-2%2"
    for i in range(3):
        with open(tmp_path / "jobs" / f"123_{i}_submitted.pkl", "rb") as f:
            args = pickle.load(f).args[0]
        assert (args.seed, args.output_dir) == (i, str(tmp_path / f"seed{i}"))


BAD = [
    ("--timeout 0", "--timeout"), ("--nodes two", "'two' is not a whole number"), ("--mem -1", "--mem"),
    ("--lr nan", "--lr"), ("--epochs 5", "--warmup_epochs 10 is longer"), ("--arch vit_smal", "vit_small"),
    ("--cluster pbs", "--cluster"), ("--cluster local", "--nodes 2"), ("--frobnicate", "--frobnicate"),
    ("--slurm =3", "--slurm =3"), ("--slurm mem=", "--slurm mem="), ("--slurm array=1-5", "give array=0-N"),
    ("--slurm array=0-2 --cluster debug", "only Slurm has job arrays"), ("--slurm array=0-2", "put %a into its name"),
    ("--use_volta32 --constraint fast", "'volta32gb&fast'"), ("--init_from /no/such.pth", "--init_from"),
    ("--timeout 2", "--signal_delay 120 s is as long as --timeout 2 minutes"), ("--device tpu", "--device tpu"),
    ("--device cuda:0", "--ngpus 8 processes would share"), ("--data_path shapes:0", "give shapes:COUNT"),
    ("--data_path=", "--data_path ''"), ("--slurm array=0-99999999", "submit several arrays"),
    ("--replay x", "main_dino.py --replay"), ("--parallel fsdp --precision fp16", "choose --precision bf16"),
    (f"--init_from {__file__}", "not a readable checkpoint"), (f"--job_dir {__file__}", f"--job_dir {__file__}: "),
    (f"--output_dir {__file__}/x", f"--output_dir {__file__}/x: "), ("--job_dir /proc/x", "--job_dir /proc/x: "),
    ("--cluster local --nodes 1 --job_dir x%j", "leave %j out"), ("@no_such_preset", "no_such_preset"),
]  # fmt: skip


@pytest.mark.parametrize("flags, named", BAD, ids=[b[0] for b in BAD])
def test_bad_input_gets_one_line_before_the_queue(sbatch, tmp_path, capsys, flags, named):
    out = tmp_path / "out"
    assert run("--output_dir", out, *flags.split()) == 2
    stderr = capsys.readouterr().err
    assert named in stderr and len(stderr.strip().splitlines()) == 1, stderr
    assert not out.exists() and not sbatch.kept.exists()


def test_the_network_to_distill_is_read_before_the_queue(sbatch, tmp_path, capsys):
    (tmp_path / "net.pth").write_bytes(b"not weights")
    assert run_with_submitit.main(run_with_submitit.parse([
        "main_dinov2.py", "--data_path", "shapes", "--distill_from", str(tmp_path / "net.pth"), "--output_dir",
        str(tmp_path / "out")])) == 2
    stderr = capsys.readouterr().err
    assert "--distill_from" in stderr and str(tmp_path / "net.pth") in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not sbatch.kept.exists()


def test_the_default_rate_of_stochastic_depth_gives_way_before_the_queue(sbatch, tmp_path, capsys):
    flags = ("--arch", "dla46x_c", "--out_dim", 64, "--ngpus", 1, "--output_dir", tmp_path / "out")
    assert run(*flags, "--drop_path_rate", 0.1) == 2 and "--drop_path_rate 0.1" in capsys.readouterr().err
    assert run(*flags) == 0 and sbatch.kept.exists()


def test_no_slurm_here(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--cluster slurm" in error and "--cluster local" in error and not (tmp_path / "out").exists()


def test_debug_runs_in_this_process(tmp_path, capsys):
    assert run(*CPU, "--steps", 2, "--num_workers", 0, "--cluster", "debug", "--output_dir", tmp_path / "out") == 0
    assert (tmp_path / "out" / "checkpoint.pth").exists() and "step 2/2" in capsys.readouterr().out


# ---- Signals ----


@pytest.fixture
def events(monkeypatch):
    """What happens in turn; submitit's handler is in place, as in a job's process."""
    happened, numbers = [], (signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(sys, "path", list(sys.path))
    signal.signal(signal.SIGUSR2, lambda number, frame: happened.append("queued again"))
    yield happened
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def call(monkeypatch, run, code=main_dino.TO_BE_CONTINUED):
    def main(args):
        run()
        return code

    monkeypatch.setattr(main_dino, "main", main)
    return run_with_submitit.Training(str(ROOT), "main_dino.py")(argparse.Namespace(output_dir="x"))


def test_the_job_is_queued_again_when_the_run_has_saved(events, monkeypatch):
    def training():
        signal.signal(signal.SIGUSR1, lambda number, frame: events.append("asked to stop"))
        signal.raise_signal(signal.SIGUSR2)
        events.append("saved")

    call(monkeypatch, training)
    assert events == ["asked to stop", "saved", "queued again"]


def test_before_the_run_has_begun_the_job_is_queued_again_at_once(events, monkeypatch):
    def starting():
        signal.raise_signal(signal.SIGUSR2)
        events.append("begun")

    call(monkeypatch, starting, code=0)
    assert events == ["queued again", "begun"]


def test_a_run_that_ends_is_not_queued_again(events, monkeypatch):
    def training():
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
        signal.raise_signal(signal.SIGUSR2)  # during the last step

    assert call(monkeypatch, training, code=0) == 0 and events == []
    with pytest.raises(RuntimeError, match="exit code 2"):
        call(monkeypatch, training, code=2)
    assert events == []


@pytest.mark.parametrize("state, task, expected", [("RUNNING", 0, ["queued again"]), ("RUNNING", 1, []),
                                                   ("CANCELLED", 0, []), ("COMPLETING", 0, [])])  # fmt: skip
def test_after_sigterm_only_a_job_that_slurm_lets_run(events, tmp_path, monkeypatch, state, task, expected):
    program(tmp_path, "scontrol", f"echo JobId=5 JobState={state} Reason=None")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, value in {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "5", "SLURM_PROCID": str(task)}.items():
        monkeypatch.setenv(name, value)
    assert call(monkeypatch, lambda: None) == 75 and events == expected
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    events.clear()
    assert call(monkeypatch, lambda: None) == 75 and events == []


def wait_for(condition, what):
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.1)


def children(pid):
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if line.split()[1] == str(pid)]


@pytest.mark.skipif(not shutil.which("ps"), reason="no ps: apt-get install procps")
@pytest.mark.slow
def test_two_local_processes_stopped_and_queued_again_equal_an_uninterrupted_run(tmp_path):
    done = launch("main_dino.py", *CPU, "--output_dir", tmp_path / "whole", processes=2)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "run_with_submitit.py", *CPU, "--cluster", "local", "--nodes", "1", "--ngpus",
               "2", "--output_dir", out]  # fmt: skip
    env = {k: v for k, v in ENV.items() if k != "PYTHONPATH"}
    with open(tmp_path / "said", "w") as said:  # not a pipe: the job keeps it open until its end
        subprocess.run(command, env=env, cwd=tmp_path, stdout=said, stderr=said, timeout=120)
    job = int((tmp_path / "said").read_text().split()[1].rstrip(":"))
    log, result = out / "log_steps.txt", [out / "jobs" / f"{job}_{i}_result.pkl" for i in (0, 1)]
    try:
        wait_for(lambda: log.exists() and log.read_text().count("\n") >= 5, "step 5")
        tasks = children(job)
        assert len(tasks) == 2
        for pid in tasks:
            os.kill(pid, signal.SIGUSR2)
        wait_for(result[0].exists, "result")
    finally:
        with suppress(ProcessLookupError):
            os.kill(job, signal.SIGTERM)
    with open(result[0], "rb") as f:
        assert pickle.load(f) == ("success", 0)
    text = (out / "jobs" / f"{job}_0_log.out").read_text()
    assert "stopped by a signal and saved" in text and "Requeued job" in text and "resuming from" in text
    assert (out / "log.txt").read_text() == (tmp_path / "whole" / "log.txt").read_text() != ""
    whole, found = (torch.load(f / "checkpoint.pth", weights_only=True) for f in (tmp_path / "whole", out))
    for part in ("student", "teacher", "dino_loss"):
        for key, value in whole[part].items():
            assert torch.equal(found[part][key], value), (part, key)
