"""curate.py from end to end: the list, --against, retrieval, resumed embeddings, what it refuses."""

import csv
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from processes import launch

import curate
import extract_features
from imagesets import shapes
from imagesets.joined import Joined
from imagesets.sources import open_images
from parallel import Refused
from protocols import curation, curation_report, embeddings, extraction
from protocols.curation_report import show
from protocols.progress import duration

NETWORK = "--arch pixels --device cpu --num_workers 0".split()


@pytest.fixture(scope="module")
def piles(tmp_path_factory):
    """a: 30 drawn images of class one, 8 of class two; b: copies of five of a: equal, three larger, one darker by 1;
    test: image 7 of a, darker; and embeddings of a."""
    root = tmp_path_factory.mktemp("piles")
    for name in ("a/one", "a/two", "b", "test", "empty"):
        (root / name).mkdir(parents=True)
    for i in range(38):
        drawn(i).save(root / "a" / ("one" if i < 30 else "two") / f"{i:02d}.png")
    shutil.copy(root / "a/one/00.png", root / "b/equal.png")
    for i in (1, 2, 3):
        drawn(i).resize((72, 72), Image.Resampling.NEAREST).save(root / "b" / f"larger{i}.png")
    darker(4).save(root / "b" / "near4.png")
    darker(7).save(root / "test" / "x.png")
    extract(root, "a", "a.npy")
    return root


def drawn(i):
    return Image.fromarray(shapes.draw(i, 36)[0])


def darker(i):
    return Image.fromarray(np.maximum(shapes.draw(i, 36)[0], 1) - 1)


def extract(root, folder, name, *more):
    args = [*NETWORK, "--data_path", str(root / folder), "--output", str(root / name), *more]
    assert extract_features.main(extract_features.get_args_parser().parse_args(args)) == 0


def run(*args):
    return curate.main(curate.get_args_parser().parse_args([*map(str, args)]))


def curated(out, *args):
    """Names of the list's images, and curation.json."""
    assert run(*args, "--output_dir", out, *(() if "--features" in args else NETWORK)) == 0
    names = [line.split("\t")[0].rpartition("/")[2] for line in (out / "list.txt").read_text().splitlines()]
    return names, json.loads((out / "curation.json").read_text())


def test_duplicates_of_two_folders(piles, tmp_path):
    names, report = curated(tmp_path / "out", "--data_path", piles / "a", piles / "b", "--duplicate_threshold", 0.9999)
    assert [(c["stage"], c["dropped"], c["left"]) for c in report["counts"]] == [
        ("images", 0, 43), ("exact duplicates", 1, 42), ("near duplicates", 4, 38)]
    reasons = {row["image"].rpartition("/")[2]: (row["reason"], row["duplicates"].rpartition("/")[2])
               for row in report["dropped"]}
    assert reasons == {"equal.png": ("exact duplicate", "00.png"), "01.png": ("near duplicate", "larger1.png"),
                       "02.png": ("near duplicate", "larger2.png"), "03.png": ("near duplicate", "larger3.png"),
                       "near4.png": ("near duplicate", "04.png")} or reasons.keys() == {
                           "equal.png", "01.png", "02.png", "03.png", "04.png"}  # by the size of their files
    assert len(names) == 38 and "larger1.png" in names and "equal.png" not in names
    page = (tmp_path / "out" / "curation.html").read_text()
    assert "Largest groups of duplicates" in page and "data:image/png" in page


def test_the_list_is_taken_by_data_path_and_keeps_classes(piles, tmp_path):
    names, report = curated(tmp_path / "out", "--features", piles / "a.npy", "--data_path", piles / "a", "--keep", 12,
                            "--duplicate_threshold", 0, "--clusters", 6, 3)
    images = open_images(tmp_path / "out" / "list.txt")
    assert len(images) == len(names) == 12 and images.classes == ["one", "two"]
    assert {(c["class"], c["before"]) for c in report["classes"]} == {("one", 30), ("two", 8)}
    assert [c["after"] for c in report["classes"]] == torch.bincount(images.labels, minlength=2).tolist()
    for i in range(12):
        kind, number = images.name(i).split("/")[-2:]
        assert images.classes[images.labels[i]] == kind
        assert (images.load(i).numpy() == np.moveaxis(shapes.draw(int(number[:2]), 36)[0], -1, 0)).all()
    assert "Clusters" in (tmp_path / "out" / "curation.html").read_text()


def test_drawn_images_are_written_for_the_list(tmp_path):
    names, report = curated(tmp_path / "out", "--data_path", "shapes:20x24", "shapes:30x24", "--keep", 10,
                            "--duplicate_threshold", 0)
    assert report["counts"][1]["dropped"] == 20 and len(names) == 10
    images = open_images(tmp_path / "out" / "list.txt")
    expected = shapes.draw(int(names[0][:8]), 24)[0] if int(names[0][:8]) < 20 else None
    assert expected is None or (images.load(0).numpy() == np.moveaxis(expected, -1, 0)).all()
    names, _ = curated(tmp_path / "out", "--data_path", "shapes:20x24", "shapes:30x24", "--keep", 5,
                       "--duplicate_threshold", 0)
    assert len(names) == 5
    with pytest.raises(Refused, match="no images"):  # what the project wrote is left out of a pile around it
        open_images(tmp_path)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_packed_images_of_any_channels_are_written_for_the_list(tmp_path, channels):
    arrays = np.random.default_rng(0).integers(256, size=(4, 12, 16, channels), dtype=np.uint8)
    with tarfile.open(tmp_path / "x-000.tar", "w") as shard:
        for i, array in enumerate(arrays):
            np.save(tmp_path / f"{i}.npy", array)
            shard.add(tmp_path / f"{i}.npy", f"{i}.npy")
    names, _ = curated(tmp_path / "out", "--data_path", tmp_path / "x-000.tar", "--in_chans", channels)
    images = open_images(tmp_path / "out" / "list.txt", in_chans=channels)
    assert len(names) == 4 and {name[-3:] for name in names} == {"png" if channels in (1, 4) else "npy"}
    assert all((images.load(i).numpy() == np.moveaxis(arrays[i], -1, 0)).all() for i in range(4))


def test_batch_size_and_seed(piles, tmp_path):
    args = ("--data_path", piles / "a", "--keep", 15, "--save_pictures", 0)
    lists = [curated(tmp_path / f"{n}", *args, *more)[0] for n, more in enumerate((
        ("--batch_size_per_gpu", 128), ("--batch_size_per_gpu", 5), ("--seed", 1)))]
    assert lists[0] == lists[1] != lists[2]


def test_against(piles, tmp_path, monkeypatch):
    """An image near the test set is dropped with all of its group, and so is an equal file."""
    (tmp_path / "equal").mkdir()
    shutil.copy(piles / "a/one/03.png", tmp_path / "equal/y.png")
    args = ("--data_path", piles / "a", piles / "b", "--against", piles / "test", tmp_path / "equal",
            "--duplicate_threshold", 0.9999)
    shown = []
    monkeypatch.setattr(curation_report, "show", lambda images, rows, captions, path: shown.append(captions)
                        or show(images, rows, captions, path))
    names, report = curated(tmp_path / "out", *args)
    assert report["counts"][-2:] == [{"stage": "copies of --against", "dropped": 1, "left": 37},
                                     {"stage": "against", "dropped": 1, "left": 36}]
    assert {row["image"].rpartition("/")[2]: row["reason"] for row in report["dropped"] if "against" in row["reason"]
            } == {"larger3.png": "copy of --against", "07.png": "near --against"}
    assert not {"03.png", "larger3.png", "07.png"} & set(names)
    assert sorted(row[0] for row in shown[0]) == ["copy of --against; 1 near", "kept; 1 exact", *["kept; 1 near"] * 3]
    assert run(*args, "--against_threshold", 0.01, "--output_dir", tmp_path / "none", *NETWORK) == 2


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_copies_of_against_are_dropped_whatever_the_threshold(engine):
    """Equal files by their hashes; at a threshold of 1 equal embeddings, whose cosine may be below 1 by rounding."""
    if engine == "faiss":
        pytest.importorskip("faiss")
    images, other = (torch.randn(n, 384, generator=torch.Generator().manual_seed(n)) for n in (40, 10))
    other[3:] = images[20:27]  # near duplicates without an equal file
    sets = Joined([open_images("shapes:40x16")]), Joined([open_images("shapes:3x16"), open_images("shapes:7x24")])
    done = curation.curate(sets[0], images, curation.Settings(against_threshold=1.0), (sets[1], other), engine=engine)
    assert done.kept.tolist() == [*range(3, 20), *range(27, 40)]
    assert done.reasons == {i: ("copy of --against", None) for i in range(3)} | {
        i: ("near --against", None) for i in range(20, 27)}
    assert [(c["stage"], c["dropped"]) for c in done.counts[2:]] == [("copies of --against", 3), ("against", 7)]


def test_retrieval(piles, tmp_path):
    """The neighbours are those of a sort, and clusters give whole clusters."""
    array = embeddings.read(piles / "a.npy")[0].astype(np.float64)
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)
    trusted = np.asarray(darker(7).resize((32, 32), Image.Resampling.BILINEAR), np.float64)
    trusted = np.moveaxis(trusted, -1, 0).ravel()
    expected = np.argsort(-unit @ trusted, kind="stable")[:3]
    args = ("--features", piles / "a.npy", "--data_path", piles / "a", "--trusted", piles / "test",
            "--duplicate_threshold", 0)
    names, _ = curated(tmp_path / "out", *args, "--neighbors", 3)
    assert sorted(names) == sorted(f"{i:02d}.png" for i in expected) and "07.png" in names
    names, report = curated(tmp_path / "clusters", *args, "--from_clusters", 4, "--clusters", 5)
    assert 1 <= len(names) <= 4 and report["counts"][-1]["stage"] == "retrieval"


def test_embeddings_are_kept_and_resumed(piles, tmp_path, monkeypatch, capsys):
    args = ("--data_path", piles / "a", piles / "b", "--output_dir", tmp_path / "out", "--duplicate_threshold", 0,
            *NETWORK)
    compute = extraction.compute_part
    calls = []

    def stopped(job, number, *rest):
        calls.append(job.output.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(job, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "compute_part", stopped)
        assert run(*args) == 130  # interrupted
        assert run(*args) == 0
    assert calls == ["embeddings.npy", "embeddings1.npy", "embeddings1.npy"]
    monkeypatch.setattr(extraction, "compute_part", None)
    assert run(*args) == 0  # nothing is computed again
    assert run(*args, "--trusted", piles / "empty") == 2
    printed = capsys.readouterr().out
    assert printed.index("embeddings of width 3072: at most") < printed.index("part 1 of 1")
    monkeypatch.undo()
    args = ("--features", piles / "a.npy", "--data_path", piles / "a", "--output_dir", tmp_path / "given")
    assert run(*args, "--against", piles / "test") == 0
    printed = capsys.readouterr().out
    assert printed.index("embeddings of width 3072: at most") < printed.index("part 1 of 1")


@pytest.mark.parametrize("settings, products", [
    ({}, 1_000_000 * 3000),
    ({"duplicate_threshold": 0.9}, 1_000_000 * 3000 + 1_000_000**2 // 2),
    ({"from_clusters": 3, "clusters": (500, 7)}, 1_000_000 * 1000 + 500 * (1_000_000 * 50 + 2000)),
    ({"keep": 9, "clusters": (500, 7)}, 1_000_000 * 3000 + 50 * 500 * (1_000_000 + 11 * 7)),
])
def test_the_estimate_counts_every_search_and_copy(monkeypatch, settings, products):
    """Of a million images of width 10, 1000 of --against and 2000 of --trusted."""
    monkeypatch.setattr(curation, "product_rate", lambda *_: 20e6)
    line = curation.estimate(1_000_000, 10, 1000, 2000, curation.Settings(**settings), "cpu")
    assert f"about {duration(products / 1e6)} for" in line
    copies = 3 * 1_000_000 + 2 * 3000 + (8000 if "clusters" in settings else 0)
    memory = 4 * (10 * copies + 3 * 512 * 65_536 + 2 * 65_536 * 10) / 1e9
    assert f"at most {memory:.1f} GB" in line


def test_images_of_the_users_are_neither_removed_nor_replaced(piles, tmp_path, capsys):
    """Whether they are the pile or lie where images of another one would be written."""
    own = tmp_path / "images"
    own.mkdir()
    for i, path in enumerate(sorted((piles / "a").rglob("*.png"))[:12]):
        (own / f"{i:08d}.png").write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    flags = ("--keep", 4, "--duplicate_threshold", 0, "--output_dir", tmp_path, *NETWORK)
    assert run("--data_path", own, *flags) == 0
    assert run("--data_path", "shapes:64x24", *flags) == 2
    assert f"--output_dir {tmp_path}: images/ in it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


def test_a_threshold_that_joins_different_images_is_refused(piles, tmp_path, capsys):
    """Chains of pairs above it leave fewer images than are asked for."""
    out = ("--data_path", piles / "a", "--keep", 20, "--output_dir", tmp_path / "out", *NETWORK)
    assert run(*out, "--duplicate_threshold", 0.1) == 2
    error = capsys.readouterr().err
    features = np.load(tmp_path / "out" / "embeddings.npy")
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ features.T
    np.fill_diagonal(cosines, -1)
    median = np.sort(cosines.max(1))[(len(cosines) - 1) // 2]
    assert "--duplicate_threshold 0.1: only " in error and "fewer than --keep 20" in error
    assert f"within a cosine of {median:.4f}" in error and not (tmp_path / "out" / "list.txt").exists()


@pytest.mark.parametrize("paths, left", [(("b",), 5), (("a", "b"), 38)])
def test_fewer_images_than_keep_are_all_kept_with_a_note(piles, tmp_path, capsys, paths, left):
    """Duplicates don't matter where the pile has fewer than --keep anyway."""
    names, _ = curated(tmp_path / "out", "--data_path", *(piles / path for path in paths), "--keep", 100,
                       "--duplicate_threshold", 0.9999)
    out = capsys.readouterr().out
    assert len(names) == left and f"--keep 100: {left} images are left, fewer than --keep" in out


@pytest.mark.parametrize("other, said", [("val", True), ("test", True), ("more", False)])
def test_images_of_a_test_part_are_told(tmp_path, capsys, other, said):
    for i, part in enumerate(("train", other, "unlabelled")):
        (tmp_path / "pile" / part).mkdir(parents=True)
        drawn(i).save(tmp_path / "pile" / part / "x.png")
    curated(tmp_path / "out", "--data_path", tmp_path / "pile")
    lines = [line for line in capsys.readouterr().out.splitlines() if "--against" in line]
    assert len(lines) == said and all(f"--data_path '{tmp_path}/pile'" in line and "train" in line for line in lines)


def test_a_list_of_the_users_is_not_replaced(piles, tmp_path, capsys):
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted((piles / "a").rglob("*.png"))))
    before = listed.read_bytes()
    assert run("--data_path", listed, "--output_dir", tmp_path, "--keep", 5, *NETWORK) == 2
    assert f"--output_dir {tmp_path}: list.txt: exists" in capsys.readouterr().err and listed.read_bytes() == before
    out = ("--data_path", listed, "--output_dir", tmp_path / "out", "--keep", 5, *NETWORK)
    assert [run(*out) for _ in range(2)] == [0, 0]


@pytest.mark.slow
def test_two_processes_write_the_list_of_one(piles, tmp_path):
    args = ("--data_path", piles / "a", piles / "b", "--against", piles / "test", "--duplicate_threshold", 0.9999,
            "--keep", 20, *NETWORK)
    for n in (1, 2):
        done = launch("curate.py", *args, "--output_dir", tmp_path / f"{n}", processes=n)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1" / "list.txt").read_text() == (tmp_path / "2" / "list.txt").read_text()


@pytest.mark.parametrize("argv, words", [
    ("--data_path {here}/empty", ("--data_path '{here}/empty'", "no images", "give")),
    ("--data_path {here}/none", ("--data_path '{here}/none'", "give")),
    ("--data_path {here}/a --trusted {here}/empty", ("--trusted '{here}/empty'", "no images", "give")),
    ("--data_path {here}/a --against {here}/empty", ("--against '{here}/empty'", "no images", "give")),
    ("--data_path {here}/b --features {here}/a.npy", ("--features {here}/a.npy", "--data_path {here}/b", "again")),
    ("--data_path {here}/a {here}/b --features {here}/a.npy", ("--features", "1 file", "give one for each")),
    ("--data_path {here}/a --features {here}/none.npy", ("--features {here}/none.npy", "no such file", "write")),
    *((f"--data_path {{here}}/a --features {{here}}/a.npy {flag}", (flag, "--features", "leave one")) for flag in (
        "--arch vit_nano", "--patch_size 8", "--checkpoint_key student", "--mean 0.5 0.5 0.5", "--std 0.2 0.2 0.2",
        "--in_chans 1", "--precision bf16", "--resize_size 40", "--crop_size 32", "--max_pixels 999",
        "--skip_bad bad.txt", "--value_range 0.5 9.5")),
    ("--data_path {here}/a --features {here}/a.npy --pretrained_weights x", ("--pretrained_weights x", "--trusted",
                                                                             "leave")),
    *((f"--data_path {{here}}/a {flag}", (flag.rpartition("--")[2], needed, "leave it out")) for flag, needed in (
        ("--clusters 5 3", "--keep or --from_clusters"), ("--iterations 9", "--keep or --from_clusters"),
        ("--resampling_steps 0", "--keep"), ("--neighbors 7", "--trusted"), ("--against_threshold 0.5", "--against"),
        ("--trusted {here}/test --cluster_votes 2", "--from_clusters"))),
    ("--data_path {here}/a --trusted {here}/test --from_clusters 3 --neighbors 7", ("--neighbors 7", "--from_clusters",
                                                                                  "leave one")),
    ("--data_path {here}/a --keep 5 --clusters 39 3", ("--clusters 39", "38 images", "lower")),
    ("--data_path {here}/a --keep 5 --clusters 5 5", ("--clusters 5 5", "falling")),
    ("--data_path {here}/a --keep -1", ("--keep", "-1", "at least 0")),
    ("--data_path {here}/a --duplicate_threshold 1.5", ("--duplicate_threshold", "1.5", "at most 1")),
    ("--data_path {here}/a --against {here}/test --duplicate_threshold 0", ("--against", "--against_threshold")),
    ("--data_path {here}/a --from_clusters 3", ("--from_clusters 3", "--trusted", "give")),
    ("--data_path {here}/a --search fast", ("--search", "'fast'", "faiss")),
    ("--data_path {here}/a --output_dir {here}/a.npy", ("--output_dir {here}/a.npy", "is a file", "give a folder")),
])
def test_refused(piles, tmp_path, capfd, argv, words):
    argv = argv.format(here=piles).split()
    output = [] if "--output_dir" in argv else ["--output_dir", str(tmp_path / "out")]
    network = [] if "--arch" in argv or "--features" in argv else NETWORK
    try:
        code = run(*argv, *output, *network)
    except SystemExit as error:
        code = error.code
    error = capfd.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    assert all(word.format(here=piles) in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_images_that_changed_since_the_extraction_are_refused(piles, tmp_path, capfd):
    shutil.copytree(piles / "test", tmp_path / "own")
    extract(tmp_path, "own", "own.npy")
    drawn(3).save(tmp_path / "own" / "x.png")
    args = ("--features", tmp_path / "own.npy", "--data_path", tmp_path / "own", "--output_dir", tmp_path / "out")
    assert run(*args) == 2 and "changed" in capfd.readouterr().err
    moved = tmp_path / "moved"
    shutil.copytree(piles / "a", moved)
    assert run("--features", piles / "a.npy", "--data_path", moved, "--output_dir", tmp_path / "moved_out") == 0


def test_a_name_that_no_list_can_hold_is_refused(tmp_path, capfd):
    (tmp_path / "pile").mkdir()
    drawn(0).save(tmp_path / "pile" / "a\tb.png")
    assert run("--data_path", tmp_path / "pile", "--output_dir", tmp_path / "out", *NETWORK) == 2
    assert "tab or line break" in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_long_tail(tmp_path, piles):
    """The list of benchmarks/long_tail.py: class sizes fall from all of the largest class to 1 / ratio of it."""
    import long_tail

    assert long_tail.sizes(100, 3, 100) == [100, 10, 1] and long_tail.sizes(5, 1, 50) == [5]
    args = ["--data_path", str(piles / "a"), "--ratio", "10", "--output", str(tmp_path / "list.txt")]
    assert long_tail.main(long_tail.get_args_parser().parse_args(args)) == 0
    with open(tmp_path / "list.txt") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert [row[1] for row in rows] == 30 * ["one"] + 3 * ["two"]


def test_evenness(tmp_path, capsys):
    """benchmarks/evenness.py: the number of equally large classes of the same entropy, beside that of random lists."""
    import evenness

    assert evenness.evenness(np.array([5, 5, 0, 5])) == pytest.approx(3)
    assert evenness.evenness(np.array([1, 3])) == pytest.approx(4 / 3**0.75)
    labels = np.repeat([0, 1], [90, 10])
    median, low, high = evenness.random_range(labels, 20, 200, 0)
    assert 1 <= low < median < high <= 2 and evenness.random_range(labels, 100, 5, 0) == pytest.approx(
        [evenness.evenness(np.array([90, 10]))] * 3)
    for name, rows in (("pile", "aaab"), ("curated", "ab"), ("other", "ac")):
        for i, label in enumerate(rows):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{i}{label}.png")
        (tmp_path / f"{name}.txt").write_text("".join(f"{tmp_path}/{i}{c}.png\t{c}\n" for i, c in enumerate(rows)))
    flags = ["--pile", str(tmp_path / "pile.txt"), "--curated", str(tmp_path / "curated.txt")]
    assert evenness.main(evenness.get_args_parser().parse_args(flags)) == 0
    printed = capsys.readouterr().out
    assert "3 1" in printed and "1.75" in printed and "2.00" in printed
    flags[3] = str(tmp_path / "other.txt")
    assert evenness.main(evenness.get_args_parser().parse_args(flags)) == 2
    assert "--curated" in capsys.readouterr().err
