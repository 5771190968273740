"""Copy detection as on INRIA Copydays (Douze et al. 2009; DINO, arXiv 2104.14294, section 4.2.1, table 4).

    python eval_copy_detection.py --pretrained_weights output/run/checkpoint.pth --data_path copies
    python eval_copy_detection.py --pretrained_weights output/run/checkpoint.pth --data_path copydays --distractors more

Queries are edited copies; the picture that each was made from is looked for in a database. The features are the class
token beside the generalized mean (GeM) of the patch tokens, whitened where --distractors gives pictures to learn that
from. --data_path is a folder with

    database/, queries/, ground_truth.csv      header query,match,attack; a line a match, paths in the two folders. A
                                               query with several matches has several lines, one without has no match
    original/, strong/, jpeg/*/, crop/*/       Copydays: the first four digits of the names say what belongs together

mAP is the mean over queries that have a match; uAP (micro-AP) ranks all pairs of query and database image together,
with those of the queries that have none.

Shapes: Q queries, M database images (with distractors), D width, B images a batch, C channels.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

import flags
import parallel
from imagesets import loaders
from imagesets.sources import open_files
from protocols import features, retrieval, scores
from vision_transformer import VisionTransformer

POOLED = "the network's output"  # of networks without patch tokens, and of raw pictures
HEADER = ("query", "match", "attack")
DISTRACTORS_FOR = {"both": ("whitening", "database"), "whitening": ("whitening",), "database": ("database",)}


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Copy detection with frozen features.")
    add = parser.add_argument
    add("--data_path", required=True, help="folder with database/, queries/ and ground_truth.csv, or Copydays")
    add("--distractors", default="", help="folder or .txt list of other pictures, without any copy of the database's")
    add("--distractors_for", choices=tuple(DISTRACTORS_FOR), default="both",
        help="what they do: the whitening is learned from them, they join the database, or both")
    add("--gem_p", type=flags.positive, default=4.0, help="power of the mean over patch tokens")
    add("--image_size", "--imsize", type=flags.count, default=0,
        help="pixels a side of the pictures, made square; 0: the weights' global crops, or 224; paper: 224 and 320")
    flags.add_weights_flags(parser)
    add("--batch_size_per_gpu", type=flags.positive_int, default=64, help="images a process and batch")
    add("--seed", type=flags.seed, default=0, help="of an untrained network")
    add("--output_dir", default="", help="for the results and features/; empty: the weights' folder, or .")
    add("--use_cuda", type=flags.boolean, default=True, help="false is --device cpu")
    flags.add_launch_flags(parser)
    return parser


# ---- Pictures that are copies of others ----


class Copies(NamedTuple):
    """Names of files below a folder; of each query, the rows of its matches in the database, and its attack."""

    database: list[str]
    queries: list[str]
    matches: list[list[int]]
    attacks: list[str]


def read_copies(data_path: str) -> Copies:
    """What `data_path` holds, in either layout.

    Raises:
        ValueError, OSError: one line that names what is missing or wrong.
    """
    folder, where = Path(data_path).expanduser(), f"--data_path {data_path}"
    if (folder / "ground_truth.csv").is_file():
        return read_csv(folder, where)
    if (folder / "original").is_dir():
        return read_copydays(folder, where)
    raise FileNotFoundError(f"{where}: neither ground_truth.csv nor original/ in it; give a folder with database/, "
                            "queries/ and ground_truth.csv, or Copydays")


def read_csv(folder: Path, where: str) -> Copies:
    with open(folder / "ground_truth.csv", newline="", encoding="utf-8-sig") as file:
        lines = [tuple(cell.strip() for cell in line) for line in csv.reader(file) if any(line)]
    if not lines or lines[0] != HEADER:
        raise ValueError(f"{where}: ground_truth.csv has to begin with the line {','.join(HEADER)}")
    wrong = [",".join(line) for line in lines if len(line) != 3 or not line[0]]
    if wrong:
        raise ValueError(f"{where}: ground_truth.csv: the line {wrong[0]!r} is no query,match,attack")
    if len(lines) == 1:
        raise ValueError(f"{where}: ground_truth.csv is empty; write a line a query below its header")
    database = pictures_in(folder / "database", where)
    row = {name: i for i, name in enumerate(database)}
    matches, attacks = {}, {}
    for query, match, attack in lines[1:]:
        if match and match not in row:
            raise ValueError(f"{where}: ground_truth.csv: {match!r}, the match of {query!r}, is not in database/")
        if attacks.setdefault(query, attack) != attack:
            raise ValueError(f"{where}: ground_truth.csv: {query!r} has two attacks, {attacks[query]!r} and {attack!r}")
        matches.setdefault(query, []).extend([row[match]] if match else [])
    absent = [query for query in matches if not (folder / "queries" / query).is_file()]
    if absent:
        raise FileNotFoundError(f"{where}: {len(absent)} picture(s) of ground_truth.csv are not in queries/, the first "
                                f"is {absent[0]!r}; put them there or take their lines out")
    return checked(where, Copies([f"database/{name}" for name in database], [f"queries/{name}" for name in matches],
                                 list(matches.values()), list(attacks.values())))


def read_copydays(folder: Path, where: str) -> Copies:
    database = pictures_in(folder / "original", where)
    row = {}
    for i, name in enumerate(database):
        if row.setdefault(name[:4], i) != i:
            raise ValueError(f"{where}: original/ has two pictures whose names begin with {name[:4]}; rename one")
    queries, matches, attacks = [], [], []
    for kind in (folder / "strong", *sorted(folder.glob("jpeg/*/")), *sorted(folder.glob("crop/*/"))):
        for name in pictures_in(kind, where) if kind.is_dir() else ():
            queries.append(f"{kind.relative_to(folder)}/{name}")
            matches.append([row[name[:4]]] if name[:4] in row else [])
            attacks.append("".join(kind.relative_to(folder).parts))
    return checked(where, Copies([f"original/{name}" for name in database], queries, matches, attacks))


def pictures_in(folder: Path, where: str) -> list[str]:
    """Paths of the pictures in a folder, relative to it, in the order of their names."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{where}: there is no folder {folder.name}/ in it")
    found = loaders.open_images(folder)
    return [os.path.relpath(found.name(i), folder) for i in range(len(found))]


def checked(where: str, copies: Copies) -> Copies:
    if not any(copies.matches):
        raise ValueError(f"{where}: none of its {len(copies.queries)} queries has a match; there is nothing to find")
    return copies


# ---- Features ----


class Squares(Dataset):
    """index -> (float32 (C, side, side), index): the whole picture, whatever its proportions, normalized."""

    def __init__(self, images: loaders.Images, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images, self.side = images, side
        self.mean, self.std = (255 * torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images.load(index)[None]
        image = F.interpolate(image, size=(self.side, self.side), mode="bicubic", antialias=True)[0]
        return (image.float() - self.mean) / self.std, index


def descriptor(model: VisionTransformer, gem_p: float) -> Callable[[Tensor], Tensor]:
    """(B, C, side, side) -> (B, 2 D): the class token and the generalized mean of the patch tokens, side by side."""

    def describe(images: Tensor) -> Tensor:
        tokens = model.forward_features(images)
        return torch.cat([tokens.cls_token.float(), retrieval.gem(tokens.patch_tokens, gem_p)], dim=1)

    return describe


def picture_features(network: features.Network, images: loaders.Images, args: argparse.Namespace, device) -> Tensor:
    about, mean, std = network.about, network.info["mean"], network.info["std"]
    pixels = about["arch"] == features.PIXELS
    dataset = features.SmallPictures(images) if pixels else Squares(images, about["image_size"], mean, std)
    has_tokens = about["features"] != POOLED
    forward = descriptor(network.forward, args.gem_p) if has_tokens else network.forward
    fingerprint = {
        "weights": str(about["weights_sha256"]), "images": features.images_hash(images),
        "transform": f"square {about['image_size']} {mean} {std}",
        "network": f"{about['arch']} {args.precision} {about['features']}",
    }
    dtype = features.PRECISIONS[args.precision]
    autocast = torch.autocast(device.type, dtype) if dtype else None
    return features.cached_features(flags.output_dir(args) / "features", fingerprint, lambda: features.extract_features(
        forward, dataset, args.batch_size_per_gpu, args.num_workers, device, autocast))


def load_network(args: argparse.Namespace, device: torch.device) -> features.Network:
    network = features.load_network(
        args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key, device, args.image_size,
        args.image_size, args.precision, args.seed, "--image_size")
    about = {k: v for k, v in network.about.items() if k not in ("resize_size", "crop_size")}
    tokens = isinstance(network.forward, VisionTransformer)
    about |= {"image_size": network.about["crop_size"],
              "features": f"class token and GeM, p = {args.gem_p:g}" if tokens else POOLED}
    return network._replace(about=about)


# ---- Figures ----


def measure(found: np.ndarray, matches: Sequence[Sequence[int]], attacks: Sequence[str]) -> list[dict]:
    """mAP and uAP in %, of all queries and by attack, in the order in which the attacks come.

    Args:
        found: (Q, M) scores.
        matches: rows of the database that each query should find; none where it should find nothing.
    """
    relevant = np.zeros(found.shape, bool)
    for q, rows in enumerate(matches):
        relevant[q, list(rows)] = True
    names = list(dict.fromkeys(attacks))
    groups = {"all": np.arange(len(found))}
    if len(names) > 1:
        groups |= {name: np.flatnonzero(np.array(attacks) == name) for name in names}
    return [{"attack": name, "queries": len(rows)} | figures(found[rows], relevant[rows])
            for name, rows in groups.items()]


def figures(found: np.ndarray, relevant: np.ndarray) -> dict:
    if not relevant.any():
        return {"mAP": None, "uAP": None}
    precisions = [retrieval.average_precision(np.flatnonzero(right[retrieval.ranking(score)]))
                  for score, right in zip(found, relevant, strict=True) if right.any()]
    low, high = retrieval.micro_interval(found, relevant)
    micro = {"value": 100 * retrieval.micro_average_precision(found, relevant), "interval": [100 * low, 100 * high]}
    return {"mAP": scores.percent(np.array(precisions)), "uAP": micro}


# ---- The evaluation ----


def compute(args: argparse.Namespace, device: torch.device, copies: Copies) -> tuple[np.ndarray, dict]:
    """(Q, M) scores, and what the report says of them."""
    network = load_network(args, device)
    in_chans = network.info["in_chans"]
    folder = os.path.expanduser(args.data_path)
    sets = [open_files(folder, names, in_chans) for names in (copies.queries, copies.database)]
    if args.distractors:
        sets.append(loaders.open_images(args.distractors, None, in_chans, flag="--distractors"))
    uses = DISTRACTORS_FOR[args.distractors_for] if args.distractors else ()
    if "whitening" in uses and len(sets[2]) < 2:
        raise ValueError(f"--distractors {args.distractors}: one picture gives no whitening; give more, or "
                         "--distractors_for database")
    flags.prepare_output(flags.output_dir(args))
    queries, database, *others = (picture_features(network, images, args, device) for images in sets)
    if "database" in uses:
        database = torch.cat([database, *others])
    if "whitening" in uses:
        whitening = retrieval.fit_whitening(others[0])
        queries, database = (retrieval.whiten(part, whitening) for part in (queries, database))
    about = network.about | {
        "data_path": args.data_path, "distractors": args.distractors or None, "whitening": "whitening" in uses,
        "images": [len(queries), len(database)],
    }
    return retrieval.similarities(queries, database), about


def evaluate_copies(args: argparse.Namespace) -> dict:
    """The whole evaluation: prints the table, writes eval_copy_detection.json, returns what it holds.

    Raises:
        flags.Refused: bad input, in one line.
    """
    try:
        device = parallel.start(args.device if args.use_cuda else "cpu", args.dist_url, args.dist_timeout)
        copies = read_copies(args.data_path)
        found, about = compute(args, device, copies)
    except (ValueError, OSError) as error:
        raise flags.Refused(error) from error
    results = measure(found, copies.matches, copies.attacks) if parallel.is_main() else []
    if parallel.is_main():
        print(f"{found.shape[0]} queries, {found.shape[1]} database images; features: {about['features']}"
              + (", whitened" if about["whitening"] else ""))
        print("in %, with 95 % bootstrap intervals over queries")
        print(scores.table(results))
        scores.write_results(flags.output_dir(args) / "eval_copy_detection.json", results, **about)
        print(f"wrote {flags.output_dir(args) / 'eval_copy_detection.json'}", flush=True)
    return about | {"results": results}


def main(args: argparse.Namespace) -> int:
    return flags.exit_code("eval_copy_detection.py", evaluate_copies, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
