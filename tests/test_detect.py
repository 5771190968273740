"""detect.py from end to end: training, a fresh process, names, videos, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import ENV, launch

import detect as script
from detection import coco, drawing, files, inference, networks, prompts
from imagesets import scenes

TEXT = "red fish . blue cup ."
QUICK = ("--device", "cpu", "--num_workers", "0")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def run(*flags) -> int:
    return script.main(script.get_args_parser().parse_args([*QUICK, *map(str, flags)]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps, with an evaluation and a held-back prompt."""
    folder = tmp_path_factory.mktemp("run")
    assert run("--model", "tiny", "--image_size", 48, "--train", "scenes:8x48", "--eval", "scenes:4x48", "--steps", 3,
               "--batch_size", 2, "--lr", "1e-3", "--phrases", 6, "--held_back", TEXT, "--threshold", "0.001",
               "--output_dir", folder) == 0
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, size in enumerate((48, 64, 80)):
        Image.fromarray(scenes.draw(i, size).image[: size - 8 * i]).save(folder / f"{i}.png")
    return folder


def test_a_run_leaves_a_network_and_a_report(trained):
    report = json.loads((trained / "detect.json").read_text())
    assert report["results"]["all"]["categories"] >= report["results"]["trained"]["categories"] > 0
    assert 0 <= report["held_back"]["AP50"] <= 100
    phrases = json.loads((trained / "network" / networks.TRAINED).read_text())
    assert phrases == sorted(coco.open_objects("scenes:8x48", "", "--train").phrases)
    before = (trained / "network" / "model.safetensors").stat().st_mtime_ns
    assert not [path for path in trained.iterdir() if path.name.startswith(".network") or path.suffix == ".tmp"]
    assert before and (trained / "checkpoint.pth").exists()


def test_a_fresh_process_detects_with_from_pretrained(trained, images, tmp_path):
    done = launch("detect.py", "--model", trained / "network", "--images", images, "--text", TEXT, "--threshold", 0,
                  "--text_threshold", 0, "--batch_size", 2, "--output_dir", tmp_path, *QUICK)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "detections_images.json").read_text())
    results = json.loads((tmp_path / "detections.json").read_text())
    assert [row["name"] for row in about["categories"]] == ["red fish", "blue cup"] and len(about["images"]) == 3
    assert {row["image_id"] for row in results} == {1, 2, 3} and len(results) == 3 * 16  # queries
    assert results[0].keys() == {"image_id", "category_id", "bbox", "score"}
    for i in range(3):
        assert max(Image.open(tmp_path / f"{i}.png").size) >= 480

    # The library alone, on the first image.
    import transformers

    model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(trained / "network")
    processor = transformers.AutoProcessor.from_pretrained(trained / "network")
    image = Image.open(images / "0.png")
    inputs = processor(images=image, text=TEXT, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    theirs = processor.post_process_grounded_object_detection(
        out, inputs["input_ids"], threshold=0, text_threshold=0, target_sizes=[image.size[::-1]])[0]
    ours = [row for row in results if row["image_id"] == 1]
    scores = torch.tensor([row["score"] for row in ours])
    # Their score is the best of all tokens, [CLS] and periods too; ours of the phrases' tokens.
    assert (scores <= theirs["scores"].sort(descending=True).values + 1e-5).all()
    corners = torch.tensor([row["bbox"] for row in ours])
    corners = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
    nearest = torch.cdist(corners, theirs["boxes"]).amin(1)
    assert nearest.max() < 1e-2


def test_a_box_has_the_phrase_of_its_best_token(trained):
    detector = networks.load(str(trained / "network"), torch.device("cpu"))
    prompt = prompts.encode(["red fish", "cup"], detector.processor.tokenizer)  # [CLS] red fish . cup . [SEP]
    probs = torch.tensor([[0.9, 0.2, 0.6, 0.9, 0.1, 0.9, 0.9], [0.9, 0.1, 0.2, 0.9, 0.7, 0.9, 0.9],
                          [0.9, 0.1, 0.1, 0.9, 0.2, 0.9, 0.9]])
    boxes = torch.arange(12.0).reshape(3, 4)
    found = inference.most_probable(detector, probs, boxes, [5, 8], prompt, 0.5, 0.3)
    assert found.classes.tolist() == [8, 5] and found.words == ["cup", "fish"]
    assert found.scores.tolist() == pytest.approx([0.7, 0.6]) and torch.equal(found.boxes, boxes[[1, 0]])


def test_more_phrases_than_a_prompt_holds(trained, images):
    detector = networks.load(str(trained / "network"), torch.device("cpu"))
    phrases = coco.open_objects("scenes:1x48", "", "--eval").phrases
    chunks = inference.chunks(detector, phrases)
    assert [len(group) for group, _ in chunks] == [84, 16]
    image = torch.from_numpy(np.array(Image.open(images / "0.png"))).permute(2, 0, 1)
    both = inference.rank(detector, [image], phrases, 10**6)[0]
    alone = inference.rank(detector, [image], phrases[84:], 10**6)[0]
    last = both.classes >= 84
    assert torch.equal(both.scores[last], alone.scores) and torch.equal(both.classes[last] - 84, alone.classes)
    assert len(inference.rank(detector, [image], phrases, 100)[0].scores) == 100


def test_frames_of_a_video(trained, images, tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    writer = imageio_ffmpeg.write_frames(str(tmp_path / "film.mp4"), (64, 48), fps=5, macro_block_size=2)
    writer.send(None)
    for i in range(3):
        writer.send(np.full((48, 64, 3), 60 * i, np.uint8))
    writer.close()
    assert run("--model", trained / "network", "--images", tmp_path / "film.mp4", images / "0.png", "scenes:1x48",
               "--text", TEXT, "--threshold", 0, "--output_dir", tmp_path / "out") == 0
    about = json.loads((tmp_path / "out" / "detections_images.json").read_text())
    names = [row["file_name"].rpartition("/")[2] for row in about["images"]]
    assert names == ["film.mp4#frame-0000", "film.mp4#frame-0001", "film.mp4#frame-0002", "0.png", "scene0000"]
    frames = list(files.open_items([str(tmp_path / "out" / "film.mp4")]))
    assert len(frames) == 3 and max(frames[0].image.shape) >= 480
    assert (tmp_path / "out" / "0.png").exists() and (tmp_path / "out" / "scene0000.png").exists()


def test_boxes_and_labels_are_drawn():
    figure = drawing.draw_boxes(np.zeros((60, 60, 3), np.uint8), [[10, 20, 40, 50], [10, 21, 40, 50]], [0, 1],
                                ["red fish 0.90", "blue cup 0.80"])
    assert figure.shape == (480, 480, 3)
    for k in (0, 1):
        shade = (figure == drawing.colour(k)).all(-1)
        assert shade.sum() > 1000  # a frame and the field of a label
    fields = []
    for _ in range(3):
        fields.append(drawing.place((0, 0, 90, 12), 80, 160, (480, 480), fields))
    for i, a in enumerate(fields):
        assert not any(a[1] < b[3] and b[1] < a[3] for b in fields[:i])
    assert drawing.place((0, 0, 90, 12), 470, 2, (480, 480), [])[0] == 480 - 98


# ---- Names ----


def test_a_name_is_taken_from_the_librarys_cache_and_says_so(trained, images, tmp_path):
    cached = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(trained / "network", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    command = [sys.executable, str(ROOT / "detect.py"), "--model", "somebody/tiny", "--images", str(images / "0.png"),
               "--text", TEXT, "--output_dir", str(tmp_path / "out"), *QUICK]
    done = subprocess.run(command, env=ENV | OFFLINE | {"HF_HOME": str(tmp_path)}, capture_output=True, text=True,
                          cwd=tmp_path, timeout=600)
    assert done.returncode == 0 and "--model somebody/tiny: not a folder" in done.stdout, done.stderr


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch, capsys, images):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert run("--model", "nobody/nothing", "--images", images, "--text", TEXT, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "hf download nobody/nothing --local-dir FOLDER" in error, error
    assert not (tmp_path / "out").exists()


def test_the_other_scripts_import_nothing_of_it():
    others = [path.stem for path in ROOT.glob("*.py") if path.stem not in ("detect", "hubconf")]
    code = f"import sys, {', '.join(sorted(others))}\n" \
           "print([m for m in ('transformers', 'faster_coco_eval', 'detection') if m in sys.modules])\n" \
           "import detect\nprint([m for m in ('transformers', 'faster_coco_eval') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stdout + done.stderr


# ---- Bad input ----

DETECT = ("--model", "{network}", "--images", "{images}", "--text", TEXT)
TRAIN = ("--model", "tiny", "--train", "scenes:8x48")


@pytest.mark.parametrize("flags, words", [
    ((), ("--images", "nothing to do", "--train")),
    (("--images", "{images}"), ("--model", "none given", "huggingface.co")),
    ((*DETECT, "--text", ""), ("--text ''", "no phrase")),
    ((*DETECT, "--text", "red fish"), ("--text 'red fish'", "no separator")),
    ((*DETECT, "--text", "zebra ."), ("--text", "'zebra'", "vocabulary")),
    ((*DETECT, "--images", "nowhere"), ("--images", "nowhere", "give")),
    ((*DETECT, "--images", "nowhere.mp4"), ("--images nowhere.mp4", "no such")),
    ((*DETECT, "--threshold", "1.5"), ("--threshold", "1.5", "at most 1")),
    ((*DETECT, "--output_dir", "{images}/0.png"), ("--output_dir", "is a file")),
    ((*DETECT, "--model", "{images}"), ("--model", "config.json")),
    ((*DETECT, "--model", "{images}/gone"), ("--model", "no such folder", "OWNER/NAME")),
    ((*DETECT, "--model", "{other}"), ("--model", "bert", "grounding-dino")),
    ((*DETECT, "--model", "{part}"), ("--model", "model.level_embed", "belongs")),
    ((*DETECT, "--device", "tpu"), ("--device tpu", "cpu")),
    ((*DETECT, "--train", "scenes:8x48"), ("--images", "--train_images")),
    (("--model", "tiny", "--images", "{images}", "--text", TEXT), ("--model tiny", "--train")),
    ((*TRAIN, "--held_back", TEXT), ("--held_back", "--eval")),
    ((*TRAIN, "--warmup_steps", "2000"), ("--warmup_steps 2000", "--steps 1000", "lower")),
    ((*TRAIN, "--eval", "scenes:8x48", "--held_back", "zebra ."), ("--held_back", "zebra", "vocabulary")),
    (("--model", "tiny", "--train", "scenes:x"), ("--train scenes:x", "scenes:COUNT")),
    (("--model", "tiny", "--train", "gone.json"), ("--train gone.json", "No such file")),
    (("--model", "{network}", "--eval", "{images}/0.png"), ("--eval", "not JSON")),
])
def test_bad_input_is_refused_in_one_line(flags, words, trained, images, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other, part = tmp_path / "other", tmp_path / "part"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    if "{part}" in flags:
        shutil.copytree(trained / "network", part)
        from safetensors.torch import load_file, save_file

        state = load_file(part / "model.safetensors")
        del state["model.level_embed"]
        save_file(state, part / "model.safetensors", {"format": "pt"})
    names = {"{network}": trained / "network", "{images}": images, "{other}": other, "{part}": part}
    for name, path in names.items():
        flags = [flag.replace(name, str(path)) for flag in flags]
    try:
        code = run("--output_dir", tmp_path / "out", *flags)
    except SystemExit as error:
        code = error.code
    error = capfd.readouterr().err
    assert code == 2 and error.count("\n") == 1 and ": error: " in error, error
    assert all(word in error for word in words) and not (tmp_path / "out").exists(), error


def test_packages_that_are_missing_are_named(trained, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert run("--model", trained / "network", "--eval", "scenes:4x48", "--output_dir", tmp_path / "out") == 2
    assert "pip install faster-coco-eval" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("--model", trained / "network", "--images", images, "--text", TEXT, "--output_dir",
               tmp_path / "out") == 2
    assert "pip install 'transformers>=4.55'" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow  # a quarter of an hour on an idle core
def test_the_preset_learns_to_detect(tmp_path):
    done = launch("detect.py", f"@{ROOT}/presets/detect_scenes.txt", "--output_dir", tmp_path, timeout=3 * 3600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "detect.json").read_text())["results"]
    assert results["all"]["AP50"] >= 50 and results["not trained"]["categories"] > 10
    assert os.path.getsize(tmp_path / "network" / "model.safetensors") < 10e6
