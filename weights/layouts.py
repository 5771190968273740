"""Read files of weights without running code, and rename their tensors to the names that `build_backbone` uses.

The only place that knows the tensor names of published DINO, DINOv2, timm, Hugging Face, XCiT and torchvision files. A
layout is recognized by names and shapes of the tensors, never by the name of the file. Imports nothing of the project,
because hubconf.py loads it alone.

Shapes: N tokens, D width, C channels, P patch size, K classes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Prefixes that wrappers add to a backbone's parameter names. They are stripped repeatedly, at the start of a name only.
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.")
# Heads and classifiers, which are not part of a backbone.
HEAD = re.compile(r"(\w+_)?(head|fc|classifier|pooler)\.")
# Options of a ViT that its tensors do not show: export.py stores them with the weights.
STORED_OPTIONS = ("interpolate_antialias", "interpolate_offset")


class BadFile(ValueError):
    """The file is damaged, or does not contain what was asked for; the message says which and starts with the path."""


class Weights(NamedTuple):
    """A file's tensors under the names of a network of `build_backbone`."""

    layout: str  # name of the layout for messages; "" if the tensors keep their names
    arch: str | None  # None: not recognized
    options: dict  # further arguments of build_backbone
    state: dict[str, Tensor]


# ---- Reading ----


def read(path: str | os.PathLike, kind: type = dict) -> dict:
    """Load a file of tensors and plain types onto the CPU, never running code that a pickle names.

    Published full checkpoints contain an argparse.Namespace, the only class that is allowed. The metadata of a
    safetensors file written by export.py is returned under `args`.

    Raises:
        FileNotFoundError: there is no such file. Nothing is downloaded or substituted.
        BadFile: the file is truncated or corrupt, contains something other than data, or is no `kind`.
        ImportError: a safetensors file, and safetensors is not installed.
    """
    if os.path.isdir(path):
        raise FileNotFoundError(f"{path}: a folder; give the file of weights in it")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        if str(path).endswith(".safetensors"):
            return read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's text advises to load it unsafely
            reason = "damaged, or it contains more than data"
        raise BadFile(f"{path}: not a readable checkpoint of plain tensors ({reason[:160]})") from error
    if not isinstance(loaded, kind):
        raise BadFile(f"{path}: not a readable checkpoint of plain tensors (it contains a {type(loaded).__name__})")
    return loaded


def read_safetensors(path: str | os.PathLike) -> dict:
    """The tensors; if export.py wrote the file, under `state_dict`, with its metadata under `args`."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: pip install safetensors") from error
    with safe_open(path, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # f is not iterable
        metadata = f.metadata() or {}
    if "arch" not in metadata:  # not written by export.py
        return tensors
    return {"state_dict": tensors, "args": {k: json.loads(v) for k, v in metadata.items() if k != "format"}}


def stored_args(loaded: Mapping) -> dict:
    """The training flags in a checkpoint of this project or a published full one; {} for plain weights."""
    args = loaded.get("args", {})
    return dict(vars(args)) if isinstance(args, argparse.Namespace) else dict(args)


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter names without the leading prefixes of wrappers (`module.`, `backbone.`, ...)."""
    stripped = {}
    for name, value in state.items():
        while name.startswith(PREFIXES):
            name = name[len(next(p for p in PREFIXES if name.startswith(p))) :]
        stripped[name] = value
    return stripped


def backbone_state(loaded: Mapping, checkpoint_key: str, path: str = "") -> dict[str, Tensor]:
    """The backbone's tensors in a loaded file, prefixes stripped.

    They are the entry `checkpoint_key` of a full checkpoint, else the entry `state_dict`, else the file itself.

    Raises:
        BadFile: a full checkpoint without that entry.
    """
    if checkpoint_key in loaded and isinstance(loaded[checkpoint_key], Mapping):
        loaded = loaded[checkpoint_key]
    elif "state_dict" in loaded and isinstance(loaded["state_dict"], Mapping):
        loaded = loaded["state_dict"]
    elif any(isinstance(v, Mapping) for v in loaded.values()):
        keys = [k for k, v in loaded.items() if isinstance(v, Mapping)]
        raise BadFile(f"{path}: no part {checkpoint_key!r} in this checkpoint; it has {', '.join(keys)}")
    return strip_prefixes({k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)})


# ---- Recognizing the network ----

# (width, depth) of the Vision Transformers; all have heads of width 64
VIT_SIZES = {(192, 4): "vit_nano", (192, 12): "vit_tiny", (384, 12): "vit_small", (768, 12): "vit_base",
             (1024, 24): "vit_large"}  # fmt: skip
VIT_NAME = re.compile(
    r"cls_token|pos_embed|register_tokens|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.((norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma)"
)
# (number of blocks in the third stage, whether a block has three convolutions)
RESNETS = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101",
           (36, True): "resnet152"}  # fmt: skip
XCIT_SIZES = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}


def recognize(state: Mapping[str, Tensor]) -> Weights:
    """Rename a backbone's tensors (prefixes stripped) and infer the network from their names and shapes.

    Tensors of a network that is not in the tables keep their names: --arch has to name it.

    Raises:
        BadFile: a tensor has a known name and an impossible number of dimensions.
    """
    layout, renamed = rename(state)
    for mark, describe in (("blocks.0.mlp.w12.weight", swiglu_vit), ("cls_attn_blocks.0.norm1.weight", xcit),
                           ("layer4.0.conv1.weight", resnet), ("blocks.0.attn.qkv.weight", vit)):
        if mark in renamed:
            recognized = describe(layout, renamed)
            return recognized if recognized.arch else recognized._replace(layout="", state=dict(state))
    return Weights("", None, {}, dict(state))


def shape(state: Mapping[str, Tensor], name: str, ndim: int) -> torch.Size:
    """Shape of a tensor that must have `ndim` dimensions. Raises BadFile."""
    if state[name].ndim != ndim:
        raise BadFile(f"{name} has shape {tuple(state[name].shape)}, expected {ndim} dimensions; give another file")
    return state[name].shape


def vit(layout: str, state: dict[str, Tensor]) -> Weights:
    """Options of build_backbone for a ViT, and its architecture if VisionTransformer has all of its tensors.

    Some networks of timm have no position embedding of the class token, or have added it to the token: it becomes 0.
    """
    if "pos_embed" not in state or "patch_embed.proj.weight" not in state:
        return Weights(layout, None, {}, state)
    width, in_chans, _, patch = shape(state, "patch_embed.proj.weight", 4)
    positions = shape(state, "pos_embed", 3)[1]
    if math.isqrt(positions) ** 2 == positions:
        state |= {"pos_embed": F.pad(state["pos_embed"], (0, 0, 1, 0))}
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    options = {"patch_size": patch, "in_chans": in_chans, "img_size": side * patch}
    if not all(VIT_NAME.fullmatch(name) or HEAD.match(name) for name in state):
        return Weights(layout, None, options, state)
    if "register_tokens" in state:
        options["num_register_tokens"] = state["register_tokens"].shape[1]
        if layout:  # DINOv2's networks with registers interpolate in another way (the options of their hub entries)
            options |= {"interpolate_antialias": True, "interpolate_offset": 0.0}
    if "blocks.0.ls1.gamma" in state:
        options["init_values"] = 1.0
    return Weights(layout, VIT_SIZES.get((width, distinct(state, r"blocks\.(\d+)\."))), options, state)


def swiglu_vit(layout: str, state: dict[str, Tensor]) -> Weights:
    """DINOv2's ViT-g/14, as timm names it: gated MLP."""
    renamed = {re.sub(r"\.w12\.", ".fc1.", re.sub(r"\.w3\.", ".fc2.", k)): v for k, v in state.items()}
    arch = "vit_giant_patch14_dinov2"
    if "register_tokens" in renamed:
        arch, renamed = "vit_giant_patch14_reg4_dinov2", to_timm_registers(renamed)
    return Weights(layout, arch, {"patch_size": 14}, renamed)


def xcit(layout: str, state: dict[str, Tensor]) -> Weights:
    stem = "patch_embed.proj.{}.0.weight"
    width = XCIT_SIZES.get(state["cls_token"].shape[-1])
    patch = 16 if stem.format(6) in state else 8  # one convolution of stride 2 per halving
    depth = distinct(state, r"blocks\.(\d+)\.")
    if width is None or stem.format(0) not in state:
        return Weights(layout, None, {}, state)
    options = {"patch_size": patch, "in_chans": shape(state, stem.format(0), 4)[1]}
    return Weights(layout, f"xcit_{width}_{depth}_p{patch}_224", options, state)


def resnet(layout: str, state: dict[str, Tensor]) -> Weights:
    arch = RESNETS.get((distinct(state, r"layer3\.(\d+)\."), "layer1.0.conv3.weight" in state))
    if state.get("layer1.0.conv1.weight", torch.empty(0)).shape[:1] != (64,):  # Wide ResNet, ResNeXt
        arch = None
    options = {"in_chans": shape(state, "conv1.weight", 4)[1]} if "conv1.weight" in state else {}
    return Weights(layout, arch, options, state)


def distinct(state: Mapping[str, Tensor], pattern: str) -> int:
    """Number of distinct values of the pattern's group, matched at the start of the names."""
    return len({m[1] for m in (re.match(pattern, name) for name in state) if m})


# ---- Names ----


def rename(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The layout's name, and the tensors under the names of this project's (for XCiT, timm's) networks."""
    layout, state = "", dict(state)
    for mark, name, convert in LAYOUTS:
        if any(re.match(mark, key) for key in state):
            layout, state = f"{layout}, {name}".removeprefix(", "), convert(state)
    return layout, state


# The library has two sets of names: on disk, and, from transformers 5 on, in a model's state_dict().
HUGGING_FACE = [(re.compile(pattern), name) for pattern, name in (
    (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
    (r"^encoder\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(attention\.)?(query|key|value|[qkv]_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
)]  # fmt: skip


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, new in HUGGING_FACE:
            name = pattern.sub(new, name)
        renamed[name] = value
    for name in [n for n in renamed if re.search(r"\.attn\.(query|q_proj)\.", n)]:
        parts = [name.replace("query", p).replace("q_proj", f"{p[0]}_proj") for p in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            qkv = torch.cat([renamed.pop(part) for part in parts])
            renamed[re.sub(r"(query|q_proj)", "qkv", name)] = qkv
    return renamed


def from_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`blocks.<chunk>.<block>.` becomes `blocks.<block>.`; the mask token, used in training only, is dropped."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items() if k != "mask_token"}


def from_timm_registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"register_tokens" if k == "reg_token" else k: v for k, v in state.items()}


def to_timm_registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT with registers as timm has it: the class token includes its position embedding."""
    state, position = dict(state), state["pos_embed"]
    state |= {"reg_token": state.pop("register_tokens"), "pos_embed": position[:, 1:],
              "cls_token": state["cls_token"] + position[:, :1]}
    return state


def from_xcit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published XCiT names as timm's, which has `pos_embed` and splits qkv in the class-attention blocks."""
    renamed = {}
    for name, value in state.items():
        name = name.replace("pos_embeder.", "pos_embed.")
        if re.match(r"cls_attn_blocks\.\d+\.attn\.qkv\.", name):
            renamed |= {name.replace("qkv", p): v for p, v in zip("qkv", value.chunk(3), strict=True)}
        else:
            renamed[name] = value
    return renamed


# (pattern that one of the names matches, name of the layout, conversion), applied one after another in this order.
LAYOUTS = (
    (r"((vit|dinov2|dinov2_with_registers)\.)?embeddings\.patch_embeddings\.", "Hugging Face", from_hugging_face),
    (r"mask_token$", "DINOv2", from_dinov2),
    (r"reg_token$", "timm", from_timm_registers),
    (r"cls_attn_blocks\.0\.attn\.qkv\.", "XCiT", from_xcit),
)


# ---- Linear classifiers ----


def linear_classifier(loaded: Mapping, path: str = "") -> nn.Linear:
    """The classifier of a linear evaluation, D -> K.

    Reads a published `*_linearweights.pth`, and any file whose tensors, or those under `state_dict`, have names that
    end in `linear.weight` and `linear.bias`, or are `weight` and `bias`.

    Raises:
        BadFile: there is no such pair, or there are several.
    """
    state = loaded["state_dict"] if isinstance(loaded.get("state_dict"), Mapping) else loaded
    weights = [k for k in state if isinstance(k, str) and re.fullmatch(r"(.*\.)?linear\.weight|weight", k)]
    weight, bias = (state.get(weights[0].removesuffix("weight") + kind) if len(weights) == 1 else None
                    for kind in ("weight", "bias"))
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.shape[:-1] != bias.shape:
        raise BadFile(f"{path}: no linear classifier, which has `linear.weight` (classes, width) and `linear.bias`; "
                      f"it has {', '.join(map(str, list(state)[:5]))}")
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear
