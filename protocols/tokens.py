"""Patch tokens of any network that has them, as feature maps at any height and width.

Shapes: B images, C channels, D width, h x w patches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel import Refused
from protocols.features import PIXELS, Network, pixel_network
from vision_transformer import VisionTransformer

PIXELS_PATCH = 8  # pixels per side of what stands for a patch token in the baseline of raw pixels


def has_patch_tokens(network: Network) -> bool:
    return isinstance(network.forward, VisionTransformer) or hasattr(network.forward, "forward_intermediates")  # timm


def check_has_patch_tokens(network: Network) -> None:
    if not has_patch_tokens(network):
        raise Refused(f"--arch {network.about['arch']}: has no patch tokens that could be read; give a Vision "
                      "Transformer, of this project or of timm")


def patch_size(network: Network) -> int:
    """Pixels per side of a patch token. Raises Refused for a network that has none."""
    if network.about["arch"] == PIXELS:
        return network.info.get("patch_size", PIXELS_PATCH)
    check_has_patch_tokens(network)
    return model_patch_size(network.forward)


def model_patch_size(model: nn.Module) -> int:
    return model.patch_size if isinstance(model, VisionTransformer) else model.feature_info[-1]["reduction"]


def block_count(network: Network) -> int:
    """Blocks whose tokens can be read together; 1 for raw pixels."""
    model = network.forward
    return len(model.blocks) if hasattr(model, "blocks") else 1


@torch.no_grad()
def check_tokens(
    network: Network, blocks: int, size: int, size_flag: str, blocks_flag: str = "--n_last_blocks"
) -> None:
    """Fail before any work.

    Raises:
        Refused: the network has no patch tokens, not so many blocks, or doesn't take images of this size.
    """
    patch = patch_size(network)
    if blocks > block_count(network):
        raise Refused(f"{blocks_flag} {blocks}: the network has {block_count(network)} blocks; lower it")
    if size < patch:
        raise Refused(f"{size_flag} {size}: smaller than a patch of {patch}; raise it")
    image = torch.zeros(1, network.info["in_chans"], size, size, dtype=torch.uint8)
    with refusing_size(network, f"{size_flag} {size}"):
        patch_tokens(network, image, blocks)


@contextmanager
def refusing_size(network: Network, size: str) -> Iterator[None]:
    """Turns what a network of timm raises in the block into Refused; `size`, of its images, names flag and value."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:  # timm asserts
        if isinstance(network.forward, VisionTransformer):
            raise
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{size}: {network.about['arch']} refuses it ({reason}); give another one") from error


def margins(height: int, width: int, patch: int) -> tuple[int, int, int, int]:
    """Padding (left, right, top, bottom) that makes whole patches of an image, which stays in the middle (DINOv2)."""
    across, down = -width % patch, -height % patch
    return across // 2, across - across // 2, down // 2, down - down // 2


@torch.no_grad()
def patch_tokens(network: Network, images: Tensor, n: int = 1) -> list[Tensor]:
    """Tokens after each of the last n blocks, through the network's last norm: n of float32 (B, D, h, w).

    Images (B, C, height, width) uint8 are normalized with the weights' mean and std, then padded by zeros to whole
    patches (`margins`). Class token and registers are left out. The "tokens" of raw pixels are the pixels of a patch.
    """
    if network.about["arch"] == PIXELS:
        return [F.pixel_unshuffle(padded(network, images), patch_size(network))]
    depth = block_count(network)
    return [maps for maps, _ in block_tokens(network, images, range(depth - n, depth))]


@torch.no_grad()
def block_tokens(
    network: Network, images: Tensor, blocks: Sequence[int], norm: bool = True
) -> list[tuple[Tensor, Tensor | None]]:
    """Patch tokens (B, D, h, w) and class token (B, D), or None, after each of the blocks, in ascending order.

    Args:
        images: as in `patch_tokens`.
        norm: apply the network's last norm.
    """
    x, depth = padded(network, images), block_count(network)
    with network.autocast():
        outputs = model_tokens(network.forward, x, [block - depth for block in blocks], norm)
    return [(maps.float(), None if class_token is None else class_token.float()) for maps, class_token in outputs]


def model_tokens(
    model: nn.Module, x: Tensor, blocks: Sequence[int] = (-1,), norm: bool = True
) -> list[tuple[Tensor, Tensor | None]]:
    """`block_tokens` of normalized images x (B, C, height, width), in the precision of the caller.

    Nothing is padded: incomplete patches at the right and bottom edge are ignored.

    Args:
        blocks: numbers from the end, -1 is the last: timm counts other things than blocks too.
    """
    if isinstance(model, VisionTransformer):
        grid, first = model.patch_embed.grid(*x.shape[-2:]), 1 + model.num_register_tokens
        numbers = [len(model.blocks) + block for block in blocks]
        return [(tokens[:, first:].transpose(1, 2).unflatten(2, grid), tokens[:, 0])
                for tokens in model.block_outputs(x, numbers, norm)]
    return timms_tokens(model, x, list(blocks), norm)


def timms_tokens(model: nn.Module, x: Tensor, blocks: list[int], norm: bool) -> list[tuple[Tensor, Tensor | None]]:
    height, width = (side - side % model_patch_size(model) for side in x.shape[-2:])
    x = x[..., :height, :width]  # timm asserts whole patches
    options = {"indices": blocks, "norm": norm, "output_fmt": "NCHW", "intermediates_only": True}
    has_class_token = getattr(model, "cls_token", None) is not None
    if has_class_token and "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters:
        outputs = model.forward_intermediates(x, return_prefix_tokens=True, **options)
        return [(maps, prefix[:, 0]) for maps, prefix in outputs]
    return [(maps, None) for maps in model.forward_intermediates(x, **options)]


def normalize(images: Tensor, info: Mapping, device: torch.device) -> Tensor:
    """uint8 (..., C, height, width) -> float32 on `device`, with the mean and std of the weights."""
    mean, std = (torch.tensor(info[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))
    return (images.to(device) / 255 - mean) / std


def padded(network: Network, images: Tensor) -> Tensor:
    x = normalize(images, network.info, network.device)
    return F.pad(x, margins(*x.shape[-2:], patch_size(network)))


def upsample(maps: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Maps of patches (B, K, h, w) at the pixels of the images they come from (B, K, height, width), bilinearly.

    The padding of `patch_tokens` is cut off.
    """
    left, right, top, bottom = margins(height, width, patch)
    size = (height + top + bottom, width + left + right)
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return maps[..., top : top + height, left : left + width]


def raw_pixels(network: Network) -> Network:
    """The baseline without a network, with patches of the size of another network's."""
    pixels = pixel_network(network.device, network.reading)
    return pixels._replace(info=pixels.info | {"patch_size": patch_size(network)})
