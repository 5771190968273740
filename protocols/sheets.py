"""Pictures of what a network sees: attention, masks and PCA of patch tokens as colours, laid over pictures, in sheets.

Pictures are uint8 arrays (height, width, 3); maps are float arrays (h, w) with one value a patch.
Shapes: n pictures, H heads, h x w patches, D width of the network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:  # torch stays out of the import
    import torch

COLORMAP = "viridis"
INK = "#333333"
MASK_COLOR = (255, 64, 64)
RIGHT, WRONG = (46, 125, 50), (198, 40, 40)  # frames of neighbours

# ---------------------------------------------------------------- maps of patches


def threshold_mask(attention: np.ndarray, mass: float = 0.6) -> np.ndarray:
    """The smallest set of patches that holds a share of the attention (paper, section 4.2.2 and figure 4).

    Patches are taken from the largest down until their sum is at least `mass` of the map's sum (to 1e-9 of it, so that
    rounding doesn't add a patch); of equal patches the first in reading order is taken first.

    Args:
        attention: (..., h, w), not negative; any scale, each map is judged by its own sum.
        mass: share to keep, above 0 and at most 1.
    Returns:
        bool (..., h, w); nothing is kept of a map that is zero everywhere.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"threshold {mass}: a share of the attention is above 0 and at most 1; the paper's is 0.6")
    attention = np.asarray(attention)
    flat = attention.astype(np.float64).reshape(*attention.shape[:-2], -1)
    if not np.isfinite(flat).all() or (flat < 0).any():
        raise ValueError("attention: a negative or non-finite value; give the weights after the softmax")
    order = np.argsort(-flat, axis=-1, kind="stable")
    largest_first = np.take_along_axis(flat, order, axis=-1)
    before = np.cumsum(largest_first, axis=-1) - largest_first  # mass already held when this patch's turn comes
    keep = before < (mass - 1e-9) * flat.sum(axis=-1, keepdims=True)
    mask = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(mask, order, keep, axis=-1)
    return mask.reshape(attention.shape)


def similarity_map(tokens: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Cosine similarity of patch tokens (h, w, D) to one of them or another, (D,): float64 (h, w) from -1 to 1."""
    tokens, token = np.asarray(tokens, dtype=np.float64), np.asarray(token, dtype=np.float64)
    norms = np.linalg.norm(tokens, axis=-1) * np.linalg.norm(token)
    return np.clip(tokens @ token / np.maximum(norms, 1e-12), -1, 1)


def pca_basis(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Three principal components of patch tokens, and the ranges that become a colour channel each.

    A component's sign is chosen so that its scores are skewed upwards: the colours don't change when the tokens are
    rotated, shifted or scaled, and are the same on every machine.

    Args:
        tokens: (..., D).
    Returns:
        mean (D,), components (3, D), low (3,), high (3,): 2nd and 98th percentile of the scores. With fewer than three
        directions in the tokens the others are zero.
    """
    flat = np.asarray(tokens, dtype=np.float64).reshape(-1, np.shape(tokens)[-1])
    mean = flat.mean(axis=0)
    centred = flat - mean
    variances, vectors = np.linalg.eigh(centred.T @ centred)  # ascending; D x D, so any number of patches will do
    components = np.zeros((3, flat.shape[1]))
    count = min(3, int((variances > 1e-10 * max(variances[-1], 1e-30)).sum()))
    components[:count] = vectors.T[::-1][:count]
    scores = centred @ components.T
    signs = np.where((scores**3).sum(axis=0) < 0, -1.0, 1.0)
    low, high = np.percentile(scores * signs, (2, 98), axis=0)
    return mean, components * signs[:, None], low, high


def pca_picture(tokens: np.ndarray, basis: tuple | None = None) -> np.ndarray:
    """Patch tokens as colours: the first three principal components as red, green and blue.

    Args:
        tokens: (n, h, w, D), or (h, w, D).
        basis: what `pca_basis` gave, to colour other pictures alike; without it one basis is found for all n.
    Returns:
        uint8 (n, h, w, 3), or (h, w, 3).
    """
    mean, components, low, high = pca_basis(tokens) if basis is None else basis
    scores = (np.asarray(tokens, dtype=np.float64) - mean) @ components.T
    spread = high - low
    colors = np.where(spread > 0, (scores - low) / np.where(spread > 0, spread, 1), 0.5)
    return (255 * np.clip(colors, 0, 1)).round().astype(np.uint8)


# ---------------------------------------------------------------- pictures out of maps


def as_picture(image: np.ndarray) -> np.ndarray:
    """uint8 (C, H, W), tensor or array -> (H, W, 3): grey is repeated, channels beyond three are left out."""
    image = np.moveaxis(np.asarray(image), 0, -1)
    return np.ascontiguousarray(image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, axis=-1))


def scale(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """A map to [0, 1]: from its smallest value to its 99.5th percentile, or between the given limits."""
    values = np.asarray(values, dtype=np.float64)
    low = values.min() if low is None else low
    high = np.percentile(values, 99.5) if high is None else high
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)


def heatmap(values: np.ndarray) -> np.ndarray:
    """A map scaled to [0, 1] as colours: (h, w) -> uint8 (h, w, 3)."""
    from matplotlib import colormaps

    return (255 * colormaps[COLORMAP](np.asarray(values))[..., :3]).round().astype(np.uint8)


def resize(picture: np.ndarray, height: int, width: int, smooth: bool = True) -> np.ndarray:
    """A picture, mask (bool) or map (float, h x w) at another size; smooth=False keeps the patches' squares."""
    if picture.dtype == bool:
        return resize(picture.astype(np.uint8), height, width, smooth=False).astype(bool)
    picture = picture.astype(np.float32) if picture.dtype.kind == "f" else picture
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize((width, height), method))


def attention_overlay(image: np.ndarray, attention: np.ndarray, strength: float = 0.75) -> np.ndarray:
    """The picture with its attention laid over it: dimmed and grey where there is little, coloured where there is much.

    Args:
        image: uint8 (H, W, 3).
        attention: (h, w), any scale.
        strength: weight of the colours where the attention is highest, 0 to 1.
    Returns:
        uint8 (H, W, 3).
    """
    height, width = image.shape[:2]
    heat = np.clip(resize(scale(attention), height, width), 0, 1)
    grey = image.mean(axis=-1, keepdims=True)
    dimmed = 0.65 * (0.5 * image + 0.5 * grey)
    weight = strength * heat[..., None] ** 0.8
    return ((1 - weight) * dimmed + weight * heatmap(heat)).round().astype(np.uint8)


def mask_overlay(image: np.ndarray, mask: np.ndarray, color: Sequence[int] = MASK_COLOR) -> np.ndarray:
    """The picture with a mask tinted and outlined: uint8 (H, W, 3), bool (any size) -> uint8 (H, W, 3)."""
    height, width = image.shape[:2]
    mask = resize(np.asarray(mask, dtype=bool), height, width)
    inner, line = mask, max(1, round(min(height, width) / 160))
    for _ in range(line):
        around = np.pad(inner, 1, mode="edge")
        inner = inner & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    weight = np.where(mask & ~inner, 1.0, np.where(mask, 0.4, 0.0))[..., None]
    dimmed = np.where(mask[..., None], 1.0, 0.6) * image
    return ((1 - weight) * dimmed + weight * np.asarray(color)).round().astype(np.uint8)


def outline_patch(picture: np.ndarray, patch: tuple[int, int], size: int) -> np.ndarray:
    """The picture with a frame around the patch at (row, column), patches being `size` pixels wide."""
    drawn, (top, left) = Image.fromarray(picture), (size * i for i in patch)
    width = max(2, min(picture.shape[:2]) // 160)
    box = left - width, top - width, left + size + width - 1, top + size + width - 1
    ImageDraw.Draw(drawn).rectangle(box, outline=MASK_COLOR, width=width)
    return np.array(drawn)


# ---------------------------------------------------------------- sheets


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] = (), cell: int = 160,
                  gap: int = 6) -> np.ndarray:
    """Pictures in rows and columns on white, their aspect ratios kept.

    Args:
        rows: rows of uint8 pictures (any size, 3), each scaled to a longer side of `cell` pixels; a row is as high as
            its highest picture, and a shorter row leaves white at its end.
        titles: one text a column, written above it.
    Returns:
        uint8 (height, width, 3).
    """
    if not any(len(row) for row in rows):
        raise ValueError("contact_sheet: no pictures")
    rows = [[fit(picture, cell) for picture in row] for row in rows]
    heights = [max((len(picture) for picture in row), default=0) for row in rows]
    columns = max(len(row) for row in rows)
    top = round(0.16 * cell) + gap if titles else gap
    sheet = np.full((top + sum(heights) + gap * len(rows), gap + columns * (cell + gap), 3), 255, dtype=np.uint8)
    if titles:
        sheet = _write_titles(sheet, titles, [gap + c * (cell + gap) + cell // 2 for c in range(columns)], top / 2)
    for row, high in zip(rows, heights, strict=True):
        for c, picture in enumerate(row):
            h, w = picture.shape[:2]
            y, x = top + (high - h) // 2, gap + c * (cell + gap) + (cell - w) // 2
            sheet[y:y + h, x:x + w] = picture
        top += high + gap
    return sheet


def fit(picture: np.ndarray, cell: int) -> np.ndarray:
    """The picture with a longer side of `cell` pixels."""
    factor = cell / max(picture.shape[:2])
    return resize(picture, *(max(1, round(side * factor)) for side in picture.shape[:2]))


def _write_titles(sheet: np.ndarray, titles: Sequence[str], centres: Sequence[float], middle: float) -> np.ndarray:
    picture = Image.fromarray(sheet)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(9, round(1.1 * middle)))
    for title, centre in zip(titles, centres, strict=False):
        draw.text((centre, middle), title, fill=INK, font=font, anchor="mm")
    return np.array(picture)


def attention_sheet(images: Sequence[np.ndarray], attentions: Sequence[np.ndarray],
                    masks: Sequence[np.ndarray] | None = None, cell: int = 160) -> np.ndarray:
    """One row a picture: the picture, its mask if given, the mean of the heads laid over it, each head.

    Args:
        images: n pictures, uint8 (H, W, 3), of one size or several.
        attentions: n arrays (H, h, w), or one (n, H, h, w).
        masks: n bool arrays, of any size.
    Returns:
        uint8 (height, width, 3).
    """
    rows = []
    for i, (image, heads) in enumerate(zip(images, attentions, strict=True)):
        heads, image = np.asarray(heads), fit(image, cell)
        marked = [] if masks is None else [mask_overlay(image, masks[i])]
        rows.append([image, *marked, attention_overlay(image, heads.mean(axis=0)), *(
            resize(heatmap(scale(head)), *image.shape[:2], smooth=False) for head in heads)])
    most = max(len(heads) for heads in attentions)
    titles = ["picture", *([] if masks is None else ["mask"]), "mean", *(f"head {i}" for i in range(most))]
    return contact_sheet(rows, titles, cell)


def neighbour_sheet(queries: Sequence[np.ndarray], found: Sequence[Sequence[np.ndarray]],
                    right: Sequence[Sequence[bool]], cell: int = 96) -> np.ndarray:
    """One row a query: the picture, then its nearest ones, framed green where `right` and red where not."""
    rows = []
    for query, near, same in zip(queries, found, right, strict=True):
        rows.append([query, *(framed(fit(n, cell), RIGHT if s else WRONG)
                              for n, s in zip(near, same, strict=True))])
    titles = ["picture", "nearest", *(str(i) for i in range(2, len(found[0]) + 1))]
    return contact_sheet(rows, titles, cell)


def framed(picture: np.ndarray, color: Sequence[int], width: int = 4) -> np.ndarray:
    picture = picture.copy()
    for edge in (picture[:width], picture[-width:], picture[:, :width], picture[:, -width:]):
        edge[...] = color
    return picture


def save_picture(picture: np.ndarray, path: str | Path) -> None:
    """Write a uint8 picture; the folder is made when it isn't there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


# ---------------------------------------------------------------- from a network


def attention_and_tokens(model: "torch.nn.Module", x: "torch.Tensor", layer: int = -1) -> tuple:
    """What the class token looks at, and the patch tokens, in one pass.

    Only the class token's row of the N x N weights is formed, from the queries and keys of the block: pictures and
    videos of thousands of patches stay cheap.

    Args:
        model: a VisionTransformer.
        x: (B, C, height, width), normalized, on the model's device.
        layer: number of the block whose attention is read, from 0, or from the end with -1 the last.
    Returns:
        float32 on the CPU: attention to every patch (B, H, h, w), the shares that go to the class token itself and to
        registers left out; and the network's last patch tokens (B, h, w, D).
    """
    attn, kept = model.blocks[layer].attn, []
    hook = attn.qkv.register_forward_hook(lambda module, inputs, output: kept.append(output.float()))
    try:
        tokens = model.forward_features(x).patch_tokens
    finally:
        hook.remove()
    q, k, _ = kept[0].unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, D / H)
    rows = (q[:, :, :1] @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1)[:, :, 0]  # (B, H, N)
    h, w = tokens.shape[1:3]
    return rows[..., -h * w:].unflatten(-1, (h, w)).cpu(), tokens.float().cpu()


def network_sheets(model: "torch.nn.Module", images: "Sequence[torch.Tensor]", mean: Sequence[float],
                   std: Sequence[float], layer: int = -1, cell: int = 160) -> dict[str, np.ndarray]:
    """What a network makes of a few pictures; training modes are left as they were found.

    Args:
        model: a VisionTransformer, on any device.
        images: uint8 tensors (C, height, width), of one size or several, none smaller than a patch.
        mean, std: one value a channel, of pixels in [0, 1], as in training.
        layer: number of the block whose attention is drawn.
    Returns:
        {"attention": the attention sheet, "pca": the pictures above their patch tokens as colours, of one basis},
        both uint8 (height, width, 3); empty without pictures.
    """
    import torch

    if not images:
        return {}
    device = next(model.parameters()).device
    center, spread = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            seen = [attention_and_tokens(model, ((image.to(device).float() / 255 - center) / spread)[None], layer)
                    for image in images]
    finally:
        for module, training in modes:
            module.training = training
    pictures = [as_picture(image) for image in images]
    tokens = [t[0].numpy() for _, t in seen]
    basis = pca_basis(np.concatenate([t.reshape(-1, t.shape[-1]) for t in tokens]))
    colors = [resize(pca_picture(t, basis), *p.shape[:2], smooth=False)
              for p, t in zip(pictures, tokens, strict=True)]
    return {"attention": attention_sheet(pictures, [a[0].numpy() for a, _ in seen], cell=cell),
            "pca": contact_sheet([pictures, colors], cell=cell)}
