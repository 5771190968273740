"""Exact neighbours among synthetic embeddings of width 384: all pairs of 100,000, and 1,000 queries against a million.

    OMP_NUM_THREADS=1 python benchmarks/neighbours.py --rounds 1 --json neighbours.jsonl
    python benchmarks/neighbours.py --device cuda

The straightforward way, a slice of one product, is timed on a part of the queries, and scaled. Times are CPU seconds of
the process on a CPU, which other programs on the machine hardly change, and wall seconds on a GPU. Also measured: the
largest memory of the process.
"""

import resource
import sys
import time

import bench
import torch

from protocols import neighbours

THRESHOLD, K = 0.8, 4
SPREAD = 0.5  # of near duplicates around each centre: a few pairs are above the threshold


def embeddings(n: int, width: int, per_center: int, seed: int, device: str) -> torch.Tensor:
    """Points in groups of `per_center`, of which every tenth group lies close together."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g)
    close = torch.arange(n) // per_center % 10 == 0
    centers = torch.randn(-(-n // per_center), width, generator=g)
    x[close] = centers[torch.arange(n)[close] // per_center] + SPREAD * x[close]
    return x.to(device)


def seconds(work, device: str) -> tuple[float, object]:
    clock = time.perf_counter if device.startswith("cuda") else bench.cpu_seconds
    bench.wait(device)
    started = clock()
    result = work()
    bench.wait(device)
    return clock() - started, result


def straightforward(queries: torch.Tensor, bank: torch.Tensor, part: int) -> torch.Tensor:
    """Cosines of the nearest of `bank` to the first `part` queries, by one product."""
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in (queries[:part], bank))
    return (x @ y.T).topk(K, dim=1)[0]


def pairs(x: torch.Tensor, engine: str, device: str) -> int:
    return sum(len(part) for part in neighbours.similar_pairs(x, THRESHOLD, engine, device))


def all_pairs(engines: list[str], n: int, args) -> list[list]:
    x, rows = embeddings(n, args.width, 5, 0, args.device), []
    for engine in engines * args.rounds:
        took, count = seconds(lambda engine=engine: pairs(x, engine, args.device), args.device)
        rows.append([f"all pairs of {n:,}, {engine}", took, n * n / 2 / took / 1e6, f"{count:,} pairs", memory()])
    return rows


def few_queries(engines: list[str], m: int, n: int, args) -> list[list]:
    bank, queries = (embeddings(count, args.width, 5, seed, args.device) for seed, count in ((1, n), (2, m)))
    part = max(1, m // 20)
    took, expected = seconds(lambda: straightforward(queries, bank, part), args.device)
    rows = [[f"{part:,} queries against {n:,}, one product", took, part * n / took / 1e6, "", memory()]]
    for engine in engines * args.rounds:
        took, (cosines, _) = seconds(lambda engine=engine: neighbours.nearest_rows(
            queries, bank, K, engine, args.device), args.device)
        worst = float((cosines[:part] - expected.cpu()).abs().max())
        if worst > 1e-5:
            raise SystemExit(f"{engine}: cosines differ from one product's by {worst}")
        rows.append([f"{m:,} queries against {n:,}, {engine}", took, m * n / took / 1e6, f"{K} neighbours", memory()])
    return rows


def measure(args) -> list[list]:
    n, m, bank = (4000, 100, 8000) if args.quick else (args.images, 1000, 1_000_000)
    engines, rows = ["exact"], []
    if args.engines != "exact" and neighbours.pick_engine("auto", torch.device(args.device)) == "faiss":
        engines.append("faiss")
    if args.part != "queries":
        rows += all_pairs(engines, n, args)
    if args.part != "pairs":
        rows += few_queries(engines, m, bank, args)
    return rows


def memory() -> float:
    """The largest resident memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(args) -> int:
    bench.header("Exact neighbours", args.device)
    rows = measure(args)
    bench.table(("search", "seconds", "million pairs/s", "result", "peak GB"), rows)
    bench.record(args, "neighbours", rows=rows)
    return 0


def get_args_parser():
    parser = bench.parser(__doc__, rounds=1)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--images", type=int, default=100_000, help="embeddings all pairs of which are compared")
    parser.add_argument("--part", choices=("all", "pairs", "queries"), default="all")
    parser.add_argument("--engines", choices=("all", "exact"), default="all")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
