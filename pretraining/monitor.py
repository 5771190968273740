"""Progress lines per logged step and epoch, and figures, while a run trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

import parallel
from imagesets.decode import Undecodable
from imagesets.sources import Images
from pretraining.logs import Log
from pretraining.plan import Plan
from protocols import attention, charts, dense, sheets, transforms
from protocols.progress import duration
from vision_transformer import VisionTransformer

# Values on the progress line: {name: (label, format)}; log_steps.txt has all of them. `left`: of uniform outputs' loss.
SHOWN = {"dino_left": ("dino left", ".0%"), "ibot_left": ("ibot left", ".0%"), "koleo": ("koleo", ".3f"),
         "entropy": ("entropy", ".2f"), "kl": ("kl", ".3f"), "feature_rank": ("rank", ".1f"),
         "loss_scale": ("loss scale", "g"), "skipped": ("skipped", ".0%")}


def log_step(
    log: Log, plan: Plan, step: int, figures: Mapping[str, float], scale: str, warning: str | None, images: int,
    seconds: float, waiting: float,
) -> None:
    """Write the progress line and a line of log_steps.txt, and a warning if there is one.

    Args:
        figures: values of the losses and of `health`.
        scale: what to compare the loss with, in words; may be empty.
        images: images per step, over all processes.
        seconds, waiting: seconds per step and fraction of waiting time, from `Clock.read`.
    """
    epoch, eta = step // plan.steps_per_epoch, duration(seconds * (plan.steps - step - 1))
    shown = "".join(f"  {label} {figures[name]:{style}}" for name, (label, style) in SHOWN.items() if name in figures)
    log.step(
        f"epoch {epoch} step {step + 1}/{plan.steps}  loss {figures['loss']:.4f}{f' ({scale})' if scale else ''}{shown}"
        f"  lr {plan.lr[step]:.2e}  {images / seconds:.0f} images/s  data {waiting:.0%}  eta {eta}",
        {"step": step, "epoch": epoch, **figures, "lr": float(plan.lr[step]), "images_per_s": images / seconds,
         "data_wait": waiting},
    )
    if warning:
        parallel.say(f"WARNING at step {step}: {warning}")


def log_epoch(
    log: Log, epoch: int, step: int, means: Mapping[str, float], ln_k: float, knn: Mapping[str, float]
) -> None:
    """Write the line of an epoch; it includes the k-NN accuracy if it was evaluated in this epoch."""
    values = {f"train_{k}": v for k, v in means.items()} | {"train_ln_k": ln_k, "epoch": epoch, "step": step}
    console = f"epoch {epoch} done: loss {values['train_loss']:.4f}"
    if knn.get("epoch") == epoch:
        values |= {f"knn_{k}": v for k, v in knn.items() if k not in ("epoch", "data")}
        baselines = {"untrained": "untrained", "start": "starting weights", "pixels": "raw pixels"}
        levels = [f"{name} {knn[key]:.1f} %" for key, name in baselines.items() if key in knn]
        console += f"; 20-NN top-1 {knn['top1']:.1f} %, best {knn['best']:.1f} %"
        console += f" ({', '.join(levels)})" if levels else ""
    log.epoch(console, values)


# ---- Figures ----


def draw(images: Images, backbone: nn.Module, crop: int, mean: Sequence[float], std: Sequence[float]
         ) -> dict[str, np.ndarray]:
    """Sheets of the attention and the PCA of patch tokens on fixed images: {name: uint8 (height, width, 3)}.

    Args:
        crop: pixels of the global crops of training; the images are larger, see `dense.default_size`.
    """
    if not isinstance(backbone, VisionTransformer):
        return {}
    return attention.network_sheets(backbone, fixed_images(images, crop, backbone.patch_size), mean, std)


def fixed_images(images: Images, crop: int, patch: int, count: int = 6) -> list[torch.Tensor]:
    """A few random images, always the same ones, at their `dense.default_size`; images that can't be decoded are left
    out."""
    chosen = np.random.default_rng(0).choice(len(images), min(count, len(images)), replace=False)
    fixed = []
    for i in sorted(chosen.tolist()):
        try:
            image = images.load(i)
        except Undecodable:
            continue
        fixed.append(transforms.resized(image, dense.default_size(crop, patch, [min(image.shape[1:])])))
    return fixed


def save_last_figures(
    folder: Path, images: Images, backbone: nn.Module, crop: int, mean: Sequence[float], std: Sequence[float]
) -> list[str]:
    """Write curves.png, and for a ViT pca.png and attention.png of the teacher, into `folder`. Returns the file
    names."""
    charts.training_curves([folder / "log.txt"], folder / "curves.png")
    drawn = draw(images, backbone, crop, mean, std)
    for name, figure in drawn.items():
        sheets.save_picture(figure, folder / f"{name}.png")
    return [f"{name}.png" for name in ("curves", *drawn)]
