"""Attention of a Vision Transformer on the frames of a video, as a video. Needs imageio-ffmpeg.

Figures are uint8 arrays (height, width, 3). Shapes: C channels, H heads, h x w patches, D width.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import atomic
import flags
from imagesets import decode, sources
from imagesets.listing import natural_order
from parallel import Refused, import_optional
from protocols import attention, dense, sheets
from protocols.features import Network
from protocols.progress import progress

DEFAULT_FPS = 30.0  # of a folder of frames, as published
COLORMAP = "inferno"  # of plain maps, the published script's
CODECS = {"mp4": ("libx264", []), "avi": ("mpeg4", ["-vtag", "xvid"])}  # by format: ffmpeg's codec and further options


class Drawn(NamedTuple):
    """What is drawn of a frame."""

    name: str
    frame: Tensor  # uint8 (C, height, width), as read
    plain: np.ndarray  # mean of the heads' attention alone, each patch a square
    row: np.ndarray  # the frame beside its overlay and the other figures asked for


def draw_video(
    network: Network, path: str, image_size: Sequence[int], output_dir: str | os.PathLike, fps: float | None = None,
    video_format: str = "mp4", layer: int = -1, threshold: float | None = None, pca: bool = False,
    point: Sequence[float] | None = None,
) -> None:
    """Write what the published video_generation.py writes, and attention.mp4.

    frames/frame-0000.jpg and so on, the frames of a video file; attention/attn-*.jpg, each frame's mean attention;
    video.mp4, a video of these; attention.mp4, each frame beside its attention overlay and the other figures asked for.

    Args:
        path: a video file, or a folder of frames.
        fps: frames per second; None takes the source's, or 30 for a folder.
        video_format: a key of CODECS.
        image_size, layer, threshold, pca, point: as in `attention.draw_image`; see `video_rows`.

    Raises:
        Refused: no such video, no frames, a point outside them, nothing can be written to `output_dir`, or frames that
            somebody else put there would be replaced.
    """
    frames, total, fps = open_video(path, fps, network.reading)
    all_drawn = progress(video_rows(network, frames, image_size, layer, threshold, pca, point), total, "frames")
    first = next(all_drawn, None)  # before anything is written: bad flags show here
    if first is None:
        raise Refused(f"--video {path}: it has no frames; give another file or folder")
    count, extracted = 0, Path(path).is_file()
    if extracted:
        check_frames(Path(output_dir) / "frames")
    folder = flags.prepare_output(output_dir)
    plain, beside = (folder / f"{name}.{video_format}" for name in ("video", "attention"))
    with writing(plain, first.plain, fps) as write_plain, writing(beside, first.row, fps) as write_row:
        for drawn in itertools.chain([first], all_drawn):
            if extracted:
                sheets.save_picture(sheets.as_picture(drawn.frame), folder / "frames" / f"{drawn.name}.jpg")
            sheets.save_picture(drawn.plain, folder / "attention" / f"attn-{drawn.name}.jpg")
            write_plain(drawn.plain)
            write_row(drawn.row)
            count += 1
    print(f"{count} frames, {fps:g} per second: {plain.name}, {beside.name}, attention/{' and frames/' * extracted} "
          f"written to {folder}")


def check_frames(folder: Path) -> None:
    """Refuse to replace frames in the folder that another program wrote."""
    own = atomic.outputs_in(folder)
    if theirs := sorted(file.name for file in folder.glob("frame-*.jpg") if os.fsencode(file.name) not in own):
        raise Refused(f"--output_dir {folder.parent}: {folder.name}/{theirs[0]} is not from this script, which would "
                      "replace it; choose another folder")


def video_rows(
    network: Network, frames: Iterable[tuple[str, Tensor]], image_size: Sequence[int], layer: int = -1,
    threshold: float | None = None, pca: bool = False, point: Sequence[float] | None = None,
) -> Iterator[Drawn]:
    """Draw each frame, a name and uint8 (C, height, width); one frame is in memory at a time.

    The basis of the PCA colours and the token of the point are those of the first frame, so that colours keep their
    meaning and the point is followed.
    """
    first = basis = token = None
    for name, frame in frames:
        image, heads, tokens = dense.look(network, frame, image_size, layer, bilinear=True)
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
        row = np.concatenate([sheets.resize(panel, *first.shape[:2]) for panel in panels], axis=1)
        yield Drawn(name, frame, attention.heat_figure(heat, figure, COLORMAP), row)


def make_video(path: str, output_dir: str | os.PathLike, fps: float | None = None, video_format: str = "mp4") -> None:
    """Write the images of a folder as video.mp4, at the size of the first one; without a network.

    Args:
        path: a folder, of whose images those in it are used, figures of `draw_video` included; if some are named
            attn-*, those alone, as in the published script.
        fps: frames per second; None: 30.
        video_format: a key of CODECS.

    Raises:
        Refused: no such folder, an image that can't be read, or nothing can be written to `output_dir`.
    """
    if not Path(path).is_dir():
        raise Refused(f"--video {path}: not a folder; give the folder of images to --video_only")
    names = [file.name for file in Path(path).iterdir()
             if file.suffix.lower() in decode.suffixes() and not file.name.startswith(".") and file.is_file()]
    if not names:
        raise Refused(f"--video {path}: no images in it; give the folder of images to --video_only")
    # Not by `open_images`, which leaves out what the project wrote.
    images = sources.open_files(path, [n for n in names if n.startswith("attn-")] or names, decode.PLAIN)
    frames = (sheets.as_picture(frame) for _, frame in folder_frames(images, range(len(images)), path))
    frames = progress(frames, len(images), "frames")
    count, fps = 0, fps or DEFAULT_FPS
    first = next(frames)  # before anything is written
    target = flags.prepare_output(output_dir) / f"video.{video_format}"
    with writing(target, first, fps) as write:
        for frame in itertools.chain([first], frames):
            write(frame if frame.shape == first.shape else sheets.resize(frame, *first.shape[:2]))
            count += 1
    print(f"{count} frames, {fps:g} per second: {target} written")


# ---- Files ----


@contextlib.contextmanager
def writing(path: Path, first: np.ndarray, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that adds a figure of the size of `first` to a new video; the file's suffix is a key of CODECS."""
    height, width = (side + side % 2 for side in first.shape[:2])  # the codecs need even sides
    codec, options = CODECS[path.suffix[1:]]
    with atomic.replacing(path) as temporary, contextlib.closing(import_ffmpeg().write_frames(
            str(temporary), (width, height), fps=fps, codec=codec, quality=7, macro_block_size=2,
            output_params=[*options, "-f", path.suffix[1:]],
    )) as writer:
        writer.send(None)
        yield lambda figure: writer.send(
            np.pad(figure, ((0, height - len(figure)), (0, width - figure.shape[1]), (0, 0)), mode="edge"))


def open_video(
    path: str, fps: float | None, reading: decode.Reading, flag: str = "--video"
) -> tuple[Iterator[tuple[str, Tensor]], int, float]:
    """Names and frames uint8 (C, height, width), decoded when they are asked for, their number, and frames per second.

    The number of a file's frames is estimated from its duration, 0 where it doesn't state one.

    Frames of a folder come in the order of the numbers in their names; those of a file are named frame-0000 and so on.

    Raises:
        Refused: no such file or folder, nothing that ffmpeg can read, or imageio-ffmpeg isn't installed.
    """
    imageio_ffmpeg = import_ffmpeg(flag)
    if Path(path).is_dir():
        images = sources.open_images(path, flag=flag, **reading.decoding())
        return folder_frames(images, range(len(images)), path), len(images), fps or DEFAULT_FPS
    if not Path(path).is_file():
        raise Refused(f"{flag} {path}: no such file or folder; give a video, or a folder of frames")
    if reading.in_chans != 3:
        raise Refused(f"{flag} {path}: a video has 3 channels, the network {reading.in_chans}; give a folder of "
                      "frames")
    reader = imageio_ffmpeg.read_frames(path)
    try:
        about = next(reader)
    except (OSError, RuntimeError, StopIteration) as error:
        raise Refused(f"{flag} {path}: not a video that ffmpeg can read; give another file") from error
    width, height = about["size"]
    frames = ((f"frame-{i:04}", torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, 3)
               .permute(2, 0, 1)) for i, frame in enumerate(reader))
    return frames, round(about["duration"] * about["fps"]), fps or about["fps"] or DEFAULT_FPS


def folder_frames(images: sources.Images, numbers: Iterable[int], path: str) -> Iterator[tuple[str, Tensor]]:
    """Names without suffix, of which none occurs twice, and frames."""
    numbers = sorted(numbers, key=lambda i: natural_order(images.name(i)))
    stems = [Path(images.name(i)).stem for i in numbers]
    if len(set(stems)) < len(stems):  # a.jpg and a.png, or files of several folders
        stems = [f"{k:04}-{stem}" for k, stem in enumerate(stems)]
    for stem, i in zip(stems, numbers, strict=True):
        try:
            yield stem, images.load(i)
        except decode.Undecodable as error:
            raise Refused(f"--video {path}: {error}; replace the frame or take it out") from error


def import_ffmpeg(flag: str = "--video"):
    return import_optional("imageio_ffmpeg", flag, "imageio-ffmpeg")
