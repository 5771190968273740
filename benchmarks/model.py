"""What a run should cost, on paper: arithmetic, memory traffic, memory, communication, decoding, storage.

    python benchmarks/model.py                                    # the tables of docs/performance.md
    python benchmarks/model.py --flops 788 --bandwidth 4.8 --worker_ms 4 --batch 128

Nothing is timed here: rates come from flags, which are measured (train_step.py prints the matmul rate, data_pipeline.py
the worker's milliseconds) or a data sheet's. Arithmetic counts matrix products, and a backward pass as two forward
ones. Bytes are those of eager execution under bf16 autocast as vision_transformer.py does it: residual stream and
layer norms in float32, everything else in bf16, attention weights never written.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import bench

ARCHS = {  # width, blocks, patch, pixels of global and local crops
    "ViT-S/16": (384, 12, 16, (224, 96)), "ViT-B/16": (768, 12, 16, (224, 96)), "ViT-L/16": (1024, 24, 16, (224, 96)),
    "ViT-g/14": (1536, 40, 14, (224, 98)),
}
SIZES = {"vit_nano": (192, 4), "vit_tiny": (192, 12), "vit_small": (384, 12), "vit_base": (768, 12)}
HIDDEN, BOTTLENECK = 2048, 256

# Bytes a token and unit of width that one block moves or keeps, forward; r read, w written.
FORWARD_TRAFFIC = {
    "bf16": sum((
        2 * (4 + 4 + 4 + 2),  # two layer norms: r4 w4, and the cast of the result: r4 w2
        2 + 6, 6 + 2, 2 + 2,  # qkv, attention, projection
        2 + 8, 8 + 8, 8 + 2,  # fc1, GELU, fc2
        2 * (2 + 2), 2 * (4 + 2 + 4),  # drop path and addition to the residual stream, twice each
    )),
    # torch.compile: the cast joins the norm; drop path, addition and residual stream are one pass
    "bf16, fused": sum((2 * (4 + 2), 2 + 6, 6 + 2, 2 + 2, 2 + 8, 8 + 8, 8 + 2, 2 * (4 + 2 + 4))),
    "fp32": 4 * sum((2 * (1 + 1), 1 + 3, 3 + 1, 1 + 1, 1 + 4, 4 + 4, 4 + 1, 2 * (1 + 1), 2 * (2 + 1))),
}
# Of the last block only what the class token needs: first norm, qkv, and k and v read.
LAST_TRAFFIC = {"bf16": 4 + 4 + 4 + 2 + 2 + 6 + 4, "bf16, fused": 4 + 2 + 2 + 6 + 4, "fp32": 4 * (1 + 1 + 1 + 3 + 2)}
KEPT = {  # for backward: two norms' inputs and results, q k v, attention's result, fc1's and GELU's
    "bf16": 2 * (4 + 2) + 6 + 2 + 8 + 8,
    "fp32": 4 * (2 * 2 + 3 + 1 + 4 + 4),
}
LAST_KEPT = {"bf16": 4 + 2 + 6, "fp32": 4 * (2 + 3)}
UPDATE_TRAFFIC = 4 * (4 + 3 + 2 + 1 + 3 + 2)  # bytes a parameter: AdamW r4 w3, clipping r2 w1, EMA r3 w2
# Values a parameter: read by the teacher's pass and the student's two; backward, once a resolution, reads it and
# writes its gradient, and adds the two up.
PASS_TRAFFIC = 1 + 2 + 2 * (1 + 1) + 3
# Bytes a value of the crops, as counted: jitter, grey, blur, solarize one by one in photometric.py, and in fused.py
COLOURS_TRAFFIC = {"eager": 460, "fused": 58}


@dataclass(frozen=True)
class Shape:
    """A network, its crops and its prototypes."""

    width: int
    blocks: int
    patch: int
    sizes: tuple[int, int]
    local: int
    k: int

    @classmethod
    def of(cls, arch: str, patch: int, sizes, local: int, k: int) -> Shape:
        return cls(*SIZES[arch], patch, tuple(sizes), local, k)

    def tokens(self, size: int) -> int:
        return 1 + (size // self.patch) ** 2

    def tokens_per_image(self) -> tuple[int, int]:
        """(teacher's, student's): two global crops, and all crops."""
        teacher = 2 * self.tokens(self.sizes[0])
        return teacher, teacher + self.local * self.tokens(self.sizes[1])

    def backbone_flop(self, size: int, all_tokens: bool = True) -> int:
        """Forward pass of one crop; or without what the last block need not compute for the class token."""
        n, d = self.tokens(size), self.width
        block, last = 24 * n * d**2 + 4 * n**2 * d, 6 * n * d**2 + 18 * d**2 + 4 * n * d
        return 2 * (n - 1) * 3 * self.patch**2 * d + (self.blocks - 1) * block + (block if all_tokens else last)

    def head_weights(self) -> int:
        return self.width * HIDDEN + HIDDEN**2 + HIDDEN * BOTTLENECK + BOTTLENECK * self.k

    def flop_per_image(self, all_tokens: bool = True) -> int:
        """Teacher: a forward pass of two global crops; student: three times a forward pass of all crops.

        The method's arithmetic, by which implementations are compared; with all_tokens=False, what ours computes.
        """
        glob, loc = (self.backbone_flop(size, all_tokens) + 2 * self.head_weights() for size in self.sizes)
        return 2 * glob + 3 * (2 * glob + self.local * loc)

    def parameters(self) -> int:
        """Of backbone and head, weights and biases."""
        d, n = self.width, self.tokens(self.sizes[0])
        block = 12 * d**2 + 13 * d
        backbone = 3 * self.patch**2 * d + d + d + n * d + self.blocks * block + 2 * d
        return backbone + self.head_weights() + 2 * HIDDEN + BOTTLENECK

    def kept_bytes(self, precision: str = "bf16") -> int:
        """Activations an image that the student's backbone keeps for backward."""
        return self.tokens_per_image()[1] * self.width * ((self.blocks - 1) * KEPT[precision] + LAST_KEPT[precision])

    def logit_bytes(self, precision: str = "bf16") -> int:
        """An image's logits and their gradient, and the teacher's logits and probabilities in float32."""
        half = 2 if precision == "bf16" else 4
        return self.k * ((2 + self.local) * 2 * half + 2 * (half + 4))

    def fixed_bytes(self) -> int:
        """Weights of student and teacher, gradients and AdamW's two moments in float32; both nets' copies in bf16."""
        return self.parameters() * (5 * 4 + 2 * 2)

    def traffic(self, precision: str = "bf16") -> tuple[float, float]:
        """Bytes moved (an image, a step): activations and logits; weights, their casts, normalization and update."""
        teacher, student = self.tokens_per_image()
        half = 4 if precision == "fp32" else 2
        blocks = (self.blocks - 1) * FORWARD_TRAFFIC[precision] + LAST_TRAFFIC[precision]
        tokens = (teacher + 3 * student) * blocks * self.width
        logits = self.k * ((2 + self.local) * 5 * half + 2 * (2 * half + 4 * 4))
        prototypes = 4 * BOTTLENECK * self.k * (2 * 2 + 4)  # both networks' forward passes, and a backward one
        return tokens + logits, self.parameters() * (UPDATE_TRAFFIC + PASS_TRAFFIC * half) + prototypes

    def colour_bytes(self, kind: str = "eager") -> int:
        """Moved for an image's colours and blur on the device."""
        return COLOURS_TRAFFIC[kind] * 3 * (2 * self.sizes[0] ** 2 + self.local * self.sizes[1] ** 2)


@dataclass(frozen=True)
class Hardware:
    flops: float  # FLOP/s of a large matrix product, measured
    bandwidth: float  # bytes/s of device memory
    inside: float = 450e9  # bytes/s in each direction between the GPUs of a host
    between: float = 50e9  # and from a GPU to other hosts
    per_host: int = 8
    worker_ms: float = 4.0  # of one core an image
    image_bytes: float = 110e3


def step_seconds(shape: Shape, batch: int, gpus: int, at: Hardware, precision: str = "bf16") -> dict[str, float]:
    """Seconds of a step on tensors that are there, by cause; the sum supposes that none of them overlap.

    Gradients travel while backward goes on: only what is longer than backward, two thirds of the student's time,
    is waited for.
    """
    per_image, per_step = shape.traffic(precision)
    arithmetic = batch * shape.flop_per_image(all_tokens=False) / at.flops
    memory = (batch * per_image + per_step) / at.bandwidth
    link = at.inside if gpus <= at.per_host else at.between
    sent = 2 * (gpus - 1) / gpus * 4 * shape.parameters()  # a ring all-reduce of float32 gradients
    hops = 5e-6 * math.ceil(math.log2(gpus)) if gpus > 1 else 0.0
    travel = sent / link + hops
    waited = max(0.0, travel - 0.6 * (arithmetic + memory))
    center = 2 * (gpus - 1) / gpus * 4 * shape.k / link + hops
    return {"arithmetic": arithmetic, "memory": memory, "communication": waited + center}


def predict(shape: Shape, batch: int, gpus: int, at: Hardware, precision: str = "bf16") -> dict[str, float]:
    seconds = step_seconds(shape, batch, gpus, at, precision)
    seconds["colours"] = batch * shape.colour_bytes() / at.bandwidth
    rate = gpus * batch / sum(seconds.values())
    return {"images_per_s": rate, "arithmetic_only": gpus * at.flops / shape.flop_per_image(False),
            "waiting": seconds["communication"] / sum(seconds.values()),
            "cores_per_gpu": rate / gpus * at.worker_ms / 1000, "storage_gb_s": rate * at.image_bytes / 1e9}


def largest_batch(shape: Shape, memory: float, precision: str = "bf16") -> int:
    """Images a GPU that fit into `memory` bytes, a tenth of which is left to the allocator and to temporaries."""
    free = 0.9 * memory - shape.fixed_bytes()
    return max(0, int(free / (shape.kept_bytes(precision) + shape.logit_bytes(precision))))


def tables(args: argparse.Namespace) -> list[dict]:
    at = Hardware(args.flops * 1e12, args.bandwidth * 1e12, worker_ms=args.worker_ms, image_bytes=args.image_kb * 1e3)
    shapes = {name: Shape(*spec, 8, args.out_dim) for name, spec in ARCHS.items()}
    print("\nAn image: 2 global and 8 local crops")
    bench.table(["network", "M parameters", "GFLOP", "GB moved", "MB kept", "MB logits", "GB weights, optimizer",
                 "batch in 80 GB", "in 141 GB"],
                [[n, s.parameters() / 1e6, s.flop_per_image() / 1e9, s.traffic()[0] / 1e9, s.kept_bytes() / 1e6,
                  s.logit_bytes() / 1e6, s.fixed_bytes() / 1e9, largest_batch(s, 80e9), largest_batch(s, 141e9)]
                 for n, s in shapes.items()])
    small = shapes["ViT-S/16"]
    print(f"\nViT-S/16 on one GPU, {args.batch} images: what stands between arithmetic and the step")
    rows = []
    for step, precision, kind in (("eager", "bf16", "eager"), ("fused by torch.compile", "bf16, fused", "fused")):
        part = step_seconds(small, args.batch, 1, at, precision)
        colours = args.batch * small.colour_bytes(kind) / at.bandwidth
        rows.append([step, 1000 * part["arithmetic"], 1000 * part["memory"], 1000 * colours,
                     args.batch / (sum(part.values()) + colours),
                     args.batch / max(part["arithmetic"], part["memory"] + colours)])
    bench.table(["step", "ms of arithmetic", "of memory traffic", "of colours", "images/s, one after the other",
                 "overlapped"], rows)
    predictions = []
    for name, shape in shapes.items():
        batch = min(args.batch, largest_batch(shape, 141e9))
        print(f"\n{name}, {batch} images a GPU")
        rows = [{"network": name, "gpus": g, "batch": batch, **predict(shape, batch, g, at)} for g in args.gpus]
        bench.table(["GPUs", "images/s", "arithmetic alone", "waits for others", "cores a GPU", "storage GB/s",
                     "h for 100 epochs of ImageNet-1k", "h for 1e9 images"],
                    [[r["gpus"], r["images_per_s"], r["arithmetic_only"], f"{r['waiting']:.1%}", r["cores_per_gpu"],
                      r["storage_gb_s"], 128.1167e6 / r["images_per_s"] / 3600, 1e9 / r["images_per_s"] / 3600]
                     for r in rows])
        predictions += rows
    return predictions


def get_args_parser() -> argparse.ArgumentParser:
    parser = bench.parser(__doc__)
    parser.add_argument("--flops", type=float, default=788, help="TFLOP/s of a large bf16 product on the device")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s of its memory")
    parser.add_argument("--worker_ms", type=float, default=4.0, help="of a core, to decode and cut an image")
    parser.add_argument("--image_kb", type=float, default=110, help="of a stored image; ImageNet's mean is 110")
    parser.add_argument("--batch", type=int, default=128, help="images a GPU, or as many as fit")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--out_dim", type=int, default=65536, help="K")
    return parser


def main(args: argparse.Namespace) -> int:
    print(f"{args.flops:g} TFLOP/s, {args.bandwidth:g} TB/s, a worker's {args.worker_ms:g} ms, "
          f"{args.image_kb:g} kB an image, K {args.out_dim}")
    bench.record(args, "model", predictions=tables(args))
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
