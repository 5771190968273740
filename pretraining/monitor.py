"""What a run shows of itself: what it is, its figures, and pictures."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

import parallel
from imagesets import loaders
from pretraining import metrics
from pretraining.run import Run
from protocols import transforms
from vision_transformer import VisionTransformer


def describe(run: Run) -> None:
    """What is about to run, in a few lines: what a reader of the console asks first."""
    if not parallel.is_main():
        return
    args, plan = run.args, run.plan
    n_params = sum(p.numel() for p in run.student.backbone.parameters())
    batch = args.batch_size_per_gpu * args.grad_accum_steps * parallel.world_size()
    used = plan.steps_per_epoch * batch
    print(f"{args.arch}: {n_params / 1e6:.1f} M parameters; K {args.out_dim}; {run.device}, "
          f"{str(run.dtype or torch.float32).removeprefix('torch.')}, {parallel.world_size()} process(es)"
          + (", networks sharded" if run.sharded else ""))
    print(f"{args.data_path}: {len(run.images)} images, {used} used an epoch; 2 x {args.global_crops_size} + "
          f"{args.local_crops_number} x {args.local_crops_size} pixels")
    if used < len(run.images):
        print(f"{len(run.images) - used} of {len(run.images)} images are left out of an epoch, others each time: what "
              f"remains is less than a step of {batch}; a --batch_size_per_gpu that divides {len(run.images)} uses all")
    print(f"{plan.steps} steps of {batch} images, {plan.steps_per_epoch} an epoch; "
          f"peak learning rate {plan.lr.max():.2e}", flush=True)


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


def write_epoch(run: Run, log: metrics.Log, epoch: int) -> None:
    values = {f"train_{k}": v for k, v in run.meters.means().items()}
    values |= {"train_ln_k": math.log(run.args.out_dim), "epoch": epoch, "step": run.step}
    console = f"epoch {epoch} done: loss {values['train_loss']:.4f}"
    if run.evaluation and run.knn.get("epoch") == epoch:
        values |= {f"knn_{k}": v for k, v in run.knn.items() if k != "epoch"}
        levels = [f"{name} {run.knn[key]:.1f} %" for key, name in (("untrained", "untrained"), ("pixels", "raw pixels"))
                  if key in run.knn]
        console += f"; 20-NN top-1 {run.knn['top1']:.1f} %, best {run.knn['best']:.1f} % ({', '.join(levels)})"
    log.epoch(console, values)


def pictures(images: loaders.Images, backbone: nn.Module, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Where the teacher looks in the fixed images, and their patch tokens as colours: {name: uint8 sheet}."""
    from protocols import attention

    if not isinstance(backbone, VisionTransformer):
        return {}
    return attention.network_sheets(backbone, fixed_images(images, args.global_crops_size), args.mean, args.std)


def fixed_images(images: loaders.Images, size: int, count: int = 6) -> list[torch.Tensor]:
    """The same few images of a set at any time, drawn from it; one that can't be decoded is passed over."""
    found = []
    chosen = np.random.default_rng(0).choice(len(images), min(count, len(images)), replace=False)
    for i in sorted(chosen.tolist()):
        try:
            found.append(transforms.resized(images.load(i), size))
        except (ValueError, OSError):
            continue
    return found


def save_last_pictures(images: loaders.Images, backbone: nn.Module, args: argparse.Namespace) -> list[str]:
    """The curves of the run and the attention of its teacher, beside the checkpoint. Returns the files' names."""
    from protocols import charts, sheets

    folder, names = Path(args.output_dir), ["curves.png"]
    charts.training_curves([folder / "log.txt"], folder / "curves.png")
    drawn = pictures(images, backbone, args)
    if "attention" in drawn:
        sheets.save_picture(drawn["attention"], folder / "attention.png")
        names.append("attention.png")
    return names
