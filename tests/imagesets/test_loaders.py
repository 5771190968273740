import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from processes import ENV, launch

from imagesets import packages, shapes, sources
from imagesets.bad_images import BadImages, TooManyBadImages, Unreadable
from imagesets.decode import Reading, Undecodable, from_pil
from imagesets.listing import Texts, pack
from imagesets.loaders import GlobalBatches, MultiCrop, batches, on_device
from imagesets.sources import open_images
from parallel import Refused
from protocols.transforms import EvalImages


def colour(i: int) -> tuple[int, int, int]:
    return i % 256, i * 7 % 256, 255 - i % 256


def write(path: Path, i: int = 0, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(i)).save(path)
    return path


def names(images) -> list[str]:
    return [images.name(i) for i in range(len(images))]


def tails(images, folder: Path) -> list[str]:
    return [str(Path(name).relative_to(folder)) for name in names(images)]


class Crops:
    """A stand-in for the augmentation: two crops of 3 pixels and `local` ones of 2, at random places."""

    def __init__(self, local: int = 3):
        self.sizes = [3, 3] + [2] * local

    reduction = None

    def cut(self, image, rng):
        crops, params = [], torch.empty(len(self.sizes), 8)
        for v, size in enumerate(self.sizes):
            top, left = (int(rng.integers(n - size + 1)) for n in image.shape[1:])
            crops.append(image[:, top : top + size, left : left + size])
            params[v] = torch.from_numpy(rng.random(8, np.float32))
        return crops, params


class Noise:
    """n images of noise; those in `bad` can't be decoded."""

    labels, classes = None, []

    def __init__(self, n: int, bad=()):
        self.n, self.bad = n, frozenset(bad)

    def __len__(self):
        return self.n

    def name(self, i):
        return f"noise/{i}"

    def load(self, i, reduction=None):
        if i in self.bad:
            raise Undecodable(f"noise/{i}: it is broken")
        return torch.from_numpy(np.random.default_rng(i).integers(256, size=(3, 5, 6), dtype=np.uint8))


# ---- Folders ----


@pytest.fixture
def classes_folder(tmp_path):
    i = 0
    for name in ("zebra", "Ant", "bee"):
        for file in ("b.png", "a.JPG", "deep/c.webp", "A.png"):
            write(tmp_path / name / file, i := i + 1)
    (tmp_path / "bee" / "notes.txt").write_text("no image")
    (tmp_path / "README.md").write_text("no image")
    write(tmp_path / ".hidden" / "a.png")
    write(tmp_path / "bee" / ".a.png")
    return tmp_path


def test_class_folders(classes_folder):
    images = open_images(str(classes_folder))
    files = ["A.png", "a.JPG", "b.png", "deep/c.webp"]
    assert tails(images, classes_folder) == [f"{name}/{file}" for name in ("Ant", "bee", "zebra") for file in files]
    assert images.classes == ["Ant", "bee", "zebra"]
    assert images.labels.dtype == torch.int64 and images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.load(3).shape == (3, 4, 6) and abs(images.load(3)[0] - 7.0).max() < 8
    assert names(pickle.loads(pickle.dumps(images))) == names(images)


def test_labels_are_those_of_torchvision(classes_folder):
    (classes_folder / ".hidden").rename(classes_folder.parent / (classes_folder.name + "_away"))
    (classes_folder / "bee" / ".a.png").unlink()
    expected, images = torchvision.datasets.ImageFolder(classes_folder), open_images(classes_folder)
    assert images.classes == expected.classes
    assert list(zip(names(images), images.labels.tolist(), strict=True)) == expected.samples


def test_an_empty_class_keeps_its_number(classes_folder):
    (classes_folder / "cat").mkdir()
    images = open_images(classes_folder)
    assert images.classes == ["Ant", "bee", "cat", "zebra"] and images.labels.unique().tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    "files",
    [
        ["b.png", "a.png"],
        ["a/b.png", "a/a.png"],  # one folder is no choice
        ["a/x/1.png", "a/y/2.png"],
        ["a/1.png", "b/2.png", "3.png"],  # not all in class folders
    ],
)
def test_folders_without_labels(tmp_path, files):
    for file in files:
        write(tmp_path / file)
    images = open_images(tmp_path)
    assert images.labels is None and images.classes == []
    assert sorted(tails(images, tmp_path)) == sorted(files)


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    for i in np.random.default_rng(0).permutation(40):
        write(tmp_path / f"{i % 3}" / f"{i // 10 % 2}" / f"{i}.png")
    first = names(open_images(tmp_path))
    real = os.scandir

    class Backwards:
        def __init__(self, path):
            with real(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert names(open_images(tmp_path)) == first and len(first) == 40


def test_links(tmp_path):
    write(tmp_path / "real" / "a.png", 9)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "real")
    (folder / "b.png").symlink_to(tmp_path / "real" / "a.png")
    (folder / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    images = open_images(folder)
    assert tails(images, folder) == ["b.png", "broken.png", "linked/a.png"]
    assert images.load(0)[0, 0, 0] == 9
    with pytest.raises(Undecodable, match="broken.png: No such file"):
        images.load(1)


def test_odd_names(tmp_path):
    odd = ["with space.png", "äö图.PNG", "a\nb.png", "%s.png"]
    for name in odd:
        write(tmp_path / name)
    images = open_images(tmp_path)
    assert tails(images, tmp_path) == sorted(odd)
    assert all(images.load(i).shape == (3, 4, 6) for i in range(4))


def test_names_that_are_not_utf8(tmp_path):
    try:
        write(tmp_path / "a.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    images = open_images(tmp_path)
    images.name(0).encode()
    assert images.name(0).endswith("\\xff.png") and images.load(0).shape == (3, 4, 6)


def test_splits_of_a_folder(tmp_path):
    for i, file in enumerate(["train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"]):
        write(tmp_path / file, i)
    assert tails(open_images(tmp_path, "train"), tmp_path) == ["train/a/1.png", "train/b/2.png"]
    assert tails(open_images(tmp_path, "val"), tmp_path) == ["test/a/3.png", "test/b/4.png"]
    assert len(open_images(tmp_path)) == 4
    write(tmp_path / "val/a/5.png")
    assert tails(open_images(tmp_path, "val"), tmp_path) == ["val/a/5.png"]
    assert tails(open_images(tmp_path / "train", "train"), tmp_path) == ["train/a/1.png", "train/b/2.png"]


def test_channels(tmp_path):
    write(tmp_path / "a.png", 3)
    np.save(tmp_path / "b.npy", np.full((4, 6, 5), 17, np.uint8))
    assert [open_images(tmp_path, in_chans=c).load(0).shape[0] for c in (1, 3, 4)] == [1, 3, 4]
    images = open_images(tmp_path, in_chans=5)
    assert tails(images, tmp_path) == ["b.npy"] and (images.load(0) == 17).all()
    images = open_images(tmp_path, max_pixels=4)
    with pytest.raises(Undecodable, match="a.png: .*limit"):
        images.load(0)


def test_paths_are_small():
    paths = (f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG".encode() for i in range(100_000))
    images = sources.Files("/data", Texts(pack(paths)), None, [], Reading(3, 100))
    assert images.name(99_999) == "/data/n00000999/n00000999_99999.JPEG" and len(images) == 100_000
    assert len(images.paths.text) < 32 * len(images)
    assert len(pickle.dumps(images)) < 45 * len(images)


# ---- Lists ----


def test_list(tmp_path):
    write(tmp_path / "images" / "b c.png", 1)
    outside = write(tmp_path / "outside" / "a.png", 2)
    listing = tmp_path / "images" / "list.TXT"
    listing.write_bytes(b"\xef\xbb\xbfb c.png\r\n\n" + os.fsencode(outside) + b"\n../outside/none.png")
    images = open_images(listing)
    assert len(images) == 3 and images.labels is None and images.name(1) == str(outside)
    assert [int(images.load(i)[0, 0, 0]) for i in (0, 1)] == [1, 2]
    with pytest.raises(Undecodable, match="none.png: No such file"):
        images.load(2)


@pytest.mark.parametrize(
    "labels, numbers, classes",
    [
        (["3", "0", "3"], [1, 0, 1], ["0", "3"]),
        (["999999", "100001", "999999"], [1, 0, 1], ["100001", "999999"]),
        (["20231105", "9", "07"], [2, 1, 0], ["7", "9", "20231105"]),
        (["dog", "ant", "dog"], [1, 0, 1], ["ant", "dog"]),
        (["10", "9", "-1"], [1, 2, 0], ["-1", "10", "9"]),
    ],
)
def test_list_with_labels(tmp_path, labels, numbers, classes):
    for i in range(len(labels)):
        write(tmp_path / f"{i}.png")
    (tmp_path / "list.txt").write_text("".join(f"{i}.png\t{label}\n" for i, label in enumerate(labels)))
    images = open_images(tmp_path / "list.txt")
    assert images.labels.tolist() == numbers and images.labels.dtype == torch.int64 and images.classes == classes


def test_relative_list(tmp_path, monkeypatch):
    write(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\n")
    monkeypatch.chdir(tmp_path)
    assert open_images("list.txt").load(0).shape == (3, 4, 6)


# ---- Shapes ----


def test_shapes():
    images = open_images("shapes:25x16")
    assert len(images) == 25 and images.classes == list(shapes.KINDS) and images.name(7) == "shapes[7]"
    drawn, label, _ = shapes.draw(7, 16)
    assert (images.load(7).permute(1, 2, 0).numpy() == drawn).all() and images.labels[7] == label
    assert open_images("shapes:5x8", in_chans=1).load(0).shape == (1, 8, 8)
    assert len(open_images("shapes")) == 10_000 and open_images("shapes:3").load(0).shape == (3, 96, 96)


def test_shapes_for_validation_are_others():
    train, val = open_images("shapes:40x8", "train"), open_images("shapes:40x8", "val")
    assert (len(train), len(val)) == (40, 10) and not set(names(train)) & set(names(val))
    assert all(val.labels[i] == shapes.draw(sources.VAL_START + i, 8)[1] for i in range(10))
    assert not (val.load(0) == train.load(0)).all()


# ---- torchvision ----


def write_mnist(root: Path, train: int = 6, test: int = 4) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", train), ("t10k", test)):
        pixels = np.arange(n * 784).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + bytes(range(n)))


def test_torchvision_on_disk(tmp_path):
    write_mnist(tmp_path)
    train, val = (open_images(f"torchvision:MNIST:{tmp_path}", split) for split in ("train", "val"))
    assert (len(train), len(val), len(open_images(f"torchvision:MNIST:{tmp_path}"))) == (6, 4, 6)
    assert train.labels.tolist() == list(range(6)) and train.labels.dtype == torch.int64
    assert train.classes[3] == "3 - three" and train.name(2) == "torchvision:MNIST[2]"
    assert train.load(1).shape == (3, 28, 28) and train.load(1)[:, 0, 0].tolist() == [784 % 256] * 3
    assert open_images(f"torchvision:MNIST:{tmp_path}", in_chans=1).load(0).shape == (1, 28, 28)


def test_torchvision_default_folder(tmp_path, monkeypatch):
    write_mnist(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert len(open_images("torchvision:MNIST")) == 6


class Fake(torch.utils.data.Dataset):
    """A class as torchvision's: with `split`, to be downloaded, of which `val` doesn't exist."""

    calls = []

    def __init__(self, root, split="train", download=False):
        if split not in ("train", "test"):
            raise ValueError("Unknown split")
        Fake.calls.append((split, download))
        if not download and not Path(root, "here").exists():
            raise RuntimeError("Dataset not found.\nYou can use download=True to download it")
        if "offline" in str(root):
            raise OSError("<urlopen error: no network>")
        Path(root, "here").touch()
        self._labels = [1, 0] if split == "train" else [0]

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, i):
        return Image.new("RGB", (5, 4), colour(i)), self._labels[i]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "Fake", Fake, raising=False)
    Fake.calls.clear()
    return Fake


def test_torchvision_splits_and_download(tmp_path, fake):
    root = tmp_path / "new" / "folder"
    val = open_images(f"torchvision:Fake:{root}", "val")
    assert fake.calls == [("test", False), ("test", True)]
    assert len(val) == 1 and val.labels.tolist() == [0] and val.classes == ["0"]
    train = open_images(f"torchvision:Fake:{root}", "train")
    assert fake.calls[2:] == [("train", False)] and train.labels.tolist() == [1, 0] and train.classes == ["0", "1"]
    assert train.load(1).shape == (3, 4, 5)


def test_torchvision_offline(tmp_path, fake):
    with pytest.raises(Refused, match=r"--data_path .*Fake.*no network>; give the folder .*torchvision:Fake:FOLDER$"):
        open_images(f"torchvision:Fake:{tmp_path}/offline", "val")
    assert fake.calls == [("test", False), ("test", True)]


def test_torchvision_without_root_or_labels(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.FakeData.__init__, "__defaults__", (5, (3, 8, 8), 4, None, None, 0))
    images = open_images("torchvision:FakeData")
    assert images.load(4).shape == (3, 8, 8) and images.labels.shape == (5,) and images.labels.max() < 4
    images.dataset = [(None, {"boxes": []})]
    assert packages.Torchvision("x", [(None, {"boxes": []})], 3).labels is None
    assert packages.Torchvision("x", [(None, 1), (None, -1)], 3).labels is None
    assert packages.Torchvision("x", [(None, 1), (None, -1)], 3).classes == []
    sparse = packages.Torchvision("x", [(None, 999_999), (None, 100_001), (None, 999_999)], 3)
    assert sparse.labels.tolist() == [1, 0, 1] and sparse.classes == ["100001", "999999"]


# ---- What can't be opened ----


@pytest.mark.parametrize(
    "data_path, split, in_chans, message",
    [
        ("nowhere", None, 3, "no folder or .txt list"),
        ("", None, 3, "no folder or .txt list"),
        ("image.png", None, 3, "a file of another kind, not a folder"),
        ("fifo.txt", None, 3, "it is a pipe, not a folder or .txt list"),
        ("dangling", None, 3, "it is a link to 'gone', which isn't there"),
        ("empty", None, 3, "no images .* give a folder that holds some"),
        ("texts", None, 3, "no images"),
        ("images", None, 7, r"no images .*\(.npy, as --in_chans is 7\)"),
        ("images", "val", 3, "no folder val or test"),
        ("empty.txt", None, 3, "the list is empty"),
        ("blank.txt", None, 3, "the list is empty"),
        ("mixed.txt", None, 3, "some lines have a label"),
        ("utf16.txt", None, 3, "UTF-8"), ("no_label.txt", None, 3, "'b.png' is empty"),
        ("tabs.txt", None, 3, "some lines have a label"),
        ("elsewhere.txt", None, 3, "'none.png' isn't there; paths are relative"),
        ("good.txt", "val", 3, "a list of their own"),
        ("shapes:0", None, 3, "shapes:COUNT"),
        ("shapes:", None, 3, "shapes:COUNT"),
        ("shapes:10x4", None, 3, "shapes:COUNT"),
        ("shapes:10x99999", None, 3, "shapes:COUNT"),
        ("shapes:-5", None, 3, "shapes:COUNT"),
        ("shapes:many", None, 3, "shapes:COUNT"),
        ("shapes:10x10x3", None, 3, "shapes:COUNT"),
        ("shapes:10", None, 2, "--in_chans 2"),
        ("shape", None, 3, "no folder or .txt list"),
        ("torchvision:CIFAR", None, 3, "similar names: .*CIFAR10"),
        ("torchvision:cifar10", None, 3, "similar names: CIFAR10"),
        ("torchvision:xyzzy", None, 3, "similar names: CIFAR10"),
        ("torchvision:", None, 3, "similar names"),
        ("torchvision", None, 3, "similar names"),
        ("torchvision:CIFAR10", None, 5, "--in_chans 5"),
        ("torchvision:EuroSAT", "val", 3, "no splits"),
        ("torchvision:DatasetFolder", None, 3, "missing"),
        ("torchvision:ImageNet:nowhere", None, 3, "torchvision:ImageNet:FOLDER"),
    ],
)
def test_errors_are_one_line_with_flag_value_and_remedy(tmp_path, monkeypatch, data_path, split, in_chans, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "image.png")
    write(tmp_path / "images" / "a.png")
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    lists = {"empty": "", "blank": "\n\r\n", "mixed": "image.png\t1\nimage.png\n", "tabs": "image.png\t1\t2\n",
             "no_label": "image.png\tcat\nb.png\t\n"}
    for name, text in (lists | {"elsewhere": "none.png\n", "good": "image.png\n"}).items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "utf16.txt").write_text("image.png\n", encoding="utf-16")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refused) as error:
        open_images(data_path, split, in_chans, flag="--eval_data_path")
    line = str(error.value)
    assert re.search(message, line) and f"--eval_data_path {data_path!r}" in line and "\n" not in line
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="'test'"):
        open_images(tmp_path, "test")


def test_unreadable_folder(tmp_path, monkeypatch):
    write(tmp_path / "a" / "a.png")
    write(tmp_path / "b" / "b.png")
    real = os.scandir

    def scandir(path):  # chmod would not stop root
        if os.fsdecode(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(Refused, match=f"^--data_path '{tmp_path}': '{tmp_path}/b': Permission denied; make it"):
        open_images(str(tmp_path))


# ---- The sampler ----


def run_of(n, batch, world=1, rank=0, seed=0, first=0, last=30, per_epoch=None):
    return list(GlobalBatches(n, batch, seed, rank, world, per_epoch, first, last))


@pytest.mark.parametrize("n, total", [(64, 8), (70, 8), (9, 8), (8, 8), (1001, 12)])
def test_global_batches_do_not_depend_on_processes(n, total):
    alone = run_of(n, total)
    for world in (2, 4):
        parts = [run_of(n, total // world, world, rank) for rank in range(world)]
        assert [sum(together, []) for together in zip(*parts, strict=True)] == alone


@pytest.mark.parametrize("n, batch, world", [(50, 8, 1), (48, 8, 2), (100, 7, 3), (5, 5, 1)])
def test_every_image_once_an_epoch(n, batch, world):
    per_epoch = n // (batch * world)
    parts = [run_of(n, batch, world, rank, last=4 * per_epoch) for rank in range(world)]
    left_out, orders = set(), set()
    for epoch in range(4):
        own = [key for part in parts for keys in part[epoch * per_epoch : (epoch + 1) * per_epoch] for key in keys]
        assert {key[0] for key in own} == {epoch}
        indices = [index for _, index in own]
        assert len(set(indices)) == len(indices) == per_epoch * batch * world
        left_out.add(frozenset(range(n)) - set(indices))
        orders.add(tuple(indices))
    assert len(orders) == 4 and (n % (batch * world) == 0 or len(left_out) > 1)


@pytest.mark.parametrize("per_epoch", [None, 3])
def test_resume_anywhere(per_epoch):
    whole = run_of(33, 4, 2, 1, per_epoch=per_epoch)
    for first in range(31):
        assert run_of(33, 4, 2, 1, first=first, per_epoch=per_epoch) == whole[first:]
    assert whole[3][0][0] == (0 if per_epoch is None else 1)


def test_sampler_lengths_seeds_and_keys():
    assert len(GlobalBatches(10, 2, 0, last_batch=7, first_batch=3)) == 4
    assert len(GlobalBatches(10, 2, 0, last_batch=3, first_batch=7)) == 0
    assert len(list(islice(GlobalBatches(10, 2, 0), 100))) == 100
    assert run_of(100, 10, seed=0) != run_of(100, 10, seed=1)
    assert all(type(i) is int for key in run_of(10, 2)[0] for i in key)
    # the order must not come from the stream that draws the views of image 0
    order = GlobalBatches(100, 10, 5).permutation(3)
    assert (order != np.random.default_rng([5, 3, 0]).permutation(100)).any()


def test_sampler_order_is_uniform():
    first = np.bincount([run_of(10, 5, seed=seed, last=1)[0][0][1] for seed in range(1000)], minlength=10)
    assert first.min() > 60 and first.max() < 140  # 100 expected, standard deviation 9.5


def test_sampler_errors():
    with pytest.raises(Refused, match="^--batch_size_per_gpu 8 times 2 process.* lower it to 7 or"):
        GlobalBatches(15, 8, 0, world_size=2)
    for per_epoch in (0, 4):
        with pytest.raises(ValueError, match="batches per epoch: 15 images make 1 to 3"):
            GlobalBatches(15, 5, 0, batches_per_epoch=per_epoch)


# ---- Views and batches ----


def same(a: dict, b: dict) -> bool:
    tensors = [a["index"], a["params"], *a["crops"]], [b["index"], b["params"], *b["crops"]]
    return a["bad"] == b["bad"] and all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


def test_batch_layout():
    images, crops = Noise(20), Crops(local=3)
    batch = next(iter(batches(images, crops, 4, 0, seed=1, last_batch=1)))
    keys = run_of(20, 4, seed=1, last=1)[0]
    items = [MultiCrop(images, crops, 1)[key] for key in keys]
    assert batch["index"].tolist() == [index for _, index in keys] and batch["index"].dtype == torch.int64
    assert [c.shape for c in batch["crops"]] == [(8, 3, 3, 3), (12, 3, 2, 2)]
    assert batch["params"].shape == (20, 8) and batch["params"].dtype == torch.float32
    for b, (cut, params, _, bad) in enumerate(items):
        for v in range(5):
            group, row = (0, v) if v < 2 else (1, v - 2)
            assert torch.equal(batch["crops"][group][row * 4 + b], cut[v])
            assert torch.equal(batch["params"][v * 4 + b], params[v])
        assert bad == []
    assert batch["bad"] == [] and all(c.dtype == torch.uint8 for c in batch["crops"])
    assert all(c.is_contiguous(memory_format=torch.channels_last) for c in batch["crops"])  # else nothing but slower


def test_no_local_crops():
    batch = next(iter(batches(Noise(8), Crops(local=0), 4, 0, seed=1)))
    assert [c.shape for c in batch["crops"]] == [(8, 3, 3, 3)] and batch["params"].shape == (8, 8)


@pytest.fixture(scope="module")
def alone():
    return list(batches(Noise(23, bad=[3, 11]), Crops(), 4, 0, seed=3, last_batch=12))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_views_do_not_depend_on_workers(alone, workers):
    found = list(batches(Noise(23, bad=[3, 11]), Crops(), 4, workers, seed=3, last_batch=12))
    assert len(found) == 12 and all(same(a, b) for a, b in zip(found, alone, strict=True))


def test_views_do_not_depend_on_resuming(alone):
    for first in (1, 5, 7, 11):
        found = list(batches(Noise(23, bad=[3, 11]), Crops(), 4, 1, seed=3, first_batch=first, last_batch=12))
        assert all(same(a, b) for a, b in zip(found, alone[first:], strict=True))


def test_views_do_not_depend_on_processes(alone):
    parts = [list(batches(Noise(23, bad=[3, 11]), Crops(), 2, 0, 3, rank, 2, last_batch=12)) for rank in (0, 1)]
    for whole, *halves in zip(alone, *parts, strict=True):
        assert torch.equal(whole["index"], torch.cat([half["index"] for half in halves]))
        by_image = [half["crops"][0].unflatten(0, (2, 2)) for half in halves]
        assert torch.equal(whole["crops"][0].unflatten(0, (2, 4)), torch.cat(by_image, 1))
        by_image = [half["params"].unflatten(0, (5, 2)) for half in halves]
        assert torch.equal(whole["params"].unflatten(0, (5, 4)), torch.cat(by_image, 1))


def test_views_change_with_seed_epoch_and_image():
    views = [MultiCrop(Noise(9), Crops(), seed)[key][1] for seed, key in ((0, (0, 1)), (1, (0, 1)), (0, (1, 1)))]
    views += [MultiCrop(Noise(9), Crops(), 0)[0, 2][1]]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_global_random_state_is_neither_used_nor_changed():
    dataset = MultiCrop(Noise(9, bad=[1]), Crops(), 0)
    torch.manual_seed(1)
    first, state = dataset[0, 1][1], torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(dataset[0, 1][1], first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_images_are_replaced():
    dataset = MultiCrop(Noise(30, bad=range(25)), Crops(), 0)
    crops, _, index, bad = dataset[2, 7]
    assert index == 7 and bad[0] == ("noise/7", "it is broken") and len(bad) >= 1
    assert bad == dataset[2, 7][3] and torch.equal(crops[0], dataset[2, 7][0][0])
    assert len({tuple(dataset[epoch, 7][3]) for epoch in range(9)}) > 1  # another one next time
    assert dataset[0, 29][3] == []


def test_a_hundred_bad_images_in_a_row():
    with pytest.raises(Unreadable, match="100 images in a row .* The last: noise/.: it is broken"):
        MultiCrop(Noise(3, bad=range(3)), Crops(), 0)[0, 1]


def bug(*_):
    raise ValueError("operands could not be broadcast")


@pytest.mark.parametrize("name", ["cut", "reduction"])
def test_a_bug_in_the_augmentation_is_not_a_bad_image(tmp_path, name):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg")
    augmentation = Crops()
    setattr(augmentation, name, bug)
    with pytest.raises(ValueError, match="^operands could not be broadcast$"):
        MultiCrop(open_images(tmp_path), augmentation, 0)[0, 0]


def test_a_bug_in_loading_is_not_a_bad_image(monkeypatch):
    images = Noise(3)
    monkeypatch.setattr(images, "load", bug)
    with pytest.raises(ValueError, match="^operands could not be broadcast$"):
        MultiCrop(images, Crops(), 0)[0, 0]


@pytest.mark.parametrize("name", ["images_below", "suffixes"])
def test_a_bug_in_opening_is_not_bad_input(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, name, bug)
    with pytest.raises(ValueError, match="^operands could not be broadcast$") as error:
        open_images(write(tmp_path / "a.png").parent)
    assert not isinstance(error.value, Refused)


def test_odd_files_of_a_folder_in_batches(tmp_path):
    for i in range(6):
        write(tmp_path / f"{i}.png", i)
    (tmp_path / "broken.jpg").write_bytes(b"rubbish")
    for batch in batches(open_images(tmp_path), Crops(), 7, 1, seed=0, last_batch=3):
        assert set(batch["bad"]) == {(str(tmp_path / "broken.jpg"), "not an image that Pillow can read")}


# ---- To the device ----


def test_crops_go_to_the_device_and_the_rest_stays():
    found = list(on_device(batches(Noise(8), Crops(), 4, 0, seed=0, last_batch=2), torch.device("meta")))
    assert [[c.device.type for c in batch["crops"]] for batch in found] == [["meta"] * 2] * 2
    assert all(batch["params"].device.type == "cpu" and len(batch["index"]) == 4 for batch in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_crops_copied_on_their_own_stream_are_whole():
    there = on_device(batches(Noise(8), Crops(), 4, 0, seed=0, last_batch=9, pin_memory=True),
                           torch.device("cuda", 0))  # fmt: skip
    for batch, expected in zip(there, batches(Noise(8), Crops(), 4, 0, seed=0, last_batch=9), strict=True):
        for found, crop in zip(batch["crops"], expected["crops"], strict=True):
            assert torch.equal(found.cpu(), crop)


# ---- Workers ----


def test_workers_leave_signals_to_their_parent():
    loader = iter(batches(Noise(40), Crops(), 4, 2, seed=0, last_batch=60))
    first = [next(loader) for _ in range(4)]
    workers = active_children()
    for name in ("INT", "TERM", "USR1"):
        for worker in workers:
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # not this process: its own is heeded
    assert len(first) + len(list(loader)) == 60
    del loader
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0


def test_workers_end_when_their_parent_tells_them():
    loader = iter(batches(Noise(40), Crops(), 4, 1, seed=0))
    next(loader)
    (worker,) = active_children()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


CROPS = """
import os, signal
from multiprocessing import active_children
import torch
from imagesets.loaders import batches
from imagesets.sources import open_images
class Crops:
    reduction = None

    def cut(self, image, rng):
        return [image, image], torch.zeros(2, 8)
loader = iter(batches(open_images("shapes:40x8"), Crops(), 4, 2, seed=0))
next(loader)
"""


def run_script(tmp_path, text):
    """In a process of its own: torch raises the death of a worker wherever the main thread stands."""
    (tmp_path / "script.py").write_text(CROPS + textwrap.dedent(text))
    return launch(tmp_path / "script.py").returncode


def test_a_worker_that_dies_is_an_error(tmp_path):
    assert run_script(tmp_path, """
        from flags import worker_death
        def death():
            try:
                os.kill(active_children()[0].pid, signal.SIGKILL)
                for _ in range(1000):
                    next(loader)
            except (RuntimeError, ConnectionError, EOFError) as error:
                return error
        try:
            error = death()
        except RuntimeError as later:  # torch's own word may come while the broken connection's is on its way
            error = later
        os._exit(7 if "memory" in worker_death(error) else 1)
    """) == 7


def test_a_batch_that_cannot_be_handed_over_is_an_error(tmp_path):
    """Python's thread that hands it over prints a traceback and takes the next one."""
    text = CROPS.replace("loader = iter", """
from multiprocessing import reduction
def no_more(fd):
    raise OSError(24, "Too many open files")
reduction.DupFd = no_more
loader = iter""", 1).replace("next(loader)", """
try:
    next(loader)
except RuntimeError as error:
    os._exit(7 if "exited unexpectedly" in str(error) else 1)""")
    (tmp_path / "script.py").write_text(text)
    done = launch(tmp_path / "script.py", timeout=60)
    assert done.returncode == 7 and "Too many open files" in done.stderr, done


def test_a_parent_that_left_is_no_news_to_a_worker(tmp_path):
    """The worker's thread that hands tensors over would print a page about it, beside the parent's line."""
    script = """if True:
        import os
        from imagesets import loaders
        for error in (ConnectionResetError("gone"), EOFError("gone"), ValueError("another")):
            if os.fork() == 0:
                loaders.init_worker(0)
                raise error
            os.wait()
    """
    (tmp_path / "script.py").write_text(script)
    said = launch(tmp_path / "script.py", real=True)  # its hooks are those of a plain interpreter
    assert said.stderr.count("Traceback") == 1 and said.stderr.endswith("ValueError: another\n")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are what Python makes of them")
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_are_children_of_the_process_that_trains_whatever_the_default_is(tmp_path, method):
    """A server between them would be hit by Slurm's signals, and what it starts could not read this script."""
    text = f"import multiprocessing\nmultiprocessing.set_start_method({method!r}, force=True)\n{CROPS}"
    text += "assert len(active_children()) == 2 and all(type(c).__name__ == 'ForkProcess' for c in active_children())\n"
    (tmp_path / "script.py").write_text(text)
    done = launch(tmp_path / "script.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux is the limit")
def test_a_long_path_of_the_temporary_folder_loses_no_batch(tmp_path):
    """Tensors travel through a socket in it; paths of sockets are short."""
    folder = tmp_path / ("t" * (76 - len(os.fsencode(tmp_path)) - 1) or "t")
    folder.mkdir()
    (tmp_path / "script.py").write_text(CROPS + "os._exit(7)\n")
    done = launch(tmp_path / "script.py", env=ENV | {"TMPDIR": str(folder)}, real=True, timeout=60)
    assert len(str(folder)) > 75 and done.returncode == 7, done.stderr


def test_a_script_with_workers_ends(tmp_path):
    assert run_script(tmp_path, "raise SystemExit(7)") == 7


# ---- Counting bad images ----


@pytest.mark.parametrize(
    "n, share, limit", [(50, 0.01, 1), (1000, 0.01, 10), (1001, 0.01, 11), (50, 0, 0), (5, 1, 5), (100, 0.07, 7)]
)
def test_limit_of_bad_images(n, share, limit):
    bad = BadImages(n, share)
    bad.add([(str(i), "why") for i in range(limit)])
    bad.add([("0", "why")] * min(limit, 1))  # the same one again
    assert bad.limit == limit == len(bad.reasons)
    line = f"^{limit + 1} of {n} images .*--max_bad_images {share:g} .*one: too much"
    with pytest.raises(TooManyBadImages, match=line):
        bad.add([("one", "too much")])
    with pytest.raises(TooManyBadImages, match="one: too much"):
        bad.add([])


def test_first_ten_bad_images_are_printed_once(capsys):
    bad = BadImages(1000, 0.5)
    bad.add([(f"file {i}", f"reason {i}") for i in range(4)])
    bad.add([(f"file {i}", f"reason {i}") for i in range(30)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[3].endswith("file 3: reason 3") and "further ones" in lines[9]
    assert len(bad.reasons) == 30


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_bad_share(share):
    with pytest.raises(Refused, match="--max_bad_images"):
        BadImages(10, share)


# ---- Evaluation ----


class Photos:
    """Smooth images with some detail, of a given size."""

    def __init__(self, height, width, channels=3):
        rng = np.random.default_rng(height * width)
        coarse = rng.integers(256, size=(height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.array(image) + rng.normal(0, 8, (height, width, 3))
        self.image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        self.channels = channels

    def __len__(self):
        return 1

    def load(self, i, reduction=None):
        return from_pil(self.image, self.channels)


@pytest.mark.parametrize("height, width", [(128, 128), (100, 301), (257, 90), (64, 65), (31, 400), (7, 5), (1, 1)])
@pytest.mark.parametrize("size, crop", [(73, 64), (64, 64), (32, 31)])
def test_evaluation_is_pillows(height, width, size, crop):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    photos = Photos(height, width)
    image, index = EvalImages(photos, size, crop, mean, std)[0]
    assert image.shape == (3, crop, crop) and image.dtype == torch.float32 and index == 0
    steps = [torchvision.transforms.Resize(size, torchvision.transforms.InterpolationMode.BICUBIC)]
    steps += [torchvision.transforms.CenterCrop(crop)]
    expected = np.array(torchvision.transforms.Compose(steps)(photos.image)).astype(int)
    levels = (image * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)) * 255
    difference = abs(levels.permute(1, 2, 0).numpy() - expected)
    assert difference.max() < 2.01 and difference.mean() < 0.3  # the order of the two passes may differ


def test_evaluation_of_a_strip_takes_little_memory():
    for height, width in ((3, 60_000), (60_000, 3)):
        image, _ = EvalImages(Photos(height, width), 32, 24, [0.5] * 3, [0.5] * 3)[0]
        middle = np.array(Photos(height, width).image)[height // 2 - 1 : height // 2 + 2][:, width // 2 - 1 :][:, :3]
        assert image.shape == (3, 24, 24)
        assert abs((image.mean() * 127.5 + 127.5) - middle.mean()) < 25


def test_evaluation_of_other_channels():
    image, _ = EvalImages(Photos(40, 50, 1), 32, 32, [0.5], [0.25])[0]
    assert image.shape == (1, 32, 32) and -2 <= image.min() < image.max() <= 2


def test_evaluation_errors():
    with pytest.raises(ValueError, match="resized to 32 pixels can't be cropped to 33"):
        EvalImages(Photos(9, 9), 32, 33, [0.5] * 3, [0.5] * 3)
    with pytest.raises(Undecodable, match="noise/1: it is broken"):
        EvalImages(Noise(2, bad=[1]), 32, 32, [0.5] * 3, [0.5] * 3)[1]
