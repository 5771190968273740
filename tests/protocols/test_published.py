"""The protocols against figures of the published scripts (tests/golden/protocols/README.md)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import GOLDEN, fill, rs

from protocols import copies, features, landmarks, propagation, retrieval, tokens, transforms, video_segmentation
from vision_transformer import VITS

FOLDER = Path(os.environ.get("PROTOCOL_GOLDEN") or GOLDEN / "protocols")


def load(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        golden = dict(file)
    return golden, json.loads(str(golden["config"]))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())


# ---- Copy detection ----


def copy_rows():
    golden, config = load("copy_detection")
    seed, width = config["seed"], config["width"]
    scale = torch.linspace(0.1, 2, width, dtype=torch.float64)
    whitening, database = (rs(seed + i, config[rows], width) * scale + config["offset"]
                           for i, rows in enumerate(("whitening_rows", "database_rows")))
    matches = np.random.RandomState(seed + 3).randint(0, len(database), config["query_rows"])
    queries = database[matches] + 0.8 * rs(seed + 2, len(matches), width)
    return golden, config, whitening, database, queries, matches


def test_whitening():
    golden, _, rows, database, queries, _ = copy_rows()
    whitening = retrieval.fit_published_whitening(rows)
    found = torch.cat([retrieval.whiten(part, whitening)[:4] for part in (database, queries)])
    expected = np.concatenate([golden["whitened_database"], golden["whitened_queries"]])
    close(found @ found.T, expected @ expected.T)  # eigenvectors have no sign


@pytest.mark.parametrize("name", ["plain", "whitened"])
def test_average_precision_of_copies(name):
    golden, _, rows, database, queries, matches = copy_rows()
    if name == "whitened":
        whitening = retrieval.fit_published_whitening(rows)
        database, queries = (retrieval.whiten(part, whitening) for part in (database, queries))
    similarity = retrieval.similarities(queries, database)
    relevant = np.arange(len(database)) == matches[:, None]
    close([copies.precision(*one, "published") for one in zip(similarity, relevant, strict=True)], golden[f"{name}_ap"])
    row = copies.measure(similarity, [[match] for match in matches], ["one"] * len(matches))[0]
    close(row["mAP"]["value"], 100 * golden[f"{name}_map"])


def test_average_precision_of_ranks():
    golden, config, *_ = copy_rows()
    close([retrieval.average_precision_trapezoid(ranks, 2) for ranks in config["ranks_of_two_positives"]],
          golden["ap_of_ranks"])


# ---- Retrieval ----


def test_features_of_landmarks():
    golden, config = load("retrieval")
    model = fill(VITS[config["arch"]](config["patch"])).eval()
    image = rs(config["seed"], 1, 3, config["height"], config["width"])
    with torch.no_grad():
        close(model(image)[0], golden["single"])
        close(landmarks.published_multiscale(model, config["patch"])(image)[0], golden["multi_scale"])


# ---- Video ----


def test_propagation_and_labels():
    golden, config = load("video")
    seed, h, w, n = (config[name] for name in ("seed", "rows", "columns", "context_frames"))

    def unit(x):
        return torch.nn.functional.normalize(x, dim=-1).unflatten(0, (h, w))

    context = [unit(rs(seed + i, config["width"], h * w).T) for i in range(n)]
    target = unit(rs(seed + 40, h * w, config["width"]))
    labels = [torch.from_numpy(np.random.RandomState(seed + 50 + i).rand(1, config["labels"], h, w))[0].movedim(0, -1)
              for i in range(n)]
    found = propagation.propagate(target, context, labels, config["radius"], config["topk"])
    close(found.movedim(-1, 0), golden["propagated"])
    height, width = golden["labels"].shape
    pixels = propagation.harden(found, range(1, config["labels"]), height, width, height // h)
    np.testing.assert_array_equal(pixels, golden["labels"])


def test_a_frame():
    golden, config = load("video")
    network = video_segmentation.patch_network(features.load_network("", "pixels"), config["patch"])
    image = torch.from_numpy(golden["image"]).movedim(-1, 0)
    size = video_segmentation.frame_size(*image.shape[1:], config["scale"], patch=1)
    frame = tokens.normalize(transforms.resize_as_opencv(image, size), network.info, network.device)
    assert tuple(frame.shape) == tuple(golden["frame_shape"])
    np.testing.assert_allclose(frame[:, ::37, ::41], golden["frame_rows"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(frame.double().sum((1, 2)), golden["frame_sums"], rtol=1e-6, atol=1e-3)
    segmentation = golden["segmentation"].astype(int)
    first = propagation.one_hot(segmentation, range(1, segmentation.max() + 1), *(side // 8 for side in size))
    np.testing.assert_array_equal(first.movedim(-1, 0), golden["one_hot"])


def test_sizes_of_frames():
    for height, width, *expected in load("video")[0]["sizes_at_480"].tolist():
        assert video_segmentation.frame_size(height, width, 480, 8) == tuple(expected)
