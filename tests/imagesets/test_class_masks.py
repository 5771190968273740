"""The layouts of sets with classes of pixels, on small trees with the published names and encodings."""

import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from test_decode import png_bytes
from test_deep import deep_png, tiff

from imagesets import class_masks, decode, masks, shapes, sources
from imagesets.class_masks import open_class_masks
from parallel import Refused


def write(path, values, palette=False, suffix_mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if palette:
        masks.write_labels(values, path)
    else:
        Image.fromarray(np.asarray(values, np.uint8), suffix_mode).save(path)


def image(path, height=6, width=8, value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value, 0, 0)).save(path)


def stripes(*values, height=6, width=8):
    """A mask whose columns repeat the values."""
    return np.resize(values, width)[None].repeat(height, 0)


def plain(root, train=((0, 1, 255),), val=((0, 2),), **options):
    for part, rows in (("train", train), ("val", val)):
        for i, values in enumerate(rows):
            image(root / part / "images" / f"{i}.jpg")
            write(root / part / "masks" / f"{i}.png", stripes(*values), **options)
    return str(root)


@pytest.mark.parametrize("palette", [False, True])
def test_folders(tmp_path, palette):
    train, val = open_class_masks(plain(tmp_path, palette=palette))
    picture, labels = train.load(0)
    assert picture.shape == (3, 6, 8) and labels.dtype == np.uint8 and (labels == stripes(0, 1, 255)).all()
    assert train.classes == val.classes == ["background", "class 1", "class 2"] and len(val.items) == 1
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n\ntree\n")
    assert open_class_masks(str(tmp_path))[0].classes == ["sky", "road", "car", "tree"]
    train, val = open_class_masks(str(tmp_path), foreground=True)
    assert (val.load(0)[1] == stripes(0, 1)).all() and (train.load(0)[1] == stripes(0, 1, 255)).all()
    assert train.classes == ["background", "object"]


def test_names_of_classes_are_in_utf8(tmp_path):
    plain(tmp_path)
    (tmp_path / "classes.txt").write_bytes("\ufeffbackground\nété\ncar\n".encode())
    assert open_class_masks(str(tmp_path))[0].classes == ["background", "été", "car"]
    (tmp_path / "classes.txt").write_bytes("background\nété\ncar\n".encode("latin-1"))
    with pytest.raises(Refused, match="classes.txt: line 2 .*save the file as UTF-8"):
        open_class_masks(str(tmp_path))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_have_the_values_that_are_stored(tmp_path, bits):
    values = np.arange(8) % 2**bits
    row = int("".join(f"{v:0{bits}b}" for v in values), 2).to_bytes(bits, "big")
    (tmp_path / "a.png").write_bytes(png_bytes(struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0), [row]))
    assert masks.read_labels(tmp_path / "a.png").tolist() == [values.tolist()]
    (tmp_path / "a.tif").write_bytes(tiff(values[None].astype(np.uint8), bits, packed=row))
    assert masks.read_labels(tmp_path / "a.tif").tolist() == [values.tolist()]


@pytest.mark.parametrize("options, words", [
    ({"sample_format": 3}, "not whole numbers; round"), ({"photometric": 0}, "WhiteIsZero.*save it as PNG")])
def test_values_without_a_certain_meaning_are_refused(tmp_path, options, words):
    values = np.array([[0, 1, 0.5]], np.float32) if "sample_format" in options else np.array([[0, 1, 1]], np.uint8)
    (tmp_path / "a.tif").write_bytes(tiff(values, **options))
    with pytest.raises(Refused, match=f"a.tif: .*{words}"):
        masks.read_labels(tmp_path / "a.tif")
    (tmp_path / "a.tif").write_bytes(tiff(np.floor(values), **{**options, "photometric": 1}))
    assert masks.read_labels(tmp_path / "a.tif").tolist() == np.floor(values).tolist()


def test_masks_of_16_bits_count_to_the_last_one(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(deep_png(np.array([[[0, 0, 0], [0, 1, 0], [65535, 0, 0]]], np.uint16)))
    assert masks.read_labels(path).tolist() == [[0, 1, 1]]
    Image.fromarray(np.array([[0, 1, 300]], np.uint16)).save(path)
    assert masks.read_labels(path).tolist() == [[0, 1, 300]]
    path.write_bytes(deep_png(np.array([[[0, 65535], [3, 65535]]], np.uint16)))
    with pytest.raises(Refused, match="a.png: 16 bits and transparency"):
        masks.read_labels(path)


def test_one_folder_and_images_from_elsewhere(tmp_path):
    plain(tmp_path)
    parts = open_class_masks(str(tmp_path / "train"))
    assert len(parts) == 1 and parts[0].classes == ["background", "class 1"]
    parts = open_class_masks(str(tmp_path / "train"), str(tmp_path / "val"))
    assert [len(part.classes) for part in parts] == [3, 3] and (parts[1].load(0)[1] == stripes(0, 2)).all()
    with pytest.raises(Refused, match="--val_data_path.*differ"):
        open_class_masks("shapes:4x16", str(tmp_path / "val"))


def test_voc(tmp_path):
    """VOC2012: palette masks of 21 classes with a border of 255, and lists of names."""
    for stem, values in (("2007_000032", (0, 1, 255)), ("2007_000033", (0, 20)), ("2007_000039", (0, 5))):
        image(tmp_path / "JPEGImages" / f"{stem}.jpg")
        write(tmp_path / "SegmentationClass" / f"{stem}.png", stripes(*values), palette=True)
    image(tmp_path / "JPEGImages" / "2007_000027.jpg")  # most images have no mask
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n2007_000039\n")
    (lists / "val.txt").write_text("2007_000033\n")
    train, val = open_class_masks(str(tmp_path))
    assert [len(part.items) for part in (train, val)] == [2, 1]
    assert (train.load(0)[1] == stripes(0, 1, 255)).all() and (val.load(0)[1] == stripes(0, 20)).all()
    assert len(train.classes) == 21 and train.classes[15] == "person" and train.classes[20] == "tvmonitor"
    (lists / "train.txt").unlink()
    with pytest.raises(Refused, match="train.txt; give the folder VOC2012"):
        open_class_masks(str(tmp_path))


def test_ade20k(tmp_path):
    """Grey masks: 0 is ignored, 1 (wall) becomes 0, 150 (flag) becomes 149."""
    for part, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        image(tmp_path / "images" / part / f"{stem}.jpg")
        write(tmp_path / "annotations" / part / f"{stem}.png", stripes(0, 1, 150))
    train, val = open_class_masks(str(tmp_path))
    assert (val.load(0)[1] == stripes(255, 0, 149)).all() and len(train.classes) == 150
    rows = "".join(f"{i}\t0.1\t1\t1\t0\t{'wall' if i == 1 else f'thing{i}, other name'}\n" for i in range(1, 151))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + rows)
    assert open_class_masks(str(tmp_path))[0].classes[::149] == ["wall", "thing150"]
    rows = rows.replace("thing9,", "wall,")
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + rows)
    assert open_class_masks(str(tmp_path))[0].classes[:9:8] == ["wall (1)", "wall (9)"]
    with pytest.raises(Refused, match="--foreground.*not the background"):
        open_class_masks(str(tmp_path), foreground=True)
    write(tmp_path / "annotations" / "training" / "ADE_train_00000001.png", stripes(151))
    with pytest.raises(decode.Undecodable, match="ADE_train_00000001.png: value 151 is none of the 150 classes"):
        open_class_masks(str(tmp_path))[0].load(0)


def test_cityscapes(tmp_path):
    """labelIds: 7 road is class 0, 33 bicycle class 18, 6 (ground) and others are ignored."""
    for split in ("train", "val"):
        stem = "aachen_000000_000019"
        image(tmp_path / "leftImg8bit" / split / "aachen" / f"{stem}_leftImg8bit.png")
        write(tmp_path / "gtFine" / split / "aachen" / f"{stem}_gtFine_labelIds.png", stripes(7, 33, 6, 0))
        write(tmp_path / "gtFine" / split / "aachen" / f"{stem}_gtFine_instanceIds.png", stripes(9))
    train, val = open_class_masks(str(tmp_path))
    assert (train.load(0)[1] == stripes(0, 18, 255, 255)).all() and len(val.items) == 1
    assert len(train.classes) == 19 and train.classes[0] == "road" and train.classes[13] == "car"
    next((tmp_path / "gtFine" / "val").glob("*/*labelIds.png")).unlink()
    with pytest.raises(Refused, match="aachen_000000_000019_leftImg8bit.png has no mask"):
        open_class_masks(str(tmp_path))


def test_drawn_images():
    train, val = open_class_masks("shapes:8x32")
    assert [len(part.items) for part in (train, val)] == [8, 2] and train.classes == ["background", *shapes.KINDS]
    drawn, label, mask = shapes.draw(sources.VAL_START + 1, 32)
    picture, labels = val.load(1)
    assert (picture.permute(1, 2, 0).numpy() == drawn).all() and (labels == np.where(mask, label + 1, 0)).all()
    assert set(np.unique(open_class_masks("shapes:8x32", foreground=True)[0].load(3)[1])) == {0, 1}
    assert pickle.loads(pickle.dumps(val)).items[0] == sources.VAL_START  # as workers that are spawned get it


@pytest.mark.parametrize("break_it, words", [
    (lambda root: (root / "train" / "masks" / "0.png").unlink(), ("0.jpg has no mask", "remove the image")),
    (lambda root: image(root / "train" / "images" / "0.jpg", 6, 9), ("8 x 6", "9 x 6", "own size")),
    (lambda root: (root / "classes.txt").write_text("a\nb\n"), ("0.png: value 2 is none of the 2 classes", "replace")),
    (lambda root: (root / "classes.txt").write_text("a\nb\n\na \n"), ("classes.txt", "two classes 'a'", "different")),
    (lambda root: Image.new("RGB", (8, 6)).save(root / "val" / "masks" / "0.png"), ("colour image", "class numbers")),
    (lambda root: (root / "val" / "masks" / "0.png").write_bytes(b"rubbish"), ("0.png: not an image",)),
    (lambda root: Image.fromarray(np.full((6, 8), 300, np.uint16)).save(root / "val" / "masks" / "0.png"),
     ("0.png: value 300",)),
    (lambda root: [write(root / part / "masks" / "0.png", stripes(0, 255)) for part in ("train", "val")],
     ("one class", "255 is ignored", "0 and 1")),
    (lambda root: [path.unlink() for path in (root / "val" / "images").iterdir()], ("no images with masks",)),
    (lambda root: image(root / "train" / "images" / "0.png", 8, 6), ("0.jpg and 0.png", "remove one")),
    (lambda root: (root / "val" / "masks").rename(root / "val" / "labels"), ("no folder", "masks", "give images/")),
])  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, break_it, words):
    plain(tmp_path)
    break_it(tmp_path)
    with pytest.raises(Refused) as refused:
        open_class_masks(str(tmp_path))
    assert all(word in str(refused.value) for word in ("--data_path", *words)), refused.value


def test_nothing_known(tmp_path):
    with pytest.raises(Refused, match="--data_path.*images/ and masks/"):
        open_class_masks(str(tmp_path))
    assert class_masks.LAYOUTS[-1][0] == ("images", "masks")  # the most general one last
