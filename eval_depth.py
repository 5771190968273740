"""Linear depth estimation on frozen tokens (DINOv2, arXiv 2304.07193, section 7.4).

    python eval_depth.py --pretrained_weights output/run/checkpoint.pth --data_path scenes:400x64 --baselines
    torchrun --nproc_per_node=8 eval_depth.py @presets/depth_nyu.txt \\
        --pretrained_weights dinov2_vits14.pth --data_path nyu

Several values of --lr or --n_blocks make a sweep: all linear layers are trained in one pass, the best is chosen on a
held-out part of the training images, and the test images are used once, for it alone.
"""

from __future__ import annotations

import argparse
import sys

import flags
import parallel
from imagesets.depth_maps import MIN_DEPTH, Limits
from protocols import dense_flags
from protocols.dense_prediction import Geometry
from protocols.dense_training import Recipe
from protocols.depth import DepthOptions, evaluate_depth, show_depth
from protocols.depth_layers import BINS
from protocols.depth_scores import CROPS
from protocols.features import load_network


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Linear depth estimation on frozen tokens.")
    flags.add_weights_flags(parser)
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data_path", default="scenes:400x64",
        help="folder with train/ and val/, each with images/ and depth/; NYU Depth v2 or KITTI (docs/depth.md); or "
             "drawn scenes: scenes:COUNTxPIXELS")
    add("--val_data_path", default="",
        help="test images outside of --data_path, all of whose training images are then used for training")
    flags.add_reading_flags(group)
    add("--depth_scale", type=flags.non_negative, default=0.0,
        help="units per metre of depth in PNG files; 0: 1000, of KITTI 256; .npy files are in metres")
    add("--min_depth", type=flags.positive, default=MIN_DEPTH, metavar="METRES",
        help="least depth of the bins; pixels with less are left out, in training and test")
    add("--max_depth", type=flags.non_negative, default=0.0, metavar="METRES",
        help="largest depth of the bins; pixels with as much or more are left out; 0: 10 for NYU and scenes, 80 for "
             "KITTI, the largest of the training images for a folder")
    dense_flags.add_part_flags(group)

    group = parser.add_argument_group("linear layer")
    add = group.add_argument
    add("--n_blocks", type=flags.positive_int, nargs="+", default=[1],
        help="number of blocks whose tokens are concatenated: 1, the last one, or 4, evenly spaced; several make a "
             "sweep")
    dense_flags.add_training_flags(group, "0.0001 with --batch_norm false", "38,400")
    add("--batch_norm", type=flags.boolean, default=True,
        help="normalize the tokens before the linear layer; false for the published recipe, whose learning rate suits "
             "the sizes of the tokens")
    add("--bins", type=flags.number(int, 2, 65536), default=BINS, help="depths that a layer weights")
    add("--gradient_weight", type=flags.non_negative, default=0.0,
        help="weight of the loss of depth gradients beside SigLoss; 0.5 for sharper edges")

    group = parser.add_argument_group("test")
    add = group.add_argument
    dense_flags.add_window_flags(group, "the whole image", "depths")
    add("--eval_crop", choices=tuple(CROPS), default="none",
        help="part of the test images that is judged; for published figures eigen_nyu on NYU, garg or eigen_kitti on "
             "KITTI")
    add("--baselines", action="store_true",
        help="also evaluate the untrained network, raw pixels, and the mean depth of the training images; doubles the "
             "time")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="",
        help="for eval_depth.json, depth.pth and depth.png; a stopped run resumes here; empty: the weights' folder, "
             "or .")
    add("--save_pictures", type=flags.count, default=8, metavar="N",
        help="draw N test images, their depth and the predictions into depth.png")
    flags.add_launch_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    if 0 < args.max_depth <= args.min_depth:
        raise parallel.Refused(f"--max_depth {args.max_depth:g}: not above --min_depth {args.min_depth:g}; raise it")


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate what the flags name and print the tables. Raises Refused for bad input."""
    check_args(args)
    output_dir = flags.check_folder(flags.output_dir(args.output_dir, args.pretrained_weights))
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    network = load_network(device=device, **flags.network_values(args))
    limits = Limits(args.depth_scale, args.min_depth, args.max_depth)
    geometry = Geometry(args.image_size, args.crop_size, args.window_size, args.stride, args.test_scales,
                        args.test_flip)
    recipe = Recipe(args.lr, args.n_blocks, args.steps, args.batch_size, args.warmup_steps, args.weight_decay,
                    scale=(1.0, 1.0), seed=args.seed, num_workers=args.num_workers)
    options = DepthOptions(args.eval_crop, args.batch_norm, args.bins, args.gradient_weight)
    report = evaluate_depth(network, args.data_path, args.val_data_path, limits, geometry, recipe, options,
                            args.baselines, args.val_share, args.save_pictures, output_dir)
    if parallel.is_main():
        show_depth(report)
        print(f"wrote {output_dir / 'eval_depth.json'}" + (" and depth.png" if args.save_pictures else ""))


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("eval_depth.py", evaluate, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
