"""Image retrieval on revisited Oxford and Paris (Radenovic et al. 2018; DINO, arXiv 2104.14294, table 3).

Each query ranks the database by the cosine similarity of features. An image of the query's landmark is easy, hard or
junk for it:

    setting    relevant      removed from the ranking
    easy       easy          hard, junk
    medium     easy, hard    junk
    hard       hard          easy, junk

    arithmetic    query           longer side              rest of a patch         several scales
    published     whole image     shrunk by Pillow         cut at right, bottom    features averaged as they are
    own           its box         resized with its image   resized with its image  features on the unit sphere averaged

Shapes: Q queries, M database images, N images, D width, B images per batch, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import flags
from imagesets.ground_truth import Query
from imagesets.landmarks import Cropped, open_landmarks
from imagesets.sources import Images
from protocols import retrieval, scores
from protocols.features import PIXELS, Network, dataset_features
from protocols.transforms import SmallPictures, Transformed, resize

SETTINGS = {  # relevant images, and images removed from the ranking
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}
KAPPAS = (1, 5, 10)
SCALES = (1.0, 2**-0.5, 0.5)


# ---- Features ----


class WholeImages(Transformed):
    """The image resized so that the longer side is at most `imsize` pixels.

    Both sides are rounded to multiples of `patch`, so that the network sees all of the image.
    """

    def __init__(
        self, images: Images, imsize: int, patch: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(images, mean, std)
        self.imsize, self.patch = imsize, patch

    def transform(self, image: Tensor, index: int) -> Tensor:
        factor = min(1.0, self.imsize / max(image.shape[1:]))
        return resize(image, [whole_patches(factor * side, self.patch) for side in image.shape[1:]])


class Thumbnails(WholeImages):
    """The image shrunk to at most `imsize` x `imsize` pixels by Pillow's `thumbnail`, as in the published script.

    The sides are whatever keeps the proportions best. A side below `patch`, for which the published script stops with
    an error, is enlarged to it.
    """

    def transform(self, image: Tensor, index: int) -> Tensor:
        channels = [Image.fromarray(channel.numpy()) for channel in image]
        for channel in channels:
            channel.thumbnail((self.imsize, self.imsize), Image.Resampling.LANCZOS)
        image = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))
        return resize(image, [max(side, self.patch) for side in image.shape[1:]]) if min(
            image.shape[1:]) < self.patch else image


def whole_patches(pixels: float, patch: int) -> int:
    """The nearest positive multiple of `patch`."""
    return max(1, round(pixels / patch)) * patch


def patch_multiple(model: nn.Module) -> int:
    """Pixels of which the sides of the network's input must be a multiple: its patch size, or 1."""
    return int(np.max(getattr(getattr(model, "patch_embed", None), "patch_size", 1)))


def multiscale(forward: Callable[[Tensor], Tensor], patch: int) -> Callable[[Tensor], Tensor]:
    """(B, C, h, w) -> (B, D): the mean over three scales of the features on the unit sphere."""

    def at_all_scales(images: Tensor) -> Tensor:
        parts = []
        for scale in SCALES:
            size = [whole_patches(scale * side, patch) for side in images.shape[-2:]]
            smaller = images if scale == 1 else F.interpolate(images, size=size, mode="bilinear", antialias=True)
            parts.append(F.normalize(forward(smaller).float(), dim=1))
        return torch.stack(parts).mean(0)

    return at_all_scales


def published_multiscale(forward: Callable[[Tensor], Tensor], patch: int) -> Callable[[Tensor], Tensor]:
    """(B, C, h, w) -> (B, D) on the unit sphere: the mean over three scales of the features as they are.

    Images are resized by a factor, bilinearly without antialiasing, to sides rounded down. The norms of the features
    weigh the scales.
    """

    def at_all_scales(images: Tensor) -> Tensor:
        parts = []
        for scale in SCALES:
            size = [max(int(scale * side), patch) for side in images.shape[-2:]]
            whole = min(images.shape[-2:]) * scale >= patch  # else the network could not see it
            how = {"scale_factor": scale} if whole else {"size": size}
            smaller = images if scale == 1 else F.interpolate(images, **how, mode="bilinear", align_corners=False)
            parts.append(forward(smaller).to(images.dtype))
        return F.normalize(torch.stack(parts).mean(0), dim=1)

    return at_all_scales


def landmark_features(
    network: Network, images: Cropped, imsize: int, use_multiscale: bool, num_workers: int,
    cache: str | os.PathLike | None, arithmetic: str = flags.PUBLISHED,
) -> Tensor:
    """(N, D) features of images, from `cache` where it has them. Sizes differ, so batches hold one image."""
    pixels, own = network.about["arch"] == PIXELS, arithmetic == flags.OWN
    patch, mean, std = patch_multiple(network.forward), network.info["mean"], network.info["std"]
    input_images = WholeImages if own else Thumbnails
    dataset = SmallPictures(images, mean, std) if pixels else input_images(images, imsize, patch, mean, std)
    scaled = multiscale if own else published_multiscale
    forward = scaled(network.forward, patch) if use_multiscale and not pixels else network.forward
    transform = f"imsize {imsize} multiscale {use_multiscale} {mean} {std} {images.boxes}" + " published" * (not own)
    return dataset_features(network, dataset, transform, 1, num_workers, cache, forward)


# ---- Figures ----


def measure(ranked: np.ndarray, queries: Sequence[Query]) -> list[dict]:
    """mAP and mP@k in % for each setting, from (Q, M) rows of the database, best first.

    Queries without a relevant image in a setting are left out of it; a setting without queries has no figures.
    """
    results = []
    names = ("mAP", *(f"mP@{k}" for k in KAPPAS))
    for setting, (wanted, removed) in SETTINGS.items():
        per_query = []  # average precision, and precision at each k
        for order, query in zip(ranked, queries, strict=True):
            relevant, junk = ([row for part in parts for row in getattr(query, part)] for parts in (wanted, removed))
            if relevant:
                ranks = retrieval.relevant_ranks(order, relevant, junk)
                precisions = [retrieval.precision_at(ranks, k) for k in KAPPAS]
                per_query.append([retrieval.average_precision_trapezoid(ranks), *precisions])
        columns = np.array(per_query).T if per_query else [None] * len(names)
        figures = {n: None if c is None else scores.percent(c) for n, c in zip(names, columns, strict=True)}
        results.append({"setting": setting, "queries": len(per_query)} | figures)
    return results


# ---- The evaluation ----


def evaluate_retrieval(
    network: Network, data_path: str, dataset: str, imsize: int = 224, use_multiscale: bool = False,
    num_workers: int = 10, output_dir: str | os.PathLike = ".", arithmetic: str = flags.PUBLISHED,
) -> dict:
    """Landmark retrieval, measured. Writes eval_image_retrieval.json and the cache of features, features/.

    Every process calls it; the first one writes.

    Args:
        network: any; computes in its precision.
        data_path, dataset: see `imagesets.landmarks`.
        imsize: pixels of the longer side; smaller images keep their size.
        use_multiscale: average the features over three scales.
        arithmetic: "published" or "own", see above.

    Returns:
        What eval_image_retrieval.json holds, without the command: settings and {"results": a line per setting}.

    Raises:
        Refused: no such data set, a file that can't be read or written.
    """
    truth, database, queries = open_landmarks(
        data_path, dataset, network.reading, crop_queries=arithmetic == flags.OWN)
    output_dir = flags.prepare_output(output_dir)
    query_features, database_features = (
        landmark_features(network, images, imsize, use_multiscale, num_workers, output_dir / "features", arithmetic)
        for images in (queries, database))
    ranked = retrieval.ranking(retrieval.similarities(query_features, database_features))
    about = {k: v for k, v in network.about.items() if k not in ("resize_size", "crop_size")} | {
        "data_path": data_path, "dataset": dataset, "imsize": imsize, "multiscale": use_multiscale,
        "arithmetic": arithmetic, "images": len(database), "queries": len(queries),
    }
    return scores.write_results(output_dir / "eval_image_retrieval.json", measure(ranked, truth.queries), **about)


def show_retrieval(report: Mapping) -> None:
    """Print the table of `evaluate_retrieval`'s report."""
    print(f"{report['dataset']}: {report['queries']} queries, {report['images']} images; in %, with 95 % bootstrap "
          f"intervals; {report['arithmetic']} arithmetic")
    print(scores.table(report["results"]), flush=True)
