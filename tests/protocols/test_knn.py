"""k-NN: against figures of the published script and naive oracles, over processes, and the script end to end."""

import json
import math
import os
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import launch, together

import eval_knn
from parallel import Refused
from protocols import knn, knn_evaluation, knn_files, scores, splits
from protocols.features import load_network
from protocols.knn_evaluation import KnnSettings
from protocols.splits import Part

HERE = ROOT / "tests"


def clusters(n=120, m=40, classes=6, width=8, seed=0, dtype=torch.float64):
    """Features in clusters that overlap: (train features, labels, test features, labels)."""
    g = torch.Generator().manual_seed(seed)
    mu = torch.randn(classes, width, generator=g, dtype=dtype)
    labels = [torch.randint(classes, (k,), generator=g) for k in (n, m)]
    features = [mu[y] + 1.2 * torch.randn(len(y), width, generator=g, dtype=dtype) for y in labels]
    return features[0], labels[0], features[1], labels[1]


def oracle(train, train_labels, test, ks, temperatures, classes, metric="cosine", exclude=None):
    """Image by image, neighbour by neighbour, in Python numbers. {(T, k): ranked classes a test image}."""
    train, test = train.tolist(), test.tolist()
    squared_norm = sum(v * v for x in train for v in x) / len(train)
    ranked = defaultdict(list)
    for i, q in enumerate(test):
        found = []
        for j, x in enumerate(train):
            if exclude is not None and exclude[i] == j:
                continue
            if metric == "cosine":
                norms = math.sqrt(sum(v * v for v in q)) * math.sqrt(sum(v * v for v in x))
                similarity = sum(a * b for a, b in zip(q, x, strict=True)) / norms
            else:
                similarity = -sum((a - b) ** 2 for a, b in zip(q, x, strict=True)) / (2 * squared_norm)
            found.append((-round(similarity, 12), j))
        found.sort()
        for T in temperatures:
            for k in ks:
                votes = [0.0] * classes
                for similarity, j in found[:k]:
                    votes[train_labels[j]] += math.exp(-similarity / T)
                ranked[T, k].append(sorted(range(classes), key=lambda c: (-votes[c], c))[:5])
    return ranked


# ---- Figures of the published script ----


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_published_figures(dtype, device):
    random = np.random.RandomState(51)
    mu = random.standard_normal((10, 32))
    labels = random.randint(0, 10, 600), random.randint(0, 10, 250)
    features = [mu[y] + 2.2 * random.standard_normal((len(y), 32)) for y in labels]
    features = [torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)).to(device, dtype) for x in features]
    labels = [torch.from_numpy(y).to(device) for y in labels]
    expected = np.load(HERE / "golden" / "knn.npz")["accuracy"]
    for k, figures in zip((1, 5, 10, 20, 100, 200), expected, strict=True):
        found = eval_knn.knn_classifier(features[0], labels[0], features[1], labels[1], k, 0.07)
        np.testing.assert_allclose(found, figures, atol=0.4 + 1e-9)  # one of 250 images


# ---- The core against the oracle ----


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("rows, columns", [(512, 65_536), (7, 64), (1, 32), (40, 100)])
def test_predictions_are_the_oracles(metric, rows, columns):
    train, y, test, _ = clusters()
    ks, temperatures = [20, 1, 3, 7, 119], [0.02, 0.07, 1.0]
    expected = oracle(train, y.tolist(), test, ks, temperatures, 6, metric)
    found = knn.knn_predict(train, y, test, ks, temperatures, 6, metric=metric, rows=rows, columns=columns)
    assert found.shape == (3, 5, 40, 5)
    for t, T in enumerate(temperatures):
        for i, k in enumerate(ks):
            assert found[t, i].tolist() == expected[T, k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("columns", [65_536, 1000, 96])
def test_neighbours_with_many_ties_come_in_the_order_of_their_rows(dtype, columns):
    g = torch.Generator().manual_seed(3)
    # Entries +-1 in 16 dimensions: similarities are exact multiples of 1/8, most of them equal.
    bank, queries = (torch.randint(2, (n, 16), generator=g).mul(2).sub(1).to(dtype) for n in (3000, 20))
    values, index = knn.nearest(queries, bank, 10, columns=columns, rows=6)
    similarity = queries.double() @ bank.double().T / 16
    expected = similarity.sort(dim=1, descending=True, stable=True)
    assert torch.equal(index, expected[1][:, :10])
    assert torch.equal(values.double(), expected[0][:, :10])


@pytest.mark.parametrize("levels", [3, 50, 10**6])
@pytest.mark.parametrize("width, k", [(64, 1), (4096, 1), (4096, 60), (4096, 100), (960, 960), (960, 2000)])
def test_top_is_a_stable_sort(levels, width, k):
    x = torch.randint(levels, (9, width), generator=torch.Generator().manual_seed(0)).float()
    expected = x.sort(dim=1, descending=True, stable=True)
    for found in (knn.top(x, k), knn.top_by_groups(x, k)):
        assert torch.equal(found[0], expected[0][:, :k])
        assert torch.equal(found[1], expected[1][:, :k])


def test_l2_is_the_cosine_on_unit_vectors_and_does_not_lose_digits_far_from_zero():
    train, y, test, _ = clusters(width=5)
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (train, test)]
    cosine, l2 = (knn.nearest(unit[1], unit[0], 30, metric) for metric in ("cosine", "l2"))
    assert torch.equal(cosine[1], l2[1])
    torch.testing.assert_close(l2[0] + 1, cosine[0])
    near = knn.nearest(test, train, 30, "l2")[1]
    far = knn.nearest((test + 1000).float(), (train + 1000).float(), 30, "l2")[1]
    assert (near == far).double().mean() > 0.98  # float32 rounds the features themselves to 6e-5


def test_leave_one_out():
    train, y, _, _ = clusters(n=60)
    itself = torch.arange(60)
    expected = oracle(train, y.tolist(), train, [1, 10, 59], [0.07], 6, exclude=itself.tolist())
    found = knn.knn_predict(train, y, train, [1, 10, 59], [0.07], 6, exclude=itself, rows=16, columns=32)
    assert found[0].tolist() == [expected[0.07, k] for k in (1, 10, 59)]


def test_a_duplicate_is_found_though_the_image_itself_is_not():
    x = torch.randn(5, 4).repeat(2, 1)  # image i and i + 5 are the same
    _, index = knn.nearest(x, x, 1, exclude=torch.arange(10))
    assert index.squeeze(1).tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_more_than_a_thousand_classes():
    g = torch.Generator().manual_seed(0)
    train = torch.randn(3000, 16, generator=g)
    y = torch.arange(3000) % 1500
    top1, top5 = eval_knn.knn_classifier(train, y, train[:200], y[:200], k=1, T=0.07)
    assert (top1, top5) == (100.0, 100.0)
    expected = oracle(train[:1600].double(), y[:1600].tolist(), train[1500:1510].double(), [20], [0.07], 1500)
    found = knn.knn_predict(train[:1600].double(), y[:1600], train[1500:1510].double(), [20], [0.07], 1500)
    assert found[0, 0].tolist() == expected[0.07, 20]


def test_large_labels_are_not_the_number_of_classes(monkeypatch):
    train, y, test, z = clusters()
    expected = eval_knn.knn_classifier(train, y, test, z, 10, 0.07)
    vote, counts = knn.vote, []
    monkeypatch.setattr(knn, "vote", lambda *args: counts.append(args[-1]) or vote(*args))
    assert eval_knn.knn_classifier(train, y + 10**12, test, z + 10**12, 10, 0.07, num_classes=0) == expected
    assert eval_knn.knn_classifier(train, y + 10**12, test, z + 10**12, 1, 0.07)[0] == \
        eval_knn.knn_classifier(train, y, test, z, 1, 0.07)[0]
    assert counts == [6, 1006, 1000]


def test_few_classes_few_images_large_k():
    train, y, test, z = clusters(n=7, m=5, classes=3)
    assert knn.knn_predict(train, y, test, [200], [0.07], 3).shape == (1, 1, 5, 3)
    assert eval_knn.knn_classifier(train, y, test, z, 200, 0.07) == eval_knn.knn_classifier(train, y, test, z, 7, 0.07)
    one = torch.zeros(5, dtype=torch.int64)
    assert eval_knn.knn_classifier(test, one, test, one, 10, 0.07, num_classes=1) == (100.0, 100.0)


def test_small_temperatures_do_not_overflow():
    train, y, test, z = clusters(dtype=torch.float32)
    nearest_one = eval_knn.knn_classifier(train, y, test, z, 1, 0.07)[0]
    assert eval_knn.knn_classifier(train, y, test, z, 50, 1e-6)[0] == nearest_one


@pytest.mark.parametrize("features, message", [
    (torch.zeros(0, 3), "images > 0"), (torch.zeros(3), "images, width"), (torch.zeros(4, 2), "width"),
    (torch.tensor([[0.0, 1.0, float("nan")]]), "not finite")])
def test_features_that_cannot_be_searched_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        knn.nearest(features, torch.ones(6, 3), 2)


def test_an_image_alone_has_no_neighbours():
    with pytest.raises(Refused, match="at least two"):
        knn.nearest(torch.ones(1, 3), torch.ones(1, 3), 2, exclude=torch.zeros(1, dtype=torch.int64))


# ---- Classes, accuracies, few-shot ----


def test_classes_are_matched_by_name():
    train = Part(torch.eye(3), torch.tensor([0, 1, 2]), ["ant", "bee", "cat"])
    test = Part(torch.eye(3), torch.tensor([0, 1, 2]), ["bee", "cat", "dog"])
    train, test = splits.match_classes(train, test)
    assert train.classes == test.classes == ["ant", "bee", "cat", "dog"]
    assert test.labels.tolist() == [1, 2, 3] and train.labels.tolist() == [0, 1, 2]
    notes = " / ".join(splits.notes_on_classes(train, test))
    assert "1 class(es) have no training images (dog): their 1 test images count as errors" in notes
    assert "no test images (ant)" in notes


def test_classes_in_two_unicode_forms_are_matched():
    train = Part(torch.eye(2), torch.tensor([0, 1]), ["bee", "cafe\u0301"])  # as macOS writes it
    test = Part(torch.eye(2), torch.tensor([0, 1]), ["bee", "caf\u00e9"])
    assert [part.classes for part in splits.match_classes(train, test)] == [["bee", "caf\u00e9"]] * 2


def test_sets_without_a_common_class_are_refused():
    train, test = (Part(torch.eye(2), torch.tensor([0, 1]), names) for names in (["ant", "bee"], ["cat", "dog"]))
    with pytest.raises(Refused, match="--x: .*training: ant, bee; test: cat, dog.*same names"):
        splits.match_classes(train, test, "--x")
    same = train._replace(labels=torch.tensor([0, 0]))  # folders of both, one of them empty
    with pytest.raises(Refused, match="training: ant; test: bee"):
        splits.match_classes(same, same._replace(labels=torch.tensor([1, 1])))


def test_dumped_features_without_a_common_class_are_refused(tmp_path):
    for name, labels in (("train", [0, 1]), ("test", [2, 3])):
        torch.save(torch.eye(2), tmp_path / f"{name}feat.pth")
        torch.save(torch.tensor(labels), tmp_path / f"{name}labels.pth")
    with pytest.raises(Refused, match="--load_features .*no class of the test set"):
        knn_files.load(tmp_path)


def test_a_name_that_stands_for_two_classes():
    same = Part(torch.eye(3), torch.tensor([0, 1, 2]), ["crane", "crane", "cat"])
    assert splits.match_classes(same, same)[1].labels.tolist() == [0, 1, 2]  # by position where the lists are one
    with pytest.raises(Refused, match="'crane' stands for two"):
        splits.match_classes(same, same._replace(classes=["cat", "crane", "crane"]))


def test_accuracies_are_means_over_images_and_over_classes():
    train, y, test, z = clusters(classes=7)
    z[z == 2] = 1  # no test image of class 2
    parts = [Part(f, labels, list("abcdefg")) for f, labels in ((train, y), (test, z))]
    results, notes = knn_evaluation.classify(parts, KnnSettings([5, 1000], [0.07, 0.5]), "cpu")
    assert [(r["k"], r["temperature"]) for r in results] == [(5, 0.07), (120, 0.07), (5, 0.5), (120, 0.5)]
    assert any("1000: k is at most the number of training images, 120" in note for note in notes)
    for row in results:
        T, k = row["temperature"], row["k"]
        expected = oracle(train, y.tolist(), test, [k], [T], 7)[T, k]
        right = np.array([r[0] == c for r, c in zip(expected, z.tolist(), strict=True)])
        five = [c in r for r, c in zip(expected, z.tolist(), strict=True)]
        by_class = {"abcdefg"[c]: 100 * right[z.numpy() == c].mean() for c in set(z.tolist())}
        assert row["top1"]["value"] == pytest.approx(100 * right.mean())
        assert row["top5"]["value"] == pytest.approx(100 * np.mean(five))
        assert row["per_class"] == pytest.approx(by_class) and "c" not in row["per_class"]
        assert row["macro"]["value"] == pytest.approx(np.mean(list(by_class.values())))
        for measure in ("top1", "top5", "macro"):
            low, high = row[measure]["interval"]
            assert low <= row[measure]["value"] <= high


def test_few_shot():
    train, y, test, z = clusters(n=90)
    parts = [Part(f, labels, list("abcdef")) for f, labels in ((train, y), (test, z))]
    results, notes = knn_evaluation.classify(parts, KnnSettings([5], n_per_class=[2, 1000], draws=3), "cpu")
    assert [r["n_per_class"] for r in results] == [2, 1000]
    expected = []
    for draw in range(3):
        support = splits.draw_support(y, 2, seed=draw)
        assert torch.bincount(y[support]).tolist() == [2] * 6
        assert torch.equal(support, splits.draw_support(y, 2, seed=draw))
        expected.append(eval_knn.knn_classifier(train[support], y[support], test, z, 5, 0.07)[0])
    assert len(set(expected)) > 1
    assert results[0]["top1"]["value"] == pytest.approx(np.mean(expected))
    assert results[0]["spread"] == pytest.approx(np.std(expected, ddof=1))
    everything = eval_knn.knn_classifier(train, y, test, z, 5, 0.07)[0]
    assert results[1]["top1"]["value"] == pytest.approx(everything) and results[1]["spread"] == 0
    assert any("--n_per_class 1000" in note for note in notes)


def test_few_shot_with_each_image_left_out():
    train, y, _, _ = clusters(n=40)
    support = splits.draw_support(y, 2, seed=0)
    bank, excluded = knn_evaluation.restrict(Part(train, y, list("abcdef")), support, torch.arange(40))
    assert [support[h].item() if h >= 0 else -1 for h in excluded] == [i if i in support else -1 for i in range(40)]
    expected = oracle(bank.features, bank.labels.tolist(), train, [3], [0.07], 6, exclude=excluded.tolist())
    found = knn.knn_predict(bank.features, bank.labels, train, [3], [0.07], 6, exclude=excluded)
    assert found[0, 0].tolist() == expected[0.07, 3]


# ---- Processes ----


def search_all_ways():
    """Neighbours among 201 and 5 rows, some with many equal similarities, without and with an excluded row."""
    g, found = torch.Generator().manual_seed(0), []
    for n, k in ((201, 20), (5, 4)):
        sets = [(*(torch.randn(m, 6, generator=g) for m in (30, n)), metric) for metric in ("cosine", "l2")]
        sets.append((*(torch.randint(2, (m, 16), generator=g).mul(2).sub(1).float() for m in (30, n)), "cosine"))
        for queries, bank, metric in sets:
            for exclude in (None, torch.arange(30) % n):
                found.append(knn.nearest(queries, bank, k, metric, exclude, rows=8, columns=64))
    return found


def search_in_a_group(rank, world_size, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world_size)
    torch.save(search_all_ways(), f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def test_two_processes_find_the_neighbours_that_one_finds(tmp_path):
    together(search_in_a_group, 2, 2, str(tmp_path))
    expected = search_all_ways()
    for rank in (0, 1):
        for found, one in zip(torch.load(tmp_path / f"{rank}.pth"), expected, strict=True):
            torch.testing.assert_close(found[0], one[0])
            assert torch.equal(found[1], one[1])


# ---- The script ----


def draw_pictures(folder, classes, each=6, size=24, seed=0):
    """Pictures of one colour a class, with noise."""
    random = np.random.RandomState(seed)
    for name in classes:
        colour = np.array([hash_of(name, i) for i in range(3)])
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.clip(colour + 40 * random.standard_normal((size, size + 4, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


def hash_of(name, i):
    return sum(ord(c) * (7 + 5 * i) for c in name) * 37 % 256


NETWORK = ("--arch", "vit_tiny", "--patch_size", 8, "--crop_size", 32, "--num_workers", 0, "--device", "cpu",
           "--batch_size_per_gpu", 5, "--nb_knn", 1, 3)


@pytest.fixture
def pictures(tmp_path):
    draw_pictures(tmp_path / "data" / "train", ["ant", "bee", "cat", "dog", "elk", "fox"])
    draw_pictures(tmp_path / "data" / "val", ["bee", "cat", "dog", "elk", "fox", "gnu"], each=3, seed=1)
    return tmp_path / "data"


def arguments(*flags):
    return eval_knn.get_args_parser().parse_args([str(f) for f in flags])


def run(*flags):
    return eval_knn.main(arguments(*flags))


def test_script(pictures, tmp_path, capsys):
    assert run("--data_path", pictures, "--output_dir", tmp_path / "out", *NETWORK) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "eval_knn.json").read_text())
    assert "no training images (gnu): their 3 test images" in printed and "macro" in printed
    assert report["images"] == [36, 18] and report["crop_size"] == 32 and report["resize_size"] == 37
    assert len(report["weights_sha256"]) == 64 and report["command"]
    row = report["results"][0]
    assert row["k"] == 1 and row["per_class"]["gnu"] == 0 and len(row["top1"]["interval"]) == 2
    assert row["top1"]["value"] == pytest.approx(100 * 5 / 6)  # colours tell even an untrained network the rest


def test_features_are_kept_and_may_be_dumped_and_loaded(pictures, tmp_path, monkeypatch):
    out, files = tmp_path / "out", tmp_path / "files"
    assert run("--data_path", pictures, "--output_dir", out, "--dump_features", files, *NETWORK) == 0
    first = json.loads((out / "eval_knn.json").read_text())
    assert sorted(p.name for p in files.iterdir()) == [
        "features.json", "testfeat.pth", "testlabels.pth", "testnorms.pth", "trainfeat.pth", "trainlabels.pth",
        "trainnorms.pth"]
    monkeypatch.setattr("protocols.features.extract_features", None)  # neither of these may compute any
    assert run("--data_path", pictures, "--output_dir", out, *NETWORK) == 0
    assert run("--load_features", files, "--output_dir", tmp_path / "again", "--nb_knn", 1, 3) == 0
    for folder in (out, tmp_path / "again"):
        again = json.loads((folder / "eval_knn.json").read_text())
        assert again["results"] == first["results"] and again["weights_sha256"] == first["weights_sha256"]


def test_dumped_features_are_normalized_as_published(tmp_path):
    g = torch.Generator().manual_seed(0)
    parts = [Part(50 * torch.rand(n, 1, generator=g) * torch.randn(n, 8, generator=g) + 3, torch.arange(n) % 3,
                  list("abc")) for n in (40, 20)]
    parts[0].features[7] = 0
    knn_files.dump(tmp_path, parts, {"arch": "a"})
    assert json.loads((tmp_path / "features.json").read_text())["normalized"]
    for part, name in zip(parts, ("train", "test"), strict=True):
        written = torch.load(tmp_path / f"{name}feat.pth")
        expected = [row / max(sum(v * v for v in row) ** 0.5, 1e-12) for row in part.features.double().numpy()]
        np.testing.assert_allclose(written, np.array(expected), atol=1e-6)
    loaded, about = knn_files.load(tmp_path)
    assert about == {"arch": "a"}
    for part, again in zip(parts, loaded, strict=True):  # the norms too, which matter for --metric l2 and RankMe
        torch.testing.assert_close(again.features, part.features)
        assert torch.equal(again.labels, part.labels) and again.classes == part.classes
    (tmp_path / "trainnorms.pth").unlink()
    torch.testing.assert_close(knn_files.load(tmp_path)[0][0].features, torch.load(tmp_path / "trainfeat.pth"))


@pytest.mark.parametrize("older", [False, True])
def test_norms_of_other_features_are_not_used(tmp_path, older):
    """The published script wrote into a folder of --dump_features; an older version of this one wrote no hashes."""
    train, y, test, z = clusters(dtype=torch.float32)
    knn_files.dump(tmp_path, [Part(9 * train, y, []), Part(3 * test, z, [])], {})
    if older:
        about = json.loads((tmp_path / "features.json").read_text())
        del about["sha256"]
        (tmp_path / "features.json").write_text(json.dumps(about))
        torch.testing.assert_close(knn_files.load(tmp_path)[0][0].features, 9 * train)
    torch.save(test, tmp_path / "trainfeat.pth")
    if older:
        later = (tmp_path / "trainnorms.pth").stat().st_mtime_ns + 10**9
        os.utime(tmp_path / "trainfeat.pth", ns=(later, later))
    torch.save(z, tmp_path / "trainlabels.pth")
    (tmp_path / "trainnorms.pth").write_bytes((tmp_path / "testnorms.pth").read_bytes())
    if older:
        os.utime(tmp_path / "trainnorms.pth", ns=(later - 1, later - 1))
    with pytest.raises(Refused, match=f"--load_features {tmp_path}: trainnorms.pth .*remove"):
        knn_files.load(tmp_path)
    for name in ("trainnorms.pth", "testnorms.pth", "features.json"):
        (tmp_path / name).unlink()
    assert torch.equal(knn_files.load(tmp_path)[0][0].features, test)


def test_files_of_the_published_script(tmp_path):
    train, y, test, z = clusters(dtype=torch.float32)
    for name, value in (("trainfeat", train), ("trainlabels", y), ("testfeat", test), ("testlabels", z)):
        torch.save(value, tmp_path / f"{name}.pth")
    assert run("--load_features", tmp_path, "--nb_knn", 10, "--device", "cpu") == 0
    report = json.loads((tmp_path / "eval_knn.json").read_text())
    expected = eval_knn.knn_classifier(train, y, test, z, 10, 0.07)
    assert (report["results"][0]["top1"]["value"], report["results"][0]["top5"]["value"]) == pytest.approx(expected)


def test_large_labels_in_files_of_the_published_script(tmp_path):
    train, y, test, z = clusters(dtype=torch.float32)
    reports = []
    for offset in (0, 999_990):
        for name, value in (("trainfeat", train), ("trainlabels", y), ("testfeat", test), ("testlabels", z)):
            torch.save(value + offset if "labels" in name else value, tmp_path / f"{name}.pth")
        assert run("--load_features", tmp_path, "--nb_knn", 10, "--device", "cpu") == 0
        reports.append(json.loads((tmp_path / "eval_knn.json").read_text())["results"][0])
    assert list(reports[1].pop("per_class")) == [str(999_990 + c) for c in range(6)]
    reports[0].pop("per_class")
    assert reports[0] == reports[1]


X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1, 1])


@pytest.mark.parametrize("changed, message", [
    ({"trainlabels": Y - 1}, "labels are not whole numbers from 0; write"),
    ({"trainlabels": Y.double()}, "labels are not whole numbers from 0; write"),
    ({"trainlabels": Y[:5]}, "6 features with labels for another number of images"),
    ({"trainlabels": None}, "one of its parts has labels and the other has none"),
    ({"trainfeat": X[:0], "trainlabels": Y[:0]}, "features are not an (images, width) tensor; write"),
    ({"trainfeat": X[0]}, "features are not an (images, width) tensor; write"),
    ({"testfeat": X[:, :3]}, "training features have width 4, test features 3"),
    ({"trainnorms": Y[:5]}, "trainnorms.pth does not hold a norm per image; remove it"),
    ({"trainfeat": X / 0}, "training features are not finite; give other"),
    ({"features.json": "{broken"}, "features.json is damaged; remove it"),
    ({"features.json": "[1]"}, "features.json is damaged; remove it"),
])
def test_files_of_features_that_cannot_be_used(changed, message, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    whole = {"trainfeat": X, "trainlabels": Y, "testfeat": X, "testlabels": Y}
    for name, value in (whole | changed).items():
        if isinstance(value, str):
            (tmp_path / "in" / name).write_text(value)
        elif value is not None:
            torch.save(value, tmp_path / "in" / f"{name}.pth")
    assert run("--load_features", tmp_path / "in", "--output_dir", tmp_path / "out", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--load_features" in error and message in error
    assert not (tmp_path / "out").exists()


def test_one_folder_is_left_one_out(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--data_path", pictures / "train", "--output_dir", out, "--dump_features", out, *NETWORK) == 0
    assert "leave-one-out" in capsys.readouterr().out
    results = json.loads((out / "eval_knn.json").read_text())["results"]
    train, y = torch.load(out / "trainfeat.pth"), torch.load(out / "trainlabels.pth")
    ranked = knn.knn_predict(train, y, train, [3], [0.07], 6, exclude=torch.arange(36))[0, 0]
    assert results[1]["top1"]["value"] == pytest.approx(100 * (ranked[:, 0] == y).double().mean().item())
    assert not (out / "testfeat.pth").exists()
    assert run("--load_features", out, "--nb_knn", 1, 3) == 0
    assert json.loads((out / "eval_knn.json").read_text())["results"] == results


def test_pictures_without_labels(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--data_path", pictures / "train" / "ant", "--output_dir", out, "--dump_features", out, *NETWORK) == 0
    report = json.loads((out / "eval_knn.json").read_text())
    assert report["results"] == [] and "rank_me" in capsys.readouterr().out
    features = torch.load(out / "trainfeat.pth")
    assert report["label_free"]["rank_me"]["value"] == pytest.approx(scores.label_free(features)["rank_me"]["value"])
    assert report["label_free"]["uniformity"]["value"] < 0 < report["label_free"]["alignment"]["value"] < 2


@pytest.mark.parametrize("count", [1, 5])
def test_black_images_without_labels(count, tmp_path, capsys):
    for i in range(count):
        (tmp_path / "black").mkdir(exist_ok=True)
        Image.new("RGB", (24, 20)).save(tmp_path / "black" / f"{i}.png")
    flags = ("--data_path", tmp_path / "black", "--arch", "pixels", "--output_dir", tmp_path, "--num_workers", 0)
    assert run(*flags) == 0
    found = json.loads((tmp_path / "eval_knn.json").read_text())["label_free"]
    assert found["uniformity"]["value"] == (0 if count > 1 else None)  # 0, the worst: all are equal
    assert found["alignment"]["value"] == 0 and found["rank_me"]["value"] == pytest.approx(1, abs=1e-3)


def test_pixels_are_a_baseline(pictures, tmp_path):
    out = ("--num_workers", 0, "--nb_knn", 3, "--metric", "l2", "--output_dir", tmp_path)
    assert run("--data_path", pictures, "--arch", "pixels", *out) == 0
    report = json.loads((tmp_path / "eval_knn.json").read_text())
    assert report["weights_sha256"] is None and report["results"][0]["top1"]["value"] > 60


@pytest.mark.parametrize("flags, message", [
    (("--data_path", "nowhere"), "--data_path 'nowhere'"),
    (("--pretrained_weights", "nothing.pth"), "nothing.pth: no such file"),
    (("--load_features", "nowhere"), "nowhere"),
    (("--device", "cuda:99"), "--device cuda:99"),
    (("--arch", "pixels", "--pretrained_weights", "x.pth"), "--pretrained_weights x.pth: --arch pixels has no weights"),
    (("--dump_features", __file__), f"--dump_features {__file__}: {__file__} is a file; give a folder"),
    (("--data_path", "shapes:8x32", "--arch", "vit_tini"), "vit_tini"),
    (("--data_path", "shapes:8x32", "--arch", "vit_tiny", "--crop_size", "32", "--resize_size", "16"), "16"),
])
def test_bad_input_is_refused_in_one_line(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*flags, "--num_workers", 0) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("eval_knn.py: error: ") and message in error
    assert not (tmp_path / "eval_knn.json").exists()


@pytest.mark.parametrize("flags", [("--nb_knn", "0"), ("--temperature", "0"), ("--metric", "l1"), ("--nearest", "3")])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        arguments(*flags)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["ant/0.png", "fox/3.png"])  # the first one, and one that workers read
def test_an_image_that_cannot_be_decoded_is_named(name, pictures, tmp_path, capsys):
    (pictures / "train" / name).write_bytes(b"no image")
    assert run("--data_path", pictures, "--output_dir", tmp_path / "out", *NETWORK, "--num_workers", 1) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"train/{name}: " in error and "repair or remove that file" in error


def test_a_bug_is_not_mistaken_for_bad_input(pictures, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(knn_evaluation, "knn_predict", broken)
    with pytest.raises(ValueError, match="could not be broadcast") as raised:
        run("--data_path", pictures, "--output_dir", tmp_path / "out", *NETWORK)
    assert raised.type is ValueError


def test_the_evaluation_takes_values(pictures, tmp_path):
    """What the script reports, from a network that another file has loaded."""
    assert run("--data_path", pictures, "--output_dir", tmp_path / "one", "--label_free", *NETWORK) == 0
    network = load_network("", "vit_tiny", 8, crop_size=32)
    parts, views = knn_evaluation.compute_features(network, str(pictures), "", tmp_path / "two", True, 5, 0)
    about = network.about | {"data_path": str(pictures), "val_data_path": None}
    found = knn_evaluation.evaluate_knn(parts, views, about, tmp_path / "two", KnnSettings([1, 3]), True)
    expected = json.loads((tmp_path / "one" / "eval_knn.json").read_text())
    del expected["command"]
    assert json.loads(json.dumps(found)) == expected and list(found) == list(expected)


def test_published_command_line():
    args = arguments("--batch_size_per_gpu", 64, "--nb_knn", 10, 20, "--temperature", 0.07, "--use_cuda", "True",
                     "--arch", "vit_small", "--patch_size", 16, "--checkpoint_key", "teacher", "--dist_url", "env://",
                     "--local-rank", 0, "--num_workers", 4, "--data_path", "here", "--pretrained_weights", "")
    assert args.use_cuda and args.nb_knn == [10, 20] and args.temperature == [0.07]
    default = arguments()
    assert (default.nb_knn, default.temperature, default.batch_size_per_gpu) == ([10, 20, 100, 200], [0.07], 128)


def test_two_processes_report_what_one_reports(pictures, tmp_path):
    flags = ["--data_path", pictures, *NETWORK, "--label_free", "--output_dir"]
    done = launch("eval_knn.py", *flags, tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert run(*flags, tmp_path / "one") == 0
    one, two = (json.loads((tmp_path / name / "eval_knn.json").read_text()) for name in ("one", "two"))
    assert one["results"] == two["results"] and one["weights_sha256"] == two["weights_sha256"]
    for measure, found in one["label_free"].items():
        assert found["value"] == pytest.approx(two["label_free"][measure]["value"], rel=1e-4)
