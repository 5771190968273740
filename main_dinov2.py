"""Pretrain a Vision Transformer with DINOv2 (arXiv 2304.07193) on a folder of images, without labels.

    python main_dinov2.py @presets/dinov2_shapes.txt --output_dir output/shapes2
    torchrun --nproc_per_node=8 main_dinov2.py --arch vit_small --data_path /path/to/images --output_dir output/run

The loss is method/dinov2.py; docs/dinov2.md has the recipes. The defaults are those of the published short recipe
(ViT-L/16, 2,048 images per step), except for the architecture. Brackets in the help give the key of the published YAML
files where it has another name.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import flags
import parallel
import utils
from imagesets import loaders
from imagesets.bad_images import BadImages
from method import dinov2, masking
from method.dinov2 import BackboneAndHeads, DINOv2Loss
from method.groups import parameter_groups, set_lr_and_wd
from parallel import Refused
from pretraining import compiling, faults, memory, monitor, networks, options, session, sharding
from pretraining.faults import TO_BE_CONTINUED, Requests  # noqa: F401 - the launcher reads the code
from pretraining.health import collapse, few_directions, few_directions_dinov2, health_dinov2
from pretraining.logs import Log
from pretraining.meters import Clock, Meters
from pretraining.plan import (
    LONGEST,
    Plan,
    begun,
    check_min_lr,
    check_warmups,
    drop_by_epoch,
    early_epochs,
    long_warmups,
    steps_per_epoch,
)
from pretraining.replay import Method, replay
from pretraining.session import Ends, add_gradients
from pretraining.state import FROZEN, WARMUP_AFTER_FREEZE, Run, plain_settings, seed_everything
from protocols.features import weights_hash
from vision_transformer import FFN_LAYERS, VITS, DINOHead
from weights import checkpoints

# Probabilities of blur: first global crop, second, local crops.
BLUR = {"trained": (0.0, 0.9, 0.5), "written": (1.0, 0.1, 0.5)}
MOST_PROTOTYPES = 128  # per image of a step, above which a run is warned; published recipes have 32 to 43
STUCK = 0.98  # of the loss of uniform outputs: a term that was never below it has not begun to learn
# Flags to try when all outputs are uniform, by --centering, and when one prototype is used.
UNIFORM = {
    "centering": "a lower --teacher_temp and --warmup_teacher_temp, --centering sinkhorn_knopp, or half the --lr",
    "sinkhorn_knopp": "a lower --teacher_temp and --warmup_teacher_temp, or half the --lr",
}
ONE = ("a higher --teacher_temp, half the --lr, --drop_path_rate 0.1, --adamw_beta2 0.99, or a longer "
       "--freeze_last_layer")


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Pretrain a Vision Transformer with DINOv2 on images without labels.", hints={
        "--resume": "a run resumes by itself: start it again with the same --output_dir;"})

    add = parser.add_argument_group("network").add_argument
    add("--arch", default="vit_small", help=f"one of {', '.join(VITS)}")
    add("--patch_size", type=flags.positive_int, default=16,
        help="pixels of a patch; the published weights have 14, with --local_crops_size 98")
    add("--ffn_layer", choices=tuple(FFN_LAYERS), default="",
        help="mlp, or swiglu as in the published long recipes; default: the architecture's")
    add("--num_register_tokens", type=flags.count, default=0,
        help="additional tokens, which keep global information out of the patch tokens; published: 0 or 4")
    add("--layerscale", type=flags.non_negative, default=1e-5,
        help="initial factor of each residual branch; 0: no LayerScale")
    add("--drop_path_rate", type=flags.number(float, 0, 0.99), default=0.3,
        help="share of the images for which a block of the student is skipped; use 0.1 or less for small networks and "
             "unstable runs")
    add("--drop_path_uniform", type=flags.boolean, default=True,
        help="the same rate in all blocks; false: increasing from 0")
    add("--interpolate_antialias", type=flags.boolean, default=False,
        help="interpolate position embeddings with antialiasing; give true and --interpolate_offset 0 to continue from "
             "published weights with registers")
    add("--interpolate_offset", type=flags.number(float, 0, 0.99), default=0.1,
        help="patches added to the size in the scale factor of that interpolation; 0: none")
    options.add_init_flags(add)
    add("--init_heads", action="store_true",
        help="take the heads from --init_from too, a checkpoint of this script or a published teacher_checkpoint.pth")

    add = parser.add_argument_group("heads").add_argument
    add("--out_dim", type=flags.number(int, 2), default=65536,
        help="K, the number of prototypes; use a few thousand for small data sets [dino.head_n_prototypes]")
    add("--head_bottleneck_dim", type=flags.positive_int, default=256, help="width before the prototypes")
    add("--head_hidden_dim", type=flags.positive_int, default=2048, help="width of the hidden layers")
    add("--head_nlayers", type=flags.positive_int, default=3, help="layers before the prototypes")
    add("--ibot_separate_head", type=flags.boolean, default=False,
        help="a separate head for patch tokens, as in the long recipes; false: one head for both [ibot.separate_head]")
    add("--ibot_out_dim", type=flags.count, default=0,
        help="K', the number of prototypes of the separate head; 0: as --out_dim [ibot.head_n_prototypes]")
    add("--ibot_head_bottleneck_dim", type=flags.positive_int, default=256,
        help="as --head_bottleneck_dim, of the separate head")
    add("--ibot_head_hidden_dim", type=flags.positive_int, default=2048,
        help="as --head_hidden_dim, of the separate head")
    add("--ibot_head_nlayers", type=flags.positive_int, default=3, help="as --head_nlayers, of the separate head")

    add = parser.add_argument_group("losses").add_argument
    add("--centering", choices=("centering", "sinkhorn_knopp"), default="centering",
        help="how the teacher's scores become targets: a running mean is subtracted (centering), or Sinkhorn-Knopp, "
             "which uses all prototypes equally, as in the long recipes")
    add("--dino_loss_weight", type=flags.non_negative, default=1.0, help="factor of the loss on class tokens")
    add("--ibot_loss_weight", type=flags.non_negative, default=1.0,
        help="factor of the loss on masked patches, which improves patch tokens")
    add("--koleo_loss_weight", type=flags.non_negative, default=0.1,
        help="factor of the term that spreads the features of different images; lower it if it outweighs the others")
    add("--koleo_all_processes", action="store_true",
        help="look for the nearest neighbours among the images of all processes, for few images per process")
    add("--mask_ratio", type=flags.fraction, nargs=2, default=(0.1, 0.5), metavar=("LOW", "HIGH"),
        help="lowest and highest share of patches that are masked in a masked crop [ibot.mask_ratio_min_max]")
    add("--mask_probability", type=flags.fraction, default=0.5,
        help="share of the global crops that are masked [ibot.mask_sample_probability]")

    add = parser.add_argument_group("teacher").add_argument
    add("--momentum_teacher", type=flags.fraction, default=0.992,
        help="momentum of the teacher's moving average at the start; rises to 1; use a higher value with small batches")
    add("--warmup_teacher_temp", type=flags.positive, default=0.04, help="teacher temperature at the start")
    add("--teacher_temp", type=flags.positive, default=0.07, help="teacher temperature after the warm-up")
    add("--warmup_teacher_temp_epochs", type=flags.non_negative, default=30, help="epochs of the temperature's warm-up")
    add("--distill_from", default="",
        help="distillation: the targets are those of the frozen network and heads in this checkpoint; the teacher, the "
             "student's moving average, is only the result; the student's crops are not masked; give --drop_path_rate "
             "0")
    add("--ibot_tokens", choices=("all", "masked"), default="all",
        help="with --distill_from: patches in the iBOT loss; masked: those that would be masked otherwise")

    add = parser.add_argument_group("optimization").add_argument
    add("--lr", type=flags.positive, default=0.004,
        help="peak learning rate for 1,024 images per step; scaled with the square root of the images per step "
             "[optim.base_lr]")
    add("--warmup_epochs", type=flags.non_negative, default=10, help="epochs of linear warm-up of the learning rate")
    add("--min_lr", type=flags.non_negative, default=1e-6, help="learning rate at the end of the cosine")
    add("--weight_decay", type=flags.non_negative, default=0.04, help="weight decay at the start")
    add("--weight_decay_end", type=flags.non_negative, default=0.4, help="weight decay at the end of its cosine")
    add("--layer_decay", type=flags.number(float, 0, 1, above=True), default=0.9,
        help="learning rate of a block as a fraction of the next one's; 1, as in the long recipes: all the same "
             "[optim.layerwise_decay]")
    add("--patch_embed_lr_mult", type=flags.non_negative, default=0.2,
        help="factor of the patch embedding's learning rate")
    add("--adamw_beta1", type=flags.number(float, 0, 0.999999), default=0.9, help="decay of AdamW's first moments")
    add("--adamw_beta2", type=flags.number(float, 0, 0.999999), default=0.999,
        help="decay of AdamW's second moments; use 0.99 for unstable runs")
    add("--clip_grad", type=flags.non_negative, default=3.0,
        help="largest gradient norm of the backbone and of each head; 0 turns clipping off")
    add("--freeze_last_layer", type=flags.non_negative, default=1,
        help="epochs in which the prototypes have learning rate 0 [optim.freeze_last_layer_epochs]")
    add("--freeze_backbone_epochs", type=flags.non_negative, default=0,
        help="epochs in which the backbone has learning rate 0, to train new heads on --init_from first, at the peak "
             "learning rate; --warmup_epochs and --freeze_last_layer begin after them")
    options.add_length_flags(add)
    add("--epoch_steps", type=flags.count, default=0,
        help="steps that count as one epoch of the flags above, warm-ups and freezing included; 0: a pass over the "
             "images. Published recipes count 1250, whatever the data [train.OFFICIAL_EPOCH_LENGTH]. Flags of "
             "evaluation and checkpoints always count passes")

    add = options.add_crop_flags(parser, global_scale=(0.32, 1.0), local_scale=(0.05, 0.32))
    add("--blur", choices=tuple(BLUR), default="trained",
        help="probability of blur of the first and second global crop and of local crops; trained: 0, 0.9 and 0.5, as "
             "the published weights were trained; written: 1, 0.1 and 0.5, as in DINO and as the published code means. "
             "Kernels are as wide as their sigma requires; those of the published training were cut off at 9 pixels")
    options.add_data_flags(parser)
    options.add_output_flags(parser)
    options.add_hardware_flags(parser, compile="off")  # not measured on a GPU
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses combinations that no single flag's type can see."""
    if args.arch not in VITS:
        raise Refused(f"--arch {args.arch}: masks replace the tokens of a Vision Transformer's patches; choose one of "
                      f"{', '.join(VITS)}, or main_dino.py for other networks")
    options.check(args, "main_dinov2.py @presets/dinov2_shapes.txt --output_dir output/shapes2", "mask_ratio")
    options.check_files(distill_from=args.distill_from)
    if args.compile == "auto":
        raise Refused("--compile auto: whether compiling pays was not measured for DINOv2; give --compile on or off")
    if args.compile not in ("off", "default"):
        raise Refused(f"--compile {args.compile}: the number of masked patches differs from step to step, which CUDA "
                      "graphs do not allow; give --compile default")
    if args.token_drop and all_patches(args):
        raise Refused(f"--token_drop {options.text(args.token_drop)}: --ibot_tokens all needs the tokens of all "
                      "patches; give --ibot_tokens masked, or leave it out")
    if args.token_drop and args.mask_probability and args.token_drop[0] + args.mask_ratio[1] >= 1:
        raise Refused(f"--token_drop {options.text(args.token_drop)}: masked patches are kept, and with --mask_ratio "
                      f"{options.text(args.mask_ratio)} no visible one may be left; lower either, to a sum below 1")
    if 0 < args.interpolate_offset < 1e-6:  # rounding would lose a row of patches
        raise Refused(f"--interpolate_offset {args.interpolate_offset:g}: give 0, or at least 1e-6")
    if args.ibot_tokens == "masked" and not args.distill_from:
        raise Refused("--ibot_tokens masked: without --distill_from the loss is on masked patches anyway; give that "
                      "too, or leave it out")
    if args.init_heads and not args.init_from:
        raise Refused("--init_heads: give the checkpoint that has the heads as --init_from")
    if args.freeze_backbone_epochs and not args.init_from and not begun(args.output_dir):
        raise Refused(f"--freeze_backbone_epochs {args.freeze_backbone_epochs:g}: the backbone is random without "
                      "--init_from; give that too, or leave it out")
    if not args.ibot_separate_head and not begun(args.output_dir):
        check_one_head(args, get_args_parser().parse_args([]))
    if not args.distill_from and args.mask_probability * args.ibot_loss_weight == 0 and args.ibot_separate_head:
        raise Refused(f"--mask_probability {args.mask_probability:g} and --ibot_loss_weight {args.ibot_loss_weight:g} "
                      "leave the patch head without training; give --ibot_separate_head false")


def check_one_head(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Refuses flags of the separate head where there is none, unless they state what the one head is."""
    for own in ("out_dim", "head_bottleneck_dim", "head_hidden_dim", "head_nlayers"):
        value, name = getattr(args, own), f"ibot_{own}"
        if (given := getattr(args, name)) not in (value, getattr(defaults, name)):
            raise Refused(f"--{name} {given}: patches have the head of --{own} {value}; give --ibot_separate_head "
                          "true, or leave it out")


def without_effect(args: argparse.Namespace) -> list[str]:
    """A warning for each flag that another one makes void."""
    void = {} if args.koleo_loss_weight else {"koleo_all_processes": "--koleo_loss_weight 0"}
    if all_patches(args):
        void |= dict.fromkeys(("mask_ratio", "mask_probability"), "--distill_from and --ibot_tokens all")
    elif not args.mask_probability:
        void["mask_ratio"] = "--mask_probability 0"
    return options.without_effect(args, get_args_parser().parse_args([]), void)


# ---- Setting up ----


def make_plan(args: argparse.Namespace, n_images: int) -> Plan:
    """Schedules by optimizer step."""
    per_epoch = steps_per_epoch(n_images, args.batch_size_per_gpu, args.grad_accum_steps, parallel.world_size())
    unit = args.epoch_steps or per_epoch  # steps of an epoch of the flags
    steps = args.steps or args.epochs * unit
    epochs = steps / unit
    check_warmups(epochs, args.steps, warmup_epochs=args.warmup_epochs,
                  warmup_teacher_temp_epochs=args.warmup_teacher_temp_epochs)
    frozen, warmup = round(args.freeze_backbone_epochs * unit), round(args.warmup_epochs * unit)  # steps
    if frozen < steps < frozen + warmup:
        raise Refused(f"--freeze_backbone_epochs {args.freeze_backbone_epochs:g} and --warmup_epochs "
                      f"{args.warmup_epochs:g}, which follows it, are longer than the run of {epochs:g} epochs; lower "
                      "either")
    peak = args.lr * math.sqrt(options.images_per_step(args) / 1024)
    check_min_lr(args.min_lr, peak, args.lr, options.images_per_step(args), args.output_dir)
    alone = frozen >= steps  # heads alone are trained
    lr = utils.cosine_scheduler(peak, args.min_lr, epochs, unit, args.warmup_epochs,
                                freeze_epochs=0 if alone else args.freeze_backbone_epochs)
    step = np.arange(steps)
    backbone_lr = lr * (step >= frozen)
    if frozen and not alone:  # the heads' is the peak, after a short ramp, until the backbone's has reached it
        ramp = utils.cosine_scheduler(peak, peak, epochs, unit, args.freeze_backbone_epochs / 10)
        lr = np.where(step < lr.argmax(), ramp, lr)
    last_frozen = (step >= frozen) & (step < round((args.freeze_backbone_epochs + args.freeze_last_layer) * unit))
    return Plan(
        per_epoch, steps, lr=lr,
        wd=utils.cosine_scheduler(args.weight_decay, args.weight_decay_end, epochs, unit),
        momentum=utils.cosine_scheduler(args.momentum_teacher, 1.0, epochs, unit),
        teacher_temp=utils.cosine_scheduler(args.teacher_temp, args.teacher_temp, epochs, unit,
                                            args.warmup_teacher_temp_epochs, args.warmup_teacher_temp),
        last_layer_lr=lr * ~last_frozen, backbone_lr=backbone_lr,
        early_epochs=early_epochs(args.low_resolution_epochs, math.ceil(steps / per_epoch)),
        token_drop=drop_by_epoch(args.token_drop, math.ceil(steps / per_epoch)))


def make_network(args: argparse.Namespace, drop_path_rate: float = 0.0) -> BackboneAndHeads:
    backbone, width = make_backbone(args, drop_path_rate)
    dino_head = DINOHead(width, args.out_dim, False, False, args.head_nlayers, args.head_hidden_dim,
                         args.head_bottleneck_dim)
    ibot_head = DINOHead(width, patch_prototypes(args), False, False, args.ibot_head_nlayers,
                         args.ibot_head_hidden_dim, args.ibot_head_bottleneck_dim)
    return BackboneAndHeads(backbone, dino_head, ibot_head if args.ibot_separate_head else None)


def make_backbone(args: argparse.Namespace, drop_path_rate: float = 0.0) -> tuple[nn.Module, int]:
    ffn = {"ffn_layer": args.ffn_layer} if args.ffn_layer else {}
    return networks.make_backbone(
        args.arch, args.patch_size, args.in_chans, args.global_crops_size, drop_path_rate, method="dinov2",
        drop_path_uniform=args.drop_path_uniform, drop_path_subset=True, init_values=args.layerscale,
        num_register_tokens=args.num_register_tokens, interpolate_antialias=args.interpolate_antialias,
        interpolate_offset=args.interpolate_offset, **ffn)


def make_networks(args: argparse.Namespace) -> tuple[BackboneAndHeads, BackboneAndHeads]:
    settings, state = networks.read_heads(args.init_from, "--init_from") if args.init_heads else ({}, {})
    student, teacher = networks.pair(partial(make_network, args), args.drop_path_rate, args.init_from,
                                     args.init_in_chans)
    if args.init_heads:
        networks.fill(student, state, settings, args.init_from, "--init_heads", heads_only=True)
        teacher.load_state_dict(student.state_dict())
    if args.distill_from or not args.mask_probability:
        student.backbone.mask_token.requires_grad_(False)  # nothing is masked
    return student, teacher


def make_loss(args: argparse.Namespace) -> DINOv2Loss:
    return DINOv2Loss(
        args.out_dim, patch_prototypes(args), args.centering, args.dino_loss_weight, args.ibot_loss_weight,
        args.koleo_loss_weight, args.koleo_all_processes, mask_student=not args.distill_from,
        all_patches=all_patches(args))


def patch_prototypes(args: argparse.Namespace) -> int:
    """K', the number of prototypes for patches."""
    return args.ibot_out_dim if args.ibot_separate_head and args.ibot_out_dim else args.out_dim


def all_patches(args: argparse.Namespace) -> bool:
    """Whether the iBOT loss is taken on all patches of the global crops, not on the masked ones."""
    return bool(args.distill_from) and args.ibot_tokens == "all"


def make_augmentation(args: argparse.Namespace) -> utils.DataAugmentationDINO:
    return options.augmentation(args, BLUR[args.blur])


def make_run(args: argparse.Namespace, plan: Plan, n_images: int, device: torch.device) -> Run:
    """Networks, loss and optimizer at the start of a run."""
    seed_everything(args.seed)  # the networks start the same on every process
    student, teacher = (network.to(device) for network in make_networks(args))
    if args.grad_checkpointing:
        networks.checkpoint_gradients(student.backbone, args.grad_checkpointing, args.arch)
    if args.compile == "default":  # the heads get another number of patches in each step
        compiling.prepare()
        networks.compile_networks(args.compile, student.backbone, *([] if args.distill_from else [teacher.backbone]))
    seed_everything(args.seed + parallel.rank())  # stochastic depth differs between the processes
    dtype = networks.half_precision(args.precision, args.use_fp16, device)
    sharded = networks.shard(student, teacher, device, dtype, args.precision) if args.parallel == "fsdp" else False
    groups = parameter_groups(dict(student.named_children()), args.layer_decay, args.patch_embed_lr_mult)
    optimizer = torch.optim.AdamW(groups, betas=(args.adamw_beta1, args.adamw_beta2), fused=True)
    settings = plain_settings(vars(args), n_images) | {"method": "dinov2", FROZEN: ""}
    settings |= {WARMUP_AFTER_FREEZE: True} if args.freeze_backbone_epochs else {}
    objective = make_loss(args)
    if args.centering == "centering" and (args.distill_from or args.init_heads):
        flag = "distill_from" if args.distill_from else "init_from"
        networks.fill_centers(objective, getattr(args, flag), f"--{flag}")
    return Run(student, teacher, objective.to(device), optimizer, device, dtype, plan.steps_per_epoch, settings,
               Path(args.output_dir), args.keep_checkpoints,
               make_backbone=(lambda: make_backbone(args)[0]) if sharded else None, computed_over=computed_over(args))


def computed_over(args: argparse.Namespace) -> dict[str, str]:
    """Run.computed_over: what depends on the images of one process and micro-batch, or of all in a micro-batch."""
    parts = {}
    if args.koleo_loss_weight:
        parts["KoLeo"] = "grad_accum_steps" if args.koleo_all_processes else "batch_size_per_gpu"
    if args.centering == "sinkhorn_knopp":
        parts["Sinkhorn-Knopp"] = "grad_accum_steps"
    elif args.ibot_loss_weight and args.mask_probability and not all_patches(args):  # unequal numbers of masked patches
        parts["the centre of patches"] = "batch_size_per_gpu"
    if args.drop_path_rate:  # a block leaves out whole images of a batch
        parts["drop path"] = "batch_size_per_gpu"
    return parts


def make_teacher(args: argparse.Namespace, run: Run) -> nn.Module:
    """The network whose targets the student learns: its own moving average, or a frozen one (distillation).

    A resume needs the same frozen network: its hash becomes a setting of the run.
    """
    if not args.distill_from:
        return run.teacher
    teacher = matching_teacher(args)
    run.settings[FROZEN] = frozen_hash(teacher)
    teacher = teacher.to(run.device)
    if args.compile == "default":
        networks.compile_networks(args.compile, teacher.backbone)
    if run.make_backbone:
        sharding.shard(teacher, run.device)
    return teacher


def matching_teacher(args: argparse.Namespace) -> BackboneAndHeads:
    """The frozen network of --distill_from. Raises Refused if the student can't learn its targets."""
    teacher, stored = read_teacher(args)
    theirs, ours = shared_flags(stored), shared_flags(args)
    differing = [name for name in theirs if theirs[name] != ours[name]]
    if differing:
        has, given = (" ".join(f"--{name} {values[name]}" if values[name] else f"no --{name}" for name in differing)
                      for values in (theirs, ours))
        raise Refused(f"--distill_from {args.distill_from}: it was trained with {has}, and the student has {given}; "
                      "give the former")
    return teacher


def frozen_hash(teacher: nn.Module) -> str:
    return weights_hash(teacher)[:12]


def shared_flags(args: argparse.Namespace) -> dict[str, str]:
    """Flags that a student has in common with its frozen network: {name: value as it is given, "" if it is not}."""
    values = {name: getattr(args, name) for name in ("patch_size", "in_chans", "out_dim", "ibot_separate_head", "mean",
                                                     "std", "value_range")}
    values["ibot_out_dim"] = patch_prototypes(args)
    return {name: options.text(value) if isinstance(value, list | tuple) else "" if value is None else str(value)
            for name, value in values.items()}


def read_teacher(args: argparse.Namespace) -> tuple[BackboneAndHeads, argparse.Namespace]:
    """The frozen network of --distill_from with its heads, and its flags; what the file doesn't state is as in `args`.
    """
    settings, state = networks.read_heads(args.distill_from, "--distill_from")
    stored = argparse.Namespace(**vars(args) | settings)
    teacher = make_network(stored)
    networks.fill(teacher, state, settings, args.distill_from, "--distill_from")
    return teacher.eval().requires_grad_(False), stored


def masked_share(args: argparse.Namespace, size: int) -> float:
    """Share of the global crops, of `size` pixels, that have a mask."""
    side = size // args.patch_size
    return masking.masked_share(2 * options.images_per_step(args), (side, side), args.mask_ratio, args.mask_probability)


def no_masks(args: argparse.Namespace, flag: str, size: int) -> str:
    """Why a run that is to mask global crops, of `size` pixels by `flag`, never does, with a remedy; "" if it does."""
    if not args.mask_probability or all_patches(args) or masked_share(args, size):
        return ""
    crops, side = 2 * options.images_per_step(args), size // args.patch_size
    if side < 2:
        return f"--{flag} {size} is one patch of --patch_size {args.patch_size}, which is never masked; make it larger"
    if int(crops * args.mask_probability) == 0:
        return (f"--mask_probability {args.mask_probability:g} of the {crops} global crops of a step is less than one: "
                f"none is masked; give {math.ceil(1000 / crops) / 1000:g} or more, or a larger --batch_size_per_gpu")
    return (f"--mask_ratio {options.text(args.mask_ratio)} of the {side**2} patches of --{flag} {size} is less than "
            f"one: none is masked; give a HIGH of {math.ceil(2000 / side**2) / 1000:g} or more")


def check_masks(args: argparse.Namespace) -> None:
    """Refuses a patch head that would never see a masked patch."""
    reason = no_masks(args, "global_crops_size", args.global_crops_size)
    if reason and args.ibot_separate_head:
        raise Refused(f"{reason}, or --ibot_separate_head false, as the patch head would not be trained")


def describe(
    args: argparse.Namespace, run: Run, plan: Plan, n_images: int, frozen: nn.Module | None = None
) -> str:
    """What is about to run, in a few lines. `frozen`: the network of --distill_from."""
    loss = run.dino_loss
    heads = f"K {loss.dino_loss.center.numel()} and {loss.ibot_patch_loss.center.numel()} for patches"
    heads += "" if args.ibot_separate_head else " (one head)"
    lines = options.description(args, run, plan, heads, n_images)
    lines.append(memory.estimate(
        run.student, args.batch_size_per_gpu, args.global_crops_size, args.local_crops_size, args.local_crops_number,
        1.0 if all_patches(args) else masked_share(args, args.global_crops_size) * sum(args.mask_ratio) / 2, run.dtype,
        args.grad_checkpointing, bool(run.make_backbone), plan.token_drop[-1] if plan.token_drop else 0.0, frozen))
    lines.append(f"loss of uniform outputs: {losses_at_start(args)['dino']:.2f} on class tokens, "
                 f"{losses_at_start(args)['ibot']:.2f} on patches; progress lines show the losses as shares of these")
    lines += many_prototypes(args, n_images)
    unit = args.epoch_steps or plan.steps_per_epoch
    alone = args.freeze_backbone_epochs * unit >= plan.steps  # heads are trained for published weights
    lines += long_warmups(plan.steps, unit, **{flag: getattr(args, flag) for flag in LONGEST
                                               if not (alone and flag == "freeze_backbone_epochs")})
    lines += without_effect(args)
    sizes = {"global_crops_size": args.global_crops_size}
    if plan.early_epochs:
        sizes["low_resolution_sizes"] = options.early_sizes(args)[0]
    lines += [f"WARNING: {reason}" for flag, size in sizes.items() if (reason := no_masks(args, flag, size))]
    if args.distill_from and args.drop_path_rate:
        lines.append(f"WARNING: --drop_path_rate {args.drop_path_rate:g} with --distill_from: published distillation "
                     "has no drop path; give 0")
    compared = args.batch_size_per_gpu * (parallel.world_size() if args.koleo_all_processes else 1)
    if args.koleo_loss_weight and compared < 2:
        lines.append("KoLeo is left out: with --batch_size_per_gpu 1 an image has no neighbour; raise it, or give "
                     "--koleo_all_processes with several processes")
    return "\n".join(lines)


def many_prototypes(args: argparse.Namespace, n_images: int) -> list[str]:
    """A warning where prototypes are too many for the images to use: losses of such runs often stay at their start."""
    if args.distill_from or args.init_heads or begun(args.output_dir):
        return []
    images, numbers = options.images_per_step(args), {"out_dim": args.out_dim}
    numbers |= {"ibot_out_dim": patch_prototypes(args)} if args.ibot_separate_head else {}
    return [f"WARNING: --{flag} {k} for {images} images per step, of {n_images}: the loss may not leave its start "
            f"(published: 32 to 43 prototypes per image of a step); lower it to {min(64 * images, n_images // 2)} or "
            "less, or give more images per step (--grad_accum_steps)"
            for flag, k in numbers.items() if k > min(MOST_PROTOTYPES * images, n_images)]


def losses_at_start(args: argparse.Namespace) -> dict[str, float]:
    """Terms of the loss for a student whose outputs are uniform: weight x ln K, for ibot x share of crops in it."""
    crops = 1.0 if all_patches(args) else masked_share(args, args.global_crops_size)
    return {"dino": args.dino_loss_weight * math.log(args.out_dim),
            "ibot": args.ibot_loss_weight * math.log(patch_prototypes(args)) * crops}


def pretrain(args: argparse.Namespace) -> int:
    """Set up, resume if there is something to resume, train. Returns the exit code."""
    check_args(args)
    device = parallel.start(args.device, args.dist_url, args.dist_timeout)
    with session.memory_refused():
        ends = options.open_data(args, device)
        plan = make_plan(args, len(ends.images))
        check_masks(args)
        run = make_run(args, plan, len(ends.images), device)
        teacher = make_teacher(args, run)
        ends = options.in_memory(args, ends, device)
    frozen = teacher if args.distill_from else None
    return session.carry_out(run, plan, ends, describe(args, run, plan, len(ends.images), frozen),
                             lambda log: train(args, run, teacher, plan, ends, log), args.extend,
                             args.tensorboard, vars(args) if args.wandb else None)


# ---- The loop ----


def train(args: argparse.Namespace, run: Run, teacher: nn.Module, plan: Plan, ends: Ends, log: Log) -> bool:
    """The training loop, from `run.step` to the plan's end. Returns False when a signal ended it early.

    Raises:
        failures.NonFinite: at the first look (logged steps, checkpoints) after a step that was not finite.
    """
    student = networks.distributed(run.student, run.device)
    load = make_loader(args, ends, plan, run.device)
    run.watch_steps(plan, load, "main_dinov2.py")
    batches, augmentation = load(run.step, plan.steps), make_augmentation(args)
    bad_images = BadImages(len(ends.images), args.max_bad_images)
    window, clock, requests = Meters(), Clock(), Requests(run.device, args.saveckp_every_minutes)
    ln_k, at_start = math.log(args.out_dim), losses_at_start(args)
    if run.step == 0:
        session.draw(run, ends, log, "start")

    def losses(student: nn.Module, crops: list[Tensor], batch: dict) -> tuple[Tensor, dict]:
        return dinov2.losses(student, teacher, crops, batch["masks"], run.dino_loss, float(plan.teacher_temp[run.step]),
                             batch.get("kept"))

    while run.step < plan.steps:
        step, epoch = run.step, run.epoch
        run.watch.begin(step)
        set_lr_and_wd(run.optimizer, plan.lr[step], plan.wd[step], plan.last_layer_lr[step], plan.backbone_lr[step])
        figures, parts = add_gradients(run, student, losses, augmentation.finish, batches, bad_images, clock,
                                       args.grad_accum_steps)
        run.scaler.unscale_(run.optimizer)
        norms = [norm for part in run.student.children()
                 for norm in utils.clip_gradients(part, args.clip_grad, per_tensor=False)]
        figures |= run.watch.judge(figures, norms)
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
            extra = health_dinov2(parts, at_start)
            extra |= {"loss_scale": run.scaler.get_scale()} if run.scaler.is_enabled() else {}
            run.meters.update(**extra)
            window.update(**extra)
            means = window.means()
            for name in {"dino_left", "ibot_left"} & means.keys():
                run.lowest_left[name] = min(means[name], run.lowest_left.get(name, math.inf))
            crops, early = 2 * args.batch_size_per_gpu, step <= max(plan.warmup, plan.steps // 10)
            warned = warning(means, run.dino_loss, crops, early, run.lowest_left)
            monitor.log_step(log, plan, step, means, "", warned, options.images_per_step(args), *clock.read())
            window.reset()
        run.dino_loss.update_centers(parts)
        del parts  # the teacher's scores, before the next step needs the memory
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


def warning(
    means: Mapping[str, float], loss: DINOv2Loss, rows: int, warming_up: bool, lowest_left: Mapping[str, float]
) -> str | None:
    """A line if the targets of class tokens or patches have collapsed, or the class tokens themselves, or if a term of
    the loss has never left its start.

    Args:
        rows, warming_up: as `health.collapse`.
        lowest_left: lowest values of dino_left and ibot_left since the run began.
    """
    # in distillation, the frozen network determines K
    stuck = [] if warming_up or not loss.mask_student else [k for k, v in sorted(lowest_left.items()) if v > STUCK]
    for prefix, center, what in (("", loss.dino_loss, "image"), ("patch_", loss.ibot_patch_loss, "patch")):
        if f"{prefix}entropy" in means:
            uniform_so_far = ("ibot_left" if prefix else "dino_left") in stuck
            line = collapse(means[f"{prefix}entropy"], math.log(center.center.numel()),
                            means[f"{prefix}prototypes_used"], UNIFORM[loss.centering], ONE, what,
                            math.inf if prefix else rows, warming_up or uniform_so_far)
            if line:
                return line
    network, prefix = ("teacher", "") if loss.mask_student else ("student", "student_")  # the one that is not frozen
    line = few_directions(means["feature_rank"], means[f"{prefix}prototypes_used"], rows, network)
    line = line or few_directions_dinov2(means, loss.centering == "sinkhorn_knopp", rows, warming_up, network)
    if line is None and stuck:
        line = (f"{' and '.join(stuck)} never below {STUCK:.0%}: the run has not begun to learn from it; try more "
                "images per step (--grad_accum_steps), a smaller --out_dim, shorter warm-ups, or --layerscale 0 if it "
                "is above")
    return line


def make_loader(
    args: argparse.Namespace, ends: Ends, plan: Plan, device: torch.device
) -> Callable[[int, int], Iterator[dict]]:
    """(first, last) -> the micro-batches of steps first ... last - 1, from one loader whose workers never restart."""
    augmentation = make_augmentation(args)
    side, early = (size // args.patch_size for size in (args.global_crops_size, options.early_sizes(args)[0]))
    masks = partial(masking.image_masks, seed=args.seed, images=options.images_per_step(args),
                    micro_batches=args.grad_accum_steps, grid=(side, side), ratio=tuple(args.mask_ratio),
                    probability=args.mask_probability, early=(plan.early_epochs, (early, early)))
    return loaders.steps(ends.source or ends.images, augmentation, args.batch_size_per_gpu, args.num_workers, args.seed,
                         args.grad_accum_steps, plan.steps_per_epoch, device, masks,
                         pixels=ends.pixels,
                         **options.by_epoch(args, plan, augmentation))


# ---- The script ----


def replay_step(args: argparse.Namespace) -> None:
    def build(settings: Mapping, about: Mapping) -> Method:
        stored = argparse.Namespace(**vars(get_args_parser().parse_args([])) | settings | {
            "init_from": "", "init_in_chans": "", "init_heads": False, "compile": "off"})
        student, average = make_networks(stored)
        objective, device = make_loss(stored), parallel.pick_device(args.device)
        frozen = read_teacher(stored)[0].to(device) if stored.distill_from else None
        if frozen and settings.get(FROZEN) not in (None, frozen_hash(frozen)):
            raise Refused(f"--replay {args.replay}: the run's --distill_from {stored.distill_from} has other weights "
                          "by now; put back those that it had")

        def losses(crops: list[Tensor], batch: Mapping, step: int) -> tuple[Tensor, dict]:
            return dinov2.losses(student, frozen or average, crops, batch["masks"], objective,
                                 float(about["teacher_temp"][step]), batch.get("kept"))

        def details(output: dinov2.Outputs, parts: Mapping, step: int) -> str:
            terms = ("dino_global", "dino_local", "ibot", "koleo")
            return "  ".join(f"{name} {parts[name].item():g}" for name in terms)

        return Method(student, average, objective, make_augmentation(stored).finish, losses, details, frozen)

    replay(args.replay, parallel.pick_device(args.device), build, "dinov2")


def main(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 done, 2 refused, 1 stopped by an error, 75 stopped by a signal, to be continued."""
    work = replay_step if args.replay else pretrain
    return flags.exit_code("main_dinov2.py", work, args, lambda error: faults.explain(error, args.output_dir))


if __name__ == "__main__":
    arguments = get_args_parser().parse_args()
    end = parallel.leave if arguments.parallel == "fsdp" else sys.exit
    end(main(arguments))
