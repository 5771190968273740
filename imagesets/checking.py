"""Images that are decoded before they are used: what a set holds, and the set without what can't be decoded.

Shapes: N images in all, C channels.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import atomic
import parallel
from imagesets import deep
from imagesets.decode import MAX_PIXELS, NPY_MAGIC, Reading, Reduction, Undecodable, formats, pillow_limits
from imagesets.loaders import available_cores, worker_options
from imagesets.sources import Images, open_images
from parallel import Refused

MOST_WORKERS = 16
FIRST, SECONDS = 3, 10  # to the first line of progress, and between lines


class Checked(NamedTuple):
    """One image. reason: why it can't be decoded, else "". kind: of its file, see `file_kind`."""

    reason: str
    kind: str
    size: tuple[int, int]  # height, width
    mean: np.ndarray  # (C,) of intensities in [0, 1]
    square: np.ndarray  # (C,) mean of their squares


class Checks(Dataset):
    """Item i: Checked of image i."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Checked:
        name = self.images.name(i)
        try:
            image = self.images.load(i)
        except Undecodable as error:
            return Checked(str(error).removeprefix(f"{name}: "), "", (0, 0), np.zeros(0), np.zeros(0))
        kind = file_kind(self.images.content(i)) if hasattr(self.images, "content") else ""
        values = image.flatten(1).double() / 255
        return Checked("", kind, tuple(image.shape[1:]), values.mean(1).numpy(), values.square().mean(1).numpy())


def check(images: Images, numbers: Sequence[int] | None = None) -> list[Checked]:
    """Every image, or those of `numbers`, decoded by as many workers as there are cores."""
    numbers = range(len(images)) if numbers is None else numbers
    workers = 0 if len(numbers) < 100 else min(available_cores(), MOST_WORKERS)
    loader = DataLoader(Checks(images), batch_size=None, sampler=numbers, **worker_options(workers))
    checked, began, due = [], time.monotonic(), FIRST
    for image in loader:
        checked.append(image)
        if (passed := time.monotonic() - began) > due:
            due = passed + SECONDS
            left = timedelta(seconds=round(passed / len(checked) * (len(numbers) - len(checked))))
            print(f"{len(checked)} of {len(numbers)} images decoded, eta {left}", file=sys.stderr, flush=True)
    return checked


def file_kind(source: str | bytes) -> str:
    """Format, channels and bits of a file by its header: "PNG, 1 channel, 16 bits"; "" where it can't be told."""
    try:
        with open(source, "rb") if isinstance(source, str) else io.BytesIO(source) as file:
            if file.read(len(NPY_MAGIC)) == NPY_MAGIC:
                file.seek(0)
                array = np.lib.format.read_array(file, allow_pickle=False)
                return kind_text("NPY", 1 if array.ndim == 2 else array.shape[2], str(array.dtype))
            file.seek(0)
            with pillow_limits(MAX_PIXELS), Image.open(file, formats=formats()) as image:
                return kind_text(image.format, len(image.getbands()), f"{deep.bits_of(image)} bits")
    except Exception:  # headers of broken files raise many types
        return ""


def kind_text(form: str, channels: int, depth: str) -> str:
    return f"{form}, {channels} channel{'s' if channels > 1 else ''}, {depth}"


class Summary(NamedTuple):
    """What the readable images of a set have in common; each image counts alike in mean and std, as in training."""

    bad: dict[int, str]  # number of an image -> why it can't be decoded
    kinds: Counter
    smallest: tuple[int, int]  # height, width by shorter side
    largest: tuple[int, int]
    mean: np.ndarray  # (C,)
    std: np.ndarray


def summarize(checked: Sequence[Checked]) -> Summary:
    bad = {i: image.reason for i, image in enumerate(checked) if image.reason}
    good = [image for image in checked if not image.reason]
    sizes = sorted((image.size for image in good), key=min) or [(0, 0)]
    mean = np.mean([image.mean for image in good], 0) if good else np.zeros(0)
    square = np.mean([image.square for image in good], 0) if good else np.zeros(0)
    return Summary(bad, Counter(image.kind for image in good if image.kind), sizes[0], sizes[-1], mean,
                   np.sqrt(np.maximum(square - mean**2, 0)))


# ---- Without what can't be decoded ----


class Chosen:
    """The images of a set numbered by `index`, as a set of images (`sources.Images`).

    Args:
        labels: of all of `images`, in place of their own.
    """

    def __init__(self, images: Images, index: Sequence[int] | Tensor, labels: Tensor | None = None) -> None:
        self.images, self.index, self.classes = images, torch.as_tensor(index), images.classes
        labels = images.labels if labels is None else labels
        self.labels = None if labels is None else labels[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def load(self, i: int, reduction: Reduction | None = None) -> Tensor:
        return self.images.load(int(self.index[i]), reduction)

    def name(self, i: int) -> str:
        return self.images.name(int(self.index[i]))

    def left_out(self) -> list[int]:
        """Numbers of the other images of the set."""
        return sorted(set(range(len(self.images))) - set(self.index.tolist()))


_checked: dict[tuple, dict[int, str]] = {}  # by what is opened: number of an image -> why it can't be decoded
_skipped: dict[str, dict[str, str]] = {}  # by list: name of an image -> reason


def open_checked(
    data_path: str | os.PathLike, split: str | None, reading: Reading, flag: str = "--data_path"
) -> Images:
    """`open_images`; with `reading.skip_bad`, without the images that can't be decoded, which are listed in that file.

    The list has a line "name<TAB>reason" for each image that was skipped in this run. All processes call this; the
    first one decodes every image, once in a run.

    Raises:
        Refused: as `open_images`; no image can be decoded; or the list can't be written, or would replace a file that
            is no such list.
    """
    images = open_images(data_path, split, flag=flag, **reading.decoding())
    if not reading.skip_bad:
        return images
    with parallel.refusing(f"--skip_bad {reading.skip_bad}", "remove it or give another name"):
        atomic.check_own(reading.skip_bad)
    where, key = f"{flag} {data_path}", (os.fspath(data_path), split, reading, len(images))
    if key not in _checked:
        _checked[key] = parallel.on_main(lambda: {i: c.reason for i, c in enumerate(check(images)) if c.reason})
    bad = _checked[key]
    if len(bad) == len(images):
        raise Refused(f"{where}: none of the {len(images)} images can be decoded; give others. The first: "
                      f"{images.name(0)}: {bad[0]}")
    skipped = _skipped.setdefault(reading.skip_bad, {})
    skipped |= {images.name(i): reason for i, reason in bad.items()}
    lines = [f"{name}\t{reason}".encode() for name, reason in skipped.items()]
    parallel.on_main(lambda: write_list(reading.skip_bad, lines, "--skip_bad"))
    if not bad:
        return images
    parallel.say(f"{where}: {len(bad)} of {len(images)} images can't be decoded and are skipped; {reading.skip_bad} "
                 "lists them")
    return Chosen(images, [i for i in range(len(images)) if i not in bad])


def write_list(path: str, lines: Sequence[bytes], flag: str) -> None:
    with parallel.refusing(f"{flag} {path}", "give a file that can be written"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic.mark_output(path)
        with atomic.replacing(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in lines))
