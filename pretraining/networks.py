"""Builds the student and the teacher and prepares them for training; chooses the precision."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import parallel
from parallel import Refused
from pretraining import sharding
from vision_transformer import VITS, VisionTransformer, build_backbone
from weights.backbones import as_flags, load_weights_into, normalizes_single_values
from weights.checkpoints import refusing
from weights.layouts import backbone_state, head_states, read, recognize, stored_args, stored_options


def pair(
    build: Callable[[float], nn.Module], drop_path_rate: float, init_from: str = "", init_in_chans: str = ""
) -> tuple[nn.Module, nn.Module]:
    """A student, and a teacher with the same weights, without gradients and without stochastic depth.

    Args:
        build: rate of stochastic depth -> a network with a `backbone` and heads.
        init_from: file of weights to initialize the backbones from; "": random initialization.
        init_in_chans: mean or tile, for weights of another number of channels; see `backbones.converted_channels`.

    Raises:
        Refused: the weights do not fit the network.
    """
    student, teacher = build(drop_path_rate), build(0.0)
    if init_from:
        load_weights_into(student.backbone, init_from, flag="--init_from", init_in_chans=init_in_chans)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def make_backbone(
    arch: str, patch_size: int, in_chans: int, img_size: int, drop_path_rate: float = 0.0, **options
) -> tuple[nn.Module, int]:
    """A randomly initialized backbone and the width of its features. `options`: of the network's constructor.

    Raises:
        Refused: there is no such network.
    """
    try:
        return build_backbone(arch, patch_size, drop_path_rate, in_chans=in_chans, img_size=img_size, **options)
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


def check_batch_norm(
    backbone: nn.Module, arch: str, in_chans: int, batch_size: int, global_size: int, local_size: int, n_local: int,
    device: torch.device,
) -> None:
    """Batch norm needs more than one value per channel; fail before training starts.

    The network sees all crops of one size together: two global ones per image, so that only a single local one can be
    alone. Synchronized batch norm counts those of all processes.

    Args:
        batch_size: images per process.
    """
    alone = n_local * batch_size == 1 and local_size != global_size
    synchronized = parallel.world_size() > 1 and device.type == "cuda"
    if alone and not synchronized and normalizes_single_values(backbone, in_chans, local_size):
        raise Refused(f"--batch_size_per_gpu 1 with --local_crops_number 1: batch norm in --arch {arch} needs more "
                      f"than one value per channel, and one crop of {local_size} pixels gives one; raise either, or "
                      "--local_crops_size")


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


def compile_networks(mode: str, *modules: nn.Module) -> None:
    """Compile modules, each of which becomes a graph where it is called."""
    for module in modules:
        # Static shapes: otherwise a second batch size would make training recompile with dynamic shapes.
        module.compile(mode=mode, dynamic=False)


def without_graphs(module: nn.Module) -> AbstractContextManager:
    """A context in which a compiled module runs as it is written, so that no graph is made for further batch sizes."""
    compiled = module._compiled_call_impl is not None  # else torch._dynamo, which takes a second to import, stays out
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def shard(student: nn.Module, teacher: nn.Module, device: torch.device, dtype: torch.dtype | None, precision: str
          ) -> bool:
    """Shard both networks over the processes, in place. Returns whether there are several processes.

    Raises:
        Refused: the precision is fp16, where each process would see the overflows of its own part only.
    """
    if parallel.world_size() == 1:
        return False
    if dtype == torch.float16:
        raise Refused(f"--parallel fsdp: --precision {precision} is fp16 here; choose bf16 or fp32")
    sharding.shard(student, device)
    sharding.shard(teacher, device)
    return True


def distributed(student: nn.Module, device: torch.device) -> nn.Module:
    """The student as the loop calls it: its gradients are those of all processes.

    The gradients are views of the buckets that are communicated, which saves 4 bytes per parameter.
    """
    if parallel.world_size() == 1 or any(isinstance(p, DTensor) for p in student.parameters()):
        return student
    return DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)


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


# ---- Heads from a file ----


def read_heads(path: str, flag: str) -> tuple[dict, dict[str, Tensor]]:
    """Flags of main_dinov2.py, and a teacher's tensors, from a checkpoint of it or a published teacher_checkpoint.pth.

    The flags follow from the shapes of the tensors, and where the checkpoint stores flags, from those. Only there are
    mean, std and value_range among them.

    Raises:
        Refused: no such file, or it has no heads.
    """
    with refusing(flag):
        loaded = read(path, mapped=True)
        heads = {f"{head}.{k}": v for head, state in head_states(loaded, "teacher", path).items()
                 for k, v in state.items()}
        recognized = recognize(backbone_state(loaded, "teacher", path))
    if "dino_head.last_layer.weight_v" not in heads:
        heads = "a head of DINO, which has none for patches" if "head.last_layer.weight_v" in heads else (
            "no heads, as published backbones")
        raise Refused(f"{flag} {path}: it has {heads}; train heads first: main_dinov2.py "
                      f"--init_from {path} with --freeze_backbone_epochs as long as the run (docs/dinov2.md)")
    stored, options = stored_args(loaded), recognized.options
    told = stored_options(stored)  # as a file with heads is of training, unlike the published backbones
    settings = {
        "arch": recognized.arch, "patch_size": options["patch_size"], "in_chans": options["in_chans"],
        "global_crops_size": options["img_size"], "num_register_tokens": options.get("num_register_tokens", 0),
        "layerscale": options.get("init_values", 0), "ffn_layer": options.get("ffn_layer", ""),
        "interpolate_antialias": told.get("interpolate_antialias", False),
        "interpolate_offset": told.get("interpolate_offset", 0.1),
        "ibot_separate_head": "ibot_head.last_layer.weight_v" in heads,
    }
    for prefix, head in (("", "dino_head."), ("ibot_", "ibot_head.")):
        if f"{head}last_layer.weight_v" in heads:
            prototypes, bottleneck = heads[f"{head}last_layer.weight_v"].shape
            layers = [v for k, v in heads.items() if k.startswith(f"{head}mlp.") and v.ndim == 2]
            settings |= {f"{prefix}out_dim": prototypes, f"{prefix}head_bottleneck_dim": bottleneck,
                         f"{prefix}head_nlayers": len(layers)}
            if len(layers) > 1:
                settings[f"{prefix}head_hidden_dim"] = layers[0].shape[0]
    state = {f"backbone.{k}": v for k, v in recognized.state.items()} | heads
    if "mean" in stored:
        settings |= {"mean": None, "std": None, "value_range": None}
    return settings | {k: v for k, v in stored.items() if k in settings}, state


def fill(
    network: nn.Module, state: Mapping[str, Tensor], settings: Mapping, path: str, flag: str, heads_only: bool = False
) -> None:
    """Copy the tensors of `read_heads` into a network, or those of the heads.

    Args:
        settings: of `read_heads`, for messages.

    Raises:
        Refused: a tensor is missing, has another shape, or has no place in the network.
    """
    own, theirs = ({k: v for k, v in tensors.items() if not (heads_only and k.startswith("backbone."))}
                   for tensors in (network.state_dict(), state))
    shapes, their_shapes = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (own, theirs))
    for name in shapes | their_shapes:
        if shapes.get(name) != their_shapes.get(name):
            heads = as_flags({k: v for k, v in settings.items() if "head" in k or "out_dim" in k})
            remedy = (f"give {heads}, or another file; a run that has begun resumes without {flag}" if heads_only else
                      "its args are not those of its tensors; give another file")
            raise Refused(f"{flag} {path}: {name} is {their_shapes.get(name, 'nothing')} there, and "
                          f"{shapes.get(name, 'nothing')} in the network; {remedy}")
    network.load_state_dict(theirs, strict=False)


def fill_centers(objective: nn.Module, path: str, flag: str) -> None:
    """Copy the centres in a checkpoint of main_dinov2.py, which belong to its teacher's heads; those that it lacks, or
    that its run did not use, start at zero, which is printed. Raises Refused.
    """
    with refusing(flag):
        stored = read(path, mapped=True).get("dino_loss")
    stored = stored if isinstance(stored, Mapping) else {}
    own = objective.state_dict()
    fitting = {k: stored[k] for k, v in own.items()
               if isinstance(stored.get(k), Tensor) and stored[k].shape == v.shape and stored[k].any()}
    objective.load_state_dict(fitting, strict=False)
    if missing := [k for k in own if k not in fitting]:
        parallel.say(f"{flag} {path}: it has no {' and '.join(missing)} of these heads; the centring starts at zero")
