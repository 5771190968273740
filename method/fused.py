"""photometric.py in a few passes over memory, for torch.compile: the augmentation under `--compile`.

One by one, the operations read and write a batch about thirty times, and each gathers the crops that need it and puts
them back. Here every crop goes through all operations; those that it does not need get factors that change nothing, not
even by rounding. Four graphs remain:

    means      crops -> each crop's mean grey at the place of its contrast     reads the uint8 crops
    colours    crops, means -> jittered, greyed crops                          reads them again, writes float32
    box_sum    a pass of the blur, of the crops that are blurred; six times    reads and writes float32, each
    finish     blurred crops -> solarized, normalized, in the order given      reads and writes float32

Sorting the crops and padding for the blur come on top, with a third of all memory traffic. `means` and `colours` repeat
some arithmetic, which costs less than writing the crops and reading them again.

Shapes: M crops, H x W pixels; three channels, because crops with others have no colours to jitter.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from method import photometric as ph

Planes = tuple[Tensor, Tensor, Tensor]  # red, green, blue, (M, H, W) each in [0, 1]

# A jitter operation as five numbers, one set for each position in a crop's order:
#   x -> clamp(SCALE x + TO_LUMA luma(x) + TO_MEAN mean grey), then STEPS cyclic permutations of the channels, then a
#   rotation of the hue by TURN
SCALE, TO_LUMA, TO_MEAN, TURN, STEPS = range(5)
UNCHANGED = np.array((1, 0, 0, 0, 0), np.float32)


def photometric(crops: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`photometric.photometric` for three channels by torch.compile: same arguments, same result up to rounding.

    Raises:
        ValueError: as photometric.photometric, and for crops of other than three channels.
    """
    if crops.ndim == 4 and crops.shape[1] != 3:
        raise ValueError(f"crops must have three channels, not {crops.shape[1]}: use photometric.photometric")
    return ph.in_parts(_by_graphs, crops, params, mean, std)


def _by_graphs(crops: Tensor, params: np.ndarray, mean: Tensor, std: Tensor, out: Tensor) -> None:
    """`photometric` of one part, for `in_parts`."""
    order = np.argsort(-params[:, ph.SIGMA], kind="stable")  # the order that the blur prefers; unblurred crops last
    ordered = params[order]
    places = jitter_places(ordered)

    def sent(values: np.ndarray) -> Tensor:
        return ph.to_device(torch.from_numpy(np.ascontiguousarray(values)), crops.device)

    crops = crops.index_select(0, sent(order)).contiguous()
    mean_greys = compiled(means)(crops, sent(before_contrast(places)))
    images = compiled(colours)(crops, sent(places), mean_greys, sent(ordered[:, ph.GREY]))
    if blurred := int((ordered[:, ph.SIGMA] > 0).sum()):
        sigma = torch.from_numpy(ordered[:blurred, ph.SIGMA])
        images[:blurred] = ph.gaussian_blur(images[:blurred], sigma, _compiled_box_sum)
    compiled(finish)(images, sent(np.argsort(order)), sent(params[:, ph.SOLARIZE]), mean, std, out)


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


# ---- From parameters to numbers ----


def jitter_places(params: np.ndarray) -> np.ndarray:
    """(M, 8) -> (M, 4, 5): the numbers SCALE to STEPS of the operation at each position of the order."""
    orders = ph.jitter_orders(params)
    value = np.take_along_axis(params, np.maximum(orders, 0), 1)
    contrast, saturation, hue = (orders == which for which in (ph.CONTRAST, ph.SATURATION, ph.HUE))
    places = np.broadcast_to(UNCHANGED, (*orders.shape, 5)).copy()
    places[..., SCALE] = np.where((orders == ph.BRIGHTNESS) | contrast | saturation, value, 1)
    places[..., TO_LUMA] = np.where(saturation, 1 - value, 0)
    places[..., TO_MEAN] = np.where(contrast, 1 - value, 0)
    sixths = np.where(hue, 6 * value, 0)
    places[..., STEPS] = np.round(sixths / 2)
    places[..., TURN] = sixths - 2 * places[..., STEPS]
    return places


def before_contrast(places: np.ndarray) -> np.ndarray:
    """(M, 4, 5) -> (M, 3, 5): only the operations before the contrast; the last position never is one of them.

    A contrast of factor 1 changes nothing and needs no mean, so it does not count.
    """
    reached = np.logical_or.accumulate(places[:, :3, TO_MEAN] != 0, axis=1)
    return np.where(reached[..., None], UNCHANGED, places[:, :3])


# ---- The four graphs ----


def means(crops: Tensor, before: Tensor) -> Tensor:
    """Mean grey (M,) of each crop (M, 3, H, W) after the operations before its contrast, (M, 3, 5)."""
    planes = _unpacked(crops)
    for place in before.unbind(1):
        planes = _jitter(planes, place, torch.zeros_like(place[:, 0]))
    return _plane_luma(*planes).mean((1, 2))


def colours(crops: Tensor, places: Tensor, mean_greys: Tensor, grey: Tensor) -> Tensor:
    """The crops (M, 3, H, W) jittered, and made grey where grey (M,) is 1; mean_greys (M,) as computed by `means`."""
    planes = _unpacked(crops)
    for place in places.unbind(1):
        planes = _jitter(planes, place, mean_greys)
    luma, is_grey = _plane_luma(*planes), grey.view(-1, 1, 1) > 0
    return torch.stack([torch.where(is_grey, luma, plane) for plane in planes], 1)


def box_sum(source: Tensor, target: Tensor, weights: Tensor, begin: int, step: int) -> None:
    """photometric.py's `_box_sum`, with all taps for all images.

    Args:
        source, target: (M C, pixels), with and without padding.
        weights: (edge + 1, M C, 1).
    """
    end = begin + target.shape[1]
    total = source[:, begin:end]
    for tap in range(1, len(weights)):
        shift = tap * step
        total = total + weights[tap] * (source[:, begin - shift : end - shift] + source[:, begin + shift : end + shift])
    target.copy_(total)


def finish(images: Tensor, origin: Tensor, solarize: Tensor, mean: Tensor, std: Tensor, out: Tensor) -> None:
    """Write images[origin] to `out`, solarized where solarize (M,) is 1, and normalized."""
    images = images[origin]
    images = torch.where(solarize.view(-1, 1, 1, 1) > 0, ph.solarize(images), images)
    out.copy_((images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))


# ---- Parts of the graphs ----


def _compiled_box_sum(source: Tensor, target: Tensor, weights: Tensor, _: list[int], begin: int, step: int) -> None:
    """`box_sum` for `gaussian_blur`: source and target (M, C, pixels), weights (edge + 1, M, 1, 1)."""
    weights = weights.flatten(2).repeat_interleave(source.shape[1], 1)
    target = target.view(-1, target.shape[2])  # not flatten, which may copy: this tensor is written to
    compiled(box_sum)(source.flatten(0, 1), target, weights, begin, step)


def _unpacked(crops: Tensor) -> Planes:
    """uint8 (M, 3, H, W) -> three float32 (M, H, W) in [0, 1]."""
    red, green, blue = (plane.float() / 255 for plane in crops.unbind(1))
    return red, green, blue


def _plane_luma(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:  # (M, H, W)
    return ph.LUMA[0] * red + ph.LUMA[1] * green + ph.LUMA[2] * blue


def _jitter(planes: Planes, place: Tensor, mean_greys: Tensor) -> Planes:
    """The operation at one position: place (M, 5), mean_greys (M,). For the hue see photometric.py's `adjust_hue`."""
    scale, to_luma, to_mean, turn, steps = (numbers.view(-1, 1, 1) for numbers in place.unbind(1))
    added = to_luma * _plane_luma(*planes) + to_mean * mean_greys.view(-1, 1, 1)
    red, green, blue = ((scale * plane + added).clamp(0, 1) for plane in planes)
    once, twice = steps.remainder(3) == 1, steps.remainder(3) == 2  # cyclic permutations of the channels
    red, green, blue = (
        torch.where(once, before, torch.where(twice, after, plane))
        for before, plane, after in ((blue, red, green), (red, green, blue), (green, blue, red)))
    low, high = torch.minimum(torch.minimum(red, green), blue), torch.maximum(torch.maximum(red, green), blue)
    stay, sign = (high - low) * (1 - turn.abs()), turn.sign()

    def turned(plane: Tensor, after: Tensor, before: Tensor) -> Tensor:
        pull = before - after
        return torch.clamp(plane + sign * (pull - torch.clamp(pull, -stay, stay)), low, high)

    return turned(red, green, blue), turned(green, blue, red), turned(blue, red, green)
