"""Checks and benchmarks for a GPU in one call: are the fast paths correct, and how fast are they?

    python benchmarks/on_gpu.py --json gpu.jsonl             # about ten minutes on one GPU
    python benchmarks/on_gpu.py --quick --device cpu         # tiny sizes, to check that the script runs

First, the gradient of each variant of the step is compared with float64 for the same weights and crops, and the colour
augmentation with the CPU's. An error above the tolerance ends the script. Then the other benchmarks run one after the
other, with the sizes of docs/performance.md.
"""

import importlib
import sys

import bench
import numpy as np
import ours
import packed
import torch
from train_step import crops_of

import utils

# (script, its flags); --device, --quick and --json are passed on.
RUNS = (
    ("train_step", "--precision bf16 --batch 64 128 256 --rounds 20 --compile --packed --grad_checkpointing"),
    ("train_step", "--precision bf16 --batch 128 --rounds 20 --compile reduce-overhead"),
    ("loss", "--precision bf16 --batch 128"),
    ("prototypes", ""),
    ("attention", ""),
    ("convolutions", "--precision bf16 --batch 256"),
    ("memory", "--precision bf16 --batch 32"),
    ("data_pipeline", "--workers 1 4 8 16"),
    ("end_to_end", "--precision bf16 --arch vit_small --batch 128 --workers 16 --steps 40 --images 512 --compile"),
    ("startup", ""),
    ("train_step", "--precision bf16 --batch 128 --compile --profile trace.json"),
)

WAYS = {  # name: (arguments of ours.Trainer, packed, tolerated relative error of the gradient)
    "fp32": ({}, False, 1e-3), "fp32, packed": ({}, True, 1e-3),
    "fp32, blocks checkpointed": ({"checkpointed": "blocks"}, False, 1e-3),
    "fp32, layers checkpointed": ({"checkpointed": "layers"}, False, 1e-3),
    "bf16": ({"dtype": torch.bfloat16}, False, 0.1), "bf16, packed": ({"dtype": torch.bfloat16}, True, 0.1),
    "bf16, layers checkpointed": ({"dtype": torch.bfloat16, "checkpointed": "layers"}, False, 0.1),
    "bf16, compiled": ({"dtype": torch.bfloat16, "compiled": "default"}, False, 0.1),
    "bf16, CUDA graphs": ({"dtype": torch.bfloat16, "compiled": "reduce-overhead"}, False, 0.1),
}


def gradient(trainer: ours.Trainer, crops: list) -> torch.Tensor:
    trainer.losses(crops)[0].backward()
    return torch.cat([p.grad.flatten().double().cpu() for p in trainer.student.parameters() if p.grad is not None])


def compare(args) -> list[list]:
    """Rows (variant, relative error of its gradient) against float64 on the CPU; exits if an error is too large."""
    torch.manual_seed(0)
    shared = {"arch": "vit_nano", "size": 64, "k": 512, "local": 2, "drop_path": 0.0}
    exact = ours.Trainer(**shared)
    weights = {k: v.clone() for k, v in exact.student.state_dict().items()}
    args.sizes, args.local = (64, 32), 2
    crops = [c.cpu() for c in crops_of(4, args)[1]]
    exact.student.double(), exact.teacher.double()
    expected, rows = gradient(exact, [c.double() for c in crops]), []
    for name, (options, pack, worst) in WAYS.items():
        if args.quick and "compiled" in options:
            continue
        bench.start_anew(args.device)
        trainer = ours.Trainer(**shared, **options, device=args.device)
        for network in (trainer.student, trainer.teacher):
            network.load_state_dict(weights)
        if pack:
            packed.pack(trainer.student)
        actual = gradient(trainer, [c.to(args.device) for c in crops])
        off = ((actual - expected).norm() / expected.norm()).item()
        rows.append([name, off])
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
        if not off < 1e-3:
            raise SystemExit(f"{name}: a value is off by {off:.2g}")
    return rows


def main(args) -> int:
    bench.header("on one device", args.device)
    bench.table(["way", "gradient off by"], compare(args))
    bench.table(["way", "value off by"], compare_colours(args))
    for name, flags in RUNS:
        script = importlib.import_module(name)
        argv = [*flags.split(), "--device", args.device, "--json", args.json]
        if args.quick:
            argv = ["--quick", "--device", args.device, "--json", args.json]
        print(f"\n## python benchmarks/{name}.py {flags}")
        script.main(script.get_args_parser().parse_args(argv))
    return 0


def get_args_parser():
    parser = bench.parser(__doc__)
    parser.set_defaults(device="cuda")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
