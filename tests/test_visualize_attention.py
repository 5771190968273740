"""The script end to end on a tiny random network: each source, each figure, each wrong flag."""

import argparse
import sys

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from processes import launch
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image

import atomic
import visualize_attention
from imagesets import shapes
from protocols import attention_video, dense, sheets, transforms
from protocols.features import Network
from vision_transformer import VisionTransformer, vit_tiny

PATCH = 8
INFO = {"arch": "vit_tiny", "patch_size": PATCH, "embed_dim": 24, "in_chans": 3, "global_crops_size": 32,
        "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def use(model, info, monkeypatch):
    """The script evaluates this network."""
    network = Network(model.eval(), info, {"arch": info["arch"], "weights": None}, torch.device("cpu"))
    monkeypatch.setattr("protocols.features.load_network", lambda *args, **options: network)
    return network


@pytest.fixture
def tiny(monkeypatch):
    """A network of 24 channels, two blocks and three heads."""
    torch.manual_seed(0)
    model = VisionTransformer([32], PATCH, embed_dim=24, depth=2, num_heads=3, qkv_bias=True, num_register_tokens=1)
    return use(model, INFO, monkeypatch)


def run(*flags):
    flags = [str(flag) for flag in flags]
    return visualize_attention.main(visualize_attention.get_args_parser().parse_args(["--device", "cpu", *flags]))


def write_image(path, height, width, seed=0):
    """A bright square on noise, saved as a PNG."""
    pixels = np.random.default_rng(seed).integers(0, 90, (height, width, 3)).astype(np.uint8)
    pixels[height // 4:height // 2, width // 4:width // 2] = 240
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def sizes(folder):
    """{name: (width, height)} of every figure in a folder."""
    return {path.name: Image.open(path).size for path in sorted(folder.glob("[!.]*"))}


# ---- sizes


@pytest.mark.parametrize("height, width, image_size, scaled, seen", [
    (300, 400, [480], (480, 640), (480, 640)),
    (400, 267, [480], (719, 480), (712, 480)),  # what is left of the last patch is cut off
    (100, 100, [50], (50, 50), (48, 48)),
    (300, 403, [], (300, 403), (296, 400)),  # no number: the image's own size
    (1, 1000, [16], (16, 16000), (16, 16000)),
    (300, 400, [64, 64], (64, 64), (64, 64)),  # two numbers: exactly these
    (300, 400, [70, 90], (70, 90), (64, 88)),
])
def test_input_sizes(height, width, image_size, scaled, seen):
    assert dense.input_sizes(height, width, image_size, PATCH) == (scaled, seen)


@pytest.mark.parametrize("image_size", [[480], [96], [64, 200]])
@pytest.mark.parametrize("height, width", [(300, 400), (401, 267), (90, 91)])
def test_patch_of_point_is_where_a_marked_pixel_lands(height, width, image_size):
    for y, x in [(0, 0), (height - 1, 0), (0, width - 1), (height // 2, width // 3), (37, 61)]:
        image = torch.zeros(1, height, width, dtype=torch.uint8)
        image[:, max(0, y - 2):y + 3, max(0, x - 2):x + 3] = 255  # wide enough to survive the scaling
        seen = dense.resize_to_patches(image, image_size, PATCH)[0]
        patches = seen.float().unflatten(0, (-1, PATCH)).unflatten(2, (-1, PATCH)).mean((1, 3))
        row, column = dense.patch_of_point((x, y), height, width, image_size, PATCH)
        around = patches[max(0, row - 1):row + 2, max(0, column - 1):column + 2]
        assert around.max() == patches.max() > 0


def test_patch_of_point_by_hand():
    """300 x 400 becomes 480 x 640: pixel (37, 61) has its centre at (60, 98.4), which is column 7 and row 12."""
    assert dense.patch_of_point((37, 61), 300, 400, [480], PATCH) == (12, 7)
    assert dense.patch_of_point((399, 299), 300, 400, [480], PATCH) == (59, 79)
    assert dense.patch_of_point((99, 149), 150, 100, [30, 30], PATCH) == (2, 2)  # 24 of 30 are seen


# ---- one image


def test_default_image_is_of_the_embedded_set(tiny, tmp_path, capsys):
    run("--output_dir", tmp_path / "new" / "folder", "--image_size", 64)
    found = sizes(tmp_path / "new" / "folder")
    assert set(found) == {"img.png", "attn-mean.png", "overlay.png", *(f"attn-head{head}.png" for head in range(3))}
    assert set(found.values()) == {(64, 64)}
    assert "3 heads on 8 x 8 patches: 6 figures" in capsys.readouterr().out


def test_portrait_keeps_its_aspect_ratio_and_every_figure_is_written(tiny, tmp_path):
    path = write_image(tmp_path / "portrait.png", 150, 100)
    run("--image_path", path, "--output_dir", tmp_path / "out", "--image_size", 64, "--threshold", 0.6, "--pca",
        "--point", 30, 60)
    found = sizes(tmp_path / "out")
    assert set(found) == {"img.png", "attn-mean.png", "overlay.png", "pca.png", "similarity.png"} | {
        f"{kind}{head}.png" for kind in ("attn-head", "mask_th0.6_head") for head in range(3)}
    masks = {name for name in found if name.startswith("mask")}
    assert {found.pop(name) for name in masks} == {(500, 500)} and set(found.values()) == {(64, 96)}


def test_two_numbers_are_height_and_width(tiny, tmp_path):
    run("--image_path", write_image(tmp_path / "in.png", 150, 100), "--output_dir", tmp_path, "--image_size", 40, 80)
    assert sizes(tmp_path)["img.png"] == (80, 40)


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
def test_head_figures_show_the_networks_own_attention(tiny, tmp_path, layer):
    run("--output_dir", tmp_path, "--image_size", 64, "--layer", layer)
    image = Image.fromarray(shapes.draw(0, 480)[0]).resize((64, 64), Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    attention = tiny.forward.get_attention_maps(((image / 255 - 0.5) / 0.25)[None], [layer])[0][0, :, 0, 2:].detach()
    for head in range(3):
        values = attention[head].view(8, 8)
        expected = sheets.heatmap(((values - values.min()) / (values.max() - values.min())).numpy())
        drawn = np.array(Image.open(tmp_path / f"attn-head{head}.png")).astype(int)
        assert np.abs(drawn - expected.repeat(PATCH, 0).repeat(PATCH, 1)).max() <= 3  # a step of the colours


def test_images_of_one_channel(tiny, tmp_path, monkeypatch):
    grey = VisionTransformer([32], PATCH, in_chans=1, embed_dim=24, depth=1, num_heads=3).eval()
    info = INFO | {"in_chans": 1, "mean": (0.5,), "std": (0.25,)}
    use(grey, info, monkeypatch)
    for source in ([], ["--image_path", write_image(tmp_path / "in.png", 60, 40)]):
        run("--output_dir", tmp_path / "out", "--image_size", 32, *source)
    pixels = np.array(Image.open(tmp_path / "out" / "img.png"))
    assert pixels.shape == (48, 32, 3) and (pixels[..., 0] == pixels[..., 2]).all()


# ---- many images


def test_folder_becomes_a_sheet_and_what_cannot_be_read_is_named(tiny, tmp_path, capsys):
    for i, (height, width) in enumerate([(60, 40), (40, 60), (50, 50)]):
        write_image(tmp_path / "in" / f"{i}.png", height, width)
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    run("--images", tmp_path / "in", "--output_dir", tmp_path / "out", "--image_size", 32, "--pca", "--threshold", 0.6)
    assert sizes(tmp_path / "out") == {  # image, mask, mean and 3 heads; a row is as high as its image
        "attention_sheet.png": (6 + 6 * 166, 32 + 166 + 113 + 166 + 3 * 16),  # 16: names
        "pca_sheet.png": (6 + 6 * 166, 6 + 166 + 16)}
    out = capsys.readouterr().out
    assert "left out" in out and "broken.jpg" in out and "3 of 4 images" in out


def test_a_strip_of_too_many_patches_is_refused_or_left_out(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PATCHES", 16)
    Image.new("RGB", (96, 6)).save(tmp_path / "strip.png")
    assert run("--image_path", tmp_path / "strip.png", "--image_size", 2 * PATCH, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--image_size {2 * PATCH}: an image of 96 x 6 pixels" in error
    assert "32 x 2 patches" in error and "lower --image_size" in error
    assert run("--image_path", tmp_path / "strip.png", "--image_size", PATCH, "--output_dir", tmp_path / "out") == 0
    Image.new("RGB", (40, 40)).save(tmp_path / "square.png")
    assert run("--images", tmp_path, "--image_size", 2 * PATCH, "--output_dir", tmp_path / "out") == 0
    assert f"left out: {tmp_path / 'strip.png'}: " in capsys.readouterr().out


@pytest.mark.parametrize("size, flags, message", [
    ((24, 400), (), "an image of 400 x 24 pixels (width x height) makes 50 x 3 patches, more than 16; lower --image_"),
    ((24, 400), ("--resize", 16), "--image_size 16: an image of 400 x 24 pixels"),
    ((6, 40), (), "40 x 6 pixels (width x height) is smaller than a patch of 8; give --image_size 8 or more"),
])
def test_frames_of_too_many_patches_or_none_are_refused(tiny, tmp_path, capsys, monkeypatch, size, flags, message):
    pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg: pip install imageio-ffmpeg")
    monkeypatch.setattr(transforms, "MAX_PATCHES", 16)
    write_image(tmp_path / "in" / "0.png", *size)
    assert run("--video", tmp_path / "in", "--output_dir", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not (tmp_path / "out").exists()


def test_of_many_images_some_are_chosen_evenly(tiny, tmp_path, monkeypatch):
    chosen = []
    original = visualize_attention.checking.open_checked

    def spying(*args, **options):
        source = original(*args, **options)
        load = source.load
        source.load = lambda i: (chosen.append(i), load(i))[1]
        return source

    monkeypatch.setattr(visualize_attention.checking, "open_checked", spying)
    run("--images", "shapes:9x32", "--max_images", 3, "--output_dir", tmp_path, "--image_size", 32)
    assert chosen == [0, 4, 8]


@pytest.mark.parametrize("name", ["img.png", "attn-head0.png", "overlay.png", "mask_th0.6_head0.png"])
def test_the_image_is_not_replaced_by_a_figure(tiny, tmp_path, capsys, name):
    write_image(tmp_path / name, 40, 40)
    before = (tmp_path / name).read_bytes()
    assert run("--image_path", tmp_path / name, "--output_dir", tmp_path, "--threshold", 0.6) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--image_path {tmp_path / name}: " in error and "another --output_dir" in error
    assert [file.name for file in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == before


def test_many_images_are_continued_on_further_sheets(tiny, tmp_path):
    run("--images", "shapes:19x32", "--max_images", 18, "--output_dir", tmp_path, "--image_size", 32, "--pca")
    found = sizes(tmp_path)
    assert set(found) == {f"{kind}_sheet{page}.png" for kind in ("attention", "pca") for page in ("", "_2")}
    assert found["attention_sheet.png"][1] == 32 + 16 * 182 and found["attention_sheet_2.png"][1] == 32 + 2 * 182
    assert found["pca_sheet.png"][1] == 6 + 4 * 182 and found["pca_sheet_2.png"][1] == 6 + 182


def test_the_size_of_a_sheet_follows_the_weights_and_the_data(tiny, tmp_path, monkeypatch):
    shown, look = [], dense.look
    monkeypatch.setattr(dense, "look", lambda network, image, size, *a, **o: (shown.append(size),
                                                                          look(network, image, size, *a, **o))[1])
    run("--images", "shapes:2x40", "--output_dir", tmp_path)
    run("--images", "shapes:2x30", "--output_dir", tmp_path)
    assert shown == [[64], [64], [56], [56]]  # 32 x 480 / 224 = 68.6 in patches of 8; twice 30


# ---- video


@pytest.fixture
def ffmpeg():
    return pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg: pip install imageio-ffmpeg")


def write_video(ffmpeg, path, frames=7, height=48, width=64, fps=10):
    writer = ffmpeg.write_frames(str(path), (width, height), fps=fps, macro_block_size=2)
    writer.send(None)
    for i in range(frames):
        frame = np.full((height, width, 3), 30, dtype=np.uint8)
        frame[10:30, 4 * i:4 * i + 20] = (200, 60, 60)
        writer.send(frame)
    writer.close()
    return path


def read_video(ffmpeg, path):
    reader = ffmpeg.read_frames(str(path))
    about = next(reader)
    width, height = about["size"]
    return about["fps"], np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_video_in_and_out(tiny, tmp_path, ffmpeg, capsys):
    video = write_video(ffmpeg, tmp_path / "in.mp4")
    run("--video", video, "--output_dir", tmp_path / "out", "--image_size", 32)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"attention", "attention.mp4", "frames", "video.mp4"}
    fps, frames = read_video(ffmpeg, tmp_path / "out" / "attention.mp4")
    assert fps == 10 and frames.shape == (7, 32, 2 * 40, 3)  # 48 x 64 -> 32 x 43, cut to 32 x 40, twice
    left = frames[:, 8:18, :40, 0].mean(1)  # the square goes to the right in the frames on the left
    assert (np.diff([(row > 120).nonzero()[0].mean() for row in left]) > 0).all()
    assert "7 frames, 10 per second" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_published_flags_of_video_generation_write_its_files(tiny, tmp_path, ffmpeg, suffix):
    """Maps of the mean attention in the frames' own size, and the video of the maps alone, at 30 frames per second."""
    for i in range(3):
        write_image(tmp_path / "in" / f"frame{i}.jpg", 45, 70, seed=i)
    run("--input_path", tmp_path / "in", "--output_path", tmp_path / "out", "--video_format", suffix)
    maps = sorted((tmp_path / "out" / "attention").glob("[!.]*"))
    assert [path.name for path in maps] == [f"attn-frame{i}.jpg" for i in range(3)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"attention", f"attention.{suffix}",
                                                                    f"video.{suffix}"}
    fps, frames = read_video(ffmpeg, tmp_path / "out" / f"video.{suffix}")
    assert fps == 30 and frames.shape == (3, 40, 64, 3)  # 45 x 70 in whole patches of 8
    for i, path in enumerate(maps):
        image = torch.from_numpy(np.array(Image.open(tmp_path / "in" / f"frame{i}.jpg"))[:40, :64]).permute(2, 0, 1)
        heat = tiny.forward.get_last_selfattention(((image / 255 - 0.5) / 0.25)[None])[0, :, 0, 2:].mean(0).view(5, 8)
        expected = colormaps["inferno"](((heat - heat.min()) / (heat.max() - heat.min())).detach().numpy(), bytes=True)
        drawn = np.array(Image.open(path)).astype(int)[4::8, 4::8]  # the centres of the patches
        assert np.abs(drawn - expected[..., :3]).mean() < 8  # JPEG
        assert np.abs(frames[i][4::8, 4::8].astype(int) - drawn).mean() < 16  # the codec halves colours


def test_published_flags_of_video_generation_on_a_file(tiny, tmp_path, ffmpeg):
    """The frames of a file are kept; its frames per second count; --resize takes height and width."""
    video = write_video(ffmpeg, tmp_path / "in.mp4", frames=2)
    run("--input_path", video, "--output_path", tmp_path / "out", "--resize", 24, 40)
    assert sorted(sizes(tmp_path / "out" / "frames").items()) == [(f"frame-000{i}.jpg", (64, 48)) for i in (0, 1)]
    assert sizes(tmp_path / "out" / "attention")["attn-frame-0001.jpg"] == (40, 24)
    fps, frames = read_video(ffmpeg, tmp_path / "out" / "video.mp4")
    assert fps == 10 and frames.shape == (2, 24, 40, 3)
    source = read_video(ffmpeg, video)[1]
    kept = np.stack([np.array(Image.open(tmp_path / "out" / "frames" / f"frame-000{i}.jpg")) for i in (0, 1)])
    assert np.abs(kept.astype(int) - source).mean() < 3


def test_frames_of_somebody_else_are_not_replaced(tiny, tmp_path, ffmpeg, capsys):
    video = write_video(ffmpeg, tmp_path / "in.mp4", frames=2)
    mine = write_image(tmp_path / "out" / "frames" / "frame-0001.jpg", 9, 9)
    before = mine.read_bytes()
    assert run("--video", video, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"--output_dir {tmp_path / 'out'}: frames/frame-0001.jpg" in error and error.count("\n") == 1
    assert mine.read_bytes() == before and [p.name for p in (tmp_path / "out").iterdir()] == ["frames"]
    mine.rename(mine.with_name("other.jpg"))
    for _ in range(2):  # its own frames it replaces
        assert run("--video", video, "--output_dir", tmp_path / "out") == 0
    assert set(atomic.outputs_in(mine.parent)) == {b"frame-0000.jpg", b"frame-0001.jpg"}  # not other.jpg


def test_video_only_makes_a_video_of_maps_without_a_network(tmp_path, ffmpeg, monkeypatch):
    monkeypatch.setattr("protocols.features.load_network", None)
    for i, name in enumerate(["attn-2.png", "attn-10.png", "other.png"]):  # the last one is no map
        (tmp_path / "maps").mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 48 - 8 * i, 3), 50 + 100 * i, dtype=np.uint8)).save(tmp_path / "maps" / name)
    atomic.mark_output(tmp_path / "maps" / "attn-10.png")  # as visualize_attention.py does with the maps that it writes
    run("--video_only", "--input_path", tmp_path / "maps", "--output_path", tmp_path / "out", "--fps", 12)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["video.mp4"]
    fps, frames = read_video(ffmpeg, tmp_path / "out" / "video.mp4")
    assert fps == 12 and frames.shape == (2, 32, 48, 3)
    assert np.abs(frames.mean((1, 2, 3)) - (50, 150)).max() < 5


def test_frames_of_one_name_do_not_overwrite_each_other(tiny, tmp_path, ffmpeg):
    for folder in "ab":
        write_image(tmp_path / "in" / folder / "1.png", 32, 32)
    run("--video", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "attention").glob("[!.]*")) == [
        "attn-0000-1.jpg", "attn-0001-1.jpg"]


def test_frames_are_taken_in_the_order_of_their_numbers(tiny, tmp_path, ffmpeg):
    for i, number in enumerate([1, 2, 10]):
        image = np.full((32, 32, 3), 60 + 60 * i, dtype=np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "in" / f"frame{number}.png")
    run("--video", tmp_path / "in", "--output_dir", tmp_path, "--image_size", 32, "--fps", 5, "--pca", "--point", 3, 4,
        "--threshold", 0.5)
    fps, frames = read_video(ffmpeg, tmp_path / "attention.mp4")
    assert fps == 5 and frames.shape == (3, 32, 5 * 32, 3)
    assert np.abs(frames[:, 4:28, 4:28].mean((1, 2, 3)) - (60, 120, 180)).max() < 5


def test_video_is_streamed(tiny, tmp_path):
    """A frame is decoded when its row of figures is asked for, and not before."""
    taken = []

    def frames():
        for i in range(1_000_000):
            taken.append(i)
            yield str(i), torch.zeros(3, 32, 32, dtype=torch.uint8)

    rows = attention_video.video_rows(tiny, frames(), [32])
    assert taken == []
    for count in (1, 2, 3):
        assert next(rows).row.shape == (32, 64, 3) and len(taken) == count


def test_colours_and_token_of_a_video_are_the_first_frames(tiny):
    rng = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 256, (3, 32, 32), generator=rng, dtype=torch.uint8) for _ in range(2))
    after_first, after_itself = ([drawn.row for drawn in attention_video.video_rows(
        tiny, enumerate(frames), [32], pca=True, point=(9, 20))] for frames in ([first, second], [second, second]))
    assert (after_first[1][:, :64] == after_itself[1][:, :64]).all()  # image and attention: of the frame alone
    assert (after_first[1][:, 64:] != after_itself[1][:, 64:]).any()


def test_missing_ffmpeg_names_the_command(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert run("--video", write_image(tmp_path / "in.png", 9, 9), "--output_dir", tmp_path / "out") == 2
    assert "pip install imageio-ffmpeg" in capsys.readouterr().err


# ---- wrong flags


def exit_code(*flags):
    """The script's, or that of its parser."""
    try:
        return run(*flags)
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize("flags, named", [
    (["--image_path", "missing.png"], "--image_path missing.png"),
    (["--image_path", "folder"], "--images"),
    (["--image_path", "text.jpg"], "--image_path text.jpg"),
    (["--images", "missing"], "--images"),
    (["--images", "folder"], "--images"),
    (["--images", "broken"], "--images broken"),
    (["--video", "missing.mp4"], "--video missing.mp4"),
    (["--video", "text.jpg"], "--video text.jpg"),
    (["--image_path", "good.png", "--video", "text.jpg"], "--image_path and --video"),
    (["--images", "shapes:2", "--point", "1", "1"], "--point with --images"),
    (["--image_path", "good.png", "--point", "40", "1"], "--point 40 1"),
    (["--image_path", "good.png", "--point", "1", "-1"], "--point"),
    (["--image_size", "7"], "--image_size 7"),
    (["--image_size", "64", "7"], "--image_size 7"),
    (["--image_size", "64", "64", "64"], "--image_size 64 64 64"),
    (["--image_size", "0"], "--image_size"),
    (["--layer", "2"], "--layer 2"),
    (["--layer", "-3"], "--layer -3"),
    (["--threshold", "0"], "--threshold"),
    (["--threshold", "1.5"], "--threshold"),
    (["--max_images", "0"], "--max_images"),
    (["--fps", "0"], "--fps"),
    (["--video_only"], "--video_only"),
    (["--video_only", "--video", "good.png"], "--video good.png"),
    (["--video_only", "--video", "folder"], "--video"),
    (["--video_only", "--video", "broken"], "--video broken"),
    (["--video_format", "gif"], "--video_format"),
    (["--device", "gpu"], "--device gpu"),
    (["--output_dir", "good.png"], "--output_dir good.png"),
    (["--output_dir", "/proc/out"], "--output_dir /proc/out"),
    (["--images", "shapes:1x32", "--output_dir", "/proc/out"], "--output_dir /proc/out"),
    (["--output_dir", "good.png/below"], "--output_dir good.png/below"),
])
def test_a_wrong_flag_is_named_before_anything_is_written(tiny, tmp_path, monkeypatch, capsys, flags, named):
    if "--video" in flags:
        pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg: pip install imageio-ffmpeg")
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "good.png", 60, 40)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "text.jpg").write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    assert exit_code(*flags) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags, named", [
    (["--arch", "resnet18"], "--arch resnet18"),
    (["--arch", "vit_smal"], "vit_small"),
    (["--pretrained_weights", "missing.pth"], "missing.pth"),
])
def test_a_network_without_attention_or_weights_is_named(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_patch_tokens_of_a_network_of_timm_are_drawn(tmp_path, capsys):
    pytest.importorskip("timm")
    path = write_image(tmp_path / "photos" / "a.png", 60, 90)
    write_image(tmp_path / "photos" / "b.png", 70, 40)
    timms = ("--arch", "test_vit", "--image_size", 64)
    assert run(*timms, "--image_path", path, "--pca", "--point", 3, 4, "--output_dir", tmp_path / "one") == 0
    assert sizes(tmp_path / "one") == dict.fromkeys(["img.png", "pca.png", "similarity.png"], (96, 64))
    assert run(*timms, "--images", tmp_path / "photos", "--pca", "--output_dir", tmp_path / "sheet") == 0
    assert list(sizes(tmp_path / "sheet")) == ["pca_sheet.png"]
    capsys.readouterr()
    for more in ([], ["--pca", "--threshold", 0.6], ["--pca", "--layer", 0], ["--pca", "--video", tmp_path / "photos"]):
        assert run(*timms, *more, "--output_dir", tmp_path / "none") == 2
        error = capsys.readouterr().err
        assert "--arch test_vit: " in error and "give --pca" in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_a_bug_keeps_its_traceback(tiny, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(dense, "look", broken)
    for source in ([], ["--images", "shapes:2x32"]):
        with pytest.raises(ValueError, match="could not be broadcast"):
            run("--output_dir", tmp_path, "--image_size", 32, *source)


# ---- as a command


def test_command_without_weights_says_so(tmp_path):
    done = launch("visualize_attention.py", "--arch", "vit_tiny", "--patch_size", 16, "--image_size", 64, "--device",
                  "cpu", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("random weights") == 1 and len(sizes(tmp_path)) == 6


@pytest.mark.parametrize("image_size", [[], [96], [100], [56, 88]])
def test_published_arguments_give_the_published_pixels(tmp_path, capsys, image_size):
    """torchvision's resize of a Pillow image, cut to whole patches; its grid for img.png; matplotlib's picture of each
    head's attention, every patch repeated; masks in a figure of 5 x 5 inches at 100 dots per inch."""
    from matplotlib import pyplot

    torch.manual_seed(0)
    model = vit_tiny(patch_size=16, img_size=64).eval().requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv.weight.mul_(8)  # maps that are not nearly uniform
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    args = argparse.Namespace(arch="vit_tiny", patch_size=16, global_crops_size=64)
    teacher = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"teacher": teacher, "student": {}, "epoch": 1, "args": args}, tmp_path / "checkpoint.pth")
    path = write_image(tmp_path / "in.png", 150, 101)
    size = ["--image_size", *image_size] if image_size else []
    run("--pretrained_weights", tmp_path / "checkpoint.pth", "--image_path", path, "--output_dir", tmp_path / "out",
        "--threshold", 0.6, *size)
    assert "random weights" not in capsys.readouterr().out

    image = v2.Resize(image_size or (480, 480))(Image.open(path).convert("RGB"))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    height, width = (side // 16 * 16 for side in pixels.shape[1:])
    pixels = pixels[:, :height, :width]
    x = v2.functional.normalize(pixels / 255, mean, std)[None]
    save_image(make_grid(x, normalize=True, scale_each=True), tmp_path / "img.png")
    drawn = np.array(Image.open(tmp_path / "out" / "img.png"))
    assert np.abs(drawn.astype(int) - np.array(Image.open(tmp_path / "img.png"))).max() <= 1
    attention = model.get_last_selfattention(x)[0, :, 0, 1:].view(3, height // 16, width // 16).numpy()
    for head, values in enumerate(attention):
        pyplot.imsave(tmp_path / "head.png", values.repeat(16, 0).repeat(16, 1))
        expected = np.array(Image.open(tmp_path / "head.png").convert("RGB")).astype(int)
        drawn = np.array(Image.open(tmp_path / "out" / f"attn-head{head}.png"))
        assert drawn.shape == expected.shape and np.abs(drawn - expected).max() <= 3  # a step of the colours
        mask = Image.open(tmp_path / "out" / f"mask_th0.6_head{head}.png")
        shown = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((500, 500), Image.Resampling.BICUBIC)
        held = sheets.threshold_mask(values, 0.6)
        assert mask.size == (500, 500) and (np.array(mask) == sheets.mask_overlay(np.array(shown), held)).all()
