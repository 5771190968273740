"""Images are read alike by all scripts: what trains can be evaluated."""

import importlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import SMALL

import check_images
import eval_knn
import extract_features
import main_dino
import search
from imagesets.checking import open_checked
from imagesets.decode import Reading
from imagesets.sources import open_images
from parallel import Refused
from protocols.features import images_hash, load_network
from vision_transformer import build_backbone

READ_IMAGES = sorted({path.stem for path in ROOT.glob("eval*.py")} | {
    "main_dino", "extract_features", "visualize_attention", "curate"})
NANO = ["--arch", "vit_nano", "--patch_size", "8", "--crop_size", "32", "--device", "cpu", "--num_workers", "0"]


@pytest.fixture
def deep(tmp_path):
    """Four 16-bit images of 0 to 2000, and one of 8 bits that comes first."""
    folder = tmp_path / "deep"
    folder.mkdir()
    Image.new("L", (40, 40), 9).save(folder / "0.png")
    for i in range(1, 5):
        values = np.random.default_rng(i).integers(0, 2001, (40, 40)).astype(np.uint16)
        values[0, :2] = 0, 2000
        Image.fromarray(values).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("script", READ_IMAGES)
def test_every_script_that_reads_images_takes_the_same_flags(script):
    parser = importlib.import_module(script).get_args_parser()
    for name, default in (("max_pixels", 178_956_970), ("value_range", None)):
        assert parser.get_default(name) == default
        assert f"--{name}" in parser.format_help()


@pytest.mark.parametrize("script", [eval_knn, extract_features])
def test_the_pixel_limit_holds_in_evaluation(script, deep, tmp_path, capsys):
    output = ["--output", str(tmp_path / "x.npy")] if script is extract_features else ["--output_dir", str(tmp_path)]
    flags = ["--data_path", str(deep), *NANO, *output]
    assert script.main(script.get_args_parser().parse_args([*flags, "--max_pixels", "1000"])) == 2
    error = capsys.readouterr().err
    assert "0.png" in error and "pixels" in error
    assert script.main(script.get_args_parser().parse_args([*flags, "--max_pixels", "1600"])) == 0


def test_a_range_reaches_the_pixels_and_the_fingerprint(deep):
    plain, ranged = open_images(deep), open_images(deep, value_range=[0, 2000])
    assert plain.load(1).max() == 8 and ranged.load(1).max() == 255 and ranged.load(1).min() == 0
    assert plain.load(0).equal(ranged.load(0)) and images_hash(plain) != images_hash(ranged)
    assert images_hash(ranged) == images_hash(open_images(deep, value_range=(0.0, 2000.0)))


def test_evaluation_takes_the_range_of_training(tmp_path):
    path = tmp_path / "checkpoint.pth"
    args = {"arch": "vit_nano", "patch_size": 8, "value_range": [0.0, 2000.0]}
    state = {f"backbone.{k}": v for k, v in build_backbone("vit_nano", 8)[0].state_dict().items()}
    torch.save({"teacher": state, "args": args}, path)
    assert load_network(str(path)).reading == Reading(3, 178_956_970, (0.0, 2000.0))
    assert load_network(str(path), value_range=[0, 100], max_pixels=7).reading == Reading(3, 7, (0, 100))
    assert load_network("", "pixels", value_range=[0, 100]).reading.value_range == (0, 100)
    settings = main_dino.get_args_parser().parse_args(["--value_range", "-1000", "3000.5"])
    assert settings.value_range == [-1000, 3000.5]


# ---- Images that can't be decoded ----


@pytest.fixture
def damaged(tmp_path):
    """Train and val parts with three images of each of two classes, one of each part cut short."""
    for part in ("train", "val"):
        for i in range(6):
            path = tmp_path / "set" / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:500])
    return tmp_path / "set"


def test_bad_images_are_skipped_and_listed(damaged, tmp_path, capsys):
    flags = ["--data_path", str(damaged), *NANO, "--output_dir", str(tmp_path / "out"), "--nb_knn", "1"]
    assert eval_knn.main(eval_knn.get_args_parser().parse_args(flags)) == 2
    assert "train/b/5.png" in capsys.readouterr().err
    bad = tmp_path / "lists" / "bad.txt"
    report = eval_knn.evaluate(eval_knn.get_args_parser().parse_args([*flags, "--skip_bad", str(bad)]))
    assert report["results"]
    lines = [line.split("\t") for line in bad.read_text().splitlines()]
    assert [name for name, _ in lines] == [str(damaged / part / "b" / "5.png") for part in ("train", "val")]
    assert all(reason for _, reason in lines) and "--skip_bad" not in capsys.readouterr().err
    images = open_checked(damaged, "val", Reading(skip_bad=str(bad)))
    assert len(images) == 5 and images.labels.tolist() == [0, 0, 0, 1, 1]
    assert images.load(4).equal(open_images(damaged / "val" / "b").load(1))


def test_extraction_without_bad_images_can_be_searched(damaged, tmp_path):
    output, bad = tmp_path / "x.npy", tmp_path / "bad.txt"
    flags = ["--data_path", str(damaged / "train"), *NANO, "--output", str(output), "--skip_bad", str(bad)]
    assert extract_features.main(extract_features.get_args_parser().parse_args(flags)) == 0
    assert np.load(output).shape[0] == 5 and len(bad.read_text().splitlines()) == 1
    sheet = ["--features", str(output), "--query", "4", "--k", "2", "--output", str(tmp_path / "sheet.png")]
    assert search.main(search.get_args_parser().parse_args(sheet)) == 0


def test_the_list_of_bad_images_replaces_no_other_file(damaged, tmp_path):
    for path in (next(damaged.rglob("*.png")), tmp_path / "list.txt"):
        path.write_bytes(b"content")
        with pytest.raises(Refused, match=f"--skip_bad {path}: exists"):
            open_checked(damaged, "train", Reading(skip_bad=str(path)))
        assert path.read_bytes() == b"content"


def test_a_set_of_bad_images_alone_is_refused(damaged, tmp_path):
    for path in damaged.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(Refused, match="--data_path .*none of the 6 images"):
        open_checked(damaged, "train", Reading(skip_bad=str(tmp_path / "bad.txt")))


@pytest.mark.usefixtures("small_heads")
def test_multispectral_images_from_file_to_evaluation(tmp_path, capsys):
    """The way that docs/channels.md describes, with the flags that check_images.py prints."""
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "tiles" / "ab"[i % 2] / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rng.integers(-100, 10_000, (40, 40, 4)).astype(np.int16))
    tiles, out = str(tmp_path / "tiles"), tmp_path / "run"
    ranged = ["--value_range", "0", "10000"]
    assert check_images.main(check_images.get_args_parser().parse_args([tiles, *ranged])) == 0
    pasted = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("--in_chans 4 --mean"))
    trained = [*SMALL, "--arch", "vit_nano", "--data_path", tiles, "--output_dir", str(out), *ranged, *pasted.split(),
               "--batch_size_per_gpu", "4", "--steps", "1", "--num_workers", "0"]
    assert main_dino.main(main_dino.get_args_parser().parse_args(trained)) == 0
    flags = ["--pretrained_weights", str(out / "checkpoint.pth"), "--data_path", tiles, "--num_workers", "0",
             "--device", "cpu", "--nb_knn", "1"]
    assert eval_knn.evaluate(eval_knn.get_args_parser().parse_args(flags))["results"]
    network = load_network(str(out / "checkpoint.pth"))
    image = open_images(tiles, **network.reading.decoding()).load(0)
    first = np.load(tmp_path / "tiles" / "a" / "0.npy").clip(0, 10_000)
    assert (image.permute(1, 2, 0).numpy() == np.rint(first * 0.0255)).mean() > 0.99  # ties are rounded either way
