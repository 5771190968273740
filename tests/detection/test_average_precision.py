"""Average precision against figures worked out by hand, and against pycocotools."""

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest

from detection import inference
from detection.coco import Objects


def box(i: int, k: int, corners, n: int) -> dict:
    x1, y1, x2, y2 = corners
    return {"id": n, "image_id": i, "category_id": k, "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}


IMAGES = [{"id": i, "width": 100, "height": 100} for i in (1, 2)]
TRUTH = {"images": IMAGES, "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}],
         "annotations": [box(1, 1, (0, 0, 10, 10), 1), box(1, 1, (50, 50, 90, 90), 2), box(2, 1, (0, 0, 50, 50), 3),
                         box(2, 2, (20, 20, 40, 40), 4)]}
# Category 1: right, wrong, right, and one object missed. Category 2: an IoU of 260 / 400 = 0.65 less a little.
RESULTS = [{**box(1, 1, (0, 0, 10, 10), 0), "score": 0.9}, {**box(2, 1, (60, 60, 70, 70), 0), "score": 0.8},
           {**box(2, 1, (0, 0, 50, 50), 0), "score": 0.7}, {**box(2, 2, (20, 20, 32.8, 40), 0), "score": 0.5}]


def test_by_hand():
    """Of 101 recalls, 34 (0 to 0.33) have precision 1 and 33 (0.34 to 0.66) 2/3. IoU 0.64 passes 0.5, 0.55 and 0.6."""
    values = inference.average_precision(TRUTH, RESULTS)
    assert values.keys() == {1, 2}  # no box of category 3
    first = 100 * (34 + 33 * 2 / 3) / 101
    assert values[1] == pytest.approx((first, first)) and values[2] == pytest.approx((30, 100))
    assert inference.average_precision(TRUTH, []) == {1: (0, 0), 2: (0, 0)}


def test_groups_of_categories(monkeypatch):
    first = 100 * (34 + 33 * 2 / 3) / 101
    monkeypatch.setattr(inference, "results_of", lambda *_: RESULTS)
    objects = Objects("", TRUTH, None)
    network = SimpleNamespace(config=SimpleNamespace())
    table = inference.evaluate(SimpleNamespace(network=network), objects, 1, [])
    every = {"AP": round((first + 30) / 2, 2), "AP50": round((first + 100) / 2, 2), "categories": 2}
    assert table == {"all": every}  # category 3 has no boxes
    network.config.trained_phrases = ["b", "x"]
    assert inference.evaluate(SimpleNamespace(network=network), objects, 1, []) == {
        "all": every, "trained": {"AP": 30, "AP50": 100, "categories": 1},
        "not trained": {"AP": round(first, 2), "AP50": round(first, 2), "categories": 1}}


def pycocotools(truth: dict, results: list) -> dict:
    coco, cocoeval = (pytest.importorskip(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco.COCO()
        known.dataset = truth
        known.createIndex()
        evaluation = cocoeval.COCOeval(known, known.loadRes([dict(row) for row in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = 100 * evaluation.eval["precision"][:, :, :, 0, 2]
    return {k: (precision[:, :, i].mean(), precision[0, :, i].mean())
            for i, k in enumerate(evaluation.params.catIds) if precision[0, 0, i] >= 0}


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys() and all(ours[k] == pytest.approx(theirs[k]) for k in ours)


def test_as_pycocotools():
    same(inference.average_precision(TRUTH, RESULTS), pycocotools(TRUTH, RESULTS))
    rng = np.random.default_rng(0)

    def corners():
        low, size = rng.uniform(0, 60, 2), rng.uniform(5, 40, 2)
        return [*low, *(low + size)]

    truth = {**TRUTH, "annotations": [box(int(rng.integers(1, 3)), int(rng.integers(1, 4)), corners(), n)
                                      for n in range(1, 30)]}
    truth["annotations"][3]["iscrowd"] = 1
    results = []
    for row in truth["annotations"]:
        x, y, w, h = row["bbox"]
        for _ in range(2):
            shifted = [x + rng.normal(0, 3), y + rng.normal(0, 3), w * rng.uniform(0.8, 1.2), h]
            results.append({"image_id": row["image_id"], "category_id": int(rng.choice([row["category_id"], 1])),
                            "bbox": shifted, "score": float(rng.random())})
    ours, theirs = inference.average_precision(truth, results), pycocotools(truth, results)
    same(ours, theirs)
    assert 5 < np.mean(list(ours.values())) < 95


def test_what_is_kept_of_another_prompt():
    first, second = RESULTS[0], {**RESULTS[3], "category_id": 2}
    assert inference.kept([first, second], [first, second], IMAGES) == pytest.approx(100)
    assert inference.kept([first, second], [{**first, "score": 0.6}], IMAGES) == pytest.approx(50)
    assert inference.kept([], [first], IMAGES) is None and inference.kept([first], [], IMAGES) == 0
