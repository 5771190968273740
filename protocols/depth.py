"""Linear depth on frozen tokens (DINOv2, arXiv 2304.07193, section 7.4).

A linear layer turns each patch token, with the class token beside it, into weights of 256 depths, whose mean is the
depth (`depth_layers`). Settings, parts of the data and the choice are those of `dense_sweep`.

Baselines: the same network untrained; raw pixels of a patch in place of a token; the mean depth of all training pixels;
the mean training depth at each place of the image.

Shapes: N images, C channels, S layers, F figures. Sizes are (height, width) in pixels, depths in metres.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import flags
import parallel
from imagesets.depth_maps import DepthMaps, Limits, open_depth_maps
from parallel import Refused
from protocols import dense_sweep, depth_scores, scores, sheets
from protocols.dense_prediction import Geometry, Predictor, per_image
from protocols.dense_sweep import drawn_rows, make_plan
from protocols.dense_training import Recipe
from protocols.depth_layers import BINS, DepthLayer, depth_loss, depth_tokens
from protocols.features import Network

UNFINISHED, CLASSIFIER = "checkpoint_depth.pth", "depth.pth"
BLOCKS_FLAG = "--n_blocks"
MEAN_DEPTH, MEAN_MAP = "mean depth", "mean map"
MAP_SIDE, MAP_IMAGES = 32, 2000  # pixels of the mean map; training images it is computed from
RECIPE = Recipe(scale=(1.0, 1.0))  # a scaled image would show its objects at another distance


class DepthOptions(NamedTuple):
    """What linear depth has beside the recipe of all linear layers.

    eval_crop: the part of the test images that is judged, one of `depth_scores.CROPS`.
    batch_norm, bins: see `DepthLayer`. gradient_weight: see `depth_loss`.
    """

    eval_crop: str = "none"
    batch_norm: bool = True
    bins: int = BINS
    gradient_weight: float = 0.0


def predict(predictor: Predictor, image: Tensor) -> list[np.ndarray]:
    """Depth at the pixels of an image uint8 (C, height, width): S of float32 (height, width).

    The mean over the scales of the geometry and, with its `flip`, the mirrored image.
    """
    return [depth[0].cpu().numpy() for depth in predictor.maps(image)]


def measure(
    predictor: Predictor, images: DepthMaps, eval_crop: str, constants: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """`depth_scores.errors` of every image, layer and constant map, (N, S + constants, F)."""
    def errors(image: Tensor, truth: np.ndarray) -> np.ndarray:
        truth = depth_scores.judged(truth, eval_crop)
        predicted = [*predict(predictor, image), *(resized(depth, truth.shape) for depth in constants)]
        return np.stack([depth_scores.errors(depth, truth) for depth in predicted])

    return per_image(images, errors, "images measured")


# ---- Constant predictions ----


def mean_maps(images: DepthMaps) -> dict[str, np.ndarray]:
    """Predictions without an image: the mean depth (1, 1), and the mean map (MAP_SIDE, MAP_SIDE), of training images.

    A place of the map that has no depth in any image gets the mean depth.
    """
    rows = np.linspace(0, len(images.items) - 1, min(MAP_IMAGES, len(images.items))).astype(int).tolist()

    def sums(image: Tensor, truth: np.ndarray) -> np.ndarray:
        depth = torch.from_numpy(truth)[None]
        return torch.cat([F.adaptive_avg_pool2d(x, MAP_SIDE) for x in (depth, (depth > 0).float())]).numpy()

    total, known = per_image(images.subset(rows), sums, "mean depth").astype(np.float64).sum(0)
    mean = total.sum() / known.sum()
    where_known = np.divide(total, known, out=np.full_like(total, mean), where=known > 0)
    return {MEAN_DEPTH: np.full((1, 1), mean, np.float32), MEAN_MAP: where_known.astype(np.float32)}


def resized(depth: np.ndarray, size: Sequence[int]) -> np.ndarray:
    return F.interpolate(torch.from_numpy(depth)[None, None], size=tuple(size), mode="bilinear")[0, 0].numpy()


# ---- The evaluation ----


def evaluate_depth(
    network: Network, data_path: str, val_data_path: str = "", limits: Limits | None = None,
    geometry: Geometry | None = None, recipe: Recipe = RECIPE, options: DepthOptions | None = None,
    baselines: bool = False, val_share: float = 0.1, save_pictures: int = 0, output_dir: str | os.PathLike = ".",
    flag: str = "--data_path",
) -> dict:
    """Train and test. Writes eval_depth.json, depth.pth (the network's chosen layer) and, with `save_pictures`,
    depth.png. A stopped run is resumed. All processes call this.

    Args:
        network: with patch tokens (`tokens.check_tokens`), or raw pixels.
        data_path, val_data_path, limits: see `open_depth_maps`.
        geometry: a window of 0 is the whole image.
        baselines: evaluate the untrained network, raw pixels and the mean depths too.
        val_share: share of the training images to choose a setting on; none are held out without a choice.
        save_pictures: number of test images to draw.
        flag: how errors name `data_path`.

    Returns:
        What eval_depth.json holds, without the command: sizes, notes, settings (a row per setting) and results (a row
        per network and constant, on the test images).

    Raises:
        Refused: bad data, a network without patch tokens, sizes that don't fit, a loss that is not finite.
    """
    options = options or DepthOptions()
    dense_sweep.check_recipe(recipe)
    images = open_depth_maps(data_path, val_data_path, network.reading, limits, flag)
    plan = make_plan(network, images, geometry or Geometry(), recipe, baselines, val_share, BLOCKS_FLAG, whole=True)
    judged = check_maps(plan, options.eval_crop, *dense_sweep.places(flag, data_path, val_data_path))
    output_dir = flags.prepare_output(output_dir)
    for note in plan.notes:
        parallel.say(note)

    used = images[0].limits
    settings, layers, rows = dense_sweep.fit(
        plan, depth_tokens,
        lambda width: DepthLayer(width, used.least, used.largest, options.batch_norm, options.bins),
        lambda depth, truth, step: depth_loss(depth, truth, step, recipe.steps, options.gradient_weight),
        lambda predictor, held: [figures["rmse"] for figures in summaries(measure(predictor, held, "none"))],
        "held-out RMSE", sign=-1, path=Path(output_dir) / UNFINISHED,
        data={"data_path": str(data_path), "options": {k: v for k, v in options._asdict().items() if k != "eval_crop"},
              "depth_scale": used.scale, "min_depth": used.least, "max_depth": used.largest})
    if parallel.is_main():
        dense_sweep.save_layer(layers[0], settings[0], network, Path(output_dir) / CLASSIFIER,
                               limits=list(used), options=options._asdict())
    constants = mean_maps(plan.train) if baselines else {}
    predictor = Predictor(plan.networks, settings, layers, plan.geometry, depth_tokens)
    measured = measure(predictor, judged, options.eval_crop, list(constants.values()))
    facts = [{"features": s.features, "blocks": s.blocks, "lr": s.lr} for s in settings]
    facts += [{"features": name, "blocks": None, "lr": None} for name in constants]
    results = [row | figures for row, figures in zip(facts, summaries(measured), strict=True)]
    if save_pictures and parallel.is_main():
        names = [s.features for s in settings]
        sheets.save_picture(draw(predictor, names, plan.test, save_pictures), Path(output_dir) / "depth.png")
    report = scores.write_results(
        Path(output_dir) / "eval_depth.json", results, **dense_sweep.about(plan, network), data_path=str(data_path),
        val_data_path=val_data_path or None, depth_scale=used.scale or None, min_depth=used.least,
        max_depth=used.largest, **options._asdict(), judged_images=len(judged.items), settings=rows)
    if parallel.is_main():
        (Path(output_dir) / UNFINISHED).unlink(missing_ok=True)
    return report


def check_maps(plan: dense_sweep.Plan, eval_crop: str, where: str, where_test: str) -> DepthMaps:
    """Reads all images but those to train on, of which only the first. Adds a note for test images that are left out.

    Args:
        where, where_test: the flags that name the images, for errors.

    Returns:
        The test images that have a depth inside of the crop.

    Raises:
        Refused: an image has no depth within the limits, or not the size of the crop; no test image is left.
    """
    for part in (plan.train.subset([0]), plan.held):
        if part:
            dense_sweep.read_all(part, lambda truth: None, where)
    valid = dense_sweep.read_all(plan.test, lambda truth: bool(depth_scores.judged(truth, eval_crop).any()), where_test)
    if not any(valid):
        raise Refused(f"--eval_crop {eval_crop}: no test image has a depth inside of it; choose another one")
    if missing := valid.count(False):
        plan.notes.append(f"--eval_crop {eval_crop}: {missing} of {len(valid)} test images have no depth inside of it "
                          "and are left out")
    return plan.test.subset(np.flatnonzero(valid).tolist())


def summaries(measured: np.ndarray) -> list[dict]:
    """`depth_scores.summarize` of every layer, of errors (N, S, F)."""
    return [depth_scores.summarize(measured[:, i]) for i in range(measured.shape[1])]


def show_depth(report: Mapping) -> None:
    """Print the tables of a report. Its notes have been printed before the work began."""
    if any("held-out RMSE" in row for row in report["settings"]):
        print(scores.table(report["settings"]))
    print(f"rmse in metres, over the pixels between {report['min_depth']:g} and {report['max_depth']:g} m; means over "
          f"{report['judged_images']} test images, with 95 % bootstrap intervals")
    print(scores.table(report["results"]), flush=True)


# ---- Pictures ----


def coloured(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """Depths as colours, near ones bright, on a logarithmic scale; black where there is none: uint8 (h, w, 3)."""
    shown = np.log(np.clip(depth, low, high) / high) / np.log(low / high) if high > low else np.ones_like(depth)
    return np.where((depth > 0)[..., None], sheets.heatmap(shown), np.uint8(0))


def draw(predictor: Predictor, names: Sequence[str], images: DepthMaps, count: int) -> np.ndarray:
    """A sheet uint8 (height, width, 3): evenly spaced images, their depth, and the prediction of every layer.

    The colours of a row go from the least to the largest true depth of its image.
    """
    def row(image: Tensor, truth: np.ndarray) -> list[np.ndarray]:
        low, high = truth[truth > 0].min(), truth.max()
        maps = [truth, *predict(predictor, image)]
        return [sheets.as_picture(image), *(coloured(depth, low, high) for depth in maps)]

    return drawn_rows(images, count, row, ["image", "truth", *names])
