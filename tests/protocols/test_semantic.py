"""Linear semantic segmentation: counts against loops, tokens against other libraries, crops, windows, and k-means."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imagesets.class_masks import open_class_masks
from imagesets.masks import VOID
from parallel import Refused
from protocols import dense_prediction, dense_sweep, dense_training, semantic, semantic_layers, semantic_scores, tokens
from protocols.dense_prediction import Geometry, Predictor
from protocols.dense_training import Recipe, Setting, TrainingCrops
from protocols.features import Network, load_network
from protocols.semantic_layers import last_tokens
from vision_transformer import build_backbone
from weights import load_backbone

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network_of(model, arch="vit_nano", **info):
    info = {"arch": arch, "patch_size": 8, "in_chans": 3, "mean": MEAN, "std": STD} | info
    about = {"arch": arch, "weights": "w", "weights_sha256": "", "precision": "fp32"}
    return Network(model.eval(), info, about, torch.device("cpu"))


def pixels(b, height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (b, 3, height, width), np.uint8))


def normalized(images):
    return (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# ---- Scores ----


def test_scores_are_those_of_a_loop_over_all_pixels():
    """Three images of different sizes, with ignored pixels; class 3 is predicted only, class 4 occurs nowhere."""
    rng = np.random.default_rng(0)
    images = [(rng.integers(0, 4, size), rng.choice([0, 1, 2, VOID], size)) for size in ((3, 5), (7, 2), (4, 4))]
    counts = np.stack([semantic_scores.pixel_counts(p, t, 5) for p, t in images])
    both, union, right, judged = [0] * 5, [0] * 5, 0, 0
    for predicted, truth in images:
        for p, t in zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True):
            if t == VOID:
                continue
            judged, right = judged + 1, right + (p == t)
            for c in range(5):
                both[c] += p == c and t == c
                union[c] += p == c or t == c
    iou = [b / u if u else None for b, u in zip(both, union, strict=True)]
    found = semantic_scores.summarize(counts, list("abcde"))
    assert iou[3] == 0 and iou[4] is None
    assert found["per_class"] == {n: None if v is None else pytest.approx(100 * v)
                                  for n, v in zip("abcde", iou, strict=True)}
    assert found["miou"]["value"] == pytest.approx(100 * sum(iou[:4]) / 4)
    assert found["pixel_accuracy"]["value"] == pytest.approx(100 * right / judged)


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 6, (2, 40, 50))
    found = semantic_scores.summarize(semantic_scores.pixel_counts(predicted, truth, 6)[None], list("abcdef"))
    assert list(found["per_class"].values()) == pytest.approx(
        100 * metrics.jaccard_score(truth.ravel(), predicted.ravel(), average=None))
    assert found["pixel_accuracy"]["value"] == pytest.approx(100 * metrics.accuracy_score(truth.ravel(),
                                                                                         predicted.ravel()))


def test_intervals_are_over_images():
    """Equal images leave no doubt; of one right and one wrong image, a resample may hold only one of them."""
    right = semantic_scores.pixel_counts(np.zeros((2, 2), int), np.zeros((2, 2), int), 2)
    wrong = semantic_scores.pixel_counts(np.ones((2, 2), int), np.zeros((2, 2), int), 2)
    assert semantic_scores.summarize(np.stack([right] * 5), "ab")["miou"] == {"value": 100, "interval": [100, 100]}
    found = semantic_scores.summarize(np.stack([right, wrong]), "ab")
    assert found["pixel_accuracy"] == {"value": 50, "interval": [0, 100]} and found["miou"]["interval"] == [0, 100]
    assert found["miou"]["value"] == 25  # class 0: 4 of 8; class 1: 0 of 4


# ---- Tokens ----


@pytest.mark.parametrize("method", ["dino", "dinov2"])
@pytest.mark.parametrize("height, width", [(32, 32), (24, 56), (27, 50)])
def test_tokens_are_the_networks_own_at_any_size(height, width, method):
    torch.manual_seed(0)
    model = build_backbone("vit_nano", 8, img_size=32, num_register_tokens=3, method=method)[0].eval()
    images = pixels(2, height, width)
    outputs = tokens.patch_tokens(network_of(model), images, 2)
    left, right, top, bottom = -width % 8 // 2, -(width // -8) * 8 - width - -width % 8 // 2, -height % 8 // 2, 0
    bottom = -height % 8 - top
    padded = torch.zeros(2, 3, height + top + bottom, width + left + right)
    padded[:, :, top : top + height, left : left + width] = normalized(images)
    with torch.no_grad():
        expected = model.forward_features(padded).patch_tokens.permute(0, 3, 1, 2)
        x = model.prepare_tokens(padded)
        for block in model.blocks[:-1]:
            x = block(x)
        before = model.norm(x)[:, 4:].transpose(1, 2).reshape(expected.shape)
    assert len(outputs) == 2
    torch.testing.assert_close(outputs[1], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[0], before, atol=1e-5, rtol=1e-5)


def test_timms_tokens():
    timm = pytest.importorskip("timm")
    network = load_network("", "vit_tiny_patch16_224")
    images = pixels(1, 48, 80)
    (found,) = tokens.patch_tokens(network, images, 1)
    assert tokens.patch_size(network) == 16 and tokens.block_count(network) == 12
    with torch.no_grad():
        expected = network.forward.forward_features(normalized(images))[:, 1:].transpose(1, 2).reshape(found.shape)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    dinov2 = load_network("", "vit_small_patch14_reg4_dinov2")
    assert tokens.patch_size(dinov2) == 14 and tokens.patch_tokens(dinov2, images, 2)[0].shape == (1, 384, 4, 6)
    assert timm.is_model("vit_small_patch14_reg4_dinov2")


def test_hugging_faces_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=56, patch_size=14)
    torch.manual_seed(0)
    model = transformers.Dinov2WithRegistersModel(config).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    backbone, info = load_backbone(str(tmp_path / "w.pth"))
    network = network_of(backbone, **info)
    images = pixels(2, 56, 56)
    (found,) = tokens.patch_tokens(network, images)
    with torch.no_grad():
        expected = model(normalized(images)).last_hidden_state[:, 5:].transpose(1, 2).reshape(found.shape)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert tokens.patch_tokens(network, pixels(1, 30, 100))[0].shape == (1, 384, 3, 8)


def test_raw_pixels_keep_every_pixel():
    network = tokens.raw_pixels(network_of(build_backbone("vit_nano", 8, img_size=32)[0]))
    images = pixels(1, 16, 24)
    (found,) = tokens.patch_tokens(network, images)
    assert found.shape == (1, 192, 2, 3)
    assert sorted(found[0, :, 1, 2].tolist()) == sorted((images[0, :, 8:, 16:] / 255).flatten().tolist())


@pytest.mark.parametrize("height, width, patch", [(16, 24, 8), (13, 30, 8), (28, 20, 14)])
def test_upsampling_puts_patches_where_they_come_from(height, width, patch):
    """Bilinear between the patches' centres, and constant beyond the outermost; a ramp stays a ramp."""
    left, _, top, _ = tokens.margins(height, width, patch)
    h, w = -(-height // patch), -(-width // patch)
    centres = [(torch.arange(n) + 0.5) * patch - before for n, before in ((h, top), (w, left))]
    ramp = (100 * centres[0][:, None] + centres[1])[None, None].float()
    found = tokens.upsample(ramp, height, width, patch)[0, 0]
    for y, x in itertools.product(range(height), range(width)):
        inside = [min(max(p + 0.5, float(c[0])), float(c[-1])) for p, c in zip((y, x), centres, strict=True)]
        assert found[y, x] == pytest.approx(100 * inside[0] + inside[1], abs=1e-2)


def test_networks_without_tokens_are_refused():
    with pytest.raises(Refused, match="--arch resnet18: has no patch tokens.*give a Vision"):
        tokens.check_tokens(load_network("", "resnet18"), 1, 64, "--crop_size")
    network = network_of(build_backbone("vit_nano", 8, img_size=32)[0])
    with pytest.raises(Refused, match="--n_last_blocks 5: the network has 4 blocks; lower"):
        tokens.check_tokens(network, 5, 64, "--crop_size")
    with pytest.raises(Refused, match="--crop_size 7: smaller than a patch of 8; raise"):
        tokens.check_tokens(network, 1, 7, "--crop_size")
    with pytest.raises(Refused, match="--crop_size 64: .*give another"):
        tokens.check_tokens(load_network("", "beit_base_patch16_224"), 1, 64, "--crop_size")


# ---- Training crops and loss ----


@pytest.mark.parametrize("image_size, crop, scale", [(40, 40, 1.0), (40, 16, 1.0), (80, 64, 1.0), (20, 64, 1.0),
                                                     (40, 32, 0.6)])
def test_a_crop_and_its_labels_show_the_same_pixels(image_size, crop, scale):
    """The image's red tells its label; what lies beyond the image has the fill colour and VOID."""
    labels = np.kron(np.arange(20).reshape(4, 5), np.ones((10, 10))).astype(np.uint8)
    image = torch.from_numpy(np.stack([labels * 12, labels * 0, labels * 0]))
    flips = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found, truth = dense_training.random_crop(image, labels, image_size, crop, (scale, scale), (9, 9, 250),
                                                  VOID, rng)
        assert found.shape == (3, crop, crop) and truth.shape == (crop, crop)
        void = truth == VOID
        assert (found[2][void] == 250).all() and (found[2][~void] == 0).all()
        assert (~void).sum() == math.prod(min(crop, round(side * image_size * scale / 40)) for side in (40, 50))
        near = (found[0].float() / 12 - truth).abs()[~void]
        assert (near < 0.5).float().mean() > 0.8  # resizing blurs the edges
        flips.add(bool(truth[0][~void[0]][0] > truth[0][~void[0]][-1]))
    assert flips == {True, False}


def test_items_are_a_function_of_the_seed_and_every_epoch_shows_every_image():
    images = open_class_masks("shapes:5x16")[0]
    crops = TrainingCrops(images, 16, 16, (0, 0, 0), Recipe(scale=(1.0, 1.0), seed=4))
    again = TrainingCrops(images, 16, 16, (0, 0, 0), Recipe(scale=(1.0, 1.0), seed=4))
    assert torch.equal(crops[7][0], again[7][0]) and torch.equal(crops[7][1], again[7][1])
    sums = [sorted(int(crops[epoch * 5 + i][0].sum()) for i in range(5)) for epoch in range(2)]
    assert sums[0] == sums[1] == sorted(int(images.load(i)[0].sum()) for i in range(5))


def test_loss_is_the_mean_over_pixels_that_count():
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[0, :2] = VOID
    terms = [-logits[b].log_softmax(0)[labels[b, y, x], y, x] for b in range(2) for y in range(4) for x in range(5)
             if labels[b, y, x] != VOID]
    assert semantic_layers.pixel_loss(logits, labels) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)
    assert semantic_layers.pixel_loss(logits, torch.full_like(labels, VOID)) == 0


def train_alone(network, crops, setting, n_classes, recipe):
    """A plain loop over one layer, on its own."""
    items = [[crops[step * recipe.batch_size + i] for i in range(recipe.batch_size)] for step in range(recipe.steps)]
    norm = conv = None
    for step, batch in enumerate(items):
        images, labels = (torch.stack(part) for part in zip(*batch, strict=True))
        with torch.no_grad():
            outputs = tokens.patch_tokens(network, images, setting.blocks)
        x = torch.cat(outputs, 1)
        if norm is None:
            norm, conv = nn.BatchNorm1d(x.shape[1]), nn.Linear(x.shape[1], n_classes)
            torch.manual_seed(recipe.seed)
            layer = semantic_layers.linear_layer(x.shape[1], n_classes)
            conv.weight.data, conv.bias.data = layer[-1].weight.data.flatten(1).clone(), torch.zeros(n_classes)
            optimizer = torch.optim.AdamW([*norm.parameters(), *conv.parameters()], weight_decay=recipe.weight_decay)
        warm = recipe.warmup_steps
        factor = (np.linspace(0, 1, warm)[step] if step < warm
                  else 0.5 * (1 + math.cos(math.pi * (step - warm) / (recipe.steps - warm))))
        optimizer.param_groups[0]["lr"] = setting.lr * factor
        b, _, h, w = x.shape
        logits = conv(norm(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]))).reshape(b, h, w, -1).permute(0, 3, 1, 2)
        logits = F.interpolate(logits, scale_factor=8, mode="bilinear")
        optimizer.zero_grad()
        F.cross_entropy(logits, labels.long(), ignore_index=VOID).backward()
        optimizer.step()
    return conv


def test_a_sweep_trains_each_layer_as_if_alone():
    torch.manual_seed(1)
    network = network_of(build_backbone("vit_nano", 8, img_size=16)[0])
    images = open_class_masks("shapes:12x16")[0]
    recipe = Recipe(steps=5, batch_size=4, warmup_steps=2, weight_decay=0.1, num_workers=0)
    crops = TrainingCrops(images, 16, 16, (0, 0, 0), recipe)
    settings = [Setting("network", 2, 0.05), Setting("network", 1, 0.01)]
    layers, losses = dense_training.train(
        {"network": network}, settings, crops, recipe, last_tokens,
        lambda width: semantic_layers.linear_layer(width, 11),
        lambda logits, labels, step: semantic_layers.pixel_loss(logits, labels))
    alone = train_alone(network, crops, settings[0], 11, recipe)  # the first: it draws the same start
    torch.testing.assert_close(layers[0][-1].weight.flatten(1), alone.weight.data, atol=1e-4, rtol=1e-3)
    assert layers[1][-1].weight.shape == (11, 192, 1, 1) and all(map(math.isfinite, losses))


# ---- Prediction ----


def test_windows_cover_a_side():
    assert dense_prediction.window_starts(1000, 512, 341) == [0, 341, 488]
    assert dense_prediction.window_starts(512, 512, 341) == dense_prediction.window_starts(100, 512, 341) == [0]
    for side, window, stride in itertools.product((5, 16, 33), (4, 8), (1, 3, 4)):
        starts = dense_prediction.window_starts(side, window, stride)
        assert {i for s in starts for i in range(s, s + window)} >= set(range(side))
        assert starts[-1] == max(0, side - window)


class Red(nn.Module):
    """A network whose one-channel token is the mean red of its patch: what it predicts is known at each place."""

    blocks = (None,)
    feature_info = ({"reduction": 4},)

    def forward_intermediates(self, x, indices, **options):
        return [F.avg_pool2d(x[:, :1], 4)]


def red_predictor(geometry):
    network = network_of(Red(), "red", mean=(0.0,) * 3, std=(1.0,) * 3)
    layer = nn.Conv2d(1, 2, 1).requires_grad_(False)  # class 1 where red is above a half
    layer.weight.copy_(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
    layer.bias.copy_(torch.tensor([0.5, 0.0]))
    return Predictor({"red": network}, [Setting("red", 1, 0.1)], [layer], geometry, last_tokens)


@pytest.mark.parametrize("geometry", [
    Geometry(48, 16, 16, 10), Geometry(48, 48, 48, 32), Geometry(24, 16, 20, 7), Geometry(48, 64, 64, 40),
    Geometry(48, 16, 16, 16, (0.5, 1, 1.5)), Geometry(48, 32, 30, 20, (1.0,), True)])
def test_predictions_are_in_place(geometry):
    """An object without symmetry, far from whole patches, at any window, scale and flip; only its border may differ."""
    truth = np.zeros((48, 76), bool)
    truth[8:20, 12:60], truth[16:40, 12:24] = True, True
    image = torch.from_numpy(np.stack([truth * 255] + [truth * 0] * 2).astype(np.uint8))
    (found,) = semantic.predict(red_predictor(geometry), image)
    assert found.shape == truth.shape and set(np.unique(found)) == {0, 1}
    assert (found.astype(bool) != truth).mean() < 0.06
    inner = np.zeros_like(truth)
    inner[11:17, 15:57] = True
    assert found[inner].all() and not found[30:, 40:].any()


def test_overlapping_windows_are_averaged():
    """Scores of a pixel are the mean over the windows that see it, each computed by itself."""
    torch.manual_seed(0)
    network = network_of(build_backbone("vit_nano", 8, img_size=16)[0])
    layer = semantic_layers.linear_layer(192, 3).eval().requires_grad_(False)
    image = pixels(1, 24, 40)[0]
    predictor = Predictor({"n": network}, [Setting("n", 1, 0.1)], [layer], Geometry(24, 16, 16, 8), last_tokens)
    (found,) = predictor.sliding(image)
    total, seen = torch.zeros(3, 24, 40), torch.zeros(24, 40)
    for top, left in itertools.product((0, 8), (0, 8, 16, 24)):
        (x,) = tokens.patch_tokens(network, image[None, :, top : top + 16, left : left + 16])
        total[:, top : top + 16, left : left + 16] += tokens.upsample(layer(x), 16, 16, 8)[0]
        seen[top : top + 16, left : left + 16] += 1
    torch.testing.assert_close(found, total / seen, atol=1e-5, rtol=1e-4)


def test_scales_and_flips_average_probabilities():
    torch.manual_seed(0)
    network = network_of(build_backbone("vit_nano", 8, img_size=16)[0])
    layer = semantic_layers.linear_layer(192, 5).eval().requires_grad_(False)
    layer[-1].weight.mul_(100)
    image = pixels(1, 16, 24)[0]

    def classes(*scales, flip=False):
        geometry = Geometry(16, 32, 64, 64, scales, flip)
        predictor = Predictor({"n": network}, [Setting("n", 1, 0.1)], [layer], geometry, last_tokens)
        return semantic.predict(predictor, image)[0]

    def probabilities(view, mirrored):
        (x,) = tokens.patch_tokens(network, view[None])
        maps = F.interpolate(tokens.upsample(layer(x), *view.shape[1:], 8), size=(16, 24), mode="bilinear")[0]
        return (maps.flip(-1) if mirrored else maps).softmax(0)

    double = dense_prediction.transforms.resize(image, (32, 48))
    expected = sum(probabilities(view.flip(-1) if mirrored else view, mirrored)
                   for view in (image, double) for mirrored in (False, True))
    assert (classes(1.0, 2.0, flip=True) == expected.argmax(0).numpy()).all()
    assert (classes(1.0) != classes(1.0, 2.0, flip=True)).any()


# ---- k-means ----


def test_clusters_get_the_class_they_overlap():
    """Red tells the class: 200 is class 0, 20 class 1, 110 class 2, whichever cluster is numbered first."""
    levels = np.array([200, 20, 110], np.uint8)

    class Images:
        items, void = range(12), VOID

        def load(self, i):
            labels = np.kron(np.random.default_rng(i).integers(0, 3, (4, 4)), np.ones((8, 8))).astype(np.uint8)
            return torch.from_numpy(np.stack([levels[labels]] + [labels * 0] * 2)), labels

    network = red_predictor(Geometry()).networks["red"]
    crops = TrainingCrops(Images(), 32, 32, (0, 0, 0), Recipe(scale=(1.0, 1.0)))
    layer = semantic_layers.kmeans_layer(network, crops, 3, batch_size=4, num_workers=0)
    assert layer(torch.tensor([200, 20, 110]).view(1, 1, 3, 1) / 255).argmax(1).flatten().tolist() == [0, 1, 2]


# ---- Sizes, splits, choice ----


def test_sizes_follow_the_data():
    drawn = open_class_masks("shapes:4x60")[0]
    assert dense_prediction.fitted_to(Geometry(), drawn, 8) == Geometry(56, 56, 56, 37)
    assert dense_prediction.fitted_to(Geometry(crop=512), drawn, 16) == Geometry(512, 512, 512, 341)
    large = replace(drawn, size=lambda item: (700, 900))
    assert dense_prediction.fitted_to(Geometry(), large, 14) == Geometry(504, 504, 504, 336)
    with pytest.raises(Refused, match="--stride 600: leaves pixels out between windows of 512; lower"):
        dense_prediction.fitted_to(Geometry(crop=512, stride=600), drawn, 16)


def test_the_parts_are_disjoint():
    images = open_class_masks("shapes:50x16")[0]
    train, held, test, notes = dense_sweep.split([images], 0.25, 0)
    assert [len(part.items) for part in (train, held, test)] == [30, 10, 10] and len(notes) == 2
    assert sorted([*train.items, *held.items, *test.items]) == list(images.items)
    assert dense_sweep.split([images, images], 0, 0)[:2] == (images, None)
    with pytest.raises(Refused, match="too few"):
        dense_sweep.split([images.subset([0])], 0, 0)


def test_each_network_has_its_best_setting():
    settings = [Setting(name, 1, lr) for name in ("network", "raw pixels") for lr in (1, 2)]
    assert dense_sweep.choose(settings, [3, 4, 7, 7]) == [1, 2]


