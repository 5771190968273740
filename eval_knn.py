"""Weighted k-NN classification with frozen features (DINO, arXiv 2104.14294, section 4.1; Wu et al. 2018, section 3.4).

    python eval_knn.py --pretrained_weights output/run/checkpoint.pth --data_path /path/to/images
    torchrun --nproc_per_node=8 eval_knn.py --pretrained_weights output/run/checkpoint.pth --data_path /path/to/images

A folder with train/ and val/ (or test/): pictures of the second are classified by the first. One labelled folder: each
picture is classified by all others (leave-one-out). A folder without labels: measures that need none.

Shapes: N training images, M test images, D width, K the largest k, C classes, W processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import flags
import parallel
from protocols import scores
from protocols.features import load_network, network_features
from protocols.knn import knn_classifier, knn_predict  # noqa: F401 - knn_classifier is published here
from protocols.splits import Part, check_labels, draw_support, match_classes, notes_on_classes, open_parts
from weights import checkpoints

MOST_CLASSES_SHOWN = 20  # per-class figures on the console; the file has all


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Weighted k-NN classification with frozen features.")
    add = parser.add_argument
    add("--data_path", default="shapes",
        help="folder with train/ and val/ (or test/), or one folder, or a .txt list; torchvision:CIFAR10; shapes")
    add("--val_data_path", default="", help="test pictures that lie elsewhere; then --data_path is all training set")
    flags.add_network_flags(parser)

    add("--nb_knn", type=flags.positive_int, nargs="+", default=[10, 20, 100, 200], help="k: one or several")
    add("--temperature", type=flags.positive, nargs="+", default=[0.07], help="of the votes' weights: one or several")
    add("--metric", choices=("cosine", "l2"), default="cosine",
        help="l2: distances in units of the training features' root mean square norm")
    add("--n_per_class", type=flags.positive_int, nargs="+", default=[], help="few-shot: so many of each class")
    add("--draws", type=flags.positive_int, default=10, help="random draws a few-shot setting")
    add("--label_free", action="store_true", help="RankMe, uniformity and alignment for labelled pictures too")
    add("--seed", type=flags.seed, default=0, help="of few-shot draws and of an untrained network")

    add("--output_dir", default="", help="for eval_knn.json and features/, the cache; empty: the weights' folder, or .")
    add("--dump_features", default="", help="folder for trainfeat.pth, trainlabels.pth, testfeat.pth, testlabels.pth")
    add("--load_features", default="", help="folder with such files to evaluate; no network, no pictures")
    add("--use_cuda", type=flags.boolean, default=True, help="false searches on the CPU; --device says where all runs")
    flags.add_launch_flags(parser)
    return parser


# ---- Accuracies ----


def accuracies(train: Part, test: Part, args: argparse.Namespace, device, exclude: Tensor | None = None) -> list[dict]:
    """A result for every n per class, k and T; `exclude` as in `nearest`."""
    rows = []
    for n in args.n_per_class or [None]:
        draws = [draw_support(train.labels, n, args.seed + d) for d in range(args.draws)] if n else [None]
        most = min(len(train.labels) if s is None else len(s) for s in draws) - (exclude is not None)
        ks = sorted({min(k, max(most, 1)) for k in args.nb_knn})
        ranked = []  # a draw each: (T, ks, M, 5)
        for support in draws:
            some, hidden = restrict(train, support, exclude)
            ranked.append(knn_predict(some.features, some.labels, test.features, ks, args.temperature,
                                      len(train.classes), metric=args.metric, exclude=hidden, device=device))
        for t, temperature in enumerate(args.temperature):
            for i, k in enumerate(ks):
                setting = ({"n_per_class": n} if n else {}) | {"k": k, "temperature": temperature}
                rows.append(setting | scores.accuracy([r[t, i] for r in ranked], test.labels, test.classes, k))
    return rows


def restrict(train: Part, support: Tensor | None, exclude: Tensor | None) -> tuple[Part, Tensor | None]:
    """The training set's rows in `support`, and `exclude` as rows of that; None is all of them."""
    if support is None:
        return train, exclude
    if exclude is not None:
        place = torch.full((len(train.labels),), -1).index_copy(0, support, torch.arange(len(support)))
        exclude = place[exclude]
    return train._replace(features=train.features[support], labels=train.labels[support]), exclude


# ---- Features in files ----

FILES = (("trainfeat.pth", "trainlabels.pth"), ("testfeat.pth", "testlabels.pth"))


def dump(folder: str, parts: Sequence[Part], about: dict) -> None:
    """Features as the network gave them and labels, plain tensors in files of the published names, and features.json
    with the classes and what the report says. Without labels or a second part there is no such file."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, names in enumerate(FILES):
        for value, name in zip(parts[i][:2] if i < len(parts) else (None, None), names, strict=True):
            if value is None:
                (Path(folder) / name).unlink(missing_ok=True)
            else:
                checkpoints.save(value, Path(folder) / name)
    (Path(folder) / "features.json").write_text(json.dumps({"classes": parts[0].classes, "about": about}, indent=2))


def load(folder: str) -> tuple[list[Part], dict]:
    """What `dump`, or the published script, wrote.

    Raises:
        FileNotFoundError, ValueError: no such files, or not tensors that belong together.
    """
    where = f"--load_features {folder}"
    if not (Path(folder) / "trainfeat.pth").is_file():
        raise FileNotFoundError(f"{where}: no trainfeat.pth in it; write one with --dump_features")
    known = read_about(Path(folder) / "features.json", where)
    read = {name: checkpoints.read(Path(folder) / name, object) for names in FILES for name in names
            if name == "trainfeat.pth" or (Path(folder) / name).is_file()}
    parts = []
    for features, labels in [(read.get(f), read.get(n)) for f, n in FILES]:
        if features is None:
            continue
        check_loaded(where, features, labels)
        parts.append(Part(features, None if labels is None else labels.long(), known["classes"]))
    if len({part.features.shape[1] for part in parts}) > 1:
        raise ValueError(f"{where}: training features have width {parts[0].features.shape[1]}, test features "
                         f"{parts[1].features.shape[1]}; write both with one network")
    most = max([int(p.labels.max()) + 1 for p in parts if p.labels is not None], default=0)
    classes = known["classes"] + [str(c) for c in range(len(known["classes"]), most)]
    check_labels(where, [part.labels for part in parts])
    return [part._replace(classes=classes) for part in parts], known["about"]


def read_about(path: Path, where: str) -> dict:
    """features.json: the names of the classes and what a report says; the published script writes none."""
    if not path.is_file():
        return {"classes": [], "about": {}}
    try:
        known = json.loads(path.read_text())
        return {"classes": list(known["classes"]), "about": dict(known["about"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: features.json is damaged; remove it to do without names of classes") from error


def check_loaded(where: str, features: object, labels: object) -> None:
    if not isinstance(features, Tensor) or features.ndim != 2 or not len(features) or not features.is_floating_point():
        raise ValueError(f"{where}: features are no (images, width) tensor; write them with --dump_features")
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.shape != features.shape[:1]:
        raise ValueError(f"{where}: {len(features)} features with labels for another number of images; write both with "
                         "--dump_features")
    if labels.is_floating_point() or labels.min() < 0:
        raise ValueError(f"{where}: labels are whole numbers from 0; write them with --dump_features")


# ---- The evaluation ----


def output_dir(args: argparse.Namespace) -> Path:
    beside = os.path.dirname(args.pretrained_weights) if os.path.isfile(args.pretrained_weights) else args.load_features
    return Path(args.output_dir or beside or ".")


def compute(args: argparse.Namespace, device: torch.device) -> tuple[list[Part], dict, tuple | None]:
    """The parts of --data_path, what the report says of them, and the features of two views where they are needed."""
    network = load_network(
        args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key, device, args.crop_size,
        args.resize_size, args.precision, args.seed)
    images = open_parts(args.data_path, args.val_data_path, network.info["in_chans"])
    check_labels(f"--data_path {args.data_path}", [i.labels for i in images])
    flags.prepare_output(output_dir(args))
    cache = output_dir(args) / "features"
    found = [network_features(network, i, args.batch_size_per_gpu, args.num_workers, cache) for i in images]
    parts = [Part(x, i.labels, i.classes) for x, i in zip(found, images, strict=True)]
    views = None
    if args.label_free or parts[0].labels is None:
        views = tuple(network_features(network, images[0], args.batch_size_per_gpu, args.num_workers, cache, view)
                      for view in (0, 1))
    return parts, network.about, views


def evaluate_knn(args: argparse.Namespace) -> dict:
    """The whole evaluation: prints the tables, writes eval_knn.json, returns what it holds.

    Raises:
        flags.Refused: bad input, in one line.
    """
    try:
        flags.check_folder(args.dump_features, "--dump_features")
        device = parallel.start(args.device, args.dist_url, args.dist_timeout)
        parts, about, views = (*load(args.load_features), None) if args.load_features else compute(args, device)
        labelled = parts[0].labels is not None
        if len(parts) == 2 and labelled:
            parts = match_classes(*parts)
        results, notes = classify(parts, args, device) if labelled else ([], ["no labels: measures that need none"])
        flags.prepare_output(output_dir(args))
        if args.dump_features and parallel.is_main():
            dump(args.dump_features, parts, about)
    except (ValueError, OSError) as error:
        raise flags.Refused(error) from error
    free = scores.label_free(parts[0].features, views) if args.label_free or not labelled else None
    about = about | {
        "data_path": args.load_features or args.data_path, "val_data_path": args.val_data_path or None,
        "images": [len(p.features) for p in parts], "metric": args.metric, "notes": notes, "label_free": free,
    }
    if parallel.is_main():
        report(results, notes, free)
        scores.write_results(output_dir(args) / "eval_knn.json", results, **about)
        print(f"wrote {output_dir(args) / 'eval_knn.json'}", flush=True)
    return about | {"results": results}


def classify(parts: Sequence[Part], args: argparse.Namespace, device: torch.device) -> tuple[list[dict], list[str]]:
    """Accuracies of the second part by the first, or of one part leaving each image out; and what to know of them."""
    train, test = parts[0], parts[-1]
    exclude = torch.arange(len(test.features)) if len(parts) == 1 else None
    notes = notes_on_classes(train, test)
    if exclude is not None:
        notes.insert(0, "one set of images: each is classified by all others (leave-one-out)")
    fewest = int(torch.bincount(train.labels)[train.labels.unique()].min())
    if args.n_per_class and max(args.n_per_class) > fewest:
        notes.append(f"--n_per_class {max(args.n_per_class)}: a class has {fewest} images only, and gives those")
    results = accuracies(train, test, args, device if args.use_cuda else torch.device("cpu"), exclude)
    for n in args.n_per_class or [None]:
        most = max(row["k"] for row in results if row.get("n_per_class") == n)
        if most < max(args.nb_knn):
            notes.append(f"--nb_knn {max(args.nb_knn)}: k is at most the number of training images, {most}"
                         + (f" with {n} of each class" if n else ""))
    return results, notes


def report(results: Sequence[dict], notes: Sequence[str], free: dict | None) -> None:
    for note in notes:
        print(note)
    if results:
        print("accuracy in %, with its 95 % bootstrap interval")
        print(scores.table([{k: v for k, v in row.items() if k != "per_class"} for row in results]))
        first = results[0]
        if 1 < len(first["per_class"]) <= MOST_CLASSES_SHOWN:
            print("\ntop-1 by class, of the first line above")
            print(scores.table([{"class": name, "top1": value} for name, value in first["per_class"].items()]))
    if free:
        print("\n" + scores.table([free]))


def main(args: argparse.Namespace) -> int:
    return flags.exit_code("eval_knn.py", evaluate_knn, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
