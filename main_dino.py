"""Pretrain a backbone with DINO (arXiv 2104.14294) on a folder of images, without labels.

    python main_dino.py @presets/shapes.txt --output_dir output/shapes
    torchrun --nproc_per_node=8 main_dino.py --arch vit_small --data_path /path/to/images --output_dir output/run

Shapes: B images per process and micro-batch, L local crops, V = 2 + L views, K prototypes, D width.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import flags
import parallel
import utils
from imagesets import loaders
from imagesets.bad_images import BadImages
from pretraining import compiling, faults, memory, monitor, networks, options, session
from pretraining.faults import TO_BE_CONTINUED, Requests  # noqa: F401 - the launcher reads the code
from pretraining.health import collapse, few_directions, health
from pretraining.logs import Log
from pretraining.meters import Clock, Meters
from pretraining.plan import (
    Plan,
    check_min_lr,
    check_warmups,
    drop_by_epoch,
    early_epochs,
    long_warmups,
    steps_per_epoch,
)
from pretraining.published import train_one_epoch  # noqa: F401 - published under this module's name, as the two below
from pretraining.replay import Method, replay, view_losses
from pretraining.session import Ends, add_gradients
from pretraining.state import Run, plain_settings, seed_everything
from utils import DataAugmentationDINO, DINOLoss  # noqa: F401
from vision_transformer import DINOHead, VisionTransformer
from weights import checkpoints
from weights.backbones import supported_drop_path_rate


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Pretrain a backbone with DINO on images without labels.", hints={
        "--resume": "a run resumes by itself: start it again with the same --output_dir;"})

    add = parser.add_argument_group("network").add_argument
    add("--arch", default="vit_small",
        help="vit_nano, vit_tiny, vit_small, vit_base, or a name of torchvision or timm; resnet18_cifar has the stem "
             "for small images")
    add("--patch_size", type=flags.positive_int, default=16,
        help="pixels of a ViT's patch; smaller patches give better features, 8 at five times the cost")
    add("--out_dim", type=flags.number(int, 2), default=65536,
        help="K, the number of prototypes; use fewer for small data sets")
    add("--norm_last_layer", type=flags.boolean, default=True,
        help="keep the norm of the prototypes at 1, which stabilizes training; false can give better features with "
             "ViT-S and long runs")
    add("--use_bn_in_head", type=flags.boolean, default=False, help="batch norm in the projection head")
    add("--drop_path_rate", type=flags.number(float, 0, 0.99), default=flags.Default(0.1),
        help="stochastic depth of the student; the default is 0 for networks without it")
    options.add_init_flags(add)

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
    options.add_length_flags(add)

    options.add_crop_flags(parser, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))
    options.add_data_flags(parser)
    options.add_output_flags(parser)
    options.add_hardware_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses combinations that no single flag's type can see."""
    options.check(args, "main_dino.py @presets/shapes.txt --output_dir output/shapes")


# ---- Setting up ----


def with_supported_rate(args: argparse.Namespace) -> argparse.Namespace:
    """A copy of the flags, in which --drop_path_rate is one that the network supports."""
    rate = supported_drop_path_rate(args.arch, float(args.drop_path_rate), args.in_chans,
                                    isinstance(args.drop_path_rate, flags.Default))
    return argparse.Namespace(**vars(args) | {"drop_path_rate": rate})


def with_compile(args: argparse.Namespace, device: torch.device, plan: Plan) -> argparse.Namespace:
    """A copy of the flags, in which --compile is what the run does: off, or a mode."""
    flop = partial(compiling.flop, args.arch, args.patch_size, args.in_chans,
                   (args.global_crops_size, args.local_crops_size), args.local_crops_number,
                   args.batch_size_per_gpu * args.grad_accum_steps, plan.steps)
    setting = compiling.decide(args.compile, args.output_dir, device, args.arch, args.parallel == "fsdp", flop)
    return argparse.Namespace(**vars(args) | {"compile": setting})


def make_plan(args: argparse.Namespace, n_images: int) -> Plan:
    """Schedules by optimizer step (section "Implementation details")."""
    world = parallel.world_size()
    per_epoch = steps_per_epoch(n_images, args.batch_size_per_gpu, args.grad_accum_steps, world)
    steps = args.steps or args.epochs * per_epoch
    epochs = steps / per_epoch
    check_warmups(epochs, args.steps, warmup_epochs=args.warmup_epochs,
                  warmup_teacher_temp_epochs=args.warmup_teacher_temp_epochs)
    peak = args.lr * args.batch_size_per_gpu * world * args.grad_accum_steps / 256  # linear scaling rule
    check_min_lr(args.min_lr, peak, args.lr, options.images_per_step(args), args.output_dir)
    return Plan(
        per_epoch, steps,
        lr=utils.cosine_scheduler(peak, args.min_lr, epochs, per_epoch, warmup_epochs=args.warmup_epochs),
        wd=utils.cosine_scheduler(args.weight_decay, args.weight_decay_end, epochs, per_epoch),
        momentum=utils.cosine_scheduler(args.momentum_teacher, 1.0, epochs, per_epoch),
        early_epochs=early_epochs(args.low_resolution_epochs, math.ceil(epochs)),
        token_drop=drop_by_epoch(args.token_drop, math.ceil(epochs)),
    )


def make_backbone(args: argparse.Namespace, drop_path_rate: float = 0.0) -> tuple[nn.Module, int]:
    return networks.make_backbone(args.arch, args.patch_size, args.in_chans, args.global_crops_size, drop_path_rate)


def make_networks(args: argparse.Namespace) -> tuple[utils.MultiCropWrapper, utils.MultiCropWrapper]:
    def build(rate: float) -> utils.MultiCropWrapper:
        backbone, width = make_backbone(args, rate)
        head = DINOHead(width, args.out_dim, args.use_bn_in_head, args.norm_last_layer)
        return utils.MultiCropWrapper(backbone, head)

    return networks.pair(build, args.drop_path_rate, args.init_from, args.init_in_chans)


def make_loss(args: argparse.Namespace, epochs: int) -> utils.DINOLoss:
    return utils.DINOLoss(args.out_dim, 2 + args.local_crops_number, args.warmup_teacher_temp, args.teacher_temp,
                          args.warmup_teacher_temp_epochs, epochs)


def make_run(args: argparse.Namespace, plan: Plan, n_images: int, device: torch.device) -> Run:
    """Networks, loss and optimizer at the start of a run."""
    seed_everything(args.seed)  # the networks start the same on every process
    student, teacher = make_networks(args)
    networks.check_crop_sizes(student.backbone, args.arch, args.in_chans, **options.crop_sizes(args))
    sizes, early = (args.global_crops_size, args.local_crops_size), options.early_sizes(args)
    if plan.early_epochs:
        networks.check_crop_sizes(student.backbone, args.arch, args.in_chans,
                                  low_resolution_sizes=min(early[: 2 if args.local_crops_number else 1]))
    for both in (sizes, early) if plan.early_epochs else (sizes,):
        networks.check_batch_norm(student.backbone, args.arch, args.in_chans, args.batch_size_per_gpu, *both,
                                  args.local_crops_number, device)
    student, teacher = networks.on_device(student, device), networks.on_device(teacher, device)
    if args.grad_checkpointing:
        networks.checkpoint_gradients(student.backbone, args.grad_checkpointing, args.arch)
    if mode := compiling.mode(args.compile):
        # The student is one graph; `utils.losses` calls the teacher's backbone and head separately.
        networks.compile_networks(mode, student, *teacher.children())
    seed_everything(args.seed + parallel.rank())  # stochastic depth differs between the processes
    dtype = networks.half_precision(args.precision, args.use_fp16, device)
    sharded = networks.shard(student, teacher, device, dtype, args.precision) if args.parallel == "fsdp" else False
    optimizer = utils.build_optimizer(args.optimizer, student)
    computed_over = {}
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in student.modules()):
        # Several processes normalize together on GPUs only (networks.on_device).
        computed_over["batch norm"] = "grad_accum_steps" if device.type == "cuda" else "batch_size_per_gpu"
    return Run(student, teacher, make_loss(args, plan.epochs).to(device), optimizer, device, dtype,
               plan.steps_per_epoch, plain_settings(vars(args), n_images), Path(args.output_dir),
               args.keep_checkpoints, make_backbone=(lambda: make_backbone(args)[0]) if sharded else None,
               computed_over=computed_over)


def describe(args: argparse.Namespace, run: Run, plan: Plan, n_images: int) -> str:
    """What is about to run, in a few lines."""
    lines = options.description(args, run, plan, f"K {args.out_dim}", n_images)
    if isinstance(run.student.backbone, VisionTransformer):
        lines.append(memory.estimate(
            run.student, args.batch_size_per_gpu, args.global_crops_size, args.local_crops_size,
            args.local_crops_number, 0.0, run.dtype, args.grad_checkpointing, bool(run.make_backbone),
            plan.token_drop[-1] if plan.token_drop else 0.0))
    # not of the temperature's, which is off by default
    lines += long_warmups(plan.steps, plan.steps_per_epoch, warmup_epochs=args.warmup_epochs,
                          freeze_last_layer=args.freeze_last_layer)
    lines += options.without_effect(args, get_args_parser().parse_args([]), {})
    return "\n".join(lines)


def pretrain(args: argparse.Namespace) -> int:
    """Set up, resume if there is something to resume, train. Returns the exit code."""
    check_args(args)
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    args = with_supported_rate(args)
    torch.backends.cudnn.benchmark = True  # crops have fixed sizes: convolutions are chosen by trial, once
    with session.memory_refused():
        ends = options.open_data(args, device)
        plan = make_plan(args, len(ends.images))
        args = with_compile(args, device, plan)
        run = make_run(args, plan, len(ends.images), device)
        ends = options.in_memory(args, ends, device)
    return session.carry_out(run, plan, ends, describe(args, run, plan, len(ends.images)),
                             lambda log: train(args, run, plan, ends, log), args.extend, args.tensorboard,
                             vars(args) if args.wandb else None)


# ---- The loop ----


def train(args: argparse.Namespace, run: Run, plan: Plan, ends: Ends, log: Log) -> bool:
    """The training loop, from `run.step` to the plan's end. Returns False when a signal ended it early.

    Raises:
        failures.NonFinite: at the first look (logged steps, checkpoints) after a step that was not finite.
    """
    student = networks.distributed(run.student, run.device)
    load = make_loader(args, ends, plan, run.device)
    run.watch_steps(plan, load)
    batches, augmentation = load(run.step, plan.steps), options.augmentation(args)
    bad_images = BadImages(len(ends.images), args.max_bad_images)
    window, clock, requests = Meters(), Clock(), Requests(run.device, args.saveckp_every_minutes)
    ln_k = math.log(args.out_dim)
    if run.step == 0:
        session.draw(run, ends, log, "start")

    def losses(student: nn.Module, crops: list[Tensor], batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        return utils.losses(student, run.teacher, crops, run.dino_loss, run.epoch, batch.get("kept"))

    while run.step < plan.steps:
        step, epoch = run.step, run.epoch
        run.watch.begin(step)
        utils.set_lr_and_wd(run.optimizer, float(plan.lr[step]), float(plan.wd[step]))
        figures, parts = add_gradients(run, student, losses, augmentation.finish, batches, bad_images, clock,
                                       args.grad_accum_steps)
        run.scaler.unscale_(run.optimizer)
        norms = utils.clip_gradients(run.student, args.clip_grad, per_tensor=args.clip_mode == "tensor")
        figures |= run.watch.judge(figures, norms)
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
            extra |= {"loss_scale": run.scaler.get_scale()} if run.scaler.is_enabled() else {}
            run.meters.update(**extra)
            window.update(**extra)
            means = window.means()
            rows = 2 * args.batch_size_per_gpu
            warning = collapse(means["entropy"], ln_k, means["prototypes_used"], rows=rows,
                               warming_up=step <= plan.warmup)
            warning = warning or few_directions(means["feature_rank"], means["prototypes_used"], rows)
            monitor.log_step(log, plan, step, means, f"ln K {ln_k:.2f}", warning, options.images_per_step(args),
                             *clock.read())
            window.reset()
        run.dino_loss.update_center(parts["teacher_mean"])
        run.step += 1
        stop, save = requests.agreed(run.step)
        if run.step % plan.steps_per_epoch == 0 or run.step == plan.steps:
            session.end_epoch(run, plan, epoch, ln_k, ends, log)
            clock.reset()
        elif stop or save or (args.saveckp_every_steps and run.step % args.saveckp_every_steps == 0):
            run.save(checkpoints.NAME)
        if stop and run.step < plan.steps:
            return False
    return True


def make_loader(
    args: argparse.Namespace, ends: Ends, plan: Plan, device: torch.device
) -> Callable[[int, int], Iterator[dict]]:
    """(first, last) -> the micro-batches of steps first ... last - 1, from one loader whose workers never restart."""
    augmentation = options.augmentation(args)
    return loaders.steps(ends.source or ends.images, augmentation, args.batch_size_per_gpu, args.num_workers, args.seed,
                         args.grad_accum_steps, plan.steps_per_epoch, device,
                         pixels=ends.pixels,
                         **options.by_epoch(args, plan, augmentation))


# ---- The script ----


def replay_step(args: argparse.Namespace) -> None:
    def build(settings: Mapping, plan: Mapping) -> Method:
        stored = argparse.Namespace(**vars(get_args_parser().parse_args([])) | settings | {
            "init_from": "", "init_in_chans": "", "compile": "off"})
        (student, teacher), dino_loss = make_networks(stored), make_loss(stored, plan["epochs"])

        def losses(crops: list[Tensor], batch: Mapping, step: int) -> tuple[Tensor, dict]:
            return utils.losses(student, teacher, crops, dino_loss, step // plan["steps_per_epoch"], batch.get("kept"))

        def by_view(output: Tensor, parts: Mapping, step: int) -> str:
            views = view_losses(dino_loss, output, parts["teacher_output"], step // plan["steps_per_epoch"])
            return "by the student's view: " + " ".join(f"{x:g}" for x in views.tolist())

        return Method(student, teacher, dino_loss, options.augmentation(stored).finish, losses, by_view)

    replay(args.replay, parallel.pick_device(args.device), build)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused, 1 stopped by an error, 75 stopped by a signal, to be continued."""
    work = replay_step if args.replay else pretrain
    return flags.exit_code("main_dino.py", work, args, lambda error: faults.explain(error, args.output_dir))


if __name__ == "__main__":
    arguments = get_args_parser().parse_args()
    end = parallel.leave if arguments.parallel == "fsdp" else sys.exit
    end(main(arguments))
