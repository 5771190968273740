"""Average precision of a detector on images with boxes, and how much of another prompt it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detection import inference, scores
from detection.coco import Objects
from detection.networks import Detector
from protocols.progress import progress


def evaluate(detector: Detector, objects: Objects, batch_size: int, flag: str = "--eval") -> dict[str, dict]:
    """{group of categories: AP, AP50, categories} in percent: all; where the network was trained by detect.py, also
    those that it was trained on and those that it was not."""
    prepared, results = inference.chunks(detector, objects.phrases, flag), []
    batches = list(inference.batched(range(len(objects)), batch_size))
    for rows in progress(batches, len(objects), "evaluation", batch_size):
        ranked = inference.rank(detector, [objects.load(i) for i in rows], objects.phrases, scores.PER_IMAGE, prepared)
        for i, found in zip(rows, ranked, strict=True):
            results += scores.coco_results(i, found._asdict(), objects.image_ids, objects.category_ids)
    by_category = scores.average_precision(scores.ground_truth(objects), results)
    named = dict(zip(objects.category_ids, objects.phrases, strict=True))
    groups = {"all": set(named)}
    if detector.trained:
        groups["trained"] = {k for k, phrase in named.items() if phrase in detector.trained}
        groups["not trained"] = set(named) - groups["trained"]
    return scores.mean_rows(by_category, groups)


def show(rows: Mapping[str, Mapping]) -> None:
    print(f"{'categories':<14}{'number':>8}{'AP':>8}{'AP50':>8}")
    for name, row in rows.items():
        print(f"{name:<14}{row['categories']:>8}{row['AP']:>8.1f}{row['AP50']:>8.1f}", flush=True)


# ---- Forgetting ----


def answers(detector: Detector, objects: Objects, phrases: Sequence[str], batch_size: int, threshold: float
            ) -> list[inference.Found]:
    """What the network detects on the images with a prompt of other phrases."""
    return [found for rows in inference.batched(range(len(objects)), batch_size)
            for found in inference.detect(detector, [objects.load(i) for i in rows], phrases, threshold, threshold)]


def kept(before: Sequence[inference.Found], after: Sequence[inference.Found], objects: Objects) -> float | None:
    """AP50, in percent, of the detections after training with those before it as the truth: 100 if nothing changed.

    None if there were no detections before.
    """
    images = [{"id": k, "height": objects.size(i)[0], "width": objects.size(i)[1]}
              for i, k in enumerate(objects.image_ids)]
    ids = range(1 + max((int(found.classes.max()) for found in before if len(found.classes)), default=-1))
    rows = [[row for i, found in enumerate(all_found)
             for row in scores.coco_results(i, found._asdict(), objects.image_ids, range(10**6))]
            for all_found in (before, after)]
    annotations = [{"id": n, "image_id": row["image_id"], "category_id": row["category_id"], "iscrowd": 0,
                    "bbox": row["bbox"], "area": row["bbox"][2] * row["bbox"][3]} for n, row in enumerate(rows[0], 1)]
    if not annotations:
        return None
    truth = {"images": images, "annotations": annotations, "categories": [{"id": k, "name": str(k)} for k in ids]}
    known = {k for k in ids}
    values = scores.average_precision(truth, [row for row in rows[1] if row["category_id"] in known])
    return sum(ap50 for _, ap50 in values.values()) / len(values)
