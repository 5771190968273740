"""Image retrieval on revisited Oxford and Paris (Radenovic et al. 2018; DINO, arXiv 2104.14294, table 3).

    python eval_image_retrieval.py --pretrained_weights output/run/checkpoint.pth --data_path . --dataset roxford5k
    torchrun --nproc_per_node=8 eval_image_retrieval.py --pretrained_weights output/run/checkpoint.pth ...

<data_path>/<dataset>/ holds jpg/*.jpg and gnd_<dataset>.pkl, as published, or .json. Prints mAP and mP@k for the
settings easy, medium and hard, and writes them to eval_image_retrieval.json.
"""

from __future__ import annotations

import argparse
import sys

import flags
import parallel
from protocols import features
from protocols.landmarks import evaluate_retrieval, show_retrieval


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Image retrieval on revisited Oxford and Paris with frozen features.")
    network = parser.add_argument_group("network")
    flags.add_weights_flags(network)
    network.add_argument("--seed", type=flags.seed, default=0, help="of an untrained network")
    data = parser.add_argument_group("data")
    flags.add_reading_flags(data)
    add = data.add_argument
    add("--data_path", default=".", help="folder that holds the data set's folder")
    add("--dataset", default="roxford5k",
        help="name of that folder and of gnd_NAME.pkl or .json in it: roxford5k, rparis6k, or your own")
    add("--imsize", type=flags.positive_int, default=224,
        help="pixels of the longer side; smaller images keep their size; the published command has 512")
    add("--multiscale", type=flags.boolean, default=False,
        help="average the features over scales 1, 0.71 and 0.5, as the published command does; 1.75 times the pixels")
    flags.add_arithmetic_flag(add, "crops queries to their boxes, lets the network see images to their edges, and "
                                   "normalizes the features of each scale")
    parser.add_argument_group("output").add_argument(
        "--output_dir", default="", help="for the results and features/; empty: the weights' folder, or .")
    flags.add_launch_flags(parser)
    parser.add_argument("--use_cuda", type=flags.boolean, default=True, help="false is --device cpu")
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate what the flags name and print the table. Raises Refused for bad input."""
    output_dir = flags.output_dir(args.output_dir, args.pretrained_weights)
    device = parallel.start(args.device if args.use_cuda else "cpu", args.dist_url, args.dist_timeout)
    network = features.load_network(device=device, crop_size=args.imsize, size_flag="--imsize",
                                    **flags.network_values(args))
    report = evaluate_retrieval(
        network, args.data_path, args.dataset, args.imsize, args.multiscale, args.num_workers, output_dir,
        args.arithmetic)
    if parallel.is_main():
        show_retrieval(report)
        print(f"wrote {output_dir / 'eval_image_retrieval.json'}", flush=True)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("eval_image_retrieval.py", evaluate, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
