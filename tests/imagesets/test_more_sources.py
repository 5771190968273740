"""Lists with spaces, CSV files, zip archives, parquet files, labels as text, DICOM and HEIF files."""

import io
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_decode import pixels

from imagesets import dicom, heif
from imagesets.decode import Reading, Undecodable, decode
from imagesets.packages import Torchvision
from imagesets.sources import has_test_part, open_images
from parallel import Refused

COLOURS = {"cat/a b.png": 10, "cat/b.png": 20, "dog/c.png": 30}


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (level, level, level)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def files(tmp_path):
    for name, level in COLOURS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(level))
    return tmp_path


def levels(images) -> list[int]:
    return [int(images.load(i)[0, 0, 0]) for i in range(len(images))]


def labelled(images) -> list[tuple[int, str]]:
    return [(level, images.classes[label]) for level, label in zip(levels(images), images.labels, strict=True)]


EXPECTED = [(10, "cat"), (20, "cat"), (30, "dog")]


# ---- Lists ----


@pytest.mark.parametrize("name, content", [
    ("l.txt", "cat/b.png\tcat\ndog/c.png\tdog\n\ncat/b.png\tdog\n"),
    ("l.txt", "cat/b.png cat\ndog/c.png dog\ncat/b.png dog\n"),
    ("l.csv", "label,path\ncat,cat/b.png\ndog,dog/c.png\ndog,./cat//b.png\n")])  # fmt: skip
def test_an_image_with_two_labels_is_refused(files, name, content):
    (files / name).write_text(content)
    with pytest.raises(Refused, match=r"cat/+b\.png.*'cat' and 'dog'.*1 and 3.*keep one"):
        open_images(files / name)


def test_an_image_that_is_listed_twice_counts_twice(files, capsys):
    (files / "l.txt").write_text("cat/b.png\tcat\ndog/c.png\tdog\ncat/b.png\tcat\n")
    assert len(open_images(files / "l.txt")) == 3
    assert "1 of 3" in (said := capsys.readouterr().out) and "'cat/b.png'" in said
    (files / "l.txt").write_text("cat/b.png\ndog/c.png\n./cat/b.png\n")
    assert len(open_images(files / "l.txt")) == 3 and "1 of 3" in capsys.readouterr().out
    (files / "l.txt").write_text("cat/b.png\ndog/c.png\n")
    assert len(open_images(files / "l.txt")) == 2 and capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_an_archive_holds_twice_is_refused(files):
    with zipfile.ZipFile(files / "a.zip", "w") as archive:
        for level in (1, 2, 3):
            archive.writestr(f"cat/{level % 2}.png", png(level))
    with pytest.raises(Refused, match=r"a\.zip.*cat/1\.png.*twice.*pack it again"):
        open_images(files / "a.zip")


def test_lists_with_spaces(files, capsys):
    (files / "l.txt").write_text("cat/a b.png cat\ncat/b.png   cat\ndog/c.png dog\n")
    assert labelled(open_images(files / "l.txt")) == EXPECTED
    assert "'path label'" in capsys.readouterr().out
    (files / "l.txt").write_text("cat/a b.png\ndog/c.png\n")  # as before: names with spaces
    images = open_images(files / "l.txt")
    assert levels(images) == [10, 30] and images.labels is None
    (files / "l.txt").write_text("cat/b.png 1\ndog/c.png\n")
    with pytest.raises(Refused, match=r"l.txt.*dog/c.png.*no label.*'path label'"):
        open_images(files / "l.txt")


@pytest.mark.parametrize("text", [
    "path,label\ncat/a b.png,cat\ncat/b.png,cat\ndog/c.png,dog\n",
    "\ufeffID;Label;File Name;filename\r\n1;cat;x;\"cat/a b.png\"\r\n2;cat;x;cat/b.png\r\n\r\n3;dog;x;dog/c.png\r\n",
    "image\tclass\ncat/a b.png\tcat\ncat/b.png\tcat\ndog/c.png\tdog\n",
])
def test_csv_files(files, text):
    (files / "l.csv").write_bytes(text.encode())
    assert labelled(open_images(files / "l.csv")) == EXPECTED


@pytest.mark.parametrize("text, words", [
    ("cat/b.png,cat\n", "header.*path.*label"),
    ("path,label\n", "header.*row per image"),
    ("path,label\ncat/b.png,cat\ndog/c.png\n", "row 3.*label"),
    ("path,label\nnone.png,cat\n", "none.png.*isn't there.*relative"),
])
def test_csv_files_that_are_refused(files, text, words):
    (files / "l.csv").write_text(text)
    with pytest.raises(Refused, match=f"l.csv.*{words}"):
        open_images(files / "l.csv")
    (files / "l.csv").write_text("path\ncat/b.png\n")
    assert levels(open_images(files / "l.csv")) == [20]


def test_labels_without_the_spaces_around_them(files):
    (files / "l.txt").write_text("cat/a b.png\tcat \ncat/b.png\t cat\ndog/c.png\tdog\n")
    assert labelled(open_images(files / "l.txt")) == EXPECTED
    (files / "l.txt").write_text("cat/a b.png\tcaf\u00e9\ncat/b.png\tcafe\u0301\n")  # é of Linux, and of macOS
    assert open_images(files / "l.txt").classes == ["caf\u00e9"]


def test_comments_and_line_ends_of_old_macs(files, capsys):
    (files / "#dog").mkdir()
    (files / "#dog/c.png").write_bytes(png(30))
    lines = ["# path\tand label", "cat/a b.png\tcat", "#", "cat/b.png\tcat", "#dog/c.png\tdog"]
    for ends in ("\n", "\r\n", "\r"):
        (files / "l.txt").write_bytes(ends.join(lines).encode())
        assert labelled(open_images(files / "l.txt")) == EXPECTED
        assert "2 of 5 lines are comments" in capsys.readouterr().out
    (files / "l.txt").write_text("cat/b.png\tcat\ndog/c.png\n")
    with pytest.raises(Refused, match="some lines.*'dog/c.png'.*write"):
        open_images(files / "l.txt")


TABLE = "path,{},{}\ncat/b.png,cat,{}\ndog/c.png,dog,{}\ncat/a b.png,cat,{}\n"


@pytest.mark.parametrize("label, split, train, val", [
    ("label", "split", "train", "val"), ("labels", "Subset", "Training", "TEST"),
])  # fmt: skip
def test_a_column_that_tells_the_part(files, label, split, train, val, capsys):
    (files / "l.csv").write_text(TABLE.format(label, split, train, train, val))
    assert has_test_part(str(files / "l.csv"))
    assert labelled(open_images(files / "l.csv", "train")) == [(20, "cat"), (30, "dog")]
    assert labelled(open_images(files / "l.csv", "val")) == [(10, "cat")] and capsys.readouterr().out == ""
    assert len(open_images(files / "l.csv")) == 3 and "all parts" in capsys.readouterr().out


def test_columns_that_do_not_help(files, capsys):
    (files / "l.csv").write_text(TABLE.format("label", "split", "fold1", "fold1", "fold2"))
    assert not has_test_part(str(files / "l.csv")) and len(open_images(files / "l.csv", "train")) == 3
    assert "'split' is not used" in capsys.readouterr().out
    (files / "l.csv").write_text(TABLE.format("label", "split", "train", "gallery", "val"))
    assert len(open_images(files / "l.csv")) == 3 and "left out" not in capsys.readouterr().out
    assert len(open_images(files / "l.csv", "train")) == 1
    assert "rows whose 'split' is 'gallery' are left out" in capsys.readouterr().out
    (files / "l.csv").write_text(TABLE.format("label", "split", "test", "test", "test"))  # a list of one part
    assert not has_test_part(str(files / "l.csv")) and len(open_images(files / "l.csv", "train")) == 3
    (files / "l.csv").write_text(TABLE.format("breed", "id", 1, 2, 3))
    assert open_images(files / "l.csv").labels is None
    assert "no labels" in (said := capsys.readouterr().out) and "breed" in said and "category" in said


# ---- Archives ----


@pytest.mark.parametrize("top", ["", "photos/"])
@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_archives(tmp_path, top, packing, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", packing) as archive:
        for name, level in reversed(COLOURS.items()):
            archive.writestr(top + name, png(level))
        for name in ("__MACOSX/cat/._b.png", ".hidden/x.png", "README.md"):
            archive.writestr(top + name, b"x")
    images = open_images(tmp_path / "a.zip")
    assert labelled(images) == EXPECTED and images.name(0) == f"{tmp_path}/a.zip/{top}cat/a b.png"
    assert "1 .md" in capsys.readouterr().out and images.fingerprint


def test_archives_that_cannot_be_read_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK no archive")
    with pytest.raises(Refused, match=r"a.zip.*make or fetch"):
        open_images(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", png(1))
    with pytest.raises(Refused, match=r"a.png.*deflate; unpack"):
        open_images(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", b"")
    with pytest.raises(Refused, match="no images"):
        open_images(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png(1) + bytes(1000))
    content = bytearray(path.read_bytes())
    content[40:60] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(Undecodable, match="a.zip/a.png: "):
        open_images(path).load(0)


# ---- Parts ----

PARTS = {"cat/1.png": 10, "dog/2.png": 20, "cat/3.png": 30, "dog/4.png": 40}  # two of each part


def write_parts(folder, kind, train, val, more=()):
    names = [f"{train if i < 2 else val}/{name}" for i, name in enumerate(PARTS)] + list(more)
    contents = [png(level) for level in PARTS.values()] + [png(99) for _ in more]
    if kind == "zip":
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            for name, content in zip(names, contents, strict=True):
                archive.writestr(f"top/{name}", content)
        return folder / "a.zip"
    for name, content in zip(names, contents, strict=True):
        (folder / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "a" / name).write_bytes(content)
    return folder / "a"


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("train, val", [("train", "test"), ("Train", "Test"), ("training", "validation"),
                                        ("TRAIN", "valid"), ("training", "val")])  # fmt: skip
def test_parts_by_their_usual_names(tmp_path, kind, train, val, capsys):
    path = write_parts(tmp_path, kind, train, val)
    assert has_test_part(str(path))
    assert labelled(open_images(path, "train")) == [(10, "cat"), (20, "dog")]
    assert labelled(open_images(path, "val")) == [(30, "cat"), (40, "dog")]
    assert capsys.readouterr().out == ""
    whole = open_images(path)  # parts are no classes
    assert whole.labels is None and levels(whole) == [v for _, v in sorted(zip((train, train, val, val), PARTS.values(),
                                                                             strict=True))]
    said = capsys.readouterr().out
    assert all(word in said for word in ("no labels", train, val, "rename"))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_classes_with_names_of_parts(tmp_path, kind, capsys):
    """Among other classes, `training` and `Train` are classes."""
    path = write_parts(tmp_path, kind, "training", "running")
    assert not has_test_part(str(path)) and open_images(path, "train").classes == ["running", "training"]
    (tmp_path / "b").mkdir()
    path = write_parts(tmp_path / "b", kind, "running", "test")
    with pytest.raises(Refused, match="'test' .*no 'train'.*rename"):
        open_images(path, "train")


def test_parts_that_differ_in_case_only(tmp_path):
    path = write_parts(tmp_path, "folder", "Train", "Test", ["TRAIN/cat/5.png"])
    with pytest.raises(Refused, match="TRAIN and Train .*rename"):
        open_images(path, "train")


def test_an_image_beside_the_folders_of_an_archive_is_named(tmp_path, capsys):
    images = open_images(write_parts(tmp_path, "zip", "a", "b", ["stray.png"]))
    assert images.labels is None and len(images) == 5
    line = capsys.readouterr().out
    assert "no labels" in line and "1 of 5 images" in line and "stray.png" in line and "move" in line


def test_archives_with_backslashes(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, level in COLOURS.items():
            archive.writestr(name.replace("/", "\\"), png(level))
    assert labelled(open_images(tmp_path / "a.zip")) == EXPECTED


def test_class_folders_in_two_unicode_forms(tmp_path, capsys):
    composed, apart = "caf\u00e9", "cafe\u0301"
    images = open_images(write_parts(tmp_path / "two", "folder", composed, apart))
    assert images.labels is None and "u0301" in (said := capsys.readouterr().out) and "join" in said


# ---- Tables ----


def test_parquet_files(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [(png(level), name.split("/")[0]) for name, level in COLOURS.items()]
    plain = pa.table({"id": [1, 2, 3], "data": [row[0] for row in rows], "label": [row[1] for row in rows]})
    pq.write_table(plain, tmp_path / "a.parquet")
    assert labelled(open_images(tmp_path / "a.parquet")) == EXPECTED
    for number, part in enumerate((plain[:2], plain[2:])):
        cells = [{"bytes": cell.as_py(), "path": None} for cell in part["data"]]
        pq.write_table(pa.table({"image": cells, "label": part["label"]}), tmp_path / f"b-{number}.parquet")
    images = open_images(f"{tmp_path}/b-{{0..1}}.parquet")
    assert labelled(images) == EXPECTED and len(images.fingerprint) == 64
    with pytest.raises(Refused, match="b-2.parquet' isn't there"):
        open_images(f"{tmp_path}/b-{{0..2}}.parquet")
    pq.write_table(plain.select(["id"]), tmp_path / "c.parquet")
    with pytest.raises(Refused, match="no column of images among id"):
        open_images(tmp_path / "c.parquet")


def test_labels_of_saved_data_sets_may_be_text(tmp_path):
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": png(level), "path": None} for level in COLOURS.values()]
    columns = {"image": cells, "label": ["zebra", "ant", "zebra"]}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "text")
    images = open_images(f"hf:{tmp_path / 'text'}")
    assert images.classes == ["ant", "zebra"] and images.labels.tolist() == [1, 0, 1]


def saved(folder, **columns) -> str:
    """A Hugging Face data set of three images; columns: (type, values)."""
    datasets = pytest.importorskip("datasets")
    kinds = {"class": datasets.ClassLabel(names=["ant", "bee"])}
    features = datasets.Features({"image": datasets.Image()} | {
        name: kinds.get(kind) or datasets.Value(kind) for name, (kind, _) in columns.items()})
    cells = [{"bytes": png(level), "path": None} for level in COLOURS.values()]
    rows = {"image": cells} | {name: values for name, (_, values) in columns.items()}
    datasets.Dataset.from_dict(rows, features).save_to_disk(folder)
    return f"hf:{folder}"


FIRST, CODED = ("class", [0, 0, 1]), ("class", [1, 0, 0])


@pytest.mark.parametrize("columns, labels, classes, words", [
    ({"is_train": FIRST, "label": CODED}, [1, 0, 0], ["ant", "bee"], ("'label'", "is_train")),
    ({"is_train": FIRST, "label": ("int64", [7, 5, 5])}, [1, 0, 0], ["5", "7"], ("'label'", "is_train")),
    ({"Category": ("string", ["b", "a ", "a"])}, [1, 0, 0], ["a", "b"], ()),
    ({"kind": CODED}, [1, 0, 0], ["ant", "bee"], ()),
    ({"label": ("float64", [3.0, 1.0, 1.0])}, [1, 0, 0], ["1", "3"], ()),
    ({"is_train": FIRST, "kind": CODED}, None, [], ("no labels", "is_train, kind", "rename_column")),
    ({"label": ("float64", [0.5, 1.0, 2.0])}, None, [], ("no labels", "fractions")),
    ({"label": ("class", [0, 1, -1])}, None, [], ("no labels", "1 of 3 rows", "'label'", "row 2")),
    ({"label": ("class", [0, None, None])}, None, [], ("no labels", "2 of 3 rows", "row 1", "complete")),
    ({"target": ("int64", [None, 1, 2])}, None, [], ("no labels", "1 of 3 rows", "'target'", "row 0")),
    ({"labels": ("string", ["a", None, "b"])}, None, [], ("no labels", "1 of 3 rows", "'labels'", "row 1")),
    ({"label": ("class", [-1, -1, -1])}, None, [], ()),  # a test set without labels
])  # fmt: skip
def test_the_column_of_labels(tmp_path, columns, labels, classes, words, capsys):
    path = saved(tmp_path / "set", **columns)
    capsys.readouterr()
    images = open_images(path)
    said = capsys.readouterr().out
    assert (None if images.labels is None else images.labels.tolist()) == labels and images.classes == classes
    assert all(word in said for word in words) and bool(said) == bool(words)


@pytest.mark.parametrize("targets, labels, words", [
    ([4, 2, 4], [1, 0, 1], ()), ([0, -1, -1], None, ("no labels", "2 of 3", "image 1")), ([-1, -1, -1], None, ()),
])  # fmt: skip
def test_targets_of_torchvision_that_are_not_known(targets, labels, words, capsys):
    class Three(list):
        pass

    dataset = Three(COLOURS)
    dataset.targets = targets
    images = Torchvision("torchvision:STL10", dataset, Reading())
    assert (None if images.labels is None else images.labels.tolist()) == labels
    said = capsys.readouterr().out
    assert all(word in said for word in words) and bool(said) == bool(words)


def test_rows_of_several_parts_are_not_mixed(tmp_path):
    path = saved(tmp_path / "set", split=("string", ["train", "Test", "train"]), label=CODED)
    assert len(open_images(path)) == 3  # to train on without labels
    with pytest.raises(Refused, match="'split' .*Test, train.*--val_data_path"):
        open_images(path, "train")


# ---- DICOM ----


def test_without_pydicom_the_way_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dicom, "installed", lambda: False)
    (tmp_path / "scan.dcm").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(Refused, match=r"no images.*1 \.dcm.*pip install pydicom"):
        open_images(tmp_path)
    with pytest.raises(Undecodable, match=r"scan\.dcm: .*pip install pydicom.*convert"):
        decode(tmp_path / "scan.dcm")
    (tmp_path / "a.png").write_bytes(png(1))
    assert len(open_images(tmp_path)) == 1 and "pip install pydicom" in capsys.readouterr().out


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_dicom_files(tmp_path, photometric):
    pydicom = pytest.importorskip("pydicom")
    values = np.array([[-1024, 0, 1023], [2047, 100, -2048]], np.int16)  # 12 bits, signed
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 2, 3, 1, photometric
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 1
    data.RescaleSlope, data.RescaleIntercept, data.PixelData = 2, -24, values.tobytes()
    data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    images = open_images(tmp_path)
    turned = (lambda a: 255 - a) if photometric == "MONOCHROME1" else (lambda a: a)
    assert (images.load(0)[0].numpy() == turned(np.rint((values + 2048.0) * (255 / 4095)))).all()
    units = np.clip((2.0 * values - 24 + 1000) / 2000, 0, 1) * 255
    assert (pixels(tmp_path / "a.dcm", 1, value_range=(-1000, 1000))[..., 0] == turned(np.rint(units))).all()
    with pytest.raises(Undecodable, match="2 x 3"):
        decode(tmp_path / "a.dcm", max_pixels=5)


# ---- HEIF ----

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_without_pillow_heif_the_way_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(heif, "installed", lambda: False)
    (tmp_path / "photo.HEIC").write_bytes(HEIC)
    with pytest.raises(Refused, match=r"no images.*1 \.heic.*pip install pillow-heif"):
        open_images(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(HEIC)  # as some phones name them
    with pytest.raises(Undecodable, match=r"photo\.jpg: .*pip install pillow-heif.*convert"):
        decode(tmp_path / "photo.jpg")
    assert len(open_images(tmp_path)) == 1 and "pip install pillow-heif" in capsys.readouterr().out


PILLOW_HEIF = """
from PIL import Image, ImageFile

class Stub(ImageFile.ImageFile):  # 5 x 4 red pixels, whatever the file holds
    format = "HEIF"
    def _open(self):
        self._size, self._mode = (5, 4), "RGB"
    def load(self):
        self.im = Image.new("RGB", (5, 4), "red").im
        return super().load()

def register_heif_opener():
    Image.register_open("HEIF", Stub, lambda start: start[4:12] == b"ftypheic")
    Image.register_extensions("HEIF", [".heic", ".heif"])
"""


def test_where_pillow_heif_is_installed_heif_files_are_images(tmp_path):
    """In a process of its own, as the package registers itself with Pillow."""
    (tmp_path / "pillow_heif.py").write_text(PILLOW_HEIF)
    for name in ("a.heic", "b.HEIF", "c.jpg"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(HEIC)
    code = ("from imagesets.sources import open_images\nimages = open_images('in')\n"
            "print([tuple(images.load(i).shape) + (int(images.load(i)[0].min()),) for i in range(len(images))])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])})
    assert done.stdout.strip() == str([(3, 4, 5, 255)] * 3), done.stderr
