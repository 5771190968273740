"""photometric.py's work in a few passes over memory, for torch.compile: what `--compile` makes of the augmentation.

Done one by one, the operations read and write a batch some thirty times, and each takes the crops that need it out of
the batch and puts them back. Here every crop goes through all of them: those that it does not need have factors that
change nothing, not even by rounding. What takes memory is then

    means      crops -> each crop's mean grey where its contrast needs it      reads the uint8 crops
    colours    crops, means -> jittered, greyed crops                          reads them again, writes float32
    box_sum    the blur's passes, six of them, of the crops that are blurred   reads and writes float32, each
    finish     blurred crops -> solarized, normalized, in the order given      reads and writes float32

and the arithmetic that `means` and `colours` do twice costs less than to write a crop and read it again. Each of the
four becomes one kernel.

Shapes: M crops, H x W pixels; three channels, as what has others has no colours to jitter.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

import photometric as ph

Planes = tuple[Tensor, Tensor, Tensor]  # red, green, blue, (M, H, W) each in [0, 1]

# The jitter's operations as numbers, one set for each place in a crop's order of them:
#   x -> clamp(SCALE x + GREY luma(x) + MEAN mean grey), then the hue turned by TURN sixths after STEPS channels' steps.
SCALE, GREY, MEAN, TURN, STEPS = range(5)
UNCHANGED = np.array((1, 0, 0, 0, 0), np.float32)


def photometric(crops: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`photometric.photometric` of three channels, by torch.compile: the same arguments, equal but for rounding."""
    return ph.in_parts(_transform, crops, params, mean, std)


def _transform(crops: Tensor, params: np.ndarray, mean: Tensor, std: Tensor, out: Tensor) -> None:
    order = np.argsort(-params[:, ph.SIGMA], kind="stable")  # as the blur likes it; those without come last
    ordered, device = params[order], crops.device
    sent = {
        "places": jitter_places(ordered), "grey": ordered[:, ph.GREY], "order": order,
        "solarize": params[:, ph.SOLARIZE], "origin": np.argsort(order),
    }
    sent["before"] = before_contrast(sent["places"])
    at = {name: ph.to_device(torch.from_numpy(values.copy()), device) for name, values in sent.items()}
    crops = crops.index_select(0, at["order"]).contiguous()
    greys = compiled(means)(crops, at["before"])
    images = compiled(colours)(crops, at["places"], greys, at["grey"])
    if blurred := int((ordered[:, ph.SIGMA] > 0).sum()):
        sigma = torch.from_numpy(ordered[:blurred, ph.SIGMA].copy())
        images[:blurred] = ph.gaussian_blur(images[:blurred], sigma, _box_sum)
    compiled(finish)(images, at["origin"], at["solarize"], mean, std, out)


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


# ---- Which numbers a crop's parameters become ----


def jitter_places(params: np.ndarray) -> np.ndarray:
    """(M, 8) -> (M, 4, 5): what is done at each place of the order, SCALE to STEPS."""
    orders = np.array(ph.ORDERS + ((-1,) * 4,))[params[:, ph.ORDER].astype(int)]  # (M, 4); order -1 takes the last row
    value = np.take_along_axis(params, np.maximum(orders, 0), 1)
    contrast, saturation, hue = (orders == which for which in (ph.CONTRAST, ph.SATURATION, ph.HUE))
    found = np.broadcast_to(UNCHANGED, (*orders.shape, 5)).copy()
    found[..., SCALE] = np.where((orders == ph.BRIGHTNESS) | contrast | saturation, value, 1)
    found[..., GREY] = np.where(saturation, 1 - value, 0)
    found[..., MEAN] = np.where(contrast, 1 - value, 0)
    sixths = np.where(hue, 6 * value, 0)
    found[..., STEPS] = np.round(sixths / 2)
    found[..., TURN] = sixths - 2 * found[..., STEPS]
    return found


def before_contrast(places: np.ndarray) -> np.ndarray:
    """(M, 4, 5) -> (M, 3, 5): the same, with nothing done from the contrast on; at the last place nothing is left."""
    reached = np.logical_or.accumulate(places[:, :3, MEAN] != 0, axis=1)
    return np.where(reached[..., None], UNCHANGED, places[:, :3])


# ---- The four kernels ----


def means(crops: Tensor, before: Tensor) -> Tensor:
    """Mean grey (M,) of each crop (M, 3, H, W) after what comes before its contrast, (M, 3, 5)."""
    planes = _unpacked(crops)
    for place in before.unbind(1):
        planes = _jitter(planes, place, torch.zeros_like(place[:, 0]))
    return _luma(*planes).mean((1, 2))


def colours(crops: Tensor, places: Tensor, greys: Tensor, grey: Tensor) -> Tensor:
    """crops (M, 3, H, W), jittered and where grey (M,) is 1 made grey; greys (M,) are those of `means`."""
    planes = _unpacked(crops)
    for place in places.unbind(1):
        planes = _jitter(planes, place, greys)
    luma, grey = _luma(*planes), grey.view(-1, 1, 1) > 0
    return torch.stack([torch.where(grey, luma, plane) for plane in planes], 1)


def box_sum(source: Tensor, target: Tensor, weights: Tensor, begin: int, step: int) -> None:
    """photometric.py's `_box_sum` with all taps for all pictures: source and target (M C, pixels), weights (t, M C, 1).
    """
    end = begin + target.shape[1]
    total = source[:, begin:end]
    for tap in range(1, len(weights)):
        shift = tap * step
        total = total + weights[tap] * (source[:, begin - shift : end - shift] + source[:, begin + shift : end + shift])
    target.copy_(total)


def finish(images: Tensor, origin: Tensor, solarize: Tensor, mean: Tensor, std: Tensor, out: Tensor) -> None:
    """Write images[origin], solarized where solarize (M,) is 1, normalized."""
    images = images[origin]
    images = torch.where(solarize.view(-1, 1, 1, 1) > 0, ph.solarize(images), images)
    out.copy_((images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))


def _box_sum(source: Tensor, target: Tensor, weights: Tensor, counts: list[int], begin: int, step: int) -> None:
    channels = source.shape[1]
    compiled(box_sum)(source.flatten(0, 1), target.flatten(0, 1), weights.flatten(2).repeat_interleave(channels, 1),
                      begin, step)


def _unpacked(crops: Tensor) -> Planes:
    red, green, blue = (plane.float() / 255 for plane in crops.unbind(1))
    return red, green, blue


def _luma(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    return ph.LUMA[0] * red + ph.LUMA[1] * green + ph.LUMA[2] * blue


def _jitter(planes: Planes, place: Tensor, greys: Tensor) -> Planes:
    """One place of the order: place (M, 5), greys (M,). For the hue see photometric.py's `adjust_hue`."""
    scale, grey, mean, turn, steps = (numbers.view(-1, 1, 1) for numbers in place.unbind(1))
    added = grey * _luma(*planes) + mean * greys.view(-1, 1, 1)
    red, green, blue = ((scale * plane + added).clamp(0, 1) for plane in planes)
    once, twice = steps.remainder(3) == 1, steps.remainder(3) == 2  # channels handed round
    red, green, blue = (
        torch.where(once, before, torch.where(twice, after, plane))
        for before, plane, after in ((blue, red, green), (red, green, blue), (green, blue, red)))
    low, high = torch.minimum(torch.minimum(red, green), blue), torch.maximum(torch.maximum(red, green), blue)
    stay, sign = (high - low) * (1 - turn.abs()), turn.sign()

    def turned(plane: Tensor, after: Tensor, before: Tensor) -> Tensor:
        pull = before - after
        return torch.clamp(plane + sign * (pull - torch.clamp(pull, -stay, stay)), low, high)

    return turned(red, green, blue), turned(green, blue, red), turned(blue, red, green)
