"""Video object segmentation by propagating labels from frame to frame with frozen patch features: no training, no
labels but the first frame's (DINO, arXiv 2104.14294, section 4.2.1; the protocol of Jabri et al. 2020).

    python eval_video_segmentation.py --pretrained_weights output/run/checkpoint.pth --data_path /path/to/DAVIS
    python eval_video_segmentation.py --arch pixels --patch_size 8 --data_path /path/to/DAVIS

Writes a palette PNG per frame, <output_dir>/<sequence>/<frame>.png, and measures region similarity J and contour
accuracy F against the annotations, without the first and the last frame as in DAVIS 2017. The table also has the
figures of the first mask copied to all frames; `--arch pixels` compares the colours of patches.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import flags
import parallel
from protocols import features
from protocols.video_segmentation import evaluate_video_segmentation, show_video_segmentation


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Video object segmentation with frozen patch features, on videos in the folders of DAVIS.")
    flags.add_dense_flags(parser)
    data = parser.add_argument_group("data")
    flags.add_reading_flags(data)
    add = data.add_argument
    add("--data_path", required=True, help="folder of DAVIS: JPEGImages/, Annotations/ and perhaps ImageSets/")
    add("--resolution", default="", help="folder in JPEGImages/ and Annotations/; empty: 480p, or the only one")
    add("--image_set", default="", help="list in ImageSets/; empty: 2017/val, 2016/val, or every sequence")
    add("--sequences", nargs="+", default=[], metavar="NAME", help="only these of the list, for a trial")
    add("--merge_objects", action="store_true", help="one object per video, as in DAVIS 2016: all objects are merged")
    flags.add_arithmetic_flag(add, "keeps the aspect ratio of frames to half a patch, resizes them with antialiasing, "
                                   "and labels them at their own size")
    add("--bs", type=flags.positive_int, default=6, help="frames per batch; lower it if memory runs out")
    add = parser.add_argument_group("propagation", "The defaults are the published ones.").add_argument
    add("--n_last_frames", type=flags.count, default=7,
        help="frames before the current one that labels come from, beside the first")
    add("--size_mask_neighborhood", type=flags.count, default=12,
        help="labels come from patches within this many rows and columns; 0: from all; raise it for smaller patches or "
             "faster motion")
    add("--topk", type=flags.positive_int, default=5, help="most similar patches, over all these frames, that count")
    add("--seed", type=flags.seed, default=0, help="of an untrained network")
    parser.add_argument_group("output").add_argument(
        "--output_dir", default="output/davis", help="for <sequence>/<frame>.png and eval_video_segmentation.json")
    flags.add_launch_flags(parser, workers=False)
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate what the flags name and print the tables. Raises Refused for bad input."""
    flags.check_folder(args.output_dir)
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    network = features.load_network(device=device, crop_size=args.image_size, size_flag="--image_size",
                                    **flags.network_values(args))
    report = evaluate_video_segmentation(
        network, args.data_path, args.resolution, args.image_set, args.sequences, args.merge_objects, args.image_size,
        args.patch_size or 16, args.n_last_frames, args.size_mask_neighborhood, args.topk, args.bs, args.output_dir,
        args.arithmetic)
    if parallel.is_main():
        show_video_segmentation(report)
        print(f"wrote {Path(args.output_dir, 'eval_video_segmentation.json')} and <sequence>/<frame>.png beside it")


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("eval_video_segmentation.py", evaluate, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
