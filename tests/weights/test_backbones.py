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


def test_errors_name_the_flag_that_gave_the_file(tmp_path):
    model = build_backbone("vit_nano", 8, img_size=16)[0]
    torch.save({"student": model.state_dict()}, tmp_path / "student.pth")
    torch.save({"cls_token": torch.zeros(1, 1, 192)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK")
    for name, message in (("absent", "no such file"), ("broken", "not a readable checkpoint"),
                          ("student", "no part 'teacher'.*it has student"), ("other", "1 of 54 tensors matched")):
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
