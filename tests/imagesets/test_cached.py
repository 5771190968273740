"""Images decoded once give the same crops, bit for bit; memory that isn't there is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from imagesets import cached as caching
from imagesets import loaders
from imagesets.decode import Undecodable
from imagesets.sources import open_images
from parallel import Refused


@pytest.fixture
def folder(tmp_path):
    """Six JPEG files of several sizes, one of which is decoded at half its size, one grey PNG, one damaged file."""
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    for i, (h, w) in enumerate([(40, 60), (33, 47), (120, 90), (260, 300), (50, 50), (64, 31)]):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(folder / f"{i}.jpg")
    Image.fromarray(rng.integers(0, 256, (30, 30), np.uint8)).save(folder / "6.png")
    (folder / "7.jpg").write_bytes(b"no image")
    return folder


AUGMENTATION = utils.DataAugmentationDINO((0.4, 1.0), (0.1, 0.4), 2, 32, 16)


def batches(images, workers, early):
    return list(loaders.batches(images, AUGMENTATION, 2, workers, seed=3, last_batch=8, early=early))


@pytest.mark.parametrize("early", [None, loaders.Early(1, AUGMENTATION.resized(16, 8))])
def test_crops_are_those_without_a_cache(folder, tmp_path, monkeypatch, capsys, early):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    images = open_images(folder)
    cache = caching.cached(images, AUGMENTATION.reduction, 0)
    assert "--cache_images: 8 decoded images" in capsys.readouterr().out
    assert cache.load(3).shape == (3, 65, 75)  # reduced, as a loader would have decoded it
    for i in range(7):
        expected = images.load(i, AUGMENTATION.reduction)
        assert torch.equal(cache.load(i), expected) and cache.load(i).stride() == expected.stride()
    with pytest.raises(Undecodable, match="7.jpg"):
        cache.load(7)
    expected = batches(images, 0, early)
    for path in folder.iterdir():
        path.unlink()
    assert not list((tmp_path / "temporary").glob("decoded*"))  # the cache has no name, and needs none
    for batch, other in zip(batches(cache, 1, early), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch["crops"], other["crops"], strict=True))
        assert torch.equal(batch["params"], other["params"]) and batch["bad"] == other["bad"]
    assert any(batch["bad"] for batch in expected)


def test_workers_that_are_not_forked_map_the_file_again(folder):
    images = open_images(folder)
    cache = caching.Cached(images, *caching.write(images, None, 0))
    sent = pickle.dumps(cache)
    assert len(sent) < sum(images.load(i).numel() for i in range(7)) / 10
    assert torch.equal(pickle.loads(sent).load(2), images.load(2))
    Path(cache.path).unlink()


def test_more_than_is_free_is_refused(folder, monkeypatch):
    images = open_images(folder)
    monkeypatch.setattr(caching, "free_memory", lambda: 1000)
    with pytest.raises(Refused, match="--cache_images.*leave it out"):
        caching.cached(images, None, 0)
    assert caching.estimated_bytes(images, None) == pytest.approx(
        8 / 7 * sum(images.load(i).numel() for i in range(7)), abs=1)
