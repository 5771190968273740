"""Bytes of a training step by category, counted: weights, optimizer, activations, logits; for ours, naive and model.py.

    python benchmarks/memory.py
    python benchmarks/memory.py --device cuda --precision bf16 --batch 32

Activations and logits are what autograd saves between forward and backward, each storage once. The count is the same
on any device, with one exception: in bf16 on a CPU, ours saves the attention weights like naive; on CUDA it does not.
Weights cast to half precision count as activations. For peaks of the CUDA allocator, see train_step.py.
"""

import sys

import bench
import model
import naive
import ours
import torch
from train_step import PRECISIONS, crops_of, trainer_options

GROWING = ("activations", "logits and loss")  # proportional to the number of images; the other categories are constant


def count(trainer, crops, features) -> dict[str, int]:
    """Bytes per category; `features` runs the student's backbone without the head."""
    weights = sum(p.numel() * p.element_size() for net in (trainer.student, trainer.teacher) for p in net.parameters())
    trained = sum(p.numel() * p.element_size() for p in trainer.student.parameters() if p.requires_grad)
    with torch.autocast(trainer.device.split(":")[0], trainer.dtype, enabled=trainer.dtype is not None):
        activations = bench.kept_bytes(features)
    logits = bench.kept_bytes(lambda: trainer.losses(crops)[0]) - activations
    return {"weights": weights, "gradients": trained, "moments": 2 * trained, "activations": activations,
            "logits and loss": logits}


def measure(batch: int, args) -> dict[str, dict]:
    shared = trainer_options(args)
    views, joined = crops_of(batch, args)
    trainers = {
        "naive": lambda: naive.Trainer(**shared, grouped=True),
        "ours": lambda: ours.Trainer(**shared, local=args.local),
        "ours, layers checkpointed": lambda: ours.Trainer(**shared, local=args.local, checkpointed="layers"),
        "ours, blocks checkpointed": lambda: ours.Trainer(**shared, local=args.local, checkpointed="blocks"),
    }
    counts = {}
    for who, make in trainers.items():
        trainer, crops = make(), views if who == "naive" else joined
        counts[who] = count(trainer, crops, lambda net=trainer.student.backbone: [net(c) for c in joined])
    shape = model.Shape.of(args.arch, args.patch, args.sizes, args.local, args.out_dim)
    precision = "fp32" if args.precision == "fp32" else "bf16"
    size = 4 * shape.parameters()
    counts["the model of cost"] = {
        "weights": 2 * size, "gradients": size, "moments": 2 * size,
        "activations": batch * shape.kept_bytes(precision), "logits and loss": None}
    return counts


def get_args_parser():
    parser = bench.step_parser(__doc__, naive.SIZES, "vit_small", (224, 96))
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32")
    return parser


def main(args) -> int:
    if args.quick:
        args.arch, args.sizes, args.local, args.out_dim = "vit_nano", (32, 16), 2, 64
    torch.manual_seed(0)
    bench.header(f"memory of a step, {args.arch}/{args.patch}, {args.precision}, {args.batch} images", args.device)
    counts, twice = measure(args.batch, args), measure(2 * args.batch, args)
    names = list(counts["ours"])
    bench.table(["MB", *names], [[who, *(row[n] and row[n] / 1e6 for n in names)] for who, row in counts.items()])
    more = {who: [(twice[who][n] - row[n]) / args.batch for n in GROWING]
            for who, row in counts.items() if None not in row.values()}
    print("\nEach additional image takes")
    bench.table(["MB", *GROWING, "both", "share of naive"],
                [[who, *(b / 1e6 for b in row), sum(row) / 1e6, sum(row) / sum(more["naive"])]
                 for who, row in more.items()])
    bench.record(args, "memory", bytes=counts, bytes_an_image=more)
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
