import argparse
import ast
import os
import signal
from collections import OrderedDict

import pytest
import torch
from conftest import ROOT

import flags
from parallel import Refused
from vision_transformer import build_backbone
from weights import backbones, checkpoints


def test_save_keeps_the_one_before_and_read_latest_falls_back(tmp_path, capsys):
    path = tmp_path / checkpoints.NAME
    for step in (1, 2):
        checkpoints.save({"step": step}, path)
    assert checkpoints.read(path)["step"] == 2 and checkpoints.read(tmp_path / checkpoints.PREVIOUS)["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoints.NAME, checkpoints.PREVIOUS]
    path.write_bytes(path.read_bytes()[:200])
    state, where = checkpoints.read_latest(tmp_path)
    assert state["step"] == 1 and where.name == checkpoints.PREVIOUS
    assert "not a readable checkpoint" in capsys.readouterr().out
    (tmp_path / checkpoints.PREVIOUS).write_bytes(b"")
    with pytest.raises(Refused, match="--output_dir .*checkpoint.pth: not a readable .*move the file away"):
        checkpoints.read_latest(tmp_path)
    assert checkpoints.read_latest(tmp_path / "nothing") is None


def test_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / checkpoints.NAME
    for step in (0, 1):
        checkpoints.save({"step": step}, path)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the one before it is intact"):
        checkpoints.save({"step": 2}, path)
    monkeypatch.undo()
    assert checkpoints.read(path)["step"] == 1 and checkpoints.read(tmp_path / checkpoints.PREVIOUS)["step"] == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_temporary_files_of_killed_runs_are_removed(tmp_path):
    """Of this version, which adds the process number to the name, and of the one before."""
    for name in (".checkpoint.pth.tmp", ".checkpoint.pth.123.tmp", ".checkpoint_best.pth.7.tmp", ".log.txt.5.tmp"):
        (tmp_path / name).touch()
    checkpoints.remove_temporary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".log.txt.5.tmp"]


def test_a_worker_that_dies_meanwhile_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def killed(fd):
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. ")

    then = signal.signal(signal.SIGCHLD, killed)  # as torch has one, which raises
    monkeypatch.setattr(os, "fsync", killed)
    try:
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            checkpoints.save({"step": 2}, tmp_path / checkpoints.NAME)
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL and not list(tmp_path.iterdir())
    finally:
        signal.signal(signal.SIGCHLD, then)


def test_a_connection_that_breaks_is_a_workers_death(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    for error in (EOFError(), ConnectionResetError(104, "Connection reset by peer")):
        assert "a DataLoader worker died (" in flags.worker_death(error) and "reset" in flags.worker_death(error)
    assert flags.worker_death(OSError(28, "No space left")) is None


class Malicious:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return (open, (str(self.flag), "w"))


def test_pickled_code_never_runs(tmp_path):
    flag, path = tmp_path / "code_ran", tmp_path / "evil.pth"
    torch.save({"teacher": Malicious(flag)}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint of plain tensors"):
        checkpoints.read(path)
    assert not flag.exists()
    torch.load(path, weights_only=False)  # the file is armed
    assert flag.exists()


PICKLES = ("pickle.", "cPickle.", "dill.", "joblib.")  # an error may be raised; loads are refused


def test_no_script_loads_without_weights_only():
    calls = []
    for path in [p for p in ROOT.rglob("*.py") if "tests" not in p.parts and ".venv" not in p.parts]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert not name.startswith(PICKLES) or name == "pickle.UnpicklingError", f"{path.name}: {name}"
                if name in ("torch.load", "torch.hub.load_state_dict_from_url"):
                    calls.append((path.name, [ast.unparse(k.value) for k in node.keywords if k.arg == "weights_only"]))
    assert calls and all(given == ["True"] for _, given in calls), calls


def test_missing_weights_are_an_error_not_a_download(tmp_path):
    with pytest.raises(Refused, match="--pretrained_weights .*absent.pth: no such file of weights"):
        backbones.load_backbone(str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("layout", ["plain", "wrapped", "compiled", "full", "state_dict"])
def test_backbone_from_any_layout(tmp_path, layout, capsys):
    torch.manual_seed(0)
    model, _ = build_backbone("vit_tiny", 16, img_size=64)
    state = model.state_dict()
    heads = {"head.mlp.0.weight": torch.zeros(2, 2)}
    saved = {
        "plain": state,
        "wrapped": {f"module.backbone.{k}": v for k, v in state.items()},
        "compiled": {f"_orig_mod.{k}": v for k, v in state.items()},
        "full": {
            "teacher": OrderedDict({f"backbone.{k}": v for k, v in state.items()} | heads),
            "student": {f"module.backbone.{k}": v for k, v in state.items()},
            "args": argparse.Namespace(arch="vit_tiny", patch_size=16),
            "epoch": 3,
        },
        "state_dict": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    }[layout]
    torch.save(saved, tmp_path / "w.pth")
    loaded, info = backbones.load_backbone(str(tmp_path / "w.pth"), arch="vit_tiny")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in state.items())
    assert "150 of 150 tensors matched" in capsys.readouterr().out
    assert (info["arch"], info["patch_size"], info["embed_dim"]) == ("vit_tiny", 16, 192) and not loaded.training


def test_other_architecture_and_other_key_are_refused(tmp_path):
    model, _ = build_backbone("vit_tiny", 16, img_size=64)
    torch.save(model.state_dict() | {"norm_pre.weight": torch.zeros(192)}, tmp_path / "w.pth")  # no ViT of ours
    with pytest.raises(Refused, match=r"--pretrained_weights .* of 150 tensors matched.*does --arch match the file"):
        backbones.load_backbone(str(tmp_path / "w.pth"), arch="vit_small")
    torch.save({"student": model.state_dict()}, tmp_path / "s.pth")
    with pytest.raises(Refused, match="--checkpoint_key teacher: .* it has student"):
        backbones.load_backbone(str(tmp_path / "s.pth"), arch="vit_tiny")


def test_random_state_goes_round(tmp_path):
    import random

    import numpy as np

    device = torch.device("cpu")
    checkpoints.save({"rng": checkpoints.rng_state(device)}, tmp_path / "rng.pth")
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    checkpoints.set_rng_state(checkpoints.read(tmp_path / "rng.pth")["rng"], device)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
