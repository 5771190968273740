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


@pytest.mark.parametrize("kind", ["i4", "u4", "f4", "f8", "i2", "u2"])
def test_values_outside_of_all_16_bits_are_clipped(kind):
    values = np.array([[-9999, 0, 1000, 30000, 65535, 100000, 2**31 - 1]], np.float64)
    least, most = (-1e6, 1e10) if kind[0] == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
    values = values[(values >= least) & (values <= most)][None].astype(kind)
    file = io.BytesIO()
    np.save(file, values)
    expected = np.rint(np.clip(values.astype(float) / 257, 0, 255))
    assert (pixels(file.getvalue(), 1, value_range=(0, 65535))[..., 0] == expected).all()
    if kind in ("i4", "u4", "f4"):
        content = tiff(values, sample_format="uif".index(kind[0]) + 1)
        assert (pixels(content, 1, value_range=(0, 65535))[..., 0] == expected).all()


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


DEEP = RNG.integers(256, 65536, size=(5, 7, 4)).astype(np.uint16)


def by_tifffile(array: np.ndarray, **options) -> bytes:
    """A TIFF file of RGB by tifffile."""
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile: pip install tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, array, photometric="rgb", **options)
    return file.getvalue()


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_a_fourth_channel_that_is_no_alpha_is_not_composited(kind, planes):
    values = (DEEP >> 8 if kind == "u1" else DEEP).astype(kind)
    options = {"planarconfig": "separate", "compression": "zlib"} if planes else {}
    file = by_tifffile(values.transpose(2, 0, 1) if planes else values, extrasamples=["unspecified"], **options)
    assert (pixels(file, 4) == DEEP >> 8).all() and (pixels(file) == DEEP[..., :3] >> 8).all()
    expected = DEEP >> 8 if kind == "u1" else np.rint(np.clip((DEEP - 1000.0) * (255 / 40000), 0, 255))
    given = {"value_range": (1000, 41000)}
    assert (pixels(file, 4, **given) == expected).all() and (pixels(file, **given) == expected[..., :3]).all()


def test_channels_that_cannot_be_told_apart_are_refused(tmp_path, monkeypatch):
    five = np.dstack([DEEP, DEEP[..., 0]]) >> 8
    file = by_tifffile(five.astype(np.uint8), extrasamples=["unspecified"] * 2)
    assert (pixels(file) == five[..., :3]).all()
    with pytest.raises(Undecodable, match=r"5 channels where --in_chans is 4.*\.npy"):
        pixels(file, 4)
    import tifffile
    bands = five[..., :3].astype(np.uint8).transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "a.tif", bands, photometric="minisblack", planarconfig="separate", compression="zlib")
    with pytest.raises(Undecodable, match=r"3 grey channels.*\.npy"):
        pixels(tmp_path / "a.tif")
    file = by_tifffile(five[..., :4].astype(np.uint8), extrasamples=["unspecified"])
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(Undecodable, match="pip install tifffile"):
        pixels(file, 4)
    assert (pixels(file) == five[..., :3]).all()


@pytest.mark.parametrize("extra", ["assocalpha", "unassalpha"])
def test_alpha_of_16_bit_tiff_by_its_kind(extra):
    straight = np.maximum(DEEP, 0x8000)
    alpha = straight[..., 3:] / 65535
    stored = straight.copy()
    if extra == "assocalpha":
        stored[..., :3] = np.rint(straight[..., :3] * alpha)
    file = by_tifffile(stored, extrasamples=[extra])
    for value_range in (None, (0, 65535), (0, 100000)):  # the range is of the colours, not of alpha
        colours = straight[..., :3] * (255 / (value_range or (0, 65535))[1])
        white = colours * alpha + 255 * (1 - alpha)
        assert abs(pixels(file, value_range=value_range) - white).max() <= 2.5
        assert abs(pixels(file, 4, value_range=value_range) - np.dstack([colours, alpha * 255])).max() <= 3


def test_no_data_of_16_bit_colour_is_black(monkeypatch):
    values = DEEP[..., :3].copy()
    values[1:3] = 65535, 1000, 65535
    expected = np.where(values == 65535, 0, values >> 8)
    file = by_tifffile(values, extratags=[(42113, "s", 0, "65535", True)])
    assert (pixels(file) == expected).all()
    near = by_tifffile(values, extratags=[(42113, "s", 0, "0", True)])
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert (pixels(near) == values >> 8).all()  # black in any case: needs no tifffile
    with pytest.raises(Undecodable, match="no-data value.*pip install tifffile"):
        pixels(file)


def test_integers_that_pillow_takes_for_others():
    """Unsigned 32 bits for signed, and signed 8 bits for unsigned."""
    values = np.array([[0, 2**31 - 1, 2**31, 3_000_000_000, 2**32 - 1]], np.uint32)
    expected = np.rint(values * (255 / (2**32 - 1)))
    assert (pixels(tiff(values), 1, value_range=(0, 2**32 - 1))[..., 0] == expected).all()
    assert (pixels(tiff(values), 1)[..., 0] == expected).all()  # stretched
    values = np.array([[-128, -1, 0, 127]], np.int8)
    expected = np.arange(-128, 128)[[0, 127, 128, 255]] + 128
    assert (pixels(tiff(values, sample_format=2), 1)[0, :, 0] == expected).all()
    assert pixels(tiff(values, sample_format=2), 1, value_range=(-1, 0))[0, :, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("white", [1023, 4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_a_range_of_pgm_is_in_the_values_that_are_stored(white, plain):
    values = np.append(RNG.integers(white + 1, size=34), white).reshape(5, 7)
    body = " ".join(map(str, values.ravel())).encode() if plain else values.astype(">u2").tobytes()
    file = b"P%d 7 5 %d\n" % (2 if plain else 5, white) + body
    assert (pixels(file, 1, value_range=(100, 900))[..., 0] == np.rint(np.clip((values - 100) / 800, 0, 1) * 255)).all()
    assert (pixels(file, 1)[..., 0] == np.rint(values * (255 / white))).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_a_range_of_jpeg_2000_is_in_the_values_that_are_stored(bare, signed):
    """A lossless 16-bit file holds v - 2^15, one of 12 bits v - 2^11: the header alone makes it one of 12 bits."""
    values = np.resize(TWELVE.astype(int), (32, 32))
    file = io.BytesIO()
    Image.fromarray((values + 2**15 - 2**11).astype(np.uint16)).save(file, "JPEG2000", no_jp2=bare)
    content = bytearray(file.getvalue())
    content[content.index(b"\xff\x4f\xff\x51") + 42] = 11 + 128 * signed
    low = -(2**11) * signed
    found = pixels(bytes(content), 1, value_range=(low + 1000, low + 3000))[..., 0]
    assert (found == np.rint(np.clip((values - 1000) / 2000, 0, 1) * 255)).all()
    assert (pixels(bytes(content), 1)[..., 0] == np.rint(values * (255 / 4095))).all()


def test_16_bits_of_fits_are_signed():
    def fits(values: np.ndarray, **cards: int) -> bytes:
        cards = {"BITPIX": 16, "NAXIS": 2, "NAXIS1": values.shape[1], "NAXIS2": values.shape[0], **cards}
        head = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in {"SIMPLE": "T", **cards}.items())
        return (head + "END").ljust(2880).encode() + values.astype(">i2").tobytes().ljust(2880, b"\0")

    values = np.array([[-100, 20, 60, 100]])
    assert pixels(fits(values), 1, value_range=(0, 100))[0, :, 0].tolist() == [0, 51, 153, 255]
    assert pixels(fits(values, BZERO=0, BSCALE=1), 1)[0, :, 0].tolist() == [0, 153, 204, 255]  # stretched
    with pytest.raises(Undecodable, match=r"BZERO.*\.npy"):
        pixels(fits(values, BZERO=32768), 1)


def test_a_range_of_deep_colour_in_jpeg_2000_is_refused():
    file = io.BytesIO()
    Image.fromarray((DEEP[..., :3] >> 8).astype(np.uint8)).save(file, "JPEG2000")
    content = bytearray(file.getvalue())
    pixels(bytes(content), value_range=(0, 9))  # 8 bits: no range applies
    content[content.index(b"\xff\x4f\xff\x51") + 42] = 9
    with pytest.raises(Undecodable, match=r"--value_range.*JPEG2000.*\.npy"):
        pixels(bytes(content), value_range=(0, 1023))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_grey_colour_key_is_compared_at_the_files_own_depth(bits):
    per_byte, step = 8 // bits, 255 // (2**bits - 1)
    values = np.arange(8) % 2**bits
    row = bytes(sum(int(v) << 8 - bits * (k + 1) for k, v in enumerate(values[i : i + per_byte]))
                for i in range(0, 8, per_byte))
    file = png_bytes(struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0), [row], tRNS=b"\0\1")
    assert (pixels(file, 1)[0, :, 0] == np.where(values == 1, 255, values * step)).all()
    assert (pixels(file, 4)[0, :, 3] == np.where(values == 1, 0, 255)).all()


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
