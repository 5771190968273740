"""The layouts of sets with depth, on small trees with the published names and encodings."""

import pickle

import numpy as np
import pytest
from PIL import Image

from imagesets import scenes, sources
from imagesets.class_masks import open_class_masks
from imagesets.decode import Undecodable
from imagesets.depth_maps import Limits, open_depth_maps
from parallel import Refused


def image(path, height=6, width=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 0, 0)).save(path)


def stripes(*values, height=6, width=8, dtype=np.uint16):
    """A map whose columns repeat the values."""
    return np.resize(np.array(values, dtype), width)[None].repeat(height, 0)


def depth(path, *values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, stripes(*values, dtype=options.pop("dtype", np.float32), **options))
    else:
        Image.fromarray(stripes(*values, **options)).save(path)


def plain(root, train=((0, 1000, 2500),), val=((0, 4000, 700),), suffix=".png"):
    for part, rows in (("train", train), ("val", val)):
        for i, values in enumerate(rows):
            image(root / part / "images" / f"{i}.jpg")
            depth(root / part / "depth" / f"{i}{suffix}", *values)
    return str(root)


def test_folders_of_integers(tmp_path):
    """Millimetres, unless a scale is given; 0 is no depth; the training images tell the largest depth, 2.5 m."""
    train, val = open_depth_maps(plain(tmp_path))
    pixels, metres = train.load(0)
    assert pixels.shape == (3, 6, 8) and metres.dtype == np.float32
    assert metres == pytest.approx(stripes(0, 1, 2.5, dtype=np.float64))
    assert train.limits == val.limits == Limits(1000, 0.001, 2.51)
    assert val.load(0)[1] == pytest.approx(stripes(0, 0, 0.7, dtype=np.float64))  # 4 m is beyond
    train, val = open_depth_maps(str(tmp_path), limits=Limits(500, 1.5, 10))
    assert train.load(0)[1] == pytest.approx(stripes(0, 2, 5, dtype=np.float64))
    assert val.load(0)[1] == pytest.approx(stripes(0, 8, 0, dtype=np.float64))  # 1.4 m is too near


def test_folders_of_floats(tmp_path):
    """Metres whatever the scale; what isn't finite is no depth."""
    plain(tmp_path, [(np.nan, 1.5, np.inf, 3)], [(0, 2.0)], ".npy")
    train, val = open_depth_maps(str(tmp_path), limits=Limits(500))
    assert train.load(0)[1] == pytest.approx(stripes(0, 1.5, 0, 3, dtype=np.float64))
    parts = open_depth_maps(str(tmp_path / "train"))
    assert len(parts) == 1 and parts[0].size(parts[0].items[0]) == (6, 8)
    other = open_depth_maps(str(tmp_path / "train"), str(tmp_path / "val"))
    assert [part.limits.largest for part in other] == [3.01, 3.01]


def test_marks_of_pixels_without_depth(tmp_path):
    """What float32 can't hold is infinite; a mark that it can hold is no largest depth, unless that is given."""
    plain(tmp_path, [(1.5, 3)], [(2.0,)], ".npy")
    depth(tmp_path / "train" / "depth" / "0.npy", 1e39, 1.5, -1e300, 3, dtype=np.float64)
    train = open_depth_maps(str(tmp_path))[0]
    assert train.limits.largest == 3.01 and train.load(0)[1] == pytest.approx(stripes(0, 1.5, 0, 3, dtype=np.float64))
    for mark in (1e30, 1e10, 65504):
        depth(tmp_path / "train" / "depth" / "0.npy", mark, 1.5)
        with pytest.raises(Refused, match=r"0.npy: a depth of .* m; store 0.*--max_depth"):
            open_depth_maps(str(tmp_path))
        limited = open_depth_maps(str(tmp_path), limits=Limits(largest=10))[0]
        assert limited.load(0)[1] == pytest.approx(stripes(0, 1.5, dtype=np.float64))


def test_nyu_depth(tmp_path):
    """By the lists, whose paths may start with a slash, and by the folders; up to 10 m, without 10 m itself."""
    for part, scene in (("sync", "basement_0001a"), ("official_splits/test", "bathroom")):
        for number in ("00000", "00045"):
            image(tmp_path / part / scene / f"rgb_{number}.jpg")
            depth(tmp_path / part / scene / f"sync_depth_{number}.png", 0, 1234, 9999, 10000)
    train, test = open_depth_maps(str(tmp_path))
    assert [len(part.items) for part in (train, test)] == [2, 2] and train.limits == Limits(1000, 0.001, 10)
    assert test.load(1)[1] == pytest.approx(stripes(0, 1.234, 9.999, 0, dtype=np.float64))
    place = "sync/basement_0001a"
    (tmp_path / "nyu_train.txt").write_text(f"/{place}/rgb_00045.jpg /{place}/sync_depth_00045.png 518.8579\n")
    with pytest.raises(Refused, match="no list .*nyu_test.txt; add it"):
        open_depth_maps(str(tmp_path))
    (tmp_path / "nyu_test.txt").write_text(
        f"{place}/rgb_00000.jpg None 518.8579\n{place}/rgb_00045.jpg {place}/sync_depth_00045.png 518.8579\n")
    assert [[pair[0].name for pair in part.items] for part in open_depth_maps(str(tmp_path))] == [["rgb_00045.jpg"]] * 2
    (tmp_path / place / "sync_depth_00045.png").unlink()
    with pytest.raises(Refused, match="nyu_train.txt lists .*sync_depth_00045.png"):
        open_depth_maps(str(tmp_path))


def test_kitti(tmp_path):
    """The raw data by date and drive, the annotated depth in train/ and val/; 256 per metre, up to 80 m."""
    for part, drive in (("train", "2011_09_26_drive_0001_sync"), ("val", "2011_09_28_drive_0002_sync")):
        for camera in ("image_02", "image_03"):
            for number in range(5, 8):
                image(tmp_path / drive[:10] / drive / camera / "data" / f"{number:010}.png")
                if number > 5:  # the first frames have no annotation
                    depth(tmp_path / part / drive / "proj_depth" / "groundtruth" / camera / f"{number:010}.png",
                          0, 256, 10240, 20992)
    train, val = open_depth_maps(str(tmp_path))
    assert [len(part.items) for part in (train, val)] == [4, 4] and val.limits == Limits(256, 0.001, 80)
    assert train.load(3)[1] == pytest.approx(stripes(0, 1, 40, 0, dtype=np.float64))
    drive = "2011_09_28_drive_0002_sync"
    line = (f"2011_09_28/{drive}/image_02/data/0000000007.png "
            f"{drive}/proj_depth/groundtruth/image_02/0000000007.png 721.5377\n")
    for part in ("train", "test"):
        (tmp_path / f"kitti_eigen_{part}.txt").write_text(line)
    assert [[image.name for image, _ in part.items] for part in open_depth_maps(str(tmp_path))] == [
        ["0000000007.png"]] * 2
    (tmp_path / "2011_09_28" / drive / "image_02" / "data" / "0000000007.png").unlink()
    with pytest.raises(Refused, match="kitti_eigen_train.txt lists .*0000000007.png"):
        open_depth_maps(str(tmp_path))
    for part in ("train", "test"):
        (tmp_path / f"kitti_eigen_{part}.txt").unlink()
    with pytest.raises(Refused, match="0000000007.png has no image .*unpack that drive"):
        open_depth_maps(str(tmp_path))


def test_drawn_scenes():
    """Two disjoint parts, pixels and depth of the same scene, no depth in the sky; classes are the objects' kinds."""
    train, val = open_depth_maps("scenes:8x32")
    assert [len(part.items) for part in (train, val)] == [8, 2]
    scene = scenes.draw(sources.VAL_START + 1, 32)
    pixels, metres = val.load(1)
    assert (pixels.permute(1, 2, 0).numpy() == scene.image).all()
    assert (metres == np.where(scene.depth < 10, scene.depth, 0)).all() and (metres == 0).any()
    pickle.loads(pickle.dumps(val))  # as workers that are spawned get it
    classes = open_class_masks("scenes:8x32")[1].load(1)[1]
    for i, thing in enumerate(scene.objects):
        assert (classes[scene.owner == i] == thing.kind + 1).all()
    assert not classes[scene.owner == -1].any()


def test_scenes_are_images_without_labels():
    images = sources.open_images("scenes:12x32", "val")
    assert len(images) == 3 and images.labels is None and images.classes == []
    assert images.name(2) == f"scenes[{sources.VAL_START + 2}]"
    assert (images.load(2).permute(1, 2, 0).numpy() == scenes.draw(sources.VAL_START + 2, 32).image).all()
    with pytest.raises(Refused, match="--data_path 'scenes:9x8': give scenes:COUNT.*16 pixels"):
        sources.open_images("scenes:9x8")


@pytest.mark.parametrize("break_it, words", [
    (lambda root: (root / "train" / "depth" / "0.png").unlink(), ("0.jpg has no depth map", "remove the image")),
    (lambda root: image(root / "train" / "images" / "0.jpg", 6, 9), ("8 x 6", "9 x 6", "own size")),
    (lambda root: depth(root / "val" / "depth" / "0.png", 0), ("0.png: no depth at any pixel", "remove")),
    (lambda root: depth(root / "val" / "depth" / "0.png", 9000), ("9 to 9 m", "--max_depth 2.51", "--depth_scale")),
    (lambda root: depth(root / "val" / "depth" / "0.png", 9, dtype=np.uint8), ("0.png: of 8 bits", "16-bit")),
    (lambda root: image(root / "val" / "depth" / "0.png"), ("0.png: a colour image", "16-bit")),
    (lambda root: (root / "val" / "depth" / "0.png").write_bytes(b"rubbish"), ("0.png: not an image",)),
    (lambda root: (root / "val" / "depth").rename(root / "val" / "depths"), ("no folder", "depth", "give images/")),
    (lambda root: [path.unlink() for path in (root / "val" / "images").iterdir()], ("no images with depth",)),
])  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, break_it, words):
    plain(tmp_path)
    break_it(tmp_path)
    with pytest.raises(Refused) as refused:
        open_depth_maps(str(tmp_path))
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("values, dtype, words", [
    ((1, 2), np.int64, ("0.npy: int64", "floats", "metres")),
    ((1.0, -2.0), np.float32, ("0.npy: a depth of -2 m", "store 0")),
    ((np.nan, 0), np.float32, ("0.npy: no depth at any pixel",)),
])
def test_arrays_that_are_not_depth(tmp_path, values, dtype, words):
    plain(tmp_path, [(1.0, 2.0)], [(1.0,)], ".npy")
    depth(tmp_path / "train" / "depth" / "0.npy", *values, dtype=dtype)
    with pytest.raises(Refused) as refused:
        open_depth_maps(str(tmp_path))
    assert all(word in str(refused.value) for word in words), refused.value


def test_broken_arrays_and_limits(tmp_path):
    plain(tmp_path, [(1.0, 2.0)], [(1.0,)], ".npy")
    with pytest.raises(Refused, match="--min_depth 5: .*2.01 m; lower|between --min_depth 5"):
        open_depth_maps(str(tmp_path), limits=Limits(least=5))
    with pytest.raises(Refused, match="not a folder.*images/ and depth/.*scenes"):
        open_depth_maps(str(tmp_path / "train" / "images"))
    train = open_depth_maps(str(tmp_path))[0]
    (tmp_path / "train" / "depth" / "0.npy").write_bytes(b"rubbish")
    with pytest.raises(Refused, match="0.npy: .*replace the file"):
        open_depth_maps(str(tmp_path))
    with pytest.raises(Undecodable, match="0.npy"):
        train.load(0)
