"""What a run shows while it trains: pictures, TensorBoard, Weights & Biases, and the line on a terminal."""

import importlib.machinery
import io
import os
import pty
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import SMALL

import main_dino
from imagesets.decode import Undecodable
from pretraining import monitor, progress

pytestmark = pytest.mark.usefixtures("small_heads")


def run(out, *extra) -> int:
    argv = [*SMALL, "--arch", "vit_nano", *map(str, extra), "--output_dir", str(out)]
    args = main_dino.get_args_parser().parse_args(argv)
    return main_dino.main(args)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    out = tmp_path_factory.mktemp("watched")
    assert run(out, "--epochs", 3, "--pictures_every", 2, "--tensorboard") == 0
    return out


def test_pictures_come_at_the_start_every_few_epochs_and_at_the_end(watched):
    names = {f"{what}_{when}.png" for what in ("attention", "pca") for when in ("start", "epoch0001", "epoch0002")}
    assert {p.name for p in (watched / "pictures").glob("*.png")} == names
    for name in names:
        with Image.open(watched / "pictures" / name) as picture:
            assert len(np.unique(np.asarray(picture))) > 50, name
    first, last = ((watched / "pictures" / f"pca_{when}.png").read_bytes() for when in ("start", "epoch0002"))
    assert first != last


def test_tensorboard_has_the_pictures_and_the_scalars(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched)).Reload()
    for name in ("pictures/attention", "pictures/pca"):
        assert [event.step for event in events.Images(name)] == [0, 16, 24]
    assert [event.step for event in events.Scalars("log/train_loss")] == [8, 16, 24]


def test_pictures_change_nothing_in_the_training(watched, tmp_path):
    assert run(tmp_path, "--epochs", 3) == 0
    assert (tmp_path / "log.txt").read_text() == (watched / "log.txt").read_text()
    assert not (tmp_path / "pictures").exists()


class Broken(list):
    def load(self, i):
        if self[i] is None:
            raise Undecodable("broken")
        return self[i]


def test_fixed_images_are_the_same_each_time_and_the_broken_passed_over():
    images = Broken(torch.full((3, 8, 8), i, dtype=torch.uint8) for i in range(100))
    once, again = ([int(x[0, 0, 0]) for x in monitor.fixed_images(images, 8, 4)] for _ in range(2))
    assert once == again == sorted(set(once)) and len(once) == 6
    assert len({i % 10 for i in once}) > 3  # neither one class after the other, nor one of them alone
    images[once[2]] = None
    assert [int(x[0, 0, 0]) for x in monitor.fixed_images(images, 8, 4)] == once[:2] + once[3:]
    assert [int(x[0, 0, 0]) for x in monitor.fixed_images(Broken(images[:1]), 8, 4)] == [0]
    assert monitor.fixed_images(Broken([None]), 8, 4) == []


def test_pictures_show_more_patches_than_the_crops_of_training():
    """Crops of 48 in patches of 8: 12 rows of patches instead of 6, for small images twice their own size."""
    shapes = [image.shape for image in monitor.fixed_images(Broken([torch.zeros(3, 64, 80, dtype=torch.uint8)]), 48, 8)]
    assert shapes == [(3, 96, 120)]
    assert monitor.fixed_images(Broken([torch.zeros(3, 30, 30, dtype=torch.uint8)]), 48, 8)[0].shape == (3, 56, 56)


def test_a_network_without_patches_has_no_pictures(tmp_path):
    assert run(tmp_path, "--arch", "resnet18", "--steps", 1, "--pictures_every", 1) == 0
    assert not any((tmp_path / "pictures").iterdir()) if (tmp_path / "pictures").exists() else True
    assert (tmp_path / "curves.png").exists()


# ---- Weights & Biases ----


def fake_wandb(monkeypatch, started: list):
    """A module with what the log uses of wandb; each run it starts is appended to `started`."""

    class FakeRun:
        def __init__(self, **options):
            self.options, self.id, self.logged = options, options["id"] or f"run{len(started)}", []
            self.log, self.finished = self.logged.append, False
            started.append(self)

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def finish(self):
            self.finished = True

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="fake")
    module.init, module.Image, module.Error = lambda **options: FakeRun(**options), np.shape, KeyError
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_figures_and_a_resume_goes_on_with_its_run(tmp_path, monkeypatch):
    started = []
    fake_wandb(monkeypatch, started)
    flags = ["--wandb", "--saveckp_every_steps", 3]
    assert run(tmp_path, *flags, "--pictures_every", 2) == 0
    logged = started[0].logged
    assert [x["step"] for x in logged if "log/train_loss" in x] == [8, 16]
    assert [x["step"] for x in logged if "pictures/pca" in x] == [0, 16]
    assert len([x for x in logged if "log_steps/loss" in x]) == 16
    assert started[0].finished and started[0].options["config"]["arch"] == "vit_nano"
    (tmp_path / "checkpoint.pth").unlink()  # back to step 15
    assert run(tmp_path, *flags) == 0
    assert started[1].id == started[0].id and started[1].options["resume"] == "allow"
    assert (tmp_path / "wandb_run.txt").read_text() == "run0\n"


def test_wandb_without_account_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def refuse(**options):
        raise KeyError("no API key")

    fake_wandb(monkeypatch, []).init = refuse
    assert run(tmp_path, "--wandb") == 1
    stderr = capsys.readouterr().err
    assert "--wandb" in stderr and "no API key" in stderr and len(stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert run(tmp_path / "out", f"--{package}") == 2
    assert f"--{package}: not installed; pip install {package}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- The console ----


def test_without_a_terminal_every_line_is_printed_as_it_is(capsys):
    lines = progress.Lines(total=10)
    lines.passing("step 1", 1)
    lines.lasting("epoch done [1]")
    lines.passing("step 2", 2)
    lines.close()
    assert capsys.readouterr().out == "step 1\nepoch done [1]\nstep 2\n"


def test_without_rich_a_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(isatty=lambda: True))
    assert progress.terminal() is None


def test_on_a_terminal_the_last_line_replaces_the_one_before():
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), force_terminal=True, width=40)
    lines = progress.Lines(10, console)
    lines.passing("step 1", 1)
    before = console.file.getvalue()
    assert "step 1" in before and "\x1b[2K" not in before
    lines.passing("step 2", 2)
    assert "\x1b[2K" in console.file.getvalue()[len(before):]  # the line is erased
    lines.lasting("epoch done [1]")
    lines.close()
    lines.close()
    text = console.file.getvalue()
    assert "epoch done [1]" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def test_a_real_terminal_shows_the_bar_and_keeps_what_is_printed():
    pytest.importorskip("rich")
    code = ("from pretraining import progress; x = progress.Lines(4)\n"
            "x.passing('step 1', 1); print('WARNING'); x.passing('step 2', 2)\n"
            "x.lasting('epoch done'); x.close(); print('after')")
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "60", "LINES": "20"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stdin=theirs, cwd=ROOT, env=env) as child:
        os.close(theirs)
        seen = b""
        try:
            while chunk := os.read(ours, 4096):
                seen += chunk
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(ours)
    text = seen.decode()
    assert child.returncode == 0 and all(word in text for word in ("WARNING", "step 2", "epoch done", "after"))
    assert text.index("\x1b[?25h") < text.index("WARNING")  # the cursor is there all the time
