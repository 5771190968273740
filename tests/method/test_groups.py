"""Parameter groups, the schedules that they follow, and clipping by network."""

import re

import numpy as np
import pytest
import torch
from dinov2_figures import figures, files, names_of
from torch import nn

import utils
from method.groups import multipliers, parameter_groups, set_lr_and_wd
from vision_transformer import DINOHead

# Of README.md beside the figures; the files have no entry for it, so that those of other files follow from the figures.
FACTORS = {"lr_decay_vits14.json": (0.9, 0.2), "lr_decay_vits16_4_chunks.json": (0.95, 0.5)}


def block_number(name: str) -> int:
    return int(re.fullmatch(r"blocks\.(?:\d+\.)?(\d+)\.[a-z].*", name)[1])


def parameters(names) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(1)) for name in names}


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("name", files("lr_decay_*.json"))
def test_figures(name, wrapper):
    facts = names_of(name)
    backbone = facts["backbone"]
    last = max((key for key in backbone if key.endswith("attn.qkv.weight")), key=block_number)
    decay = backbone[last][0]
    patch_embed = backbone["patch_embed.proj.weight"][0] / backbone["pos_embed"][0]
    assert (decay, patch_embed) == pytest.approx(FACTORS.get(name, (decay, patch_embed)))
    decay, patch_embed = FACTORS.get(name, (decay, patch_embed))
    found = multipliers([wrapper + key for key in backbone], decay, patch_embed)
    for key, (lr, wd, last) in backbone.items():
        assert found[wrapper + key] == (pytest.approx(lr, rel=1e-9), wd, last), key
    assert multipliers(facts["dino_head"]) == {key: tuple(value) for key, value in facts["dino_head"].items()}

    networks = {"backbone": parameters(backbone), "dino_head": parameters(facts["dino_head"])}
    groups = parameter_groups(networks, decay, patch_embed)
    for network, named in networks.items():
        own = [group for group in groups if group["network"] == network]
        assert len(own) == facts[f"{network}_fused_groups"]
        assert sum(len(group["params"]) for group in own) == len(named)
    for group in groups:
        for parameter in group["params"]:
            key = next(k for k, p in networks[group["network"]].items() if p is parameter)
            assert facts[group["network"]][key] == [
                pytest.approx(group["lr_multiplier"]), group["wd_multiplier"], group["is_last_layer"]]


def test_layer_decay_leaves_heads_alone_and_frozen_parameters_out():
    head = DINOHead(8, 16, hidden_dim=8, bottleneck_dim=4, norm_last_layer=False)
    head.last_layer.weight_g.requires_grad = False
    head.blocks = nn.ModuleList([nn.Linear(2, 2)])  # a name as the backbone has it
    groups = parameter_groups({"ibot_head": head}, layer_decay=0.5)
    assert {group["lr_multiplier"] for group in groups} == {1.0}
    assert sum(len(group["params"]) for group in groups) == len(list(head.parameters())) - 1


def test_frozen_last_layers_keep_their_moments():
    head = DINOHead(8, 16, hidden_dim=8, bottleneck_dim=4, norm_last_layer=False)
    optimizer = torch.optim.AdamW(parameter_groups({"dino_head": head}))
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    set_lr_and_wd(optimizer, 0.1, 0.2, last_layer_lr=0.0)
    head(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    for name, p in head.named_parameters():
        assert torch.equal(p, before[name]) == ("last_layer" in name), name
        assert optimizer.state[p]["exp_avg"].any() or not p.grad.any()
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0.2 * group["wd_multiplier"]


@pytest.mark.parametrize("file", files("schedules*.npz"))
def test_schedule_figures(file):
    config, expected = figures(file)
    for name, (base, final, total, warmup, start, freeze) in config["base_final_total_warmup_start_freeze"].items():
        values = utils.cosine_scheduler(base, final, total, 1, warmup, start, freeze)
        assert len(values) == total
        np.testing.assert_allclose(values, expected[name][:total], rtol=1e-9, atol=1e-18)
    with pytest.raises(ValueError, match="longer than the run of 5"):
        utils.cosine_scheduler(1, 0, 5, 10, 3, 0, 3)


def test_clipping_by_network_is_torchs():
    networks = [nn.Linear(5, 7), nn.Linear(3, 2)]
    for scale, network in zip((1e-3, 10.0), networks, strict=True):
        for p in network.parameters():
            p.grad = scale * torch.randn_like(p)
    expected = [[p.grad.clone() for p in network.parameters()] for network in networks]
    for network, grads in zip(networks, expected, strict=True):
        norms = utils.clip_gradients(network, 3.0, per_tensor=False)
        total = torch.cat([g.flatten() for g in grads]).norm()
        torch.testing.assert_close(torch.stack(norms).norm(), total)
        factor = min(1.0, 3.0 / (total.item() + 1e-6))
        for p, g in zip(network.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, factor * g)
