"""Propagation against loops, labels to and from patches by hand, folders of videos, and the script end to end."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from processes import launch

import eval_video_segmentation as script
from imagesets import davis, masks
from parallel import Refused
from protocols import features, propagation, transforms, video_segmentation

# ---- Propagation ----


def naive_propagate(query, context, labels, radius, topk):
    """A patch at a time: all allowed patches of all frames, sorted; weights exp(similarity / 0.1) of the best."""
    h, w = query.shape[:2]
    found = torch.zeros_like(labels[0])
    for y, x in itertools.product(range(h), range(w)):
        candidates = []
        for frame, label in zip(context, labels, strict=True):
            for v, u in itertools.product(range(h), range(w)):
                if radius == 0 or (abs(v - y) <= radius and abs(u - x) <= radius):
                    candidates.append((math.fsum((query[y, x] * frame[v, u]).tolist()), label[v, u]))
        last = sorted((similarity for similarity, _ in candidates), reverse=True)[:topk][-1]
        best = [candidate for candidate in candidates if candidate[0] >= last]
        total = math.fsum(math.exp(s / 0.1) for s, _ in best)
        found[y, x] = sum(math.exp(s / 0.1) / total * label for s, label in best)
    return found


def random_frames(n, h, w, width=6, labels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, h, w, width, generator=g, dtype=torch.float64)
    soft = torch.rand(n, h, w, labels, generator=g, dtype=torch.float64)
    return features, soft / soft.sum(-1, keepdim=True)


@pytest.mark.parametrize("radius, topk, tile", [(2, 3, 12), (1, 1, 2), (2, 4, 3), (0, 5, 2), (1, 1000, 4), (9, 5, 3)])
def test_propagation_is_that_of_loops(radius, topk, tile, monkeypatch):
    monkeypatch.setattr(propagation, "TILE", tile)
    frames, labels = random_frames(4, 5, 7)
    frames = torch.nn.functional.normalize(frames, dim=-1)
    found = propagation.propagate(frames[0], frames[1:], labels[1:], radius, topk)
    torch.testing.assert_close(found, naive_propagate(frames[0], frames[1:], labels[1:], radius, topk))


def test_ties_with_the_last_of_the_most_similar_count():
    """Features of one number, 1 or -1: all of the same sign are equally similar, so their labels are averaged."""
    features = torch.tensor([1.0, -1, 1, -1, 1, 1]).view(1, 2, 3, 1)
    labels = torch.eye(6).view(1, 2, 3, 6)
    found = propagation.propagate(features[0], features, labels, 0, 2)
    assert torch.equal(found, naive_propagate(features[0], features, labels, 0, 2))
    torch.testing.assert_close(found[0, 0], torch.tensor([1, 0, 1, 0, 1, 1]) / 4)
    torch.testing.assert_close(found[1, 0], torch.tensor([0, 1, 0, 1.0, 0, 0]) / 2)


@pytest.mark.parametrize("n_last", [0, 1, 2, 7])
def test_context_is_the_first_frame_and_the_last_ones(n_last):
    frames, labels = random_frames(6, 4, 3, seed=1)
    unit = frames / frames.norm(dim=-1, keepdim=True)
    expected = [labels[0]]
    for t in range(1, 6):
        used = [0, *range(max(1, t - n_last), t)]
        expected.append(naive_propagate(unit[t], unit[used], torch.stack([expected[i] for i in used]), 2, 5))
    found = list(propagation.propagate_video(iter(frames), labels[0], n_last, 2, 5))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))


def test_frames_are_asked_for_one_by_one():
    """Nothing but the context is held, however long the video."""
    frames, labels = random_frames(6, 3, 3)
    asked = []
    soft = propagation.propagate_video((asked.append(i) or frames[i] for i in range(6)), labels[0], 2, 2, 5)
    for i in range(6):
        next(soft)
        assert asked == list(range(i + 1))


def test_a_video_that_stands_still_keeps_its_labels():
    frames, _ = random_frames(1, 6, 6, width=30)
    first = torch.eye(2, dtype=torch.float64)[(torch.arange(36) % 2).view(6, 6)]
    *_, last = propagation.propagate_video(iter(frames.expand(5, -1, -1, -1)), first, 7, 12, 1)
    assert torch.equal(last, first)


# ---- Labels of pixels and of patches ----


def test_one_hot_reads_the_patches_centres():
    labels = np.zeros((8, 12), int)
    labels[:, 6:] = 7
    labels[2, 2] = 3  # the centre of the first patch of 4 x 4
    found = propagation.one_hot(labels, [3, 7], 2, 3)
    assert found.argmax(-1).tolist() == [[1, 2, 2], [0, 2, 2]] and (found.sum(-1) == 1).all()


def test_harden_by_hand():
    """Four patches in a row, to twice the size: labels change where the bilinear maps cross."""
    soft = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.8, 0.2]]])
    # pixels lie at -0.25, 0.25, 0.75 ... patches; scaled to 0..1, both labels cross 1/2 at patch 1 exactly
    assert propagation.harden(soft, [5], 1, 8).tolist() == [[0, 0, 0, 5, 5, 5, 5, 5]]
    gone = torch.tensor([[[1.0, 0.0]]]).expand(2, 2, 2)  # an object that left the frame
    assert propagation.harden(gone, [5], 4, 4).max() == 0
    assert propagation.harden(torch.tensor([[[0.5, 0.5]]]), [5], 2, 2).max() == 0


def test_harden_is_that_of_loops():
    soft, objects, (height, width) = random_frames(1, 3, 4, labels=4, seed=2)[1][0], [2, 5, 9], (7, 11)
    maps = np.zeros((height, width, 4))
    for y, x in itertools.product(range(height), range(width)):
        v, u = (min(max((p + 0.5) * n / side - 0.5, 0), n - 1) for p, n, side in ((y, 3, height), (x, 4, width)))
        for i, j in itertools.product(range(3), range(4)):
            maps[y, x] += max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j)) * soft[i, j].numpy()
    for k in range(4):
        maps[..., k] = (maps[..., k] - maps[..., k].min()) / (maps[..., k].max() - maps[..., k].min())
    expected = np.array([0, *objects])[maps.argmax(-1)]
    assert (propagation.harden(soft, objects, height, width) == expected).all()


@pytest.mark.parametrize("height, width, image_size, patch, seen", [
    (480, 854, 480, 8, (480, 856)), (480, 854, 480, 16, (480, 848)), (854, 480, 100, 16, (176, 96)),
    (10, 1000, 8, 8, (8, 800)), (240, 428, 480, 8, (480, 856))])
def test_frame_size(height, width, image_size, patch, seen):
    assert video_segmentation.frame_size(height, width, image_size, patch, "own") == seen


@pytest.mark.parametrize("height, width, image_size, patch, seen", [
    (480, 854, 480, 8, (480, 832)), (854, 480, 100, 16, (128, 96)), (500, 500, 480, 8, (480, 448)),
    (32, 48, 32, 8, (32, 48)), (480, 854, 480, 14, (476, 826))])  # below 64, and patches that 64 does not hold
def test_published_frame_size(height, width, image_size, patch, seen):
    assert video_segmentation.frame_size(height, width, image_size, patch) == seen


@pytest.mark.parametrize("size, new", [((90, 150), (128, 192)), ((90, 150), (45, 75)), ((40, 30), (40, 64)),
                                       ((33, 57), (21, 64)), ((1, 3), (8, 8))])
def test_resizing_as_opencv_is_bilinear_between_pixel_centres(size, new):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, *size)).astype(np.uint8))
    found = transforms.resize_as_opencv(image, new)
    for y, x in itertools.product(range(new[0]), range(new[1])):
        v, u = (min(max((p + 0.5) * n / m - 0.5, 0), n - 1) for p, n, m in ((y, size[0], new[0]), (x, size[1], new[1])))
        total = sum(max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j)) * image[:, i, j].double()
                    for i in {math.floor(v), math.ceil(v)} for j in {math.floor(u), math.ceil(u)})
        assert (found[:, y, x] - total).abs().max() < 1  # OpenCV drops fractions on the way
    assert torch.equal(transforms.resize_as_opencv(image, size), image)


def test_published_std_is_that_of_weights_trained_with_imagenets():
    network = features.load_network("", "vit_nano", 8)
    assert video_segmentation.patch_network(network, 8).info["std"] == (0.228, 0.224, 0.225)
    assert video_segmentation.patch_network(network, 8, "own").info["std"] == (0.229, 0.224, 0.225)
    other = network._replace(info=network.info | {"std": (0.5, 0.5, 0.5)})
    assert video_segmentation.patch_network(other, 8).info["std"] == (0.5, 0.5, 0.5)


def test_features_of_the_pixels_are_the_patches():
    network = video_segmentation.patch_network(features.load_network("", "pixels"), 4)
    assert network.info["patch_size"] == 4
    x = torch.rand(2, 3, 8, 12)
    found = network.forward(x)
    assert found.shape == (2, 2, 3, 48)
    assert torch.equal(found[1, 1, 2].sort()[0], x[1, :, 4:, 8:].flatten().sort()[0])


# ---- Folders ----


def draw_video(root, name, objects=(1,), frames=6, size=(32, 48), resolution="480p", annotated=None, seed=0):
    """Textured squares that move to the right over noise, two pixels a frame."""
    rng = np.random.default_rng(seed)
    background = rng.integers(0, 120, (*size, 3)).astype(np.uint8)
    textures = [rng.integers(100, 256, (12, 12, 3)).astype(np.uint8) for _ in objects]
    for t in range(frames):
        image, labels = background.copy(), np.zeros(size, np.uint8)
        for k, (label, texture) in enumerate(zip(objects, textures, strict=True)):
            spot = slice(2 + 15 * k, 14 + 15 * k), slice(4 + 2 * t, 16 + 2 * t)
            image[spot], labels[spot] = texture, label
        path = root / "JPEGImages" / resolution / name / f"{t:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        if annotated is None or t in annotated:
            masks.write_labels(labels, root / "Annotations" / resolution / name / f"{t:05d}.png")


def test_lists_and_resolutions(tmp_path):
    for name in ("ant", "bee", "cow"):
        draw_video(tmp_path, name, frames=2)
    def names(*args):
        return [video.name for video in davis.find_videos(str(tmp_path), *args)]
    assert names() == ["ant", "bee", "cow"]
    for name, text in (("2016/val", "bee\n\ncow\n"), ("2017/val", "cow\n"), ("480p/val", "/J/480p/ant/00000.jpg /A/x\n"
                                                      "/J/480p/ant/00001.jpg /A/y\n")):
        path = tmp_path / "ImageSets" / f"{name}.txt"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert names() == ["cow"] and names("", "2016/val") == ["bee", "cow"] and names("", "480p/val.txt") == ["ant"]
    assert names("480p", "2016/val", ["cow"]) == ["cow"]
    draw_video(tmp_path, "cow", frames=3, resolution="Full-Resolution")
    assert len(davis.find_videos(str(tmp_path), "Full-Resolution")[0].frames) == 3
    assert len(davis.find_videos(str(tmp_path))[0].frames) == 2
    for wrong, message in ((("720p",), "--resolution 720p"), (("", "2018"), "--image_set 2018"),
                           (("", "", ["dog"]), "--sequences dog")):
        with pytest.raises(Refused, match=message):
            names(*wrong)


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for folder in ("frames", "masks"):
        (tmp_path / folder).mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8)).save(tmp_path / "frames" / f"frame{i}.png")
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "masks" / "frame0.png")
    video = davis.open_video("x", tmp_path / "frames", tmp_path / "masks")
    assert [path.stem for path in video.frames] == [f"frame{i}" for i in range(12)]


def test_labels_of_annotations(tmp_path):
    draw_video(tmp_path, "two", objects=(3, 7), frames=2)
    draw_video(tmp_path, "old", objects=(255,), frames=2)  # DAVIS 2016 writes its object so
    two, old = (davis.find_videos(str(tmp_path), names=[name])[0] for name in ("two", "old"))
    assert (two.objects, two.void, old.objects, old.void) == ([3, 7], 255, [255], None)
    labels = davis.read_annotation(two, 0)[0]
    labels[0] = 255
    masks.write_labels(labels, two.annotations[1])
    read, void = davis.read_annotation(two, 1)
    assert void[0].all() and not void[1:].any() and set(np.unique(read)) == {0, 3, 7}
    merged = davis.find_videos(str(tmp_path), names=["two"], merge=True)[0]
    assert merged.objects == [3] and set(np.unique(davis.read_annotation(merged, 1)[0])) == {0, 3}


def test_what_cannot_be_used_is_named(tmp_path):
    draw_video(tmp_path, "dog")
    spoil = [
        ("JPEGImages/480p/dog/00002.png", (40, 32), "00002.png is 40 x 32 pixels and its first frame 48 x 32"),
        ("Annotations/480p/dog/00003.png", (48, 31), "00003.png is 48 x 31"),
        ("JPEGImages/480p/dog/00001.png", None, "00001.png: the file|00001.png: not an image"),
        ("Annotations/480p/dog/00000.png", "black", "no object"),
        ("Annotations/480p/dog/00000.png", "gone", "first frame has no annotation"),
    ]
    for name, how, message in spoil:
        path = tmp_path / name
        kept = path.read_bytes()
        if how is None:
            path.write_bytes(b"")
        elif how == "gone":
            path.unlink()
        else:
            Image.new("L", (48, 32) if how == "black" else how).save(path)
        with pytest.raises(Refused, match=message):
            davis.find_videos(str(tmp_path))
        path.write_bytes(kept)
    assert len(davis.find_videos(str(tmp_path))[0].annotations) == 6
    with pytest.raises(Refused, match="no JPEGImages/"):
        davis.find_videos(str(tmp_path / "Annotations"))


# ---- The script ----

SMALL = ["--device", "cpu", "--patch_size", "4", "--image_size", "32", "--bs", "2"]


def run(data, out, *flags):
    flags = ["--data_path", data, "--output_dir", out, *SMALL, *flags]
    return script.main(script.get_args_parser().parse_args([str(flag) for flag in flags]))


def test_moving_squares_are_followed(tmp_path, capsys):
    draw_video(tmp_path, "two", objects=(3, 7), frames=8)
    draw_video(tmp_path, "one", frames=7, annotated=(0, 2, 6), seed=1)
    draw_video(tmp_path, "bare", frames=4, annotated=(0,), seed=2)
    out = tmp_path / "out"
    assert run(tmp_path, out, "--arch", "pixels", "--patch_size", 2) == 0
    report, printed = json.loads((out / "eval_video_segmentation.json").read_text()), capsys.readouterr().out
    assert "not judged: bare" in printed and "some frames only, and judged in those: one" in printed
    propagated, copied = report["results"]
    assert propagated["J mean"]["value"] > 90 and propagated["J&F"]["value"] > 90 > 75 > copied["J mean"]["value"]
    assert [(v["sequence"], v["objects"], v["frames"]) for v in report["per_sequence"]] == [
        ("one", 1, 1), ("two", 2, 6)]
    # the square of 12 has moved by 2 t: the copied mask shares 12 - 2 t of 12 + 2 t columns; frame 2, and 1 to 6
    expected = [8 / 16, *[np.mean([max(0, 12 - 2 * t) / min(24, 12 + 2 * t) for t in range(1, 7)])] * 2]
    assert copied["J mean"]["value"] == pytest.approx(100 * np.mean(expected))
    for name, count in (("two", 8), ("one", 7), ("bare", 4)):
        written = sorted((out / name).glob("[!.]*"))
        assert [p.name for p in written] == [f"{t:05d}.png" for t in range(count)]
        first = Image.open(written[0])
        assert first.mode == "P" and first.size == (48, 32) and first.getpalette()[:12] == [
            0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
        annotation = Image.open(tmp_path / "Annotations" / "480p" / name / "00000.png")
        assert (np.asarray(first) == np.asarray(annotation)).all()
    assert set(np.unique(np.asarray(Image.open(out / "two" / "00005.png")))) == {0, 3, 7}


def test_a_network_and_two_processes(tmp_path):
    for i, name in enumerate(("ant", "bee", "cow")):
        draw_video(tmp_path, name, frames=4, seed=i)
    network = ["--arch", "vit_nano", "--patch_size", "8"]
    done = launch("eval_video_segmentation.py", "--data_path", tmp_path, *SMALL, *network, "--output_dir",
                  tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert run(tmp_path, tmp_path / "one", *network) == 0
    one, two = (json.loads((tmp_path / name / "eval_video_segmentation.json").read_text()) for name in ("one", "two"))
    for key in ("results", "per_sequence", "weights_sha256", "notes"):
        assert one[key] == two[key]
    assert one["arch"] == "vit_nano" and len(one["per_sequence"]) == 3
    for name in ("ant", "cow"):
        pixels = [np.asarray(Image.open(tmp_path / run / name / "00003.png")) for run in ("one", "two")]
        assert (pixels[0] == pixels[1]).all()


def test_features_of_a_network_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    network = features.load_network("", "test_vit", patch_size=8)
    patches = video_segmentation.patch_network(network, 8)
    x = torch.randn(2, 3, 32, 48)
    found = patches.forward(x)
    assert patches.info["patch_size"] == 16 and found.shape == (2, 2, 3, 64)
    with torch.no_grad():
        torch.testing.assert_close(found, network.forward.forward_features(x)[:, 1:].unflatten(1, (2, 3)))
    draw_video(tmp_path, "ant", frames=3)
    assert run(tmp_path, tmp_path / "out", "--arch", "test_vit") == 0
    assert json.loads((tmp_path / "out" / "eval_video_segmentation.json").read_text())["results"]
    one_size = timm.create_model("beit_base_patch16_224", embed_dim=24, depth=1, num_heads=2)
    patches = video_segmentation.patch_network(network._replace(forward=one_size), 8)
    with pytest.raises(Refused, match="--image_size: a frame of 48 x 32 pixels.*give another one"):
        patches.forward(x)


def test_one_frame_has_nothing_to_measure(tmp_path, capsys):
    draw_video(tmp_path, "still", frames=1)
    assert run(tmp_path, tmp_path / "out", "--arch", "pixels") == 0
    assert "nothing to measure" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "eval_video_segmentation.json").read_text())["results"] == []


@pytest.mark.parametrize("flags, message", [
    (("--image_size", "3"), "--image_size 3"),
    (("--arch", "resnet18"), "--arch resnet18: has no patch tokens"),
    (("--pretrained_weights", "nothing.pth"), "--arch pixels has no weights"),
    (("--arch", "vit_nano", "--pretrained_weights", "nothing.pth"), "nothing.pth: no such file"),
    (("--sequences", "dog"), "--sequences dog"),
    (("--data_path", "nowhere"), "nowhere"),
    (("--device", "cuda:99"), "--device cuda:99"),
    (("--output_dir", __file__), "is a file"),
    (("--output_dir", "/proc/out"), "--output_dir /proc/out: No such file or directory; choose"),
])
def test_bad_input_is_refused_in_one_line(flags, message, tmp_path, capsys):
    draw_video(tmp_path, "ant", frames=2)
    assert run(tmp_path, tmp_path / "out", "--arch", "pixels", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("eval_video_segmentation.py: error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*args):
        raise ValueError("operands could not be broadcast")

    draw_video(tmp_path, "ant", frames=3)
    monkeypatch.setattr(propagation, "propagate", broken)
    with pytest.raises(ValueError, match="could not be broadcast"):
        run(tmp_path, tmp_path / "out", "--arch", "pixels")


def test_a_frame_that_cannot_be_decoded_is_named(tmp_path, capsys):
    draw_video(tmp_path, "ant", frames=3)
    path = tmp_path / "JPEGImages" / "480p" / "ant" / "00001.png"
    path.write_bytes(path.read_bytes()[:-300])  # its header is whole
    assert run(tmp_path, tmp_path / "out", "--arch", "pixels") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "sequence ant" in error and "00001.png: " in error and "replace" in error


def test_published_command_line():
    flags = ("--pretrained_weights w.pth --arch vit_small --patch_size 8 --checkpoint_key teacher --data_path davis "
             "--output_dir out --n_last_frames 7 --size_mask_neighborhood 12 --topk 5 --bs 6").split()
    args = script.get_args_parser().parse_args(flags)
    default = script.get_args_parser().parse_args(["--data_path", "davis"])
    for name in ("n_last_frames", "size_mask_neighborhood", "topk", "bs", "checkpoint_key"):
        assert getattr(args, name) == getattr(default, name)
