"""Two runs in one folder: the second is refused while the first lives, and takes over when it does not."""

import json
import os
import signal
import time

import pytest
from forks import SMALLEST, Started, lines

from parallel import Refused
from pretraining import owner


def write(path, **changed):
    path.write_text(json.dumps(owner.myself() | changed))


def test_the_second_run_is_refused_in_one_line_and_the_first_goes_on(tmp_path):
    first = Started(*SMALLEST, "--epochs", 30, "--output_dir", tmp_path)
    assert first.wait_for(lambda: lines(tmp_path / "log_steps.txt") >= 2)
    second = Started(*SMALLEST, "--epochs", 30, "--output_dir", tmp_path)
    assert second.wait() == [2]
    said = second.output().strip()
    assert f"--output_dir {tmp_path}" in said and str(first.all[0].pid) in said and "another folder" in said
    assert len(said.splitlines()) == 1
    first.signal(signal.SIGKILL)
    first.wait()
    again = Started(*SMALLEST, "--epochs", 30, "--steps", 0, "--output_dir", tmp_path)
    assert again.wait_for(lambda: "resuming" in again.output() or "step" in again.output())  # taken over at once
    again.kill()


def test_a_finished_run_leaves_no_owner(tmp_path):
    with owner.owned(tmp_path):
        assert json.loads((tmp_path / owner.NAME).read_text())["process"] == os.getpid()
        with pytest.raises(Refused):
            owner.take(tmp_path / owner.NAME)
    assert not (tmp_path / owner.NAME).exists()


def test_a_number_that_is_used_again_is_no_owner(tmp_path):
    write(tmp_path / owner.NAME, process=1, started="0")  # process 1 lives, and started at another time
    owner.take(tmp_path / owner.NAME)
    assert owner.read(tmp_path / owner.NAME) == owner.myself()


def test_a_requeued_job_takes_over_from_any_host(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    write(tmp_path / owner.NAME, host="elsewhere", job="7")
    owner.take(tmp_path / owner.NAME)


@pytest.mark.parametrize("lives", [True, False])
def test_another_host_has_a_while_to_give_a_sign_of_life(tmp_path, monkeypatch, lives):
    monkeypatch.setattr(owner, "SILENCE_SECONDS", 2)
    path = tmp_path / owner.NAME
    write(path, host="elsewhere")
    if lives:
        monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: (os.utime(path), sleep(0.01)))
        with pytest.raises(Refused, match="elsewhere"):
            owner.take(path)
    else:
        owner.take(path)
        assert owner.read(path) == owner.myself()


def test_a_file_cut_short_by_a_kill_is_no_owner(tmp_path):
    (tmp_path / owner.NAME).write_text('{"host": "x", "proc')
    owner.take(tmp_path / owner.NAME)
