"""The ten kinds of drawn objects: their silhouettes and textures, as signed distance fields.

A field holds, at the centre of each pixel, the distance to an outline: negative inside, positive outside.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# --- Fields. Distances in the units of x and y, negative inside; y points down. --------------------------------------

Field = np.ndarray  # (h, w) float64


def tri(x: Field) -> Field:
    """Distance to the nearest integer, 0 to 0.5."""
    return np.abs(x - np.rint(x))


def norm(x: Field, y: Field) -> Field:
    """Distance to the origin; several times faster than np.hypot, and rounded the same on every machine."""
    return np.sqrt(x * x + y * y)


def ellipse(x: Field, y: Field, rx: float, ry: float) -> Field:
    """Ellipse around the origin; the distance is exact for a circle, and too small along the longer axis."""
    return (norm(x / rx, y / ry) - 1) * min(rx, ry)


def capsule(x: Field, y: Field, x1: float, y1: float, r0: float, r1: float) -> Field:
    """Segment from the origin to (x1, y1) with round ends, whose half-width changes from r0 to r1."""
    along = np.clip((x * x1 + y * y1) / (x1 * x1 + y1 * y1), 0, 1)
    return norm(x - along * x1, y - along * y1) - (r0 + (r1 - r0) * along)


def box(x: Field, y: Field, half_width: float, half_height: float) -> Field:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def fold(x: Field, y: Field, n: int) -> tuple[Field, Field]:
    """Map n sectors of a circle onto the one around the upward axis: coordinates (along, across >= 0) of that axis."""
    radius, sector = norm(x, y), 2 * np.pi / n
    angle = sector * tri(np.arctan2(x, -y) / sector)
    return radius * np.cos(angle), radius * np.sin(angle)


# --- Textures. (x, y) in repeats -> field of the second colour. ------------------------------------------------------


def stripes(x: Field, y: Field) -> Field:
    return tri(x) - 0.25


def checks(x: Field, y: Field) -> Field:
    a, b = tri(x / 1.5) - 0.25, tri(y / 1.5) - 0.25
    return 1.5 * np.sign(a * b) * np.minimum(np.abs(a), np.abs(b))


def dots(x: Field, y: Field) -> Field:
    row = np.floor(y)
    return norm(tri(x + 0.5 * (row % 2)), y - row - 0.5) - 0.29


def bricks(x: Field, y: Field) -> Field:
    row = np.floor(y)
    across = 0.5 - tri(x / 2 + 0.5 * (row % 2) + 0.25)
    return np.minimum(2 * across, 0.5 - np.abs(y - row - 0.5)) - 0.13


def scales(x: Field, y: Field) -> Field:
    row = np.floor(y)
    return np.abs(norm(tri(x + 0.5 * (row % 2)), y - row) - 0.55) - 0.13


def rings(x: Field, y: Field) -> Field:
    return tri(norm(x, y)) - 0.25


def rays(x: Field, y: Field) -> Field:
    return (tri(np.arctan2(x, y + 0.2) * (7 / np.pi)) - 0.25) * norm(x, y) * 0.45


def zigzag(x: Field, y: Field) -> Field:
    return 0.6 * (tri(y * 0.9 + 1.6 * tri(x * 0.6)) - 0.25)


def veins(x: Field, y: Field) -> Field:
    side = 0.75 * (tri(0.9 * y + 0.8 * np.abs(x)) - 0.16)
    return np.minimum(side, np.abs(x) - 0.16)


def blotches(x: Field, y: Field) -> Field:
    wave = np.sin(3.1 * x + 1.3 * np.sin(2.3 * y)) + np.sin(3.4 * y + 1.7 * np.sin(1.9 * x + 1))
    return 0.2 * (wave - 0.35)


# --- Shapes. (x, y, a: eight numbers in [0, 1)) -> the parts from back to front, each a field and its colour. --------
# An object is about 2 units wide, and none extends further than REACH from the origin; `a` sets its proportions.
# BODY has the texture, the other parts are plain.

REACH = 1.5
BODY, TRIM, DARK, LIGHT, TEXTURE = range(5)
Parts = list[tuple[Field, int]]


def fish(x: Field, y: Field, a: np.ndarray) -> Parts:
    tall, end = 0.44 + 0.2 * a[0], 0.42 + 0.22 * a[1]
    tail = np.maximum(np.abs(np.abs(y) - 0.5 * end * (-x - 0.4) / 0.5) - 0.32 * (-x - 0.35), -x - 1.05)
    fin = np.maximum(ellipse(x + 0.1, y + tall * 0.72, 0.42 + 0.15 * a[2], 0.38), x - 0.25)
    body = ellipse(x - 0.2, y, 0.82, tall)
    eye_x, eye_y = x - 0.68, y + 0.12
    return [(tail, TRIM), (fin, TRIM), (body, BODY), (ellipse(eye_x, eye_y, 0.13, 0.13), LIGHT),
            (ellipse(eye_x - 0.03, eye_y, 0.07, 0.07), DARK)]


def leaf(x: Field, y: Field, a: np.ndarray) -> Parts:
    wide = 0.48 + 0.22 * a[0]
    bent = x - (0.5 * a[1] - 0.25) * (y * y - 0.4)
    radius = (1 + wide * wide) / (2 * wide)
    blade = norm(np.abs(bent) + radius - wide, y) - radius
    stem = capsule(bent, y - 0.9, 0.2 * a[2] - 0.1, 0.42, 0.05, 0.07)
    return [(stem, TRIM), (blade + 0.035 * a[3] * np.cos(22 * y), BODY)]


def starfish(x: Field, y: Field, a: np.ndarray) -> Parts:
    along, across = fold(x, y, 5 + int(1.6 * a[0]))
    h = np.clip(along / 0.9, 0, 1)
    return [(norm(along - 0.9 * h, across) - (0.42 + 0.1 * a[1]) * (1 - h) - (0.11 + 0.06 * a[2]) * h, BODY)]


def flower(x: Field, y: Field, a: np.ndarray) -> Parts:
    n = 5 + int(4 * a[0])
    along, across = fold(x, y, n)
    petal = ellipse(along - 0.58, across, 0.42, (2.0 + 0.5 * a[1]) / n)
    heart = 0.26 + 0.1 * a[2]
    return [(np.minimum(petal, norm(x, y) - 0.4), BODY), (ellipse(x, y, heart, heart), TRIM)]


def mushroom(x: Field, y: Field, a: np.ndarray) -> Parts:
    tall, wide = 0.72 + 0.25 * a[0], 0.19 + 0.12 * a[1]
    stem = np.maximum(np.abs(x) - wide * (1 + 0.35 * y * y), np.abs(y - 0.4) - 0.55)
    cap = np.maximum(ellipse(x, y - 0.05, 0.98, tall + 0.1), ellipse(x, y + 0.9, 1.4, 1.02 + 0.1 * a[2]))
    gills = ellipse(x, y - 0.06, 0.78, 0.15)
    return [(gills, DARK), (stem, LIGHT), (cap, BODY)]


def butterfly(x: Field, y: Field, a: np.ndarray) -> Parts:
    side, tilt = np.abs(x), 0.5 + 0.4 * a[0]
    c, s = np.cos(tilt), np.sin(tilt)
    ux, uy = side - 0.52, y + 0.34
    upper = ellipse(ux * c - uy * s, ux * s + uy * c, 0.62, 0.40 + 0.08 * a[1])
    lower = ellipse(side - 0.40, y - 0.42 - 0.1 * a[2], 0.40, 0.36 + 0.1 * a[3])
    feeler = capsule(side - 0.03, y + 0.42, 0.22, -0.48, 0.03, 0.045)
    return [(feeler, DARK), (np.minimum(upper, lower), BODY), (capsule(x, y + 0.45, 0, 0.95, 0.12, 0.08), DARK)]


def house(x: Field, y: Field, a: np.ndarray) -> Parts:
    wide, tall, pitch = 0.62 + 0.22 * a[0], 0.5 + 0.15 * a[1], 0.65 + 0.35 * a[2]
    eaves = 0.3 - tall
    roof = np.maximum(0.75 * (np.abs(x) * pitch - (y - eaves) - pitch * (wide + 0.16)), y - eaves)
    chimney = box(x - 0.45 * wide, y - eaves + 0.42, 0.1, 0.36)
    window_x = np.abs(x) - 0.56 * wide
    return [(chimney, DARK), (box(x, y - 0.3, wide, tall), BODY), (roof, TRIM),
            (box(x, y - 0.3 - tall + 0.3, 0.15, 0.3), DARK), (box(window_x, y - 0.22, 0.14, 0.14), LIGHT)]


def kite(x: Field, y: Field, a: np.ndarray) -> Parts:
    wide, low = 0.66 + 0.14 * a[0], 0.95 + 0.1 * a[1]
    slope = np.where(y < -0.25, wide / 0.65, wide / low)
    sail = (np.abs(x) + slope * np.abs(y + 0.25) - wide) / np.sqrt(1 + slope * slope)
    wave = (0.1 + 0.08 * a[2]) * np.sin(5 * (y - 0.7))
    tail = np.maximum(np.abs(x - wave) - 0.045, np.abs(y - 1.0) - 0.36)
    bows_y = np.abs(y - 1.12) - 0.16
    bows = np.maximum(np.abs(bows_y) - 0.2 * np.abs(x - wave) - 0.015, np.abs(x - wave) - 0.19)
    return [(tail, DARK), (bows, TRIM), (sail, BODY)]


def cup(x: Field, y: Field, a: np.ndarray) -> Parts:
    tall, top, taper = 0.62 + 0.15 * a[0], 0.66 + 0.1 * a[1], 0.05 + 0.3 * a[2]
    wide = top - 0.5 * taper * (1 + y / tall)
    body = np.maximum(np.abs(x + 0.15) - wide, np.abs(y) - tall)
    handle = np.abs(ellipse(x - 0.50, y + 0.04, 0.40, 0.38 + 0.08 * a[3])) - 0.09
    rim = ellipse(x + 0.15, y + tall, top, 0.17)
    return [(handle, TRIM), (np.minimum(body, ellipse(x + 0.15, y - tall, top - taper, 0.13)), BODY), (rim, LIGHT),
            (ellipse(x + 0.15, y + tall, top - 0.09, 0.105), DARK)]


def balloon(x: Field, y: Field, a: np.ndarray) -> Parts:
    wide = 0.72 + 0.1 * a[0]
    bag = np.minimum(ellipse(x, y + 0.3, wide, wide), capsule(x, y + 0.3, 0, 0.72, 0.82 * wide, 0.2))
    basket = box(x, y - 0.98, 0.17 + 0.06 * a[1], 0.14)
    ropes = np.maximum(np.abs(np.abs(x) - 0.17) - 0.025, np.abs(y - 0.7) - 0.25)
    return [(ropes, DARK), (basket, TRIM), (bag, BODY)]


class Kind(NamedTuple):
    shape: Callable[[Field, Field, np.ndarray], Parts]
    texture: Callable[[Field, Field], Field]  # its own, of a fraction shapes.OWN_TEXTURE of its images and a few more
    palette: str  # its own, of a fraction shapes.OWN_PALETTE of its images and a few more
    turn: float  # largest rotation to either side, in degrees: houses are not upside down
    extent: float  # average area in square units, so that shapes.AREA means the same for all kinds


TABLE = {
    "fish": Kind(fish, scales, "ocean", 60, 1.9),
    "leaf": Kind(leaf, veins, "moss", 180, 1.75),
    "starfish": Kind(starfish, dots, "citrus", 180, 1.95),
    "flower": Kind(flower, rings, "rose", 180, 2.6),
    "mushroom": Kind(mushroom, blotches, "ember", 40, 2.05),
    "butterfly": Kind(butterfly, rays, "violet", 180, 2.8),
    "house": Kind(house, bricks, "cocoa", 30, 2.4),
    "kite": Kind(kite, checks, "lagoon", 90, 1.35),
    "cup": Kind(cup, zigzag, "chalk", 40, 2.3),
    "balloon": Kind(balloon, stripes, "lemon", 40, 2.05),
}
KINDS: tuple[str, ...] = tuple(TABLE)
TEXTURES = tuple(kind.texture for kind in TABLE.values())
