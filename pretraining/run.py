"""What a training run is made of: its plan, its networks, and the state that a checkpoint holds.

Shapes: K prototypes, D width.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import parallel
import utils
from imagesets import loaders
from pretraining import metrics, sharding
from pretraining.evaluation import Evaluation
from vision_transformer import VITS, DINOHead, VisionTransformer, build_backbone
from weights import backbones, checkpoints


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
        most = n_images // (world_size * args.grad_accum_steps)
        remedy = f"lower it to {most} or less" if most else "start fewer processes or lower --grad_accum_steps"
        raise ValueError(
            f"--batch_size_per_gpu {args.batch_size_per_gpu}: {n_images} images are less than one step of "
            f"{global_batch} ({world_size} processes x --grad_accum_steps {args.grad_accum_steps}), so an epoch would "
            f"have no step; {remedy}"
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
    if args.arch not in VITS:
        refuse_unfit_crops(student.backbone, args)
    if args.init_from:
        backbones.load_weights_into(student.backbone, args.init_from, flag="--init_from")
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    student, teacher = student.to(device), teacher.to(device)
    if parallel.world_size() > 1 and device.type == "cuda":  # batch norm over all processes; torch has it on GPUs only
        student, teacher = (nn.SyncBatchNorm.convert_sync_batchnorm(m) for m in (student, teacher))
    if args.grad_checkpointing:
        if not hasattr(student.backbone, "set_grad_checkpointing"):  # timm's networks have it too
            raise ValueError(f"--grad_checkpointing {args.grad_checkpointing}: {args.arch} cannot do it; leave it out, "
                             "or choose a ViT")
        if args.grad_checkpointing == "blocks":
            student.backbone.set_grad_checkpointing()
        elif isinstance(student.backbone, VisionTransformer):
            student.backbone.set_grad_checkpointing(layers=True)
        else:
            raise ValueError(f"--grad_checkpointing layers: {args.arch} cannot do it; give blocks, or choose a ViT")
    if args.compile:
        # The student is one graph for all sizes of crops; the loop calls the parts of the teacher one by one.
        for module in (student, teacher.backbone, teacher.head):
            module.compile(mode=args.compile, dynamic=False)  # evaluation's batches would leave sizes open in training
    return student, teacher


@torch.no_grad()
def refuse_unfit_crops(backbone: nn.Module, args: argparse.Namespace) -> None:
    """Networks of other making may be for one size of pictures: better told before training."""
    backbone.eval()
    for flag in ("global_crops_size", "local_crops_size")[: 2 if args.local_crops_number else 1]:
        size = getattr(args, flag)
        try:
            backbone(torch.zeros(1, args.in_chans, size, size))
        except Exception as error:  # of any kind
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"--{flag} {size}: --arch {args.arch} cannot take it ({reason}); give it another size, "
                             "or choose another network") from error
    backbone.train()


def build_loss(args: argparse.Namespace, epochs: int) -> utils.DINOLoss:
    return utils.DINOLoss(args.out_dim, args.local_crops_number + 2, args.warmup_teacher_temp, args.teacher_temp,
                          args.warmup_teacher_temp_epochs, epochs)


def build_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Learning rate and weight decay are set at every step."""
    groups = utils.get_params_groups(model)
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if name == "sgd":
        return utils.SGD(groups)
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
    return torch.bfloat16 if device.type == "cpu" and parallel.gather_objects(bf16_is_faster())[0] else None


@cache
def bf16_is_faster() -> bool:
    """Whether this CPU multiplies matrices faster in bf16 than in float32, by measurement: of those that have the
    instructions, some are several times as fast, others half as fast.
    """
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return False

    def seconds(dtype: torch.dtype) -> float:
        x, best = torch.ones(512, 512, dtype=dtype), math.inf
        for _ in range(5):
            start = time.perf_counter()
            x @ x
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) < seconds(torch.float32)


# ---- Resume ----

# Flags that may change when a run goes on: where it runs and what it says, not what it computes.
FREE_FLAGS = {
    "data_path", "output_dir", "saveckp_freq", "saveckp_every_steps", "saveckp_every_minutes", "keep_checkpoints",
    "eval_knn_every", "eval_data_path", "log_every", "pictures_every", "tensorboard", "wandb", "device",
    "num_workers", "dist_url", "dist_timeout", "local_rank", "compile", "grad_checkpointing", "max_bad_images",
    "init_from", "batch_size_per_gpu", "grad_accum_steps", "world_size", "replay", "max_pixels", "parallel",
}


NEEDED = {
    "student", "teacher", "optimizer", "fp16_scaler", "dino_loss", "step", "precision", "args", "rng", "meters", "knn",
}


def plain_args(args: argparse.Namespace, n_images: int) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()} | {
        "images": n_images,
        "world_size": parallel.world_size(),
        "global_batch": args.batch_size_per_gpu * args.grad_accum_steps * parallel.world_size(),
    }


def dtype_named(name: str) -> torch.dtype | None:
    """`str` of a dtype or of None, back."""
    return None if name == "None" else getattr(torch, name.removeprefix("torch."))


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
        self.images = loaders.open_images(args.data_path, None, args.in_chans, args.max_pixels)
        self.evaluation = Evaluation(args, device) if args.eval_knn_every else None
        self.plan = make_plan(args, len(self.images), parallel.world_size())
        seed_everything(args.seed)  # the networks start the same on every process
        self.student, self.teacher = build_networks(args, device)
        seed_everything(args.seed + parallel.rank())  # stochastic depth differs between them
        self.sharded = args.parallel == "fsdp" and parallel.world_size() > 1
        if self.sharded:
            for network in (self.student, self.teacher):
                sharding.shard(network, device)
        self.dino_loss = build_loss(args, self.plan.epochs).to(device)
        self.optimizer = build_optimizer(args.optimizer, self.student)
        self.set_precision(half_precision(args.precision, args.use_fp16, device))
        if self.sharded and self.dtype == torch.float16:  # each process would judge overflows by its own part
            raise ValueError(f"--parallel fsdp: --precision {args.precision} is fp16 here; choose bf16 or fp32")
        self.meters = metrics.Meters()  # of the running epoch
        self.knn: dict[str, float] = {}  # latest figures, the baselines and the best
        self.step = 0
        self.last_saved = "none"
        self.rng: dict[int, dict] = {}  # torch's random state before each step that has not been found finite yet

    def set_precision(self, dtype: torch.dtype | None) -> None:
        """`dtype`: of autocast; None is float32 throughout."""
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def network_state(self, name: str) -> dict:
        """The student's or the teacher's whole tensors; every process calls it."""
        return sharding.whole(getattr(self, name).state_dict())

    def teacher_backbone(self) -> nn.Module:
        """The teacher's backbone, whole on every process; every process calls it."""
        if not self.sharded:
            return self.teacher.backbone
        args = self.args
        with torch.random.fork_rng(devices=[]):
            backbone, _ = build_backbone(
                args.arch, args.patch_size, in_chans=args.in_chans, img_size=args.global_crops_size)
        backbone.load_state_dict(sharding.whole(self.teacher.backbone.state_dict()))
        return backbone.to(self.device)

    def first_backbone(self) -> nn.Module:
        """The backbone that training started from, whole on every process; every process calls it."""
        if self.step == 0:
            return self.teacher_backbone()
        rng = checkpoints.rng_state(self.device)
        seed_everything(self.args.seed)
        _, teacher = build_networks(self.args, self.device)
        checkpoints.set_rng_state(rng, self.device)
        return teacher.backbone

    def state(self) -> dict:
        """What a checkpoint holds; every process calls it, and rank 0 has it whole."""
        keep = parallel.is_main()
        return {
            "student": sharding.whole(self.student.state_dict(), keep),
            "teacher": sharding.whole(self.teacher.state_dict(), keep),
            "optimizer": sharding.whole(self.optimizer.state_dict(), keep),
            "fp16_scaler": self.scaler.state_dict(),
            "dino_loss": self.dino_loss.state_dict(),
            "epoch": self.step // self.plan.steps_per_epoch,
            "step": self.step,
            "precision": str(self.dtype),
            "args": plain_args(self.args, len(self.images)),
            "rng": parallel.gather_objects(checkpoints.rng_state(self.device)),
            "meters": parallel.gather_objects(self.meters.state_dict()),
            "knn": self.knn,
            "best_checkpoint": checkpoints.BEST if "best" in self.knn else None,
        }

    def save(self, *names: str) -> None:
        """Write the state under each name in --output_dir, in this order; every process calls it, rank 0 writes."""
        state = self.state()
        for name in names:
            if parallel.is_main():
                checkpoints.save(state, Path(self.args.output_dir) / name)
        if parallel.is_main() and self.args.keep_checkpoints:
            checkpoints.remove_numbered(self.args.output_dir, keep=self.args.keep_checkpoints)
        self.last_saved = names[-1]
        parallel.barrier()

    def resume(self, state: dict, path: Path) -> None:
        if not NEEDED <= state.keys():
            raise ValueError(f"--output_dir {path.parent}: {path.name} there lacks what a resume needs; to start from "
                             f"its weights, give --init_from {path} and another folder")
        refuse_other_hyperparameters(plain_args(self.args, len(self.images)), state["args"], path)
        sharding.load(self.student, state["student"])
        sharding.load(self.teacher, state["teacher"])
        sharding.load_optimizer(self.optimizer, state["optimizer"])
        self.dino_loss.load_state_dict(state["dino_loss"])
        if self.args.precision == "auto":  # another machine might choose another one
            self.set_precision(dtype_named(state["precision"]))
        self.scaler.load_state_dict(state["fp16_scaler"])
        self.knn, self.step, self.last_saved = dict(state["knn"]), state["step"], path.name
        same_processes = len(state["rng"]) == parallel.world_size()
        if same_processes:
            checkpoints.set_rng_state(state["rng"][parallel.rank()], self.device)
            self.meters.load_state_dict(state["meters"][parallel.rank()], self.device)
        else:
            seed_everything(self.args.seed + self.step + parallel.rank())
            self.meters.load_state_dict(metrics.averaged(state["meters"]), self.device)
        if parallel.is_main():
            print(f"resuming from {path} at step {self.step} of {self.plan.steps}", flush=True)
            if not same_processes:
                print(f"{len(state['rng'])} -> {parallel.world_size()} processes: equal to rounding, not to the bit, "
                      "and stochastic depth draws anew", flush=True)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_augmentation(args: argparse.Namespace) -> utils.DataAugmentationDINO:
    return utils.DataAugmentationDINO(
        args.global_crops_scale, args.local_crops_scale, args.local_crops_number, args.global_crops_size,
        args.local_crops_size, args.mean, args.std, bool(args.compile),
    )
