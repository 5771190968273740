"""Crops that are cut on the device are those that the workers cut, up to rounding."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import json_lines

import main_dino
import utils
from imagesets import loaders
from imagesets.cached import cached
from imagesets.pixels import Pixels
from imagesets.sources import open_images
from parallel import Refused

SIZES = ((96, 120), (70, 64), (33, 200), (96, 120))  # height, width
CPU = torch.device("cpu")


def smooth(height: int, width: int, seed: int, channels: int = 3) -> torch.Tensor:
    noise = torch.rand(1, channels, 9, 9, generator=torch.Generator().manual_seed(seed))
    return (255 * F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)).round().byte()[0]


IMAGES = [smooth(*size, i) for i, size in enumerate(SIZES)]


def augmentation(**options) -> utils.DataAugmentationDINO:
    return utils.DataAugmentationDINO((0.25, 1), (0.05, 0.25), 4, 80, 40, **options)


@pytest.mark.parametrize("channels, part", [(3, 2**26), (1, 1)])
def test_crops_are_those_of_the_workers(channels, part, monkeypatch):
    monkeypatch.setattr("imagesets.pixels.PART", part)
    images = [smooth(*size, i, channels) for i, size in enumerate(SIZES)]
    pixels, views = Pixels([image.permute(1, 2, 0) for image in images], CPU), augmentation()
    flips = set()
    for i, image in enumerate(images):
        crops, params = views.cut(image, np.random.default_rng(i))
        rows, same = views.places(i, *image.shape[-2:], np.random.default_rng(i))
        assert torch.equal(params, same) and all(row[0] == i for row in rows)
        flips |= {int(row[-1]) for row in rows}
        for group in (slice(0, 2), slice(2, 6)):
            actual, expected = pixels.crops(torch.stack(rows[group])), torch.stack(crops[group])
            assert actual.dtype == torch.uint8 and actual.shape == expected.shape
            off = (actual.int() - expected.int()).abs()
            assert off.max() <= 3 and off.float().mean() < 0.3  # `cut` also rounds between the two axes
    assert flips == {0, 1}


def test_a_crop_is_resized_in_float_and_rounded_once():
    pixels = Pixels([image.permute(1, 2, 0) for image in IMAGES], CPU)
    for i, (top, left, height, width), flipped in (
            (0, (3, 5, 90, 60), 0), (1, (0, 0, 70, 64), 1), (2, (1, 9, 7, 5), 0)):
        crop = IMAGES[i][None, :, top : top + height, left : left + width].float()
        expected = F.interpolate(crop, (40, 40), mode="bicubic", antialias=True)[0].clamp(0, 255)
        expected = expected.flip(-1) if flipped else expected
        (actual,) = pixels.crops(torch.tensor([[i, 40, top, left, height, width, flipped]]))
        assert (actual - expected).abs().max() <= 0.51


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        Image.fromarray(smooth(48, 64, i).permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_up_to_rounding(folder, workers):
    (folder / "5.png").write_bytes(b"no image")  # is replaced by another image, and its crops are that image's
    images = cached(open_images(str(folder)), None, 0)
    pixels = Pixels(images.images_in_memory(), CPU)

    def batches(pixels):
        return loaders.steps(images, augmentation(), 4, workers, 0, 1, 3, CPU, pixels=pixels)(0, 6)

    for actual, expected in zip(batches(pixels), batches(None), strict=True):
        assert torch.equal(actual["params"], expected["params"]) and torch.equal(actual["index"], expected["index"])
        assert actual["bad"] == expected["bad"]
        for ours, workers_crops in zip(actual["crops"], expected["crops"], strict=True):
            assert (ours.int() - workers_crops.int()).abs().float().mean() < 0.3


def test_a_run_with_crops_from_the_device(folder):
    def losses(name: str, *flags: str) -> list[float]:
        argv = ("--arch vit_nano --patch_size 8 --global_crops_size 32 --local_crops_size 16 --local_crops_number 2 "
                "--out_dim 64 --steps 6 --warmup_epochs 0 --batch_size_per_gpu 4 --precision fp32 --device cpu "
                "--num_workers 0 --log_every 1 --saveckp_freq 0 --cache_images").split()
        out = folder.parent / name
        argv += ["--data_path", str(folder), "--output_dir", str(out), *flags]
        args = main_dino.get_args_parser().parse_args(argv)
        assert main_dino.main(args) == 0
        return [line["loss"] for line in json_lines(out / "log_steps.txt")]

    assert losses("device", "--crop_on_device") == pytest.approx(losses("workers"), rel=2e-3)


def test_images_larger_than_the_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 80e9))
    with pytest.raises(Refused, match=r"--crop_on_device: 4 images of up to 200 x 96 pixels.*leave it out"):
        Pixels([image.permute(1, 2, 0) for image in IMAGES], torch.device("cuda"))


def test_that_refusal_comes_before_anything_is_written(folder, monkeypatch, capsys):
    def refused(images, device):
        raise Refused("--crop_on_device: too large")

    monkeypatch.setattr("pretraining.options.Pixels", refused)
    out = folder.parent / "out"
    argv = ("--arch vit_nano --patch_size 8 --global_crops_size 32 --local_crops_size 16 --out_dim 64 --steps 1 "
            "--warmup_epochs 0 --batch_size_per_gpu 4 --device cpu --num_workers 0 --cache_images --crop_on_device "
            f"--data_path {folder} --output_dir {out}").split()
    assert main_dino.main(main_dino.get_args_parser().parse_args(argv)) == 2
    assert "--crop_on_device: too large" in capsys.readouterr().err and not out.exists()
