"""Linear semantic segmentation on frozen patch tokens (DINOv2, arXiv 2304.07193, section 7.4).

    python eval_semantic.py --pretrained_weights output/run/checkpoint.pth --data_path shapes:1200x64 --baselines
    torchrun --nproc_per_node=8 eval_semantic.py @presets/semantic_dinov3.txt \\
        --pretrained_weights output/run/checkpoint.pth --data_path ADEChallengeData2016

Several values of --lr or --n_last_blocks make a sweep: all linear layers are trained in one pass, the best is chosen on
a held-out part of the training images, and the test images are used once, for it alone.
"""

from __future__ import annotations

import argparse
import sys

import flags
import parallel
from protocols import dense_flags
from protocols.dense_prediction import Geometry
from protocols.dense_training import Recipe
from protocols.features import load_network
from protocols.semantic import evaluate_semantic, show_semantic


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Linear semantic segmentation on frozen patch tokens.")
    flags.add_weights_flags(parser)
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data_path", default="shapes:1200x64",
        help="folder with train/ and val/, each with images/ and masks/; VOC2012, ADEChallengeData2016 or Cityscapes "
             "as they come; or drawn images: shapes:COUNTxPIXELS, scenes:COUNTxPIXELS")
    add("--val_data_path", default="",
        help="test images outside of --data_path, all of whose training images are then used for training")
    flags.add_reading_flags(group)
    add("--foreground", action="store_true",
        help="two classes, background (0) and object (all others), instead of those of the masks")
    add("--scale", type=flags.positive, nargs=2, default=[0.5, 2.0], metavar=("LOW", "HIGH"),
        help="random scale of the training images, times --image_size")
    dense_flags.add_part_flags(group)

    group = parser.add_argument_group("linear layer")
    add = group.add_argument
    add("--n_last_blocks", type=flags.positive_int, nargs="+", default=[1],
        help="number of last blocks whose tokens are concatenated, 1 or 4; several make a sweep")
    dense_flags.add_training_flags(group, "0.001 for tens of thousands of steps", "40,000")
    add("--dropout", type=flags.number(float, 0, 0.99), default=0.0,
        help="share of the channels of the tokens that are zeroed in training")

    group = parser.add_argument_group("test")
    add = group.add_argument
    dense_flags.add_window_flags(group, "as --crop_size", "probabilities")
    add("--baselines", action="store_true",
        help="also evaluate the untrained network, raw pixels, and k-means of the patch tokens; doubles the time")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="",
        help="for eval_semantic.json, semantic.pth and semantic.png; a stopped run resumes here; empty: the weights' "
             "folder, or .")
    add("--save_pictures", type=flags.count, default=8, metavar="N",
        help="draw N test images, their truth and the predictions into semantic.png")
    flags.add_launch_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    if args.scale[0] > args.scale[1]:
        raise parallel.Refused(f"--scale {args.scale[0]:g} {args.scale[1]:g}: give the smaller value first")


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate what the flags name and print the tables. Raises Refused for bad input."""
    check_args(args)
    output_dir = flags.check_folder(flags.output_dir(args.output_dir, args.pretrained_weights))
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    network = load_network(device=device, **flags.network_values(args))
    geometry = Geometry(args.image_size, args.crop_size, args.window_size, args.stride, args.test_scales,
                        args.test_flip)
    recipe = Recipe(args.lr, args.n_last_blocks, args.steps, args.batch_size, args.warmup_steps, args.weight_decay,
                    args.dropout, tuple(args.scale), args.seed, args.num_workers)
    report = evaluate_semantic(network, args.data_path, args.val_data_path, geometry, recipe, args.foreground,
                               args.baselines, args.val_share, args.save_pictures, output_dir)
    if parallel.is_main():
        show_semantic(report)
        print(f"wrote {output_dir / 'eval_semantic.json'}" + (" and semantic.png" if args.save_pictures else ""))


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("eval_semantic.py", evaluate, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
