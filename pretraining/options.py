"""Flags that the pretraining scripts share, what they describe, and checks of what no single flag's type can see."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

import flags
import parallel
import utils
from imagesets import loaders
from imagesets.cached import cached
from imagesets.decode import Reading
from imagesets.pixels import Pixels
from imagesets.sources import open_images
from method import masking
from parallel import Refused
from pretraining import compiling, networks
from pretraining.evaluation import open_evaluation
from pretraining.health import FEWEST_ROWS
from pretraining.logs import installed
from pretraining.plan import Plan
from pretraining.session import Ends
from pretraining.state import Run
from vision_transformer import VITS
from weights.checkpoints import refusing
from weights.layouts import check_file


def add_init_flags(add: Callable) -> None:
    """Weights to start from, for the group `network`."""
    add("--init_from", default="",
        help="start from the backbone in this file, such as published weights; not needed to resume a run")
    add("--init_in_chans", choices=("mean", "tile"), default="",
        help="with --init_from, for weights of other channels than --in_chans: average the first layer over its "
             "channels, or repeat them; prefer mean. A heuristic: train for long enough to adapt it")


def add_length_flags(add: Callable) -> None:
    """Batch size and length of a run, for the group `optimization`."""
    add("--batch_size_per_gpu", type=flags.positive_int, default=64, help="images per process and micro-batch")
    add("--grad_accum_steps", type=flags.positive_int, default=1,
        help="micro-batches per optimizer step, for larger steps than fit the memory")
    add("--epochs", type=flags.positive_int, default=100, help="passes over the images")
    add("--steps", type=flags.count, default=0, help="length of the run in optimizer steps; 0: --epochs counts")
    add("--use_fp16", type=flags.boolean, default=True,
        help="half precision where the device has it; false is float32, for when the loss becomes NaN")


def add_crop_flags(
    parser: argparse.ArgumentParser, global_scale: tuple[float, float], local_scale: tuple[float, float]
) -> Callable:
    """Multi-crop views. Returns the group's `add_argument`, for further flags."""
    add = parser.add_argument_group("crops").add_argument
    add("--global_crops_scale", type=flags.fraction, nargs=2, default=global_scale, metavar=("LOW", "HIGH"),
        help="share of the image's area in a global crop; without local crops use a wider range, such as 0.14 1")
    add("--local_crops_scale", type=flags.fraction, nargs=2, default=local_scale, metavar=("LOW", "HIGH"),
        help="share of the image's area in a local crop")
    add("--local_crops_number", type=flags.number(int, 0, 1000), default=8,
        help="local crops per image; more cost time and memory, 0 trains on the two global crops")
    add("--global_crops_size", type=flags.positive_int, default=224, help="side of the global crops in pixels")
    add("--local_crops_size", type=flags.positive_int, default=96, help="side of the local crops in pixels")
    add("--low_resolution_epochs", type=flags.fraction, default=0.0,
        help="share of the epochs, the first ones, on crops of --low_resolution_sizes, for less time per image; 0.75 "
             "in FastDINOv2 (arXiv 2507.03779). Evaluation uses the full size")
    add("--low_resolution_sizes", type=flags.positive_int, nargs=2, metavar=("GLOBAL", "LOCAL"),
        help="sides of the crops in these epochs, multiples of a ViT's --patch_size; without it, half of the full ones")
    add("--noise_patches", type=flags.fraction, default=0.0,
        help="share of the crops of full size with Gaussian noise in a square; for robustness after "
             "--low_resolution_epochs")
    add("--token_drop", type=flags.number(float, 0, 0.9), nargs=2, metavar=("START", "END"),
        help="share of the patches that are dropped, at random, from the student's global crops, at the start and at "
             "the end of the run, in four steps: less time and memory per image (arXiv 2410.22364), for ViTs")
    add("--mean", type=flags.fraction, nargs="+", default=utils.IMAGENET_MEAN,
        help="mean of each channel, of intensities in [0, 1]; ImageNet's by default")
    add("--std", type=flags.number(float, 0, 1, above=True), nargs="+", default=utils.IMAGENET_STD,
        help="standard deviation of each channel")
    add("--in_chans", type=flags.positive_int, default=3,
        help="channels of the images; other than 3 needs --mean and --std of as many values")
    return add


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data_path", default="",
        help="folder of images, with or without class folders; a .txt or .csv list; a .zip; shards-{000..099}.tar; "
             ".parquet files; hf:FOLDER; torchvision:CIFAR10; shapes or scenes[:COUNT[xPIXELS]], drawn images "
             "(docs/data.md)")
    flags.add_reading_flags(group)
    add("--cache_images", action="store_true",
        help="decode every image once and keep it in memory, which all processes of a host share: for small data sets, "
             "and where decoding limits the speed. Crops are the same, bit for bit")
    add("--crop_on_device", action="store_true",
        help="with --cache_images: copy the images to the GPU and cut the crops there, where the workers' cutting "
             "limits the speed. Crops are the same up to rounding; all images must fit the GPU at the largest one's "
             "size")
    add("--max_bad_images", type=flags.fraction, default=0.01,
        help="share of undecodable files, rounded up to whole files, above which the run stops")
    add("--eval_knn_every", type=flags.count, default=0,
        help="epochs between k-NN evaluations on labelled images; 0: never")
    add("--eval_data_path", default="", help="labelled images with train and val (or test) parts; empty: --data_path")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default=".",
        help="folder for checkpoints and logs; a run that finds its own checkpoint there resumes")
    add("--extend", action="store_true",
        help="continue the run in --output_dir with a larger --epochs or --steps, or on more images: weights, "
             "optimizer and centre are kept, the schedules from here on are those of the longer run")
    add("--saveckp_freq", type=flags.count, default=20, help="epochs between checkpoints that are kept; 0: none")
    add("--saveckp_every_steps", type=flags.count, default=0,
        help="steps between checkpoints to resume from, for long epochs; 0: at the end of epochs only")
    add("--saveckp_every_minutes", type=flags.non_negative, default=0,
        help="minutes between checkpoints to resume from; 0: never")
    add("--keep_checkpoints", type=flags.count, default=0,
        help="keep only so many of the newest checkpoints of --saveckp_freq; 0: all")
    add("--log_every", type=flags.positive_int, default=10, help="steps between progress lines and health checks")
    add("--pictures_every", type=flags.count, default=0,
        help="epochs between figures of the teacher's attention and patch tokens (PCA) on six fixed images; 0: never")
    add("--tensorboard", action="store_true", help="write scalars and figures for TensorBoard into --output_dir")
    add("--wandb", action="store_true",
        help="send scalars and figures to Weights & Biases; WANDB_PROJECT and WANDB_MODE are read")
    add("--replay", default="", metavar="FAILURE",
        help="compute the step in a failure.pt, which a loss of NaN leaves, again with a look inside, and exit")
    add("--seed", type=flags.seed, default=0, help="of the weights, the order of images and their views")


# {default of --compile: (its choices, what they do)}
COMPILE = {
    "auto": ("auto|on|off|reduce-overhead|max-autotune",
             "torch.compile networks and colour operations: faster steps after minutes of compiling. auto: on for our "
             "ViTs and ResNets on a CUDA GPU, in runs whose arithmetic pays for compiling (5,000 steps of ViT-S with "
             "128 images); reduce-overhead uses CUDA graphs, for small networks"),
    "off": ("on|off", "on: torch.compile the backbones and colour operations, with minutes of compiling before the "
                      "first steps; the gain was not measured, so compare both on your GPU"),
}


def add_hardware_flags(parser: argparse.ArgumentParser, compile: str = "auto") -> None:
    """Args: compile: default of --compile, in COMPILE."""
    group = parser.add_argument_group("hardware")
    add = group.add_argument
    flags.add_precision_flags(group)
    add("--parallel", choices=("ddp", "fsdp"), default="ddp",
        help="with several processes: each holds the networks (ddp), or its part of them (fsdp) for networks that do "
             "not fit one GPU")
    choices, what = COMPILE[compile]
    add("--compile", nargs="?", const="default", default=compile, type=compiling.setting, metavar=choices, help=what)
    add("--grad_checkpointing", nargs="?", const="blocks", choices=("blocks", "layers"),
        help="keep less memory for the backward pass and recompute it, so that larger batches fit: whole blocks for a "
             "fifth of the time, or layers (norms and GELU, a third of the memory) for a few percent")
    flags.add_launch_flags(group)


# ---- What the flags describe ----


def images_per_step(args: argparse.Namespace) -> int:
    """Images of an optimizer step, over all processes."""
    return args.batch_size_per_gpu * args.grad_accum_steps * parallel.world_size()


def augmentation(args: argparse.Namespace, *blur: Sequence[float]) -> utils.DataAugmentationDINO:
    """`blur`: DataAugmentationDINO's, if another one than DINO's."""
    return utils.DataAugmentationDINO(
        args.global_crops_scale, args.local_crops_scale, args.local_crops_number, args.global_crops_size,
        args.local_crops_size, args.mean, args.std, bool(compiling.mode(args.compile)), *blur,
        noise=args.noise_patches)


def crop_sizes(args: argparse.Namespace) -> dict[str, int]:
    """{flag: side in pixels} of the crops that there are."""
    local = {"local_crops_size": args.local_crops_size} if args.local_crops_number else {}
    return {"global_crops_size": args.global_crops_size} | local


def early_sizes(args: argparse.Namespace) -> tuple[int, int]:
    """Sides of global and local crops in the epochs of low resolution."""
    return tuple(args.low_resolution_sizes or (args.global_crops_size // 2, args.local_crops_size // 2))


def by_epoch(args: argparse.Namespace, plan: Plan, full: utils.DataAugmentationDINO) -> dict[str, Any]:
    """What changes between epochs, for `loaders.steps`: small crops in the first ones, and patches that are kept."""
    early = early_sizes(args)
    counts = plan.patch_counts(*((side // args.patch_size) ** 2 for side in (args.global_crops_size, early[0])))
    return {"early": loaders.Early(plan.early_epochs, full.resized(*early)),
            "kept": partial(masking.kept_patches, seed=args.seed, counts=counts) if counts else None}


def open_data(args: argparse.Namespace, device: torch.device) -> Ends:
    """The images to train on and those of the k-NN evaluation, with what is done with them at the ends of epochs.

    Raises:
        Refused: there are no such images.
    """
    reading, evaluation = Reading(args.in_chans, args.max_pixels, args.value_range), None
    images = open_images(args.data_path, None, **reading.decoding())
    if args.eval_knn_every:
        flag = "eval_data_path" if args.eval_data_path else "data_path"
        evaluation = open_evaluation(
            getattr(args, flag), f"--{flag}", reading, args.global_crops_size, args.mean, args.std,
            4 * args.batch_size_per_gpu, args.num_workers, device)
    return Ends(images, evaluation, args.eval_knn_every, args.saveckp_freq, args.pictures_every,
                args.global_crops_size, args.mean, args.std)


def in_memory(args: argparse.Namespace, ends: Ends, device: torch.device) -> Ends:
    """With --cache_images, the same with decoded images for the loader to read; with --crop_on_device, also there."""
    if not args.cache_images:
        return ends
    source = cached(ends.images, augmentation(args).reduction, args.num_workers)
    return ends._replace(source=source,
                         pixels=Pixels(source.images_in_memory(), device) if args.crop_on_device else None)


def description(args: argparse.Namespace, run: Run, plan: Plan, prototypes: str, n_images: int) -> list[str]:
    """What is about to run, in a few lines."""
    n_params, batch = sum(p.numel() for p in run.student.backbone.parameters()), images_per_step(args)
    used = plan.steps_per_epoch * batch
    lines = [
        f"{args.arch}: {n_params / 1e6:.1f} M parameters; {prototypes}; {run.device}, "
        f"{str(run.dtype or torch.float32).removeprefix('torch.')}, {parallel.world_size()} process(es)"
        + (", networks sharded" if run.make_backbone else ""),
        f"{args.data_path}: {n_images} images, {used} used per epoch; 2 x {args.global_crops_size} + "
        f"{args.local_crops_number} x {args.local_crops_size} pixels"]
    if args.num_workers > (cores := loaders.available_cores()):
        lines.append(f"{cores} data-loading workers per process instead of --num_workers {args.num_workers}, as this "
                     f"process has {cores} core(s)")
    if used < n_images:
        lines.append(
            f"{n_images - used} of {n_images} images are left out of each epoch, different ones each time, as they do "
            f"not fill a step of {batch}; a --batch_size_per_gpu that divides {n_images} uses all")
    lines.append(f"{plan.steps} steps of {batch} images, {plan.steps_per_epoch} per epoch; peak learning rate "
                 f"{plan.lr.max():.2e}")
    lines += networks.cut_pixels(args.arch, args.patch_size, **crop_sizes(args))
    if 2 * args.batch_size_per_gpu < FEWEST_ROWS:
        lines.append(f"--batch_size_per_gpu {args.batch_size_per_gpu}: from so few images a collapse of the features "
                     f"to few directions can't be judged, which takes {FEWEST_ROWS // 2}")
    return lines + plan.less_work((args.global_crops_size, args.local_crops_size), early_sizes(args))


def without_effect(args: argparse.Namespace, defaults: argparse.Namespace, void: Mapping[str, str]) -> list[str]:
    """A warning for each flag that is not at its default and that another one makes void.

    Args:
        void: {flag: the other one with its value}, beside those that all scripts share.
    """
    void = dict(void)
    if not args.eval_knn_every:
        void["eval_data_path"] = "--eval_knn_every 0"
    if not args.warmup_teacher_temp_epochs:
        void["warmup_teacher_temp"] = "--warmup_teacher_temp_epochs 0"
    lines = []
    for name, other in void.items():
        value = getattr(args, name)
        shown, default = (text(v) if isinstance(v, list | tuple) else v for v in (value, getattr(defaults, name)))
        if shown != default:
            given = f"--{name}" if value is True else f"--{name} {shown}"
            lines.append(f"WARNING: {given} has no effect with {other}; change that, or leave it out")
    return lines


# ---- Checks ----


def check(args: argparse.Namespace, first_trial: str, *scales: str) -> None:
    """Refuses combinations of the flags above.

    Args:
        first_trial: a command that works without images of one's own.
        scales: further flags with LOW and HIGH.
    """
    if not args.data_path:
        raise Refused("--data_path '': give a folder of images, and --output_dir; for a first trial: python "
                      f"{first_trial}; --help lists all flags")
    check_crops(
        args.arch, args.patch_size,
        {name: getattr(args, name) for name in ("global_crops_scale", "local_crops_scale", *scales)},
        args.local_crops_number, args.global_crops_size, args.local_crops_size, args.in_chans,
        {"mean": args.mean, "std": args.std})
    check_less_work(
        args.arch, args.patch_size, args.local_crops_number, (args.global_crops_size, args.local_crops_size),
        args.low_resolution_epochs, args.low_resolution_sizes, early_sizes(args), args.token_drop)
    if args.crop_on_device and not args.cache_images:
        raise Refused("--crop_on_device: cuts from decoded images in memory; give --cache_images too, or leave it out")
    if args.crop_on_device and args.noise_patches:
        raise Refused(f"--crop_on_device with --noise_patches {args.noise_patches:g}: workers draw the noise; leave "
                      "one of them out")
    check_length(args.epochs, args.steps, warmup_epochs=args.warmup_epochs,
                 warmup_teacher_temp_epochs=args.warmup_teacher_temp_epochs)
    check_hardware(args.parallel, args.precision, args.use_fp16, args.compile, args.grad_accum_steps)
    check_packages(tensorboard=args.tensorboard, wandb=args.wandb)
    check_files(init_from=args.init_from)
    if args.init_in_chans and not args.init_from:
        raise Refused(f"--init_in_chans {args.init_in_chans}: converts the weights of --init_from; give that too, or "
                      "leave it out")


def check_crops(
    arch: str, patch_size: int, scales: dict[str, Sequence[float]], local_crops_number: int, global_crops_size: int,
    local_crops_size: int, in_chans: int, statistics: dict[str, Sequence[float]],
) -> None:
    """Args: scales: {flag: (low, high)}; statistics: {flag: a value per channel}."""
    for name, (low, high) in scales.items():
        if not 0 < low <= high:
            raise Refused(f"--{name} {low:g} {high:g}: give 0 < low <= high <= 1")
    for name, values in statistics.items():
        if len(values) != in_chans:
            raise Refused(f"--{name} {' '.join(f'{v:g}' for v in values)}: --in_chans {in_chans} needs {in_chans} "
                          "values")
    if local_crops_number and local_crops_size > global_crops_size:
        raise Refused(f"--local_crops_size {local_crops_size} is larger than --global_crops_size {global_crops_size}; "
                      "make it smaller")
    smallest = local_crops_size if local_crops_number else global_crops_size
    if arch in VITS and patch_size > smallest:
        flag = "local" if local_crops_number else "global"
        raise Refused(f"--patch_size {patch_size} is larger than --{flag}_crops_size {smallest}; lower it")


def check_less_work(
    arch: str, patch_size: int, local_crops_number: int, sizes: tuple[int, int], low_resolution_epochs: float,
    low_resolution_sizes: Sequence[int] | None, low: tuple[int, int], token_drop: Sequence[float] | None,
) -> None:
    """Args: sizes, low: sides of global and local crops, in the first epochs low."""
    if low_resolution_sizes and not low_resolution_epochs:
        raise Refused(f"--low_resolution_sizes {text(low_resolution_sizes)}: give --low_resolution_epochs too, such as "
                      "0.75, or leave it out")
    pairs = list(zip(low, sizes, strict=True))[: 2 if local_crops_number else 1]
    if low_resolution_epochs and arch in VITS and any(n % patch_size or not n for n, _ in pairs):
        given = f"--low_resolution_sizes {text(low)}" + ("" if low_resolution_sizes else " (half of the full sizes)")
        near = [max(round(n / patch_size), 1) * patch_size for n in low]
        raise Refused(f"{given}: not multiples of --patch_size {patch_size}; give --low_resolution_sizes {text(near)}")
    if low_resolution_epochs and (any(n > full for n, full in pairs) or local_crops_number and low[1] > low[0]):
        raise Refused(f"--low_resolution_sizes {text(low)}: give at most the full sizes {text(sizes)}, global before "
                      "local")
    if token_drop and arch not in VITS:
        raise Refused(f"--token_drop {text(token_drop)}: --arch {arch} has no patches to drop; choose one of "
                      f"{', '.join(VITS)}, or leave it out")
    if token_drop and token_drop[0] < token_drop[1]:
        raise Refused(f"--token_drop {text(token_drop)}: give START >= END, as the end is what evaluation is like")


def text(values: Sequence[float]) -> str:
    return " ".join(f"{v:g}" for v in values)


def check_length(epochs: int, steps: int, **warmups: float) -> None:
    """Args: warmups: {flag: epochs}; with --steps, they are checked once the length of an epoch is known."""
    for flag, length in warmups.items():
        if not steps and length > epochs:
            raise Refused(f"--{flag} {length:g} is longer than --epochs {epochs}; lower it")


def check_hardware(parallel: str, precision: str, use_fp16: bool, compile: str, grad_accum_steps: int) -> None:
    if parallel == "fsdp" and precision == "fp16":  # each process would see the overflows of its own part
        raise Refused("--parallel fsdp with --precision fp16: choose --precision bf16 or fp32")
    if precision in ("fp16", "bf16") and not use_fp16:
        raise Refused(f"--use_fp16 false contradicts --precision {precision}; leave one of them out")
    if compiling.mode(compile) and parallel == "fsdp":
        raise Refused(f"--compile {compile} with --parallel fsdp is not supported: FSDP gathers the parameters of a "
                      "block when it is called, where the graph of the compiled backbone breaks; leave one of them out")
    if compile in ("reduce-overhead", "max-autotune") and grad_accum_steps > 1:  # their outputs do not last
        raise Refused(f"--compile {compile} with --grad_accum_steps {grad_accum_steps} is not supported: "
                      "CUDA graphs take a micro-batch's gradients back; give --compile default")


def check_packages(**wanted: bool) -> None:
    """Args: wanted: {flag and name of the package: whether the flag was given}."""
    for name, given in wanted.items():
        if given and not installed(name):
            raise Refused(f"--{name}: not installed; pip install {name}")


def check_files(**paths: str) -> None:
    """Args: paths: {flag: file of weights, or "" for none}."""
    for flag, path in paths.items():
        if path:
            with refusing(f"--{flag}"):
                check_file(path)
