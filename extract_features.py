"""Embeddings of a folder of images in one file, with the images' names. A run that was stopped can be resumed.

    python extract_features.py --pretrained_weights output/run/checkpoint.pth --data_path photos --output photos.npy
    torchrun --nproc_per_node=8 extract_features.py --pretrained_weights output/run/checkpoint.pth ...

The suffix of --output chooses the format, .npy, .safetensors or .parquet; `protocols/embeddings.py` describes and
reads them.

Shapes: N images, D width, P patches: (N, D) for --tokens cls, (N, P, D) for patch, (N, 1 + P, D) for both, the class
token first. Patches are in reading order.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import flags
import parallel
from imagesets.checking import open_checked
from protocols import embeddings, extraction
from protocols.features import load_network


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Embeddings of a folder of images in one file.")
    flags.add_network_flags(parser)

    data = parser.add_argument_group("data")
    flags.add_reading_flags(data, skip_bad=True)
    add = data.add_argument
    add("--data_path", required=True, help="folder of images, .txt list, torchvision:NAME or shapes")
    add("--seed", type=flags.seed, default=0, help="seed of an untrained network")

    add = parser.add_argument_group("output").add_argument
    add("--output", required=True, help=f"file to write: {', '.join(embeddings.FORMATS)}")
    add("--tokens", choices=("cls", "patch", "both"), default="cls",
        help="class token, as search.py needs it; patch tokens, for dense tasks, of a Vision Transformer of this "
             "project or of timm; or both")
    add("--half", action="store_true", help="float16 instead of float32, half the size")
    add("--images_per_part", type=flags.positive_int, default=1024,
        help="images written at a time: a run that is stopped loses at most these. Lower it for patch tokens, which "
             "are large")
    flags.add_launch_flags(parser)
    return parser


def extract(args: argparse.Namespace) -> None:
    """Write --output.

    Raises:
        Refused: bad input.
    """
    output = Path(args.output).expanduser()
    embeddings.check_package("--output", output)
    embeddings.check_output(output)
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    network = load_network(device=device, crop_size=args.crop_size, resize_size=args.resize_size,
                           **flags.network_values(args))
    images = open_checked(args.data_path, None, network.reading)
    about = extraction.describe(network, args.data_path, args.tokens, args.seed, args.precision)
    extraction.extract(network, images, output, about, args.half, args.images_per_part, args.batch_size_per_gpu,
                       args.num_workers)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    return flags.exit_code("extract_features.py", extract, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
