"""Run every evaluation that the given data allow, in one process with one feature cache, and write one report.

    python evaluate.py --pretrained_weights output/run/checkpoint.pth --data_path images --segmentation_data ecssd

Writes report.html, which contains its figures, and report.json. `--baselines` evaluates the same network untrained and
raw pixels too: good weights are better than both.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import flags
import parallel
from imagesets import class_masks, depth_maps, masks
from imagesets.decode import Reading
from parallel import Refused
from protocols import overview, scores, tokens
from protocols.copies import evaluate_copies, show_copies
from protocols.dense_training import Recipe
from protocols.depth import evaluate_depth, show_depth
from protocols.features import PIXELS, Network, load_network, pixel_network, untrained
from protocols.knn_evaluation import KnnSettings, Views, compute_features, evaluate_knn, show_knn
from protocols.landmarks import evaluate_retrieval, show_retrieval
from protocols.linear import Training
from protocols.probes import evaluate_linear, show_linear
from protocols.segmentation import evaluate_segmentation, show_segmentation
from protocols.semantic import evaluate_semantic, show_semantic
from protocols.splits import Part, open_parts
from protocols.video_segmentation import evaluate_video_segmentation, show_video_segmentation

KS = (1, 5, 10, 20, 50, 100, 200)
SWEEP = {"lrs": (0.001, 0.01, 0.1, 1.0), "n_last_blocks": (1, 4), "avgpool_patchtokens": (False, True)}
SEMANTIC_LRS = (0.001, 0.01)
DEPTH_LRS = (0.001, 0.01)
NETWORK = "this network"


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Every evaluation that the given data allow, on one page.")
    flags.add_network_flags(parser)
    add = flags.add_data_flags(parser, "shapes:2000x64")
    add("--segmentation_data", default="", help="images with masks, as in eval_segmentation.py; empty: left out")
    add("--semantic_data", default="",
        help="images whose pixels have classes, as in eval_semantic.py, at its default sizes whatever --image_size "
             "is: shapes:1200x64; empty: left out")
    add("--depth_data", default="",
        help="images with depth maps, as in eval_depth.py, at its default sizes whatever --image_size is: "
             "scenes:400x64; empty: left out")
    add("--video_data", default="", help="videos with masks, as in eval_video_segmentation.py; empty: left out")
    add("--copy_data", default="", help="images and edited copies, as in eval_copy_detection.py; empty: left out")
    add("--retrieval_data", default="",
        help="folder of a retrieval set, as eval_image_retrieval.py wants it: PATH/roxford5k; empty: left out")
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--baselines", action="store_true",
        help="evaluate the untrained network and raw pixels too; triples the time")
    flags.add_image_size(group)
    add("--linear_epochs", type=flags.positive_int, default=100, help="epochs of the linear classifiers")
    add("--linear_views", type=flags.count, default=4,
        help="random crops per image to train classifiers on; 0: new ones in each epoch, as published, and slower")
    add("--semantic_steps", type=flags.positive_int, default=400,
        help="training steps of the linear layers for --semantic_data; raise it for large data")
    add("--depth_steps", type=flags.positive_int, default=400,
        help="training steps of the linear layers for --depth_data; raise it for large data")
    flags.add_arithmetic_flag(add, "that of every script's --arithmetic own, and bicubic crops for linear classifiers")
    add("--seed", type=flags.seed, default=0, help="of classifiers, of what is held out, of untrained weights")
    parser.add_argument_group("output").add_argument(
        "--output_dir", default="", help="for report.html and report.json; empty: report/ in the weights' folder, or .")
    flags.add_launch_flags(parser)
    return parser


# ---- Protocols ----


class Protocol(NamedTuple):
    """An evaluation of a network, whose files go into a folder."""

    name: str
    data: str  # the flag that names its data
    evaluate: Callable[[Network, argparse.Namespace, Path], dict]
    show: Callable[[dict], None]
    figures: Callable[[Mapping], dict]  # its report -> {measure: {"value", "interval"}}


def knn_features(network: Network, args: argparse.Namespace, folder: Path) -> tuple[list[Part], Views | None]:
    return compute_features(network, args.data_path, args.val_data_path, folder, batch_size=args.batch_size_per_gpu,
                            num_workers=args.num_workers)


def run_knn(network: Network, args: argparse.Namespace, folder: Path) -> dict:
    source = {"data_path": args.data_path, "val_data_path": args.val_data_path or None}
    return evaluate_knn(*knn_features(network, args, folder), network.about | source, folder,
                        KnnSettings(KS, seed=args.seed), device=network.device)


def run_linear(network: Network, args: argparse.Namespace, folder: Path) -> dict:
    training = Training(**SWEEP, epochs=args.linear_epochs, views=args.linear_views, seed=args.seed,
                        batch_size=args.batch_size_per_gpu, num_workers=args.num_workers,
                        interpolation="bicubic" if args.arithmetic == flags.OWN else "bilinear")
    return evaluate_linear(network, args.data_path, args.val_data_path, folder, training)


PROTOCOLS = (
    Protocol("k-NN", "data_path", run_knn, show_knn, overview.knn_figures),
    Protocol("linear", "data_path", run_linear, show_linear, lambda r: {"top-1": r["test"]["top1"]}),
    Protocol("segmentation", "segmentation_data", lambda network, args, folder: evaluate_segmentation(
        network, args.segmentation_data, args.image_size, seed=args.seed, save_masks=8, output_dir=folder,
        flag="--segmentation_data"), show_segmentation, overview.segmentation_figures),
    Protocol("semantic segmentation", "semantic_data", lambda network, args, folder: evaluate_semantic(
        network, args.semantic_data, recipe=Recipe(SEMANTIC_LRS, steps=args.semantic_steps, seed=args.seed,
                                                    num_workers=args.num_workers),
        output_dir=folder, flag="--semantic_data"), show_semantic, overview.semantic_figures),
    Protocol("depth", "depth_data", lambda network, args, folder: evaluate_depth(
        network, args.depth_data, recipe=Recipe(DEPTH_LRS, steps=args.depth_steps, scale=(1.0, 1.0), seed=args.seed,
                                                 num_workers=args.num_workers),
        output_dir=folder, flag="--depth_data"), show_depth, overview.depth_figures),
    Protocol("video segmentation", "video_data", lambda network, args, folder: evaluate_video_segmentation(
        network, args.video_data, image_size=args.image_size or 480, output_dir=folder / "video",
        patch_size=network.info.get("patch_size", args.patch_size or 16), arithmetic=args.arithmetic),
        show_video_segmentation,
        lambda r: {"J&F": r["results"][0]["J&F"]} if r["results"] else {}),
    Protocol("copy detection", "copy_data", lambda network, args, folder: evaluate_copies(
        network, args.copy_data, image_size=network.about["crop_size"], batch_size=args.batch_size_per_gpu,
        num_workers=args.num_workers, output_dir=folder, arithmetic=args.arithmetic), show_copies,
        lambda r: {name: r["results"][0][name] for name in ("mAP", "uAP")} if r["results"] else {}),
    Protocol("retrieval", "retrieval_data", lambda network, args, folder: evaluate_retrieval(
        network, str(Path(args.retrieval_data).parent), Path(args.retrieval_data).name, num_workers=args.num_workers,
        output_dir=folder, arithmetic=args.arithmetic), show_retrieval,
        lambda r: {f"mAP, {row['setting']}": row["mAP"] for row in r["results"]}),
)


def load_networks(args: argparse.Namespace) -> dict[str, Network]:
    """What is evaluated, by its name in the table."""
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    network = load_network(device=device, crop_size=args.crop_size, resize_size=args.resize_size,
                           **flags.network_values(args))
    networks = {NETWORK: network}
    if args.baselines and args.arch != PIXELS:
        if args.pretrained_weights:
            networks["untrained"] = untrained(network, args.seed)
        info = network.info
        pixels = pixel_network(device, network.reading, info["mean"], info["std"])
        with suppress(Refused):  # of a network without patch tokens, which these evaluations refuse
            pixels = pixels._replace(info=pixels.info | {"patch_size": tokens.patch_size(network)})
        networks["raw pixels"] = pixels
    return networks


def check_data(args: argparse.Namespace, reading: Reading) -> list:
    """The images to classify. Data that can't be there are refused before any work."""
    drawn = {  # kinds of drawn images, and what opens them
        "segmentation_data": (("shapes",), masks.open_masked),
        "semantic_data": (class_masks.DRAW, class_masks.open_parts),
        "depth_data": (("scenes",), depth_maps.open_depth_maps),
    }
    for name in (*drawn, "video_data", "copy_data", "retrieval_data"):
        value = getattr(args, name)
        kinds, open_drawn = drawn.get(name, ((), None))
        if masks.is_drawn(value, kinds):
            open_drawn(value, reading=reading, flag=f"--{name}")
        elif value and not os.path.isdir(value):
            raise Refused(f"--{name} {value}: no such folder; give one, or leave the flag out")
    return open_parts(args.data_path, args.val_data_path, reading)


def run_all(
    args: argparse.Namespace, networks: Mapping[str, Network], folder: Path
) -> tuple[list[dict], dict[str, dict[str, dict]], dict[str, str]]:
    """The table of figures, the reports by protocol and network, and what was skipped and why."""
    table, reports, skipped = [], {}, {}
    for protocol in PROTOCOLS:
        if not getattr(args, protocol.data):
            skipped[protocol.name] = f"no --{protocol.data} was given"
            continue
        figures: dict[str, dict] = {}
        for name, network in networks.items():
            parallel.say(f"---- {protocol.name}, {name}")
            try:
                report = protocol.evaluate(network, args, folder / name.replace(" ", "_"))
            except Refused as error:
                skipped[protocol.name if name == NETWORK else f"{protocol.name}, {name}"] = str(error)
                continue
            if parallel.is_main():
                protocol.show(report)
            figures[name] = protocol.figures(report)
            reports.setdefault(protocol.name, {})[name] = report
        table += [{"protocol": protocol.name, "figure": measure}
                  | {name: figures.get(name, {}).get(measure) for name in networks}
                  for measure in figures.get(NETWORK, {})]
    return table, reports, skipped


# ---- The script ----


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate everything and write report.html and report.json. Raises Refused for bad input."""
    if not args.pretrained_weights and not args.arch:
        raise Refused("--pretrained_weights: give the file of a network, or --arch alone for one with random weights")
    folder = flags.output_dir(args.output_dir, args.pretrained_weights)
    folder = folder if args.output_dir else folder / "report"
    networks = load_networks(args)
    network = networks[NETWORK]
    images = check_data(args, network.reading)
    flags.prepare_output(folder)
    table, all_reports, skipped = run_all(args, networks, folder)
    reports = {protocol: by_network[NETWORK] for protocol, by_network in all_reports.items() if NETWORK in by_network}
    own = folder / NETWORK.replace(" ", "_")
    parts = knn_features(network, args, own)[0] if "k-NN" in reports else []  # from the cache
    if not parallel.is_main():
        return
    sweeps = {name: knn["results"] for name, knn in all_reports.get("k-NN", {}).items() if knn["results"]}
    drawn = overview.draw(folder, network, images, parts, sweeps, args.image_size, args.seed, skipped)
    page = overview.page(network.about, args.data_path, table, reports, skipped, drawn, parts, own / "masks.png")
    (folder / "report.html").write_text(page, encoding="utf-8")
    scores.write_results(folder / "report.json", table, **network.about, skipped=skipped, reports=reports)
    print(scores.table(table) if table else "no figures")
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}")
    print(f"wrote {folder / 'report.html'} and report.json", flush=True)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("evaluate.py", evaluate, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
