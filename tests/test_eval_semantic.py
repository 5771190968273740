"""eval_semantic.py from end to end: folders, drawn images, two processes, presets, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import launch

import eval_semantic as script
import parallel
from imagesets import masks
from protocols import semantic, tokens
from protocols.semantic_layers import linear_layer
from vision_transformer import vit_nano

SMALL = ["--arch", "vit_nano", "--patch_size", "8", "--num_workers", "0", "--device", "cpu", "--batch_size", "4"]


def run(data, out, *flags):
    flags = ["--data_path", data, "--output_dir", out, *SMALL, *flags]
    return script.main(script.get_args_parser().parse_args([str(flag) for flag in flags]))


def read(out):
    return json.loads((out / "eval_semantic.json").read_text())


def coloured_folder(root, n=12):
    """Each pixel's class is its colour: black, red, green; a border of 255; images of two shapes."""
    colours = np.array([(0, 0, 0), (220, 30, 30), (20, 200, 40)], np.uint8)
    for part in ("train", "val"):
        for i in range(n):
            rng = np.random.default_rng((i, part == "val"))
            height, width = (32, 48) if i % 2 else (56, 40)
            labels = np.zeros((height, width), np.uint8)
            for c in (1, 2):
                top, left = rng.integers(0, 16, 2)
                labels[top : top + 16, left : left + 16] = c
            pixels = colours[labels]
            labels[:2] = masks.VOID
            (root / part / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / part / "images" / f"{i}.png")
            masks.write_labels(labels, root / part / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("ground\nbrick\nleaf\n")
    return root


def test_a_folder_whose_colours_are_its_classes(tmp_path):
    """Raw pixels suffice, at the masks' own sizes and through windows smaller than the images."""
    data = coloured_folder(tmp_path / "data")
    flags = ("--arch", "pixels", "--steps", "150", "--lr", "0.03", "--crop_size", "32", "--image_size", "64",
             "--window_size", "40", "--stride", "24", "--scale", "0.8", "1.5")
    assert run(data, tmp_path / "out", *flags) == 0
    report = read(tmp_path / "out")
    (row,) = report["results"]
    assert row["features"] == "raw pixels" and row["miou"]["value"] > 80 and row["pixel_accuracy"]["value"] > 90
    low, high = row["miou"]["interval"]
    assert low < row["miou"]["value"] < high and list(report["per_class"]) == ["ground", "brick", "leaf"]
    assert report["images"] == [12, 0, 12] and report["geometry"]["window"] == 40
    assert np.mean([by["raw pixels"] for by in report["per_class"].values()]) == pytest.approx(row["miou"]["value"])
    assert Image.open(tmp_path / "out" / "semantic.png").width > 600


def test_a_sweep_with_baselines(tmp_path, capsys):
    torch.manual_seed(1)
    torch.save(vit_nano(8, img_size=32).state_dict(), tmp_path / "weights.pth")
    flags = ("--pretrained_weights", tmp_path / "weights.pth", "--steps", "3", "--lr", "0.01", "0.1", "--n_last_blocks",
             "1", "2", "--baselines", "--val_share", "0.25")
    assert run("shapes:16x32", tmp_path / "out", *flags) == 0
    report, printed = read(tmp_path / "out"), capsys.readouterr().out
    assert [row["features"] for row in report["results"]] == ["network", "k-means", "untrained", "raw pixels"]
    assert len(report["settings"]) == 4 + 4 + 2 and sum(row["chosen"] == "*" for row in report["settings"]) == 3
    for name in ("network", "untrained", "raw pixels"):
        mine = [row for row in report["settings"] if row["features"] == name]
        best = max(mine, key=lambda row: row["held-out mIoU"]["value"])
        (tested,) = [row for row in report["results"] if row["features"] == name]
        assert best["chosen"] == "*" and (best["lr"], best["blocks"]) == (tested["lr"], tested["blocks"])
    assert report["images"] == [12, 4, 4] and len(report["per_class"]) == 11 and "held out" in printed
    assert report["geometry"]["crop"] == 32


def test_two_processes_agree_with_one(tmp_path):
    flags = ["--data_path", "shapes:8x16", *SMALL, "--steps", "3", "--baselines", "--lr", "0.01", "0.1"]
    done = launch("eval_semantic.py", *flags, "--output_dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert run("shapes:8x16", tmp_path / "one", *flags[2:]) == 0
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    for a, b in zip(one["settings"], two["settings"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    for a, b in zip(one["results"], two["results"], strict=True):  # a pixel at a boundary may change its class
        assert a["features"] == b["features"] and a["miou"]["value"] == pytest.approx(b["miou"]["value"], abs=1)


@pytest.mark.parametrize("flags, words", [
    (("--data_path", "nowhere"), ("--data_path 'nowhere'", "images/ and masks/")),
    (("--data_path", "shapes:x"), ("--data_path 'shapes:x'", "shapes:COUNT")),
    (("--pretrained_weights", "nothing.pth"), ("nothing.pth", "no such file")),
    (("--arch", "resnet18"), ("--arch resnet18", "Vision Transformer")),
    (("--n_last_blocks", "9"), ("--n_last_blocks 9", "4 blocks", "lower")),
    (("--crop_size", "4"), ("--crop_size 4", "patch of 8", "raise")),
    (("--stride", "40"), ("--stride 40", "windows of 16", "lower")),
    (("--scale", "2", "1"), ("--scale 2 1", "smaller value first")),
    (("--warmup_steps", "9"), ("--warmup_steps 9", "--steps 2", "lower")),
    (("--lr", "0.1", "1", "--val_share", "0"), ("--val_share 0", "raise")),
    (("--output_dir", __file__), ("is a file",)),
])
def test_bad_input_is_refused_in_one_line(flags, words, tmp_path, capsys):
    assert run("shapes:4x16", tmp_path / "out", "--steps", "2", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("eval_semantic.py: error: "), error
    assert all(word in error for word in words) and not (tmp_path / "out").exists()


def test_a_broken_image_is_named_even_by_a_worker(tmp_path, capsys):
    data = coloured_folder(tmp_path / "data", 2)
    path = data / "train" / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:-60])
    for workers in (0, 1):
        assert run(data, tmp_path / "out", "--steps", "2", "--num_workers", workers) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(path) in error and "Traceback" not in error and "repair" in error


def test_test_images_are_read_before_the_training(tmp_path, capsys):
    """Those of VOC 2012, whose masks are not read to count the classes."""
    for name in ("a", "b"):
        for folder, values in (("JPEGImages", np.zeros((16, 16, 3))), ("SegmentationClass", np.ones((16, 16)))):
            (tmp_path / "VOC2012" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / "VOC2012" / folder / f"{name}.png")
    lists = tmp_path / "VOC2012" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\n")
    Image.new("L", (16, 16), 200).save(tmp_path / "VOC2012" / "SegmentationClass" / "b.png")
    assert run(tmp_path / "VOC2012", tmp_path / "out", "--steps", "2") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "b.png: value 200" in error and "repair or remove" in error
    assert not (tmp_path / "out").exists()

    (lists / "val.txt").write_text("a\n")  # a folder that is sound itself, tested on one that is not
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "VOC2012", tmp_path / "other" / "VOC2012")
    (tmp_path / "other" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt").write_text("b\n")
    assert run(tmp_path / "VOC2012", tmp_path / "out", "--steps", "2", "--val_data_path",
               tmp_path / "other" / "VOC2012") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--val_data_path" in error and "b.png: value 200" in error


def test_a_rate_that_diverges_is_named(tmp_path, capsys):
    assert run("shapes:4x16", tmp_path / "out", "--steps", "10", "--lr", "1e30") == 2
    assert "--lr 1e+30: the loss is no longer finite; lower it" in capsys.readouterr().err


def test_a_sweep_goes_on_without_what_diverges(tmp_path, capsys, monkeypatch):
    """A rate, and a baseline with every rate; classes are predicted with weights that are not finite too."""
    def layer(width, *args):
        layer = linear_layer(width, *args)
        layer[-1].weight.data *= float("nan") if width == 3 * 4 * 4 else 1  # raw pixels
        return layer

    monkeypatch.setattr(semantic, "linear_layer", layer)
    flags = ("--patch_size", "4", "--steps", "6", "--lr", "1e30", "0.01", "--val_share", "0.5", "--baselines")
    assert run("shapes:4x16", tmp_path / "out", *flags) == 0
    report, printed = read(tmp_path / "out"), capsys.readouterr().out
    assert "3 of 4 not finite" in printed and "nan" not in printed
    settings = report["settings"]
    assert [(row["features"], row["lr"], row["held-out mIoU"] is None, row["chosen"]) for row in settings] == [
        ("untrained", 1e30, True, ""), ("untrained", 0.01, False, "*"), ("raw pixels", 1e30, True, ""),
        ("raw pixels", 0.01, True, "")]
    assert [row["features"] for row in report["results"]] == ["untrained", "k-means"]
    assert any("raw pixels" in note and "--lr" in note for note in report["notes"])


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*args):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(tokens, "upsample", broken)
    with pytest.raises(ValueError, match="could not be broadcast"):
        run("shapes:4x16", tmp_path / "out", "--steps", "2")


def test_presets():
    def parse(name):
        return script.get_args_parser().parse_args([f"@{ROOT}/presets/{name}.txt"])

    args = parse("semantic_dinov3")
    assert (args.steps, args.batch_size, args.lr, args.weight_decay, args.warmup_steps, args.window_size, args.stride,
            args.n_last_blocks) == (40000, 16, [1e-3], 1e-3, 1500, 512, 341, [1])
    args = parse("semantic_dinov2_ms")
    assert (args.n_last_blocks, args.crop_size, args.test_scales, args.test_flip) == (
        [4], 640, [1, 1.32, 1.73, 2.28, 3], True)


def test_a_stopped_run_resumes_where_it_was(tmp_path, monkeypatch, capsys):
    """Dropout included; the trained layer is kept, the unfinished state is not."""
    flags = ("shapes:20x64", "--steps", "6", "--dropout", "0.5", "--lr", "0.01", "0.1", "--save_pictures", "0")
    assert run(flags[0], tmp_path / "whole", *flags[1:]) == 0
    say = parallel.say

    def stopping(line):
        if line.startswith("step 4/"):
            raise KeyboardInterrupt
        say(line)

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "say", stopping)
        assert run(flags[0], tmp_path / "parts", *flags[1:]) == 130
    kept = [path.name for path in (tmp_path / "parts").iterdir()]
    assert kept == ["checkpoint_semantic.pth"] and not (tmp_path / "whole" / kept[0]).exists()
    assert run(flags[0], tmp_path / "parts", *flags[1:-3], "0.2", "--save_pictures", "0") == 2
    assert "--output_dir" in (said := capsys.readouterr().err) and "settings" in said
    for name, values in (("mean", "0.4 0.4 0.4"), ("std", "0.3 0.3 0.3"), ("value_range", "0 4095")):
        assert run(flags[0], tmp_path / "parts", *flags[1:], f"--{name}", *values.split()) == 2
        assert f"(different {name})" in capsys.readouterr().err
    old = torch.load(tmp_path / "parts" / kept[0], weights_only=True)
    del old["run"]["mean"], old["run"]["std"], old["run"]["value_range"]  # as older versions wrote it
    torch.save(old, tmp_path / "parts" / kept[0])
    assert run(flags[0], tmp_path / "parts", *flags[1:]) == 0
    assert "resuming after step 3" in capsys.readouterr().out
    one, two = (torch.load(tmp_path / name / "semantic.pth", weights_only=True) for name in ("whole", "parts"))
    assert one["classes"] == two["classes"] and one["setting"] == two["setting"]
    assert all(torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items())
    assert read(tmp_path / "whole")["results"] == read(tmp_path / "parts")["results"]
    assert not (tmp_path / "parts" / "checkpoint_semantic.pth").exists()
