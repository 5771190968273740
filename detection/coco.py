"""Images with boxes: files in COCO format, and drawn scenes.

A box is (x1, y1, x2, y2) in pixels, x2 and y2 exclusive; in a file it is [x, y, width, height].
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from detection import prompts
from imagesets import decode, scenes
from imagesets.kinds import KINDS
from parallel import Refused

SCENES = re.compile(r"scenes:([0-9]+)(?:x([0-9]+))?")
VAL_START = 1_000_000_000  # scenes from here on are for evaluation
PIXEL = 1.0  # boxes may reach as far beyond the image, rounded as some tools do; they are clipped


class Truth(NamedTuple):
    """The objects of an image."""

    boxes: Tensor  # float32 (n, 4)
    classes: Tensor  # int64 (n,), indices of phrases
    crowd: Tensor  # bool (n,): a group, which is not trained on, and detections in it count neither way


class Objects(Protocol):
    """A set of images with objects, each of which one of the phrases names."""

    name: str
    phrases: list[str]
    category_ids: list[int]  # of the phrases
    image_ids: list[int]

    def __len__(self) -> int: ...
    def load(self, i: int) -> Tensor: ...  # uint8 (3, H, W)
    def truth(self, i: int) -> Truth: ...
    def size(self, i: int) -> tuple[int, int]: ...  # H, W


def open_objects(
    path: str, images: str, flag: str, skip_bad: bool = False, max_pixels: int = decode.MAX_PIXELS
) -> Objects:
    """Open a COCO file, or `scenes:COUNT[xPIXELS]`.

    Args:
        images: folder of the COCO file's images; "": the file's folder, or the folder `images` in it.
        flag: --train or --eval. Scenes of --train leave out the pairs of kind and colour that `held_out` names.
        skip_bad: leave out boxes that can't be used, instead of refusing them.
        max_pixels: larger images can't be decoded.

    Raises:
        Refused: there is no such file, or it can't be used.
    """
    if path.split(":")[0] == "scenes":
        return open_scenes(path, flag)
    return Coco(path, images, flag, skip_bad, max_pixels)


# ---- Drawn scenes ----


def open_scenes(path: str, flag: str) -> Scenes:
    match = SCENES.fullmatch(path)
    count, pixels = (int(match[1]), int(match[2] or 96)) if match else (0, 0)
    if not 1 <= count <= VAL_START or not 32 <= pixels <= 4096:
        raise Refused(f"{flag} {path}: give scenes:COUNT or scenes:COUNTxPIXELS, as in scenes:2000x96, of 32 pixels or "
                      "more")
    return Scenes(path, count, pixels, training=flag == "--train")


def held_out(kind: int, colour: str) -> bool:
    """Whether training scenes leave a pair out: every fifth, so that each kind and each colour occurs without it."""
    return (kind + list(scenes.COLOURS).index(colour)) % 5 == 0


class Scenes:
    """Scenes of `scenes.draw`, whose objects are named by kind and colour. A drawn scene is kept."""

    def __init__(self, name: str, count: int, pixels: int, training: bool) -> None:
        self.name, self.pixels, self.start = name, pixels, 0 if training else VAL_START
        self.pairs = [(kind, colour) for kind in range(len(KINDS)) for colour in scenes.COLOURS
                      if not (training and held_out(kind, colour))]
        self.phrases = [f"{colour} {KINDS[kind]}" for kind, colour in self.pairs]
        self.category_ids, self.image_ids = list(range(1, len(self.pairs) + 1)), list(range(1, count + 1))
        self.drawn: dict[int, tuple[Tensor, Truth]] = {}

    def __len__(self) -> int:
        return len(self.image_ids)

    def draw(self, i: int) -> tuple[Tensor, Truth]:
        if i not in self.drawn:
            scene = scenes.draw(self.start + i, self.pixels, pairs=self.pairs)
            classes = [self.phrases.index(thing.phrase) for thing in scene.objects]
            self.drawn[i] = torch.from_numpy(scene.image).permute(2, 0, 1), as_truth(
                [thing.box for thing in scene.objects], classes)
        return self.drawn[i]

    def load(self, i: int) -> Tensor:
        return self.draw(i)[0]

    def truth(self, i: int) -> Truth:
        return self.draw(i)[1]

    def size(self, i: int) -> tuple[int, int]:
        return self.pixels, self.pixels


def as_truth(boxes: Sequence, classes: Sequence[int], crowd: Sequence[bool] | None = None) -> Truth:
    return Truth(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(classes, dtype=torch.int64),
                 torch.tensor(crowd or [False] * len(classes), dtype=torch.bool))


# ---- Files ----


class Coco:
    """A file in COCO format, checked; images are decoded when they are asked for."""

    def __init__(self, path: str, images: str, flag: str, skip_bad: bool, max_pixels: int) -> None:
        self.name, self.flag, self.max_pixels = path, flag, max_pixels
        content = read(path, flag)
        self.category_ids, self.phrases = categories(content, self.where)
        self.images = content["images"]
        self.image_ids = [image["id"] for image in self.images]
        self.folder = images or default_folder(path, self.images[0]["file_name"])
        self.truths = truths(content, self.category_ids, self.where, skip_bad)
        for image in self.images:
            if not os.path.isfile(os.path.join(self.folder, image["file_name"])):
                raise Refused(f"{self.where}: no image {image['file_name']} in {self.folder}; give the images' folder "
                              f"with {flag}_images")

    @property
    def where(self) -> str:
        return f"{self.flag} {self.name}"

    def __len__(self) -> int:
        return len(self.images)

    def load(self, i: int) -> Tensor:
        try:
            pixels = decode.decode(os.path.join(self.folder, self.images[i]["file_name"]), max_pixels=self.max_pixels)
        except decode.Undecodable as error:
            raise Refused(f"{self.where}: {error}; repair the image or take it out of the file") from error
        if tuple(pixels.shape[1:]) != self.size(i):
            raise Refused(f"{self.where}: {self.images[i]['file_name']} has {pixels.shape[2]} x {pixels.shape[1]} "
                          f"pixels, the file says {self.size(i)[1]} x {self.size(i)[0]}; correct the file")
        return pixels

    def truth(self, i: int) -> Truth:
        return self.truths[i]

    def size(self, i: int) -> tuple[int, int]:
        return self.images[i]["height"], self.images[i]["width"]


FIELDS = {"images": ("id", "file_name", "height", "width"), "annotations": ("image_id", "category_id", "bbox"),
          "categories": ("id", "name")}


def read(path: str, flag: str) -> dict:
    """The content of a COCO file with all fields that are needed."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise Refused(f"{flag} {path}: {reason}; give a file in COCO format, or scenes:COUNTxPIXELS") from error
    for name, fields in FIELDS.items():
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= set(fields) for row in rows):
            raise Refused(f"{flag} {path}: not in COCO format: {name} must be a list of entries with "
                          f"{', '.join(fields)}")
    for name in ("images", "categories"):
        if not content[name]:
            raise Refused(f"{flag} {path}: it has no {name}; add some")
        if repeated := [k for k, n in Counter(row["id"] for row in content[name]).items() if n > 1]:
            raise Refused(f"{flag} {path}: id {repeated[0]} occurs twice among its {name}; give each its own")
    if repeated := [k for k, n in Counter(str(row["file_name"]) for row in content["images"]).items() if n > 1]:
        raise Refused(f"{flag} {path}: two of its images have the file_name {repeated[0]}; give their annotations one "
                      "image_id and remove the other")
    return content


def categories(content: Mapping, where: str) -> tuple[list[int], list[str]]:
    """Ids and phrases."""
    phrases = [prompts.clean(str(row["name"])) for row in content["categories"]]
    for i, phrase in enumerate(phrases):
        if not phrase:
            raise Refused(f"{where}: category {content['categories'][i]['name']!r} has no words; rename it")
        if phrase in phrases[:i]:
            raise Refused(f"{where}: category {phrase!r} occurs twice; merge the two or rename one")
    return [row["id"] for row in content["categories"]], phrases


def default_folder(path: str, name: str) -> str:
    """The file's folder, or the folder `images` in it if the first image is there."""
    folder = os.path.dirname(path) or "."
    inner = os.path.join(folder, "images")
    return inner if os.path.isfile(os.path.join(inner, name)) else folder


def truths(content: Mapping, category_ids: Sequence[int], where: str, skip_bad: bool) -> list[Truth]:
    """The objects of each image.

    Raises:
        Refused: annotations of an image or a category that the file lacks; unless `skip_bad`, boxes without area or
            outside of their image.
    """
    rows = {image["id"]: ([], [], []) for image in content["images"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    numbers = {category: i for i, category in enumerate(category_ids)}
    for number, row in enumerate(content["annotations"]):
        name = f"{where}: annotation {row.get('id', f'number {number + 1}')}"
        if row["image_id"] not in rows:
            raise Refused(f"{name} is of image {row['image_id']}, which the file lacks; add the image or remove it")
        if row["category_id"] not in numbers:
            raise Refused(f"{name} has category {row['category_id']}, which the file lacks; add it to its categories")
        box, reason = checked_box(row["bbox"], *sizes[row["image_id"]])
        if reason and not skip_bad:
            raise Refused(f"{name} has the box {row['bbox']}: {reason}; correct it, or give --skip_bad_boxes")
        if not reason:
            boxes, classes, crowd = rows[row["image_id"]]
            boxes.append(box)
            classes.append(numbers[row["category_id"]])
            crowd.append(bool(row.get("iscrowd", 0)))
    return [as_truth(*row) for row in rows.values()]


def checked_box(box: object, width: float, height: float) -> tuple[list[float], str]:
    """The corners, clipped to the image, and what is wrong with the box, or ""."""
    try:
        x, y, w, h = (float(value) for value in box)
    except (TypeError, ValueError):
        return [], "not four numbers [x, y, width, height]"
    if not (w > 0 and h > 0):
        return [], "it has no area"
    corners = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
    if max(abs(a - b) for a, b in zip(corners, (x, y, x + w, y + h), strict=True)) > PIXEL:
        return [], f"it reaches outside of the {width} x {height} image"
    return corners, "" if corners[0] < corners[2] and corners[1] < corners[3] else "it has no area in the image"
