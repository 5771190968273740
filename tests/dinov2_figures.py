"""DINOv2's reference figures and how their weights and inputs are made (tests/golden/dinov2/README.md)."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from golden_weights import GOLDEN, fill, rs
from torch import nn

from method.dinov2 import BackboneAndHeads
from vision_transformer import DINOHead, VisionTransformer

__all__ = ["FOLDER", "figures", "fill", "files", "mask", "names_of", "network", "rs", "two_processes"]
FOLDER = Path(os.environ.get("DINOV2_GOLDEN") or GOLDEN / "dinov2")


def files(pattern: str) -> list[str]:
    """Names of the files of figures that match, to parametrize a test with; never empty."""
    names = sorted(path.name for path in FOLDER.glob(pattern))
    if not names:
        raise FileNotFoundError(f"{FOLDER}: no {pattern}; DINOV2_GOLDEN names the folder of reference figures")
    return names


def figures(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """A .npz file's `config` and its arrays (those of text stay NumPy's)."""
    with np.load(FOLDER / name) as arrays:
        config = json.loads(str(arrays["config"]))
        return config, {k: torch.from_numpy(arrays[k]) if arrays[k].dtype.kind in "biuf" else arrays[k]
                        for k in arrays.files if k != "config"}  # fmt: skip


def two_processes() -> list[str]:
    """Names of the files of assignments on several processes, whose `patch_rows` are a list."""
    return [name for name in files("sinkhorn*.npz") if isinstance(figures(name)[0]["patch_rows"], list)]


def names_of(name: str) -> dict:
    """The content of a .json file."""
    return json.loads((FOLDER / name).read_text())


def mask(seed: int, n: int, tokens: int, share: float) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).rand(n, tokens) < share)


def network(config: dict) -> BackboneAndHeads:
    """The network of a file of whole steps, filled, in float64."""
    options = config["network"]
    backbone = VisionTransformer(
        options["img_size"], options["patch"], embed_dim=options["width"], depth=options["depth"],
        num_heads=options["heads"], mlp_ratio=options["mlp_ratio"], qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), num_register_tokens=options["registers"],
        init_values=1.0 if options["layerscale"] else None, ffn_layer=options["ffn"], method="dinov2",
        interpolate_antialias=options["interpolate_antialias"], interpolate_offset=options["interpolate_offset"])
    heads = [DINOHead(options["width"], norm_last_layer=False, **config[name]) if config.get(name) else None
             for name in ("dino_head", "ibot_head")]
    both = fill(BackboneAndHeads(backbone, *heads)).double()
    for head in filter(None, heads):
        nn.init.ones_(head.last_layer.weight_g)
    return both
