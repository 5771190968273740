"""The second stage of DINO's augmentation, for a whole batch of crops on any device.

The published augmentation (arXiv 2104.14294, section 3.1, "Implementation details", after BYOL's) is, for each crop:

    colour jitter -> grey -> blur -> solarize -> [0, 1] -> (x - mean) / std

Each operation is a function `f(images, factor) -> images` of pictures in [0, 1] with one factor a picture;
`photometric` applies them in that order to the crops that need them. They compute what Pillow's and torchvision's
operations on one picture do, in float32 and without rounding to 8 bits in between.

A crop's result is a function of that crop and its parameters alone: every sum runs within one picture, in an order
that does not depend on the other pictures, so a batch may be cut up in any way. Nothing waits for the device: which
crops need what is worked out from the parameters, on the CPU.

Shapes: M crops, C channels, H x W pixels.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# What a row of parameters holds: three factors (1: unchanged), a hue shift (0: unchanged), the order of the four
# jitter operations (-1: no jitter), grey (0 or 1), blur in pixels (0: none), solarize (0 or 1).
COLUMNS = ("brightness", "contrast", "saturation", "hue", "order", "grey", "sigma", "solarize")
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARIZE = range(8)
ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))  # 24

# On a CPU, work through the crops in parts of about this many values: a part and its temporaries stay in the cache.
# Whole batches of 224-pixel crops took five times as long, most of it page faults of fresh memory.
CPU_PART = 2**20


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each picture with black: clamp(f x).

    Args:
        images: (M, C, H, W) float in [0, 1], as in all functions below.
        factor: (M,) f >= 0; 0 is black, 1 the picture. On any device, as in all functions below.
    """
    return (images * _per_image(factor, images)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each picture with the mean m of its grey version: clamp(f x + (1 - f) m).

    Args:
        factor: (M,) f >= 0; 0 is even grey, 1 the picture.
    """
    factor = _per_image(factor, images)
    mean = _luma(images.mean(3, keepdim=True).mean(2, keepdim=True))  # grey is linear, so the mean may come first
    return _blend(images, mean, factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each picture with its grey version g: clamp(f x + (1 - f) g). Three channels only.

    Args:
        factor: (M,) f >= 0; 0 is grey, 1 the picture.
    """
    return _blend(images, _luma(images), _per_image(factor, images))


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue of each pixel in HSV, keeping its value and saturation. Three channels only.

    Neither the hue nor the sector it lies in has to be found. Count hue in sixths of the circle. Red, as a function
    of hue, is `high` for two sixths, falls to `low` for one, stays for two and rises for one; green and blue are red
    two and four sixths later. Writing that out sector by sector, a turn by t in [-1, 1] gives

        red' = clamp(red + sign(t) shrink(blue - green), low, high),    shrink(v) = v - clamp(v, -s, s),
                                                                        s = (1 - |t|) (high - low),

    and the same for the other channels in cyclic order. Greater turns start with one by +-2, which only hands the
    channels round.

    Args:
        factor: (M,) share of the circle in [-0.5, 0.5]; 0 is the picture.
    """
    sixths = 6 * _per_image(factor, images)
    steps = (sixths / 2).round()
    images = _hand_round(images, steps.flatten().long())
    turn = sixths - 2 * steps
    low, high = images.amin(1, keepdim=True), images.amax(1, keepdim=True)
    stay = (high - low) * (1 - turn.abs())
    red, green, blue = images.unbind(1)
    pull = torch.stack((blue - green, red - blue, green - red), dim=1)
    pull -= pull.clamp(-stay, stay)
    return torch.addcmul(images, pull, turn.sign()).clamp_(low, high)


def to_grey(images: Tensor) -> Tensor:
    """ITU-R 601 luma, 0.299 R + 0.587 G + 0.114 B, on all three channels. Three channels only."""
    return _luma(images).repeat(1, 3, 1, 1)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each picture as Pillow's `ImageFilter.GaussianBlur(sigma)`; the pixels at the edge are repeated outwards.

    The kernel is Pillow's (see `_blur_kernels`), whose variance is sigma^2 for small sigma too. A sampled Gaussian
    hardly blurs for sigma < 0.5, where Pillow's does: at 0.3 the middle weighs 0.99 there, 0.91 here.

    Args:
        sigma: (M,) standard deviation in pixels, ON THE CPU, for it says how many taps to compute; 0 is the picture.
            Falling sigma is the fastest order: a tap then runs over the first pictures only.
    """
    if not (sigma > 0).any():
        return images
    height, width = images.shape[2:]
    kernels = _blur_kernels(sigma)
    radius = kernels.shape[1] - 1
    # How many pictures, from the first, must take part in a tap: beyond them its weights are zero.
    ranks = torch.arange(1, len(kernels) + 1)[:, None]
    counts = ((kernels != 0) * ranks).amax(0).tolist()
    kernels = to_device(kernels.T.contiguous(), images.device)[..., None, None]  # (radius + 1, M, 1, 1)
    # Pictures lie flat, so that a shift by a row or by a pixel is one long run of memory; the last row is a spare,
    # for the run of the second pass ends 2 radius early.
    flat = F.pad(images, (radius, radius, radius, radius + 1), mode="replicate").flatten(2)
    pitch = width + 2 * radius
    flat = _shift_and_add(_shift_and_add(flat, kernels, counts, pitch), kernels, counts, 1)
    return flat[:, :, : height * pitch].unflatten(2, (height, pitch))[..., :width]


def solarize(images: Tensor) -> Tensor:
    """Invert what is brighter than the middle: min(x, 1 - x).

    For 8-bit values this is Pillow's `ImageOps.solarize` at its threshold 128. Between 127 and 128 the minimum is
    continuous where a threshold is not, so rounding can't be magnified.
    """
    return torch.minimum(images, 1 - images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std, with mean and std (C,) on the pictures' device."""
    return (images - mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


@torch.no_grad()
def photometric(crops: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Colour jitter, grey, blur, solarize and normalization of a batch of crops, each by its own parameters.

    Crops of other than three channels go without saturation, hue and grey, which mean nothing there; grey, as the
    contrast needs it, is then the mean of the channels.

    Args:
        crops: (M, C, H, W) uint8, on any device.
        params: (M, 8) float32 on the CPU; see COLUMNS.
        mean, std: C numbers each, for values in [0, 1].

    Returns:
        (M, C, H, W) float32 on the crops' device.

    Raises:
        ValueError: the shapes, the types or the orders are not as said, or the parameters are not on the CPU.
    """
    _check(crops, params, mean, std)
    mean, std = (to_device(torch.tensor(values, dtype=torch.float32), crops.device) for values in (mean, std))
    result = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    part = len(crops)
    if crops.device.type == "cpu":
        part = max(1, CPU_PART // max(1, crops[:1].numel()))
    for first in range(0, len(crops), max(1, part)):
        rows = slice(first, first + part)
        _transform(crops[rows], params[rows], mean, std, result[rows])
    return result


# A stage: for each crop the number of its function or -1, and the functions, each with the column of its factor.
Stage = tuple[Tensor, dict[int, tuple[Callable[..., Tensor], int | None]]]


def _stages(params: Tensor, channels: int) -> list[Stage]:
    """What is to be done, in order. Of the jitter, one stage for each place in the order of its operations."""
    jitter = {
        BRIGHTNESS: (adjust_brightness, BRIGHTNESS),
        CONTRAST: (adjust_contrast, CONTRAST),
        SATURATION: (adjust_saturation, SATURATION),
        HUE: (adjust_hue, HUE),
    }
    orders = torch.tensor(ORDERS + ((-1,) * 4,))[params[:, ORDER].long()]  # (M, 4); an order of -1 takes the last row
    grey = (params[:, GREY] > 0).long() - 1
    if channels != 3:
        orders[(orders == SATURATION) | (orders == HUE)] = -1
        grey.fill_(-1)
    return [
        *((which, jitter) for which in orders.unbind(1)),
        (grey, {0: (to_grey, None)}),
        ((params[:, SIGMA] > 0).long() - 1, {0: (gaussian_blur, SIGMA)}),
        ((params[:, SOLARIZE] > 0).long() - 1, {0: (solarize, None)}),
    ]


def _transform(crops: Tensor, params: Tensor, mean: Tensor, std: Tensor, out: Tensor) -> None:
    """`photometric` of crops that are worked on together.

    Before each stage the crops are put in the order of the functions they need, so that a function takes a slice:
    reading rows in any order is fast everywhere, writing them so is slow on a CPU.
    """
    places = params[:, SIGMA].argsort(descending=True, stable=True)  # as gaussian_blur likes it; kept by stable sorts
    images = crops.index_select(0, to_device(places, crops.device)).float().div_(255)
    for which, functions in _stages(params, crops.shape[1]):
        if (which < 0).all():
            continue
        move = which[places].argsort(stable=True)
        places = places[move]
        images = images.index_select(0, to_device(move, crops.device))
        for number, (function, column) in functions.items():
            begin, end = int((which < number).sum()), int((which <= number).sum())
            if begin < end:
                factor = () if column is None else (params[places[begin:end], column],)
                images[begin:end] = function(images[begin:end], *factor)
    torch.index_select(normalize(images, mean, std), 0, to_device(places.argsort(), crops.device), out=out)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a small CPU tensor without waiting for the device, which takes pinned memory on CUDA."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _per_image(factor: Tensor, images: Tensor) -> Tensor:
    return to_device(factor.to(images.dtype), images.device).view(-1, 1, 1, 1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).add_(other * (1 - factor)).clamp_(0, 1)


def _luma(images: Tensor) -> Tensor:
    """(M, C, H, W) -> (M, 1, H, W): ITU-R 601 luma of three channels, the mean of any other number."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _hand_round(images: Tensor, steps: Tensor) -> Tensor:
    """Channel c of picture m becomes its channel c - steps[m], modulo 3."""
    first = 3 * torch.arange(len(images), device=images.device)[:, None]
    channels = (torch.arange(3, device=images.device) - steps[:, None]) % 3
    return images.flatten(0, 1).index_select(0, (first + channels).flatten()).view_as(images)


def _blur_kernels(sigma: Tensor) -> Tensor:
    """The right half of Pillow's kernels: (M,) -> (M, radius + 1) float32, the middle first.

    Pillow approximates the Gaussian by three passes of an "extended box" (Gwosdek et al., "Theoretical foundations
    of Gaussian convolution by extended box filtering", 2011): 2 l + 1 ones and a weight a < 1 at both ends, with l
    and a such that its variance is sigma^2 / 3. One kernel does what the three do, but for roundings and the rim.
    In float64, so that float32 holds the rounded truth whatever the batch.
    """
    variance = sigma.double()[:, None] / 3
    whole = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()  # l
    ends = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))  # a
    reach = int(whole.max()) + 1
    distance = torch.arange(-reach, reach + 1).abs()
    box = (distance <= whole) + ends * (distance == whole + 1)
    box /= box.sum(1, keepdim=True)
    kernels = box
    for _ in range(2):
        kernels = F.conv1d(kernels[None], box[:, None], padding=2 * reach, groups=len(box))[0]
    return kernels[:, 3 * reach :].float()


def _shift_and_add(flat: Tensor, kernels: Tensor, counts: list[int], step: int) -> Tensor:
    """(M, C, P) -> (M, C, P - 2 radius step): the sum over k of kernel[|k|] times the input shifted by k steps."""
    edge = step * (len(kernels) - 1)
    size = flat.shape[2] - 2 * edge
    result = flat[:, :, edge : edge + size] * kernels[0]
    for k in range(1, len(kernels)):
        few = flat[: counts[k]]
        before, after = edge - k * step, edge + k * step
        pair = few[:, :, before : before + size] + few[:, :, after : after + size]
        result[: counts[k]].addcmul_(pair, kernels[k, : counts[k]])
    return result


def _check(crops: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    if crops.ndim != 4 or crops.dtype != torch.uint8:
        raise ValueError(f"crops must be uint8 of shape (M, C, H, W), not {crops.dtype} of {tuple(crops.shape)}")
    if params.shape != (len(crops), len(COLUMNS)) or params.device.type != "cpu":
        want = (len(crops), len(COLUMNS))
        raise ValueError(f"params must be {want} on the CPU, not {tuple(params.shape)} on {params.device}")
    if not len(mean) == len(std) == crops.shape[1]:
        raise ValueError(f"--mean and --std need one number for each of {crops.shape[1]} channels: {mean}, {std}")
    orders = params[:, ORDER]
    if len(orders) and not -1 <= orders.min() <= orders.max() < math.factorial(4):
        raise ValueError(f"the order of the jitter must be -1 to 23, not {orders.min():g} to {orders.max():g}")
