"""Images with boxes: drawn scenes, files in COCO format, and what is refused of them."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

import detect
from detection import coco, files
from imagesets import scenes
from imagesets.decode import Undecodable
from parallel import Refused

CONTENT = {
    "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 30},
               {"id": 9, "file_name": "b.png", "width": 20, "height": 20}],
    "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 5, 20, 10], "iscrowd": 0},
                    {"id": 2, "image_id": 7, "category_id": 5, "bbox": [-0.5, 0, 5, 5], "iscrowd": 1}],
    "categories": [{"id": 3, "name": "Fish"}, {"id": 5, "name": "cup"}],
}


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.full((30, 40, 3), 9, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "b.png")
    return tmp_path


def write(folder, content) -> str:
    (folder / "data.json").write_text(json.dumps(content))
    return str(folder / "data.json")


def test_a_file(folder):
    objects = coco.open_objects(write(folder, CONTENT), "", "--train")
    assert objects.phrases == {3: "fish", 5: "cup"} and [image["id"] for image in objects.images] == [7, 9]
    assert [[row["bbox"] for row in rows] for rows in objects.rows] == [[[10, 5, 20, 10], [-0.5, 0, 5, 5]], []]
    assert [(row["iscrowd"], row["area"]) for row in objects.rows[0]] == [(0, 200), (1, 25)]
    assert objects.load(0).shape == (3, 30, 40) and len(objects) == 2
    (folder / "elsewhere").mkdir()
    with pytest.raises(Refused, match="no image .*elsewhere/a.png; give .* --train_images"):
        coco.open_objects(write(folder, CONTENT), str(folder / "elsewhere"), "--train")


def test_null_is_nothing(folder):
    content = copy.deepcopy(CONTENT)
    content["annotations"][0] |= {"iscrowd": None, "area": None}
    (row, _), _ = coco.open_objects(write(folder, content), "", "--train").rows
    assert (row["iscrowd"], row["area"]) == (0, 200)


def change(path: str, value):
    """A change of CONTENT: "annotations.0.bbox" -> value."""
    def apply(content):
        *keys, last = [int(k) if k.isdecimal() else k for k in path.split(".")]
        place = content
        for key in keys:
            place = place[key]
        place[last] = value
    return apply


@pytest.mark.parametrize("edit, words", [
    (change("annotations.0.image_id", 8), ("annotation 1", "image_id 8", "remove")),
    (change("annotations.0.category_id", 4), ("annotation 1", "category_id 4", "add")),
    (change("annotations.0.bbox", [10, 5, 0, 10]), ("annotation 1", "[10, 5, 0, 10]", "no area", "--skip_bad_boxes")),
    (change("annotations.0.bbox", [30, 5, 20, 10]), ("annotation 1", "outside", "40 x 30", "--skip_bad_boxes")),
    (change("annotations.0.bbox", [60, 5, 2, 2]), ("annotation 1", "outside")),
    (change("annotations.0.bbox", [40.1, 5, 0.5, 2]), ("annotation 1", "outside")),  # all of it
    (change("annotations.0.bbox", [1, 2, 3]), ("annotation 1", "four numbers")),
    (change("annotations.0.bbox", [float("nan"), 0, 1, 1]), ("annotation 1",)),
    (change("images.0.width", None), ("number 1 of its images", "width None", "number")),
    (change("images.0.height", "30"), ("number 1 of its images", "height '30'")),
    (change("images.0.id", "7"), ("number 1 of its images", "id '7'")),
    (change("images.1.file_name", 5), ("number 2 of its images", "file_name 5")),
    (change("annotations.0.image_id", [7]), ("number 1 of its annotations", "image_id [7]")),
    (change("categories.1.name", "fish "), ("'fish'", "twice", "rename")),
    (change("categories.1.id", 3), ("id 3", "twice")),
    (change("categories.1.name", " . "), ("no words", "rename")),
    (change("images.1.id", 7), ("id 7", "twice")),
    (change("images.1.file_name", CONTENT["images"][0]["file_name"]), ("file_name", "a.png", "image_id")),
    (change("images.1.file_name", "c.png"), ("c.png", "--train_images")),
    (change("images", []), ("no images",)),
    (change("categories", {}), ("categories", "COCO")),
    (change("images.0", {"id": 7}), ("images", "COCO", "file_name")),
])
def test_bad_files_are_refused_in_one_line(folder, edit, words):
    content = copy.deepcopy(CONTENT)
    edit(content)
    with pytest.raises(Refused) as error:
        coco.open_objects(write(folder, content), "", "--train")
    assert all(word in str(error.value) for word in ("--train", "data.json", *words)), error.value


def test_bad_boxes_can_be_left_out(folder):
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["bbox"] = [10, 5, 0, 10]
    assert [len(rows) for rows in coco.open_objects(write(folder, content), "", "--train", True).rows] == [1, 0]


def test_images_above_the_limit_are_not_decoded_and_its_flag_is_named(folder):
    """In a COCO file and among images to search, and read where the flag is raised."""
    path = write(folder, CONTENT)
    for pixels in (100, 40 * 30):
        objects = coco.open_objects(path, "", "--train", max_pixels=pixels)
        frames = files.open_frames([str(folder / "a.png")], max_pixels=pixels)
        for read in (lambda objects=objects: objects.load(0), lambda frames=frames: next(frames).image):
            if pixels == 100:
                with pytest.raises(Undecodable, match="a.png: .*raise --max_pixels"):
                    read()
            else:
                assert read().shape == (3, 30, 40)
    assert detect.get_args_parser().parse_args(["--max_pixels", "7"]).max_pixels == 7


def test_an_image_of_another_size_is_not_used(folder):
    content = copy.deepcopy(CONTENT)
    content["images"][1]["width"] = 25
    with pytest.raises(Undecodable, match=r"b.png: it has \(20, 20\) pixels, the COCO file says \(20, 25\)"):
        coco.open_objects(write(folder, content), "", "--train").load(1)


@pytest.mark.parametrize("path", ["scenes", "scenes:0", "scenes:5x8", "scenes:x", "nowhere.json"])
def test_names_of_nothing_are_refused(path):
    with pytest.raises(Refused, match=f"--eval {path}.*give"):
        coco.open_objects(path, "", "--eval")


def test_training_scenes_lack_every_fifth_pair_and_no_kind_or_colour():
    train, test = (coco.open_objects("scenes:40x48", "", flag) for flag in ("--train", "--eval"))
    absent = set(test.phrases.values()) - set(train.phrases.values())
    assert len(test.phrases) == 100 and len(absent) == 20
    for place in (0, 1):
        words = [{phrase.split()[place] for phrase in objects.phrases.values()} for objects in (train, test)]
        assert words[0] == words[1] and len(words[0]) == 10
    shown = {test.phrases[row["category_id"]] for rows in test.rows for row in rows}
    assert shown & absent and not torch.equal(train.load(0), test.load(0))


def test_boxes_of_scenes_are_where_the_objects_are():
    objects = coco.open_objects("scenes:3x64", "", "--eval")
    pairs = [(kind, colour) for kind in range(10) for colour in scenes.COLOURS]
    for i, rows in enumerate(objects.rows):
        scene = scenes.draw(coco.VAL_START + i, 64, pairs=pairs)
        for thing, row in zip(range(len(scene.objects)), rows, strict=True):
            x, y, w, h = row["bbox"]
            assert (scene.owner[y : y + h, x : x + w] == thing).sum() == (scene.owner == thing).sum()
            assert objects.phrases[row["category_id"]] == scene.objects[thing].phrase
