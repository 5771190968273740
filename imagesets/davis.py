"""Videos with annotated objects, in the folders of DAVIS: listed, checked, and read frame by frame.

    JPEGImages/480p/<sequence>/00000.jpg ...    Annotations/480p/<sequence>/00000.png ...    ImageSets/2017/val.txt

Shapes: C channels; label maps are integers (height, width), 0 is background.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import atomic
from imagesets import decode, lists, masks
from imagesets.listing import natural_order
from parallel import Refused

RESOLUTION = "480p"
LISTS = ("2017/val.txt", "2016/val.txt", "480p/val.txt", "val.txt")


class Video(NamedTuple):
    """One sequence: its frames in order and its annotations by frame number."""

    name: str
    frames: list[Path]
    annotations: dict[int, Path]
    objects: list[int]  # labels of the first annotation
    void: int | None  # the label of pixels that are not judged
    merged: bool = False  # all labels stand for one object


def find_videos(
    data_path: str, resolution: str = "", image_set: str = "", names: Sequence[str] = (), merge: bool = False,
    reading: decode.Reading = decode.PLAIN,
) -> list[Video]:
    """The sequences of a folder in the layout above, all checked.

    Args:
        resolution: folder below JPEGImages/ and Annotations/; "" takes 480p, or the only one.
        image_set: list below ImageSets/; "" takes the first of `LISTS` that exists, or else every sequence.
        names: only these sequences.
        merge: take all objects of a sequence for one, the first, as in DAVIS 2016.

    Raises:
        Refused: no such folder, list or sequence, or a sequence whose files don't fit together.
    """
    where, root = f"--data_path {data_path!r}", Path(os.path.expanduser(data_path))
    for name in ("JPEGImages", "Annotations"):
        if not (root / name).is_dir():
            raise Refused(f"{where}: it has no {name}/; give the folder of DAVIS that holds JPEGImages/ and "
                          "Annotations/")
    frames = find_resolution(root / "JPEGImages", resolution)
    below = frames.relative_to(root / "JPEGImages")
    listed = read_list(root, image_set) or sorted(p.name for p in frames.iterdir() if p.is_dir())
    if unknown := [name for name in names if name not in listed]:
        raise Refused(f"--sequences {unknown[0]}: not among the sequences of {where}: {', '.join(listed[:8])}"
                      + (", ..." if len(listed) > 8 else ""))
    listed = [name for name in listed if name in names] if names else listed
    if not listed:
        raise Refused(f"{where}: there are no sequences in {frames}; give a folder that has some")
    videos = [open_video(name, frames / name, root / "Annotations" / below / name, reading) for name in listed]
    return [video._replace(objects=video.objects[:1], merged=True) for video in videos] if merge else videos


def find_resolution(folder: Path, resolution: str) -> Path:
    """JPEGImages/480p, or the only folder of sequences; JPEGImages/ itself when the sequences lie in it."""
    known = sorted(p.name for p in folder.iterdir() if p.is_dir() and any(q.is_dir() for q in p.iterdir()))
    if resolution and resolution not in known:
        raise Refused(f"--resolution {resolution}: {folder} has {', '.join(known) or 'no such folder'}; give one of "
                      "its folders")
    if not resolution and RESOLUTION not in known and len(known) > 1:
        raise Refused(f"--resolution: {folder} has {', '.join(known)}; give one of them")
    return folder / (resolution or (RESOLUTION if RESOLUTION in known else known[0] if known else ""))


def read_list(root: Path, image_set: str) -> list[str]:
    """Names of sequences: one per line or, in the lists of 2016, the paths of a frame and of its mask per line."""
    candidates = [image_set, f"{image_set}.txt"] if image_set else LISTS
    path = next((root / "ImageSets" / name for name in candidates if (root / "ImageSets" / name).is_file()), None)
    if path is None and image_set:
        raise Refused(f"--image_set {image_set}: {root / 'ImageSets'} has no such list; give one, for example 2017/val")
    lines = [line.split()[0] for line in lists.read_text(path).splitlines() if line.split()] if path else []
    return list(dict.fromkeys(Path(line).parent.name if "/" in line else line for line in lines))


def open_video(name: str, folder: Path, annotated: Path, reading: decode.Reading = decode.PLAIN) -> Video:
    """A sequence whose frames and annotations all have one size.

    255 is void, unless it is the only label of the first annotation: DAVIS 2016 labels its one object so.
    """
    if not folder.is_dir():
        raise Refused(f"sequence {name}: there is no folder {folder}; take the name out of the list")
    where = f"sequence {name}"
    by_stem = masks.by_stem(where, folder, decode.suffixes(reading.in_chans), atomic.outputs_in(folder))
    frames = [by_stem[stem] for stem in sorted(by_stem, key=natural_order)]
    by_stem = masks.by_stem(where, annotated, masks.SUFFIXES) if annotated.is_dir() else {}
    annotations = {i: by_stem[path.stem] for i, path in enumerate(frames) if path.stem in by_stem}
    if not frames:
        raise Refused(f"sequence {name}: there are no images in {folder}; add its frames or take the name out of the "
                      "list")
    if 0 not in annotations:
        raise Refused(f"sequence {name}: its first frame has no annotation {annotated / frames[0].stem}.png; add it, "
                      "it gives the objects")
    expected = masks.size(frames[0], turned=True)
    for path in [*frames, *annotations.values()]:
        size = masks.size(path, turned=path not in annotations.values())
        if size != expected:
            raise Refused(f"sequence {name}: {path} is {size[1]} x {size[0]} pixels and its first frame "
                          f"{expected[1]} x {expected[0]}; give frames and annotations of one size")
    labels = np.unique(masks.read_labels(annotations[0])).tolist()
    objects = [label for label in labels if label not in (0, masks.VOID)]
    if not objects and masks.VOID not in labels:
        raise Refused(f"sequence {name}: {annotations[0]} has no object in it; give another annotation")
    return Video(name, frames, annotations, objects or [masks.VOID], masks.VOID if objects else None)


def read_annotation(video: Video, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """A frame's labels and its void pixels: integers and bool (height, width)."""
    labels = masks.read_labels(video.annotations[frame])
    void = labels == (-1 if video.void is None else video.void)
    labels = np.where(void, 0, labels)
    return np.where(labels > 0, video.objects[0], 0) if video.merged else labels, void
