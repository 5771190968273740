"""Odd and broken files, and a worker that dies, have the outcome that docs/data.md states."""

import csv
import io
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import ENV, SMALL
from test_decode import png_bytes, smooth

import main_dino
from imagesets import heif
from imagesets.decode import Undecodable
from imagesets.loaders import batches
from imagesets.sources import open_images
from protocols.transforms import EvalImages

FOLDER = os.environ.get("DINO_ODD_IMAGES", "")  # with MANIFEST.csv: file, what it is

pytestmark = pytest.mark.usefixtures("small_heads")


def table() -> dict[str, str]:
    """file -> what a run does with it, from the page's table."""
    rows = re.findall(r"^\| (.+?) \| (trained on|replaced|passed over) \|", (ROOT / "docs/data.md").read_text(), re.M)
    return dict(rows)


# ---- The same kinds, made here ----


def encoded(array, kind: str, mode: str | None = None, **options) -> bytes:
    buffer, image = io.BytesIO(), Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(samples: int, declared: int, bits: int, sample_format: int) -> bytes:
    """2 x 2 pixels, one strip, little-endian; the header says `declared` samples a pixel."""
    entries = [(256, 3, 2), (257, 3, 2), (258, 3, bits), (259, 3, 1), (262, 3, 2 if samples == 3 else 1),
               (273, 4, 8), (277, 3, declared), (278, 3, 2), (279, 4, 4 * samples * bits // 8), (339, 3, sample_format)]
    pixels = np.linspace(0, 1, 4 * samples).astype(np.float32 if bits == 32 else np.uint8).tobytes()
    rows = b"".join(struct.pack("<HHIHH", tag, kind, 1, value, 0) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(entries)) + rows + bytes(4)


def with_exif(exif: bytes) -> bytes:
    return encoded(smooth(), "JPEG", exif=exif)


def kinds() -> dict[str, tuple[str, bytes]]:
    """What the page's table calls a file -> (name, content)."""
    rgb, grey = smooth(), smooth()[..., 0]
    deep = (grey.astype(np.uint16) << 8) + 99
    alpha = np.dstack([rgb, grey])
    jpeg, png = encoded(rgb, "JPEG"), encoded(rgb, "PNG")
    stream = png.index(b"IDAT") + 20
    frames = [Image.fromarray(rgb), Image.new("RGB", (64, 48))]
    upright = Image.Exif()
    upright[0x0112] = 6
    gif = b"GIF89a%s\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0%s\0\2\2L\1\0;"
    tables = jpeg.index(b"\xff\xc4")
    return {
        "JPEG cut short": ("a.jpg", jpeg[: len(jpeg) // 2]),
        "JPEG head, then zeros (as after a crash)": ("a.jpg", jpeg[:200] + bytes(len(jpeg) - 200)),
        "fuzzed JPEG": ("a.jpeg", jpeg[: tables + 5] + b"\xff" * 16 + jpeg[tables + 21 :]),  # Huffman codes
        "JPEG, APP14 marker cut short": ("a.jpg", jpeg[:2] + b"\xff\xee\0\x09Adobe\0d" + jpeg[2:]),
        "PNG with a broken IDAT stream": ("a.png", png[:stream] + bytes(40) + png[stream + 40 :]),
        "PNG without a whole IEND": ("a.png", png[:-12] + b"\0\0vNIDAT"),
        "TIFF that crashed libtiff": ("a.tif", tiff(3, 65535, 8, 1)),
        "GIF of zero width": ("a.gif", gif % (b"\0\0\1\0", b"\0\0\1\0")),
        "GIF that declares a huge size": ("a.gif", gif % (b"\xff\xff\xff\xff", b"\xff\xff\xff\xff")),
        "900 Mpx 1-bit PNG (DecompressionBombError)":
            ("a.png", png_bytes(struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0), [bytes(3750)] * 10)),
        "zero bytes": ("a.jpg", b""),
        "text named .jpg": ("a.jpg", b"this is not an image"),
        "32-bit float TIFF, colour": ("a.tiff", tiff(3, 3, 32, 3)),
        "HEIF (needs a plug-in)": ("a.heif", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        "PNG bytes named .jpg": ("a.jpg", png),
        "name with a space, non-ASCII, upper-case suffix": ("näme with space 图.JPG", jpeg),
        "CMYK JPEG": ("a.jpg", encoded(rgb, "JPEG", "CMYK")),
        "greyscale JPEG": ("a.jpg", encoded(grey, "JPEG")),
        "16-bit grey TIFF": ("a.tif", encoded(deep, "TIFF")),
        "16-bit grey PNG": ("a.png", encoded(deep, "PNG")),
        "float PFM": ("a.pfm", encoded(grey / np.float32(7), "PPM")),
        "1-bit PNG with tRNS": ("a.png", encoded(grey > 99, "PNG", transparency=0)),
        "palette PNG": ("a.png", encoded(rgb, "PNG", "P")),
        "RGBA PNG": ("a.png", encoded(alpha, "PNG")),
        "WebP with alpha": ("a.webp", encoded(alpha, "WEBP")),
        "animated GIF": ("a.gif", encoded(rgb, "GIF", save_all=True, append_images=frames[1:])),
        "multi-picture JPEG (MPO)": ("a.mpo", encoded(rgb, "MPO", save_all=True, append_images=frames[1:])),
        "EXIF orientation 6": ("a.jpg", with_exif(upright.tobytes())),
        "bad EXIF": ("a.jpg", with_exif(b"Exif\0\0MM\0*\0\0\xff\xff")),
        "progressive JPEG": ("a.jpg", encoded(rgb, "JPEG", progressive=True)),
        "BMP": ("a.bmp", encoded(rgb, "BMP")),
        "1x1": ("a.png", encoded(rgb[:1, :1], "PNG")),
    }  # fmt: skip


def outcome(path: Path) -> str:
    """What a run does with a file that has a good neighbour."""
    images = open_images(path.parent)
    numbers = [i for i in range(len(images)) if images.name(i) == str(path)]
    if not numbers:
        return "passed over"
    try:
        image = images.load(numbers[0])
    except Undecodable as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return "replaced"
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return "trained on"


def test_the_table_and_the_kinds_here_are_the_same():
    assert table().keys() == kinds().keys() and len(table()) >= 30


@pytest.mark.parametrize("kind", kinds())
def test_what_the_page_says(tmp_path, kind):
    if "HEIF" in kind and heif.installed():
        pytest.skip("pillow-heif is installed")
    name, content = kinds()[kind]
    (tmp_path / "neighbour.png").write_bytes(encoded(smooth(), "PNG"))
    (tmp_path / name).write_bytes(content)
    assert outcome(tmp_path / name) == table()[kind]


@pytest.mark.skipif(not FOLDER, reason="DINO_ODD_IMAGES names no folder of odd images with its MANIFEST.csv")
def test_what_the_page_says_of_real_files():
    said, wrong = table(), []
    with open(Path(FOLDER) / "MANIFEST.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        kind = next((k for k in said if k.startswith(row["what it is"].removesuffix(" (photo)"))), None)
        found = outcome(Path(FOLDER) / row["file"])
        if kind is None or found != said[kind]:
            wrong.append((row["file"], row["what it is"], found, said.get(kind)))
    assert rows and not wrong


# ---- All of them in one run ----


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    for i, (name, content) in enumerate(kinds().values()):
        (folder / f"{i:02d} {name}").write_bytes(content)
    return folder


def parsed(*flags):
    return main_dino.get_args_parser().parse_args([*SMALL, "--arch", "vit_nano", *map(str, flags)])


def test_a_run_on_all_of_them(odd, tmp_path, capfd):
    bad = [i for i, kind in enumerate(kinds()) if table()[kind] == "replaced"]
    flags = ["--data_path", odd, "--output_dir", tmp_path / "out", "--max_bad_images", 0.9, "--epochs", 1]
    assert main_dino.main(parsed(*flags, "--batch_size_per_gpu", 31, "--log_every", 9)) == 0
    out, err = capfd.readouterr()
    said = {int(n) for n in re.findall(r"^bad image, replaced by another: .*/(\d\d) ", out, re.M)}
    assert said <= set(bad) and len(said) == 10 and "further ones are only counted" in out and "Traceback" not in err


def test_too_many_of_them_stop_a_run(odd, tmp_path, capfd):
    assert main_dino.main(parsed("--data_path", odd, "--output_dir", tmp_path / "out")) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.search(r"stopped: .* images can't be decoded, more than --max_bad_images 0.01 allows; .*The last: ", line)


@pytest.mark.parametrize("workers", [0, 1])
def test_none_but_broken_ones_stop_a_run(tmp_path, capfd, workers):
    for i in range(16):
        (tmp_path / f"{i}.jpg").write_bytes(b"rubbish")
    flags = ["--data_path", tmp_path, "--output_dir", tmp_path / "out", "--num_workers", workers]
    assert main_dino.main(parsed(*flags)) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.search(r"stopped: --data_path: 100 images in a row can't be decoded; .*\.jpg: not an image", line)


def test_the_pixel_limit_is_a_flag(tmp_path, capfd):
    for i in range(16):
        Image.fromarray(smooth()).save(tmp_path / f"{i}.png")
    flags = ["--data_path", tmp_path, "--output_dir", tmp_path / "out", "--num_workers", 0, "--steps", 1]
    assert main_dino.main(parsed(*flags, "--max_pixels", 1000)) == 1
    assert "3072 pixels" in capfd.readouterr().err
    assert main_dino.main(parsed(*flags, "--max_pixels", 64 * 48)) == 0


def test_evaluation_names_the_broken_one(odd):
    images = open_images(odd)
    with pytest.raises(Undecodable, match="00 a.jpg: "):
        EvalImages(images, 32, 32, [0.5] * 3, [0.5] * 3)[0]


def test_a_broken_one_in_evaluation_is_named(tmp_path, capfd):
    for part in ("train", "val"):
        for i in range(16):
            path = tmp_path / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(smooth()).save(path)
    path.write_bytes(b"rubbish")
    flags = ["--eval_knn_every", 1, "--eval_data_path", tmp_path, "--num_workers", 0, "--output_dir", tmp_path / "out"]
    assert main_dino.main(parsed(*flags)) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.search(r"stopped: --eval_data_path: .*val/b/15.png: not an image .*; .*remove that file", line)


class Crops:
    reduction = None

    def cut(self, image, rng):
        return [torch.zeros(3, 2, 2)] * 2, torch.zeros(2, 8)


def test_replacements_do_not_depend_on_workers(odd):
    images = open_images(odd)
    alone, shared = (list(batches(images, Crops(), 5, workers, 0, last_batch=9)) for workers in (0, 2))
    assert [b["bad"] for b in alone] == [b["bad"] for b in shared] and any(b["bad"] for b in alone)


# ---- A worker that dies ----


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="workers are found in Linux's /proc")
def test_a_killed_worker_ends_the_run_with_one_line(tmp_path):
    flags = [*SMALL, "--arch", "vit_nano", "--num_workers", "2", "--epochs", "9999", "--output_dir", str(tmp_path)]
    run = subprocess.Popen([sys.executable, str(ROOT / "main_dino.py"), *flags], env=ENV, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        while "step 5/" not in run.stdout.readline():
            assert run.poll() is None
        os.kill(children(run.pid)[0], signal.SIGKILL)
        _, stderr = run.communicate(timeout=600)
    finally:
        run.kill()
    (line,) = stderr.strip().splitlines()
    # torch's own word, or that of the connection on which a batch was half-way
    assert run.returncode == 1 and re.search("stopped: (a )?DataLoader worker .*(Killed|exited|reset)", line)
    assert "--num_workers" in line and "memory" in line
