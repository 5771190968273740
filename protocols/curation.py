"""From a pile of images to a training set, as in DINOv2 (arXiv 2304.07193, section 3): without duplicates, near to
trusted images, and balanced over what it contains (arXiv 2405.15613).

Each stage works on the embeddings of what the stages before have left, and records what it drops and why.

Shapes: N images of the pile, n that are left, D width.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import parallel
from imagesets.checking import open_checked
from imagesets.decode import Reading
from imagesets.joined import Joined
from imagesets.sources import Images, has_test_part
from parallel import Refused
from protocols import clustering, duplicates, embeddings, extraction, knn, neighbours, sampling
from protocols.features import Network, images_hash
from protocols.image_search import class_tokens, open_stored, tensor
from protocols.progress import duration

EXACT, NEAR, COPY, AGAINST, FAR, SURPLUS = (
    "exact duplicate", "near duplicate", "copy of --against", "near --against", "not near --trusted",
    "surplus of a cluster")


class Settings(NamedTuple):
    """What `curate` does; flags of curate.py describe the fields."""

    duplicate_threshold: float = 0.0
    against_threshold: float = 0.0
    neighbors: int = 4
    from_clusters: int = 0
    cluster_votes: int = 1
    keep: int = 0
    clusters: tuple[int, ...] = ()
    iterations: int = 50
    resampling_steps: int = 10
    seed: int = 0


class Curated(NamedTuple):
    """What became of each image of the pile."""

    kept: np.ndarray  # numbers of the images that are left, ascending
    reasons: dict[int, tuple[str, int | None]]  # of each other: why, and the image that it duplicates
    counts: list[dict]  # a line per stage
    group: np.ndarray  # (N,) duplicate groups: the number of the image that is kept of each
    levels: list  # of clusters, where the set was balanced
    clustered: np.ndarray  # the images that the finest level clusters


# ---- Embeddings ----


def open_pile(data_paths: Sequence[str], reading: Reading, flag: str = "--data_path") -> Joined:
    """The images of several folders, lists or shards as one set. Raises Refused: one of them has no images."""
    return Joined([open_checked(path, None, reading, flag) for path in data_paths])


def say_parts(data_paths: Sequence[str]) -> None:
    """Say where test images are in the pile, because a path is a folder or archive that has a part for them."""
    for path in data_paths:
        if (os.path.isdir(os.path.expanduser(path)) or path.lower().endswith(".zip")) and has_test_part(path):
            parallel.say(f"--data_path {path!r}: images of all its parts are in the pile, those of val or test too; to "
                         "train on no test image, give its train folder alone and the other one to --against")


def embed(
    network: Network, data_paths: Sequence[str], images: Joined, output: Path, about: dict, batch_size: int,
    num_workers: int,
) -> Tensor:
    """(N, D) embeddings, computed and kept in `output`, one file per data path; a stopped run is resumed.

    Args:
        output: name of the files, without number and suffix. about: has the seed and precision of the network.
    """
    arrays = []
    for number, (path, part) in enumerate(zip(data_paths, images.parts, strict=True)):
        file = output.with_name(f"{output.name}{number or ''}.npy")
        own = extraction.describe(network, path, "cls", about["seed"], about["precision"])
        extraction.extract(network, part, file, own, batch_size=batch_size, num_workers=num_workers,
                           flag="--output_dir")
        parallel.barrier()  # the main process writes the file
        arrays.append(tensor(embeddings.read(file)[0]))
    return torch.cat(arrays) if len(arrays) > 1 else arrays[0]


def read_embeddings(files: Sequence[str], data_paths: Sequence[str]) -> tuple[Joined, Tensor, dict]:
    """The pile and its (N, D) embeddings from files of extract_features.py, one per data path; what they say.

    Raises:
        Refused: other files, images or networks than these.
    """
    if len(files) != len(data_paths):
        raise Refused(f"--features: {len(files)} file(s) for {len(data_paths)} of --data_path; give one for each, in "
                      "the same order")
    parts, arrays, abouts = [], [], []
    for file, path in zip(files, data_paths, strict=True):
        array, names, about = embeddings.read(file)
        parts.append(belonging(path, file, names, about))
        arrays.append(tensor(class_tokens(array, about)))
        abouts.append(about)
        if about["weights_sha256"] != abouts[0]["weights_sha256"] or arrays[-1].shape[1:] != arrays[0].shape[1:]:
            raise Refused(f"--features {file}: extracted with other weights than {files[0]}; give files of "
                          "the same")
    return Joined(parts), torch.cat(arrays) if len(arrays) > 1 else arrays[0], abouts[0]


def belonging(path: str, file: str, names: Sequence[str], about: dict) -> Images:
    """The images at `path`, without those that the extraction left out, if they are those of the file.

    Where the images are at the same place, sizes and times of the files have to be the same too; in another place,
    names are all that can be compared.
    """
    images = open_stored(path, about)
    own = [images.name(i) for i in range(len(images))]
    where = f"--features {file}: not the embeddings of --data_path {path}"
    remedy = "extract them again, or leave --features out"
    if below(own) != below(names):
        raise Refused(f"{where} ({len(names)} images of other names or in another order than its {len(own)}); {remedy}")
    known = about.get("fingerprint", {}).get("images")
    if known and known != images_hash(images):
        if own == list(names):
            raise Refused(f"{where}: its images have changed since; {remedy}")
        parallel.say(f"{path}: its images have the names of those of {file}, which are taken for the same")
    return images


def below(names: Sequence[str]) -> list[str]:
    """Names without the folder that all of them share."""
    cut = os.path.commonprefix([os.path.dirname(name) + "/" for name in names]).rfind("/") + 1
    return [name[cut:] for name in names] if cut else list(names)


# ---- The cost, before the work ----


def estimate(
    n: int, width: int, against: int, trusted: int, settings: Settings, device: torch.device | str
) -> str:
    """One line: the memory and time that the stages may take, from the measured speed of a matrix product."""
    sizes = settings.clusters or clustering.default_sizes(n)
    products = n * n / 2 if settings.duplicate_threshold else 0.0  # each pair once
    products += n * against
    products += sizes[0] * (settings.iterations * n + trusted) if settings.from_clusters else n * trusted
    points = n
    for level, k in enumerate(sizes if settings.keep else ()):
        products += points * k * settings.iterations * (1 + (settings.resampling_steps if level else 0))
        points = k
    rows = 3 * n + 2 * (against + trusted)  # embeddings, those that are left, and these normalized
    if settings.keep or settings.from_clusters:
        drawn = max(clustering.FEWEST, clustering.SAMPLE * sizes[0])  # for the first centroids
        rows += max(drawn if drawn < n else 0, 6 * sizes[0])  # old and new centroids, some in float64
    blocks = 3 * knn.ROWS * knn.COLUMNS + 2 * min(n, knn.COLUMNS) * width  # similarities; points
    time_left = duration(2 * products * width / product_rate(width, device))
    return (f"{n} embeddings of width {width}: at most {4 * (rows * width + blocks) / 1e9:.1f} GB of memory beside the "
            f"network, and about {time_left} for neighbours and clusters by this device's speed, without reading and "
            "embedding the images")


def product_rate(width: int, device: torch.device | str) -> float:
    """FLOP/s of a product of 512 x `width` and `width` x 8192 matrices."""
    x, y = torch.ones(512, width, device=device), torch.ones(width, 8192, device=device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        (x @ y)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * x.numel() * y.shape[1] / min(times)


# ---- The stages ----


class Stages:
    """What is left of n images, and the record of what was dropped."""

    def __init__(self, n: int) -> None:
        self.left = np.arange(n)
        self.reasons: dict[int, tuple[str, int | None]] = {}
        self.counts = [{"stage": "images", "dropped": 0, "left": n}]

    def keep(self, stage: str, kept: np.ndarray, reason: str, keeper: np.ndarray | None = None) -> None:
        """Drop all images but `kept`, a subset of `left`; `keeper`: (N,) the image that is kept in place of each."""
        dropped = np.setdiff1d(self.left, kept)
        self.reasons |= {int(i): (reason, None if keeper is None else int(keeper[i])) for i in dropped}
        self.left = np.asarray(kept)
        self.counts.append({"stage": stage, "dropped": len(dropped), "left": len(kept)})
        parallel.say(f"{stage}: {len(dropped)} dropped, {len(kept)} left")
        if not len(kept):
            raise Refused(REMEDIES[reason])


REMEDIES = {
    COPY: "--against: every image of the pile is a copy of one of it; give a pile of other images",
    AGAINST: "--against: every image of the pile is near one of it; raise --against_threshold",
    FAR: "--from_clusters: no cluster holds enough trusted images; lower --cluster_votes",
}


def curate(
    images: Joined, features: Tensor, settings: Settings, against: tuple[Joined, Tensor] | None = None,
    trusted: Tensor | None = None, engine: str = "exact", device: torch.device | str = "cpu",
) -> Curated:
    """Drop duplicates, copies of images of `against` and what is near them, and what is far from `trusted`; balance.

    Args:
        features: (N, D). against: images and their embeddings. trusted: embeddings. All (., D) by the same network;
            None leaves the stage out.

    Raises:
        Refused: nothing is left.
    """
    stages, group, levels, clustered = Stages(len(images)), None, [], np.zeros(0, np.int64)
    every = images if against is None else Joined([*images.parts, *against[0].parts])
    exact = parallel.on_main(lambda: duplicates.exact_groups(every))  # images of the pile come first
    group = drop_duplicates(stages, images, exact[: len(images)], features, settings, engine, device)
    if against is not None:
        drop_groups(stages, group, np.isin(exact[: len(images)], exact[len(images) :]), "copies of --against", COPY)
        threshold = settings.against_threshold or settings.duplicate_threshold
        cosines = neighbours.nearest_rows(features, against[1], 1, engine, device)[0][:, 0]
        drop_groups(stages, group, (cosines >= threshold - neighbours.ROUNDING).numpy(), "against", AGAINST)
    if trusted is not None:
        retrieve(stages, features[stages.left], trusted, settings, engine, device)
    if settings.keep > len(stages.left):
        parallel.say(f"--keep {settings.keep}: {len(stages.left)} images are left, fewer than --keep; all are kept")
    if settings.keep:
        sizes = level_sizes(settings, len(stages.left))
        clustered = stages.left
        levels = clustering.hierarchy(features[clustered], sizes, settings.iterations, settings.resampling_steps,
                                      settings.seed, device)
        kept = clustered[sampling.balanced_sample(levels, settings.keep, settings.seed)]
        stages.keep("balance", kept, SURPLUS)
    return Curated(stages.left, stages.reasons, stages.counts, group, levels, clustered)


def check_settings(settings: Settings, n: int) -> None:
    """Raises Refused: more clusters than images, or levels that do not fall in size."""
    sizes = settings.clusters
    if any(one <= other for one, other in zip(sizes, sizes[1:], strict=False)):
        raise Refused(f"--clusters {' '.join(map(str, sizes))}: give falling numbers, from the finest level")
    if sizes and sizes[0] > n:
        raise Refused(f"--clusters {sizes[0]}: more clusters than the pile's {n} images; lower it")


def level_sizes(settings: Settings, n: int) -> Sequence[int]:
    sizes = settings.clusters or clustering.default_sizes(n)
    if sizes[0] > n:
        raise Refused(f"--clusters {sizes[0]}: more clusters than the {n} images that are left; lower it")
    return sizes


def drop_duplicates(
    stages: Stages, images: Joined, group: np.ndarray, features: Tensor, settings: Settings, engine: str,
    device: torch.device | str,
) -> np.ndarray:
    """Keep one image of each group. Returns (N,) the image that is kept of each one's group.

    Args:
        group: (N,) of equal files.

    Raises:
        Refused: near duplicates leave fewer images than are to be kept, of a pile with enough, because the threshold is
            too low for these embeddings.
    """
    threshold = settings.duplicate_threshold
    unique = np.unique(group)
    stages.keep("exact duplicates", unique, EXACT, group)
    if not threshold:
        return group
    near = duplicates.near_groups(features[unique], threshold, engine, device)  # numbers in `unique`
    near = unique[near][np.searchsorted(unique, group)]
    best = parallel.on_main(lambda: duplicates.largest(images, near, unique))
    keeper = np.arange(len(group))
    for first, kept in best.items():
        keeper[first] = kept
    group = keeper[near]
    stages.keep("near duplicates", np.unique(group), NEAR, group)
    if len(stages.left) < settings.keep <= len(unique):
        nearest = neighbours.nearest_rows(features[unique], features[unique], 2, engine, device)[0][:, 1]
        raise Refused(f"--duplicate_threshold {threshold:g}: only {len(stages.left)} of {len(unique)} images are left, "
                      f"fewer than --keep {settings.keep}; half of them have one within a cosine of "
                      f"{nearest.median():.4f}: raise the threshold well above that, or lower --keep")
    return group


def drop_groups(stages: Stages, group: np.ndarray, tainted: np.ndarray, stage: str, reason: str) -> None:
    """Drop every group that has a member of which `tainted` (N,) is true."""
    stages.keep(stage, np.setdiff1d(stages.left, group[tainted]), reason)


def retrieve(
    stages: Stages, features: Tensor, trusted: Tensor, settings: Settings, engine: str, device: torch.device | str
) -> None:
    """Keep the nearest images of each trusted one, or images from the clusters that trusted ones fall into."""
    if settings.from_clusters:
        points, queries = (torch.nn.functional.normalize(x.float(), dim=1) for x in (features, trusted))
        k, rng = level_sizes(settings, len(points))[0], np.random.default_rng(settings.seed)
        clusters, _ = clustering.kmeans(points, clustering.first_centroids(points, k, rng), settings.iterations, device)
        votes = clustering.assign(queries, clusters.centroids, device)
        rows = sampling.draw_from_clusters(clusters.labels.numpy(), votes.numpy(), settings.from_clusters,
                                           settings.cluster_votes, settings.seed)
    else:
        rows = neighbours.nearest_rows(trusted, features, settings.neighbors, engine, device)[1].unique().numpy()
    stages.keep("retrieval", stages.left[rows], FAR)
