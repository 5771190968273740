"""Features: in order, for any batch size and number of processes; computed once; the hashes that say when."""

import os

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from processes import together
from torch import nn
from torch.utils.data import Dataset

from imagesets.decode import Undecodable
from imagesets.sources import open_images
from parallel import Refused
from protocols import extraction, features, splits
from protocols.features import cached_features, extract_features, images_hash, load_network, weights_hash
from vision_transformer import build_backbone


class Numbers(Dataset):
    """Image i is full of i; remembers which were asked for."""

    def __init__(self, n):
        self.n, self.seen = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.seen.append(i)
        return torch.full((1, 2, 2), float(i)), i


def corners(x):
    return torch.stack([x[:, 0, 0, 0], -2 * x[:, 0, 1, 1]], 1)


@pytest.mark.parametrize("n, batch_size, num_workers", [(1, 4, 0), (10, 4, 0), (12, 4, 2), (5, 1, 0), (3, 100, 1)])
def test_every_image_once_and_in_order(n, batch_size, num_workers):
    dataset = Numbers(n)
    found = extract_features(corners, dataset, batch_size, num_workers)
    expected = torch.arange(n).float()
    assert torch.equal(found, torch.stack([expected, -2 * expected], 1)) and found.dtype == torch.float32
    if not num_workers:
        assert dataset.seen == list(range(n))


def test_a_probe_can_be_trained_on_them_and_the_network_gets_no_gradient():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    found = extract_features(lambda x: network(x.double()), Numbers(4), 2, 0)
    probe = nn.Linear(3, 1)
    probe(found).sum().backward()
    assert found.dtype == torch.float32 and not found.requires_grad and probe.weight.grad is not None


def test_autocast_is_used():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    exact, half = (extract_features(network, Numbers(4), 2, 0, autocast=a)
                   for a in (None, torch.autocast("cpu", torch.bfloat16)))
    assert half.dtype == torch.float32 and torch.equal(half, half.bfloat16().float()) and not torch.equal(exact, half)


def test_no_images():
    with pytest.raises(Refused, match="no images"):
        extract_features(corners, Numbers(0))


class Broken(Numbers):
    def __init__(self, n, error):
        super().__init__(n)
        self.error = error

    def __getitem__(self, i):
        if i == 3:
            raise self.error
        return super().__getitem__(i)


@pytest.mark.parametrize("flag", ["--crop_size", "--imsize"])
def test_a_crop_of_too_many_patches_is_refused(flag):
    """131,072 patches of 4 x 4 pixels are 362 x 362: the next crop is one too many."""
    assert load_network("", "vit_nano", 4, crop_size=362 * 4, size_flag=flag).about["crop_size"] == 1448
    with pytest.raises(Refused, match=f"{flag} 1452: .* 363 x 363 patches, more than 131072; lower {flag}"):
        load_network("", "vit_nano", 4, crop_size=363 * 4, size_flag=flag)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("first", [True, False])
def test_an_image_of_182_million_pixels_is_named_in_one_line(first, num_workers, tmp_path):
    """Above Pillow's limit; it is the image whose pixels are in the hash of the images, or another."""
    name = "a.png" if first else "z.png"
    Image.new("1", (13500, 13500)).save(tmp_path / name)
    Image.new("RGB", (40, 40)).save(tmp_path / "b.png")
    network = features.load_network("", "vit_nano", 8, crop_size=32)
    with pytest.raises(Refused, match=f"{name}: .*182250000 pixels.* remove that file") as refused:
        features.network_features(network, open_images(str(tmp_path)), 2, num_workers, tmp_path / "cache")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named_in_one_line(num_workers):
    with pytest.raises(Refused) as raised:
        extract_features(corners, Broken(5, Undecodable("three.png: not an image")), 2, num_workers)
    assert str(raised.value) == "three.png: not an image; repair or remove that file, then start again"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bug_of_a_data_set_keeps_its_type(num_workers):
    with pytest.raises(ValueError, match="could not be broadcast") as raised:
        extract_features(corners, Broken(5, ValueError("operands could not be broadcast")), 2, num_workers)
    assert raised.type is ValueError


def extract_in_a_group(rank, world_size, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world_size)
    found = {}
    for n in (1, 2, 7, 12):
        dataset = Numbers(n)
        found[n] = extract_features(corners, dataset, 2, 0), dataset.seen
    calls = []
    for _ in range(2):
        cached_features(f"{folder}/cache", {"weights": "a"}, lambda: calls.append(1) or torch.ones(2))
    if rank == 1:  # as if this process could not see what the other sees: both compute
        features.read_features = lambda *_: None
    cached_features(f"{folder}/cache", {"weights": "a"}, lambda: calls.append(1) or torch.ones(2))
    torch.save((found, len(calls)), f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_work_and_both_have_all(tmp_path):
    together(extract_in_a_group, 2, 2, str(tmp_path))
    (first, calls0), (second, calls1) = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert calls0 == calls1 == 2
    for n in (1, 2, 7, 12):
        expected = extract_features(corners, Numbers(n), 3, 0)
        assert torch.equal(first[n][0], expected) and torch.equal(second[n][0], expected)
        assert first[n][1] == list(range(0, n, 2))
        assert second[n][1] == list(range(1, n, 2)) + [n - 1] * (n % 2)  # the last once more, and cut off


# ---- Computed once ----


def test_features_are_computed_once_for_a_fingerprint(tmp_path):
    calls = []

    def extract():
        calls.append(1)
        return torch.full((2, 3), float(len(calls)))

    what = {"weights": "a", "images": "b"}
    assert cached_features(tmp_path / "new", what, extract)[0, 0] == 1
    assert torch.equal(cached_features(tmp_path / "new", what, extract), torch.ones(2, 3))
    assert len(calls) == 1
    assert cached_features(tmp_path / "new", what | {"images": "c"}, extract)[0, 0] == 2  # beside the first
    assert len(list((tmp_path / "new").iterdir())) == 2
    assert cached_features(tmp_path / "new", what | {"weights": "d"}, extract)[0, 0] == 3  # in place of the first
    assert len(list((tmp_path / "new").iterdir())) == 2
    assert cached_features(tmp_path / "new", what, extract)[0, 0] == 4
    assert cached_features(None, what, extract)[0, 0] == 5


def test_a_broken_file_is_computed_anew_and_a_folder_in_the_way_is_said(tmp_path, capsys):
    cached_features(tmp_path, {"weights": "a"}, lambda: torch.zeros(1))
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:100])
    assert cached_features(tmp_path, {"weights": "a"}, lambda: torch.ones(1)) == 1
    assert cached_features(tmp_path, {"weights": "a"}, lambda: torch.zeros(1)) == 1
    (tmp_path / "file").write_text("")
    assert cached_features(tmp_path / "file", {"weights": "a"}, lambda: torch.ones(1)) == 1
    assert "not kept" in capsys.readouterr().out


def test_weights_hash_is_of_names_and_values():
    one = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    two = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    two.load_state_dict(one.state_dict())
    assert weights_hash(one) == weights_hash(two) and len(weights_hash(one)) == 64
    two[1].running_mean[0] = 1e-7
    assert weights_hash(one) != weights_hash(two)
    assert weights_hash(one) != weights_hash(nn.Sequential(nn.Identity(), *one)) != weights_hash(one.half())


def test_the_options_of_networks_with_registers_are_their_default():
    """Features that were cached before options counted stay valid."""
    published = {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}
    assert features.unseen_options(published) == {} == features.unseen_options({"interpolate_offset": 0.1})
    assert features.unseen_options(published | {"interpolate_offset": 0.1}) == {"interpolate_offset": 0.1}
    assert features.unseen_options({"num_heads": 12}) == {"num_heads": 12}


@pytest.mark.parametrize("option", [{"interpolate_offset": 0.0}, {"interpolate_antialias": True}])
def test_options_that_tensors_do_not_show_are_part_of_the_fingerprint(tmp_path, option):
    """The same tensors, from images of another size than the positions are for."""
    state = build_backbone("vit_nano", 8, img_size=16)[0].state_dict()
    images, found = open_images("shapes:4x24"), []
    for args in ({}, option):
        torch.save({"teacher": state, "args": {"arch": "vit_nano", "patch_size": 8} | args}, tmp_path / "w.pth")
        network = load_network(str(tmp_path / "w.pth"), crop_size=24)
        cached, exact = (features.network_features(network, images, num_workers=0, cache=folder)
                         for folder in (tmp_path / "cache", None))
        assert torch.equal(cached, exact)
        about = extraction.describe(network, "", "cls", 0, "fp32")
        found.append((exact, extraction.fingerprint(network, images, about, False)))
    assert not torch.equal(found[0][0], found[1][0])
    assert extraction.differences(found[0][1], found[1][1]) == "different network"


def test_images_hash_follows_the_files(tmp_path):
    def drawn(pixels):
        return open_images(f"shapes:4x{pixels}")

    assert images_hash(drawn(16)) == images_hash(drawn(16)) != images_hash(drawn(24))
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    before = images_hash(open_images(tmp_path))
    assert before == images_hash(open_images(tmp_path))
    assert before != images_hash(open_images(tmp_path, in_chans=1))
    os.utime(tmp_path / "b.png", ns=(0, 0))
    touched = images_hash(open_images(tmp_path))
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert len({before, touched, images_hash(open_images(tmp_path))}) == 3


def write_classes(folder, gray):
    """Two classes of two images of equal file sizes and times; the first image is always the same."""
    for i, level in enumerate((0, gray, gray, 9)):
        path = folder / "ab"[i // 2] / f"{i}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (level,) * 3).save(path)
        os.utime(path, ns=(10**18, 10**18))


def test_images_hash_of_torchvision_sets_covers_files_and_pixels(tmp_path, monkeypatch):
    write_classes(tmp_path / "one", 50)
    write_classes(tmp_path / "two", 60)
    one, two = (images_hash(open_images(f"torchvision:ImageFolder:{tmp_path / name}")) for name in ("one", "two"))
    assert one != two
    assert one == images_hash(open_images(f"torchvision:ImageFolder:{tmp_path / 'one'}"))
    os.utime(tmp_path / "one" / "b" / "2.bmp", ns=(10**18, 10**18 + 1))
    assert one != images_hash(open_images(f"torchvision:ImageFolder:{tmp_path / 'one'}"))

    class InMemory(Dataset):
        data = np.zeros((3, 8, 8, 3), np.uint8)

        def __init__(self, root, train=True):
            pass

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return Image.fromarray(self.data[i]), 0

    class Unlisted(InMemory):  # its files are named in no attribute
        data = None

        def __getitem__(self, i):
            return Image.new("RGB", (8, 8)), 0

    for kind in (InMemory, Unlisted):
        monkeypatch.setattr(torchvision.datasets, kind.__name__, kind, raising=False)
    where = f"torchvision:InMemory:{tmp_path / 'one'}"
    before = images_hash(open_images(where))
    assert before == images_hash(open_images(where))
    InMemory.data = InMemory.data.copy()
    InMemory.data[2, 7, 7, 2] = 1
    assert before != images_hash(open_images(where))
    where = f"torchvision:Unlisted:{tmp_path / 'one'}"
    before = images_hash(open_images(where))
    assert before == images_hash(open_images(where)) != images_hash(open_images(where, "val"))
    (tmp_path / "one" / "a" / "new").touch()
    assert before != images_hash(open_images(where))


def test_images_hash_covers_files_with_odd_names_and_without_times(tmp_path):
    def written(name, gray, ns):
        Image.new("RGB", (8, 8)).save(tmp_path / "0.bmp")
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as file:
            Image.new("RGB", (8, 8), (gray,) * 3).save(file, "BMP")
        for file in (path, tmp_path / "0.bmp"):
            os.utime(file, ns=(ns, ns))
        return images_hash(open_images(tmp_path))

    assert written(b"\xff.bmp", 1, 10**18) != written(b"\xff.bmp", 1, 10**18 + 1)
    for ns in (0, 10**9, 315_532_800 * 10**9):  # reproducible archives have 1, or 1980-01-01 as zip's first day
        assert written(b"1.bmp", 1, ns) == written(b"1.bmp", 1, ns) != written(b"1.bmp", 2, ns)


def test_images_hash_of_a_subset_covers_its_set(tmp_path):
    hashes = []
    for gray in (50, 60):
        write_classes(tmp_path / str(gray), gray)
        images = open_images(f"torchvision:ImageFolder:{tmp_path / str(gray)}")
        hashes.append(images_hash(splits.Chosen(images, torch.tensor([0, 2]))))
    assert hashes[0] != hashes[1]


# ---- Pixels and views ----


def test_pixel_features_are_small_pictures():
    images = open_images("shapes:3x64")
    found = features.pixel_features(images)
    assert found.shape == (3, 3 * 32 * 32) and 0 <= found.min() and found.max() <= 1
    means = images.load(1).float().div(255).mean((1, 2))
    torch.testing.assert_close(found[1].view(3, -1).mean(1), means, atol=0.02, rtol=0)


def test_views_are_functions_of_image_and_view():
    images = open_images("shapes:3x48")
    views = [features.RandomViews(images, 24, (0.5,) * 3, (0.25,) * 3, view) for view in (0, 0, 1)]
    for i in range(3):
        same, again, other = (v[i][0] for v in views)
        assert same.shape == (3, 24, 24) and torch.equal(same, again) and not torch.equal(same, other)
        assert -2 <= same.min() and same.max() <= 2
