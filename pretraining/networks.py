"""Builds the student and the teacher and prepares them for training; chooses the precision."""

from __future__ import annotations

import math
import time
from functools import cache

import torch
from torch import nn

import parallel
from parallel import Refused
from utils import MultiCropWrapper
from vision_transformer import VITS, DINOHead, VisionTransformer, build_backbone
from weights.backbones import load_weights_into


def build_networks(
    arch: str,
    patch_size: int,
    in_chans: int,
    global_crops_size: int,
    drop_path_rate: float,
    out_dim: int,
    use_bn_in_head: bool,
    norm_last_layer: bool,
    init_from: str = "",
) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """A student, and a teacher with the same weights, without gradients and without stochastic depth.

    Args:
        init_from: file of weights to initialize the backbones from; "": random initialization.

    Raises:
        Refused: there is no such network, or the weights do not fit it.
    """

    def build(rate: float) -> MultiCropWrapper:
        backbone, width = make_backbone(arch, patch_size, in_chans, global_crops_size, rate)
        return MultiCropWrapper(backbone, DINOHead(width, out_dim, use_bn_in_head, norm_last_layer))

    student, teacher = build(drop_path_rate), build(0.0)
    if init_from:
        load_weights_into(student.backbone, init_from, flag="--init_from")
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def make_backbone(
    arch: str, patch_size: int, in_chans: int, img_size: int, drop_path_rate: float = 0.0
) -> tuple[nn.Module, int]:
    """A randomly initialized backbone and the width of its features.

    Raises:
        Refused: there is no such network.
    """
    try:
        return build_backbone(arch, patch_size, drop_path_rate, in_chans=in_chans, img_size=img_size)
    except ValueError as error:  # vision_transformer imports no other module, so it can't raise Refused
        raise Refused(error) from error


@torch.no_grad()
def check_crop_sizes(backbone: nn.Module, arch: str, in_chans: int, **sizes: int) -> None:
    """Some networks accept only one input size; fail before training starts. `sizes`: {flag: side in pixels}."""
    if arch in VITS:
        return
    backbone.eval()
    for flag, size in sizes.items():
        try:
            backbone(torch.zeros(1, in_chans, size, size))
        except Exception as error:  # the type depends on the library
            reason = " ".join(str(error).split())[:160]
            raise Refused(f"--{flag} {size}: --arch {arch} does not accept this size ({reason}); choose another size "
                          "or another network") from error
    backbone.train()


def cut_pixels(arch: str, patch_size: int, **sizes: int) -> list[str]:
    """A warning for each of the `sizes` ({flag: side in pixels}) of which a ViT's patches don't cover the last pixels.
    """
    if arch not in VITS:
        return []
    return [f"WARNING: the last {size % patch_size} pixels of --{flag} {size} are not used, as --patch_size "
            f"{patch_size} does not divide it; give {size // patch_size * patch_size} or "
            f"{-(-size // patch_size) * patch_size}" for flag, size in sizes.items() if size % patch_size]


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to its device; with several GPUs, synchronize batch norm (torch can't on CPUs)."""
    network = network.to(device)
    if parallel.world_size() > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def checkpoint_gradients(backbone: nn.Module, mode: str, arch: str) -> None:
    """Recompute whole `blocks`, or only cheap `layers`, in the backward pass to save memory."""
    if not hasattr(backbone, "set_grad_checkpointing"):  # timm's networks have it too
        raise Refused(f"--grad_checkpointing {mode}: not available for --arch {arch}; leave it out or choose a ViT")
    if mode == "blocks":
        backbone.set_grad_checkpointing()
    elif isinstance(backbone, VisionTransformer):
        backbone.set_grad_checkpointing(layers=True)
    else:
        raise Refused(f"--grad_checkpointing {mode}: not available for --arch {arch}; give blocks or choose a ViT")


def compile_networks(student: nn.Module, teacher: nn.Module, mode: str) -> None:
    """Compile the student as one graph, and the teacher's backbone and head, which `utils.losses` calls separately."""
    for module in (student, *teacher.children()):
        # Static shapes: otherwise the batch sizes of evaluation would make training recompile with dynamic shapes.
        module.compile(mode=mode, dynamic=False)


# ---- Precision ----


def half_precision(precision: str, use_fp16: bool, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast; None: float32. `auto` prefers bf16 if it is fast, because it needs no gradient scaler."""
    if precision == "fp32" or not use_fp16:
        return None
    if precision != "auto":
        return torch.float16 if precision == "fp16" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and parallel.gather_objects(bf16_is_faster())[0] else None


@cache
def bf16_is_faster() -> bool:
    """Whether this CPU multiplies matrices faster in bf16 than in float32.

    Measured: of the CPUs with bf16 instructions, some are several times faster in bf16, and some half as fast.
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
