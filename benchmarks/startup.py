"""Start-up time: --help, a run of one step, and for comparison the import of torch.

    python benchmarks/startup.py
"""

import os
import subprocess
import sys
import tempfile

import bench

RUN = (
    "main_dino.py --arch vit_nano --patch_size 8 --data_path shapes:64x32 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --out_dim 64 --epochs 1 --warmup_epochs 0 --batch_size_per_gpu 8 --num_workers 1 --steps 1 "
    "--log_every 1 --saveckp_freq 0 --device {device} --output_dir"
).split()


def python(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=bench.ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(bench.ROOT)})
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}: {done.stderr.strip()}")


def one_step(device: str) -> None:
    """A whole run of one step: networks, loader with a worker, step, checkpoint, figures."""
    with tempfile.TemporaryDirectory() as folder:
        python(*(word.format(device=device) for word in RUN), folder)


def main(args) -> int:
    bench.header("start-up", args.device)
    variants = {
        "import torch": lambda: python("-c", "import torch"),
        "main_dino.py --help": lambda: python("main_dino.py", "--help"),
        "eval_knn.py --help": lambda: python("eval_knn.py", "--help"),
        "main_dino.py, one step, start to end": lambda: one_step(args.device),
    }
    if args.quick:
        variants, args.rounds = {name: variants[name] for name in ("main_dino.py --help",)}, 1
    summary = bench.summary(bench.in_turns(variants, args.rounds))
    bench.table(bench.TIMES[:3], [row[:3] for row in bench.time_rows(summary)])
    bench.record(args, "startup", variants=summary)
    return 0


def get_args_parser():
    return bench.parser(__doc__, rounds=3)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
