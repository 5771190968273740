"""Other ways of computing a step, one change each, against the project's own step: time, error, and counted traffic.

    python benchmarks/variants.py --device cuda --precision bf16 --batch 128 --compile
    python benchmarks/variants.py --count                        # operations and bytes alone, without computing

A variant enters the project when a measurement here shows that it pays. Its gradient is compared with float64 for a
small network, as in parity.py. Operations and bytes of the forward and backward passes are counted in float32, one
operation at a time, where no GPU is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

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


def half_stream(network: MultiCropWrapper) -> None:
    network.backbone.pos_drop = ToHalf()
    for module in network.backbone.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = HalfNorm


def patches_by(kind: type[PatchEmbed], trainer: ours.Trainer) -> None:
    for network in (trainer.student, trainer.teacher):
        network.backbone.patch_embed.__class__ = kind


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


# What changes the trainer, the kernels that attention is limited to, and whether it needs a GPU.
VARIANTS: dict[str, tuple[Callable[[ours.Trainer], None] | None, SDPBackend | None, bool]] = {
    "ours": (None, None, False),
    "patches by convolution": (partial(patches_by, Convolution), None, False),
    "patches by a matrix product": (partial(patches_by, Product), None, False),
    "residual stream in half precision": (half_streams, None, False),
    "local crops' attention in one kernel": (local_attention, None, True),
    "loss compiled": (compiled_loss, None, True),
    "all four": (all_four, None, True),
    "attention by torch's flash kernels": (None, SDPBackend.FLASH_ATTENTION, True),
    "attention by the memory-efficient kernels": (None, SDPBackend.EFFICIENT_ATTENTION, True),
}


def trainer_of(name: str, **options) -> ours.Trainer:
    trainer = ours.Trainer(**options)
    if change := VARIANTS[name][0]:
        change(trainer)
    return trainer


def attention_of(name: str):
    """A context in which attention runs as the variant wants it."""
    backend = VARIANTS[name][1]
    return sdpa_kernel(backend) if backend is not None else nullcontext()


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
    with attention_of(name):
        actual = parity.gradient(trainer, [c.to(args.device) for c in crops])
    return ((actual - expected).norm() / expected.norm()).item()


def times(names: list[str], args) -> dict[str, dict]:
    bench.start_anew(args.device)
    crops = crops_of(args.batch, args)[1]
    trainers = {name: trainer_of(name, **trainer_options(args), local=args.local, compiled=args.compile)
                for name in names}

    def step(name: str) -> None:
        with attention_of(name):
            trainers[name].step(crops)

    clock = bench.cpu_seconds if args.device == "cpu" else None
    turns = {name: lambda name=name: step(name) for name in names}
    return bench.summary(bench.in_turns(turns, args.rounds, args.device, *([clock] if clock else [])), names[0])


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
    names = [name for name in args.only or VARIANTS if not VARIANTS[name][2] or args.device.startswith("cuda")]
    counts = {name: counted(name, args) for name in names if not VARIANTS[name][2]}  # kernels can't be counted
    results = {name: {"operations": t.operations, "bytes": t.bytes} if (t := counts.get(name)) else {}
               for name in names}
    rows = {name: [row.get("operations"), row["bytes"] / 1e9 if row else None] for name, row in results.items()}
    columns = ["variant", "operations, fp32", "GB, fp32"]
    if not args.count:
        columns += ["gradient off by", *bench.TIMES[1:]]
        summary = times(names, args)
        for cells, (name, row) in zip(bench.time_rows(summary), summary.items(), strict=True):
            results[name] |= row | {"error": error(name, args)}
            rows[name] += [results[name]["error"], *cells[1:]]
    bench.table(columns, [[name, *row] for name, row in rows.items()])
    bench.record(args, "variants", variants=results)
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
