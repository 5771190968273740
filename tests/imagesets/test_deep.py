"""Images of more than 8 bits, against values computed from the formats' own rules."""

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from test_decode import pixels, png_bytes, saved

import utils
from imagesets import loaders, remarks
from imagesets.decode import Undecodable, decode
from imagesets.sources import open_images

RNG = np.random.default_rng(0)
TWELVE = RNG.permutation(4096)[:35].reshape(5, 7).astype(np.uint16)


def deep_png(array: np.ndarray, **chunks: bytes) -> bytes:
    """A 16-bit PNG file: grey (H, W), grey and alpha (H, W, 2), RGB (H, W, 3) or RGBA (H, W, 4)."""
    kind = {2: 0, 3: {2: 4, 3: 2, 4: 6}.get(array.shape[-1])}[array.ndim]
    rows = [row.astype(">u2").tobytes() for row in array]
    return png_bytes(struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, kind, 0, 0, 0), rows, **chunks)


def tiff(array: np.ndarray, bits: int = 0, sample_format: int = 1, packed: bytes = b"", **tags: object) -> bytes:
    """A little-endian TIFF file of one strip, written from the specification. tags: photometric, no_data."""
    body, height, width = packed or array.tobytes(), *array.shape
    text = str(tags.get("no_data", "")).encode() + b"\0"
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 1, bits or 8 * array.itemsize), (259, 3, 1, 1),
               (262, 3, 1, tags.get("photometric", 1)), (273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, height),
               (279, 4, 1, len(body)), (339, 3, 1, sample_format)]
    if "no_data" in tags:
        entries.append((42113, 2, len(text), 8 + len(body)))
    assert len(text) > 4 or "no_data" not in tags
    directory = 8 + len(body) + len(text) + len(text) % 2
    head = struct.pack("<2sHI", b"II", 42, directory) + body + text + bytes(len(text) % 2)
    return head + struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + bytes(4)


# ---- What files declare ----


def test_colour_keys_are_compared_at_all_16_bits():
    grey = np.array([[0x1234, 0x1235, 0x1334]], np.uint16)
    file = deep_png(grey, tRNS=struct.pack(">H", 0x1234))
    assert pixels(file, 1)[..., 0].tolist() == [[255, round(0x1235 / 257), round(0x1334 / 257)]]
    assert pixels(file, 4)[..., 3].tolist() == [[0, 255, 255]]
    colour = np.array([[[0x1234, 0x5678, 0x9ABC], [0x1234, 0x5678, 0x9ABD]]], np.uint16)
    file = deep_png(colour, tRNS=struct.pack(">HHH", *colour[0, 0]))
    assert pixels(file).tolist() == [[[255, 255, 255], [0x12, 0x56, 0x9A]]]
    assert pixels(file, 4).tolist() == [[[0x12, 0x56, 0x9A, 0], [0x12, 0x56, 0x9A, 255]]]


@pytest.mark.parametrize("kind", ["u2", "f4"])
def test_white_is_zero_inverts_as_at_8_bits(kind):
    ramp = np.linspace(0, 65535, 35).reshape(5, 7).astype(kind)
    plain, turned = (tiff(ramp, sample_format=3 if kind == "f4" else 1, photometric=p) for p in (1, 0))
    assert (pixels(turned, 1) == 255 - pixels(plain, 1)).all() and pixels(turned, 1)[0, 0] == 255
    eight = tiff(np.arange(35, dtype=np.uint8).reshape(5, 7), photometric=0)
    assert (pixels(eight, 1)[..., 0] == 255 - np.arange(35).reshape(5, 7)).all()


def test_bits_that_a_tiff_declares_are_its_range():
    flat = np.append(TWELVE[0], 0).astype(int)  # rows are packed to whole bytes: 8 samples of 12 bits
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in flat.reshape(-1, 2))
    file = tiff(flat[None].astype(np.uint16), 12, packed=packed)
    assert (pixels(file, 1)[0, :, 0] == np.rint(flat * 255 / 4095)).all()
    multiples = 16 * np.arange(8)  # could be scaled values of a PNG; in a TIFF they are plain
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in multiples.reshape(-1, 2))
    assert (pixels(tiff(multiples[None].astype(np.uint16), 12, packed=packed), 1)[0, :, 0]
            == np.rint(multiples * 255 / 4095)).all()


def test_significant_bits_of_a_png():
    expected = np.rint(TWELVE * (255 / 4095))
    plain = deep_png(TWELVE, sBIT=b"\x0c")
    by_rule = deep_png(np.rint(TWELVE * (65535 / 4095)).astype(np.uint16), sBIT=b"\x0c")
    shifted = deep_png(TWELVE << 4, sBIT=b"\x0c")
    repeated = deep_png(TWELVE << 4 | TWELVE >> 8, sBIT=b"\x0c")
    for file in (plain, by_rule, shifted, repeated):
        assert abs(pixels(file, 1)[..., 0] - expected).max() <= 1
    assert (pixels(plain, 1)[..., 0] == expected).all()
    dark = np.array([[0x0FF0, 0x0010]], np.uint16)  # by the specification, and darker than 1/16
    assert (pixels(deep_png(dark, sBIT=b"\x0c"), 1)[..., 0] == np.rint(dark / 257)).all()
    colour = np.dstack([TWELVE, TWELVE[::-1], TWELVE[:, ::-1]])
    file = deep_png(colour, sBIT=b"\x0c\x0c\x0c")
    assert (pixels(file) == np.rint(colour * (255 / 4095))).all()
    alpha = np.dstack([colour, np.full((5, 7), 65535, np.uint16)])
    assert (pixels(deep_png(alpha, sBIT=b"\x0c\x0c\x0c\x10")) == np.rint(colour * (255 / 4095))).all()
    assert (pixels(deep_png(np.dstack([TWELVE, alpha[..., 3]]), sBIT=b"\x0c\x10"))
            == expected[..., None]).all()
    for broken in (b"", b"\x0c\x0c", b"\x00\x0c\x0c", b"\xff\xff\xff"):
        assert (pixels(deep_png(colour, sBIT=broken)) == colour >> 8).all()
    assert (pixels(deep_png(colour)) == colour >> 8).all()  # nothing declared: 16 bits


@pytest.mark.parametrize("no_data", ["-9999", "-3.4028234663852886e+38", "nan  "])
def test_no_data_is_black_and_has_no_part_in_the_range(no_data):
    heights = np.linspace(100, 200, 35, dtype=np.float32).reshape(5, 7)
    holes = heights.copy()
    holes[1, 2] = float(no_data)
    expected = (heights - 100) * 2.55
    expected[1, 2] = 0
    found = pixels(tiff(holes, sample_format=3, no_data=no_data), 1)[..., 0]
    assert abs(found - expected).max() <= 0.51 and found[1, 2] == 0 and found[-1, -1] == 255
    inverted = pixels(tiff(holes, sample_format=3, no_data=no_data, photometric=0), 1)[..., 0]
    assert inverted[1, 2] == 0 and inverted[0, 0] == 255
    given = pixels(tiff(holes, sample_format=3, no_data=no_data), 1, value_range=(0, 250))[..., 0]
    assert given[1, 2] == 0 and given[0, 0] == 102 and given[-1, -1] == 204
    assert (pixels(tiff(np.full((2, 2), np.float32(no_data)), sample_format=3, no_data=no_data), 1) == 0).all()


def test_no_data_of_16_bits():
    values = np.array([[65535, 1000]], np.uint16)
    assert pixels(tiff(values, no_data="65535"), 1)[..., 0].tolist() == [[0, 4]]


# ---- A range that is given ----


def test_a_given_range_holds_for_every_depth_above_8(tmp_path):
    values = np.array([[-9999, 0, 500, 1000, 3000]])
    expected = [[0, 0, 64, 128, 255]]  # of 0 to 2000: rint(255 v / 2000), clipped; 63.75 and 127.5, to even
    for name, array in (("a.tif", values.astype(np.float32)), ("b.tif", values.astype(np.int32)),
                        ("c.tif", values.clip(0).astype(np.uint16)), ("d.png", values.clip(0).astype(np.uint16))):
        assert pixels(saved(tmp_path / name, array), 1, value_range=(0, 2000))[..., 0].tolist() == expected, name
    for kind in ("int16", "uint16", "uint32", "int64", "float16", "float32", ">f8"):
        np.save(tmp_path / "a.npy", (values if np.dtype(kind).kind != "u" else values.clip(0)).astype(kind))
        assert pixels(tmp_path / "a.npy", 1, value_range=(0, 2000))[..., 0].tolist() == expected, kind
    colour = np.dstack([values.clip(0)] * 3).astype(np.uint16)
    assert pixels(deep_png(colour), value_range=(0, 2000))[..., 1].tolist() == expected
    eight = np.array([[7, 200]], np.uint8)
    for path in (saved(tmp_path / "e.png", eight), tmp_path / "e.npy"):
        np.save(tmp_path / "e.npy", eight)
        assert pixels(path, 1, value_range=(0, 2000))[..., 0].tolist() == [[7, 200]]


def colour_tiff(array: np.ndarray, planes: bool = False, orientation: int = 1) -> bytes:
    """A little-endian TIFF file of 16-bit RGB (H, W, 3), written from the specification."""
    height, width = array.shape[:2]
    strips = [array[..., c].tobytes() for c in range(3)] if planes else [array.tobytes()]
    n, size, body = len(strips), len(strips[0]), b"".join(strips)
    arrays = struct.pack(f"<3H{2 * n}I", 16, 16, 16, *(14 + 8 * n + i * size for i in range(n)), *[size] * n)
    at = [(273, 4, n, 14), (279, 4, n, 14 + 4 * n)] if planes else [(273, 4, 1, 14 + 8 * n), (279, 4, 1, size)]
    entries = sorted([(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2),
                      (274, 3, 1, orientation), (277, 3, 1, 3), (278, 3, 1, height), (284, 3, 1, 1 + planes), *at])
    head = struct.pack("<2sHI", b"II", 42, 8 + len(arrays) + len(body)) + arrays + body
    return head + struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + bytes(4)


@pytest.mark.parametrize("planes", [False, True])
def test_colour_tiff_of_16_bits(planes):
    pytest.importorskip("tifffile", reason="needs tifffile: pip install tifffile")
    colour = np.dstack([TWELVE, TWELVE[::-1], TWELVE[:, ::-1]])
    expected = np.rint(colour * (255 / 4095))
    assert (pixels(colour_tiff(colour, planes), value_range=(0, 4095)) == expected).all()
    assert (pixels(colour_tiff(colour, planes)) == colour >> 8).all()
    turned = pixels(colour_tiff(colour, planes, orientation=6), value_range=(0, 4095))  # a quarter turn clockwise
    assert (turned == np.rot90(expected, -1)).all()


def test_without_tifffile_the_way_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    colour = np.dstack([TWELVE] * 3)
    assert (pixels(colour_tiff(colour)) == colour >> 8).all()
    for file, value_range in ((colour_tiff(colour), (0, 4095)), (colour_tiff(colour, planes=True), None)):
        with pytest.raises(Undecodable, match=r"pip install tifffile.*\.npy"):
            pixels(file, value_range=value_range)


def test_what_a_range_cannot_be_applied_to_is_named(tmp_path):
    file = io.BytesIO()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    Image.new("RGB", (3, 2)).save(file, "TIFF", tiffinfo=tags)
    content = file.getvalue()  # 8 bits: no range applies
    assert pixels(content, value_range=(0, 9)).max() == 0
    (tmp_path / "a.ppm").write_bytes(b"P6 1 1 65535\n" + bytes(6))
    with pytest.raises(Undecodable, match=r"a.ppm: --value_range .*\.npy"):
        decode(tmp_path / "a.ppm", value_range=(0, 2000))
    np.save(tmp_path / "a.npy", np.zeros((2, 2), np.float32))
    with pytest.raises(Undecodable, match="float32 array.*--value_range LOW HIGH"):
        decode(tmp_path / "a.npy", 1)
    np.save(tmp_path / "a.npy", np.full((2, 2), np.nan))
    with pytest.raises(Undecodable, match="not finite"):
        decode(tmp_path / "a.npy", 1, value_range=(0, 1))


# ---- Remarks ----


@pytest.fixture
def said(capfd, monkeypatch):
    """A function that returns what was printed to stderr since its last call; nothing was remarked before."""
    for name in ("_printed", "_shared", "_full"):
        monkeypatch.setattr(remarks, name, type(getattr(remarks, name))())
    return lambda: capfd.readouterr().err


def corrupt_jpeg(said) -> bytes:
    """A file whose decoder remarks on it and returns an image nevertheless."""
    whole = io.BytesIO()
    Image.fromarray(RNG.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    for place in range(700, 1500):
        content = bytearray(whole.getvalue())
        content[place] ^= 0x55
        try:
            decode(bytes(content), name=f"trial {place}")
        except Undecodable:
            continue
        if "Corrupt JPEG" in said():
            return bytes(content)
    raise AssertionError("no damage that libjpeg remarks on")


def test_a_decoders_remark_has_the_files_name_and_comes_once(tmp_path, said, monkeypatch):
    content = corrupt_jpeg(said)
    monkeypatch.setattr(remarks, "_full", [])
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(content)
    for _ in range(2):
        decode(tmp_path / "a.jpg")
    lines = said().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{tmp_path / 'a.jpg'}: Corrupt JPEG data")
    augmentation = utils.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 0, 64, 64)
    loader = loaders.batches(open_images(tmp_path), augmentation, 1, 2, 0, batches_per_epoch=2, last_batch=12)
    assert len(list(loader)) == 12  # six epochs, in which both workers see both files
    lines = said().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{tmp_path / 'b.jpg'}: Corrupt JPEG data")


def test_a_remark_on_a_file_that_cannot_be_decoded_is_part_of_the_reason(tmp_path, said):
    path = saved(tmp_path / "a.tif", RNG.integers(256, size=(64, 64), dtype=np.uint8), compression="tiff_deflate")
    content = bytearray(path.read_bytes())
    start = Image.open(path).tag_v2[273][0]
    content[start : start + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(Undecodable, match=r"a.tif: .*\(.*ZIPDecode"):
        decode(path)
    assert said() == ""


def test_stretching_is_said_of_the_first_image_and_remarks_are_few(tmp_path, said):
    for name in ("a.tif", "b.tif"):
        decode(saved(tmp_path / name, np.linspace(-3, 7, 35, dtype=np.float32).reshape(5, 7)))
    (line,) = said().splitlines()
    assert line.count(f"{tmp_path / 'a.tif'}: ") == 1 and "-3 to 7" in line and "--value_range LOW HIGH" in line
    for i in range(2 * remarks.MOST):
        remarks.say(f"{i}.jpg", "odd")
    lines = said().splitlines()
    assert len(lines) == remarks.MOST and "not shown" in lines[-1]
