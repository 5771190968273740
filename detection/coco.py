"""Images with boxes: files in COCO format, and drawn scenes in the same form. A box is [x, y, width, height]."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from detection import prompts
from imagesets import decode, scenes
from imagesets.kinds import KINDS
from imagesets.sources import VAL_START
from parallel import Refused
from protocols.progress import progress

PIXEL = 1.0  # boxes may reach as far beyond the image, rounded as some tools do
FIELDS = {"images": {"id", "file_name", "height", "width"}, "annotations": {"image_id", "category_id", "bbox"},
          "categories": {"id", "name"}}
NUMBERS = ("id", "image_id", "category_id", "height", "width")


class Objects:
    """Images with boxes, each of which one of the phrases names. `content` is in COCO format, its annotations with id,
    area and iscrowd; `rows` holds those of each image. `load(i)` decodes image i, uint8 (3, height, width)."""

    def __init__(self, name: str, content: Mapping, load: Callable[[int], Tensor]) -> None:
        self.name, self.content, self.images, self.load = name, content, content["images"], load
        self.phrases = {row["id"]: prompts.clean(str(row["name"])) for row in content["categories"]}
        rows = {image["id"]: [] for image in self.images}
        for row in content["annotations"]:
            rows[row["image_id"]].append(row)
        self.rows: list[list[dict]] = list(rows.values())

    def __len__(self) -> int:
        return len(self.images)


def open_objects(path: str, folder: str, flag: str, skip_bad: bool = False, max_pixels: int = decode.MAX_PIXELS
                 ) -> Objects:
    """Open a COCO file, or `scenes:COUNT[xPIXELS]`. Raises Refused: there is no such file, or it can't be used.

    Args:
        folder: of the file's images; "": the file's.
        flag: that names the file. Only scenes of --train leave out the pairs that `held_out` names.
        skip_bad: leave out boxes that can't be used, instead of refusing them.
        max_pixels: larger images can't be decoded.
    """
    if path.split(":")[0] == "scenes":
        return open_scenes(path, flag)
    content, where, folder = read(path, flag), f"{flag} {path}", folder or os.path.dirname(path)
    content["annotations"] = checked_annotations(content, where, skip_bad)
    objects = Objects(path, content, lambda i: load(folder, content["images"][i], max_pixels))
    for phrase, n in Counter(objects.phrases.values()).items():
        if n > 1 or not phrase:
            raise Refused(f"{where}: category {phrase!r} {'occurs twice' if phrase else 'has no words'}; rename it")
    for image in objects.images:
        if not os.path.isfile(name := os.path.join(folder, image["file_name"])):
            raise Refused(f"{where}: no image {name}; give the images' folder with {flag}_images")
    return objects


def held_out(kind: int, colour: str) -> bool:
    """Whether training scenes leave a pair out: every fifth, so that each kind and each colour occurs without it."""
    return (kind + list(scenes.COLOURS).index(colour)) % 5 == 0


def open_scenes(path: str, flag: str) -> Objects:
    match = re.fullmatch(r"scenes:([0-9]+)(?:x([0-9]+))?", path)
    count, pixels = (int(match[1]), int(match[2] or 96)) if match else (0, 0)
    if not 1 <= count <= VAL_START or not 32 <= pixels <= 4096:
        raise Refused(f"{flag} {path}: give scenes:COUNTxPIXELS, as in scenes:2000x96, of 32 pixels or more")
    training = flag == "--train"
    pairs = [(kind, colour) for kind in range(len(KINDS)) for colour in scenes.COLOURS
             if not (training and held_out(kind, colour))]
    ids = {f"{colour} {KINDS[kind]}": k for k, (kind, colour) in enumerate(pairs, 1)}
    images, annotations, drawn = [], [], []
    for i in progress(range(count), count, f"drawing {path}"):
        scene = scenes.draw(i + (0 if training else VAL_START), pixels, pairs=pairs)
        drawn.append(torch.from_numpy(scene.image).permute(2, 0, 1))
        images.append({"id": i + 1, "file_name": f"scene{i:04}.png", "height": pixels, "width": pixels})
        for thing in scene.objects:
            (x, y, *_), (w, h) = thing.box, (thing.box[2] - thing.box[0], thing.box[3] - thing.box[1])
            annotations.append({"id": len(annotations) + 1, "image_id": i + 1, "category_id": ids[thing.phrase],
                                "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
    categories = [{"id": k, "name": name} for name, k in ids.items()]
    return Objects(path, {"images": images, "annotations": annotations, "categories": categories}, drawn.__getitem__)


def read(path: str, flag: str) -> dict:
    """The content of a COCO file with all fields that are needed, whose ids are unique."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise Refused(f"{flag} {path}: {reason}; give a file in COCO format, or scenes:COUNTxPIXELS") from error
    for name, fields in FIELDS.items():
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= fields for row in rows):
            raise Refused(f"{flag} {path}: not in COCO format: give a list {name}, of entries with {sorted(fields)}")
        for n, row in enumerate(rows, 1):
            one = f"{flag} {path}: number {n} of its {name}"
            if wrong := [key for key in NUMBERS if key in fields and type(row[key]) not in (int, float)]:
                raise Refused(f"{one} has {wrong[0]} {row[wrong[0]]!r}; give a number")
            if not isinstance(row.get("file_name", ""), str):
                raise Refused(f"{one} has file_name {row['file_name']!r}; give a text")
        ids = Counter(row["id"] for row in rows) if "id" in fields else {"": 1}
        if not ids or max(ids.values()) > 1:
            reason = f"id {max(ids, key=ids.get)} occurs twice among its" if ids else "it has no"
            raise Refused(f"{flag} {path}: {reason} {name}; give each its own")
    if repeated := [k for k, n in Counter(str(row["file_name"]) for row in content["images"]).items() if n > 1]:
        raise Refused(f"{flag} {path}: two of its images have the file_name {repeated[0]}; give their annotations one "
                      "image_id and remove the other")
    return content


def checked_annotations(content: Mapping, where: str, skip_bad: bool) -> list[dict]:
    """The annotations with id, area and iscrowd. Raises Refused: their image or category is not in the file, or, unless
    `skip_bad`, boxes without area or outside of their image."""
    sizes, rows = {image["id"]: (image["width"], image["height"]) for image in content["images"]}, []
    known = {"image_id": sizes, "category_id": {row["id"] for row in content["categories"]}}
    for n, row in enumerate(content["annotations"], 1):
        name = f"{where}: annotation {row.get('id', f'number {n}')}"
        if unknown := [key for key, ids in known.items() if row[key] not in ids]:
            raise Refused(f"{name} has {unknown[0]} {row[unknown[0]]}, which the file lacks; add or remove it")
        if not (reason := why_bad(row["bbox"], *sizes[row["image_id"]])):
            rows.append({"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
                        | {key: value for key, value in row.items() if value is not None} | {"id": n})
        elif not skip_bad:
            raise Refused(f"{name} has the box {row['bbox']}: {reason}; correct it, or give --skip_bad_boxes")
    return rows


def why_bad(box: object, width: float, height: float) -> str:
    """What is wrong with a box, or ""."""
    try:
        x, y, w, h = (value + 0.0 for value in box)
    except (TypeError, ValueError):
        return "not four numbers [x, y, width, height]"
    if not (w > 0 and h > 0):
        return "it has no area"
    inside = min(x, y, width - x - w, height - y - h) >= -PIXEL and x < width and y < height and x + w > 0 and y + h > 0
    return "" if inside else f"it reaches outside of the {width} x {height} image"


def load(folder: str, image: Mapping, max_pixels: int) -> Tensor:
    """Raises Undecodable, also for an image of another size: its boxes would be elsewhere."""
    name, size = os.path.join(folder, image["file_name"]), (image["height"], image["width"])
    pixels = decode.decode(name, max_pixels=max_pixels)
    if pixels.shape[1:] != size:
        raise decode.Undecodable(f"{name}: it has {tuple(pixels.shape[1:])} pixels, the COCO file says {size}")
    return pixels
