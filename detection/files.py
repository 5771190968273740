"""What detect.py reads and writes when it detects: images and videos; drawn boxes and results in COCO format."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

import atomic
from detection import coco, drawing, inference, scores
from imagesets import decode, sources
from parallel import Refused
from protocols import attention_video, sheets

VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}


class Item(NamedTuple):
    """An image, or a frame of a video."""

    name: str  # its path; of a frame video#frame-0000
    image: Tensor  # uint8 (3, H, W)
    video: str  # "" for an image
    fps: float


def open_items(
    paths: Sequence[str], flag: str = "--images", max_pixels: int = decode.MAX_PIXELS
) -> Iterator[Item]:
    """Images of files and folders, frames of videos, and drawn scenes, decoded when they are asked for.

    Raises:
        Refused: a path that doesn't exist or holds no images (at once), or an image that can't be decoded.
    """
    opened, reading = [], decode.Reading(max_pixels=max_pixels)
    for path in paths:
        if Path(path).suffix.lower() in VIDEOS:
            frames, _, fps = attention_video.open_video(path, None, reading, flag)
            opened.append((path, frames, fps))
        elif path.split(":")[0] == "scenes":
            opened.append(("", Drawn(coco.open_scenes(path, flag)), 0.0))
        elif Path(path).is_file() and Path(path).suffix.lower() not in (".txt", ".csv", ".zip", ".tar", ".parquet"):
            opened.append(("", sources.open_files(Path(path).parent, [Path(path).name], reading), 0.0))
        else:
            opened.append(("", sources.open_images(path, max_pixels=max_pixels, flag=flag), 0.0))
    return items(opened, flag)


class Drawn:
    """The scenes of an evaluation as images without boxes."""

    def __init__(self, objects: coco.Scenes) -> None:
        self.load, self.count = objects.load, len(objects)

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"scene{i:04}"


def items(opened: Sequence[tuple], flag: str) -> Iterator[Item]:
    for video, frames, fps in opened:
        if video:
            yield from (Item(f"{video}#{name}", frame, video, fps) for name, frame in frames)
            continue
        for i in range(len(frames)):
            try:
                yield Item(frames.name(i), frames.load(i), "", 0.0)
            except decode.Undecodable as error:
                raise Refused(f"{flag} {error}; repair the image or take it out") from error


class Results:
    """Detections on disk: NAME.png of each image and NAME.mp4 of each video with boxes; when it ends, detections.json
    (COCO's result format) and detections_images.json (the images and categories that its ids stand for)."""

    def __init__(self, folder: Path, phrases: Sequence[str], draw: bool) -> None:
        self.folder, self.phrases, self.draw = folder, list(phrases), draw
        self.images: list[dict] = []
        self.results: list[dict] = []
        self.names: set[str] = set()
        self.video, self.write = "", None
        self.open = contextlib.ExitStack()

    def add(self, item: Item, found: inference.Found) -> None:
        height, width = item.image.shape[1:]
        self.images.append({"id": len(self.images) + 1, "file_name": item.name, "height": height, "width": width})
        ids = [image["id"] for image in self.images]
        self.results += scores.coco_results(len(ids) - 1, found._asdict(), ids, range(1, len(self.phrases) + 1))
        if not self.draw:
            return
        labels = [f"{word or self.phrases[k]} {score:.2f}" for word, k, score in
                  zip(found.words, found.classes.tolist(), found.scores.tolist(), strict=True)]
        figure = drawing.draw_boxes(sheets.as_picture(item.image), found.boxes.tolist(), found.classes.tolist(), labels)
        if item.video != self.video:
            self.open.close()
            self.video = item.video
            self.write = self.start_video(item, figure) if item.video else None
        if self.write:
            self.write(figure)
        else:
            sheets.save_picture(figure, self.folder / self.unused(item.name, ".png"))

    def start_video(self, item: Item, figure: np.ndarray) -> Callable[[np.ndarray], None]:
        target = self.folder / self.unused(item.video, ".mp4")
        return self.open.enter_context(attention_video.writing(target, figure, item.fps))

    def unused(self, name: str, suffix: str) -> str:
        """A file name that none of the others has."""
        stem, number = Path(name).stem, 1
        while (unused := f"{stem}{f'_{number}' * (number > 1)}{suffix}") in self.names:
            number += 1
        self.names.add(unused)
        return unused

    def close(self) -> None:
        """End a video and write the JSON files."""
        self.open.close()
        categories = [{"id": k, "name": phrase} for k, phrase in enumerate(self.phrases, 1)]
        atomic.write_text(self.folder / "detections_images.json",
                          json.dumps({"images": self.images, "categories": categories}, indent=1))
        atomic.write_text(self.folder / "detections.json", json.dumps(self.results, indent=1))
