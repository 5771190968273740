"""torch.hub entries, and code as it is written against the published hub models."""

import argparse
import copy
import importlib
import io
import json
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from golden_weights import GOLDEN

import published
import vision_transformer
from layouts import recognize
from vision_transformer import VisionTransformer, build_backbone

NAMES = ["dino_resnet50", "dino_vitb16", "dino_vitb8", "dino_vits16", "dino_vits8", "dino_xcit_medium_24_p16",
         "dino_xcit_medium_24_p8", "dino_xcit_small_12_p16", "dino_xcit_small_12_p8"]  # fmt: skip


def load(name, **kwargs):
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


@pytest.fixture(scope="module")
def random_model():
    torch.manual_seed(0)
    return load("dino_vits16", pretrained=False).eval()


@pytest.fixture
def model(random_model):
    return copy.deepcopy(random_model)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder in the place of the published address, and an empty cache of downloads."""
    monkeypatch.setattr(published, "BASE", (tmp_path / "site").as_uri())
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

    def put(name, content):
        path = tmp_path / "site" / published.PUBLISHED[name].folder / f"{published.PUBLISHED[name].folder}.pth"
        path.parent.mkdir(parents=True)
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    return put


# ---- Entries ----


def test_entries_are_the_published_ones():
    hubconf = importlib.import_module("hubconf")
    entries = [f for f in dir(hubconf) if callable(getattr(hubconf, f)) and not f.startswith("_")]  # torch.hub.list
    assert sorted(entries) == NAMES == sorted(published.PUBLISHED)
    for name in NAMES:  # what torch.hub.help prints
        row = published.PUBLISHED[name]
        assert f"20-NN {row.knn_top1} %, linear {row.linear_top1} %" in getattr(hubconf, name).__doc__


def test_addresses():
    row = published.PUBLISHED["dino_vits16"]
    assert row.url == ("https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth")
    assert row.linear_url.endswith("/dino_deitsmall16_pretrain/dino_deitsmall16_linearweights.pth")
    assert row.full_checkpoint_url.endswith("/dino_deitsmall16_pretrain_full_checkpoint.pth")


def test_random_networks():
    with torch.device("meta"):
        for name in NAMES:
            row, model = published.PUBLISHED[name], load(name, pretrained=False)
            width = {"vit_small": 384, "vit_base": 768, "resnet50": 2048}.get(row.arch, 384 if "small" in name else 512)
            assert model(torch.zeros(2, 3, 32, 32)).shape == (2, width)
        assert load("dino_vits8", pretrained=False, drop_path_rate=0.1, num_classes=3).head.out_features == 3


def test_published_file_is_downloaded_once(site, model, tmp_path):
    shapes = json.loads((GOLDEN / "backbone_state_dict_shapes.json").read_text())["vit_small_patch16"]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == shapes
    site("dino_vits16", model.state_dict())
    for _ in range(2):
        loaded = load("dino_vits16")
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
        for file in (tmp_path / "site").rglob("*.pth"):
            file.unlink()
    assert loaded.training and next(loaded.parameters()).requires_grad  # as published
    assert os.listdir(tmp_path / "hub" / "checkpoints") == ["dino_deitsmall16_pretrain.pth"]


@pytest.mark.parametrize("name", ["dino_resnet50", "dino_xcit_small_12_p16"])
def test_published_file_of_other_networks(site, name):
    model = load(name, pretrained=False)
    state = model.state_dict()
    if "xcit" in name:
        from test_layouts import published_xcit

        state = published_xcit(state)
    site(name, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")})
    loaded = load(name).state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())


def test_without_a_network_the_message_says_what_to_do(site):
    with pytest.raises(OSError, match=r"dino_deitsmall16_pretrain.pth can't be downloaded .*give its path as weights="):
        load("dino_vits16")


def test_only_whole_files_are_accepted(site, model, tmp_path):
    state = dict(model.state_dict())
    del state["norm.weight"]
    state["norm.extra"] = torch.zeros(1)
    state["cls_token"] = torch.zeros(1, 1, 380)
    site("dino_vits16", state)
    with pytest.raises(ValueError, match="norm.weight is missing; norm.extra has no place; cls_token is .1, 1, 380."):
        load("dino_vits16")
    site("dino_vits8", b"<html>not found</html>")
    with pytest.raises(ValueError, match="not a readable checkpoint .* remove it to download it again"):
        load("dino_vits8")
    torch.save(model.state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="dino_vitb16: .*small.pth holds .* a vit_small, not of a vit_base"):
        load("dino_vitb16", weights=str(tmp_path / "small.pth"))
    with pytest.raises(FileNotFoundError, match="absent.pth: no such file"):
        load("dino_vits16", weights=str(tmp_path / "absent.pth"))


def test_weights_of_ones_own(tmp_path):
    trained, _ = build_backbone("vit_small", 16, img_size=32)
    teacher = {f"backbone.{k}": v for k, v in trained.state_dict().items()} | {"head.mlp.0.weight": torch.zeros(2, 2)}
    torch.save({"teacher": teacher, "student": {}, "args": argparse.Namespace(arch="vit_small")}, tmp_path / "w.pth")
    for where in (str(tmp_path / "w.pth"), (tmp_path / "w.pth").as_uri()):
        loaded = load("dino_vits16", weights=where, pretrained=False)
        assert all(torch.equal(v, trained.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_downloads_do_not_pass_for_each_other(tmp_path, monkeypatch):
    urls = []
    for part in "ab":
        (tmp_path / part).mkdir()
        (tmp_path / part / "checkpoint.pth").write_text(part)
        urls.append((tmp_path / part / "checkpoint.pth").as_uri())
    assert [published.fetch(url, tmp_path / "cache").read_text() for url in urls] == ["a", "b"]
    digest = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # of "a"
    monkeypatch.setattr(published, "SHA256", dict.fromkeys(urls, digest))
    assert published.fetch(urls[0], tmp_path / "cache").read_text() == "a"
    with pytest.raises(ValueError, match=f"SHA-256 3e23e8.* instead of {digest}; remove the file"):
        published.fetch(urls[1], tmp_path / "cache")


# ---- A process with modules of its own ----

PROGRAM = """
import copy, os, pickle, sys
import utils, data, metrics, checkpoint          # the user's own
import torch
model = torch.hub.load(sys.argv[1], "dino_vits16", source="local", pretrained=False).eval()
saved = torch.hub.load(sys.argv[1], "dino_vits16", source="local", weights=sys.argv[2])
assert {m.MINE for m in (utils, data, metrics, checkpoint)} == {1} and sys.modules["utils"] is utils
import layouts, published                         # the user's own, imported later
assert layouts.MINE and published.MINE
if os.path.exists("vision_transformer.py"):
    import vision_transformer
    assert vision_transformer.MINE and type(model).__module__ != "vision_transformer"
x = torch.zeros(1, 3, 32, 32)
assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
torch.save(saved, "model.pt")
print(type(model).__module__)
"""


@pytest.mark.parametrize("theirs_is_called_so_too", [False, True])
def test_modules_of_the_users_own(tmp_path, model, theirs_is_called_so_too):
    names = ["utils", "data", "metrics", "checkpoint", "layouts", "published", "flags"]
    for name in names + ["vision_transformer"] * theirs_is_called_so_too:
        (tmp_path / f"{name}.py").write_text("MINE = 1\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "program.py", str(ROOT), "weights.pth"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    name = run.stdout.split()[-1]
    assert (name == "vision_transformer") != theirs_is_called_so_too
    if not theirs_is_called_so_too:  # a process that has this folder on its path, as this one, unpickles the model
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        assert type(again) is VisionTransformer
        torch.testing.assert_close(again.eval()(torch.zeros(1, 3, 32, 32)), model(torch.zeros(1, 3, 32, 32)))


def test_another_module_that_is_imported_already(monkeypatch):
    theirs = types.ModuleType("vision_transformer")
    monkeypatch.setitem(sys.modules, "vision_transformer", theirs)
    first, second = (load("dino_vits16", pretrained=False) for _ in range(2))
    assert type(first) is type(second) and type(first) is not VisionTransformer
    assert sys.modules["vision_transformer"] is theirs and sys.modules[type(first).__module__].__file__.startswith(
        str(ROOT))  # fmt: skip
    buffer = io.BytesIO()
    torch.save(first, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is type(first)
    monkeypatch.delitem(sys.modules, type(first).__module__)


def test_our_own_module_is_used_where_it_is_imported(model):
    assert type(model) is vision_transformer.VisionTransformer


# ---- Code written against the published models ----


def picture(height=48, width=64, n=2):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(3))


def test_hook_on_qkv_gives_the_last_attention(model):
    seen = {}
    model._modules["blocks"][-1]._modules["attn"]._modules["qkv"].register_forward_hook(
        lambda module, inputs, output: seen.update(qkv=output))
    attentions = model.get_last_selfattention(picture())
    B, H, N = attentions.shape[:3]
    assert (B, H, N) == (2, 6, 13)
    q, k, _ = seen["qkv"].reshape(B, N, 3, H, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * model.blocks[-1].attn.scale).softmax(-1)
    torch.testing.assert_close(weights, attentions)


def test_hooks_on_attn_drop_and_blocks(model):
    x, attentions, tokens = picture(), [], []
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
    seen = {}
    drop = model.blocks[-1].attn.attn_drop
    drop.register_forward_pre_hook(lambda m, i: seen.update(input=i[0]))
    model(picture())
    assert seen["input"].shape == (2, 6, 13, 13)
    drop._forward_pre_hooks.clear()
    drop.register_full_backward_hook(lambda m, gi, go: seen.update(gradient=go[0]))
    model(picture())[:, 0].sum().backward()
    assert seen["gradient"].shape == (2, 6, 13, 13)


def test_a_module_in_the_place_of_attn_drop_is_called(model):
    class Recorder(torch.nn.Module):
        def forward(self, attention):
            self.seen = attention
            return torch.zeros_like(attention)

    block = model.blocks[-1]
    block.attn.attn_drop = Recorder()
    before = model.get_intermediate_layers(picture(), 2)[0]
    model(picture())
    assert block.attn.attn_drop.seen.shape == (2, 6, 13, 13)
    torch.testing.assert_close(block.attn(before)[0], block.attn.proj.bias.expand_as(before))


def test_intermediate_layers_and_sizes(model):
    layers = model.get_intermediate_layers(picture(), n=4)
    assert len(layers) == 4 and {t.shape for t in layers} == {(2, 13, 384)}
    torch.testing.assert_close(torch.cat([t[:, 0] for t in layers], -1)[:, -384:], model(picture()))
    assert (model.patch_embed.patch_size, model.num_features, model.embed_dim) == (16, 384, 384)
    assert model.patch_embed.num_patches == 196 and model.pos_embed.shape == (1, 197, 384)
    tokens = model.prepare_tokens(picture())
    for block in model.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(model.norm(tokens)[:, 0], model(picture()))
    torch.testing.assert_close(model.blocks[-1](tokens, return_attention=True).sum(-1), torch.ones(2, 6, 13))


def test_dense_features_with_a_stride_and_positions_of_ones_own(model):
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
    x = picture()
    found = model.get_intermediate_layers(x, n=1)[0]
    assert calls == [((2, 1 + 5 * 7, 384), 48, 64)] and found.shape == (2, 36, 384)
    patches = F.unfold(x, 16, stride=8).transpose(1, 2) @ model.patch_embed.proj.weight.flatten(1).T
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), patches + model.patch_embed.proj.bias], 1)
    tokens = tokens + positions(model, tokens, 48, 64)
    for block in model.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(found, model.norm(tokens))
    keys = []
    model.blocks[9].attn.register_forward_hook(
        lambda m, i, o: keys.append(m.qkv(i[0]).reshape(2, 36, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4)[1]))
    model(x)
    assert keys[0].shape == (2, 6, 36, 64)


def test_positions_with_a_changed_stride_and_the_networks_own_method(model):
    model.patch_embed.proj.stride = (8, 8)
    assert model.get_intermediate_layers(picture(), n=1)[0].shape == (2, 36, 384)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model, dtype):
    expected = model(picture())
    found = model.to(dtype)(picture().to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1)


@pytest.mark.filterwarnings("ignore")
def test_trace_copy_and_pickle(model):
    x = picture(32, 32)
    expected = model(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected, rtol=1e-4, atol=1e-5)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other(x), expected)


def test_the_table_and_the_names_agree():
    for row in published.PUBLISHED.values():
        with torch.device("meta"):
            model, _ = build_backbone(row.arch, row.patch_size)
        assert recognize(model.state_dict()).arch in (row.arch, f"{row.arch}_224")
