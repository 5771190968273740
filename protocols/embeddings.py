"""Files of embeddings: an array and the images' names, as NumPy, safetensors or Parquet; row i belongs to name i.

    photos.npy           the array, which can be memory-mapped: numpy.load("photos.npy", mmap_mode="r")
    photos.safetensors   the tensor "features"
    photos.parquet       columns "name" and "features", the latter a list of numbers per row
    photos.npy.json      beside the first two: {"names": [...], "about": {...}}; in Parquet, "about" is in the metadata

Shapes: N images; an array is (N, D), or (N, tokens, D).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import atomic
import flags
from parallel import Refused, import_optional, refusing

FORMATS = {".npy": "numpy", ".safetensors": "safetensors", ".parquet": "pyarrow"}  # suffix: package


def write(path: Path, parts: list[np.ndarray], names: list[str], about: Mapping) -> None:
    """Write arrays, concatenated, as one file, atomically.

    Args:
        about: plain values, which `about_of` returns; the array's shape is added.

    Raises:
        Refused: the file can't be written.
    """
    about = dict(about, shape=[sum(map(len, parts)), *parts[0].shape[1:]])
    with refusing(f"--output {path}", "give a file that can be written"):
        atomic.mark_output(path)
        with atomic.replacing(path) as temporary:
            WRITERS[path.suffix](temporary, parts, names, about)
            if path.suffix != ".parquet":  # first the file beside it: without that, the array could not be read
                atomic.write_text(sidecar(path), json.dumps({"names": names, "about": about}, indent=1))


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
    """`about` of a file of embeddings; {} where there is none."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return json.loads(parquet.read_schema(path).metadata[b"about"])
        return json.loads(sidecar(path).read_text())["about"]
    except (OSError, ValueError, KeyError, TypeError):  # pyarrow's errors are ValueErrors
        return {}


def read(path: str | os.PathLike) -> tuple[np.ndarray, list[str], dict]:
    """A file of extract_features.py: features (N, ...), names, and {arch, weights, data_path, tokens, shape ...}.

    Raises:
        Refused: no such file, a damaged one, or one of another program.
    """
    path = Path(path)
    check_package("--features", path)
    if not path.is_file():
        raise Refused(f"--features {path}: no such file; write one with extract_features.py")
    about = about_of(path)
    if "shape" not in about:
        raise Refused(f"--features {path}: does not describe what it holds; write it with extract_features.py")
    if path.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.read_table(path)
        values = table["features"].combine_chunks().values.to_numpy(zero_copy_only=False)
        return values.reshape(about["shape"]), table["name"].to_pylist(), about
    try:
        names = json.loads(sidecar(path).read_text())["names"]
        array = np.load(path, mmap_mode="c") if path.suffix == ".npy" else load_safetensors(path)
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise Refused(f"--features {path}: damaged ({error}); write it again with extract_features.py") from error
    if not list(array.shape) == about["shape"] == [len(names), *about["shape"][1:]]:
        raise Refused(f"--features {path}: not what {sidecar(path).name} beside it describes; write both again with "
                      "extract_features.py")
    return array, names, about


def load_safetensors(path: Path) -> np.ndarray:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)["features"]
    except SafetensorError as error:
        raise ValueError(error) from error


def check_output(path: Path) -> None:
    """Refuse an --output that can't be a file, before any work."""
    if path.is_dir():
        raise Refused(f"--output {path}: a folder; give a file")
    if not path.exists():
        flags.check_folder(path, "--output")


def check_package(flag: str, path: Path) -> None:
    if path.suffix not in FORMATS:
        raise Refused(f"{flag} {path}: the file's name has to end in {', '.join(FORMATS)}")
    import_optional(FORMATS[path.suffix], f"{flag} {path}", FORMATS[path.suffix])
