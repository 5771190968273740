"""Boxes and their labels drawn into images, as uint8 arrays (height, width, 3)."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST = 480  # images whose longer side is shorter are enlarged, so that labels are small beside the objects


def draw_boxes(figure: np.ndarray, boxes: Sequence[Sequence[float]], classes: Sequence[int], labels: Sequence[str]
               ) -> np.ndarray:
    """The image with boxes, each with a label on a field of its phrase's colour.

    A label stands above its box where there is room, else in it, and below the labels before it that it would cover.

    Args:
        boxes: (n, 4) x1, y1, x2, y2 in pixels.
        classes: n numbers of phrases, which choose the colours.
        labels: n texts.
    """
    height, width = figure.shape[:2]
    factor = max(1, -(-SMALLEST // max(height, width)))
    drawn = Image.fromarray(figure).resize((factor * width, factor * height), Image.Resampling.BICUBIC)
    drawing, line = ImageDraw.Draw(drawn), max(2, round(max(drawn.size) / 300))
    font = ImageFont.load_default(size=max(13, round(max(drawn.size) / 45)))
    taken: list[tuple[float, float, float, float]] = []
    corners = [[factor * v for v in box] for box in boxes]
    for (x1, y1, x2, y2), k in zip(corners, classes, strict=True):
        drawing.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour(k), width=line)
    for (x1, y1, _, _), k, label in zip(corners, classes, labels, strict=True):
        field = place(drawing.textbbox((0, 0), label, font=font), x1, y1, drawn.size, taken)
        taken.append(field)
        drawing.rectangle(field, fill=colour(k))
        ink = "black" if np.dot(colour(k), (0.299, 0.587, 0.114)) > 140 else "white"
        drawing.text(((field[0] + field[2]) / 2, (field[1] + field[3]) / 2), label, fill=ink, font=font, anchor="mm")
    return np.array(drawn)


def place(text: Sequence[float], x: float, y: float, size: tuple[int, int], taken: Sequence[Sequence[float]]
          ) -> tuple[float, float, float, float]:
    """Where the field of a label lies whose box starts at (x, y).

    Args:
        text: extent of the text.
        size: width and height of the image.
        taken: fields of other labels.
    """
    width, height = text[2] - text[0] + 8, text[3] - text[1] + 8
    left = min(max(x, 0), max(size[0] - width, 0))
    top = y - height if y >= height else max(y, 0)
    for _ in taken:
        covered = [b for b in taken if left < b[2] and b[0] < left + width and top < b[3] and b[1] < top + height]
        if not covered or max(b[3] for b in covered) + height > size[1]:
            break
        top = max(b[3] for b in covered) + 1
    return left, top, left + width, top + height


def colour(k: int) -> tuple[int, int, int]:
    """Colours that differ for neighbouring numbers: hues by the golden ratio."""
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb((0.61803 * k) % 1, 0.75, 0.95))
