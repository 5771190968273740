"""Files of weights: read without running code, and their tensors renamed to what `build_backbone` calls them.

One place knows how the published DINO, DINOv2, timm, Hugging Face, XCiT and torchvision files name things. What a file
is, its tensors' names and shapes say; its own name says nothing. Imports nothing of the project, for hubconf.py's sake.

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

# What wrappers put in front of a backbone's parameter names. Only leading ones are stripped, as often as they stand.
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.")
# Heads and classifiers have no place in a backbone.
HEAD = re.compile(r"(\w+_)?(head|fc|classifier|pooler)\.")
# Options of a ViT that no tensor says: export.py writes them beside the weights.
STORED_OPTIONS = ("interpolate_antialias", "interpolate_offset")


class Weights(NamedTuple):
    """A file's tensors as a backbone of `build_backbone` takes them."""

    layout: str  # for the reader; "" where the tensors were left as they are
    arch: str | None  # None: the tensors do not say
    options: dict  # further arguments of build_backbone
    state: dict[str, Tensor]


# ---- Reading ----


def read(path: str | os.PathLike, kind: type = dict) -> dict:
    """Load a file of tensors and plain types onto the CPU, never running code that a pickle names.

    Published full checkpoints hold one argparse.Namespace, which is allowed by name. The metadata of a safetensors
    file that this project wrote is under `args`.

    Raises:
        FileNotFoundError: there is no such file. Weights are never substituted.
        ValueError: the file is truncated, corrupt, or holds something other than data, or than a `kind`.
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
            reason = "damaged, or it holds more than data"
        raise ValueError(f"{path}: not a readable checkpoint of plain tensors ({reason[:160]})") from error
    if not isinstance(loaded, kind):
        raise ValueError(f"{path}: not a readable checkpoint of plain tensors (it holds a {type(loaded).__name__})")
    return loaded


def read_safetensors(path: str | os.PathLike) -> dict:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: pip install safetensors") from error
    with safe_open(path, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # it is no dict
        metadata = f.metadata() or {}
    if "arch" not in metadata:  # not one of ours
        return tensors
    return {"state_dict": tensors, "args": {k: json.loads(v) for k, v in metadata.items() if k != "format"}}


def stored_args(loaded: Mapping) -> dict:
    """The flags that a checkpoint of ours or a published one was trained with; {} for plain weights."""
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
    """The backbone's tensors in a loaded file: under `checkpoint_key` in a full checkpoint, else the file itself."""
    if checkpoint_key in loaded and isinstance(loaded[checkpoint_key], Mapping):
        loaded = loaded[checkpoint_key]
    elif "state_dict" in loaded and isinstance(loaded["state_dict"], Mapping):
        loaded = loaded["state_dict"]
    elif any(isinstance(v, Mapping) for v in loaded.values()):
        keys = [k for k, v in loaded.items() if isinstance(v, Mapping)]
        raise ValueError(f"--checkpoint_key {checkpoint_key}: {path} has no such part; it has {', '.join(keys)}")
    return strip_prefixes({k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)})


# ---- What the tensors are ----

# (width, depth) of the Vision Transformers, whose heads are all 64 wide
VIT_SIZES = {(192, 4): "vit_nano", (192, 12): "vit_tiny", (384, 12): "vit_small", (768, 12): "vit_base",
             (1024, 24): "vit_large"}  # fmt: skip
VIT_NAME = re.compile(
    r"cls_token|pos_embed|register_tokens|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.((norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma)"
)
# blocks of the third stage, and whether blocks have three convolutions
RESNETS = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101",
           (36, True): "resnet152"}  # fmt: skip
XCIT_SIZES = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}


def recognize(state: Mapping[str, Tensor]) -> Weights:
    """Rename a backbone's tensors (prefixes stripped) and say what network they are of, as far as names and shapes say.

    A network that is not in the tables is left as it is, for --arch to name it.
    """
    layout, renamed = rename(state)
    for mark, describe in (("blocks.0.mlp.w12.weight", swiglu_vit), ("cls_attn_blocks.0.norm1.weight", xcit),
                           ("layer4.0.conv1.weight", resnet), ("blocks.0.attn.qkv.weight", vit)):
        if mark in renamed:
            found = describe(layout, renamed)
            return found if found.arch else found._replace(layout="", state=dict(state))
    return Weights("", None, {}, dict(state))


def vit(layout: str, state: dict[str, Tensor]) -> Weights:
    """Options of build_backbone for a ViT; the architecture only if no tensor is foreign to ours.

    Of timm's networks some have no position for the class token, or have added it to the token: it is zero then.
    """
    if "pos_embed" not in state or "patch_embed.proj.weight" not in state:
        return Weights(layout, None, {}, state)
    width, in_chans, _, patch = state["patch_embed.proj.weight"].shape
    if math.isqrt(state["pos_embed"].shape[1]) ** 2 == state["pos_embed"].shape[1]:
        state |= {"pos_embed": F.pad(state["pos_embed"], (0, 0, 1, 0))}
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    options = {"patch_size": patch, "in_chans": in_chans, "img_size": side * patch}
    if not all(VIT_NAME.fullmatch(name) or HEAD.match(name) for name in state):
        return Weights(layout, None, options, state)
    if "register_tokens" in state:
        options["num_register_tokens"] = state["register_tokens"].shape[1]
        if layout:  # DINOv2's networks with registers were trained with another interpolation (their hub's options)
            options |= {"interpolate_antialias": True, "interpolate_offset": 0.0}
    if "blocks.0.ls1.gamma" in state:
        options["init_values"] = 1.0
    return Weights(layout, VIT_SIZES.get((width, count(state, r"blocks\.(\d+)\."))), options, state)


def swiglu_vit(layout: str, state: dict[str, Tensor]) -> Weights:
    """DINOv2's ViT-g/14, which is timm's: gated MLP, class token of a network with registers without a position."""
    renamed = {re.sub(r"\.w12\.", ".fc1.", re.sub(r"\.w3\.", ".fc2.", k)): v for k, v in state.items()}
    arch = "vit_giant_patch14_dinov2"
    if "register_tokens" in renamed:
        arch, position = "vit_giant_patch14_reg4_dinov2", renamed["pos_embed"]
        renamed |= {"reg_token": renamed.pop("register_tokens"), "pos_embed": position[:, 1:],
                    "cls_token": renamed["cls_token"] + position[:, :1]}
    return Weights(layout, arch, {"patch_size": 14}, renamed)


def xcit(layout: str, state: dict[str, Tensor]) -> Weights:
    stem = "patch_embed.proj.{}.0.weight"
    width = XCIT_SIZES.get(state["cls_token"].shape[-1])
    patch = 16 if stem.format(6) in state else 8  # as many convolutions of stride two as halvings
    depth = count(state, r"blocks\.(\d+)\.")
    if width is None or stem.format(0) not in state:
        return Weights(layout, None, {}, state)
    options = {"patch_size": patch, "in_chans": state[stem.format(0)].shape[1]}
    return Weights(layout, f"xcit_{width}_{depth}_p{patch}_224", options, state)


def resnet(layout: str, state: dict[str, Tensor]) -> Weights:
    arch = RESNETS.get((count(state, r"layer3\.(\d+)\."), "layer1.0.conv3.weight" in state))
    if state.get("layer1.0.conv1.weight", torch.empty(0)).shape[:1] != (64,):  # the wide ones and ResNeXt
        arch = None
    stem = state.get("conv1.weight")
    return Weights(layout, arch, {} if stem is None else {"in_chans": stem.shape[1]}, state)


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the pattern's group takes at the start of the names."""
    return len({m[1] for m in (re.match(pattern, name) for name in state) if m})


# ---- Names ----


def rename(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Tensors under the names of this project's (or, for XCiT, timm's) networks, and what the layout was called."""
    layout, state = "", dict(state)
    for mark, name, convert in LAYOUTS:
        if any(re.match(mark, key) for key in state):
            layout, state = f"{layout}, {name}".removeprefix(", "), convert(state)
    return layout, state


# Both of the library's namings: on disk and, from transformers 5 on, of a model's own state_dict().
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
    """Chunked names `blocks.<chunk>.<block>.` keep the block; the mask token is for training only."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items() if k != "mask_token"}


def from_timm_registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"register_tokens" if k == "reg_token" else k: v for k, v in state.items()}


def from_xcit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published XCiT names as timm's: `pos_embeder`, and one qkv matrix a class-attention block."""
    renamed = {}
    for name, value in state.items():
        name = name.replace("pos_embeder.", "pos_embed.")
        if re.match(r"cls_attn_blocks\.\d+\.attn\.qkv\.", name):
            renamed |= {name.replace("qkv", p): v for p, v in zip("qkv", value.chunk(3), strict=True)}
        else:
            renamed[name] = value
    return renamed


# A pattern that a name matches, what the layout is called, and how it becomes ours; in this order, one after another.
LAYOUTS = (
    (r"((vit|dinov2|dinov2_with_registers)\.)?embeddings\.patch_embeddings\.", "Hugging Face", from_hugging_face),
    (r"mask_token$", "DINOv2", from_dinov2),
    (r"reg_token$", "timm", from_timm_registers),
    (r"cls_attn_blocks\.0\.attn\.qkv\.", "XCiT", from_xcit),
)


# ---- Linear classifiers ----


def linear_classifier(loaded: Mapping, path: str = "") -> nn.Linear:
    """The classifier of a linear evaluation, D -> K: of a published `*_linearweights.pth`, or of any file whose
    tensors (or those under `state_dict`) end in `linear.weight` and `linear.bias`, or are called `weight` and `bias`.

    Raises:
        ValueError: there is no such pair, or there are several.
    """
    state = loaded["state_dict"] if isinstance(loaded.get("state_dict"), Mapping) else loaded
    weights = [k for k in state if isinstance(k, str) and re.fullmatch(r"(.*\.)?linear\.weight|weight", k)]
    weight, bias = (state.get(weights[0].removesuffix("weight") + kind) if len(weights) == 1 else None
                    for kind in ("weight", "bias"))
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.shape[:-1] != bias.shape:
        raise ValueError(f"{path}: no linear classifier, which has `linear.weight` (classes, width) and `linear.bias`; "
                         f"it has {', '.join(map(str, list(state)[:5]))}")
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear
