"""k-NN accuracy during training: what it is compared with, and which checkpoint it makes the best one."""

import pytest
import torch
from forks import SMALLEST, make_small_in

import main_dino
from pretraining.evaluation import KnnEvaluation
from weights import checkpoints

ARGS = [*SMALLEST, "--batch_size_per_gpu", 32, "--num_workers", 0, "--saveckp_freq", 0, "--eval_knn_every", 1]


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Runs in this process, from weights in a file, with the k-NN accuracies that are given: -> what the run says."""
    make_small_in(monkeypatch)

    def parsed(*flags):
        return main_dino.get_args_parser().parse_args([str(a) for a in (*ARGS, "--output_dir", tmp_path / "run", *flags)])

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
