"""Masks against loops and by hand, folders of masks, the figures' choices, and the script end to end."""

import itertools
import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import launch

import eval_segmentation as script
import parallel
from imagesets import decode, masks, shapes, sources
from protocols import dense, segmentation, segmentation_scores, sheets, transforms
from protocols.features import Network, load_network
from vision_transformer import VisionTransformer, build_backbone, vit_nano

# ---- Masks of patches and of pixels ----


@pytest.mark.parametrize("height, width, image_size, patch", [
    (30, 40, [48], 8), (40, 27, [32], 8), (31, 57, [50], 16), (96, 96, [96], 8), (9, 70, [16], 16)])
def test_each_pixel_gets_its_nearest_patch(height, width, image_size, patch):
    """Patch centres are mapped back to the image; its pixels look for the nearest one."""
    scaled = [math.floor(Fraction(image_size[0] * side, min(height, width))) for side in (height, width)]
    h, w = (side // patch for side in scaled)
    mask = np.random.default_rng(0).random((2, h, w)) < 0.5
    found = dense.patches_to_pixels(mask, height, width, image_size, patch)
    assert found.shape == (2, height, width)
    for y, x in itertools.product(range(height), range(width)):
        def gap(i, n, side, count):
            return [abs((i + 0.5) * side / n - (k + 0.5) * patch) for k in range(count)]
        rows, columns = gap(y, height, scaled[0], h), gap(x, width, scaled[1], w)
        if sorted(rows)[:2].count(min(rows)) == 1 and sorted(columns)[:2].count(min(columns)) == 1:
            assert (found[:, y, x] == mask[:, rows.index(min(rows)), columns.index(min(columns))]).all()


def test_kmeans_takes_what_touches_less_of_the_border():
    inside = np.zeros((7, 9), bool)
    inside[2:5, 2:8] = True
    rng = np.random.default_rng(0)
    for object_of in (inside, ~inside):  # whichever cluster is numbered first
        tokens = np.where(object_of[..., None], [4.0, 0, 1], [0, 3.0, 1]) + 0.1 * rng.standard_normal((7, 9, 3))
        assert (segmentation.kmeans_mask(tokens) == inside).all()
    cut = np.zeros((7, 9), bool)
    cut[:4, 1:5] = True  # 4 of the 28 patches of the border
    assert (segmentation.kmeans_mask(np.where(cut[..., None], [4.0, 0], [0, 3.0])) == cut).all()
    for equal in (np.ones((3, 4, 2)), np.ones((1, 1, 2))):
        assert not segmentation.kmeans_mask(equal).any()


def test_centre_box_by_hand():
    assert segmentation.centre_box(4, 6, 0.5).astype(int).tolist() == [
        [0] * 6, [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0], [0] * 6]
    assert segmentation.centre_box(5, 7, 1.0).all()
    assert segmentation.centre_box(100, 200, 0.6).mean() == pytest.approx(0.36)


# ---- Folders ----


def write_pair(root, stem, mask, layout=("images", "masks"), mode="L", size=None):
    """A image of its mask's size, noise with a bright foreground; the mask in a mode of Pillow."""
    height, width = size or mask.shape
    rng = np.random.default_rng(len(stem))
    pixels = rng.integers(0, 100, (height, width, 3)) + (0 if size else 120 * (mask > 0)[..., None])
    for folder in layout:
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(root / layout[0] / f"{stem}.jpg")
    path = root / layout[1] / f"{stem}.png"
    if mode == "P":
        masks.write_labels(mask, path)
    elif mode == "1":
        Image.fromarray(mask > 0).save(path)
    else:
        Image.fromarray(mask.astype(np.uint8)).convert(mode).save(path)


def square(value=255, height=40, width=56):
    mask = np.zeros((height, width), int)
    mask[8:24, 16:40] = value
    return mask


@pytest.mark.parametrize("mode, value", [("L", 255), ("L", 1), ("1", 1), ("P", 3), ("P", 255), ("RGB", 200),
                                         ("RGBA", 200), ("LA", 9)])
def test_anything_but_zero_is_foreground(tmp_path, mode, value):
    write_pair(tmp_path, "a", square(value), mode=mode)
    image, truth, ignored = masks.open_masked(str(tmp_path)).load(0)
    assert image.shape == (3, 40, 56) and (truth == (square() > 0)).all() and not ignored.any()


def test_a_palette_that_does_not_begin_with_black_has_no_certain_background(tmp_path):
    """`quantize` may give the object index 0, which by the indices would be the background."""
    write_pair(tmp_path, "a", square(), mode="RGB")
    reduced = Image.open(tmp_path / "masks" / "a.png").quantize(2)
    assert reduced.getpalette()[:3] == [255, 255, 255]
    reduced.save(tmp_path / "masks" / "a.png")
    with pytest.raises(parallel.Refused, match=r"a.png: index 0 .*\(255, 255, 255\).*save it as grey"):
        masks.open_masked(str(tmp_path))
    reduced.convert("L").save(tmp_path / "masks" / "a.png")  # the remedy
    assert (masks.open_masked(str(tmp_path)).load(0)[1] == (square() > 0)).all()
    black_first = Image.open(tmp_path / "masks" / "a.png").point(lambda v: v > 0).convert("L")
    black_first.putpalette([0, 0, 0, 9, 200, 3])
    black_first.save(tmp_path / "masks" / "a.png")
    assert (masks.open_masked(str(tmp_path)).load(0)[1] == (square() > 0)).all()


def test_voc(tmp_path):
    layout = "JPEGImages", "SegmentationClass"
    labels = square(15)
    labels[8:10] *= 17  # 255: the border that nobody judges
    for stem in "abc":
        write_pair(tmp_path, stem, labels, layout, "P")
    Image.new("RGB", (5, 5)).save(tmp_path / "JPEGImages" / "d.jpg")
    opened = masks.open_masked(str(tmp_path))
    assert len(opened.names) == 3 and opened.notes == ["1 of 4 images have no mask and are left out"]
    _, truth, ignored = opened.load(1)
    assert (truth == (labels == 15)).all() and (ignored == (labels == 255)).all()
    listed = tmp_path / masks.VOC_LIST
    listed.parent.mkdir(parents=True)
    listed.write_text("c\na\n")
    opened = masks.open_masked(str(tmp_path))
    assert [name[-5:] for name in opened.names] == ["c.jpg", "a.jpg"] and not opened.notes
    listed.write_text("a\nd\n")
    with pytest.raises(parallel.Refused, match="lists d, but there is no SegmentationClass/d"):
        masks.open_masked(str(tmp_path))


def test_drawn_images_are_held_out():
    opened = masks.open_masked("shapes:3x32")
    drawn, _, mask = shapes.draw(sources.VAL_START + 2, 32)
    image, truth, ignored = opened.load(2)
    assert len(opened.names) == 3 and (truth == mask).all() and not ignored.any()
    assert (image.permute(1, 2, 0).numpy() == drawn).all()


def test_a_turned_image_has_the_size_that_is_seen(tmp_path):
    write_pair(tmp_path, "a", square())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 56)).save(tmp_path / "images" / "a.jpg", exif=exif)
    assert masks.open_masked(str(tmp_path)).load(0)[0].shape == (3, 40, 56)


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_decoded_file(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (40, 56)).save(path, exif=exif)
    assert masks.size(path, turned=True) == decode.decode(path).shape[1:]
    assert masks.size(path) == masks.read_labels(path).shape


def test_palette_is_that_of_voc():
    colors = np.array(masks.palette()).reshape(256, 3)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 7: (128, 128, 128), 8: (64, 0, 0),
             15: (192, 128, 128), 20: (0, 64, 128), 21: (128, 64, 128), 255: (224, 224, 192)}
    assert {label: tuple(colors[label].tolist()) for label in known} == known


# ---- Figures ----


def test_choices_are_made_on_one_part_and_judged_on_the_other():
    validation = np.array([True, True, False, False, False])
    heads = np.zeros((5, 2, 3))
    heads[..., 0] = [[0.2, 0.9], [0.4, 0.3], [0.5, 0.1], [0.6, 0.2], [0.0, 0.3]]  # head 1 by 0.6 to 0.3
    heads[..., 1] = [[9, 9], [9, 9], [1, 2], [3, 4], [5, 6]]
    heads[..., 2] = [[9, 9], [9, 9], [0, 1], [0, 1], [1, 0]]
    box = np.zeros((5, len(segmentation.BOX_SIDES), 3))
    box[:, 3, 0] = 0.5
    measured = {("network", "heads"): heads, ("network", "mean"): heads[:, :1], ("", "box"): box}
    found = {row["mask"]: row for row in segmentation.summarize(measured, validation)}
    value = lambda mask, column: found[mask][column] and found[mask][column]["value"]  # noqa: E731
    assert value("best head", "jaccard") == pytest.approx(100 * (0.9 + 0.4 + 0.5 + 0.6 + 0.3) / 5)
    assert value("best head", "jaccard_held_out") == pytest.approx(100 * (0.5 + 0.6 + 0.3) / 3)
    assert found["one head"]["chosen"] == "head 1" and value("one head", "jaccard") is None
    assert value("one head", "jaccard_held_out") == pytest.approx(100 * (0.1 + 0.2 + 0.3) / 3)
    assert value("mean of heads", "jaccard_held_out") == pytest.approx(100 * 1.1 / 3)
    assert value("one head", "energy_ratio") == pytest.approx(4)
    assert value("one head", "pointing_game") == pytest.approx(200 / 3)
    assert value("best head", "energy_ratio") == pytest.approx((1 + 3 + 6) / 3)  # of the heads 0, 0 and 1
    assert value("best head", "pointing_game") == pytest.approx(0)
    assert found["centre box"]["chosen"] == "sides x 0.45" and value("centre box", "jaccard_held_out") == 50
    none = segmentation.summarize(measured, np.zeros(5, bool))
    assert [row["mask"] for row in none] == ["best head", "mean of heads"] and none[0]["jaccard_held_out"] is None


def test_validation_part():
    assert [segmentation.validation_part(n, 0.2, 0).sum() for n in (1, 2, 10, 300)] == [0, 1, 2, 60]
    assert segmentation.validation_part(10, 0, 0).sum() == 0 and segmentation.validation_part(3, 0.9, 0).sum() == 2
    parts = [segmentation.validation_part(50, 0.2, seed).tolist() for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]


def test_an_error_of_one_process_is_raised_in_all(monkeypatch):
    assert parallel.map_shared(lambda i: i * i, 5) == [0, 1, 4, 9, 16] and parallel.map_shared(str, 0) == []
    monkeypatch.setattr(parallel, "gather_objects", lambda mine: [mine, ([], OSError("x.png is broken"))])
    with pytest.raises(OSError, match="broken"):
        parallel.map_shared(lambda i: i, 4)


@pytest.mark.parametrize("crop, patch, sides, expected", [
    (224, 16, [500, 375, 375], 480),  # photographs, published weights
    (48, 8, [96], 96),  # 102.9 in whole patches
    (224, 16, [64, 64, 2000], 224),  # small images: not below the crops of training
    (224, 16, [130, 150, 140], 272),  # twice 140, in whole patches
])
def test_default_size_follows_the_weights_and_the_data(crop, patch, sides, expected):
    assert dense.default_size(crop, patch, sides) == expected


# ---- The script ----

SMALL = ["--arch", "vit_nano", "--patch_size", "8", "--image_size", "32", "--device", "cpu"]


def run(data, out, *flags):
    flags = ["--data_path", data, "--output_dir", out, *SMALL, *flags]
    return script.main(script.get_args_parser().parse_args([str(flag) for flag in flags]))


def read(out):
    return json.loads((out / "eval_segmentation.json").read_text())


def test_a_head_that_sees_the_object_is_found(tmp_path, monkeypatch):
    """Attention that is 60 % on the object's own patches, in head 1 alone; the others see a corner."""
    truth = np.zeros((4, 5), bool)
    truth[1:3, 2:4] = True
    for i in range(6):
        write_pair(tmp_path, f"{i}", np.kron(truth, np.ones((8, 8))))
    right = np.where(truth, 0.2, 0.2 / 16)
    wrong = np.full((4, 5), 0.1 / 19)
    wrong[0, 0] = 0.9
    attention = np.stack([wrong, right, wrong])
    monkeypatch.setattr(dense, "look", lambda *args: (None, attention, truth[..., None] * 1.0))
    assert run(tmp_path, tmp_path / "out", "--threshold", "0.7", "--pretrained_weights", "") == 0
    found = {row["mask"]: row for row in read(tmp_path / "out")["results"]}
    assert found["best head"]["jaccard"]["value"] == found["one head"]["jaccard_held_out"]["value"] == 100
    assert found["one head"]["chosen"] == "head 1" and found["k-means"]["jaccard"]["value"] == 100
    mean = sheets.threshold_mask(attention.mean(0), 0.7)
    expected = 100 * (mean & truth).sum() / (mean | truth).sum()
    assert found["mean of heads"]["jaccard"]["value"] == pytest.approx(expected)
    assert found["one head"]["energy_ratio"]["value"] == pytest.approx(0.8 / (4 / 20))  # 4 of the 20 patches
    assert found["one head"]["pointing_game"]["value"] == found["k-means"]["pointing_game"]["value"] == 100
    assert found["mean of heads"]["pointing_game"]["value"] == 0 and found["k-means"]["energy_ratio"]["value"] == 5
    side = float(found["centre box"]["chosen"].split()[-1])
    fits = [segmentation_scores.jaccard(segmentation.centre_box(32, 40, s), np.kron(truth, np.ones((8, 8))) > 0)
            for s in segmentation.BOX_SIDES]
    assert side == segmentation.BOX_SIDES[int(np.argmax(fits))]


def network_for_bright_patches():
    """A real network with weights by hand: the class token of head 0 attends to bright patches alone, head 1 to dark.

    Patches are embedded as (b, -b, 0, 0) with b their mean brightness, of which layer norm leaves the sign.
    """
    model = VisionTransformer(16, 8, embed_dim=4, depth=1, num_heads=2, qkv_bias=True).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.zero_()
    model.patch_embed.proj.weight[0], model.patch_embed.proj.weight[1] = 1 / 192, -1 / 192
    model.cls_token[0, 0, :2] = torch.tensor([1.0, -1.0])
    model.blocks[0].norm1.weight.fill_(1), model.norm.weight.fill_(1)
    model.blocks[0].attn.qkv.weight[[0, 2, 4, 6], 0] = torch.tensor([4.0, 4.0, 4.0, -4.0])  # q, q, k, k of two heads
    info = {"arch": "vit_nano", "patch_size": 8, "in_chans": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    about = {"arch": "vit_nano", "patch_size": 8, "weights": None, "checkpoint_key": "teacher", "weights_sha256": ""}
    return Network(model, info, about, torch.device("cpu"))


@pytest.mark.parametrize("height, width, image_size, least", [
    (96, 160, 96, 100), (160, 96, 96, 100), (192, 320, 96, 100), (91, 170, 200, 85), (230, 101, 204, 85)])
def test_attention_that_is_on_the_object_is_scored_as_such(height, width, image_size, least, tmp_path, monkeypatch):
    """Nothing in between is transposed, turned, shifted or inverted: the image's pixels go in, its figure comes out.

    The object has no symmetry, so every such mistake costs more than what patches cost at its border.
    """
    monkeypatch.setattr("protocols.features.load_network", lambda *args, **options: network_for_bright_patches())
    for i in range(5):
        mask = np.zeros((12, 20) if width > height else (20, 12), bool)
        mask[1 + i:4 + i, 1:9], mask[1:5 + i, 7:9] = True, True  # an angle, up and left of the middle
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        write_pair(tmp_path, str(i), mask)
        Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(tmp_path / "images" / f"{i}.jpg", quality=95)
    assert run(tmp_path, tmp_path / "out", "--image_size", image_size, "--threshold", 0.999, "--val_share", 0.4) == 0
    found = {row["mask"]: row for row in read(tmp_path / "out")["results"]}
    assert found["best head"]["jaccard"]["value"] >= least and found["k-means"]["jaccard"]["value"] >= least
    assert found["one head"]["chosen"] == "head 0" and found["one head"]["jaccard_held_out"]["value"] >= least


def test_attention_of_one_patch_looks_at_the_object_though_its_mask_is_small(tmp_path, monkeypatch):
    """Nine tenths of the mass on one of four patches of the object: a poor mask, a high energy ratio, a hit."""
    truth = np.zeros((4, 5), bool)
    truth[1:3, 2:4] = True
    attention = np.full((1, 4, 5), 0.1 / 19)
    attention[0, 1, 2] = 0.9
    for i in range(3):
        write_pair(tmp_path, f"{i}", np.kron(truth, np.ones((8, 8))))
    monkeypatch.setattr(dense, "look", lambda *args: (None, attention, truth[..., None] * 1.0))
    assert run(tmp_path, tmp_path / "out") == 0
    row = read(tmp_path / "out")["results"][0]
    assert row["mask"] == "best head" and row["jaccard"]["value"] == 25 and row["pointing_game"]["value"] == 100
    assert row["energy_ratio"]["value"] == pytest.approx((0.9 + 3 * 0.1 / 19) / 0.2)


def test_images_of_all_sorts(tmp_path, capsys):
    """Two sizes, a grey image, an empty mask, a 1-bit mask, and one that has no mask."""
    write_pair(tmp_path, "a", square())
    write_pair(tmp_path, "bb", square(height=60, width=44), mode="1")
    write_pair(tmp_path, "ccc", square())
    Image.new("L", (56, 40), 90).save(tmp_path / "images" / "ccc.jpg")
    write_pair(tmp_path, "dddd", square(0))
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "e.jpg")
    assert run(tmp_path, tmp_path / "out", "--save_masks", "2") == 0
    report, printed = read(tmp_path / "out"), capsys.readouterr().out
    assert report["images"] == 3 and report["held_out"] == 2
    assert "1 of 4 images have no foreground" in printed and "1 of 5 images have no mask" in printed
    assert Image.open(tmp_path / "out" / "masks.png").size == (6 + 6 * 206, 32 + 6 + 2 * (149 + 20))
    assert {row["network"] for row in report["results"]} == {"random weights", "-"}


def test_size_is_chosen_from_the_folder_and_said_before_the_work(tmp_path, capsys):
    write_pair(tmp_path, "a", square(height=40, width=120))
    write_pair(tmp_path, "b", square(height=60, width=50))
    torch.save(vit_nano(8, img_size=32).state_dict() | {}, tmp_path / "weights.pth")
    from_crops = ["--pretrained_weights", tmp_path / "weights.pth", "--image_size", "0"]
    assert run(tmp_path, tmp_path / "out", *from_crops) == 0
    assert read(tmp_path / "out")["image_size"] == 224  # the file doesn't tell the crops of training: 224
    assert "2 images, shorter side resized to 224 pixels" in capsys.readouterr().out


def test_a_line_says_how_far_it_is_from_the_first_seconds(tmp_path, capsys, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr("protocols.progress.time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    assert run("shapes:8x32", tmp_path) == 0  # an image takes a second by this clock
    lines = [line for line in capsys.readouterr().out.splitlines() if "eta" in line]
    assert lines[0] == "images segmented: 3 of 8, eta 0:00:05"


def test_an_image_of_too_many_patches_is_named_before_the_work(tmp_path, capsys, monkeypatch):
    write_pair(tmp_path, "a", square())
    write_pair(tmp_path, "strip", square(height=24, width=400))
    monkeypatch.setattr(transforms, "MAX_PATCHES", 64)
    monkeypatch.setattr(dense, "look", None)  # no work
    assert run(tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "strip.jpg" in error and "--image_size 32" in error
    assert "66 x 4 patches, more than 64; lower --image_size" in error


def test_an_image_that_takes_longer_than_all_others_is_named(tmp_path, capsys, monkeypatch):
    for name in "abc":
        write_pair(tmp_path, name, square())
    write_pair(tmp_path, "strip", square(height=24, width=400))
    for most, words in ((64, ("strip.jpg makes 264 patches", "--image_size")), (300, ())):
        monkeypatch.setattr(segmentation, "LONG", most)
        images = masks.open_masked(str(tmp_path))
        segmentation.check_sizes(images, 32, 8, "--data_path x")
        said = capsys.readouterr().out
        assert all(word in said for word in words) and bool(said) == bool(words)


def test_one_image(tmp_path, capsys):
    write_pair(tmp_path, "a", square())
    assert run(tmp_path, tmp_path / "out", "--save_masks", "9") == 0
    assert "no validation part" in capsys.readouterr().out
    assert [row["mask"] for row in read(tmp_path / "out")["results"]] == ["best head", "mean of heads", "k-means"]


def test_weights_stand_beside_random_ones_and_two_processes_agree(tmp_path):
    torch.manual_seed(1)
    torch.save(vit_nano(8, img_size=32).state_dict(), tmp_path / "weights.pth")
    flags = ["--data_path", "shapes:7x32", *SMALL, "--pretrained_weights", str(tmp_path / "weights.pth")]
    done = launch("eval_segmentation.py", *flags, "--output_dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert run("shapes:7x32", tmp_path / "one", *flags[2:]) == 0
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one["results"] == two["results"] and one["weights_sha256"] == two["weights_sha256"]
    rows = {(row["network"], row["mask"]): row for row in one["results"]}
    assert len(rows) == 9 and len(one["weights_sha256"]) == 64
    assert rows["network", "best head"]["jaccard"] != rows["random weights", "best head"]["jaccard"]
    assert all(0 <= row["jaccard_held_out"]["value"] <= 100 for row in rows.values())
    assert all(row["energy_ratio"]["value"] >= 0 <= row["pointing_game"]["value"] <= 100 for row in rows.values())


@pytest.mark.parametrize("flags, message", [
    (("--data_path", "nowhere"), "--data_path 'nowhere'"),
    (("--data_path", "shapes:x"), "--data_path 'shapes:x'"),
    (("--arch", "resnet18"), "--arch resnet18: has no patch tokens"),
    (("--pretrained_weights", "nothing.pth"), "nothing.pth: no such file"),
    (("--image_size", "7"), "--image_size 7"),
    (("--data_path", "shapes:2x4000", "--image_size", "3200"), "3200 x 3200 pixels makes 400 x 400 patches"),
    (("--layer", "4"), "--layer 4"),
    (("--device", "cuda:99"), "--device cuda:99"),
    (("--output_dir", __file__), "is a file"),
    (("--output_dir", "/proc/out"), "--output_dir /proc/out: No such file or directory; choose"),
])
def test_bad_input_is_refused_in_one_line(flags, message, tmp_path, capsys):
    assert run("shapes:2x32", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("eval_segmentation.py: error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_a_network_of_timm_has_the_rows_without_attention(tmp_path, capsys):
    pytest.importorskip("timm")
    for i, (height, width) in enumerate([(32, 48), (48, 32), (32, 32)]):
        write_pair(tmp_path / "data", str(i), square(height=height, width=width))
    torch.manual_seed(1)
    torch.save(build_backbone("test_vit")[0].state_dict(), tmp_path / "w.pth")
    flags = ("--arch", "test_vit", "--patch_size", 8)  # the patches of this network have 16 pixels, whatever is given
    assert run(tmp_path / "data", tmp_path / "out", *flags, "--pretrained_weights", tmp_path / "w.pth",
               "--save_masks", 2, "--image_size", 70) == 0
    report, printed = read(tmp_path / "out"), capsys.readouterr().out
    assert [(row["network"], row["mask"]) for row in report["results"]] == [
        ("network", "k-means"), ("random weights", "k-means"), ("-", "centre box")]
    (line,) = [line for line in printed.splitlines() if line.startswith("left out: ")]
    assert all(part in line for part in ("best head, one head, mean of heads", "test_vit")) and line in report["notes"]
    assert report["patch_size"] == 16 and (tmp_path / "out" / "masks.png").is_file()


def test_an_image_size_that_a_network_of_timm_does_not_take_is_refused(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    assert run("shapes:3x32", tmp_path / "out", "--arch", "test_vit", "--image_size", 8) == 2
    assert "--image_size 8: smaller than a patch of 16" in capsys.readouterr().err
    network = load_network("", "test_vit")
    one_size = timm.create_model("beit_base_patch16_224", embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(parallel.Refused, match="--image_size: an image of 48 x 32 pixels .*give another one"):
        dense.look(network._replace(forward=one_size), torch.zeros(3, 32, 48, dtype=torch.uint8), [32])


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*args):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(segmentation, "kmeans_mask", broken)
    with pytest.raises(ValueError, match="could not be broadcast"):
        run("shapes:2x32", tmp_path / "out")


def test_an_image_that_cannot_be_decoded_is_named(tmp_path, capsys):
    write_pair(tmp_path / "data", "a", square())
    path = tmp_path / "data" / "images" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    assert run(tmp_path / "data", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--data_path" in error and "a.jpg: " in error and "replace" in error


def test_bad_masks_are_named(tmp_path, capsys):
    def refused(message):
        assert run(tmp_path / "data", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error and not (tmp_path / "out").exists()

    write_pair(tmp_path / "data", "a", square(0))
    refused("every mask is empty")
    write_pair(tmp_path / "data", "b", square(), size=(40, 57))
    refused("masks/b.png is 56 x 40 pixels and its image 57 x 40")
    (tmp_path / "data" / "masks" / "b.png").write_bytes(b"no image")
    refused("masks/b.png: not an image")
    for path in (tmp_path / "data" / "masks").iterdir():
        path.unlink()
    refused("no image of images/ has a mask of its name in masks/")


@pytest.mark.parametrize("flags", [("--threshold", "0"), ("--threshold", "1.1"), ("--val_share", "1"),
                                   ("--save_masks", "-1"), ("--seed", str(2**32))])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.get_args_parser().parse_args(flags)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_math_of_the_interval_is_over_images(tmp_path):
    """Of two held-out images with Jaccard 0 and 1, the interval reaches from 0 to 100."""
    measured = {("network", "mean"): np.array([[[0.0, 1, 1]], [[1.0, 1, 1]]])}
    row, = segmentation.summarize(measured, np.zeros(2, bool))
    assert row["jaccard"] == {"value": 50.0, "interval": [0.0, 100.0]} and math.isfinite(row["jaccard"]["value"])
