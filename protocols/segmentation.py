"""Zero-shot foreground masks from the class token's attention (DINO, arXiv 2104.14294, section 4.2.2).

The mask of a head is the set of patches that hold 60 % of its attention. The score is the Jaccard index (IoU) with the
foreground at the image's own size, averaged over images. Labels are used only where a row mentions them:

    best head          the head that fits each image best, chosen with its label: the paper's figure, an upper bound
    one head           one head for all images, chosen on a validation part: what a user can have
    mean of heads      the mask of the mean attention of the heads; no choice
    k-means            two clusters of the patch tokens; the foreground is the cluster with less of the border
    centre box         a box with the image's proportions, its size chosen on the validation part

and the first four for the same network with random weights. Of a network of timm, whose attention isn't read, the
last two. The column "held out" averages over the images outside
the validation part; choices are judged there only.

Two more columns judge the map behind a mask, which the mask can hide: a network may attend to the object and still have
a mask of one patch, if that patch holds most of the attention. They are `segmentation_scores.energy_ratio` and
`segmentation_scores.pointing` of the attention at the image's own size; of k-means and the box, of the mask itself. A
row's head is the one that its mask was chosen by. They average over the held-out images, or over all without a
validation part.

Shapes: N images, C channels, H heads, h x w patches, D width. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

import flags
import parallel
from imagesets import masks
from parallel import Refused, import_optional
from protocols import dense, scores, segmentation_scores, sheets
from protocols.features import Network, untrained
from protocols.progress import map_shared
from protocols.tokens import patch_size
from protocols.transforms import TooManyPatches

BOX_SIDES = tuple(round(0.3 + 0.05 * i, 2) for i in range(15))  # share of the image's sides: 0.3 to 1

# ---- Masks ----


class Candidate(NamedTuple):
    """What a row of the table chooses from, on one image."""

    masks: np.ndarray  # bool (candidates, height, width)
    maps: np.ndarray  # what the masks were made of, floats (candidates, height, width), or the masks themselves


Candidates = dict[tuple[str, str], Candidate]  # by network and kind; the box has no network: ""
Measured = dict[tuple[str, str], np.ndarray]  # MEASURES of candidates: (candidates, 3), or (N, candidates, 3)
LONG = 2**14  # patches, for whose attention a CPU takes seconds per block
MEASURES = (segmentation_scores.jaccard, segmentation_scores.energy_ratio, segmentation_scores.pointing)


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
    """The masks that are compared on an image uint8 (C, height, width), and the maps behind them.

    Args:
        networks: by their names in the table.
        image_size, layer, threshold, seed: see `evaluate_segmentation`.
    """
    height, width = image.shape[-2:]
    candidates = {}
    for name, network in networks.items():
        _, attention, tokens = dense.look(network, image, [image_size], layer)
        cluster = kmeans_mask(tokens, seed)[None]
        pairs = {"k-means": (cluster, cluster)}
        if attention is not None:
            mean = attention.mean(axis=0, keepdims=True)
            pairs |= {kind: (sheets.threshold_mask(maps, threshold), maps)
                      for kind, maps in (("heads", attention), ("mean", mean))}
        for kind, pair in pairs.items():
            candidates[name, kind] = Candidate(*(
                dense.patches_to_pixels(x, height, width, [image_size], patch_size(network)) for x in pair))
    boxes = np.stack([centre_box(height, width, side) for side in BOX_SIDES])
    return candidates | {("", "box"): Candidate(boxes, boxes)}


def measure(candidates: Candidates, truth: np.ndarray, ignored: np.ndarray) -> Measured:
    """MEASURES (candidates, 3) of an image's `candidate_masks`."""
    jaccard, *of_maps = MEASURES
    return {key: np.array([[jaccard(mask, truth, ignored), *(score(heat, truth, ignored) for score in of_maps)]
                           for mask, heat in zip(*each, strict=True)]) for key, each in candidates.items()}


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
    """The candidate of MEASURES (N, candidates, 3) with the best Jaccard index on the validation part; None where the
    row has no such choice."""
    return int(values[validation, :, 0].mean(0).argmax()) if row.choice == "all" and validation.any() else None


def summarize(measured: Measured, validation: np.ndarray) -> list[dict]:
    """The lines of the table, by network and row, from MEASURES (N, candidates, 3) of all images."""
    results = []
    for network in dict.fromkeys(network for network, _ in measured):
        for row in ROWS:
            if (network, row.kind) not in measured:
                continue
            values = measured[network, row.kind]
            best = choose(values, row, validation)
            if row.choice == "all" and best is None:
                continue
            chosen = values[..., 0].argmax(axis=1) if best is None else best
            jaccard, energy, hit = values[np.arange(len(values)), chosen].T
            results.append({
                "network": network or "-", "mask": row.name, "chosen": "-" if best is None else row.chosen(best),
                "jaccard": scores.percent(jaccard) if best is None else None,
                "jaccard_held_out": scores.percent(jaccard[~validation]) if validation.any() else None,
                "energy_ratio": scores.summary(energy[~validation]),
                "pointing_game": scores.percent(hit[~validation]),
            })
    return results


def note_on_choices(validation: np.ndarray, attends: bool) -> str:
    chosen, verb = ("one head and the centre box", "are") if attends else ("the centre box", "is")
    if validation.any():
        return (f"{chosen} {verb} chosen on {validation.sum()} images (--val_share) and judged on "
                f"the other {(~validation).sum()}, the column held out")
    return f"no validation part (--val_share 0, or one image): {chosen} {verb} left out"


def notes_on(network: Network, validation: np.ndarray) -> list[str]:
    attends = dense.has_attention(network)
    notes = [note_on_choices(validation, attends)]
    if not attends:
        rows = ", ".join(row.name for row in ROWS if row.kind in ("heads", "mean"))
        notes.append(f"left out: {rows}; the attention of {network.about['arch']}, a network of timm, isn't read")
    return notes


# ---- The evaluation ----


def compared_networks(network: Network, seed: int) -> dict[str, Network]:
    """The network and the same one with random weights, by their names in the table."""
    if network.about["weights"] is None:
        return {"random weights": network}
    return {"network": network, "random weights": untrained(network, seed)}


def check_sizes(images: masks.MaskedImages, image_size: int, patch: int, flag: str) -> None:
    """Refuse images of too many patches before any work, and name an image that takes longer than all the others."""
    counts = []
    for name, (height, width) in zip(images.names, images.sizes, strict=True):
        try:
            _, cropped = dense.input_sizes(height, width, [image_size], patch)
        except TooManyPatches as error:
            raise Refused(f"{flag}: {name}: {error}") from error
        counts.append(cropped[0] * cropped[1] // patch**2)
    costs, most = np.square(counts, dtype=float), int(np.argmax(counts))  # of the attention
    if counts[most] > LONG and costs[most] > costs.sum() - costs[most] > 0:
        parallel.say(f"{flag}: {images.names[most]} makes {counts[most]} patches, whose attention takes longer than "
                     "that of all other images together; take the image out or lower --image_size")


def score_images(images: masks.MaskedImages, find_masks: Callable[[Tensor], Candidates]) -> Measured:
    """MEASURES (N, candidates, 3) of the masks that `find_masks` makes of each image; the processes share them."""
    def work(i: int) -> Measured:
        image, truth, ignored = images.load(i)
        return measure(find_masks(image), truth, ignored)

    per_image = map_shared(work, len(images.names), "images segmented")
    return {key: np.stack([one[key] for one in per_image]) for key in per_image[0]}


def draw_masks(
    rows: Sequence[int], images: masks.MaskedImages, find_masks: Callable[[Tensor], Candidates], head: int | None
) -> np.ndarray:
    """A sheet uint8 (height, width, 3) of the images `rows`: foreground and masks; `head` is the chosen one."""
    cells, names = [], [[Path(images.names[i]).name] for i in rows]
    for i in rows:
        image, truth, ignored = images.load(i)
        candidates = find_masks(image)
        networks = [network for network, kind in candidates if kind == "k-means"]
        first, last = networks[0], networks[-1]
        best = {key: candidates[key].masks[values[:, 0].argmax()]
                for key, values in measure(candidates, truth, ignored).items()}
        shown = {"foreground": truth, "best head": best.get((first, "heads"))}
        if head is not None:
            shown[f"head {head}"] = candidates[first, "heads"].masks[head]
        shown |= {"mean of heads": best.get((first, "mean")), "k-means": best[first, "k-means"]}
        if last != first:
            shown |= {"random: best head": best.get((last, "heads")), "random: k-means": best[last, "k-means"]}
        shown = {title: mask for title, mask in shown.items() if mask is not None}  # None: no attention is read
        figure = sheets.as_picture(image)
        cells.append([figure, *(sheets.mask_overlay(figure, mask) for mask in shown.values())])
    return sheets.contact_sheet(cells, ["image", *shown], cell=200, captions=names)


def evaluate_segmentation(
    network: Network, data_path: str, image_size: int = 0, layer: int = -1, threshold: float = 0.6,
    val_share: float = 0.2, seed: int = 0, save_masks: int = 0, output_dir: str | os.PathLike = ".",
    flag: str = "--data_path",
) -> dict:
    """Masks from attention, measured. Writes eval_segmentation.json and, with `save_masks`, masks.png.

    Every process calls it; the first one writes. The same network with random weights is measured too.

    Args:
        network: with patch tokens; computes in float32.
        data_path: see `masks.open_masked`.
        image_size: shorter side of the network's input in pixels; 0: see `dense.default_size`.
        layer: index of the block whose attention is used; negative ones count from the last.
        threshold: share of the attention that a mask holds.
        val_share: share of the images on which one head and the box are chosen; 0 leaves both out.
        seed: of the validation part, the random weights and k-means.
        save_masks: number of images to draw.
        flag: how errors name `data_path`.

    Returns:
        What eval_segmentation.json holds, without the command: settings, notes and {"results": lines of the table}.

    Raises:
        Refused: a network without patch tokens, no images with masks, a file that can't be read or written.
    """
    import_kmeans()  # before any work
    dense.check_look(network, [image_size] if image_size else (), layer)
    images, patch = masks.open_masked(data_path, network.reading, flag), patch_size(network)
    image_size = image_size or dense.default_size(
        network.info["global_crops_size"], patch, [min(size) for size in images.sizes])
    check_sizes(images, image_size, patch, flag)
    parallel.say(f"{len(images.names)} images, shorter side resized to {image_size} pixels")
    output_dir = flags.prepare_output(output_dir)
    networks = compared_networks(network, seed)
    find_masks = partial(candidate_masks, networks=networks, image_size=image_size, layer=layer, threshold=threshold,
                         seed=seed)
    measured = score_images(images, find_masks)
    n = len(images.names)
    validation = validation_part(n, val_share, seed)
    about = {name: network.about[name] for name in (
        "arch", "patch_size", "weights", "checkpoint_key", "weights_sha256")} | {
        "patch_size": patch, "data_path": data_path, "images": n, "held_out": int((~validation).sum()),
        "image_size": image_size, "layer": layer, "threshold": threshold, "seed": seed,
        "notes": [*images.notes, *notes_on(network, validation)],
    }
    if save_masks and parallel.is_main():
        rows = np.linspace(0, n - 1, min(n, save_masks)).astype(int).tolist()
        heads = measured.get((next(iter(networks)), "heads"))
        head = None if heads is None else choose(heads, ROWS[1], validation)
        sheets.save_picture(draw_masks(rows, images, find_masks, head), output_dir / "masks.png")
    return scores.write_results(output_dir / "eval_segmentation.json", summarize(measured, validation), **about)


def show_segmentation(report: Mapping) -> None:
    """Print the notes and the table of `evaluate_segmentation`'s report."""
    for note in report["notes"]:
        print(note)
    print(f"Jaccard index in %, mean over {report['images']} images and over the {report['held_out']} held out, "
          "with its 95 % bootstrap interval\n"
          "energy ratio: share of the attention on the object over the object's share of the area; 1: no preference\n"
          "pointing game: whether the attention's maximum lies on the object, in %")
    print(scores.table(report["results"]), flush=True)
