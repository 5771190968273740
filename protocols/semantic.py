"""Linear semantic segmentation on frozen patch tokens (DINOv2, arXiv 2304.07193, section 7.4).

A linear layer (batch norm, 1 x 1 convolution) turns each patch token into scores of the classes, which are upsampled
bilinearly to the pixels. All settings and baselines are trained on the same crops in one pass; of several settings of a
network, the best one is chosen on held-out training images, and the test images are used once, for it alone.

Baselines: the same network untrained; raw pixels of a patch in place of a token; k-means of the patch tokens, its
clusters matched to the classes.

Shapes: N images, C channels, K classes, S layers. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flags
import parallel
from imagesets import masks
from imagesets.class_masks import ClassMasks, open_class_masks
from imagesets.decode import Undecodable
from parallel import Refused
from protocols import scores, semantic_scores, sheets, tokens, transforms
from protocols.features import PIXELS, Network, refused_image, untrained
from protocols.progress import progress
from protocols.segmentation import import_kmeans
from protocols.semantic_training import Recipe, Setting, TrainingCrops, kmeans_layer, last_blocks, train
from weights import checkpoints

LARGEST_CROP = 512  # pixels, unless a flag says otherwise
MEASURED = 100  # training images whose sizes decide the crop
UNFINISHED, CLASSIFIER = "checkpoint_semantic.pth", "semantic.pth"
WINDOWS = 8  # windows of an image per forward pass
TEST_SHARE = 0.2  # of the images, where there is no test set
KMEANS = "k-means"  # of the network's patch tokens


class Geometry(NamedTuple):
    """Sizes in pixels; 0 follows from the others, or from the data (see `fitted_to`)."""

    image_size: int = 0  # shorter side of the images at scale 1; 0: crop
    crop: int = 0  # side of the training crops; 0: LARGEST_CROP, or the images' own shorter side where that is less
    window: int = 0  # side of the windows of the test; 0: crop
    stride: int = 0  # between windows; 0: two thirds of the window
    scales: Sequence[float] = (1.0,)  # of the images in the test
    flip: bool = False  # also test the mirrored image


def fitted_to(geometry: Geometry, images: ClassMasks, patch: int) -> Geometry:
    """Replaces zeros by values for these images. Raises Refused for sizes that contradict each other."""
    sides = [min(images.size(item)) for item in images.items[:MEASURED]]
    crop = geometry.crop or max(patch, min(LARGEST_CROP, int(np.median(sides))) // patch * patch)
    window = geometry.window or crop
    stride = geometry.stride or max(1, window * 2 // 3)
    if stride > window:
        raise Refused(f"--stride {stride}: leaves pixels out between windows of {window}; lower it or raise "
                      "--window_size")
    return geometry._replace(image_size=geometry.image_size or crop, crop=crop, window=window, stride=stride)


# ---- Prediction ----


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows that cover a side; the last one ends at its end."""
    count = max(0, math.ceil((side - window) / stride)) + 1
    return [max(0, min(i * stride, side - window)) for i in range(count)]


class Predictor(NamedTuple):
    """Linear layers on the tokens of networks. Each layer has a setting, which names its network."""

    networks: Mapping[str, Network]
    settings: Sequence[Setting]
    layers: Sequence[nn.Module]
    geometry: Geometry

    def sliding(self, image: Tensor) -> list[Tensor]:
        """Scores of the classes at the pixels of an image uint8 (C, height, width), the mean of all windows that see a
        pixel: S of (K, height, width)."""
        height, width = image.shape[-2:]
        window, stride = self.geometry.window, self.geometry.stride
        corners = [(top, left) for top in window_starts(height, window, stride)
                   for left in window_starts(width, window, stride)]
        totals: list[Tensor | None] = [None] * len(self.layers)
        seen = torch.zeros(height, width)
        for first in range(0, len(corners), WINDOWS):
            places = [(slice(top, top + window), slice(left, left + window))
                      for top, left in corners[first : first + WINDOWS]]
            crops = torch.stack([image[:, rows, columns] for rows, columns in places])
            for rows, columns in places:
                seen[rows, columns] += 1
            for name, network in self.networks.items():
                mine = [i for i, s in enumerate(self.settings) if s.features == name]
                if not mine:
                    continue
                outputs = tokens.patch_tokens(network, crops, max(self.settings[i].n_last_blocks for i in mine))
                for i in mine:
                    maps = self.layers[i](last_blocks(outputs, self.settings[i].n_last_blocks))
                    maps = tokens.upsample(maps, *crops.shape[-2:], tokens.patch_size(network))
                    if totals[i] is None:
                        totals[i] = maps.new_zeros(maps.shape[1], height, width)
                    for part, (rows, columns) in zip(maps, places, strict=True):
                        totals[i][:, rows, columns] += part
        return [total / seen.to(total.device) for total in totals]

    @torch.no_grad()
    def predict(self, image: Tensor) -> np.ndarray:
        """Classes of the pixels of an image uint8 (C, height, width): uint8 (S, height, width).

        Over several scales, and the mirrored image, the classes' probabilities are averaged.
        """
        size, geometry = image.shape[-2:], self.geometry
        views = [(scale, flip) for scale in geometry.scales for flip in ((False, True) if geometry.flip else (False,))]
        totals: list[Tensor] = []
        for scale, flip in views:
            factor = scale * geometry.image_size / min(size)
            view = transforms.resize(image, [max(1, round(side * factor)) for side in size])
            maps = self.sliding(view.flip(-1) if flip else view)
            maps = [F.interpolate((x.flip(-1) if flip else x)[None], size=size, mode="bilinear")[0] for x in maps]
            if len(views) > 1:
                maps = [x.softmax(0) for x in maps]
            totals = [a + b for a, b in zip(totals, maps, strict=True)] if totals else maps
        return np.stack([total.argmax(0).to(torch.uint8).cpu().numpy() for total in totals])

    def count(self, images: ClassMasks) -> np.ndarray:
        """`semantic_scores.pixel_counts` of every image and layer, (N, S, 3, K); the processes share the images."""
        steps = progress(repeat(None), len(images.items), "images segmented", size=parallel.world_size())

        def work(i: int) -> np.ndarray:
            next(steps)
            image, truth = images.load(i)
            return np.stack([semantic_scores.pixel_counts(classes, truth, len(images.classes))
                             for classes in self.predict(image)])

        try:
            return np.stack(parallel.map_shared(work, len(images.items)))
        except Undecodable as error:
            raise refused_image(error) from error


# ---- The evaluation ----


def split(images: Sequence[ClassMasks], val_share: float, seed: int) -> tuple[ClassMasks, ClassMasks | None, ClassMasks,
                                                                              list[str]]:
    """Training, held-out (None for a share of 0) and test images, and notes.

    Raises:
        Refused: too few images.
    """
    notes, train_images, test = [], images[0], images[-1]
    if len(images) == 1:
        order = np.random.default_rng(seed).permutation(len(train_images.items))
        count = max(1, round(TEST_SHARE * len(order)))
        train_images, test = train_images.subset(sorted(order[count:])), train_images.subset(sorted(order[:count]))
        notes.append(f"no test set: {count} of the images, a fifth, are used for testing")
    held = None
    if val_share:
        order = np.random.default_rng((seed, 1)).permutation(len(train_images.items))
        count = max(1, round(val_share * len(order)))
        notes.append(f"{count} of {len(order)} training images are held out to choose by")
        train_images, held = train_images.subset(sorted(order[count:])), train_images.subset(sorted(order[:count]))
    if not train_images.items:
        raise Refused(f"--data_path: {len(images[0].items)} image(s) are too few to train and test on; give more")
    return train_images, held, test, notes


def sweep(networks: Mapping[str, Network], recipe: Recipe) -> list[Setting]:
    """All settings of the networks; raw pixels have no blocks."""
    return [Setting(name, n, lr) for name, network in networks.items()
            for n in (recipe.n_last_blocks if network.about["arch"] != PIXELS else [1]) for lr in recipe.lrs]


def compared(network: Network, baselines: bool, seed: int) -> dict[str, Network]:
    """What is evaluated, by its name in the table."""
    name = "raw pixels" if network.about["arch"] == PIXELS else "network" if network.about["weights"] else "untrained"
    networks = {name: network}
    if baselines and name == "network":
        networks["untrained"] = untrained(network, seed)
    if baselines and name != "raw pixels":
        networks["raw pixels"] = tokens.raw_pixels(network)
    return networks


def choose(settings: Sequence[Setting], miou: Sequence[float]) -> list[int]:
    """The best setting of each network, the first among ties."""
    names = dict.fromkeys(s.features for s in settings)
    return [max((i for i, s in enumerate(settings) if s.features == name), key=lambda i: miou[i]) for name in names]


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
    if recipe.warmup_steps > recipe.steps:
        raise Refused(f"--warmup_steps {recipe.warmup_steps} is more than --steps {recipe.steps}; lower it")
    if recipe.batch_size % parallel.world_size():
        raise Refused(f"--batch_size {recipe.batch_size}: {parallel.world_size()} processes can't share it evenly; "
                      "give a multiple of their number")
    if baselines:
        import_kmeans()  # before any work
    images = open_class_masks(data_path, val_data_path, network.reading, foreground, flag)
    networks = compared(network, baselines, recipe.seed)
    settings = sweep(networks, recipe)
    choice = len(settings) > len(networks)
    if choice and not val_share:
        raise Refused("--val_share 0: several settings need held-out images to choose by; raise it, or give one --lr "
                      "and one --n_last_blocks")
    train_images, held, test, notes = split(images, val_share if choice else 0, recipe.seed)
    geometry = fitted_to(geometry, train_images, tokens.patch_size(network))
    for size_flag, size in (("--crop_size", geometry.crop), ("--window_size", geometry.window)):
        tokens.check_tokens(network, max(recipe.n_last_blocks), size, size_flag)
    output_dir = flags.prepare_output(output_dir)
    for note in notes:
        parallel.say(note)

    fill = [round(255 * value) for value in network.info["mean"]]
    crops = TrainingCrops(train_images, geometry.image_size, geometry.crop, fill, recipe)
    run = {
        "weights": {name: other.about["weights_sha256"] for name, other in networks.items()},
        "data_path": str(data_path), "images": len(train_images.items), "classes": list(test.classes),
        "settings": [list(s) for s in settings], "crops": [geometry.image_size, geometry.crop],
        "precision": network.about["precision"],
        "recipe": {k: v if isinstance(v, (int, float)) else list(v) for k, v in recipe._asdict().items()
                   if k != "num_workers"}}
    layers, losses = train(networks, settings, crops, len(test.classes), recipe, Path(output_dir) / UNFINISHED, run)
    rows = [s._asdict() | {"train_loss": loss if math.isfinite(loss) else None}
            for s, loss in zip(settings, losses, strict=True)]
    chosen = list(range(len(settings)))
    if held:
        counts = Predictor(networks, settings, layers, geometry).count(held)
        figures = [semantic_scores.summarize(counts[:, i], held.classes)["miou"] for i in range(len(settings))]
        chosen = choose(settings, [figure["value"] for figure in figures])
        rows = [row | {"held-out mIoU": figure, "chosen": "*" if i in chosen else ""}
                for i, (row, figure) in enumerate(zip(rows, figures, strict=True))]
    settings, layers = [settings[i] for i in chosen], [layers[i] for i in chosen]
    names = [s.features for s in settings]
    if parallel.is_main():
        checkpoints.save({
            "state_dict": layers[0].state_dict(), "classes": list(test.classes), "setting": settings[0]._asdict(),
            "weights_sha256": network.about["weights_sha256"]}, Path(output_dir) / CLASSIFIER)
    if baselines and names[0] != "raw pixels":
        whole = TrainingCrops(train_images, geometry.image_size, geometry.crop, fill, recipe._replace(scale=(1.0, 1.0)))
        layers.insert(1, kmeans_layer(network, whole, len(test.classes), recipe.batch_size, recipe.num_workers,
                                      seed=recipe.seed))
        settings.insert(1, Setting(names[0], 1, 0.0))
        names.insert(1, KMEANS)
    predictor = Predictor(networks, settings, layers, geometry)
    counts = predictor.count(test)
    figures = [semantic_scores.summarize(counts[:, i], test.classes) for i in range(len(names))]
    results = [{"features": name, "n_last_blocks": s.n_last_blocks, "lr": s.lr or None, "miou": figure["miou"],
                "pixel_accuracy": figure["pixel_accuracy"]}
               for name, s, figure in zip(names, settings, figures, strict=True)]
    per_class = {name: {row: figure["per_class"][name] for row, figure in zip(names, figures, strict=True)}
                 for name in test.classes}
    if save_pictures and parallel.is_main():
        sheets.save_picture(draw(predictor, names, test, save_pictures), Path(output_dir) / "semantic.png")
    about = {key: value for key, value in network.about.items() if key not in ("crop_size", "resize_size")}
    report = scores.write_results(
        Path(output_dir) / "eval_semantic.json", results, **about, data_path=str(data_path),
        val_data_path=val_data_path or None, foreground=foreground,
        images=[len(train_images.items), len(held.items) if held else 0, len(test.items)],
        geometry=geometry._asdict() | {"scales": list(geometry.scales)}, steps=recipe.steps,
        batch_size=recipe.batch_size, weight_decay=recipe.weight_decay, seed=recipe.seed, notes=notes, settings=rows,
        per_class=per_class)
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
    cells = []
    for i in np.linspace(0, len(images.items) - 1, min(count, len(images.items))).astype(int).tolist():
        image, truth = images.load(i)
        figure = sheets.as_picture(image)
        cells.append([figure, *(coloured(figure, labels) for labels in (truth, *predictor.predict(image)))])
    return sheets.contact_sheet(cells, ["image", "truth", *names], cell=200)


