"""What the project writes is never read as data, wherever it is written."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from processes import SMALL, launch

import atomic
import extract_features
import visualize_attention
from imagesets import masks
from imagesets.sources import open_images
from pretraining import logs
from protocols import charts, sheets

NANO = ["--arch", "vit_nano", "--patch_size", "8", "--device", "cpu"]


@pytest.fixture
def photos(tmp_path):
    """Six images in the class folders cat and dog."""
    for i in range(6):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 48, 3), np.uint8)).save(path)
    return tmp_path / "photos"


def listed(folder):
    images = open_images(folder)
    return [images.name(i) for i in range(len(images))], images.labels.tolist(), images.classes


def test_outputs_below_the_images_change_neither_images_nor_labels(photos, capsys):
    before = listed(photos)
    assert len(before[0]) == 6 and before[2] == ["cat", "dog"]
    figure = np.zeros((8, 8, 3), np.uint8)
    sheets.save_picture(figure, photos / "sheet.png")
    sheets.save_picture(figure, photos / "cat" / "attention.png")
    sheets.save_picture(figure, photos / "a_run" / "pictures" / "pca.png")  # would be the first class
    masks.write_labels(figure[..., 0], photos / "dog" / "masks" / "0.png")
    rows = [{"k": 1, "top1": {"value": 50.0, "interval": [40.0, 60.0]}}]
    charts.sweep_chart({"": rows}, photos / "sweep.png")
    script, flags = extract_features, ["--data_path", str(photos), *NANO, "--num_workers", "0", "--crop_size", "32"]
    assert script.main(script.get_args_parser().parse_args([*flags, "--output", str(photos / "cat" / "x.npy")])) == 0
    script = visualize_attention
    flags = ["--images", str(photos), "--output_dir", str(photos / "dog"), *NANO, "--image_size", "32"]
    assert script.main(script.get_args_parser().parse_args(flags)) == 0
    assert (photos / "dog" / "attention_sheet.png").exists()
    capsys.readouterr()
    assert listed(photos) == before
    said = capsys.readouterr().out
    assert "attention.png, attention_sheet.png" in said and "left out" in said and "move it" in said


def test_outputs_are_left_out_by_name_and_nothing_else_is(photos):
    Image.new("RGB", (8, 8)).save(photos / "cat" / "curves.png")  # a user's own image of this name
    atomic.mark_output(photos / "dog" / "curves.png")
    atomic.mark_output(photos / "dog" / "curves.png")
    Image.new("RGB", (8, 8)).save(photos / "dog" / "curves.png")
    assert (photos / "dog" / atomic.OUTPUTS).read_text() == "curves.png\n"
    names, labels, _ = listed(photos)
    assert len(names) == 7 and sum("curves" in name for name in names) == 1 and labels == [0, 0, 0, 0, 1, 1, 1]


def test_a_stopped_extraction_and_copies_of_shards_are_no_data(photos):
    before = listed(photos)
    (photos / "x.npy.parts").mkdir()
    atomic.mark_output(photos / "x.npy.parts")  # as extraction does before its first part
    np.save(photos / "x.npy.parts" / "000000.npy", np.zeros((4, 4), np.uint8))
    assert listed(photos) == before


def test_a_run_that_writes_into_its_images_resumes(photos):
    flags = [*SMALL, "--data_path", photos, "--output_dir", photos, "--batch_size_per_gpu", 6, "--steps", 2,
             "--epochs", 2]
    first = launch("main_dino.py", *flags)
    assert first.returncode == 0 and (photos / "curves.png").exists(), first.stderr
    again = launch("main_dino.py", *flags)
    assert again.returncode == 0 and "resuming from" in again.stdout and "6 images" in again.stdout, again.stderr
    assert "3 outputs of these scripts are left out (attention.png, curves.png, pca.png)" in again.stdout


def test_figures_that_wandb_keeps_are_no_data(photos, monkeypatch):
    run = SimpleNamespace(id="x", define_metric=lambda *args, **kwargs: None)
    fake = SimpleNamespace(Error=RuntimeError, init=lambda **kwargs: run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    before = listed(photos)
    logs.start_wandb(photos, {})
    (photos / "wandb" / "files").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(photos / "wandb" / "files" / "pca.png")
    assert listed(photos) == before
