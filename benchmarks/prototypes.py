"""Weight normalization of the prototypes, forward and backward: written out, and with torch's weight-norm kernel.

    python benchmarks/prototypes.py
    python benchmarks/prototypes.py --device cuda
"""

import sys

import bench
import torch
import torch.nn.functional as F


def main(args) -> int:
    k = 64 if args.quick else args.out_dim
    bench.header(f"prototypes, {k} x 256", args.device)
    g, grad = torch.ones(k, 1, device=args.device), torch.randn(k, 256, device=args.device)
    v = torch.randn(k, 256, device=args.device, requires_grad=True)
    functions = {"written out": lambda: g * F.normalize(v, dim=1), "kernel": lambda: torch._weight_norm(v, g, 0)}
    grads = [torch.autograd.grad(function(), v, grad)[0] for function in functions.values()]
    torch.testing.assert_close(*grads)
    times = bench.in_turns({n: (lambda f=f: torch.autograd.grad(f(), v, grad)) for n, f in functions.items()},
                           args.rounds, args.device)
    summary = bench.summary(times, "written out")
    bench.table(bench.TIMES, bench.time_rows(summary))
    bench.record(args, "prototypes", variants=summary)
    return 0


def get_args_parser():
    parser = bench.parser(__doc__, rounds=7)
    parser.add_argument("--out_dim", type=int, default=65536, help="number of prototypes K")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
