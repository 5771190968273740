"""What evaluations of linear layers on patch tokens have in common: networks, settings, parts of the data, the choice.

All settings of a network and of its baselines are trained on the same crops in one pass. Of several settings of a
network, the best one is chosen on held-out training images, and the test images are used once, for it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from torch import Tensor, nn

import parallel
from imagesets.annotated import Annotated
from imagesets.decode import Undecodable
from imagesets.listing import files_hash
from parallel import Refused
from protocols import sheets, tokens
from protocols.dense_prediction import Geometry, Predictor, fitted_to
from protocols.dense_training import Read, Recipe, Setting, TrainingCrops, check_finite, train
from protocols.features import PIXELS, Network, untrained
from protocols.linear import is_finite
from protocols.progress import map_shared
from protocols.transforms import check_patches
from weights import checkpoints

Judgement = TypeVar("Judgement")
TEST_SHARE = 0.2  # of the images, where there is no test set
RAW_PIXELS = "raw pixels"


class Plan(NamedTuple):
    """What is trained on what. `held` is None where there is nothing to choose."""

    networks: dict[str, Network]
    settings: list[Setting]
    train: Annotated
    held: Annotated | None
    test: Annotated
    geometry: Geometry
    recipe: Recipe
    notes: list[str]

    def crops(self, **changes: object) -> TrainingCrops:
        """Training crops of the recipe, or of the recipe with `changes`."""
        network = next(iter(self.networks.values()))
        fill = [round(255 * value) for value in network.info["mean"]]
        return TrainingCrops(self.train, self.geometry.image_size, self.geometry.crop, fill,
                             self.recipe._replace(**changes))

    def sizes(self) -> list[int]:
        """Numbers of training, held-out and test images."""
        return [len(self.train.items), len(self.held.items) if self.held else 0, len(self.test.items)]


def split(images: Sequence[Annotated], val_share: float, seed: int) -> tuple[Annotated, Annotated | None, Annotated,
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
            for n in (recipe.blocks if network.about["arch"] != PIXELS else [1]) for lr in recipe.lrs]


def compared(network: Network, baselines: bool, seed: int) -> dict[str, Network]:
    """What is evaluated, by its name in the table."""
    name = RAW_PIXELS if network.about["arch"] == PIXELS else "network" if network.about["weights"] else "untrained"
    networks = {name: network}
    if baselines and name == "network":
        networks["untrained"] = untrained(network, seed)
    if baselines and name != RAW_PIXELS:
        networks[RAW_PIXELS] = tokens.raw_pixels(network)
    return networks


def check_recipe(recipe: Recipe) -> None:
    """Raises Refused for values that contradict each other or the number of processes."""
    if recipe.warmup_steps > recipe.steps:
        raise Refused(f"--warmup_steps {recipe.warmup_steps} is more than --steps {recipe.steps}; lower it")
    if recipe.batch_size % parallel.world_size():
        raise Refused(f"--batch_size {recipe.batch_size}: {parallel.world_size()} processes can't share it evenly; "
                      "give a multiple of their number")


def make_plan(
    network: Network, images: Sequence[Annotated], geometry: Geometry, recipe: Recipe, baselines: bool,
    val_share: float, blocks_flag: str, whole: bool = False,
) -> Plan:
    """Settings, parts and sizes. Fails before any work.

    Args:
        images: training and test images, or one part to divide.
        val_share: share of the training images to choose a setting on; none are held out without a choice.
        blocks_flag: how errors name the numbers of blocks.
        whole: see `fitted_to`.

    Raises:
        Refused: too few images, a network without patch tokens, sizes that don't fit.
    """
    networks = compared(network, baselines, recipe.seed)
    settings = sweep(networks, recipe)
    choice = len(settings) > len(networks)
    if choice and not val_share:
        raise Refused("--val_share 0: several settings need held-out images to choose by; raise it, or give one --lr "
                      f"and one {blocks_flag}")
    train_images, held, test, notes = split(images, val_share if choice else 0, recipe.seed)
    geometry = fitted_to(geometry, train_images, tokens.patch_size(network), whole)
    for size_flag, size in (("--crop_size", geometry.crop), ("--window_size", geometry.window or geometry.crop)):
        tokens.check_tokens(network, max(recipe.blocks), size, size_flag, blocks_flag)
    check_sizes([part for part in (held, test) if part], geometry, tokens.patch_size(network))
    return Plan(networks, settings, train_images, held, test, geometry, recipe, notes)


def check_sizes(parts: Sequence[Annotated], geometry: Geometry, patch: int) -> None:
    """Refuse crops, windows and whole images of too many patches, before any work."""
    for flag, side in (("--crop_size", geometry.crop), ("--window_size", geometry.window)):
        check_patches(side, side, patch, f"{flag} {side}: it", f"lower {flag}")
    if geometry.window:
        return
    for part in parts:
        for item in part.items:
            size = part.size(item)
            sides = (int(max(geometry.scales) * geometry.image_size * side / min(size)) for side in size)
            name = item[0] if isinstance(item, tuple) else f"image {item}"
            check_patches(*sides, patch, f"--image_size {geometry.image_size}: {name}, {size[1]} x {size[0]} pixels,",
                          "give --window_size, lower --image_size or crop the image")


def places(flag: str, data_path: str, val_data_path: str) -> tuple[str, str]:
    """How errors name the images that are trained on or held out, and those of the test."""
    training = f"{flag} {data_path!r}"
    return training, f"--val_data_path {val_data_path!r}" if val_data_path else training


def read_all(images: Annotated, judge: Callable[[np.ndarray], Judgement], where: str) -> list[Judgement]:
    """`judge(truth)` of every image, before the training, so that a bad file does not end a run in its test.

    Args:
        where: the flag that names the images, for errors.

    Raises:
        Refused: an image or its truth can't be read.
    """
    try:
        return map_shared(lambda i: judge(images.load(i)[1]), len(images.items), "images read")
    except Undecodable as error:
        remedy = "" if ";" in str(error) else "; repair or remove that file"
        raise Refused(f"{where}: {error}{remedy}") from error


def choose(settings: Sequence[Setting], goodness: Sequence[float]) -> list[int]:
    """The best setting of each network, the first among ties."""
    names = dict.fromkeys(s.features for s in settings)
    return [max((i for i, s in enumerate(settings) if s.features == name), key=lambda i: goodness[i]) for name in names]


def fit(
    plan: Plan, read: Read, new_layer: Callable[[int], nn.Module], loss: Callable[[Tensor, Tensor, int], Tensor],
    figures: Callable[[Predictor, Annotated], list[dict]], title: str, sign: int = 1, path: Path | None = None,
    data: Mapping | None = None,
) -> tuple[list[Setting], list[nn.Module], list[dict]]:
    """Train all settings, and choose the best one of each network, without those that diverged.

    Args:
        read, new_layer, loss: see `dense_training.train`.
        figures: the figure {"value", "interval"} to choose by, of every layer of a predictor on the images.
        title: the name of that figure on the held-out images.
        sign: 1 if more is better, -1 if less is.
        path: file for the state of an unfinished run, from which it is resumed; the caller removes it in the end.
        data: plain values that, with the plan, tell one run from another.

    Returns:
        The chosen settings, their layers, and a row for the report of every setting. A baseline of which all settings
        diverged is left out, with a note.

    Raises:
        Refused: all settings of the network diverged; see `dense_training.train` for others.
    """
    layers, losses = train(plan.networks, plan.settings, plan.crops(), plan.recipe, read, new_layer, loss, path,
                           run_of(plan) | dict(data or {}))
    rows = [s._asdict() | {"train_loss": value if math.isfinite(value) else None}
            for s, value in zip(plan.settings, losses, strict=True)]
    finite = [i for i, layer in enumerate(layers) if is_finite(layer)]
    settings, layers = [plan.settings[i] for i in finite], [layers[i] for i in finite]
    names = {s.features for s in settings}
    check_finite([plan.settings[0].features in names], plan.recipe)
    for name in (name for name in plan.networks if name not in names):
        plan.notes.append(f"{name}: left out, because its loss is not finite with any --lr; a lower one may be")
        parallel.say(plan.notes[-1])
    chosen = list(range(len(settings)))
    if plan.held:
        held = figures(Predictor(plan.networks, settings, layers, plan.geometry, read), plan.held)
        chosen = choose(settings, [sign * figure["value"] for figure in held])
        figure_of, starred = dict(zip(finite, held, strict=True)), {finite[i] for i in chosen}
        rows = [row | {title: figure_of.get(i), "chosen": "*" if i in starred else ""} for i, row in enumerate(rows)]
    return [settings[i] for i in chosen], [layers[i] for i in chosen], rows


def run_of(plan: Plan) -> dict:
    """What a stopped run and the one that resumes it must have in common; plain values.

    --max_pixels is not part of it: it refuses images and changes none, and a run that it stopped goes on with a larger.
    """
    network = next(iter(plan.networks.values()))
    value_range = network.reading.value_range
    recipe = {k: v if isinstance(v, (int, float)) else list(v) for k, v in plan.recipe._asdict().items()}
    items = [item for part in (plan.train, plan.held, plan.test) if part for item in part.items]
    patches = {name: tokens.patch_size(network) for name, network in plan.networks.items()
               if network.about["arch"] == PIXELS}  # which their weights don't tell
    return ({"raw_patches": patches} if patches else {}) | {
        "data": files_hash(path for item in items if isinstance(item, tuple) for path in item),  # others are drawn
        "weights": {name: f"{network.about['weights_sha256']}{network.about.get('network_options', '')}"
                    for name, network in plan.networks.items()},
        "precision": network.about["precision"], "images": plan.sizes(),
        "mean": list(network.info["mean"]), "std": list(network.info["std"]),
        "value_range": list(value_range) if value_range else None,
        "settings": [list(s) for s in plan.settings], "crops": [plan.geometry.image_size, plan.geometry.crop],
        "recipe": {k: v for k, v in recipe.items() if k != "num_workers"}}


def save_layer(layer: nn.Module, setting: Setting, network: Network, path: Path, **facts: object) -> None:
    """The chosen layer of the network, its setting and `facts`, which are plain values."""
    checkpoints.save({"state_dict": layer.state_dict(), "setting": setting._asdict(),
                      "weights_sha256": network.about["weights_sha256"]} | facts, path)


def about(plan: Plan, network: Network) -> dict:
    """What a report says of the network and the training, in plain values."""
    facts = {key: value for key, value in network.about.items() if key not in ("crop_size", "resize_size")}
    recipe, geometry = plan.recipe, plan.geometry
    return facts | {
        "images": plan.sizes(), "geometry": geometry._asdict() | {"scales": list(geometry.scales)},
        "steps": recipe.steps, "batch_size": recipe.batch_size, "weight_decay": recipe.weight_decay,
        "seed": recipe.seed, "notes": plan.notes}


def drawn_rows(
    images: Annotated, count: int, row: Callable[[Tensor, np.ndarray], list[np.ndarray]], titles: Sequence[str]
) -> np.ndarray:
    """A sheet uint8 (height, width, 3) with `row(image, truth)` of `count` evenly spaced images."""
    numbers = np.linspace(0, len(images.items) - 1, min(count, len(images.items))).astype(int).tolist()
    return sheets.contact_sheet([row(*images.load(i)) for i in numbers], titles, cell=200)
