"""All crops of a batch in one pass through the blocks; utils.MultiCropWrapper makes one pass per resolution.

Measured by train_step.py --packed; tests/test_benchmarks.py checks that the result equals that of separate passes.

The tokens of all crops are concatenated, so that norms, linear layers and GELU run once. Attention must not mix crops
and runs once per group of crops with the same number of tokens.

Shapes: T tokens of all crops, groups [(n crops of N tokens), ...], D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import bench  # noqa: F401 - finds the project
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import MultiCropWrapper
from vision_transformer import HALF, Attention, Block, DropPath

Groups = list[tuple[int, int]]


def pack(network: MultiCropWrapper) -> None:
    """Replace the network's passes per resolution by a packed pass, in place."""
    network.features = partial(features, network.backbone)


def features(backbone, crops: Sequence[Tensor], kept: None = None) -> Tensor:
    """list of (n_i, C, h_i, w_i) -> class tokens (sum n_i, D); the last block computes nothing else.

    No patches are dropped: `kept` is None.
    """
    tokens = [backbone.prepare_tokens(x) for x in crops]
    groups = [tuple(t.shape[:2]) for t in tokens]
    x = torch.cat([t.flatten(0, 1) for t in tokens])  # (T, D)
    for block in backbone.blocks:
        x = run(block, x, groups, first_only=block is backbone.blocks[-1])
    return backbone.norm(x)


def run(block: Block, x: Tensor, groups: Groups, first_only: bool) -> Tensor:
    y = attend(block.attn, block.norm1(x), groups, first_only)
    if first_only:
        x = torch.cat([part.view(n, N, -1)[:, 0] for part, (n, N) in split(x, groups)])
        groups = [(n, 1) for n, _ in groups]
    x = x + dropped(block.drop_path, y, groups)
    return x + dropped(block.drop_path, block.mlp(block.norm2(x)), groups)


def attend(attn: Attention, x: Tensor, groups: Groups, first_only: bool) -> Tensor:
    results = []
    for part, (n, N) in split(attn.qkv(x), groups):
        q, k, v = part.view(n, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # each (n, H, N, D / H)
        q = q[:, :, :1] if first_only else q
        if q.device.type == "cpu" and q.dtype in HALF:  # as vision_transformer.Attention
            y = (q @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        results.append(y.transpose(1, 2).reshape(-1, x.shape[-1]))
    return attn.proj(torch.cat(results))


def split(x: Tensor, groups: Groups):
    """Yields (tokens (n N, .), (n, N)) of each group."""
    yield from zip(x.split([n * N for n, N in groups]), groups, strict=True)


def dropped(module, y: Tensor, groups: Groups) -> Tensor:
    """Stochastic depth: one random number per crop."""
    if not isinstance(module, DropPath) or not module.training:
        return y
    keep = 1 - module.drop_prob
    masks = [(y.new_empty(n, 1).bernoulli_(keep) / keep).repeat_interleave(N, 0) for n, N in groups]
    return y * torch.cat(masks)
