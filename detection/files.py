"""Images and frames of videos to detect in, and the same with drawn boxes."""

from __future__ import annotations

import colorsys
import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from detection import coco
from imagesets import decode, sources
from protocols import attention_video, sheets

VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
SMALLEST = 480  # images whose longer side is shorter are enlarged, so that labels are small beside the objects


class Frame(NamedTuple):
    """An image, or a frame of a video."""

    name: str  # its path; of a frame video#frame-0000
    image: Tensor  # uint8 (3, H, W)
    video: str = ""
    fps: float = 0.0


def open_frames(paths: Sequence[str], max_pixels: int = decode.MAX_PIXELS) -> Iterator[Frame]:
    """Images of files and folders, frames of videos, and drawn scenes, decoded when they are asked for.

    Raises Refused, at once, for a path that doesn't exist or holds no images; later Undecodable.
    """
    reading = decode.Reading(max_pixels=max_pixels)
    return itertools.chain.from_iterable([open_path(path, reading) for path in paths])


def open_path(path: str, reading: decode.Reading) -> Iterator[Frame]:
    suffix = Path(path).suffix.lower()
    if suffix in VIDEOS:
        frames, _, fps = attention_video.open_video(path, None, reading, "--images")
        return (Frame(f"{path}#{name}", image, path, fps) for name, image in frames)
    if path.split(":")[0] == "scenes":
        objects = coco.open_objects(path, "", "--images")
        return (Frame(about["file_name"], objects.load(i)) for i, about in enumerate(objects.images))
    one = suffix in decode.suffixes() and Path(path).is_file()
    images = (sources.open_files(Path(path).parent, [Path(path).name], reading) if one else
              sources.open_images(path, flag="--images", **reading.decoding()))
    return (Frame(images.name(i), images.load(i)) for i in range(len(images)))


class Figures(contextlib.ExitStack):
    """Writes NUMBER_NAME.png of an image and NUMBER_NAME.mp4 of a video, by the number of its first frame."""

    video, write = "", None

    def add(self, folder: Path, number: int, frame: Frame, figure: np.ndarray) -> None:
        target = folder / f"{number:04}_{Path(frame.video or frame.name).stem}"
        if frame.video != self.video:
            self.close()  # the video before
            self.video = frame.video
            self.write = frame.video and self.enter_context(
                attention_video.writing(target.with_name(f"{target.name}.mp4"), figure, frame.fps))
        if frame.video:
            self.write(figure)
        else:
            sheets.save_picture(figure, target.with_name(f"{target.name}.png"))


def draw_boxes(image: Tensor, rows: Sequence[dict], phrases: Mapping[int, str]) -> np.ndarray:
    """The image with the boxes of its detections, each with a label on a field of its phrase's colour.

    A label stands above its box where there is room, else in it, and below the labels that it would cover.
    """
    drawn = Image.fromarray(sheets.as_picture(image))
    factor = max(1, -(-SMALLEST // max(drawn.size)))
    drawn = ImageOps.scale(drawn, factor)
    pen, side, fields = ImageDraw.Draw(drawn), max(drawn.size), []
    font = ImageFont.load_default(size=max(13, side // 45))
    boxes = [[factor * value for value in row["bbox"]] for row in rows]
    for (x, y, w, h), row in zip(boxes, rows, strict=True):
        pen.rectangle((x, y, x + w, y + h), outline=colour(row["category_id"]), width=max(2, side // 300))
    for (x, y, _, _), row in zip(boxes, rows, strict=True):
        label = f"{row['words'] or phrases[row['category_id']]} {row['score']:.2f}"
        width, height = (extent + 8 for extent in pen.textbbox((0, 0), label, font=font, anchor="lt")[2:])
        left = max(min(x, drawn.width - width), 0)
        top = y - height if y >= height else max(y, 0)
        beside = [field for field in fields if left < field[2] and field[0] < left + width]
        while covered := [field[3] for field in beside if top < field[3] and field[1] < top + height]:
            top = max(covered) + 1
        fields.append((left, top, left + width, top + height))
        pen.rectangle(fields[-1], fill=colour(row["category_id"]))
        pen.text((left + width / 2, top + height / 2), label, fill="black", font=font, anchor="mm")
    return np.array(drawn)


def colour(k: int) -> tuple[int, int, int]:
    """Bright colours that differ for neighbouring numbers: hues by the golden ratio."""
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb((0.61803 * k) % 1, 0.6, 1))
