"""What networks see in whole images: the class token's attention to every patch, and the patch tokens.

Shapes: B images, C channels, H heads, N tokens, h x w patches, D width. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from parallel import Refused
from protocols.features import Network
from protocols.tokens import check_has_patch_tokens, model_tokens, normalize, patch_size, refusing_size
from protocols.transforms import check_patches, resize
from vision_transformer import VisionTransformer

# ---- Sizes ----

PUBLISHED_SIZE = 480 / 224  # shorter side of the published attention maps' images, per side of the training crops


def default_size(crop: int, patch: int, sides: Sequence[int]) -> int:
    """Shorter side of the network's input, in pixels and whole patches, where no size is asked for.

    480 for global crops of 224 pixels in training, as published, and in proportion for other sizes `crop`; at most
    twice the median of the images' shorter `sides`, which have no more detail, and at least `crop`.
    """
    return max(crop, min(int(crop * PUBLISHED_SIZE), 2 * int(np.median(sides)))) // patch * patch


def input_sizes(
    height: int, width: int, image_size: Sequence[int], patch: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size to which an image is resized, and size of the crop of it that the network gets; as published.

    One number in `image_size` is the shorter side; the longer one keeps the aspect ratio, rounded down. Two numbers are
    the exact height and width; none keeps the image's own size. The crop drops the incomplete patches at the right and
    bottom edge.

    Raises:
        Refused: more than two numbers, or a side below the patch size; TooManyPatches, of which it is the base: more
            than MAX_PATCHES.
    """
    if len(image_size) > 2:
        raise Refused(f"--image_size {' '.join(map(str, image_size))}: give the shorter side, or height and width")
    if image_size and min(image_size) < patch:
        raise Refused(f"--image_size {min(image_size)}: smaller than a patch of {patch}; give {patch} or more")
    resized = tuple(image_size) or (height, width)
    if len(image_size) == 1:
        resized = tuple(image_size[0] * side // min(height, width) for side in (height, width))
    subject = f"an image of {width} x {height} pixels (width x height)"
    if min(resized) < patch:
        raise Refused(f"--image_size: {subject} is smaller than a patch of {patch}; give --image_size {patch} or more")
    subject = " ".join(["--image_size", *map(str, image_size)]) + f": {subject}"
    check_patches(*resized, patch, subject, "lower --image_size or crop the image")
    return resized, tuple(side // patch * patch for side in resized)


def resize_to_patches(image: Tensor, image_size: Sequence[int], patch: int, bilinear: bool = False) -> Tensor:
    """uint8 (C, height, width) -> uint8 (C, h * patch, w * patch), with antialiasing; see `input_sizes`.

    Bicubic as in training, or `bilinear` by Pillow, which is what the published script shows its network.
    """
    resized, cropped = input_sizes(*image.shape[-2:], image_size, patch)
    if bilinear:
        channels = [Image.fromarray(channel).resize(resized[::-1], Image.Resampling.BILINEAR)
                    for channel in image.numpy()]
        image = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))
    else:
        image = resize(image, resized)
    return image[:, : cropped[0], : cropped[1]]


def patches_to_pixels(maps: np.ndarray, height: int, width: int, image_size: Sequence[int], patch: int) -> np.ndarray:
    """Maps of patches (..., h, w) at the image's own size (..., height, width); each pixel takes its nearest patch.

    The inverse of `resize_to_patches`: pixels of the strip that was cropped take the last patch.
    """
    resized, _ = input_sizes(height, width, image_size, patch)
    rows, columns = (
        np.minimum(((np.arange(pixels) + 0.5) * side / pixels).astype(int) // patch, count - 1)
        for pixels, side, count in zip((height, width), resized, maps.shape[-2:], strict=True))
    return maps[..., rows[:, None], columns]


def patch_of_point(
    point: Sequence[float], height: int, width: int, image_size: Sequence[int], patch: int
) -> tuple[int, int]:
    """Row and column of the patch that contains pixel (x, y) of an image of height x width before resizing.

    Raises:
        Refused: the point lies outside the image.
    """
    x, y = point
    if x >= width or y >= height:
        raise Refused(f"--point {x:g} {y:g}: outside the image of {width} x {height} pixels (width x height); give "
                      "coordinates inside it")
    resized, cropped = input_sizes(height, width, image_size, patch)
    row, column = int((y + 0.5) * resized[0] / height) // patch, int((x + 0.5) * resized[1] / width) // patch
    return min(row, cropped[0] // patch - 1), min(column, cropped[1] // patch - 1)


# ---- The network ----


def has_attention(network: Network) -> bool:
    """Whether `look` returns attention; of timm's networks, it reads patch tokens only."""
    return isinstance(network.forward, VisionTransformer)


def check_look(network: Network, image_size: Sequence[int], layer: int) -> None:
    """Fail before any image is read.

    Raises:
        Refused: the network has no patch tokens, no such layer, or patches larger than the image.
    """
    check_has_patch_tokens(network)
    if has_attention(network):
        depth = len(network.forward.blocks)
        if not -depth <= layer < depth:
            raise Refused(f"--layer {layer}: the network has layers 0 to {depth - 1}; -1 is the last")
    patch = patch_size(network)
    input_sizes(patch, patch, image_size, patch)


def attention_and_tokens(model: nn.Module, x: Tensor, layer: int = -1) -> tuple[Tensor, Tensor]:
    """Attention of the class token, softmax(q k^T / sqrt(D / H)), and the patch tokens, in one forward pass.

    Computes only the class token's row of the N x N weights, from the queries and keys of the block, so that thousands
    of patches per image need little memory.

    Args:
        model: a VisionTransformer.
        x: (B, C, height, width), normalized, on the model's device.
        layer: index of the block whose attention is read; negative ones count from the last.

    Returns:
        float32 on the CPU: attention to every patch (B, H, h, w), without the shares of the class token itself and of
        registers; the network's normalized output patch tokens (B, h, w, D).
    """
    attn, outputs = model.blocks[layer].attn, []
    hook = attn.qkv.register_forward_hook(lambda module, inputs, output: outputs.append(output.float()))
    try:
        tokens = model.forward_features(x).patch_tokens
    finally:
        hook.remove()
    q, k, _ = outputs[0].unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, D / H)
    rows = (q[:, :, :1] @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1)[:, :, 0]  # (B, H, N)
    h, w = tokens.shape[1:3]
    return rows[..., -h * w:].unflatten(-1, (h, w)).cpu(), tokens.float().cpu()


@torch.no_grad()
def look(
    network: Network, image: Tensor, image_size: Sequence[int], layer: int = -1, bilinear: bool = False
) -> tuple[Tensor, np.ndarray | None, np.ndarray]:
    """Show a network one image, uint8 (C, height, width), resized by `resize_to_patches`.

    Returns:
        The resized and cropped image uint8 (C, h * patch, w * patch); attention (H, h, w), or None, see
        `has_attention`; patch tokens (h, w, D).

    Raises:
        Refused: a network of timm that doesn't take images of this size.
    """
    image = resize_to_patches(image, image_size, patch_size(network), bilinear)
    x = normalize(image, network.info, network.device)[None]
    if has_attention(network):
        attention, tokens = attention_and_tokens(network.forward, x, layer)
        return image, attention[0].numpy(), tokens[0].numpy()
    with refusing_size(network, f"--image_size: an image of {x.shape[-1]} x {x.shape[-2]} pixels (width x height)"):
        ((maps, _),) = model_tokens(network.forward, x)
    return image, None, maps[0].movedim(0, -1).float().cpu().numpy()
