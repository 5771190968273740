"""Progress lines by a clock of its own."""

from protocols import progress


def test_lines_come_from_the_first_seconds_with_the_time_left(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = progress.Progress(100, "images")
    for _ in range(50):
        now += 1.0
        lines.done(2)
    assert capsys.readouterr().out.splitlines() == [
        "6 of 100 images  eta 0:00:47", "46 of 100 images  eta 0:00:27", "86 of 100 images  eta 0:00:07"]


def test_short_work_prints_nothing(monkeypatch, capsys):
    lines = progress.Progress(3, "images")
    for _ in range(3):
        lines.done()
    assert not capsys.readouterr().out
