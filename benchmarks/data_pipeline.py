"""From a JPEG file to ten crops: milliseconds per image on one core, stage by stage, and images/s by workers.

    python benchmarks/data_pipeline.py                        # 500 x 375 pixels, 2 x 224 + 8 x 96
    python benchmarks/data_pipeline.py --workers 1 2 4 8 16
    python benchmarks/data_pipeline.py --width 4000 --height 3000 --images 4 --workers     # photographs of a phone

Ours splits the work: a worker decodes, crops and resizes, and the device does colours and blur for the whole batch.
naive.py does everything in the worker, image by image with Pillow. Milliseconds are processor time, on which other
processes of the machine have little effect; on a GPU (--device cuda) those of colours are wall-clock, as are images/s.
"""

import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench
import naive
import numpy as np
import photos
import torch
from PIL import Image

import utils
from imagesets import decode, loaders, sources

COLOURS = ("ours: colours, blur, normalize", "ours: the same, compiled")  # the stages of the device


def stages(paths: list[Path], args) -> dict:
    """{stage: function that runs it for all images}; the stages before `colours` are the worker's."""
    aug = augmentation(args)
    decoded = [decode.decode(path, reduction=aug.reduction) for path in paths]
    items = [(*aug.cut(x, np.random.default_rng(i)), i, []) for i, x in enumerate(decoded)]
    batch = loaders.collate(items)
    crops, compiled = [c.to(args.device) for c in batch["crops"]], copy.copy(aug)
    compiled.compiled = not args.quick  # compiling takes a minute
    images = [Image.open(path).convert("RGB") for path in paths]
    options = {"local": args.local, "sizes": tuple(args.sizes)}
    return {
        "ours: read, decode": lambda: [decode.decode(path, reduction=aug.reduction) for path in paths],
        "ours: read, decode at full size": lambda: [decode.decode(path) for path in paths],
        "ours: the same by Pillow alone": lambda: [decode.from_pil(Image.open(path)) for path in paths],
        "ours: draw the views": lambda: [draw(aug, x, i) for i, x in enumerate(decoded)],
        "ours: draw, cut, resize, flip": lambda: [aug.cut(x, np.random.default_rng(i)) for i, x in enumerate(decoded)],
        "ours: the same, crops channels first": lambda: [draw(aug, x, i, True) for i, x in enumerate(decoded)],
        "ours: collate": lambda: loaders.collate(items),
        "ours: worker, all of it": lambda: loaders.collate([
            (*aug.cut(decode.decode(path, reduction=aug.reduction), np.random.default_rng(i)), i, [])
            for i, path in enumerate(paths)]),
        "ours: the same with --cache_images": lambda: loaders.collate([
            (*aug.cut(x, np.random.default_rng(i)), i, []) for i, x in enumerate(decoded)]),
        COLOURS[0]: lambda: aug.finish(crops, batch["params"]),
        COLOURS[1]: lambda: compiled.finish(crops, batch["params"]),
        "naive: read, decode": lambda: [Image.open(path).convert("RGB") for path in paths],
        "naive: ten crops with colours": lambda: [naive.augment(image, **options) for image in images],
        "naive: worker, all of it": lambda: [naive.augment(Image.open(p).convert("RGB"), **options) for p in paths],
    }


def draw(aug: utils.DataAugmentationDINO, image: torch.Tensor, seed: int, resize: bool = False) -> None:
    """Draw what `cut` draws; with `resize` also crop and resize in the image's memory, which puts channels first."""
    rng = np.random.default_rng(seed)
    for view, (scale, size) in enumerate(zip(aug.scales, aug.sizes, strict=True)):
        top, left, height, width = utils.random_resized_crop_box(*image.shape[-2:], scale, rng)
        flip = rng.random() < 0.5
        if resize:
            crop = image[None, :, top : top + height, left : left + width]
            crop = torch.nn.functional.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)
            crop.flip(-1) if flip else crop  # timed, not used
        aug.draw_photometric(view, rng)


def augmentation(args) -> utils.DataAugmentationDINO:
    return utils.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), args.local, *args.sizes)


def by_stage(paths: list[Path], args) -> dict:
    functions = stages(paths, args)
    on_device = {name: functions.pop(name) for name in COLOURS} if args.device.startswith("cuda") else {}
    times = bench.in_turns(functions, args.rounds, clock=bench.cpu_seconds)
    results = bench.summary(times, "naive: worker, all of it", per=len(paths))
    results |= bench.summary(bench.in_turns(on_device, args.rounds, args.device), per=len(paths))
    print(f"\nms of one core per image; {len(paths)} files of {args.width} x {args.height}, "
          f"{np.mean([p.stat().st_size for p in paths]) / 1e3:.0f} kB; views 2 x {args.sizes[0]} + "
          f"{args.local} x {args.sizes[1]}")
    rows = bench.time_rows(results)
    bench.table(bench.TIMES, [row if "all of it" in row[0] else [*row[:3], None] for row in rows])
    return results


def loader(name: str, paths: list[Path], workers: int, args):
    """An endless loader of batches."""
    if name != "naive":
        opened = sources.open_images(str(paths[0].parent), None)
        return loaders.batches(opened, augmentation(args), args.batch, workers, 0,
                               pin_memory=args.device.startswith("cuda"))
    images = naive.ImageFiles(paths, local=args.local, sizes=tuple(args.sizes))
    forever = torch.utils.data.RandomSampler(paths, replacement=True, num_samples=10**9)
    return torch.utils.data.DataLoader(images, args.batch, sampler=forever, num_workers=workers,
                                       prefetch_factor=4 if workers else None)


def rate(name: str, paths: list[Path], workers: int, args) -> float:
    """images/s (wall-clock) of a loader; its first batches, which fill its queue, are not counted."""
    batches = 1 if args.quick else 4 * max(1, workers)
    iterator = iter(loader(name, paths, workers, args))
    for _ in range(batches):
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return batches * args.batch / (time.perf_counter() - start)


def by_workers(paths: list[Path], args) -> list[dict]:
    """Median of three turns. Only one loader exists at a time, because an idle one would load ahead."""
    results = []
    for workers in args.workers:
        rates = {"naive": [], "ours": []}
        for _ in range(1 if args.quick else 3):
            for name, turns in rates.items():
                turns.append(rate(name, paths, workers, args))
        results.append({"workers": workers} | {name: statistics.median(turns) for name, turns in rates.items()})
    print("\nimages/s (wall-clock)")
    bench.table(["workers", "naive", "ours", "ratio"],
                [[r["workers"], r["naive"], r["ours"], r["ours"] / r["naive"]] for r in results])
    return results


def get_args_parser():
    parser = bench.parser(__doc__)
    parser.add_argument("--images", type=int, default=24, help="files, drawn and written into a temporary folder")
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--sizes", type=int, nargs=2, default=(224, 96), help="pixels of global and local crops")
    parser.add_argument("--local", type=int, default=8, help="local crops")
    parser.add_argument("--batch", type=int, default=16, help="images per batch of the loaders")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of workers to try")
    return parser


def main(args) -> int:
    if args.quick:
        args.images, args.width, args.height, args.sizes, args.local = 4, 64, 48, (32, 16), 2
        args.batch, args.workers, args.rounds = 2, [0], 1
    torch.set_num_threads(1)
    bench.header("data pipeline", args.device)
    with tempfile.TemporaryDirectory() as folder:
        paths = photos.write(Path(folder), args.images, args.width, args.height)
        results = by_stage(paths, args)
        rates = by_workers(paths, args)
    bench.record(args, "data_pipeline", stages=results, rates=rates)
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
