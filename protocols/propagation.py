"""Propagation of labels from frame to frame of a video, by the similarity of patch features, without training
(DINO, arXiv 2104.14294, section 4.2.1; the protocol of Jabri et al. 2020).

Shapes: h x w patches, D width, K labels (background and objects), n context frames. Sizes are (height, width) in
pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

TEMPERATURE = 0.1  # of the weights, as published
TILE = 12  # rows and columns of patches that are matched at once


def propagate(query: Tensor, context: Sequence[Tensor], labels: Sequence[Tensor], radius: int, topk: int) -> Tensor:
    """Labels of a frame's patches from their nearest patches in the context frames.

    label(q) = sum_i w_i label(i), w = softmax(cos(q, i) / 0.1), over the `topk` most similar patches i among those of
    all context frames that lie within `radius` rows and columns of q (0: anywhere), and any that equal the last of
    these in similarity. Computed tile by tile, so that only a few patches' similarities are in memory.

    Args:
        query: (h, w, D), of unit length.
        context: n of (h, w, D), of unit length.
        labels: n of (h, w, K).

    Returns:
        (h, w, K), in the type of `labels`.
    """
    h, w = query.shape[:2]
    reach = radius or max(h, w)
    context, labels = torch.stack(tuple(context)), torch.stack(tuple(labels))  # (n, h, w, D), (n, h, w, K)
    result = torch.empty_like(labels[0])
    rows, columns = (torch.arange(side, device=query.device) for side in (h, w))
    for top in range(0, h, TILE):
        for left in range(0, w, TILE):
            tile = slice(top, top + TILE), slice(left, left + TILE)
            near = slice(max(0, top - reach), top + TILE + reach), slice(max(0, left - reach), left + TILE + reach)
            far = ((rows[tile[0], None, None, None] - rows[near[0], None]).abs() > reach) | (
                (columns[tile[1], None, None] - columns[near[1]]).abs() > reach)  # (tile h, tile w, near h, near w)
            similarity = query[tile].flatten(0, 1) @ context[(slice(None), *near)].flatten(0, 2).T
            similarity.unflatten(1, (len(context), -1)).masked_fill_(far.flatten(2).flatten(0, 1)[:, None], -torch.inf)
            last = similarity.topk(min(topk, similarity.shape[1]), dim=1).values[:, -1:]  # (patches of the tile, 1)
            weights = similarity.masked_fill_(similarity < last, -torch.inf).div_(TEMPERATURE).softmax(dim=1)
            mean = weights.to(labels.dtype) @ labels[(slice(None), *near)].flatten(0, 2)
            result[tile] = mean.view(*result[tile].shape)
    return result


def propagate_video(
    features: Iterable[Tensor], first: Tensor, n_last: int, radius: int, topk: int
) -> Iterator[Tensor]:
    """Soft labels (h, w, K) of each frame of a video from those of the first.

    The context is the first frame and the `n_last` frames before the current one; no other frame is kept.

    Args:
        features: (h, w, D) for each frame, of any length.
        first: (h, w, K).
    """
    features = (F.normalize(frame, dim=-1) for frame in features)
    origin, last = (next(features), first), deque(maxlen=n_last)
    yield first
    for frame in features:
        labels = propagate(frame, *zip(origin, *last, strict=True), radius, topk)
        last.append((frame, labels))
        yield labels


# ---- Labels of pixels and of patches ----


def one_hot(labels: np.ndarray, objects: Sequence[int], h: int, w: int) -> Tensor:
    """Labels (height, width) at the patches' centres: float (h, w, K), background first, then the objects."""
    return torch.from_numpy(nearest(labels, h, w)[..., None] == np.array([0, *objects])).float()


def harden(soft: Tensor, objects: Sequence[int], height: int, width: int, patch: int = 0) -> np.ndarray:
    """Soft labels (h, w, K) -> labels of a frame's pixels (height, width).

    Each label is resized bilinearly to the frame's size and scaled to the range 0 to 1 (a constant one is left as it
    is, which the published script divides by 0); a pixel gets its highest label, the first of equals.

    Args:
        patch: published: the labels are resized by this factor, to the size of the network's input, and the highest
            of each pixel of that size is then resized to the frame's, by nearest neighbours; 0: directly.
    """
    how = {"scale_factor": patch} if patch else {"size": (height, width)}
    maps = F.interpolate(soft.movedim(-1, 0)[None], **how, mode="bilinear", align_corners=False)[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = torch.where(high > low, (maps - low) / (high - low).clamp_min(1e-12), maps)
    return nearest(np.array([0, *objects])[maps.argmax(0).cpu().numpy()], height, width)


def nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels (h, w) resized to (height, width): those of the nearest pixels, as Pillow finds them."""
    resized = Image.fromarray(labels.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized).astype(labels.dtype)
