"""How the input images of a network are made: mean, std, channels, image size and the size before the crop, from
wherever they are stored.

In this order: flags, what the file of weights itself says (`args` of a checkpoint, metadata of safetensors),
`preprocessor_config.json` and `config.json` beside it (Hugging Face, timm), ImageNet's mean and std for 3 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from method.photometric import IMAGENET_MEAN, IMAGENET_STD
from parallel import Refused
from weights.layouts import BadFile, beside, is_count, is_number

PILLOW_FILTERS = {"0": "nearest", "1": "lanczos", "2": "bilinear", "3": "bicubic"}  # by number, as text
DEFAULTS = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


class Found(NamedTuple):
    """A value and where it comes from, for messages."""

    value: Any
    source: str


def from_args(args: Mapping) -> dict:
    """Of a checkpoint of this project, a published full one, or a safetensors file of export.py."""
    return {"mean": args.get("mean"), "std": args.get("std"), "in_chans": args.get("in_chans"),
            "image_size": args.get("global_crops_size")}


def from_processor(config: Mapping) -> dict:
    """Of Hugging Face's image processors, which compute (rescale_factor x - image_mean) / image_std of x in 0 ... 255.

    Mean and std are returned for intensities in [0, 1], as everywhere else.
    """
    nested = config.get("image_processor")
    config = nested if isinstance(nested, Mapping) else config
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if not is_number(factor) or factor <= 0:
        raise ValueError(f"rescale_factor is {factor!r}")
    white = 255 * factor
    if config.get("do_normalize", True):
        mean, std = (scaled(config[key] if config.get(key) is not None else default(config, key), white)
                     for key in ("image_mean", "image_std"))
    else:
        mean, std = 0.0, 1 / white
    crop = side(config.get("crop_size")) if config.get("do_center_crop", True) else None
    size = side(config.get("size"))
    return {"mean": mean, "std": std, "image_size": crop or size,
            "resize_ratio": size / (crop or size) if size and config.get("do_resize", True) and size >= (crop or 0)
            else None, "interpolation": PILLOW_FILTERS.get(str(config.get("resample")))}


def default(config: Mapping, key: str) -> Any:
    """What transformers takes for an entry that a processor's file lacks; None where the file names no processor.

    Where that is not known, a text, for `per_channel` to refuse unless a flag gives the value.
    """
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    if not isinstance(name, str):
        return None
    name = name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    try:
        import transformers

        value = getattr(getattr(transformers, name)(), key)
    except (ImportError, AttributeError, TypeError, ValueError):  # not installed, no such class, or it needs arguments
        value = None
    return f"of {name}, which is not stated," if value is None else list(value)


def scaled(values: Any, white: float) -> Any:
    """Numbers divided by `white`; anything else as it is, for `per_channel` to refuse."""
    if isinstance(values, list) and all(map(is_number, values)):
        return [v / white for v in values]
    return values / white if is_number(values) else values


def side(size: Any) -> int | None:
    """Pixels per side of Hugging Face's forms of a size; None: not a square, or not stated."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or (size.get("height") if size.get("height") == size.get("width") else None)
    return int(size) if is_number(size) and size == int(size) else None


def from_config(config: Mapping) -> dict:
    """Of timm's config.json (`pretrained_cfg`; older ones hold its keys themselves) or a Hugging Face model's."""
    timm = config.get("pretrained_cfg")
    timm = timm if isinstance(timm, Mapping) else config
    shape = timm.get("input_size")
    if not (isinstance(shape, list) and len(shape) == 3):
        shape = (config.get("num_channels"), *[config.get("image_size")] * 2)
    share = timm.get("crop_pct")
    return {"mean": timm.get("mean"), "std": timm.get("std"), "in_chans": shape[0],
            "resize_ratio": 1 / share if is_number(share) and 0 < share <= 1 else None,
            "interpolation": timm.get("interpolation"),
            "image_size": shape[1] if shape[1] == shape[2] and isinstance(shape[1], int) else None}


BESIDE: dict[str, Callable[[Mapping], dict]] = {  # in this order
    "preprocessor_config.json": from_processor, "processor_config.json": from_processor, "config.json": from_config,
}


def stored(path: str, args: Mapping) -> dict[str, Found]:
    """mean, std, in_chans, image_size, resize_ratio (the shorter side before the crop, per side of the crop) and
    interpolation of a file of weights, those that are stored, each from its first source.

    Args:
        path: the file; "" is none.
        args: what `layouts.stored_args` returns for it.

    Raises:
        BadFile: a configuration beside the file is damaged.
    """
    sources = [(f"stored in {Path(path).name}", from_args(args))] if path else []
    for name, parse in BESIDE.items() if path else ():
        if (values := beside(path, name, parse)) is not None:
            sources.append((str(Path(path).with_name(name)), values))
    found: dict[str, Found] = {}
    for source, values in sources:
        for key, value in values.items():
            if value is not None:
                found.setdefault(key, Found(value, source))
    if "image_size" in found:
        value, source = found["image_size"]
        if not is_count(value):
            raise BadFile(f"{path}: made for images of {value!r} pixels ({source}); correct it there")
        found["image_size"] = Found(int(value), source)
    return found


def normalization(
    found: Mapping[str, Found], in_chans: int, file: str, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, Found]:
    """The mean and the std to use, one value per channel.

    Args:
        found: what `stored` returned.
        file: the flag and the file of weights, for messages.
        mean, std: given by flags, or None.

    Raises:
        Refused: numbers that do not fit the channels, or none are known.
    """
    chosen = {}
    for key, given in (("mean", mean), ("std", std)):
        if given is not None:
            chosen[key] = Found(per_channel(key, given, in_chans, f"--{key} {' '.join(f'{v:g}' for v in given)}"),
                                f"--{key}")
        elif key in found:
            value, source = found[key]
            chosen[key] = Found(per_channel(key, value, in_chans, f"{file}: {key} {value} ({source})"), source)
        elif in_chans == len(DEFAULTS[key]):
            chosen[key] = Found(tuple(DEFAULTS[key]), "ImageNet's, the default: none is stored with the weights")
        else:
            raise Refused(f"{file}: {in_chans} channel(s), and no {key} is stored with the weights; give --mean and "
                          f"--std with {in_chans} value(s) each")
    return chosen


def per_channel(key: str, value: Any, in_chans: int, where: str) -> tuple[float, ...]:
    """The value as one number per channel; a single stored number counts for each channel. Raises Refused."""
    values = [value] * in_chans if isinstance(value, Real) else value
    remedy = f"give --{key} with {in_chans} value(s), one per channel"
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != in_chans:
        count = f"{len(values)} value(s)" if isinstance(values, Sequence) and not isinstance(values, str) else "no list"
        raise Refused(f"{where}: {count} for {in_chans} channel(s); {remedy}")
    if not all(is_number(v) and (key == "mean" or v > 0) for v in values):
        raise Refused(f"{where}: not finite numbers{', or not above 0' if key == 'std' else ''}; {remedy}")
    return tuple(map(float, values))


def sentence(chosen: Mapping[str, Found]) -> str:
    """`mean 0.5 0.5 0.5 (config.json), std 0.2 0.2 0.2 (--std)`; what is no list of numbers as it is."""
    texts = {key: " ".join(f"{v:g}" for v in value) if isinstance(value, (list, tuple)) and all(map(is_number, value))
             else value for key, (value, _) in chosen.items()}
    return ", ".join(f"{key} {texts[key]} ({source})" for key, (_, source) in chosen.items())
