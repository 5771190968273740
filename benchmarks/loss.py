"""The losses alone, targets, forward and backward, with K = 65,536.

Class tokens of ten crops (DINO): `ours`, the double loop of naive.py, and the same algebra (logsumexp and inner
products) differentiated by autograd, on all logits at once and in ours' parts, each of which torch.utils.checkpoint
recomputes. Masked patches (iBOT, with Sinkhorn-Knopp, as many as 16 x 16 patches have at DINOv2's mask ratios): `ours`,
and the algorithms as the papers have them, on all logits at once.

    python benchmarks/loss.py                                            # 8 images, float32 logits
    python benchmarks/loss.py --device cuda --precision bf16 --batch 128

`kept` counts the bytes that autograd saves between forward and backward; `peak` includes temporaries (CUDA only).
Losses and gradients of all variants must agree.
"""

import sys

import bench
import naive
import torch
from torch.utils.checkpoint import checkpoint

import utils
from method.ibot import patch_loss
from method.sinkhorn import sinkhorn_knopp
from method.targets import PART

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASKED = 0.5 * 0.3  # half of the global crops are masked, 0.1 to 0.5 of their patches
WORST = {"fp32": 1e-4, "bf16": 2e-2}  # tolerated difference of gradients, relative to the largest gradient


def at_once(s: torch.Tensor, t: torch.Tensor, center: torch.Tensor, crops: int) -> torch.Tensor:
    """DINO's loss. q sums to one, so the cross-entropy of a pair is logsumexp(logits) - <q, logits>."""
    s = s.float().unflatten(0, (crops, -1)) / 0.1
    q = ((t.float() - center) / 0.04).softmax(-1).unflatten(0, (2, -1))
    match = (q.flip(0) * s[:2]).sum() + (q.sum(0) * s[2:].sum(0)).sum()
    log_z = s.logsumexp(-1)
    return (log_z[:2].sum() + 2 * log_z[2:].sum() - match) / (2 * (crops - 1) * q.shape[1])


def in_parts(s: torch.Tensor, t: torch.Tensor, center: torch.Tensor, crops: int) -> torch.Tensor:
    """at_once of some images at a time; for each part autograd keeps its inputs alone."""
    s, t = s.unflatten(0, (crops, -1)), t.unflatten(0, (2, -1))
    size = max(1, PART[s.device.type] // (crops * s.shape[-1]))
    losses = [len(rows[0]) * checkpoint(at_once, rows.flatten(0, 1), targets.flatten(0, 1), center, crops,
                                        use_reentrant=False)
              for rows, targets in zip(s.split(size, 1), t.split(size, 1), strict=True)]
    return torch.stack(losses).sum() / s.shape[1]


def naive_patch_loss(s: torch.Tensor, t: torch.Tensor, weights: torch.Tensor, crops: int) -> torch.Tensor:
    """- sum_j w_j <q_j, log p_j> / crops, with q of Sinkhorn-Knopp; normal scores do not overflow at 0.07."""
    with torch.no_grad():
        q = (t.float() / 0.07).exp().T
        k, n = q.shape
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True) * k
            q /= q.sum(0, keepdim=True) * n
        q = (q * n).T
    return -(weights * (q * (s.float() / 0.1).log_softmax(-1)).sum(-1)).sum() / crops


def class_variants(crops: int, k: int, device: str) -> dict:
    loss = utils.DINOLoss(k, crops, 0.04, 0.04, 0, 1).to(device)
    return {
        "naive": lambda s, t: naive.dino_loss(s.chunk(crops), t.chunk(2), loss.center),
        "all at once": lambda s, t: at_once(s, t, loss.center, crops),
        "checkpointed parts": lambda s, t: in_parts(s, t, loss.center, crops),
        "ours": lambda s, t: loss(s, t, 0, update_center=False),
    }


def agree(results: dict, precision: str) -> None:
    """Exits if a variant's loss or gradient differs from the first variant's."""
    (loss, grad), *others = results.values()
    for other, other_grad in others:
        worst = ((grad - other_grad).abs().max() / grad.abs().max()).item()
        if abs(loss - other) > 1e-3 * abs(loss) or worst > WORST[precision]:
            raise SystemExit(f"the variants differ: losses {loss} and {other}, gradients by {worst:.2g} of the largest")


def patch_variants(patches: int, crops: int, device: str) -> dict:
    weights = torch.rand(patches, device=device)
    return {
        "naive": lambda s, t: naive_patch_loss(s, t, weights, crops),
        "ours": lambda s, t: patch_loss(s, sinkhorn_knopp(t, 0.07), weights, crops),
    }


def measure(args, title: str, functions: dict, rows: int, teacher_rows: int) -> dict:
    dtype = PRECISIONS[args.precision]
    student = (3 * torch.randn(rows, args.out_dim, device=args.device)).to(dtype).requires_grad_()
    teacher = torch.randn(teacher_rows, args.out_dim, device=args.device).to(dtype)
    results, counted = {}, {}
    for name, function in functions.items():
        kept = bench.kept_bytes(lambda function=function: function(student, teacher))
        student.grad = None
        if args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        value = function(student, teacher)
        value.backward()
        results[name] = value.item(), student.grad.float()
        peak = torch.cuda.max_memory_allocated() - before if args.device.startswith("cuda") else None
        counted[name] = {"kept": kept, "peak": peak}
    agree(results, args.precision)

    def run(name: str) -> None:
        student.grad = None
        functions[name](student, teacher).backward()

    times = bench.in_turns({n: (lambda n=n: run(n)) for n in functions}, args.rounds, args.device)
    table = {n: row | counted[n] for n, row in bench.summary(times, "naive").items()}
    logits = student.numel() * student.element_size()
    print(f"{title}, {args.batch} images, K {args.out_dim}: the student's logits are {logits / 1e6:.0f} MB")
    bench.table([*bench.TIMES, "kept MB", "peak MB"],
                [[*cells, row["kept"] / 1e6, row["peak"] and row["peak"] / 1e6]
                 for cells, row in zip(bench.time_rows(table), table.values(), strict=True)])
    return table


def get_args_parser():
    parser = bench.parser(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="number of images")
    parser.add_argument("--local", type=int, default=8, help="number of local crops")
    parser.add_argument("--out_dim", type=int, default=65536, help="number of prototypes K")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32", help="dtype of the logits")
    return parser


def main(args) -> int:
    if args.quick:
        args.batch, args.local, args.out_dim, args.rounds = 2, 2, 64, 1
    torch.manual_seed(0)
    bench.header(f"loss, {args.precision} logits", args.device)
    crops, patches = 2 + args.local, max(1, int(2 * args.batch * MASKED * 256))
    bench.record(
        args, "loss",
        variants=measure(args, f"class tokens of {crops} crops", class_variants(crops, args.out_dim, args.device),
                         crops * args.batch, 2 * args.batch),
        patches=measure(args, f"{patches} masked patches", patch_variants(patches, 2 * args.batch, args.device),
                        patches, patches))
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
