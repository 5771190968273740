"""Code as people have written it against the published hub models.

tests/test_hub.py runs it in its own process and folder: without the project on the path, without a network, and beside
modules with the names of this project's modules.
"""

import copy
import io
import os
import pickle
import socket
import sys
import types

import data
import metrics
import pytest
import torch
import torch.nn.functional as F

import utils
import vision_transformer

HUB = os.environ["HUB"]
torch.set_num_threads(1)


def no_network(*args):
    raise OSError("no network")


socket.socket.connect = socket.getaddrinfo = no_network


@pytest.fixture(scope="module")
def random_model():
    torch.manual_seed(0)
    return torch.hub.load(HUB, "dino_vits16", source="local", pretrained=False).eval()


@pytest.fixture
def model(random_model):
    return copy.deepcopy(random_model)


def test_the_modules_are_the_users_own(model):
    for module in (data, metrics, utils, vision_transformer):
        assert module.MINE and sys.modules[module.__name__] is module
    assert HUB not in sys.path and sys.modules[type(model).__module__].__file__.startswith(HUB)


def test_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(OSError, match=r"dino_deitsmall16_pretrain.pth can't be downloaded .*give its path as weights="):
        torch.hub.load(HUB, "dino_vits16", source="local")


def images(height=48, width=64, n=2):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(3))


def test_hook_on_qkv_gives_the_last_attention(model):
    captured = {}
    model._modules["blocks"][-1]._modules["attn"]._modules["qkv"].register_forward_hook(
        lambda module, inputs, output: captured.update(qkv=output))
    attentions = model.get_last_selfattention(images())
    B, H, N = attentions.shape[:3]
    assert (B, H, N) == (2, 6, 13)
    q, k, _ = captured["qkv"].reshape(B, N, 3, H, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * model.blocks[-1].attn.scale).softmax(-1)
    torch.testing.assert_close(weights, attentions)


def test_hooks_on_attn_drop_and_blocks(model):
    x, attentions, tokens = images(), [], []
    expected = model.get_last_selfattention(x), model.get_intermediate_layers(x, n=1)[0]
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda m, i, o: attentions.append(o.detach()))
        block.register_forward_hook(lambda m, i, o: tokens.append(o.detach()))
    out = model(x)
    assert len(attentions) == len(tokens) == 12 and {a.shape for a in attentions} == {(2, 6, 13, 13)}
    torch.testing.assert_close(attentions[-1], expected[0])
    torch.testing.assert_close(model.norm(tokens[-1]), expected[1])
    torch.testing.assert_close(out, expected[1][:, 0])


def test_hooks_on_inputs_and_gradients_of_attn_drop(model):
    captured = {}
    drop = model.blocks[-1].attn.attn_drop
    drop.register_forward_pre_hook(lambda m, i: captured.update(input=i[0]))
    model(images())
    assert captured["input"].shape == (2, 6, 13, 13)
    drop._forward_pre_hooks.clear()
    drop.register_full_backward_hook(lambda m, gi, go: captured.update(gradient=go[0]))
    model(images())[:, 0].sum().backward()
    assert captured["gradient"].shape == (2, 6, 13, 13)


def test_a_module_that_replaces_attn_drop_is_called(model):
    class Recorder(torch.nn.Module):
        def forward(self, attention):
            self.received = attention
            return torch.zeros_like(attention)

    block = model.blocks[-1]
    block.attn.attn_drop = Recorder()
    before = model.get_intermediate_layers(images(), 2)[0]
    model(images())
    assert block.attn.attn_drop.received.shape == (2, 6, 13, 13)
    torch.testing.assert_close(block.attn(before)[0], block.attn.proj.bias.expand_as(before))


def test_intermediate_layers_and_sizes(model):
    layers = model.get_intermediate_layers(images(), n=4)
    assert len(layers) == 4 and {t.shape for t in layers} == {(2, 13, 384)}
    torch.testing.assert_close(torch.cat([t[:, 0] for t in layers], -1)[:, -384:], model(images()))
    assert (model.patch_embed.patch_size, model.num_features, model.embed_dim) == (16, 384, 384)
    assert model.patch_embed.num_patches == 196 and model.pos_embed.shape == (1, 197, 384)
    tokens = model.prepare_tokens(images())
    for block in model.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(model.norm(tokens)[:, 0], model(images()))
    torch.testing.assert_close(model.blocks[-1](tokens, return_attention=True).sum(-1), torch.ones(2, 6, 13))


def test_attention_of_ones_own(model):
    """As DINO's published module: tokens alone go in, tokens and weights come out."""
    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, D)), weights

    x = images()
    expected = model(x), model.get_last_selfattention(x), model(x, class_token_only=True)
    for block in model.blocks:
        y, weights = block.attn(torch.ones(1, 4, 384))
        assert y.shape == (1, 4, 384) and weights.shape == (1, 6, 4, 4)
        block.attn.forward = types.MethodType(forward, block.attn)
    for found, want in zip((model(x), model.get_last_selfattention(x), model(x, class_token_only=True)), expected,
                           strict=True):
        torch.testing.assert_close(found, want)


def test_dense_features_with_a_stride_and_own_positions(model):
    """Overlapping patches, positions from a method that replaces the network's."""
    calls = []

    def positions(self, x, w, h):
        calls.append((tuple(x.shape), w, h))
        rows, columns = 1 + (w - 16) // 8, 1 + (h - 16) // 8
        grid = self.pos_embed[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    model.patch_embed.proj.stride = (8, 8)
    model.interpolate_pos_encoding = types.MethodType(positions, model)
    x = images()
    features = model.get_intermediate_layers(x, n=1)[0]
    assert calls == [((2, 1 + 5 * 7, 384), 48, 64)] and features.shape == (2, 36, 384)
    patches = F.unfold(x, 16, stride=8).transpose(1, 2) @ model.patch_embed.proj.weight.flatten(1).T
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), patches + model.patch_embed.proj.bias], 1)
    tokens = tokens + positions(model, tokens, 48, 64)
    for block in model.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(features, model.norm(tokens))
    keys = []
    model.blocks[9].attn.register_forward_hook(
        lambda m, i, o: keys.append(m.qkv(i[0]).reshape(2, 36, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4)[1]))
    model(x)
    assert keys[0].shape == (2, 6, 36, 64)


def test_positions_with_a_changed_stride_and_the_networks_own_method(model):
    model.patch_embed.proj.stride = (8, 8)
    assert model.get_intermediate_layers(images(), n=1)[0].shape == (2, 36, 384)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model, dtype):
    expected = model(images())
    half = model.to(dtype)(images().to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.1)


@pytest.mark.filterwarnings("ignore")
def test_trace_copy_and_pickle(model):
    x = images(32, 32)
    expected = model(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected, rtol=1e-4, atol=1e-5)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), expected)


# ---- DINOv2 ----


@pytest.fixture(scope="module", params=["dinov2_vits14", "dinov2_vits14_reg"])
def dinov2(request):
    torch.manual_seed(0)
    model = torch.hub.load(HUB, request.param, source="local", pretrained=False, depth=3).eval()
    torch.nn.init.normal_(model.mask_token)
    return model


def test_dictionary_of_features(dinov2):
    x = images(56, 84)
    with torch.no_grad():
        out = dinov2.forward_features(x)
        whole = dinov2(x, is_training=True)
    assert isinstance(out, dict)
    assert set(out.keys()) == {"x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm", "masks"}
    assert "x_norm_patchtokens" in out and "cls" not in out and out["masks"] is None and out.get("cls") is None
    registers = dinov2.num_register_tokens
    assert out["x_norm_patchtokens"].shape == (2, 24, 384) and out["x_norm_regtokens"].shape == (2, registers, 384)
    tokens = dinov2.norm(out["x_prenorm"])
    torch.testing.assert_close(tokens[:, 0], out["x_norm_clstoken"])
    torch.testing.assert_close(tokens[:, 1 + registers :], out["x_norm_patchtokens"])
    torch.testing.assert_close(dinov2(x), out["x_norm_clstoken"])
    for key, value in whole.items():
        assert value is None if key == "masks" else torch.equal(value, out[key])
    assert set({**out}) == set(dict(out)) == set(out.keys())
    class_token, patches, _ = out
    assert patches.shape == (2, 4, 6, 384) and class_token is out["x_norm_clstoken"] is out.cls_token
    grid = out["x_norm_patchtokens"].reshape(2, 56 // dinov2.patch_size, 84 // dinov2.patch_size, dinov2.embed_dim)
    torch.testing.assert_close(grid, patches)
    with pytest.raises(KeyError):
        out["cls"]


def test_masked_patches(dinov2):
    x, masks = images(56, 56), torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 5] = True
    with torch.no_grad():
        plain, masked = dinov2.forward_features(x), dinov2.forward_features(x, masks=masks)
        again = dinov2(x, masks, is_training=True)
        tokens = dinov2.prepare_tokens_with_masks(x, masks) - dinov2.prepare_tokens_with_masks(x)
    assert torch.equal(masked["masks"], masks) and torch.equal(masked["x_prenorm"], again["x_prenorm"])
    assert torch.equal(masked["x_prenorm"][1], plain["x_prenorm"][1])
    assert not torch.allclose(masked["x_norm_clstoken"][0], plain["x_norm_clstoken"][0])
    changed = tokens.abs().sum(-1).nonzero().tolist()
    assert changed == [[0, 1 + dinov2.num_register_tokens + 5]]


def test_layers_of_dinov2(dinov2):
    x = images(56, 84)
    with torch.no_grad():
        out = dinov2.forward_features(x)
        last = dinov2.get_intermediate_layers(x)
        pairs = dinov2.get_intermediate_layers(x, n=2, return_class_token=True)
        chosen = dinov2.get_intermediate_layers(x, [0, 2], reshape=True, return_class_token=True, norm=True)
        raw = dinov2.get_intermediate_layers(x, n=[2], norm=False, return_class_token=True)
        with pytest.raises(ValueError, match="block 3 does not exist"):
            dinov2.get_intermediate_layers(x, [3])
    assert isinstance(last, tuple) and len(last) == 1 and len(pairs) == 2
    torch.testing.assert_close(last[0], out["x_norm_patchtokens"])
    torch.testing.assert_close(pairs[1][1], out["x_norm_clstoken"])
    (first, _), (grid, class_token) = chosen
    assert first.shape == grid.shape == (2, 384, 4, 6) and class_token.shape == (2, 384) and grid.is_contiguous()
    torch.testing.assert_close(grid.flatten(2).transpose(1, 2), out["x_norm_patchtokens"])
    torch.testing.assert_close(dinov2.norm(raw[0][1]), out["x_norm_clstoken"])


def test_sizes_of_dinov2(dinov2):
    assert (dinov2.patch_size, dinov2.embed_dim, dinov2.num_heads, dinov2.n_blocks) == (14, 384, 6, 3)
    assert dinov2.pos_embed.shape == (1, 1370, 384) and len(dinov2.blocks) == dinov2.n_blocks
    x = images(60, 90)  # not divided by the patch: the remainder is cut
    with torch.no_grad():
        torch.testing.assert_close(dinov2(x), dinov2(x[..., :56, :84]))
        positions = dinov2.interpolate_pos_encoding(torch.zeros(1, 25, 384), 56, 84)
    assert positions.shape == (1, 25, 384)
    again = pickle.loads(pickle.dumps(dinov2)), copy.deepcopy(dinov2)
    assert all(torch.equal(other(x), dinov2(x)) for other in again)
    captured = []
    hook = dinov2.blocks[-1].attn.qkv.register_forward_hook(lambda m, i, o: captured.append(o))
    dinov2.get_intermediate_layers(x, 1)
    hook.remove()
    assert captured[0].shape == (2, 25 + dinov2.num_register_tokens, 3 * 384)


def by_hand(model, x):
    """Tokens before each block, and after the last, as code that walks through the blocks computes them."""
    tokens = [model.prepare_tokens_with_masks(x)]
    for block in model.blocks:
        x = tokens[-1]
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        tokens.append(x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))
    return tokens


@torch.no_grad()
def test_blocks_of_dinov2_by_hand(dinov2):
    x, hooked = images(56, 84), []
    hook = dinov2.blocks[-1].attn.register_forward_hook(lambda m, i, o: hooked.append(o))
    tokens = by_hand(dinov2, x)
    torch.testing.assert_close(dinov2.norm(tokens[-1])[:, 0], dinov2(x))
    hook.remove()
    torch.testing.assert_close(hooked[0], hooked[1])
    assert not dinov2.chunked_blocks and dinov2.num_tokens == 1
    for found, want in zip(dinov2._get_intermediate_layers_not_chunked(x, n=2), tokens[-2:], strict=True):
        torch.testing.assert_close(found, want)
    (first, second) = dinov2.forward_features_list([x, x[..., :56]], [None, None])
    assert first["x_norm_patchtokens"].shape == (2, 24, 384) and second["x_norm_patchtokens"].shape == (2, 16, 384)
    assert torch.equal(first["x_prenorm"], dinov2.forward_features(x)["x_prenorm"])


def explicit_attention(self, x, attn_bias=None):
    B, N, D = x.shape
    q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    self.weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
    return self.proj_drop(self.proj((self.weights @ v).transpose(1, 2).reshape(B, N, D)))


@pytest.mark.parametrize("place", ["instance", "class", "module"])
@torch.no_grad()
def test_attention_of_dinov2_of_ones_own(dinov2, place, monkeypatch):
    model, x = copy.deepcopy(dinov2), images(56, 84)
    expected = model(x), model(x, class_token_only=True), model.get_last_selfattention(x)
    kind = type(model.blocks[0].attn)
    if place == "class":
        monkeypatch.setattr(kind, "forward", explicit_attention)
    for block in model.blocks:
        if place == "instance":
            block.attn.forward = types.MethodType(explicit_attention, block.attn)
        elif place == "module":
            block.attn.__class__ = type("Explicit", (kind,), {"forward": explicit_attention})
    torch.testing.assert_close(model(x), expected[0])
    torch.testing.assert_close(model(x, class_token_only=True), expected[1])
    torch.testing.assert_close(model.blocks[-1].attn.weights, expected[2])
    with pytest.raises(ValueError, match="return_attention"):
        model.get_last_selfattention(x)


def test_patch_embedding_of_dinov2(dinov2):
    embed = dinov2.patch_embed
    assert (embed.patch_size, embed.img_size, embed.patches_resolution) == ((14, 14), (518, 518), (37, 37))
    height, width = 56 // embed.patch_size[0], 84 // embed.patch_size[1]
    assert embed(images(56, 84)).shape == (2, height * width, 384) and embed.num_patches == 37 * 37


def test_options_of_dinov2():
    def load(**options):
        return torch.hub.load(HUB, "dinov2_vits14", source="local", pretrained=False, depth=1, **options)

    with torch.device("meta"):
        plain = load().state_dict()
        given = load(img_size=518, patch_size=14, init_values=1.0, ffn_layer="mlp", block_chunks=0, qkv_bias=True,
                     proj_bias=True, ffn_bias=True, num_register_tokens=0, drop_path_uniform=True).state_dict()
        assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in plain.items()}
        assert load(patch_size=16).patch_size == 16 and load(qkv_bias=False).blocks[0].attn.qkv.bias is None
    for option, value in (("block_chunks", 4), ("proj_bias", False), ("ffn_bias", False)):
        with pytest.raises(ValueError, match=f"dinov2_vits14: {option}={value}: .* leave it out"):
            load(**{option: value})
