"""Is every way of computing a step right on this device? Gradients against float64, colours against the CPU's.

    python benchmarks/parity.py --device cuda

The weights and crops are the same for every variant. An error above the tolerance ends the script with exit code 1.
"""

import sys

import bench
import numpy as np
import ours
import torch

import utils

WAYS = {  # name: (arguments of ours.Trainer, tolerated relative error of the gradient)
    "fp32": ({}, 1e-3),
    "fp32, blocks checkpointed": ({"checkpointed": "blocks"}, 1e-3),
    "fp32, layers checkpointed": ({"checkpointed": "layers"}, 1e-3),
    "bf16": ({"dtype": torch.bfloat16}, 0.1),
    "bf16, layers checkpointed": ({"dtype": torch.bfloat16, "checkpointed": "layers"}, 0.1),
    "bf16, compiled": ({"dtype": torch.bfloat16, "compiled": "default"}, 0.1),
    "bf16, CUDA graphs": ({"dtype": torch.bfloat16, "compiled": "reduce-overhead"}, 0.1),
}


SMALL = {"arch": "vit_nano", "size": 64, "k": 512, "local": 2, "drop_path": 0.0}  # arguments of ours.Trainer


def gradient(trainer: ours.Trainer, crops: list) -> torch.Tensor:
    trainer.losses(crops)[0].backward()
    return torch.cat([p.grad.flatten().double().cpu() for p in trainer.student.parameters() if p.grad is not None])


def reference() -> tuple[dict, list, torch.Tensor]:
    """Weights and crops of a small network, and the gradient of its loss in float64."""
    torch.manual_seed(0)
    exact = ours.Trainer(**SMALL)
    weights = {k: v.clone() for k, v in exact.student.state_dict().items()}
    crops = [torch.randn(8, 3, 64, 64), torch.randn(8, 3, 32, 32)]
    exact.student.double(), exact.teacher.double()
    return weights, crops, gradient(exact, [c.double() for c in crops])


def compare(args) -> list[list]:
    """Rows (variant, relative error of its gradient) against float64 on the CPU; exits if an error is too large.

    Each row is printed, and recorded, as soon as it is there: the compiled variants take a minute.
    """
    weights, crops, expected = reference()
    rows = []
    for name, (options, worst) in WAYS.items():
        if args.quick and "compiled" in options:
            continue
        bench.start_anew(args.device)
        trainer = ours.Trainer(**SMALL, **options, device=args.device)
        for network in (trainer.student, trainer.teacher):
            network.load_state_dict(weights)
        actual = gradient(trainer, [c.to(args.device) for c in crops])
        off = ((actual - expected).norm() / expected.norm()).item()
        rows.append([name, off])
        print(f"{name}: the gradient is off by {off:.2g} of its norm", flush=True)
        bench.record(args, "parity", way=name, error=off, tolerated=worst)
        if not off < worst:
            raise SystemExit(f"{name}: the gradient is off by {off:.2g} of its norm, more than {worst:g}")
    return rows


def compare_colours(args) -> list[list]:
    """Rows (variant, maximum absolute error) against photometric.py on the CPU; exits if an error is too large."""
    aug, rng = utils.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 2, 64, 32), np.random.default_rng(0)
    crops = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
    params = torch.from_numpy(np.stack([aug.draw_photometric(i % 4, rng) for i in range(len(crops))]))
    crops = crops.to(memory_format=torch.channels_last)
    expected, rows = aug.finish([crops], params)[0], []
    for name, aug.compiled in (("colours", False), ("colours, compiled", True))[: 1 if args.quick else 2]:
        off = (aug.finish([crops.to(args.device)], params)[0].cpu() - expected).abs().max().item()
        rows.append([name, off])
        bench.record(args, "parity", way=name, error=off, tolerated=1e-3)
        if not off < 1e-3:
            raise SystemExit(f"{name}: a value is off by {off:.2g}")
    return rows


def get_args_parser():
    return bench.parser(__doc__)


def main(args) -> int:
    bench.header("parity", args.device)
    rows, colours = compare(args), compare_colours(args)
    bench.table(["way", "gradient off by"], rows)
    bench.table(["way", "value off by"], colours)
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
