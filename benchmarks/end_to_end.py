"""From JPEG files to optimizer steps: images/s, and the fraction of time that steps wait for data.

    python benchmarks/end_to_end.py --arch vit_tiny --batch 16 --workers 1                       # two CPU cores
    python benchmarks/end_to_end.py --device cuda --precision bf16 --arch vit_small --batch 128 --workers 16 \
        --steps 40 --compile

`ours` is loaders.batches, colour augmentation on the device, and the step of ours.py, with --compile also compiled;
`naive` is a DataLoader with the augmentation and the step of naive.py. They run in turns, each with its own loader,
whose queue is filled before timing starts. Each turn is printed and recorded when it is done, the compiled one last.
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
from train_step import PRECISIONS, trainer_options

from imagesets import loaders


def batches_of(name: str, paths: list[Path], args):
    """Endless batches on the device, in the form that the trainer's step takes."""
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
    """images/s over --steps steps, and the fraction of time spent waiting for batches."""
    batches = batches_of(name, paths, args)
    for _ in range(2):
        trainer.step(next(batches))
    bench.wait(args.device)
    waited, start = 0.0, time.perf_counter()
    for _ in range(args.steps):
        requested = time.perf_counter()
        crops = next(batches)
        waited += time.perf_counter() - requested
        trainer.step(crops)
    bench.wait(args.device)
    seconds = time.perf_counter() - start
    return {"images_per_s": args.steps * args.batch / seconds, "data_wait": waited / seconds}


def measure(paths: list[Path], args) -> dict:
    bench.start_anew(args.device)
    shared = trainer_options(args)
    trainers = {} if args.without_naive else {"naive": naive.Trainer(**shared)}
    trainers["ours"] = ours.Trainer(**shared, local=args.local)
    if args.compile:
        trainers["ours, compiled"] = ours.Trainer(**shared, local=args.local, compiled=args.compile)
    runs = {name: [] for name in trainers}
    for _ in range(args.rounds):
        for name, trainer in trainers.items():
            runs[name].append(run(name, trainer, paths, args))
            print("{}: {images_per_s:.4g} images/s, waits for data {data_wait:.0%}".format(name, **runs[name][-1]),
                  flush=True)
            bench.record(args, "end_to_end", variant=name, **runs[name][-1])
    rows, results = [], {}
    for name, rounds in runs.items():
        rates, waits = ([r[key] for r in rounds] for key in ("images_per_s", "data_wait"))
        first = next(iter(runs.values()))  # naive, where it takes part
        ratios = [a["images_per_s"] / b["images_per_s"] for a, b in zip(rounds, first, strict=True)]
        results[name] = {"images_per_s": statistics.median(rates), "rates": rates, "ratios": ratios,
                       "data_wait": statistics.median(waits)}
        rows.append([name, statistics.median(rates), f"{bench.shown(min(rates))} .. {bench.shown(max(rates))}",
                     f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})",
                     f"{statistics.median(waits):.0%}"])
    bench.table(["variant", "images/s", "range", "times as fast (range)", "waits for data"], rows)
    return results


def get_args_parser():
    parser = bench.step_parser(__doc__, naive.SIZES, "vit_tiny", (224, 96), rounds=3)
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per round")
    parser.add_argument("--workers", type=int, default=1, help="data-loading workers; give all cores of the machine")
    parser.add_argument("--images", type=int, default=64,
                        help="number of 500 x 375 JPEG files, generated in a temporary folder")
    parser.add_argument("--compile", nargs="?", const="default", default="", metavar="MODE",
                        help="also time ours with networks and colour augmentation under torch.compile")
    parser.add_argument("--without_naive", action="store_true",
                        help="leave out the naive implementation, whose loader takes most of the time; ratios are then "
                             "relative to `ours`")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32")
    return parser


def main(args) -> int:
    if args.quick:
        args.arch, args.sizes, args.local, args.out_dim, args.batch = "vit_nano", (32, 16), 2, 64, 2
        args.steps, args.workers, args.images, args.rounds = 1, 0, 4, 1
    torch.manual_seed(0)
    bench.header(f"end to end, {args.arch}/{args.patch}, {args.precision}, {args.batch} images per step, "
                 f"{args.workers} workers", args.device)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(photos.write(Path(folder), args.images), args)
    bench.record(args, "end_to_end", variants=results)
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
