"""Accuracy against time of runs that do less work: crops of low resolution first, dropped patches, fewer epochs.

    python benchmarks/less_work.py --seeds 0 1 2                                       # drawn images, main_dino.py
    python benchmarks/less_work.py --preset imagenette --flags "--data_path imagenette128/train" --eval imagenette128
    python benchmarks/less_work.py --preset imagenet_vits16_100ep --flags "--batch_size_per_gpu 128" --low 112 48 \
        --step_only --device cuda                                                      # minutes, on a GPU

--step_only times a step of main_dino.py on fixed tensors for each size and share of dropped patches, in turns, instead
of training; on a GPU compiled, as in a long run, unless --flags has --compile off. Without it every variant is a whole
run of the preset with a few more flags, for each seed, and time is that of the run without its evaluation: CPU time,
which doesn't depend on the load by other processes, or seconds on a GPU. Arithmetic is that of the backbones
(model.py), the student's three times, as its backward pass costs twice the forward pass; --count prints it without a
run. Accuracy is that of 20-NN on the teacher's features at the full size, as during training. With --json each run is
recorded when it is done, and a later call with the same flags and file leaves it out.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench
import model
import ours
import torch

import main_dino
import main_dinov2
from imagesets.decode import Reading
from parallel import Refused, pick_device
from pretraining import compiling, networks, options
from pretraining.evaluation import open_evaluation
from vision_transformer import VITS, build_backbone
from weights import checkpoints
from weights.backbones import load_backbone

SCRIPTS = {"main_dino.py": main_dino, "main_dinov2.py": main_dinov2}
DROP = {"main_dino.py": 0.5, "main_dinov2.py": 0.4}  # masked patches, up to half of all, are not dropped


def variants(args) -> dict[str, str]:
    """{name: flags}; the last one is a plain run that takes about as long as the shorter ones before it."""
    low = f"--low_resolution_epochs 0.75 --low_resolution_sizes {args.low[0]} {args.low[1]}"
    drop = f"--token_drop {args.drop} 0"
    return {"plain": "", "low resolution first": low, "patches dropped": drop, "both": f"{low} {drop}",
            "plain, fewer epochs": f"--epochs {args.fewer}"}


def parsed(name: str, flags: str, args) -> argparse.Namespace:
    """The training script's flags of a variant, checked as the script does."""
    script = SCRIPTS[args.script]
    given = script.get_args_parser().parse_args(shlex.split(f"@presets/{args.preset}.txt {args.flags} {flags}"))
    try:
        if given.arch not in VITS:
            raise Refused(f"--arch {given.arch}: the arithmetic is counted for ViTs; choose one of {', '.join(VITS)}")
        if args.count or args.step_only:
            given.data_path = given.data_path or "shapes:8x64"  # no image is read
        script.check_args(given)
        script.make_plan(given, options.images_per_step(given))
    except Refused as error:
        raise SystemExit(f"--script {args.script}, variant {name!r} ({flags}): {error}") from error
    return given


def flop_per_image(script, args, low: tuple[int, int]) -> float:
    """Mean over the run's epochs of the backbones' FLOPs per image: the teacher's once, the student's three times."""
    plan = script.make_plan(args, args.batch_size_per_gpu * args.grad_accum_steps)
    all_tokens, total, full = script is main_dinov2, 0, (args.global_crops_size, args.local_crops_size)
    with torch.device("meta"):
        backbone, width = build_backbone(args.arch, args.patch_size)
    shape = model.Shape(width, backbone.n_blocks, args.patch_size, full, args.local_crops_number, args.out_dim)
    for epoch in range(plan.epochs):
        size, local_size = low if epoch < plan.early_epochs else full
        dropped = plan.token_drop[epoch] if plan.token_drop else 0.0
        student = (2 * shape.backbone_flop(size, all_tokens, dropped)
                   + args.local_crops_number * shape.backbone_flop(local_size, all_tokens))
        total += 2 * shape.backbone_flop(size, all_tokens) + 3 * student
    return total / plan.epochs


def count(args) -> dict[str, dict]:
    """The arithmetic of each variant by its flags, without a run."""
    script, results = SCRIPTS[args.script], {}
    for name, flags in variants(args).items():
        given = parsed(name, flags, args)
        results[name] = {"epochs": given.epochs, "flop": flop_per_image(script, given, options.early_sizes(given))}
    plain = results["plain"]
    bench.table(["variant", "epochs", "GFLOP per image", "of the plain run's arithmetic"], [
        [name, row["epochs"], row["flop"] / 1e9,
         f"{row['flop'] * row['epochs'] / plain['flop'] / plain['epochs']:.0%}"] for name, row in results.items()])
    return results


def run(script, flags: list[str], device: str, evaluated: str) -> dict[str, float]:
    """One run in this process, and its accuracy."""
    args = script.get_args_parser().parse_args(flags)
    clock = bench.cpu_seconds if device == "cpu" else time.perf_counter
    started = clock()
    if code := script.main(args):
        raise SystemExit(f"the run ended with code {code}: {shlex.join(flags)}")
    seconds = clock() - started
    backbone, _ = load_backbone(f"{args.output_dir}/checkpoint.pth")
    evaluation = open_evaluation(
        evaluated or args.data_path, "--eval", Reading(args.in_chans, args.max_pixels, args.value_range),
        args.global_crops_size, args.mean, args.std, 4 * args.batch_size_per_gpu, 0, pick_device(device))
    top1, _ = evaluation.knn(backbone.to(pick_device(device)))
    steps = checkpoints.read(f"{args.output_dir}/checkpoint.pth")["step"]
    return {"seconds": seconds, "top1": top1, "steps": steps,
            "flop": steps * args.batch_size_per_gpu * flop_per_image(script, args, options.early_sizes(args))}


def time_steps(args) -> dict[str, dict]:
    """A step on fixed tensors at each size and share of dropped patches, in turns."""
    given, device = parsed("plain", "", args), pick_device(args.device)
    dtype = networks.half_precision(given.precision, given.use_fp16, device)
    # What --compile does in a run that is long enough.
    setting, _ = compiling.decided(given.compile, None, device.type, given.arch, given.parallel == "fsdp",
                                   flop=lambda: math.inf)
    trainer = ours.Trainer(given.arch, given.patch_size, given.global_crops_size, given.out_dim, args.device, dtype,
                           given.local_crops_number, compiled=compiling.mode(setting) or "")
    full, batch = (given.global_crops_size, given.local_crops_size), given.batch_size_per_gpu

    def step(sizes: tuple[int, int], dropped: float):
        n = (sizes[0] // given.patch_size) ** 2
        kept = torch.stack([torch.randperm(n)[: n - int(n * dropped)].sort().values for _ in range(2 * batch)])
        crops = [torch.randn(count * batch, 3, size, size, device=args.device)
                 for count, size in zip((2, given.local_crops_number), sizes, strict=True) if count]
        return lambda: trainer.step(crops, kept=kept if dropped else None)

    shares = [args.drop * part / 3 for part in (3, 2, 1)]
    steps = {f"{sizes[0]} and {sizes[1]} pixels": step(sizes, 0) for sizes in (full, tuple(args.low))}
    steps |= {f"{full[0]} and {full[1]} pixels, {share:.0%} dropped": step(full, share) for share in shares}
    clock = bench.cpu_seconds if args.device == "cpu" else time.perf_counter
    summary = bench.summary(bench.in_turns(steps, args.rounds, args.device, clock), next(iter(steps)), batch)
    print(f"{given.arch}/{given.patch_size}, {batch} images per step; ms per image")
    bench.table(bench.TIMES, bench.time_rows(summary))
    return summary


def get_args_parser():
    parser = bench.parser(__doc__)
    parser.add_argument("--script", default="main_dino.py", choices=sorted(SCRIPTS))
    parser.add_argument("--preset", default="shapes", help="name of a file in presets/")
    parser.add_argument("--flags", default="", help="further flags of all runs, in quotes")
    parser.add_argument("--eval", default="", help="labelled images with train and val parts; empty: --data_path")
    parser.add_argument("--low", type=int, nargs=2, default=(32, 16), help="sides of the small crops in pixels")
    parser.add_argument("--drop", type=float,
                        help="share of patches dropped at the start; default: 0.5, with main_dinov2.py 0.4")
    parser.add_argument("--fewer", type=int, default=5, help="epochs of the shorter plain run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=0,
                        help="data-loading workers; on a CPU 0, so that their time is counted")
    parser.add_argument("--count", action="store_true", help="only count the arithmetic")
    parser.add_argument("--step_only", action="store_true", help="time steps on fixed tensors instead of whole runs")
    parser.add_argument("--only", nargs="+", default=[], help="names of the variants to run")
    return parser


def recorded(args) -> dict[tuple[str, int], dict]:
    """{(variant, seed): figures} of the runs with these flags that the file of --json already has."""
    if not args.json or not Path(args.json).exists():
        return {}

    def same(flags: dict) -> dict:
        return {k: v for k, v in json.loads(json.dumps(flags)).items() if k not in ("seeds", "only", "rounds", "json")}

    lines = [json.loads(line) for line in Path(args.json).read_text().splitlines()]
    return {(line["variant"], line["seed"]): line["figures"] for line in lines
            if line["benchmark"] == "less_work" and "variant" in line and same(line["flags"]) == same(vars(args))}


def main(args) -> int:
    if args.quick:
        args.only, args.rounds = args.only or ["plain", "both"], 1
        args.flags, args.seeds, args.fewer, args.low = (
            "--data_path shapes:64x32 --epochs 4 --warmup_epochs 1 --global_crops_size 32 --local_crops_size 16 "
            "--local_crops_number 1 --batch_size_per_gpu 16"), [0], 2, (16, 8)
    args.drop = DROP[args.script] if args.drop is None else args.drop
    bench.header(f"less work: {args.script} @presets/{args.preset}.txt {args.flags}", args.device)
    if args.count:
        bench.record(args, "less_work", variants=count(args))
        return 0
    if args.step_only and args.script != "main_dino.py":
        raise SystemExit(f"--step_only --script {args.script}: the step is main_dino.py's; leave --script out")
    if args.step_only:
        bench.record(args, "less_work", steps=time_steps(args))
        return 0
    chosen = {name: flags for name, flags in variants(args).items() if not args.only or name in args.only}
    for name, flags in chosen.items():  # before the first run
        parsed(name, flags, args)
    results, done = {name: [] for name in chosen}, recorded(args)
    for seed in args.seeds:
        for name, flags in chosen.items():
            if (row := done.get((name, seed))) is None:
                with tempfile.TemporaryDirectory() as folder:
                    words = shlex.split(
                        f"@presets/{args.preset}.txt {args.flags} {flags} --eval_knn_every 0 --device {args.device} "
                        f"--num_workers {args.workers} --seed {seed} --output_dir") + [str(Path(folder, "run"))]
                    row = run(SCRIPTS[args.script], words, args.device, args.eval)
                bench.record(args, "less_work", variant=name, seed=seed, figures=row)
            results[name].append(row)
            print(f"seed {seed}, {name}: {row}", flush=True)
    bench.table(["variant", "steps", "arithmetic", "time", "s", "20-NN %", "by seed"], [
        [name, rows[0]["steps"], *relative(rows, results), statistics.median(r["seconds"] for r in rows),
         statistics.mean(r["top1"] for r in rows), ", ".join(f"{r['top1']:.1f}" for r in rows)]
        for name, rows in results.items()])
    return 0


def relative(rows: list[dict], results: dict[str, list[dict]]) -> list[str]:
    """Arithmetic and time as shares of those of the first variant, which is the plain run."""
    first = next(iter(results.values()))
    return [f"{statistics.median(r[key] for r in rows) / statistics.median(r[key] for r in first):.0%}"
            for key in ("flop", "seconds")]


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
