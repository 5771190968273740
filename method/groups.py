"""Parameter groups with a learning rate that grows from block to block (BEiT, arXiv 2106.08254), as DINOv2 has them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

EMBEDDING = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")
BLOCK = re.compile(r"\bblocks\.(?:\d+\.)?(\d+)\.")  # blocks.BLOCK., or blocks.CHUNK.BLOCK. with blocks counted through
WRAPPERS = re.compile(r"\b(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def parameter_groups(
    networks: Mapping[str, nn.Module | Mapping[str, nn.Parameter]],
    layer_decay: float = 1.0,
    patch_embed_factor: float = 0.2,
) -> list[dict]:
    """Groups of the trainable parameters of `backbone`, `dino_head` and `ibot_head`, or of dicts name -> parameter.

    Each group has the factors `lr_multiplier` and `wd_multiplier` (`multipliers`), `is_last_layer`, and its `network`;
    a network's parameters that agree in them share a group. `set_lr_and_wd` applies them.

    `layer_decay` is for the backbone alone.
    """
    groups = {}
    for network, module in networks.items():
        named = dict(module.named_parameters() if isinstance(module, nn.Module) else module)
        decay = layer_decay if network == "backbone" else 1.0
        factors = multipliers(named, decay, patch_embed_factor)
        for name, parameter in named.items():
            if parameter.requires_grad:
                lr, wd, last = factors[name]
                group = groups.setdefault((network, lr, wd, last), {
                    "params": [], "network": network, "lr_multiplier": lr, "wd_multiplier": wd, "is_last_layer": last})
                group["params"].append(parameter)
    return list(groups.values())


def multipliers(
    names: Mapping[str, object] | list[str], layer_decay: float = 1.0, patch_embed_factor: float = 0.2
) -> dict[str, tuple[float, float, bool]]:
    """Name of a network's parameter -> (factor of the learning rate, factor of the weight decay, is it a last layer).

        learning rate: layer_decay^(d - i) for block i of d, layer_decay^(d + 1) for the tokens and embeddings in front
            of the blocks, 1 for what follows them; the patch embedding's is multiplied by patch_embed_factor
        weight decay: 0 for biases, norms and LayerScale, else 1. Unlike `utils.get_params_groups`, by name.
    """
    plain = {name: WRAPPERS.sub("", name) for name in names}
    blocks = {name: int(match[1]) for name, key in plain.items() if (match := BLOCK.search(key))}
    depth = 1 + max(blocks.values(), default=-1)

    def factors(name: str, key: str) -> tuple[float, float, bool]:
        embedding = any(word in key for word in EMBEDDING) and name not in blocks
        exponent = depth - blocks[name] if name in blocks else depth + 1 if embedding else 0
        undecayed = key.endswith(".bias") or "norm" in key or "gamma" in key
        lr = layer_decay**exponent * (patch_embed_factor if "patch_embed" in key else 1.0)
        return lr, 0.0 if undecayed else 1.0, "last_layer" in key

    return {name: factors(name, key) for name, key in plain.items()}


def set_lr_and_wd(
    optimizer: torch.optim.Optimizer, lr: float, wd: float, last_layer_lr: float, backbone_lr: float | None = None
) -> None:
    """Set a step's learning rate and weight decay times the groups' factors.

    A last layer is frozen by last_layer_lr = 0, as published: it is neither updated nor decayed, but its gradients
    count for clipping and for AdamW's moments.
    """
    for group in optimizer.param_groups:
        rate = last_layer_lr if group["is_last_layer"] else lr
        if group["network"] == "backbone" and backbone_lr is not None:
            rate = backbone_lr
        group["lr"] = float(rate * group["lr_multiplier"])
        group["weight_decay"] = float(wd * group["wd_multiplier"])
