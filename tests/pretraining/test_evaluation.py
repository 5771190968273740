"""k-NN accuracy during training: what it is compared with, and which checkpoint it makes the best one."""

import pytest
import torch
from forks import SMALLEST, make_small_in
from processes import json_lines

import main_dino
from pretraining.evaluation import KnnEvaluation
from weights import checkpoints

ARGS = [*SMALLEST, "--batch_size_per_gpu", 32, "--num_workers", 0, "--saveckp_freq", 0, "--eval_knn_every", 1]


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Runs in this process, from weights in a file, with the k-NN accuracies that are given: -> what the run says."""
    make_small_in(monkeypatch)

    def parsed(*flags):
        argv = (*ARGS, "--output_dir", tmp_path / "run", *flags)
        return main_dino.get_args_parser().parse_args([str(a) for a in argv])

    torch.save(main_dino.make_backbone(parsed())[0].state_dict(), tmp_path / "w.pth")

    def started(accuracies, *flags, init=True):
        left = iter(accuracies)
        monkeypatch.setattr(KnnEvaluation, "knn", lambda *args: (float(next(left)), 100.0))
        assert main_dino.main(parsed(*flags, *(["--init_from", tmp_path / "w.pth"] if init else []))) == 0
        assert not list(left)
        return capsys.readouterr().out

    return started


def test_the_best_checkpoint_is_better_than_the_starting_weights(start, tmp_path):
    """Of 60 % on 16 images, 40 % is no more than chance below."""
    said = start([60, 20, 40, 30, 55], "--epochs", 3)
    warning, = (line for line in said.splitlines() if "WARNING" in line and "starting weights" in line)
    assert "30.0 %" in warning and "30.0 points" in warning and "--init_from" in warning and "--lr" in warning
    assert not (tmp_path / "run" / checkpoints.BEST).exists() and "best 60.0 %" in said
    assert checkpoints.read(tmp_path / "run" / checkpoints.NAME)["best_checkpoint"] is None
    assert "best 61.0 %" in start([61], "--epochs", 4, "--extend")
    assert checkpoints.read(tmp_path / "run" / checkpoints.BEST)["best_checkpoint"] == checkpoints.BEST


@pytest.mark.parametrize("init", [True, False])
def test_accuracies_on_other_images_are_not_compared(start, tmp_path, init):
    """Starting weights are those of the first start; a resume without the file can't measure them."""
    start([60, 20, 70] if init else [30, 20, 70], "--epochs", 1, init=init)
    assert "best 70.0 %" in start([50], "--epochs", 2, "--extend", init=False)
    said = start([15, 45] if init else [35, 15, 45], "--epochs", 3, "--extend", "--eval_data_path", "shapes:80x16",
                 init=False)
    assert "--eval_data_path" in said and "best 45.0 %" in said and "raw pixels 15.0 %" in said
    assert ("untrained 35.0 %" in said) != init and "starting weights 60" not in said
    logged = json_lines(tmp_path / "run" / "log.txt")
    assert [line["knn_best"] for line in logged] == [70, 70, 45] and "knn_data" not in logged[0]
    stored = checkpoints.read(tmp_path / "run" / checkpoints.NAME)
    assert stored["knn"]["best_epoch"] == 2 and bool(stored["args"]["init_from"]) == init


def test_knn_that_begins_with_a_resume_is_compared_with_what_the_run_began_with(start):
    start([], "--epochs", 1, "--eval_knn_every", 0)
    said = start([20, 40], "--epochs", 2, "--extend", init=False)
    assert "--init_from" in said and "untrained" not in said
