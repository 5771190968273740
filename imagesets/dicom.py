"""DICOM files, where pydicom is installed: the first frame of each, by the range that the file declares.

Black and white are the ends of the stored bits (BitsStored, PixelRepresentation). With a range given, values are those
after RescaleSlope and RescaleIntercept, such as Hounsfield units. MONOCHROME1 is inverted.
"""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import BinaryIO

import numpy as np
from PIL import Image

from imagesets import deep
from imagesets.deep import Range, Undecodable

SUFFIXES = (".dcm", ".dicom")
REMEDY = "pip install pydicom to read DICOM files"


def installed() -> bool:
    return find_spec("pydicom") is not None


def is_dicom(file: BinaryIO) -> bool:
    """Whether it has DICOM's preamble and prefix. Goes back to the start."""
    start = file.read(132)
    file.seek(0)
    return start[128:] == b"DICM"


def read(file: BinaryIO, max_pixels: int, value_range: Range | None) -> Image.Image:
    """An 8-bit Pillow image, grey or RGB.

    Raises:
        Undecodable: no pydicom, more pixels than max_pixels, or a compression that needs another package.
    """
    if not installed():
        raise Undecodable(f"a DICOM file; {REMEDY}, or convert it")
    import pydicom
    from pydicom.pixels import apply_rescale, pixel_array

    data = pydicom.dcmread(io.BytesIO(file.read()))
    if data.Rows * data.Columns > max_pixels:
        raise Undecodable(f"{data.Rows} x {data.Columns}: more than {max_pixels} pixels")
    values = pixel_array(data, index=0)  # colours as RGB
    if values.ndim == 3:
        if data.BitsAllocated != 8:
            raise Undecodable(f"colour of {data.BitsAllocated} bits; convert it to .npy")
        return Image.fromarray(values)
    if value_range is None:
        bits, signed = data.BitsStored, data.PixelRepresentation
        value_range = (-(2 ** (bits - 1)) if signed else 0, 2 ** (bits - signed) - 1)
    else:
        values = apply_rescale(values, data)
    grey = deep.scaled(np.asarray(values), value_range)
    return Image.fromarray(255 - grey if data.PhotometricInterpretation == "MONOCHROME1" else grey)
