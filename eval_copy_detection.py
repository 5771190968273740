"""Copy detection as on INRIA Copydays (Douze et al. 2009; DINO, arXiv 2104.14294, section 4.2.1, table 4).

    python eval_copy_detection.py --pretrained_weights output/run/checkpoint.pth --data_path copies
    python eval_copy_detection.py --pretrained_weights output/run/checkpoint.pth --data_path copydays \\
        --whitening_path some_images --distractors_path other_images

Prints mAP and uAP, of all queries and by attack, and writes them to eval_copy_detection.json. --data_path is Copydays,
or a folder with database/, queries/ and ground_truth.csv; imagesets/copies.py describes both.
"""

from __future__ import annotations

import argparse
import sys

import flags
import parallel
from protocols import features
from protocols.copies import evaluate_copies, show_copies

HINTS = {flag: "images that join the database are --distractors_path, those that the whitening is learned from "
               "--whitening_path;" for flag in ("--distractors", "--distractors_for")}


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Copy detection with frozen features.", hints=HINTS)
    network = parser.add_argument_group("network")
    flags.add_weights_flags(network)
    network.add_argument("--seed", type=flags.seed, default=0, help="of an untrained network")
    network.add_argument("--gem_p", type=flags.positive, default=4.0,
                         help="power of the mean over patch tokens; 1 is the plain mean")
    data = parser.add_argument_group("data")
    flags.add_reading_flags(data, skip_bad=True)
    add = data.add_argument
    add("--data_path", required=True, help="folder with database/, queries/ and ground_truth.csv, or Copydays")
    add("--distractors_path", default="",
        help="folder or .txt list of images that join the database, to make the search harder; without copies of it")
    add("--whitening_path", default="",
        help="folder or .txt list of images to learn the whitening from, other ones than the distractors; empty: "
             "features are not whitened")
    add("--image_size", "--imsize", type=flags.count, default=0,
        help="pixels per side of the images, made square; 0: 320, as published, for weights trained on crops of 224 "
             "pixels or whose file does not say; otherwise the size of their crops")
    add("--batch_size_per_gpu", "--batch_size", type=flags.positive_int, default=64,
        help="images per process and batch; lower it if memory runs out")
    flags.add_arithmetic_flag(add, "average precision over the whole ranking, whitening by the covariance")
    parser.add_argument_group("output").add_argument(
        "--output_dir", default="", help="for the results and features/; empty: the weights' folder, or .")
    flags.add_launch_flags(parser)
    parser.add_argument("--use_cuda", type=flags.boolean, default=True, help="false is --device cpu")
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate what the flags name and print the table. Raises Refused for bad input."""
    output_dir = flags.output_dir(args.output_dir, args.pretrained_weights)
    device = parallel.start(args.device if args.use_cuda else "cpu", args.dist_url, args.dist_timeout)
    network = features.load_network(device=device, crop_size=args.image_size, size_flag="--image_size",
                                    **flags.network_values(args))
    report = evaluate_copies(
        network, args.data_path, args.distractors_path, args.whitening_path, args.gem_p, args.image_size,
        args.batch_size_per_gpu, args.num_workers, output_dir, args.arithmetic)
    if parallel.is_main():
        show_copies(report)
        print(f"wrote {output_dir / 'eval_copy_detection.json'}", flush=True)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("eval_copy_detection.py", evaluate, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
