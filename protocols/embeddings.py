"""Files of embeddings: an array and the images' names, as NumPy, safetensors or Parquet; row i belongs to name i.

    photos.npy           the array, to be mapped: numpy.load("photos.npy", mmap_mode="r")
    photos.safetensors   the tensor "features"
    photos.parquet       columns name and features, a list of numbers a row
    photos.npy.json      beside the first two: {"names": [...], "about": {...}}; Parquet has the latter in its metadata

Shapes: N images; an array is (N, D), or (N, tokens, D).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

import flags

FORMATS = {".npy": "numpy", ".safetensors": "safetensors", ".parquet": "pyarrow"}  # suffix: package


def write(path: Path, parts: list[np.ndarray], names: list[str], about: Mapping) -> None:
    """Write arrays, one after the other, as one file; it appears under its name when it is whole.

    `about`, of plain values, is what `about_of` reads; it gets the array's shape.
    """
    about = dict(about, shape=[sum(map(len, parts)), *parts[0].shape[1:]])
    temporary = path.with_name(f".{path.name}.tmp")
    WRITERS[path.suffix](temporary, parts, names, about)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    if path.suffix != ".parquet":
        write_text(sidecar(path), json.dumps({"names": names, "about": about}, indent=1))
    os.replace(temporary, path)


def write_npy(path: Path, parts: list[np.ndarray], names: list[str], about: Mapping) -> None:
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(parts[0].dtype), "fortran_order": False,
                  "shape": tuple(about["shape"])}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).data)


def write_safetensors(path: Path, parts: list[np.ndarray], names: list[str], about: Mapping) -> None:
    from safetensors.numpy import save_file

    save_file({"features": np.concatenate(parts)}, path)


def write_parquet(path: Path, parts: list[np.ndarray], names: list[str], about: Mapping) -> None:
    import pyarrow
    from pyarrow import parquet

    width = int(np.prod(about["shape"][1:]))
    values = pyarrow.list_(pyarrow.from_numpy_dtype(parts[0].dtype), width)
    schema = pyarrow.schema([("name", pyarrow.string()), ("features", values)], {"about": json.dumps(about)})
    first = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for part in parts:
            column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.asarray(part).ravel()), width)
            writer.write_table(pyarrow.table([names[first : first + len(part)], column], schema=schema))
            first += len(part)


WRITERS = {".npy": write_npy, ".safetensors": write_safetensors, ".parquet": write_parquet}


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def about_of(path: Path) -> dict:
    """What a file of features says of itself; {} where it says nothing."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return json.loads(parquet.read_schema(path).metadata[b"about"])
        return json.loads(sidecar(path).read_text())["about"]
    except (OSError, ValueError, KeyError, TypeError):  # pyarrow's errors are ValueErrors
        return {}


def read(path: str | os.PathLike) -> tuple[np.ndarray, list[str], dict]:
    """What extract_features.py wrote: features (N, ...), names, and {arch, weights, data_path, tokens, shape ...}.

    Raises:
        ValueError, OSError: no such file, or not written by it.
    """
    path = Path(path)
    check_package("--features", path)
    if not path.is_file():
        raise FileNotFoundError(f"--features {path}: no such file; write one with extract_features.py")
    about = about_of(path)
    if "shape" not in about:
        raise ValueError(f"--features {path}: it does not say what it holds; write it with extract_features.py")
    if path.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.read_table(path)
        values = table["features"].combine_chunks().values.to_numpy(zero_copy_only=False)
        return values.reshape(about["shape"]), table["name"].to_pylist(), about
    names = json.loads(sidecar(path).read_text())["names"]
    try:
        array = np.load(path, mmap_mode="r") if path.suffix == ".npy" else load_safetensors(path)
    except Exception as error:  # of NumPy or safetensors, on a damaged file
        raise ValueError(f"--features {path}: damaged ({error}); write it again with extract_features.py") from error
    if not list(array.shape) == about["shape"] == [len(names), *about["shape"][1:]]:
        raise ValueError(f"--features {path}: not what {sidecar(path).name} beside it describes; write both again with "
                         "extract_features.py")
    return array, names, about


def load_safetensors(path: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(path)["features"]


def check_output(path: Path) -> None:
    """ValueError where --output can't be a file, before any work."""
    if path.is_dir():
        raise ValueError(f"--output {path}: a folder; give a file")
    if not path.exists():
        flags.check_folder(path, "--output")


def check_package(flag: str, path: Path) -> None:
    if path.suffix not in FORMATS:
        raise ValueError(f"{flag} {path}: the file's name has to end in {', '.join(FORMATS)}")
    package = FORMATS[path.suffix]
    try:
        __import__(package)
    except ImportError as error:
        raise ValueError(f"{flag} {path}: {path.suffix} files need {package}: pip install {package}") from error


# ---- Small files ----


def replace(path: Path, write: Callable) -> None:
    """`write` a file under a temporary name, then give it its own: it is whole, or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    replace(path, lambda file: file.write(text.encode()))
