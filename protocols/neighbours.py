"""Exact neighbours among many embeddings, in bounded memory: the search of `knn.nearest`, or faiss's where installed.

Both compare all pairs, a block at a time, and give the same neighbours up to rounding.

Shapes: N embeddings, M queries, D width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import parallel
from parallel import Refused
from protocols import knn
from protocols.progress import progress

ENGINES = ("auto", "exact", "faiss")
ROUNDING = 1e-6  # by which the float32 cosine of two copies may be below 1; thresholds are compared with this margin
ROWS = 64  # of a block whose similar pairs are listed at a time: where all are similar, their list stays small


def pick_engine(engine: str, device: torch.device) -> str:
    """"exact" or "faiss"; "auto" is faiss on a single CPU process where it is installed.

    Raises:
        Refused: "faiss" that is not installed, or on another device.
    """
    alone = device.type == "cpu" and parallel.world_size() == 1
    if engine == "faiss" and not alone:
        raise Refused("--search faiss: runs in one process on the CPU; give --search exact, which takes GPUs and "
                      "several processes")
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        if engine == "faiss":
            raise Refused("--search faiss: not installed; pip install faiss-cpu, or give --search exact") from error
        return "exact"
    return "faiss" if engine != "exact" and alone else "exact"


def nearest_rows(
    queries: Tensor, bank: Tensor, k: int, engine: str = "exact", device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosines (M, K) and rows (M, K) of the k nearest of `bank` to each query, nearest first; see `knn.nearest`.

    Args:
        queries: (M, D). bank: (N, D). K is k, or N if that is smaller.
    """
    if engine == "exact":
        return knn.nearest(queries, bank, k, device=device)
    import faiss

    knn.check_features(queries, bank)
    index, place = faiss.IndexFlatIP(bank.shape[1]), knn.embedding(bank, "cosine", torch.device("cpu"))
    for block in bank.split(knn.COLUMNS):
        index.add(place(block).float().numpy())
    parts = [index.search(place(block).float().numpy(), min(k, len(bank))) for block in
             progress(queries.split(knn.ROWS), len(queries), "neighbours", knn.ROWS)]
    cosines, rows = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    order = rows.sort(1)[1]  # faiss leaves the order of equal cosines open: by row, as above
    cosines, rows = cosines.gather(1, order), rows.gather(1, order)
    order = cosines.sort(dim=1, descending=True, stable=True)[1]
    return cosines.gather(1, order), rows.gather(1, order)


def similar_pairs(
    features: Tensor, threshold: float, engine: str = "exact", device: torch.device | str = "cpu",
    rows: int = knn.ROWS, columns: int = knn.COLUMNS,
) -> Iterator[np.ndarray]:
    """All pairs i < j of rows with a cosine of at least `threshold`, up to ROUNDING: arrays (n, 2), each pair once.

    Compares N (N - 1) / 2 pairs, `rows` x `columns` at a time. Of several processes, each yields a part of the pairs.

    Args:
        features: (N, D).

    Raises:
        Refused: features that are not finite.
    """
    knn.check_features(features, features)
    blocks, threshold = range(0, len(features), rows), threshold - ROUNDING
    if engine == "faiss":
        yield from faiss_pairs(features, threshold, progress(blocks, len(features), "similar pairs", rows), rows)
        return
    device = parallel.group_device(device)
    keys = knn.embedding(features, "cosine", device)(features)
    mine = blocks[parallel.rank() :: parallel.world_size()]
    for first in progress(mine, len(mine) * rows, "similar pairs", rows):
        x = keys[first : first + rows]
        for start in range(first, len(keys), columns):  # pairs with an earlier row came with that row
            similar = x @ keys[start : start + columns].T >= threshold
            for offset, part in zip(range(0, rows, ROWS), similar.split(ROWS), strict=False):
                i, j = part.nonzero(as_tuple=True)
                pairs = torch.stack([i + first + offset, j + start], 1)
                yield pairs[pairs[:, 0] < pairs[:, 1]].cpu().numpy()


def faiss_pairs(features: Tensor, threshold: float, blocks: Iterator[int], rows: int) -> Iterator[np.ndarray]:
    import faiss

    index, place = faiss.IndexFlatIP(features.shape[1]), knn.embedding(features, "cosine", torch.device("cpu"))
    below = float(np.nextafter(np.float32(threshold), np.float32(-1)))  # faiss returns what lies above its radius
    for first in blocks:
        x = place(features[first : first + rows]).float().numpy()
        index.add(x)  # so far: pairs with a later row come with that row
        ends, _, found = index.range_search(x, below)
        i = np.repeat(np.arange(len(x)), np.diff(ends).astype(np.int64)) + first
        yield np.stack([found, i], 1)[found < i]
