"""Linear depth: figures and losses against loops, the layer against its definition, tokens, and constants."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imagesets.depth_maps import open_depth_maps
from parallel import Refused
from protocols import depth, depth_layers, depth_scores, scores, tokens
from protocols.dense_prediction import Geometry, Predictor, fitted_to
from protocols.dense_training import Recipe, Setting, TrainingCrops, train
from protocols.depth_layers import DepthLayer, depth_tokens
from protocols.features import Network, load_network
from vision_transformer import build_backbone

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network_of(model, arch="vit_nano", **info):
    info = {"arch": arch, "patch_size": 8, "in_chans": 3, "mean": MEAN, "std": STD} | info
    about = {"arch": arch, "weights": "w", "weights_sha256": "", "precision": "fp32"}
    return Network(model.eval(), info, about, torch.device("cpu"))


def pixels(b, height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (b, 3, height, width), np.uint8))


def normalized(images):
    return (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# ---- Figures ----


def test_figures_are_those_of_a_loop_over_the_pixels_with_depth():
    rng = np.random.default_rng(0)
    truth, predicted = rng.uniform(0.5, 9, (2, 5, 7)).astype(np.float32)
    truth[1:3, 2:4] = 0
    square = ratio = within = decades = count = 0
    logs = []
    for p, d in zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if not d:
            continue
        count += 1
        square += (p - d) ** 2
        ratio += abs(p - d) / d
        within += p / d < 1.25 and d / p < 1.25
        decades += abs(math.log10(p) - math.log10(d))
        logs.append(math.log(p) - math.log(d))
    silog = math.sqrt(sum(e * e for e in logs) / count - (sum(logs) / count) ** 2)
    expected = [math.sqrt(square / count), ratio / count, within / count, decades / count, silog]
    assert count == 31 and depth_scores.errors(predicted, truth) == pytest.approx(expected, rel=1e-5)
    assert depth_scores.errors(truth.clip(1), truth.clip(1)).tolist() == [0, 0, 1, 0, 0]


def test_the_first_errors_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    truth, predicted = np.random.default_rng(1).uniform(0.2, 1.2, (2, 200))
    found = depth_scores.errors(predicted[None], truth[None])
    assert found[0] ** 2 == pytest.approx(metrics.mean_squared_error(truth, predicted))
    assert found[1] == pytest.approx(metrics.mean_absolute_percentage_error(truth, predicted))


def test_means_are_over_images():
    found = depth_scores.summarize(np.array([[1.0] * 5, [3.0] * 5]))
    assert found["rmse"]["value"] == 2 and found["rmse"]["interval"] == [1, 3]
    assert scores.cell_text(found["rmse"]) == "2.000 [1.000, 3.000]"


@pytest.mark.parametrize("crop, size, box", [
    ("none", (10, 20), (0, 10, 0, 20)), ("eigen_nyu", (480, 640), (45, 471, 41, 601)),
    ("garg", (375, 1242), (153, 371, 44, 1197)), ("eigen_kitti", (375, 1242), (124, 342, 44, 1197))])
def test_published_crops(crop, size, box):
    rows, columns = np.nonzero(depth_scores.judged(np.ones(size), crop))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == box
    assert len(rows) == (box[1] - box[0]) * (box[3] - box[2])
    with pytest.raises(Refused, match="--eval_crop eigen_nyu: .*640 x 480.*not 50 x 40; choose"):
        depth_scores.judged(np.ones((40, 50)), "eigen_nyu")


# ---- Tokens ----


@pytest.mark.parametrize("blocks, expected", [(12, (2, 5, 8, 11)), (24, (4, 11, 17, 23)), (40, (9, 19, 29, 39)),
                                              (4, (0, 1, 2, 3))])
def test_four_blocks_are_the_published_ones(blocks, expected):
    assert depth_layers.spaced_blocks(blocks, 4) == expected and depth_layers.spaced_blocks(blocks, 1) == (blocks - 1,)


@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_tokens_have_the_class_token_beside_them_and_no_last_norm(method):
    torch.manual_seed(0)
    model = build_backbone("vit_nano", 8, img_size=32, num_register_tokens=2, method=method)[0].eval()
    images = pixels(2, 24, 40)
    found = depth_tokens(network_of(model), images, [1, 2])
    with torch.no_grad():
        x, outputs = model.prepare_tokens(normalized(images)), []
        for block in model.blocks:
            x = block(x)
            outputs.append(torch.cat([x[:, 3:].transpose(1, 2).reshape(2, 192, 3, 5),
                                      x[:, 0, :, None, None].expand(2, 192, 3, 5)], 1))
    torch.testing.assert_close(found[1], outputs[3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2], torch.cat([outputs[1], outputs[3]], 1), atol=1e-5, rtol=1e-5)


def test_timms_class_token():
    pytest.importorskip("timm")
    network = load_network("", "vit_tiny_patch16_224")
    images = pixels(1, 48, 80)
    found = depth_tokens(network, images, [1])[1]
    taken = []
    handle = network.forward.blocks[-1].register_forward_hook(lambda module, inputs, output: taken.append(output))
    with torch.no_grad():
        network.forward.forward_features(normalized(images))
    handle.remove()
    torch.testing.assert_close(found[:, :192].flatten(2).transpose(1, 2), taken[-1][:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0, 192:, 2, 4], taken[-1][0, 0], atol=1e-4, rtol=1e-4)


def test_networks_without_a_class_token_and_raw_pixels():
    network = load_network("", "swin_tiny_patch4_window7_224") if pytest.importorskip("timm") else None
    (maps, class_token), = tokens.block_tokens(network, pixels(1, 64, 64), [0], norm=False)
    assert class_token is None and maps.shape == (1, 768, 2, 2)  # the last stage
    raw = tokens.raw_pixels(network_of(build_backbone("vit_nano", 8, img_size=32)[0]))
    assert depth_tokens(raw, pixels(1, 16, 16), [1])[1].shape == (1, 192, 2, 2)


# ---- The layer ----


@pytest.mark.parametrize("batch_norm", [False, True])
def test_depth_is_the_mean_of_the_bins(batch_norm):
    """Tokens upsampled first, as published, then the linear layer, the weights and their mean, pixel by pixel."""
    torch.manual_seed(0)
    layer = DepthLayer(6, 0.5, 8, batch_norm, bins=16).eval()
    layer.linear.weight.data.normal_()
    if batch_norm:
        layer.norm.running_mean.normal_()
        layer.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 6, 3, 5)
    large = F.interpolate(x, scale_factor=4, mode="bilinear")
    if batch_norm:
        mean, var = layer.norm.running_mean, layer.norm.running_var
        large = (large - mean[:, None, None]) / (var[:, None, None] + layer.norm.eps).sqrt()
    layer.requires_grad_(False)
    found = layer(x)
    assert found.shape == (1, 1, 12, 20)
    bins = [0.5 + 7.5 * k / 15 for k in range(16)]
    for row, column in ((0, 0), (5, 7), (11, 19)):
        weights = [max(0.0, float(layer.linear.weight[k, :, 0, 0] @ large[0, :, row, column])) + 0.1
                   for k in range(16)]
        expected = sum(w * b for w, b in zip(weights, bins, strict=True)) / sum(weights)
        assert float(found[0, 0, row, column]) == pytest.approx(expected, rel=1e-4)


# ---- Losses ----


def naive_log_errors(predicted, truth):
    predicted = predicted.detach()
    return {(b, y, x): math.log(float(predicted[b, 0, y, x]) + 0.001) - math.log(float(truth[b, y, x]) + 0.001)
            for b in range(truth.shape[0]) for y in range(truth.shape[1]) for x in range(truth.shape[2])
            if truth[b, y, x] > 0}


def example():
    torch.manual_seed(0)
    predicted, truth = torch.rand(2, 1, 9, 11) + 0.1, torch.rand(2, 9, 11) + 0.1
    truth[0, 2:5, 3:8] = 0
    return predicted.requires_grad_(), truth


def test_sig_loss_is_the_papers():
    predicted, truth = example()
    g = list(naive_log_errors(predicted, truth).values())
    mean = sum(g) / len(g)
    variance = sum((e - mean) ** 2 for e in g) / (len(g) - 1)
    loss = depth_layers.sig_loss(predicted, truth)
    assert float(loss) == pytest.approx(math.sqrt(variance + 0.15 * mean**2), rel=1e-4)
    loss.backward()
    assert (predicted.grad[:, 0][truth == 0] == 0).all() and predicted.grad.abs().sum() > 0
    assert float(depth_layers.sig_loss(predicted, truth, scale_only=True)) == pytest.approx(
        math.sqrt(0.15) * abs(mean), rel=1e-4)
    nothing = depth_layers.sig_loss(predicted, truth * 0)
    nothing.backward()
    assert nothing == 0 and predicted.grad.isfinite().all()


def test_gradient_loss_is_a_sum_over_pairs():
    predicted, truth = example()
    g, expected = naive_log_errors(predicted, truth), 0.0
    for step in (1, 2, 4, 8):
        grid = {k: e for k, e in g.items() if k[1] % step == 0 and k[2] % step == 0}
        pairs = [abs(grid[b, y + step, x] - e) for (b, y, x), e in grid.items() if (b, y + step, x) in grid]
        pairs += [abs(grid[b, y, x + step] - e) for (b, y, x), e in grid.items() if (b, y, x + step) in grid]
        expected += sum(pairs) / len(grid)
    assert float(depth_layers.gradient_loss(predicted, truth)) == pytest.approx(expected, rel=1e-4)


def test_the_first_steps_fit_the_scale_alone():
    predicted, truth = example()
    early, late = (depth_layers.sig_loss(predicted, truth, scale_only).item() for scale_only in (True, False))
    for steps, last in ((38400, 99), (300, 29)):
        assert [depth_layers.depth_loss(predicted, truth, step, steps).item() for step in (0, last, last + 1)] == [
            early, early, late]
    with_gradient = depth_layers.depth_loss(predicted, truth, 200, 300, 0.5).item()
    assert with_gradient == pytest.approx(late + 0.5 * depth_layers.gradient_loss(predicted, truth).item())


# ---- Training and prediction ----


def test_a_sweep_trains_each_layer_as_if_alone():
    """Against a plain loop, at crops larger than the images, whose surroundings have no depth."""
    torch.manual_seed(1)
    network = network_of(build_backbone("vit_nano", 8, img_size=16)[0])
    images = open_depth_maps("scenes:12x16")[0]
    recipe = Recipe(steps=5, batch_size=4, weight_decay=0.1, num_workers=0, scale=(1.0, 1.0))
    crops = TrainingCrops(images, 16, 24, (0, 0, 0), recipe)
    settings = [Setting("network", 2, 0.05), Setting("network", 1, 0.01)]
    layers, _ = train({"network": network}, settings, crops, recipe, depth_tokens,
                      lambda width: DepthLayer(width, 0.001, 10, bins=32),
                      lambda maps, truth, step: depth_layers.depth_loss(maps, truth, step, recipe.steps))

    torch.manual_seed(recipe.seed)
    alone = DepthLayer(4 * 192, 0.001, 10, bins=32)
    optimizer = torch.optim.AdamW(alone.parameters(), weight_decay=0.1)
    for step in range(5):
        pictures, truth = (torch.stack(part) for part in zip(*(crops[4 * step + i] for i in range(4)), strict=True))
        assert (truth[:, 16:] == 0).all() and (truth[:, :16, :16] > 0).any()
        maps = F.interpolate(alone(depth_tokens(network, pictures, [2])[2]), size=(24, 24), mode="bilinear")
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 5))
        g = ((maps[:, 0] + 0.001).log() - (truth + 0.001).log())[truth > 0]
        optimizer.zero_grad()
        (g.var() + 0.15 * g.mean() ** 2).sqrt().backward()
        optimizer.step()
    torch.testing.assert_close(layers[0].linear.weight, alone.linear.weight.data, atol=1e-4, rtol=1e-3)


class Red(nn.Module):
    """A network whose one-channel token is the mean red of its patch."""

    blocks = (None,)
    feature_info = ({"reduction": 4},)

    def forward_intermediates(self, x, indices, **options):
        return [F.avg_pool2d(x[:, :1], 4)]


@pytest.mark.parametrize("geometry", [Geometry(48, 48), Geometry(48, 48, 20, 7), Geometry(24, 48, 0, 0, (1.0, 2.0)),
                                      Geometry(48, 48, 0, 0, (1.0,), True)])
def test_predictions_are_in_place_and_averaged(geometry):
    """Red tells the depth: a ramp without symmetry is found at the image's own size, at any window, scale and flip."""
    ramp = np.linspace(40, 240, 76)[None] * np.linspace(0.5, 1, 48)[:, None]
    image = torch.from_numpy(np.stack([ramp] + [ramp * 0] * 2).astype(np.uint8))
    network = network_of(Red(), "red", mean=(0.0,) * 3, std=(1.0,) * 3)
    predictor = Predictor({"red": network}, [Setting("red", 1, 0.1)], [nn.Identity()], geometry, depth_tokens)
    (found,) = depth.predict(predictor, image)
    assert found.shape == (48, 76) and np.abs(found - ramp / 255)[8:-8, 8:-8].max() < 0.03


def test_a_window_of_zero_is_the_whole_image():
    drawn = open_depth_maps("scenes:4x60")[0]
    assert fitted_to(Geometry(), drawn, 8, whole=True) == Geometry(56, 56, 0, 0)
    assert fitted_to(Geometry(window=30), drawn, 8, whole=True) == Geometry(56, 56, 30, 20)
    with pytest.raises(Refused, match="--stride 5: .*windows of 0.*--window_size"):
        fitted_to(Geometry(stride=5), drawn, 8, whole=True)


# ---- Constants ----


def test_constants_are_the_means_of_training_pixels():
    images = open_depth_maps("scenes:10x32")[0]
    maps = np.stack([images.load(i)[1] for i in range(10)])
    found = depth.mean_maps(images)
    assert found["mean depth"] == pytest.approx(maps[maps > 0].mean(), rel=1e-4)
    for row, column in ((31, 0), (20, 15), (11, 7)):
        known = maps[:, row, column][maps[:, row, column] > 0]
        assert found["mean map"][row, column] == pytest.approx(known.mean(), rel=1e-4)
    assert found["mean map"][0, 0] == pytest.approx(found["mean depth"].item(), rel=1e-5)  # sky in all of them
    assert depth.resized(found["mean depth"], (5, 9)).shape == (5, 9)
