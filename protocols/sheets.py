"""Figures of images: attention, masks and PCA of patch tokens as colours, overlaid on images and arranged in sheets.

Figures, and the images in them, are uint8 arrays (height, width, 3); maps are float arrays (h, w), a value per patch.
Shapes: n images, H heads, h x w patches, D width of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import atomic
from parallel import Refused

COLORMAP = "viridis"  # the published script's
INK = "#333333"
MASK_COLOR = (255, 64, 64)
RIGHT, WRONG = (46, 125, 50), (198, 40, 40)  # outlines of neighbours

# ---- Maps of patches ----


def threshold_mask(attention: np.ndarray, mass: float = 0.6) -> np.ndarray:
    """The smallest set of patches that holds a share of the attention (DINO, section 4.2.2 and figure 4).

    Patches are taken in descending order until their sum is at least `mass` times the map's sum (to a relative 1e-9, so
    that rounding doesn't add a patch); ties are taken in reading order.

    Args:
        attention: (..., h, w), not negative; of any scale, as each map is compared with its own sum.
        mass: share to keep, above 0 and at most 1.

    Returns:
        bool (..., h, w); all False for a map of zeros.

    Raises:
        ValueError: `mass` is out of range.
        Refused: negative or non-finite attention, which comes from non-finite weights.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"threshold {mass}: a share of the attention is above 0 and at most 1; the paper's is 0.6")
    attention = np.asarray(attention)
    flat = attention.astype(np.float64).reshape(*attention.shape[:-2], -1)
    if not np.isfinite(flat).all() or (flat < 0).any():
        raise Refused("the attention has negative or non-finite values; give --pretrained_weights that are finite")
    order = np.argsort(-flat, axis=-1, kind="stable")
    largest_first = np.take_along_axis(flat, order, axis=-1)
    before = np.cumsum(largest_first, axis=-1) - largest_first  # attention held by the larger patches
    keep = before < (mass - 1e-9) * flat.sum(axis=-1, keepdims=True)
    mask = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(mask, order, keep, axis=-1)
    return mask.reshape(attention.shape)


def similarity_map(tokens: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Cosine similarity of patch tokens (h, w, D) to a token (D,): float64 (h, w) in [-1, 1]."""
    tokens, token = np.asarray(tokens, dtype=np.float64), np.asarray(token, dtype=np.float64)
    norms = np.linalg.norm(tokens, axis=-1) * np.linalg.norm(token)
    return np.clip(tokens @ token / np.maximum(norms, 1e-12), -1, 1)


def pca_basis(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Three principal components of patch tokens, and for each the range of scores that a colour channel shows.

    A component's sign is chosen so that its scores have positive skew. The colours are therefore invariant to rotation,
    shift and scale of the tokens, and equal on every machine.

    Args:
        tokens: (..., D).

    Returns:
        mean (D,), components (3, D), low (3,), high (3,): 2nd and 98th percentile of the scores. Components beyond the
        rank of the tokens are zero.
    """
    flat = np.asarray(tokens, dtype=np.float64).reshape(-1, np.shape(tokens)[-1])
    mean = flat.mean(axis=0)
    centred = flat - mean
    variances, vectors = np.linalg.eigh(centred.T @ centred)  # ascending; D x D for any number of patches
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
        basis: output of `pca_basis`, to colour several images alike; None computes one basis for all n.

    Returns:
        uint8 (n, h, w, 3), or (h, w, 3).
    """
    mean, components, low, high = pca_basis(tokens) if basis is None else basis
    scores = (np.asarray(tokens, dtype=np.float64) - mean) @ components.T
    spread = high - low
    colors = np.where(spread > 0, (scores - low) / np.where(spread > 0, spread, 1), 0.5)
    return (255 * np.clip(colors, 0, 1)).round().astype(np.uint8)


# ---- Figures of maps ----


def as_picture(image: np.ndarray) -> np.ndarray:
    """uint8 (C, H, W), tensor or array -> (H, W, 3): one channel is repeated, channels beyond three are dropped."""
    image = np.moveaxis(np.asarray(image), 0, -1)
    return np.ascontiguousarray(image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, axis=-1))


def scale(values: np.ndarray, percentile: float = 99.5) -> np.ndarray:
    """A map scaled linearly to [0, 1] from its minimum and a percentile, and clipped."""
    values = np.asarray(values, dtype=np.float64)
    low, high = values.min(), np.percentile(values, percentile)
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)


def heatmap(values: np.ndarray, colormap: str = COLORMAP) -> np.ndarray:
    """A map in [0, 1] as colours: (h, w) -> uint8 (h, w, 3)."""
    from matplotlib import colormaps

    return colormaps[colormap](np.asarray(values), bytes=True)[..., :3]


def resize(values: np.ndarray, height: int, width: int, smooth: bool = True) -> np.ndarray:
    """A figure, mask (bool) or map (float, h x w) at another size; smooth=False keeps patches as squares."""
    if values.dtype == bool:
        return resize(values.astype(np.uint8), height, width, smooth=False).astype(bool)
    values = values.astype(np.float32) if values.dtype.kind == "f" else values
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(values).resize((width, height), method))


def attention_overlay(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The image overlaid with its attention: dimmed and grey where it is low, coloured where it is high.

    Args:
        image: uint8 (H, W, 3).
        attention: (h, w), any scale.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = image.shape[:2]
    heat = np.clip(resize(scale(attention), height, width), 0, 1)
    grey = image.mean(axis=-1, keepdims=True)
    dimmed = 0.65 * (0.5 * image + 0.5 * grey)
    weight = 0.75 * heat[..., None] ** 0.8  # of the colours
    return ((1 - weight) * dimmed + weight * heatmap(heat)).round().astype(np.uint8)


def mask_overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with a mask tinted and outlined: uint8 (H, W, 3), bool of any size -> uint8 (H, W, 3)."""
    height, width = image.shape[:2]
    mask = resize(np.asarray(mask, dtype=bool), height, width)
    inner, line = mask, max(1, round(min(height, width) / 160))
    for _ in range(line):
        around = np.pad(inner, 1, mode="edge")
        inner = inner & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    weight = np.where(mask & ~inner, 1.0, np.where(mask, 0.4, 0.0))[..., None]
    dimmed = np.where(mask[..., None], 1.0, 0.6) * image
    return ((1 - weight) * dimmed + weight * np.array(MASK_COLOR)).round().astype(np.uint8)


def outline_patch(figure: np.ndarray, patch: tuple[int, int], size: int) -> np.ndarray:
    """The figure with the patch at (row, column) outlined; patches are `size` pixels wide."""
    top, left = (size * i for i in patch)
    width = max(2, min(figure.shape[:2]) // 160)
    return framed(figure, (left - width, top - width, left + size + width - 1, top + size + width - 1), MASK_COLOR,
                  width)


def framed(figure: np.ndarray, box: tuple[int, int, int, int], color: tuple[int, int, int], width: int) -> np.ndarray:
    """The figure with a frame `width` pixels wide along the inside of a box (left, top, right, bottom), inclusive."""
    drawn = Image.fromarray(figure)
    ImageDraw.Draw(drawn).rectangle(box, outline=color, width=width)
    return np.array(drawn)


# ---- Sheets ----


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] = (), cell: int = 160,
                  gap: int = 6, captions: Sequence[Sequence[str]] = ()) -> np.ndarray:
    """Figures in rows and columns on white; aspect ratios are kept.

    Args:
        rows: rows of uint8 figures (height, width, 3) of any size, each resized to a longer side of `cell` pixels. A
            row is as high as its highest figure; a shorter row is padded with white.
        titles: one text per column, written above it.
        captions: for each row its figures' names, written below them, or fewer; long ones are shortened to the cell.

    Returns:
        uint8 (height, width, 3).
    """
    if not any(len(row) for row in rows):
        raise ValueError("contact_sheet: no figures")
    rows = [[fit(figure, cell) for figure in row] for row in rows]
    heights = [max((len(figure) for figure in row), default=0) for row in rows]
    lefts = [gap + column * (cell + gap) for column in range(max(len(row) for row in rows))]
    top = round(0.16 * cell) + gap if titles else gap
    below = max(12, round(0.1 * cell)) if captions else 0
    sheet = Image.new("RGB", (lefts[-1] + cell + gap, top + sum(heights) + (below + gap) * len(rows)), "white")
    drawing = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=max(9, round(0.55 * top)))
    for left, title in zip(lefts, titles, strict=False):
        drawing.text((left + cell // 2, top / 2), title, fill=INK, font=font, anchor="mm")
    small = ImageFont.load_default(size=max(9, round(0.7 * below)))
    for row, high, names in zip(rows, heights, captions or [()] * len(rows), strict=True):
        for left, figure in zip(lefts, row, strict=False):
            height, width = figure.shape[:2]
            sheet.paste(Image.fromarray(figure), (left + (cell - width) // 2, top + (high - height) // 2))
        for left, name in zip(lefts, names, strict=False):
            drawing.text((left + cell // 2, top + high + below / 2), shortened(name, small, cell), fill=INK, font=small,
                         anchor="mm")
        top += high + below + gap
    return np.array(sheet)


def shortened(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A name without its middle, if it is wider than `width` pixels."""
    kept, text = len(name), name
    while font.getlength(text) > width and kept > 1:
        kept -= 1
        text = name[: kept // 2] + "..." + name[len(name) - (kept - kept // 2):]
    return text


def fit(figure: np.ndarray, cell: int) -> np.ndarray:
    """The figure resized to a longer side of `cell` pixels."""
    factor = cell / max(figure.shape[:2])
    return resize(figure, *(max(1, round(side * factor)) for side in figure.shape[:2]))


def attention_sheet(images: Sequence[np.ndarray], attentions: Sequence[np.ndarray],
                    masks: Sequence[np.ndarray] | None = None, cell: int = 160, names: Sequence[str] = ()
                    ) -> np.ndarray:
    """One row per image: the image, its mask if given, the mean of the heads as an overlay, each head.

    Args:
        images: n images, uint8 (H, W, 3), of any sizes.
        attentions: n arrays (H, h, w), or one (n, H, h, w).
        masks: n bool arrays, of any sizes.
        names: n texts, written below the images.

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
    titles = ["image", *([] if masks is None else ["mask"]), "mean", *(f"head {i}" for i in range(most))]
    return contact_sheet(rows, titles, cell, captions=[[name] for name in names])


def neighbour_sheet(queries: Sequence[np.ndarray], neighbours: Sequence[Sequence[np.ndarray]],
                    right: Sequence[Sequence[bool]], cell: int = 96, names: Sequence[Sequence[str]] = ()) -> np.ndarray:
    """One row per query: the image, then its nearest ones, outlined in green where `right` and in red elsewhere.

    Args:
        names: for each row, of the query and its neighbours.
    """
    rows = []
    for query, near, same in zip(queries, neighbours, right, strict=True):
        near = [fit(figure, cell) for figure in near]
        rows.append([query, *(framed(n, (0, 0, n.shape[1] - 1, n.shape[0] - 1), RIGHT if s else WRONG, 4)
                              for n, s in zip(near, same, strict=True))])
    titles = ["image", "nearest", *(str(i) for i in range(2, len(neighbours[0]) + 1))]
    return contact_sheet(rows, titles, cell, captions=names)


def save_picture(figure: np.ndarray, path: str | Path) -> None:
    """Write a uint8 figure in the format that the name's suffix says; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.mark_output(path)
    with atomic.replacing(path) as temporary:
        # the quality is of JPEG; other formats ignore it
        Image.fromarray(figure).save(temporary, format=Image.registered_extensions()[path.suffix.lower()], quality=95)
