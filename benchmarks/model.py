"""A cost model of training: arithmetic, memory traffic, memory, communication, decoding, storage.

    python benchmarks/model.py                                    # the tables of docs/performance.md
    python benchmarks/model.py --flops 788 --bandwidth 4.8 --worker_ms 4 --batch 128

Nothing is timed here. The rates are flags: take them from measurements (train_step.py prints the matmul rate,
data_pipeline.py the milliseconds per image of a worker) or from a data sheet. Arithmetic counts matrix products only; a
backward pass counts as two forward passes. Bytes are those of vision_transformer.py in eager mode under bf16 autocast:
residual stream and layer norms in float32, everything else in bf16, attention weights never written to memory.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import bench
import kinds
import naive

ARCHS = {  # width, blocks, patch size, sides of global and local crops in pixels
    "ViT-S/16": (384, 12, 16, (224, 96)), "ViT-B/16": (768, 12, 16, (224, 96)), "ViT-L/16": (1024, 24, 16, (224, 96)),
    "ViT-g/14": (1536, 40, 14, (224, 98)),
}
HIDDEN, BOTTLENECK = 2048, 256

# Bytes per token and unit of width that one block moves in the forward pass, by kind; torch.compile fuses the cast of a
# norm's result with the norm, and drop path with the addition to the residual stream.
BLOCK_TRAFFIC = {
    "bf16": {
        kinds.NORMS: 2 * (4 + 4), kinds.COPIES: 2 * (4 + 2),  # the norms' results in float32, then cast
        kinds.MATMUL: (2 + 6) + (2 + 2) + (2 + 8) + (8 + 2),  # qkv, projection, fc1, fc2: read and write
        kinds.ATTENTION: 6 + 2, kinds.ACTIVATION: 8 + 8,
        kinds.RESIDUAL: 2 * (2 + 2) + 2 * (4 + 2 + 4),  # drop path, and the addition to the residual stream
    },
    "bf16, fused": {
        kinds.NORMS: 2 * (4 + 2), kinds.MATMUL: (2 + 6) + (2 + 2) + (2 + 8) + (8 + 2), kinds.ATTENTION: 6 + 2,
        kinds.ACTIVATION: 8 + 8, kinds.RESIDUAL: 2 * (4 + 2 + 4),
    },
    # A variant (variants.py): the residual stream in bf16, and norms that read and write bf16.
    "bf16 stream": {
        kinds.NORMS: 2 * (2 + 2), kinds.MATMUL: (2 + 6) + (2 + 2) + (2 + 8) + (8 + 2), kinds.ATTENTION: 6 + 2,
        kinds.ACTIVATION: 8 + 8, kinds.RESIDUAL: 2 * (2 + 2) + 2 * (2 + 2 + 2),
    },
    "bf16 stream, fused": {
        kinds.NORMS: 2 * (2 + 2), kinds.MATMUL: (2 + 6) + (2 + 2) + (2 + 8) + (8 + 2), kinds.ATTENTION: 6 + 2,
        kinds.ACTIVATION: 8 + 8, kinds.RESIDUAL: 2 * (2 + 2 + 2),
    },
    "fp32": {
        kinds.NORMS: 4 * 2 * (1 + 1), kinds.MATMUL: 4 * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1)),
        kinds.ATTENTION: 4 * (3 + 1), kinds.ACTIVATION: 4 * (4 + 4), kinds.RESIDUAL: 4 * (2 * (1 + 1) + 2 * (2 + 1)),
    },
}
# The last block computes only what the class token needs: first norm, qkv, and reading k and v.
LAST_TRAFFIC = {
    "bf16": {kinds.NORMS: 4 + 4, kinds.COPIES: 4 + 2, kinds.MATMUL: 2 + 6, kinds.ATTENTION: 4},
    "bf16, fused": {kinds.NORMS: 4 + 2, kinds.MATMUL: 2 + 6, kinds.ATTENTION: 4},
    "bf16 stream": {kinds.NORMS: 2 + 2, kinds.MATMUL: 2 + 6, kinds.ATTENTION: 4},
    "bf16 stream, fused": {kinds.NORMS: 2 + 2, kinds.MATMUL: 2 + 6, kinds.ATTENTION: 4},
    "fp32": {kinds.NORMS: 4 * (1 + 1), kinds.MATMUL: 4 * (1 + 3), kinds.ATTENTION: 4 * 2},
}
# Bytes per token and unit of width that one block saves for backward: inputs and results of two norms, q k v, results
# of attention, fc1 and GELU.
KEPT = {
    "bf16": 2 * (4 + 2) + 6 + 2 + 8 + 8,
    "fp32": 4 * (2 * 2 + 3 + 1 + 4 + 4),
}
LAST_KEPT = {"bf16": 4 + 2 + 6, "fp32": 4 * (2 + 3)}
KEPT_BY_LAYERS = {"bf16": 2 * 4 + 6 + 2 + 8, "fp32": 4 * (2 + 3 + 1 + 4)}  # without the results of norms and GELU
UPDATE_TRAFFIC = 4 * (4 + 3 + 2 + 1 + 3 + 2)  # bytes per parameter: AdamW r4 w3, clipping r2 w1, EMA r3 w2
# Accesses per parameter: one read by the teacher's pass and two by the student's (one per resolution); backward reads
# it and writes its gradient once per resolution, then adds the two gradients.
PASS_TRAFFIC = 1 + 2 + 2 * (1 + 1) + 3
# Counted bytes per value of the crops for jitter, grey, blur and solarize: photometric.py (eager), fused.py (fused)
COLOURS_TRAFFIC = {"eager": 460, "fused": 58}


@dataclass(frozen=True)
class Shape:
    """Sizes of the network, the crops and the head."""

    width: int
    blocks: int
    patch: int
    sizes: tuple[int, int]
    local: int
    k: int

    @classmethod
    def of(cls, arch: str, patch: int, sizes, local: int, k: int) -> Shape:
        return cls(*naive.SIZES[arch][:2], patch, tuple(sizes), local, k)

    def tokens(self, size: int) -> int:
        return 1 + (size // self.patch) ** 2

    def tokens_per_image(self) -> tuple[int, int]:
        """(tokens of the teacher: two global crops, tokens of the student: all crops)."""
        teacher = 2 * self.tokens(self.sizes[0])
        return teacher, teacher + self.local * self.tokens(self.sizes[1])

    def backbone_flop(self, size: int, all_tokens: bool = True, dropped: float = 0.0) -> int:
        """FLOPs of a forward pass of one crop; all_tokens=False: the last block computes only the class token.

        dropped: share of the patches that are embedded and then dropped.
        """
        patches, d = self.tokens(size) - 1, self.width
        n = 1 + patches - int(patches * dropped)
        block, last = 24 * n * d**2 + 4 * n**2 * d, 6 * n * d**2 + 18 * d**2 + 4 * n * d
        return 2 * patches * 3 * self.patch**2 * d + (self.blocks - 1) * block + (block if all_tokens else last)

    def head_weights(self) -> int:
        return self.width * HIDDEN + HIDDEN**2 + HIDDEN * BOTTLENECK + BOTTLENECK * self.k

    def flop_per_image(self, all_tokens: bool = True) -> int:
        """FLOPs per image: the teacher's forward pass of two global crops, and three times the student's of all crops.

        all_tokens=True is the arithmetic of the method, the common measure for all implementations; all_tokens=False
        is what ours computes.
        """
        glob, loc = (self.backbone_flop(size, all_tokens) + 2 * self.head_weights() for size in self.sizes)
        return 2 * glob + 3 * (2 * glob + self.local * loc)

    def parameters(self) -> int:
        """Number of weights and biases of backbone and head."""
        d, n = self.width, self.tokens(self.sizes[0])
        block = 12 * d**2 + 13 * d
        backbone = 3 * self.patch**2 * d + d + d + n * d + self.blocks * block + 2 * d
        return backbone + self.head_weights() + 2 * HIDDEN + BOTTLENECK

    def kept_bytes(self, precision: str = "bf16", checkpointing: str = "") -> int:
        """Bytes of activations per image that the student's backbone saves for backward, by --grad_checkpointing."""
        tokens = self.tokens_per_image()[1] * self.width
        if checkpointing == "blocks":
            half = 4 if precision == "fp32" else 2  # the blocks' inputs, in float32, and the unfolded patches
            return tokens * self.blocks * 4 + self.tokens_per_image()[1] * 3 * self.patch**2 * half
        kept = KEPT_BY_LAYERS if checkpointing == "layers" else KEPT
        return tokens * ((self.blocks - 1) * kept[precision] + LAST_KEPT[precision])

    def step_bytes(self, batch: int, checkpointing: str = "", precision: str = "bf16") -> float:
        """Bytes of a training step: weights, optimizer, activations by --grad_checkpointing, logits."""
        kept = self.kept_bytes(precision, checkpointing)
        if checkpointing == "blocks":  # one block at a time is recomputed
            kept += self.tokens_per_image()[1] * self.width * KEPT[precision]
        return self.fixed_bytes() + batch * (kept + self.logit_bytes(precision))

    def logit_bytes(self, precision: str = "bf16") -> int:
        """Bytes per image of the student's logits and their gradient, and the teacher's logits and probabilities."""
        half = 2 if precision == "bf16" else 4
        return self.k * ((2 + self.local) * 2 * half + 2 * (half + 4))

    def fixed_bytes(self) -> int:
        """Bytes of both networks' weights, gradients and AdamW's two moments (float32), and bf16 copies of weights."""
        return self.parameters() * (5 * 4 + 2 * 2)

    def traffic_by_kind(self, precision: str = "bf16") -> dict[str, tuple[float, float]]:
        """{kind: bytes moved (per image, per step)}; per step: weights, with their products, weight norm and update."""
        teacher, student = self.tokens_per_image()
        half = 4 if precision == "fp32" else 2
        tokens = (teacher + 3 * student) * self.width
        block, last = BLOCK_TRAFFIC[precision], LAST_TRAFFIC[precision]
        moved = {kind: [tokens * ((self.blocks - 1) * n + last.get(kind, 0)), 0.0] for kind, n in block.items()}
        moved[kinds.MATMUL][1] = self.parameters() * PASS_TRAFFIC * half
        # Both networks' forward passes, and a backward one, normalize the prototypes in float32.
        moved[kinds.LOSS] = [self.k * ((2 + self.local) * 5 * half + 2 * (2 * half + 4 * 4)),
                             4 * BOTTLENECK * self.k * (2 * 2 + 4)]
        moved[kinds.OPTIMIZER] = [0.0, self.parameters() * UPDATE_TRAFFIC]
        return {kind: (image, step) for kind, (image, step) in moved.items()}

    def traffic(self, precision: str = "bf16") -> tuple[float, float]:
        """Bytes moved (per image, per step), without the patch embedding's."""
        image, step = zip(*self.traffic_by_kind(precision).values(), strict=True)
        return sum(image), sum(step)

    def flop_by_kind(self) -> dict[str, float]:
        """{kind: FLOPs per image} of what ours computes; the sum is flop_per_image(all_tokens=False)."""
        passes = ((8, self.sizes[0]), (3 * self.local, self.sizes[1]))  # forward passes, of which a backward is two
        flop = dict.fromkeys((kinds.MATMUL, kinds.ATTENTION, kinds.PATCHES, kinds.LOSS), 0.0)
        for count, size in passes:
            n, d = self.tokens(size), self.width
            flop[kinds.ATTENTION] += count * 4 * n * d * ((self.blocks - 1) * n + 1)
            flop[kinds.PATCHES] += count * 2 * (n - 1) * 3 * self.patch**2 * d
            flop[kinds.LOSS] += count * 2 * BOTTLENECK * self.k
            flop[kinds.MATMUL] += count * (self.backbone_flop(size, False) + 2 * self.head_weights())
        flop[kinds.MATMUL] -= sum(flop[kind] for kind in (kinds.ATTENTION, kinds.PATCHES, kinds.LOSS))
        return flop

    def floors(self, batch: int, flops: float, bandwidth: float, precision: str = "bf16") -> dict[str, float]:
        """{kind: seconds of a step that it takes at least}: the longer of its arithmetic and its memory traffic."""
        arithmetic, traffic = self.flop_by_kind(), self.traffic_by_kind(precision)
        half = 4 if precision == "fp32" else 2
        pixels = 3 * (2 * self.sizes[0] ** 2 + self.local * self.sizes[1] ** 2)
        # Patches: both networks' passes and the gradient of the weights read the crops; tokens written, gradients read.
        traffic[kinds.PATCHES] = (4 * 3 * pixels + 3 * half * self.width * self.tokens_per_image()[1], 0.0)
        return {kind: max(batch * arithmetic.get(kind, 0.0) / flops, (batch * image + step) / bandwidth)
                for kind, (image, step) in traffic.items()}

    def colour_bytes(self, kind: str = "eager") -> int:
        """Bytes moved per image by the colour augmentation on the device."""
        return COLOURS_TRAFFIC[kind] * 3 * (2 * self.sizes[0] ** 2 + self.local * self.sizes[1] ** 2)


@dataclass(frozen=True)
class Hardware:
    """Measured or published rates of a machine."""

    flops: float  # FLOP/s of a large matrix product
    bandwidth: float  # bytes/s of device memory
    inside: float = 450e9  # bytes/s in each direction between the GPUs of a host
    between: float = 50e9  # bytes/s from a GPU to other hosts
    per_host: int = 8  # GPUs
    worker_ms: float = 4.0  # of one core, per image
    image_bytes: float = 110e3  # size of a stored image


def step_seconds(shape: Shape, batch: int, gpus: int, at: Hardware, precision: str = "bf16") -> dict[str, float]:
    """Seconds of a step by cause, without data loading; their sum assumes that they do not overlap.

    The all-reduce of the gradients overlaps with backward, which takes about 0.6 of arithmetic and memory time; only
    the excess counts.
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
    """Predicted throughput of a run, and the CPU cores and storage bandwidth that it needs."""
    seconds = step_seconds(shape, batch, gpus, at, precision)
    seconds["colours"] = batch * shape.colour_bytes() / at.bandwidth
    rate = gpus * batch / sum(seconds.values())
    return {"images_per_s": rate, "arithmetic_only": gpus * at.flops / shape.flop_per_image(False),
            "waiting": seconds["communication"] / sum(seconds.values()),
            "cores_per_gpu": rate / gpus * at.worker_ms / 1000, "storage_gb_s": rate * at.image_bytes / 1e9}


def largest_batch(shape: Shape, memory: float, precision: str = "bf16") -> int:
    """Images per GPU that fit into `memory` bytes; a tenth is left for the allocator and temporaries."""
    free = 0.9 * memory - shape.fixed_bytes()
    return max(0, int(free / (shape.kept_bytes(precision) + shape.logit_bytes(precision))))


def tables(args: argparse.Namespace) -> list[dict]:
    at = Hardware(args.flops * 1e12, args.bandwidth * 1e12, worker_ms=args.worker_ms, image_bytes=args.image_kb * 1e3)
    shapes = {name: Shape(*spec, 8, args.out_dim) for name, spec in ARCHS.items()}
    print("\nPer image: 2 global and 8 local crops")
    bench.table(["network", "M parameters", "GFLOP", "GB moved", "MB kept", "MB logits", "GB weights, optimizer",
                 "batch in 80 GB", "in 141 GB"],
                [[n, s.parameters() / 1e6, s.flop_per_image() / 1e9, s.traffic()[0] / 1e9, s.kept_bytes() / 1e6,
                  s.logit_bytes() / 1e6, s.fixed_bytes() / 1e9, largest_batch(s, 80e9), largest_batch(s, 141e9)]
                 for n, s in shapes.items()])
    small = shapes["ViT-S/16"]
    print(f"\nViT-S/16 on one GPU, {args.batch} images: time of a step by cause")
    rows = []
    for step, precision, kind in (
            ("eager", "bf16", "eager"), ("fused by torch.compile", "bf16, fused", "fused"),
            ("eager, residual stream in bf16", "bf16 stream", "eager"),
            ("fused, residual stream in bf16", "bf16 stream, fused", "fused")):
        part = step_seconds(small, args.batch, 1, at, precision)
        colours = args.batch * small.colour_bytes(kind) / at.bandwidth
        rows.append([step, 1000 * part["arithmetic"], 1000 * part["memory"], 1000 * colours,
                     args.batch / (sum(part.values()) + colours),
                     args.batch / max(part["arithmetic"], part["memory"] + colours)])
    bench.table(["step", "ms of arithmetic", "of memory traffic", "of colours", "images/s, one after the other",
                 "overlapped"], rows)
    print(f"\nViT-S/16, {args.batch} images: GB of a step by --grad_checkpointing, without the temporaries of kernels")
    modes = {"off": "", "layers": "layers", "blocks": "blocks"}
    bench.table(list(modes), [[small.step_bytes(args.batch, mode) / 1e9 for mode in modes.values()]])
    predictions = []
    for name, shape in shapes.items():
        batch = min(args.batch, largest_batch(shape, 141e9))
        print(f"\n{name}, {batch} images per GPU")
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
    parser.add_argument("--flops", type=float, default=788, help="TFLOP/s of a large bf16 matrix product")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s of device memory")
    parser.add_argument("--worker_ms", type=float, default=4.0, help="ms of a CPU core to decode and crop an image")
    parser.add_argument("--image_kb", type=float, default=110, help="mean size of a file in kB; ImageNet's is 110")
    parser.add_argument("--batch", type=int, default=128, help="images per GPU; reduced if they do not fit")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512], help="numbers of GPUs to predict for")
    parser.add_argument("--out_dim", type=int, default=65536, help="number of prototypes K")
    return parser


def main(args: argparse.Namespace) -> int:
    print(f"{args.flops:g} TFLOP/s, {args.bandwidth:g} TB/s, {args.worker_ms:g} ms and {args.image_kb:g} kB per image, "
          f"K {args.out_dim}")
    bench.record(args, "model", predictions=tables(args))
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
