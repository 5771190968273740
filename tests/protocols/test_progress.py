"""Signs of life: when lines come, what they say, and that each script has them."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval_knn
import eval_linear
import extract_features
import visualize_attention
from imagesets import checking
from imagesets.sources import open_images
from protocols import knn, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that `progress` reads; each reading takes a second, or what `seconds` says."""
    clock = SimpleNamespace(now=0.0, seconds=1.0)

    def monotonic():
        clock.now += clock.seconds
        return clock.now

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=monotonic))
    return clock


def test_lines_come_ever_less_often(clock, capsys):
    assert list(progress.progress(range(1000), 2000, "images", size=2)) == list(range(1000))
    lines = capsys.readouterr().out.splitlines()
    seconds = [int(line.split()[1]) // 2 for line in lines]  # an item a second
    assert seconds[:5] == [3, 6, 12, 24, 48] and seconds[5] == 96 and max(np.diff(seconds)) == 60
    assert lines[0] == "images: 6 of 2000, eta 0:16:37" and lines[3].endswith("eta 0:16:16")
    assert len(lines) == 6 + (996 - 96) // 60


def test_short_work_and_work_without_a_name_are_silent(clock, capsys):
    clock.seconds = 0.01
    list(progress.progress(range(100), 100, "images"))
    clock.seconds = 10
    list(progress.progress(range(100), 100, ""))
    list(progress.progress(range(1), 1, "images"))
    assert capsys.readouterr().out == ""
    assert next(iter(progress.progress(itertools.count(), 10, "images"))) == 0


def test_work_whose_length_is_unknown_shows_how_far_it_is(clock, capsys):
    list(progress.progress(range(7), 0, "frames"))
    assert capsys.readouterr().out == "frames: 3\nframes: 6\n"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for part, name, i in itertools.product(("train", "val"), ("a", "b"), range(6)):
        (folder / part / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * i, 0, 200 * (name == "b"))).save(folder / part / name / f"{i}.png")
    return folder


NETWORK = ["--arch", "vit_nano", "--patch_size", "8", "--crop_size", "16", "--num_workers", "0", "--device", "cpu",
           "--batch_size_per_gpu", "2"]  # fmt: skip


@pytest.mark.parametrize("script, flags, lines", [
    (eval_knn, [], ["features: 6 of 12, eta 0:00:03"]),
    (eval_linear, ["--epochs", "2", "--lr", "0.1"], ["epoch 1: 6 of 12, eta 0:00:03", "epoch 1/2: training loss"]),
    (eval_linear, ["--epochs", "2", "--finetune", "--warmup_epochs", "0"], ["epoch 1: 6 of 12, eta", "epoch 1/2: "]),
    (extract_features, ["--output", "x.npy"], ["first part: 6 of 24, eta 0:00:09", "images/s, eta 0:00:00"]),
])  # fmt: skip
def test_scripts_show_signs_of_life(script, flags, lines, clock, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*NETWORK, "--data_path", str(pictures), *flags]
    assert script.main(script.get_args_parser().parse_args(argv)) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in lines), said
    if script is eval_linear:
        assert "epoch 1/2: training loss" in said and ", eta " in said.split("epoch 1/2")[1].splitlines()[0]


def test_a_search_of_neighbours_shows_one(clock, capsys):
    knn.nearest(torch.eye(8), torch.eye(8), 1, rows=1)
    assert "neighbours: 3 of 8, eta 0:00:05" in capsys.readouterr().out


@pytest.mark.parametrize("flags, lines", [
    (["--images"], ["images: 3 of 6, eta 0:00:03"]),
    (["--video"], ["frames: 3 of 6, eta 0:00:03"]),
    (["--video_only", "--video"], ["frames: 3 of 6, eta 0:00:03"]),
])  # fmt: skip
def test_drawing_many_images_shows_one(flags, lines, clock, pictures, tmp_path, capsys):
    if "--video" in flags:
        pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg: pip install imageio-ffmpeg")
    argv = ["--arch", "vit_nano", "--device", "cpu", "--output_dir", str(tmp_path), *flags,
            str(pictures / "train" / "a")]
    assert visualize_attention.main(visualize_attention.get_args_parser().parse_args(argv)) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in lines), said


def test_checking_images_shows_one(pictures, monkeypatch, capsys):
    seconds = itertools.count()
    monkeypatch.setattr(checking, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    checking.check(open_images(pictures))
    assert "4 of 24 images decoded, eta 0:00:20" in capsys.readouterr().err
