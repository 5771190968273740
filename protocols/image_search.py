"""Nearest neighbours of images among the embeddings of extract_features.py, by cosine similarity.

Shapes: N images, Q queries, D width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import parallel
from imagesets.checking import Chosen
from imagesets.decode import Reading, decode
from imagesets.sources import Images, open_files, open_images
from parallel import Refused
from protocols import embeddings
from protocols.features import Network, images_refused, load_network, network_features
from protocols.knn import nearest

LONGEST_TITLE = 24  # characters


class Neighbours(NamedTuple):
    """Of each query: its row of the file, or None for an image file; (row, cosine) of its neighbours, nearest first."""

    queries: Sequence[str]
    rows: list[int | None]
    nearest: list[list[tuple[int, float]]]
    names: list[str]  # of all rows
    images: Images  # of all rows
    reading: Reading


def nearest_images(
    features: str, queries: Sequence[str], k: int = 8, data_path: str = "", weights: str = "", device: str = "cpu",
    batch_size: int = 32,
) -> Neighbours:
    """The k nearest images of each query.

    Args:
        features: file of extract_features.py with class tokens.
        queries: rows of the file, or paths of images, which go through the network that the file names.
        data_path, weights: where the images and weights are now; "": where the file says.

    Raises:
        Refused: the file, a query, the images or the weights don't exist or don't match.
    """
    array, names, about = embeddings.read(features)
    array = class_tokens(array, about)
    rows = [row_of(query, len(array)) for query in queries]
    images = open_named(data_path or about["data_path"], names, about)
    files = [query for query, row in zip(queries, rows, strict=True) if row is None]
    embedded = iter(embed(files, about, weights, device, batch_size) if files else ())
    vectors = torch.stack([next(embedded) if row is None else tensor(array[row]).float() for row in rows])
    cosines, candidates = nearest(vectors, tensor(array), k + 1)  # one more, in case the query itself is among them
    neighbours = [without(row, c.tolist(), i.tolist(), k) for row, c, i in zip(rows, cosines, candidates, strict=True)]
    return Neighbours(queries, rows, neighbours, names, images, stored_reading(about))


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def without(row: int | None, cosines: Sequence[float], candidates: Sequence[int], k: int) -> list[tuple[int, float]]:
    """The first k (candidate, cosine), without the query's own row."""
    return [(i, c) for i, c in zip(candidates, cosines, strict=True) if i != row][:k]


# ---- Queries ----


def class_tokens(array: np.ndarray, about: dict) -> np.ndarray:
    if about.get("tokens") == "patch":
        raise Refused("--features: the file has patch tokens only; extract class tokens with --tokens cls or both")
    return array if about.get("tokens") == "cls" else array[:, 0]


def row_of(query: str, n: int) -> int | None:
    """The row that a query names; None for an image file."""
    if re.fullmatch("[0-9]+", query) and int(query) < n:
        return int(query)
    if not os.path.isfile(query):
        raise Refused(f"--query {query}: neither a row, 0 to {n - 1}, nor an image file; give one of them")
    return None


def embed(paths: Sequence[str], about: dict, weights: str, device: str, batch_size: int) -> Tensor:
    """(Q, D) features of image files, computed as those of the file were.

    Args:
        about: what the file of features says.
        weights: "": the ones the file names.
    """
    network = stored_network(about, weights, parallel.pick_device(device))
    images = open_files(os.getcwd(), paths, network.reading)
    return network_features(network, images, batch_size, num_workers=0)


def stored_network(about: dict, weights: str, device: torch.device | str) -> Network:
    """The network that a file of embeddings was extracted with.

    Args:
        about: what the file says.
        weights: "": the ones the file names.

    Raises:
        Refused: these weights don't exist, or are others.
    """
    weights = weights or about.get("weights") or ""
    network = load_network(
        weights, about["arch"], about.get("patch_size"), about.get("checkpoint_key"), device,
        about.get("crop_size"), about.get("resize_size"), about["precision"], about["seed"], mean=about.get("mean"),
        std=about.get("std"), in_chans=about.get("in_chans"),
        **{k: v for k, v in about.get("reading", {}).items() if k != "in_chans"})
    if network.about["weights_sha256"] != about["weights_sha256"]:
        raise Refused(f"--pretrained_weights {weights}: not the weights that the file's features were extracted with; "
                      "give those")
    return network


def stored_reading(about: dict) -> Reading:
    """How the images of a file of embeddings were decoded, by what the file says."""
    return Reading(**{"in_chans": about["in_chans"]} | about.get("reading", {}))  # not in files of older versions


def open_stored(data_path: str, about: dict) -> Images:
    """The images at `data_path`, decoded as those of a file of embeddings were, without those that it left out."""
    images, left_out = open_images(data_path, None, **stored_reading(about).decoding()), about.get("left_out")
    return Chosen(images, sorted(set(range(len(images))) - set(left_out))) if left_out else images


def open_named(data_path: str, names: Sequence[str], about: dict) -> Images:
    """`open_stored`, refused unless the images have these names in this order."""
    images = open_stored(data_path, about)
    same = len(images) == len(names) and all(
        os.path.basename(images.name(i)) == os.path.basename(name) for i, name in enumerate(names))
    if not same:
        raise Refused(f"--data_path {data_path}: not the images that the features were extracted from, by their names; "
                      "give the folder as it was, or extract the features again")
    return images


# ---- Sheet ----


def sheet_rows(result: Neighbours) -> list[list[tuple[Tensor, str]]]:
    """Per query, (image, title) of the query and of its neighbours, for `charts.draw_sheet`."""
    sheet = []
    with images_refused():
        for query, row, neighbours in zip(result.queries, result.rows, result.nearest, strict=True):
            image = decode(query, **result.reading.decoding()) if row is None else result.images.load(row)
            name = query if row is None else result.names[row]
            sheet.append([(image, f"query\n{short(name)}")] + [
                (result.images.load(i), f"{cosine:.3f}\n{short(result.names[i])}") for i, cosine in neighbours])
    return sheet


def short(name: str) -> str:
    """The file name, or its end where it is long."""
    name = os.path.basename(name)
    return name if len(name) <= LONGEST_TITLE else "\N{HORIZONTAL ELLIPSIS}" + name[1 - LONGEST_TITLE :]
