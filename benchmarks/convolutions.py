"""A ResNet, forward and backward, with crops in channels-first or channels-last memory format.

    python benchmarks/convolutions.py                        # and with --precision bf16
    python benchmarks/convolutions.py --device cuda --precision bf16 --batch 256
"""

import sys
import time

import bench
import torch
from train_step import PRECISIONS

from vision_transformer import build_backbone


def main(args) -> int:
    if args.quick:
        args.arch, args.sizes, args.batch = "resnet18", (32, 16), 2
    torch.manual_seed(0)
    bench.header(f"{args.arch}, {args.precision}", args.device)
    network = build_backbone(args.arch, 16, 0.0, img_size=args.sizes[0])[0].to(args.device)
    dtype, summaries = PRECISIONS[args.precision], {}

    def train(crops: torch.Tensor) -> None:
        with torch.autocast(args.device.split(":")[0], dtype, enabled=dtype is not None):
            features = network(crops)
        features.float().square().mean().backward()

    for size in args.sizes:
        images = max(2, args.batch * args.sizes[0] ** 2 // size**2)  # the same number of pixels at each size
        crops = torch.randn(images, 3, size, size, device=args.device)
        times = bench.in_turns({
            "channels first": lambda x=crops: train(x),
            "channels last": lambda x=crops: train(x.contiguous(memory_format=torch.channels_last)),
        }, args.rounds, args.device, bench.cpu_seconds if args.device == "cpu" else time.perf_counter)
        summaries[size] = bench.summary(times, "channels first")
        print(f"\n{images} crops of {size} pixels")
        bench.table(bench.TIMES, bench.time_rows(summaries[size]))
    bench.record(args, "convolutions", variants=summaries)
    return 0


def get_args_parser():
    parser = bench.parser(__doc__)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--sizes", type=int, nargs="+", default=(224, 96), help="sides of the crops in pixels")
    parser.add_argument("--batch", type=int, default=4, help="number of crops of the first size")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
