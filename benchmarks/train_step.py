"""A training step on fixed tensors (forward, loss, backward, clipping, optimizer, EMA): ours against naive.py.

    python benchmarks/train_step.py --batch 4
    python benchmarks/train_step.py --device cuda --precision bf16 --batch 64 128 256 --rounds 20
    python benchmarks/train_step.py --device cuda --precision bf16 --batch 128 --compile --profile
    python benchmarks/train_step.py --device cuda --precision bf16 --batch 256 --compile --arch resnet18 \\
        --sizes 160 80 --local 6 --out_dim 2048

TFLOP/s counts the method's arithmetic (model.py), which is the same for every variant. For a ResNet there is neither a
naive variant nor a cost model; its ratios compare with our step. The compiled step comes last, in turns with the
baseline alone: all others are printed and recorded before anything is compiled. Peak GB are those of a variant's own
networks, optimizer, crops and step; what other variants of the process hold is left out. --profile prints the time of
our step by kind of work (kinds.py), beside the least time that the cost model allows each kind, and the ten operations
that take the most time on the device; --profile FILE also writes the trace, for chrome://tracing or Perfetto.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench
import kinds
import model
import naive
import ours
import torch

RESNETS = ("resnet18", "resnet50", "resnet18_cifar")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def crops_of(batch: int, args) -> tuple[list, list]:
    """The same random crops in two forms: a list of views (naive.py), and one tensor per resolution (ours)."""
    sizes = [args.sizes[0]] * 2 + [args.sizes[1]] * args.local
    views = [torch.randn(batch, 3, s, s, device=args.device) for s in sizes]
    return views, [torch.cat(group) for group in (views[:2], views[2:]) if group]


def trainer_options(args) -> dict:
    """The arguments that naive.Trainer and ours.Trainer share."""
    return {"arch": args.arch, "patch": args.patch, "size": args.sizes[0], "k": args.out_dim, "device": args.device,
            "dtype": PRECISIONS[args.precision]}


COMPILED = "ours, compiled"


def trainers(args) -> dict[str, Callable]:
    """{variant: function that builds its trainer}."""
    shared = trainer_options(args)
    own = partial(ours.Trainer, **shared, local=args.local)
    variants = {}
    if args.arch in naive.SIZES:
        variants = {"naive, a pass a crop": partial(naive.Trainer, **shared),
                    "naive, a pass a resolution": partial(naive.Trainer, **shared, grouped=True)}
    variants["ours"] = own
    if args.all_tokens:
        variants["ours, all tokens"] = lambda: with_all_tokens(own())
    if args.grad_checkpointing:
        variants |= {f"ours, {what} checkpointed": partial(own, checkpointed=what) for what in ("layers", "blocks")}
    if args.compile:
        variants[COMPILED] = partial(own, compiled=args.compile)
    return variants


def with_all_tokens(trainer: ours.Trainer) -> ours.Trainer:
    for network in (trainer.student, trainer.teacher):
        network.outputs = lambda crops, kept=None, outputs=network.outputs, **options: outputs(crops)
    return trainer


def peak_of(step: Callable[[], object], held: int) -> tuple[int, int]:
    """A trainer's bytes on the GPU: (the most during a step, those after it). It holds `held` before; what others hold
    is not counted.
    """
    others = torch.cuda.memory_allocated() - held
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - others, torch.cuda.memory_allocated() - others


def measure(batch: int, args, rate: float, bandwidth: float) -> None:
    """Print and record a table of the variants that are not compiled, then one of the compiled step and the baseline.
    """
    baseline = "naive, a pass a resolution" if args.arch in naive.SIZES else "ours"  # the stronger of the two
    names = list(trainers(args))
    groups = [[name for name in names if name != COMPILED], [baseline, COMPILED]]
    for group in groups[: 2 if COMPILED in names else 1]:
        summary = timed(group, baseline, batch, args)
        predicted = show(summary, batch, args, rate, bandwidth)
        bench.record(args, "train_step", matmul_flops=rate, copy_bytes=bandwidth, batch=batch, predicted=predicted,
                     variants=summary)


def timed(names: list[str], baseline: str, batch: int, args) -> dict[str, dict]:
    """`bench.summary` of steps in turns, with images_per_s and peak_gb."""
    bench.start_anew(args.device)
    cuda, (views, grouped) = args.device.startswith("cuda"), crops_of(batch, args)
    variants, held, peaks = {}, {}, {}
    for name in names:
        before = torch.cuda.memory_allocated() if cuda else 0
        variants[name] = trainers(args)[name]()
        held[name] = sum(v.nbytes for v in views) + (torch.cuda.memory_allocated() - before if cuda else 0)

    def run(name: str) -> None:
        step = partial(variants[name].step, grouped if name.startswith("ours") else views)
        if cuda:
            peaks[name], held[name] = peak_of(step, held[name])
        else:
            step()

    clock = bench.cpu_seconds if args.cpu_time else time.perf_counter
    times = bench.in_turns({n: (lambda n=n: run(n)) for n in variants}, args.rounds, args.device, clock)
    summary = bench.summary(times, baseline)
    for name, row in summary.items():
        row |= {"images_per_s": 1000 * batch / row["ms"], "peak_gb": peaks[name] / 1e9 if peaks else None}
    return summary


def show(summary: dict[str, dict], batch: int, args, rate: float, bandwidth: float) -> float | None:
    """Print the table of `timed`; adds TFLOP/s to its rows and returns the predicted images/s, where there is a model.
    """
    if args.arch not in naive.SIZES:
        print(f"\n{batch} images per step")
        rows = [[*cells, row["images_per_s"], row["peak_gb"]]
                for cells, row in zip(bench.time_rows(summary), summary.values(), strict=True)]
        bench.table([*bench.TIMES, "images/s", "peak GB"], rows)
        return None
    shape = model.Shape.of(args.arch, args.patch, args.sizes, args.local, args.out_dim)
    flop, precision = shape.flop_per_image() * batch, "fp32" if args.precision == "fp32" else "bf16"
    causes = model.step_seconds(shape, batch, 1, model.Hardware(rate, bandwidth), precision)
    for row in summary.values():
        achieved = flop * 1000 / row["ms"]
        row |= {"tflops": achieved / 1e12, "share": achieved / rate}
    rows = [[*cells, row["images_per_s"], row["tflops"], f"{row['share']:.0%}", row["peak_gb"]]
            for cells, row in zip(bench.time_rows(summary), summary.values(), strict=True)]
    predicted = batch / sum(causes.values())
    print(f"\n{batch} images per step, {flop / batch / 1e9:.1f} GFLOP per image; model.py predicts "
          f"{predicted:.3g} images/s: {1000 * causes['arithmetic']:.3g} ms of arithmetic, "
          f"{1000 * causes['memory']:.3g} ms of memory traffic")
    bench.table([*bench.TIMES, "images/s", "TFLOP/s", "of matmul", "peak GB"], rows)
    return predicted


def profile(args, rate: float, bandwidth: float) -> dict:
    """Print the time of our step by kind beside each kind's floor, then its ten longest operations on the device."""
    from torch.profiler import ProfilerActivity, record_function

    cuda, steps = args.device.startswith("cuda"), 1 if args.quick else 3
    bench.start_anew(args.device)
    trainer, crops = trainers(args)[COMPILED if args.compile else "ours"](), crops_of(args.batch[0], args)[1]
    for network in (trainer.student, trainer.teacher) if not args.compile else ():
        network.backbone.embed = record_function(kinds.PATCHES)(network.backbone.embed)
    for _ in range(2):  # after the first step the optimizer has its state
        trainer.step(crops)
    bench.wait(args.device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            with record_function(kinds.STEP):
                trainer.step(crops)
        bench.wait(args.device)
    rows = time_by_kind(profiler, args, rate, bandwidth, steps)

    def time_of(event) -> float:
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    events = sorted(profiler.key_averages(), key=time_of, reverse=True)
    events = [e for e in events if not cuda or e.device_type != torch.autograd.DeviceType.CPU]  # kernels only
    events = [e for e in events if not e.is_user_annotation and not e.key.startswith("## Call")]  # of compiled graphs
    total = sum(map(time_of, events))
    print(f"\nthe ten largest {'kernels' if cuda else 'operations'} of {steps} step(s):")
    largest = [[e.key[:80], f"{time_of(e) / total:.1%}", time_of(e) / 1000, e.count] for e in events[:50]]
    bench.table(["name", "share", "ms", "calls"], largest[:10])
    return {"kinds": rows, "largest": largest}


def time_by_kind(profiler, args, rate: float, bandwidth: float, steps: int) -> dict[str, dict]:
    """{kind: {ms of a step, floor_ms}}, printed; writes the trace to the file that --profile names, if any."""
    with tempfile.TemporaryDirectory() as folder:
        path = args.profile if args.profile != "-" else f"{folder}/trace.json"
        profiler.export_chrome_trace(path)
        times = kinds.by_kind(json.loads(Path(path).read_text()), args.out_dim)
    shape = model.Shape.of(args.arch, args.patch, args.sizes, args.local, args.out_dim)
    precision = "fp32" if args.precision == "fp32" else "bf16, fused" if args.compile else "bf16"
    floors = shape.floors(args.batch[0], rate, bandwidth, precision)
    rows = {kind: {"ms": ms / steps, "floor_ms": 1000 * floors.get(kind, 0.0)} for kind, ms in times.items()}
    total = {name: sum(row[name] for row in rows.values()) for name in ("ms", "floor_ms")}
    print(f"\na step of {args.batch[0]} images by kind; the floor is the longer of arithmetic and memory traffic")
    bench.table(["kind", "ms", "share", "floor, ms"],
                [[kind, row["ms"], f"{row['ms'] / total['ms']:.1%}", row["floor_ms"]]
                 for kind, row in (rows | {"all": total}).items()])
    return rows


def get_args_parser():
    parser = bench.step_parser(__doc__, [*naive.SIZES, *RESNETS], "vit_small", (224, 96))
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="images per step; one table for each value")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32")
    parser.add_argument("--compile", nargs="?", const="default", default="", metavar="MODE",
                        help="also time our step under torch.compile; reduce-overhead uses CUDA graphs")
    parser.add_argument("--all_tokens", action="store_true",
                        help="also time our step with all tokens in the last block")
    parser.add_argument("--grad_checkpointing", action="store_true",
                        help="also time our step with recomputed layers, and with recomputed blocks")
    parser.add_argument("--cpu_time", action="store_true",
                        help="measure CPU time instead of wall time; use it with one thread on a busy machine")
    parser.add_argument("--profile", nargs="?", const="-", default="", metavar="FILE",
                        help="print our step's time by kind instead of timing the variants; also write its trace")
    return parser


def main(args) -> int:
    if args.quick:
        args.arch, args.sizes, args.local, args.out_dim, args.batch, args.rounds = "vit_nano", (32, 16), 2, 64, [2], 1
        args.grad_checkpointing = args.all_tokens = True
    for flag in ("profile", "all_tokens", "grad_checkpointing"):
        if getattr(args, flag) and args.arch in RESNETS:
            raise SystemExit(f"--{flag} --arch {args.arch}: is about a ViT's layers; leave it out or choose a ViT")
    torch.manual_seed(0)
    bench.header(f"training step of {args.arch}/{args.patch}, {args.precision}", args.device)
    rate = bench.matmul_rate(args.device, PRECISIONS[args.precision] or torch.float32, 64 if args.quick else 0)
    bandwidth = bench.copy_rate(args.device, size=2**20 if args.quick else 2**28)
    print(f"measured: matrix products {rate / 1e12:.3g} TFLOP/s, copies {bandwidth / 1e9:.3g} GB/s")
    if args.profile:
        bench.record(args, "profile", matmul_flops=rate, copy_bytes=bandwidth, **profile(args, rate, bandwidth))
        return 0
    for batch in args.batch:
        measure(batch, args, rate, bandwidth)
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
