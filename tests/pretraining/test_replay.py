"""A step that was not finite is kept as it was, and computed again with the culprit's name."""

import re

import pytest
import torch
from forks import SMALLEST, Started

import main_dino
import main_dinov2
import utils
from imagesets import loaders
from pretraining import failures, replay
from weights import checkpoints


def nan_in_the_sixth_loss() -> None:
    then, calls = utils.cross_entropy, []

    def cross_entropy(*args):
        calls.append(1)
        return then(*args) * (float("nan") if len(calls) == 6 else 1)

    utils.cross_entropy = cross_entropy


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_state_before_the_step_is_kept(tmp_path, optimizer):
    """Step 5 fails, and is found out at step 8: the checkpoint before step 5 has what must have been kept."""
    started = Started(*SMALLEST, "--optimizer", optimizer, "--log_every", 8, "--saveckp_every_steps", 5, "--lr", 0.1,
                      "--drop_path_rate", 0.5, "--output_dir", tmp_path, before=nan_in_the_sixth_loss)  # fmt: skip
    assert started.wait() == [1], started.output()
    path = tmp_path / replay.NAME
    last = started.output().strip().splitlines()[-1]
    assert "step 5: loss or gradient is not finite" in last and f"main_dino.py --replay {path}" in last
    failure, before = checkpoints.read(path), checkpoints.read(tmp_path / checkpoints.NAME)
    assert before["step"] == failure["step"] == 5
    for key, value in before["student"].items():
        assert torch.equal(value, failure["student"][key]), key
    for key, value in before["teacher"].items():
        torch.testing.assert_close(failure["teacher"][key], value, rtol=1e-6, atol=1e-6, msg=key)
    assert torch.equal(before["dino_loss"]["center"], failure["dino_loss"]["center"])
    assert torch.equal(before["rng"][0]["torch"], failure["rng"]["torch"])
    order = loaders.GlobalBatches(64, 8, seed=0).permutation(0)
    assert failure["index"][0].tolist() == order[40:48].tolist()
    again = Started("--replay", path, "--device", "cpu")
    assert again.wait() == [0] and "in float32 the step is finite" in again.output(), again.output()


def test_replay_names_the_module(tmp_path):
    args = [*SMALLEST, "--output_dir", tmp_path, "--grad_accum_steps", 2, "--batch_size_per_gpu", 4]
    assert Started(*args, "--saveckp_every_steps", 5).wait() == [0]
    state = checkpoints.read(tmp_path / "checkpoint_prev.pth")
    state["student"]["backbone.blocks.1.mlp.fc1.weight"][0, 0] = float("inf")
    checkpoints.save(state, tmp_path / checkpoints.NAME)
    started = Started(*args)
    assert started.wait() == [1], started.output()
    again = Started("--replay", tmp_path / replay.NAME, "--device", "cpu")
    assert again.wait() == [0], again.output()
    said = again.output()
    assert "student's parameters before the step" in said and "NOT FINITE: backbone.blocks.1.mlp.fc1.weight" in said
    assert re.search(r"student: backbone.blocks.1.mlp.fc1 max .* <- the first that is not finite", said)
    assert re.search(r"gradients: .* not finite", said) and "not finite either" in said
    assert said.count("by the student's view: nan nan nan nan") == 2  # micro-batches


def test_only_a_failure_is_replayed(tmp_path, capsys):
    checkpoints.save({"student": {}}, tmp_path / "x.pt")
    for path in (tmp_path / "x.pt", tmp_path / "absent.pt"):
        args = main_dino.get_args_parser().parse_args(["--replay", str(path), "--device", "cpu"])
        assert main_dino.main(args) == 2
        said = capsys.readouterr().err
        assert str(path) in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("script, other", [(main_dino, main_dinov2), (main_dinov2, main_dino)])
def test_a_failure_of_the_other_script_is_refused(tmp_path, capsys, script, other):
    path, method = tmp_path / "failure.pt", {} if other is main_dino else {"method": "dinov2"}
    checkpoints.save({"crops": [], "args": method}, path)
    assert script.main(script.get_args_parser().parse_args(["--replay", str(path), "--device", "cpu"])) == 2
    said = capsys.readouterr().err
    assert f"python {other.__name__}.py --replay {path}" in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("args, cuda, words", [
    ({"world_size": 2, "centering": "sinkhorn_knopp"}, False, "Sinkhorn-Knopp saw"),
    ({"world_size": 2, "centering": "sinkhorn_knopp", "koleo_all_processes": True, "koleo_loss_weight": 0.1}, True,
     "Sinkhorn-Knopp, KoLeo (--koleo_all_processes), batch norm saw"),
    ({"world_size": 2, "centering": "centering", "koleo_all_processes": False}, False, ""),
    ({"world_size": 1, "centering": "sinkhorn_knopp"}, True, ""), ({"world_size": 2}, True, "batch norm saw")])
def test_what_the_run_computed_over_all_processes_is_said(tmp_path, monkeypatch, capsys, args, cuda, words):
    monkeypatch.setattr(replay, "compute", lambda *args: False)
    failure = {"step": 5, "rank": 1, "index": [torch.arange(2)], "crops": [], "dtype": "None", "args": args,
               "student": {"head.mlp.1.running_mean": torch.ones(1)}, "teacher": {}, "rng": {"cuda": 0} if cuda else {}}
    checkpoints.save(failure, tmp_path / "failure.pt")
    replay.replay(str(tmp_path / "failure.pt"), torch.device("cpu"), None)
    said = capsys.readouterr().out
    assert f"{words} the images of all 2 processes" in said if words else "WARNING" not in said


def test_view_losses_add_up_to_the_loss():
    torch.manual_seed(0)
    loss = utils.DINOLoss(16, 5, 0.1, 0.1, 0, 1)
    student, teacher = torch.randn(5 * 3, 16), torch.randn(2 * 3, 16)
    views = replay.view_losses(loss, student, teacher, 0)
    # a global view has one pair, a local one two
    expected = (views[:2].sum() + 2 * views[2:].sum()) / 8
    torch.testing.assert_close(expected, loss(student, teacher, 0, update_center=False))
    q = ((teacher[3] - 0) / 0.1).softmax(-1)
    one = replay.view_losses(loss, student[[0, 3, 6, 9, 12]], teacher[[0, 3]], 0)
    torch.testing.assert_close(one[0], -(q * (student[0] / 0.1).log_softmax(-1)).sum())


def test_updates_of_the_teacher_are_taken_back():
    torch.manual_seed(0)
    student, before = {"w": torch.randn(9), "n": torch.tensor(3)}, {"w": torch.randn(9), "n": torch.tensor(3)}
    after = {k: v.clone() for k, v in before.items()}
    for m in (0.9, 0.99, 0.5):
        after["w"] = m * after["w"] + (1 - m) * student["w"]
    found = failures.without_updates(after, student, ["w"], [0.9, 0.99, 0.5])
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-6)
    assert failures.without_updates(after, student, ["w"], [0.9, 0.0]) is after
