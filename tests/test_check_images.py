"""check_images.py: what it says of a folder, against what was put there."""

import numpy as np
import pytest
from PIL import Image

import check_images
from imagesets.sources import open_images


@pytest.fixture
def folder(tmp_path):
    """Two classes of three colour images, one of them cut short, a text file named .png, and a .raw file."""
    rng = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / "set" / ("cat", "dog é")[i % 2] / f"{i} a.{'png' if i < 4 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40 + i, 50, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:600])
    (path.parent / "text.png").write_text("no image")
    (path.parent / "scan.raw").write_bytes(b"x")
    return tmp_path / "set"


def run(capsys, *flags) -> tuple[int, str]:
    code = check_images.main(check_images.get_args_parser().parse_args(list(map(str, flags))))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_what_is_said_of_a_folder(folder, capsys):
    code, said = run(capsys, folder)
    assert code == 0 and "7 images, 2 of which can't be decoded; 2 classes (cat, dog é)" in said
    assert "by suffix: 5 .png, 2 .jpg" in said and "1 .raw" in said
    assert "by format: 4 PNG, 3 channels, 8 bits; 1 JPEG, 3 channels, 8 bits" in said
    assert "height x width: 40 x 50 to 44 x 50" in said
    for name in ("5 a.jpg", "text.png"):
        assert f"can't be decoded: {folder / 'dog é' / name}: " in said
    good = [np.asarray(Image.open(p).convert("RGB")) / 255 for p in
            [*(folder / "cat").iterdir(), folder / "dog é" / "1 a.png", folder / "dog é" / "3 a.png"]]
    mean = np.mean([p.mean((0, 1)) for p in good], 0)
    std = np.sqrt(np.mean([((p - mean) ** 2).mean((0, 1)) for p in good], 0))
    line = next(line for line in said.splitlines() if line.startswith("--mean"))
    numbers = np.array([float(word) for word in line.split() if not word.startswith("--")])
    assert np.allclose(numbers, [*mean, *std], atol=6e-5)


def test_the_list_of_good_images_is_a_data_path(folder, tmp_path, capsys):
    path = tmp_path / "lists" / "good.txt"
    code, said = run(capsys, folder, "--write", path)
    assert code == 0 and "5 images" in said.splitlines()[-1]
    images, whole = open_images(path), open_images(folder)
    names = [whole.name(i) for i in range(len(whole))]
    assert [images.name(i) for i in range(len(images))] == [n for n in names if n[-7:] not in ("5 a.jpg", "ext.png")]
    assert images.classes == whole.classes and images.labels.tolist() == [0, 0, 0, 1, 1]
    assert all(images.load(i).shape[0] == 3 for i in range(5))


def test_grey_and_multispectral_images_get_their_channels(tmp_path, capsys):
    for name in ("grey", "bands", "floats"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(tmp_path / "grey" / "a.png")
    np.save(tmp_path / "bands" / "a.npy", np.full((8, 8, 5), 51, np.uint8))
    np.save(tmp_path / "floats" / "a.npy", np.full((8, 8, 2), 500.0))
    said = run(capsys, tmp_path / "grey", "--value_range", 0, 8000)[1]
    assert "1 PNG, 1 channel, 16 bits" in said and "--in_chans 1 --mean 0.5020 --std 0.0000" in said  # 128 / 255
    said = run(capsys, tmp_path / "bands")[1]
    assert "NPY, 5 channels, uint8" in said and f"--in_chans 5 --mean {' '.join(['0.2000'] * 5)}" in said
    assert "--value_range LOW HIGH" in run(capsys, tmp_path / "floats")[1]
    said = run(capsys, tmp_path / "floats", "--value_range", 0, 1000)[1]
    assert "NPY, 2 channels, float64" in said and "--in_chans 2" in said


def test_a_file_of_the_users_is_not_replaced(folder, tmp_path, capsys):
    """The list that is checked, above all; what the script itself wrote is."""
    listed = tmp_path / "mine.csv"
    listed.write_text("path,label,camera\n" + "".join(f"{p},a,1\n" for p in sorted(folder.rglob("*.png"))))
    before = listed.read_bytes()
    code, said = run(capsys, listed, "--write", listed)
    assert code == 2 and f"--write {listed}: exists" in said and "another name" in said
    assert listed.read_bytes() == before
    assert [run(capsys, folder, "--write", tmp_path / "good.txt")[0] for _ in range(2)] == [0, 0]


def test_what_is_refused(folder, tmp_path, capsys):
    for flags, words in (
        ([tmp_path / "none"], ("DATA", "none")),
        (["shapes:4x32", "--write", tmp_path / "x.txt"], ("--write", "folder or list")),
        ([folder, "--write", folder / "cat" / "0 a.png" / "x.txt"], ("--write", "x.txt", "give a file")),
    ):
        code, said = run(capsys, *flags)
        assert code == 2 and all(word in said for word in words) and "Traceback" not in said
    assert run(capsys, "shapes:4x32")[0] == 0
