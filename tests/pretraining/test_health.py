import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import utils
from method.rank import effective_rank
from method.sinkhorn import sinkhorn_knopp
from method.targets import centred
from pretraining import failures, logs
from pretraining.health import collapse, few_directions, few_directions_dinov2, health, health_dinov2
from pretraining.meters import Meters
from weights import checkpoints


def loss_of(K, temp=0.04):
    return utils.DINOLoss(K, 2, temp, temp, 0, 1)


def test_health_against_the_definitions():
    torch.manual_seed(0)
    teacher, features = torch.randn(6, 16), torch.randn(6, 5)
    seen = health(teacher, features, torch.tensor(3.0), loss_of(16, 0.5), 0)
    q = np.exp(teacher.double().numpy() / 0.5)
    q /= q.sum(1, keepdims=True)
    entropy = -(q * np.log(q)).sum(1).mean()
    assert seen["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert seen["kl"].item() == pytest.approx(3 - entropy, rel=1e-5)
    assert seen["prototypes_used"] == len(set(q.argmax(1)))
    unit = features / features.norm(dim=1, keepdim=True)
    assert seen["feature_std"].item() == pytest.approx(unit.std(0).mean().item() * math.sqrt(5), rel=1e-5)


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.eye(7)).item() == pytest.approx(7, rel=1e-3)
    assert effective_rank(torch.ones(20, 9)).item() == pytest.approx(1, rel=1e-3)


def test_the_three_ways_of_a_teacher():
    K, n = 64, 32
    uniform = health(torch.zeros(n, K), torch.randn(n, 4), torch.tensor(4.0), loss_of(K), 0)
    same = torch.nn.functional.one_hot(torch.zeros(n, dtype=torch.long), K).float()
    one_hot = health(same * 10, torch.randn(n, 4), torch.tensor(4.0), loss_of(K), 0)
    different = torch.nn.functional.one_hot(torch.arange(n), K).float()
    healthy = health(different * 10, torch.randn(n, 4), torch.tensor(4.0), loss_of(K), 0)

    def verdict(h):
        used = h["prototypes_used"].item()
        return collapse(h["entropy"].item(), math.log(K), used) or few_directions(h["feature_rank"].item(), used, n)

    assert "uniform" in verdict(uniform) and "--teacher_temp" in verdict(uniform)
    assert "one prototype" in verdict(one_hot) and "--teacher_temp" in verdict(one_hot)
    assert verdict(healthy) is None
    groups = torch.arange(n) % 2  # features on a line, two prototypes, and an entropy as in a healthy run
    soft = torch.nn.functional.one_hot(groups, K).float() * 0.1
    line = health(soft, groups[:, None] * torch.ones(4) + 1e-3 * torch.randn(n, 4), torch.tensor(4.0), loss_of(K), 0)
    assert 0.1 < line["entropy"].item() / math.log(K) < 0.99
    assert "directions" in verdict(line) and "--lr" in verdict(line)


@pytest.mark.parametrize("groups", [0, 2], ids=["line", "two clusters"])
@pytest.mark.parametrize("of_patches", [False, True], ids=["class tokens", "patch tokens"])
@pytest.mark.parametrize("sinkhorn", [True, False], ids=["sinkhorn", "centring"])
def test_few_directions_that_use_many_prototypes(groups, of_patches, sinkhorn):
    """Sinkhorn-Knopp spreads even tokens on a line over the prototypes; so the rank alone tells."""
    torch.manual_seed(0)
    n, width, prototypes = 64, 16, torch.randn(16, 128)
    place = torch.arange(n) % groups if groups else torch.randn(n)
    narrow = place[:, None] * torch.randn(width) + 0.02 * torch.randn(n, width)
    healthy = torch.randn(n, width)
    tokens, patches = (healthy, narrow) if of_patches else (narrow, healthy)

    def figures(tokens, patches):
        scores = [F.normalize(x) @ F.normalize(prototypes, dim=0) for x in (tokens, patches)]
        class_targets, patch_targets = (sinkhorn_knopp(x, 0.04) if sinkhorn else centred(x, torch.zeros(128), 0.04)
                                        for x in scores)
        parts = {name: torch.tensor(1.0) for name in ("dino_global", "dino_local", "ibot")} | {
            "class_targets": class_targets, "patch_targets": patch_targets, "features": tokens,
            "patch_features": patches}
        return {k: v.item() for k, v in health_dinov2(parts, {"dino": 2.0, "ibot": 1.0}).items()}

    means = figures(tokens, patches)
    if sinkhorn:
        assert means["patch_prototypes_used" if of_patches else "prototypes_used"] >= 4
    line = few_directions_dinov2(means, sinkhorn, n, False)
    if sinkhorn or of_patches:
        assert "directions" in line and ("patch tokens" in line) == of_patches
    else:
        assert line is None  # `few_directions` judges them with the number of prototypes
    assert not few_directions_dinov2(figures(healthy, healthy), sinkhorn, n, False)
    assert not few_directions_dinov2(means, sinkhorn, n, True)  # the learning rate's warm-up
    assert not few_directions_dinov2(means, sinkhorn, 6, False)
    untrained = {k: v for k, v in means.items() if k != "ibot_left"}
    assert not (of_patches and few_directions_dinov2(untrained, sinkhorn, n, False))


def test_what_few_crops_or_a_new_network_cannot_show():
    assert few_directions(1.5, 3, 8) and not few_directions(1.5, 3, 6)
    assert collapse(0.0, math.log(64), 1, rows=4) and not collapse(0.0, math.log(64), 1, rows=2)  # of one image
    uniform = math.log(64), math.log(64), 1
    assert collapse(*uniform) and not collapse(*uniform, warming_up=True)


def test_meters_average_and_go_round():
    meters = Meters()
    for value in (1.0, 2.0, 6.0):
        meters.update(loss=torch.tensor(value), lr=0.5)
    meters.update(rank=4.0)
    copy = Meters()
    copy.load_state_dict(meters.state_dict(), torch.device("cpu"))
    assert copy.means() == {"loss": 3.0, "lr": 0.5, "rank": 4.0}


def test_watch_remembers_the_first_bad_step(tmp_path):
    network, optimizer = torch.nn.Linear(2, 2), SimpleNamespace()
    watch = failures.Watch(network, network, loss_of(4), optimizer, np.full(9, 0.9), lambda step: [],
                           {"steps_per_epoch": 5, "dtype": "None"}, tmp_path / "failure.pt", torch.device("cpu"))
    for step, loss, norms in ((4, 1.0, [1.0]), (5, 2.5, [1.0, math.inf]), (6, math.nan, [1.0])):
        watch.begin(step)
        watch.judge({"loss": torch.tensor(loss)}, torch.tensor(norms))
        if step == 4:
            watch.check("checkpoint.pth")
            assert not optimizer.found_inf and not watch.beginnings
    assert optimizer.found_inf
    with pytest.raises(failures.NonFinite, match=r"step 5: .*loss 2.5 by rank.*checkpoint.pth.*--lr.*failure.pt") as e:
        watch.check("checkpoint.pth")
    assert "--precision" not in str(e.value)  # float32 already
    state = torch.load(tmp_path / "failure.pt", weights_only=True)
    assert (state["step"], state["epoch"], state["rank"]) == (5, 1, 0)


@pytest.mark.parametrize("dtype, remedy", [("float16", "bf16"), ("bfloat16", "fp32")])
def test_updates_that_a_scaler_skips_without_end_stop_the_run(tmp_path, dtype, remedy):
    network = torch.nn.Linear(2, 2)
    watch = failures.Watch(network, network, loss_of(4), None, np.full(99, 0.9), lambda step: [],
                           {"steps_per_epoch": 99, "dtype": f"torch.{dtype}"}, tmp_path / "failure.pt",
                           torch.device("cpu"))
    for step in range(40):  # 19 steps until a scale fits, one that is good, and 20 that are not
        watch.begin(step)
        skipped = watch.judge({"loss": torch.tensor(2.5)}, [torch.tensor(1.0 if step == 19 else math.inf)])["skipped"]
        assert skipped == (step != 19)
        if step % 10 == 8:
            watch.check("checkpoint.pth")
    with pytest.raises(failures.NonFinite, match=rf"step 39: .* 19 steps before.*loss 2.5.*--precision {remedy}"):
        watch.check("checkpoint.pth")
    assert checkpoints.read(tmp_path / "failure.pt")["step"] == 39


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"ste')
    logs.drop_lines_from(log, 2)
    assert log.read_text() == '{"step": 0}\n{"step": 1}\n'
