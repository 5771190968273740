"""Names of the published scripts, called as code that imports them does."""

import argparse
import copy
import math
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from golden_weights import rs
from PIL import Image, ImageFilter
from processes import ENV, launch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

import eval_knn
import eval_linear
import main_dino
import utils
from parallel import Refused
from vision_transformer import DINOHead, VisionTransformer

TINY = partial(VisionTransformer, img_size=[32], patch_size=8, embed_dim=24, depth=2, num_heads=2)


def test_every_name_is_there():
    names = {
        main_dino: "DINOLoss DataAugmentationDINO train_one_epoch get_args_parser",
        eval_knn: "extract_features ReturnIndexDataset knn_classifier",
        eval_linear: "LinearClassifier validate_network",
        utils: "load_pretrained_weights bool_flag GaussianBlur Solarization trunc_normal_ has_batchnorms "
               "fix_random_seeds init_distributed_mode restart_from_checkpoint MetricLogger SmoothedValue PCA "
               "multi_scale compute_map LARS MultiCropWrapper cosine_scheduler clip_gradients get_params_groups "
               "cancel_gradients_last_layer get_rank get_world_size is_main_process",
    }
    for module, listed in names.items():
        for name in listed.split():
            assert callable(getattr(module, name)), name
    assert main_dino.DINOLoss is utils.DINOLoss and not hasattr(utils, "none_such")
    assert not hasattr(eval_knn, "none_such")


def test_a_list_of_what_is_left_out():
    listed = (ROOT / "docs" / "published_names.md").read_text()
    for name in ("save_on_master", "load_pretrained_linear_weights", "get_sha", "setup_for_distributed",
                 *utils.ELSEWHERE):  # fmt: skip
        assert name in listed, name


def test_utils_alone_imports_nothing_below_it():
    script = "import sys, utils; print(*[m for m in ('weights', 'protocols', 'pretraining', 'torchvision') " \
             "if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], env=ENV, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "", done.stdout + done.stderr


# ---- An epoch of training ----


def networks():
    torch.manual_seed(0)
    student = utils.MultiCropWrapper(TINY(), DINOHead(24, 16, False))
    teacher = utils.MultiCropWrapper(TINY(), DINOHead(24, 16))
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def test_train_one_epoch_against_a_loop():
    loader = [([rs(10 * i + c, 4, 3, s, s).float() for c, s in enumerate((32, 32, 16))], torch.zeros(4))
              for i in range(3)]
    lr, wd = np.linspace(1e-3, 2e-3, 6), np.linspace(0.04, 0.4, 6)
    momentum = np.linspace(0.9, 1, 6)
    args = argparse.Namespace(clip_grad=0.3, freeze_last_layer=1, epochs=2)
    student, teacher = networks()
    loss_fn = main_dino.DINOLoss(16, 3, 0.04, 0.04, 0, 2)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    stats = [main_dino.train_one_epoch(student, teacher, teacher, loss_fn, loader, optimizer, lr, wd, momentum, epoch,
                                       None, args) for epoch in range(2)]

    student2, teacher2 = networks()
    loss2, losses = main_dino.DINOLoss(16, 3, 0.04, 0.04, 0, 2), []
    optimizer2 = torch.optim.AdamW(utils.get_params_groups(student2))
    for step in range(6):
        optimizer2.param_groups[0].update(lr=lr[step], weight_decay=wd[step])
        optimizer2.param_groups[1].update(lr=lr[step])
        crops = loader[step % 3][0]
        loss = loss2(student2(crops), teacher2(crops[:2]), step // 3)
        optimizer2.zero_grad()
        loss.backward()
        for name, p in student2.named_parameters():
            if p.grad is not None:
                p.grad *= min(1, 0.3 / (p.grad.norm().item() + 1e-6))
                if step < 3 and "last_layer" in name:
                    p.grad = None
        optimizer2.step()
        for t, s in zip(teacher2.parameters(), student2.parameters(), strict=True):
            t.mul_(momentum[step]).add_((1 - momentum[step]) * s.detach())
        losses.append(loss.item())
    assert [s["loss"] for s in stats] == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])], rel=1e-5)
    assert stats[1]["lr"] == pytest.approx(np.mean(lr[3:])) and stats[0]["wd"] == pytest.approx(np.mean(wd[:3]))
    for ours, theirs in zip((student, teacher), (student2, teacher2), strict=True):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=2e-5)


def test_lars_filters():
    """A true filter spares a matrix the weight decay, or the scaling, as vectors are."""
    g, p0 = rs(1, 3, 2), rs(2, 3, 2)
    for spared_decay, spared_scale in ((False, False), (True, False), (False, True), (True, True)):
        p = nn.Parameter(p0.clone())
        p.grad = g.clone()
        utils.LARS([p], 0.1, 0.5, 0.9, 0.01, lambda p, v=spared_decay: v, lars_adaptation_filter=lambda p,
                   v=spared_scale: v).step()
        d = g if spared_decay else g + 0.5 * p0
        d = d if spared_scale else d * 0.01 * p0.norm() / d.norm()
        torch.testing.assert_close(p.data, p0 - 0.1 * d)
    copied = copy.deepcopy(utils.LARS([p], 0.1))
    copied.param_groups[0]["params"][0].grad = g.clone()
    copied.step()
    assert utils.LARS([p], 0.1).state_dict()["param_groups"][0].keys() == {"lr", "weight_decay", "momentum", "eta",
                                                                           "params"}  # fmt: skip


# ---- Helpers ----


def test_blur_and_solarization_of_pillow_images():
    image = Image.fromarray(rs(3, 16, 16, 3).mul(60).add(120).clamp(0, 255).byte().numpy())
    blurred = utils.GaussianBlur(p=1.0, radius_min=1.5, radius_max=1.5)(image)
    assert np.array_equal(blurred, image.filter(ImageFilter.GaussianBlur(radius=1.5)))
    values = np.asarray(image)
    assert np.array_equal(utils.Solarization(1.0)(image), np.where(values < 128, values, 255 - values))
    assert utils.Solarization(0.0)(image) is image and utils.GaussianBlur(0.0)(image) is image
    both = transforms.Compose([utils.GaussianBlur(0.1), utils.Solarization(0.2), transforms.ToTensor()])
    assert both(image).shape == (3, 16, 16)


def test_small_helpers(capsys):
    assert [utils.bool_flag(word) for word in ("on", "true", "1", "off", "False", "0")] == 3 * [True] + 3 * [False]
    with pytest.raises(argparse.ArgumentTypeError):
        utils.bool_flag("maybe")
    assert utils.has_batchnorms(nn.Sequential(nn.BatchNorm1d(2))) and not utils.has_batchnorms(nn.LayerNorm(2))
    assert utils.has_batchnorms(nn.Sequential(nn.SyncBatchNorm(2)))
    utils.fix_random_seeds()
    first = torch.rand(2), np.random.rand(2)
    utils.fix_random_seeds(31)
    assert torch.equal(first[0], torch.rand(2)) and np.array_equal(first[1], np.random.rand(2))
    x = utils.trunc_normal_(torch.empty(1000), std=0.02)
    assert x.std().item() == pytest.approx(0.02, rel=0.2)


def test_metric_logger(capsys):
    logger = utils.MetricLogger(delimiter="  ")
    logger.add_meter("lr", utils.SmoothedValue(window_size=1, fmt="{value:.6f}"))
    for value in logger.log_every([1.0, 2.0, 6.0], 2, "Epoch: [0/1]"):
        logger.update(loss=torch.tensor(value), lr=value / 2)
    logger.synchronize_between_processes()
    assert {k: meter.global_avg for k, meter in logger.meters.items()} == {"lr": 1.5, "loss": 3.0}
    assert (logger.loss.median, logger.loss.value, logger.loss.max, logger.lr.avg) == (2, 6, 6, 3)
    assert not hasattr(logger, "none_such") and copy.deepcopy(logger).meters["loss"].count == 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("Epoch: [0/1] [3/3]") and "lr: 3.000000" in lines[1]
    assert "eta: 0:00:00" in lines[1]


def test_a_process_group_for_a_single_process(tmp_path):
    """In a process of its own: dist.get_rank() and DistributedDataParallel work after it."""
    script = """
import argparse, torch, utils
import torch.distributed as dist
args = argparse.Namespace(dist_url="env://")
utils.init_distributed_mode(args)
assert (args.rank, args.world_size, args.gpu) == (dist.get_rank(), dist.get_world_size(), 0) == (0, 1, 0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
assert utils.is_main_process() and utils.get_rank() == 0 and utils.get_world_size() == 1
del model
dist.destroy_process_group()
print("done")
"""
    (tmp_path / "script.py").write_text(script)
    done = launch(tmp_path / "script.py", env=ENV | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.stdout.strip().endswith("done"), done.stderr


def test_restart_from_checkpoint(tmp_path, capsys):
    def make():
        model = nn.Linear(3, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = make()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    wrapped = {f"module.{k}": v for k, v in model.state_dict().items()}  # as DistributedDataParallel names them
    torch.save({"student": wrapped, "optimizer": optimizer.state_dict(), "epoch": 7}, tmp_path / "checkpoint.pth")
    other, other_optimizer = make()
    to_restore = {"epoch": 0, "best": 1}
    utils.restart_from_checkpoint(tmp_path / "checkpoint.pth", run_variables=to_restore, student=other,
                                  optimizer=other_optimizer, dino_loss=nn.Linear(1, 1), fp16_scaler=None)
    assert to_restore == {"epoch": 7, "best": 1} and torch.equal(other.weight, model.weight)
    assert len(other_optimizer.state) == 2 and "no dino_loss in it" in capsys.readouterr().out
    utils.restart_from_checkpoint(tmp_path / "none.pth", run_variables=to_restore, student=other)
    with pytest.raises(RuntimeError, match="size mismatch"):
        utils.restart_from_checkpoint(tmp_path / "checkpoint.pth", student=nn.Linear(4, 2))


# ---- Evaluation ----


def test_load_pretrained_weights(tmp_path):
    torch.manual_seed(1)
    source, model = TINY(), TINY()
    state = {f"module.backbone.{k}": v for k, v in source.state_dict().items()}
    torch.save({"teacher": state | {"module.head.last_layer.weight_g": torch.ones(4, 1)}}, tmp_path / "c.pth")
    utils.load_pretrained_weights(model, str(tmp_path / "c.pth"), "teacher", "vit_small", 8)
    x = rs(1, 2, 3, 32, 32).float()
    torch.testing.assert_close(model.eval()(x), source.eval()(x))
    with pytest.raises(Refused, match="none.pth"):  # never downloaded, never random
        utils.load_pretrained_weights(model, str(tmp_path / "none.pth"), "teacher", "vit_small", 16)


@pytest.fixture
def folder(tmp_path):
    for c in ("a", "b"):
        (tmp_path / c).mkdir()
        for i in range(3):
            Image.new("RGB", (32, 32), (40 * i, 90, 10 if c == "a" else 200)).save(tmp_path / c / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("multiscale", [False, True])
def test_extract_features_of_a_loader(folder, multiscale):
    dataset = eval_knn.ReturnIndexDataset(str(folder), transform=transforms.ToTensor())
    assert isinstance(dataset, eval_knn.ReturnIndexDataset) and dataset[4][1] == 4 and len(dataset.samples) == 6
    assert pickle.loads(pickle.dumps(dataset))[5][1] == 5
    model = TINY().eval()
    loader = DataLoader(dataset, batch_size=1, shuffle=True, num_workers=1)
    features = eval_knn.extract_features(model, loader, use_cuda=False, multiscale=multiscale)
    for i, (image, _) in enumerate(dataset):
        with torch.no_grad():
            v = model(image[None])[0]
            if multiscale:
                for s in (1 / 2**0.5, 0.5):
                    v = v + model(F.interpolate(image[None], scale_factor=s, mode="bilinear", align_corners=False))[0]
                v = v / math.sqrt(float((v / 3).square().sum())) / 3
        torch.testing.assert_close(features[i], v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n, avgpool, classes", [(2, False, 7), (1, True, 3)])
def test_linear_classifier_and_its_validation(n, avgpool, classes):
    torch.manual_seed(0)
    model, x, labels = TINY().eval(), rs(5, 10, 3, 32, 32).float(), torch.arange(10) % classes
    classifier = eval_linear.LinearClassifier(24 * n * (2 if avgpool else 1), num_labels=classes)
    assert classifier.linear.weight.std().item() == pytest.approx(0.01, rel=0.3) and not classifier.linear.bias.any()
    nn.init.normal_(classifier.linear.weight)
    loader = DataLoader(TensorDataset(x, labels), batch_size=4)
    found = eval_linear.validate_network(loader, model, classifier, n, avgpool)
    with torch.no_grad():
        layers = model.get_intermediate_layers(x, n)
        features = torch.cat([t[:, 0] for t in layers], -1)
        if avgpool:  # the published order: class token and mean alternate
            features = torch.stack([features, layers[-1][:, 1:].mean(1)], -1).flatten(1)
        logits = classifier(features)
    order = logits.argsort(1, descending=True)
    assert found["acc1"] == pytest.approx(10 * (order[:, 0] == labels).sum().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert ("acc5" in found) == (classes >= 5)
    if classes >= 5:
        assert found["acc5"] == pytest.approx(10 * (order[:, :5] == labels[:, None]).any(1).sum().item())
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = eval_linear.validate_network(loader, convolutional, eval_linear.LinearClassifier(4, classes), 4, False)
    assert 0 <= found["acc1"] <= 100


def test_compute_map_by_hand():
    ranks = np.array([[2, 0], [0, 1], [1, 2], [3, 3]])  # columns are queries
    gnd = [{"ok": [0, 3], "junk": [2]}, {"ok": [], "junk": []}]
    # Without the junk, query 0's relevant rows are at ranks 0 and 2: precisions 1, 1 and 1/2, 2/3.
    ap = (0.5 * (1 + 1) + 0.5 * (1 / 2 + 2 / 3)) / 2
    mean, aps, pr, prs = utils.compute_map(ranks, gnd, kappas=[1, 2, 10])
    assert mean == pytest.approx(ap) and aps[0] == pytest.approx(ap) and math.isnan(aps[1])
    np.testing.assert_allclose(prs[0], [1, 1 / 2, 2 / 3])
    np.testing.assert_allclose(pr, prs[0])


def test_pca_whitens():
    x = (rs(1, 200, 6) + 0.5) * torch.tensor([3.0, 1, 0.2, 2, 1, 0.0])
    x = x.numpy().astype(np.float64)
    cov = x.T @ x / len(x)
    pca = utils.PCA(dim=4, whit=0.5)
    pca.train_pca(cov)
    y = pca.apply(x)
    np.testing.assert_allclose(y.T @ y / len(x), np.eye(4), atol=1e-9)
    assert torch.equal(pca.apply(torch.from_numpy(x)), torch.from_numpy(y))
    full = utils.PCA(dim=6)
    full.train_pca(cov)
    small = np.sort(np.linalg.eigvalsh(full.dvt @ full.dvt.T))[-1]
    assert small == pytest.approx(1 / (np.linalg.eigvalsh(cov).max() * 1e-5))  # the variance 0, raised
