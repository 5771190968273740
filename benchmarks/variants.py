"""Other ways of computing a step, one change each, against the project's own step: time, error, and counted traffic.

    python benchmarks/variants.py --device cuda --precision bf16 --batch 128 --compile
    python benchmarks/variants.py --count                        # operations and bytes alone, without computing

A variant enters the project when a measurement here shows that it pays. Its gradient is compared with float64 for a
small network, as in parity.py. Each variant takes turns with the first one alone, and is printed and recorded when it
is done. Operations and bytes of the forward and backward passes are counted in float32, one operation at a time. Not
counted are kernels of Triton and of torch.compile, what differs in half precision only, and the choice of torch's
attention kernel, which is one operation in any case.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import bench
import naive
import ours
import parity
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from traffic import Traffic
from train_step import PRECISIONS, crops_of, trainer_options

from utils import MultiCropWrapper
from vision_transformer import Attention, PatchEmbed, autocast_dtype


class Convolution(PatchEmbed):
    """The patch embedding as a convolution, after which class token and positions are added in passes of their own."""


class Product(PatchEmbed):
    """A matrix product under torch.compile too."""

    def is_matrix_product(self, x: Tensor) -> bool:
        return True


class HalfNorm(nn.LayerNorm):
    """Reads and writes the type of its input, which autocast would cast to float32; sums are in float32 in any case."""

    def forward(self, x: Tensor) -> Tensor:
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ToHalf(nn.Module):
    """Starts the residual stream in autocast's type; positions in float32 make it float32 otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(autocast_dtype(x))


class ShortAttention(Attention):
    """Attention of at most 64 tokens by the kernels of short_attention.py."""

    def forward(self, x: Tensor, return_attention: bool = True, class_token_only: bool = False, norm=None):
        from short_attention import LONGEST, attention

        B, N, D = x.shape
        if return_attention or class_token_only or N > LONGEST or norm is not None:
            return super().forward(x, return_attention, class_token_only, norm)
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        return self.proj_drop(self.proj(attention(qkv.contiguous(), self.scale))), None


class FlashAttention(Attention):
    """Attention by torch's flash kernels. The context is inside of the module, where torch.compile sees it: it is in
    the graph, which is then this class's own.
    """

    kernels = SDPBackend.FLASH_ATTENTION

    def forward(self, x: Tensor, return_attention: bool | None = None, class_token_only: bool = False, norm=None):
        with sdpa_kernel(self.kernels):
            return super().forward(x, return_attention, class_token_only, norm)


class EfficientAttention(FlashAttention):
    """Attention by torch's memory-efficient kernels."""

    kernels = SDPBackend.EFFICIENT_ATTENTION


def half_stream(network: MultiCropWrapper) -> None:
    network.backbone.pos_drop = ToHalf()
    for module in network.backbone.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = HalfNorm


def patches_by(kind: type[PatchEmbed], trainer: ours.Trainer) -> None:
    for network in (trainer.student, trainer.teacher):
        network.backbone.patch_embed.__class__ = kind


def attention_by(kind: type[Attention], trainer: ours.Trainer) -> None:
    for network in (trainer.student, trainer.teacher):
        for block in network.backbone.blocks:
            block.attn.__class__ = kind


def half_streams(trainer: ours.Trainer) -> None:
    for network in (trainer.student, trainer.teacher):
        half_stream(network)


def local_attention(trainer: ours.Trainer) -> None:
    for block in trainer.student.backbone.blocks:
        block.attn.__class__ = ShortAttention


def compiled_loss(trainer: ours.Trainer) -> None:
    trainer.dino_loss.compare = torch.compile(trainer.dino_loss.compare, dynamic=False)


def all_four(trainer: ours.Trainer) -> None:
    patches_by(Product, trainer)
    for change in (half_streams, local_attention, compiled_loss):
        change(trainer)


class Variant(NamedTuple):
    change: Callable[[ours.Trainer], None] | None = None
    gpu: bool = False  # needs one
    half: bool = False  # has no float32 kernel
    counted: bool = False


VARIANTS = {
    "ours": Variant(counted=True),
    "patches by convolution": Variant(partial(patches_by, Convolution), counted=True),
    "patches by a matrix product": Variant(partial(patches_by, Product), counted=True),
    "residual stream in half precision": Variant(half_streams),
    "local crops' attention in one kernel": Variant(local_attention, gpu=True),
    "loss compiled": Variant(compiled_loss, gpu=True),
    "all four": Variant(all_four, gpu=True),
    "attention by torch's flash kernels": Variant(partial(attention_by, FlashAttention), gpu=True, half=True),
    "attention by the memory-efficient kernels": Variant(partial(attention_by, EfficientAttention), gpu=True),
}


def trainer_of(name: str, **options) -> ours.Trainer:
    trainer = ours.Trainer(**options)
    if change := VARIANTS[name].change:
        change(trainer)
    return trainer


def counted(name: str, args) -> Traffic:
    """Operations and bytes of the forward and backward passes in float32; the update is the same for all."""
    options = trainer_options(args) | {"device": "meta", "dtype": None}
    with torch.device("meta"):
        trainer = trainer_of(name, **options, local=args.local)
    trainer.device = "cpu"  # of autocast, which is off
    groups = zip((2, args.local), args.sizes, strict=True)
    crops = [torch.empty(n * args.batch, 3, s, s, device="meta") for n, s in groups]
    with Traffic() as traffic:
        trainer.losses(crops)[0].backward()
    return traffic


def error(name: str, args) -> float:
    """Relative error of the gradient of a small network against float64."""
    weights, crops, expected = parity.reference()
    options = parity.SMALL | {"dtype": PRECISIONS[args.precision], "device": args.device}
    trainer = trainer_of(name, **options)
    for network in (trainer.student, trainer.teacher):
        network.load_state_dict(weights)
    actual = parity.gradient(trainer, [c.to(args.device) for c in crops])
    return ((actual - expected).norm() / expected.norm()).item()


def times(baseline: str, name: str, args) -> dict[str, dict]:
    """`bench.summary` of a variant in turns with the baseline: more of them would exceed torch.compile's limit of
    graphs for one function, beyond which it compiles nothing.
    """
    bench.start_anew(args.device)
    crops = crops_of(args.batch, args)[1]
    trainers = {n: trainer_of(n, **trainer_options(args), local=args.local, compiled=args.compile)
                for n in dict.fromkeys((baseline, name))}
    clock = bench.cpu_seconds if args.device == "cpu" else time.perf_counter
    turns = {n: partial(trainer.step, crops) for n, trainer in trainers.items()}
    return bench.summary(bench.in_turns(turns, args.rounds, args.device, clock), baseline)


def runnable(args) -> list[str]:
    """The variants that --only names, or all, without those that can't run here, which is said."""
    names = []
    for name in args.only or VARIANTS:
        variant = VARIANTS[name]
        reason = ("not counted" if args.count and not variant.counted else
                  "needs --device cuda" if variant.gpu and not args.device.startswith("cuda") else
                  "has no float32 kernel, needs --precision bf16" if variant.half and args.precision == "fp32" else "")
        if reason:
            print(f"{name}: left out, {reason}", flush=True)
        else:
            names.append(name)
    if not names:
        raise SystemExit("nothing to do: no variant of --only is left")
    return names


def get_args_parser():
    parser = bench.step_parser(__doc__, naive.SIZES, "vit_small", (224, 96))
    parser.add_argument("--batch", type=int, default=4, help="images per step")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32")
    parser.add_argument("--compile", nargs="?", const="default", default="", metavar="MODE",
                        help="compile all variants")
    parser.add_argument("--only", nargs="+", choices=tuple(VARIANTS), help="these variants; the first is the baseline")
    parser.add_argument("--count", action="store_true", help="count operations and bytes, time nothing")
    return parser


def main(args) -> int:
    if args.quick:
        args.arch, args.sizes, args.local, args.out_dim, args.batch, args.rounds = "vit_nano", (32, 16), 2, 64, 2, 1
    torch.manual_seed(0)
    bench.header(f"variants of the step, {args.arch}/{args.patch}, {args.precision}, {args.batch} images", args.device)
    names, results = runnable(args), {}
    for name in names:
        row = {}
        if VARIANTS[name].counted:
            traffic = counted(name, args)
            row = {"operations": traffic.operations, "bytes": traffic.bytes}
        if not args.count:
            row["error"] = error(name, args)
            print(f"{name}: the gradient is off by {row['error']:.2g}", flush=True)
        results[name] = row
    for name in (names[1:] or names) if not args.count else ():
        summary = times(names[0], name, args)
        bench.table(bench.TIMES, bench.time_rows(summary))
        bench.record(args, "variants", variants={n: results[n] | row for n, row in summary.items()})
    columns = ["variant", "operations, fp32", "GB, fp32"] + (["gradient off by"] if not args.count else [])
    print("\ncounted, and compared with float64")
    bench.table(columns, [[name, row.get("operations"), row["bytes"] / 1e9 if "bytes" in row else None,
                           *([row["error"]] if "error" in row else [])] for name, row in results.items()])
    if args.count:
        bench.record(args, "variants", variants=results)
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
