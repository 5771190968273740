"""Images of revisited Oxford and Paris: <data_path>/<dataset>/ holds jpg/*.jpg and gnd_<dataset>.pkl or .json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from imagesets.decode import Reading, Undecodable
from imagesets.ground_truth import GroundTruth, read_ground_truth
from imagesets.sources import Images, open_files
from parallel import Refused


class Cropped:
    """A set of images, each cropped to a box (left, top, right, bottom) in pixels, rounded; None keeps all of it."""

    labels, classes = None, []

    def __init__(self, images: Images, boxes: Sequence[tuple | None]) -> None:
        self.images, self.boxes = images, list(boxes)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return self.images.name(i)

    def load(self, i: int) -> Tensor:
        """uint8 (C, H, W). Raises Undecodable where the box lies outside the image."""
        image = self.images.load(i)
        if self.boxes[i] is None:
            return image
        left, top, right, bottom = (max(0, round(side)) for side in self.boxes[i])
        image = image[:, top:bottom, left:right]
        if 0 in image.shape:
            raise Undecodable(f"{self.name(i)}: the query's box {self.boxes[i]} lies outside the image")
        return image


def open_landmarks(
    data_path: str, dataset: str, reading: Reading, crop_queries: bool = True
) -> tuple[GroundTruth, Cropped, Cropped]:
    """Ground truth, database images and queries, which are cropped to their boxes or left whole.

    Raises:
        Refused: no ground truth, or images of it are missing.
    """
    folder = Path(data_path).expanduser() / dataset
    candidates = [folder / f"gnd_{dataset}.{suffix}" for suffix in ("pkl", "json")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise Refused(f"--data_path {data_path} --dataset {dataset}: no {candidates[0]} or .json; give the folder that "
                      "holds the data set's folder")
    truth = read_ground_truth(path)

    def open_images(names: Sequence[str], boxes: Sequence[tuple | None]) -> Cropped:
        absent = [name for name in names if not (folder / "jpg" / f"{name}.jpg").is_file()]
        if absent:
            raise Refused(f"--data_path {data_path}: {len(absent)} image(s) of {path.name} are missing, the first is "
                          f"{folder / 'jpg' / absent[0]}.jpg; put them there")
        return Cropped(open_files(folder / "jpg", [f"{name}.jpg" for name in names], reading), boxes)

    database = open_images(truth.database, [None] * len(truth.database))
    return truth, database, open_images(
        [q.name for q in truth.queries], [q.box if crop_queries else None for q in truth.queries])
