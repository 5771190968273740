"""Files that an older version wrote (tests/golden/before) are read, resumed from and reused."""

import hashlib
import importlib.util
import json
import lzma
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from processes import json_lines

import eval_knn
import eval_linear
import extract_features
import main_dino
from imagesets import sources
from protocols import embeddings
from utils import MultiCropWrapper
from vision_transformer import VisionTransformer, build_backbone
from weights import checkpoints

BEFORE = ROOT / "tests" / "golden" / "before"
KNOWN = json.loads((BEFORE / "known.json").read_text())

spec = importlib.util.spec_from_file_location("make_before", BEFORE / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def run(script, *argv) -> int:
    return script.main(script.get_args_parser().parse_args([*map(str, argv)]))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with the inputs of the evaluations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DINO_CACHE", "")
    make.write_images(tmp_path)
    make.write_weights(tmp_path / "weights.pth", build_backbone)
    return tmp_path


# ---- Training ----


def test_losses_of_a_run_are_the_same(tmp_path):
    assert run(main_dino, *make.TRAINING, tmp_path) == 0
    losses = [line["loss"] for line in json_lines(tmp_path / "log_steps.txt")]
    assert losses == pytest.approx(KNOWN["step_losses"], rel=1e-4)
    now, then = json_lines(tmp_path / "log.txt"), json_lines(BEFORE / "log.txt")
    assert [line.keys() for line in now] == [line.keys() for line in then]
    for key in ("train_loss", "train_lr", "train_wd", "epoch", "step"):
        assert [line[key] for line in now] == pytest.approx([line[key] for line in then], rel=1e-4)


def test_a_run_is_resumed(tmp_path, capsys):
    (tmp_path / "checkpoint.pth").write_bytes(lzma.decompress((BEFORE / "checkpoint.pth.xz").read_bytes()))
    keys = checkpoints.read(tmp_path / "checkpoint.pth").keys()
    first = (BEFORE / "log.txt").read_text().splitlines(keepends=True)[0]
    (tmp_path / "log.txt").write_text(first)
    assert run(main_dino, *make.TRAINING, tmp_path) == 0
    assert "at step 3 of 4" in capsys.readouterr().out
    text, lines = (tmp_path / "log.txt").read_text(), json_lines(tmp_path / "log.txt")
    assert text.startswith(first) and [line["step"] for line in lines] == [2, 4]
    assert np.isfinite(lines[1]["train_loss"])
    finished = checkpoints.read(tmp_path / "checkpoint.pth")
    assert finished["step"] == 4 and keys <= finished.keys()


# ---- Evaluations ----


def test_cached_features_are_used(here):
    shutil.copytree(BEFORE / "features", here / "out" / "features")
    before = {path.name: path.read_bytes() for path in (here / "out" / "features").iterdir()}
    assert run(eval_knn, *make.KNN, "out") == 0
    assert {path.name: path.read_bytes() for path in (here / "out" / "features").iterdir()} == before
    (result,) = json.loads((here / "out" / "eval_knn.json").read_text())["results"]
    assert result["top1"]["value"] == 0  # with features of its own, k-NN is right for every image


def test_an_index_of_a_listing_is_used(here, monkeypatch):
    """It lists 12 images; a 13th, which the folder's time does not tell of, stays unnoticed."""
    folder = os.path.realpath("photos/train")
    with np.load(BEFORE / "index.npz") as arrays:
        index = dict(arrays)
    watched = index["watched"].tobytes().replace(os.fsencode(KNOWN["listed"]), os.fsencode(folder))
    index["watched"] = np.frombuffer(watched, np.uint8)
    key = json.dumps([1, folder, sorted(sources.suffixes(3))])
    (here / "cache").mkdir()
    np.savez(here / "cache" / f"index_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz", **index)
    shutil.copy("photos/train/a/0.bmp", "photos/train/a/new.bmp")
    make.set_times(here)
    assert len(sources.open_images("photos/train")) == 13
    monkeypatch.setenv("DINO_CACHE", str(here / "cache"))
    images = sources.open_images("photos/train")
    assert len(images) == 12 and images.labels.tolist() == [0] * 6 + [1] * 6 and images.classes == ["a", "b"]


def test_a_linear_classifier_is_evaluated(here):
    assert run(eval_linear, *make.LINEAR, "out", "--evaluate", "--linear_weights", BEFORE / "linear.pth") == 0
    report = json.loads((here / "out" / "eval_linear.json").read_text())
    assert report["test"]["top1"]["value"] == KNOWN["linear_top1"] == 100


def test_a_linear_evaluation_is_resumed(here, capsys):
    (here / "out").mkdir()
    shutil.copy(BEFORE / "checkpoint_linear.pth", here / "out")
    now = ("--select_epoch", "last", "--interpolation", "bicubic")  # what that version did
    assert run(eval_linear, *make.LINEAR, "out") == 2 and "different select_epoch" in capsys.readouterr().err
    assert run(eval_linear, *make.LINEAR, "out", *now) == 0
    bias = checkpoints.read(here / "out" / "linear.pth")["state_dict"]["linear.bias"]
    assert (bias - torch.tensor([40.0, -40.0])).abs().max() < 20
    assert not (here / "out" / "checkpoint_linear.pth").exists()


# ---- Embeddings ----


def test_embeddings_are_read(here):
    for name in ("embeddings.npy", "embeddings.npy.json"):
        shutil.copy(BEFORE / name, here)
    array, names, about = embeddings.read("embeddings.npy")
    assert array.shape == (6, 192) and names[3] == "photos/val/b/0.bmp" and about["arch"] == "vit_nano"
    written = (here / "embeddings.npy").read_bytes()
    assert run(extract_features, *make.FEATURES, "embeddings.npy") == 0  # the same job: nothing to do
    assert (here / "embeddings.npy").read_bytes() == written
    (here / "embeddings.npy").unlink()
    assert run(extract_features, *make.FEATURES, "embeddings.npy") == 0
    np.testing.assert_allclose(np.load("embeddings.npy"), array, rtol=1e-4, atol=1e-5)


def test_embeddings_of_a_killed_run_are_finished(here):
    shutil.copytree(BEFORE / "embeddings.npy.parts", here / "embeddings.npy.parts")
    assert run(extract_features, *make.FEATURES, "embeddings.npy") == 0
    array, expected = np.load("embeddings.npy"), np.load(BEFORE / "embeddings.npy")
    assert (array[:4] == 0.5).all()
    np.testing.assert_allclose(array[4:], expected[4:], rtol=1e-4, atol=1e-5)
    assert not (here / "embeddings.npy.parts").exists()


# ---- Pickled models ----


@torch.no_grad()
def test_pickled_models_are_loaded():
    model = torch.load(BEFORE / "model.pt", weights_only=False)
    backbone = torch.load(BEFORE / "backbone.pt", weights_only=False)
    assert type(model) is MultiCropWrapper and type(backbone) is VisionTransformer
    x = make.forward_input()
    torch.testing.assert_close(model([x]), torch.tensor(KNOWN["model"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backbone(x), torch.tensor(KNOWN["backbone"]), rtol=1e-4, atol=1e-5)
    (tokens,) = backbone.get_intermediate_layers(x)
    torch.testing.assert_close(tokens[:, 0], backbone(x))
    assert (backbone.patch_size, backbone.n_blocks, backbone.method) == (8, len(backbone.blocks), "dino")
