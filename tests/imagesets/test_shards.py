"""Shards and Hugging Face data sets give the same images and labels as a folder of the same files."""

import io
import json
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import SMALL, json_lines

import main_dino
from imagesets import listing, shards
from imagesets.decode import Undecodable
from imagesets.loaders import batches
from imagesets.sources import open_images
from parallel import Refused
from protocols.features import images_hash

N, CLASSES = 48, ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory):
    """A folder of class folders with images of many formats and sizes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(N):
        path = folder / CLASSES[i % 3] / f"{i:04d}{('.jpg', '.png', '.PNG', '.npy')[i % 4]}"
        path.parent.mkdir(exist_ok=True)
        array = rng.integers(256, size=(32 + i, 40, 3), dtype=np.uint8)
        np.save(path, array) if path.suffix == ".npy" else Image.fromarray(array).save(path)
    return folder


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def by_tarfile(images, folder: Path, label: str = "cls", shards: int = 3, **options) -> str:
    """Write `images` into shards, each in a sample with its label; returns the pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = np.array_split(np.arange(len(images)), shards)
    for s, part in enumerate(parts):
        with tarfile.open(folder / f"part-{s:03d}.tar", "w", **options) as tar:
            for i in part:
                path = Path(images.name(i))
                key, number = f"{path.parent.name}/{path.stem}", images.labels[i].item()
                add(tar, f"{key}{path.suffix}", path.read_bytes())
                if label == "cls":
                    add(tar, f"{key}.cls", b"%d\n" % number)
                elif label:
                    add(tar, f"{key}.json", json.dumps({"caption": "x", "label": CLASSES[number]}).encode())
    return str(folder / f"part-{{000..{shards - 1:03d}}}.tar")


def by_webdataset(images, folder: Path, count: int = 20) -> str:
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "part-%06d.tar"), maxcount=count, verbose=0) as writer:
        for i in range(len(images)):
            path = Path(images.name(i))
            sample = {"__key__": path.stem, path.suffix[1:].lower(): path.read_bytes(), "cls": images.labels[i].item()}
            writer.write(sample | {"json": {"name": path.name}})
    return str(folder / f"part-{{000000..{(len(images) - 1) // count:06d}}}.tar")


def same(found, images, classes=None) -> bool:
    assert len(found) == len(images)
    assert torch.equal(found.labels, images.labels) and found.labels.dtype == torch.int64
    assert found.classes == (classes or list(map(str, range(3))))
    return all(torch.equal(found.load(i), images.load(i)) for i in range(len(images)))


# ---- Equal to the folder ----


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards_of_tarfile(class_folder, tmp_path, tar_format):
    images = open_images(class_folder)
    found = open_images(by_tarfile(images, tmp_path / "a", format=tar_format))
    assert same(found, images)
    assert found.name(0) == f"{tmp_path}/a/part-000.tar/ant/0000.jpg"


def test_labels_in_json(class_folder, tmp_path):
    images = open_images(class_folder)
    assert same(open_images(by_tarfile(images, tmp_path / "a", "json")), images, list(CLASSES))


def test_shards_without_labels(class_folder, tmp_path):
    found = open_images(by_tarfile(open_images(class_folder), tmp_path / "a", label=""))
    assert found.labels is None and found.classes == [] and len(found) == N


def write_samples(path: Path, labels: list) -> str:
    """A shard of one image per label; bytes go to a .cls member, the rest, but None, to a .json one."""
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            add(tar, f"{i}.png", png(i))
            if label is not None:
                text = label if isinstance(label, bytes) else json.dumps({"label": label}).encode()
                add(tar, f"{i}.cls" if isinstance(label, bytes) else f"{i}.json", text)
    return str(path)


@pytest.mark.parametrize("missing", [None, b" ", 1.5, True])
def test_a_sample_without_a_label_is_named(tmp_path, missing, capsys):
    images = open_images(write_samples(tmp_path / "a.tar", [b"1", 0, missing, b"1", missing]))
    assert images.labels is None and images.classes == []
    said = capsys.readouterr().out
    assert all(word in said for word in ("no labels", "2 of 5 samples", "a.tar/2.png", "key.cls"))


def test_labels_in_json_may_be_whole_floats(tmp_path):
    images = open_images(write_samples(tmp_path / "a.tar", [b"1", 1.0, 0, 2.0]))
    assert images.labels.tolist() == [1, 1, 0, 2] and images.classes == ["0", "1", "2"]


def test_shards_of_webdataset_read_as_webdataset_does(class_folder, tmp_path):
    images = open_images(class_folder)
    pattern = by_webdataset(images, tmp_path / "a")
    found = open_images(pattern)
    assert same(found, images)
    webdataset = pytest.importorskip("webdataset")
    oracle = list(webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in oracle] == [Path(found.name(i)).stem for i in range(N)]
    assert [int(s["cls"]) for s in oracle] == found.labels.tolist()


def test_a_folder_of_shards_and_its_splits(class_folder, tmp_path):
    images = open_images(class_folder)
    for part in ("train", "val"):
        by_tarfile(images, tmp_path / "set" / part)
    (tmp_path / "set" / "train" / "README.md").write_text("about them")
    for split in ("train", "val"):
        assert same(open_images(tmp_path / "set", split), images)
    assert same(open_images(tmp_path / "set" / "val"), images)


def test_what_is_no_shard_is_not_kept(tmp_path, cache):
    pytest.importorskip("webdataset")
    for command in ("echo 404: no such page", "true"):
        with pytest.raises(Refused, match="could not be copied"):
            open_images(f"pipe:{command}")
        assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_pipes_are_copied_once(class_folder, tmp_path, cache, capfd):
    pytest.importorskip("webdataset")
    images = open_images(class_folder)
    pattern = by_tarfile(images, tmp_path / "a")
    pipe = f"pipe:echo run >> {tmp_path}/runs; cat {pattern}"
    for _ in range(2):
        assert same(open_images(pipe), images)
    assert {path.suffix for path in cache.glob("[!.]*")} == {".lock", ".tar"}
    assert (tmp_path / "runs").read_text() == "run\n" * 3
    assert capfd.readouterr().out.count("delete that file to copy it again") == 3
    for path in cache.glob("*.tar"):
        path.rename(path.with_name(f".{path.name}.12345.tmp"))  # what a process leaves that is killed while it copies
    assert same(open_images(pipe), images) and not list(cache.glob(".*.tmp"))
    assert (tmp_path / "runs").read_text() == "run\n" * 6


@pytest.mark.parametrize(
    "pattern", ["a", "a-{000..003}.tar", "{7..11}x", "{a,b}/{08..10}", "x{,y}z", "{print}", "{2..1}"]
)
def test_braces(pattern):
    braceexpand = pytest.importorskip("braceexpand")
    expected = [] if pattern == "{2..1}" else list(braceexpand.braceexpand(pattern))  # it would count down
    assert shards.expand(pattern) == expected


# ---- Training on them ----


class Whole:
    """A stand-in for the augmentation: two crops at random places."""

    reduction = None

    def cut(self, image, rng):
        top, left = (int(rng.integers(n - 15)) for n in image.shape[1:])
        return [image[:, top : top + 16, left : left + 16]] * 2, torch.from_numpy(rng.random((2, 8), np.float32))


def test_two_ranks_with_two_workers_see_every_image_once_an_epoch(class_folder, tmp_path):
    found = open_images(by_tarfile(open_images(class_folder), tmp_path / "a"))
    loaders = [batches(found, Whole(), 4, 2, 0, rank, 2, last_batch=2 * N // 8) for rank in (0, 1)]
    seen = [[index for batch in loader for index in batch["index"].tolist()] for loader in loaders]
    for epoch in range(2):
        part = slice(epoch * N // 2, (epoch + 1) * N // 2)
        assert Counter(seen[0][part] + seen[1][part]) == Counter(range(N))


def test_the_position_is_resumed_to_the_bit_and_views_are_those_of_the_folder(class_folder, tmp_path):
    images = open_images(class_folder)
    found = open_images(by_tarfile(images, tmp_path / "a"))
    whole = list(batches(images, Whole(), 8, 0, 0, last_batch=12))
    for first in (0, 5, 7):
        part = list(batches(found, Whole(), 8, 2, 0, first_batch=first, last_batch=12))
        assert len(part) == 12 - first
        for a, b in zip(part, whole[first:], strict=True):
            assert torch.equal(a["index"], b["index"]) and torch.equal(a["params"], b["params"])
            assert torch.equal(a["crops"][0], b["crops"][0])


@pytest.mark.usefixtures("small_heads")
def test_a_run_on_shards_is_the_run_on_the_folder(class_folder, tmp_path):
    logs = []
    for path in (class_folder, by_tarfile(open_images(class_folder), tmp_path / "a")):
        out = str(tmp_path / f"out{len(logs)}")
        argv = [*SMALL, "--arch", "vit_nano", "--num_workers", "0", "--data_path", str(path), "--output_dir", out]
        assert main_dino.main(main_dino.get_args_parser().parse_args([*argv, "--steps", "3"])) == 0
        logs.append([line["loss"] for line in json_lines(Path(out) / "log_steps.txt")])
    assert logs[0] == logs[1] and len(logs[0]) == 3


# ---- What shards may hold ----


def shard(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add(tar, name, content)
    return str(path)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_one_image_per_sample_and_what_is_skipped(tmp_path, capsys):
    path = shard(tmp_path / "a.tar", {
        "._x.png": b"of a Mac", "x.png": png(1), "x.seg.png": png(2), "x.cls": b"3", "y.cls": b"0", "y.PNG": png(4),
        "deep.er/z.png": png(5), "deep.er/z.cls": b"1", "notes.txt": b"none",
    })  # fmt: skip
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("w.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = open_images(path)
    assert [int(found.load(i)[0, 0, 0]) for i in range(len(found))] == [1, 4, 5]
    assert found.labels.tolist() == [2, 0, 1] and found.classes == ["0", "1", "3"]
    assert "1 images are left out" in capsys.readouterr().out


def test_links_have_the_content_of_the_member_they_lead_to(tmp_path):
    path = shard(tmp_path / "a.tar", {"a/x.png": png(1), "a/x.cls": b"7"})
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (("b/y.png", tarfile.LNKTYPE, "a/x.png"), ("b/y.cls", tarfile.SYMTYPE, "../a/x.cls"),
                                   ("b/z.png", tarfile.SYMTYPE, "y.png"), ("b/z.cls", tarfile.SYMTYPE, "y.cls"),
                                   ("c/gone.png", tarfile.SYMTYPE, "nowhere.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        add(tar, "c/gone.cls", b"7")
    found = open_images(path)
    assert [Path(found.name(i)).name for i in range(len(found))] == ["x.png", "y.png", "z.png", "gone.png"]
    assert [int(found.load(i)[0, 0, 0]) for i in range(3)] == [1, 1, 1]
    assert found.labels.tolist() == [0] * 4 and found.classes == ["7"]
    with pytest.raises(Undecodable, match="gone.png: the file is empty"):
        found.load(3)


def test_a_sample_in_two_places_is_refused(tmp_path):
    path = shard(tmp_path / "a.tar", {"x.png": png(1), "y.png": png(2), "x.cls": b"1", "y.cls": b"2"})
    with pytest.raises(Refused, match="--data_path .*a.tar: .*sample 'x'.*--sort=name"):
        open_images(path)


def test_a_sample_with_two_labels_is_refused(tmp_path):
    members = {"x.png": png(1), "x.cls": b"1", "x.json": b'{"label": 2}', "y.png": png(2), "y.cls": b"2"}
    with pytest.raises(Refused, match="--data_path .*a.tar: sample 'x' has the labels 1 and 2; "):
        open_images(shard(tmp_path / "a.tar", members))
    agreeing = members | {"x.json": b'{"label": 1}'}
    assert open_images(shard(tmp_path / "b.tar", agreeing)).labels.tolist() == [0, 1]


def test_samples_without_an_image_are_counted(tmp_path, capsys):
    open_images(shard(tmp_path / "a.tar", {"x.png": png(1), "y.raw": b"", "z.raw": b"", "notes.txt": b""}))
    assert "3 samples without an image are passed over (2 .raw, 1 .txt)" in capsys.readouterr().out


def test_long_and_odd_names(tmp_path):
    odd = ["with space/äö 图.png", "x" * 120 + "/" + "y" * 150 + ".png", "a/100%.png"]
    found = open_images(shard(tmp_path / "a b.tar", {name: png(i) for i, name in enumerate(odd)}))
    assert [found.name(i) for i in range(3)] == [f"{tmp_path}/a b.tar/{name}" for name in odd]
    assert [int(found.load(i)[0, 0, 0]) for i in range(3)] == [0, 1, 2]


def test_a_broken_image_is_named(tmp_path):
    found = open_images(shard(tmp_path / "a.tar", {"x.png": png(0), "y.jpg": b"rubbish", "z.jpg": b""}))
    for i, reason in ((1, "y.jpg: not an image"), (2, "z.jpg: the file is empty")):
        with pytest.raises(Undecodable, match=f"^{tmp_path}/a.tar/{reason}"):
            found.load(i)


def test_a_shard_that_is_gone_is_named(tmp_path):
    found = open_images(shard(tmp_path / "a.tar", {"x.png": png(0)}))
    (tmp_path / "a.tar").unlink()
    with pytest.raises(Undecodable, match=f"^{tmp_path}/a.tar/x.png: No such file"):
        found.load(0)


def test_channels_and_pixels(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.full((4, 6, 5), 17, np.uint8))
    path = shard(tmp_path / "a.tar", {"x.png": png(0), "y.npy": buffer.getvalue()})
    found = open_images(path, in_chans=5)
    assert len(found) == 1 and (found.load(0) == 17).all()
    with pytest.raises(Undecodable, match="x.png: .*limit"):
        open_images(path, max_pixels=9).load(0)


@pytest.mark.parametrize("pattern, message", [
    ("none-{000..002}.tar", "'none-000.tar' isn't there .3 of 3"),
    ("whole{,r}.tar", "'wholer.tar' isn't there .1 of 2"),
    ("whole-{3..1}.tar", "the range is empty"),
    ("cut.tar", "cut.tar: .*cut short"),
    ("cut2.tar", "cut2.tar: .*cut short|unexpected end"),
    ("text.tar", "text.tar: .*again"),
    ("packed.tar.gz", "packed.tar.gz: .*again"),
    ("noimages.tar", "no images in 1 shard"),
    ("badjson.tar", "badjson.tar: .*again"),
    ("pipe:cat none.tar", "could not be copied .*exit 1"),
    ("pipe:cat cut.tar", "cut short"),
])  # fmt: skip
def test_errors_are_one_line(tmp_path, monkeypatch, pattern, message):
    if pattern.startswith("pipe:"):
        pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    whole = Path(shard(tmp_path / "whole.tar", {f"{i}.png": png(i) for i in range(9)}))
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:2048])
    (tmp_path / "cut2.tar").write_bytes(whole.read_bytes()[:5220])
    (tmp_path / "text.tar").write_text("no shard at all\n" * 100)
    shard(tmp_path / "noimages.tar", {"x.txt": b"x"})
    shard(tmp_path / "badjson.tar", {"x.png": png(0), "x.json": b"{"})
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as tar:
        add(tar, "x.png", png(0))
    with pytest.raises(Refused, match=message) as error:
        open_images(pattern)
    assert f"--data_path '{pattern}'" in str(error.value) and "\n" not in str(error.value)


def test_validation_needs_a_folder(tmp_path):
    with pytest.raises(Refused, match="no validation part"):
        open_images(shard(tmp_path / "a.tar", {"x.png": png(0)}), "val")


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    for module, path in (("webdataset", "pipe:cat x.tar"), ("datasets", f"hf:{tmp_path}")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(Refused, match=f"pip install {module}"):
            open_images(path)


def test_pipes_need_a_cache(monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setenv("DINO_CACHE", "")
    with pytest.raises(Refused, match="DINO_CACHE is empty; set it"):
        open_images("pipe:cat x.tar")


@pytest.mark.parametrize("name", ["samples", "key", "label"])
def test_a_bug_is_not_a_broken_shard(tmp_path, monkeypatch, name):
    def bug(*_):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(shards, name, bug)
    with pytest.raises(ValueError, match="^operands could not be broadcast$"):
        open_images(shard(tmp_path / "a.tar", {"x.png": png(0)}))


# ---- The index of shards ----


def test_the_index_follows_the_shards(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(listing, "WORTH_AN_INDEX", 2)
    path = shard(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(4)})

    def age(seconds):
        os.utime(path, (os.stat(path).st_mtime - seconds,) * 2)

    age(100)
    first = open_images(path)
    assert "index" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(shards, "samples", None)  # it may not be read again
        second = open_images(path)
    assert [int(second.load(i)[0, 0, 0]) for i in range(4)] == [0, 1, 2, 3]
    assert second.fingerprint == first.fingerprint and images_hash(second) == images_hash(first)
    shard(tmp_path / "a.tar", {f"{i}.png": png(i + 10) for i in range(4)})
    age(50)
    third = open_images(path)
    assert [int(third.load(i)[0, 0, 0]) for i in range(4)] == [10, 11, 12, 13]
    assert third.fingerprint != first.fingerprint and images_hash(third) != images_hash(first)


# ---- Hugging Face ----


@pytest.fixture(scope="module")
def hugging_face(class_folder, tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    images = open_images(class_folder)
    kept = [i for i in range(N) if not images.name(i).endswith(".npy")]
    content = [{"bytes": Path(images.name(i)).read_bytes(), "path": None} for i in kept]
    features = datasets.Features({"id": datasets.Value("int64"), "photo": datasets.Image(),
                                  "kind": datasets.ClassLabel(names=list(CLASSES))})  # fmt: skip
    rows = {"id": kept, "photo": content, "kind": images.labels[kept].tolist()}
    dataset = datasets.Dataset.from_dict(rows, features)
    folder = tmp_path_factory.mktemp("hf")
    dataset.save_to_disk(folder / "one")
    part = dataset.select(range(9))
    datasets.DatasetDict({"train": dataset, "validation": part}).save_to_disk(folder / "both")
    datasets.DatasetDict({"train": dataset, "test": part.remove_columns("kind")}).save_to_disk(folder / "other")
    integers = dataset.rename_column("kind", "label").cast_column("label", datasets.Value("int64"))
    integers.save_to_disk(folder / "int")
    integers.map(lambda row: {"label": 10 ** (4 + row["label"])}).save_to_disk(folder / "sparse")
    dataset.remove_columns("kind").save_to_disk(folder / "none")
    dataset.remove_columns("photo").save_to_disk(folder / "blind")
    return folder, [images.load(i) for i in kept], images.labels[kept]


@pytest.mark.parametrize("name, split, rows, classes", [
    ("one", None, 36, list(CLASSES)), ("one", "train", 36, list(CLASSES)), ("both", None, 36, list(CLASSES)),
    ("both", "train", 36, list(CLASSES)), ("both", "val", 9, list(CLASSES)), ("other", "val", 9, []),
    ("int", None, 36, ["0", "1", "2"]), ("sparse", None, 36, ["10000", "100000", "1000000"]),
    ("none", None, 36, []), ("both/validation", None, 9, list(CLASSES)),
])  # fmt: skip
def test_hugging_face(hugging_face, name, split, rows, classes):
    folder, tensors, labels = hugging_face
    found = open_images(f"hf:{folder}/{name}", split)
    assert len(found) == rows and found.classes == classes and found.name(3) == f"hf:{folder}/{name}[3]"
    assert all(torch.equal(found.load(i), tensors[i]) for i in range(rows))
    assert found.labels is None if not classes else torch.equal(found.labels, labels[:rows])


def test_hugging_face_in_workers(hugging_face):
    found = open_images(f"hf:{hugging_face[0]}/one")
    seen = [i for b in batches(found, Whole(), 6, 2, 0, last_batch=6) for i in b["index"].tolist()]
    assert sorted(seen) == list(range(36)) and images_hash(found) == images_hash(found)


@pytest.mark.parametrize("name, split, message", [
    ("nowhere", None, "no folder"), ("", None, "hf:FOLDER"), ("one", "val", "no splits"),
    ("blind", None, "datasets.Image"),
])  # fmt: skip
def test_hugging_face_errors(hugging_face, name, split, message):
    with pytest.raises(Refused, match=message) as error:
        open_images(f"hf:{hugging_face[0]}/{name}", split, flag="--eval_data_path")
    assert str(error.value).startswith("--eval_data_path 'hf:") and "\n" not in str(error.value)


def test_hugging_face_cells(tmp_path):
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": content, "path": None} for content in (png(1), b"rubbish", b"")] + [None]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features).save_to_disk(tmp_path / "a")
    found = open_images(f"hf:{tmp_path}/a")
    assert found.load(0).shape == (3, 4, 4)
    for i in (1, 2, 3):
        with pytest.raises(Undecodable, match=rf"a\[{i}\]: "):
            found.load(i)
