"""The batched colour operations against Pillow's and torchvision's on one image, and their independence of the batch.

Differences from Pillow are given in levels of 255.
"""

import colorsys
from functools import cache

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv1
import torchvision.transforms.v2.functional as tv2
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from method import fused
from method import photometric as ph

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Pillow cuts (brightness, solarize) or rounds each result to 8 bits; for contrast it also rounds the grey version and
# its mean, of which at most |1 - f| < 1 takes part.
ONE_ROUNDING = 1.01
TWO_ROUNDINGS = 1.5
# Six box passes, each rounded to 8 bits and then spread by the next: half a level each at the worst.
BLUR = 3.01
# Pillow turns hue in HSV of 8 bits. The hue is cut to 1/255 of the circle, so is the turn, and going once around loses
# a third; each is 6 levels where high - low is 255. The means are smaller, and smaller yet on photographs (0.4).
HUE_WORST, HUE_MEAN = 18.0, 2.0
# The whole chain. Without hue, roundings grown by the factors up to 1.4; with it, its error likewise.
CHAIN_WORST, CHAIN_MEAN = 6.0, 1.5
CHAIN_WORST_HUE, CHAIN_MEAN_HUE = 24.0, 2.0
# float32 against float32 or float64, in [0, 1]; torchvision's luma starts with 0.2989 for 0.299, which contrast and
# saturation take |1 - f| of.
FLOAT, LUMA = 2e-6, 1.2e-4


def photos(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(M, 3, H, W) uint8 with the statistics of photographs: 1/f noise, correlated channels, and occluding edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    spectrum = 1 / np.maximum(frequency, 1 / max(height, width))

    def noise() -> np.ndarray:
        field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((3, height, width))) * spectrum).real
        field /= field.std() + 1e-9
        return 0.8 * field[:1] + 0.4 * field  # channels of natural images go together

    rows, columns = np.mgrid[:height, :width]
    result = []
    for _ in range(count):
        image = 128 + 45 * noise()
        for _ in range(3):
            side = np.cos(angle := rng.uniform(0, 7)) * rows + np.sin(angle) * columns
            behind = side < rng.choice(side.ravel())
            image = np.where(behind, image, rng.uniform(0, 255, (3, 1, 1)) + 30 * noise())
        result.append(image.clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.stack(result))


def random_params(count: int, seed: int = 0, strong: bool = False) -> torch.Tensor:
    """Parameters of the published ranges, all operations in use; strong: any hue, blur beyond the published."""
    rng = np.random.default_rng(seed)
    params = np.empty((count, 8), np.float32)
    params[:, ph.BRIGHTNESS], params[:, ph.CONTRAST] = rng.uniform(0.6, 1.4, (2, count))
    params[:, ph.SATURATION] = rng.uniform(0.8, 1.2, count)
    params[:, ph.HUE] = rng.uniform(-0.1, 0.1, count) * (5 if strong else 1)
    params[:, ph.ORDER] = rng.integers(-1, 24, count)
    params[:, ph.GREY] = rng.random(count) < 0.3
    params[:, ph.SIGMA] = rng.uniform(0.1, 2, count) * (2 if strong else 1) * (rng.random(count) < 0.6)
    params[:, ph.SOLARIZE] = rng.random(count) < 0.3
    return torch.from_numpy(params)


def identity(count: int) -> torch.Tensor:
    """Parameters that ask for nothing."""
    return torch.tensor([1.0, 1.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0]).repeat(count, 1)


def to_pil(crops: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(c.permute(1, 2, 0).numpy()) for c in crops]


def from_pil(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])


def unnormalize(images: torch.Tensor) -> torch.Tensor:
    return images * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)


def levels(ours: torch.Tensor, pillow: list[Image.Image]) -> torch.Tensor:
    """Absolute differences of images in [0, 1] from Pillow's, in levels of 255."""
    return (255 * ours - from_pil(pillow)).abs()


def pillow_jitter(image: Image.Image, operation: int, factor: float) -> Image.Image:
    if operation == ph.HUE:
        return tv1.adjust_hue(image, factor) if factor else image
    enhance = {
        ph.BRIGHTNESS: ImageEnhance.Brightness, ph.CONTRAST: ImageEnhance.Contrast, ph.SATURATION: ImageEnhance.Color
    }
    return enhance[operation](image).enhance(factor)


def pillow_chain(image: Image.Image, params: list[float]) -> Image.Image:
    """The published transforms on one image, up to the tensor."""
    if params[ph.ORDER] >= 0:
        for operation in ph.ORDERS[int(params[ph.ORDER])]:
            image = pillow_jitter(image, operation, params[operation])
    if params[ph.GREY]:
        image = image.convert("L").convert("RGB")
    image = image.filter(ImageFilter.GaussianBlur(params[ph.SIGMA]))
    return ImageOps.solarize(image) if params[ph.SOLARIZE] else image


CROPS = photos(8, 61, 48)
IMAGES = CROPS / 255


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    "ours, operation, torchvision, worst, tolerance",
    [
        (ph.adjust_brightness, ph.BRIGHTNESS, tv2.adjust_brightness, ONE_ROUNDING, FLOAT),
        (ph.adjust_contrast, ph.CONTRAST, tv2.adjust_contrast, TWO_ROUNDINGS, LUMA),
        (ph.adjust_saturation, ph.SATURATION, tv2.adjust_saturation, TWO_ROUNDINGS, LUMA),
    ],
)
def test_blends(ours, operation, torchvision, worst, tolerance, factor):
    result = ours(IMAGES, torch.full((8,), factor))
    assert levels(result, [pillow_jitter(i, operation, factor) for i in to_pil(CROPS)]).max() <= worst
    assert (result - torchvision(IMAGES, factor)).abs().max() <= tolerance


@pytest.mark.parametrize("factor", [-0.5, -0.3, -0.1, -0.02, 0.0, 0.05, 0.1, 1 / 6, 1 / 3, 0.45, 0.5])
def test_hue(factor):
    result = ph.adjust_hue(IMAGES, torch.full((8,), factor))
    difference = levels(result, [tv1.adjust_hue(i, factor) for i in to_pil(CROPS)])
    assert difference.max() <= HUE_WORST and difference.mean() <= HUE_MEAN
    assert (result - tv2.adjust_hue(IMAGES, factor)).abs().max() <= FLOAT
    if factor == 0:
        assert torch.equal(result, IMAGES)


def test_hue_of_pure_colours():
    """Black, white, greys, and the corners, edges and faces of the colour cube."""
    colours = torch.cartesian_prod(*[torch.tensor([0.0, 0.25, 0.5, 1.0])] * 3)  # (64, 3)
    turns = torch.linspace(-0.5, 0.5, 25)
    result = ph.adjust_hue(colours.T.reshape(1, 3, 8, 8).repeat(25, 1, 1, 1), turns).flatten(2)
    for turn, turned in zip(turns.tolist(), result, strict=True):
        hsv = [colorsys.rgb_to_hsv(*c) for c in colours.tolist()]
        expected = torch.tensor([colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in hsv])
        assert (turned.T - expected).abs().max() <= FLOAT


def test_grey():
    result = ph.to_grey(IMAGES)
    assert levels(result, [i.convert("L").convert("RGB") for i in to_pil(CROPS)]).max() <= ONE_ROUNDING
    assert (result - tv2.rgb_to_grayscale(IMAGES, 3)).abs().max() <= LUMA


def test_solarize_is_pillows_on_every_value():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    result = ph.solarize(values / 255)
    assert levels(result, [ImageOps.solarize(i) for i in to_pil(values)]).max() <= 1e-4
    assert (result - tv2.solarize(values / 255, 128 / 255)).abs().max() <= FLOAT


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.0, 1.41, 1.42, 2.0, 3.0, 12.0])
@pytest.mark.parametrize("size", [(61, 48), (5, 3), (1, 2), (1, 1)])
def test_blur_is_pillows_up_to_the_edge(sigma, size):
    crops = photos(4, *size)
    result = ph.gaussian_blur(crops / 255, torch.full((4,), sigma))
    assert levels(result, [i.filter(ImageFilter.GaussianBlur(sigma)) for i in to_pil(crops)]).max() <= BLUR


def box_blur(plane: np.ndarray, sigma: float) -> np.ndarray:
    """Three passes of the box with the weights (a, 1, ..., 1, a) that has a third of the variance, by definition."""
    span = np.arange(-99, 100)
    for length in range(98):  # the box's variance grows from l to l + 1 ones on each side, and a says how far it goes
        ones, twos = np.abs(span) <= length, np.abs(span) == length + 1
        # variance (S + a R) / (n + 2 a) = sigma^2 / 3, solved for a
        rest = 2 * (length + 1) ** 2 - 2 * sigma**2 / 3
        ends = (ones.sum() * sigma**2 / 3 - (ones * span**2).sum()) / rest
        if 0 <= ends < 1:
            break
    box = ones + ends * twos
    box /= box.sum()
    for axis in (0, 1) * 3:
        padded = np.pad(plane, [(99, 99) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        plane = np.apply_along_axis(np.convolve, axis, padded, box, "valid")
    return plane


def test_blur_against_direct_convolution():
    sigma = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.05, 4.0, 1.4, 1.5])  # mixed, in any order
    result = ph.gaussian_blur(IMAGES, sigma)
    for ours, image, s in zip(result, IMAGES.double().numpy(), sigma.tolist(), strict=True):
        expected = np.stack([box_blur(plane, s) for plane in image])
        assert np.abs(ours.numpy() - expected).max() <= FLOAT


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 1.7, 2.0])
def test_blur_is_gaussian(sigma):
    """The response to a point: variance sigma^2 along each direction, and near the sampled Gaussian."""
    image = torch.zeros(1, 1, 25, 25, dtype=torch.float64)
    image[..., 12, 12] = 1
    response = ph.gaussian_blur(image, torch.tensor([sigma]))[0, 0]
    distance = torch.arange(-12, 13)
    assert torch.allclose(response, response.T, atol=1e-12) and abs(response.sum() - 1) < 1e-9
    assert abs((response.sum(0) * distance**2).sum() - sigma**2) < 1e-6
    if sigma >= 1:
        gaussian = torch.exp(-(distance**2) / (2 * sigma**2))
        assert (response.sum(0) - gaussian / gaussian.sum()).abs().max() < 0.012


def test_normalize_is_torchvisions():
    result = ph.photometric(CROPS, identity(8), MEAN, STD)
    expected = torch.stack([tv1.normalize(tv1.to_tensor(i), MEAN, STD) for i in to_pil(CROPS)])
    assert torch.equal(result, expected)


@pytest.mark.parametrize("hue, worst, mean", [(0, CHAIN_WORST, CHAIN_MEAN), (1, CHAIN_WORST_HUE, CHAIN_MEAN_HUE)])
def test_chain_against_pillow_in_all_orders(hue, worst, mean):
    crops, params = photos(75, 40, 52), random_params(75)
    params[:, ph.ORDER] = torch.arange(75) % 25 - 1
    params[:, ph.HUE] *= hue
    result = unnormalize(ph.photometric(crops, params, MEAN, STD))
    chain = [pillow_chain(image, row) for image, row in zip(to_pil(crops), params.tolist(), strict=True)]
    difference = levels(result, chain)
    assert difference.max() <= worst and difference.mean() <= mean


def test_chain_is_its_operations_one_by_one():
    crops, params = photos(50, 23, 18), random_params(50, strong=True)
    params[:, ph.ORDER] = torch.arange(50) % 25 - 1
    result = ph.photometric(crops, params, MEAN, STD)
    jitter = {
        ph.BRIGHTNESS: ph.adjust_brightness, ph.CONTRAST: ph.adjust_contrast,
        ph.SATURATION: ph.adjust_saturation, ph.HUE: ph.adjust_hue,
    }
    for ours, crop, row in zip(result, crops, params, strict=True):
        image = crop[None] / 255
        for operation in ph.ORDERS[int(row[ph.ORDER])] if row[ph.ORDER] >= 0 else ():
            image = jitter[operation](image, row[operation, None])
        if row[ph.GREY]:
            image = ph.to_grey(image)
        image = ph.gaussian_blur(image, row[ph.SIGMA, None])
        if row[ph.SOLARIZE]:
            image = ph.solarize(image)
        assert torch.equal(ours, ph.normalize(image, torch.tensor(MEAN), torch.tensor(STD))[0])


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("part", [1, 7000, 2**40])
def test_a_crop_does_not_depend_on_its_batch(part, channels, monkeypatch):
    """To the bit, however the batch is ordered, divided between processes, or cut into parts."""
    crops, params = photos(60, 29, 31)[:, :channels], random_params(60, strong=True)
    stats = MEAN[:channels], STD[:channels]
    whole, before = ph.photometric(crops, params, *stats), crops.clone()
    monkeypatch.setattr(ph, "CPU_PART", part)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ph.photometric(crops[order], params[order], *stats), whole[order])
    for rows in (slice(0, 1), slice(3, 20), slice(1, 60, 2)):
        assert torch.equal(ph.photometric(crops[rows], params[rows], *stats), whole[rows])
    last = crops.to(memory_format=torch.channels_last)
    assert torch.equal(ph.photometric(last, params, *stats), whole)
    assert torch.equal(crops, before)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_go_without_colour(channels):
    crops = torch.cat([photos(12, 20, 21, seed=s) for s in (0, 1)], dim=1)[:, :channels]
    params = random_params(12)
    mean, std = (0.5,) * channels, (0.25,) * channels
    plain = params.clone()
    plain[:, ph.SATURATION], plain[:, ph.HUE], plain[:, ph.GREY] = 1, 0, 0
    result = ph.photometric(crops, params, mean, std)
    assert torch.equal(result, ph.photometric(crops, plain, mean, std))
    if channels == 1:  # Pillow's grey images have a contrast, too
        images, pixels = [Image.fromarray(c[0].numpy()) for c in crops], 255 * (0.5 + 0.25 * result[:, 0])
        params[:, ph.HUE] = 0
        for ours, image, row in zip(pixels, images, params.tolist(), strict=True):
            pillow = pillow_chain(image.convert("RGB"), [*row[:2], 1, *row[3:]]).getchannel(0)
            assert np.abs(ours.numpy() - np.array(pillow)).max() <= 6  # roundings, grown by the factors up to 1.4


@pytest.mark.parametrize("params", [identity(5), random_params(5)[:0]], ids=["nobody", "empty"])
def test_nothing_to_do(params):
    crops = CROPS[: len(params)]
    result = ph.photometric(crops, params, MEAN, STD)
    assert result.shape == crops.shape and result.dtype == torch.float32
    assert torch.allclose(unnormalize(result), crops / 255, atol=1e-6)


@pytest.mark.parametrize("method, shape", [
    (ph, (40, 3, 32, 24)), (ph, (40, 1, 5, 5)), (ph, (0, 3, 8, 8)), (fused, (40, 3, 32, 24)), (fused, (0, 3, 8, 8))])
def test_no_step_reads_the_pixels(method, shape, monkeypatch):
    """On the meta device there are none: whatever waits for a value fails."""
    monkeypatch.setattr(fused, "compiled", lambda function: function)
    crops = torch.empty(shape, dtype=torch.uint8, device="meta")
    stats = MEAN[: shape[1]], STD[: shape[1]]
    result = method.photometric(crops, random_params(shape[0], strong=True), *stats)
    assert result.shape == shape and result.dtype == torch.float32 and result.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", [ph, fused])
def test_cuda_is_cpu_and_never_waits(method):
    crops, params = photos(64, 48, 40), random_params(64, strong=True)
    on_cpu, there = ph.photometric(crops, params, MEAN, STD), crops.cuda()
    method.photometric(there, params, MEAN, STD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = method.photometric(there, params, MEAN, STD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (result.cpu() - on_cpu).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(crops=CROPS.float()), "uint8"),
        (dict(crops=CROPS[0]), "uint8"),
        (dict(params=identity(7)), r"\(8, 8\)"),
        (dict(params=identity(8).to("meta")), "on the CPU"),
        (dict(params=identity(8).index_fill(1, torch.tensor(ph.ORDER), 24)), "-1 to 23"),
        (dict(mean=(0.5,)), "mean and std"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        ph.photometric(**(dict(crops=CROPS, params=identity(8), mean=MEAN, std=STD) | change))


def test_fused_kernels_compute_the_same(monkeypatch):
    """Without the compiler, which takes a minute: operations one by one, and what torch.compile traces of them."""
    crops, params = photos(75, 23, 18), random_params(75, strong=True)
    params[:, ph.ORDER] = torch.arange(75) % 25 - 1
    params[:20, ph.SIGMA] = 0
    plain, last = ph.photometric(crops, params, MEAN, STD), crops.to(memory_format=torch.channels_last)
    for backend in (None, "aot_eager"):
        traced = cache(lambda f, b=backend: torch.compile(f, dynamic=True, backend=b, fullgraph=True) if b else f)
        monkeypatch.setattr(fused, "compiled", traced)
        for given, rows in ((crops, slice(75)), (last, slice(75)), (crops, slice(3)), (crops, slice(0))):
            result = fused.photometric(given[rows], params[rows], MEAN, STD)
            torch.testing.assert_close(result, plain[rows], rtol=0, atol=2e-5)


def test_fused_kernels_are_for_three_channels():
    with pytest.raises(ValueError, match="three channels, not 1"):
        fused.photometric(CROPS[:, :1], identity(8), MEAN[:1], STD[:1])
    with pytest.raises(ValueError, match=r"\(8, 8\)"):  # all else is checked as there
        fused.photometric(CROPS, identity(7), MEAN, STD)


def test_factors_that_change_nothing_change_nothing(monkeypatch):
    monkeypatch.setattr(fused, "compiled", lambda function: function)
    params = random_params(8, strong=True)
    params[:, [ph.ORDER, ph.GREY, ph.SIGMA, ph.SOLARIZE]] = torch.tensor([-1.0, 0, 0, 0])
    assert torch.equal(fused.photometric(CROPS, params, MEAN, STD), ph.photometric(CROPS, params, MEAN, STD))


@pytest.mark.slow
def test_compiled_photometric_equals_the_plain_one_without_a_graph_a_batch():
    torch._dynamo.reset()
    fused.compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    for count, side in ((40, 24), (12, 48), (31, 24), (7, 33), (1, 24), (25, 48)):
        crops, params = photos(count, side, side), random_params(count, seed=count)
        compiled = fused.photometric(crops, params, MEAN, STD)
        torch.testing.assert_close(compiled, ph.photometric(crops, params, MEAN, STD), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4 * 2  # four kernels; many crops, and one alone
