"""Scenes: what is listed agrees with what is painted."""

import numpy as np
import pytest

from imagesets import scenes
from imagesets.kinds import KINDS


def test_boxes_depth_and_owners_agree():
    for index in range(40):
        scene = scenes.draw(index, 64)
        assert scene.image.shape == (64, 64, 3) and scene.image.dtype == np.uint8
        assert scene.depth.dtype == np.float32 and 0 < scene.depth.min() and scene.depth.max() <= scenes.SKY
        distances = [thing.depth for thing in scene.objects]
        assert distances == sorted(distances, reverse=True)
        assert set(np.unique(scene.owner)) <= set(range(-1, len(scene.objects)))
        for i, thing in enumerate(scene.objects):
            rows, columns = np.nonzero(scene.owner == i)
            assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.allclose(scene.depth[scene.owner == i], thing.depth)
            assert scenes.NEAR <= thing.depth <= scenes.FAR


def test_the_nearer_object_is_in_front_and_larger():
    areas = {"near": [], "far": []}
    for index in range(200):
        scene = scenes.draw(index, 64, count=(1, 1))
        for i, thing in enumerate(scene.objects):
            areas["near" if thing.depth < 2.5 else "far"].append((scene.owner == i).mean())
    assert np.mean(areas["near"]) > 2 * np.mean(areas["far"])


def test_the_scene_is_the_same_at_every_size():
    for index in range(10):
        large, small = scenes.draw(index, 192), scenes.draw(index, 64)
        shrunk = large.image.reshape(64, 3, 64, 3, 3).mean((1, 3))
        assert np.abs(shrunk - small.image).mean() < 6  # of 255
        assert [thing.phrase for thing in small.objects if thing.depth < 3] == \
            [thing.phrase for thing in large.objects if thing.depth < 3]


def test_only_the_given_pairs_occur_and_all_do():
    pairs = [(0, "red"), (3, "blue"), (9, "black")]
    phrases = [thing.phrase for index in range(60) for thing in scenes.draw(index, 64, pairs=pairs).objects]
    assert set(phrases) == {f"{colour} {KINDS[kind]}" for kind, colour in pairs}
    everything = {thing.phrase for index in range(600) for thing in scenes.draw(index, 32).objects}
    assert len(everything) > 95


def test_counts_and_bad_arguments():
    assert all(1 <= len(scenes.draw(index, 96, count=(3, 3)).objects) <= 3 for index in range(20))
    for arguments in ({"index": -1}, {"index": 0, "size": 8}, {"index": 0, "count": (2, 1)}, {"index": 0, "pairs": []}):
        with pytest.raises(ValueError, match="scenes"):
            scenes.draw(**arguments)
