import math

import numpy as np
import pytest
import torch

import utils
from pretraining import metrics


def loss_of(K, temp=0.04):
    return utils.DINOLoss(K, 2, temp, temp, 0, 1)


def test_health_against_the_definitions():
    torch.manual_seed(0)
    teacher, features = torch.randn(6, 16), torch.randn(6, 5)
    seen = metrics.health(teacher, features, torch.tensor(3.0), loss_of(16, 0.5), 0)
    q = np.exp(teacher.double().numpy() / 0.5)
    q /= q.sum(1, keepdims=True)
    entropy = -(q * np.log(q)).sum(1).mean()
    assert seen["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert seen["kl"].item() == pytest.approx(3 - entropy, rel=1e-5)
    assert seen["prototypes_used"] == len(set(q.argmax(1)))
    unit = features / features.norm(dim=1, keepdim=True)
    assert seen["feature_std"].item() == pytest.approx(unit.std(0).mean().item() * math.sqrt(5), rel=1e-5)


def test_effective_rank_counts_equal_directions():
    assert metrics.effective_rank(torch.eye(7)).item() == pytest.approx(7, rel=1e-3)
    assert metrics.effective_rank(torch.ones(20, 9)).item() == pytest.approx(1, rel=1e-3)


def test_the_three_ways_of_a_teacher():
    K, n = 64, 32
    uniform = metrics.health(torch.zeros(n, K), torch.randn(n, 4), torch.tensor(4.0), loss_of(K), 0)
    same = torch.nn.functional.one_hot(torch.zeros(n, dtype=torch.long), K).float()
    one_hot = metrics.health(same * 10, torch.randn(n, 4), torch.tensor(4.0), loss_of(K), 0)
    different = torch.nn.functional.one_hot(torch.arange(n), K).float()
    healthy = metrics.health(different * 10, torch.randn(n, 4), torch.tensor(4.0), loss_of(K), 0)

    def verdict(h):
        return metrics.collapse(h["entropy"].item(), math.log(K), h["prototypes_used"].item())

    assert "uniform" in verdict(uniform) and "--teacher_temp" in verdict(uniform)
    assert "one prototype" in verdict(one_hot) and "--teacher_temp" in verdict(one_hot)
    assert verdict(healthy) is None


def test_meters_average_and_go_round():
    meters = metrics.Meters()
    for value in (1.0, 2.0, 6.0):
        meters.update(loss=torch.tensor(value), lr=0.5)
    meters.update(rank=4.0)
    copy = metrics.Meters()
    copy.load_state_dict(meters.state_dict(), torch.device("cpu"))
    assert copy.means() == {"loss": 3.0, "lr": 0.5, "rank": 4.0}


def test_watch_remembers_the_first_bad_step():
    watch = metrics.FiniteWatch(torch.device("cpu"))
    watch.update(4, torch.tensor(1.0), torch.ones(3))
    watch.check("checkpoint.pth")
    watch.update(5, torch.tensor(2.5), torch.tensor([1.0, math.inf]))
    watch.update(6, torch.tensor(math.nan))
    with pytest.raises(metrics.NonFinite, match=r"step 5: .*loss 2.5 by rank.*checkpoint.pth.*--lr"):
        watch.check("checkpoint.pth")


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text('{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n{"epo')
    metrics.drop_lines_from(log, "epoch", 2)
    assert log.read_text() == '{"epoch": 0}\n{"epoch": 1}\n'
