"""The student and the teacher of a run, and what is done to them before the first step."""

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
    """A student, and a teacher with the same weights, which are not trained; stochastic depth is the student's alone.

    Args:
        init_from: a file of weights for the backbones; "" starts from random ones.

    Raises:
        Refused: no such network, or weights that are not this network's.
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
    """A backbone with random weights, and the width of its features. Refused: no such network."""
    try:
        return build_backbone(arch, patch_size, drop_path_rate, in_chans=in_chans, img_size=img_size)
    except ValueError as error:  # vision_transformer imports nothing of ours
        raise Refused(error) from error


@torch.no_grad()
def check_crop_sizes(backbone: nn.Module, arch: str, in_chans: int, **sizes: int) -> None:
    """Refuses crops that a network can't take: some accept one input size only. `sizes` go by their flags."""
    if arch in VITS:
        return
    backbone.eval()
    for flag, size in sizes.items():
        try:
            backbone(torch.zeros(1, in_chans, size, size))
        except Exception as error:  # each library raises its own
            reason = " ".join(str(error).split())[:160]
            raise Refused(f"--{flag} {size}: --arch {arch} cannot take it ({reason}); give it another size, or choose "
                          "another network") from error
    backbone.train()


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Several processes on GPUs share the statistics of batch norm; torch has no such layer for CPUs."""
    network = network.to(device)
    if parallel.world_size() > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def checkpoint_gradients(backbone: nn.Module, mode: str, arch: str) -> None:
    """Recompute `blocks` or cheap `layers` in the backward pass, to keep less memory for it."""
    if not hasattr(backbone, "set_grad_checkpointing"):  # timm's networks have it too
        raise Refused(f"--grad_checkpointing {mode}: {arch} cannot do it; leave it out, or choose a ViT")
    if mode == "blocks":
        backbone.set_grad_checkpointing()
    elif isinstance(backbone, VisionTransformer):
        backbone.set_grad_checkpointing(layers=True)
    else:
        raise Refused(f"--grad_checkpointing {mode}: {arch} cannot do it; give blocks, or choose a ViT")


def compile_networks(student: nn.Module, teacher: nn.Module, mode: str) -> None:
    """The student is one graph for all sizes of crops; `utils.losses` calls the teacher's parts one by one."""
    for module in (student, *teacher.children()):
        module.compile(mode=mode, dynamic=False)  # else evaluation's batches would leave sizes open in training


# ---- Precision ----


def half_precision(precision: str, use_fp16: bool, device: torch.device) -> torch.dtype | None:
    """The type of autocast, None for float32. `auto` prefers bf16, which needs no gradient scaler, where it is fast."""
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

    Measured, because of the CPUs that have the instructions some are several times as fast and others half as fast.
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
