import io
import os
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imagesets.decode
from imagesets.decode import MAX_PIXELS, Undecodable, decode, from_array, from_pil, suffixes

RNG = np.random.default_rng(0)
RGB = RNG.integers(256, size=(5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0].copy()
DEEP = RNG.integers(65536, size=(5, 7), dtype=np.uint16)


def saved(path: Path, image: Image.Image | np.ndarray, **options) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def pixels(source, in_chans: int = 3, **options) -> np.ndarray:
    """What `decode` gives, as an integer array (H, W, C)."""
    image = decode(source, in_chans, **options)
    assert image.dtype == torch.uint8 and image.shape[0] == in_chans
    assert image.permute(1, 2, 0).is_contiguous()
    return image.permute(1, 2, 0).numpy().astype(int)


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    """An image that JPEG keeps to a few levels."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, 128 + 0 * x], -1).astype(np.uint8)


def png_bytes(header: bytes, rows: list[bytes], **chunks: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    others = b"".join(chunk(kind.encode(), body) for kind, body in chunks.items())
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), others, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"".join(parts)


# ---- Channels ----


def test_rgb_is_kept_and_converted(tmp_path):
    path = saved(tmp_path / "a.png", RGB)
    assert (pixels(path) == RGB).all() and (pixels(path.read_bytes()) == RGB).all()
    luma = RGB @ np.array([0.299, 0.587, 0.114])
    assert abs(pixels(path, 1)[..., 0] - luma).max() <= 1
    assert (pixels(path, 4) == np.dstack([RGB, np.full((5, 7), 255)])).all()


def test_layout_is_channels_last():
    image = from_pil(Image.fromarray(RGB))
    assert image.stride() == (1, 21, 3) and image[None].is_contiguous(memory_format=torch.channels_last)
    image += 1  # its own memory, which may be written


def test_grey_one_bit_and_palette(tmp_path):
    path = saved(tmp_path / "grey.png", GREY)
    assert (pixels(path) == GREY[..., None]).all() and (pixels(path, 1)[..., 0] == GREY).all()
    bits = GREY > 127
    path = saved(tmp_path / "bits.png", Image.fromarray(bits))
    assert (pixels(path) == 255 * bits[..., None]).all() and (pixels(path, 1)[..., 0] == 255 * bits).all()
    path = saved(tmp_path / "palette.png", Image.fromarray(RGB).quantize(64))
    assert Image.open(path).mode == "P" and (pixels(path) == RGB).all()


def test_alpha_is_laid_on_white(tmp_path):
    alpha = np.array([0, 255, 128, 0, 255, 1, 254], np.uint8)[None].repeat(5, 0)
    path = saved(tmp_path / "rgba.png", np.dstack([RGB, alpha]))
    share = alpha[..., None] / 255
    white = RGB * share + 255 * (1 - share)
    assert abs(pixels(path) - white).max() <= 1
    assert (pixels(path)[:, 0] == 255).all() and (pixels(path)[:, 1] == RGB[:, 1]).all()
    assert abs(pixels(path, 1)[..., 0] - white @ [0.299, 0.587, 0.114]).max() <= 2
    assert (pixels(path, 4) == np.dstack([RGB, alpha])).all()
    path = saved(tmp_path / "la.png", np.dstack([GREY, alpha]))
    assert abs(pixels(path) - (GREY[..., None] * share + 255 * (1 - share))).max() <= 1
    path = saved(tmp_path / "a.webp", np.dstack([RGB, alpha]), lossless=True, exact=True)
    assert abs(pixels(path) - white).max() <= 1


def test_transparent_colours_are_laid_on_white(tmp_path):
    colours = [10, 20, 30, 200, 100, 50]
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    palette.putpalette(colours)
    for path in (
        saved(tmp_path / "p.png", palette, transparency=1),
        saved(tmp_path / "table.png", palette, transparency=bytes([255, 0])),
        saved(tmp_path / "p.gif", palette, transparency=1),
    ):
        assert pixels(path).tolist() == [[[10, 20, 30], [255] * 3], [[255] * 3, [10, 20, 30]]]
        assert pixels(path, 4)[..., 3].tolist() == [[255, 0], [0, 255]]
    pair = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    path = saved(tmp_path / "rgb.png", pair, transparency=(4, 5, 6))
    assert pixels(path).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    path = saved(tmp_path / "l.png", np.array([[7, 8]], np.uint8), transparency=7)
    assert pixels(path, 1).tolist() == [[[255], [8]]]
    path = saved(tmp_path / "1.png", Image.fromarray(np.array([[True, False]])), transparency=0)
    assert pixels(path, 1).tolist() == [[[255], [255]]]


def test_cmyk(tmp_path):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:8, :, 0], inks[8:, :, 1], inks[:, 8:, 3] = 255, 255, 255  # cyan above, magenta below, black at the right
    expected = np.zeros((16, 16, 3))
    expected[:8, :8], expected[8:, :8] = (0, 255, 255), (255, 0, 255)
    for name in ("a.tif", "a.jpg"):
        path = saved(tmp_path / name, Image.fromarray(inks, "CMYK"), quality=100)
        assert Image.open(path).mode == "CMYK" and abs(pixels(path) - expected).max() <= 3
        assert pixels(path, 4)[..., 3].min() == 255


# ---- Depth ----


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    expected = np.rint(DEEP / 257)
    big = DEEP.astype(">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P5 7 5 65535\n" + big)
    for path in (saved(tmp_path / "a.png", DEEP), saved(tmp_path / "a.tif", DEEP), tmp_path / "a.pgm"):
        assert (pixels(path, 1)[..., 0] == expected).all() and (pixels(path) == expected[..., None]).all()
        assert (pixels(path, 4)[..., :3] == expected[..., None]).all()
    dark = np.full((5, 7), 694, np.uint16)  # all of the range is scaled, not what the image uses of it
    assert (pixels(saved(tmp_path / "dark.tif", dark)) == 3).all()


def test_sixteen_bit_colour_is_scaled(tmp_path):
    deep = RNG.integers(65536, size=(5, 7, 3), dtype=np.uint16)
    rows = [row.astype(">u2").tobytes() for row in deep]
    (tmp_path / "a.png").write_bytes(png_bytes(struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0), rows))
    (tmp_path / "a.ppm").write_bytes(b"P6 7 5 65535\n" + b"".join(rows))
    for name in ("a.png", "a.ppm"):
        assert abs(pixels(tmp_path / name) - deep / 257).max() <= 1


def test_images_that_state_no_white_are_stretched(tmp_path):
    values = np.linspace(-3, 7, 35, dtype=np.float32).reshape(5, 7)
    expected = np.rint((values + 3) * 25.5)[..., None]
    whole = np.rint(values * 1e6).astype(np.int32)
    for path in (
        saved(tmp_path / "a.tif", values),
        saved(tmp_path / "a.pfm", values),
        saved(tmp_path / "b.tif", whole),
    ):
        assert abs(pixels(path) - expected).max() <= 1
        assert pixels(path, 1).min() == 0 and pixels(path, 1).max() == 255
    assert (pixels(saved(tmp_path / "one.tif", np.full((2, 2), 0.5, np.float32))) == 0).all()
    values[0, 0] = np.nan
    with pytest.raises(Undecodable, match="nan.tif: pixels that are not finite"):
        decode(saved(tmp_path / "nan.tif", values))


# ---- Orientation and frames ----

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "deep.png", "alpha.png"])
def test_exif_orientation(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = {"deep.png": DEEP, "alpha.png": np.dstack([RGB, GREY | 255])}.get(name, RGB)
    path = saved(tmp_path / name, array, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
    expected = UPRIGHT[orientation]((DEEP / 257).round()[..., None] if array is DEEP else RGB)
    assert (pixels(path) == expected).all()


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0rubbish", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1"]
)
def test_broken_exif_is_ignored(tmp_path, exif):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = saved(tmp_path / "a.jpg", smooth(), exif=exif, quality=95)
        assert abs(pixels(path) - smooth()).max() < 12


def test_orientation_out_of_range_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    assert (pixels(saved(tmp_path / "a.png", RGB, exif=exif)) == RGB).all()


def test_first_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], lossless=True)
        assert Image.open(path).n_frames == 3 and (pixels(path) == (255, 0, 0)).all()
    path = saved(tmp_path / "a.mpo", Image.fromarray(smooth()), save_all=True, append_images=frames, quality=95)
    assert Image.open(path).format == "MPO" and abs(pixels(path) - smooth()).max() < 12


def test_content_counts_not_the_suffix(tmp_path):
    saved(tmp_path / "a.png", RGB)
    path = (tmp_path / "a.png").rename(tmp_path / "äö with space 图.JPG")
    assert (pixels(path) == RGB).all()


def test_one_pixel_and_progressive_jpeg(tmp_path):
    assert pixels(saved(tmp_path / "a.png", RGB[:1, :1])).shape == (1, 1, 3)
    path = saved(tmp_path / "a.jpg", smooth(), progressive=True, quality=95)
    assert abs(pixels(path) - smooth()).max() < 12


# ---- Arrays ----


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2"])
def test_npy(tmp_path, channels, dtype):
    array = RNG.integers(np.iinfo(dtype).max + 1, size=(6, 5, channels)).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    expected = array if dtype == "uint8" else np.rint(array / 257)
    assert (pixels(tmp_path / "a.npy", channels) == expected).all()
    if channels == 1:
        np.save(tmp_path / "flat.npy", np.asfortranarray(array[..., 0]))
        assert (pixels(tmp_path / "flat.npy", 1) == expected).all() and (
            pixels(tmp_path / "flat.npy") == expected
        ).all()


def test_npy_converts_like_an_image(tmp_path):
    np.save(tmp_path / "a.npy", RGB)
    assert (pixels(tmp_path / "a.npy", 1) == pixels(saved(tmp_path / "a.png", RGB), 1)).all()


@pytest.mark.parametrize(
    "array, in_chans, message",
    [
        (np.zeros((2, 2, 3), np.float32), 3, "float32 array"),
        (np.zeros((2, 2), bool), 1, "bool array"),
        (np.zeros((0, 2, 3), np.uint8), 3, "array"),
        (np.zeros((1, 2, 2, 3), np.uint8), 3, "array"),
        (np.zeros((2, 2, 2), np.uint8), 3, "2 channels where --in_chans is 3"),
        (np.zeros((2, 2, 3), np.uint8), 5, "3 channels where --in_chans is 5"),
        (np.zeros((2, 9), np.uint8), 1, "more than 16 pixels"),
    ],
)
def test_arrays_that_do_not_fit(array, in_chans, message):
    with pytest.raises(Undecodable, match=message):
        from_array(array, in_chans, max_pixels=16)


def test_four_channels_of_a_given_range_are_no_alpha():
    bands = RNG.integers(10000, size=(5, 7, 4)).astype(np.float32)
    for in_chans in (1, 3):
        with pytest.raises(Undecodable, match=f"4 channels .* --in_chans is {in_chans}"):
            from_array(bands, in_chans, value_range=(0, 10000))
    expected = np.rint(bands.astype(float) * 0.0255)
    assert (from_array(bands, 4, value_range=(0, 10000)).permute(1, 2, 0).numpy() == expected).all()
    assert from_array(bands.astype(np.uint8), 3, value_range=(0, 10000)).shape == (3, 5, 7)


def test_npy_never_unpickles(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(Undecodable, match="a.npy: "):
        decode(tmp_path / "a.npy")


# ---- Files that can't be decoded ----


def broken_files() -> dict[str, bytes]:
    buffer = io.BytesIO()
    Image.fromarray(smooth()).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    header, rows = struct.pack(">IIBBBBB", 7, 5, 8, 2, 0, 0, 0), [row.tobytes() for row in RGB]
    png = png_bytes(header, rows)
    middle = png.index(b"IDAT") + 20
    buffer = io.BytesIO()
    np.save(buffer, RGB)
    tall = struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    gif = b"GIF89a%s\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0%s\0\2\2L\1\0;"
    return {
        "empty.jpg": b"",
        "text.jpg": b"this is not an image",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "zeros.jpg": jpeg[:200] + bytes(len(jpeg) - 200),
        "truncated.png": png[: len(png) - 40],
        "noend.png": png[:-12] + struct.pack(">I", 999) + b"IDAT",
        "broken.png": png[:middle] + bytes(byte ^ 255 for byte in png[middle : middle + 20]) + png[middle + 20 :],
        "bomb.png": png_bytes(tall, [bytes(3750)] * 10),
        "bomb.gif": gif % (b"\xff\xff\xff\xff", b"\xff\xff\xff\xff"),
        "zero.gif": gif % (b"\0\0\1\0", b"\0\0\1\0"),
        "short.npy": buffer.getvalue()[:-5],
        "head.npy": buffer.getvalue()[:20],
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    }


@pytest.mark.parametrize("name", broken_files())
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_broken_files_raise_their_name(tmp_path, name, in_chans):
    path = tmp_path / name
    path.write_bytes(broken_files()[name])
    with pytest.raises(Undecodable) as error:
        decode(path, in_chans)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and "<_io" not in message
    with pytest.raises(Undecodable, match="<bytes>: "):
        decode(path.read_bytes(), in_chans)


def test_every_truncation_raises_or_is_whole(tmp_path):
    for suffix, options in ((".png", {}), (".gif", {}), (".bmp", {}), (".tif", {}), (".webp", {"lossless": True})):
        path = saved(tmp_path / f"a{suffix}", Image.fromarray(RGB).quantize(64).convert("RGB"), **options)
        whole, expected = path.read_bytes(), pixels(path)
        for length in range(0, len(whole), 7):
            try:
                found = pixels(whole[:length])
            except Undecodable:
                continue
            assert (found == expected).all()


def test_size_limit(tmp_path):
    path = saved(tmp_path / "a.png", RGB)
    assert (pixels(path, max_pixels=35) == RGB).all()
    with pytest.raises(Undecodable, match="a.png: .*35 pixels.* limit of 34"):
        decode(path, max_pixels=34)
    with pytest.raises(Undecodable, match="a.png: "):
        decode(path, max_pixels=10)
    icon = saved(tmp_path / "a.ico", Image.new("RGB", (64, 64)), sizes=[(64, 64)])
    with pytest.raises(Undecodable, match="a.ico: "):
        decode(icon, max_pixels=1000)


@pytest.mark.parametrize("by", [1, 2, 4, 8])
def test_jpeg_is_decoded_at_a_reduced_size(tmp_path, by):
    """Near the full image's averages over by x by pixels; turned by EXIF after that; other formats stay whole."""
    rows, columns = np.mgrid[:160, :240]
    pixels = np.repeat((rows + columns)[..., None] // 2, 3, 2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    asked = []
    found = decode(tmp_path / "a.jpg", reduction=lambda h, w: asked.append({h, w}) or by)
    expected = pixels.reshape(160 // by, by, 240 // by, by, 3).mean((1, 3))
    turned = np.rot90(expected, -1).transpose(2, 0, 1)
    assert found.shape == turned.shape and asked[0] == {160, 240}
    np.testing.assert_allclose(found, turned, atol=2.5)
    assert decode(tmp_path / "a.png", reduction=lambda h, w: by).shape == (3, 160, 240)


def test_pillow_is_left_as_it_was(tmp_path):
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    decode(saved(tmp_path / "a.png", RGB))
    with pytest.raises(Undecodable):
        decode(b"rubbish")
    assert limit == Image.MAX_IMAGE_PIXELS and filters == warnings.filters and limit * 2 + 1 >= MAX_PIXELS


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(Undecodable, match="none.png: No such file"):
        decode(tmp_path / "none.png")
    with pytest.raises(Undecodable, match="Is a directory"):
        decode(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_limit_of_open_files_is_no_fault_of_the_image(tmp_path):
    """It would be replaced by another one, and the run be another run."""
    import resource

    path, limits = saved(tmp_path / "a.jpg", RGB), resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = os.open(path, os.O_RDONLY)  # the lowest free number: with it as the limit no other file can be opened
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 1, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            decode(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(opened)


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    try:
        Path(name).write_bytes(b"rubbish")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with pytest.raises(Undecodable) as error:
        decode(name)
    assert "\\xff.png: not an image" in str(error.value).encode().decode()


def test_suffixes():
    assert {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".webp", ".npy", ".pfm", ".mpo"} <= suffixes()
    assert not {".txt", ".pdf", ".eps", ".h5", ".mpg", ".palm"} & suffixes()
    assert suffixes(7) == {".npy"}


def test_other_channels_need_arrays(tmp_path):
    with pytest.raises(Undecodable, match="a.png: .*use .npy"):
        decode(saved(tmp_path / "a.png", RGB), 5)


@pytest.mark.parametrize("damage", ["none", "cut short", "bytes changed", "bytes lost"])
def test_jpeg_is_what_pillow_makes_of_it(tmp_path, damage):
    """Pixels alike, also of damaged files, and refused when Pillow refuses."""
    rng = np.random.default_rng(1)
    whole = saved(tmp_path / "a.jpg", rng.integers(256, size=(90, 70, 3), dtype=np.uint8)).read_bytes()
    refused = 0
    for _ in range(1 if damage == "none" else 30):
        content, at = bytearray(whole), int(rng.integers(640, len(whole) - 40))
        if damage == "cut short":
            del content[at:]
        elif damage == "bytes changed":
            content[at] = rng.integers(256)
        elif damage == "bytes lost":
            del content[at : at + int(rng.integers(1, 40))]
        try:
            expected = from_pil(Image.open(io.BytesIO(content)))
        except OSError as error:
            refused += 1
            with pytest.raises(Undecodable, match=re.escape(str(error))):
                decode(bytes(content))
        else:
            assert torch.equal(decode(bytes(content)), expected)
            assert torch.equal(imagesets.decode.plain_jpeg(bytes(content)), expected)
    assert refused == 30 * (damage == "cut short")


def test_without_torchvisions_decoder_pillow_decodes(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.jpg", smooth())
    expected = decode(path)
    monkeypatch.setattr(imagesets.decode, "jpeg_decoder", lambda: None)
    assert torch.equal(decode(path), expected)
