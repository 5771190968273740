"""The index of a listing: correct after every change, the same in all processes, shared in the workers' memory."""

import os
import pickle
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from processes import ENV, launch

from benchmarks.listing import growth_in_a_fork
from imagesets import listing
from imagesets.decode import Reading
from imagesets.sources import Files, open_images

FLAT_MB = 3


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DINO_CACHE", str(folder))
    monkeypatch.setattr(listing, "WORTH_AN_INDEX", 5)
    return folder


@pytest.fixture
def tree(tmp_path):
    """Twelve empty files in class folders, made long ago."""
    for i in range(12):
        touch(tmp_path / "set" / "abc"[i % 3] / "deep" / f"{i:02d}.jpg")
    age(tmp_path / "set")
    return tmp_path / "set"


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def age(folder: Path, seconds: float = 100) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            os.utime(path, (time.time() - seconds,) * 2)


def listed(folder: Path, monkeypatch=None) -> tuple:
    images = open_images(folder)
    names = [os.path.relpath(images.name(i), folder) for i in range(len(images))]
    return names, None if images.labels is None else images.labels.tolist(), images.classes


def walks(monkeypatch) -> list:
    """Folders that are read from now on."""
    seen, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (seen.append(path), real(path))[1])
    return seen


def test_the_second_start_reads_the_index_only(tree, cache, monkeypatch, capsys):
    first = listed(tree)
    (index,) = cache.iterdir()
    assert capsys.readouterr().out == f"{tree}: 12 images, saved in the index {index}; delete it to search again\n"
    said = f"{tree}: 12 images from the index {index}; delete it to search again\n"
    seen = walks(monkeypatch)
    assert listed(tree) == first and not seen and capsys.readouterr().out == said
    assert first[0] == sorted(first[0]) and first[1] == [0] * 4 + [1] * 4 + [2] * 4 and first[2] == ["a", "b", "c"]
    index.unlink()
    assert listed(tree) == first and seen


CHANGES = {
    "new file": lambda tree: touch(tree / "b/deep/new.jpg"),
    "file gone": lambda tree: (tree / "c/deep/05.jpg").unlink(),
    "file renamed": lambda tree: (tree / "c/deep/05.jpg").rename(tree / "c/deep/06.jpg"),
    "new folder with a file": lambda tree: touch(tree / "a/deep/er/new.jpg"),
    "new class, empty": lambda tree: (tree / "aa").mkdir(),
    "folder renamed": lambda tree: (tree / "a").rename(tree / "z"),
    "folder gone": lambda tree: [(tree / "a/deep").rename(tree.parent / "away")],
    "link to elsewhere": lambda tree: (tree / "d").symlink_to(touch(tree.parent / "other/x.jpg").parent),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_names_is_seen(tree, cache, monkeypatch, change):
    before = listed(tree)
    CHANGES[change](tree)
    after = listed(tree)
    monkeypatch.setenv("DINO_CACHE", "")
    assert after == listed(tree) != before


@pytest.mark.parametrize("seconds", [0, 4_000_000_000])
def test_times_that_show_no_change_are_not_trusted(tree, cache, seconds):
    def stopped():
        for path in (tree, *tree.rglob("*")):
            os.utime(path, (seconds, seconds))

    stopped()
    before = listed(tree)
    assert not list(cache.iterdir())
    touch(tree / "b/deep/new.jpg")
    stopped()
    assert len(listed(tree)[0]) == len(before[0]) + 1
    age(tree)
    listed(tree)
    (index,) = cache.iterdir()  # as an older version may have written it
    table = listing.read_index(index)
    table["stamps"][:, 0] = seconds * 10**9
    listing.write_index(index, table)
    touch(tree / "b/deep/newer.jpg")
    stopped()
    assert len(listed(tree)[0]) == len(before[0]) + 2


def test_what_is_passed_over_is_counted_also_from_the_index(tree, cache, capsys):
    expected = listed(tree)
    for name in ("a/@eaDir/00.jpg/thumb.jpg", "__MACOSX/a/00.jpg", "a/.AppleDouble/00.jpg",
                 "#recycle/a/00.jpg", "a/$RECYCLE.BIN/00.jpg"):
        touch(tree / name)
    assert listed(tree) == expected and "passed over" not in capsys.readouterr().out
    for name in ("a/0.raw", "b/1.RAW", "LICENSE"):
        touch(tree / name)
    age(tree)
    for _ in range(2):
        assert listed(tree) == expected
        assert capsys.readouterr().out.endswith(
            f"--data_path '{tree}': 3 files of other suffixes are passed over (2 .raw, 1 without suffix)\n")
    (index,) = cache.iterdir()  # as an older version may have written it
    table = listing.read_index(index)
    os.utime(tree / "__MACOSX", (10**9, 10**9))
    table["watched"] = listing.pack([*listing.Texts(table["watched"]), os.fsencode(tree / "__MACOSX")])
    table["stamps"] = np.concatenate([table["stamps"], [[10**18, 0]]])
    listing.write_index(index, table)
    listed(tree)
    assert "from the index" not in capsys.readouterr().out


def test_an_image_beside_class_folders_is_named(tree, capsys):
    touch(tree / "stray.jpg")
    assert listed(tree)[1] is None
    line = capsys.readouterr().out.splitlines()[-1]
    assert "no labels" in line and "1 of 13 images" in line and "'stray.jpg'" in line and "move" in line


def test_odd_folders_and_other_ways_to_them(tmp_path, monkeypatch, capsys):
    odd = tmp_path / "{a} %s\udcff"
    for i in range(6):
        touch(odd / f"{i}.jpg")
    age(odd)
    names = [os.path.basename(name) for name in listed(odd)[0]]
    (tmp_path / "link").symlink_to(odd)
    monkeypatch.chdir(tmp_path)
    seen = walks(monkeypatch)
    assert listed(Path("link"))[0] == names == [f"{i}.jpg" for i in range(6)] and not seen
    assert open_images("link").name(0) == "link/0.jpg" and "from the index" in capsys.readouterr().out


def test_a_linked_folder_is_watched_where_it_lies(tree, tmp_path):
    (tree / "d").symlink_to(touch(tmp_path / "other" / "x.jpg").parent)
    age(tree), age(tmp_path / "other")
    assert "d/x.jpg" in listed(tree)[0]
    touch(tmp_path / "other" / "y.jpg")
    assert "d/y.jpg" in listed(tree)[0]


def test_the_content_of_files_does_not_matter(tree, cache, monkeypatch):
    listed(tree)
    (tree / "a/deep/00.jpg").write_text("something else")
    seen = walks(monkeypatch)
    listed(tree)
    assert not seen


def test_what_was_just_written_is_not_trusted(tree, cache):
    touch(tree / "a" / "new.jpg")
    listed(tree)
    assert not list(cache.iterdir())  # a file made within the same tick of the clock would never be seen


def test_nor_after_a_long_search(cache, monkeypatch):
    clock = [10**18]
    monkeypatch.setattr(listing.time, "time_ns", lambda: clock[0])

    def search(stamps):
        stamps.append((b"folder", clock[0], 0))  # changed as the search began
        clock[0] += 10**11
        return {"paths": listing.pack([b"a"] * 9)}

    listing.listed("folder", frozenset(), search)
    assert not list(cache.iterdir())


def test_small_folders_need_none(tree, cache, monkeypatch):
    monkeypatch.setattr(listing, "WORTH_AN_INDEX", 13)
    assert len(listed(tree)[0]) == 12 and not list(cache.iterdir())


def test_folders_channels_and_splits_have_their_own(tree, tmp_path, cache):
    for i in range(6):
        touch(tmp_path / "set" / "train" / f"{i}.npy")
    age(tree)
    assert len(open_images(tree)) == 18 and len(open_images(tree, "train")) == 6
    assert len(open_images(tree, in_chans=5)) == 6 and len(list(cache.iterdir())) == 3
    assert len(open_images(tree)) == 18 and len(open_images(tree, in_chans=5)) == 6


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x05\x06" + bytes(18)])
def test_a_broken_index_is_replaced(tree, cache, content):
    first = listed(tree)
    (index,) = cache.iterdir()
    whole = index.read_bytes()
    for broken in (content, whole[: len(whole) // 2]):
        index.write_bytes(broken)
        assert listed(tree) == first and index.read_bytes() == whole


def test_without_a_place_for_it(tree, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "file" / "cache"))
    assert len(listed(tree)[0]) == 12
    assert "no index is saved" in capsys.readouterr().out
    monkeypatch.setenv("DINO_CACHE", "")
    assert len(listed(tree)[0]) == 12 and capsys.readouterr().out == ""


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("DINO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert listing.cache_dir() == tmp_path / "dino"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert listing.cache_dir() == tmp_path / ".cache" / "dino"


def test_texts():
    strings = [b"a", b"", b"\xff/x y", b"long" * 100]
    texts = listing.Texts(listing.pack(strings))
    assert list(texts) == strings and len(texts) == 4 and list(pickle.loads(pickle.dumps(texts))) == strings
    assert list(listing.Texts(listing.pack([]))) == []


# ---- Processes ----


def test_one_process_searches_and_all_get_its_listing(tree, tmp_path):
    """Two processes, without an index: the second reads no folder, and raises the first's errors."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import os, sys
            import parallel
            from imagesets.sources import open_images
            parallel.start("cpu")
            real, seen = os.scandir, []
            os.scandir = lambda path: (seen.append(path), real(path))[1]
            images = open_images(sys.argv[1])
            assert bool(seen) == parallel.is_main(), seen
            found = [images.name(i) for i in range(len(images))], images.labels.tolist(), images.classes
            assert found[1:] == ([0] * 4 + [1] * 4 + [2] * 4, ["a", "b", "c"])
            assert parallel.gather_objects(found) == [found] * 2
            try:
                open_images(sys.argv[2])
            except parallel.Refused as error:
                assert "no images in" in str(error), error
                os.write(1, b"refused %d\\n" % parallel.rank())
            os.scandir = None
            open_images(sys.argv[1])  # a bug ends rank 0: the other must not wait forever
        """)
    )
    (tmp_path / "empty").mkdir()
    done = launch(script, tree, tmp_path / "empty", env=ENV | {"DINO_CACHE": ""}, timeout=120, processes=2)
    assert sorted(done.stdout.split("\n")) == ["", "refused 0", "refused 1"], done.stderr
    assert done.returncode == 1 and "TypeError: 'NoneType' object is not callable" in done.stderr, done.stderr


# ---- Memory ----


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux says what memory is private")
def test_a_worker_that_reads_all_names_gains_no_memory():
    """A list of names, in contrast, is copied page by page as reference counts change."""
    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(200_000)]
    files = Files("/data", listing.Texts(listing.pack(map(str.encode, names))), None, [], Reading(3, 100))
    assert growth_in_a_fork(names.__getitem__, len(names)) > 3 * FLAT_MB
    assert growth_in_a_fork(files.path, len(names)) < FLAT_MB
