"""DINOv2's backbone and heads against the published figures: tests/golden/dinov2, or the folder DINOV2_GOLDEN."""

import math
import re

import numpy as np
import pytest
import torch
from dinov2_figures import figures, files, fill, mask, names_of, rs
from torch import nn

from protocols import linear
from vision_transformer import VITS, Block, DINOHead, DropPath, VisionTransformer
from weights import layouts
from weights.backbones import load_weights_into


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-9, atol=1e-11)


def network(config: dict, **options) -> VisionTransformer:
    vit = VisionTransformer(
        img_size=config["img_size"], patch_size=config["patch"], embed_dim=config["width"], depth=config["depth"],
        num_heads=config["heads"], mlp_ratio=config["mlp_ratio"], qkv_bias=True, method="dinov2",
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6), init_values=1e-5 if config["layerscale"] else None,
        ffn_layer=config["ffn"], num_register_tokens=config["registers"], **options)
    return fill(vit).eval()


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {k: list(v.shape) for k, v in module.state_dict().items()}


def options_of(sizes: dict[str, list[int]]) -> tuple[int, dict]:
    """Patch size, and the other options of the network with tensors of these shapes."""
    (width, _, _, patch), positions = sizes["patch_embed.proj.weight"], sizes["pos_embed"][1]
    return patch, {
        "img_size": patch * math.isqrt(positions - 1), "method": "dinov2",
        "num_register_tokens": sizes.get("register_tokens", [1, 0, width])[1],
        "init_values": 1e-5 if any(k.endswith("ls1.gamma") for k in sizes) else None,
        "ffn_layer": "swiglu" if any(k.endswith("mlp.w12.weight") for k in sizes) else "mlp"}


# ---- Names ----


@pytest.mark.parametrize("name", files("state_dict_*.json"))
def test_names_and_shapes(name):
    golden = names_of(name)
    arch, stated = re.match(rf"state_dict_({'|'.join(VITS)})(\d+)", name).groups()
    patch, options = options_of(golden["without_registers"])
    added, count = next((key, int(m[1])) for key in golden if (m := re.fullmatch(r"with_(\d+)_registers_added", key)))
    with torch.device("meta"):
        plain, registers = (VITS[arch](patch, **options | {"num_register_tokens": n}) for n in (0, count))
    assert shapes(plain) == golden["without_registers"]
    assert shapes(registers) == golden["without_registers"] | golden[added]
    first = golden["order_with_registers"]
    assert list(registers.state_dict())[: len(first)] == first
    assert sum(p.numel() for p in plain.parameters()) == golden["parameters"]
    assert (plain.num_heads, plain.n_blocks, plain.patch_size) == (golden["heads"], golden["blocks"], int(stated))
    with torch.device("meta"):
        assert "mask_token" not in VITS[arch](patch).state_dict()  # DINO's keys stay as published


HEADS = {
    "default_384_65536": dict(in_dim=384, out_dim=65536), "batch_norm": dict(in_dim=384, out_dim=65536, use_bn=True),
    "vitg_1536_131072": dict(in_dim=1536, out_dim=131072, bottleneck_dim=384),
    "one_layer": dict(in_dim=384, out_dim=65536, nlayers=1), "two_layers": dict(in_dim=384, out_dim=65536, nlayers=2),
    "no_bias": dict(in_dim=384, out_dim=65536, mlp_bias=False),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_names_and_shapes_of_heads(name):
    with torch.device("meta"):
        assert shapes(DINOHead(**HEADS[name], norm_last_layer=False)) == names_of("head_state_dict.json")[name]


@pytest.mark.parametrize("name", files("teacher_checkpoint_*.json"))
def test_checkpoint_of_a_published_run(name, tmp_path):
    """Blocks grouped in chunks, or not; the heads beside the backbone."""
    teacher = {k: torch.randn(v) for k, v in names_of(name)["teacher"].items()}
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": teacher}, path)
    heads = layouts.head_states(layouts.read(path), "teacher")
    for head in ("dino_head", "ibot_head"):
        expected = {k.removeprefix(f"{head}."): v for k, v in teacher.items() if k.startswith(head)}
        assert heads.get(head, {}).keys() == expected.keys()
        assert all(torch.equal(v, expected[k]) for k, v in heads.get(head, {}).items())
    width = teacher["backbone.mask_token"].shape[1]
    blocks = {re.match(r"backbone\.blocks\.(\d+\.)?(\d+)\.[a-z]", k)[2] for k in teacher if "e.blocks." in k}
    patch, options = options_of({k.removeprefix("backbone."): list(v.shape) for k, v in teacher.items()})
    model = VisionTransformer(
        patch_size=patch, embed_dim=width, depth=len(blocks), num_heads=3, qkv_bias=True, **options)
    load_weights_into(model, str(path))
    for key, value in model.state_dict().items():
        chunk = f"backbone.{key}"
        if match := re.match(r"blocks\.(\d+)\.(.*)", key):
            chunk = next(k for k in teacher if re.fullmatch(rf"backbone\.blocks\.(\d+\.)?{match[1]}\.{match[2]}", k))
        assert torch.equal(value, teacher[chunk])


# ---- Figures ----


@pytest.mark.parametrize("name", files("vit_*.npz"))
def test_tokens(name):
    config, golden = figures(name)
    side, every, seed = config["img_size"], config["every"], config["seed"]
    inputs = {"native": rs(seed, 2, 3, side, side), "other": rs(seed + 1, 2, 3, *config["other"])}
    interpolation = {"native": {}, "other_offset": {"interpolate_antialias": False, "interpolate_offset": 0.1},
                     "other_antialias": {"interpolate_antialias": True, "interpolate_offset": 0.0}}
    for case, options in interpolation.items():
        model, x = network(config, **options), inputs[case.split("_")[0]]
        patches = (x.shape[2] // config["patch"]) * (x.shape[3] // config["patch"])
        drawn = mask(seed + (2 if case == "native" else 3), 2, patches, config["mask_share"])
        for suffix, masks in (("", None), ("_masked", drawn)):
            with torch.no_grad():
                out = model.forward_features(x, masks)
            for key, value in {
                "cls": out["x_norm_clstoken"], "registers": out["x_norm_regtokens"][..., :16],
                "patches": out["x_norm_patchtokens"][:, ::every], "patch_sums": out["x_norm_patchtokens"].sum(-1),
                "prenorm_sums": out["x_prenorm"].sum(-1),
            }.items():  # fmt: skip
                if f"{case}{suffix}/{key}" in golden:
                    close(value, golden[f"{case}{suffix}/{key}"])
            assert out["masks"] is masks and f"{case}{suffix}/cls" in golden
    model = network(config)
    with torch.no_grad():
        layers = model.get_intermediate_layers(inputs["native"], 2, return_class_token=True)
        grid = model.get_intermediate_layers(inputs["native"], [config["depth"] - 1], reshape=True, norm=False)[0]
    for i, (patch_tokens, class_token) in enumerate(layers):
        close(class_token, golden[f"inter{i}/cls"])
        close(patch_tokens.mean(1), golden[f"inter{i}/patch_means"])
    close(grid[:, 0], golden["inter_reshaped_no_norm/first_channel"])


@pytest.mark.parametrize("name", files("linear_input*.npz"))
def test_input_of_linear_classifiers(name):
    config, golden = figures(name)
    model, side = network(config), config["img_size"]
    most = max(n for n, _ in config["cases"])
    with torch.no_grad():
        features = linear.probe_features(model, most)(rs(config["seed"], 3, 3, side, side))
    for n, avgpool in config["cases"]:
        found = linear.columns(features, most, n, avgpool, linear.interleaves(model))
        close(found, golden[f"blocks{n}_avgpool{int(avgpool)}"])


@pytest.mark.parametrize("name", files("pos_embed_*.npz"))
def test_interpolated_positions(name):
    config, golden = figures(name)
    kinds = {"offset": (False, 0.1), "antialias": (True, 0.0), "plain": (False, 0.0)}
    for kind, (antialias, offset) in kinds.items():
        model = fill(VisionTransformer(config["side"] * config["patch"], config["patch"], embed_dim=config["dim"],
                                       depth=0, interpolate_antialias=antialias, interpolate_offset=offset))
        for height, width in config["sizes"]:
            n = (height // config["patch"]) * (width // config["patch"])
            positions = model.interpolate_pos_encoding(torch.zeros(1, 1 + n, config["dim"]), height, width)[0]
            close(positions[:: config["every"], :4], golden[f"{kind}_{height}x{width}"])
            close(positions.sum(0), golden[f"{kind}_{height}x{width}_sums"])


@pytest.mark.parametrize("checkpointing", [None, "blocks", "layers"])
@pytest.mark.parametrize("name", files("drop_path_*.npz"))
def test_drop_path_on_a_subset(name, checkpointing, monkeypatch):
    config, golden = figures(name)
    model = network(config, drop_path_rate=config["rate"], drop_path_uniform=config["uniform"], drop_path_subset=True)
    kept = iter(sorted(k for k in golden if k.startswith("kept")))
    draws = []
    real = DropPath.kept_rows

    def stored(self, n, device):
        rows = golden[next(kept)]
        draws.append(n / len(rows))
        assert real(self, n, device).shape == rows.shape
        return rows

    monkeypatch.setattr(DropPath, "kept_rows", stored)
    if checkpointing:
        model.set_grad_checkpointing(layers=checkpointing == "layers")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    close(torch.tensor(rates, dtype=torch.float64), golden["rates"])
    batches = [rs(config["seed"] + i, n, 3, side, side) for i, (n, side) in enumerate(config["batches"])]
    for i, tokens in enumerate(model.train()(batches, all_tokens=True)):
        close(tokens[:, 0], golden[f"cls{i}"])
        close(tokens[:, 1 + config["registers"] :].sum(-1), golden[f"patch_sums{i}"])
    close(torch.tensor(draws, dtype=torch.float64), golden["scales"])
    assert next(kept, None) is None


@pytest.mark.parametrize("name", files("dino_head*.npz"))
def test_heads(name):
    config, golden = figures(name)
    sizes = {k: v for k, v in config.items() if k not in ("seed", "rows")}
    head = fill(DINOHead(norm_last_layer=False, **sizes)).train()
    x = rs(config["seed"], config["rows"], config["in_dim"]).requires_grad_()
    out = head(x)
    close(out, golden["out"])
    (out * rs(config["seed"] + 1, *out.shape)).sum().backward()
    close(x.grad, golden["grad_input"])
    close(head.last_layer.weight_g.grad, golden["grad_weight_g"])
    close(head.last_layer.weight_v.grad.sum(1), golden["grad_weight_v_sums"])
    assert sorted(k for k, p in head.named_parameters() if p.requires_grad) == sorted(golden["trainable"])


# ---- What the figures do not show ----

SMALL = {"img_size": 56, "patch": 7, "width": 48, "depth": 3, "heads": 3, "mlp_ratio": 4, "layerscale": True,
         "ffn": "swiglu", "registers": 2}  # fmt: skip


def test_a_list_of_batches_equals_separate_passes():
    model = network(SMALL).train()
    batches, masks = [rs(1, 2, 3, 56, 56), rs(2, 3, 3, 28, 28)], [mask(3, 2, 64, 0.4), None]
    together = model(batches, masks, all_tokens=True)
    alone = [model(x, m, all_tokens=True) for x, m in zip(batches, masks, strict=True)]
    for a, b, features in zip(together, alone, model(batches, masks, is_training=True), strict=True):
        assert torch.equal(a, b) and torch.equal(features["x_norm_clstoken"], a[:, 0])
    assert torch.equal(model(batches)[1], model(batches[1]))
    assert torch.equal(model(batches, class_token_only=True)[0], model(batches[0], class_token_only=True))


def test_drawn_rows_are_a_random_subset_and_are_drawn_again_alike():
    """Checkpointed blocks compute their branches twice, for the same samples."""
    drop = DropPath(0.4, subset=True)
    draws = torch.stack([drop.kept_rows(5, torch.device("cpu")) for _ in range(600)])
    assert draws.shape == (600, 3) and all(len(set(row)) == 3 for row in draws.tolist())
    assert all(abs((draws == i).sum() / 600 - 0.6) < 0.1 for i in range(5))
    assert len(DropPath(0.9, True).kept_rows(3, torch.device("cpu"))) == 1
    found = []
    for mode in (None, "blocks", "layers"):
        model = network(SMALL, drop_path_rate=0.5, drop_path_subset=True).train()
        if mode:
            model.set_grad_checkpointing(layers=mode == "layers")
        torch.manual_seed(0)
        out = model([rs(1, 5, 3, 56, 56), rs(2, 6, 3, 28, 28)], [mask(3, 5, 64, 0.4), None], all_tokens=True)
        found.append(torch.autograd.grad(sum(tokens.square().sum() for tokens in out), list(model.parameters())))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-13)
    assert all(g.abs().sum() > 0 for g in found[0])  # the mask token's and the registers' included


def test_dropped_samples_cost_nothing_and_evaluation_keeps_all():
    model, sizes = network(SMALL, drop_path_rate=0.6, drop_path_uniform=True, drop_path_subset=True), []
    model.blocks[1].attn.register_forward_hook(lambda module, given, out: sizes.append(len(given[0])))
    x = rs(1, 5, 3, 28, 28)
    model.train()(x)
    torch.testing.assert_close(model.eval()(x), network(SMALL)(x))
    assert sizes == [2, 5]


def test_class_token_alone_with_a_subset():
    found = []
    for alone in (False, True):
        model = network(SMALL, drop_path_rate=0.5, drop_path_subset=True).train()
        torch.manual_seed(0)
        found.append(model(rs(1, 5, 3, 28, 28), class_token_only=alone))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_the_gated_layer_saves_neither_norm_nor_product():
    kept = {}
    for layers in (False, True):
        model, kept[layers] = network(SMALL).train(), 0
        model.set_grad_checkpointing(layers, layers=layers)

        def count(t, layers=layers):
            kept[layers] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            model(rs(1, 4, 3, 56, 56))
    tokens, hidden, width, blocks = 4 * 67, 128, 48, 3  # silu, product and gate are saved otherwise; and two norms
    weights = sum(p.numel() for b in model.blocks for p in (b.mlp.w12.weight, b.mlp.w3.weight, b.attn.qkv.weight))
    assert kept[False] - kept[True] >= tokens * (2 * hidden + 2 * width) * blocks - weights


@pytest.mark.parametrize("method, std", [("dino", 0.02), ("dinov2", 1e-6)])
def test_initialization(method, std):
    torch.manual_seed(0)
    model = VITS["vit_tiny"](14, img_size=56, depth=1, num_register_tokens=8, init_values=1e-5, method=method)
    for tokens in (model.cls_token, model.register_tokens):
        assert 0.7 < tokens.std() / std < 1.3
    assert abs(model.pos_embed.std() / 0.02 - 1) < 0.1 and abs(model.blocks[0].mlp.fc1.weight.std() / 0.02 - 1) < 0.1
    assert torch.all(model.blocks[0].ls1.gamma == 1e-5) and torch.all(model.blocks[0].attn.qkv.bias == 0)
    if method == "dinov2":
        assert torch.all(model.mask_token == 0)
    for option in ({"method": "dinov3"}, {"ffn_layer": "gated"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} {next(iter(option.values()))}: "):
            VITS["vit_nano"](8, **option)


def test_vit_large_with_a_gated_mlp():
    with torch.device("meta"):
        w12 = VITS["vit_large"](14, ffn_layer="swiglufused").blocks[0].mlp.w12
    assert w12.out_features == 2 * 2736  # the published ViT-L trained from scratch
    assert isinstance(Block(48, 3, init_values=0.0).ls1, nn.Identity)


def test_masks_need_a_mask_token():
    model = VITS["vit_nano"](8, img_size=16, depth=1)
    with pytest.raises(ValueError, match='masks: .* method="dinov2"'):
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, dtype=torch.bool))
