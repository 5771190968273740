"""Pixels of more than 8 bits -> 8 bits: which value is black and which is white.

    a range is given          LOW is black, HIGH is white, values outside of it are clipped (--value_range)
    n bits are declared       0 .. 2^n - 1; n is 16, or TIFF's BitsPerSample, or PNG's sBIT (see `significant_bits`)
    32-bit, signed and float  stretched from the image's own minimum..maximum, as such files don't state their white
    no-data value             GDAL's tag of a TIFF file: black, and left out of the minimum and maximum
    inverted polarity         TIFF's PhotometricInterpretation WhiteIsZero: black and white change places
    colour key                tRNS of a PNG file: transparent, compared at the file's own depth
    further channels          a fourth one of RGB in TIFF that isn't alpha, such as near infrared, is the fourth of 4
                              channels, and otherwise left out

Images of 8 bits pass unchanged. Of 16-bit colour, Pillow reads the high byte; where that loses what is needed, PNG
files are read by torchvision, TIFF files by tifffile where it is installed, and other formats are refused.

Shapes: H x W pixels, C channels.
"""

import io
import re
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from imagesets import remarks

Range = tuple[float, float]  # values of black and of white

WHITE_16 = 65535
# Tags of TIFF. PhotometricInterpretation 0 is WhiteIsZero, PlanarConfiguration 2 is a plane per colour.
BITS, PHOTOMETRIC, ORIENTATION, PLANES, EXTRA, SAMPLE_FORMAT, NO_DATA = 258, 262, 274, 284, 338, 339, 42113
# Values of ExtraSamples, what a channel beside the colours is.
UNSPECIFIED, PREMULTIPLIED = 0, 1
# Integers that Pillow reads as others of the same size, by SampleFormat (1 unsigned, 2 signed) and BitsPerSample.
STORED = {(1, 32): "u4", (2, 8): "i1"}


class Undecodable(ValueError):
    """An image that can't be decoded. From `decode`, the message is "<name>: <reason>"."""


class Declared(NamedTuple):
    """What a file says about its pixels, read before Pillow decodes it.

    white: value of white in a grey image that is not stretched.
    bits: significant bits of each channel of a 16-bit PNG file, () where it doesn't say.
    key: the transparent colour of a PNG file of 16-bit samples or of 2- and 4-bit grey, or None.
    content: of a PNG or TIFF file that Pillow can't read whole, else b"".
    orientation: of TIFF, as in EXIF; Pillow applies it when it loads the image.
    stored: NumPy's name of the type of a file's integers where Pillow takes them for another one of that size.
    extra: of TIFF, what the first channel beside the colours is, None where the file doesn't say.
    scale, offset: Pillow reads a grey value v of PGM and JPEG 2000 as scale (v + offset), to fill 16 bits.
    """

    white: int = WHITE_16
    bits: Sequence[int] = ()
    inverted: bool = False
    no_data: float | None = None
    key: int | tuple[int, ...] | None = None
    deep_colour: bool = False
    content: bytes = b""
    orientation: int = 1
    stored: str = ""
    extra: int | None = None
    scale: float = 1.0
    offset: int = 0


def declared(image: Image.Image, value_range: Range | None = None, in_chans: int = 3) -> Declared:
    """Of an image that Pillow has opened and not yet loaded.

    Raises:
        Undecodable: channels that Pillow would leave out, although they may be among those asked for.
    """
    colour = image.mode not in ("1", "L", "P") and not is_grey(image)
    if image.format == "TIFF":
        return declared_by_tiff(image, colour, value_range, in_chans)
    if not getattr(image, "tile", None):  # not from a file, or of a format that Pillow decodes as it opens it
        return Declared()
    arguments = str(image.tile[0][3])
    if image.format == "PPM" and image.mode == "I" and image.tile[0][0] != "raw":
        maxval = image.tile[0][3][-1]
        return Declared(white=maxval, scale=WHITE_16 / maxval)
    if image.format == "FITS":
        head = contents(image.fp)[: image.tile[0][2]]
        if any(float(value) != plain for name, plain in ((b"BZERO", 0), (b"BSCALE", 1))
               for value in re.findall(name + rb" *= *([-+.\dE]+)", head)):
            raise Undecodable("FITS with BZERO or BSCALE: convert it to .npy")
        return Declared(stored="i2" if image.mode == "I;16" else "")
    if image.format == "JPEG2000":
        bits, signed = jpeg2000_bits(contents(image.fp))
        offset = 2 ** (bits - 1) if signed and value_range is not None else 0  # without a range, the least is black
        return Declared(2**bits - 1, deep_colour=colour and bits > 8, scale=2.0 ** (16 - bits), offset=offset)
    if image.format == "PNG" and image.mode == "L" and "transparency" in image.info:
        return Declared(key=image.info["transparency"] * grey_step(image))
    if image.format != "PNG" or "16B" not in arguments:
        return Declared(deep_colour=colour and (";16" in arguments or wide_ppm(image)))
    bits, key = png_sbit(image.fp), image.info.get("transparency")
    whole = colour and (value_range is not None or key is not None or any(n < 16 for n in bits))
    return Declared(bits=bits, key=key, deep_colour=colour, content=contents(image.fp) if whole else b"")


def declared_by_tiff(image: Image.Image, colour: bool, value_range: Range | None, in_chans: int) -> Declared:
    tags = image.tag_v2
    bits, extra, no_data = max(tags.get(BITS, (8,))), tags.get(EXTRA, ()), number(tags.get(NO_DATA))
    if tags.get(PHOTOMETRIC) in (0, 1) and len(extra) > 1:  # of which Pillow reads the first plane
        raise Undecodable(f"TIFF of {1 + len(extra)} grey channels: convert it to .npy")
    fourth = image.mode == "RGB" and extra[:1] == (UNSPECIFIED,) and in_chans == 4
    if fourth and len(extra) > 1:
        raise Undecodable(f"TIFF of {3 + len(extra)} channels where --in_chans is 4: convert it to .npy")
    deep_colour = colour and bits > 8
    # Pillow misreads planes, and a no-data value whose high byte isn't black.
    whole = fourth or deep_colour and (
        value_range is not None or tags.get(PLANES) == 2 or no_data is not None and no_data > 255)
    stored = STORED.get((tags.get(SAMPLE_FORMAT, (1,))[0], bits), "") if image.mode in ("L", "I") else ""
    return Declared(2**bits - 1 if 8 < bits < 16 else WHITE_16, inverted=tags.get(PHOTOMETRIC) == 0, no_data=no_data,
                    deep_colour=deep_colour, content=contents(image.fp) if whole else b"",
                    orientation=tags.get(ORIENTATION, 1), stored=stored, extra=extra[0] if extra else None)


def grey_step(image: Image.Image) -> int:
    """What Pillow multiplies the values of a grey image of 2 or 4 bits by, to fill 8 bits; before it is loaded."""
    if image.mode != "L" or not getattr(image, "tile", None):
        return 1
    if image.format == "TIFF":
        bits = max(image.tag_v2.get(BITS, (8,)))
    else:
        bits = {"L;2": 2, "L;4": 4}.get(str(image.tile[0][3]), 8)
    return 255 // (2**bits - 1)


def is_grey(image: Image.Image) -> bool:
    """One channel of more than 8 bits; 16-bit PGM and, in some versions of Pillow, 16-bit PNG files have the mode I."""
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def bits_of(image: Image.Image) -> int:
    """Bits of a channel, by the header of an image that Pillow has opened and not yet loaded."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS, (1,)))
    if image.mode == "1":
        return 1
    if is_grey(image):
        return 16 if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") and image.mode == "I" else 32
    return 16 if declared(image).deep_colour else 8


def eight_bit(
    image: Image.Image, file: Declared, value_range: Range | None = None, name: str = "", in_chans: int = 3
) -> Image.Image:
    """A loaded image of any Pillow mode -> one of 8 bits, whose transparency is 8-bit too.

    Args:
        file: what `declared` returned before the image was loaded.
        name: of the file, for remarks.

    Raises:
        Undecodable: pixels that are not finite, or 16-bit colour that can't be read with `value_range`.
    """
    if file.content:
        if image.format == "TIFF":
            return from_tiff(file.content, file, value_range, in_chans)
        return from_png(file.content, file, value_range)
    if not is_grey(image) and not file.stored:
        if value_range is not None and file.deep_colour:
            raise Undecodable(f"--value_range and 16-bit colour of {image.format}: convert it to PNG or .npy")
        if file.key is not None:
            image.info["transparency"] = file.key
        return image
    values = np.asarray(image)
    values = values.view(file.stored) if file.stored else values
    if file.scale != 1 or file.offset:
        values = np.rint(values / file.scale).astype(np.int32) - file.offset
    left_out = missing(values, file.no_data)
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if value_range is None and sixteen and not file.stored:
        bits = significant_bits(values[..., None], file.bits)
        value_range = (0, 2 ** bits[0] - 1 if bits else file.white)
    grey = scaled(values, value_range, left_out, name)
    grey = 255 - grey if file.inverted else grey
    grey[left_out] = 0
    if file.key is None:
        return Image.fromarray(grey)
    return Image.fromarray(np.dstack([grey, np.where(values == file.key, 0, 255).astype(np.uint8)]))


def scaled(
    values: np.ndarray, value_range: Range | None, left_out: np.ndarray | bool = False, name: str = ""
) -> np.ndarray:
    """255 (v - low) / (high - low), clipped to 0..255 and rounded: uint8 of the same shape.

    Args:
        value_range: (low, high); None takes the values' own minimum and maximum, and one value alone is black.
        left_out: bool (...), pixels that have no part in these; they become black.
        name: of the file, for the remark that it is stretched.

    Raises:
        Undecodable: values that are not finite.
    """
    if value_range == (0, WHITE_16) and values.dtype.newbyteorder("=") == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # the same in integers
    values = values.astype(np.float64)
    left_out = np.broadcast_to(left_out, values.shape)
    kept = values[~left_out]
    if not np.isfinite(kept).all():
        raise Undecodable("pixels that are not finite")
    low, high = value_range or ((kept.min(), kept.max()) if kept.size else (0.0, 0.0))
    if value_range is None and name:
        remarks.say_kind("stretched", f"{name}: stretched from its own values, {low:g} to {high:g}, as its format does "
                         "not state which value is white; --value_range LOW HIGH gives all images one scale")
    values = np.where(left_out, low, values)
    return np.rint(np.clip((values - low) * (255 / (high - low) if high > low else 0), 0, 255)).astype(np.uint8)


def missing(values: np.ndarray, no_data: float | None) -> np.ndarray:
    """Pixels that are the no-data value, bool of the same shape."""
    if no_data is None:
        return np.zeros(values.shape, bool)
    if np.isnan(no_data):
        return np.isnan(values)
    return values == (np.float32(no_data) if values.dtype.kind == "f" else no_data)


def number(text: str | None) -> float | None:
    try:
        return float(text.strip(" \0"))
    except (AttributeError, ValueError):
        return None


def significant_bits(values: np.ndarray, bits: Sequence[int]) -> Sequence[int]:
    """`bits` if values (H, W, C) of 16-bit samples are stored in the low bits, else ().

    The PNG specification stores n significant bits scaled to all 16; then the scale is that of 16 bits. Files of
    cameras and microscopes often hold the plain values: none exceeds 2^n - 1, and not all of them are what scaling can
    give.
    """
    bits = bits[: values.shape[-1]]
    if len(bits) < values.shape[-1] or not all(0 < n <= 16 for n in bits) or min(bits) == 16:  # broken, or no news
        return ()
    bits = np.array(bits)
    if (values > 2**bits - 1).any():
        return ()
    top = values.astype(np.int64) >> (16 - bits)
    by_shift, by_rule = top << (16 - bits), np.rint(top * (WHITE_16 / (2.0**bits - 1)))
    repeated = by_shift | top >> np.maximum(2 * bits - 16, 0)
    fits = (values == by_shift) | (values == by_rule) | (values == repeated)
    return () if fits.all() else bits.tolist()


# ---- PNG ----


def png_sbit(file) -> Sequence[int]:
    """The significant bits of each channel, () where the file doesn't declare them. Keeps the file's position."""
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            if kind == b"sBIT":
                return tuple(file.read(size))
            if kind in (b"PLTE", b"IDAT"):  # it has to come before these
                return ()
            file.seek(size + 4, 1)
        return ()
    finally:
        file.seek(position)


def contents(file) -> bytes:
    position = file.tell()
    try:
        file.seek(0)
        return file.read()
    finally:
        file.seek(position)


def from_png(content: bytes, file: Declared, value_range: Range | None) -> Image.Image:
    """A 16-bit colour PNG file -> RGB, or RGBA where it has transparency or a colour key."""
    try:
        from torchvision.io import ImageReadMode, decode_png  # takes half a second, and is rarely needed
    except ImportError as error:
        raise Undecodable("16-bit colour with a range, significant bits or a colour key needs torchvision's PNG "
                          "decoder, which this version lacks: convert it to .npy") from error
    values = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    values = values.permute(1, 2, 0).numpy()  # (H, W, C)
    colours = values[..., : values.shape[2] - (values.shape[2] in (2, 4))]
    bits = significant_bits(colours, file.bits)
    if value_range is not None or bits:
        ranges = [value_range or (0, 2**n - 1) for n in bits or [16] * colours.shape[2]]
        eight = np.dstack([scaled(colours[..., c], ranges[c]) for c in range(len(ranges))])
    else:
        eight = (colours >> 8).astype(np.uint8)  # as Pillow reads it
    if eight.shape[2] == 1:
        eight = eight.repeat(3, 2)
    if values.shape[2] in (2, 4):
        return Image.fromarray(np.dstack([eight, (values[..., -1] >> 8).astype(np.uint8)]))
    if file.key is None:
        return Image.fromarray(eight)
    opaque = (colours != np.array(file.key)).any(-1)
    return Image.fromarray(np.dstack([eight, np.where(opaque, 255, 0).astype(np.uint8)]))


# ---- Other formats ----


def from_tiff(content: bytes, file: Declared, value_range: Range | None, in_chans: int) -> Image.Image:
    """The first page of a TIFF file of RGB -> RGB, or RGBA where it has alpha or, of 4 channels, any other fourth one.

    Raises:
        Undecodable: tifffile or the package of the file's compression isn't installed, or it is no RGB.
    """
    what = "with --value_range, with a no-data value, in separate planes or with a fourth channel"
    try:
        from tifffile import PHOTOMETRIC as KINDS
        from tifffile import TiffFile
    except ImportError as error:
        raise Undecodable(f"TIFF {what}: pip install tifffile imagecodecs, or convert it to PNG or .npy") from error
    with TiffFile(io.BytesIO(content)) as tiff:
        page = tiff.pages[0]
        if page.photometric != KINDS.RGB or page.axes not in ("YXS", "SYX"):
            raise Undecodable(f"TIFF of 16-bit {page.photometric.name} ({page.axes}) {what}: convert it to PNG or .npy")
        try:
            values = page.asarray()
        except ValueError as error:  # names the codec
            raise Undecodable(f"{error}; pip install imagecodecs") from error
    values = values if page.axes == "YXS" else values.transpose(1, 2, 0)  # (H, W, C)
    fourth = in_chans == 4 and file.extra == UNSPECIFIED
    colours = values[..., : 4 if fourth else 3]
    left_out = missing(colours, file.no_data) & (colours.dtype != np.uint8)
    alpha = values[..., 3:4] if values.shape[2] > 3 and file.extra != UNSPECIFIED else None
    if file.extra == PREMULTIPLIED:
        colours = np.minimum(colours * (WHITE_16 / np.maximum(alpha, 1)), WHITE_16)
    if colours.dtype == np.uint8:
        eight = colours
    elif value_range:
        eight = scaled(colours, value_range, left_out)
    else:
        eight = colours.astype(np.uint16) >> 8  # as Pillow reads it
    eight = np.where(left_out, 0, eight)
    image = Image.fromarray(np.dstack([eight] if alpha is None else [eight, alpha >> 8]).astype(np.uint8))
    image.getexif()[ORIENTATION] = file.orientation
    return ImageOps.exif_transpose(image)


def jpeg2000_bits(content: bytes) -> tuple[int, bool]:
    """Bits of the first channel, and whether it is signed: Ssiz of the codestream's SIZ marker segment."""
    start = content.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(content) < start + 43:
        raise Undecodable("JPEG 2000 without a codestream")
    return (content[start + 42] & 127) + 1, content[start + 42] > 127


def wide_ppm(image: Image.Image) -> bool:
    arguments = image.tile[0][3]
    return image.format == "PPM" and isinstance(arguments, tuple) and arguments[-1] > 255
