"""One picture file -> uint8 tensor, whatever the file holds.

What comes out, for `in_chans` 1 (luma), 3 (RGB) or 4 (RGBA):

    EXIF orientation          applied; EXIF data that can't be parsed are ignored
    grey, palette, 1-bit      converted; CMYK too, without its ICC profile
    alpha, transparent colour laid on white: what lies under transparent pixels is arbitrary (often black or the
                              last drawing), and white is the page for which such pictures were made. With 4 channels
                              the alpha channel stays and nothing is laid on anything
    16-bit                    scaled, v / 257 rounded. Pillow itself halves 16-bit colour to its high byte
    32-bit and float          stretched from the picture's own minimum..maximum, as such files state no white
    several frames            the first one
    .npy                      (H, W) or (H, W, C), uint8 or uint16: the way to any other number of channels
"""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 178_956_970  # where Pillow's own guard against decompression bombs refuses

# Registered with Pillow, but no pictures to train on: it only writes them, only recognizes them, or runs another
# program on them (Ghostscript).
NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}

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


class Undecodable(ValueError):
    """A file that can't be decoded: "<name>: <reason>"."""


def decode(
    source: str | os.PathLike | bytes, in_chans: int = 3, max_pixels: int = MAX_PIXELS, name: str = "<bytes>",
    reduction: Reduction | None = None,
) -> Tensor:
    """The picture in a file as uint8 (C, H, W), a view of contiguous (H, W, C) memory.

    That layout is torch's channels-last, which its antialiased resizing of uint8 is fastest on.

    Args:
        source: a path, or the file's bytes.
        in_chans: C.
        max_pixels: larger pictures are refused before they are unpacked (an odd limit as the even one above it).
        name: of bytes, for errors.
        reduction: (H, W) -> 1, 2, 4 or 8, by what the picture may be reduced. A JPEG file is, which costs a fraction
            of decoding all of it: its blocks of 8 x 8 pixels are transformed at the smaller size.

    Raises:
        Undecodable: "<name>: <reason>", for every file that can't be decoded, whatever the decoder raised.
    """
    in_memory = isinstance(source, bytes)
    try:
        with io.BytesIO(source) if in_memory else open(source, "rb") as file:
            magic = file.read(len(NPY_MAGIC))
            file.seek(0)
            if not magic:
                raise ValueError("the file is empty")
            if magic == NPY_MAGIC:
                return from_array(np.load(file, allow_pickle=False), in_chans, max_pixels)
            with pillow_limits(max_pixels):
                picture = Image.open(file, formats=formats())
                if picture.format == "JPEG":
                    scale = 1 if reduction is None else reduction(*picture.size)
                    if scale > 1:
                        picture.draft(None, tuple(n // scale for n in picture.size))
                    elif picture.mode == MODES.get(in_chans) == "RGB" and orientation(picture) == 1:
                        file.seek(0)
                        if (pixels := plain_jpeg(file.read())) is not None:
                            return pixels
                return from_pil(picture, in_chans)
    except Exception as error:  # on broken bytes, decoders raise SyntaxError, KeyError, struct.error and more
        name = name if in_memory else printable(os.fsencode(source))
        raise Undecodable(f"{name}: {reason(error)}") from error


def from_pil(picture: Image.Image, in_chans: int = 3) -> Tensor:
    """Pillow's picture -> uint8 (C, H, W), a view of contiguous (H, W, C) memory; by the rules at the file's top."""
    if in_chans not in MODES:
        raise ValueError(f"a picture gives 1, 3 or 4 channels, not {in_chans}: use .npy arrays")
    picture.load()  # before anything reads EXIF: that loads too, and hides the error of a broken PNG
    pixels = with_mode(eight_bit(picture), MODES[in_chans])
    turn = TURNS.get(orientation(picture))
    pixels = np.array(pixels if turn is None else pixels.transpose(turn))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], in_chans)).permute(2, 0, 1)


def from_array(array: np.ndarray, in_chans: int = 3, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Array (H, W) or (H, W, C) of uint8 or uint16 -> uint8 (in_chans, H, W).

    C is in_chans, or both are among 1, 3 and 4 and are converted as a picture's.
    """
    if array.dtype.kind != "u" or array.itemsize > 2 or array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"{array.dtype} array {array.shape}: (H, W) or (H, W, C) of uint8 or uint16 is needed")
    if array.shape[0] * array.shape[1] > max_pixels:
        raise ValueError(f"array {array.shape}: more than {max_pixels} pixels")
    array = array if array.itemsize == 1 else from_16_bit(array)
    channels = 1 if array.ndim == 2 else array.shape[2]
    if channels == in_chans:
        array = np.ascontiguousarray(array.reshape(*array.shape[:2], channels))
        return torch.from_numpy(array).permute(2, 0, 1)
    if channels in MODES and in_chans in MODES:
        return from_pil(Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array), in_chans)
    raise ValueError(f"{channels} channels where --in_chans is {in_chans}")


def suffixes(in_chans: int = 3) -> frozenset[str]:
    """Lower-case suffixes, with the dot, of the files that may hold a picture of so many channels."""
    if in_chans not in MODES:
        return frozenset([".npy"])
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name not in NOT_PICTURES) | {".npy"}


def printable(path: bytes) -> str:
    """A path for messages: file names need not be valid UTF-8."""
    return path.decode("utf-8", "backslashreplace")


# ---- The steps ----


def plain_jpeg(content: bytes) -> Tensor | None:
    """A JPEG file of three colours as Pillow decodes it, in three quarters of the time: same decoder, fewer copies.

    uint8 (3, H, W) as `decode` gives it, or None where Pillow shall do it, or say why it can't be done.
    """
    decoder = jpeg_decoder()
    try:
        return decoder and decoder(torch.from_numpy(np.frombuffer(bytearray(content), np.uint8)))
    except RuntimeError:
        return None


@cache
def jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    """torchvision's, or None in a version without it: 0.29 has it on the way out."""
    try:
        from torchvision.io import decode_jpeg  # half a second of import, for those who decode
    except ImportError:
        return None
    return decode_jpeg


@cache
def formats() -> tuple[str, ...]:
    """Pillow's formats that are tried, by content, on every file."""
    Image.preinit()  # the common ones first
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_PICTURES)


@contextmanager
def pillow_limits(max_pixels: int) -> Iterator[None]:
    """Pillow's guard set to max_pixels, so that it holds for pictures inside pictures (.ico) too; and no warnings.

    Those, about odd EXIF data for instance, would come from every worker; what they are about decodes or raises.
    """
    saved = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2  # Pillow warns above it and refuses above twice it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = saved


def orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF data: as if there were none
        return 1


def eight_bit(picture: Image.Image) -> Image.Image:
    """Deep grey pictures -> 8 bit; all others are returned as they are."""
    # "I" is 32 bits; but PGM and, in some versions of Pillow, PNG files of 16 bits come in it
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return Image.fromarray(from_16_bit(np.asarray(picture)))
    if picture.mode in ("I", "F"):
        return Image.fromarray(stretched(np.asarray(picture)))
    return picture


def from_16_bit(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # v / 257, rounded


def stretched(values: np.ndarray) -> np.ndarray:
    """(v - min) / (max - min) in 0..255; a picture of one value is black."""
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite(high - low):
        raise ValueError("pixels that are not finite")
    return np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)


def with_mode(picture: Image.Image, mode: str) -> Image.Image:
    """8-bit picture of any of Pillow's modes -> L, RGB or RGBA."""
    if picture.has_transparency_data and mode != "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    if picture.mode not in ("1", "L", "P", "RGB", "RGBA"):  # not all modes convert to each other
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    return picture if picture.mode == mode else picture.convert(mode)


def reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture that Pillow can read"  # its own text is about a file object
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
