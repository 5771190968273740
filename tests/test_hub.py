"""torch.hub entries, and code as it is written against the published hub models."""

import argparse
import ast
import copy
import importlib
import io
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT
from dinov2_figures import names_of
from golden_weights import GOLDEN

import vision_transformer
from vision_transformer import VisionTransformer, build_backbone
from weights import published
from weights.layouts import recognize

NAMES = ["dino_resnet50", "dino_vitb16", "dino_vitb8", "dino_vits16", "dino_vits8", "dino_xcit_medium_24_p16",
         "dino_xcit_medium_24_p8", "dino_xcit_small_12_p16", "dino_xcit_small_12_p8",
         "dinov2_vitb14", "dinov2_vitb14_reg", "dinov2_vitg14", "dinov2_vitg14_reg",
         "dinov2_vitl14", "dinov2_vitl14_reg", "dinov2_vits14", "dinov2_vits14_reg"]  # fmt: skip


def load(name, **kwargs):
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


@pytest.fixture(scope="module")
def random_model():
    torch.manual_seed(0)
    return load("dino_vits16", pretrained=False).eval()


@pytest.fixture
def model(random_model):
    return copy.deepcopy(random_model)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder in place of the published address, and an empty cache of downloads."""
    monkeypatch.setattr(published, "BASE", (tmp_path / "site").as_uri())
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

    def put(name, content):
        path = tmp_path / "site" / published.PUBLISHED[name].path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    return put


# ---- Entries ----


def test_entries_are_the_published_ones():
    hubconf = importlib.import_module("hubconf")
    entries = [f for f in dir(hubconf) if callable(getattr(hubconf, f)) and not f.startswith("_")]  # torch.hub.list
    assert sorted(entries) == ["dino", *NAMES] and sorted(published.PUBLISHED) == NAMES
    for name in NAMES:  # what torch.hub.help prints
        row = published.PUBLISHED[name]
        classifier = "k-NN" if name.startswith("dinov2_") else "20-NN"  # the k of DINOv2's figures is not stated
        assert f"{classifier} {row.knn_top1} %, linear {row.linear_top1} %" in getattr(hubconf, name).__doc__


def test_any_checkpoint_by_the_generic_entry(tmp_path):
    """Architecture, patch size, image size and channels are the file's; so are registers and networks of timm."""
    for number, (arch, patch, options) in enumerate((
        ("vit_nano", 8, {"img_size": 64}), ("vit_tiny", 4, {"img_size": 32, "in_chans": 4}),
        ("vit_nano", 8, {"img_size": 32, "num_register_tokens": 2, "init_values": 1.0}),
        ("resnet18", 16, {"in_chans": 1}), ("mobilenetv3_small_050", 16, {}),
    )):
        source, _ = build_backbone(arch, patch, **options)
        args = {"arch": arch, "patch_size": patch, "in_chans": options.get("in_chans", 3)}
        path = tmp_path / f"{number}.pth"
        torch.save({"teacher": {f"backbone.{k}": v for k, v in source.state_dict().items()}, "args": args}, path)
        x = torch.randn(2, args["in_chans"], 64, 64)
        assert torch.equal(load("dino", weights=path).eval()(x), source.eval()(x)), arch
    plain = {k: v for k, v in source.state_dict().items()}  # a network that tensors alone do not tell
    torch.save(plain, path)
    with pytest.raises(ValueError, match="4.pth .*arch="):
        load("dino", weights=path)
    assert torch.equal(load("dino", weights=path, arch=arch).eval()(x), source(x))


def test_xcit_takes_the_published_state_dict(tmp_path):
    """Strictly, alone and as a part of another module; timm's own names too."""
    from test_layouts import published_xcit, random_like

    model = load("dino_xcit_small_12_p16", pretrained=False)
    state = random_like(model.state_dict())
    theirs = published_xcit(state)
    for names, target in ((theirs, model), ({f"backbone.{k}": v for k, v in theirs.items()},
                                            torch.nn.ModuleDict({"backbone": copy.deepcopy(model)})), (state, model)):
        for tensor in target.state_dict().values():
            tensor.zero_()
        before = dict(names)
        target.load_state_dict(names, strict=True)
        assert all(torch.equal(v, state[k.removeprefix("backbone.")]) for k, v in target.state_dict().items())
        assert names == before
    with pytest.raises(RuntimeError, match="pos_embed"):
        model.load_state_dict({k: v for k, v in theirs.items() if "pos_embeder" not in k}, strict=True)
    torch.save(model, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False).load_state_dict(theirs)


def test_addresses():
    row = published.PUBLISHED["dino_vits16"]
    assert row.url == ("https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth")
    folder = "https://dl.fbaipublicfiles.com/dinov2"
    for size in ("vits14", "vitb14", "vitl14", "vitg14"):
        plain, registers = (published.PUBLISHED[f"dinov2_{size}{suffix}"] for suffix in ("", "_reg"))
        assert plain.url == f"{folder}/dinov2_{size}/dinov2_{size}_pretrain.pth"
        assert registers.url == f"{folder}/dinov2_{size}/dinov2_{size}_reg4_pretrain.pth"


def test_random_networks():
    with torch.device("meta"):
        for name in NAMES:
            row, model = published.PUBLISHED[name], load(name, pretrained=False)
            width = {"vit_small": 384, "vit_base": 768, "vit_large": 1024, "vit_giant2": 1536, "resnet50": 2048}.get(
                row.arch, 384 if "small" in name else 512)
            assert model(torch.zeros(2, 3, 32, 32)).shape == (2, width)
        assert load("dino_vits8", pretrained=False, drop_path_rate=0.1, num_classes=3).head.out_features == 3


def test_published_file_is_downloaded_once(site, model, tmp_path):
    shapes = json.loads((GOLDEN / "backbone_state_dict_shapes.json").read_text())["vit_small_patch16"]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == shapes
    site("dino_vits16", model.state_dict())
    for _ in range(2):
        loaded = load("dino_vits16")
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
        for file in (tmp_path / "site").rglob("*.pth"):
            file.unlink()
    assert loaded.training and next(loaded.parameters()).requires_grad  # as published
    assert os.listdir(tmp_path / "hub" / "checkpoints") == ["dino_deitsmall16_pretrain.pth"]


@pytest.mark.parametrize("registers", [0, 4])
def test_published_file_of_dinov2(site, registers):
    name = "dinov2_vits14_reg" if registers else "dinov2_vits14"
    golden = names_of("state_dict_vit_small14.json")
    shapes = golden["without_registers"] | (golden["with_4_registers_added"] if registers else {})
    state = {k: torch.randn(v) * 0.02 for k, v in shapes.items()}
    site(name, state)
    for options in ({}, {"weights": "LVD142M"}):
        model = load(name, **options)
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert (model.method, model.num_register_tokens, model.n_blocks) == ("dinov2", registers, 12)
    assert (model.interpolate_antialias, model.interpolate_offset) == ((True, 0.0) if registers else (False, 0.1))
    assert load(name, pretrained=False).state_dict().keys() == state.keys()
    if not registers:
        site("dinov2_vits14_reg", state)
        with pytest.raises(ValueError, match="dinov2_vits14_reg: .*missing: register_tokens"):
            load("dinov2_vits14_reg")


@pytest.mark.parametrize("name", ["dino_resnet50", "dino_xcit_small_12_p16"])
def test_published_file_of_other_networks(site, name):
    model = load(name, pretrained=False)
    state = model.state_dict()
    if "xcit" in name:
        from test_layouts import published_xcit

        state = published_xcit(state)
    site(name, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")})
    loaded = load(name).state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())


def test_without_a_network_the_message_says_what_to_do(site):
    with pytest.raises(OSError, match=r"dino_deitsmall16_pretrain.pth can't be downloaded .*give its path as weights="):
        load("dino_vits16")


def test_only_whole_files_are_accepted(site, model, tmp_path):
    state = dict(model.state_dict())
    del state["norm.weight"]
    state["norm.extra"] = torch.zeros(1)
    state["cls_token"] = torch.zeros(1, 1, 380)
    site("dino_vits16", state)
    with pytest.raises(ValueError, match="dino_vits16: .*missing: norm.weight; wrong shape: cls_token .1, 1, 380.* "
                                         "unused: norm.extra"):
        load("dino_vits16")
    site("dino_vits8", b"<html>not found</html>")
    with pytest.raises(ValueError, match="not a readable checkpoint .* remove it to download it again"):
        load("dino_vits8")
    torch.save(model.state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="dino_vitb16: .*small.pth holds .* a vit_small, not of a vit_base"):
        load("dino_vitb16", weights=str(tmp_path / "small.pth"))
    with pytest.raises(FileNotFoundError, match="absent.pth: no such file"):
        load("dino_vits16", weights=str(tmp_path / "absent.pth"))


def test_own_weights(tmp_path):
    trained, _ = build_backbone("vit_small", 16, img_size=32)
    teacher = {f"backbone.{k}": v for k, v in trained.state_dict().items()} | {"head.mlp.0.weight": torch.zeros(2, 2)}
    torch.save({"teacher": teacher, "student": {}, "args": argparse.Namespace(arch="vit_small")}, tmp_path / "w.pth")
    for where in (tmp_path / "w.pth", str(tmp_path / "w.pth"), (tmp_path / "w.pth").as_uri()):
        loaded = load("dino_vits16", weights=where, pretrained=False)
        assert all(torch.equal(v, trained.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("name, options", [
    ("dinov2_vits14", {}), ("dinov2_vits14", {"init_values": 0.1, "num_register_tokens": 2}),
    ("dinov2_vits14_reg", {"num_register_tokens": 4}), ("dino_vits16", {"init_values": 0.1})])
def test_own_weights_of_another_kind_than_the_published(tmp_path, name, options):
    """Without LayerScale, with registers, or of DINOv2 where the entry is DINO's: the file tells."""
    patch = 16 if name == "dino_vits16" else 14
    trained, _ = build_backbone("vit_small", patch, img_size=28, method="dinov2", **options)
    args = {"arch": "vit_small", "patch_size": patch, "global_crops_size": 28, "method": "dinov2"}
    torch.save({"teacher": trained.state_dict(), "args": args}, tmp_path / "w.pth")
    loaded, x = load(name, weights=tmp_path / "w.pth").eval(), torch.randn(2, 3, 42, 28)
    assert torch.equal(loaded(x), trained.eval()(x))


def test_downloads_of_equal_names_stay_apart(tmp_path, monkeypatch):
    urls = []
    for part in "ab":
        (tmp_path / part).mkdir()
        (tmp_path / part / "checkpoint.pth").write_text(part)
        urls.append((tmp_path / part / "checkpoint.pth").as_uri())
    assert [published.fetch(url, tmp_path / "cache").read_text() for url in urls] == ["a", "b"]
    digest = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # of "a"
    monkeypatch.setattr(published, "SHA256", dict.fromkeys(urls, digest))
    assert published.fetch(urls[0], tmp_path / "cache").read_text() == "a"
    with pytest.raises(ValueError, match=f"SHA-256 3e23e8.* instead of {digest}; remove the file"):
        published.fetch(urls[1], tmp_path / "cache")


# ---- A process with modules of its own ----


def project_names() -> set[str]:
    """Names of the project's modules and rooms, as `import` takes them."""
    return {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/__init__.py")}


def closure() -> tuple[set[str], set[str]]:
    """What a hub entry executes: the modules that it loads by path, and the project's names that these import."""
    by_path, imported, todo = {"hubconf"}, set(), ["hubconf"]
    while todo:
        for node in ast.walk(ast.parse((ROOT / f"{todo.pop()}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_load_module":
                name = ast.literal_eval(node.args[0])
                todo += {name} - by_path
                by_path.add(name)
    return by_path, imported & project_names()


def test_what_the_hub_loads_imports_nothing_of_the_project():
    by_path, imported = closure()
    assert by_path == {"hubconf", "vision_transformer", "weights/layouts", "weights/published"} and not imported


# One import of torch, then a child process for each order of imports.
PROGRAM = """
import copy, importlib, os, pickle, sys
import torch
hub, *names = sys.argv[1:]
torch.set_num_threads(1)

def theirs():
    return {name: importlib.import_module(name) for name in names}

def check(first):
    before = theirs() if first else {}
    model = torch.hub.load(hub, "dino_vits16", source="local", pretrained=False).eval()
    torch.hub.load(hub, "dino_vits16", source="local", weights="weights.pth")
    modules = theirs()
    for name, module in modules.items():
        assert module.__name__ == name and not any(p.startswith(hub) for p in module.__path__ or [module.__file__])
        assert not first or before[name] is module is sys.modules[name]
    assert hub not in sys.path and type(model).__module__.startswith("_dino_")
    x = torch.zeros(1, 3, 32, 32)
    again = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    assert all(torch.equal(other(x), model(x)) for other in again)

for first in (True, False):
    child = os.fork()
    if child == 0:
        check(first)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "theirs first" if first else "theirs later"
"""


def program(folder, source, *args):
    """Run a program in a folder, with nothing of this project on its path."""
    (folder / "program_of_the_user.py").write_text(source)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "program_of_the_user.py", *map(str, args)], cwd=folder, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["module", "package", "namespace"])
def test_modules_of_the_users_own(tmp_path, model, kind):
    names = {part for name in closure()[0] for part in name.split("/")} | project_names()
    for name in names:
        if kind == "module":
            (tmp_path / f"{name}.py").write_text("__path__ = None\n")
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "part.py").touch()
        if kind == "package":
            (tmp_path / name / "__init__.py").touch()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    program(tmp_path, PROGRAM, ROOT, *names)


def test_nothing_of_the_project_becomes_importable(tmp_path, model):
    """vision_transformer is registered under its plain name, so that this process, which has it, unpickles the model"""
    output = program(tmp_path, """
import importlib.util, sys, torch
hub, *names = sys.argv[1:]
model = torch.hub.load(hub, "dino_vits16", source="local", pretrained=False).eval()
print([name for name in names if name in sys.modules or importlib.util.find_spec(name)])
torch.save(model, "model.pt")
torch.save(model.state_dict(), "state.pth")
""", ROOT, *project_names())
    assert output.strip() == "['vision_transformer']"
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(again) is VisionTransformer
    model.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(x), model(x))


def test_code_written_against_the_published_models(tmp_path):
    """published_code.py in a process that knows only this folder's path, and has modules of the same names."""
    for name in ("utils", "data", "metrics", "vision_transformer"):
        (tmp_path / f"{name}.py").write_text("MINE = 1\n")
    (tmp_path / "test_published_code.py").write_text((ROOT / "tests" / "published_code.py").read_text())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", "HUB": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", "."]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout


def test_another_module_that_is_imported_already(monkeypatch):
    theirs = types.ModuleType("vision_transformer")
    monkeypatch.setitem(sys.modules, "vision_transformer", theirs)
    first, second = (load("dino_vits16", pretrained=False) for _ in range(2))
    assert type(first) is type(second) and type(first) is not VisionTransformer
    assert sys.modules["vision_transformer"] is theirs and sys.modules[type(first).__module__].__file__.startswith(
        str(ROOT))  # fmt: skip
    buffer = io.BytesIO()
    torch.save(first, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is type(first)
    monkeypatch.delitem(sys.modules, type(first).__module__)


def test_our_own_module_is_used_where_it_is_imported(model):
    assert type(model) is vision_transformer.VisionTransformer


def test_the_table_and_the_names_agree():
    for row in published.PUBLISHED.values():
        with torch.device("meta"):
            model, _ = build_backbone(row.arch, row.patch_size, **row.options)
        assert recognize(model.state_dict()).arch in (row.arch, f"{row.arch}_224")
