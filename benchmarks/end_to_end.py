"""From JPEG files to optimizer steps: images/s, and the share of the time in which the step waits for data.

    python benchmarks/end_to_end.py --arch vit_tiny --batch 16 --workers 1                       # two CPU cores
    python benchmarks/end_to_end.py --device cuda --precision bf16 --arch vit_small --batch 128 --workers 16 \
        --steps 40 --compile

Ours is loaders.batches, the colours on the device, and our step, with --compile also compiled; naive is a DataLoader of
naive.py's pictures and its step. They run in turns, each with a loader of its own whose queue is filled before the
clock starts.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench
import data_pipeline
import naive
import ours
import photos
import torch
from train_step import PRECISIONS

from imagesets import loaders


def batches_of(name: str, paths: list[Path], args):
    """Endless batches, each as its trainer's step takes it and on the device."""
    augmentation = data_pipeline.augmentation(args)
    augmentation.compiled = "compiled" in name
    loader = data_pipeline.loader(name, paths, args.workers, args)
    if name != "naive":
        for batch in loaders.on_device(loader, torch.device(args.device)):
            yield augmentation.finish(batch["crops"], batch["params"])
    else:
        for batch in loader:
            yield [view.to(args.device) for view in batch]


def run(name: str, trainer, paths: list[Path], args) -> dict[str, float]:
    """images/s of --steps steps, and the share of them spent between asking for a batch and having it."""
    batches = batches_of(name, paths, args)
    for _ in range(2):
        trainer.step(next(batches))
    bench.wait(args.device)
    waited, start = 0.0, time.perf_counter()
    for _ in range(args.steps):
        asked = time.perf_counter()
        crops = next(batches)
        waited += time.perf_counter() - asked
        trainer.step(crops)
    bench.wait(args.device)
    seconds = time.perf_counter() - start
    return {"images_per_s": args.steps * args.batch / seconds, "data_wait": waited / seconds}


def measure(paths: list[Path], args) -> dict:
    bench.start_anew(args.device)
    shared = {"arch": args.arch, "patch": args.patch, "size": args.sizes[0], "k": args.out_dim,
              "device": args.device, "dtype": PRECISIONS[args.precision]}
    trainers = {"naive": naive.Trainer(**shared), "ours": ours.Trainer(**shared, local=args.local)}
    if args.compile:
        trainers["ours, compiled"] = ours.Trainer(**shared, local=args.local, compiled=args.compile)
    runs = {name: [] for name in trainers}
    for _ in range(args.rounds):
        for name, trainer in trainers.items():
            runs[name].append(run(name, trainer, paths, args))
    rows, results = [], {}
    for name, rounds in runs.items():
        rates, waits = ([r[key] for r in rounds] for key in ("images_per_s", "data_wait"))
        ratios = [a["images_per_s"] / b["images_per_s"] for a, b in zip(rounds, runs["naive"], strict=True)]
        results[name] = {"images_per_s": statistics.median(rates), "rates": rates, "ratios": ratios,
                       "data_wait": statistics.median(waits)}
        rows.append([name, statistics.median(rates), f"{bench.shown(min(rates))} .. {bench.shown(max(rates))}",
                     f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})",
                     f"{statistics.median(waits):.0%}"])
    bench.table(["variant", "images/s", "range", "times as fast (range)", "waits for data"], rows)
    return results


def get_args_parser():
    parser = bench.parser(__doc__, rounds=3)
    parser.add_argument("--arch", default="vit_tiny", choices=sorted(naive.SIZES))
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs=2, default=(224, 96), help="pixels of global and local crops")
    parser.add_argument("--local", type=int, default=8, help="local crops")
    parser.add_argument("--out_dim", type=int, default=65536, help="K")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a turn")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--images", type=int, default=64, help="files of 500 x 375, drawn into a temporary folder")
    parser.add_argument("--compile", nargs="?", const="default", default="", metavar="MODE",
                        help="also ours with torch.compile, networks and colours")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32")
    return parser


def main(args) -> int:
    if args.quick:
        args.arch, args.sizes, args.local, args.out_dim, args.batch = "vit_nano", (32, 16), 2, 64, 2
        args.steps, args.workers, args.images, args.rounds = 1, 0, 4, 1
    torch.manual_seed(0)
    bench.header(f"end to end, {args.arch}/{args.patch}, {args.precision}, {args.batch} images a step, "
                 f"{args.workers} workers", args.device)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(photos.write(Path(folder), args.images), args)
    bench.record(args, "end_to_end", variants=results)
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
