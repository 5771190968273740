"""From images and prompts to boxes, and their average precision by COCO's rules (arXiv 1405.0312).

A detection is a dict: category_id, bbox ([x, y, width, height] in pixels of the image) and score.
Shapes: B images, Q queries of the network, T tokens, P phrases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from detection import prompts
from detection.coco import Objects
from detection.networks import Detector
from detection.prompts import Prompt
from parallel import import_optional
from protocols.progress import progress

PER_IMAGE = 100  # detections of an image that count in average precision, by score
Pick = Callable[[Tensor, Tensor, Prompt], Iterable[dict]]
# Probabilities (Q, T) that a query is what a token names, and its box (Q, 4) -> detections.


def prompts_of(detector: Detector, phrases: Mapping[int, str], flag: str = "--text") -> list[Prompt]:
    return prompts.shared_out(phrases, detector.processor.tokenizer, detector.network.config.max_text_len, flag)


@torch.no_grad()
def detections(detector: Detector, images: Iterable[tuple[Any, Tensor]], batch_size: int, asked: Sequence[Prompt],
               pick: Pick) -> Iterator[tuple[Any, list[dict]]]:
    """What `pick` takes of each image, uint8 (3, H, W) of any size, by falling score. Each comes with a name or so."""
    images = iter(images)
    while batch := list(itertools.islice(images, batch_size)):
        device, found, pictures = detector.network.device, [[] for _ in batch], [image for _, image in batch]
        pixels = detector.processor.image_processor(images=pictures, return_tensors="pt").to(device)
        sizes = torch.tensor([image.shape[:0:-1] for image in pictures]).repeat(1, 2)  # W, H, W, H
        for prompt in asked:
            ids = prompt.ids.to(device).expand(len(batch), -1)
            out = detector.network(**pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
            probs = out.logits[..., : ids.shape[1]].float().sigmoid().cpu()
            boxes = box_convert(out.pred_boxes.float().cpu(), "cxcywh", "xywh") * sizes[:, None]
            for i, rows in enumerate(found):
                rows += pick(probs[i], boxes[i], prompt)
        for (name, _), rows in zip(batch, found, strict=True):
            yield name, sorted(rows, key=lambda row: -row["score"])


def most_probable(tokenizer, threshold: float, text_threshold: float) -> Pick:
    """Picks the boxes whose most probable token is above `threshold`, as the paper's demonstration does. A box has the
    phrase of that token; its `words` are the phrase's tokens above `text_threshold`."""
    def pick(probs: Tensor, boxes: Tensor, prompt: Prompt) -> Iterator[dict]:
        scores, phrases = torch.stack([probs[:, span].amax(1) for span in prompt.spans], 1).max(1)  # of (Q, P)
        for i in (scores > threshold).nonzero()[:, 0].tolist():
            words = prompt.ids[0, prompt.spans[phrases[i]] & (probs[i] > text_threshold)]
            yield {"category_id": prompt.categories[phrases[i]], "bbox": boxes[i].tolist(), "score": scores[i].item(),
                   "words": tokenizer.decode(words)}

    return pick


def best_pairs(probs: Tensor, boxes: Tensor, prompt: Prompt) -> Iterator[dict]:
    """Picks pairs of a box and a phrase, whose score is the mean of the phrase's tokens, as the paper's evaluation on
    COCO does."""
    scores = probs @ (prompt.spans / prompt.spans.sum(1, keepdim=True)).T  # (Q, P)
    for pair in scores.flatten().topk(min(PER_IMAGE, scores.numel())).indices.tolist():
        query, k = divmod(pair, len(prompt.categories))
        yield {"category_id": prompt.categories[k], "bbox": boxes[query].tolist(), "score": scores[query, k].item()}


def results_of(detector: Detector, objects: Objects, batch_size: int, asked: Sequence[Prompt], pick: Pick
               ) -> list[dict]:
    """Detections on all images in COCO's result format, at most PER_IMAGE of each."""
    images = ((image["id"], objects.load(i)) for i, image in enumerate(objects.images))
    found = progress(detections(detector, images, batch_size, asked, pick), len(objects), "evaluation")
    return [{"image_id": image_id} | row for image_id, rows in found for row in rows[:PER_IMAGE]]


def import_evaluator():
    return import_optional("faster_coco_eval", "average precision", "faster-coco-eval")


def average_precision(truth: Mapping, results: Sequence[Mapping]) -> dict[int, tuple[float, float]]:
    """{category id: (AP, AP50)} in percent, of the categories that have boxes in `truth` (COCO format).

    AP50 is the precision at an IoU of 0.50, averaged over 101 recalls; AP the mean over 0.50, 0.55, ..., 0.95.
    """
    if not results:  # which the library doesn't take
        return {row["category_id"]: (0.0, 0.0) for row in truth["annotations"] if not row["iscrowd"]}
    library = import_evaluator()
    known = library.COCO(dict(truth))
    evaluation = library.COCOeval_faster(known, known.loadRes(list(results)), "bbox", print_function=lambda *_: None)
    evaluation.evaluate()
    evaluation.accumulate()
    precision = 100 * evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, category; all areas, 100 detections
    return {int(category): (float(precision[:, :, k].mean()), float(precision[0, :, k].mean()))
            for k, category in enumerate(evaluation.params.catIds) if precision[0, 0, k] >= 0}


def evaluate(detector: Detector, objects: Objects, batch_size: int, asked: Sequence[Prompt]) -> dict[str, dict]:
    """{group of categories: AP, AP50, number of categories}, in percent, of the categories that have boxes: all; where
    detect.py has trained the network, also those that it was trained on and those that it was not."""
    values = average_precision(objects.content, results_of(detector, objects, batch_size, asked, best_pairs))
    groups = {"all": set(values)}
    if trained := getattr(detector.network.config, "trained_phrases", None):
        groups["trained"] = {k for k in values if objects.phrases[k] in trained}
        groups["not trained"] = groups["all"] - groups["trained"]
    means = {group: np.mean([values[k] for k in ids], axis=0).round(2).tolist() for group, ids in groups.items() if ids}
    return {group: {"AP": ap, "AP50": ap50, "categories": len(groups[group])} for group, (ap, ap50) in means.items()}


def kept(before: Sequence[Mapping], after: Sequence[Mapping], images: Sequence[Mapping]) -> float | None:
    """AP50, in percent, of results after training with those before it as the truth: 100 if nothing changed, None if
    there were none before."""
    ids = {row["category_id"] for row in before}
    truth = {"images": images, "categories": [{"id": k, "name": str(k)} for k in ids],
             "annotations": [row | {"id": n, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]}
                             for n, row in enumerate(before, 1)]}
    values = average_precision(truth, [row for row in after if row["category_id"] in ids])
    return sum(ap50 for _, ap50 in values.values()) / len(values) if values else None
