"""Whether a run's networks and colour operations are compiled, and where the compiled code is kept."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

import parallel
from imagesets import listing
from pretraining import networks
from pretraining.logs import installed
from vision_transformer import VITS
from weights import checkpoints

MODES = ("default", "reduce-overhead", "max-autotune")  # of torch.compile
WORDS = {"on": "default", "true": "default", "1": "default", "yes": "default",
         "off": "off", "false": "off", "0": "off", "no": "off", "none": "off"}
# FLOPs of a process's run from which on compiling pays. Measured (docs/performance.md): it takes ViTs two minutes, and
# a step of ViT-S with 128 images, 1.44e13 FLOP, is 37 ms shorter, which pays after 3,300 steps; it takes ResNets half a
# minute, and a step of ResNet-18 with 256 images, 0.6e13 FLOP, is 15 ms shorter, which pays after 2,000 steps. Smaller
# steps save less, in proportion. These are 1.5 times as many steps.
ENOUGH = {"vit": 7.1e16, "resnet": 1.8e16}


def setting(text: str) -> str:
    """A `type` for argparse: auto, off, or a mode of torch.compile."""
    value = WORDS.get(text.lower(), text)
    if value not in ("auto", "off", *MODES):
        raise argparse.ArgumentTypeError(f"{text!r} is not known; give auto, on, off, {MODES[1]} or {MODES[2]}")
    return value


def mode(setting: str | None) -> str | None:
    """The mode of torch.compile that a decided setting stands for; None: nothing is compiled."""
    return setting if setting in MODES else None


def flop(
    arch: str, patch_size: int, in_chans: int, sizes: tuple[int, int], local_crops_number: int, images: int, steps: int
) -> float:
    """FLOPs of the backbones in the steps of a process: forward and backward of all crops, which costs three times the
    forward pass, and the teacher's forward pass of the global ones.

    Args:
        sizes: sides of global and local crops.
        images: of the process in a step.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton; only long runs on a GPU need it

    passes = []
    with torch.device("meta"), torch.no_grad():
        backbone, _ = networks.make_backbone(arch, patch_size, in_chans, sizes[0])
        for size in sizes[: 2 if local_crops_number else 1]:
            with FlopCounterMode(display=False) as counter:
                backbone.eval()(torch.empty(1, in_chans, size, size))
            passes.append(counter.get_total_flops())
    return float(steps) * images * (2 * passes[0] + 3 * (2 * passes[0] + local_crops_number * passes[-1]))


def decided(
    setting: str, stored: str | None, device: str, arch: str, sharded: bool, flop: Callable[[], float],
    triton: bool = True,
) -> tuple[str, str]:
    """(`off` or a mode, why) for the flag --compile; why is empty where the flag itself says it.

    Args:
        stored: what an earlier part of the run decided; None: there is none.
        device: cpu, cuda or mps.
        flop: counts the arithmetic of the whole run on a process.
        triton: whether torch.compile can make kernels for a GPU here.
    """
    if setting != "auto":
        return setting, ""
    if device != "cuda":
        return "off", ""  # no gain was measured on CPUs
    if stored is not None and not (stored != "off" and sharded):
        return stored, f"--compile {'on' if stored == 'default' else stored}, as this run was started"
    if sharded or arch not in VITS and not arch.startswith("resnet"):
        reason = "--parallel fsdp" if sharded else f"--arch {arch}, whose compiled steps were not measured"
        return "off", f"--compile off, because of {reason}"
    if not triton:
        return "off", "--compile off, as triton is not installed; pip install triton makes long runs faster"
    total, enough = flop(), ENOUGH["vit" if arch in VITS else "resnet"]
    if total < enough:
        return "off", (f"--compile off, as the {total:.1e} FLOP of the run are too few to pay for compiling, "
                       f"{enough:.1e}; --compile on compiles anyway")
    return "default", (f"--compile on: the first steps take minutes, each later one less; {total:.1e} FLOP of the run "
                       "pay for it")


def decide(
    setting: str, folder: str | os.PathLike, device: torch.device, arch: str, sharded: bool, flop: Callable[[], float]
) -> str:
    """`decided` for a run in this folder, said in a line; the same on all processes."""
    stored = None
    if setting == "auto" and device.type == "cuda" and (latest := checkpoints.read_latest(folder)):
        stored = latest[0].get("args", {}).get("compile") or "off"  # older runs stored None
        stored = None if stored == "auto" else stored
    value, why = decided(setting, stored, device.type, arch, sharded, flop, installed("triton"))
    value = parallel.gather_objects(value)[0]
    if why:
        parallel.say(why)
    if mode(value):
        prepare()
    return value


def prepare() -> None:
    """What a run does before it compiles anything."""
    keep_on_disk()
    start_workers()


def start_workers() -> None:
    """Start torch's compile workers so that they ignore the signals that ask a run to save and stop.

    Slurm sends these to every process of a run. They would end the workers, and the run would wait for code that never
    comes instead of saving.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}  # is inherited
    try:
        from torch._inductor.async_compile import AsyncCompile  # may start them

        AsyncCompile.warm_pool()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_on_disk() -> None:
    """Let torch keep compiled code between runs, in the project's cache, unless the user has named a folder."""
    if folder := listing.cache_dir():
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(folder) / "compiled"))
