import argparse
import ast
import errno
import os
import pathlib
import signal
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import flags
from parallel import Refused
from pretraining import options
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


@pytest.mark.parametrize("zipped", [True, False])
def test_the_checkpoint_to_resume_from_is_mapped_where_its_format_allows(tmp_path, monkeypatch, zipped):
    then, mapped = torch.load, []
    torch.save({"x": torch.arange(9.0)}, tmp_path / checkpoints.NAME, _use_new_zipfile_serialization=zipped)

    def load(*args, **kwargs):
        loaded = then(*args, **kwargs)
        mapped.append(kwargs.get("mmap", False))
        return loaded

    monkeypatch.setattr(torch, "load", load)
    state, _ = checkpoints.read_latest(tmp_path)
    assert mapped == [zipped] and torch.equal(state["x"], torch.arange(9.0))
    checkpoints.save({"x": torch.zeros(9)}, tmp_path / checkpoints.NAME)  # another file under this name
    state["x"] += 1
    assert torch.equal(state["x"], torch.arange(1.0, 10))
    assert torch.equal(checkpoints.read(tmp_path / checkpoints.NAME)["x"], torch.zeros(9))


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


@pytest.mark.parametrize("before, words", [
    (None, ("there is none before it", "from the beginning")),
    (checkpoints.PREVIOUS, ("the one before it is intact", "to resume")),
])  # fmt: skip
def test_a_full_disk_at_the_first_save(tmp_path, monkeypatch, before, words):
    """torch's RuntimeError has words of its own; the operating system's are in the error that it met."""
    if before:
        checkpoints.save({"step": 0}, tmp_path / before)

    def full(state, file):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # noqa: B904

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(checkpoints.NotSaved) as raised:
        checkpoints.save({"step": 1}, tmp_path / checkpoints.NAME)
    said = str(raised.value)
    assert "checkpoint.pth" in said and "No space left on device" in said and "--output_dir" in said
    assert all(word in said for word in words) and "inline_container" not in said


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


@pytest.mark.parametrize("error, said", [
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                  "RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left on device\n"),
     ("unable to allocate shared memory(shm)", "--shm-size", "--num_workers")),
    (RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that dataloader's workers "
                  "are out of shared memory. Please try to raise your shared memory limit."), ("pid 5", "--shm-size")),
    (RuntimeError("Too many open files. Communication with the workers is no longer possible."), ("ulimit -n",)),
    (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
     ("ulimit -n",)),
    (OSError(errno.EMFILE, "Too many open files", "a.jpg"), ("a.jpg", "ulimit -n", "--num_workers")),
])  # fmt: skip
def test_limits_that_workers_meet_are_named_with_their_remedy(monkeypatch, error, said):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    line = flags.worker_death(error)
    assert "\n" not in line and all(word in line for word in said) and "Traceback" not in line, line


class Malicious:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return (open, (str(self.flag), "w"))


def test_pickled_code_never_runs(tmp_path):
    flag, path = tmp_path / "code_ran", tmp_path / "evil.pth"
    torch.save({"teacher": Malicious(flag)}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint of plain tensors .*open, .*save model.state_dict"):
        checkpoints.read(path)
    assert not flag.exists()
    torch.load(path, weights_only=False)  # the file is armed
    assert flag.exists()


@pytest.mark.parametrize("core", ["numpy._core", "numpy.core"])
def test_a_full_checkpoint_as_the_published_script_writes_it(tmp_path, core):
    """Its optimizer takes learning rate and weight decay out of NumPy arrays, so the pickle names NumPy's scalars."""
    backbone, _ = build_backbone("vit_nano", 8, img_size=16)
    optimizer = torch.optim.AdamW([{"params": list(backbone.parameters())}, {"params": [], "weight_decay": 0.0}])
    lr_schedule, wd_schedule = np.linspace(0, 5e-4, 10), 0.4 - 0.36 * np.cos(np.linspace(0, np.pi, 10))
    for i, param_group in enumerate(optimizer.param_groups):
        param_group["lr"] = lr_schedule[3]
        if i == 0:
            param_group["weight_decay"] = wd_schedule[3]
    assert type(optimizer.state_dict()["param_groups"][0]["lr"]) is np.float64
    args = argparse.Namespace(arch="vit_nano", patch_size=8, data_path="/x", output_dir=pathlib.Path("runs/a"))
    torch.save({
        "student": {f"module.backbone.{k}": v for k, v in backbone.state_dict().items()},
        "teacher": {f"backbone.{k}": v for k, v in backbone.state_dict().items()},
        "optimizer": optimizer.state_dict(), "epoch": 4, "args": args, "dino_loss": {"center": torch.zeros(1, 8)},
    }, tmp_path / "w.pth", pickle_protocol=2)  # fmt: skip
    if core == "numpy.core":  # as NumPy 1 names the same function
        with zipfile.ZipFile(tmp_path / "w.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
            for name in new.namelist():
                old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        os.replace(tmp_path / "old.pth", tmp_path / "w.pth")
    loaded = checkpoints.read(tmp_path / "w.pth")
    groups = loaded["optimizer"]["param_groups"]
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (lr_schedule[3], wd_schedule[3])
    assert loaded["args"].output_dir == pathlib.PurePosixPath("runs/a")
    loaded, info = backbones.load_backbone(str(tmp_path / "w.pth"))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in backbone.state_dict().items())
    assert (info["arch"], info["patch_size"]) == ("vit_nano", 8)


@pytest.mark.parametrize("value, name", [(np.int64(3), "Int64DType"), (np.zeros(2), "_reconstruct"),
                                         (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear")])  # fmt: skip
def test_what_is_not_data_is_named(tmp_path, value, name):
    torch.save({"teacher": {}, "value": value}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"w.pth: not a readable .*it contains .*{name}, .*save model.state_dict"):
        checkpoints.read(tmp_path / "w.pth")


def test_files_that_are_cut_short_are_called_damaged(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"teacher": {"weight": torch.zeros(5000)}}, path)
    whole = path.read_bytes()
    torch.save({"teacher": {"weight": torch.zeros(5000)}}, path, _use_new_zipfile_serialization=False)
    for content in (whole, path.read_bytes()):
        for size in (0, 1, 100, len(content) // 2, len(content) - 10):
            path.write_bytes(content[:size])
            with pytest.raises(ValueError, match="w.pth: not a readable .* .damaged or cut short, .*: copy or [^:]*$"):
                checkpoints.read(path)


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
    with pytest.raises(Refused, match="https://host/w.pth: no such file of weights"):
        backbones.load_backbone("https://host/w.pth")
    with pytest.raises(Refused, match="--pretrained_weights .*absent.pth: no such file of weights"):
        backbones.load_backbone(str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("part", ["", ".metadata", "__0_0.distcp"])
def test_a_distributed_checkpoint_is_refused_with_the_command_that_joins_it(tmp_path, part):
    torch.distributed.checkpoint.save({"x": torch.ones(3)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    given, command = str(tmp_path / "dcp" / part), rf"format_utils dcp_to_torch {tmp_path}/dcp "
    with pytest.raises(Refused, match=f"^--pretrained_weights .*{command}"):
        backbones.load_backbone(given)
    with pytest.raises(Refused, match=f"^--init_from .*{command}"):
        options.check_files(init_from=given)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "w.pth")
    assert torch.equal(checkpoints.read(tmp_path / "w.pth")["x"], torch.ones(3))
    with pytest.raises(Refused, match=f"^--init_from {tmp_path}: a folder"):
        options.check_files(init_from=str(tmp_path))


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
    with pytest.raises(Refused, match=r"--pretrained_weights .* of 150 tensors matched.*give the --arch"):
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
