"""Embeddings in files: each format read back by its own package, stopped runs, and bad input."""

import json
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from processes import launch

import extract_features
from imagesets import shapes
from imagesets.sources import open_images
from parallel import Refused
from protocols import embeddings, extraction, features, transforms
from weights import backbones


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(11):
        Image.fromarray(shapes.draw(i, 40)[0]).save(folder / f"{i:02d} é.png")
    return folder


NETWORK = ("--arch", "vit_nano", "--patch_size", 8, "--crop_size", 32, "--num_workers", 0, "--device", "cpu",
           "--batch_size_per_gpu", 2, "--images_per_part", 4)


def run(*args):
    return extract_features.main(extract_features.get_args_parser().parse_args([*map(str, args)]))


def expected_tokens(folder, tokens):
    """Picture by picture, from the network itself."""
    torch.manual_seed(0)
    model, info = backbones.load_backbone("", "vit_nano", 8)
    images = transforms.EvalImages(open_images(folder), 37, 32, info["mean"], info["std"])
    with torch.no_grad():
        found = [model.get_intermediate_layers(images[i][0][None], 1)[0][0] for i in range(len(images))]
    return torch.stack(found)[:, {"cls": slice(0, 1), "patch": slice(1, None), "both": slice(None)}[tokens]].numpy()


def read_alone(path):
    """The file by the format's own package, not by the project's code: features and names."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        rows = parquet.read_table(path).to_pylist()
        return np.array([row["features"] for row in rows]), [row["name"] for row in rows]
    names = json.loads((path.parent / (path.name + ".json")).read_text())["names"]
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r"), names
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return file.get_tensor("features"), names


@pytest.mark.parametrize("tokens", ["cls", "patch", "both"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
@pytest.mark.parametrize("half", [False, True])
def test_formats(photos, tmp_path, suffix, tokens, half):
    output = tmp_path / "out" / f"photos{suffix}"
    more = ("--half",) if half else ()
    assert run("--data_path", photos, "--output", output, "--tokens", tokens, *more, *NETWORK) == 0
    expected = expected_tokens(photos, tokens)
    expected = expected[:, 0] if tokens == "cls" else expected
    found, names = read_alone(output)
    assert names == [str(photos / f"{i:02d} é.png") for i in range(11)]
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if half else {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(found.reshape(expected.shape), expected, **tolerance)
    array, again, about = embeddings.read(output)
    assert array.shape == expected.shape and array.dtype == (np.float16 if half else np.float32) and again == names
    np.testing.assert_array_equal(array, np.asarray(found).reshape(array.shape))
    assert about["tokens"] == tokens and about["shape"] == list(expected.shape) and len(about["weights_sha256"]) == 64
    left = {p.name for p in output.parent.glob("[!.]*")}
    assert left == {output.name} | (set() if suffix == ".parquet" else {output.name + ".json"})


KILLED = """
import os, signal, sys
import numpy as np
import extract_features
saved = []
save = np.save
def save_or_die(file, array):
    if len(saved) == 2:
        file.write(b"half a part")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    saved.append(file)
    save(file, array)
np.save = save_or_die
extract_features.main(extract_features.get_args_parser().parse_args(sys.argv[1:]))
"""


def test_a_killed_run_goes_on(photos, tmp_path, tmp_path_factory, capsys, monkeypatch):
    output = tmp_path / "photos.npy"
    command = ["--data_path", str(photos), "--output", str(output), *map(str, NETWORK)]
    script = tmp_path_factory.mktemp("script") / "killed.py"
    script.write_text(KILLED)
    killed = launch(script, *command)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    parts = tmp_path / "photos.npy.parts"
    left = sorted(p.name for p in parts.iterdir())
    assert re.fullmatch(r"\.000002\.npy\.\d+\.tmp", left[0])
    assert left[1:] == ["000000.npy", "000001.npy", "fingerprint.json"]
    assert not output.exists()
    kept = [os.stat(parts / name).st_mtime_ns for name in ("000000.npy", "000001.npy")]

    for changed in (("--half",), ("--crop_size", 24), ("--seed", 1), ("--images_per_part", 5), ("--tokens", "both")):
        assert run(*command, *changed) == 2  # the last of a flag's values counts
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "was begun with something else" in error and "give another --output" in error
    assert kept == [os.stat(parts / name).st_mtime_ns for name in ("000000.npy", "000001.npy")]

    asked = []
    compute = extraction.compute_part
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "compute_part", lambda job, n, *a: asked.append(n) or compute(job, n, *a))
        assert run(*command) == 0
    assert asked == [2] and "resuming: 1 of 3 parts" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["photos.npy", "photos.npy.json"]
    assert run(*command[:2], "--output", tmp_path / "whole.npy", *NETWORK) == 0
    np.testing.assert_array_equal(np.load(output), np.load(tmp_path / "whole.npy"))


def test_a_finished_file(photos, tmp_path, capsys, monkeypatch):
    output = tmp_path / "photos.safetensors"
    where = ("--data_path", photos, "--output", output)
    assert run(*where, *NETWORK) == 0
    monkeypatch.setattr("protocols.features.extract_features", None)
    (tmp_path / "photos.safetensors.parts").mkdir()  # a kill while the parts were removed
    assert run(*where, *NETWORK, "--images_per_part", 3) == 0 and "nothing to do" in capsys.readouterr().out
    assert not (tmp_path / "photos.safetensors.parts").exists()
    before = output.read_bytes()
    for other in (("--half",), ("--seed", 3), ("--data_path", "shapes:11x40")):
        assert run(*where, *NETWORK, *other) == 2
        assert "the existing file holds something else" in capsys.readouterr().err
    (tmp_path / "mine.npy").write_bytes(b"something of the user's")
    assert run("--data_path", photos, "--output", tmp_path / "mine.npy", *NETWORK) == 2
    assert output.read_bytes() == before and (tmp_path / "mine.npy").read_bytes() == b"something of the user's"


def test_images_that_change_between_runs_are_noticed(tmp_path, capsys):
    for i in range(3):
        Image.fromarray(shapes.draw(i, 40)[0]).save(tmp_path / f"{i}.png")
    where = ("--data_path", tmp_path, "--output", tmp_path / "o.npy", *NETWORK)
    assert run(*where) == 0
    Image.fromarray(shapes.draw(9, 40)[0]).save(tmp_path / "3.png")
    assert run(*where) == 2 and "different images" in capsys.readouterr().err


def test_pixels_and_other_networks(photos, tmp_path):
    more = ("--num_workers", 0, "--device", "cpu", "--crop_size", 32)
    assert run("--data_path", photos, "--output", tmp_path / "p.npy", "--arch", "pixels", *more) == 0
    expected = features.pixel_features(open_images(photos)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), expected, atol=1e-6)
    assert run("--data_path", photos, "--output", tmp_path / "r.npy", "--arch", "resnet18", *more) == 0
    assert np.load(tmp_path / "r.npy").shape == (11, 512)


def test_patch_tokens_of_a_network_of_timm(photos, tmp_path, capsys):
    timm = pytest.importorskip("timm")
    more = ("--arch", "test_vit", "--num_workers", 0, "--device", "cpu", "--data_path", photos)
    found = {}
    for tokens in ("cls", "both", "patch"):
        assert run(*more, "--crop_size", 48, "--tokens", tokens, "--output", tmp_path / f"{tokens}.npy") == 0
        found[tokens] = np.load(tmp_path / f"{tokens}.npy")
    assert found["patch"].shape == (11, 9, 64) and embeddings.about_of(tmp_path / "patch.npy")["patch_size"] == 16
    np.testing.assert_allclose(found["both"], np.concatenate([found["cls"][:, None], found["patch"]], 1), atol=1e-5)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", dynamic_img_size=True, num_classes=0).eval()
    dataset = transforms.EvalImages(open_images(photos), 55, 48, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = model.forward_features(torch.stack([dataset[i][0] for i in range(11)]))
    np.testing.assert_allclose(found["both"], expected, atol=1e-5)
    # as in this project's networks, incomplete patches are ignored
    assert run(*more, "--crop_size", 50, "--tokens", "patch", "--output", tmp_path / "cut.npy") == 0
    assert np.load(tmp_path / "cut.npy").shape == (11, 9, 64)
    without = ("--arch", "test_convnext", "--crop_size", 32, "--tokens", "both", "--output", tmp_path / "no.npy")
    assert run(*more, *without) == 2
    error = capsys.readouterr().err
    assert "--tokens both: " in error and "test_convnext; give --tokens patch" in error and error.count("\n") == 1
    network = features.load_network("", "test_vit", crop_size=48)
    one_size = timm.create_model("beit_base_patch16_224", embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(Refused, match="--crop_size 48: .*give another"):
        extraction.token_forward(network._replace(forward=one_size), "patch")


def test_one_picture(tmp_path):
    assert run("--data_path", "shapes:1x40", "--output", tmp_path / "one.npy", *NETWORK) == 0
    assert np.load(tmp_path / "one.npy").shape == (1, 192)


@pytest.mark.parametrize("args, message", [
    (("--data_path", "nowhere", "--output", "x.npy"), "--data_path 'nowhere'"),
    (("--data_path", "shapes:4x40", "--output", "x.csv"), "--output x.csv: the file's name has to end in .npy"),
    (("--data_path", "shapes:4x40", "--output", "x.npy", "--pretrained_weights", "no.pth"), "no.pth: no such file"),
    (("--data_path", "shapes:4x40", "--output", "/dev/null/x.npy"), "--output /dev/null/x.npy: /dev/null is a file"),
    (("--data_path", "shapes:4x40", "--output", "x.npy", "--arch", "resnet18", "--tokens", "patch"), "--tokens patch"),
])
def test_bad_input_is_refused_in_one_line(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*args, "--num_workers", 0) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("extract_features.py: error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_what_stands_in_the_way_is_named(tmp_path, capsys):
    (tmp_path / "a.npy").mkdir()
    (tmp_path / "b.npy.parts").touch()
    (tmp_path / "c.npy.parts").mkdir()
    (tmp_path / "c.npy.parts/fingerprint.json").write_text("not JSON")
    (tmp_path / "d.npy.parts").mkdir()
    (tmp_path / "d.npy.parts/fingerprint.json").write_text("[1]")
    for name, message in (("a.npy", "a.npy: a folder; give a file"), *(
            (f"{name}.npy", "not what a stopped run leaves; remove it") for name in "bcd")):
        assert run("--data_path", "shapes:4x40", "--output", tmp_path / name, *NETWORK) == 2
        error = capsys.readouterr().err
        assert f"--output {tmp_path / name}: " in error and message in error and error.count("\n") == 1


def test_a_broken_picture_is_named_and_the_parts_before_it_stay(photos, tmp_path, capsys, monkeypatch):
    (tmp_path / "photos").mkdir()
    for file in photos.iterdir():
        (tmp_path / "photos" / file.name).write_bytes(file.read_bytes())
    broken = tmp_path / "photos" / "05 é.png"
    broken.write_bytes(b"xx")
    where = ("--data_path", tmp_path / "photos", "--output", tmp_path / "p.npy", *NETWORK)
    assert run(*where) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{broken}: " in error and "repair or remove that file" in error
    kept = tmp_path / "p.npy.parts/000000.npy"
    assert kept.exists() and not (tmp_path / "p.npy").exists()
    computed, compute = [], extraction.compute_part
    monkeypatch.setattr(extraction, "compute_part", lambda job, n, *a: computed.append(n) or compute(job, n, *a))
    broken.unlink()  # the remedy that the message names
    assert run(*where) == 0 and computed == [1, 2]
    assert run("--data_path", tmp_path / "photos", "--output", tmp_path / "whole.npy", *NETWORK) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), np.load(tmp_path / "whole.npy"))
    assert json.loads((tmp_path / "p.npy.json").read_text())["names"] == [
        str(tmp_path / "photos" / f"{i:02d} é.png") for i in range(11) if i != 5]


def test_parts_of_other_images_are_not_removed(photos, tmp_path, capsys, monkeypatch):
    """The drawn images of two sizes have the same names."""
    def stop(*args):
        raise KeyboardInterrupt

    compute = extraction.compute_part
    monkeypatch.setattr(extraction, "compute_part", lambda job, n, *a: compute(job, n, *a) if n == 0 else stop())
    assert run("--data_path", "shapes:9x40", "--output", tmp_path / "p.npy", *NETWORK) != 0
    capsys.readouterr()
    for other in (photos, "shapes:9x48"):
        assert run("--data_path", other, "--output", tmp_path / "p.npy", *NETWORK) == 2
        error = capsys.readouterr().err
        assert "different images" in error and "remove it, or give another --output" in error
    assert (tmp_path / "p.npy.parts/000000.npy").exists()


def test_a_bug_is_not_mistaken_for_bad_input(photos, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(extraction, "extract_features", broken)
    with pytest.raises(ValueError, match="could not be broadcast") as raised:
        run("--data_path", photos, "--output", tmp_path / "x.npy", *NETWORK)
    assert raised.type is ValueError


def test_a_missing_package_is_named_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run("--data_path", "nowhere", "--output", tmp_path / "x.parquet") == 2
    assert "pip install pyarrow" in capsys.readouterr().err


TWICE = """
import sys
import extract_features
folder, *flags = sys.argv[1:]
for meeting, more, code in (("a", [], 0), ("b", ["--half"], 2)):
    more = [*more, "--dist_url", f"file://{folder}/{meeting}"]
    assert extract_features.main(extract_features.get_args_parser().parse_args([*flags, *more])) == code
"""


def test_two_processes_write_what_one_writes_and_refuse_together(photos, tmp_path):
    flags = ["--data_path", str(photos), *map(str, NETWORK), "--tokens", "both", "--output"]
    (tmp_path / "twice.py").write_text(TWICE)
    done = launch(tmp_path / "twice.py", tmp_path, *flags, tmp_path / "two.npy", processes=2)
    assert done.returncode == 0 and done.stderr.count("different half") == 2, done.stderr
    assert run(*flags, tmp_path / "one.npy") == 0
    np.testing.assert_allclose(np.load(tmp_path / "two.npy"), np.load(tmp_path / "one.npy"), rtol=1e-4, atol=1e-5)
