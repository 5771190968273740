"""Every evaluation that the given data allow, in one process, with one feature cache, on one page.

    python evaluate.py --pretrained_weights output/run/checkpoint.pth --data_path images --segmentation_data ecssd

Writes report.html, with its pictures inside, and report.json. `--baselines` adds the same network untrained and raw
pixels: what the weights are worth is what they add to those.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

import eval_copy_detection
import eval_image_retrieval
import eval_knn
import eval_linear
import eval_segmentation
import eval_video_segmentation
import flags
import parallel
import visualize_attention
from imagesets import masks
from protocols import charts, report, scores, sheets
from protocols.features import PIXELS, load_network, network_features
from protocols.knn import knn_predict, nearest
from protocols.splits import Part, match_classes, open_parts

KS = (1, 5, 10, 20, 50, 100, 200)
VOTERS, TEMPERATURE = 20, 0.07  # of the k-NN whose errors are shown
SWEEP = ("--lr", "0.001", "0.01", "0.1", "1", "--n_last_blocks", "1", "4", "--avgpool_patchtokens", "false", "true")
MAPPED, SHOWN, QUERIES, NEIGHBOURS = 2000, 12, 10, 6  # images of the map, of the sheets, and of the neighbours


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Every evaluation that the given data allow, on one page.")
    add = parser.add_argument
    add("--data_path", default="shapes:2000x64", help="pictures to classify and to look at, as in eval_knn.py")
    add("--val_data_path", default="", help="test pictures that lie elsewhere")
    add("--segmentation_data", default="", help="pictures with masks, as in eval_segmentation.py")
    add("--video_data", default="", help="videos with masks, as in eval_video_segmentation.py")
    add("--copy_data", default="", help="pictures and edited copies, as in eval_copy_detection.py")
    add("--retrieval_data", default="", help="folder of a retrieval set, as eval_image_retrieval.py "
        "wants it: PATH/roxford5k")
    flags.add_network_flags(parser)
    add("--image_size", type=flags.positive_int, default=480, metavar="PIXELS",
        help="shorter side of the pictures whose masks are found, and of the attention sheets")
    add("--baselines", action="store_true", help="evaluate the untrained network and raw pixels too")
    add("--linear_epochs", type=flags.positive_int, default=100, help="of the linear classifiers")
    add("--linear_views", type=flags.count, default=4, help="crops an image to train on; 0: new ones each epoch")
    add("--seed", type=flags.seed, default=0, help="of classifiers, of what is held out, of untrained weights")
    add("--output_dir", default="", help="for report.html and report.json; empty: report/ in the weights' folder, or .")
    flags.add_launch_flags(parser)
    return parser


def output_dir(args: argparse.Namespace) -> Path:
    return flags.output_dir(args) if args.output_dir else flags.output_dir(args) / "report"


# ---- Protocols ----


class Protocol(NamedTuple):
    """One evaluation script: which flag gives it data, its own flags, and the figures to show of its report."""

    name: str
    script: ModuleType
    evaluate: Callable[[argparse.Namespace], dict]
    data: str  # the flag of this script that names its data
    own: Callable[[argparse.Namespace], Sequence[str]]
    figures: Callable[[dict], dict]  # its report -> {measure: {"value", "interval"}}


def retrieval_flags(args: argparse.Namespace) -> list[str]:
    folder = Path(args.retrieval_data)
    return ["--data_path", str(folder.parent), "--dataset", folder.name]


def knn_figures(found: dict) -> dict:
    rows = [r for r in found["results"] if r["k"] == VOTERS] or found["results"][-1:]
    figures = {f"top-1, k = {rows[0]['k']}": rows[0]["top1"]} if rows else {}
    return figures | {name: value for name, value in (found["label_free"] or {}).items() if value}


def segmentation_figures(found: dict) -> dict:
    first = found["results"][0]["network"]
    return {f"Jaccard, {row['mask']}": row["jaccard"] or row["jaccard_held_out"]
            for row in found["results"] if row["network"] == first}


PROTOCOLS = (
    Protocol("k-NN", eval_knn, eval_knn.evaluate, "data_path",
             lambda a: ["--data_path", a.data_path, "--val_data_path", a.val_data_path, "--nb_knn", *map(str, KS)],
             knn_figures),
    Protocol("linear", eval_linear, eval_linear.evaluate, "data_path",
             lambda a: ["--data_path", a.data_path, "--val_data_path", a.val_data_path, "--epochs",
                        str(a.linear_epochs), "--views", str(a.linear_views), *SWEEP],
             lambda found: {"top-1": found["test"]["top1"]}),
    Protocol("segmentation", eval_segmentation, eval_segmentation.evaluate_segmentation, "segmentation_data",
             lambda a: ["--data_path", a.segmentation_data, "--save_masks", "8"], segmentation_figures),
    Protocol("video segmentation", eval_video_segmentation, eval_video_segmentation.evaluate_video_segmentation,
             "video_data", lambda a: ["--data_path", a.video_data],
             lambda found: {"J&F": found["results"][0]["J&F"]} if found["results"] else {}),
    Protocol("copy detection", eval_copy_detection, eval_copy_detection.evaluate_copies, "copy_data",
             lambda a: ["--data_path", a.copy_data],
             lambda found: {name: found["results"][0][name] for name in ("mAP", "uAP")}),
    Protocol("retrieval", eval_image_retrieval, eval_image_retrieval.evaluate_retrieval, "retrieval_data",
             retrieval_flags, lambda found: {f"mAP, {row['setting']}": row["mAP"] for row in found["results"]}),
)

SHARED = ("pretrained_weights", "checkpoint_key", "arch", "patch_size", "resize_size", "crop_size",
          "batch_size_per_gpu", "precision", "seed", "device", "num_workers", "dist_url", "dist_timeout")
DENSE = (eval_segmentation, eval_video_segmentation)


def subjects(args: argparse.Namespace, about: dict) -> dict[str, dict]:
    """What is evaluated, by its name in the table: values of flags that differ from this script's."""
    found: dict[str, dict] = {"this network": {}}
    if args.baselines and args.arch != PIXELS:
        same = {name: about[name] for name in ("arch", "patch_size", "crop_size")}
        if args.pretrained_weights:
            found["untrained"] = same | {"pretrained_weights": ""}
        found["raw pixels"] = {"pretrained_weights": "", "arch": PIXELS}
    return found


def run(protocol: Protocol, args: argparse.Namespace, subject: str, values: dict) -> dict:
    """The protocol's report. Raises flags.Refused."""
    own = protocol.script.get_args_parser().parse_args(protocol.own(args))
    for name in SHARED:
        if hasattr(own, name):
            setattr(own, name, values.get(name, getattr(args, name)))
    if protocol.script in DENSE:
        own.image_size = args.image_size
    folder = "video" if protocol.script is eval_video_segmentation else ""
    own.output_dir = str(output_dir(args) / subject.replace(" ", "_") / folder)
    if parallel.is_main():
        print(f"---- {protocol.name}, {subject}", flush=True)
    return protocol.evaluate(own)


def run_all(args: argparse.Namespace, about: dict) -> tuple[list[dict], dict[str, dict], dict[str, str]]:
    """The table of figures, the reports on this network by protocol, and what was skipped and why."""
    table, reports, skipped = [], {}, {}
    for protocol in PROTOCOLS:
        if not getattr(args, protocol.data):
            skipped[protocol.name] = f"no --{protocol.data} was given"
            continue
        figures: dict[str, dict] = {}
        for subject, values in subjects(args, about).items():
            try:
                found = run(protocol, args, subject, values)
            except flags.Refused as error:
                skipped[protocol.name if not values else f"{protocol.name}, {subject}"] = str(error)
                continue
            figures[subject] = protocol.figures(found)
            if not values:
                reports[protocol.name] = found
        for measure in figures.get("this network", {}):
            table.append({"protocol": protocol.name, "figure": measure}
                         | {subject: figures.get(subject, {}).get(measure) for subject in subjects(args, about)})
    return table, reports, skipped


# ---- Pictures ----


def classified(args: argparse.Namespace, device: torch.device) -> tuple[list, list[Part]]:
    """The images to classify, and their features from the cache that k-NN has filled."""
    network = load_network(
        args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key, device, args.crop_size,
        args.resize_size, args.precision, args.seed)
    images = open_parts(args.data_path, args.val_data_path, network.info["in_chans"])
    cache = output_dir(args) / "this_network" / "features"
    found = [network_features(network, i, args.batch_size_per_gpu, args.num_workers, cache) for i in images]
    parts = [Part(x, i.labels, i.classes) for x, i in zip(found, images, strict=True)]
    return images, match_classes(*parts) if len(parts) == 2 and parts[0].labels is not None else parts


def confusions(parts: Sequence[Part], most: int = 10) -> list[dict]:
    """The pairs of classes that 20-NN takes for each other most often."""
    train, test = parts[0], parts[-1]
    hidden = torch.arange(len(test.features)) if len(parts) == 1 else None
    found = knn_predict(train.features, train.labels, test.features, [VOTERS], [TEMPERATURE], len(train.classes),
                        exclude=hidden)[0, 0][:, 0]
    wrong = found != test.labels
    pairs, counts = torch.stack([test.labels[wrong], found[wrong]], 1).unique(dim=0, return_counts=True)
    sizes = torch.bincount(test.labels, minlength=len(test.classes))
    return [{"class": test.classes[a], "taken for": test.classes[b], "images": int(counts[i]),
             "of the class, %": 100 * float(counts[i] / sizes[a])}
            for i in counts.argsort(descending=True, stable=True)[:most].tolist() for a, b in [pairs[i].tolist()]]


def draw_neighbours(images: Sequence, parts: Sequence[Part], path: Path) -> None:
    """Ten test images, evenly chosen, and their nearest training images."""
    train, test = parts[0], parts[-1]
    rows = torch.linspace(0, len(test.features) - 1, min(QUERIES, len(test.features))).round().long()
    _, near = nearest(test.features[rows], train.features, NEIGHBOURS, exclude=rows if len(parts) == 1 else None)
    pictures = [sheets.as_picture(images[-1].load(i)) for i in rows.tolist()]
    found = [[sheets.as_picture(images[0].load(j)) for j in row] for row in near.tolist()]
    same = [[train.labels is None or bool(train.labels[j] == test.labels[i]) for j in row]
            for i, row in zip(rows.tolist(), near.tolist(), strict=True)]
    sheets.save_picture(sheets.neighbour_sheet(pictures, found, same), path)


def draw_map(parts: Sequence[Part], path: Path, seed: int) -> None:
    """The test images' features, at most 2,000 of them, evenly chosen."""
    test = parts[-1]
    rows = torch.linspace(0, len(test.features) - 1, min(MAPPED, len(test.features))).round().long()
    labels = torch.zeros(len(rows), dtype=torch.long) if test.labels is None else test.labels[rows]
    charts.feature_map(test.features[rows].numpy(), labels.numpy(), test.classes or ["no labels"], path, seed)


def draw_sheets(args: argparse.Namespace, images: Sequence, folder: Path) -> None:
    """attention_sheet.png and pca_sheet.png of some test pictures."""
    own = visualize_attention.get_args_parser().parse_args([
        "--max_images", str(SHOWN), "--pca", "--threshold", "0.6",
        "--image_size", str(args.image_size), "--output_dir", str(folder)])
    for name in SHARED:
        if hasattr(own, name):
            setattr(own, name, getattr(args, name))
    model, info = visualize_attention.load_network(own)
    images = images or open_parts(args.data_path, args.val_data_path, info["in_chans"])
    visualize_attention.draw_sheets(own, model, info, images[-1])


# ---- The page ----


def sections(args: argparse.Namespace, about: dict, results: tuple, images: Sequence, parts: Sequence[Part]
             ) -> list[tuple[str, list[str]]]:
    """The page's sections; draws its pictures into --output_dir. What cannot be drawn is added to what was skipped."""
    table, reports, skipped = results
    folder = output_dir(args)
    drawn: dict[str, list[str]] = {}

    def draw(name: str, function: Callable, *pictures: tuple[str, str]) -> None:
        try:
            function()
            drawn[name] = [report.picture(folder / file, caption) for file, caption in pictures]
        except (ValueError, OSError, ImportError) as error:
            skipped[name] = str(error)

    knn = reports.get("k-NN", {})
    if knn.get("results"):
        draw("sweep", lambda: charts.sweep_chart(knn["results"], folder / "k_sweep.png"),
             ("k_sweep.png", "top-1 accuracy for every k, with its 95 % interval"))
    if parts and len(parts[-1].features) >= 5:
        draw("map of the features", lambda: draw_map(parts, folder / "tsne.png", args.seed),
             ("tsne.png", f"t-SNE of the features of {min(MAPPED, len(parts[-1].features))} test images by class"))
    elif parts:
        skipped["map of the features"] = f"{len(parts[-1].features)} images are too few"
    if parts and len(parts[0].features) > 1:
        draw("neighbours", lambda: draw_neighbours(images, parts, folder / "neighbours.png"),
             ("neighbours.png", "test images and the training images nearest to them; green: the same class, red: "
                                "another"))
    draw("attention and PCA", lambda: draw_sheets(args, images, folder),
         ("attention_sheet.png", "picture, the patches that hold 60 % of the attention, mean of the heads, each head"),
         ("pca_sheet.png", "patch tokens' first three principal components as red, green and blue"))
    lines = [{k: v for k, v in row.items() if k != "per_class"} for row in knn.get("results", [])]
    wrong = confusions(parts) if knn.get("results") else []
    segmented = reports.get("segmentation")
    sheet = folder / "this_network" / "masks.png"
    facts = {k: about[k] for k in ("arch", "patch_size", "weights", "checkpoint_key", "weights_sha256", "crop_size")
             if about.get(k) is not None}
    return [
        ("What was evaluated", [report.facts(facts | {"data": args.data_path, "command": shlex.join(sys.argv)})]),
        ("Figures, with 95 % bootstrap intervals", [report.table(table), report.note(
            "Accuracies, Jaccard indices, J&F and average precisions in %. Segmentation: best head chooses with the "
            "ground truth of each image; one head was chosen on other images.")]),
        ("k-NN", drawn.get("sweep", []) + [report.table(lines)] + [report.note(n) for n in knn.get("notes", [])]),
        ("Classes taken for each other", [report.table(wrong)] if wrong else []),
        ("Linear classifiers", [report.table(reports["linear"]["results"]), report.note(
            "The chosen one alone met the test set.")] if "linear" in reports else []),
        ("Map of the features", drawn.get("map of the features", [])),
        ("Nearest neighbours", drawn.get("neighbours", [])),
        ("What the network looks at", drawn.get("attention and PCA", [])),
        ("Foreground masks", [report.table(segmented["results"])] + (
            [report.picture(sheet, "images, their foreground, and masks from the attention")] if sheet.is_file() else []
        ) if segmented else []),
        *((name.capitalize(), [report.table(reports[name]["results"])])
          for name in ("video segmentation", "copy detection", "retrieval") if name in reports),
        ("Skipped", [report.facts(skipped)] if skipped else []),
    ]


def evaluate(args: argparse.Namespace) -> dict:
    """Everything: writes report.html and report.json, returns what the JSON holds.

    Raises:
        flags.Refused: bad input, in one line.
    """
    try:
        device = parallel.start(args.device, args.dist_url, args.dist_timeout)
        network = load_network(
            args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key, device, args.crop_size,
            args.resize_size, args.precision, args.seed)
        for name in ("segmentation_data", "video_data", "copy_data", "retrieval_data"):
            value = getattr(args, name)
            if name == "segmentation_data" and masks.is_drawn(value):
                masks.open_masked(value, network.info["in_chans"], f"--{name}")
            elif value and not os.path.isdir(value):
                raise FileNotFoundError(f"--{name} {value}: no such folder")
        # A wrong path is named before any work.
        open_parts(args.data_path, args.val_data_path, network.info["in_chans"])
        flags.prepare_output(output_dir(args))
    except (ValueError, OSError) as error:
        raise flags.Refused(error) from error
    results = run_all(args, network.about)
    images, parts = classified(args, device) if "k-NN" in results[1] else ([], [])
    table, reports, skipped = results
    if parallel.is_main():
        page = report.page("Evaluation of frozen features", sections(args, network.about, results, images, parts))
        (output_dir(args) / "report.html").write_text(page)
        scores.write_results(output_dir(args) / "report.json", table, **network.about, skipped=skipped,
                             reports=reports)
        print(scores.table(table) if table else "no figures")
        for name, reason in skipped.items():
            print(f"skipped: {name}: {reason}")
        print(f"wrote {output_dir(args) / 'report.html'} and report.json", flush=True)
    return network.about | {"results": table, "skipped": skipped, "reports": reports}


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("evaluate.py", evaluate, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
