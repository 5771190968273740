"""Image retrieval on revisited Oxford and Paris (Radenovic et al. 2018; DINO, arXiv 2104.14294, table 3).

    python eval_image_retrieval.py --pretrained_weights output/run/checkpoint.pth --data_path . --dataset roxford5k
    torchrun --nproc_per_node=8 eval_image_retrieval.py --pretrained_weights output/run/checkpoint.pth ...

<data_path>/<dataset>/ holds jpg/*.jpg and gnd_<dataset>.pkl, as published, or .json. Each query, cropped to its box,
ranks the database by the cosine of the features. An image of the landmark is easy, hard or junk for a query:

    setting    must be found    taken out of the ranking
    easy       easy             hard, junk
    medium     easy, hard       junk
    hard       hard             easy, junk

Shapes: Q queries, M database images, D width, C channels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import flags
import parallel
from imagesets import loaders
from imagesets.ground_truth import GroundTruth, Query, read_ground_truth
from imagesets.sources import open_files
from protocols import features, retrieval, scores

SETTINGS = {  # what must be found, and what is taken out of the ranking
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}
KAPPAS = (1, 5, 10)
SCALES = (1.0, 2**-0.5, 0.5)


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Image retrieval on revisited Oxford and Paris with frozen features.")
    add = parser.add_argument
    add("--data_path", default=".", help="folder that holds the data set's folder")
    add("--dataset", default="roxford5k", help="name of that folder and of gnd_NAME.pkl or .json in it: roxford5k ...")
    add("--imsize", type=flags.positive_int, default=224, help="pixels of the longer side; smaller pictures stay")
    add("--multiscale", type=flags.boolean, default=False, help="mean of the features at scales 1, 0.71 and 0.5")
    flags.add_weights_flags(parser)
    add("--seed", type=flags.seed, default=0, help="of an untrained network")
    add("--output_dir", default="", help="for the results and features/; empty: the weights' folder, or .")
    add("--use_cuda", type=flags.boolean, default=True, help="false is --device cpu")
    flags.add_launch_flags(parser)
    return parser


# ---- Pictures ----


class Cropped:
    """A set of images, each cropped to a box (left, top, right, bottom) in pixels, rounded; None is all of it."""

    labels, classes = None, []

    def __init__(self, images: loaders.Images, boxes: Sequence[tuple | None]) -> None:
        self.images, self.boxes = images, list(boxes)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return self.images.name(i)

    def load(self, i: int) -> Tensor:
        image = self.images.load(i)
        if self.boxes[i] is None:
            return image
        left, top, right, bottom = (max(0, round(side)) for side in self.boxes[i])
        image = image[:, top:bottom, left:right]
        if 0 in image.shape:
            raise ValueError(f"{self.name(i)}: the query's box {self.boxes[i]} lies outside the picture")
        return image


class WholePictures(Dataset):
    """index -> (float32 (C, h, w), index): the longer side at most `imsize` pixels, normalized.

    Both sides are multiples of `patch`, the nearest ones, so that the network sees all of the picture.
    """

    def __init__(
        self, images: loaders.Images, imsize: int, patch: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.images, self.imsize, self.patch = images, imsize, patch
        self.mean, self.std = (255 * torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images.load(index)
        factor = min(1.0, self.imsize / max(image.shape[1:]))
        size = [in_patches(factor * side, self.patch) for side in image.shape[1:]]
        image = F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]
        return (image.float() - self.mean) / self.std, index


def in_patches(pixels: float, patch: int) -> int:
    return max(1, round(pixels / patch)) * patch


def patch_of(model: nn.Module) -> int:
    """Pixels that the sides of the network's pictures must be a multiple of: those of its patch, or 1."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return patch if isinstance(patch, int) else max(patch)


def multiscale(forward: Callable[[Tensor], Tensor], patch: int) -> Callable[[Tensor], Tensor]:
    """(B, C, h, w) -> (B, D): the mean of the features at three scales, each on the unit sphere."""

    def at_all_scales(images: Tensor) -> Tensor:
        parts = []
        for scale in SCALES:
            size = [in_patches(scale * side, patch) for side in images.shape[-2:]]
            smaller = images if scale == 1 else F.interpolate(images, size=size, mode="bilinear", antialias=True)
            parts.append(F.normalize(forward(smaller).float(), dim=1))
        return torch.stack(parts).mean(0)

    return at_all_scales


def picture_features(network: features.Network, images: Cropped, args: argparse.Namespace, device) -> Tensor:
    """(N, D) features of whole pictures; their sizes differ, so they go through the network one by one."""
    pixels = network.about["arch"] == features.PIXELS
    patch, mean, std = patch_of(network.forward), network.info["mean"], network.info["std"]
    dataset = features.SmallPictures(images) if pixels else WholePictures(images, args.imsize, patch, mean, std)
    forward = multiscale(network.forward, patch) if args.multiscale and not pixels else network.forward
    fingerprint = {
        "weights": str(network.about["weights_sha256"]), "images": features.images_hash(images),
        "transform": f"imsize {args.imsize} multiscale {args.multiscale} {mean} {std} {images.boxes}",
        "network": f"{network.about['arch']} {args.precision}",
    }
    dtype = features.PRECISIONS[args.precision]
    autocast = torch.autocast(device.type, dtype) if dtype else None
    return features.cached_features(flags.output_dir(args) / "features", fingerprint, lambda: features.extract_features(
        forward, dataset, 1, args.num_workers, device, autocast))


# ---- Figures ----


def measure(ranked: np.ndarray, queries: Sequence[Query]) -> list[dict]:
    """mAP and mP@k in % for each setting, from (Q, M) rows of the database, best first.

    Queries that have nothing to find in a setting are left out of it; a setting without queries has no figures.
    """
    rows = []
    for setting, (wanted, removed) in SETTINGS.items():
        found = []  # a query each: average precision, and precision at each k
        for order, query in zip(ranked, queries, strict=True):
            relevant, junk = ([row for part in parts for row in getattr(query, part)] for parts in (wanted, removed))
            if relevant:
                ranks = retrieval.relevant_ranks(order, relevant, junk)
                precisions = [retrieval.precision_at(ranks, k) for k in KAPPAS]
                found.append([retrieval.average_precision_trapezoid(ranks), *precisions])
        columns = np.array(found).T if found else [None] * (1 + len(KAPPAS))
        names = ("mAP", *(f"mP@{k}" for k in KAPPAS))
        figures = {n: None if c is None else scores.percent(c) for n, c in zip(names, columns, strict=True)}
        rows.append({"setting": setting, "queries": len(found)} | figures)
    return rows


# ---- The evaluation ----


def open_dataset(args: argparse.Namespace, in_chans: int) -> tuple[GroundTruth, Cropped, Cropped]:
    """Ground truth, database images and queries.

    Raises:
        ValueError, OSError: a file is missing or is no ground truth.
    """
    folder = Path(args.data_path).expanduser() / args.dataset
    known = [folder / f"gnd_{args.dataset}.{suffix}" for suffix in ("pkl", "json")]
    there = [path for path in known if path.is_file()]
    if not there:
        raise FileNotFoundError(f"--data_path {args.data_path} --dataset {args.dataset}: no {known[0]} or .json; give "
                                "the folder that holds the data set's folder")
    truth = read_ground_truth(there[0])

    def open_pictures(names: Sequence[str], boxes: Sequence[tuple | None]) -> Cropped:
        absent = [name for name in names if not (folder / "jpg" / f"{name}.jpg").is_file()]
        if absent:
            raise FileNotFoundError(f"--data_path {args.data_path}: {len(absent)} picture(s) of {there[0].name} are "
                                    f"missing, the first is {folder / 'jpg' / absent[0]}.jpg; put them there")
        return Cropped(open_files(folder / "jpg", [f"{name}.jpg" for name in names], in_chans), boxes)

    database = open_pictures(truth.database, [None] * len(truth.database))
    return truth, database, open_pictures([q.name for q in truth.queries], [q.box for q in truth.queries])


def evaluate_retrieval(args: argparse.Namespace) -> dict:
    """The whole evaluation: prints the table, writes eval_image_retrieval.json, returns what it holds.

    Raises:
        flags.Refused: bad input, in one line.
    """
    try:
        device = parallel.start(args.device if args.use_cuda else "cpu", args.dist_url, args.dist_timeout)
        network = features.load_network(
            args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key, device, args.imsize,
            args.imsize, args.precision, args.seed, "--imsize")
        truth, database, queries = open_dataset(args, network.info["in_chans"])
        flags.prepare_output(flags.output_dir(args))
        found = [picture_features(network, images, args, device) for images in (queries, database)]
    except (ValueError, OSError) as error:
        raise flags.Refused(error) from error
    results = measure(retrieval.ranking(retrieval.similarities(*found)), truth.queries)
    about = {k: v for k, v in network.about.items() if k not in ("resize_size", "crop_size")} | {
        "data_path": args.data_path, "dataset": args.dataset, "imsize": args.imsize, "multiscale": args.multiscale,
        "images": len(database), "queries": len(queries),
    }
    if parallel.is_main():
        print(f"{args.dataset}: {len(queries)} queries, {len(database)} images; in %, with 95 % bootstrap intervals")
        print(scores.table(results))
        scores.write_results(flags.output_dir(args) / "eval_image_retrieval.json", results, **about)
        print(f"wrote {flags.output_dir(args) / 'eval_image_retrieval.json'}", flush=True)
    return about | {"results": results}


def main(args: argparse.Namespace) -> int:
    return flags.exit_code("eval_image_retrieval.py", evaluate_retrieval, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
