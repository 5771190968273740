"""eval_depth.py from end to end: folders, drawn scenes, two processes, presets, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import launch

import eval_depth as script
import parallel
from protocols import transforms
from vision_transformer import vit_nano

SMALL = ["--arch", "vit_nano", "--patch_size", "8", "--num_workers", "0", "--device", "cpu", "--batch_size", "4"]


def run(data, out, *flags):
    flags = ["--data_path", data, "--output_dir", out, *SMALL, *flags]
    return script.main(script.get_args_parser().parse_args([str(flag) for flag in flags]))


def read(out):
    return json.loads((out / "eval_depth.json").read_text())


def grey_folder(root, n=12):
    """The darker a block, the farther it is: 1 to 5 m, in millimetres, with a border of no depth; two shapes."""
    for part in ("train", "val"):
        for i in range(n):
            rng = np.random.default_rng((i, part == "val"))
            height, width = (32, 48) if i % 2 else (56, 40)
            metres = np.kron(rng.uniform(1, 5, (height // 8, width // 8)), np.ones((8, 8)))
            grey = np.repeat((255 - 50 * (metres - 1)).astype(np.uint8)[..., None], 3, -1)
            depth = (1000 * metres).astype(np.uint16)
            depth[:2] = 0
            for name, values in (("images", grey), ("depth", depth)):
                (root / part / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / part / name / f"{i}.png")
    return root


def test_a_folder_whose_grey_is_its_depth(tmp_path):
    """Raw pixels suffice, at the maps' own sizes, and are far better than the constants."""
    data = grey_folder(tmp_path / "data")
    flags = ("--arch", "pixels", "--steps", "100", "--lr", "0.03", "--crop_size", "32", "--test_flip", "--baselines",
             "--bins", "64")
    assert run(data, tmp_path / "out", *flags) == 0
    report = read(tmp_path / "out")
    pixels, mean, mean_map = report["results"]
    assert [row["features"] for row in report["results"]] == ["raw pixels", "mean depth", "mean map"]
    assert pixels["rmse"]["value"] < 0.75 * min(mean["rmse"]["value"], mean_map["rmse"]["value"])
    assert mean["rmse"]["value"] == pytest.approx(4 / 12**0.5, rel=0.1)  # of a uniform distribution over 4 m
    low, high = pixels["rmse"]["interval"]
    assert low < pixels["rmse"]["value"] < high and pixels["delta1"]["value"] > mean["delta1"]["value"]
    assert report["images"] == [12, 0, 12] and report["geometry"]["window"] == 0 and report["depth_scale"] == 1000
    assert 4.9 < report["max_depth"] < 5.02 and Image.open(tmp_path / "out" / "depth.png").width > 600


def test_a_sweep_with_baselines(tmp_path, capsys):
    torch.manual_seed(1)
    torch.save(vit_nano(8, img_size=32).state_dict(), tmp_path / "weights.pth")
    flags = ("--pretrained_weights", tmp_path / "weights.pth", "--steps", "3", "--lr", "0.01", "0.1", "--n_blocks",
             "1", "4", "--baselines", "--val_share", "0.25", "--gradient_weight", "0.5", "--bins", "16")
    assert run("scenes:16x32", tmp_path / "out", *flags) == 0
    report, printed = read(tmp_path / "out"), capsys.readouterr().out
    assert [row["features"] for row in report["results"]] == ["network", "untrained", "raw pixels", "mean depth",
                                                              "mean map"]
    assert len(report["settings"]) == 4 + 4 + 2 and sum(row["chosen"] == "*" for row in report["settings"]) == 3
    for name in ("network", "untrained", "raw pixels"):
        mine = [row for row in report["settings"] if row["features"] == name]
        best = min(mine, key=lambda row: row["held-out RMSE"]["value"])
        (tested,) = [row for row in report["results"] if row["features"] == name]
        assert best["chosen"] == "*" and (best["lr"], best["blocks"]) == (tested["lr"], tested["blocks"])
    assert report["images"] == [12, 4, 4] and "held out" in printed and "0.001 and 10 m" in printed


def test_two_processes_agree_with_one(tmp_path):
    flags = ["--data_path", "scenes:8x16", *SMALL, "--steps", "3", "--baselines", "--lr", "0.01", "0.1"]
    done = launch("eval_depth.py", *flags, "--output_dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert run("scenes:8x16", tmp_path / "one", *flags[2:]) == 0
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    for a, b in zip(one["settings"], two["settings"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
    for a, b in zip(one["results"], two["results"], strict=True):
        assert a["features"] == b["features"] and a["rmse"]["value"] == pytest.approx(b["rmse"]["value"], rel=1e-2)


@pytest.mark.parametrize("flags, words", [
    (("--data_path", "nowhere"), ("--data_path 'nowhere'", "images/ and depth/")),
    (("--data_path", "scenes:x"), ("--data_path 'scenes:x'", "scenes:COUNT")),
    (("--data_path", "shapes:8x16"), ("--data_path 'shapes:8x16'", "scenes")),
    (("--n_blocks", "9"), ("--n_blocks 9", "4 blocks", "lower")),
    (("--crop_size", "4"), ("--crop_size 4", "patch of 8", "raise")),
    (("--max_depth", "0.0005"), ("--max_depth 0.0005", "--min_depth 0.001", "raise")),
    (("--min_depth", "20"), ("--min_depth 20", "10 m", "lower")),
    (("--max_depth", "0.01"), ("scenes[", "--max_depth 0.01", "correct")),
    (("--eval_crop", "eigen_nyu"), ("--eval_crop eigen_nyu", "640 x 480", "16 x 16", "choose")),
    (("--lr", "0.1", "1", "--val_share", "0"), ("--val_share 0", "--n_blocks", "raise")),
    (("--warmup_steps", "9"), ("--warmup_steps 9", "--steps 2", "lower")),
    (("--output_dir", __file__), ("is a file",)),
])
def test_bad_input_is_refused_in_one_line(flags, words, tmp_path, capsys):
    assert run("scenes:4x16", tmp_path / "out", "--steps", "2", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("eval_depth.py: error: "), error
    assert all(word in error for word in words) and not (tmp_path / "out").exists()


def test_whole_images_of_too_many_patches_are_refused_before_any_work(tmp_path, capsys, monkeypatch):
    """A strip among the test images, and a window and a crop; a window makes the strip possible."""
    grey_folder(tmp_path / "data")
    for name, image in (("images", Image.new("RGB", (3200, 32))),
                        ("depth", Image.fromarray(np.full((32, 3200), 1000, np.uint16)))):
        image.save(tmp_path / "data" / "val" / name / "2.png")
    monkeypatch.setattr(transforms, "MAX_PATCHES", 800)
    flags = ("--steps", "1", "--save_pictures", "0")
    for more, words in (((), ("val/images/2.png", "400 x 4 patches", "--window_size")),
                        (("--crop_size", "320"), ("--crop_size 320",)),
                        (("--window_size", "320", "--crop_size", "16"), ("--window_size 320",))):
        assert run(tmp_path / "data", tmp_path / "out", *flags, *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
        assert not (tmp_path / "out").exists()
    assert run(tmp_path / "data", tmp_path / "out", *flags, "--window_size", "16", "--crop_size", "16") == 0


def test_a_broken_depth_map_is_named_even_by_a_worker(tmp_path, capsys):
    """The folder of NYU Depth v2, of which only the maps of the test are read before the training."""
    for part in ("sync", "official_splits/test"):
        for i in range(4):
            (tmp_path / "nyu" / part / "room").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16)).save(tmp_path / "nyu" / part / "room" / f"rgb_{i:05}.jpg")
            Image.fromarray(np.full((16, 16), 2000, np.uint16)).save(
                tmp_path / "nyu" / part / "room" / f"sync_depth_{i:05}.png")
    path = tmp_path / "nyu" / "sync" / "room" / "sync_depth_00002.png"
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(path)
    for workers in (0, 1):
        assert run(tmp_path / "nyu", tmp_path / "out", "--steps", "2", "--num_workers", workers) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(path) in error and "Traceback" not in error and "no depth" in error
    path = tmp_path / "nyu" / "official_splits" / "test" / "room" / "sync_depth_00003.png"
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(path)
    assert run(tmp_path / "nyu", tmp_path / "before", "--steps", "2") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error and "remove the image" in error
    assert not (tmp_path / "before").exists()


def test_images_without_depth_in_the_crop_are_counted(tmp_path, capsys):
    grey_folder(tmp_path / "data", 3)
    for i in range(3):
        path = tmp_path / "data" / "val" / "depth" / f"{i}.png"
        depth = np.array(Image.open(path))
        depth[13:] = 0  # above Garg's crop
        if i < 2:
            Image.fromarray(depth).save(path)
    flags = ("--steps", "1", "--save_pictures", "1", "--eval_crop", "garg")
    assert run(tmp_path / "data", tmp_path / "out", *flags) == 0
    report, printed = read(tmp_path / "out"), capsys.readouterr().out
    (note,) = [note for note in report["notes"] if "garg" in note]
    assert "2 of 3 test images" in note and note in printed and "means over 1 test images" in printed
    assert report["images"] == [3, 0, 3] and report["judged_images"] == 1
    Image.fromarray(depth).save(path)
    assert run(tmp_path / "data", tmp_path / "none", *flags) == 2
    error = capsys.readouterr().err
    assert "--eval_crop garg" in error and "choose" in error and not (tmp_path / "none").exists()


def test_a_rate_that_diverges_is_named(tmp_path, capsys):
    assert run("scenes:4x16", tmp_path / "out", "--steps", "10", "--lr", "1e30", "--batch_norm", "false") == 2
    assert "--lr 1e+30: the loss is no longer finite; lower it" in capsys.readouterr().err


def test_a_sweep_goes_on_without_a_rate_that_diverges(tmp_path, capsys):
    flags = ("--steps", "6", "--lr", "1e30", "0.01", "--val_share", "0.5", "--save_pictures", "0")
    assert run("scenes:4x16", tmp_path / "out", *flags) == 0
    report, printed = read(tmp_path / "out"), capsys.readouterr().out
    assert "1 of 2 not finite" in printed and "nan" not in printed
    assert [(row["train_loss"] is None, row["held-out RMSE"] is None, row["chosen"])
            for row in report["settings"]] == [(True, True, ""), (False, False, "*")]
    assert report["results"][0]["lr"] == 0.01


def test_presets():
    def parse(name):
        return script.get_args_parser().parse_args([f"@{ROOT}/presets/{name}.txt"])

    args = parse("depth_nyu")
    assert (args.steps, args.batch_size, args.lr, args.weight_decay, args.warmup_steps, args.n_blocks, args.batch_norm,
            args.bins, args.eval_crop, args.test_flip) == (
        38400, 16, [1e-4], 0.01, 12800, [4], False, 256, "eigen_nyu", True)
    assert (parse("depth_kitti").eval_crop, parse("depth_kitti").steps) == ("garg", 38400)


def test_a_stopped_run_resumes_where_it_was(tmp_path, monkeypatch, capsys):
    """The trained layer is kept, the unfinished state is not, and other depths are another run."""
    flags = ("scenes:20x32", "--steps", "6", "--bins", "8", "--lr", "0.01", "0.1", "--save_pictures", "0")
    assert run(flags[0], tmp_path / "whole", *flags[1:]) == 0
    say = parallel.say

    def stopping(line):
        if line.startswith("step 4/"):
            raise KeyboardInterrupt
        say(line)

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "say", stopping)
        assert run(flags[0], tmp_path / "parts", *flags[1:]) == 130
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoint_depth.pth"]
    assert run(flags[0], tmp_path / "parts", *flags[1:], "--max_depth", "9") == 2
    assert "--output_dir" in (said := capsys.readouterr().err) and "max_depth" in said
    assert run(flags[0], tmp_path / "parts", *flags[1:]) == 0
    assert "resuming after step 3" in capsys.readouterr().out
    one, two = (torch.load(tmp_path / name / "depth.pth", weights_only=True) for name in ("whole", "parts"))
    assert one["setting"] == two["setting"] and (one["options"]["bins"], one["limits"][2]) == (8, 10)
    assert all(torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items())
    assert read(tmp_path / "whole")["results"] == read(tmp_path / "parts")["results"]
    assert not (tmp_path / "parts" / "checkpoint_depth.pth").exists()
