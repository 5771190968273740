"""Pretrain a backbone with DINO (arXiv 2104.14294) on a folder of images, without labels.

    python main_dino.py @presets/shapes.txt --output_dir output/shapes
    torchrun --nproc_per_node=8 main_dino.py --arch vit_small --data_path /path/to/images --output_dir output/run

Shapes: B images a process and micro-batch, L local crops, V = 2 + L views, K prototypes, D width.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import data
import flags
import metrics
import parallel
import utils
from vision_transformer import VITS, DINOHead, VisionTransformer, build_backbone

TO_BE_CONTINUED = 75  # exit code of a run that was asked to stop and saved; sysexits.h calls it "try again"


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Pretrain a backbone with DINO on images without labels.")
    add = parser.add_argument

    # Network
    add("--arch", default="vit_small", help="vit_nano, vit_tiny, vit_small, vit_base, or torchvision's or timm's name")
    add("--patch_size", type=flags.positive_int, default=16, help="pixels of a ViT's patch; 8 is better and 5x slower")
    add("--out_dim", type=flags.positive_int, default=65536, help="K, the number of prototypes; smaller for small data")
    add("--norm_last_layer", type=flags.boolean, default=True,
        help="keep the prototypes at norm 1: steadier; false can do better with ViT-S and longer runs")
    add("--use_bn_in_head", type=flags.boolean, default=False, help="batch norm in the projection head")
    add("--drop_path_rate", type=flags.number(float, 0, 0.99), default=0.1, help="stochastic depth of the student")
    add("--init_from", default="", help="start from the weights in this file (not a resume)")

    # Teacher and temperatures
    add("--momentum_teacher", type=flags.fraction, default=0.996,
        help="of the teacher's moving average; rises to 1. Use a higher value with small batches: 0.9995 at 256")
    add("--warmup_teacher_temp", type=flags.positive, default=0.04, help="teacher temperature at the start")
    add("--teacher_temp", type=flags.positive, default=0.04, help="and after its warm-up; above 0.07 is unstable")
    add("--warmup_teacher_temp_epochs", type=flags.count, default=0, help="epochs of that warm-up")

    # Optimization
    add("--optimizer", choices=("adamw", "sgd", "lars"), default="adamw", help="adamw for ViTs")
    add("--lr", type=flags.positive, default=0.0005, help="peak learning rate for 256 images a step; scaled linearly")
    add("--warmup_epochs", type=flags.non_negative, default=10, help="epochs of linear warm-up of the learning rate")
    add("--min_lr", type=flags.non_negative, default=1e-6, help="learning rate at the end")
    add("--weight_decay", type=flags.non_negative, default=0.04, help="at the start")
    add("--weight_decay_end", type=flags.non_negative, default=0.4, help="at the end; a cosine between")
    add("--clip_grad", type=flags.non_negative, default=3.0, help="largest gradient norm; 0 leaves gradients alone")
    add("--clip_mode", choices=("tensor", "global"), default="tensor", help="norm of each parameter tensor, or of all")
    add("--freeze_last_layer", type=flags.count, default=1, help="epochs in which the prototypes are kept as they are")
    add("--batch_size_per_gpu", type=flags.positive_int, default=64, help="images a process and micro-batch")
    add("--grad_accum_steps", type=flags.positive_int, default=1, help="micro-batches an optimizer step")
    add("--epochs", type=flags.positive_int, default=100, help="passes over the images")
    add("--steps", type=flags.count, default=0, help="length of the run in optimizer steps instead of epochs")
    add("--use_fp16", type=flags.boolean, default=True, help="half precision where the device has it; false is fp32")
    flags.add_precision_flags(parser)
    add("--compile", action="store_true", help="torch.compile the networks")

    # Crops
    add("--global_crops_scale", type=flags.fraction, nargs=2, default=(0.4, 1.0), help="share of the area, low high")
    add("--local_crops_scale", type=flags.fraction, nargs=2, default=(0.05, 0.4), help="share of the area, low high")
    add("--local_crops_number", type=flags.count, default=8, help="local crops an image; 0 trains on two crops")
    add("--global_crops_size", type=flags.positive_int, default=224, help="pixels")
    add("--local_crops_size", type=flags.positive_int, default=96, help="pixels")
    add("--mean", type=flags.fraction, nargs="+", default=utils.IMAGENET_MEAN, help="of each channel, in [0, 1]")
    add("--std", type=flags.number(float, 0, 1, above=True), nargs="+", default=utils.IMAGENET_STD,
        help="of each channel")
    add("--in_chans", type=flags.positive_int, default=3, help="channels; with --mean and --std of as many values")

    # Data and output
    add("--data_path", default="shapes",
        help="folder of images, with or without class folders; a .txt list; shards-{000..099}.tar; hf:FOLDER; "
             "torchvision:CIFAR10; shapes[:COUNT[xPIXELS]], the embedded pictures (docs/data.md)")
    add("--max_pixels", type=flags.positive_int, default=data.MAX_PIXELS,
        help="larger files count as undecodable: a guard against decompression bombs")
    add("--max_bad_images", type=flags.fraction, default=0.01, help="share of undecodable files that stops the run")
    add("--output_dir", default=".", help="checkpoints and logs; a run that finds its own checkpoint there resumes")
    add("--saveckp_freq", type=flags.count, default=20, help="epochs between checkpoints that are kept; 0: none")
    add("--saveckp_every_steps", type=flags.count, default=0, help="steps between checkpoints; 0: epochs only")
    add("--seed", type=flags.seed, default=0, help="of the weights, the order and the views")
    add("--eval_knn_every", type=flags.count, default=0, help="epochs between k-NN evaluations; 0: never")
    add("--eval_data_path", default="", help="labelled images with train and val (or test) parts; empty: --data_path")
    add("--log_every", type=flags.positive_int, default=10, help="steps between progress lines and health checks")
    add("--tensorboard", action="store_true", help="write TensorBoard scalars into --output_dir")
    flags.add_launch_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Combinations that no single flag's type can see. Raises ValueError in one line with flag, value and remedy."""
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        if not 0 < low <= high:
            raise ValueError(f"--{name} {low:g} {high:g}: give 0 < low <= high <= 1")
    for name in ("mean", "std"):
        if len(getattr(args, name)) != args.in_chans:
            given = " ".join(f"{v:g}" for v in getattr(args, name))
            raise ValueError(f"--{name} {given}: --in_chans {args.in_chans} needs {args.in_chans} values")
    if args.min_lr > args.lr:
        raise ValueError(f"--min_lr {args.min_lr:g} is above --lr {args.lr:g}; lower it")
    if args.local_crops_number and args.local_crops_size > args.global_crops_size:
        raise ValueError(f"--local_crops_size {args.local_crops_size} is larger than --global_crops_size "
                         f"{args.global_crops_size}; make it smaller")
    smallest = args.local_crops_size if args.local_crops_number else args.global_crops_size
    if args.arch in VITS and args.patch_size > smallest:
        flag = "local" if args.local_crops_number else "global"
        raise ValueError(f"--patch_size {args.patch_size} is larger than --{flag}_crops_size {smallest}; lower it")
    if not args.steps and args.warmup_epochs > args.epochs:
        raise ValueError(f"--warmup_epochs {args.warmup_epochs:g} is longer than --epochs {args.epochs}; lower it")
    if not args.steps and args.warmup_teacher_temp_epochs > args.epochs:
        raise ValueError(f"--warmup_teacher_temp_epochs {args.warmup_teacher_temp_epochs} is longer than --epochs "
                         f"{args.epochs}; lower it")
    if args.precision in ("fp16", "bf16") and not args.use_fp16:
        raise ValueError(f"--use_fp16 false contradicts --precision {args.precision}; leave one of them out")
    if args.init_from and not os.path.isfile(args.init_from):
        raise ValueError(f"--init_from {args.init_from}: no such file; weights are never downloaded")


# ---- What a run is made of ----


class Plan(NamedTuple):
    """Durations in optimizer steps, worked out once; the loop indexes the arrays by step."""

    steps_per_epoch: int
    steps: int
    epochs: int  # the last one may be a part
    lr: np.ndarray
    wd: np.ndarray
    momentum: np.ndarray


def make_plan(args: argparse.Namespace, n_images: int, world_size: int) -> Plan:
    global_batch = args.batch_size_per_gpu * world_size * args.grad_accum_steps
    steps_per_epoch = n_images // global_batch
    if steps_per_epoch == 0:
        raise ValueError(
            f"--batch_size_per_gpu {args.batch_size_per_gpu}: {n_images} images are less than one step of "
            f"{global_batch} ({world_size} processes x --grad_accum_steps {args.grad_accum_steps}); lower it"
        )
    steps = args.steps or args.epochs * steps_per_epoch
    epochs = steps / steps_per_epoch
    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        if getattr(args, name) > epochs:
            raise ValueError(f"--{name} {getattr(args, name):g} is longer than the run of {epochs:g} epochs "
                             f"(--steps {args.steps}); lower it")
    # Linear scaling rule: the learning rate is given for 256 images.
    lr = utils.cosine_scheduler(
        args.lr * global_batch / 256, args.min_lr, epochs, steps_per_epoch, warmup_epochs=args.warmup_epochs
    )
    wd = utils.cosine_scheduler(args.weight_decay, args.weight_decay_end, epochs, steps_per_epoch)
    momentum = utils.cosine_scheduler(args.momentum_teacher, 1.0, epochs, steps_per_epoch)
    return Plan(steps_per_epoch, steps, math.ceil(epochs), lr, wd, momentum)


def build_networks(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Student and teacher with the same weights; stochastic depth is the student's alone."""

    def build(drop_path_rate: float) -> utils.MultiCropWrapper:
        backbone, embed_dim = build_backbone(
            args.arch, args.patch_size, drop_path_rate, in_chans=args.in_chans, img_size=args.global_crops_size
        )
        head = DINOHead(embed_dim, args.out_dim, args.use_bn_in_head, args.norm_last_layer)
        return utils.MultiCropWrapper(backbone, head)

    student, teacher = build(args.drop_path_rate), build(0.0)
    if args.init_from:
        load_initial(student.backbone, args.init_from)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    student, teacher = student.to(device), teacher.to(device)
    if parallel.world_size() > 1 and device.type == "cuda":  # batch norm over all processes; torch has it on GPUs only
        student, teacher = (nn.SyncBatchNorm.convert_sync_batchnorm(m) for m in (student, teacher))
    if args.compile:
        for module in (student.backbone, student.head, teacher.backbone, teacher.head):
            module.compile()
    return student, teacher


def load_initial(backbone: nn.Module, path: str) -> None:
    try:
        state = checkpoint.backbone_state(checkpoint.read(path), "teacher", path)
        checkpoint.load_matching(backbone, state, path)
    except ValueError as error:  # it names the evaluation scripts' flags
        reason = re.sub("--(pretrained_weights|checkpoint_key) ", "", str(error)).removeprefix(f"{path}: ")
        raise ValueError(f"--init_from {path}: {reason}") from error


def build_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Learning rate and weight decay are set at every step."""
    groups = utils.get_params_groups(model)
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0, momentum=0.9)
    return utils.LARS(groups)


def set_lr_and_wd(optimizer: torch.optim.Optimizer, lr: float, wd: float) -> None:
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = lr
        if i == 0:  # the second group, biases and norms, is not decayed
            group["weight_decay"] = wd


def half_precision(precision: str, use_fp16: bool, device: torch.device) -> torch.dtype | None:
    """The autocast type, None for float32. bf16 needs no gradient scaler, so `auto` prefers it where it is fast."""
    if precision == "fp32" or not use_fp16:
        return None
    if precision != "auto":
        return torch.float16 if precision == "fp16" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    bf16_units = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if bf16_units else None


# ---- Resume ----

# Flags that may change when a run goes on: where it runs and what it says, not what it computes.
FREE_FLAGS = {
    "data_path", "output_dir", "saveckp_freq", "saveckp_every_steps", "eval_knn_every", "eval_data_path", "log_every",
    "tensorboard", "device", "num_workers", "dist_url", "dist_timeout", "local_rank", "compile", "max_bad_images",
    "max_pixels", "init_from", "batch_size_per_gpu", "grad_accum_steps", "world_size",
}


def plain_args(args: argparse.Namespace, n_images: int) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()} | {
        "images": n_images,
        "world_size": parallel.world_size(),
        "global_batch": args.batch_size_per_gpu * args.grad_accum_steps * parallel.world_size(),
    }


def refuse_other_hyperparameters(now: dict, then: dict, path: Path) -> None:
    changed = [f"{k} {then.get(k)} -> {v}" for k, v in now.items() if k not in FREE_FLAGS and then.get(k) != v]
    if changed:
        raise ValueError(f"--output_dir {path.parent}: {path.name} there is of another run ({', '.join(changed)}); "
                         "choose another folder, or the same flags to resume")


# ---- The run ----


class Run:
    """The state of a training run: everything that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.images = data.open_images(args.data_path, None, args.in_chans, args.max_pixels)
        self.evaluation = Evaluation(args, device) if args.eval_knn_every else None
        self.plan = make_plan(args, len(self.images), parallel.world_size())
        seed_everything(args.seed)  # the networks start the same on every process
        self.student, self.teacher = build_networks(args, device)
        seed_everything(args.seed + parallel.rank())  # stochastic depth differs between them
        self.dino_loss = utils.DINOLoss(
            args.out_dim, args.local_crops_number + 2, args.warmup_teacher_temp, args.teacher_temp,
            args.warmup_teacher_temp_epochs, self.plan.epochs,
        ).to(device)
        self.optimizer = build_optimizer(args.optimizer, self.student)
        self.dtype = half_precision(args.precision, args.use_fp16, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.meters = metrics.Meters()  # of the running epoch
        self.knn: dict[str, float] = {}  # latest figures, the baselines and the best
        self.step = 0
        self.last_saved = "none"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def state(self) -> dict:
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "fp16_scaler": self.scaler.state_dict(),
            "dino_loss": self.dino_loss.state_dict(),
            "epoch": self.step // self.plan.steps_per_epoch,
            "step": self.step,
            "args": plain_args(self.args, len(self.images)),
            "rng": parallel.gather_objects(checkpoint.rng_state(self.device)),
            "meters": parallel.gather_objects(self.meters.state_dict()),
            "knn": self.knn,
        }

    def save(self, *names: str) -> None:
        """Write the state under each name in --output_dir; every process calls it, rank 0 writes."""
        state = self.state()
        for name in names:
            if parallel.is_main():
                checkpoint.save(state, Path(self.args.output_dir) / name)
        self.last_saved = names[0]
        parallel.barrier()

    def resume(self, state: dict, path: Path) -> None:
        refuse_other_hyperparameters(plain_args(self.args, len(self.images)), state["args"], path)
        for name in ("student", "teacher", "optimizer", "dino_loss"):
            getattr(self, name).load_state_dict(state[name])
        self.scaler.load_state_dict(state["fp16_scaler"])
        self.knn, self.step, self.last_saved = dict(state["knn"]), state["step"], path.name
        same_processes = len(state["rng"]) == parallel.world_size()
        self.meters.load_state_dict(state["meters"][parallel.rank() if same_processes else 0], self.device)
        if same_processes:
            checkpoint.set_rng_state(state["rng"][parallel.rank()], self.device)
        if parallel.is_main():
            print(f"resuming from {path} at step {self.step} of {self.plan.steps}"
                  + ("" if same_processes else
                     f": {len(state['rng'])} -> {parallel.world_size()} processes, equal to rounding, not to the bit"),
                  flush=True)


def train(run: Run, log: metrics.Log) -> bool:
    """The training loop, from `run.step` to the plan's end. Returns False when a signal ended it early."""
    args, plan, device, teacher, dino_loss = run.args, run.plan, run.device, run.teacher, run.dino_loss
    student = run.student
    if parallel.world_size() > 1:
        student = DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)
    augmentation = make_augmentation(args)
    batches, bad_images = iter(load(run, augmentation)), data.BadImages(len(run.images), args.max_bad_images)
    watch, window, clock, stop = metrics.FiniteWatch(device), metrics.Meters(), metrics.Clock(), StopSignal()

    while run.step < plan.steps:
        step, epoch = run.step, run.step // plan.steps_per_epoch
        set_lr_and_wd(run.optimizer, float(plan.lr[step]), float(plan.wd[step]))
        step_loss, teacher_means = torch.zeros((), device=device), []
        for micro in range(args.grad_accum_steps):
            batch = clock.next(batches)
            bad_images.add(batch["bad"])
            crops = augmentation.finish([c.to(device, non_blocking=True) for c in batch["crops"]], batch["params"])
            last = micro == args.grad_accum_steps - 1
            with nullcontext() if last or student is run.student else student.no_sync():
                with run.autocast():
                    with torch.no_grad():
                        features = teacher.features(crops[:1])  # (2B, D), global views only
                        teacher_out = teacher.head(features)  # (2B, K)
                    student_out = student(crops)  # (VB, K)
                loss = dino_loss(student_out, teacher_out, epoch, update_center=False)  # float32, outside autocast
                run.scaler.scale(loss / args.grad_accum_steps).backward()
            step_loss += loss.detach() / args.grad_accum_steps
            teacher_means.append(teacher_out.float().mean(0, keepdim=True))
        run.scaler.unscale_(run.optimizer)
        norms = utils.clip_gradients(run.student, args.clip_grad, per_tensor=args.clip_mode == "tensor")
        watch.update(step, step_loss, None if run.scaler.is_enabled() else norms)
        utils.cancel_gradients_last_layer(epoch, run.student, args.freeze_last_layer)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        utils.ema_update(run.student, teacher, plan.momentum[step])
        window.update(loss=step_loss)
        run.meters.update(loss=step_loss, lr=plan.lr[step], wd=plan.wd[step])
        clock.steps += 1

        if step % args.log_every == 0 or step + 1 == plan.steps:
            watch.check(run.last_saved)
            bad_images.share()
            window.update(**metrics.health(teacher_out, features, loss, dino_loss, epoch))
            log_step(run, log, step, epoch, window, clock)
        dino_loss.update_center(torch.cat(teacher_means))
        run.step += 1
        if run.step % plan.steps_per_epoch == 0 or run.step == plan.steps:
            watch.check(run.last_saved)
            end_epoch(run, log, epoch)
            clock.reset()
        elif args.saveckp_every_steps and run.step % args.saveckp_every_steps == 0:
            watch.check(run.last_saved)
            run.save(checkpoint.NAME)
        if stop.agreed(run.step % args.log_every == 0) and run.step < plan.steps:
            watch.check(run.last_saved)
            run.save(checkpoint.NAME)
            return False
    return True


def load(run: Run, augmentation: utils.DataAugmentationDINO):
    """The rest of the run's micro-batches; one loader for all epochs, so that its workers never start anew."""
    accum = run.args.grad_accum_steps
    return data.batches(
        run.images, augmentation, run.args.batch_size_per_gpu, run.args.num_workers, run.args.seed, parallel.rank(),
        parallel.world_size(), batches_per_epoch=run.plan.steps_per_epoch * accum, first_batch=run.step * accum,
        last_batch=run.plan.steps * accum, pin_memory=run.device.type == "cuda",
    )


def end_epoch(run: Run, log: metrics.Log, epoch: int) -> None:
    """k-NN when it is due, the line of the epoch, then the checkpoints: a kill in between repeats the epoch."""
    args, names = run.args, [checkpoint.NAME]
    if args.saveckp_freq and (epoch + 1) % args.saveckp_freq == 0:
        names.append(f"checkpoint{epoch:04d}.pth")
    if run.evaluation and ((epoch + 1) % args.eval_knn_every == 0 or run.step == run.plan.steps):
        top1, top5 = run.evaluation.knn(run.teacher.backbone, run.autocast())
        run.knn |= {"epoch": epoch, "top1": top1, "top5": top5}
        if run.knn["top1"] > run.knn.get("best", -1):
            run.knn |= {"best": run.knn["top1"], "best_epoch": epoch}
            names.append(checkpoint.BEST)
    write_epoch(run, log, epoch)
    run.meters = metrics.Meters()
    run.save(*names)


def log_step(run: Run, log: metrics.Log, step: int, epoch: int, window: metrics.Meters, clock: metrics.Clock) -> None:
    """Progress and health of a logged step; only there does the loop wait for the device."""
    seen = window.means()
    window.reset()
    health = {k: v for k, v in seen.items() if k != "loss"}
    run.meters.update(**health)
    seconds, waiting = clock.read()
    images = run.args.batch_size_per_gpu * run.args.grad_accum_steps * parallel.world_size() / seconds
    eta = metrics.duration(seconds * (run.plan.steps - step - 1))
    ln_k = math.log(run.args.out_dim)
    log.step(
        f"epoch {epoch} step {step + 1}/{run.plan.steps}  loss {seen['loss']:.4f} (ln K {ln_k:.2f})"
        f"  entropy {seen['entropy']:.2f}  kl {seen['kl']:.3f}  rank {seen['feature_rank']:.1f}"
        f"  lr {run.plan.lr[step]:.2e}  {images:.0f} images/s  data {waiting:.0%}  eta {eta}",
        {"step": step, "epoch": epoch, **seen, "lr": float(run.plan.lr[step]), "images_per_s": images,
         "data_wait": waiting},
    )
    warning = metrics.collapse(seen["entropy"], ln_k, seen["prototypes_used"])
    if warning and parallel.is_main():
        print(f"WARNING at step {step}: {warning}", flush=True)


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 ask the run to save and stop after the step; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.ask)

    def ask(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.asked = True

    def agreed(self, talk: bool) -> bool:
        """All processes must stop after the same step: they compare notes on logged steps only."""
        if parallel.world_size() == 1:
            return self.asked
        return talk and any(parallel.gather_objects(self.asked))


# ---- Evaluation during training ----


class Evaluation:
    """k-NN of the teacher's features on labelled pictures, and the figures it must beat."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        path = args.eval_data_path or args.data_path
        flag = "--eval_data_path" if args.eval_data_path else "--data_path"
        self.train, self.val = (data.open_images(path, part, args.in_chans, args.max_pixels, flag)
                                for part in ("train", "val"))
        for images, part in ((self.train, "train"), (self.val, "val")):
            if images.labels is None:
                raise ValueError(f"--eval_data_path {path}: its {part} part has no labels; --eval_knn_every needs "
                                 "train/ and val/ folders of class folders")
        from splits import Part, match_classes

        parts = (Part(torch.empty(0), images.labels, images.classes) for images in (self.train, self.val))
        train, val = match_classes(*parts)  # by name: a class may be missing in one part
        self.labels, self.n_classes = (train.labels, val.labels), len(train.classes)

    def knn(self, backbone: nn.Module | None, autocast=None) -> tuple[float, float]:
        """(top-1, top-5) in % of 20-NN on a backbone's features, or on raw pixels for None."""
        from eval_knn import knn_classifier

        try:
            found = [self.features(images, backbone, autocast) for images in (self.train, self.val)]
        except ValueError as error:
            raise data.Unreadable(f"--eval_data_path: {error}; evaluation needs all images: remove it") from error
        train, val = zip(found, self.labels, strict=True)
        return knn_classifier(*train, *val, k=20, T=0.07, num_classes=self.n_classes)

    def features(self, images: data.Images, backbone: nn.Module | None, autocast) -> torch.Tensor:
        from features import extract_features, pixel_features

        if backbone is None:
            return pixel_features(images)
        backbone.eval()
        found = extract_features(backbone, self.transformed(images), 4 * self.args.batch_size_per_gpu,
                                 self.args.num_workers, self.device, autocast)
        backbone.train()
        return found

    def baselines(self, backbone: nn.Module, autocast) -> dict[str, float]:
        """Top-1 of the untrained network and of raw pixels: a backbone that does not beat them has learned nothing."""
        found = {"untrained": self.knn(backbone, autocast)[0], "pixels": self.knn(None)[0]}
        if parallel.is_main():
            print(f"20-NN before training: {found['untrained']:.1f} % on this network's features, "
                  f"{found['pixels']:.1f} % on raw pixels", flush=True)
        return found

    def transformed(self, images):
        crop = self.args.global_crops_size
        return data.EvalImages(images, round(crop * 256 / 224), crop, self.args.mean, self.args.std)


def setup(args: argparse.Namespace) -> Run:
    """Everything that bad input can break, before anything is written. Raises flags.Refused in one line."""
    try:
        check_args(args)
        device = parallel.start(args.device, args.dist_url, args.dist_timeout)
        run = Run(args, device)
        found = checkpoint.read_latest(args.output_dir)
        if found:
            run.resume(*found)
        flags.prepare_output(Path(args.output_dir))
    except (ValueError, OSError) as error:
        raise flags.Refused(error) from error
    return run


def train_dino(args: argparse.Namespace) -> bool:
    """Set up, resume if there is something to resume, train. Returns False if a signal ended it early."""
    run = setup(args)
    describe(run)
    log = metrics.Log(args.output_dir, run.step // run.plan.steps_per_epoch, run.step, args.tensorboard)
    if run.evaluation and "untrained" not in run.knn:
        run.knn |= run.evaluation.baselines(run.teacher.backbone, run.autocast())
    finished = train(run, log)
    if finished and parallel.is_main():
        save_pictures(run)
    return finished


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_augmentation(args: argparse.Namespace) -> utils.DataAugmentationDINO:
    return utils.DataAugmentationDINO(
        args.global_crops_scale, args.local_crops_scale, args.local_crops_number, args.global_crops_size,
        args.local_crops_size, args.mean, args.std,
    )


def describe(run: Run) -> None:
    """What is about to run, in four lines: what a reader of the console asks first."""
    if not parallel.is_main():
        return
    args, plan = run.args, run.plan
    n_params = sum(p.numel() for p in run.student.backbone.parameters())
    used = plan.steps_per_epoch * args.batch_size_per_gpu * args.grad_accum_steps * parallel.world_size()
    print(f"{args.arch}: {n_params / 1e6:.1f} M parameters; K {args.out_dim}; {run.device}, "
          f"{str(run.dtype or torch.float32).removeprefix('torch.')}, {parallel.world_size()} process(es)")
    print(f"{args.data_path}: {len(run.images)} images, {used} used an epoch; 2 x {args.global_crops_size} + "
          f"{args.local_crops_number} x {args.local_crops_size} pixels")
    print(f"{plan.steps} steps of {used // plan.steps_per_epoch} images, {plan.steps_per_epoch} an epoch; "
          f"peak learning rate {plan.lr.max():.2e}", flush=True)


def write_epoch(run: Run, log: metrics.Log, epoch: int) -> None:
    values = {f"train_{k}": v for k, v in run.meters.means().items()}
    values |= {"train_ln_k": math.log(run.args.out_dim), "epoch": epoch, "step": run.step}
    console = f"epoch {epoch} done: loss {values['train_loss']:.4f}"
    if run.evaluation and run.knn.get("epoch") == epoch:
        values |= {f"knn_{k}": v for k, v in run.knn.items() if k != "epoch"}
        console += (f"; 20-NN top-1 {run.knn['top1']:.1f} %, best {run.knn['best']:.1f} % "
                    f"(untrained {run.knn['untrained']:.1f} %, raw pixels {run.knn['pixels']:.1f} %)")
    log.epoch(console, values)


def save_pictures(run: Run) -> None:
    """The curves of the run, and where the teacher looks in six pictures."""
    import plots

    images, output_dir = run.images, Path(run.args.output_dir)

    plots.training_curves([output_dir / "log.txt"], output_dir / "curves.png")
    names = ["curves.png"]
    if isinstance(run.teacher.backbone, VisionTransformer) and run.args.in_chans == 3:
        chosen = [data.resized(image, run.args.global_crops_size) for image in data.first_readable(images, 6)]
        plots.save_attention(run.teacher.backbone, chosen, output_dir / "attention.png", run.args.mean, run.args.std)
        names.append("attention.png")
    print(f"wrote {', '.join(names)}, log.txt and {run.last_saved} in {output_dir}", flush=True)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused, 1 stopped by an error, 75 stopped by a signal, to be continued."""
    try:
        finished = train_dino(args)
    except flags.Refused as error:
        print(f"main_dino.py: error: {error}", file=sys.stderr)
        return 2
    except (metrics.NonFinite, data.TooManyBadImages) as error:
        if parallel.is_main():
            print(f"main_dino.py: stopped: {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:  # of this process alone
        reason = error if isinstance(error, data.Unreadable) else flags.worker_death(error)
        if reason is None:
            raise
        print(f"main_dino.py: stopped: {reason}", file=sys.stderr, flush=True)
        return 1
    finally:
        parallel.stop()
    if not finished:
        print(f"stopped by a signal and saved; start again to continue (exit code {TO_BE_CONTINUED})", flush=True)
        return TO_BE_CONTINUED
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
