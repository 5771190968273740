"""One image file -> uint8 tensor, whatever the format.

What `decode` returns for `in_chans` 1 (luma), 3 (RGB) or 4 (RGBA):

    EXIF orientation          applied; EXIF data that can't be parsed are ignored
    grey, palette, 1-bit      converted; CMYK too, without its ICC profile
    alpha, transparent colour composited on white. The colours under transparent pixels are arbitrary (often black, or
                              left over from editing), and such images were mostly made for white pages. With 4
                              channels the alpha channel is kept and nothing is composited
    more than 8 bits          scaled to 8 by what the file declares, or by a given range of values (deep.py)
    several frames            the first one
    DICOM, HEIF               where pydicom or pillow-heif is installed (dicom.py, heif.py)
    .npy                      (H, W) or (H, W, C): the format for any other number of channels. uint8, uint16, or with a
                              given range any type of numbers
"""

import errno
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagesets import deep, dicom, heif, remarks
from imagesets.deep import WHITE_16, Range, Undecodable

MAX_PIXELS = 178_956_970  # above it Pillow's own guard against decompression bombs raises

# Formats registered with Pillow that hold no images to train on: Pillow only writes them, only recognizes them, or runs
# another program on them (Ghostscript).
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}

Reduction = Callable[[int, int], int]

NPY_MAGIC = b"\x93NUMPY"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's mode

ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Reading(NamedTuple):
    """How the files of a set of images are read.

    in_chans, max_pixels, value_range: see `decode`.
    skip_bad: file to list images in that can't be decoded and are left out; "" leaves out none (see `checking`).
    """

    in_chans: int = 3
    max_pixels: int = MAX_PIXELS
    value_range: Range | None = None
    skip_bad: str = ""

    def decoding(self) -> dict[str, Any]:
        """The arguments of `decode`."""
        return {"in_chans": self.in_chans, "max_pixels": self.max_pixels, "value_range": self.value_range}


PLAIN = Reading()


def decode(
    source: str | os.PathLike | bytes, in_chans: int = 3, max_pixels: int = MAX_PIXELS, name: str = "<bytes>",
    reduction: Reduction | None = None, value_range: Range | None = None,
) -> Tensor:
    """Decode an image file to uint8 (C, H, W), a view of contiguous (H, W, C) memory.

    That layout is torch's channels-last, for which its antialiased resizing of uint8 is fastest.

    Args:
        source: a path, or the file's bytes.
        in_chans: C.
        max_pixels: larger images are refused before they are decompressed (an odd limit acts as the next even one).
        name: used in error messages when `source` is bytes.
        reduction: (H, W) -> 1, 2, 4 or 8, the factor by which the image may be downsampled while it is decoded. Only
            JPEG makes use of it: transforming its blocks of 8 x 8 pixels at the smaller size costs a fraction of
            decoding the whole image.
        value_range: values of black and of white, for images of more than 8 bits; None: as the file declares.

    Raises:
        Undecodable: for every file that can't be decoded, whatever the decoder raised. An exception raised by
            `reduction` is passed on as it is.
    """
    if not isinstance(source, bytes):
        name = printable(os.fsencode(source))
    try:
        with remarks.captured() as remark:
            pixels = decode_quietly(source, in_chans, max_pixels, name, reduction, value_range)
    except Undecodable as error:
        if remark:
            raise Undecodable(f"{error} ({remark[0]})") from error
        raise
    if remark:
        remarks.say(name, remark[0].removeprefix(f"{name}: "))  # which this project's own have
    return pixels


def decode_quietly(
    source: str | os.PathLike | bytes, in_chans: int, max_pixels: int, name: str, reduction: Reduction | None,
    value_range: Range | None,
) -> Tensor:
    with decoding(name):
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
    with file, pillow_limits(max_pixels):
        with decoding(name):
            magic = file.read(len(NPY_MAGIC))
            file.seek(0)
            if not magic:
                raise Undecodable("the file is empty")
            if magic == NPY_MAGIC:
                return from_array(np.load(file, allow_pickle=False), in_chans, max_pixels, value_range)
            if dicom.is_dicom(file):
                return from_pil(dicom.read(file, max_pixels, value_range), in_chans)
            if heif.is_heif(file) and not heif.installed():
                raise Undecodable(f"a HEIF file; {heif.REMEDY}, or convert it")
            image = Image.open(file, formats=formats())
        # Outside of `decoding`: a bug in `reduction` is not a broken file.
        scale = reduction(*image.size) if reduction is not None and image.format == "JPEG" else 1
        with decoding(name):
            if scale > 1:
                image.draft(None, tuple(n // scale for n in image.size))
            elif image.format == "JPEG" and image.mode == MODES.get(in_chans) == "RGB" and orientation(image) == 1:
                file.seek(0)
                if (pixels := plain_jpeg(file.read())) is not None:
                    return pixels
            return from_pil(image, in_chans, value_range, name)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Any exception in the block becomes Undecodable: "<name>: <reason>", unless no more files can be opened."""
    try:
        yield
    except Exception as error:  # on broken bytes, decoders raise SyntaxError, KeyError, struct.error and more
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):  # no fault of the image
            raise
        raise Undecodable(f"{name}: {reason(error)}") from error


def from_pil(
    image: Image.Image, in_chans: int = 3, value_range: Range | None = None, name: str = "an image"
) -> Tensor:
    """A Pillow image -> uint8 (C, H, W), a view of contiguous (H, W, C) memory; by the rules at the top of this file.

    Args:
        value_range: as in `decode`.
        name: for remarks.

    Raises:
        Undecodable: for other than 1, 3 or 4 channels, and for pixels that are not finite; the message has no name.
    """
    if in_chans not in MODES:
        raise Undecodable(f"an image has 1, 3 or 4 channels, not {in_chans}: use .npy arrays")
    file = deep.declared(image, value_range, in_chans)
    image.load()  # before anything reads EXIF: that loads too, and hides the error of a broken PNG
    pixels = with_mode(deep.eight_bit(image, file, value_range, name, in_chans), MODES[in_chans])
    turn = TURNS.get(orientation(image))
    pixels = np.array(pixels if turn is None else pixels.transpose(turn))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], in_chans)).permute(2, 0, 1)


def from_array(
    array: np.ndarray, in_chans: int = 3, max_pixels: int = MAX_PIXELS, value_range: Range | None = None
) -> Tensor:
    """Array (H, W) or (H, W, C) of uint8 or uint16, or with `value_range` of numbers -> uint8 (in_chans, H, W).

    C equals in_chans, or both are among 1, 3 and 4 and are converted like those of an image, unless four channels are
    scaled by `value_range`, which are bands rather than RGBA. uint8 is not scaled.

    Raises:
        Undecodable: for an array of another type, shape or number of channels; the message has no name.
    """
    if array.ndim not in (2, 3) or not array.size:
        raise Undecodable(f"array {array.shape}: (H, W) or (H, W, C) is needed")
    if array.dtype not in (np.uint8, np.uint16, ">u2") and (value_range is None or array.dtype.kind not in "uif"):
        raise Undecodable(f"{array.dtype} array {array.shape}: uint8 or uint16 is needed, or --value_range LOW HIGH "
                          "for other numbers")
    if array.shape[0] * array.shape[1] > max_pixels:
        raise Undecodable(f"array {array.shape}: more than {max_pixels} pixels")
    channels = 1 if array.ndim == 2 else array.shape[2]
    if channels == 4 != in_chans and value_range is not None and array.dtype != np.uint8:  # no range of alpha
        raise Undecodable(f"4 channels of one range, so none of alpha, where --in_chans is {in_chans}; give 4")
    array = array if array.dtype == np.uint8 else deep.scaled(array, value_range or (0, WHITE_16))
    if channels == in_chans:
        array = np.ascontiguousarray(array.reshape(*array.shape[:2], channels))
        return torch.from_numpy(array).permute(2, 0, 1)
    if channels in MODES and in_chans in MODES:
        return from_pil(Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array), in_chans)
    raise Undecodable(f"{channels} channels where --in_chans is {in_chans}")


def suffixes(in_chans: int = 3) -> frozenset[str]:
    """Lower-case suffixes, with the dot, of files that may hold an image with this number of channels."""
    if in_chans not in MODES:
        return frozenset([".npy"])
    heif.register()
    known = Image.registered_extensions()
    others = {".npy", *(dicom.SUFFIXES if dicom.installed() else ())}
    return frozenset(suffix for suffix, name in known.items() if name not in NOT_IMAGES) | others


def printable(path: bytes) -> str:
    """A path as text for messages; file names need not be valid UTF-8."""
    return path.decode("utf-8", "backslashreplace")


# ---- The steps ----


def plain_jpeg(content: bytes) -> Tensor | None:
    """Decode an RGB JPEG file like Pillow, in three quarters of the time: the same decoder, fewer copies.

    Returns:
        uint8 (3, H, W) laid out as by `decode`, or None where Pillow has to decode the file or to report its error.
    """
    decoder = jpeg_decoder()
    try:
        return decoder and decoder(torch.from_numpy(np.frombuffer(bytearray(content), np.uint8)))
    except RuntimeError:
        return None


@cache
def jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    """torchvision's decoder, or None in versions without it: 0.29 deprecates it."""
    try:
        from torchvision.io import decode_jpeg  # the import takes half a second: only for processes that decode
    except ImportError:
        return None
    return decode_jpeg


@cache
def formats() -> tuple[str, ...]:
    """The formats that Pillow tries, by content, on every file."""
    heif.register()
    Image.preinit()  # the common ones first
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_IMAGES)


@contextmanager
def pillow_limits(max_pixels: int) -> Iterator[None]:
    """Set Pillow's guard to max_pixels, so that it also covers images inside images (.ico), and silence warnings.

    Every worker would print those, about odd EXIF data for instance; the file either decodes or raises anyway.
    """
    saved = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2  # Pillow warns above it and raises above twice it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = saved


def orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF data count as none
        return 1


def with_mode(image: Image.Image, mode: str) -> Image.Image:
    """8-bit image of any Pillow mode -> L, RGB or RGBA."""
    if image.has_transparency_data and mode != "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode not in ("1", "L", "P", "RGB", "RGBA"):  # not all modes convert to each other
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image if image.mode == mode else image.convert(mode)


def reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"  # Pillow's message names a file object
    if isinstance(error, Image.DecompressionBombError):
        return f"{str(error).partition(', could')[0]}; raise --max_pixels to read it"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
