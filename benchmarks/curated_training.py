"""k-NN accuracy of DINO trained on a curated list, on random lists, and on lists made even by their labels.

    python benchmarks/long_tail.py --data_path imagenette128/train --output long_tail.txt
    python curate.py --pretrained_weights output/imagenette2_11/checkpoint.pth --crop_size 96 \\
        --data_path long_tail.txt --keep 1000 --output_dir output/curated_long_tail
    python benchmarks/curated_training.py --pile long_tail.txt --curated output/curated_long_tail/list.txt \\
        --eval_data_path imagenette128

A run of equal steps per list and seed. The other lists have the size of the curated one and are drawn from the pile by
the seed: at random, and with as many images of each class as of any other while the pile has them, which is as even as
a curated list could be. A call that was stopped goes on where it stopped. The k-NN bank is the training part of
--eval_data_path, the same for all runs.
"""

import collections
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import bench
import numpy as np

RECIPE = ("--arch vit_nano --patch_size 8 --global_crops_size 48 --local_crops_size 24 --local_crops_number 4 "
          "--global_crops_scale 0.25 1 --local_crops_scale 0.05 0.25 --out_dim 256 --use_bn_in_head true "
          "--drop_path_rate 0 --momentum_teacher 0.97 --lr 0.004 --warmup_teacher_temp 0.04 --teacher_temp 0.025 "
          "--warmup_teacher_temp_epochs 8 --batch_size_per_gpu 32 --warmup_epochs 3 --eval_knn_every 0 "
          "--saveckp_freq 0 --precision fp32").split()


def call(script: str, *flags: object) -> None:
    subprocess.run([sys.executable, str(bench.ROOT / script), *map(str, flags)], check=True)


def draw(pile: Path, size: int, seed: int, path: Path, even: bool) -> Path:
    """Write a list of `size` lines of the pile; with `even`, of all classes equally many while they last."""
    lines, seen = pile.read_bytes().splitlines(), collections.Counter()
    order = np.random.default_rng(seed).permutation(len(lines))
    if even:
        earlier = []  # images of the same class that come first
        for i in order:
            label = lines[i].split(b"\t")[-1]
            earlier.append(seen[label])
            seen[label] += 1
        order = order[np.argsort(earlier, kind="stable")]
    path.write_bytes(b"".join(lines[i] + b"\n" for i in np.sort(order[:size])))
    return path


def accuracy(images: Path, seed: int, folder: Path, args) -> dict:
    """Train and evaluate one run: {"value", "interval"} of 20-NN top-1 in %."""
    result, device = folder / "eval_knn.json", ("--device", args.device, "--num_workers", args.workers)
    if not result.exists():
        call("main_dino.py", *RECIPE, "--steps", args.steps, "--seed", seed, "--data_path", images, "--output_dir",
             folder, *device, *args.more)
        call("eval_knn.py", "--pretrained_weights", folder / "checkpoint.pth", "--data_path", args.eval_data_path,
             "--nb_knn", 20, "--output_dir", folder, *device)
    return json.loads(result.read_text())["results"][0]["top1"]


def main(args) -> int:
    bench.header(f"DINO on a curated list and on others of its size, {args.steps} steps of 32", args.device)
    out, size = Path(args.output_dir), len(Path(args.curated).read_bytes().splitlines())
    out.mkdir(parents=True, exist_ok=True)
    started, values = time.perf_counter(), {"curated": [], "random": [], "even": []}
    for seed in range(args.seeds):
        lists = {"curated": Path(args.curated),
                 **{name: draw(Path(args.pile), size, seed, out / f"{name}{seed}.txt", name == "even")
                    for name in ("random", "even")}}
        for name, images in lists.items():
            values[name].append(accuracy(images, seed, out / f"{name}{seed}", args)["value"])
            print(f"{name}, seed {seed}: {values[name][-1]:.1f} %", flush=True)
    rows = [[name, *map(float, v), statistics.mean(v), statistics.stdev(v) if len(v) > 1 else None]
            for name, v in values.items()]
    bench.table(("20-NN top-1 in %", *(f"seed {s}" for s in range(args.seeds)), "mean", "std"), rows)
    bench.record(args, "curated_training", images=size, accuracies=values, seconds=time.perf_counter() - started)
    return 0


def get_args_parser():
    parser = bench.parser(__doc__)
    add = parser.add_argument
    add("--pile", required=True, help="list that was curated")
    add("--curated", required=True, help="list.txt that curate.py wrote from it")
    add("--eval_data_path", required=True, help="labelled folder with train/ and val/")
    add("--output_dir", default="output/curated_training")
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=800)
    add("--workers", type=int, default=1)
    add("--more", nargs="*", default=[], help="further flags of main_dino.py, without dashes: arch=vit_tiny")
    return parser


if __name__ == "__main__":
    args = get_args_parser().parse_args()
    args.more = [word for pair in args.more for word in ("--" + pair.split("=")[0], *pair.split("=")[1:])]
    sys.exit(main(args))
