"""Pretraining under a real Slurm of one node: interrupted runs end equal, to the bit, to the uninterrupted one."""

import os
import shlex
import signal
import sys

import pytest
import slurm_cluster
import torch
from conftest import ROOT
from processes import SMALL

pytestmark = pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "-")

# Three epochs of 16 steps on two processes: some seconds, so that a signal finds the run half-way.
RUN = [*SMALL, "--arch", "vit_nano", "--data_path", "shapes:128x32", "--batch_size_per_gpu", "4", "--epochs", "3",
       "--saveckp_freq", "0"]  # fmt: skip
SRUN = f"srun {sys.executable} {ROOT / 'main_dino.py'} "
SUBMITIT = [sys.executable, ROOT / "run_with_submitit.py", *RUN, "--nodes", "1", "--ngpus", "2", "--cpus_per_task", "1",
            "--mem", "0", "--timeout", "60"]  # fmt: skip


@pytest.fixture(scope="module")
def slurm():
    with slurm_cluster.cluster() as cluster:
        yield cluster


def batch(slurm, out, after=""):
    """Submits a run of two tasks; returns the job's number."""
    script = SRUN + shlex.join([*RUN, "--output_dir", str(out)]) + after
    return slurm.submit(script, "--ntasks=2", f"--output={out}.log", "--open-mode=append")


@pytest.fixture(scope="module")
def whole(slurm, tmp_path_factory):
    """The folder of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    job = batch(slurm, out)
    assert slurm.wait_for_end(job) == "COMPLETED", out.with_suffix(".log").read_text()
    assert "2 process(es)" in out.with_suffix(".log").read_text()
    return out


def wait_for_steps(slurm, out, steps):
    log = out / "log_steps.txt"
    slurm.wait_for(lambda: log.exists() and log.read_text().count("\n") >= steps, f"step {steps} in {out}")


def assert_equal_runs(whole, out):
    assert (out / "log.txt").read_text() == (whole / "log.txt").read_text() != ""
    expected, found = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (whole, out))
    for part in ("student", "teacher", "dino_loss", "optimizer", "rng"):
        assert_equal(found[part], expected[part], part)
    assert found["step"] == expected["step"] == 48


def assert_equal(a, b, where):
    """Nested dictionaries and lists of tensors and plain values."""
    if isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in b:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(b, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(b) else a == b, where


def test_requeued_half_way(slurm, whole, tmp_path):
    out = tmp_path / "out"
    job = batch(slurm, out)
    wait_for_steps(slurm, out, 5)
    slurm.run("scontrol", "requeue", job)
    assert slurm.wait_for_end(job) == "COMPLETED" and slurm.job(job)["Restarts"] == "1"
    assert "resuming from" in (tmp_path / "out.log").read_text()
    assert_equal_runs(whole, out)


@pytest.mark.slow
def test_warned_half_way_the_batch_script_requeues(slurm, whole, tmp_path):
    """SIGUSR1, as --signal=USR1@120 sends it before the time is over."""
    out = tmp_path / "out"
    job = batch(slurm, out, "\n[ $? = 75 ] && scontrol requeue $SLURM_JOB_ID")
    wait_for_steps(slurm, out, 5)
    slurm.run("scancel", "--signal=USR1", job)
    slurm.wait_for(lambda: slurm.job(job)["Restarts"] == "1", "requeue")
    slurm.wait_for_end(job)
    text = (tmp_path / "out.log").read_text()
    assert "stopped by a signal and saved" in text and "resuming from" in text, text
    assert_equal_runs(whole, out)


def submit(slurm, folder):
    """Through submitit, from a folder that is not the project's; returns the job's number and its --output_dir."""
    stdout = slurm.run(*SUBMITIT, "--output_dir", "run%j", cwd=folder)
    job = stdout.split()[1].rstrip(":")
    assert f"checkpoints in run{job}, logs in {folder}/run{job}/jobs" in stdout
    return job, folder / f"run{job}"


def pids(slurm, job):
    """The processes of the step's tasks."""
    rows = [line.split() for line in slurm.run("scontrol", "listpids", job).splitlines()]
    return [int(row[0]) for row in rows if row[2] == "0" and row[4].isdigit()]


def test_out_of_time_half_way_submitit_requeues(slurm, whole, tmp_path):
    """Slurm's own time limit, for which it looks every 30 s: so long the processes are held still. It wakes them."""
    job, out = submit(slurm, tmp_path)
    wait_for_steps(slurm, out, 5)
    for pid in pids(slurm, job):
        os.kill(pid, signal.SIGSTOP)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")  # minutes
    slurm.wait_for(lambda: slurm.job(job)["Restarts"] == "1", "requeue")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    state, logs = slurm.wait_for_end(job), read_logs(out)
    assert state == "COMPLETED" and slurm.job(job)["Restarts"] == "1", logs
    assert "stopped by a signal and saved" in logs and "Requeued job" in logs and "resuming from" in logs, logs
    assert_equal_runs(whole, out)


def read_logs(out):
    return "\n".join(f.read_text() for f in sorted((out / "jobs").glob("*_log.*")))


def test_cancelled_submitit_job_saves_and_stays_cancelled(slurm, tmp_path):
    job, out = submit(slurm, tmp_path)
    wait_for_steps(slurm, out, 3)
    slurm.run("scancel", job)
    slurm.wait_for(lambda: "stopped by a signal and saved" in read_logs(out), "checkpoint")
    assert slurm.wait_for_end(job) == "CANCELLED" and slurm.job(job)["Restarts"] == "0"
    assert torch.load(out / "checkpoint.pth", weights_only=True)["step"] >= 3


def test_what_sbatch_refuses_is_said_in_one_line(slurm, tmp_path):
    command = [*SUBMITIT, "--output_dir", tmp_path / "out", "--partition", "none"]
    with pytest.raises(AssertionError, match="--cluster slurm: sbatch: error: invalid partition specified: none"):
        slurm.run(*command)


def test_first_host_is_what_scontrol_says(slurm):
    import parallel

    for nodelist in ("vm", "a,b", "node[03-07,12]", "r[0-1]n[1-4],x", "a-b[2,4]"):
        hosts = slurm.run("scontrol", "show", "hostnames", nodelist).split()
        assert parallel.first_slurm_host(nodelist) == hosts[0]
