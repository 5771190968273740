"""Pretrain a backbone with DINO (arXiv 2104.14294) on a folder of images, without labels.

    python main_dino.py @presets/shapes.txt --output_dir output/shapes
    torchrun --nproc_per_node=8 main_dino.py --arch vit_small --data_path /path/to/images --output_dir output/run

Shapes: B images a process and micro-batch, L local crops, V = 2 + L views, K prototypes, D width.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flags
import parallel
import utils
from imagesets import loaders
from pretraining import metrics, monitor, replay
from pretraining.faults import TO_BE_CONTINUED, Requests, lost_process
from pretraining.run import Run, make_augmentation, set_lr_and_wd
from vision_transformer import VITS
from weights import checkpoints


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Pretrain a backbone with DINO on images without labels.")
    add = parser.add_argument

    # Network
    add("--arch", default="vit_small", help="vit_nano, vit_tiny, vit_small, vit_base, or torchvision's or timm's name")
    add("--patch_size", type=flags.positive_int, default=16, help="pixels of a ViT's patch; 8 is better and 5x slower")
    add("--out_dim", type=flags.number(int, 2), default=65536, help="K, prototypes; fewer for small data")
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
    add("--parallel", choices=("ddp", "fsdp"), default="ddp",
        help="several processes: each holds the networks, or (fsdp) its part of them")
    add("--compile", nargs="?", const="default", choices=("default", "reduce-overhead", "max-autotune"),
        help="torch.compile networks and colours; a mode of torch's for the networks may follow: reduce-overhead is "
             "CUDA graphs")
    add("--grad_checkpointing", nargs="?", const="blocks", choices=("blocks", "layers"),
        help="keep less for backward and compute it again, so that larger batches fit: whole blocks for a fifth of the "
             "time, or (layers) norms and GELU, a third of the memory, for a fiftieth")

    # Crops
    add("--global_crops_scale", type=flags.fraction, nargs=2, default=(0.4, 1.0), help="share of the area, low high")
    add("--local_crops_scale", type=flags.fraction, nargs=2, default=(0.05, 0.4), help="share of the area, low high")
    add("--local_crops_number", type=flags.number(int, 0, 1000), default=8,
        help="local crops an image; 0 trains on two crops")
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
    add("--max_pixels", type=flags.positive_int, default=loaders.MAX_PIXELS,
        help="larger files count as undecodable: a guard against decompression bombs")
    add("--max_bad_images", type=flags.fraction, default=0.01, help="share of undecodable files that stops the run")
    add("--output_dir", default=".", help="checkpoints and logs; a run that finds its own checkpoint there resumes")
    add("--saveckp_freq", type=flags.count, default=20, help="epochs between checkpoints that are kept; 0: none")
    add("--saveckp_every_steps", type=flags.count, default=0, help="steps between checkpoints; 0: epochs only")
    add("--saveckp_every_minutes", type=flags.non_negative, default=0, help="minutes between checkpoints; 0: never")
    add("--keep_checkpoints", type=flags.count, default=0,
        help="how many of the checkpoints of --saveckp_freq are kept, the newest; 0: all")
    add("--seed", type=flags.seed, default=0, help="of the weights, the order and the views")
    add("--eval_knn_every", type=flags.count, default=0, help="epochs between k-NN evaluations; 0: never")
    add("--eval_data_path", default="", help="labelled images with train and val (or test) parts; empty: --data_path")
    add("--replay", default="", metavar="FAILURE", help="look into a failure.pt that a loss of NaN left, and exit")
    add("--log_every", type=flags.positive_int, default=10, help="steps between progress lines and health checks")
    add("--pictures_every", type=flags.count, default=0,
        help="epochs between pictures of the teacher's attention and patch tokens (PCA) on six fixed images; 0: never")
    add("--tensorboard", action="store_true", help="write scalars and pictures for TensorBoard into --output_dir")
    add("--wandb", action="store_true", help="send them to Weights & Biases; WANDB_PROJECT, WANDB_MODE are heeded")
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
    if args.parallel == "fsdp" and args.precision == "fp16":  # each process would judge overflows by its own part
        raise ValueError("--parallel fsdp with --precision fp16: choose --precision bf16 or fp32")
    if args.precision in ("fp16", "bf16") and not args.use_fp16:
        raise ValueError(f"--use_fp16 false contradicts --precision {args.precision}; leave one of them out")
    if args.compile and args.parallel == "fsdp":
        raise ValueError(f"--compile {args.compile} with --parallel fsdp is not supported; leave one of them out")
    if args.compile in ("reduce-overhead", "max-autotune") and args.grad_accum_steps > 1:  # their results do not last
        raise ValueError(f"--compile {args.compile} with --grad_accum_steps {args.grad_accum_steps} is not supported: "
                         "CUDA graphs take a micro-batch's gradients back; give --compile default")
    for name in ("tensorboard", "wandb"):
        if getattr(args, name) and not metrics.installed(name):
            raise ValueError(f"--{name}: not installed; pip install {name}")
    if args.init_from and not os.path.isfile(args.init_from):
        raise ValueError(f"--init_from {args.init_from}: no such file; weights are never downloaded")


def setup(args: argparse.Namespace) -> Run:
    """Everything that bad input can break, before anything is written. Raises flags.Refused in one line."""
    try:
        check_args(args)
        device = parallel.start(args.device, args.dist_url, args.dist_timeout)
        torch.backends.cudnn.benchmark = True  # crops have fixed sizes: convolutions are chosen by trial, once
        run = Run(args, device)
        found = checkpoints.read_latest(args.output_dir)
        if found:
            run.resume(*found)
        flags.prepare_output(Path(args.output_dir))
        if parallel.is_main():
            checkpoints.remove_temporary(args.output_dir)
    except (ValueError, OSError) as error:
        raise flags.Refused(error) from error
    except (RuntimeError, MemoryError) as error:
        if not (reason := flags.out_of_memory(error)):
            raise
        raise flags.Refused(reason) from error
    return run


def train_dino(args: argparse.Namespace) -> bool:
    """Set up, resume if there is something to resume, train. Returns False if a signal ended it early."""
    run = setup(args)
    monitor.describe(run)
    if run.evaluation and "untrained" not in run.knn:
        run.knn |= run.evaluation.baselines(run.first_backbone(), run.autocast())
    log = metrics.Log(args, run.step // run.plan.steps_per_epoch, run.step, run.plan.steps)
    try:
        if args.pictures_every and run.step == 0:
            save_pictures(run, log, "start")
        finished = train(run, log)
    finally:
        log.close()
    if finished:
        backbone = run.teacher_backbone()  # all processes help, where it is sharded
        if parallel.is_main():
            names = monitor.save_last_pictures(run.images, backbone, args)
            print(f"wrote {', '.join(names)}, log.txt and {run.last_saved} in {args.output_dir}", flush=True)
    return finished


def save_pictures(run: Run, log: metrics.Log, when: str) -> None:
    backbone = run.teacher_backbone()
    if parallel.is_main():
        log.pictures(monitor.pictures(run.images, backbone, run.args), when, run.step)


# ---- The loop ----


def train(run: Run, log: metrics.Log) -> bool:
    """The training loop, from `run.step` to the plan's end. Returns False when a signal ended it early.

    Raises metrics.NonFinite at the first look (logged steps, checkpoints) after a step that was not finite.
    """
    args, plan, device, student, dino_loss = run.args, run.plan, run.device, run.student, run.dino_loss
    if parallel.world_size() > 1 and not run.sharded:
        student = DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)
    augmentation = make_augmentation(args)
    batches = loaders.on_device(load(run, augmentation, run.step, plan.steps), device)
    bad_images = loaders.BadImages(len(run.images), args.max_bad_images)
    watch, window, clock = metrics.FiniteWatch(device), metrics.Meters(), metrics.Clock()
    requests = Requests(device, args.saveckp_every_minutes)
    if not run.scaler.is_enabled():
        run.optimizer.found_inf = watch.found  # keeps the weights before a step that is not finite

    while run.step < plan.steps:
        step, epoch = run.step, run.step // plan.steps_per_epoch
        run.rng[step] = replay.torch_rng(device)
        set_lr_and_wd(run.optimizer, float(plan.lr[step]), float(plan.wd[step]))
        step_loss, teacher_means = torch.zeros((), device=device), []
        for micro in range(args.grad_accum_steps):
            batch = clock.next(batches)
            bad_images.add(batch["bad"])
            crops = augmentation.finish(batch["crops"], batch["params"])
            last = micro == args.grad_accum_steps - 1
            with nullcontext() if last or student is run.student else student.no_sync():
                loss, features, teacher_out = forward_backward(run, student, crops, epoch)
            step_loss += loss / args.grad_accum_steps
            teacher_means.append(teacher_out.float().mean(0, keepdim=True))
        run.scaler.unscale_(run.optimizer)
        norms = utils.clip_gradients(run.student, args.clip_grad, per_tensor=args.clip_mode == "tensor")
        watch.update(step, step_loss, None if run.scaler.is_enabled() else norms)
        utils.cancel_gradients_last_layer(epoch, run.student, args.freeze_last_layer)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        utils.ema_update(run.student, run.teacher, plan.momentum[step])
        window.update(loss=step_loss)
        run.meters.update(loss=step_loss, lr=plan.lr[step], wd=plan.wd[step])
        clock.steps += 1

        if step % args.log_every == 0 or step + 1 == plan.steps:
            check_finite(run, watch, step + 1)
            bad_images.share()
            window.update(**metrics.health(teacher_out, features, loss, dino_loss, epoch))
            monitor.log_step(run, log, step, epoch, window, clock)
        center = dino_loss.center
        dino_loss.update_center(torch.cat(teacher_means))
        dino_loss.center = torch.where(watch.found > 0, center, dino_loss.center)
        run.step += 1
        stop, save = requests.agreed(run.step)
        if run.step % plan.steps_per_epoch == 0 or run.step == plan.steps:
            check_finite(run, watch, step + 1)
            end_epoch(run, log, epoch)
            clock.reset()
        elif stop or save or (args.saveckp_every_steps and run.step % args.saveckp_every_steps == 0):
            check_finite(run, watch, step + 1)
            run.save(checkpoints.NAME)
        if stop and run.step < plan.steps:
            return False
    return True


def forward_backward(run: Run, student: nn.Module, crops: list[Tensor], epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Add a micro-batch's gradients to the student's parameters.

    Args:
        student: run.student, or what makes its gradients those of all processes.
        crops: [(2B, C, g, g), (LB, C, l, l)], normalized.

    Returns:
        The loss, and the teacher's features (2B, D) and output (2B, K), without gradients.
    """
    with run.autocast():
        with torch.no_grad():
            # Cloned, as a CUDA graph (--compile reduce-overhead) takes its results back when another one starts.
            features = run.teacher.features(crops[:1]).clone()  # (2B, D), global views only
            teacher_out = run.teacher.head(features).clone()  # (2B, K)
        student_out = student(crops)  # (VB, K)
    loss = run.dino_loss(student_out, teacher_out, epoch, update_center=False)  # float32, outside autocast
    run.scaler.scale(loss / run.args.grad_accum_steps).backward()
    return loss.detach(), features, teacher_out


def load(run: Run, augmentation: utils.DataAugmentationDINO, first: int, last: int):
    """The micro-batches of steps first ... last - 1; one loader for all epochs: its workers never start anew."""
    accum = run.args.grad_accum_steps
    return loaders.batches(
        run.images, augmentation, run.args.batch_size_per_gpu, run.args.num_workers, run.args.seed, parallel.rank(),
        parallel.world_size(), batches_per_epoch=run.plan.steps_per_epoch * accum, first_batch=first * accum,
        last_batch=last * accum, pin_memory=run.device.type == "cuda",
    )


def check_finite(run: Run, watch: metrics.FiniteWatch, updates: int) -> None:
    """Stop the run at a step that was not finite, and keep what it takes to look into it.

    `updates`: how many the teacher has had.
    """
    try:
        watch.check(run.last_saved)
    except metrics.NonFinite as found:
        # The crops are a function of the step, so they are made again rather than kept.
        batches = load(run, make_augmentation(run.args), found.step, found.step + 1)
        momenta = run.plan.momentum[found.step : updates]
        path = replay.save_failure(run, found, batches, run.rng[found.step], momenta)
        found.args = (f"{found}; to look into it: python main_dino.py --replay {path}",)
        raise
    for step in [s for s in run.rng if s < updates]:
        del run.rng[step]


def end_epoch(run: Run, log: metrics.Log, epoch: int) -> None:
    """k-NN when it is due, the line of the epoch, then the checkpoints.

    The one to resume from comes last: a kill before it repeats what is left of the epoch, and so writes the others.
    """
    args, names = run.args, []
    if args.saveckp_freq and (epoch + 1) % args.saveckp_freq == 0:
        names.append(f"checkpoint{epoch:04d}.pth")
    if run.evaluation and ((epoch + 1) % args.eval_knn_every == 0 or run.step == run.plan.steps):
        top1, top5 = run.evaluation.knn(run.teacher_backbone(), run.autocast())
        run.knn |= {"epoch": epoch, "top1": top1, "top5": top5}
        if run.knn["top1"] > run.knn.get("best", -1):
            run.knn |= {"best": run.knn["top1"], "best_epoch": epoch}
            names.append(checkpoints.BEST)
    monitor.write_epoch(run, log, epoch)
    if args.pictures_every and ((epoch + 1) % args.pictures_every == 0 or run.step == run.plan.steps):
        save_pictures(run, log, f"epoch{epoch:04d}")
    run.meters = metrics.Meters()
    run.save(*names, checkpoints.NAME)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused, 1 stopped by an error, 75 stopped by a signal, to be continued."""
    try:
        return outcome(args)
    except RuntimeError as error:  # torch's word of a worker whose broken connection was just being told
        if not (reason := flags.worker_death(error)):
            raise
        return stopped(reason)


def outcome(args: argparse.Namespace) -> int:
    try:
        if args.replay:
            return replay_step(args)
        if train_dino(args):
            return 0
        if parallel.is_main():
            print(f"stopped by a signal and saved; start again to continue (exit code {TO_BE_CONTINUED})", flush=True)
        return TO_BE_CONTINUED
    except flags.Refused as error:
        print(f"main_dino.py: error: {error}", file=sys.stderr)
        return 2
    except (metrics.NonFinite, loaders.TooManyBadImages) as error:  # of all processes
        return stopped(error, parallel.is_main())
    except (OSError, EOFError) as error:  # of one: a full disk, say
        return stopped(flags.worker_death(error) or error)
    except RuntimeError as error:
        known = isinstance(error, loaders.Unreadable) and error
        if reason := known or flags.worker_death(error) or flags.out_of_memory(error):
            return stopped(reason)  # of one
        if not (reason := lost_process(error)):
            raise
        # Two processes say so, as one of them may be the one that is lost.
        return stopped(f"{reason}; start again to continue from the last checkpoint in {args.output_dir}",
                       parallel.rank() < 2)
    finally:
        parallel.stop()


def replay_step(args: argparse.Namespace) -> int:
    try:
        replay.replay(args.replay, parallel.pick_device(args.device))
    except (ValueError, OSError) as error:
        raise flags.Refused(error) from error
    return 0


def stopped(reason: object, say_so: bool = True) -> int:
    if say_so:
        print(f"main_dino.py: stopped: {reason}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    arguments = get_args_parser().parse_args()
    end = parallel.leave if arguments.parallel == "fsdp" else sys.exit
    end(main(arguments))
