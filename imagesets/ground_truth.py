"""Ground truth of revisited Oxford and Paris (Radenovic et al. 2018), read from its pickle without running its code.

A pickle is a program. This reader lets it build plain Python values, and arrays and scalars of numbers, for which it
substitutes stand-ins for NumPy's classes. A pickle that names anything else is refused before that name is called.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parallel import Refused, refusing

LISTS = ("easy", "hard", "junk")


class Query(NamedTuple):
    """Name of an image, the query's box (left, top, right, bottom) in it in pixels, and rows of the database."""

    name: str
    box: tuple[float, float, float, float]
    easy: list[int]
    hard: list[int]
    junk: list[int]


class GroundTruth(NamedTuple):
    database: list[str]  # names of images, without .jpg
    queries: list[Query]


def read_ground_truth(path: str | os.PathLike) -> GroundTruth:
    """Reads .pkl as published, or .json with the same keys: imlist, qimlist, gnd [{bbx, easy, hard, junk}, ...].

    Raises:
        Refused: a file that can't be read or would run code, or lists that don't fit together.
    """
    with refusing(str(path), "make it readable"):
        content = Path(path).read_bytes()
    try:
        loaded = json.loads(content) if str(path).endswith(".json") else unpickle(content)
        return checked(plain(loaded))
    except Exception as error:  # pickle and values of the wrong type raise nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refused(f"{path}: not a ground truth of revisited Oxford or Paris: {reason[:160]}; give the published "
                      "file") from error


def checked(loaded: Mapping) -> GroundTruth:
    """The ground truth in plain values. Raises ValueError where its lists don't fit together."""
    missing = [key for key in ("imlist", "qimlist", "gnd") if key not in loaded]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}")
    database, names, entries = list(loaded["imlist"]), list(loaded["qimlist"]), list(loaded["gnd"])
    if not names or not database or len(names) != len(entries):
        raise ValueError(f"{len(database)} database images, {len(names)} queries and {len(entries)} entries of 'gnd'")
    queries = []
    for name, entry in zip(names, entries, strict=True):
        absent = [key for key in ("bbx", *LISTS) if key not in entry]
        if absent:
            raise ValueError(f"query {name}: no {absent[0]!r}")
        lists = [[int(row) for row in entry[key]] for key in LISTS]
        rows = [row for rows in lists for row in rows]
        if any(not 0 <= row < len(database) for row in rows):
            raise ValueError(f"query {name}: a row outside the {len(database)} images of the database")
        if len(set(rows)) < len(rows):
            raise ValueError(f"query {name}: an image occurs twice in easy, hard and junk")
        box = tuple(float(side) for side in entry["bbx"])
        if len(box) != 4 or not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"query {name}: bbx {box} is not a box (left, top, right, bottom)")
        queries.append(Query(str(name), box, *lists))
    return GroundTruth([str(name) for name in database], queries)


# ---- Pickles ----


class Dtype:
    """Stand-in for numpy.dtype: a type of numbers and its byte order."""

    def __init__(self, text: str, *_) -> None:
        self.text, self.order = str(text), "="

    def __setstate__(self, state: tuple) -> None:
        self.order = str(state[1])

    def values(self, raw: bytes | str) -> list:
        dtype = np.dtype(self.text.lstrip("<>=|")).newbyteorder(self.order.replace("|", "="))
        if dtype.kind not in "biufU":
            raise ValueError(f"an array of type {self.text}")
        # bytes written by Python 2 arrive as text, one character per byte
        return np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else bytes(raw), dtype).tolist()


class Array:
    """Stand-in for numpy.ndarray: its values in a flat list, as all arrays of a ground truth are flat."""

    def __init__(self, *_) -> None:
        self.values = []

    def __setstate__(self, state: tuple) -> None:
        _, _, dtype, _, raw = state
        self.values = list(raw) if isinstance(raw, list) else dtype.values(raw)  # a list: an array of objects


def scalar(dtype: Dtype, raw: bytes | str):
    return dtype.values(raw)[0]


def from_buffer(raw: bytes, dtype: Dtype, *_) -> Array:
    array = Array()
    array.values = dtype.values(raw)
    return array


def encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")  # how protocol 2 stores bytes; other encodings could decompress to any size


def no_bytes() -> bytes:
    return b""  # how protocol 2 stores empty bytes


NUMPY = {"_reconstruct": Array, "scalar": scalar, "_frombuffer": from_buffer, "ndarray": Array, "dtype": Dtype}
ALLOWED = {("_codecs", "encode"): encode, ("__builtin__", "bytes"): no_bytes, ("builtins", "bytes"): no_bytes} | {
    (module, name): stand_in
    for name, stand_in in NUMPY.items()
    for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric",
                   "numpy._core.numeric")
}


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"the pickle names {module}.{name}, which is not data; nothing was run")
        return ALLOWED[module, name]


def unpickle(content: bytes):
    return PlainUnpickler(io.BytesIO(content), encoding="latin1").load()


def plain(value):
    """Replaces stand-ins in nested lists and dictionaries by their values."""
    if isinstance(value, Array):
        return plain(value.values)
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
