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
from protocols.features import load_network
from protocols.semantic import Geometry, evaluate_semantic, show_semantic
from protocols.semantic_training import Recipe


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Linear semantic segmentation on frozen patch tokens.")
    flags.add_weights_flags(parser)
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data_path", default="shapes:1200x64",
        help="folder with train/ and val/, each with images/ and masks/; VOC2012, ADEChallengeData2016 or Cityscapes "
             "as they come; or drawn images: shapes:COUNTxPIXELS")
    add("--val_data_path", default="",
        help="test images outside of --data_path, all of whose training images are then used for training")
    flags.add_reading_flags(group)
    add("--foreground", action="store_true",
        help="two classes, background (0) and object (all others), instead of those of the masks")
    add("--image_size", type=flags.count, default=0, metavar="PIXELS",
        help="shorter side of the resized images; 0: as --crop_size; raise it if objects are small")
    add("--crop_size", type=flags.count, default=0, metavar="PIXELS",
        help="side of the training crops; 0: 512, or the shorter side of the images where that is less")
    add("--scale", type=flags.positive, nargs=2, default=[0.5, 2.0], metavar=("LOW", "HIGH"),
        help="random scale of the training images, times --image_size")
    add("--val_share", type=flags.number(float, 0, 0.9), default=0.1,
        help="share of the training images held out to choose a setting by; raise it for small data")
    add("--seed", type=flags.seed, default=0,
        help="of crops, layers, what is held out, and untrained weights; change it to see how much the table varies")

    add = parser.add_argument_group("linear layer").add_argument
    add("--n_last_blocks", type=flags.positive_int, nargs="+", default=[1],
        help="number of last blocks whose tokens are concatenated, 1 or 4; several make a sweep")
    add("--lr", type=flags.positive, nargs="+", default=[1e-2],
        help="peak learning rate of AdamW; 0.001 for tens of thousands of steps; several make a sweep")
    add("--steps", type=flags.positive_int, default=400,
        help="training steps; raise it for large data: the published evaluations take 40,000")
    add("--batch_size", type=flags.positive_int, default=16,
        help="training images per step, of all processes together; lower it if memory runs out")
    add("--warmup_steps", type=flags.count, default=0,
        help="steps of linear learning-rate warm-up, before half a cosine to 0")
    add("--weight_decay", type=flags.non_negative, default=1e-3, help="weight decay of AdamW")
    add("--dropout", type=flags.number(float, 0, 0.99), default=0.0,
        help="share of the channels of the tokens that are zeroed in training")

    add = parser.add_argument_group("test").add_argument
    add("--window_size", type=flags.count, default=0, metavar="PIXELS",
        help="side of the windows that a test image is seen through; 0: as --crop_size")
    add("--stride", type=flags.count, default=0, metavar="PIXELS",
        help="distance between windows; 0: two thirds of the window; lower it for smoother results, and more time")
    add("--test_scales", type=flags.positive, nargs="+", default=[1.0],
        help="scales of the test images; over several, probabilities are averaged")
    add("--test_flip", action="store_true", help="also test each image mirrored, and average")
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
    network = load_network(args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key, device,
                           precision=args.precision, seed=args.seed, mean=args.mean, std=args.std,
                           in_chans=args.in_chans, max_pixels=args.max_pixels, value_range=args.value_range)
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
