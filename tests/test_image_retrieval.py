"""Revisited Oxford and Paris: its ground truth read safely, its protocol against a loop, the script end to end."""

import json
import os
import pickle
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from processes import launch
from test_retrieval import oracle_precision_at, oracle_trapezoid

import eval_image_retrieval
from imagesets import ground_truth, shapes
from imagesets.decode import Undecodable
from imagesets.ground_truth import Query
from imagesets.landmarks import Cropped
from protocols import landmarks, retrieval
from vision_transformer import build_backbone

BOX = [4.0, 2.6, 40.2, 44.0]


def entry(easy, hard, junk, box=BOX):
    return {"bbx": box, "easy": easy, "hard": hard, "junk": junk}


@pytest.fixture
def dataset(tmp_path):
    """Thirty drawn images of three kinds and different sizes; four queries, the last with nothing to find."""
    folder = tmp_path / "toy" / "jpg"
    folder.mkdir(parents=True)
    for i in range(30):
        image = Image.fromarray(shapes.draw(10 * (i // 3) + i % 3, 48)[0])
        image.resize([(48, 48), (64, 40), (30, 70)][i % 5 % 3]).save(folder / f"db_{i}.jpg", quality=95)
    for q in range(4):
        Image.fromarray(shapes.draw(10 * (500 + q) + q % 3, 48)[0]).save(folder / f"q_{q}.jpg")
    lists = [[i for i in range(30) if i % 3 == q] for q in range(3)]
    gnd = [entry(r[:4], r[4:7], r[7:]) for r in lists] + [entry([], [], [5])]
    gnd[1] = entry([], lists[1][2:5], [])  # nothing easy
    truth = {"imlist": [f"db_{i}" for i in range(30)], "qimlist": [f"q_{q}" for q in range(4)], "gnd": gnd}
    (tmp_path / "toy" / "gnd_toy.json").write_text(json.dumps(truth))
    return tmp_path, truth


OWN = ("--arithmetic", "own")
NETWORK = ("--arch", "vit_nano", "--patch_size", 8, "--imsize", 40, "--num_workers", 0, "--device", "cpu")


def run(*args):
    parsed = eval_image_retrieval.get_args_parser().parse_args([*map(str, args)])
    return eval_image_retrieval.main(parsed)


# ---- Ground truth ----


def with_arrays(truth):
    gnd = [{k: np.array(v) if k == "bbx" else np.array(v, np.int64) for k, v in e.items()} for e in truth["gnd"]]
    gnd[0]["easy"] = [np.int64(row) for row in truth["gnd"][0]["easy"]]  # scalars
    gnd[0]["hard"] = np.array(truth["gnd"][0]["hard"], ">i4")
    return truth | {"gnd": gnd, "imlist": np.array(truth["imlist"]), "qimlist": np.array(truth["qimlist"], object)}


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol_hold_what_json_holds(dataset, protocol):
    folder, truth = dataset
    expected = ground_truth.read_ground_truth(folder / "toy" / "gnd_toy.json")
    assert expected.queries[0] == Query("q_0", tuple(BOX), [0, 3, 6, 9], [12, 15, 18], [21, 24, 27])
    for name, content in (("plain", truth), ("arrays", with_arrays(truth))):
        path = folder / f"{name}.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        assert ground_truth.read_ground_truth(path) == expected
        for old, new in ((b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")):
            text = path.read_bytes()
            if protocol == 0 and old in text:  # names of modules are lines of text there
                path.write_bytes(text.replace(old, new))
                assert ground_truth.read_ground_truth(path) == expected


def test_a_pickle_of_python_2():
    # {'a': array([1, 258])} as Python 2 and NumPy 1 wrote it: the bytes are a string
    content = (b"(dp0\nS'a'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\n"
               b"dtype\n(S'i2'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x01\\x00\\x02\\x01'\ntbs.")
    assert ground_truth.plain(ground_truth.unpickle(content)) == {"a": [1, 258]}


class Runs:
    """What a pickle may name to have it called."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


ATTACKS = {
    "system": lambda trace: Runs(os.system, f"touch {trace}"),
    "eval": lambda trace: Runs(eval, f"open({trace!r}, 'w').close()"),
    "open": lambda trace: Runs(open, trace, "w"),
    "numpy": lambda trace: Runs(np.savetxt, trace, [1]),
    "process": lambda trace: Runs(subprocess.check_call, ["touch", trace]),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_that_runs_something_is_refused(dataset, tmp_path, name, capsys):
    folder, truth = dataset
    trace = tmp_path / "trace"
    content = pickle.dumps(truth | {"gnd": ATTACKS[name](str(trace))})
    (folder / "toy" / "gnd_toy.pkl").write_bytes(content)  # it comes before the .json
    assert run("--data_path", folder, "--dataset", "toy", "--output_dir", tmp_path / "out", *NETWORK) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "gnd_toy.pkl" in error and "not data" in error
    assert not trace.exists() and not (tmp_path / "out").exists()
    try:
        pickle.loads(content)  # nothing but the refusal kept it from running
    except Exception as failed:  # a file is no list of queries
        print(failed)
    assert trace.exists()


def test_a_pickle_can_only_name_the_stand_ins():
    named = {f"{stand_in.__module__}.{stand_in.__qualname__}" for stand_in in ground_truth.ALLOWED.values()}
    assert all(name.startswith("imagesets.ground_truth.") for name in named)
    for content in (b"cnumpy\nsave\n.", b"c__builtin__\ngetattr\n.", b"cnumpy.core.multiarray\nfromfile\n.",
                    b"cimagesets.ground_truth\nArray\n."):
        with pytest.raises(pickle.UnpicklingError, match="not data"):
            ground_truth.unpickle(content)
    with pytest.raises(TypeError):
        ground_truth.unpickle(b"c__builtin__\nbytes\n(I1000000\ntR.")  # nor to fill the memory


def test_images_smaller_than_a_patch_are_refused_by_their_flag(dataset, tmp_path, capsys):
    assert run("--data_path", dataset[0], "--dataset", "toy", "--output_dir", tmp_path / "out", *NETWORK,
               "--imsize", 4) == 2
    assert "error: --imsize 4: smaller than a patch of 8; raise it\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    ({"gnd": None}, "not a ground truth"),
    ({"gnd": []}, "0 entries"),
    ({"imlist": ["db_0"]}, "query q_0: a row outside the 1 images"),
    ({"gnd": [entry([0, 1], [1], [])] * 4}, "occurs twice"),
    ({"gnd": [entry([0], [1], [], [1, 2, 1, 5])] * 4}, "is not a box"),
    ({"gnd": [entry([0], [1], [], [1, 2, float("inf"), 5])] * 4}, "is not a box"),
    ({"gnd": [{"bbx": BOX, "easy": []}] * 4}, "query q_0: no 'hard'"),
])
def test_wrong_ground_truth(dataset, change, message):
    folder, truth = dataset
    path = folder / "wrong.json"
    path.write_text(json.dumps(truth | change))
    with pytest.raises(ValueError, match=message):
        ground_truth.read_ground_truth(path)


def test_broken_files(tmp_path):
    for name, content in (("a.pkl", b""), ("b.pkl", b"no pickle"), ("c.json", b"{"), ("d.json", b"[]"),
                          ("e.pkl", pickle.dumps({"imlist": [1]})[:-3])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            ground_truth.read_ground_truth(tmp_path / name)


# ---- Protocol ----


def test_settings_against_a_loop():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((6, 40))
    queries = []
    for q in range(6):
        rows = rng.permutation(40).tolist()
        queries.append(Query(f"q{q}", BOX, rows[: 4 * (q != 2)], rows[5 : 5 + q], rows[10:18]))
    found = landmarks.measure(np.argsort(-scores), queries)
    for row, wanted, removed in zip(found, ("e", "eh", "h"), ("hj", "j", "ej"), strict=True):
        parts = [{"e": set(q.easy), "h": set(q.hard), "j": set(q.junk)} for q in queries]
        used = [(s, set.union(*(p[w] for w in wanted)), set.union(*(p[r] for r in removed)))
                for s, p in zip(scores, parts, strict=True)]
        used = [one for one in used if one[1]]
        assert row["queries"] == len(used)
        assert row["mAP"]["value"] == pytest.approx(100 * np.mean([oracle_trapezoid(*one) for one in used]))
        for k in (1, 5, 10):
            expected = [oracle_precision_at(s, wanted, k, junk) for s, wanted, junk in used]
            assert row[f"mP@{k}"]["value"] == pytest.approx(100 * np.mean(expected))
    assert [row["queries"] for row in found] == [5, 6, 5]


def test_a_setting_without_queries():
    easy, medium, hard = landmarks.measure(np.array([[0, 1, 2]]), [Query("q", BOX, [0], [], [])])
    assert hard["queries"] == 0 and hard["mAP"] is None and easy["mAP"]["value"] == medium["mAP"]["value"] == 100


# ---- Pictures ----


class Columns:
    """Image i has (rows, columns) sizes[i]; a pixel's value is its column."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def name(self, i):
        return str(i)

    def load(self, i):
        rows, columns = self.sizes[i]
        return torch.arange(columns).expand(3, rows, columns).to(torch.uint8)


def test_crops_are_boxes_of_the_image():
    cropped = Cropped(Columns((20, 30), (20, 30)), [None, (2.4, 5.6, 9.5, 100.0)])
    assert cropped.load(0).shape == (3, 20, 30)
    assert cropped.load(1).shape == (3, 14, 8) and cropped.load(1)[0, 0].tolist() == list(range(2, 10))
    with pytest.raises(Undecodable, match="outside the image"):
        Cropped(Columns((20, 30)), [(30, 0, 40, 10)]).load(0)


@pytest.mark.parametrize("size", [(100, 200), (200, 101), (40, 24), (45, 27), (3, 300)])
def test_published_images_are_thumbnails_by_pillow(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    images = Columns(size)
    images.load = lambda i: torch.from_numpy(pixels).permute(2, 0, 1)
    image, _ = landmarks.Thumbnails(images, 64, 8, (0.0,) * 3, (1 / 255,) * 3)[0]
    thumbnail = Image.fromarray(pixels)
    thumbnail.thumbnail((64, 64), Image.Resampling.LANCZOS)
    assert image.shape == (3, *(max(side, 8) for side in thumbnail.size[::-1]))
    if min(thumbnail.size) >= 8:
        np.testing.assert_allclose(image.permute(1, 2, 0), np.asarray(thumbnail), atol=1e-3)


@pytest.mark.parametrize("size, expected", [
    ((100, 200), (32, 64)), ((200, 100), (64, 32)), ((40, 24), (40, 24)), ((45, 27), (48, 24)), ((3, 300), (8, 64)),
])
def test_images_keep_their_proportions_and_are_never_enlarged(size, expected):
    dataset = landmarks.WholeImages(Columns(size), 64, 8, (0.5,) * 3, (0.25,) * 3)
    image, index = dataset[0]
    assert image.shape == (3, *expected) and index == 0
    # from the first to the last column: nothing is cut off
    levels = image[0, 0] * 0.25 * 255 + 0.5 * 255
    assert levels[0] == pytest.approx(0, abs=4) and levels[-1] == pytest.approx((size[1] - 1) % 256, abs=4)


def test_multiscale():
    model = build_backbone("vit_nano", 8)[0].eval()
    seen = []

    def forward(x):
        seen.append(tuple(x.shape[-2:]))
        return model(x)

    x = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        found = landmarks.multiscale(forward, 8)(x)
        first = torch.nn.functional.normalize(model(x), dim=1)
    assert seen == [(48, 80), (32, 56), (24, 40)]
    expected = sum(torch.nn.functional.normalize(model(torch.nn.functional.interpolate(
        x, s, mode="bilinear", antialias=True)), dim=1) for s in seen[1:]) + first
    torch.testing.assert_close(found, expected / 3)


def test_multiscale_as_published():
    model = build_backbone("vit_nano", 8)[0].eval()
    seen = []

    def forward(x):
        seen.append(tuple(x.shape[-2:]))
        return 3 * model(x) if x.shape[-1] == 83 else model(x)  # norms weigh the scales

    x = torch.randn(1, 3, 50, 83)
    with torch.no_grad():
        found = landmarks.published_multiscale(forward, 8)(x)
        smaller = [torch.nn.functional.interpolate(x, scale_factor=s, mode="bilinear") for s in (0.5**0.5, 0.5)]
        mean = (3 * model(x) + model(smaller[0]) + model(smaller[1])) / 3
        assert seen == [(50, 83), (35, 58), (25, 41)]
        torch.testing.assert_close(found, mean / mean.norm())
        landmarks.published_multiscale(forward, 8)(x[..., :12, :])
    assert seen[-1] == (8, 41)  # the published script stops here


# ---- The script ----


def test_script_on_json_and_pickle(dataset, tmp_path, capsys, monkeypatch):
    folder, truth = dataset
    where = ("--data_path", folder, "--dataset", "toy", "--output_dir", tmp_path / "out")
    assert run(*where, *NETWORK, *OWN) == 0
    printed = capsys.readouterr().out
    first = json.loads((tmp_path / "out" / "eval_image_retrieval.json").read_text())
    assert "4 queries, 30 images" in printed and "mP@10" in printed
    assert [(r["setting"], r["queries"]) for r in first["results"]] == [("easy", 2), ("medium", 3), ("hard", 3)]
    assert first["imsize"] == 40 and len(first["weights_sha256"]) == 64 and "crop_size" not in first
    low, high = first["results"][1]["mAP"]["interval"]
    assert 0 < low <= first["results"][1]["mAP"]["value"] <= high <= 100
    (folder / "toy" / "gnd_toy.json").unlink()
    (folder / "toy" / "gnd_toy.pkl").write_bytes(pickle.dumps(with_arrays(truth)))
    monkeypatch.setattr("protocols.features.extract_features", None)  # the features are kept
    assert run(*where, *NETWORK, *OWN) == 0
    assert json.loads((tmp_path / "out" / "eval_image_retrieval.json").read_text())["results"] == first["results"]
    with pytest.raises(TypeError):  # other boxes are other queries
        truth["gnd"][2]["bbx"] = [0, 0, 48, 48]  # not the first: that one's pixels are in the hash of the images
        (folder / "toy" / "gnd_toy.pkl").write_bytes(pickle.dumps(truth))
        run(*where, *NETWORK, *OWN)


def test_published_queries_are_whole_images(dataset, tmp_path, capsys):
    folder, truth = dataset
    where = ("--data_path", folder, "--dataset", "toy", "--output_dir", tmp_path / "out", *NETWORK)

    def results(*flags):
        assert run(*where, *flags) == 0
        report = json.loads((tmp_path / "out" / "eval_image_retrieval.json").read_text())
        assert f"{report['arithmetic']} arithmetic" in capsys.readouterr().out
        return report["results"]

    published, own = results(), results(*OWN)
    assert published != own and results() == published  # neither takes the other's features from the cache
    for query in truth["gnd"]:
        query["bbx"] = [0, 0, 12, 12]
    (folder / "toy" / "gnd_toy.json").write_text(json.dumps(truth))
    assert results() == published and results(*OWN) != own


def test_pixels_and_multiscale(dataset, tmp_path):
    folder, _ = dataset
    where = ("--data_path", folder, "--dataset", "toy", "--num_workers", 0, "--output_dir", tmp_path)
    multiscale = ("--multiscale", "true", *NETWORK)
    for more in (("--arch", "pixels"), multiscale, (*multiscale, *OWN)):
        assert run(*where, *more) == 0
        assert json.loads((tmp_path / "eval_image_retrieval.json").read_text())["results"][0]["mAP"]["value"] > 0


def test_bad_input_is_refused_in_one_line(dataset, tmp_path, capsys):
    folder, _ = dataset
    where = ("--data_path", folder, "--output_dir", tmp_path / "out")
    cases = [((*where, "--dataset", "roxford5k", *NETWORK), "gnd_roxford5k.pkl"),
             ((*where, "--dataset", "toy", *NETWORK, "--pretrained_weights", "no.pth"), "no.pth: no such file")]
    (folder / "toy" / "jpg" / "db_7.jpg").unlink()
    cases.append(((*where, "--dataset", "toy", *NETWORK), "db_7.jpg"))
    for args, message in cases:
        assert run(*args) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("eval_image_retrieval.py: error: ") and message in error
    assert not (tmp_path / "out").exists()
    (folder / "toy" / "jpg" / "db_7.jpg").write_bytes(b"no image")
    assert run(*cases[2][0]) == 2 and "db_7.jpg" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(dataset, tmp_path, monkeypatch):
    def broken(*args):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(retrieval, "similarities", broken)
    with pytest.raises(ValueError, match="could not be broadcast"):
        run("--data_path", dataset[0], "--dataset", "toy", "--output_dir", tmp_path / "out", *NETWORK)


def test_published_command_line():
    args = eval_image_retrieval.get_args_parser().parse_args(
        "--data_path here --dataset rparis6k --multiscale 1 --imsize 512 --pretrained_weights w --use_cuda true "
        "--arch vit_small --patch_size 16 --checkpoint_key teacher --num_workers 10 --dist_url env:// --local_rank 0"
        .split())
    assert args.multiscale and args.imsize == 512 and args.use_cuda


def test_two_processes_report_what_one_reports(dataset, tmp_path):
    folder, _ = dataset
    flags = ["--data_path", str(folder), "--dataset", "toy", *map(str, NETWORK), "--output_dir"]
    done = launch("eval_image_retrieval.py", *flags, tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert run(*flags, tmp_path / "one") == 0
    one, two = (json.loads((tmp_path / n / "eval_image_retrieval.json").read_text()) for n in ("one", "two"))
    assert one["results"] == two["results"] and one["weights_sha256"] == two["weights_sha256"]
