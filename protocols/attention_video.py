"""Attention of a Vision Transformer on the frames of a video, as a video. Needs imageio-ffmpeg.

Figures are uint8 arrays (height, width, 3). Shapes: C channels, H heads, h x w patches, D width.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import atomic
import flags
from imagesets import decode, sources
from parallel import Refused, import_optional
from protocols import attention, dense, sheets
from protocols.features import Network

DEFAULT_FPS = 25.0  # of a folder of frames


def draw_video(
    network: Network, path: str, image_size: Sequence[int], output_dir: str | os.PathLike, fps: float | None = None,
    layer: int = -1, threshold: float | None = None, pca: bool = False, point: Sequence[float] | None = None,
) -> None:
    """Write attention.mp4: each frame beside its attention overlay and the other figures asked for.

    Args:
        path: a video file, or a folder of frames.
        fps: frames per second; None takes the source's, or 25 for a folder.
        image_size, layer, threshold, pca, point: as in `attention.draw_image`; see `video_rows`.

    Raises:
        Refused: no such video, no frames, a point outside them, or nothing can be written to `output_dir`.
    """
    frames, fps = open_video(path, fps, network.reading)
    rows = video_rows(network, frames, image_size, layer, threshold, pca, point)
    first = next(rows, None)  # before anything is written: bad flags show here
    if first is None:
        raise Refused(f"--video {path}: it has no frames; give another file or folder")
    target, count = flags.prepare_output(output_dir) / "attention.mp4", 0
    height, width = (side + side % 2 for side in first.shape[:2])  # H.264 needs even sides
    with atomic.replacing(target) as temporary, contextlib.closing(import_ffmpeg().write_frames(
            str(temporary), (width, height), fps=fps, quality=7, macro_block_size=2, output_params=["-f", "mp4"],
    )) as writer:
        writer.send(None)
        for row in itertools.chain([first], rows):
            writer.send(np.pad(row, ((0, height - len(row)), (0, width - row.shape[1]), (0, 0)), mode="edge"))
            count += 1
    print(f"{count} frames, {fps:g} per second: {target} written")


def video_rows(
    network: Network, frames: Iterable[Tensor], image_size: Sequence[int], layer: int = -1,
    threshold: float | None = None, pca: bool = False, point: Sequence[float] | None = None,
) -> Iterator[np.ndarray]:
    """For each frame uint8 (C, height, width) its figures side by side; one frame is in memory at a time.

    The basis of the PCA colours and the token of the point are those of the first frame, so that colours keep their
    meaning and the point is followed.
    """
    first = basis = token = None
    for frame in frames:
        image, heads, tokens = dense.look(network, frame, image_size, layer)
        figure, heat = sheets.as_picture(image), heads.mean(axis=0)
        if first is None:
            first, basis = figure, sheets.pca_basis(tokens) if pca else None
            if point:
                token = tokens[dense.patch_of_point(
                    point, *frame.shape[-2:], image_size, network.info["patch_size"])]
        panels = [figure, sheets.attention_overlay(figure, heat)]
        if threshold:
            panels.append(sheets.mask_overlay(figure, sheets.threshold_mask(heat, threshold)))
        if pca:
            panels.append(attention.enlarge(sheets.pca_picture(tokens, basis), figure))
        if point:
            panels.append(attention.similarity_figure(figure, tokens, token))
        yield np.concatenate([sheets.resize(panel, *first.shape[:2]) for panel in panels], axis=1)


# ---- Files ----


def open_video(path: str, fps: float | None, reading: decode.Reading) -> tuple[Iterator[Tensor], float]:
    """Frames uint8 (C, height, width), decoded when they are asked for, and frames per second.

    Frames of a folder come in the order of the numbers in their names.

    Raises:
        Refused: no such file or folder, nothing that ffmpeg can read, or imageio-ffmpeg isn't installed.
    """
    imageio_ffmpeg = import_ffmpeg()
    if Path(path).is_dir():
        images = sources.open_images(path, flag="--video", **reading.decoding())
        return folder_frames(images, path), fps or DEFAULT_FPS
    if not Path(path).is_file():
        raise Refused(f"--video {path}: no such file or folder; give a video, or a folder of frames")
    if reading.in_chans != 3:
        raise Refused(f"--video {path}: a video has 3 channels, the network {reading.in_chans}; give a folder of "
                      "frames")
    reader = imageio_ffmpeg.read_frames(path)
    try:
        about = next(reader)
    except (OSError, RuntimeError, StopIteration) as error:
        raise Refused(f"--video {path}: not a video that ffmpeg can read; give another file") from error
    width, height = about["size"]
    frames = (torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
              for frame in reader)
    return frames, fps or about["fps"] or DEFAULT_FPS


def folder_frames(images: sources.Images, path: str) -> Iterator[Tensor]:
    for i in sorted(range(len(images)), key=lambda i: natural_order(images.name(i))):
        try:
            yield images.load(i)
        except decode.Undecodable as error:
            raise Refused(f"--video {path}: {error}; replace the frame or take it out") from error


def natural_order(name: str) -> list:
    """Sort key that puts frame2 before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def import_ffmpeg():
    return import_optional("imageio_ffmpeg", "--video", "imageio-ffmpeg")
