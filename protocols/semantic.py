"""Linear semantic segmentation on frozen patch tokens (DINOv2, arXiv 2304.07193, section 7.4).

A linear layer (batch norm, 1 x 1 convolution) turns each patch token into scores of the classes, which are upsampled
bilinearly to the pixels. All settings and baselines are trained on the same crops in one pass; of several settings of a
network, the best one is chosen on held-out training images, and the test images are used once, for it alone.

Baselines: the same network untrained; raw pixels of a patch in place of a token; k-means of the patch tokens, its
clusters matched to the classes.

Shapes: N images, C channels, K classes, S layers. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

import flags
import parallel
from imagesets import masks
from imagesets.class_masks import ClassMasks, open_class_masks
from protocols import dense_sweep, scores, semantic_scores, sheets
from protocols.dense_prediction import Geometry, Predictor, per_image
from protocols.dense_sweep import RAW_PIXELS, drawn_rows, make_plan
from protocols.dense_training import Recipe, Setting
from protocols.features import Network
from protocols.segmentation import import_kmeans
from protocols.semantic_layers import kmeans_layer, last_tokens, linear_layer, pixel_loss

UNFINISHED, CLASSIFIER = "checkpoint_semantic.pth", "semantic.pth"
KMEANS = "k-means"  # of the network's patch tokens
BLOCKS_FLAG = "--n_last_blocks"


def predict(predictor: Predictor, image: Tensor) -> np.ndarray:
    """Classes of the pixels of an image uint8 (C, height, width): uint8 (S, height, width).

    Over several scales, and the mirrored image, the classes' probabilities are averaged.
    """
    maps = predictor.maps(image, lambda logits: logits.softmax(0))
    return np.stack([logits.argmax(0).byte().cpu().numpy() for logits in maps])


def count(predictor: Predictor, images: ClassMasks) -> np.ndarray:
    """`semantic_scores.pixel_counts` of every image and layer, (N, S, 3, K)."""
    def measure(image: Tensor, truth: np.ndarray) -> np.ndarray:
        return np.stack([semantic_scores.pixel_counts(classes, truth, len(images.classes))
                         for classes in predict(predictor, image)])

    return per_image(images, measure, "images segmented")


def summaries(predictor: Predictor, images: ClassMasks) -> list[dict]:
    """`semantic_scores.summarize` of every layer."""
    counts = count(predictor, images)
    return [semantic_scores.summarize(counts[:, i], images.classes) for i in range(counts.shape[1])]


# ---- The evaluation ----


def evaluate_semantic(
    network: Network, data_path: str, val_data_path: str = "", geometry: Geometry | None = None,
    recipe: Recipe | None = None, foreground: bool = False, baselines: bool = False, val_share: float = 0.1,
    save_pictures: int = 0, output_dir: str | os.PathLike = ".", flag: str = "--data_path",
) -> dict:
    """Train and test. Writes eval_semantic.json, semantic.pth (the network's chosen layer, batch norm and 1 x 1
    convolution) and, with `save_pictures`, semantic.png. A stopped run is resumed. All processes call this.

    Args:
        network: with patch tokens (`tokens.check_tokens`), or raw pixels.
        data_path, val_data_path, foreground: see `open_class_masks`.
        baselines: evaluate the untrained network, raw pixels and k-means too.
        val_share: share of the training images to choose a setting on; none are held out without a choice.
        save_pictures: number of test images to draw.
        flag: how errors name `data_path`.

    Returns:
        What eval_semantic.json holds, without the command: sizes, notes, settings (a row per setting), results (a row
        per network and k-means, on the test images) and per_class {class: {row: IoU in %}}.

    Raises:
        Refused: bad data, a network without patch tokens, sizes that don't fit, a loss that is not finite.
    """
    geometry, recipe = geometry or Geometry(), recipe or Recipe()
    dense_sweep.check_recipe(recipe)
    if baselines:
        import_kmeans()  # before any work
    images = open_class_masks(data_path, val_data_path, network.reading, foreground, flag)
    plan = make_plan(network, images, geometry, recipe, baselines, val_share, BLOCKS_FLAG)
    for part, where in zip((plan.held, plan.test), dense_sweep.places(flag, data_path, val_data_path), strict=True):
        if part:
            dense_sweep.read_all(part, lambda truth: None, where)
    output_dir = flags.prepare_output(output_dir)
    for note in plan.notes:
        parallel.say(note)

    test = plan.test
    settings, layers, rows = dense_sweep.fit(
        plan, last_tokens, lambda width: linear_layer(width, len(test.classes), recipe.dropout),
        lambda logits, labels, step: pixel_loss(logits, labels),
        lambda predictor, held: [figure["miou"] for figure in summaries(predictor, held)], "held-out mIoU",
        path=Path(output_dir) / UNFINISHED,
        data={"data_path": str(data_path), "foreground": foreground, "classes": list(test.classes)})
    names = [s.features for s in settings]
    if parallel.is_main():
        dense_sweep.save_layer(layers[0], settings[0], network, Path(output_dir) / CLASSIFIER,
                               classes=list(test.classes))
    if baselines and names[0] != RAW_PIXELS:
        whole = plan.crops(scale=(1.0, 1.0))
        layers.insert(1, kmeans_layer(network, whole, len(test.classes), recipe.batch_size, recipe.num_workers,
                                      seed=recipe.seed))
        settings.insert(1, Setting(names[0], 1, 0.0))
        names.insert(1, KMEANS)
    predictor = Predictor(plan.networks, settings, layers, plan.geometry, last_tokens)
    figures = summaries(predictor, test)
    results = [{"features": name, "blocks": s.blocks, "lr": s.lr or None, "miou": figure["miou"],
                "pixel_accuracy": figure["pixel_accuracy"]}
               for name, s, figure in zip(names, settings, figures, strict=True)]
    per_class = {name: {row: figure["per_class"][name] for row, figure in zip(names, figures, strict=True)}
                 for name in test.classes}
    if save_pictures and parallel.is_main():
        sheets.save_picture(draw(predictor, names, test, save_pictures), Path(output_dir) / "semantic.png")
    report = scores.write_results(
        Path(output_dir) / "eval_semantic.json", results, **dense_sweep.about(plan, network), data_path=str(data_path),
        val_data_path=val_data_path or None, foreground=foreground, settings=rows, per_class=per_class)
    if parallel.is_main():
        (Path(output_dir) / UNFINISHED).unlink(missing_ok=True)
    return report


def show_semantic(report: Mapping) -> None:
    """Print the tables of a report. Its notes have been printed before the work began."""
    if any("held-out mIoU" in row for row in report["settings"]):
        print(scores.table(report["settings"]))
    print(f"in % over all pixels of {report['images'][-1]} test images, with 95 % bootstrap intervals over the images")
    print(scores.table(report["results"]))
    print(scores.table([{"IoU of": name} | row for name, row in report["per_class"].items()]), flush=True)


# ---- Pictures ----


def coloured(image: np.ndarray, labels: np.ndarray, weight: float = 0.65) -> np.ndarray:
    """The image tinted with VOC's colours of the classes, uint8 (height, width, 3); class 0 only dims it."""
    colours = np.array(masks.palette()).reshape(256, 3)
    return ((1 - weight) * image + weight * colours[labels]).round().astype(np.uint8)


def draw(predictor: Predictor, names: Sequence[str], images: ClassMasks, count: int) -> np.ndarray:
    """A sheet uint8 (height, width, 3): evenly spaced images, their truth, and the prediction of every layer."""
    def row(image: Tensor, truth: np.ndarray) -> list[np.ndarray]:
        figure = sheets.as_picture(image)
        return [figure, *(coloured(figure, labels) for labels in (truth, *predict(predictor, image)))]

    return drawn_rows(images, count, row, ["image", "truth", *names])
