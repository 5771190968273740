"""Zero-shot foreground masks from the class token's attention (DINO, arXiv 2104.14294, section 4.2.2).

    python eval_segmentation.py --pretrained_weights output/run/checkpoint.pth --data_path /path/to/VOC2012
    python eval_segmentation.py --pretrained_weights output/run/checkpoint.pth --data_path ecssd --save_masks 8

A head's mask are the patches that hold 60 % of its attention. The figure is the Jaccard index (IoU) with the foreground
at the picture's own size, mean over the images. No label has a part in a mask, but for the choices that are named:

    best head          the head that fits each image best, chosen with its mask: the paper's figure, an upper bound
    one head           one head for all images, chosen on a validation part of them: what a user can have
    mean of heads      the mask of the heads' mean attention: nothing is chosen
    k-means            two clusters of the patch tokens; the foreground is the one that less of the border belongs to
    centre box         a box of the picture's proportions, its size chosen on the validation part

and the first three for the same network with random weights. Choices are judged on the images outside the validation
part ("held out"), and so is everything else in that column.

Shapes: N images, H heads, h x w patches, D width; pixel sizes are written height x width.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import flags
import parallel
import visualize_attention
from imagesets import masks
from protocols import scores, segmentation_scores, sheets
from protocols.features import PIXELS, weights_hash
from vision_transformer import build_backbone

BOX_SIDES = tuple(round(0.3 + 0.05 * i, 2) for i in range(15))  # shares of the picture's sides: 0.3 to 1
PROGRESS = 100  # images between two lines on the console


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Zero-shot foreground masks from the class token's attention.")
    add = parser.add_argument
    add("--data_path", default="shapes:200x96",
        help="folder with images/ and masks/, or JPEGImages/ and SegmentationClass/ (VOC); shapes:COUNTxPIXELS")
    flags.add_dense_flags(parser)
    add("--layer", type=int, default=-1, help="block whose attention is used, from 0; -1 is the last")
    add("--threshold", type=flags.number(float, 0, 1, above=True), default=0.6,
        help="share of the attention that a mask holds")
    add("--val_share", type=flags.number(float, 0, 0.9), default=0.2,
        help="share of the images on which one head and the box are chosen; 0 leaves both out")
    add("--seed", type=flags.seed, default=0, help="of the validation part, the random weights and k-means")
    add("--output_dir", default="",
        help="for eval_segmentation.json and masks.png; empty: the weights' folder, or .")
    add("--save_masks", type=flags.count, default=0, metavar="N", help="draw the masks of N images into masks.png")
    flags.add_launch_flags(parser, workers=False)
    return parser


# ---- Masks: of patches, of pixels ----


def enlarge(patches: np.ndarray, height: int, width: int, image_size: Sequence[int], patch: int) -> np.ndarray:
    """Masks of patches (..., h, w) at the picture's own size (..., height, width): each pixel takes its nearest patch.

    The inverse of `visualize_attention.resize`; pixels of the strip that it cuts off take the last patch.
    """
    scaled, _ = visualize_attention.network_size(height, width, image_size, patch)
    rows, columns = (
        np.minimum(((np.arange(pixels) + 0.5) * side / pixels).astype(int) // patch, count - 1)
        for pixels, side, count in zip((height, width), scaled, patches.shape[-2:], strict=True))
    return patches[..., rows[:, None], columns]


def kmeans_mask(tokens: np.ndarray, seed: int = 0) -> np.ndarray:
    """Foreground of two clusters of patch tokens (h, w, D): bool (h, w).

    The background is the cluster that holds more of the outermost patches; of equals, the larger cluster.
    """
    h, w = tokens.shape[:2]
    if h * w < 2 or (tokens == tokens[0, 0]).all():
        return np.zeros((h, w), bool)  # there are no two clusters
    found = import_kmeans()(2, n_init=3, random_state=seed).fit_predict(tokens.reshape(h * w, -1))
    found = found.reshape(h, w).astype(bool)
    border = np.ones((h, w), bool)
    border[1:-1, 1:-1] = False
    on_border, in_all = (2 * np.count_nonzero(found[of]) - np.count_nonzero(of) for of in (border, found | True))
    return found if (on_border, in_all) < (0, 0) else ~found


def import_kmeans():
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("the k-means baseline needs scikit-learn: pip install scikit-learn") from error
    return KMeans


def centre_box(height: int, width: int, side: float) -> np.ndarray:
    """Pixels whose centres lie in a centred box of a share of the picture's sides: bool (height, width)."""
    rows, columns = (np.abs((np.arange(n) + 0.5) / n - 0.5) < side / 2 for n in (height, width))
    return rows[:, None] & columns


def picture_masks(image: Tensor, models: Mapping[str, nn.Module], info: Mapping, args: argparse.Namespace
                  ) -> dict[tuple[str, str], np.ndarray]:
    """The masks of a picture uint8 (C, height, width), as candidates bool (n, height, width) by (network, kind).

    `models` go by their names in the table; the first one's tokens are clustered.
    """
    height, width = image.shape[-2:]
    found = {}
    for name, model in models.items():
        _, attention, tokens = visualize_attention.look(model, info, image, args)
        found[name, "heads"] = sheets.threshold_mask(attention, args.threshold)
        found[name, "mean"] = sheets.threshold_mask(attention.mean(axis=0), args.threshold)[None]
        if name == next(iter(models)):
            found[name, "k-means"] = kmeans_mask(tokens, args.seed)[None]
    found = {key: enlarge(m, height, width, args.image_size, info["patch_size"]) for key, m in found.items()}
    return found | {("", "box"): np.stack([centre_box(height, width, side) for side in BOX_SIDES])}


def picture_scores(found: Mapping[tuple[str, str], np.ndarray], truth: np.ndarray, ignored: np.ndarray
                   ) -> dict[tuple[str, str], list[float]]:
    """Jaccard of every candidate of `picture_masks`."""
    return {key: [segmentation_scores.jaccard(m, truth, ignored) for m in candidates]
            for key, candidates in found.items()}


# ---- Figures ----


class Row(NamedTuple):
    name: str
    kind: str  # of candidates
    choice: str  # each: the best of each image; all: one for all images, chosen on the validation part; none
    chosen: Callable[[int], str] = str


ROWS = (
    Row("best head", "heads", "each"),
    Row("one head", "heads", "all", "head {}".format),
    Row("mean of heads", "mean", "none"),
    Row("k-means", "k-means", "none"),
    Row("centre box", "box", "all", lambda i: f"sides x {BOX_SIDES[i]:g}"),
)


def validation_part(n: int, share: float, seed: int) -> np.ndarray:
    """Which of n images the choices are made on, drawn at random: bool (n,).

    At least one where there are two, and never all; none of a single image, and none for a share of 0.
    """
    count = 0 if share == 0 else min(max(1, round(share * n)), n - 1)
    chosen = np.zeros(n, bool)
    chosen[np.random.default_rng(seed).permutation(n)[:count]] = True
    return chosen


def choose(values: np.ndarray, row: Row, validation: np.ndarray) -> int | None:
    """The candidate of values (N, candidates) that is best on the validation part; None where none is chosen."""
    return int(values[validation].mean(0).argmax()) if row.choice == "all" and validation.any() else None


def summarize(measured: Mapping[tuple[str, str], np.ndarray], validation: np.ndarray) -> list[dict]:
    """A line of the table for each network and row; `measured` are Jaccard indices (N, candidates)."""
    results = []
    for network in dict.fromkeys(network for network, _ in measured):
        for row in ROWS:
            if (network, row.kind) not in measured:
                continue
            values = measured[network, row.kind]
            best = choose(values, row, validation)
            if row.choice == "all" and best is None:
                continue
            each = values.max(axis=1) if best is None else values[:, best]
            results.append({
                "network": network or "-", "mask": row.name, "chosen": "-" if best is None else row.chosen(best),
                "jaccard": scores.percent(each) if best is None else None,
                "jaccard_held_out": scores.percent(each[~validation]) if validation.any() else None,
            })
    return results


# ---- The evaluation ----


def random_network(model: nn.Module, info: Mapping, seed: int) -> nn.Module:
    """The same network with random weights, on the same device."""
    torch.manual_seed(seed)
    side = math.isqrt(model.pos_embed.shape[1] - 1) * info["patch_size"]
    untrained, _ = build_backbone(info["arch"], info["patch_size"], in_chans=info["in_chans"], img_size=side)
    return untrained.to(model.pos_embed.device).eval()


def load_networks(args: argparse.Namespace) -> tuple[dict[str, nn.Module], dict]:
    """The network of the flags and the same one with random weights, and how their pictures are made."""
    if args.arch == PIXELS:
        raise ValueError("--arch pixels: raw pixels have no attention to make masks from; name a Vision Transformer")
    torch.manual_seed(args.seed)
    model, info = visualize_attention.load_network(args)
    if not args.pretrained_weights:
        return {"random weights": model}, info
    return {"network": model, "random weights": random_network(model, info, args.seed)}, info


def score_pictures(pictures: masks.MaskedPictures, models: Mapping[str, nn.Module], info: Mapping,
                   args: argparse.Namespace) -> dict[tuple[str, str], np.ndarray]:
    """Jaccard indices (N, candidates) of every kind of mask; shared by the processes."""
    def work(i: int) -> dict:
        if i % PROGRESS == 0 and i and parallel.is_main():
            print(f"image {i} of {len(pictures.names)}", flush=True)
        image, truth, ignored = pictures.load(i)
        return picture_scores(picture_masks(image, models, info, args), truth, ignored)

    found = parallel.map_shared(work, len(pictures.names))
    return {key: np.array([one[key] for one in found]) for key in found[0]}


def draw_masks(drawn: Sequence[int], pictures: masks.MaskedPictures, models: Mapping[str, nn.Module], info: Mapping,
               args: argparse.Namespace, head: int | None) -> np.ndarray:
    """A sheet: a row for each image `drawn`, with its foreground and the masks; `head` is the one chosen."""
    first, last = list(models)[0], list(models)[-1]
    rows = []
    for i in drawn:
        image, truth, ignored = pictures.load(i)
        found = picture_masks(image, models, info, args)
        fit = picture_scores(found, truth, ignored)
        shown = {"foreground": truth, "best head": found[first, "heads"][np.argmax(fit[first, "heads"])]}
        if head is not None:
            shown[f"head {head}"] = found[first, "heads"][head]
        shown |= {"mean of heads": found[first, "mean"][0], "k-means": found[first, "k-means"][0]}
        if last != first:
            shown["random: best head"] = found[last, "heads"][np.argmax(fit[last, "heads"])]
        picture = sheets.as_picture(image)
        rows.append([picture, *(sheets.mask_overlay(picture, mask) for mask in shown.values())])
    return sheets.contact_sheet(rows, ["image", *shown], cell=200)


def note_on_choices(validation: np.ndarray) -> str:
    if validation.any():
        return (f"one head and the centre box are chosen on {validation.sum()} images (--val_share) and judged on "
                f"the other {(~validation).sum()}, the column held out")
    return "no validation part (--val_share 0, or one image): one head and the centre box are left out"


def evaluate_segmentation(args: argparse.Namespace) -> dict:
    """The whole evaluation: prints the table, writes eval_segmentation.json and masks.png, returns what the JSON holds.

    Raises:
        flags.Refused: bad input, in one line.
    """
    try:
        import_kmeans()  # it is missed before any work is done
        output_dir = flags.check_folder(args.output_dir or os.path.dirname(args.pretrained_weights) or ".")
        device = parallel.start(args.device, args.dist_url, args.dist_timeout)
        args = argparse.Namespace(**vars(args) | {"device": str(device), "image_size": [args.image_size]})
        models, info = load_networks(args)
        pictures = masks.open_masked(args.data_path, info["in_chans"])
        flags.prepare_output(output_dir)
        measured = score_pictures(pictures, models, info, args)
    except (ValueError, OSError, ImportError) as error:
        raise flags.Refused(error) from error
    n = len(pictures.names)
    validation = validation_part(n, args.val_share, args.seed)
    first = next(iter(models))
    about = {
        "arch": info["arch"], "patch_size": info["patch_size"], "weights": args.pretrained_weights or None,
        "checkpoint_key": args.checkpoint_key, "weights_sha256": weights_hash(models[first]),
        "data_path": args.data_path, "images": n, "held_out": int((~validation).sum()),
        "image_size": args.image_size[0], "layer": args.layer, "threshold": args.threshold, "seed": args.seed,
        "notes": [*pictures.notes, note_on_choices(validation)],
    }
    results = summarize(measured, validation)
    if parallel.is_main():
        report(results, about)
        scores.write_results(output_dir / "eval_segmentation.json", results, **about)
        if args.save_masks:
            drawn = np.linspace(0, n - 1, min(n, args.save_masks)).astype(int).tolist()
            head = choose(measured[first, "heads"], ROWS[1], validation)
            sheet = draw_masks(drawn, pictures, models, info, args, head)
            sheets.save_picture(sheet, output_dir / "masks.png")
        print(f"wrote {output_dir / 'eval_segmentation.json'}" + (" and masks.png" if args.save_masks else ""))
    return about | {"results": results}


def report(results: Sequence[Mapping], about: Mapping) -> None:
    for note in about["notes"]:
        print(note)
    print(f"Jaccard index in %, mean over {about['images']} images and over the {about['held_out']} held out, "
          "with its 95 % bootstrap interval")
    print(scores.table(results), flush=True)


def main(args: argparse.Namespace) -> int:
    return flags.exit_code("eval_segmentation.py", evaluate_segmentation, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
