"""Duplicates among images: equal files, and near duplicates by the cosine similarity of embeddings.

Near duplicates are joined to groups by union-find: two images are in one group if a chain of pairs above the threshold
connects them, as in DINOv2 (arXiv 2304.07193, section 3 and appendix A).

A group is written as (N,) int64: the number of the group's first image, for each image. Shapes: N images, D width.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import parallel
from imagesets.decode import MAX_PIXELS, Undecodable, formats, pillow_limits
from imagesets.joined import Joined
from imagesets.loaders import available_cores
from protocols import neighbours
from protocols.features import images_refused
from protocols.progress import progress

MOST_PAIRS = 1 << 22  # that wait to be joined

# ---- Groups ----


def join(n: int, parts: Iterable[np.ndarray]) -> np.ndarray:
    """Groups of n images from arrays (p, 2) of pairs. Holds n numbers and at most MOST_PAIRS more pairs than a part."""
    group, waiting, count = np.arange(n), [], 0
    for pairs in parts:
        waiting.append(pairs)
        count += len(pairs)
        if count > MOST_PAIRS:
            group, waiting, count = joined(group, waiting), [], 0
    return joined(group, waiting)


def joined(group: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(group)
    pairs = np.concatenate([np.stack([np.arange(n), group], 1), *parts])
    edges = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return first_members(connected_components(edges, directed=False)[1])


def first_members(labels: np.ndarray) -> np.ndarray:
    """Any numbering of groups -> the number of each group's first image."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]


def near_groups(features: Tensor, threshold: float, engine: str = "exact", device: str = "cpu") -> np.ndarray:
    """Groups of images joined by cosines of at least `threshold`; all processes call this and get the same."""
    group = join(len(features), neighbours.similar_pairs(features, threshold, engine, device))
    if parallel.world_size() == 1:
        return group
    parts = [np.stack([np.arange(len(g)), g], 1) for g in parallel.gather_objects(group)]
    return join(len(features), parts)


# ---- Equal files ----


def exact_groups(images: Joined) -> np.ndarray:
    """Groups of equal files, by their SHA-256; of images without a file of their own, by their pixels.

    Only files whose size another one has are read; all of them, if some images are in archives: the sizes of those are
    not known.

    Raises:
        Refused: an image can't be read.
    """
    sizes = [file_size(images, i) for i in range(len(images))]
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero((counts[inverse] > 1) | (min(sizes) < 0))
    digests = np.array([f"{i:064d}" for i in range(len(images))])  # of no other image
    with images_refused(), ThreadPoolExecutor(available_cores()) as threads:
        hashes = threads.map(lambda i: digest(images, int(i)), candidates)
        digests[candidates] = list(progress(hashes, len(candidates), "files compared"))
    return first_members(digests)


def file_size(images: Joined, i: int) -> int:
    """Bytes of the file; -1 for an image without one of its own."""
    try:
        return os.path.getsize(images.path(i)) if images.path(i) else -1
    except OSError:
        return -1


def digest(images: Joined, i: int) -> str:
    content = images.content(i)
    if content is None:
        pixels = images.load(i)
        return hashlib.sha256(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes()).hexdigest()
    try:
        return hashlib.sha256(Path(content).read_bytes() if isinstance(content, str) else content).hexdigest()
    except OSError as error:
        raise Undecodable(f"{images.name(i)}: {error.strerror}") from error


# ---- The image to keep ----


def largest(images: Joined, group: np.ndarray, among: np.ndarray) -> dict[int, int]:
    """The image to keep of each group of several: of the most pixels, then bytes, then the first.

    Args:
        group: (N,). among: numbers of the images to choose from.

    Returns:
        {number of the group: number of the image}.
    """
    members = among[np.bincount(group[among], minlength=len(group))[group[among]] > 1].tolist()
    best: dict[int, tuple] = {}
    for i in progress(members, len(members), "sizes of duplicates"):
        rank, number = (pixels(images, i), file_size(images, i), -i), int(group[i])
        best[number] = max(rank, best.get(number, rank))
    return {number: -rank[2] for number, rank in best.items()}


def pixels(images: Joined, i: int) -> int:
    """Height x width by the header of the file, or of the decoded image."""
    content = images.content(i)
    try:
        with pillow_limits(MAX_PIXELS), Image.open(io.BytesIO(content) if isinstance(content, bytes) else content,
                                             formats=formats()) as image:
            return image.width * image.height
    except Exception:  # no file, or none that Pillow opens: arrays, and headers of broken files raise many types
        try:
            _, height, width = images.load(i).shape
            return height * width
        except Undecodable:
            return 0


# ---- Measuring the threshold ----


def threshold_curve(features: Tensor, source: np.ndarray, thresholds: Sequence[float]) -> list[dict]:
    """Precision and recall of duplicates at each threshold, in %, of pairs and of the groups that the pairs make.

    Args:
        features: (N, D), N up to some ten thousand.
        source: (N,) int: images of one source are true duplicates; -1 is an image without any.

    Returns:
        {"threshold", "pairs", "precision", "recall", "group_precision", "group_recall", "kept"} per threshold; "kept"
        counts the groups, what deduplication would leave. A precision of nothing is None.
    """
    n = len(features)
    counts = np.bincount(source[source >= 0])
    true = int((counts * (counts - 1) // 2).sum())
    rows = []
    for threshold in thresholds:
        pairs = np.concatenate(list(neighbours.similar_pairs(features, threshold)))
        group = join(n, [pairs])
        right = int(same_source(source, pairs).sum())
        together = np.bincount(group, minlength=n)
        joint = int((together * (together - 1) // 2).sum())
        both = np.unique(np.stack([group, source], 1)[source >= 0], axis=0, return_counts=True)[1]
        joint_right = int((both * (both - 1) // 2).sum())
        rows.append({"threshold": threshold, "pairs": len(pairs), "precision": share(right, len(pairs)),
                     "recall": share(right, true), "group_precision": share(joint_right, joint),
                     "group_recall": share(joint_right, true), "kept": len(np.unique(group))})
    return rows


def average_precision(
    features: Tensor, source: np.ndarray, draws: int = 200, seed: int = 0
) -> tuple[float, list[float]]:
    """Area under precision over recall of all pairs by falling cosine, in %, and its 95 % bootstrap interval.

    Sources are drawn, with all their images; an image without duplicates is a source of its own.

    Args:
        features, source: as in `threshold_curve`; holds N (N - 1) / 2 pairs.
    """
    n, x = len(features), F.normalize(features.float(), dim=1)
    one, other = np.triu_indices(n, 1)
    order = torch.argsort((x @ x.T)[one, other], descending=True, stable=True).numpy()
    one, other = one[order], other[order]
    right = same_source(source, np.stack([one, other], 1))
    origin = np.unique(np.where(source >= 0, source, -1 - np.arange(n)), return_inverse=True)[1]

    def area(drawn: np.ndarray) -> float:  # (N,): how often each image's source is drawn
        weights = np.where(right, drawn[one], drawn[one] * drawn[other])
        hits = right * weights
        precision = np.cumsum(hits) / np.maximum(np.cumsum(weights), 1)
        return 100 * float((precision * hits).sum() / max(hits.sum(), 1))

    rng, sources = np.random.default_rng(seed), origin.max() + 1
    areas = [area(np.bincount(rng.integers(sources, size=sources), minlength=sources)[origin]) for _ in range(draws)]
    return area(np.ones(n, np.int64)), np.percentile(areas, (2.5, 97.5)).tolist()


def same_source(source: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    one, other = source[pairs[:, 0]], source[pairs[:, 1]]
    return (one == other) & (one >= 0)


def share(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
