"""Checks and benchmarks for a GPU in one call: are the fast paths correct, and how fast are they?

    python benchmarks/on_gpu.py --json gpu.jsonl                 # everything
    python benchmarks/on_gpu.py --json gpu.jsonl --minutes 5     # the most telling measurements, in this order
    python benchmarks/on_gpu.py --quick --device cpu             # tiny sizes, to check that the script runs

Each section is a benchmark in a process of its own. --minutes also gives each section a time box: one that does not end
in it is stopped, what it has recorded so far stays, and the next one starts. Compiled code is kept on disk, so that a
later section, or another call, does not compile again. If the comparison with float64 fails, nothing else is run.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import bench
from variants import VARIANTS


class Section(NamedTuple):
    script: str
    flags: str  # --device, --quick and --json are passed on
    seconds: int  # its time box under --minutes


# The most telling ones first: the first four take five minutes. Sizes are those of docs/performance.md.
SECTIONS = (
    Section("parity", "", 90),
    Section("train_step", "--precision bf16 --batch 128 --rounds 6 --compile", 90),
    Section("train_step", "--precision bf16 --batch 128 --compile --profile", 60),
    Section("end_to_end", "--precision bf16 --arch vit_small --batch 128 --workers 16 --steps 20 --images 512 "
                          "--compile --rounds 1 --without_naive", 60),
    Section("train_step", "--precision bf16 --batch 128 --profile", 45),
    Section("patches", "--precision bf16 --batch 128", 30),
    *(Section("variants", f"--precision bf16 --batch 128 --rounds 6 --compile --only ours {shlex.quote(name)}", 120)
      for name in VARIANTS if name != "ours"),
    Section("train_step", "--precision bf16 --batch 256 --compile --arch resnet18 --sizes 160 80 --local 6 "
                          "--out_dim 2048", 60),
    Section("convolutions", "--precision bf16 --batch 256 --arch resnet18 --sizes 160 80", 45),
    Section("train_step", "--precision bf16 --batch 128 --rounds 20 --compile reduce-overhead", 120),
    Section("train_step", "--precision bf16 --batch 64 128 256 --rounds 20 --compile --grad_checkpointing", 300),
    Section("loss", "--precision bf16 --batch 128", 60),
    Section("prototypes", "", 30),
    Section("attention", "", 30),
    Section("convolutions", "--precision bf16 --batch 256", 60),
    Section("memory", "--precision bf16 --batch 32", 60),
    Section("data_pipeline", "--workers 1 4 8 16", 180),
    Section("end_to_end", "--precision bf16 --arch vit_small --batch 128 --workers 16 --steps 40 --images 512 "
                          "--compile", 300),
    Section("startup", "", 60),
)
SHORTEST = 15  # seconds that a section needs at least, to start


def run(section: Section, args, seconds: float | None) -> int | None:
    """The section's exit code, or None if it did not end within `seconds`."""
    flags = "--quick" if args.quick else section.flags
    command = [sys.executable, str(Path(__file__).with_name(f"{section.script}.py")), *shlex.split(flags),
               "--device", args.device, "--json", args.json]
    box = "" if seconds is None else f"   # at most {seconds:.0f} s"
    print(f"\n## python benchmarks/{section.script}.py {flags}{box}", flush=True)
    cache = os.path.join(tempfile.gettempdir(), f"compiled_{os.getuid()}")
    # A session of its own: its workers end with it.
    process = subprocess.Popen(command, env={"TORCHINDUCTOR_CACHE_DIR": cache} | os.environ, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(args) -> int:
    bench.header("on one device", args.device)
    start, failed = time.monotonic(), []
    # --quick leaves out their flags, so that a script's sections are alike.
    sections = list({section.script: section for section in SECTIONS}.values()) if args.quick else SECTIONS
    for number, section in enumerate(sections):
        seconds = None
        if args.minutes:
            left = 60 * args.minutes - (time.monotonic() - start)
            if left < SHORTEST:
                print(f"\n--minutes {args.minutes:g} are over; not run: "
                      + ", ".join(f"{s.script} {s.flags}".strip() for s in sections[number:]))
                break
            seconds = min(section.seconds, left)
        code = run(section, args, seconds)
        if code is None:
            print(f"stopped after {seconds:.0f} s")
        elif code:
            failed.append(section.script)
            print(f"{section.script} ended with exit code {code}")
            if section.script == "parity":
                break
    return 1 if failed else 0


def get_args_parser():
    parser = bench.parser(__doc__)
    parser.set_defaults(device="cuda")
    parser.add_argument("--minutes", type=float, default=0,
                        help="stop after so many minutes, with a time box for each section; 0: run everything")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
