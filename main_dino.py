"""Pretrain a backbone with DINO (arXiv 2104.14294) on a folder of images, without labels.

    python main_dino.py @presets/shapes.txt --output_dir output/shapes
    torchrun --nproc_per_node=8 main_dino.py --arch vit_small --data_path /path/to/images --output_dir output/run

Shapes: B images per process and micro-batch, L local crops, V = 2 + L views, K prototypes, D width.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flags
import parallel
import utils
from imagesets import loaders
from imagesets.bad_images import BadImages
from imagesets.decode import MAX_PIXELS
from imagesets.sources import Images, open_images
from parallel import Refused
from pretraining import failures, faults, monitor, networks, sharding
from pretraining.evaluation import KnnEvaluation, open_evaluation
from pretraining.faults import TO_BE_CONTINUED, Requests
from pretraining.health import health
from pretraining.logs import Log, installed
from pretraining.meters import Clock, Meters
from pretraining.owner import owned
from pretraining.plan import Plan, check_warmups, steps_per_epoch
from pretraining.published import train_one_epoch  # noqa: F401 - published under this module's name, as the two below
from pretraining.replay import replay
from pretraining.state import Run, plain_settings, seed_everything
from utils import DataAugmentationDINO, DINOLoss  # noqa: F401
from vision_transformer import VITS
from weights import checkpoints


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Pretrain a backbone with DINO on images without labels.", hints={
        "--resume": "a run resumes by itself: start it again with the same --output_dir;"})

    add = parser.add_argument_group("network").add_argument
    add("--arch", default="vit_small", help="vit_nano, vit_tiny, vit_small, vit_base, or a name of torchvision or timm")
    add("--patch_size", type=flags.positive_int, default=16,
        help="pixels of a ViT's patch; smaller patches give better features, 8 at five times the cost")
    add("--out_dim", type=flags.number(int, 2), default=65536,
        help="K, the number of prototypes; use fewer for small data sets")
    add("--norm_last_layer", type=flags.boolean, default=True,
        help="keep the norm of the prototypes at 1, which stabilizes training; false can give better features with "
             "ViT-S and long runs")
    add("--use_bn_in_head", type=flags.boolean, default=False, help="batch norm in the projection head")
    add("--drop_path_rate", type=flags.number(float, 0, 0.99), default=0.1, help="stochastic depth of the student")
    add("--init_from", default="", help="start from the weights in this file; it is not a resume")

    add = parser.add_argument_group("teacher").add_argument
    add("--momentum_teacher", type=flags.fraction, default=0.996,
        help="of the teacher's moving average; rises to 1 over the run. Use a higher value with small batches, such as "
             "0.9995 with 256 images")
    add("--warmup_teacher_temp", type=flags.positive, default=0.04,
        help="teacher temperature at the start; try a lower one if the loss does not fall")
    add("--teacher_temp", type=flags.positive, default=0.04,
        help="teacher temperature after the warm-up; above 0.07 training becomes unstable")
    add("--warmup_teacher_temp_epochs", type=flags.count, default=0, help="epochs of the temperature's warm-up")

    add = parser.add_argument_group("optimization").add_argument
    add("--optimizer", choices=("adamw", "sgd", "lars"), default="adamw",
        help="adamw for ViTs; sgd or lars for convolutional networks")
    add("--lr", type=flags.positive, default=0.0005,
        help="peak learning rate for 256 images per step; scaled linearly with the images per step")
    add("--warmup_epochs", type=flags.non_negative, default=10, help="epochs of linear warm-up of the learning rate")
    add("--min_lr", type=flags.non_negative, default=1e-6, help="learning rate at the end of the cosine")
    add("--weight_decay", type=flags.non_negative, default=0.04, help="weight decay at the start")
    add("--weight_decay_end", type=flags.non_negative, default=0.4,
        help="weight decay at the end, reached by a cosine; a larger one helps ViTs")
    add("--clip_grad", type=flags.non_negative, default=3.0,
        help="largest gradient norm; lower it if training diverges, 0 turns clipping off")
    add("--clip_mode", choices=("tensor", "global"), default="tensor",
        help="clip the norm of each parameter tensor, as published, or of all gradients together")
    add("--freeze_last_layer", type=flags.count, default=1,
        help="epochs in which the prototypes are not trained; increase it if the loss does not fall")
    add("--batch_size_per_gpu", type=flags.positive_int, default=64, help="images per process and micro-batch")
    add("--grad_accum_steps", type=flags.positive_int, default=1,
        help="micro-batches per optimizer step, for larger steps than fit the memory")
    add("--epochs", type=flags.positive_int, default=100, help="passes over the images")
    add("--steps", type=flags.count, default=0, help="length of the run in optimizer steps; 0: --epochs counts")
    add("--use_fp16", type=flags.boolean, default=True,
        help="half precision where the device has it; false is float32, for when the loss becomes NaN")

    add = parser.add_argument_group("crops").add_argument
    add("--global_crops_scale", type=flags.fraction, nargs=2, default=(0.4, 1.0), metavar=("LOW", "HIGH"),
        help="share of the image's area in a global crop; without local crops use a wider range, such as 0.14 1")
    add("--local_crops_scale", type=flags.fraction, nargs=2, default=(0.05, 0.4), metavar=("LOW", "HIGH"),
        help="share of the image's area in a local crop")
    add("--local_crops_number", type=flags.number(int, 0, 1000), default=8,
        help="local crops per image; more cost time and memory, 0 trains on the two global crops")
    add("--global_crops_size", type=flags.positive_int, default=224, help="side of the global crops in pixels")
    add("--local_crops_size", type=flags.positive_int, default=96, help="side of the local crops in pixels")
    add("--mean", type=flags.fraction, nargs="+", default=utils.IMAGENET_MEAN,
        help="mean of each channel, of intensities in [0, 1]; ImageNet's by default")
    add("--std", type=flags.number(float, 0, 1, above=True), nargs="+", default=utils.IMAGENET_STD,
        help="standard deviation of each channel")
    add("--in_chans", type=flags.positive_int, default=3,
        help="channels of the images; other than 3 needs --mean and --std of as many values")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="",
        help="folder of images, with or without class folders; a .txt list; shards-{000..099}.tar; hf:FOLDER; "
             "torchvision:CIFAR10; shapes[:COUNT[xPIXELS]], drawn images (docs/data.md)")
    add("--max_pixels", type=flags.positive_int, default=MAX_PIXELS,
        help="larger images count as undecodable, against decompression bombs; raise it for very large images")
    add("--max_bad_images", type=flags.fraction, default=0.01,
        help="share of undecodable files above which the run stops")
    add("--eval_knn_every", type=flags.count, default=0,
        help="epochs between k-NN evaluations on labelled images; 0: never")
    add("--eval_data_path", default="", help="labelled images with train and val (or test) parts; empty: --data_path")

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

    group = parser.add_argument_group("hardware")
    add = group.add_argument
    flags.add_precision_flags(group)
    add("--parallel", choices=("ddp", "fsdp"), default="ddp",
        help="with several processes: each holds the networks (ddp), or its part of them (fsdp) for networks that do "
             "not fit one GPU")
    add("--compile", nargs="?", const="default", choices=("default", "reduce-overhead", "max-autotune"),
        help="torch.compile networks and colour operations: faster steps after minutes of compiling; reduce-overhead "
             "uses CUDA graphs, for small networks")
    add("--grad_checkpointing", nargs="?", const="blocks", choices=("blocks", "layers"),
        help="keep less memory for the backward pass and recompute it, so that larger batches fit: whole blocks for a "
             "fifth of the time, or layers (norms and GELU, a third of the memory) for a fiftieth")
    flags.add_launch_flags(group)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses combinations that no single flag's type can see."""
    if not args.data_path:
        raise Refused("--data_path '': give a folder of images, and --output_dir; for a first trial: python "
                      "main_dino.py @presets/shapes.txt --output_dir output/shapes; --help lists all flags")
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        if not 0 < low <= high:
            raise Refused(f"--{name} {low:g} {high:g}: give 0 < low <= high <= 1")
    for name in ("mean", "std"):
        if len(getattr(args, name)) != args.in_chans:
            given = " ".join(f"{v:g}" for v in getattr(args, name))
            raise Refused(f"--{name} {given}: --in_chans {args.in_chans} needs {args.in_chans} values")
    if args.min_lr > args.lr:
        raise Refused(f"--min_lr {args.min_lr:g} is above --lr {args.lr:g}; lower it")
    if args.local_crops_number and args.local_crops_size > args.global_crops_size:
        raise Refused(f"--local_crops_size {args.local_crops_size} is larger than --global_crops_size "
                         f"{args.global_crops_size}; make it smaller")
    smallest = args.local_crops_size if args.local_crops_number else args.global_crops_size
    if args.arch in VITS and args.patch_size > smallest:
        flag = "local" if args.local_crops_number else "global"
        raise Refused(f"--patch_size {args.patch_size} is larger than --{flag}_crops_size {smallest}; lower it")
    if not args.steps and args.warmup_epochs > args.epochs:
        raise Refused(f"--warmup_epochs {args.warmup_epochs:g} is longer than --epochs {args.epochs}; lower it")
    if not args.steps and args.warmup_teacher_temp_epochs > args.epochs:
        raise Refused(f"--warmup_teacher_temp_epochs {args.warmup_teacher_temp_epochs} is longer than --epochs "
                         f"{args.epochs}; lower it")
    if args.parallel == "fsdp" and args.precision == "fp16":  # each process would see the overflows of its own part
        raise Refused("--parallel fsdp with --precision fp16: choose --precision bf16 or fp32")
    if args.precision in ("fp16", "bf16") and not args.use_fp16:
        raise Refused(f"--use_fp16 false contradicts --precision {args.precision}; leave one of them out")
    if args.compile and args.parallel == "fsdp":
        raise Refused(f"--compile {args.compile} with --parallel fsdp is not supported; leave one of them out")
    if args.compile in ("reduce-overhead", "max-autotune") and args.grad_accum_steps > 1:  # their outputs do not last
        raise Refused(f"--compile {args.compile} with --grad_accum_steps {args.grad_accum_steps} is not supported: "
                         "CUDA graphs take a micro-batch's gradients back; give --compile default")
    for name in ("tensorboard", "wandb"):
        if getattr(args, name) and not installed(name):
            raise Refused(f"--{name}: not installed; pip install {name}")
    if args.init_from and not os.path.isfile(args.init_from):
        raise Refused(f"--init_from {args.init_from}: no such file; weights are never downloaded")


# ---- Setting up ----


def make_plan(args: argparse.Namespace, n_images: int) -> Plan:
    """Schedules by optimizer step (section "Implementation details")."""
    world = parallel.world_size()
    per_epoch = steps_per_epoch(n_images, args.batch_size_per_gpu, args.grad_accum_steps, world)
    steps = args.steps or args.epochs * per_epoch
    epochs = steps / per_epoch
    check_warmups(epochs, args.steps, warmup_epochs=args.warmup_epochs,
                  warmup_teacher_temp_epochs=args.warmup_teacher_temp_epochs)
    peak = args.lr * args.batch_size_per_gpu * world * args.grad_accum_steps / 256  # linear scaling rule
    return Plan(
        per_epoch, steps,
        lr=utils.cosine_scheduler(peak, args.min_lr, epochs, per_epoch, warmup_epochs=args.warmup_epochs),
        wd=utils.cosine_scheduler(args.weight_decay, args.weight_decay_end, epochs, per_epoch),
        momentum=utils.cosine_scheduler(args.momentum_teacher, 1.0, epochs, per_epoch),
    )


def make_networks(args: argparse.Namespace) -> tuple[utils.MultiCropWrapper, utils.MultiCropWrapper]:
    return networks.build_networks(
        args.arch, args.patch_size, args.in_chans, args.global_crops_size, args.drop_path_rate, args.out_dim,
        args.use_bn_in_head, args.norm_last_layer, args.init_from)


def make_loss(args: argparse.Namespace, epochs: int) -> utils.DINOLoss:
    return utils.DINOLoss(args.out_dim, 2 + args.local_crops_number, args.warmup_teacher_temp, args.teacher_temp,
                          args.warmup_teacher_temp_epochs, epochs)


def make_augmentation(args: argparse.Namespace) -> utils.DataAugmentationDINO:
    return utils.DataAugmentationDINO(
        args.global_crops_scale, args.local_crops_scale, args.local_crops_number, args.global_crops_size,
        args.local_crops_size, args.mean, args.std, bool(args.compile))


def make_evaluation(args: argparse.Namespace, device: torch.device) -> KnnEvaluation | None:
    if not args.eval_knn_every:
        return None
    path, flag = (args.eval_data_path, "--eval_data_path") if args.eval_data_path else (args.data_path, "--data_path")
    return open_evaluation(path, flag, args.global_crops_size, args.mean, args.std, args.in_chans,
                           4 * args.batch_size_per_gpu, args.num_workers, device, args.max_pixels)


def make_run(args: argparse.Namespace, plan: Plan, n_images: int, device: torch.device) -> Run:
    """Networks, loss and optimizer at the start of a run."""
    seed_everything(args.seed)  # the networks start the same on every process
    student, teacher = make_networks(args)
    networks.check_crop_sizes(student.backbone, args.arch, args.in_chans, **crop_sizes(args))
    student, teacher = networks.on_device(student, device), networks.on_device(teacher, device)
    if args.grad_checkpointing:
        networks.checkpoint_gradients(student.backbone, args.grad_checkpointing, args.arch)
    if args.compile:
        networks.compile_networks(student, teacher, args.compile)
    seed_everything(args.seed + parallel.rank())  # stochastic depth differs between the processes
    sharded = args.parallel == "fsdp" and parallel.world_size() > 1
    if sharded:
        sharding.shard(student, device)
        sharding.shard(teacher, device)
    dtype = networks.half_precision(args.precision, args.use_fp16, device)
    if sharded and dtype == torch.float16:
        raise Refused(f"--parallel fsdp: --precision {args.precision} is fp16 here; choose bf16 or fp32")
    whole = partial(networks.make_backbone, args.arch, args.patch_size, args.in_chans, args.global_crops_size)
    optimizer = utils.build_optimizer(args.optimizer, student)
    return Run(student, teacher, make_loss(args, plan.epochs).to(device), optimizer, device, dtype,
               plan.steps_per_epoch, plain_settings(vars(args), n_images), Path(args.output_dir),
               args.keep_checkpoints, make_backbone=(lambda: whole()[0]) if sharded else None)


def describe(args: argparse.Namespace, run: Run, plan: Plan, n_images: int) -> None:
    """What is about to run, in a few lines."""
    if not parallel.is_main():
        return
    n_params = sum(p.numel() for p in run.student.backbone.parameters())
    batch = images_per_step(args)
    used = plan.steps_per_epoch * batch
    print(f"{args.arch}: {n_params / 1e6:.1f} M parameters; K {args.out_dim}; {run.device}, "
          f"{str(run.dtype or torch.float32).removeprefix('torch.')}, {parallel.world_size()} process(es)"
          + (", networks sharded" if run.make_backbone else ""))
    print(f"{args.data_path}: {n_images} images, {used} used per epoch; 2 x {args.global_crops_size} + "
          f"{args.local_crops_number} x {args.local_crops_size} pixels")
    if args.num_workers > (cores := loaders.available_cores()):
        print(f"{cores} data-loading workers per process instead of --num_workers {args.num_workers}, as this process "
              f"has {cores} core(s)")
    for line in networks.cut_pixels(args.arch, args.patch_size, **crop_sizes(args)):
        print(line)
    if used < n_images:
        print(f"{n_images - used} of {n_images} images are left out of each epoch, different ones each time, as they "
              f"do not fill a step of {batch}; a --batch_size_per_gpu that divides {n_images} uses all")
    print(f"{plan.steps} steps of {batch} images, {plan.steps_per_epoch} per epoch; "
          f"peak learning rate {plan.lr.max():.2e}", flush=True)
    if args.freeze_last_layer >= plan.steps / plan.steps_per_epoch:
        print(f"WARNING: the prototypes stay frozen for the whole run, as --freeze_last_layer {args.freeze_last_layer} "
              f"epoch(s) is not shorter than the run of {plan.steps / plan.steps_per_epoch:.3g}; lower it", flush=True)


def crop_sizes(args: argparse.Namespace) -> dict[str, int]:
    """{flag: side in pixels} of the crops that there are."""
    local = {"local_crops_size": args.local_crops_size} if args.local_crops_number else {}
    return {"global_crops_size": args.global_crops_size} | local


def images_per_step(args: argparse.Namespace) -> int:
    return args.batch_size_per_gpu * args.grad_accum_steps * parallel.world_size()


def pretrain(args: argparse.Namespace) -> int:
    """Set up, resume if there is something to resume, train. Returns the exit code."""
    check_args(args)
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    torch.backends.cudnn.benchmark = True  # crops have fixed sizes: convolutions are chosen by trial, once
    try:
        images = open_images(args.data_path, None, args.in_chans, args.max_pixels)
        evaluation = make_evaluation(args, device)
        plan = make_plan(args, len(images))
        run = make_run(args, plan, len(images), device)
    except (RuntimeError, MemoryError) as error:
        if not (reason := faults.out_of_memory(error)):
            raise
        raise Refused(reason) from error
    latest = run.find_checkpoint(args.extend)
    flags.prepare_output(run.folder)
    with owned(run.folder):
        start(args, run, plan, len(images), evaluation, latest)
        del latest  # its memory
        return train_and_report(args, run, plan, images, evaluation)


def start(
    args: argparse.Namespace, run: Run, plan: Plan, n_images: int, evaluation: KnnEvaluation | None,
    latest: tuple[dict, Path] | None,
) -> None:
    """Describe the run, evaluate its baselines where they are not known yet, and resume."""
    if parallel.is_main():
        checkpoints.remove_temporary(run.folder)
    describe(args, run, plan, n_images)
    knn = dict(latest[0]["knn"]) if latest else {}
    if evaluation and "untrained" not in knn:
        knn |= evaluation.baselines(run.teacher_backbone(), run.autocast())
    if latest:
        run.resume(*latest)
        parallel.say(f"resuming from {latest[1]} at step {run.step} of {plan.steps}")
    run.knn = knn


def train_and_report(
    args: argparse.Namespace, run: Run, plan: Plan, images: Images, evaluation: KnnEvaluation | None
) -> int:
    log = Log(run.folder, run.step, plan.steps, tensorboard=args.tensorboard,
              wandb_config=vars(args) if args.wandb else None)
    try:
        finished = train(args, run, plan, images, evaluation, log)
    finally:
        log.close()
    if not finished:
        parallel.say(f"stopped by a signal and saved; start again to continue (exit code {TO_BE_CONTINUED})")
        return TO_BE_CONTINUED
    backbone = run.teacher_backbone()  # all processes help, where it is sharded
    if parallel.is_main():
        names = monitor.save_last_figures(run.folder, images, backbone, args.global_crops_size, args.mean, args.std)
        print(f"wrote {', '.join(names)}, log.txt and {run.last_saved} in {args.output_dir}", flush=True)
    return 0


# ---- The loop ----


def train(
    args: argparse.Namespace, run: Run, plan: Plan, images: Images, evaluation: KnnEvaluation | None, log: Log
) -> bool:
    """The training loop, from `run.step` to the plan's end. Returns False when a signal ended it early.

    Raises:
        failures.NonFinite: at the first look (logged steps, checkpoints) after a step that was not finite.
    """
    student, load = distributed(run), make_loader(args, images, plan, run.device)
    run.watch = watch(args, run, plan, load)
    batches, augmentation = load(run.step, plan.steps), make_augmentation(args)
    bad_images = BadImages(len(images), args.max_bad_images)
    window, clock, requests = Meters(), Clock(), Requests(run.device, args.saveckp_every_minutes)
    if run.step == 0:
        draw(args, run, images, log, "start")

    while run.step < plan.steps:
        step, epoch = run.step, run.epoch
        run.watch.begin(step)
        utils.set_lr_and_wd(run.optimizer, float(plan.lr[step]), float(plan.wd[step]))
        figures, parts, teacher_mean = add_gradients(
            run, student, augmentation, batches, bad_images, clock, args.grad_accum_steps)
        run.scaler.unscale_(run.optimizer)
        norms = utils.clip_gradients(run.student, args.clip_grad, per_tensor=args.clip_mode == "tensor")
        run.watch.judge(figures["loss"], norms)
        utils.cancel_gradients_last_layer(epoch, run.student, args.freeze_last_layer)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        utils.ema_update(run.student, run.teacher, plan.momentum[step])
        window.update(**figures)
        run.meters.update(**figures, lr=plan.lr[step], wd=plan.wd[step])
        clock.steps += 1

        if step % args.log_every == 0 or step + 1 == plan.steps:  # only here does the loop wait for the device
            run.watch.check(run.last_saved)
            bad_images.share()
            extra = health(parts["teacher_output"], parts["teacher_features"], parts["loss"], run.dino_loss, epoch)
            run.meters.update(**extra)
            window.update(**extra)
            monitor.log_step(log, plan, step, window.means(), math.log(args.out_dim), images_per_step(args),
                             *clock.read())
            window.reset()
        run.dino_loss.update_center(teacher_mean)
        run.step += 1
        stop, save = requests.agreed(run.step)
        if run.step % plan.steps_per_epoch == 0 or run.step == plan.steps:
            end_epoch(args, run, plan, epoch, images, evaluation, log)
            clock.reset()
        elif stop or save or (args.saveckp_every_steps and run.step % args.saveckp_every_steps == 0):
            run.save(checkpoints.NAME)
        if stop and run.step < plan.steps:
            return False
    return True


def add_gradients(
    run: Run, student: nn.Module, augmentation: utils.DataAugmentationDINO, batches: Iterator[dict],
    bad_images: BadImages, clock: Clock, grad_accum_steps: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Add the gradients of a step's micro-batches to the student's parameters.

    Args:
        student: run.student, or what makes its gradients those of all processes.

    Returns:
        Means of the scalars that `utils.losses` returns, all that it returns for the last micro-batch, and the mean
        of the teacher's output (1, K).
    """
    figures: dict[str, Tensor] = {}
    means = []
    for micro in range(grad_accum_steps):
        batch = clock.next(batches)
        bad_images.add(batch["bad"])
        crops = augmentation.finish(batch["crops"], batch["params"])
        last = micro == grad_accum_steps - 1
        with nullcontext() if last or student is run.student else student.no_sync():
            with run.autocast():
                loss, parts = utils.losses(student, run.teacher, crops, run.dino_loss, run.epoch)
            run.scaler.scale(loss / grad_accum_steps).backward()
        for name, value in parts.items():
            if value.ndim == 0:
                figures[name] = figures.get(name, 0) + value / grad_accum_steps
        means.append(parts["teacher_output"].float().mean(0, keepdim=True))
    return figures, parts, torch.cat(means).mean(0, keepdim=True)


def distributed(run: Run) -> nn.Module:
    """The student as it is called: its gradients are those of all processes."""
    if parallel.world_size() == 1 or run.make_backbone:
        return run.student
    return DistributedDataParallel(run.student, device_ids=[run.device.index] if run.device.type == "cuda" else None)


def make_loader(
    args: argparse.Namespace, images: Images, plan: Plan, device: torch.device
) -> Callable[[int, int], Iterator[dict]]:
    """(first, last) -> the micro-batches of steps first ... last - 1, from one loader whose workers never restart."""
    accum, augmentation = args.grad_accum_steps, make_augmentation(args)

    def load(first: int, last: int) -> Iterator[dict]:
        return loaders.on_device(loaders.batches(
            images, augmentation, args.batch_size_per_gpu, args.num_workers, args.seed, parallel.rank(),
            parallel.world_size(), batches_per_epoch=plan.steps_per_epoch * accum, first_batch=first * accum,
            last_batch=last * accum, pin_memory=device.type == "cuda"), device)

    return load


def watch(
    args: argparse.Namespace, run: Run, plan: Plan, load: Callable[[int, int], Iterator[dict]]
) -> failures.Watch:
    about = {"args": run.settings, "dtype": str(run.dtype), "epochs": plan.epochs,
             "steps_per_epoch": plan.steps_per_epoch}
    optimizer = None if run.scaler.is_enabled() else run.optimizer
    return failures.Watch(run.student, run.teacher, run.dino_loss, optimizer, plan.momentum,
                          lambda step: load(step, step + 1), about, run.folder / failures.NAME, run.device)


def end_epoch(
    args: argparse.Namespace, run: Run, plan: Plan, epoch: int, images: Images, evaluation: KnnEvaluation | None,
    log: Log,
) -> None:
    """k-NN when it is due, the line of the epoch, then the checkpoints.

    The checkpoint to resume from is written last: after a kill before it, the rest of the epoch is repeated, and
    with it the others are written.
    """
    run.watch.check(run.last_saved)
    last, names = run.step == plan.steps, []
    if args.saveckp_freq and (epoch + 1) % args.saveckp_freq == 0:
        names.append(f"checkpoint{epoch:04d}.pth")
    if evaluation and ((epoch + 1) % args.eval_knn_every == 0 or last):
        top1, top5 = evaluation.knn(run.teacher_backbone(), run.autocast())
        run.knn |= {"epoch": epoch, "top1": top1, "top5": top5}
        if run.knn["top1"] > run.knn.get("best", -1):
            run.knn |= {"best": run.knn["top1"], "best_epoch": epoch}
            names.append(checkpoints.BEST)
    monitor.log_epoch(log, epoch, run.step, run.meters.means(), math.log(args.out_dim), run.knn if evaluation else {})
    if last or (args.pictures_every and (epoch + 1) % args.pictures_every == 0):
        draw(args, run, images, log, f"epoch{epoch:04d}")
    run.meters = Meters()
    run.save(*names, checkpoints.NAME)


def draw(args: argparse.Namespace, run: Run, images: Images, log: Log, when: str) -> None:
    """Figures of the teacher on six fixed images, where --pictures_every asks for them."""
    if args.pictures_every:
        backbone = run.teacher_backbone()  # all processes help, where it is sharded
        if parallel.is_main():
            log.pictures(monitor.draw(images, backbone, args.global_crops_size, args.mean, args.std), when, run.step)


# ---- The script ----


def replay_step(args: argparse.Namespace) -> None:
    def build(settings: Mapping, epochs: int) -> tuple:
        stored = argparse.Namespace(**settings | {"init_from": "", "compile": None})
        return *make_networks(stored), make_loss(stored, epochs), make_augmentation(stored)

    replay(args.replay, parallel.pick_device(args.device), build)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused, 1 stopped by an error, 75 stopped by a signal, to be continued."""
    work = replay_step if args.replay else pretrain
    return flags.exit_code("main_dino.py", work, args, lambda error: faults.explain(error, args.output_dir))


if __name__ == "__main__":
    arguments = get_args_parser().parse_args()
    end = parallel.leave if arguments.parallel == "fsdp" else sys.exit
    end(main(arguments))
