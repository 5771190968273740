"""Drawn scenes of several objects on a ground plane, with what dense tasks and detection need to know about them.

The objects are those of shapes.py, and the camera looks at them from eye height: an object stands on the ground, the
farther away the smaller and the closer to the horizon, and near objects hide far ones. Depth follows from order and
size alone. Each object has one colour, so that a phrase ("red fish") names it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from imagesets import shapes
from imagesets.kinds import KINDS, TABLE

COLOURS = {"red": "ember", "orange": "citrus", "green": "moss", "turquoise": "lagoon", "blue": "ocean",
           "purple": "violet", "pink": "rose", "yellow": "lemon", "brown": "cocoa", "black": "chalk"}  # -> palette

NEAR, FAR = 1.5, 5.0  # metres: distances of objects; the ground is seen from NEAR / 2 on
SKY = 10.0  # metres: the depth of everything beyond the ground that is seen, and of the sky
EYES = 0.55  # height of the camera as a fraction of the field of view at one metre
HORIZON = (0.25, 0.4)  # its height, as a fraction of the image from the top
UNIT = 0.30  # unit of length of an object at NEAR metres, as a fraction of the image's side
GROWTH = (0.85, 1.15)  # real sizes of objects differ by these factors
VISIBLE = 0.3  # an object of which a smaller fraction is visible is painted but not listed


class SceneObject(NamedTuple):
    kind: int  # index into KINDS
    colour: str  # one of COLOURS
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 of its visible pixels, x2 and y2 exclusive
    depth: float  # metres

    @property
    def phrase(self) -> str:
        return f"{self.colour} {KINDS[self.kind]}"


class Scene(NamedTuple):
    image: np.ndarray  # (size, size, 3) uint8 RGB
    objects: list[SceneObject]  # from far to near
    owner: np.ndarray  # (size, size) int16: index into objects of each pixel; -1 for the background
    depth: np.ndarray  # (size, size) float32, metres


def draw(index: int, size: int = 96, count: tuple[int, int] = (2, 4),
         pairs: Sequence[tuple[int, str]] | None = None) -> Scene:
    """Draw scene `index`, a pure function of the arguments.

    Args:
        index: 0 or more.
        size: side in pixels, 16 or more. The scene doesn't depend on it, apart from objects that are too small to list.
        count: least and largest number of objects.
        pairs: (kind, colour) combinations that occur; None for all.

    Raises:
        ValueError: an index, size or count out of range, or no pairs.
    """
    if index < 0 or size < 16 or not 1 <= count[0] <= count[1] or (pairs is not None and not pairs):
        raise ValueError(f"scenes: cannot draw index {index} at {size} pixels with {count} objects and pairs {pairs}")
    rng = np.random.Generator(np.random.PCG64([index, 1]))  # 1: another stream than that of shapes.draw
    number = count[0] + int(rng.random() * (count[1] - count[0] + 1))
    horizon = HORIZON[0] + (HORIZON[1] - HORIZON[0]) * rng.random()
    canvas, depth = ground(rng, size, horizon)
    owner = np.full((size, size), -1, np.int16)

    # One column per object, so that near ones rarely hide far ones; the farthest is painted first.
    columns = np.argsort(rng.random(number))
    distances = NEAR * (FAR / NEAR) ** rng.random(number)
    whole, painted = [], []
    for column, distance in sorted(zip(columns, distances, strict=True), key=lambda pair: -pair[1]):
        r = rng.random(6)
        kind, colour = pick(r[0], r[1], pairs)
        unit = UNIT * NEAR / distance * (GROWTH[0] + (GROWTH[1] - GROWTH[0]) * r[2])
        foot = horizon + EYES / distance
        centre = np.array([foot - 0.8 * unit, (column + 0.5 + 0.5 * (r[3] - 0.5)) / number])
        placement = shapes.Placement(centre, shapes.turned(TABLE[KINDS[kind]], unit, r[4], r[5]), unit)
        mask = shapes.paint_object(rng, TABLE[KINDS[kind]], canvas, placement, tints(rng, COLOURS[colour]))
        owner[mask], depth[mask] = len(painted), distance
        whole.append(mask.sum())
        painted.append((kind, colour, float(distance)))

    image = np.clip(canvas, 0, 1).transpose(1, 2, 0) * 255 + 0.5
    return Scene(np.ascontiguousarray(image.astype(np.uint8)), *listed(painted, whole, owner), depth)


def ground(rng: np.random.Generator, size: int, horizon: float) -> tuple[np.ndarray, np.ndarray]:
    """Canvas (3, size, size) with ground below a straight horizon, and its depth (size, size) float32 in metres."""
    v = (np.arange(size) + 0.5) / size
    depth = np.minimum(SKY, EYES / np.maximum(v - horizon, 1e-6)).astype(np.float32)
    r = rng.random(4)
    sky, earth = (np.array(table[int(x * len(table))]) + 0.12 * (y - 0.5)
                  for table, x, y in ((shapes.SKIES, r[0], r[1]), (shapes.GROUNDS, r[2], r[3])))
    near = shapes.cover(horizon - v, 0.01 + 1 / size)[:, None] * np.ones(size)
    canvas = shapes.blend(np.stack([sky, earth]), np.stack([1 - near, near]))
    canvas += shapes.NOISE_COLOUR * shapes.noise(rng, size, 8, 3)
    canvas += shapes.NOISE_LIGHT * (0.7 + 0.6 * near) * shapes.noise(rng, size, shapes.NOISE_WAVES, 1)[0]
    return canvas, np.repeat(depth[:, None], size, 1)


def pick(first: float, second: float, pairs: Sequence[tuple[int, str]] | None) -> tuple[int, str]:
    """A kind and a colour from two numbers in [0, 1)."""
    if pairs is None:
        return int(first * len(KINDS)), list(COLOURS)[int(second * len(COLOURS))]
    return pairs[int(first * len(pairs))]


def tints(rng: np.random.Generator, palette: str) -> np.ndarray:
    """(5, 3): the colours of an object whose main colour is the palette's first; see shapes.colours."""
    first, second, trim = shapes.PALETTES[palette]
    table = np.array([first, trim, shapes.INK, shapes.PAPER, second])
    return table + shapes.COLOUR_JITTER * (2 * rng.random(table.shape) - 1)


def listed(painted: list[tuple[int, str, float]], whole: list[int],
           owner: np.ndarray) -> tuple[list[SceneObject], np.ndarray]:
    """The objects of which enough is visible, with their boxes, and the map of owners in their numbers.

    A pixel of an object that isn't listed belongs to the background.
    """
    objects, numbers = [], np.full(len(painted) + 1, -1, np.int16)  # the last entry is the background's, -1
    for i, ((kind, colour, distance), area) in enumerate(zip(painted, whole, strict=True)):
        rows, columns = np.nonzero(owner == i)
        if len(rows) < max(4, VISIBLE * area):
            continue
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        numbers[i] = len(objects)
        objects.append(SceneObject(kind, colour, box, distance))
    return objects, numbers[owner]
