"""The built-in data set: images drawn on the fly, each with a class and a foreground mask.

An object of one of ten kinds (kinds.py) lies anywhere on a hazy landscape. A kind has a silhouette with its parts, and
its own texture and palette, but only statistically: other kinds get its texture and palette too, so that no single cue
determines the class. Position, size, rotation, proportions, colours and light change from image to image.

An image is a pure function of (index, size), and shows the same scene at every size. All silhouettes and textures are
signed distance fields (negative inside), evaluated at the centres of the pixels. A field divided by the width of a
pixel and clipped is the fraction of the pixel that is covered, which gives smooth edges without supersampling.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from imagesets.kinds import BODY, KINDS, REACH, TABLE, TEXTURE, TEXTURES, Field, Kind

# --- Settings that make the task harder or easier, in one place. -----------------------------------------------------

# Fraction of images with their kind's own texture / palette; the others get a random one. The texture is the cue that
# small crops share and that a network learns first. The palette must remain a weak cue, or the mean colour (and so the
# raw pixels) would determine the class.
OWN_TEXTURE = 0.95
OWN_PALETTE = 0.45

# Fraction of the image's area that an object covers before the border cuts it, drawn uniformly between the two. Large
# on purpose: a local crop takes 5 to 40 % of the image, and most crops should contain part of the object.
AREA = (0.17, 0.47)

# Smallest distance of an object's centre from the border, in radii of the object; below 1, the border cuts some.
MARGIN = 0.75

# Repeats of a texture per radius of the object, drawn uniformly: fine enough that any crop contains several, coarse
# enough to be visible at 64 pixels.
REPEATS = (2.2, 3.4)

# Contrast and colour of the background's noise. Low, and from the same distribution for all images: a background that
# identifies its image is a shortcut, which self-supervision would learn instead of the object.
NOISE_LIGHT = 0.085
NOISE_COLOUR = 0.030
DAYLIGHT = 0.35  # sky and ground each become lighter or darker by up to half of this
NOISE_WAVES = 64  # cosines per side in the noise, i.e. its finest detail is 1/64 of the image

COLOUR_JITTER = 0.09  # each channel of each colour changes by up to this much
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

# The background's colours, muted. They are drawn independently of the kind.
SKIES = ((0.70, 0.75, 0.78), (0.80, 0.75, 0.70), (0.60, 0.67, 0.72))
GROUNDS = ((0.50, 0.48, 0.40), (0.42, 0.46, 0.48), (0.58, 0.51, 0.41))

# --- Scene. Images are (3, h, w) float64 in [0, 1] until the last line; u and v run from 0 to 1 over the image. -------


def cover(field: Field, width: float) -> Field:
    """Fraction of each pixel that lies inside, from the distance at its centre and its width."""
    return np.clip(0.5 - field / width, 0, 1)


def blend(colour: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum of colours (n, 3) with weights (n, h, w) -> (3, h, w)."""
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
    """(channels, size, size) 1/f noise. Waves too fine for the image are left out."""
    weights = amplitudes(count) * (rng.random((channels, count, count)) - 0.5)
    held = min(count, size)
    waves = cosines(size, held)
    return waves @ weights[:, :held, :held] @ waves.T


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Sky, hills and ground in muted colours under 1/f noise; the horizon may lie outside the image."""
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


def turned(kind: Kind, unit: float, angle: float, mirror: float) -> np.ndarray:
    """(2, 2) matrix from (u, v) to (x, y): a rotation, maybe a reflection, divided by the unit; both from [0, 1)."""
    radians = np.radians(kind.turn) * (2 * angle - 1)
    c, s = np.cos(radians), np.sin(radians)
    sign = -1 if mirror < 0.5 else 1
    return np.array([[sign * c, sign * s], [-s, c]]) / unit


class Placement(NamedTuple):
    centre: np.ndarray  # (v, u), fractions of the side
    matrix: np.ndarray  # (2, 2), from (u, v) around the centre to the object's own (x, y)
    unit: float  # the object's unit of length as a fraction of the side


def place(rng: np.random.Generator, kind: Kind) -> Placement:
    """Where a single object lies: anywhere on the image, large, rotated by up to the kind's `turn`, maybe reflected."""
    r = rng.random(5)
    unit = float(np.sqrt((AREA[0] + (AREA[1] - AREA[0]) * r[0]) / kind.extent))
    keep = min(MARGIN * unit, 0.5)
    return Placement(keep + (1 - 2 * keep) * r[3:5], turned(kind, unit, *r[1:3]), unit)


def wear(rng: np.random.Generator, own: Callable[[Field, Field], Field], x: Field, y: Field) -> Field:
    """Field of a texture on an object, the kind's own or a random one, slightly rotated and shifted."""
    r = rng.random(6)
    texture = own if r[0] < OWN_TEXTURE else TEXTURES[int(r[1] * len(TEXTURES))]
    repeats, angle = REPEATS[0] + (REPEATS[1] - REPEATS[0]) * r[2], 0.5 * (r[3] - 0.5)
    c, s = repeats * np.cos(angle), repeats * np.sin(angle)
    return texture(c * x + s * y + 0.6 * (r[4] - 0.5), c * y - s * x + 0.6 * (r[5] - 0.5)) / repeats


def shift(field: Field, down: int, right: int) -> Field:
    """Shift a field by whole pixels, repeating its border."""
    rows, columns = (np.clip(np.arange(n) - by, 0, n - 1) for n, by in zip(field.shape, (down, right), strict=True))
    return field[rows[:, None], columns]


def paint_object(rng: np.random.Generator, kind: Kind, canvas: np.ndarray, placement: Placement,
                 colour: np.ndarray) -> np.ndarray:
    """Paint an object, and its shadow, into the canvas in place, with the five colours of `colours`.

    Returns its mask, (size, size) bool.
    """
    size, (centre, matrix, unit) = canvas.shape[1], placement
    proportions, light = rng.random(8), np.pi * (0.2 + 0.6 * rng.random())

    # Only the square that the object can reach is computed. `pixel` is the width of a pixel in the object's units.
    low, high = (np.clip((centre + side * REACH * unit) * size, 0, size - 1).astype(int) for side in (-1, 1))
    window = tuple(slice(first, last + 1) for first, last in zip(low, high, strict=True))
    v, u = ((np.arange(size)[cut] + 0.5) / size - middle for cut, middle in zip(window, centre, strict=True))
    u, v = np.meshgrid(u, v)
    x, y = (a * u + b * v for a, b in matrix)
    pixel = 1 / (size * unit)
    parts = kind.shape(x, y, proportions)
    texture = cover(wear(rng, kind.texture, x, y), pixel)

    # Front to back: a part contributes in proportion to the light that the parts in front of it let through.
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
    """Draw image `index` of the data set.

    Args:
        index: 0 or more. The class is index % len(KINDS), so any range of indices is balanced.
        size: side in pixels, 8 or more. The scene doesn't depend on it.

    Returns:
        the image, (size, size, 3) uint8 RGB; its class, an index into KINDS; the object's mask, (size, size) bool.

    Raises:
        ValueError: a negative index, or a size below 8.
    """
    if index < 0:
        raise ValueError(f"shapes: there is no image {index}: indices start at 0")
    if size < 8:
        raise ValueError(f"shapes: images of {size} pixels are too small: use 8 or more")
    # Only uniform numbers are drawn, whose stream NumPy has never changed, and the same number at any size.
    rng = np.random.Generator(np.random.PCG64(index))
    label = index % len(KINDS)
    canvas = background(rng, size)
    kind = TABLE[KINDS[label]]
    mask = paint_object(rng, kind, canvas, place(rng, kind), colours(rng, kind.palette))
    image = np.clip(canvas, 0, 1).transpose(1, 2, 0) * 255 + 0.5
    return np.ascontiguousarray(image.astype(np.uint8)), label, mask
