"""Zero-shot foreground masks from the class token's attention (DINO, arXiv 2104.14294, section 4.2.2).

    python eval_segmentation.py --pretrained_weights output/run/checkpoint.pth --data_path /path/to/VOC2012
    python eval_segmentation.py --pretrained_weights output/run/checkpoint.pth --data_path ecssd --save_masks 8

Prints a table of Jaccard indices and writes it to eval_segmentation.json; protocols/segmentation.py explains its rows.
Of a network of timm, whose attention isn't read, only the rows that need none.
"""

from __future__ import annotations

import argparse
import sys

import flags
import parallel
from protocols import features
from protocols.segmentation import evaluate_segmentation, show_segmentation


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Zero-shot foreground masks from the class token's attention.")
    network = parser.add_argument_group("network")
    flags.add_weights_flags(network, precision=False)
    flags.add_image_size(network)
    data = parser.add_argument_group("data")
    flags.add_reading_flags(data)
    add = data.add_argument
    add("--data_path", default="shapes:200x96",
        help="folder with images/ and masks/, or with JPEGImages/ and SegmentationClass/ (VOC), or drawn images: "
             "shapes:COUNTxPIXELS")
    add("--val_share", type=flags.number(float, 0, 0.9), default=0.2,
        help="share of the images on which one head and the box are chosen; 0 leaves both out; raise it for few images")
    add("--seed", type=flags.seed, default=0,
        help="of the validation part, the random weights and k-means; change it to see how much the table varies")
    add = parser.add_argument_group("masks").add_argument
    add("--layer", type=int, default=-1,
        help="block whose attention is used, from 0; negative ones count from the last; without effect on "
             "networks of timm, whose attention isn't read")
    add("--threshold", type=flags.number(float, 0, 1, above=True), default=0.6,
        help="share of the attention that a mask holds; lower it if masks are too large")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="", help="for eval_segmentation.json and masks.png; empty: the weights' folder, or .")
    add("--save_masks", type=flags.count, default=0, metavar="N", help="draw the masks of N images into masks.png")
    flags.add_launch_flags(parser, workers=False)
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate what the flags name and print the table. Raises Refused for bad input."""
    output_dir = flags.check_folder(flags.output_dir(args.output_dir, args.pretrained_weights))
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    network = features.load_network(device=device, crop_size=args.image_size, size_flag="--image_size",
                                    **flags.network_values(args))
    report = evaluate_segmentation(
        network, args.data_path, args.image_size, args.layer, args.threshold, args.val_share, args.seed,
        args.save_masks, output_dir)
    if parallel.is_main():
        show_segmentation(report)
        print(f"wrote {output_dir / 'eval_segmentation.json'}" + (" and masks.png" if args.save_masks else ""))


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("eval_segmentation.py", evaluate, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
