"""The embedded data set: pictures drawn on the fly, with a class and a foreground mask each.

One object of ten kinds lies anywhere on a hazy landscape. A kind ties a silhouette with its parts to a texture and a
palette, but only statistically: textures and palettes are lent to other kinds too, so that no single cue gives the
class away. Position, size, rotation, proportions, colours and light change from picture to picture.

A picture is a pure function of (index, size), and the same scene at every size. All shapes and textures are signed
distance fields (negative inside), evaluated at the pixels' centres: a field divided by the pixel's width and clipped
is the share of the pixel that is covered, which makes edges smooth without drawing anything larger and shrinking it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# --- Knobs. What makes the task harder or easier, in one place. -----------------------------------------------------

# Share of the pictures that wear their kind's own texture / palette; the rest draw one of all at random. The texture
# is the cue that small crops share and that a network picks up first; the palette must stay weak, or mean colours
# (and so raw pixels) would tell the class.
OWN_TEXTURE = 0.95
OWN_PALETTE = 0.45

# Share of the picture's area that an object covers (drawn uniformly between the two, before the picture's border cuts
# it). Large on purpose: a local crop takes 5 to 40 % of the picture, and most should see something of the object.
AREA = (0.17, 0.47)

# How far a centre keeps from the border, as a share of the object's radius: below 1, some objects are cut by it.
MARGIN = 0.75

# Repeats of a texture in one radius of the object (drawn uniformly): fine enough that any crop holds several, coarse
# enough to survive 64 pixels.
REPEATS = (2.2, 3.4)

# Contrast and colour of the background's noise. Kept low and from one family for all pictures: what a background
# tells about its picture is a shortcut that self-supervision would take before it looks at the object.
NOISE_LIGHT = 0.085
NOISE_COLOUR = 0.030
DAYLIGHT = 0.35  # sky and ground are each lighter or darker by up to half of this
NOISE_WAVES = 64  # cosines a side in the noise, i.e. its finest detail is 1/64 of the picture

COLOUR_JITTER = 0.09  # each channel of each colour moves by up to this much
SHADE = 0.22  # how much darker the side away from the light is
RIM = 0.40  # how much darker the edge of a part is
SHADOW = 0.45  # how dark the shadow that the object casts is

# The object's colours: two for the texture, one for the other parts. Saturated, unlike the background.
PALETTES = {
    "ember": ((0.86, 0.20, 0.13), (0.99, 0.84, 0.60), (0.47, 0.13, 0.13)),
    "citrus": ((0.99, 0.62, 0.10), (0.85, 0.33, 0.06), (0.98, 0.92, 0.62)),
    "moss": ((0.24, 0.58, 0.22), (0.80, 0.88, 0.40), (0.12, 0.33, 0.18)),
    "lagoon": ((0.08, 0.62, 0.60), (0.80, 0.95, 0.85), (0.04, 0.32, 0.42)),
    "ocean": ((0.13, 0.36, 0.78), (0.62, 0.85, 0.98), (0.96, 0.86, 0.48)),
    "violet": ((0.46, 0.22, 0.70), (0.88, 0.72, 0.96), (0.96, 0.78, 0.26)),
    "rose": ((0.90, 0.32, 0.52), (0.99, 0.86, 0.88), (0.55, 0.10, 0.32)),
    "lemon": ((0.97, 0.84, 0.13), (0.99, 0.97, 0.74), (0.55, 0.45, 0.10)),
    "cocoa": ((0.45, 0.27, 0.16), (0.85, 0.70, 0.52), (0.72, 0.25, 0.18)),
    "chalk": ((0.15, 0.15, 0.20), (0.94, 0.94, 0.92), (0.80, 0.24, 0.24)),
}
INK, PAPER = (0.10, 0.09, 0.13), (0.97, 0.96, 0.92)  # eyes, doors, windows

# The background's colours, muted: far to near. Which one a picture gets has nothing to do with its kind.
SKIES = ((0.70, 0.75, 0.78), (0.80, 0.75, 0.70), (0.60, 0.67, 0.72))
GROUNDS = ((0.50, 0.48, 0.40), (0.42, 0.46, 0.48), (0.58, 0.51, 0.41))

# --- Fields. Distances in the units of x and y, negative inside; y points down. --------------------------------------

Field = np.ndarray  # (h, w) float64


def tri(x: Field) -> Field:
    """Distance to the nearest integer, 0 to 0.5."""
    return np.abs(x - np.rint(x))


def norm(x: Field, y: Field) -> Field:
    """Distance to the origin; several times faster than np.hypot, and rounded alike on every machine."""
    return np.sqrt(x * x + y * y)


def ellipse(x: Field, y: Field, rx: float, ry: float) -> Field:
    """Ellipse at the origin; the distance is exact for a circle and too small along the longer axis."""
    return (norm(x / rx, y / ry) - 1) * min(rx, ry)


def capsule(x: Field, y: Field, x1: float, y1: float, r0: float, r1: float) -> Field:
    """Line from the origin to (x1, y1) whose half-width goes from r0 to r1, with round ends."""
    along = np.clip((x * x1 + y * y1) / (x1 * x1 + y1 * y1), 0, 1)
    return norm(x - along * x1, y - along * y1) - (r0 + (r1 - r0) * along)


def box(x: Field, y: Field, half_width: float, half_height: float) -> Field:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def fold(x: Field, y: Field, n: int) -> tuple[Field, Field]:
    """The n sectors of a circle folded onto the one around the upward axis: (along, across >= 0) of that axis."""
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
# An object is about 2 units wide, and none reaches further than REACH from the origin; `a` sets its proportions.
# BODY wears the texture, the other parts are plain.

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
    texture: Callable[[Field, Field], Field]  # its own, worn by OWN_TEXTURE of the pictures and some
    palette: str  # its own, worn by OWN_PALETTE of the pictures and some
    turn: float  # largest rotation to either side, in degrees: nobody builds houses upside down
    extent: float  # area of an average one in square units, so that AREA means the same for all kinds


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


# --- Scene. Pictures are (3, h, w) float64 in [0, 1] until the last line; u and v run from 0 to 1 over the picture. ---


def cover(field: Field, width: float) -> Field:
    """Share of each pixel that lies inside, from the distance at its centre and the pixel's width."""
    return np.clip(0.5 - field / width, 0, 1)


def blend(colour: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Colours (n, 3) mixed by weights (n, h, w) -> (3, h, w)."""
    return (colour.T @ weights.reshape(len(weights), -1)).reshape(3, *weights.shape[1:])


@lru_cache(maxsize=16)
def cosines(size: int, count: int) -> np.ndarray:
    """(size, count): wave k of a cosine transform at the pixels' centres."""
    return np.cos(np.pi * np.arange(count) * (np.arange(size)[:, None] + 0.5) / size)


@lru_cache(maxsize=16)
def amplitudes(count: int) -> np.ndarray:
    """(count, count): 1/f for each pair of waves, as in photographs, for noise of unit variance; 0 for the mean."""
    frequency = np.hypot(*np.mgrid[:count, :count])
    frequency[0, 0] = np.inf
    return 1 / frequency / np.sqrt((1 / frequency**2).sum() / 12)


def noise(rng: np.random.Generator, size: int, count: int, channels: int) -> np.ndarray:
    """(channels, size, size) 1/f noise. A smaller picture leaves out the waves that it cannot hold."""
    weights = amplitudes(count) * (rng.random((channels, count, count)) - 0.5)
    held = min(count, size)
    waves = cosines(size, held)
    return waves @ weights[:, :held, :held] @ waves.T


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Sky, hills and ground in muted colours under 1/f noise; the horizon may lie outside of the picture."""
    r, tint = rng.random(11), 0.12 * (rng.random((2, 3)) - 0.5)
    sky, ground = (np.array(table[int(x * len(table))]) for table, x in ((SKIES, r[0]), (GROUNDS, r[1])))
    sky, ground = sky + tint[0] + DAYLIGHT * (r[2] - 0.5), ground + tint[1] + DAYLIGHT * (r[3] - 0.5)
    u = (np.arange(size) + 0.5) / size
    v = u[:, None]
    rolling = (rng.random((2, 8)) - 0.5) / np.arange(1, 9) @ cosines(size, 8).T  # (2, size)
    horizon = 1.3 * r[4] - 0.1 + 0.3 * (r[5] - 0.5) * (u - 0.5) + 0.08 * r[6] * rolling[0]
    ridge = horizon - 0.2 * r[7] + 0.25 * r[8] * rolling[1]
    near = cover(horizon - v, 0.015 + 1 / size)
    hills = cover(ridge - v, 0.02 + 1 / size) * (1 - near)
    canvas = blend(np.stack([sky, 0.5 * (sky + ground), ground]), np.stack([1 - hills - near, hills, near]))
    canvas += NOISE_COLOUR * noise(rng, size, 8, 3)
    grain = NOISE_LIGHT * (0.6 + 0.8 * r[9]) * (0.7 + 0.6 * near) * noise(rng, size, NOISE_WAVES, 1)[0]
    return canvas + (grain + (0.14 - 0.26 * near) * (v - 0.5))


def colours(rng: np.random.Generator, own: str) -> np.ndarray:
    """(5, 3): the colours of BODY, TRIM, DARK, LIGHT, and of the texture on the body."""
    r = rng.random(3)
    names = list(PALETTES)
    first, second, trim = PALETTES[own if r[0] < OWN_PALETTE else names[int(r[1] * len(names))]]
    if r[2] < 0.5:
        first, second = second, first
    table = np.array([first, trim, INK, PAPER, second])
    return table + COLOUR_JITTER * (2 * rng.random(table.shape) - 1)


def place(rng: np.random.Generator, kind: Kind) -> tuple[np.ndarray, np.ndarray, float]:
    """Where an object lies: its centre (v, u), the matrix from picture to object, its unit as a share of the side.

    The matrix maps (u, v) to (x, y): a rotation by up to the kind's turn and perhaps a mirror, over the unit.
    """
    r = rng.random(5)
    unit = float(np.sqrt((AREA[0] + (AREA[1] - AREA[0]) * r[0]) / kind.extent))
    keep = min(MARGIN * unit, 0.5)
    angle = np.radians(kind.turn) * (2 * r[1] - 1)
    c, s = np.cos(angle), np.sin(angle)
    mirror = -1 if r[2] < 0.5 else 1
    return keep + (1 - 2 * keep) * r[3:5], np.array([[mirror * c, mirror * s], [-s, c]]) / unit, unit


def wear(rng: np.random.Generator, own: Callable[[Field, Field], Field], x: Field, y: Field) -> Field:
    """Field of a texture on an object, the kind's own or another one, slightly turned and shifted."""
    r = rng.random(6)
    texture = own if r[0] < OWN_TEXTURE else TEXTURES[int(r[1] * len(TEXTURES))]
    repeats, angle = REPEATS[0] + (REPEATS[1] - REPEATS[0]) * r[2], 0.5 * (r[3] - 0.5)
    c, s = repeats * np.cos(angle), repeats * np.sin(angle)
    return texture(c * x + s * y + 0.6 * (r[4] - 0.5), c * y - s * x + 0.6 * (r[5] - 0.5)) / repeats


def shift(field: Field, down: int, right: int) -> Field:
    """The field moved by whole pixels, its border repeated."""
    rows, columns = (np.clip(np.arange(n) - by, 0, n - 1) for n, by in zip(field.shape, (down, right), strict=True))
    return field[rows[:, None], columns]


def paint_object(rng: np.random.Generator, kind: Kind, canvas: np.ndarray) -> np.ndarray:
    """Paints an object of the kind and its shadow into the canvas, in place; returns its mask, (size, size) bool."""
    size = canvas.shape[1]
    centre, matrix, unit = place(rng, kind)
    colour, proportions, light = colours(rng, kind.palette), rng.random(8), np.pi * (0.2 + 0.6 * rng.random())

    # Only the square that the object can reach is computed. `pixel` is a pixel's width in the object's units.
    low, high = (np.clip((centre + side * REACH * unit) * size, 0, size - 1).astype(int) for side in (-1, 1))
    window = tuple(slice(first, last + 1) for first, last in zip(low, high, strict=True))
    v, u = ((np.arange(size)[cut] + 0.5) / size - middle for cut, middle in zip(window, centre, strict=True))
    u, v = np.meshgrid(u, v)
    x, y = (a * u + b * v for a, b in matrix)
    pixel = 1 / (size * unit)
    parts = kind.shape(x, y, proportions)
    texture = cover(wear(rng, kind.texture, x, y), pixel)

    # From front to back: what a part adds is its share of the light that the parts before it let through.
    weights, through = np.zeros((len(colour), *u.shape)), np.ones(u.shape)
    for part, role in reversed(parts):
        alpha = through * cover(part, pixel)
        through -= alpha
        edge = np.clip(1 + part / 0.15, 0, 1)
        weights[role] += alpha * (1 - RIM * edge * edge)
    weights[TEXTURE] = weights[BODY] * texture
    weights[BODY] -= weights[TEXTURE]

    silhouette = np.minimum.reduce([part for part, _ in parts])
    to_light = np.array([-np.sin(light), np.cos(light)])  # (v, u), from above
    shadow = shift(silhouette, *np.rint(-0.12 * unit * size * to_light).astype(int))
    view = canvas[(slice(None), *window)]
    view *= through * (1 - SHADOW * cover(shadow, 0.3 + pixel))
    view += blend(colour, weights * (1 + SHADE / unit * (to_light[0] * v + to_light[1] * u)))
    mask = np.zeros((size, size), bool)
    mask[window] = silhouette < 0
    return mask


def draw(index: int, size: int = 96) -> tuple[np.ndarray, int, np.ndarray]:
    """Picture `index` of the data set.

    Args:
        index: which picture, 0 or more. Its class is index % len(KINDS), so any run of pictures is balanced.
        size: side in pixels, 8 or more. The scene doesn't depend on it.

    Returns:
        the picture, (size, size, 3) uint8 RGB; its class, an index into KINDS; the object's mask, (size, size) bool.

    Raises:
        ValueError: for a negative index or a size below 8.
    """
    if index < 0:
        raise ValueError(f"shapes: there is no picture {index}: indices start at 0")
    if size < 8:
        raise ValueError(f"shapes: pictures of {size} pixels are too small: ask for 8 or more")
    # Only uniform numbers are drawn, the one stream that NumPy has never changed, and as many at any size.
    rng = np.random.Generator(np.random.PCG64(index))
    label = index % len(KINDS)
    canvas = background(rng, size)
    mask = paint_object(rng, TABLE[KINDS[label]], canvas)
    picture = np.clip(canvas, 0, 1).transpose(1, 2, 0) * 255 + 0.5
    return np.ascontiguousarray(picture.astype(np.uint8)), label, mask
