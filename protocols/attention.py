"""Figures of what a Vision Transformer attends to and of its patch tokens: of one image, of a set of images, of a
network in training. Of networks of timm, whose attention isn't read, figures of the patch tokens only.

Figures are uint8 arrays (height, width, 3). Shapes: C channels, H heads, h x w patches, D width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import flags
from imagesets import decode, shapes
from imagesets.sources import Images
from parallel import Refused
from protocols import dense, sheets
from protocols.features import Network
from protocols.progress import progress
from protocols.tokens import normalize, patch_size
from protocols.transforms import TooManyPatches

PUBLISHED_SIZE = (480, 480)  # of the published script's figures
MASK_SIDE = 500  # pixels of its figures of masks, whatever the image's proportions
PCA_PAIRS = 4  # pairs of image and colours in a row of the PCA sheet
PAGE = 16  # images on a sheet


# ---- One image ----


def load_image(path: str | None, reading: decode.Reading) -> Tensor:
    """An image file as uint8 (C, height, width); without a path, the first image of the drawn set.

    Raises:
        Refused: no such file, or one that can't be decoded.
    """
    if path is None:
        return decode.from_array(shapes.draw(0, 480)[0], reading.in_chans)
    if not Path(path).is_file():
        raise Refused(f"--image_path {path}: no such file; give a folder of images to --images")
    try:
        return decode.decode(path, **reading.decoding())
    except decode.Undecodable as error:
        raise Refused(f"--image_path {error}; give another image") from error


def draw_image(
    network: Network, image: Tensor, image_size: Sequence[int], output_dir: str | os.PathLike, layer: int = -1,
    threshold: float | None = None, pca: bool = False, point: Sequence[float] | None = None,
) -> None:
    """Write img.png, attn-mean.png, overlay.png, attn-head*.png and what else is asked for; of a network of timm,
    nothing of attention.

    img.png, attn-head*.png and the size of mask_th*_head*.png are those of the published script.

    Args:
        image: uint8 (C, height, width).
        image_size: see `dense.input_sizes`; empty: 480 x 480, as published.
        threshold: also mask_th*_head*.png, the patches that hold this share of a head's attention.
        pca: also pca.png, the first three principal components of the patch tokens.
        point: pixel (x, y) of the image; also similarity.png, the cosine similarity of all patches to its patch.

    Raises:
        Refused: the point lies outside the image, or nothing can be written to `output_dir`.
    """
    patch, image_size = patch_size(network), image_size or PUBLISHED_SIZE
    position = dense.patch_of_point(point, *image.shape[-2:], image_size, patch) if point else None
    image, attention, tokens = dense.look(network, image, image_size, layer, bilinear=True)
    figure, figures = sheets.as_picture(image), {"img": stretched(network, image)}
    if attention is not None:
        mean = attention.mean(axis=0)
        figures |= {"attn-mean": heat_figure(mean, figure), "overlay": sheets.attention_overlay(figure, mean)}
        figures |= {f"attn-head{i}": heat_figure(head, figure) for i, head in enumerate(attention)}
    if threshold and attention is not None:
        masks = sheets.threshold_mask(attention, threshold)
        square = sheets.resize(figure, MASK_SIDE, MASK_SIDE)
        figures |= {f"mask_th{threshold}_head{i}": sheets.mask_overlay(square, m) for i, m in enumerate(masks)}
    if pca:
        figures["pca"] = enlarge(sheets.pca_picture(tokens), figure)
    if position:
        drawn = similarity_figure(figure, tokens, tokens[position])
        figures["similarity"] = sheets.outline_patch(drawn, position, patch)
    save(figures, output_dir)
    heads = "" if attention is None else f"{len(attention)} heads on "
    print(f"{heads}{tokens.shape[0]} x {tokens.shape[1]} patches: {len(figures)} figures written to {output_dir} "
          f"({', '.join(f'{name}.png' for name in figures)})")


def save(figures: Mapping[str, np.ndarray], output_dir: str | os.PathLike) -> None:
    folder = flags.prepare_output(output_dir)
    for name, figure in figures.items():
        sheets.save_picture(figure, folder / f"{name}.png")


def stretched(network: Network, image: Tensor) -> np.ndarray:
    """An image uint8 (C, h, w) as the network gets it: its normalized values, scaled from their smallest to their
    largest over all channels, as a figure."""
    x = normalize(image, network.info, torch.device("cpu"))
    x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-5)
    return sheets.as_picture((255 * x + 0.5).clamp(0, 255).to(torch.uint8))


def heat_figure(values: np.ndarray, figure: np.ndarray, colormap: str = sheets.COLORMAP) -> np.ndarray:
    """A map (h, w) as colours from its smallest to its largest value, each patch a square, at the figure's size."""
    return enlarge(sheets.heatmap(sheets.scale(values, 100), colormap), figure)


def enlarge(colors: np.ndarray, figure: np.ndarray) -> np.ndarray:
    """Colours of patches (h, w, 3) as squares, at the figure's size."""
    return sheets.resize(colors, *figure.shape[:2], smooth=False)


def similarity_figure(figure: np.ndarray, tokens: np.ndarray, token: np.ndarray) -> np.ndarray:
    """The figure overlaid with the cosine similarity of every patch token (h, w, D) to a token (D,)."""
    return sheets.attention_overlay(figure, sheets.similarity_map(tokens, token))


# ---- A set of images ----


def draw_sheets(
    network: Network, images: Images, image_size: Sequence[int], output_dir: str | os.PathLike, layer: int = -1,
    max_images: int = 16, threshold: float | None = None, pca: bool = False, flag: str = "--images",
) -> None:
    """Write attention_sheet.png, a row per image, and with `pca` also pca_sheet.png, with one basis for all images; of
    a network of timm, pca_sheet.png only.

    More than PAGE images are continued in attention_sheet_2.png and so on.

    Args:
        images: of a larger set, `max_images` evenly spaced ones are drawn.
        image_size: see `dense.input_sizes`; empty: see `dense.default_size`.
        threshold: also a column of masks, the patches that hold this share of the mean attention.
        flag: how errors name the images.

    Raises:
        Refused: no image can be decoded, or nothing can be written to `output_dir`.
    """
    drawn, outputs = [], []
    for i in np.linspace(0, len(images) - 1, min(len(images), max_images)).astype(int).tolist():
        try:
            drawn.append((images.name(i), images.load(i)))
        except decode.Undecodable as error:
            print(f"left out: {error}")
    size = image_size or [dense.default_size(
        network.info["global_crops_size"], patch_size(network),
        [min(image.shape[1:]) for _, image in drawn] or [0])]
    for name, image in progress(drawn, len(drawn), "images"):
        try:
            outputs.append((Path(name).name, *dense.look(network, image, size, layer, bilinear=True)))
        except TooManyPatches as error:
            print(f"left out: {name}: {error}")
    if not outputs:
        raise Refused(f"{flag}: no image can be decoded and drawn; give others")
    names, shown, attentions, tokens = zip(*outputs, strict=True)
    figures = [sheets.as_picture(image) for image in shown]
    attends = dense.has_attention(network)
    masks = [sheets.threshold_mask(a.mean(axis=0), threshold) for a in attentions] if threshold and attends else None
    colors = pca_figures(tokens, figures) if pca else None
    pages = {}
    for first in range(0, len(outputs), PAGE):
        page, end = slice(first, first + PAGE), f"_{first // PAGE + 1}" if first else ""
        if attends:
            pages[f"attention_sheet{end}"] = sheets.attention_sheet(
                figures[page], attentions[page], masks and masks[page], names=names[page])
        if pca:
            pages[f"pca_sheet{end}"] = pca_sheet(figures[page], colors[page], names[page])
    save(pages, output_dir)
    print(f"{len(outputs)} of {len(images)} images: {' and '.join(f'{name}.png' for name in pages)} written to "
          f"{output_dir}")


def pca_sheet(figures: Sequence[np.ndarray], colors: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Figures beside their patch tokens as colours, with their names below, a few pairs in a row."""
    cells = [cell for pair in zip(figures, colors, strict=True) for cell in pair]
    captions = [caption for name in names for caption in (name, "")]
    columns = 2 * min(PCA_PAIRS, len(figures))
    rows, captions = ([x[i:i + columns] for i in range(0, len(x), columns)] for x in (cells, captions))
    return sheets.contact_sheet(rows, captions=captions)


def pca_figures(tokens: Sequence[np.ndarray], figures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Patch tokens (h, w, D) of n images as colours of one basis, each at the size of its figure."""
    basis = sheets.pca_basis(np.concatenate([t.reshape(-1, t.shape[-1]) for t in tokens]))
    return [enlarge(sheets.pca_picture(t, basis), figure) for t, figure in zip(tokens, figures, strict=True)]


# ---- A network in training ----


def network_sheets(
    model: nn.Module, images: Sequence[Tensor], mean: Sequence[float], std: Sequence[float], cell: int = 160
) -> dict[str, np.ndarray]:
    """Attention and PCA sheets of a few images. The modules' training modes are restored.

    Args:
        model: a VisionTransformer, on any device.
        images: uint8 tensors (C, height, width), of any sizes, none smaller than a patch.
        mean, std: one value per channel, of intensities in [0, 1], as in training.

    Returns:
        {"pca": the images above their patch tokens as colours, of one basis, "attention": the attention sheet}, both
        uint8 (height, width, 3); empty without images.
    """
    if not images:
        return {}
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            outputs = [dense.attention_and_tokens(
                model, normalize(image, {"mean": mean, "std": std}, device)[None]) for image in images]
    finally:
        for module, training in modes:
            module.training = training
    figures = [sheets.as_picture(image) for image in images]
    colors = pca_figures([t[0].numpy() for _, t in outputs], figures)
    attention = sheets.attention_sheet(figures, [a[0].numpy() for a, _ in outputs], cell=cell)
    return {"pca": sheets.contact_sheet([figures, colors], cell=cell), "attention": attention}
