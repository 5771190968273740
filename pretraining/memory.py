"""How much memory a training step will take, roughly, before it is tried. For Vision Transformers."""

from __future__ import annotations

import torch
from torch import nn

import parallel
from vision_transformer import VisionTransformer

# Values of width D that a block saves per token for its backward pass, by --grad_checkpointing.
SAVED_PER_BLOCK = {None: 16, "layers": 10, "blocks": 1}


def estimate(
    student: nn.Module, images: int, global_size: int, local_size: int, local_crops: int, masked: float,
    dtype: torch.dtype | None, checkpointing: str | None, sharded: bool, dropped: float = 0.0,
    frozen: nn.Module | None = None,
) -> str:
    """A line for the console.

    Args:
        student: a `method.dinov2.BackboneAndHeads`, or a `utils.MultiCropWrapper` of a VisionTransformer.
        images: per process and micro-batch.
        masked: patches in the iBOT loss, as a share of all patches of the global crops.
        dtype: of autocast; None: float32.
        sharded: whether the networks are split over the processes.
        dropped: share of the patches of the student's global crops that it doesn't see.
        frozen: the network that makes the targets in distillation, beside the student and its average.
    """
    state, saved, scores = bytes_needed(student, images, global_size, local_size, local_crops, masked, dtype,
                                        checkpointing, dropped, frozen)
    if sharded:
        state /= parallel.world_size()
    total = state + saved + scores
    return (f"memory of a process, estimated: {total / 1e9:.1f} GB (networks and optimizer {state / 1e9:.1f}, "
            f"activations {saved / 1e9:.1f}, prototypes' scores {scores / 1e9:.1f})")


def bytes_needed(
    student: nn.Module, images: int, global_size: int, local_size: int, local_crops: int, masked: float,
    dtype: torch.dtype | None, checkpointing: str | None, dropped: float = 0.0, frozen: nn.Module | None = None,
) -> tuple[float, float, float]:
    """(networks and optimizer, activations kept for the backward pass, scores of the prototypes and their gradients).

    In bytes. Left out: the losses' parts in float32, at most 0.8 GB on a GPU, and what kernels need for a moment. For
    DINO some terms are a little too large: its last block computes the class token alone.
    """
    backbone: VisionTransformer = student.backbone
    size = 4 if dtype is None else 2
    parameters = sum(p.numel() for p in student.parameters())
    # Student: weights, gradients and two moments; teacher: weights; under autocast, both once more in half precision.
    state = parameters * (4 * 5 + (2 * size if dtype else 0))
    if frozen is not None:  # autocast keeps half copies only of parameters that need gradients
        state += 4 * sum(p.numel() for p in frozen.parameters())

    def tokens(side: int, dropped: float = 0.0) -> int:
        patches = (side // backbone.patch_size) ** 2
        return 1 + backbone.num_register_tokens + patches - int(patches * dropped)

    n_tokens = images * (2 * tokens(global_size, dropped) + local_crops * tokens(local_size))
    saved = backbone.n_blocks * block_bytes(backbone, n_tokens, size, checkpointing)
    if checkpointing == "blocks":  # one block at a time is recomputed
        saved += block_bytes(backbone, n_tokens, size)
    patches = masked * images * 2 * (global_size // backbone.patch_size) ** 2
    # Rows of the student's scores and their gradients, and of the teacher's scores; the prototypes of unit norm.
    class_rows, patch_rows = images * (2 * (2 + local_crops) + 2), 3 * patches
    has_one = hasattr(student, "head")  # DINO, without a loss on patches
    heads = [student.head] if has_one else [student.dino_head, student.ibot_head or student.dino_head]
    scores = sum((rows + head.last_layer.weight_v.shape[1]) * head.last_layer.weight_v.shape[0] * size
                 for rows, head in zip((class_rows, patch_rows), heads, strict=False))
    return state, saved, scores


def block_bytes(backbone: VisionTransformer, n_tokens: int, size: int, checkpointing: str | None = None) -> float:
    """What a block keeps for its backward pass, in values of `size` bytes."""
    return n_tokens * backbone.embed_dim * SAVED_PER_BLOCK[checkpointing] * size
