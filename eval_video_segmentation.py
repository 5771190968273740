"""Video object segmentation by passing labels from frame to frame with frozen patch features: no training, no labels
but the first frame's (DINO, arXiv 2104.14294, section 4.2.1; the protocol of Jabri et al. 2020).

    python eval_video_segmentation.py --pretrained_weights output/run/checkpoint.pth --data_path /path/to/DAVIS
    python eval_video_segmentation.py --arch pixels --patch_size 8 --data_path /path/to/DAVIS

Writes a palette PNG for each frame, <output_dir>/<sequence>/<frame>.png, and measures region similarity J and contour
accuracy F against the annotations, the first and the last frame left out as in DAVIS 2017. Every table has the figures
of the first mask copied to all frames; `--arch pixels` compares the patches' colours.

Shapes: B frames a batch, C channels, h x w patches, D width, K labels (background and objects), n context frames.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import flags
import parallel
import visualize_attention
from imagesets import davis, decode, masks
from protocols import scores, segmentation_scores
from protocols.features import PIXELS, refuse_weights, weights_hash
from utils import IMAGENET_MEAN, IMAGENET_STD
from vision_transformer import VITS, VisionTransformer
from weights import backbones

TEMPERATURE = 0.1  # of the weights, as published
TILE = 12  # rows and columns of patches that are matched at once
STATISTICS = ("mean", "recall", "decay")


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.Parser("Video object segmentation with frozen patch features, on videos in the folders of DAVIS.")
    add = parser.add_argument
    add("--data_path", required=True, help="folder of DAVIS: JPEGImages/, Annotations/ and perhaps ImageSets/")
    add("--resolution", default="", help="folder in JPEGImages/ and Annotations/; empty: 480p, or the only one")
    add("--image_set", default="", help="list in ImageSets/; empty: 2017/val, 2016/val, or every sequence")
    add("--sequences", nargs="+", default=[], metavar="NAME", help="only these of them")
    add("--merge_objects", action="store_true", help="all objects of a video are one, as in DAVIS 2016")
    flags.add_dense_flags(parser)
    add("--n_last_frames", type=flags.count, default=7, help="frames before the current one that labels come from")
    add("--size_mask_neighborhood", type=flags.count, default=12,
        help="labels come from patches within so many rows and columns; 0: from all")
    add("--topk", type=flags.positive_int, default=5, help="most similar patches, of all these frames, that count")
    add("--bs", type=flags.positive_int, default=6, help="frames shown to the network at once")
    add("--seed", type=flags.seed, default=0, help="of an untrained network")
    add("--output_dir", default="output/davis", help="for <sequence>/<frame>.png and eval_video_segmentation.json")
    flags.add_launch_flags(parser, workers=False)
    return parser


# ---- Propagation ----


def propagate(query: Tensor, context: Sequence[Tensor], labels: Sequence[Tensor], radius: int, topk: int) -> Tensor:
    """Labels of a frame's patches: the mean of those of their nearest patches in the context frames.

    The weights are exp(cosine similarity / 0.1) over their sum, of the `topk` most similar patches that lie within
    `radius` rows and columns (0: anywhere) in any of the context frames. The patches are worked through in tiles, so
    that the similarities of a few are held at a time.

    Args:
        query: (h, w, D), of unit length.
        context: n of (h, w, D), of unit length.
        labels: n of (h, w, K).

    Returns:
        (h, w, K), the labels' type.
    """
    h, w = query.shape[:2]
    reach = radius or max(h, w)
    context, labels = torch.stack(tuple(context)), torch.stack(tuple(labels))  # (n, h, w, D), (n, h, w, K)
    found = torch.empty_like(labels[0])
    rows, columns = (torch.arange(side, device=query.device) for side in (h, w))
    for top in range(0, h, TILE):
        for left in range(0, w, TILE):
            tile = slice(top, top + TILE), slice(left, left + TILE)
            near = slice(max(0, top - reach), top + TILE + reach), slice(max(0, left - reach), left + TILE + reach)
            far = ((rows[tile[0], None, None, None] - rows[near[0], None]).abs() > reach) | (
                (columns[tile[1], None, None] - columns[near[1]]).abs() > reach)  # (tile h, tile w, near h, near w)
            similarity = query[tile].flatten(0, 1) @ context[(slice(None), *near)].flatten(0, 2).T
            similarity.unflatten(1, (len(context), -1)).masked_fill_(far.flatten(2).flatten(0, 1)[:, None], -torch.inf)
            best, source = similarity.topk(min(topk, similarity.shape[1]), dim=1)  # (patches of the tile, topk)
            weights = (best / TEMPERATURE).softmax(dim=1)[..., None]
            mean = (weights.to(labels.dtype) * labels[(slice(None), *near)].flatten(0, 2)[source]).sum(1)
            found[tile] = mean.view(*found[tile].shape)
    return found


def segment(features: Iterable[Tensor], first: Tensor, n_last: int, radius: int, topk: int) -> Iterator[Tensor]:
    """Soft labels (h, w, K) of each frame of a video, given those of the first.

    The context is the first frame and the `n_last` frames before the current one; no other is held.

    Args:
        features: of each frame (h, w, D), any length.
        first: (h, w, K).
    """
    features = (F.normalize(frame, dim=-1) for frame in features)
    origin, last = (next(features), first), deque(maxlen=n_last)
    yield first
    for frame in features:
        found = propagate(frame, *zip(origin, *last, strict=True), radius, topk)
        last.append((frame, found))
        yield found


def one_hot(labels: np.ndarray, objects: Sequence[int], h: int, w: int) -> Tensor:
    """Labels (height, width) at the patches' centres: float (h, w, K), background first, then the objects."""
    rows, columns = (((np.arange(n) + 0.5) * side / n).astype(int)
                     for n, side in zip((h, w), labels.shape, strict=True))
    numbers = np.array([0, *objects])
    return torch.from_numpy(labels[rows[:, None], columns][..., None] == numbers).float()


def harden(soft: Tensor, objects: Sequence[int], height: int, width: int) -> np.ndarray:
    """Soft labels (h, w, K) -> labels of a frame's pixels (height, width).

    Each label is scaled bilinearly to the frame's size and then to the range 0 to 1 (one that is the same everywhere
    stays as it is), and a pixel gets its highest label; of equals, the first.
    """
    maps = F.interpolate(soft.movedim(-1, 0)[None], (height, width), mode="bilinear", align_corners=False)[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = torch.where(high > low, (maps - low) / (high - low).clamp_min(1e-12), maps)
    return np.array([0, *objects])[maps.argmax(0).cpu().numpy()]


# ---- Features ----


def load_forward(args: argparse.Namespace, device: torch.device) -> tuple[Callable[[Tensor], Tensor], dict]:
    """What makes patch features (B, h, w, D) of normalized frames (B, C, height, width), and what a report says of it.

    Raises:
        FileNotFoundError, ValueError: no such weights, or no patches.
    """
    if args.arch == PIXELS:
        refuse_weights(args.pretrained_weights)
        about = {"arch": PIXELS, "patch_size": args.patch_size, "weights": None, "weights_sha256": None,
                 "in_chans": 3, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        return lambda x: F.pixel_unshuffle(x, args.patch_size).movedim(1, -1), about
    torch.manual_seed(args.seed)
    model, info = backbones.load_backbone(args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"--arch {info['arch']}: has no patch tokens; use one of {', '.join(VITS)}, or {PIXELS}")
    about = {"weights": args.pretrained_weights or None, "checkpoint_key": args.checkpoint_key,
             "weights_sha256": weights_hash(model)} | info
    model.to(device)
    return lambda x: model.forward_features(x).patch_tokens, about


def network_size(height: int, width: int, image_size: int, patch: int) -> tuple[int, int]:
    """Size at which a frame is seen: the shorter side `image_size` rounded down, the other rounded to whole patches.

    The frame is squashed by less than half a patch: labels must cover it to its border.
    """
    if image_size < patch:
        raise ValueError(f"--image_size {image_size}: smaller than a patch of {patch}; give {patch} or more")
    shorter = image_size // patch * patch
    return tuple(max(1, round(side * shorter / min(height, width) / patch)) * patch for side in (height, width))


@torch.inference_mode()
def frame_features(frames: Sequence[Path], forward: Callable[[Tensor], Tensor], about: Mapping, size: tuple[int, int],
                   batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Patch features float32 (h, w, D) of each frame; `batch_size` frames are held."""
    mean, std = (torch.tensor(about[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))
    for start in range(0, len(frames), batch_size):
        batch = [decode.decode(path, about["in_chans"]) for path in frames[start : start + batch_size]]
        batch = torch.stack([visualize_attention.resize(frame, size, about["patch_size"]) for frame in batch])
        yield from forward((batch.to(device) / 255 - mean) / std).float()


# ---- One video ----


def segment_video(video: davis.Video, forward: Callable[[Tensor], Tensor], about: Mapping, args: argparse.Namespace,
                  device: torch.device) -> Iterator[np.ndarray]:
    """Labels (height, width) of each frame; the first frame's are its annotation's."""
    first, _ = davis.read_annotation(video, 0)
    size = network_size(*first.shape, args.image_size, about["patch_size"])
    h, w = (side // about["patch_size"] for side in size)
    features = frame_features(video.frames, forward, about, size, args.bs, device)
    soft = segment(features, one_hot(first, video.objects, h, w).to(device), args.n_last_frames,
                   args.size_mask_neighborhood, args.topk)
    for i, labels in enumerate(soft):
        yield harden(labels, video.objects, *first.shape) if i else first


def frame_scores(found: np.ndarray, truth: np.ndarray, void: np.ndarray, objects: Sequence[int]) -> list[list[float]]:
    """J and F of each object: objects x 2."""
    return [[measure(found == o, truth == o, void)
             for measure in (segmentation_scores.jaccard, segmentation_scores.contour_accuracy)] for o in objects]


def evaluate_video(video: davis.Video, forward: Callable[[Tensor], Tensor], about: Mapping, args: argparse.Namespace,
                   device: torch.device) -> dict:
    """Write a video's segmentations and measure them: {method: (frames, objects, 2)} over the annotated frames.

    The first frame is given, and the last one is left out as in DAVIS 2017.
    """
    started, measured = time.perf_counter(), {"propagated": [], "first mask copied": []}
    first, _ = davis.read_annotation(video, 0)
    for i, found in enumerate(segment_video(video, forward, about, args, device)):
        masks.write_labels(found, Path(args.output_dir, video.name, f"{video.frames[i].stem}.png"))
        if i in video.annotations and 0 < i < len(video.frames) - 1:
            truth, void = davis.read_annotation(video, i)
            for name, labels in (("propagated", found), ("first mask copied", first)):
                measured[name].append(frame_scores(labels, truth, void, video.objects))
    print(f"{video.name}: {len(video.frames)} frames, {len(video.objects)} object(s), "
          f"{(time.perf_counter() - started) / len(video.frames):.2f} s a frame", flush=True)
    return measured


# ---- Figures ----


def object_figures(measured: Sequence) -> dict[str, np.ndarray]:
    """Figures of a video's objects from J and F (frames, objects, 2): {"J&F", "J mean", ... "F decay"}: (objects,)."""
    measured = np.asarray(measured, np.float64)
    found = {}
    for k, name in enumerate("JF"):
        each = np.array([segmentation_scores.statistics(series) for series in measured[..., k].T])  # (objects, 3)
        found |= {f"{name} {statistic}": each[:, i] for i, statistic in enumerate(STATISTICS)}
    return {"J&F": (found["J mean"] + found["F mean"]) / 2} | found


def summarize(videos: Sequence[davis.Video], measured: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """A line for each method, the mean over objects, and one for each video that has a judged frame."""
    judged = [(video, found) for video, found in zip(videos, measured, strict=True) if found["propagated"]]
    results = []
    for method in judged[0][1] if judged else ():
        each = [object_figures(found[method]) for _, found in judged]
        results.append({"method": method} | {key: scores.percent(np.concatenate([e[key] for e in each]))
                                             for key in each[0]})
    per_video = [{"sequence": video.name, "objects": len(found["propagated"][0]), "frames": len(found["propagated"])}
                 | {key: 100 * float(value.mean()) for key, value in object_figures(found["propagated"]).items()}
                 | {"copied J&F": 100 * float(object_figures(found["first mask copied"])["J&F"].mean())}
                 for video, found in judged]
    return results, per_video


def notes_on(videos: Sequence[davis.Video], measured: Sequence[dict]) -> list[str]:
    notes = []
    if bare := [video.name for video, found in zip(videos, measured, strict=True) if not found["propagated"]]:
        notes.append(f"{len(bare)} sequence(s) without an annotated frame between the first and the last are segmented "
                     f"but not judged: {', '.join(bare[:5])}" + (", ..." if len(bare) > 5 else ""))
    if partly := [v.name for v in videos if v.name not in bare and len(v.annotations) < len(v.frames)]:
        notes.append(f"{len(partly)} sequence(s) are annotated in some frames only, and judged in those: "
                     f"{', '.join(partly[:5])}" + (", ..." if len(partly) > 5 else ""))
    return notes


def evaluate_video_segmentation(args: argparse.Namespace) -> dict:
    """The whole evaluation: writes the segmentations and eval_video_segmentation.json, prints the tables.

    Raises:
        flags.Refused: bad input, in one line.
    """
    try:
        flags.check_folder(args.output_dir)
        device = parallel.start(args.device, args.dist_url, args.dist_timeout)
        forward, about = load_forward(args, device)
        network_size(64, 64, args.image_size, about["patch_size"])  # a wrong flag is named before any work
        videos = davis.find_videos(args.data_path, args.resolution, args.image_set, args.sequences, args.merge_objects,
                                   about["in_chans"])
        flags.prepare_output(Path(args.output_dir))
        measured = parallel.map_shared(lambda i: evaluate_video(videos[i], forward, about, args, device), len(videos))
    except (ValueError, OSError) as error:
        raise flags.Refused(error) from error
    results, per_video = summarize(videos, measured)
    protocol = ("data_path", "image_size", "n_last_frames", "size_mask_neighborhood", "topk", "merge_objects")
    about = about | {name: getattr(args, name) for name in protocol} | {
        "sequences": len(videos), "notes": notes_on(videos, measured), "per_sequence": per_video}
    if parallel.is_main():
        report(results, about)
        scores.write_results(Path(args.output_dir, "eval_video_segmentation.json"), results, **about)
        print(f"wrote {Path(args.output_dir, 'eval_video_segmentation.json')} and <sequence>/<frame>.png beside it")
    return about | {"results": results}


def report(results: Sequence[Mapping], about: Mapping) -> None:
    for note in about["notes"]:
        print(note)
    if not results:
        print("no frame is annotated but the first ones: there is nothing to measure")
        return
    print("region similarity J and contour accuracy F in %, mean over objects with its 95 % bootstrap interval")
    print(scores.table(about["per_sequence"]) + "\n\n" + scores.table(results), flush=True)


def main(args: argparse.Namespace) -> int:
    return flags.exit_code("eval_video_segmentation.py", evaluate_video_segmentation, args)


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
