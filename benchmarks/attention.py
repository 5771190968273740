"""Attention, forward and backward: explicit matrix products against PyTorch's fused kernel.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cuda
"""

import sys

import bench
import torch
import torch.nn.functional as F

SHAPES = ((128, 10), (64, 37), (64, 65), (32, 197))  # (crops, tokens); three heads of width 64


def plain(q, k, v):
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def main(args) -> int:
    bench.header("attention", args.device)
    rows, results = [], {}
    for B, N in ((2, 10),) if args.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            qkv = torch.randn(3, B, 3, N, 64, device=args.device).to(dtype).requires_grad_()
            functions = {"plain": plain, "fused": F.scaled_dot_product_attention}
            times = bench.in_turns(
                {n: (lambda f=f, x=qkv: torch.autograd.grad(f(*x.unbind(0)).float().sum(), x))
                 for n, f in functions.items()}, args.rounds, args.device)
            summary = bench.summary(times, "fused")
            results[f"{B} x {N} {dtype}"] = summary
            row = summary["plain"]
            rows.append([f"{B} x {N}", str(dtype).removeprefix("torch."), row["ms"], summary["fused"]["ms"],
                         f"{row['ratio']:.2f} ({row['ratio_low']:.2f} .. {row['ratio_high']:.2f})"])
    bench.table(["crops x tokens", "type", "plain, median ms", "fused", "plain is times as fast (range)"], rows)
    bench.record(args, "attention", shapes=results)
    return 0


def get_args_parser():
    return bench.parser(__doc__, rounds=7)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
