"""The drawn images: what callers rely on, and what makes them a fair task for self-supervision."""

import numpy as np
import pytest
from PIL import Image

from imagesets import shapes


def downscale(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask at a smaller size: pixels at least half covered."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((size, size), Image.Resampling.BOX)) >= 128


@pytest.mark.parametrize("size", [8, 33, 64, 200])
def test_types_and_shapes(size):
    for index in range(10):
        image, label, mask = shapes.draw(index, size)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
        assert mask.shape == (size, size) and mask.dtype == bool and mask.any() and not mask.all()
        assert type(label) is int and 0 <= label < len(shapes.KINDS)


def test_kinds_are_ten_names_and_balanced():
    assert len(shapes.KINDS) == len(set(shapes.KINDS)) == 10
    labels = [shapes.draw(index, 8)[1] for index in range(37, 137)]
    assert np.bincount(labels).tolist() == [10] * 10


def test_an_image_is_a_function_of_its_index():
    # Whatever was drawn before, at whatever size, and whatever became of the arrays that were handed out.
    image, label, mask = shapes.draw(123, 48)
    kept = image.copy(), mask.copy()
    image[:], mask[:] = 0, False
    np.random.seed(0)
    shapes.draw(5, 48), shapes.draw(123, 96)
    again = shapes.draw(123, 48)
    assert np.array_equal(again[0], kept[0]) and again[1] == label and np.array_equal(again[2], kept[1])


def test_images_differ():
    images = np.stack([shapes.draw(index, 32)[0] for index in (*range(0, 200, 10), 10**6, 10**12)]).astype(int)
    distance = np.abs(images[:, None] - images[None]).mean((2, 3, 4))
    assert distance[~np.eye(len(images), dtype=bool)].min() > 5  # of 255, all of one kind


def test_masks_are_large_and_alike_for_all_kinds():
    shares = np.array([shapes.draw(index, 48)[2].mean() for index in range(500)])
    assert shares.min() > 0.05 and shares.max() < 0.7
    assert 0.2 < shares.mean() < 0.36
    of_kinds = shares.reshape(-1, 10).mean(0)
    assert of_kinds.max() - of_kinds.min() < 0.08


def test_same_scene_at_every_size():
    for index in range(40):
        large, small = shapes.draw(index, 192), shapes.draw(index, 64)
        expected = downscale(large[2], 64)
        assert (expected & small[2]).sum() / (expected | small[2]).sum() > 0.93
        shrunk = np.asarray(Image.fromarray(large[0]).resize((64, 64), Image.Resampling.BOX)).astype(float)
        assert np.abs(shrunk - small[0]).mean() < 6  # of 255


def test_mask_is_where_the_object_was_painted():
    for kind in shapes.TABLE.values():
        canvas = np.full((3, 64, 64), 0.5)
        rng = np.random.Generator(np.random.PCG64(7))
        mask = shapes.paint_object(rng, kind, canvas, shapes.place(rng, kind), shapes.colours(rng, kind.palette))
        change = np.abs(canvas - 0.5).mean(0)
        assert (change[mask] > 0.02).mean() > 0.95
        assert (change[~mask] > 0.02).mean() < 0.5  # edges and the shadow
        assert canvas[:, ~mask].max() < 1 and canvas[:, ~mask].mean() < 0.51  # a shadow only darkens


def test_noise_has_the_same_waves_at_every_size():
    small, large = (shapes.noise(np.random.Generator(np.random.PCG64(1)), size, 8, 1)[0] for size in (32, 128))
    assert np.abs(large.reshape(32, 4, 32, 4).mean((1, 3)) - small).max() < 0.1


def test_raw_pixels_do_not_tell_the_class():
    def features(indices: range) -> np.ndarray:
        rows = np.stack([shapes.draw(index, 32)[0].ravel() for index in indices]).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    train, test = features(range(1500)), features(range(10**6, 10**6 + 400))
    nearest = np.argsort(-(test @ train.T), axis=1)[:, :20] % 10
    predicted = [np.bincount(row, minlength=10).argmax() for row in nearest]
    assert np.mean(predicted == np.arange(400) % 10) < 0.4


def test_bad_arguments():
    with pytest.raises(ValueError, match="no image -1"):
        shapes.draw(-1, 64)
    with pytest.raises(ValueError, match="7 pixels"):
        shapes.draw(0, 7)


@pytest.mark.parametrize("name", shapes.KINDS)
def test_table_says_the_truth_about_a_shape(name):
    kind = shapes.TABLE[name]
    side = np.linspace(-2, 2, 200)
    x, y = np.meshgrid(side, side)
    areas = []
    for proportions in np.random.default_rng(0).random((80, 8)):
        inside = np.minimum.reduce([part for part, _ in kind.shape(x, y, proportions)]) < 0
        assert np.hypot(x, y)[inside].max() <= shapes.REACH
        areas.append(inside.mean() * 16)
    assert np.mean(areas) == pytest.approx(kind.extent, rel=0.07)
