"""Shared by all benchmarks: flags, interleaved timing, tables, and JSON output.

Variants are timed in turns within one process, so that a busy or throttled machine slows down all of them alike, and
ratios are computed per round. A table shows the median, the fastest and the slowest round, and the median ratio to the
baseline with its range.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, so that a project module wins over a benchmark of the same name


def parser(doc: str, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark; `doc` is the script's docstring."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--quick", action="store_true", help="tiny sizes, to check that the script runs")
    flags.add_argument("--rounds", type=int, default=rounds, help="timed calls of each variant")
    flags.add_argument("--device", default="cpu", help="cpu or cuda")
    flags.add_argument("--json", default="", metavar="FILE", help="append a line of JSON to this file")
    return flags


def step_parser(
    doc: str, archs: Sequence[str], arch: str, sizes: tuple[int, int], rounds: int = 5
) -> argparse.ArgumentParser:
    """`parser`, with flags for the network and the crops of a training step."""
    flags = parser(doc, rounds)
    flags.add_argument("--arch", default=arch, choices=sorted(archs))
    flags.add_argument("--patch", type=int, default=16)
    flags.add_argument("--sizes", type=int, nargs=2, default=sizes, help="side in pixels of global and local crops")
    flags.add_argument("--local", type=int, default=8, help="number of local crops")
    flags.add_argument("--out_dim", type=int, default=65536, help="number of prototypes K")
    return flags


def machine(device: str = "cpu") -> dict:
    """Hardware and versions, stored in every line of JSON."""
    info = {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(), "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform(),
    }
    if device.startswith("cuda"):
        info |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return info


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def header(title: str, device: str = "cpu") -> None:
    """Print the title, the hardware and the load of the machine."""
    info = machine(device)
    where = info.get("gpu") or f"{info['cpu']}, {info['cores']} cores, {info['threads']} threads, {info['capability']}"
    print(f"{title}\n{where}; torch {info['torch']}; load {info['load']} before the run", flush=True)


def start_anew(device: str) -> None:
    """Drop compiled graphs and free memory of earlier networks; torch would reuse the graphs for the next ones."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def wait(device: str) -> None:
    """Wait until the device has finished all work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """CPU time of this process; unlike wall time, it does not depend on the load by other processes."""
    return time.process_time()


def in_turns(
    variants: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round. One untimed call of each comes first; every other round is reversed."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            wait(device)
            start = clock()
            variants[name]()
            wait(device)
            if number >= 0:
                times[name].append(clock() - start)
    return times


def summary(times: Mapping[str, Sequence[float]], baseline: str | None = None, per: float = 1) -> dict[str, dict]:
    """{variant: {ms, low, high, ratio, ratio_low, ratio_high}}: median and range in ms, and of the speed-up.

    Args:
        times: {variant: seconds of each round}.
        baseline: variant that ratios compare with; above 1 is faster than it. None: no ratios.
        per: number of items that a round processes; times are per item.
    """
    rows = {}
    for name, seconds in times.items():
        ms = [1000 * t / per for t in seconds]
        rows[name] = {"ms": statistics.median(ms), "low": min(ms), "high": max(ms)}
        if baseline is not None:
            ratios = [b / t for b, t in zip(times[baseline], seconds, strict=True)]
            rows[name] |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return rows


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table, as in docs/performance.md; floats have three digits, None is an empty cell."""
    text = [[shown(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in text) for i in range(len(columns))]
    for number, row in enumerate(text):
        cells = (cell.ljust(w) if i == 0 else cell.rjust(w)
                 for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        print("| " + " | ".join(cells) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|")
    sys.stdout.flush()


def shown(cell: object) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, float):
        return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"


def time_rows(summaries: Mapping[str, dict]) -> list[list]:
    """Rows of a table with the columns TIMES, from `summary`."""
    return [
        [name, row["ms"], f"{shown(row['low'])} .. {shown(row['high'])}",
         f"{row['ratio']:.2f} ({row['ratio_low']:.2f} .. {row['ratio_high']:.2f})" if "ratio" in row else None]
        for name, row in summaries.items()
    ]


TIMES = ("variant", "median ms", "range ms", "times as fast (range)")


def record(args: argparse.Namespace, benchmark: str, **results: object) -> None:
    """Append a line of JSON to the file that --json names, if any."""
    if args.json:
        line = {"benchmark": benchmark, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine": machine(args.device),
                "flags": {k: v for k, v in vars(args).items() if k != "json"}, **results}
        with open(args.json, "a") as file:
            file.write(json.dumps(line) + "\n")


# ---- Counting bytes that autograd saves; measuring peak rates ----


def kept_bytes(function: Callable[[], object]) -> int:
    """Bytes that autograd saves for backward during `function`: each storage once, without leaves (weights)."""
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        source = x if x._base is None else x._base
        if not (source.is_leaf and source.requires_grad):
            storage = x.untyped_storage()
            kept[storage._cdata] = storage.nbytes(), storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()  # noqa: F841 - keeps the graph alive until everything is counted
    return sum(size for size, _ in kept.values())


def matmul_rate(device: str, dtype: torch.dtype, side: int = 0) -> float:
    """Measured FLOP/s of a product of square matrices, the peak that a step is compared with."""
    side = side or (8192 if device.startswith("cuda") else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / shortest(lambda: a @ b, device)


def copy_rate(device: str, size: int = 2**28) -> float:
    """Measured bytes/s, read plus written, of copying a tensor larger than the caches."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / shortest(lambda: target.copy_(source), device)


def shortest(function: Callable[[], object], device: str, seconds: float = 1.0) -> float:
    """Seconds of the fastest call of a function, which is called once untimed and then repeatedly for `seconds`."""
    times, end = [], time.perf_counter() + seconds
    function()
    while not times or time.perf_counter() < end:
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times)
