"""The whole evaluation on drawn pictures, its page in a real browser, and what it refuses."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from importlib.metadata import version

import pytest
import torch
from PIL import Image

import evaluate
from imagesets import sources
from imagesets.decode import PLAIN
from protocols import overview, report, tokens
from protocols.features import load_network
from protocols.splits import Part
from vision_transformer import vit_nano


def run(*flags):
    small = ("--arch", "vit_nano", "--patch_size", 8, "--crop_size", 32, "--num_workers", 0, "--device", "cpu",
             "--linear_epochs", 1, "--linear_views", 1, "--image_size", 64, "--semantic_steps", 2, "--depth_steps", 2)
    return evaluate.main(evaluate.get_args_parser().parse_args([str(f) for f in (*small, *flags)]))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    code = run("--data_path", "shapes:80x32", "--segmentation_data", "shapes:6x32", "--semantic_data", "shapes:12x32",
               "--depth_data", "scenes:12x32", "--baselines", "--output_dir", folder)
    assert code == 0
    return folder


def test_the_report_holds_every_figure(page):
    found = json.loads((page / "report.json").read_text())
    assert {row["protocol"] for row in found["results"]} == {
        "k-NN", "linear", "segmentation", "semantic segmentation", "depth"}
    for row in found["results"]:
        low, high = row["this network"]["interval"]
        assert low <= row["this network"]["value"] <= high
    assert found["results"][0]["raw pixels"]["value"] >= 0
    assert set(found["skipped"]) == {"segmentation, raw pixels", "video segmentation", "copy detection", "retrieval"}
    assert "--video_data" in found["skipped"]["video segmentation"]
    knn = json.loads((page / "this_network" / "eval_knn.json").read_text())
    assert found["reports"]["k-NN"]["results"] == knn["results"]


def test_the_page_needs_nothing_else(page):
    text = (page / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', text) and "<script" not in text
    pictures = re.findall(r'base64,([^"]+)"', text)
    assert len(pictures) == 6  # sweep, map, neighbours, attention, PCA, masks
    for encoded in pictures:
        Image.open(io.BytesIO(base64.b64decode(encoded))).load()


def test_the_page_says_when_and_with_what_it_was_made(page):
    text = (page / "report.html").read_text()
    assert re.search(r"<dt>date</dt><dd>20\d\d-\d\d-\d\d \d\d:\d\d", text)
    assert f"torch {version('torch')}" in text and "Python 3." in text


def test_the_sweep_has_the_baselines(page, tmp_path, monkeypatch):
    """The chart is drawn from each network's own file."""
    shown, drawn = [], overview.charts.sweep_chart
    monkeypatch.setattr(overview.charts, "sweep_chart",
                        lambda networks, path: (shown.append(networks), drawn(networks, path)))
    page = shutil.copytree(page, tmp_path / "page")  # with the features
    assert run("--data_path", "shapes:80x32", "--baselines", "--output_dir", page) == 0
    folders = {name: page / name.replace(" ", "_") for name in ("this network", "raw pixels")}
    assert shown == [{name: json.loads((folder / "eval_knn.json").read_text())["results"]
                      for name, folder in folders.items()}]


def test_raw_pixels_have_the_patches_of_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate_video_segmentation", lambda *args, patch_size, **options: patch_size)
    (video,) = [protocol for protocol in evaluate.PROTOCOLS if protocol.name == "video segmentation"]
    torch.save(vit_nano(4, img_size=32).state_dict(), tmp_path / "weights.pth")
    for flags, patch, of_videos in ((("--pretrained_weights", str(tmp_path / "weights.pth")), 4, 4),
                                    (("--arch", "resnet18"), 8, 16)):
        args = evaluate.get_args_parser().parse_args([*flags, "--baselines", "--device", "cpu"])
        pixels = evaluate.load_networks(args)["raw pixels"]
        assert tokens.patch_size(pixels) == patch and video.evaluate(pixels, args, tmp_path) == of_videos


def test_notes_of_every_protocol_are_on_the_page(tmp_path):
    reports = {name: {"results": [{"mAP": 1.0}], "notes": [f"note on {name}"]} for name in (
        "k-NN", "linear", "segmentation", "video segmentation", "copy detection", "retrieval")}
    reports["k-NN"]["results"] = []
    text = overview.page({}, "images", [], reports, {}, {}, [], tmp_path / "masks.png")
    assert all(f"note on {name}" in text for name in reports)


@pytest.mark.parametrize("width", [390, 1000])
def test_the_page_in_a_browser(page, tmp_path, width):
    """In a frame as wide as a phone too: nothing but tables is wider, and those scroll by themselves."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium here")
    script = ("<script>addEventListener('load', () => { const i = [...document.images]; document.title = "
              "`${i.length} pictures, ${i.filter(x => x.naturalWidth > 50).length} shown, ` + "
              "`${document.querySelectorAll('tbody tr').length} lines, ${document.documentElement.scrollWidth} wide`; "
              "parent.document.title = document.title; })</script>")
    text = (page / "report.html").read_text()
    frame = html.escape(text.replace("</body>", script + "</body>"))
    (tmp_path / "page.html").write_text(
        f"<!doctype html><title></title><iframe srcdoc='{frame}' style='width: {width}px; height: 800px; border: 0'>")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'user'}"]
    command = [browser, *quiet, "--window-size=1000,800", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>(\d+) pictures, (\d+) shown, (\d+) lines, (\d+) wide</title>", shown)
    assert title, shown[:300]
    assert title[1] == title[2] == "6" and int(title[3]) > 20 and int(title[4]) <= width


def test_pairs_of_classes_taken_for_each_other():
    """Test points of b lie at a, one of c at a; a is right."""
    at = torch.eye(3)
    train = Part(at.repeat_interleave(25, 0), torch.arange(3).repeat_interleave(25), ["a", "b", "c"])
    test = Part(at[[0, 0, 0, 0, 2]], torch.tensor([0, 1, 1, 2, 2]), ["a", "b", "c"])
    rows = overview.confusions([train, test])
    assert [(r["class"], r["taken for"], r["images"], r["of the class, %"]) for r in rows] == [
        ("b", "a", 2, 100.0), ("c", "a", 1, 50.0)]


def test_the_sheets_show_test_images(page, tmp_path, monkeypatch):
    """Drawn ones too, which have no val/ folder: the network has seen the others."""
    shown = []
    monkeypatch.setattr(overview.attention, "draw_sheets",
                        lambda network, images, *args, **options: shown.append(images.name(0)))
    args = evaluate.get_args_parser().parse_args(["--data_path", "shapes:8x32", "--arch", "vit_nano", "--device", "cpu",
                                                  "--image_size", "32"])
    network = evaluate.load_networks(args)[evaluate.NETWORK]
    overview.draw(page, network, evaluate.check_data(args, PLAIN), [], {}, 32, 0, {})
    assert shown == [sources.open_images("shapes:8x32", "val").name(0)] != [sources.open_images("shapes:8x32").name(0)]


def test_a_network_of_timm_has_a_sheet_of_patch_tokens(tmp_path):
    pytest.importorskip("timm")
    network, skipped = load_network("", "test_vit"), {}
    drawn = overview.draw(tmp_path, network, [sources.open_images("shapes:2x32")], [], {}, 64, 0, skipped)
    assert len(drawn["attention and PCA"]) == 1 and "test_vit" in skipped["attention"]
    assert [path.name for path in tmp_path.glob("*.png")] == ["pca_sheet.png"]


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def bug(*args, **options):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr("protocols.knn_evaluation.knn_predict", bug)
    with pytest.raises(ValueError, match="operands could not be broadcast"):
        run("--data_path", "shapes:16x32", "--output_dir", tmp_path)


def test_text_is_escaped():
    assert "<b>" not in report.page("<b>", [("<b>", [report.note("<b>"), report.table([{"<b>": "<b>"}]),
                                                    report.facts({"<b>": "<b>"})])]).replace("<body>", "")


@pytest.mark.parametrize("flags, message", [
    (("--data_path", "nowhere"), "--data_path 'nowhere'"),
    (("--video_data", "nowhere"), "--video_data nowhere"),
    (("--video_data", "shapes:8"), "--video_data shapes:8"),
    (("--segmentation_data", "shapes:x"), "--segmentation_data 'shapes:x': give shapes:COUNT"),
    (("--depth_data", "scenes:x"), "--depth_data 'scenes:x': give scenes:COUNT"),
    (("--semantic_data", "shapes:x"), "--semantic_data 'shapes:x': give shapes:COUNT"),
    (("--pretrained_weights", "nothing.pth"), "nothing.pth"),
])
def test_bad_input_is_refused_in_one_line(flags, message, tmp_path, capsys):
    assert run("--output_dir", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not (tmp_path / "out").exists()


def test_pictures_without_labels_and_few_of_them(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        Image.new("L" if i else "RGB", (40 + i, 36), 100 * i).save(folder / f"{i}.png")
    assert run("--data_path", folder, "--output_dir", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "no labels" in found["skipped"]["linear"] and "too few" in found["skipped"]["map of the features"]
    assert [row["figure"] for row in found["results"]][0] == "rank_me"


def test_without_a_network_it_names_what_to_give(capsys):
    assert evaluate.main(evaluate.get_args_parser().parse_args([])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--pretrained_weights" in error and "--arch" in error
