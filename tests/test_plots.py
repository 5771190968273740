"""Figures with axes: the curves from logs with holes, charts of an evaluation."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from processes import launch

import plots
from protocols import charts

# ---------------------------------------------------------------- curves


def write_log(path, epochs=5, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"epoch": e, "train_loss": 8 - e, **{key: value(e) for key, value in more.items()}} for e in range(epochs)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_read_log_takes_the_last_word_on_an_epoch_and_passes_over_rubbish(tmp_path):
    log = write_log(tmp_path / "log.txt", 3, knn_top1=lambda e: 50 + e if e == 1 else None)
    log.write_text(log.read_text() + '{"epoch": 2, "train_loss": 1}\n[3]\n\n{"epoch": 3, "train_lo')
    series = charts.read_log(log)
    assert series["train_loss"][0].tolist() == [0, 1, 2] and series["train_loss"][1].tolist() == [8, 7, 1]
    assert series["knn_top1"][0].tolist() == [1] and series["knn_top1"][1].tolist() == [51]
    assert charts.read_log(tmp_path).keys() == series.keys()


def test_a_checkpoint_is_no_log(tmp_path, capsys, monkeypatch):
    torch.save({"epoch": 3, "teacher": torch.randn(10_000)}, tmp_path / "checkpoint.pth")
    monkeypatch.setattr(charts.Path, "read_text", None)  # never read as text, which took a minute
    assert plots.main(plots.get_args_parser().parse_args([str(tmp_path / "checkpoint.pth")])) == 2
    said = capsys.readouterr().err
    assert "checkpoint.pth: not a text file" in said and "log.txt" in said and said.count("\n") == 1


FULL = {key: lambda e: 1.0 + e for key in (
    "train_lr", "train_wd", "train_entropy", "train_kl", "train_center_norm", "train_feature_std", "train_feature_rank",
    "train_prototypes_used", "knn_top1", "images_per_s", "data_wait")} | {
    "train_ln_k": lambda e: 8.3, "knn_untrained": lambda e: 30.0, "knn_pixels": lambda e: 35.0}


DINOV2 = {key: lambda e: 1.0 + e for key in (
    "train_dino_left", "train_ibot_left", "train_koleo", "train_patch_entropy", "train_patch_prototypes_used")}


@pytest.mark.parametrize("keys", [[], ["train_lr"], ["knn_top1", "knn_pixels"], ["train_ln_k"], list(FULL)])
def test_curves_draw_what_the_log_has(tmp_path, keys):
    log = write_log(tmp_path / "log.txt", **{key: FULL[key] for key in keys})
    charts.training_curves([log], tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    for key, text in {"knn_pixels": "raw pixels", "knn_untrained": "untrained network", "train_ln_k": "ln K",
                      "train_lr": "Learning rate", "train_feature_rank": "Effective rank of features"}.items():
        assert (f"<!-- {text} -->" in drawn) == (key in keys), text


def test_curves_of_one_epoch_of_nan_and_of_several_runs(tmp_path):
    logs = [write_log(tmp_path / "one" / "log.txt", 1), write_log(tmp_path / "nan" / "log.txt", 40, **FULL)]
    logs[1].write_text(logs[1].read_text().replace("8,", "NaN,"))
    charts.training_curves(logs, tmp_path / "deep" / "curves.png")
    with Image.open(tmp_path / "deep" / "curves.png") as picture:
        assert picture.width == 1430 and picture.convert("L").getextrema() != (255, 255)


def drawn_axes(monkeypatch, logs, out):
    """The figure's axes by title, and the figure."""
    figures = []
    monkeypatch.setattr(charts, "save", lambda figure, *args: figures.append(figure))
    charts.training_curves(logs, out)
    return {axes.get_title(loc="left"): axes for axes in figures[0].axes}, figures[0]


def test_the_accuracy_starts_at_the_untrained_value_and_epochs_stand_at_their_ends(tmp_path, monkeypatch):
    log = write_log(tmp_path / "run7" / "log.txt", 6, **FULL | {"knn_top1": lambda e: 50.0 + e if e % 2 else None})
    panels, figure = drawn_axes(monkeypatch, [log], tmp_path / "curves.png")
    teacher = panels["k-NN on held-out images"].lines[0]
    assert teacher.get_xydata().tolist() == [[0, 30], [2, 51], [4, 53], [6, 55]]  # untrained: 30
    assert panels["Loss"].lines[0].get_xydata().tolist() == [[e + 1, 8 - e] for e in range(6)]
    assert figure.get_suptitle() == "run7"
    started = {key: value for key, value in FULL.items() if key != "knn_untrained"} | {"knn_start": lambda e: 44.0}
    panels, _ = drawn_axes(monkeypatch, [write_log(tmp_path / "log.txt", 3, **started)], tmp_path / "curves.png")
    assert panels["k-NN on held-out images"].lines[0].get_xydata()[0].tolist() == [0, 44]


def test_every_panel_has_its_axes_named_and_no_legend_lies_on_curves(tmp_path, monkeypatch):
    log = write_log(tmp_path / "log.txt", **FULL | {"train_momentum": lambda e: 0.99} | DINOV2)
    panels, figure = drawn_axes(monkeypatch, [log], tmp_path / "curves.png")
    assert len(panels) == len(charts.LARGE_PANELS) + len(charts.SMALL_PANELS)
    figure.canvas.draw()
    for title, axes in panels.items():
        assert axes.get_xlabel() == "epochs done" and axes.get_ylabel(), title
        if legend := axes.get_legend():
            box, area = legend.get_window_extent(), axes.get_window_extent()
            assert not box.overlaps(area.shrunk(0.99, 0.99)) and not box.overlaps(axes._left_title.get_window_extent())


def test_curves_leave_matplotlib_as_it_was(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    charts.training_curves([write_log(tmp_path / "log.txt", **FULL)], tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    a, b = tmp_path / "a" / "run" / "log.txt", tmp_path / "b" / "run" / "log.txt"
    assert charts.run_names([a, b]) == ["a/run", "b/run"]
    assert charts.run_names([a]) == ["run"]
    assert charts.run_names([a, a]) == charts.run_names([a, a])[:1] * 2


def test_a_run_in_a_folder_whose_name_is_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    charts.training_curves([write_log(folder / "log.txt", **FULL)], folder / "curves.png")
    assert charts.run_names([folder / "log.txt"]) == ["caf\\xe9"] and (folder / "curves.png").stat().st_size > 10_000


def test_script(tmp_path, capsys):
    write_log(tmp_path / "run1" / "log.txt", **FULL)
    write_log(tmp_path / "run2" / "log.txt")
    out = tmp_path / "curves.png"
    done = launch("plots.py", tmp_path / "run1" / "log.txt", tmp_path / "run2", "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize("log, out, message", [
    ("missing.txt", "curves.png", "missing.txt: no such file"),
    ("empty.txt", "curves.png", "empty.txt: no line with an epoch"),
    ("epochs.txt", "curves.png", "epochs.txt: nothing to draw"),
    ("log.txt", "curves.xyz", "--out"),
    ("log.txt", "log.txt/curves.png", "log.txt"),
    ("log.txt", "photo.png", "exists"),
])
def test_script_names_what_is_wrong_in_one_line(tmp_path, capsys, log, out, message):
    write_log(tmp_path / "log.txt")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "photo.png").write_bytes(b"of the user")
    (tmp_path / "epochs.txt").write_text('{"epoch": 0}\n')
    before = sorted(tmp_path.iterdir())
    code = plots.main(plots.get_args_parser().parse_args([str(tmp_path / log), "--out", str(tmp_path / out)]))
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_bug_is_not_mistaken_for_bad_input(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(charts, "run_names", broken)
    logs = [str(write_log(tmp_path / name / "log.txt")) for name in "ab"]
    with pytest.raises(ValueError, match="could not be broadcast") as raised:
        plots.main(plots.get_args_parser().parse_args([*logs, "--out", str(tmp_path / "c.png")]))
    assert raised.type is ValueError


# ---------------------------------------------------------------- charts of an evaluation


def test_the_sweep_shows_every_network(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: shown.append(figure.axes[0]))
    rows = [{"k": k, "top1": {"value": 50.0 + k, "interval": [49.0, 52.0 + k]}} for k in (1, 20)]
    charts.sweep_chart({"this network": rows, "untrained": rows[:1]}, tmp_path / "sweep.png")
    assert [text.get_text() for text in shown[0].get_legend().get_texts()] == ["this network", "untrained"]
    charts.sweep_chart({"this network": rows}, tmp_path / "sweep.png")
    assert shown[1].get_legend() is None


def test_a_map_lies_along_its_figure(tmp_path, monkeypatch):
    """A long diagonal cloud is turned: no correlation of x and y is left, and x has the larger spread."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    cloud = np.random.default_rng(0).normal(size=(40, 2)) * (20, 2) @ [[1, 1], [-1, 1]] + 50
    monkeypatch.setattr(TSNE, "fit_transform", lambda self, features: cloud)
    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: shown.append(figure.axes[0]))
    charts.feature_map(np.ones((40, 3)), np.arange(40) % 2, ["a", "b"], tmp_path / "map.png")
    drawn = np.concatenate([dots.get_offsets() for dots in shown[0].collections])
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.01 and np.ptp(drawn[:, 0]) > 3 * np.ptp(drawn[:, 1])
    away = lambda x: np.sort(np.linalg.norm(x - x.mean(0), axis=1))  # noqa: E731
    assert np.allclose(away(drawn), away(cloud))  # turned, not stretched


def test_a_map_fills_its_figure(tmp_path):
    rng = np.random.default_rng(0)
    charts.feature_map(rng.standard_normal((60, 4)), np.arange(60) % 3, ["a", "b", "c"], tmp_path / "map.png")
    dark = np.array(Image.open(tmp_path / "map.png").convert("L")) < 250
    rows, columns = dark.any(1).nonzero()[0], dark.any(0).nonzero()[0]
    assert np.ptp(rows) > 0.9 * dark.shape[0] and np.ptp(columns) > 0.9 * dark.shape[1]


def test_a_map_of_one_class_and_of_many(tmp_path):
    rng = np.random.default_rng(0)
    charts.feature_map(rng.standard_normal((6, 4)), np.zeros(6, int), ["one"], tmp_path / "one.png")
    charts.feature_map(rng.standard_normal((40, 4)), np.arange(40) % 30, [str(i) for i in range(30)],
                       tmp_path / "many.png")
    assert Image.open(tmp_path / "one.png").size == Image.open(tmp_path / "many.png").size


@pytest.mark.parametrize("out", ["file/a.png", "folder.png"])
def test_a_picture_that_cannot_be_written_is_named_by_its_flag(tmp_path, capsys, out):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 1.0}\n{"epoch": 1, "train_loss": 0.5}\n')
    code = plots.main(plots.get_args_parser().parse_args([str(tmp_path / "log.txt"), "--out", str(tmp_path / out)]))
    assert code == 2 and f"--out {tmp_path / out}: " in capsys.readouterr().err
