"""Zero-shot foreground masks from the class token's attention (DINO, arXiv 2104.14294, section 4.2.2).

The mask of a head is the set of patches that hold 60 % of its attention. The score is the Jaccard index (IoU) with the
foreground at the image's own size, averaged over images. Labels are used only where a row mentions them:

    best head          the head that fits each image best, chosen with its label: the paper's figure, an upper bound
    one head           one head for all images, chosen on a validation part: what a user can have
    mean of heads      the mask of the mean attention of the heads; no choice
    k-means            two clusters of the patch tokens; the foreground is the cluster with less of the border
    centre box         a box with the image's proportions, its size chosen on the validation part

and the first three for the same network with random weights. The column "held out" averages over the images outside
the validation part; choices are judged there only.

Shapes: N images, C channels, H heads, h x w patches, D width. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import flags
import parallel
from imagesets import masks
from parallel import import_optional
from protocols import dense, scores, segmentation_scores, sheets
from protocols.features import Network
from vision_transformer import build_backbone

BOX_SIDES = tuple(round(0.3 + 0.05 * i, 2) for i in range(15))  # share of the image's sides: 0.3 to 1
PROGRESS = 100  # images between two lines on the console

# ---- Masks ----


Candidates = dict[tuple[str, str], np.ndarray]  # by network and kind; the box has no network: ""


def kmeans_mask(tokens: np.ndarray, seed: int = 0) -> np.ndarray:
    """Foreground of two clusters of patch tokens (h, w, D): bool (h, w).

    The background is the cluster with more of the outermost patches; of equals, the larger cluster.
    """
    h, w = tokens.shape[:2]
    if h * w < 2 or (tokens == tokens[0, 0]).all():
        return np.zeros((h, w), bool)  # two clusters don't exist
    cluster = import_kmeans()(2, n_init=3, random_state=seed).fit_predict(tokens.reshape(h * w, -1))
    cluster = cluster.reshape(h, w).astype(bool)
    border = np.ones((h, w), bool)
    border[1:-1, 1:-1] = False
    on_border, overall = (2 * np.count_nonzero(cluster[part]) - np.count_nonzero(part)
                          for part in (border, np.ones((h, w), bool)))
    return cluster if (on_border, overall) < (0, 0) else ~cluster


def import_kmeans():
    return import_optional("sklearn.cluster", "the k-means baseline", "scikit-learn").KMeans


def centre_box(height: int, width: int, side: float) -> np.ndarray:
    """Pixels whose centres lie in a centred box, `side` times the image's sides: bool (height, width)."""
    rows, columns = (np.abs((np.arange(n) + 0.5) / n - 0.5) < side / 2 for n in (height, width))
    return rows[:, None] & columns


def candidate_masks(
    image: Tensor, networks: Mapping[str, Network], image_size: int, layer: int, threshold: float, seed: int
) -> Candidates:
    """Masks bool (candidates, height, width) of an image uint8 (C, height, width).

    Args:
        networks: by their names in the table; the tokens of the first one are clustered.
        image_size, layer, threshold, seed: see `evaluate_segmentation`.
    """
    height, width = image.shape[-2:]
    patches = {}
    for name, network in networks.items():
        _, attention, tokens = dense.look(network, image, [image_size], layer)
        patches[name, "heads"] = sheets.threshold_mask(attention, threshold)
        patches[name, "mean"] = sheets.threshold_mask(attention.mean(axis=0), threshold)[None]
        if name == next(iter(networks)):
            patches[name, "k-means"] = kmeans_mask(tokens, seed)[None]
    pixels = {key: dense.patches_to_pixels(mask, height, width, [image_size], network.info["patch_size"])
              for key, mask in patches.items()}
    return pixels | {("", "box"): np.stack([centre_box(height, width, side) for side in BOX_SIDES])}


def candidate_scores(candidates: Candidates, truth: np.ndarray, ignored: np.ndarray) -> Candidates:
    """Jaccard indices (candidates,) of `candidate_masks`."""
    return {key: np.array([segmentation_scores.jaccard(mask, truth, ignored) for mask in each])
            for key, each in candidates.items()}


# ---- Figures ----


class Row(NamedTuple):
    """A line of the table for each network that has candidates of this kind."""

    name: str
    kind: str
    choice: str  # each: the best one per image; all: one for all images, chosen on the validation part; none
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

    With share > 0 at least one image and never all; none of a single image.
    """
    count = 0 if share == 0 else min(max(1, round(share * n)), n - 1)
    chosen = np.zeros(n, bool)
    chosen[np.random.default_rng(seed).permutation(n)[:count]] = True
    return chosen


def choose(values: np.ndarray, row: Row, validation: np.ndarray) -> int | None:
    """The best candidate of values (N, candidates) on the validation part; None where the row has no such choice."""
    return int(values[validation].mean(0).argmax()) if row.choice == "all" and validation.any() else None


def summarize(jaccard: Candidates, validation: np.ndarray) -> list[dict]:
    """The lines of the table, by network and row, from Jaccard indices (N, candidates)."""
    results = []
    for network in dict.fromkeys(network for network, _ in jaccard):
        for row in ROWS:
            if (network, row.kind) not in jaccard:
                continue
            values = jaccard[network, row.kind]
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


def note_on_choices(validation: np.ndarray) -> str:
    if validation.any():
        return (f"one head and the centre box are chosen on {validation.sum()} images (--val_share) and judged on "
                f"the other {(~validation).sum()}, the column held out")
    return "no validation part (--val_share 0, or one image): one head and the centre box are left out"


# ---- The evaluation ----


def compared_networks(network: Network, seed: int) -> dict[str, Network]:
    """The network and the same one with random weights, by their names in the table."""
    if network.about["weights"] is None:
        return {"random weights": network}
    torch.manual_seed(seed)
    info, positions = network.info, network.forward.pos_embed.shape[1] - 1
    untrained, _ = build_backbone(info["arch"], info["patch_size"], in_chans=info["in_chans"],
                                  img_size=math.isqrt(positions) * info["patch_size"])
    return {"network": network, "random weights": network._replace(forward=untrained.to(network.device).eval())}


def score_images(images: masks.MaskedImages, find_masks: Callable[[Tensor], Candidates]) -> Candidates:
    """Jaccard indices (N, candidates) of the masks that `find_masks` makes of each image; the processes share them."""
    def work(i: int) -> Candidates:
        if i % PROGRESS == 0 and i:
            parallel.say(f"image {i} of {len(images.names)}")
        image, truth, ignored = images.load(i)
        return candidate_scores(find_masks(image), truth, ignored)

    per_image = parallel.map_shared(work, len(images.names))
    return {key: np.stack([one[key] for one in per_image]) for key in per_image[0]}


def draw_masks(
    rows: Sequence[int], images: masks.MaskedImages, find_masks: Callable[[Tensor], Candidates], head: int | None
) -> np.ndarray:
    """A sheet uint8 (height, width, 3) of the images `rows`: foreground and masks; `head` is the chosen one."""
    cells = []
    for i in rows:
        image, truth, ignored = images.load(i)
        candidates = find_masks(image)
        networks = [network for network, kind in candidates if kind == "heads"]
        first, last = networks[0], networks[-1]
        jaccard = candidate_scores(candidates, truth, ignored)
        shown = {"foreground": truth, "best head": candidates[first, "heads"][np.argmax(jaccard[first, "heads"])]}
        if head is not None:
            shown[f"head {head}"] = candidates[first, "heads"][head]
        shown |= {"mean of heads": candidates[first, "mean"][0], "k-means": candidates[first, "k-means"][0]}
        if last != first:
            shown["random: best head"] = candidates[last, "heads"][np.argmax(jaccard[last, "heads"])]
        figure = sheets.as_picture(image)
        cells.append([figure, *(sheets.mask_overlay(figure, mask) for mask in shown.values())])
    return sheets.contact_sheet(cells, ["image", *shown], cell=200)


def evaluate_segmentation(
    network: Network, data_path: str, image_size: int = 480, layer: int = -1, threshold: float = 0.6,
    val_share: float = 0.2, seed: int = 0, save_masks: int = 0, output_dir: str | os.PathLike = ".",
    flag: str = "--data_path",
) -> dict:
    """Masks from attention, measured. Writes eval_segmentation.json and, with `save_masks`, masks.png.

    Every process calls it; the first one writes. The same network with random weights is measured too.

    Args:
        network: a VisionTransformer; computes in float32.
        data_path: see `masks.open_masked`.
        image_size: shorter side of the network's input in pixels, rounded down to whole patches.
        layer: index of the block whose attention is used; negative ones count from the last.
        threshold: share of the attention that a mask holds.
        val_share: share of the images on which one head and the box are chosen; 0 leaves both out.
        seed: of the validation part, the random weights and k-means.
        save_masks: number of images to draw.
        flag: how errors name `data_path`.

    Returns:
        What eval_segmentation.json holds, without the command: settings, notes and {"results": lines of the table}.

    Raises:
        Refused: a network without attention, no images with masks, a file that can't be read or written.
    """
    import_kmeans()  # before any work
    dense.check_attention(network, [image_size], layer)
    images = masks.open_masked(data_path, network.reading, flag)
    output_dir = flags.prepare_output(output_dir)
    networks = compared_networks(network, seed)
    find_masks = partial(candidate_masks, networks=networks, image_size=image_size, layer=layer, threshold=threshold,
                         seed=seed)
    jaccard = score_images(images, find_masks)
    n = len(images.names)
    validation = validation_part(n, val_share, seed)
    about = {name: network.about[name] for name in (
        "arch", "patch_size", "weights", "checkpoint_key", "weights_sha256")} | {
        "data_path": data_path, "images": n, "held_out": int((~validation).sum()),
        "image_size": image_size, "layer": layer, "threshold": threshold, "seed": seed,
        "notes": [*images.notes, note_on_choices(validation)],
    }
    if save_masks and parallel.is_main():
        rows = np.linspace(0, n - 1, min(n, save_masks)).astype(int).tolist()
        head = choose(jaccard[next(iter(networks)), "heads"], ROWS[1], validation)
        sheets.save_picture(draw_masks(rows, images, find_masks, head), output_dir / "masks.png")
    return scores.write_results(output_dir / "eval_segmentation.json", summarize(jaccard, validation), **about)


def show_segmentation(report: Mapping) -> None:
    """Print the notes and the table of `evaluate_segmentation`'s report."""
    for note in report["notes"]:
        print(note)
    print(f"Jaccard index in %, mean over {report['images']} images and over the {report['held_out']} held out, "
          "with its 95 % bootstrap interval")
    print(scores.table(report["results"]), flush=True)
