"""From images and phrases to boxes.

Shapes: B images, Q queries of the network, T tokens, P phrases, n boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detection import prompts
from detection.networks import Detector
from detection.prompts import Prompt


class Found(NamedTuple):
    """Detections of an image, by falling score."""

    boxes: Tensor  # float32 (n, 4): x1, y1, x2, y2 in pixels of the image
    classes: Tensor  # int64 (n,): indices of phrases
    scores: Tensor  # float32 (n,)
    words: list[str]  # (n,): what of the phrase passed the text threshold


@torch.no_grad()
def probabilities(detector: Detector, images: Sequence[Tensor], prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Probabilities (B, Q, T) that a query is what a token names, and its box (B, Q, 4) in pixels.

    Args:
        images: uint8 (3, H, W), of any sizes; the model's processor resizes, normalizes and pads them.
    """
    pixels = detector.processor.image_processor(images=list(images), return_tensors="pt").to(detector.device)
    ids = prompt.ids.to(detector.device).expand(len(images), -1)
    out = detector.network(**pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
    sizes = torch.tensor([image.shape[1:] for image in images]).flip(1)  # W, H
    boxes = corners(out.pred_boxes.float().cpu()) * sizes.repeat(1, 2)[:, None]
    return out.logits[..., : ids.shape[1]].float().sigmoid().cpu(), boxes


def corners(boxes: Tensor) -> Tensor:
    """(..., 4): centre, width and height -> x1, y1, x2, y2."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def centres(boxes: Tensor) -> Tensor:
    """(..., 4): x1, y1, x2, y2 -> centre, width and height."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def chunks(detector: Detector, phrases: Sequence[str], flag: str = "--text") -> list[tuple[list[int], Prompt]]:
    """Prompts that together hold the phrases, each with their indices."""
    tokenizer = detector.processor.tokenizer
    groups = prompts.parts(prompts.lengths(phrases, tokenizer), detector.limit, flag)
    return [(group, prompts.encode([phrases[i] for i in group], tokenizer, flag)) for group in groups]


# ---- Detection: a phrase for each box ----


def detect(
    detector: Detector, images: Sequence[Tensor], phrases: Sequence[str], threshold: float, text_threshold: float
) -> list[Found]:
    """The boxes whose most probable token is above `threshold`, as in the paper's demonstration.

    A box has the phrase of that token; its words are the phrase's tokens above `text_threshold`.
    """
    parts = [[] for _ in images]
    for group, prompt in chunks(detector, phrases):
        for part, probs, boxes in zip(parts, *probabilities(detector, images, prompt), strict=True):
            part.append(most_probable(detector, probs, boxes, group, prompt, threshold, text_threshold))
    return [merged(part) for part in parts]


def most_probable(
    detector: Detector, probs: Tensor, boxes: Tensor, group: Sequence[int], prompt: Prompt, threshold: float,
    text_threshold: float,
) -> Found:
    """One image: probabilities (Q, T) and boxes (Q, 4) -> detections of a prompt."""
    by_phrase = torch.stack([probs[:, span].amax(1) for span in prompt.spans], 1)  # (Q, P)
    scores, classes = by_phrase.max(1)
    order = [i for i in scores.argsort(descending=True, stable=True).tolist() if scores[i] > threshold]
    words = []
    for i in order:
        kept = prompt.spans[classes[i]] & (probs[i] > text_threshold)
        words.append(detector.processor.tokenizer.decode(prompt.ids[0, kept]))
    return Found(boxes[order], torch.tensor(group)[classes[order]], scores[order], words)


def merged(parts: Sequence[Found]) -> Found:
    """Detections of several prompts on an image."""
    boxes, classes, scores = (torch.cat(rows) for rows in list(zip(*parts, strict=True))[:3])
    order, words = scores.argsort(descending=True, stable=True), [word for part in parts for word in part.words]
    return Found(boxes[order], classes[order], scores[order], [words[i] for i in order])


# ---- Evaluation: every box with every phrase ----


def rank(detector: Detector, images: Sequence[Tensor], phrases: Sequence[str], most: int,
         prepared: Sequence[tuple[list[int], Prompt]] | None = None) -> list[Found]:
    """The `most` best pairs of a box and a phrase on each image, for average precision.

    The score is the mean of the phrase's tokens, as in the paper's evaluation on COCO.
    """
    parts = [[] for _ in images]
    for group, prompt in prepared or chunks(detector, phrases):
        weights = prompt.spans.float() / prompt.spans.sum(1, keepdim=True)
        for part, probs, boxes in zip(parts, *probabilities(detector, images, prompt), strict=True):
            scores, pairs = (probs @ weights.T).flatten().topk(min(most, len(boxes) * len(group)))
            query, phrase = pairs // len(group), pairs % len(group)
            part.append(Found(boxes[query], torch.tensor(group)[phrase], scores, [""] * len(scores)))
    best = [merged(part) for part in parts]
    return [Found(*(column[:most] for column in row)) for row in best]


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one maybe shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
