"""Average precision of detections, by COCO's rules (Lin et al., arXiv 1405.0312; faster-coco-eval computes it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from detection.coco import Objects
from parallel import import_optional

PER_IMAGE = 100  # detections of an image that count, by score
PACKAGE = "faster-coco-eval"


def import_evaluator():
    return import_optional("faster_coco_eval", "average precision", PACKAGE)


def coco_results(i: int, detections: Mapping[str, Sequence], image_ids: Sequence[int],
                 category_ids: Sequence[int]) -> list[dict]:
    """Detections of image i in COCO's result format.

    Args:
        detections: boxes (n, 4), classes (n,), scores (n,); see inference.Found.
    """
    return [{"image_id": image_ids[i], "category_id": category_ids[k], "score": float(score),
             "bbox": [float(v) for v in (x1, y1, x2 - x1, y2 - y1)]}
            for (x1, y1, x2, y2), k, score in zip(*(np.asarray(detections[name]).tolist() for name in
                                                    ("boxes", "classes", "scores")), strict=True)]


def ground_truth(objects: Objects) -> dict:
    """The boxes of a set in COCO format."""
    images, annotations = [], []
    for i, image_id in enumerate(objects.image_ids):
        height, width = objects.size(i)
        images.append({"id": image_id, "height": height, "width": width})
        truth = objects.truth(i)
        for box, k, crowd in zip(truth.boxes.tolist(), truth.classes.tolist(), truth.crowd.tolist(), strict=True):
            x1, y1, x2, y2 = box
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "iscrowd": int(crowd),
                                "category_id": objects.category_ids[k], "bbox": [x1, y1, x2 - x1, y2 - y1],
                                "area": (x2 - x1) * (y2 - y1)})
    categories = [{"id": k, "name": name} for k, name in zip(objects.category_ids, objects.phrases, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def average_precision(truth: Mapping, results: Sequence[Mapping]) -> dict[int, tuple[float, float]]:
    """{category id: (AP, AP50)} in percent of the categories that have boxes in `truth`.

    AP is the mean over the IoU thresholds 0.50, 0.55, ..., 0.95, AP50 that of 0.50, each the precision averaged over
    101 recalls.

    Args:
        truth: in COCO format.
        results: in COCO's result format.
    """
    if not results:
        return {row["category_id"]: (0.0, 0.0) for row in truth["annotations"] if not row["iscrowd"]}
    evaluator = import_evaluator()
    known = evaluator.COCO(dict(truth))
    evaluation = evaluator.COCOeval_faster(known, known.loadRes(list(results)), "bbox", print_function=lambda *_: None)
    evaluation.params.maxDets = [1, 10, PER_IMAGE]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = 100 * evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, category; all areas
    return {int(category): (float(precision[:, :, k].mean()), float(precision[0, :, k].mean()))
            for k, category in enumerate(evaluation.params.catIds) if precision[0, 0, k] >= 0}


def mean_rows(by_category: Mapping[int, tuple[float, float]], groups: Mapping[str, set[int]]) -> dict[str, dict]:
    """{group: AP, AP50 and number of categories}: means over the categories of each group that have boxes."""
    rows = {}
    for name, ids in groups.items():
        values = [value for category, value in by_category.items() if category in ids]
        if values:
            ap, ap50 = np.mean(values, axis=0).tolist()
            rows[name] = {"AP": round(ap, 2), "AP50": round(ap50, 2), "categories": len(values)}
    return rows
