"""Copy detection: both layouts of the ground truth, the figures against loops, the script end to end."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from processes import launch
from test_retrieval import oracle_ap, oracle_micro, oracle_trapezoid

import eval_copy_detection
from imagesets import shapes
from imagesets.copies import read_copies
from parallel import Refused
from protocols import copies as copy_detection
from protocols import retrieval
from vision_transformer import build_backbone

EDITS = {
    "grey": lambda p: ImageOps.grayscale(p), "flip": lambda p: ImageOps.mirror(p),
    "crop": lambda p: p.crop((8, 4, 40, 44)),
}


@pytest.fixture
def copies(tmp_path):
    """Eight drawn images, six of which were copied in three ways, and two queries that are no copies."""
    folder = tmp_path / "copies"
    for name in ("database", "queries"):
        (folder / name).mkdir(parents=True)
    lines = ["query,match,attack"]
    for i in range(8):
        image = Image.fromarray(shapes.draw(i, 48)[0])
        image.save(folder / "database" / f"{i}.png")
        for name, edit in EDITS.items() if i < 6 else ():
            edit(image).save(folder / "queries" / f"{i}_{name}.png")
            lines.append(f"{i}_{name}.png,{i}.png,{name}")
    for i in range(2):
        Image.fromarray(shapes.draw(100 + i, 48)[0]).save(folder / "queries" / f"none_{i}.png")
        lines.append(f"none_{i}.png,,grey")
    lines.append("0_flip.png,7.png,flip")  # a second match
    (folder / "ground_truth.csv").write_text("\n".join(lines) + "\n\n")
    return folder


NETWORK = ("--arch", "vit_nano", "--patch_size", 8, "--image_size", 32, "--num_workers", 0, "--device", "cpu",
           "--batch_size_per_gpu", 5)


def run(*args):
    return eval_copy_detection.main(eval_copy_detection.get_args_parser().parse_args([*map(str, args)]))


def report(folder):
    return json.loads((folder / "eval_copy_detection.json").read_text())


# ---- Ground truth ----


def test_csv(copies):
    found = read_copies(str(copies))
    assert found.database == [f"database/{i}.png" for i in range(8)] and len(found.queries) == 20
    assert found.queries[:3] == ["queries/0_grey.png", "queries/0_flip.png", "queries/0_crop.png"]
    assert found.matches[:4] == [[0], [0, 7], [0], [1]] and found.matches[-2:] == [[], []]
    assert found.attacks[:3] == ["grey", "flip", "crop"] and found.attacks[-1] == "grey"


def test_copydays_layout(tmp_path):
    for name in ("original/200000.jpg", "original/200100.jpg", "strong/200001.jpg", "strong/200102.jpg",
                 "strong/209901.jpg", "jpeg/3/200000.jpg", "jpeg/75/200100.jpg", "crop/10/200000.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    found = read_copies(str(tmp_path))
    assert found.database == ["original/200000.jpg", "original/200100.jpg"] and not found.notes
    assert list(zip(found.queries, found.matches, found.attacks, strict=True)) == [
        ("strong/200001.jpg", [0], "strong"), ("strong/200102.jpg", [1], "strong"), ("strong/209901.jpg", [], "strong"),
        ("jpeg/3/200000.jpg", [0], "jpeg3"), ("jpeg/75/200100.jpg", [1], "jpeg75"),
        ("crop/10/200000.jpg", [0], "crop10")]
    Image.new("RGB", (9, 9)).save(tmp_path / "original/200001.jpg")
    with pytest.raises(Refused, match="begin with 2000"):
        read_copies(str(tmp_path))


def test_copydays_as_it_is_unpacked(tmp_path, capsys):
    """The folders of qualities and shares in jpegqual/ and crops/, as they come in the copies in circulation."""
    qualities, shares = (3, 5, 8, 10, 15, 20, 30, 50, 75), (10, 15, 20, 30, 40, 50, 60, 70, 80)
    for name in ("original/200000.png", "strong/200001.png", *(f"jpegqual/{q}/200000.png" for q in qualities),
                 *(f"crops/{share}/200000.png" for share in shares)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    found = read_copies(str(tmp_path))
    assert found.attacks == ["strong", *(f"jpeg{q}" for q in qualities), *(f"crop{share}" for share in shares)]
    assert found.matches == [[0]] * 19 and not found.notes
    assert all((tmp_path / query).is_file() for query in found.queries)
    (tmp_path / "crop").mkdir()
    with pytest.raises(Refused, match="both crop/ and crops/ .*; remove one"):
        read_copies(str(tmp_path))
    (tmp_path / "crop").rmdir()
    (tmp_path / "jpegqual").rename(tmp_path / "quality")
    assert run("--data_path", tmp_path, "--output_dir", tmp_path / "out", *NETWORK) == 0
    printed, about = capsys.readouterr().out, json.loads((tmp_path / "out" / "eval_copy_detection.json").read_text())
    assert len(about["notes"]) == 1 and "no jpeg queries" in about["notes"][0] and "jpegqual/" in about["notes"][0]
    assert about["notes"][0] in printed and about["images"] == [10, 1]


@pytest.mark.parametrize("text, message", [
    ("", "has to begin with the line query,match,attack"),
    ("a.png,0.png,grey\n", "has to begin with"),
    ("query,match,attack\n", "ground_truth.csv is empty"),
    ("query,match,attack\n0_grey.png,0.png\n", "'0_grey.png,0.png' is not query,match,attack"),
    ("query,match,attack\n0_grey.png,99.png,grey\n", "'99.png', the match of '0_grey.png', is not in database/"),
    ("query,match,attack\n0_grey.png,0.png,a\n0_grey.png,1.png,b\n", "two attacks"),
    ("query,match,attack\n0_grey.png,0.png,a\n0_grey.png,0.png,a\n", "'0.png' is a match of '0_grey.png' twice"),
    ("query,match,attack\nnothing.png,0.png,grey\n", "'nothing.png'; put them there"),
    ("query,match,attack\n0_grey.png,,grey\n", "none of its 1 queries has a match"),
])
def test_wrong_ground_truth_is_refused_in_one_line(copies, text, message, capsys, tmp_path):
    (copies / "ground_truth.csv").write_text(text)
    assert run("--data_path", copies, "--output_dir", tmp_path / "out", *NETWORK) == 2
    error = capsys.readouterr().err
    assert error.startswith("eval_copy_detection.py: error: --data_path")
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_other_bad_input(copies, capsys, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    Image.new("RGB", (9, 9)).save(one / "0.png")
    cases = [(("--data_path", tmp_path / "nowhere"), "neither ground_truth.csv nor original/"),
             (("--data_path", copies, "--distractors_path", "nowhere", *NETWORK), "--distractors_path 'nowhere'"),
             (("--data_path", copies, "--whitening_path", "nowhere", *NETWORK), "--whitening_path 'nowhere'"),
             (("--data_path", copies, *NETWORK, "--image_size", 4), "--image_size 4: smaller than a patch of 8"),
             (("--data_path", copies, *NETWORK, "--distractors_path", copies / "queries" / "0_flip.png"),
              "--distractors_path"),
             (("--data_path", copies, *NETWORK, "--whitening_path", one),
              f"--whitening_path {one}: one image gives no"),
             (("--data_path", copies, "--pretrained_weights", "no.pth"), "no.pth: no such file")]
    for args, message in cases:
        assert run(*args, "--output_dir", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


# ---- Figures ----


def oracle_20_nearest(scores, relevant):
    """Trapezoids as in `oracle_trapezoid`, of the matches among the 20 nearest, over the number of all matches."""
    nearest = sorted(range(len(scores)), key=lambda m: (-scores[m], m))[:20]
    share = len(relevant & set(nearest)) / len(relevant)
    return share * oracle_trapezoid(scores, relevant & set(nearest)) if share else 0.0


@pytest.mark.parametrize("arithmetic, oracle", [("own", oracle_ap), ("published", oracle_20_nearest)])
def test_figures_against_loops(arithmetic, oracle):
    rng = np.random.default_rng(0)
    matches = [[2], [], [0, 5, 30], [7], [1], []]
    attacks = ["blur", "blur", "text", "text", "blur", "none"]
    found = rng.standard_normal((6, 40))
    rows = copy_detection.measure(found, matches, attacks, arithmetic)
    assert [(r["attack"], r["queries"]) for r in rows] == [("all", 6), ("blur", 3), ("text", 2), ("none", 1)]
    for row in rows:
        some = [q for q in range(6) if row["attack"] in ("all", attacks[q])]
        relevant = np.array([[m in matches[q] for m in range(40)] for q in some])
        if not relevant.any():
            assert row["mAP"] is None and row["uAP"] is None
            continue
        expected = [oracle(found[q], set(matches[q])) for q in some if matches[q]]
        assert row["mAP"]["value"] == pytest.approx(100 * np.mean(expected))
        assert row["uAP"]["value"] == pytest.approx(100 * oracle_micro(found[some], relevant))
        assert row["uAP"]["interval"][0] <= row["uAP"]["value"] <= row["uAP"]["interval"][1]
    assert [r["attack"] for r in copy_detection.measure(found, matches, ["one"] * 6)] == ["all"]


def test_descriptor():
    model = build_backbone("vit_nano", 8, img_size=32)[0].eval()
    x = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        forward, name = copy_detection.descriptor(model, 3.0)
        found = forward(x)
        tokens = model.get_intermediate_layers(x, 1)[0]
    pooled = tokens[:, 1:].clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)
    torch.testing.assert_close(found, torch.cat([tokens[:, 0], pooled], 1))
    assert name == "class token and GeM, p = 3"


# ---- The script ----


def test_script(copies, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run("--data_path", copies, "--output_dir", out, *NETWORK) == 0
    first = report(out)
    assert "20 queries, 8 database images" in capsys.readouterr().out
    counts = {row["attack"]: row["queries"] for row in first["results"]}
    assert counts == {"all": 20, "grey": 8, "flip": 6, "crop": 6}
    assert first["image_size"] == 32 and first["features"] == "class token and GeM, p = 4" and not first["whitening"]
    assert first["results"][0]["mAP"]["value"] > first["results"][0]["uAP"]["value"] > 0
    with monkeypatch.context() as patch:
        patch.setattr("protocols.features.extract_features", None)  # kept
        assert run("--data_path", copies, "--output_dir", out, *NETWORK) == 0
        assert report(out)["results"] == first["results"]
        with pytest.raises(TypeError):
            run("--data_path", copies, "--output_dir", out, *NETWORK, "--gem_p", 3)


def test_a_bug_keeps_its_traceback(copies, tmp_path, monkeypatch):
    def broken(*args):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(retrieval, "similarities", broken)
    with pytest.raises(ValueError, match="could not be broadcast"):
        run("--data_path", copies, "--output_dir", tmp_path / "out", *NETWORK)


@pytest.fixture
def others(tmp_path):
    """Twelve images to whiten with, and five other ones as distractors."""
    for name, first, count in (("whitening", 200, 12), ("distractors", 300, 5)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(shapes.draw(first + i, 48)[0]).save(tmp_path / name / f"{i}.png")
    return {name: (f"--{name}_path", tmp_path / name) for name in ("whitening", "distractors")}


def test_distractors_and_whitening_are_different_images(copies, others, tmp_path, capsys):
    seen = set()
    for flags, images in (((), 8), (others["whitening"], 8), (others["distractors"], 13),
                          ((*others["whitening"], *others["distractors"]), 13)):
        for arithmetic in ("published", "own"):
            assert run("--data_path", copies, "--output_dir", tmp_path, *flags, *NETWORK, "--arithmetic", arithmetic
                       ) == 0
            found = report(tmp_path)
            assert found["whitening"] == ("--whitening_path" in flags) and found["images"] == [20, images]
            assert found["arithmetic"] == arithmetic and f"{arithmetic} arithmetic" in capsys.readouterr().out
            seen.add(found["results"][0]["uAP"]["value"])
    assert len(seen) == 6  # uAP differs with the whitening alone


def test_flags_of_earlier_versions_are_named(copies, capsys):
    for flag in ("--distractors", "--distractors_for"):
        with pytest.raises(SystemExit):
            run("--data_path", copies, flag, "more")
        error = capsys.readouterr().err
        assert flag in error and "--distractors_path" in error and "--whitening_path" in error


def test_published_command_line():
    args = eval_copy_detection.get_args_parser().parse_args(
        "--data_path here --whitening_path some --distractors_path other --imsize 320 --batch_size 16 --use_cuda true "
        "--pretrained_weights w --arch vit_base --patch_size 8 --checkpoint_key teacher --num_workers 10 "
        "--dist_url env:// --local_rank 0".split())
    assert (args.whitening_path, args.distractors_path, args.image_size, args.batch_size_per_gpu) == (
        "some", "other", 320, 16)
    assert args.arithmetic == "published"


@pytest.mark.parametrize("crops, side", [(224, 320), (64, 64), (518, 518)])
def test_images_are_as_large_as_published_unless_the_weights_say_otherwise(crops, side):
    assert copy_detection.default_side(crops) == side


@pytest.mark.parametrize("arch, features", [("pixels", "the network's output"), ("resnet18", "the network's output")])
def test_without_tokens(copies, tmp_path, arch, features):
    more = ("--num_workers", 0, "--device", "cpu", "--image_size", 32)
    assert run("--data_path", copies, "--arch", arch, "--output_dir", tmp_path, *more) == 0
    found = report(tmp_path)
    assert found["features"] == features and found["results"][0]["mAP"]["value"] > 20


def test_two_processes_report_what_one_reports(copies, tmp_path):
    flags = ["--data_path", str(copies), *map(str, NETWORK), "--whitening_path", str(copies / "database"),
             "--output_dir"]
    done = launch("eval_copy_detection.py", *flags, tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert run(*flags, tmp_path / "one") == 0
    one, two = (report(tmp_path / name) for name in ("one", "two"))
    for first, second in zip(one["results"], two["results"], strict=True):
        assert first["attack"] == second["attack"]
        for measure in ("mAP", "uAP"):
            assert first[measure]["value"] == pytest.approx(second[measure]["value"], abs=1e-3)


def test_whitening_is_the_same_for_queries_and_database(copies, tmp_path, monkeypatch):
    seen = []
    whiten = retrieval.whiten
    monkeypatch.setattr(retrieval, "whiten", lambda x, w: seen.append((len(x), w)) or whiten(x, w))
    assert run("--data_path", copies, "--output_dir", tmp_path, "--whitening_path", copies / "queries", *NETWORK) == 0
    assert [n for n, _ in seen] == [20, 8] and seen[0][1] is seen[1][1]
