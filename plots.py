"""Every picture of the project: curves of a run, attention, masks, PCA of patch tokens, sheets of pictures.

Pictures are uint8 arrays (height, width, 3); maps are float arrays (h, w) with one value a patch.
Shapes: n pictures, H heads, h x w patches, D width of the network.

As a script it draws the curves of one or several runs:
    python plots.py run1/log.txt run2/log.txt --out curves.png
"""

import argparse
import json
import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import flags

if TYPE_CHECKING:  # torch and matplotlib stay out of the import: it takes a tenth of a second
    import torch
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

COLORMAP = "viridis"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#4d4d4d")
INK, GREY, GRID = "#333333", "#888888", "#dddddd"
MASK_COLOR = (255, 64, 64)

# ---------------------------------------------------------------- curves of training

# title, unit, {key of log.txt: (label, line style)}; a panel without any of its keys is left out
LARGE_PANELS = (
    ("Loss", "nats", {
        "train_loss": ("loss", "-"), "train_entropy": ("teacher entropy", "--"), "train_ln_k": ("ln K", ":")}),
    ("k-NN on held-out pictures", "top-1 %", {
        "knn_top1": ("teacher", "-"), "knn_untrained": ("untrained network", "--"), "knn_pixels": ("raw pixels", ":")}),
)
SMALL_PANELS = (
    ("Learning rate", "", {"train_lr": ("", "-")}),
    ("Weight decay", "", {"train_wd": ("", "-")}),
    ("Teacher momentum", "", {"train_momentum": ("", "-")}),
    ("Effective rank of features", "", {"train_feature_rank": ("", "-")}),
    ("Std of features", "", {"train_feature_std": ("", "-")}),
    ("Prototypes in use", "", {"train_prototypes_used": ("", "-")}),
    ("KL teacher to student", "", {"train_kl": ("", "-")}),
    ("Norm of the centre", "", {"train_center_norm": ("", "-")}),
)
LEVELS = {"knn_untrained", "knn_pixels", "train_ln_k"}  # one value a run, drawn across the whole panel
FORMATS = (".png", ".svg", ".pdf")
COLUMNS = 4  # small panels a row; the large ones share the same width


def read_log(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the JSON lines of a `log.txt`: {key: (epochs, values)}, each in the order of epochs.

    An epoch that stands twice (a run that was resumed) counts as it was written last. A line cut short by a crash is
    passed over, and so is what is no number. ValueError when nothing is left, FileNotFoundError when there is no file.
    """
    path = Path(path)
    path = path / "log.txt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"log {path}: no such file; give the log.txt of a run, or its folder")
    epochs = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and _is_number(record.get("epoch")):
            epochs[record["epoch"]] = record
    if not epochs:
        raise ValueError(f"log {path}: no line with an epoch in it; give the log.txt that main_dino.py writes")
    series: dict[str, list] = {}
    for epoch in sorted(epochs):
        for key, value in epochs[epoch].items():
            if _is_number(value):
                series.setdefault(key, []).append((epoch, value))
    return {key: tuple(np.array(points, dtype=float).T) for key, points in series.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def run_names(paths: Sequence[str | Path]) -> list[str]:
    """A short name for each log: the fewest last folders of its path that tell it from the others."""
    parts = [Path(os.path.abspath(path)) for path in paths]
    parts = [(path if path.is_dir() else path.parent).parts for path in parts]
    for length in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-length:]).lstrip("/") for p in parts]
        if len(set(names)) == len(names):
            return names
    return names


def training_curves(logs: Sequence[str | Path], out: str | Path) -> None:
    """Draw the curves of one or several runs, one colour a run, into one picture file.

    Args:
        logs: paths of log.txt files, or of folders that hold one. Only `epoch` must be in them: what else is there
            is drawn, what isn't is left out.
        out: the picture to write; its ending chooses the format, one of FORMATS.
    Raises:
        ValueError, FileNotFoundError: a log that is missing, or empty, or nothing to draw in any of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if Path(out).suffix.lower() not in FORMATS:
        raise ValueError(f"--out {out}: a picture's name ends in {', '.join(FORMATS)}")
    runs = [read_log(path) for path in logs]
    large, small = ([p for p in panels if any(key in run for run in runs for key in p[2])]
                    for panels in (LARGE_PANELS, SMALL_PANELS))
    if not large and not small:
        raise ValueError(f"log {logs[0]}: nothing to draw beside the epochs; give the log.txt that main_dino.py writes")
    heights = [3.6] * bool(large) + [1.9] * -(-len(small) // COLUMNS)
    figure = Figure(figsize=(11, sum(heights) + 0.3 + 0.3 * (len(runs) > 1)), dpi=130)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08, wspace=0.02, hspace=0.03)
    FigureCanvasAgg(figure)  # a canvas of its own: no global backend, no pyplot state
    cells = figure.add_gridspec(len(heights), COLUMNS, height_ratios=heights)
    for i, panel in enumerate(large):
        span = COLUMNS // len(large)
        _draw_panel(figure.add_subplot(cells[0, i * span:(i + 1) * span]), panel, runs, 10)
    for i, panel in enumerate(small):
        _draw_panel(figure.add_subplot(cells[bool(large) + i // COLUMNS, i % COLUMNS]), panel, runs, 8)
    if len(runs) > 1:
        names = run_names(logs)
        handles = [_line(COLORS[i % len(COLORS)], "-") for i in range(len(runs))]
        figure.legend(handles, names, loc="outside upper left", ncols=min(len(names), 4), frameon=False, fontsize=10)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def _draw_panel(axes: "Axes", panel: tuple, runs: list[dict], font: int) -> None:
    title, unit, keys = panel
    for key, (_, style) in keys.items():
        shared = len({run[key][1][-1] for run in runs if key in run}) == 1
        for color, run in zip(cycle(COLORS), runs, strict=False):
            if key in run and key in LEVELS:
                axes.axhline(run[key][1][-1], linestyle=style, color=GREY if shared else color, linewidth=1.6)
            elif key in run:
                axes.plot(*run[key], style, color=color, linewidth=1.6, clip_on=False,
                          marker="o" if len(run[key][0]) <= 30 else None, markersize=font / 4)
    axes.set_title(title, fontsize=font + 1, color=INK, loc="left")
    axes.set_ylabel(unit, fontsize=font, color=INK)
    axes.set_xlabel("epoch" if font == 10 else "", fontsize=font, color=INK)
    axes.tick_params(labelsize=font - 1, colors=INK, length=0)
    first, last = (end(run["epoch"][0][side] for run in runs) for end, side in ((min, 0), (max, -1)))
    axes.set_xlim(first, max(last, first + 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[:].set_visible(False)
    drawn = [(key, *entry) for key, entry in keys.items() if any(key in run for run in runs)]
    if len(keys) > 1:  # of several runs the colour is the run's, the line's style the key's
        plain = COLORS[0] if len(runs) == 1 else INK
        handles = [_line(GREY if key in LEVELS else plain, style) for key, _, style in drawn]
        axes.legend(handles, [label for _, label, _ in drawn], fontsize=font - 1, framealpha=0.8, edgecolor="none",
                    labelcolor=INK)


def _line(color: str, style: str) -> "Line2D":
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=style, linewidth=1.6)


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
    rows = [[_fit(picture, cell) for picture in row] for row in rows]
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


def _fit(picture: np.ndarray, cell: int) -> np.ndarray:
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
        heads, image = np.asarray(heads), _fit(image, cell)
        marked = [] if masks is None else [mask_overlay(image, masks[i])]
        rows.append([image, *marked, attention_overlay(image, heads.mean(axis=0)), *(
            resize(heatmap(scale(head)), *image.shape[:2], smooth=False) for head in heads)])
    most = max(len(heads) for heads in attentions)
    titles = ["picture", *([] if masks is None else ["mask"]), "mean", *(f"head {i}" for i in range(most))]
    return contact_sheet(rows, titles, cell)


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


# ---------------------------------------------------------------- script


def get_args_parser() -> flags.Parser:
    parser = flags.Parser("Draw the curves of one or several runs of main_dino.py.")
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log.txt of a run, or the folder that holds it")
    parser.add_argument("--out", default="curves.png", help="picture to write: png, svg or pdf")
    return parser


def main(args: argparse.Namespace) -> None:
    try:
        training_curves(args.logs, args.out)
    except (ValueError, OSError) as error:
        get_args_parser().error(str(error))
    print(f"curves of {len(args.logs)} run(s) written to {args.out}")


if __name__ == "__main__":
    arguments = get_args_parser().parse_args()
    main(arguments)
