"""From images to tokens, forward and backward: a product of unfolded patches against a convolution, `cat` and addition.

    OMP_NUM_THREADS=1 python benchmarks/patches.py                       # and with --precision bf16
    python benchmarks/patches.py --device cuda --precision bf16 --batch 128
"""

import sys
import time

import bench
import naive
import torch
from train_step import PRECISIONS, crops_of
from variants import Convolution

from vision_transformer import build_backbone


def get_args_parser():
    parser = bench.step_parser(__doc__, naive.SIZES, "vit_small", (224, 96))
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32")
    return parser


def main(args) -> int:
    if args.quick:
        args.arch, args.sizes, args.local, args.rounds = "vit_nano", (32, 16), 2, 1
    torch.manual_seed(0)
    bench.header(f"tokens of {args.batch} images, {args.arch}/{args.patch}, {args.precision}", args.device)
    crops, dtype = crops_of(args.batch, args)[1], PRECISIONS[args.precision]
    product, convolution = (build_backbone(args.arch, args.patch, img_size=args.sizes[0])[0].to(args.device)
                            for _ in range(2))
    convolution.patch_embed.__class__ = Convolution

    def run(backbone) -> None:
        with torch.autocast(args.device.split(":")[0], dtype, enabled=dtype is not None):
            tokens = [backbone.prepare_tokens(x) for x in crops]
        sum(x.float().mean() for x in tokens).backward()

    clock = bench.cpu_seconds if args.device == "cpu" else time.perf_counter
    times = bench.in_turns({"convolution, cat, addition": lambda: run(convolution), "product": lambda: run(product)},
                           args.rounds, args.device, clock)
    summary = bench.summary(times, "convolution, cat, addition")
    bench.table(bench.TIMES, bench.time_rows(summary))
    bench.record(args, "patches", variants=summary)
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
