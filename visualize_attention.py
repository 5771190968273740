"""Draw the class token's attention of a Vision Transformer on an image, a set of images or a video
(DINO, arXiv 2104.14294, figures 1 and 4).

    python visualize_attention.py --pretrained_weights output/run/checkpoint.pth --image_path photo.jpg
    python visualize_attention.py --pretrained_weights output/run/checkpoint.pth --images folder --pca
    python visualize_attention.py --pretrained_weights output/run/checkpoint.pth --video clip.mp4 --threshold 0.6

Of a network of timm, --pca and --point draw its patch tokens; its attention isn't read.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import flags
import parallel
from imagesets import checking
from parallel import Refused
from protocols import attention, attention_video, dense, features
from vision_transformer import VITS

FIGURES = r"(img|overlay|pca|similarity|attn-(mean|head\d+)|mask_th.+_head\d+)\.png"  # of one image


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Draw what a Vision Transformer attends to, on an image, a set of images or a video.")
    flags.add_weights_flags(parser, precision=False)
    data = parser.add_argument_group(
        "data", "At most one of --image_path, --images and --video; without them, a drawn image.")
    flags.add_reading_flags(data, skip_bad=True)
    add = data.add_argument
    add("--image_path", help="one image")
    add("--images", help="folder or list of images, or shapes:COUNT; draws a sheet with a row per image")
    add("--max_images", type=flags.positive_int, default=16,
        help="rows of the sheet; of a larger set, evenly spaced images are drawn")
    add("--video", "--input_path",
        help="video file, or folder of frames in the order of their numbers; flags and files of the published "
             "video_generation.py, and attention.mp4 with the frames beside their maps")
    add("--video_only", action="store_true",
        help="only make video.mp4 of the images in the folder --video, such as attention/; needs no weights")
    add("--video_format", choices=sorted(attention_video.CODECS, reverse=True), default="mp4",
        help="of the videos that are written; avi for players that lack H.264")
    add("--fps", type=flags.positive,
        help="frames per second of the videos that are written; default: the source's, "
             f"{attention_video.DEFAULT_FPS:g} for a folder of frames")
    add("--image_size", "--resize", type=flags.positive_int, nargs="+", default=[], metavar="PIXELS",
        help="one number: shorter side, the aspect ratio is kept; two: exact height and width; raise it for finer "
             "maps, lower it to save memory. Default: 480 480 for one image, whatever its proportions, and a video's "
             "own size, both as published; for --images 480 on the shorter side for a network trained on crops of 224 "
             "pixels, in proportion for others")
    add = parser.add_argument_group("figures").add_argument
    add("--layer", type=int, default=-1,
        help="block whose attention is drawn, from 0; negative ones count from the last")
    add("--threshold", type=flags.number(float, 0, 1, above=True),
        help="also draw masks of the patches that hold this share of the attention (paper: 0.6)")
    add("--pca", action="store_true",
        help="also draw the first three principal components of the patch tokens as colours; networks of timm need "
             "this or --point, and have no other figures")
    add("--point", type=flags.non_negative, nargs=2, metavar=("X", "Y"),
        help="also draw every patch's similarity to the one at this pixel of the image (of a video's first frame, and "
             "followed from there)")
    parser.add_argument_group("output").add_argument(
        "--output_dir", "--output_path", default=".", help="folder for the figures")
    parser.add_argument_group("hardware").add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def check_args(args: argparse.Namespace) -> None:
    given = [name for name in ("image_path", "images", "video") if getattr(args, name) is not None]
    if len(given) > 1:
        raise Refused(f"--{given[0]} and --{given[1]}: give one of them")
    if args.images is not None and args.point:
        raise Refused("--point with --images: a point belongs to one image; use --image_path or --video")
    if args.video_only and args.video is None:
        raise Refused("--video_only: makes a video of a folder of images; give the folder to --video")
    folder = flags.check_folder(args.output_dir)
    for flag, names in (("image_path", FIGURES), ("video", rf"(video|attention)\.{args.video_format}")):
        file = Path(getattr(args, flag) or "")
        if file.is_file() and re.fullmatch(names, file.name) and folder.is_dir() and folder.samefile(file.parent):
            raise Refused(f"--{flag} {file}: a figure of this name would replace it; give another --output_dir")


def check_without_attention(args: argparse.Namespace, arch: str) -> None:
    attention_asked = args.video is not None or args.threshold is not None or args.layer != -1
    if attention_asked or not (args.pca or args.point):
        raise Refused(f"--arch {arch}: of networks of timm, patch tokens are read, not attention; give --pca or "
                      f"--point, without --video, --threshold and --layer, or use one of {', '.join(VITS)}")


def visualize(args: argparse.Namespace) -> None:
    """Draw what the flags ask for. Raises Refused for bad input."""
    check_args(args)
    if args.video_only:
        attention_video.make_video(args.video, args.output_dir, args.fps, args.video_format)
        return
    # Without weights, which tell theirs: smaller patches give finer maps.
    patch_size = args.patch_size or (None if args.pretrained_weights else 8)
    network = features.load_network(
        device=parallel.pick_device(args.device), crop_size=min(args.image_size, default=0), size_flag="--image_size",
        **flags.network_values(args) | {"patch_size": patch_size})
    dense.check_look(network, args.image_size, args.layer)
    if not dense.has_attention(network):
        check_without_attention(args, network.about["arch"])
    settings = {"image_size": args.image_size, "output_dir": args.output_dir, "layer": args.layer,
                "threshold": args.threshold, "pca": args.pca}
    if args.video is not None:
        attention_video.draw_video(
            network, args.video, fps=args.fps, video_format=args.video_format, point=args.point, **settings)
    elif args.images is not None:
        images = checking.open_checked(args.images, None, network.reading, "--images")
        attention.draw_sheets(
            network, images, max_images=args.max_images, flag=f"--images {args.images}", **settings)
    else:
        image = attention.load_image(args.image_path, network.reading)
        attention.draw_image(network, image, point=args.point, **settings)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("visualize_attention.py", visualize, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
