"""Search among embeddings: neighbours against a product in NumPy, queries by row and by image file, the sheet."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import extract_features
import search
from imagesets import shapes
from protocols import charts, embeddings, image_search
from protocols.knn import nearest


def brute_force(array, query, k, leave_out=None):
    """(row, cosine) one by one."""
    found = []
    for i, row in enumerate(array.astype(np.float64)):
        if i != leave_out:
            found.append((float(row @ query / np.sqrt((row @ row) * (query @ query))), i))
    return [(i, c) for c, i in sorted(found, key=lambda one: (-one[0], one[1]))[:k]]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nearest_is_exact(dtype):
    rng = np.random.default_rng(0)
    array, queries = (rng.standard_normal((n, 24)).astype(dtype) * 3 for n in (200, 5))
    found = nearest(torch.from_numpy(queries), torch.from_numpy(array), 10, columns=64)  # 200 rows in four blocks
    cosines, rows = (x.numpy() for x in found)
    for q in range(5):
        expected = brute_force(array, queries[q].astype(np.float64), 10)
        assert rows[q].tolist() == [i for i, _ in expected]
        np.testing.assert_allclose(cosines[q], [c for _, c in expected], atol=2e-6)


def test_the_query_is_left_out_by_its_row():
    assert image_search.without(4, [1.0, 1.0, 0.5, 0.2], [2, 4, 0, 1], 2) == [(2, 1.0), (0, 0.5)]
    assert image_search.without(None, [1.0, 0.5], [2, 4], 1) == [(2, 1.0)]
    assert image_search.without(9, [1.0, 1.0], [2, 4], 1) == [(2, 1.0)]  # behind its own copies


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Fifteen drawn images, of which 5 and 12 are the same, and their class tokens."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "photos").mkdir()
    for i in range(15):
        picture = Image.fromarray(shapes.draw(5 if i == 12 else i, 48)[0])
        picture.resize((48, 30) if i % 4 == 0 else (48, 48)).save(folder / "photos" / f"{i:02d}.png")
    extract(folder, "f.npy")
    return folder


def extract(folder, name, *more):
    args = ["--data_path", folder / "photos", "--output", folder / name, "--arch", "vit_nano", "--patch_size", 8,
            "--crop_size", 32, "--num_workers", 0, "--device", "cpu", *more]
    assert extract_features.main(extract_features.get_args_parser().parse_args([*map(str, args)])) == 0


def parse(*args):
    return search.get_args_parser().parse_args([*map(str, args)])


def test_a_query_is_normalized_as_the_features_were(photos, tmp_path):
    """The flags of the extraction count, not the defaults: a copy of row 5 has cosine 1 with it."""
    extract(photos, "scaled.npy", "--mean", 0.1, 0.2, 0.9, "--std", 0.9, 0.1, 0.4)
    default, scaled = (embeddings.read(photos / name)[0] for name in ("f.npy", "scaled.npy"))
    cosine = float(default[5] @ scaled[5] / np.linalg.norm(default[5]) / np.linalg.norm(scaled[5]))
    assert cosine < 0.99  # else the test would say nothing
    found = search.search(parse("--features", photos / "scaled.npy", "--query", photos / "photos" / "05.png", "--k", 2,
                                "--output", tmp_path / "sheet.png"))
    assert found[0][0][0] == 5 and found[0][0][1] > 0.99999


@pytest.mark.parametrize("suffix, more", [
    (".npy", ()), (".parquet", ("--half",)), (".safetensors", ("--tokens", "both")),
])
def test_rows_and_image_files(photos, tmp_path, capsys, suffix, more):
    if suffix != ".npy":
        extract(photos, f"f{suffix}", *more)
    query = photos / "photos" / "12.png"
    found = search.search(parse("--features", photos / f"f{suffix}", "--query", 5, 0, query, "--k", 4,
                                "--output", tmp_path / "new" / "sheet.png"))
    array = embeddings.read(photos / f"f{suffix}")[0]
    array = (array if array.ndim == 2 else array[:, 0]).astype(np.float64)
    for row, near in zip((5, 0), found, strict=False):
        expected = brute_force(array, array[row], 4, leave_out=row)
        assert [i for i, _ in near] == [i for i, _ in expected]
        np.testing.assert_allclose([c for _, c in near], [c for _, c in expected], atol=1e-5)
    assert found[0][0][0] == 12 and {i for i, _ in found[2][:2]} == {5, 12}
    assert found[2][0][1] == pytest.approx(1, abs=1e-3)
    printed = capsys.readouterr().out
    assert "row 12" in printed and "12.png" in printed
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        width, height = sheet.size
    assert width > 5 * 150 and height > 3 * 150


def test_sheet(tmp_path):
    image = torch.tensor([200, 30, 30], dtype=torch.uint8)[:, None, None].expand(3, 60, 90)
    rows = [[(image, "query\na"), (image, "0.9\nb")], [(image[:, :, :20], "query\nc")]]
    charts.draw_sheet(rows, tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as sheet:
        red = (np.asarray(sheet.convert("RGB")) == (200, 30, 30)).all(-1)
    height, width = red.shape
    quarters = [red[: height // 2, : width // 2], red[: height // 2, width // 2 :],
                red[height // 2 :, : width // 2], red[height // 2 :, width // 2 :]]
    assert [bool(q.any()) for q in quarters] == [True, True, True, False]
    assert image_search.short("a/b.png") == "b.png" and image_search.short("x" * 40 + "end.png").endswith("end.png")
    assert len(image_search.short("x" * 40)) == image_search.LONGEST_TITLE


def test_moved_images(photos, tmp_path):
    where = ("--features", photos / "f.npy", "--query", 1, "--output", tmp_path / "s.png")
    (tmp_path / "moved").symlink_to(photos / "photos")
    assert search.main(parse(*where, "--data_path", tmp_path / "moved")) == 0


@pytest.mark.parametrize("args, message", [
    (("--features", "nothing.npy"), "--features nothing.npy: no such file"),
    (("--features", "x.csv"), "has to end in"),
    (("--query", "15"), "--query 15: neither a row, 0 to 14"),
    (("--query", "nothing.png"), "--query nothing.png"),
    (("--output", "sheet.gif"), "--output sheet.gif"),
    (("--output", "{photos}/../f.npy/s.png"), "f.npy is a file; give a folder"),
    (("--data_path", "shapes:15x40"), "not the images that the features"),
    (("--query", "{photos}/00.png", "--pretrained_weights", "no.pth"), "no.pth: no such file"),
])
def test_bad_input_is_refused_in_one_line(photos, args, message, tmp_path, capsys):
    usual = ["--features", photos / "f.npy", "--query", "1", "--output", tmp_path / "s.png"]
    assert search.main(parse(*usual, *(a.format(photos=photos / "photos") for a in args))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("search.py: error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_the_sheet_replaces_no_image_of_the_users(photos, tmp_path, capsys):
    image, sheet = tmp_path / "mine.png", tmp_path / "sheet.png"
    image.write_bytes((photos / "photos" / "00.png").read_bytes())
    before = image.read_bytes()
    where = ["--features", photos / "f.npy", "--query", "1"]
    assert search.main(parse(*where, "--output", image)) == 2 and image.read_bytes() == before
    assert f"--output {image}: exists" in capsys.readouterr().err
    assert [search.main(parse(*where, "--output", sheet)) for _ in range(2)] == [0, 0]  # its own it may


def test_patch_tokens_and_strange_files_are_refused(photos, tmp_path, capsys):
    extract(photos, "patch.npy", "--tokens", "patch")
    np.save(tmp_path / "strange.npy", np.zeros((3, 4)))
    beside = json.loads((photos / "f.npy.json").read_text())
    for name, content, names in (("short", (photos / "f.npy").read_bytes()[:300], beside["names"]),
                                 ("fewer", (photos / "f.npy").read_bytes(), beside["names"][:5])):
        (tmp_path / f"{name}.npy").write_bytes(content)
        (tmp_path / f"{name}.npy.json").write_text(json.dumps(beside | {"names": names}))
    for path, message in ((photos / "patch.npy", "patch tokens only"), (tmp_path / "strange.npy", "does not describe"),
                          (tmp_path / "short.npy", "short.npy: damaged"),
                          (tmp_path / "fewer.npy", "fewer.npy: not what fewer.npy.json beside it describes")):
        assert search.main(parse("--features", path, "--query", 0, "--output", tmp_path / "s.png")) == 2
        assert message in capsys.readouterr().err


def test_an_image_that_cannot_be_decoded_is_named(photos, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    where = ("--features", photos / "f.npy", "--output", tmp_path / "s.png")
    assert search.main(parse(*where, "--query", tmp_path / "broken.png")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path / 'broken.png'}: " in error and "repair or remove" in error


def test_a_bug_is_not_mistaken_for_bad_input(photos, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(image_search, "nearest", broken)
    with pytest.raises(ValueError, match="could not be broadcast") as raised:
        search.main(parse("--features", photos / "f.npy", "--query", 0, "--output", tmp_path / "s.png"))
    assert raised.type is ValueError
