"""The photometric stage of DINO's augmentation, for a whole batch of crops on any device.

The published augmentation (arXiv 2104.14294, section 3.2, "Implementation details", after BYOL's) is, for each crop:

    colour jitter -> grey -> blur -> solarize -> [0, 1] -> (x - mean) / std

Each operation is a function `f(images, factor) -> images` of images in [0, 1], with one factor per image. `photometric`
applies them in this order to the crops that need them. They compute the same as Pillow's and torchvision's operations
on single images, but in float32 and without rounding to 8 bits in between.

The result for a crop depends on that crop and its parameters alone: every sum runs within one image, in an order that
does not depend on the other images, so a batch may be split in any way. The host never waits for the device: which
crops need which operation is derived from the parameters, on the CPU.

Shapes: M crops, C channels, H x W pixels.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Columns of the parameters: three factors (1: unchanged), a hue shift (0: unchanged), the order of the four jitter
# operations (an index into ORDERS; -1: no jitter), grey (0 or 1), blur in pixels (0: none), solarize (0 or 1).
COLUMNS = ("brightness", "contrast", "saturation", "hue", "order", "grey", "sigma", "solarize")
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARIZE = range(8)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of intensities in [0, 1]
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))  # 24

# On a CPU, process the crops in parts of about this many values, so that a part and its temporaries stay in the cache.
# Processing a whole batch at once took three to five times as long, mostly for allocating memory.
CPU_PART = 2**20


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with black: clamp(f x).

    Args:
        images: (M, C, H, W) float in [0, 1], as in all functions below.
        factor: (M,) f >= 0; 0 gives black, 1 the image itself. On any device, as in all functions below.
    """
    return (images * _per_image(factor, images)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with the mean m of its grey version: clamp(f x + (1 - f) m).

    Args:
        factor: (M,) f >= 0; 0 gives uniform grey, 1 the image itself.
    """
    factor = _per_image(factor, images)
    mean = _luma(images.mean(3, keepdim=True).mean(2, keepdim=True))  # luma is linear, so the mean may be taken first
    return _blend(images, mean, factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its grey version g: clamp(f x + (1 - f) g). Three channels only.

    Args:
        factor: (M,) f >= 0; 0 gives the grey version, 1 the image itself.
    """
    return _blend(images, _luma(images), _per_image(factor, images))


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Rotate the hue of each pixel in HSV, keeping its value and saturation. Three channels only.

    Neither the hue nor its sector has to be computed. Measure hue in sixths of the circle. As a function of hue, red is
    `high` for two sixths, falls to `low` during one, stays there for two and rises during one; green and blue are the
    same function shifted by two and four sixths. Writing that out sector by sector, a rotation by t in [-1, 1] gives

        red' = clamp(red + sign(t) shrink(blue - green), low, high),    shrink(v) = v - clamp(v, -s, s),
                                                                        s = (1 - |t|) (high - low),

    and the same for the other channels in cyclic order. Larger rotations begin with one by +-2, which only permutes
    the channels.

    Args:
        factor: (M,) fraction of the circle in [-0.5, 0.5]; 0 gives the image itself.
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


def gaussian_blur(images: Tensor, sigma: Tensor, summed: Callable[..., None] | None = None) -> Tensor:
    """Blur each image like Pillow's `ImageFilter.GaussianBlur(sigma)`, repeating the pixels at the edge.

    Pillow does not sample a Gaussian but makes three passes of an "extended box" in each direction (see `_boxes`), so
    that the variance is sigma^2 however small sigma is. This matters: at sigma 0.3 a sampled Gaussian leaves 99 % of a
    pixel's value in place, the boxes 91 %.

    Args:
        sigma: (M,) standard deviation in pixels, ON THE CPU, because the number of taps depends on it; 0 gives the
            image itself. Descending order is fastest: each tap is then computed for the first images only.
        summed: a replacement for `_box_sum`.
    """
    if not (sigma > 0).any():
        return images
    boxes, total = _boxes(sigma.numpy())  # (edge + 1, M), (M,)
    edge = len(boxes) - 1
    # Each tap is computed for the images up to the last one in which its weight is not zero.
    counts = ((boxes != 0) * np.arange(1, len(sigma) + 1)).max(1).tolist()
    weights = to_device(torch.from_numpy(boxes).to(images.dtype), images.device)[..., None, None]
    passes = (2, 2, 2, 3, 3, 3)
    padded = F.pad(images, (edge,) * 4, mode="replicate")
    for dim in passes:
        padded = _box_pass(padded, weights, counts, dim, summed or _box_sum)
    scale = torch.from_numpy(total ** -len(passes))
    return padded[:, :, edge:-edge, edge:-edge] * _per_image(scale, images)


def solarize(images: Tensor) -> Tensor:
    """Invert values above 0.5: min(x, 1 - x).

    For 8-bit values this is Pillow's `ImageOps.solarize` with its threshold of 128. Unlike a threshold, the minimum is
    continuous between 127 and 128, so it can't magnify rounding errors.
    """
    return torch.minimum(images, 1 - images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std, with mean and std (C,) on the images' device."""
    return (images - mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def photometric(crops: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Colour jitter, grey, blur, solarize and normalization of a batch of crops, each with its own parameters.

    Saturation, hue and grey are skipped for crops of other than three channels, where they have no meaning; the
    contrast then uses the mean of the channels as luma.

    Args:
        crops: (M, C, H, W) uint8, on any device.
        params: (M, 8) float32 on the CPU; see COLUMNS.
        mean, std: C numbers each, for values in [0, 1].

    Returns:
        (M, C, H, W) float32 on the crops' device.

    Raises:
        ValueError: shapes, types or orders differ from the above, or the parameters are not on the CPU.
    """
    return in_parts(_by_slices, crops, params, mean, std)


@torch.no_grad()
def in_parts(
    transform: Callable[[Tensor, np.ndarray, Tensor, Tensor, Tensor], None],
    crops: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float],
) -> Tensor:
    """Apply a transform to the crops, on a CPU part by part; see `photometric` for the other arguments.

    Args:
        transform: called as transform(crops, params, mean, std, out) with m crops, an array (m, 8), two tensors (C,)
            on the device, and a tensor (m, C, H, W) to write the result to.
    """
    _check(crops, params, mean, std)
    mean, std = (to_device(torch.tensor(values, dtype=torch.float32), crops.device) for values in (mean, std))
    result = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    parts = max(1, -(-crops.numel() // CPU_PART)) if crops.device.type == "cpu" else 1
    for part, rows, out in zip(*(x.tensor_split(parts) for x in (crops, params, result)), strict=True):
        if len(part):
            transform(part, rows.numpy(), mean, std, out)
    return result


def jitter_orders(params: np.ndarray) -> np.ndarray:
    """(M, 8) -> (M, 4): the columns of a crop's jitter operations in their order; -1 for a crop without jitter."""
    return np.array(ORDERS + ((-1,) * 4,))[params[:, ORDER].astype(int)]  # order -1 takes the last row


# By the column of the parameters that holds the factor; grey and solarize have none.
OPERATIONS: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    BRIGHTNESS: adjust_brightness, CONTRAST: adjust_contrast, SATURATION: adjust_saturation, HUE: adjust_hue,
    GREY: lambda images, _: to_grey(images), SIGMA: gaussian_blur, SOLARIZE: lambda images, _: solarize(images),
}


def _stages(params: np.ndarray, channels: int) -> np.ndarray:
    """(M, 8) -> (7, M): the operation that each crop needs at each stage, by its column in the parameters, or -1.

    The jitter has four stages, one for each position in the order of its operations; grey, blur, solarize follow.
    """
    others = [np.where(params[:, column] > 0, column, -1) for column in (GREY, SIGMA, SOLARIZE)]
    operations = np.stack([*jitter_orders(params).T, *others])
    if channels != 3:
        operations[np.isin(operations, (SATURATION, HUE, GREY))] = -1
    return operations


def _by_slices(crops: Tensor, params: np.ndarray, mean: Tensor, std: Tensor, out: Tensor) -> None:
    """`photometric` of one part, for `in_parts`.

    Before each stage the crops are sorted by the operation they need, so that each operation works on a slice. Reading
    rows in any order is fast on all devices; writing them in any order is slow on a CPU.
    """
    # Sorted as gaussian_blur prefers; the stable sorts below keep that order.
    places = np.argsort(-params[:, SIGMA], kind="stable")
    images = _reorder(crops, places).contiguous().float().div_(255)
    for stage in _stages(params, crops.shape[1]):
        move = np.argsort(stage[places], kind="stable")
        places, images = places[move], _reorder(images, move)
        for column in np.unique(stage[stage >= 0]):
            rows = slice(*np.searchsorted(stage[places], (column, column + 1)).tolist())
            changed = OPERATIONS[column](images[rows], torch.from_numpy(params[places[rows], column]))
            if len(changed) == len(images):
                images = changed
            else:
                images[rows] = changed
    out.copy_(_reorder(normalize(images, mean, std), np.argsort(places)))


def _reorder(images: Tensor, order: np.ndarray) -> Tensor:
    if (order[1:] > order[:-1]).all():
        return images
    return images.index_select(0, to_device(torch.from_numpy(order), images.device))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor without waiting for the device, which on CUDA needs pinned memory."""
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
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _hand_round(images: Tensor, steps: Tensor) -> Tensor:
    """Permute channels: channel c of image m becomes its channel c - steps[m], modulo 3."""
    first = 3 * torch.arange(len(images), device=images.device)[:, None]
    channels = (torch.arange(3, device=images.device) - steps[:, None]) % 3
    return images.flatten(0, 1).index_select(0, (first + channels).flatten()).view_as(images)


def _boxes(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The box for each sigma: (M,) -> its weights at distance 0, 1, ... (edge + 1, M), and their total (M,).

    The extended box (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering",
    2011) has 2 l + 1 ones and a smaller weight a at both ends, with l and a such that its variance is
    v = sigma^2 / 3, a third of the variance after three passes:

        l = floor((sqrt(12 v + 1) - 1) / 2),    a = (2 l + 1) (l (l + 1) - 3 v) / (6 (v - (l + 1)^2)).
    """
    variance = sigma.astype(np.float64) ** 2 / 3
    length = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)  # l
    ends = (2 * length + 1) * (length * (length + 1) - 3 * variance) / (6 * (variance - (length + 1) ** 2))  # a
    distance = np.arange(length.max() + 2)[:, None]
    boxes = (distance <= length) + ends * (distance == length + 1)
    return boxes, 2 * (length + ends) + 1


def _box_pass(images: Tensor, weights: Tensor, counts: list[int], dim: int, summed: Callable[..., None]) -> Tensor:
    """Sum the padded images over their boxes along `dim` (2 or 3) and pad the result again.

    An image is treated as one contiguous vector, so a shift along a row reads past the ends of the row. The values
    affected lie in the padding, which is written last.
    """
    edge, (rows, pitch) = len(weights) - 1, images.shape[2:]
    begin, end = edge * pitch, (rows - edge) * pitch
    result = images.new_empty(images.shape)
    summed(images.flatten(2), result.flatten(2)[:, :, begin:end], weights, counts, begin, pitch if dim == 2 else 1)
    last = images.shape[dim] - edge
    result.narrow(dim, 0, edge).copy_(result.narrow(dim, edge, 1))
    result.narrow(dim, last, edge).copy_(result.narrow(dim, last - 1, 1))
    return result


def _box_sum(source: Tensor, target: Tensor, weights: Tensor, counts: list[int], begin: int, step: int) -> None:
    """target[i] = x[0] + sum over t of weights[t] (x[-t] + x[t]), where x[j] is source[begin + i + j step].

    Args:
        source: (M, C, padded pixels).
        target: (M, C, pixels), written.
        weights: (edge + 1, M, 1, 1), t = 1 .. edge.
        counts: for each t the number of images, from the first on, to compute it for: the weights of others are zero.
    """
    end = begin + target.shape[2]

    def pair(tap: int, count: int) -> Tensor:
        before, after = -tap * step, tap * step
        part = source[:count]
        return part[:, :, begin + before : end + before] + part[:, :, begin + after : end + after]

    torch.addcmul(source[:, :, begin:end], pair(1, len(source)), weights[1], out=target)
    for tap in range(2, len(weights)):
        target[: counts[tap]].addcmul_(pair(tap, counts[tap]), weights[tap, : counts[tap]])


def _check(crops: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    if crops.ndim != 4 or crops.dtype != torch.uint8:
        raise ValueError(f"crops must be uint8 of shape (M, C, H, W), not {crops.dtype} of {tuple(crops.shape)}")
    if params.shape != (len(crops), len(COLUMNS)) or params.device.type != "cpu":
        want = (len(crops), len(COLUMNS))
        raise ValueError(f"params must be {want} on the CPU, not {tuple(params.shape)} on {params.device}")
    if not len(mean) == len(std) == crops.shape[1]:
        raise ValueError(f"mean and std need one number for each of {crops.shape[1]} channels: {mean}, {std}")
    orders = params[:, ORDER]
    if len(orders) and not -1 <= orders.min() <= orders.max() < math.factorial(4):
        raise ValueError(f"the order of the jitter must be -1 to 23, not {orders.min():g} to {orders.max():g}")
