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


def test_init_from_refuses_what_does_not_fit(tmp_path, capsys):
    from test_layouts import dinov2_file

    torch.save(build_backbone("vit_nano", 8, img_size=32)[0].state_dict(), tmp_path / "w.pth")
    torch.save(dinov2_file(), tmp_path / "dinov2.pth")
    for file, network, message in (
        ("w", {"patch_size": 16}, "patch_embed.proj.weight .192, 3, 8, 8. .*--patch_size"),
        ("w", {"patch_size": 8, "in_chans": 4}, "wrong shape: patch_embed.proj.weight .*3, 8, 8"),
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
    for name in ("backbone_state", "recognize", "load_matching"):
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
