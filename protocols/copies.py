"""Copy detection as on INRIA Copydays (Douze et al. 2009; DINO, arXiv 2104.14294, section 4.2.1, table 4).

Queries are edited copies; the image that each was made from is searched in a database by the cosine similarity of
features: the class token concatenated with the generalized mean (GeM) of the patch tokens, whitened if there are other
images to learn that from. mAP averages over the queries that have a match; uAP (micro-AP) ranks all pairs of query and
database image together, those of queries without a match included.

    arithmetic    mAP                                      whitening
    published     trapezoid rule, over the 20 nearest      retrieval.fit_published_whitening
    own           mean precision, over the whole ranking   retrieval.fit_whitening

Shapes: Q queries, M database images (with distractors), D width, B images per batch, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

import flags
import parallel
from imagesets.checking import open_checked
from imagesets.copies import Copies, read_copies
from imagesets.decode import Reading
from imagesets.sources import Images, open_files
from parallel import Refused
from protocols import retrieval, scores
from protocols.features import PIXELS, Network, dataset_features
from protocols.transforms import PIXELS_SIDE, SmallPictures, Transformed, resize
from vision_transformer import VisionTransformer

NEAREST = 20  # database images that the published average precision looks at
PUBLISHED_SIDE = 320  # pixels, the default of the published script, whose weights were trained on crops of 224


# ---- Features ----


class Squares(Transformed):
    """The whole image, resized to side x side pixels without keeping its proportions."""

    def __init__(self, images: Images, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(images, mean, std)
        self.side = side

    def transform(self, image: Tensor, index: int) -> Tensor:
        return resize(image, (self.side, self.side))


def descriptor(model: nn.Module, gem_p: float) -> tuple[Callable[[Tensor], Tensor], str]:
    """Features of images, and their name in reports.

    (B, C, side, side) -> (B, 2 D): the class token and the generalized mean of the patch tokens, concatenated; the
    output (B, D) of a network without patch tokens.
    """
    if not isinstance(model, VisionTransformer):
        return model, "the network's output"

    def describe(images: Tensor) -> Tensor:
        tokens = model.forward_features(images)
        return torch.cat([tokens.cls_token.float(), retrieval.gem(tokens.patch_tokens, gem_p)], dim=1)

    return describe, f"class token and GeM, p = {gem_p:g}"


# ---- Figures ----


def measure(
    similarity: np.ndarray, matches: Sequence[Sequence[int]], attacks: Sequence[str], arithmetic: str = flags.PUBLISHED
) -> list[dict]:
    """mAP and uAP in %, of all queries and by attack, in the order in which the attacks first occur.

    Args:
        similarity: (Q, M).
        matches: for each query the rows of the database that it should find, or none.
        attacks: (Q,) names.
    """
    relevant = np.zeros(similarity.shape, bool)
    for q, rows in enumerate(matches):
        relevant[q, list(rows)] = True
    names = list(dict.fromkeys(attacks))
    groups = {"all": np.arange(len(similarity))}
    if len(names) > 1:
        groups |= {name: np.flatnonzero(np.array(attacks) == name) for name in names}
    return [{"attack": name, "queries": len(rows)} | figures(similarity[rows], relevant[rows], arithmetic)
            for name, rows in groups.items()]


def precision(similarity: np.ndarray, relevant: np.ndarray, arithmetic: str) -> float:
    """Average precision of one query, from (M,) similarities and bool (M,), some of which are true."""
    right = relevant[retrieval.ranking(similarity)]
    if arithmetic == flags.OWN:
        return retrieval.average_precision(np.flatnonzero(right))
    return retrieval.average_precision_trapezoid(np.flatnonzero(right[:NEAREST]), int(right.sum()))


def figures(similarity: np.ndarray, relevant: np.ndarray, arithmetic: str) -> dict:
    """mAP and uAP in % with their intervals, from (Q, M) similarities and bool (Q, M)."""
    if not relevant.any():
        return {"mAP": None, "uAP": None}
    precisions = [precision(score, right, arithmetic)
                  for score, right in zip(similarity, relevant, strict=True) if right.any()]
    low, high = retrieval.micro_interval(similarity, relevant)
    micro = 100 * retrieval.micro_average_precision(similarity, relevant)
    return {"mAP": scores.percent(np.array(precisions)), "uAP": {"value": micro, "interval": [100 * low, 100 * high]}}


# ---- The evaluation ----


def evaluate_copies(
    network: Network, data_path: str, distractors_path: str = "", whitening_path: str = "", gem_p: float = 4.0,
    image_size: int = 0, batch_size: int = 64, num_workers: int = 10, output_dir: str | os.PathLike = ".",
    arithmetic: str = flags.PUBLISHED,
) -> dict:
    """Copy detection, measured. Writes eval_copy_detection.json and the cache of features, features/.

    Every process calls it; the first one measures and writes.

    Args:
        network: any; computes in its precision.
        data_path: see `imagesets.copies`.
        distractors_path: folder or list of images that join the database, without copies of it; "" for none.
        whitening_path: folder or list of images that the whitening is learned from; "" for none.
        gem_p: power of the mean over patch tokens.
        image_size: pixels per side of the network's input; 0: PUBLISHED_SIDE for weights trained on crops of 224
            pixels, as all are whose file doesn't say; otherwise the size of their crops.
        batch_size: images per process and batch.
        arithmetic: "published" or "own", see above.

    Returns:
        What eval_copy_detection.json holds, without the command: settings and {"results": a line per attack}, which
        is empty in all processes but the first.

    Raises:
        Refused: no such images, no whitening, a file that can't be read or written.
    """
    info, pixels = network.info, network.about["arch"] == PIXELS
    side = PIXELS_SIDE if pixels else image_size or default_side(info["global_crops_size"])
    copies = read_copies(data_path)
    sets = open_sets(data_path, copies, distractors_path, whitening_path, network.reading)
    output_dir = flags.prepare_output(output_dir)
    for note in copies.notes:
        parallel.say(note)
    (forward, name), mean, std = descriptor(network.forward, gem_p), info["mean"], info["std"]
    parts = {
        part: dataset_features(
            network, SmallPictures(images, mean, std) if pixels else Squares(images, side, mean, std),
            f"square {side} {mean} {std}", batch_size, num_workers, output_dir / "features", forward, f" {name}")
        for part, images in sets.items()}
    queries, database = parts["queries"], parts["database"]
    if "distractors" in parts:
        database = torch.cat([database, parts["distractors"]])
    if "whitening" in parts:
        fit = retrieval.fit_whitening if arithmetic == flags.OWN else retrieval.fit_published_whitening
        whitening = fit(parts["whitening"])
        queries, database = (retrieval.whiten(part, whitening) for part in (queries, database))
    about = {k: v for k, v in network.about.items() if k not in ("resize_size", "crop_size")} | {
        "image_size": side, "features": name, "data_path": data_path,
        "distractors": distractors_path or None, "whitening": bool(whitening_path),
        "whitening_path": whitening_path or None, "arithmetic": arithmetic, "images": [len(queries), len(database)],
        "notes": list(copies.notes),
    }
    results = []
    if parallel.is_main():
        results = measure(retrieval.similarities(queries, database), copies.matches, copies.attacks, arithmetic)
    return scores.write_results(output_dir / "eval_copy_detection.json", results, **about)


def open_sets(
    data_path: str, copies: Copies, distractors_path: str, whitening_path: str, reading: Reading
) -> dict[str, Images]:
    """The sets of images: queries, database and, where they are given, distractors and whitening."""
    sets: dict[str, Images] = {name: open_files(os.path.expanduser(data_path), getattr(copies, name), reading)
                               for name in ("queries", "database")}
    for name, path in (("distractors", distractors_path), ("whitening", whitening_path)):
        if path:
            sets[name] = open_checked(path, None, reading, f"--{name}_path")
    if whitening_path and len(sets["whitening"]) < 2:
        raise Refused(f"--whitening_path {whitening_path}: one image gives no whitening; give more, or leave it out")
    return sets


def default_side(global_crops_size: int) -> int:
    return PUBLISHED_SIDE if global_crops_size == 224 else global_crops_size


def show_copies(report: Mapping) -> None:
    """Print the table of `evaluate_copies`' report."""
    queries, database = report["images"]
    print(f"{queries} queries, {database} database images; features: {report['features']}"
          + (", whitened" if report["whitening"] else ""))
    print(f"in %, with 95 % bootstrap intervals over queries; {report['arithmetic']} arithmetic")
    print(scores.table(report["results"]), flush=True)
