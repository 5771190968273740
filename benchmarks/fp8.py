"""An experiment: linear layers of the student in fp8 (torchao's float8 training), against bf16 and float32.

    pip install torchao
    python benchmarks/fp8.py                       # on a CPU torchao emulates fp8: ignore the times
    python benchmarks/fp8.py --device cuda --arch vit_small --sizes 224 96 --out_dim 65536 --batch 128

From the same weights and crops, for each precision: the relative error of the first step's gradient against float32,
the loss after --steps steps, and the time per step. The head's last layer is not converted.
"""

import statistics
import sys
import time

import bench
import naive
import ours
import torch
from train_step import crops_of


def to_fp8(trainer: ours.Trainer) -> None:
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise SystemExit("needs torchao: pip install torchao") from error
    convert_to_float8_training(trainer.student, config=Float8LinearConfig(emulate=trainer.device == "cpu"))


def run(trainer: ours.Trainer, crops: list, args) -> dict:
    loss, _ = trainer.losses(crops)
    loss.backward()
    gradient = torch.cat([p.grad.flatten().float() for p in trainer.student.parameters() if p.grad is not None])
    trainer.optimizer.zero_grad()
    seconds = []
    for _ in range(args.steps):
        bench.wait(args.device)
        start = time.perf_counter()
        loss = trainer.step(crops)
        bench.wait(args.device)
        seconds.append(time.perf_counter() - start)
    return {"gradient": gradient, "loss": loss.item(), "ms": 1000 * statistics.median(seconds)}


def measure(args) -> dict:
    crops, results = crops_of(args.batch, args)[1], {}
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16), ("fp8", torch.bfloat16)):
        torch.manual_seed(0)  # the same weights
        trainer = ours.Trainer(args.arch, args.patch, args.sizes[0], args.out_dim, args.device, dtype, args.local, 0.0)
        if name == "fp8":
            to_fp8(trainer)
        results[name] = run(trainer, crops, args)
    exact = results["fp32"]["gradient"]
    for row in results.values():
        row["off"] = ((row.pop("gradient") - exact).norm() / exact.norm()).item()
    return results


def main(args) -> int:
    if args.quick:
        args.arch, args.sizes, args.local, args.out_dim, args.batch, args.steps = "vit_nano", (32, 16), 2, 64, 8, 1
    torch.manual_seed(0)
    bench.header(f"fp8, {args.arch}/{args.patch}, {args.batch} images per step", args.device)
    results = measure(args)
    bench.table(["precision", "gradient off by", f"loss after {args.steps} steps", "median ms"],
                [[name, row["off"], row["loss"], row["ms"]] for name, row in results.items()])
    bench.record(args, "fp8", variants=results)
    return 0


def get_args_parser():
    parser = bench.step_parser(__doc__, naive.SIZES, "vit_tiny", (96, 48))
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
