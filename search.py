"""Nearest neighbours of images among embeddings, as a sheet of pictures: the query first, then what is most like it.

    python search.py --features photos.npy --query 17 403 --output sheet.png
    python search.py --features photos.npy --query mine.jpg --k 12 --output sheet.png

--features is a file of extract_features.py with class tokens. A query is a row of it, or an image file, which goes
through the network whose weights the file names. The search is faiss's exact one, by cosine.

Shapes: N images, Q queries, D width.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import flags
import parallel
from imagesets import loaders
from imagesets.decode import decode
from imagesets.sources import open_files
from protocols import charts, embeddings, features, sheets

ROWS_AT_A_TIME = 65_536
CELL = 224  # pixels of a picture's longer side on the sheet
LONGEST_TITLE = 24  # characters


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Nearest neighbours of images among embeddings, as a sheet of pictures.")
    add = parser.add_argument
    add("--features", required=True, help="file that extract_features.py wrote")
    add("--query", required=True, nargs="+", help="rows of the file, from 0, or images")
    add("--k", type=flags.number(int, 1, 100), default=8, help="neighbours a query, 100 at most")
    add("--output", default="sheet.png", help="picture to write: " + ", ".join(charts.FORMATS))
    add("--data_path", default="", help="where the images of the file are now, if they were moved")
    add("--pretrained_weights", default="", help="where the weights of the file are now, if they were moved")
    add("--batch_size_per_gpu", type=flags.positive_int, default=32, help="query images at a time")
    add("--device", default="cpu", help="of the network: auto, cpu, cuda or cuda:N")
    return parser


# ---- Search ----


def unit_rows(array: np.ndarray) -> np.ndarray:
    """float32 copy with rows of length 1; a row of zeros stays."""
    array = np.array(array, np.float32)
    return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)


def nearest(array: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and rows (Q, min(k, N)) of each query's nearest rows of `array`, the nearest first.

    Args:
        array: (N, D), queries: (Q, D).

    Raises:
        ValueError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ValueError("the search needs faiss: pip install faiss-cpu") from error
    index = faiss.IndexFlatIP(array.shape[1])
    for first in range(0, len(array), ROWS_AT_A_TIME):
        index.add(unit_rows(array[first : first + ROWS_AT_A_TIME]))
    return index.search(unit_rows(queries), min(k, len(array)))


def without(row: int | None, cosines: np.ndarray, rows: np.ndarray, k: int) -> list[tuple[int, float]]:
    """The k nearest (row, cosine), the query's own row left out."""
    return [(int(r), float(c)) for r, c in zip(rows, cosines, strict=True) if r != row][:k]


# ---- Queries ----


def class_tokens(array: np.ndarray, about: dict) -> np.ndarray:
    if about.get("tokens") == "patch":
        raise ValueError("--features: the file has patch tokens only; extract class tokens with --tokens cls or both")
    return array if about.get("tokens") == "cls" else array[:, 0]


def row_of(query: str, n: int) -> int | None:
    """A query's row; None for an image.

    Raises:
        ValueError: there is neither such a row nor such a file.
    """
    if re.fullmatch("[0-9]+", query) and int(query) < n:
        return int(query)
    if not os.path.isfile(query):
        raise ValueError(f"--query {query}: neither a row, 0 to {n - 1}, nor a file of an image")
    return None


def embed(paths: Sequence[str], about: dict, args: argparse.Namespace) -> np.ndarray:
    """(Q, D) features of image files, computed as those of the file were.

    Raises:
        ValueError, OSError: the weights are missing or others, or a picture can't be read.
    """
    names = ("arch", "patch_size", "checkpoint_key", "resize_size", "crop_size", "precision", "seed")
    for name in names:
        setattr(args, name, about.get(name))
    args.pretrained_weights = args.pretrained_weights or about.get("weights") or ""
    args.num_workers = 0
    device = parallel.pick_device(args.device)
    network = features.load_network(
        args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key, device, args.crop_size,
        args.resize_size, args.precision, args.seed)
    if network.about["weights_sha256"] != about["weights_sha256"]:
        raise ValueError(f"--pretrained_weights {args.pretrained_weights}: not the weights that the file's features "
                         "come from; give those")
    images = open_files(os.getcwd(), paths, network.info["in_chans"])
    return features.network_features(network, images, args.batch_size_per_gpu, num_workers=0).numpy()


# ---- Sheet ----


def short(name: str) -> str:
    """The end of a name, as a title."""
    name = os.path.basename(name)
    return name if len(name) <= LONGEST_TITLE else "\N{HORIZONTAL ELLIPSIS}" + name[1 - LONGEST_TITLE :]


def draw_sheet(rows: Sequence[Sequence[tuple[np.ndarray, str]]], path: str | Path) -> None:
    """Write rows of (uint8 picture, title) as one picture: a query with its neighbours a row, the query framed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(map(len, rows))
    figure = Figure(figsize=(1.7 * columns, 2.1 * len(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: no global backend
    for row, cells in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axes in row:
            axes.axis("off")
        for i, (axes, (picture, title)) in enumerate(zip(row, cells, strict=False)):
            axes.imshow(sheets.fit(picture, CELL))
            axes.set_title(title, fontsize=7, color=charts.INK)
            if i == 0:
                axes.axis("on")
                axes.set(xticks=[], yticks=[])
                for spine in axes.spines.values():
                    spine.set(color=charts.COLORS[1], linewidth=2.5)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# ---- The run ----


def search(args: argparse.Namespace) -> list[list[tuple[int, float]]]:
    """The whole search: prints the neighbours, writes --output, returns (row, cosine) of each query's.

    Raises:
        flags.Refused: bad input, in one line.
    """
    try:
        if Path(args.output).suffix.lower() not in charts.FORMATS:
            raise ValueError(f"--output {args.output}: a picture's name ends in {', '.join(charts.FORMATS)}")
        embeddings.check_output(Path(args.output))
        array, names, about = embeddings.read(args.features)
        array = class_tokens(array, about)
        own = [row_of(query, len(array)) for query in args.query]
        images = open_named(args.data_path or about["data_path"], names, about["in_chans"])
        files = [query for query, row in zip(args.query, own, strict=True) if row is None]
        computed = iter(embed(files, about, args) if files else ())
        queries = np.stack([next(computed) if row is None else np.asarray(array[row], np.float32) for row in own])
        cosines, rows = nearest(array, queries, args.k + 1)
        found = [without(*one, args.k) for one in zip(own, cosines, rows, strict=True)]
        draw_sheet([sheet_row(query, row, near, images, names, about["in_chans"])
                    for query, row, near in zip(args.query, own, found, strict=True)], args.output)
    except (ValueError, OSError) as error:
        raise flags.Refused(error) from error
    for query, row, near in zip(args.query, own, found, strict=True):
        print(f"{query}" + ("" if row is None else f": {names[row]}"))
        for neighbour, cosine in near:
            print(f"  {cosine:.4f}  row {neighbour}  {names[neighbour]}")
    print(f"wrote {args.output}", flush=True)
    return found


def open_named(data_path: str, names: Sequence[str], in_chans: int) -> loaders.Images:
    """The images of the features.

    Raises:
        ValueError: they are others, or more or fewer.
    """
    images = loaders.open_images(data_path, None, in_chans)
    same = len(images) == len(names) and all(
        os.path.basename(images.name(i)) == os.path.basename(names[i]) for i in range(len(names)))
    if not same:
        raise ValueError(f"--data_path {data_path}: not the images of the features, by their names; give the folder as "
                         "it was, or extract the features anew")
    return images


def sheet_row(query: str, row: int | None, near: Sequence[tuple[int, float]], images: loaders.Images,
              names: Sequence[str], in_chans: int) -> list[tuple[np.ndarray, str]]:
    """The query's picture and its neighbours', with their titles."""
    picture = decode(query, in_chans) if row is None else images.load(row)
    first = (sheets.as_picture(picture), f"query\n{short(query if row is None else names[row])}")
    return [first] + [(sheets.as_picture(images.load(i)), f"{cosine:.3f}\n{short(names[i])}") for i, cosine in near]


def main(args: argparse.Namespace) -> int:
    return flags.exit_code("search.py", search, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
