"""The Python entry `from weights import load_backbone`, from other folders; and weights read into a given network."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from parallel import Refused
from vision_transformer import build_backbone
from weights import backbones, layouts

THEIRS = ("data", "metrics", "features", "checkpoint", "models", "training", "evaluation", "images",
          "datasets", "config")

PROGRAM = """
import importlib, sys
folder, weights, *names = sys.argv[1:]
before = [importlib.import_module(name) for name in names[::2]]
sys.path.insert(0, folder)
from weights import load_backbone
backbone, info = load_backbone(weights, arch="vit_nano", patch_size=8)
modules = [importlib.import_module(name) for name in names]
assert all(module.MINE for module in modules) and modules[::2] == before
import torch
assert backbone(torch.zeros(2, 3, 16, 24)).shape == (2, info["embed_dim"]) == (2, 192) and not backbone.training
"""


@pytest.mark.parametrize("kind", ["file", "untrained"])
def test_the_entry_beside_modules_of_the_users_own(tmp_path, kind):
    """As in a notebook: sys.path starts with "", the current folder, which has the user's modules."""
    for name in THEIRS:
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    weights = "weights.pth" if kind == "file" else ""
    torch.save(build_backbone("vit_nano", 8, img_size=16)[0].state_dict(), tmp_path / "weights.pth")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, ROOT, weights, *THEIRS], cwd=tmp_path, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("54 of 54 tensors matched" if weights else "random weights") in done.stdout


def test_weights_into_a_network(tmp_path):
    torch.manual_seed(0)
    source, target = (build_backbone("vit_nano", 8, img_size=16)[0] for _ in range(2))
    torch.save({"teacher": {f"backbone.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth")
    backbones.load_weights_into(target, str(tmp_path / "w.pth"))
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


def test_init_from_reads_every_layout(tmp_path):
    """Hugging Face's names, chunked DINOv2 names, timm's position embeddings without the class token."""
    from test_layouts import dinov2_file
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, image_size=16, patch_size=8,
                       intermediate_size=768)  # fmt: skip
    chunked = dinov2_file(chunked=True)
    no_class_position = build_backbone("vit_nano", 8, img_size=16)[0].state_dict()
    no_class_position["pos_embed"] = no_class_position["pos_embed"][:, 1:]
    for state, options in ((ViTModel(config).state_dict(), {"patch_size": 8, "img_size": 16}),
                           (chunked, {"patch_size": 14, "img_size": 56, "init_values": 1.0, "method": "dinov2"}),
                           (no_class_position, {"patch_size": 8, "img_size": 16})):
        torch.save(state, tmp_path / "w.pth")
        expected, _ = backbones.load_backbone(str(tmp_path / "w.pth"))
        model, _ = build_backbone("vit_nano", **options)
        backbones.load_weights_into(model, str(tmp_path / "w.pth"), flag="--init_from")
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in expected.state_dict().items())
    timm_own, _ = build_backbone("vit_small_patch14_reg4_dinov2", depth=1)
    torch.save(timm_own.state_dict(), tmp_path / "w.pth")
    backbones.load_weights_into(build_backbone("vit_small_patch14_reg4_dinov2", depth=1)[0], str(tmp_path / "w.pth"))


@pytest.mark.parametrize("theirs", ["dino", "dinov2"])
def test_a_mask_token_that_a_file_lacks_is_told(tmp_path, capsys, theirs):
    torch.save(build_backbone("vit_nano", 8, img_size=16, method=theirs)[0].state_dict(), tmp_path / "w.pth")
    backbones.load_weights_into(build_backbone("vit_nano", 8, img_size=16, method="dinov2")[0],
                                str(tmp_path / "w.pth"), flag="--init_from")
    assert ("no mask_token" in capsys.readouterr().out) == (theirs == "dino")


def test_init_from_refuses_what_does_not_fit(tmp_path, capsys):
    from test_layouts import dinov2_file

    torch.save(build_backbone("vit_nano", 8, img_size=32)[0].state_dict(), tmp_path / "w.pth")
    torch.save(dinov2_file(), tmp_path / "dinov2.pth")
    for file, network, message in (
        ("w", {"patch_size": 16}, "patch_embed.proj.weight .192, 3, 8, 8. .*--patch_size"),
        ("w", {"patch_size": 8, "depth": 5}, "missing: blocks.4"), ("w", {"patch_size": 8, "depth": 3}, "unused: bl"),
        ("w", {"patch_size": 8, "init_values": 1.0}, "missing: blocks.0.ls1.gamma"),
        ("w", {"patch_size": 8, "num_register_tokens": 2}, "missing: register_tokens"),
        ("dinov2", {"patch_size": 14}, "unused: blocks.0.ls1.gamma.* layer scale"),
    ):
        model, _ = build_backbone("vit_nano", img_size=32, **network)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(Refused, match=f"^--init_from .*{file}.pth .*tensors matched; .*{message}.*"):
            backbones.load_weights_into(model, str(tmp_path / f"{file}.pth"), flag="--init_from")
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not capsys.readouterr().out


LAYERSCALE = {"init_values": 1.0, "method": "dinov2"}


@pytest.mark.parametrize("kind, network, flags", [
    ("dino", LAYERSCALE, "give --layerscale 0"), ("no layerscale", LAYERSCALE, "give --layerscale 0"),
    ("dino", {"patch_size": 16}, "give --patch_size 14"), ("dino", {"depth": 12}, "give --arch vit_nano"),
    ("plain", {"method": "dinov2"}, "give --layerscale 1e-05"), ("plain", {}, "main_dinov2.py.* --layerscale 1e-05"),
    ("swiglu", LAYERSCALE, "give --ffn_layer swiglu"),
    ("swiglu", {}, "main_dinov2.py.* --layerscale 1e-05 --ffn_layer swiglu"),
    ("plain", LAYERSCALE | {"ffn_layer": "swiglu"}, "give --ffn_layer mlp"),
    ("run", LAYERSCALE, "give --num_register_tokens 4"),
    ("run", {}, "main_dinov2.py.* --num_register_tokens 4 --layerscale 1e-05"),
    ("plain", LAYERSCALE | {"num_register_tokens": 2}, "give --num_register_tokens 0"),
    ("run without layerscale", {}, "main_dinov2.py.* --num_register_tokens 4 --layerscale 0"),
    ("resnet", LAYERSCALE, "main_dino.py trains such networks, with --arch resnet18"),
])
def test_the_remedy_names_the_flags_of_the_weights(tmp_path, kind, network, flags):
    from test_layouts import dinov2_file

    state = dinov2_file(registers=4 if kind.startswith("run") else 0, gated=kind == "swiglu")
    if kind in ("dino", "no layerscale", "run without layerscale"):
        state = {k: v for k, v in state.items() if ".ls" not in k and (kind != "dino" or k != "mask_token")}
    if kind == "resnet":
        state = build_backbone("resnet18")[0].state_dict()
    args = {"args": {"method": "dinov2"}} if kind.startswith("run") else {}
    torch.save({"teacher": state} | args, tmp_path / "w.pth")
    model, _ = build_backbone("vit_nano", **{"patch_size": 14, "img_size": 56} | network)
    with pytest.raises(Refused, match=f"^--init_from .*w.pth .*; {flags}[,;]"):
        backbones.load_weights_into(model, str(tmp_path / "w.pth"), flag="--init_from")


@pytest.mark.parametrize("args, options, flags", [
    (None, {}, "give --interpolate_antialias true --interpolate_offset 0,"),  # published weights with registers
    ({"interpolate_antialias": True, "interpolate_offset": 0.0}, {"interpolate_offset": 0.0},
     "give --interpolate_antialias true,"),
    ({}, {"interpolate_antialias": True, "interpolate_offset": 0.0},
     "give --interpolate_antialias false --interpolate_offset 0.1,"),
])
def test_weights_that_interpolate_in_another_way_are_refused(tmp_path, args, options, flags):
    """Training would resize positions, and its small crops' positions, as the weights never were."""
    from test_layouts import dinov2_file

    args = {} if args is None else {"args": {"method": "dinov2"} | args}
    torch.save({"teacher": dinov2_file(registers=4)} | args, tmp_path / "w.pth")
    made = {"patch_size": 14, "img_size": 28, "num_register_tokens": 4} | LAYERSCALE
    for more in ({}, {"num_register_tokens": 0}):
        model, _ = build_backbone("vit_nano", **made | options | more)
        with pytest.raises(Refused, match=f"^--init_from .*w.pth: .*{flags.strip(',')}.*without this file$"):
            backbones.load_weights_into(model, str(tmp_path / "w.pth"), flag="--init_from")
    with pytest.raises(Refused, match=flags):
        backbones.load_weights_into(build_backbone("vit_nano", **made | options)[0], str(tmp_path / "w.pth"))
    theirs = backbones.load_backbone(str(tmp_path / "w.pth"))[0]
    same = {k: getattr(theirs, k) for k in layouts.INTERPOLATION}
    backbones.load_weights_into(build_backbone("vit_nano", **made | same)[0], str(tmp_path / "w.pth"))


def test_main_dino_has_no_flags_of_interpolation(tmp_path):
    model, _ = build_backbone("vit_nano", 8, img_size=16)
    args = {"method": "dinov2", "interpolate_antialias": True, "interpolate_offset": 0.0}
    torch.save({"teacher": model.state_dict(), "args": args}, tmp_path / "w.pth")
    with pytest.raises(Refused, match="main_dinov2.py .*--interpolate_antialias true .*_offset 0 --layerscale 0;"):
        backbones.load_weights_into(model, str(tmp_path / "w.pth"), flag="--init_from")


@pytest.mark.parametrize("method, said", [("dino", False), ("dinov2", True)])
def test_an_unknown_interpolation_is_said(tmp_path, capsys, method, said):
    model, _ = build_backbone("vit_nano", 8, img_size=16, method=method, interpolate_antialias=said)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    backbones.load_weights_into(model, str(tmp_path / "w.pth"), flag="--init_from")
    assert ("--interpolate_antialias true --interpolate_offset 0.1" in capsys.readouterr().out) == said


def test_position_embeddings_of_another_image_size_are_interpolated(tmp_path, capsys):
    """At its own image size, the new network computes what the old one computes there."""
    old, _ = build_backbone("vit_nano", 8, img_size=32)
    new, _ = build_backbone("vit_nano", 8, img_size=56)
    torch.save(old.state_dict(), tmp_path / "w.pth")
    backbones.load_weights_into(new, str(tmp_path / "w.pth"), flag="--init_from")
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(new(x), old(x), rtol=0, atol=1e-6)
    output = capsys.readouterr().out
    assert "from 4 x 4 to 7 x 7 patches" in output and "54 of 54 tensors matched" in output
    assert new.pos_embed.requires_grad and new.pos_embed.shape == (1, 50, 192)


def test_errors_name_the_flag_that_gave_the_file(tmp_path):
    model = build_backbone("vit_nano", 8, img_size=16)[0]
    torch.save({"student": model.state_dict()}, tmp_path / "student.pth")
    torch.save({"cls_token": torch.zeros(1, 1, 192)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK")
    for name, message in (("absent", "no such file"), ("broken", "not a readable checkpoint"),
                          ("student", "no part 'teacher'.*it has student"), ("other", "1 of 54 tensors matched; miss")):
        path = str(tmp_path / f"{name}.pth")
        with pytest.raises(Refused, match=f"^--init_from {path}: {message}"):
            backbones.load_weights_into(model, path, flag="--init_from")
    for name in ("absent", "broken"):
        with pytest.raises(Refused, match=f"^--teacher {tmp_path}/{name}.pth: "):
            backbones.load_backbone(str(tmp_path / f"{name}.pth"), flag="--teacher")
    with pytest.raises(Refused, match="^--arch vit_nanoo: no such network"):
        backbones.load_backbone("", "vit_nanoo")


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def bug(*args):
        raise ValueError("operands could not be broadcast")

    torch.save(build_backbone("vit_nano", 8, img_size=16)[0].state_dict(), tmp_path / "w.pth")
    for name in ("backbone_state", "describe", "load_matching"):
        with monkeypatch.context() as patched:
            patched.setattr(backbones, name, lambda *args, **options: bug())
            with pytest.raises(ValueError, match="broadcast") as raised:
                backbones.load_backbone(str(tmp_path / "w.pth"))
            assert raised.type is ValueError


@pytest.mark.parametrize("name, shape", [("patch_embed.proj.weight", (192, 3)), ("pos_embed", (192,)),
                                         ("layer4.0.conv1.weight", (1,))])
def test_tensors_with_an_impossible_number_of_dimensions_are_refused(tmp_path, name, shape):
    state = dict(build_backbone("vit_nano", 8, img_size=16)[0].state_dict())
    if name.startswith("layer4"):
        state = {name: torch.zeros(1), "conv1.weight": torch.zeros(1)}
        name = "conv1.weight"
    state[name] = torch.zeros(shape)
    with pytest.raises(layouts.BadFile, match=f"{name} has shape"):
        layouts.recognize(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(Refused, match=f"--pretrained_weights .*w.pth: {name} has shape"):
        backbones.load_backbone(str(tmp_path / "w.pth"))


# ---- Other numbers of channels ----


@pytest.mark.parametrize("mode", ["mean", "tile"])
@pytest.mark.parametrize("arch, name", [("vit_nano", "patch_embed.proj.weight"), ("resnet18", "conv1.weight")])
@pytest.mark.parametrize("in_chans", [1, 4, 6])
def test_weights_for_other_channels(tmp_path, capsys, arch, name, in_chans, mode):
    torch.save(build_backbone(arch, 8, img_size=16)[0].state_dict(), tmp_path / "w.pth")
    old = torch.load(tmp_path / "w.pth")[name]
    model, _ = build_backbone(arch, 8, img_size=16, in_chans=in_chans)
    with pytest.raises(Refused, match=f"--init_from .*w.pth.* 3 .*{in_chans}.*--init_in_chans.*--in_chans 3"):
        backbones.load_weights_into(model, str(tmp_path / "w.pth"), flag="--init_from")
    backbones.load_weights_into(model, str(tmp_path / "w.pth"), flag="--init_from", init_in_chans=mode)
    new = model.state_dict()[name]
    for channel in range(in_chans):
        source = old[:, channel % 3] if mode == "tile" else (old[:, 0] + old[:, 1] + old[:, 2]) / 3
        torch.testing.assert_close(new[:, channel], source * 3 / in_chans)
    if mode == "mean" or in_chans % 3 == 0:  # the response to an image of equal channels
        image = torch.randn(2, 1, 16, 16)
        before, after = (torch.nn.functional.conv2d(image.expand(-1, w.shape[1], -1, -1), w) for w in (old, new))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert f"3 to {in_chans}" in capsys.readouterr().out
    same, _ = build_backbone(arch, 8, img_size=16)
    backbones.load_weights_into(same, str(tmp_path / "w.pth"), init_in_chans=mode)
    assert torch.equal(same.state_dict()[name], old)


def test_init_from_says_the_normalization_of_its_weights(tmp_path, capsys):
    model, _ = build_backbone("vit_nano", 8, img_size=16)
    torch.save({"teacher": model.state_dict(), "args": {"mean": [0.5] * 3, "std": [0.25] * 3}}, tmp_path / "w.pth")
    backbones.load_weights_into(model, str(tmp_path / "w.pth"), flag="--init_from")
    said = capsys.readouterr().out
    assert "mean 0.5 0.5 0.5" in said and "std 0.25 0.25 0.25" in said and "--mean" in said


# ---- What a network supports in training ----


@pytest.mark.parametrize("arch", ["hrnet_w18_small", "selecsls42", "inception_v4"])
def test_a_default_rate_gives_way_where_there_is_no_stochastic_depth(arch, capsys):
    assert backbones.supported_drop_path_rate(arch, 0.1, is_default=True) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "--drop_path_rate 0" in said and "0.1" in said and arch in said
    with pytest.raises(Refused, match=f"--drop_path_rate 0.1: --arch {arch} .*give 0"):
        backbones.supported_drop_path_rate(arch, 0.1)
    assert backbones.supported_drop_path_rate(arch, 0.0) == 0


@pytest.mark.parametrize("arch", ["vit_nano", "swin_t", "resnet26"])
def test_stochastic_depth_that_a_network_has(arch, capsys):
    for is_default in (True, False):
        assert backbones.supported_drop_path_rate(arch, 0.3, is_default=is_default) == 0.3
    assert not capsys.readouterr().out


def test_torchvisions_networks_without_stochastic_depth():
    """They ignore the rate: the default stays what earlier runs stored, a given one is refused."""
    assert backbones.supported_drop_path_rate("resnet18", 0.1, is_default=True) == 0.1
    with pytest.raises(Refused, match="--drop_path_rate 0.2: --arch resnet18 has no stochastic depth"):
        backbones.supported_drop_path_rate("resnet18", 0.2)
    with pytest.raises(Refused, match="--arch resnet81: no such network"):
        backbones.supported_drop_path_rate("resnet81", 0.1, is_default=True)


@pytest.mark.parametrize("arch, size, single", [
    ("resnet18", 32, True), ("resnet18", 33, False), ("resnet18", 64, False), ("resnet26", 32, True),
    ("vit_nano", 16, False)])
def test_batch_norm_of_one_value_is_what_torch_refuses_to_train(arch, size, single):
    model, _ = build_backbone(arch, img_size=16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert backbones.normalizes_single_values(model.train(), 3, size) == single and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    if single:
        with pytest.raises(ValueError, match="more than 1 value"):
            model(torch.zeros(1, 3, size, size))
    else:
        model(torch.zeros(1, 3, size, size))
