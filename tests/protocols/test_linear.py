"""Linear classifiers against softmax gradients written out, the script against itself; and what it refuses."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from processes import launch

import eval_linear
from parallel import Refused
from protocols import finetune, linear, probes, splits
from protocols.features import TRAINING_SCALE, Network, load_network
from protocols.transforms import EvalImages, RandomViews
from utils import IMAGENET_MEAN, IMAGENET_STD, random_resized_crop_box
from vision_transformer import VisionTransformer, build_backbone, vit_nano
from weights import backbones

S = linear.Setting


def blobs(n=60, width=8, blocks=2, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    x = rng.standard_normal((n, width * (blocks + 1))) + rng.standard_normal((classes, width * (blocks + 1)))[y]
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def train(heads, x, y, epochs=3, batch=20):
    optimizer = linear.build_optimizer(heads, batch)
    for epoch in range(epochs):
        loss = linear.train_epoch(heads, optimizer, epoch, epochs, zip(x.split(batch), y.split(batch), strict=True))
    return loss


def test_training_is_sgd_on_the_softmax_gradient():
    """Three epochs of the mean cross-entropy's gradient, (p - onehot) x^T / B, with momentum 0.9 and a half cosine."""
    x, y = blobs()
    heads = linear.Heads([S(0.3, 2, False)], 8, 2, 4)
    w, b = (p.detach().double().numpy().copy() for p in (heads.heads[0].weight, heads.heads[0].bias))
    train(heads, x, y)
    seen, onehot = x[:, :16].double().numpy(), np.eye(4)[y.numpy()]
    mw, mb = 0, 0
    for epoch in range(3):
        lr = 0.3 * 20 / 256 * (1 + np.cos(np.pi * epoch / 3)) / 2
        for i in range(0, 60, 20):
            z = seen[i : i + 20] @ w.T + b
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            error = (p - onehot[i : i + 20]) / 20
            mw, mb = 0.9 * mw + error.T @ seen[i : i + 20], 0.9 * mb + error.sum(0)
            w, b = w - lr * mw, b - lr * mb
    np.testing.assert_allclose(heads.heads[0].weight.detach().numpy(), w, atol=1e-5)
    np.testing.assert_allclose(heads.heads[0].bias.detach().numpy(), b, atol=1e-5)


def test_a_head_of_a_sweep_is_trained_as_if_alone():
    x, y = blobs()
    found = linear.sweep(linear.Training([0.1, 1.0], [1, 2], [False, True]))
    heads = linear.Heads(found, 8, 2, 4)
    alone = [linear.Heads([s], 8, 2, 4) for s in found]
    for one, head in zip(alone, heads.heads, strict=True):
        one.heads[0].load_state_dict(head.state_dict())
    loss = train(heads, x, y)
    ranked = linear.predict(heads, x, batch_size=7)
    assert ranked.shape == (8, 60, 4) and len(found) == 8
    for i, one in enumerate(alone):
        torch.testing.assert_close(train(one, x, y)[0], loss[i])
        torch.testing.assert_close(one.heads[0].weight, heads.heads[i].weight)
        assert torch.equal(linear.predict(one, x)[0], ranked[i])


def test_what_a_setting_sees():
    torch.manual_seed(0)
    model, x = vit_nano(8, img_size=32).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = linear.probe_features(model, 3)(x)
        tokens = model.get_intermediate_layers(x, 3)
    cls, mean = [t[:, 0] for t in tokens], tokens[-1][:, 1:].mean(1)
    assert features.shape == (2, 4 * 192)
    assert torch.equal(linear.columns(features, 3, 1, False), cls[2])
    assert torch.equal(linear.columns(features, 3, 2, False), torch.cat(cls[1:], 1))
    assert torch.equal(linear.columns(features, 3, 3, True), torch.cat([*cls, mean], 1))
    published = torch.cat((cls[2].unsqueeze(-1), mean.unsqueeze(-1)), dim=-1).reshape(2, -1)
    assert torch.equal(linear.columns(features, 3, 1, True), published)
    assert torch.equal(linear.columns(features, 3, 1, True, interleaved=False), torch.cat([cls[2], mean], 1))
    resnet, _ = build_backbone("resnet18")
    assert linear.probe_features(resnet, 4) is resnet


def test_the_mean_is_over_patches_and_not_over_registers():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_register_tokens=4)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, features = model.eval().get_intermediate_layers(x, 2), linear.probe_features(model, 2)(x)
        patches = model.forward_features(x).patch_tokens
        torch.testing.assert_close(features[:, 48:], patches.mean(dim=(1, 2)))
        for t in tokens:
            t[:, 1:5] = 1e6
        model.block_outputs = lambda x, n: tokens[-n:]
        assert torch.equal(linear.probe_features(model, 2)(x), features)


def test_a_head_that_diverges_leaves_the_others_alone():
    x, y = blobs()
    torch.manual_seed(0)
    both, one = linear.Heads([S(0.1, 1, False), S(1e39, 1, False)], 8, 2, 4), linear.Heads([S(0.1, 1, False)], 8, 2, 4)
    one.heads[0].load_state_dict(both.heads[0].state_dict())
    loss = train(both, x, y)
    torch.testing.assert_close(train(one, x, y)[0], loss[0])
    assert not loss[1].isfinite()


def test_more_than_a_thousand_classes():
    heads = linear.Heads([S(1.0, 0, False)], 8, 0, 1200)
    x, y = torch.eye(8).repeat(2, 1), torch.tensor([1199, 3, 1000, 7, 5, 1100, 0, 1] * 2)
    train(heads, 30 * x, y, epochs=40, batch=16)
    assert torch.equal(linear.predict(heads, 30 * x)[0, :, 0], y)


def test_the_file_of_a_classifier_may_hold_more(tmp_path):
    torch.save({"module.linear.weight": torch.ones(2, 3), "module.linear.bias": torch.zeros(2), "x": 1}, tmp_path / "f")
    assert sorted(linear.read_classifier(tmp_path / "f")) == ["bias", "weight"]


def test_logistic_regression_is_chosen_by_the_held_out_part():
    x, y = blobs(n=90)
    strengths = [1e-6, 1.0]
    ranked, best, accuracies = linear.logistic_regression((x[:40], y[:40]), (x[40:60], y[40:60]), x[60:], strengths)
    assert best == 1.0 and accuracies[1] > accuracies[0]
    assert (ranked[:, 0] == y[60:]).float().mean() > 0.8 and ranked.shape == (30, 4)


# ---- How a data set is divided ----


def test_shares_of_each_class():
    y = torch.tensor([0] * 100 + [1] * 10 + [2])
    drawn, left = splits.draw_share(y, 0.1, seed=3)
    assert torch.bincount(y[drawn], minlength=3).tolist() == [10, 1, 0]
    assert torch.equal(torch.cat([drawn, left]).sort()[0], torch.arange(111))
    assert torch.equal(drawn, splits.draw_share(y, 0.1, seed=3)[0])
    assert not torch.equal(drawn, splits.draw_share(y, 0.1, seed=4)[0])
    few = splits.draw_share(y, 0.99, seed=0)[1]  # one per cent of each class, at least one image
    assert torch.bincount(y[few]).tolist() == [1, 1, 1]


# ---- The script ----


def draw_pictures(folder, names, each, seed=0, size=32):
    """Pictures whose colour tells the class, one of them grey, of two sizes."""
    rng = np.random.default_rng(seed)
    for c, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            colour = np.array([60 * c % 256, 97 * c % 256, 255 - 50 * c % 256])
            pixels = np.clip(colour + 20 * rng.standard_normal((size + 8 * (i % 2), size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder / "train", ["ant", "bee", "cat", "dog"], each=10)
    draw_pictures(folder / "val", ["ant", "bee", "cat", "eel"], each=3, seed=1)
    Image.new("L", (40, 40), 128).save(folder / "train" / "ant" / "grey.png")
    return folder


NETWORK = ("--arch", "vit_nano", "--patch_size", 8, "--crop_size", 32, "--num_workers", 0, "--device", "cpu",
           "--batch_size_per_gpu", 8)


def run(folder, out, *flags):
    command = ["--data_path", folder, "--output_dir", out, *NETWORK, *flags]
    code = eval_linear.main(eval_linear.get_args_parser().parse_args([str(f) for f in command]))
    return json.loads((out / "eval_linear.json").read_text()) if code == 0 else code


SWEEP = ("--lr", 0.01, 0.3, "--n_last_blocks", 1, 4, "--avgpool_patchtokens", True, False, "--epochs", 3)


@pytest.fixture(scope="module")
def swept(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("swept")
    return out, run(pictures, out, *SWEEP)


def test_a_sweep_is_chosen_without_the_test_set(swept):
    out, report = swept
    assert len(report["results"]) == 8 and sum(row["chosen"] == "*" for row in report["results"]) == 1
    chosen = max(report["results"], key=lambda row: row["held-out top1"]["value"])
    assert chosen["chosen"] == "*" and report["images"] == [37, 4, 12]
    assert report["test"]["per_class"]["eel"] == 0 and report["test"]["top1"]["value"] >= 50
    assert "no training images (eel)" in " ".join(report["notes"]) and len(report["weights_sha256"]) == 64


@pytest.mark.parametrize("flags", [
    SWEEP, ("--logreg", "--val_share", 0.3),
    ("--select_epoch", "held_out", "--val_share", 0.4, "--lr", 3, "--epochs", 5),
    (*SWEEP, "--select_epoch", "held_out"),
])
def test_what_is_chosen_does_not_depend_on_the_test_pictures(flags, pictures, tmp_path):
    """With all test pictures in another class's folder, every figure but the test set's is the same."""
    names = ["ant", "bee", "cat", "eel"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(pictures / "train")
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        shutil.copytree(pictures / "val" / other, tmp_path / "data" / "val" / name)
    one, other = (run(folder, tmp_path / f"out{i}", *flags) for i, folder in enumerate((pictures, tmp_path / "data")))
    assert one["results"] == other["results"] and one["test"] != other["test"]


def test_the_classifier_is_evaluated_again(swept, pictures, tmp_path):
    out, report = swept
    again = run(pictures, tmp_path, "--evaluate", "--linear_weights", out / "linear.pth")
    assert again["test"] == report["test"]


def test_a_published_classifier(swept, pictures, tmp_path):
    """`state_dict` with `module.linear.*`, no names of classes: outputs are the classes in the order of their names."""
    out, report = swept
    ours = torch.load(out / "linear.pth")
    order = [ours["classes"].index(name) for name in ("ant", "bee", "cat", "dog", "eel")]
    file = {"epoch": 100, "state_dict": {f"module.{k}": v[order] for k, v in ours["state_dict"].items()}}
    torch.save(file, tmp_path / "published.pth")
    draw_pictures(tmp_path / "data" / "train", ["ant", "bee", "cat", "dog", "eel"], each=2)
    (tmp_path / "data" / "val").symlink_to(pictures / "val")
    n, avgpool = ours["setting"]["n_last_blocks"], ours["setting"]["avgpool_patchtokens"]
    setting = ("--n_last_blocks", n, "--avgpool_patchtokens", avgpool)
    flags = ("--evaluate", "--linear_weights", tmp_path / "published.pth")
    found = run(tmp_path / "data", tmp_path / "out", *flags, *setting)
    assert found["test"]["top1"] == report["test"]["top1"]
    assert run(pictures / "train", tmp_path / "out", *flags, *setting) == 2  # five outputs, four classes, no names
    assert run(tmp_path / "data", tmp_path / "out", *flags, "--n_last_blocks", 5 - n, *setting[2:]) == 2  # other width


def test_classifiers_of_dinov2_take_the_mean_behind_the_class_token(pictures, tmp_path):
    """A file of this project without the entry is older, with the two interleaved; a published one has no setting."""
    weights, _ = build_backbone("vit_nano", 8, img_size=32, init_values=1.0, method="dinov2")
    torch.save(weights.state_dict(), tmp_path / "w.pth")
    flags = ("--pretrained_weights", tmp_path / "w.pth", "--n_last_blocks", 1, "--avgpool_patchtokens", True)
    trained = run(pictures, tmp_path, *flags, "--epochs", 2, "--lr", 0.3)
    ours = torch.load(tmp_path / "linear.pth")
    weight = ours["state_dict"]["linear.weight"]
    assert ours["interleaved"] is False
    interleaved = torch.stack([weight[:, :192], weight[:, 192:]], 2).flatten(1)
    older = {k: v for k, v in ours.items() if k != "interleaved"}
    older["state_dict"] = ours["state_dict"] | {"linear.weight": interleaved}
    published = {"state_dict": ours["state_dict"], "classes": ours["classes"]}
    for file in (ours, older, published):
        torch.save(file, tmp_path / "again.pth")
        again = run(pictures, tmp_path / "out", *flags, "--evaluate", "--linear_weights", tmp_path / "again.pth")
        assert again["test"] == trained["test"]


@pytest.mark.parametrize("classes, count, expected, order", [
    (["0", "1", "10", "11", "2"], 5, ["0", "1", "2", "10", "11"], "numeric order"),
    (["0", "10", "2"], 12, ["0", "", "2", *[""] * 7, "10", ""], "numeric order"),
    (["ant", "bee", "cat"], 3, ["ant", "bee", "cat"], "the order of their names"),
    (["class_10", "class_2"], 2, ["class_10", "class_2"], "the order of their names"),
    (["01", "1", "2"], 3, ["01", "1", "2"], "the order of their names"),  # two names of one number
])
def test_classes_of_outputs_without_names(classes, count, expected, order):
    names, said = probes.unnamed_outputs(classes, count, "linear.pth")
    assert names == expected and order in said


@pytest.mark.parametrize("classes", [["ant", "bee"], ["1", "3"], ["0", "1", "2", "3"]])
def test_outputs_without_names_for_other_classes(classes):
    with pytest.raises(Refused, match="--linear_weights linear.pth: 3 outputs without names .* give data with all"):
        probes.unnamed_outputs(classes, 3, "linear.pth")


def test_a_classifier_of_other_classes_is_refused(swept, pictures, tmp_path, capsys):
    state = torch.load(swept[0] / "linear.pth", weights_only=True)
    torch.save(state | {"classes": [f"other {name}" for name in state["classes"]]}, tmp_path / "linear.pth")
    assert run(pictures, tmp_path, "--evaluate", "--linear_weights", tmp_path / "linear.pth") == 2
    said = capsys.readouterr().err
    assert "--linear_weights" in said and "none of its classes (other " in said and "give a classifier" in said


def test_a_published_classifier_of_folders_with_numbers(pictures, tmp_path):
    """Twelve classes 0, ..., 11: each image's output is the number of its folder, and 10 does not come before 2."""
    draw_pictures(tmp_path / "data" / "train", [str(i) for i in range(12)], each=2)
    draw_pictures(tmp_path / "data" / "val", [str(i) for i in range(12)], each=2)
    trained = run(tmp_path / "data", tmp_path / "trained", "--epochs", 2, "--lr", 0.1)
    ours = torch.load(tmp_path / "trained" / "linear.pth")
    order = [ours["classes"].index(str(i)) for i in range(12)]
    torch.save({"state_dict": {k: v[order] for k, v in ours["state_dict"].items()}}, tmp_path / "published.pth")
    report = run(tmp_path / "data", tmp_path / "out", "--evaluate", "--linear_weights", tmp_path / "published.pth")
    assert report["test"] == trained["test"] and len(set(trained["test"]["per_class"].values())) > 1
    assert "no names" in report["notes"][-1] and "numeric order" in report["notes"][-1]


def test_large_labels_are_not_the_number_of_outputs(pictures, tmp_path):
    for part in ("train", "val"):
        images = sorted((pictures / part).glob("[ab]*/*.png"))
        (tmp_path / f"{part}.txt").write_text("".join(
            f"{path}\t{100_001 if path.parent.name == 'ant' else 999_999}\n" for path in images))
    report = run(tmp_path / "train.txt", tmp_path / "out", "--val_data_path", tmp_path / "val.txt", "--epochs", 1)
    ours = torch.load(tmp_path / "out" / "linear.pth")
    assert ours["classes"] == ["100001", "999999"] and len(ours["state_dict"]["linear.bias"]) == 2
    assert list(report["test"]["per_class"]) == ["100001", "999999"]


# ---- The reported epoch, and the training crops ----


@pytest.fixture
def epochs(monkeypatch):
    """Weights and bias of the first head after each epoch of a run."""
    states, train_epoch = [], linear.train_epoch

    def recorded(heads, *args):
        loss = train_epoch(heads, *args)
        states.append([p.detach().clone() for p in (heads.heads[0].weight, heads.heads[0].bias)])
        return loss

    monkeypatch.setattr(linear, "train_epoch", recorded)
    return states


def accuracies_on(images, classes, states):
    """Top-1 in % of each epoch's classifier on images in class folders, from the class tokens of four blocks."""
    torch.manual_seed(0)
    model, _ = build_backbone("vit_nano", 8)
    names = [name for name in classes if (images / name).is_dir()]
    files = [(name, path) for name in names for path in sorted((images / name).iterdir())]
    pixels = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for _, path in files]
    crops = [EvalImages([], 37, 32, IMAGENET_MEAN, IMAGENET_STD) for _ in files]
    x = torch.stack([(crop.transform(image, 0) - crop.mean) / crop.std
                     for crop, image in zip(crops, pixels, strict=True)])
    with torch.no_grad():
        features = torch.cat([t[:, 0] for t in model.eval().get_intermediate_layers(x, 4)], 1)
    labels = torch.tensor([classes.index(name) for name, _ in files])
    return [100 * ((features @ w.T + b).argmax(1) == labels).double().mean().item() for w, b in states]


@pytest.fixture
def hard(pictures, tmp_path):
    """The same training images, and test images of random colours, on which accuracies go up and down."""
    (tmp_path / "hard").mkdir()
    (tmp_path / "hard" / "train").symlink_to(pictures / "train")
    rng = np.random.default_rng(4)
    for name in ("ant", "bee", "cat", "dog"):
        (tmp_path / "hard" / "val" / name).mkdir(parents=True)
        for i in range(8):
            colour = tuple(rng.integers(0, 256, 3).tolist())
            Image.new("RGB", (32, 32), colour).save(tmp_path / "hard" / "val" / name / f"{i}.png")
    return tmp_path / "hard"


@pytest.mark.parametrize("val_freq, validated", [(1, range(8)), (3, (0, 3, 6, 7))])
def test_the_best_epoch_on_the_test_set_is_reported_as_published(val_freq, validated, hard, tmp_path, epochs, capsys):
    report = run(hard, tmp_path, "--lr", 10, "--epochs", 8, "--val_freq", val_freq)
    found = accuracies_on(hard / "val", ["ant", "bee", "cat", "dog"], epochs)
    best = max(validated, key=lambda epoch: found[epoch])  # the first of equals
    assert found[best] > found[-1]  # otherwise the last would do
    assert report["test"]["top1"]["value"] == pytest.approx(found[best])
    assert report["results"][0]["epoch"] == best + 1 and report["select_epoch"] == "best"
    assert torch.equal(torch.load(tmp_path / "linear.pth")["state_dict"]["linear.weight"], epochs[best][0])
    assert f"epoch {best + 1} of 8: the epoch with the highest accuracy on the test set" in capsys.readouterr().out


def test_the_last_epoch(pictures, tmp_path, epochs):
    report = run(pictures, tmp_path, "--lr", 3, "--epochs", 6, "--select_epoch", "last")
    found = accuracies_on(pictures / "val", ["ant", "bee", "cat", "dog", "eel"], epochs)
    assert report["test"]["top1"]["value"] == pytest.approx(found[-1]) and report["results"][0]["epoch"] == 6
    assert report["images"][1] == 0


def test_an_epoch_chosen_on_held_out_images(pictures, tmp_path, epochs):
    report = run(pictures, tmp_path, "--lr", 3, "--epochs", 6, "--select_epoch", "held_out", "--val_share", 0.4)
    best = report["results"][0]["epoch"] - 1
    assert report["images"][1] == 16 and report["select_epoch"] == "held_out"
    found = accuracies_on(pictures / "val", ["ant", "bee", "cat", "dog", "eel"], epochs)
    assert report["test"]["top1"]["value"] == pytest.approx(found[best])
    assert torch.equal(torch.load(tmp_path / "linear.pth")["state_dict"]["linear.weight"], epochs[best][0])


def test_each_head_keeps_its_own_best_epoch():
    heads = linear.Heads([S(0.1, 1, False), S(0.1, 1, False)], 4, 1, 3)
    best, states = linear.BestEpochs(heads), []
    for epoch, right in enumerate(((3, 5), (4, 5), (4, 6), (0, 2)), 1):
        for head in heads.heads:
            torch.nn.init.normal_(head.weight)
        states.append([head.weight.detach().clone() for head in heads.heads])
        best.update(heads, right, epoch)
    assert best.epoch.tolist() == [2, 3] and best.right.tolist() == [4, 6]
    assert torch.equal(best.heads.heads[0].weight, states[1][0])
    assert torch.equal(best.heads.heads[1].weight, states[2][1])
    again = linear.BestEpochs(heads)
    again.load_state_dict(best.state_dict())
    assert again.epoch.tolist() == [2, 3] and torch.equal(again.heads.heads[0].weight, states[1][0])


def test_a_sweep_is_not_chosen_on_the_test_set(pictures, tmp_path, capsys):
    assert run(pictures, tmp_path / "out", *SWEEP, "--select_epoch", "best") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--select_epoch best" in error and "held_out or last" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_crops_are_resized_as_pillow_does(interpolation, pictures):
    image = torch.from_numpy(np.array(Image.open(pictures / "train" / "ant" / "1.png"))).permute(2, 0, 1)
    for view in range(20):
        found = RandomViews([], 24, (0,), (1,), view, TRAINING_SCALE, interpolation).transform(image, 3)
        rng = np.random.default_rng((3, view))
        top, left, height, width = random_resized_crop_box(*image.shape[1:], TRAINING_SCALE, rng)
        crop = Image.fromarray(image[:, top : top + height, left : left + width].permute(1, 2, 0).numpy())
        expected = torch.from_numpy(np.array(crop.resize((24, 24), getattr(Image.Resampling, interpolation.upper()))))
        expected = expected.permute(2, 0, 1).flip(-1) if rng.random() < 0.5 else expected.permute(2, 0, 1)
        assert (found.int() - expected.int()).abs().double().mean() < 0.7  # the other interpolation differs by 2 to 3


def test_crops_of_one_interpolation_are_not_taken_for_those_of_the_other(pictures, tmp_path, monkeypatch):
    flags = ("--views", 1, "--epochs", 1)
    bilinear = run(pictures, tmp_path, *flags)
    bicubic = run(pictures, tmp_path, *flags, "--interpolation", "bicubic")
    assert (bilinear["interpolation"], bicubic["interpolation"]) == ("bilinear", "bicubic")
    assert bilinear["results"][0]["train_loss"] != bicubic["results"][0]["train_loss"]
    monkeypatch.setattr("protocols.features.extract_features", None)  # both are kept
    assert run(pictures, tmp_path, *flags)["results"] == bilinear["results"]
    assert run(pictures, tmp_path, *flags, "--interpolation", "bicubic")["results"] == bicubic["results"]


def stop_after(monkeypatch, module, name, calls):
    """The real function, which is interrupted at its call number `calls`."""
    real, count = getattr(module, name), iter(range(calls))

    def interrupted(*args, **kwargs):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


@pytest.mark.parametrize("flags", [
    SWEEP, ("--lr", 0.3, "--epochs", 3), ("--lr", 0.3, "--epochs", 3, "--finetune", "--warmup_epochs", 1)])
def test_a_stopped_run_goes_on(flags, pictures, tmp_path, monkeypatch, capsys):
    whole = run(pictures, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        module, name = (finetune, "batches") if "--finetune" in flags else (linear, "train_epoch")
        stop_after(patch, module, name, 2)
        assert run(pictures, tmp_path / "parts", *flags) == 130
    for changed in ([f if f != 3 else 4 for f in flags], [f if f != 0.3 else 0.2 for f in flags],
                    [*flags, "--seed", 1], [*flags, "--crop_size", 40], [*flags, "--low_shot", "80%"],
                    [*flags, "--mean", 0.4, 0.4, 0.4], [*flags, "--std", 0.3, 0.3, 0.3]):
        assert run(pictures, tmp_path / "parts", *changed) == 2  # another run
        error = capsys.readouterr().err
        assert f"--output_dir {tmp_path / 'parts'}" in error and "belongs to another run (different " in error
    parts = run(pictures, tmp_path / "parts", *flags)
    assert "resuming after epoch 2" in capsys.readouterr().out
    assert parts["results"] == whole["results"] and parts["test"] == whole["test"]
    assert not list((tmp_path / "parts").glob("checkpoint_*"))


def test_a_run_stopped_on_other_images_is_another_run(pictures, tmp_path, monkeypatch, capsys):
    """As many of the same classes, in the same place."""
    shutil.copytree(pictures, tmp_path / "data")
    flags = ("--epochs", 4, "--views", 0)
    with monkeypatch.context() as patch:
        stop_after(patch, linear, "train_epoch", 2)
        assert run(tmp_path / "data", tmp_path / "out", *flags) == 130
    one = next((tmp_path / "data").rglob("*.png"))
    one.write_bytes(sorted((tmp_path / "data").rglob("*.png"))[-1].read_bytes())
    os.utime(one, (1, 1))
    assert run(tmp_path / "data", tmp_path / "out", *flags) == 2
    assert "checkpoint_linear.pth belongs to another run (different data)" in capsys.readouterr().err
    old = torch.load(tmp_path / "out" / "checkpoint_linear.pth", weights_only=True)
    del old["run"]["data"], old["run"]["mean"], old["run"]["std"]  # as written by versions that don't state them
    torch.save(old, tmp_path / "out" / "checkpoint_linear.pth")
    run(tmp_path / "data", tmp_path / "out", *flags)
    assert "resuming after epoch" in capsys.readouterr().out


@pytest.mark.parametrize("flags, name", [((), "checkpoint_linear.pth"), (
    ("--finetune", "--epochs", 5), "checkpoint_finetune.pth")])
def test_a_file_that_is_no_stopped_run_is_named(flags, name, pictures, tmp_path, capsys):
    torch.save([1], tmp_path / name)
    assert run(pictures, tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{name} belongs to another run; remove it" in error


@pytest.mark.parametrize("content", [
    torch.ones(3), [1, 2], {"teacher": {"norm.weight": torch.ones(3)}}, {"linear.weight": 1, "linear.bias": 2},
    {"linear.weight": torch.ones(3), "linear.bias": torch.ones(3)}, {0: torch.ones(3)},
    {"linear.weight": torch.ones(3, 4), "linear.bias": torch.ones(4)}])
def test_a_file_without_a_classifier_is_named_before_any_work(content, pictures, tmp_path, capsys):
    torch.save(content, tmp_path / "file.pth")
    assert run(pictures, tmp_path / "out", "--evaluate", "--linear_weights", tmp_path / "file.pth") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--linear_weights {tmp_path}/file.pth: no linear classifier" in error
    assert "linear.weight" in error and "give a linear.pth" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [
    0, ["lr"], {}, {"lr": 0.1}, torch.ones(2), *({"lr": 0.1, "n_last_blocks": n, "avgpool_patchtokens": False}
                                                 for n in ("4", 2.5, -3))])
def test_a_classifier_with_a_broken_setting_is_named_before_any_work(setting, pictures, tmp_path, capsys):
    file = {"linear.weight": torch.ones(4, 192), "linear.bias": torch.ones(4)}
    torch.save({"state_dict": file, "setting": setting}, tmp_path / "file.pth")
    assert run(pictures, tmp_path / "out", "--evaluate", "--linear_weights", tmp_path / "file.pth") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--linear_weights {tmp_path}/file.pth: its setting does not hold lr" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field, value", [
    ("classes", 5), ("classes", [1, 2, 3, 4]), ("classes", {"ant": 1}), ("classes", ["ant", "ant"]),
    ("classes", "ants"), ("classes", ["ant", "bee", "cat", "dog", "eel"]), ("interleaved", "x")])
def test_a_classifier_with_broken_entries_is_named_before_any_work(field, value, pictures, tmp_path, capsys):
    """Not a list of names, a name twice, more names than outputs, no truth value."""
    file = {"linear.weight": torch.ones(4, 192), "linear.bias": torch.ones(4)}
    torch.save({"state_dict": file, field: value}, tmp_path / "file.pth")
    assert run(pictures, tmp_path / "out", "--evaluate", "--linear_weights", tmp_path / "file.pth") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--linear_weights {tmp_path}/file.pth: its " in error and field in error
    assert not (tmp_path / "out").exists()


def test_views_are_extracted_once(pictures, tmp_path, monkeypatch):
    report = run(pictures, tmp_path, "--lr", 0.3, "--views", 2, "--epochs", 8)
    assert report["test"]["top1"]["value"] >= 50
    monkeypatch.setattr("protocols.features.extract_features", None)  # all of it is there
    assert run(pictures, tmp_path, "--lr", 0.3, "--views", 2, "--epochs", 8)["test"] == report["test"]


def test_low_shot_logreg_pixels_and_other_networks(pictures, tmp_path):
    report = run(pictures, tmp_path, "--lr", 0.3, "--low_shot", "10%", "--epochs", 1)
    assert report["images"] == [4, 0, 12]
    assert run(pictures, tmp_path, "--logreg", "--val_share", 0.3)["test"]["top1"]["value"] >= 50
    assert run(pictures, tmp_path, "--arch", "pixels", "--epochs", 2)["weights_sha256"] is None
    assert run(pictures, tmp_path, "--arch", "resnet18", "--epochs", 1)["results"][0]["n_last_blocks"] == 0


def test_one_folder_keeps_a_fifth_for_testing(pictures, tmp_path):
    report = run(pictures / "train", tmp_path, "--epochs", 1)
    assert report["images"] == [33, 0, 8] and "a fifth" in report["notes"][0]


def test_one_class_and_one_image_a_class(pictures, tmp_path, capsys):
    draw_pictures(tmp_path / "few" / "train", ["ant", "bee"], each=1)
    draw_pictures(tmp_path / "few" / "val", ["ant", "bee"], each=1)
    assert run(tmp_path / "few", tmp_path / "out", "--epochs", 1)["images"] == [2, 0, 2]
    assert run(tmp_path / "few", tmp_path / "out", *SWEEP) == 2  # nothing to choose by
    assert "--val_share 0.1" in capsys.readouterr().err
    assert run(pictures / "train" / "ant", tmp_path / "none") == 2 and not (tmp_path / "none").exists()
    assert "no labels" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (("--n_last_blocks", 5), "--n_last_blocks 5"),
    (("--patch_size", 64), "--crop_size 32: smaller than a patch of 64; raise it"),
    (("--num_labels", 3), "--num_labels 3"),
    (("--evaluate",), "linear.pth: no such file"),
    (("--linear_weights", "x.pth"), "add --evaluate"),
    (("--logreg", "--finetune"), "--logreg with --finetune"),
    (("--finetune", "--lr", 1, 2), "--lr 1 2"),
    (("--finetune", "--epochs", 2), "--warmup_epochs 5"),
    (("--finetune", "--precision", "fp16"), "--precision fp16"),
    (("--finetune", "--arch", "pixels"), "--arch pixels"),
    (("--arch", "pixels", "--pretrained_weights", "x.pth"), "x.pth: --arch pixels has no weights"),
    (("--data_path", "nowhere"), "--data_path 'nowhere'"),
    (("--val_data_path", "nowhere"), "--val_data_path 'nowhere'"),
    (("--pretrained_weights", "nothing.pth"), "nothing.pth"),
    (("--finetune", "--warmup_epochs", 0, "--batch_size_per_gpu", 64), "--batch_size_per_gpu 64"),
])
def test_bad_input_is_refused_in_one_line(flags, message, pictures, tmp_path, capsys):
    assert run(pictures, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not (tmp_path / "out" / "eval_linear.json").exists()


def test_a_classifier_that_diverged_is_not_chosen(pictures, tmp_path, capsys, monkeypatch):
    """Even where its answers, all the same class, are as often right."""
    monkeypatch.setattr("flags.LARGEST", math.inf)
    monkeypatch.setattr(linear, "predict",
                        lambda heads, features: torch.zeros(len(heads.heads), len(features), 1).long())
    report = run(pictures, tmp_path, "--epochs", 1, "--views", 1, "--lr", 1e39, 0.1, "--select_epoch", "last")
    assert [row["chosen"] for row in report["results"]] == ["", "*"]
    assert "1 of 2 not finite" in capsys.readouterr().out


def test_learning_rates_that_all_diverge_are_refused(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flags.LARGEST", math.inf)
    assert run(pictures, tmp_path, "--epochs", 2, "--lr", 1e39) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--lr 1e+39" in error


@pytest.mark.parametrize("flags", [("--low_shot", "0"), ("--low_shot", "200%"), ("--lr", "0"), ("--epochs", "0"),
                                   ("--lr", "1e39"), ("--low_shot", "ten"), ("--seed", str(2**32)),
                                   ("--layer_decay", "2"), ("--smoothing", "1")])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        eval_linear.get_args_parser().parse_args(flags)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_published_command_line():
    args = eval_linear.get_args_parser().parse_args(
        "--n_last_blocks 4 --avgpool_patchtokens false --arch vit_small --patch_size 16 --checkpoint_key teacher "
        "--epochs 100 --lr 0.001 --batch_size_per_gpu 128 --dist_url env:// --local_rank 0 --num_workers 10 "
        "--val_freq 1 --output_dir . --num_labels 1000 --evaluate".split())
    eval_linear.check_args(args)
    training = eval_linear.training_of(args)
    assert training._replace(num_labels=0) == linear.Training(
        lrs=[0.001], n_last_blocks=[4], avgpool_patchtokens=[False], select_epoch="best", interpolation="bilinear")
    default, tuned = (eval_linear.get_args_parser().parse_args(flags) for flags in ([], ["--finetune"]))
    assert eval_linear.training_of(default).lrs == [0.001] and eval_linear.training_of(tuned).lrs == [0.0005]
    assert eval_linear.recipe_of(default) == finetune.Recipe()


@pytest.mark.parametrize("flags, module, name", [
    ((), linear, "train_epoch"), (("--finetune", "--warmup_epochs", 0), finetune, "tune_epoch"),
    (("--logreg", "--val_share", 0.3), linear, "logistic_regression")])
def test_a_bug_is_not_mistaken_for_bad_input(flags, module, name, pictures, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(module, name, broken)
    with pytest.raises(ValueError, match="could not be broadcast") as raised:
        run(pictures, tmp_path, "--epochs", 1, *flags)
    assert raised.type is ValueError


def test_the_evaluation_takes_values(pictures, swept, tmp_path):
    """What the script reports, from a network that another file has loaded."""
    torch.manual_seed(0)
    network = load_network("", "vit_nano", 8, crop_size=32)
    training = linear.Training([0.01, 0.3], [1, 4], [True, False], epochs=3, batch_size=8, num_workers=0)
    found = probes.evaluate_linear(network, str(pictures), "", tmp_path, training)
    expected = {k: v for k, v in swept[1].items() if k != "command"}
    assert json.loads(json.dumps(found)) == expected and list(found) == list(expected)


def test_two_processes_report_what_one_reports(pictures, tmp_path):
    flags = ["--data_path", pictures, *NETWORK, "--lr", 0.3, 0.01, "--epochs", 2]
    done = launch("eval_linear.py", *flags, "--batch_size_per_gpu", 4, "--output_dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = run(pictures, tmp_path / "one", *flags[2:]), json.loads((tmp_path / "two/eval_linear.json").read_text())
    assert one["test"] == two["test"]
    for a, b in zip(one["results"], two["results"], strict=True):
        assert a["held-out top1"] == b["held-out top1"] and a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-4)


# ---- Fine-tuning ----


def test_layers_of_a_vit_and_a_resnet():
    names = [name for name, _ in vit_nano(8).named_parameters()]
    depth = finetune.depths(names)
    assert depth["cls_token"] == depth["pos_embed"] == depth["patch_embed.proj.weight"] == 0
    assert depth["blocks.0.norm1.weight"] == 1 and depth["blocks.3.mlp.fc2.bias"] == 4 and depth["norm.weight"] == 5
    resnet, _ = build_backbone("resnet18")
    depth = finetune.depths([name for name, _ in resnet.named_parameters()])
    assert depth["conv1.weight"] == depth["bn1.bias"] == 0 and depth["layer1.0.conv1.weight"] == 1
    assert depth["layer4.1.bn2.weight"] == 8 and max(depth.values()) == 8


def test_learning_rates_and_decay_of_the_layers():
    model = finetune.Classifier(vit_nano(8), 192, 4)
    groups = {id(p): group for group in finetune.param_groups(model, 1.0, 0.05, 0.5) for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    blocks = model.backbone.blocks
    assert groups[id(model.linear.weight)]["peak"] == groups[id(model.backbone.norm.weight)]["peak"] == 1
    assert groups[id(blocks[3].mlp.fc1.weight)]["peak"] == 0.5
    assert groups[id(blocks[0].attn.qkv.weight)]["peak"] == 1 / 16
    assert groups[id(model.backbone.cls_token)]["peak"] == 1 / 32
    assert groups[id(model.backbone.cls_token)]["weight_decay"] == 0
    assert groups[id(blocks[0].norm1.weight)]["weight_decay"] == 0
    assert groups[id(blocks[0].mlp.fc1.weight)]["weight_decay"] == 0.05


def test_stochastic_depth_rises_with_the_depth():
    network = Network(vit_nano(8, img_size=32), {"arch": "vit_nano"}, {}, torch.device("cpu"))
    model = finetune.trainable(network, 0.3)
    assert [block.drop_path.drop_prob for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert all(p.requires_grad for p in model.parameters()) and model is not network.forward
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), network.forward.eval()(x))


def test_mixing():
    torch.manual_seed(0)
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    mixed, soft = finetune.mixing(0.8, 1.0, 5)(x, y)
    assert mixed.shape == x.shape and soft.shape == (4, 5) and torch.allclose(soft.sum(1), torch.ones(4))
    same, hard = finetune.mixing(0, 0, 5)(x, y)
    assert torch.equal(same, x) and torch.equal(hard.argmax(1), y)


@pytest.mark.parametrize("flags, message", [
    (("--arch", "dla46x_c", "--drop_path_rate", 0.1), "--drop_path_rate 0.1: --arch dla46x_c"),
    (("--arch", "resnet18", "--batch_size_per_gpu", 1), "--batch_size_per_gpu 1: batch norm in --arch resnet18"),
])
def test_fine_tuning_what_a_network_does_not_support(flags, message, pictures, tmp_path, capsys):
    assert run(pictures, tmp_path, "--finetune", "--epochs", 1, "--warmup_epochs", 0, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and "finetuned.pth" not in [p.name for p in tmp_path.iterdir()]


def test_fine_tuning_without_stochastic_depth(pictures, tmp_path, capsys):
    report = run(pictures, tmp_path, "--finetune", "--epochs", 1, "--warmup_epochs", 0, "--arch", "dla46x_c")
    assert report["protocol"] == "finetune" and "--drop_path_rate 0 instead" in capsys.readouterr().out


def test_fine_tuning_learns_and_its_backbone_loads(pictures, tmp_path):
    flags = ("--finetune", "--epochs", 6, "--warmup_epochs", 1, "--lr", 0.03, "--drop_path_rate", 0.1)
    report = run(pictures, tmp_path, *flags)
    assert report["test"]["top1"]["value"] >= 50 and report["protocol"] == "finetune"
    model, info = backbones.load_backbone(str(tmp_path / "finetuned.pth"))
    assert info["arch"] == "vit_nano" and info["patch_size"] == 8 and info["global_crops_size"] == 32
    untrained = run(pictures, tmp_path, "--epochs", 1)["weights_sha256"]
    assert run(pictures, tmp_path, "--epochs", 1, "--pretrained_weights", tmp_path / "finetuned.pth")[
        "weights_sha256"] != untrained
