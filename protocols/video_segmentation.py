"""Video object segmentation: the labels of a video's first frame, propagated and measured on the other frames.

    arithmetic    longer side of a frame         resized          labels of pixels
    published     a multiple of 64, rounded off  as OpenCV does   at the network's input size, then resized
    own           nearest number of patches      antialiased      at the frame's size

Shapes: B frames per batch, C channels, h x w patches, D width. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import flags
import parallel
from imagesets import davis, masks
from parallel import Refused
from protocols import dense, scores, tokens
from protocols.features import PIXELS, Network
from protocols.progress import progress
from protocols.propagation import harden, one_hot, propagate_video
from protocols.segmentation_scores import contour_accuracy, jaccard, statistics
from protocols.transforms import resize, resize_as_opencv
from utils import IMAGENET_MEAN, IMAGENET_STD

STATISTICS = ("mean", "recall", "decay")
PROPAGATED, COPIED = "propagated", "first mask copied"  # methods in the table
PUBLISHED_STD = (0.228, 0.224, 0.225)  # the published script's, where the network was trained with IMAGENET_STD


# ---- Features ----


def patch_network(network: Network, patch_size: int, arithmetic: str = flags.PUBLISHED) -> Network:
    """A network that computes patch features: (B, C, height, width), normalized -> (B, h, w, D).

    Args:
        patch_size: of raw pixels, whose features are the pixels of a patch. A network has its own.
        arithmetic: "published" takes PUBLISHED_STD for IMAGENET_STD.

    Raises:
        Refused: the network has no patch tokens.
    """
    if network.about["arch"] == PIXELS:
        info = network.info | {"patch_size": patch_size}
        if info["mean"] == (0.0,) * 3:  # the default of raw pixels; cosines of patches need centred values
            info |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        network = network._replace(forward=lambda x: F.pixel_unshuffle(x, patch_size).movedim(1, -1), info=info)
    else:
        info, given = network.info | {"patch_size": tokens.patch_size(network)}, network

        def forward(x: Tensor) -> Tensor:
            with tokens.refusing_size(given, f"--image_size: a frame of {x.shape[-1]} x {x.shape[-2]} pixels"):
                ((maps, _),) = tokens.model_tokens(given.forward, x)
            return maps.movedim(1, -1)

        network = network._replace(forward=forward, info=info)
    if arithmetic == flags.PUBLISHED and tuple(network.info["std"]) == IMAGENET_STD:
        network = network._replace(info=network.info | {"std": PUBLISHED_STD})
    return network


def frame_size(
    height: int, width: int, image_size: int, patch: int, arithmetic: str = flags.PUBLISHED
) -> tuple[int, int]:
    """Size of the network's input: shorter side `image_size` rounded down to whole patches; both in whole patches.

    The longer side, or the width of a square frame, is rounded down to a multiple of 64, or to whole patches where
    that is 0 (published), or to the nearest number of patches (own). The frame is distorted instead of cropped: labels
    must cover it to its edges.

    Raises:
        Refused: `image_size` is below the patch size.
    """
    if image_size < patch:
        raise Refused(f"--image_size {image_size}: smaller than a patch of {patch}; give {patch} or more")
    shorter = image_size // patch * patch
    dense.input_sizes(height, width, [image_size], patch)  # refuses too many patches
    longer = shorter * max(height, width) / min(height, width)
    if arithmetic == flags.OWN:
        longer = round(longer / patch) * patch
    else:
        longer = int(longer // 64 * 64) // patch * patch or int(longer // patch) * patch
    return (longer, shorter) if height > width else (shorter, longer)


@torch.inference_mode()
def frame_features(
    video: davis.Video, network: Network, size: tuple[int, int], batch_size: int, arithmetic: str
) -> Iterator[Tensor]:
    """Patch features float32 (h, w, D) of each frame; `batch_size` frames are in memory."""
    shrink = resize if arithmetic == flags.OWN else resize_as_opencv
    for first in range(0, len(video.frames), batch_size):
        images = (masks.read_image(frame, network.reading, f"sequence {video.name}")
                  for frame in video.frames[first : first + batch_size])
        batch = torch.stack([shrink(image, size) for image in images])
        yield from network.forward(tokens.normalize(batch, network.info, network.device)).float()


# ---- One video ----


def segment_video(
    video: davis.Video, network: Network, image_size: int, n_last_frames: int, radius: int, topk: int, batch_size: int,
    arithmetic: str = flags.PUBLISHED,
) -> Iterator[np.ndarray]:
    """Labels (height, width) of each frame; those of the first are its annotation."""
    first, _ = davis.read_annotation(video, 0)
    patch = network.info["patch_size"]
    size = frame_size(*first.shape, image_size, patch, arithmetic)
    h, w = (side // patch for side in size)
    features = frame_features(video, network, size, batch_size, arithmetic)
    given = one_hot(first, video.objects, h, w).to(network.device)
    for i, labels in enumerate(propagate_video(features, given, n_last_frames, radius, topk)):
        yield harden(labels, video.objects, *first.shape, 0 if arithmetic == flags.OWN else patch) if i else first


def frame_scores(
    labels: np.ndarray, truth: np.ndarray, void: np.ndarray, objects: Sequence[int]
) -> list[list[float]]:
    """J and F of each object: objects x 2."""
    return [[measure(labels == o, truth == o, void) for measure in (jaccard, contour_accuracy)] for o in objects]


def evaluate_video(video: davis.Video, segmented: Iterable[np.ndarray], output_dir: Path) -> dict[str, list]:
    """Write the labels of a video's frames and measure them where annotated: {method: (frames, objects, 2)}.

    The first frame is given, and the last one is left out as in DAVIS 2017.
    """
    started, measured = time.perf_counter(), {PROPAGATED: [], COPIED: []}
    first, _ = davis.read_annotation(video, 0)
    for i, labels in enumerate(progress(segmented, len(video.frames), f"{video.name}, frame")):
        masks.write_labels(labels, output_dir / video.name / f"{video.frames[i].stem}.png")
        if i in video.annotations and 0 < i < len(video.frames) - 1:
            truth, void = davis.read_annotation(video, i)
            for method, prediction in ((PROPAGATED, labels), (COPIED, first)):
                measured[method].append(frame_scores(prediction, truth, void, video.objects))
    print(f"{video.name}: {len(video.frames)} frames, {len(video.objects)} object(s), "
          f"{(time.perf_counter() - started) / len(video.frames):.2f} s per frame", flush=True)
    return measured


# ---- Figures ----


def object_figures(measured: Sequence) -> dict[str, np.ndarray]:
    """Figures of a video's objects from J and F (frames, objects, 2): {"J&F", "J mean", ... "F decay"}: (objects,)."""
    measured = np.asarray(measured, np.float64)
    figures = {}
    for k, name in enumerate("JF"):
        each = np.array([statistics(series) for series in measured[..., k].T])  # (objects, 3)
        figures |= {f"{name} {statistic}": each[:, i] for i, statistic in enumerate(STATISTICS)}
    return {"J&F": (figures["J mean"] + figures["F mean"]) / 2} | figures


def summarize(videos: Sequence[davis.Video], measured: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """A line per method, averaged over objects, and a line per video that has a judged frame."""
    results, per_video, judged = [], [], []
    for video, one in zip(videos, measured, strict=True):
        if one[PROPAGATED]:
            judged.append(figures := {method: object_figures(values) for method, values in one.items()})
            per_video.append(
                {"sequence": video.name, "objects": len(video.objects), "frames": len(one[PROPAGATED])}
                | {key: 100 * float(values.mean()) for key, values in figures[PROPAGATED].items()}
                | {"copied J&F": 100 * float(figures[COPIED]["J&F"].mean())})
    for method in judged[0] if judged else ():
        results.append({"method": method} | {
            key: scores.percent(np.concatenate([figures[method][key] for figures in judged]))
            for key in judged[0][method]})
    return results, per_video


def notes_on(videos: Sequence[davis.Video], measured: Sequence[dict]) -> list[str]:
    bare = [video.name for video, one in zip(videos, measured, strict=True) if not one[PROPAGATED]]
    partly = [v.name for v in videos if v.name not in bare and len(v.annotations) < len(v.frames)]
    notes = {
        "without an annotated frame between the first and the last are segmented but not judged": bare,
        "are annotated in some frames only, and judged in those": partly,
    }
    return [f"{len(names)} sequence(s) {note}: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "")
            for note, names in notes.items() if names]


# ---- The evaluation ----


def evaluate_video_segmentation(
    network: Network, data_path: str, resolution: str = "", image_set: str = "", sequences: Sequence[str] = (),
    merge_objects: bool = False, image_size: int = 480, patch_size: int = 16, n_last_frames: int = 7,
    size_mask_neighborhood: int = 12, topk: int = 5, batch_size: int = 6, output_dir: str | os.PathLike = ".",
    arithmetic: str = flags.PUBLISHED,
) -> dict:
    """Propagate labels through videos and measure them. Writes <sequence>/<frame>.png, eval_video_segmentation.json.

    Every process calls it; they share the sequences, and the first one writes the JSON file.

    Args:
        network: with patch tokens, or raw pixels; computes in float32.
        data_path, resolution, image_set, sequences, merge_objects: see `davis.find_videos`.
        image_size: shorter side of the network's input in pixels, rounded down to whole patches.
        patch_size: of raw pixels; a network has its own.
        n_last_frames: frames before the current one that labels come from, beside the first.
        size_mask_neighborhood: rows and columns of patches within which labels are taken; 0: no limit.
        topk: most similar patches, of all these frames, that count.
        batch_size: frames shown to the network at once.
        arithmetic: "published" or "own", see above.

    Returns:
        What eval_video_segmentation.json holds, without the command: settings, notes, "per_sequence" and {"results": a
        line per method}, which is empty where no frame can be judged.

    Raises:
        Refused: a network without patch tokens, no such sequences, a file that can't be read or written.
    """
    network = patch_network(network, patch_size, arithmetic)
    frame_size(64, 64, image_size, network.info["patch_size"])  # fail before any frame is read
    videos = davis.find_videos(data_path, resolution, image_set, sequences, merge_objects, network.reading)
    output_dir = flags.prepare_output(output_dir)
    segment = partial(segment_video, network=network, image_size=image_size, n_last_frames=n_last_frames,
                      radius=size_mask_neighborhood, topk=topk, batch_size=batch_size, arithmetic=arithmetic)
    measured = parallel.map_shared(lambda i: evaluate_video(videos[i], segment(videos[i]), output_dir), len(videos))
    results, per_video = summarize(videos, measured)
    names = ("arch", "weights", "checkpoint_key", "weights_sha256")
    about = {name: network.about[name] for name in names if name in network.about} | network.info | {
        "data_path": data_path, "image_size": image_size, "n_last_frames": n_last_frames,
        "size_mask_neighborhood": size_mask_neighborhood, "topk": topk, "merge_objects": merge_objects,
        "arithmetic": arithmetic,
        "sequences": len(videos), "notes": notes_on(videos, measured), "per_sequence": per_video,
    }
    return scores.write_results(output_dir / "eval_video_segmentation.json", results, **about)


def show_video_segmentation(report: Mapping) -> None:
    """Print the notes and tables of `evaluate_video_segmentation`'s report."""
    for note in report["notes"]:
        print(note)
    if not report["results"]:
        print("no frame is annotated but the first ones: there is nothing to measure")
        return
    print("region similarity J and contour accuracy F in %, mean over objects with its 95 % bootstrap interval; "
          f"{report['arithmetic']} arithmetic")
    print(scores.table(report["per_sequence"]) + "\n\n" + scores.table(report["results"]), flush=True)
