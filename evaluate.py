"""Every evaluation that the given data allow, in one process, with one feature cache, on one page.

    python evaluate.py --pretrained_weights output/run/checkpoint.pth --data_path images --segmentation_data ecssd

Writes report.html, which contains its figures, and report.json. `--baselines` evaluates the same network untrained and
raw pixels too: good weights are better than both.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import flags
import parallel
from imagesets import masks
from parallel import Refused
from protocols import overview, scores
from protocols.copies import evaluate_copies, show_copies
from protocols.features import PIXELS, Network, load_network
from protocols.knn_evaluation import KnnSettings, Views, compute_features, evaluate_knn, show_knn
from protocols.landmarks import evaluate_retrieval, show_retrieval
from protocols.linear import Training
from protocols.probes import evaluate_linear, show_linear
from protocols.segmentation import evaluate_segmentation, show_segmentation
from protocols.splits import Part, open_parts
from protocols.video_segmentation import evaluate_video_segmentation, show_video_segmentation

KS = (1, 5, 10, 20, 50, 100, 200)
SWEEP = {"lrs": (0.001, 0.01, 0.1, 1.0), "n_last_blocks": (1, 4), "avgpool_patchtokens": (False, True)}
NETWORK = "this network"


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Every evaluation that the given data allow, on one page.")
    flags.add_network_flags(parser)
    add = flags.add_data_flags(parser, "shapes:2000x64")
    add("--segmentation_data", default="", help="images with masks, as in eval_segmentation.py; empty: left out")
    add("--video_data", default="", help="videos with masks, as in eval_video_segmentation.py; empty: left out")
    add("--copy_data", default="", help="images and edited copies, as in eval_copy_detection.py; empty: left out")
    add("--retrieval_data", default="",
        help="folder of a retrieval set, as eval_image_retrieval.py wants it: PATH/roxford5k; empty: left out")
    add = parser.add_argument_group("evaluation").add_argument
    add("--baselines", action="store_true",
        help="evaluate the untrained network and raw pixels too; triples the time")
    add("--image_size", type=flags.positive_int, default=480, metavar="PIXELS",
        help="shorter side of the images for masks and attention sheets; lower it for small images")
    add("--linear_epochs", type=flags.positive_int, default=100, help="epochs of the linear classifiers")
    add("--linear_views", type=flags.count, default=4,
        help="random crops per image to train classifiers on; 0: new ones in each epoch, as published, and slower")
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
                        batch_size=args.batch_size_per_gpu, num_workers=args.num_workers)
    return evaluate_linear(network, args.data_path, args.val_data_path, folder, training)


PROTOCOLS = (
    Protocol("k-NN", "data_path", run_knn, show_knn, overview.knn_figures),
    Protocol("linear", "data_path", run_linear, show_linear, lambda r: {"top-1": r["test"]["top1"]}),
    Protocol("segmentation", "segmentation_data", lambda network, args, folder: evaluate_segmentation(
        network, args.segmentation_data, args.image_size, seed=args.seed, save_masks=8, output_dir=folder,
        flag="--segmentation_data"), show_segmentation, overview.segmentation_figures),
    Protocol("video segmentation", "video_data", lambda network, args, folder: evaluate_video_segmentation(
        network, args.video_data, image_size=args.image_size, patch_size=args.patch_size or 16,
        output_dir=folder / "video"),
        show_video_segmentation, lambda r: {"J&F": r["results"][0]["J&F"]} if r["results"] else {}),
    Protocol("copy detection", "copy_data", lambda network, args, folder: evaluate_copies(
        network, args.copy_data, batch_size=args.batch_size_per_gpu, num_workers=args.num_workers, output_dir=folder),
        show_copies, lambda r: {name: r["results"][0][name] for name in ("mAP", "uAP")} if r["results"] else {}),
    Protocol("retrieval", "retrieval_data", lambda network, args, folder: evaluate_retrieval(
        network, str(Path(args.retrieval_data).parent), Path(args.retrieval_data).name, num_workers=args.num_workers,
        output_dir=folder), show_retrieval, lambda r: {f"mAP, {row['setting']}": row["mAP"] for row in r["results"]}),
)


def load_networks(args: argparse.Namespace) -> dict[str, Network]:
    """What is evaluated, by its name in the table."""
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    network = load_network(args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key, device,
                           args.crop_size, args.resize_size, args.precision, args.seed)
    networks = {NETWORK: network}
    if args.baselines and args.arch != PIXELS:
        about = network.about
        if args.pretrained_weights:
            networks["untrained"] = load_network(
                "", about["arch"], about["patch_size"], args.checkpoint_key, device, about["crop_size"],
                args.resize_size, args.precision, args.seed)
        networks["raw pixels"] = load_network("", PIXELS, device=device)
    return networks


def check_data(args: argparse.Namespace, in_chans: int) -> list:
    """The images to classify. Data that can't be there are refused before any work."""
    for name in ("segmentation_data", "video_data", "copy_data", "retrieval_data"):
        value = getattr(args, name)
        if name == "segmentation_data" and masks.is_drawn(value):
            masks.open_masked(value, in_chans, f"--{name}")
        elif value and not os.path.isdir(value):
            raise Refused(f"--{name} {value}: no such folder; give one, or leave the flag out")
    return open_parts(args.data_path, args.val_data_path, in_chans)


def run_all(
    args: argparse.Namespace, networks: Mapping[str, Network], folder: Path
) -> tuple[list[dict], dict[str, dict], dict[str, str]]:
    """The table of figures, the reports on this network by protocol, and what was skipped and why."""
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
            if name == NETWORK:
                reports[protocol.name] = report
        table += [{"protocol": protocol.name, "figure": measure}
                  | {name: figures.get(name, {}).get(measure) for name in networks}
                  for measure in figures.get(NETWORK, {})]
    return table, reports, skipped


# ---- The script ----


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate everything and write report.html and report.json. Raises Refused for bad input."""
    folder = flags.output_dir(args.output_dir, args.pretrained_weights)
    folder = folder if args.output_dir else folder / "report"
    networks = load_networks(args)
    network = networks[NETWORK]
    images = check_data(args, network.info["in_chans"])
    flags.prepare_output(folder)
    table, reports, skipped = run_all(args, networks, folder)
    own = folder / NETWORK.replace(" ", "_")
    parts = knn_features(network, args, own)[0] if "k-NN" in reports else []  # from the cache
    if not parallel.is_main():
        return
    drawn = overview.draw(folder, network, images, parts, reports.get("k-NN", {}), args.image_size, args.seed, skipped)
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
