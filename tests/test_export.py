"""Each format is read back by its library here, independently of the check that the command itself makes."""

import json
import os

import pytest
import torch
from processes import launch
from test_layouts import dinov2_file, published_xcit, random_like

import export
from protocols import features, formats
from vision_transformer import build_backbone
from weights import backbones

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a small ViT for pictures of 32 x 32."""
    model, _ = build_backbone("vit_nano", 8, img_size=32)
    args = {"arch": "vit_nano", "patch_size": 8, "global_crops_size": 32, "mean": MEAN, "std": STD}
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    torch.save({"teacher": random_like(model.state_dict()), "args": args}, path)
    return path


def run(weights, output, *args):
    return export.main(export.get_args_parser().parse_args(
        ["--pretrained_weights", str(weights), "--output", str(output), "--format", *map(str, args)]))


def ours(weights):
    return backbones.load_backbone(str(weights))[0]


@torch.no_grad()
def assert_same(weights, theirs, *size, batch=5):
    x = torch.randn(batch, 3, *size)
    expected = ours(weights)(x)
    torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).max() > 0.01  # else equal outputs would say nothing


def test_safetensors_carries_what_the_network_needs(weights, tmp_path, capsys):
    assert run(weights, tmp_path / "w.safetensors", "safetensors") == 0
    said = capsys.readouterr().out
    assert "largest difference 0.0e+00 of the features' RMS, tolerance 0.0001" in said
    assert str(tmp_path / "w.safetensors") in said and ".export-" not in said  # no temporary file
    model, info = backbones.load_backbone(str(tmp_path / "w.safetensors"))
    assert_same(weights, model, 24, 48)
    assert info["arch"] == "vit_nano" and info["mean"] == tuple(MEAN) and info["global_crops_size"] == 32
    from safetensors import safe_open

    with safe_open(tmp_path / "w.safetensors", "pt") as f:
        assert json.loads(f.metadata()["weights_sha256"]) == features.weights_hash(ours(weights))
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_onnx(weights, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert run(weights, tmp_path / "w.onnx", "onnx", "--opset", 20) == 0
    session = onnxruntime.InferenceSession(tmp_path / "w.onnx")
    assert_same(weights, lambda x: torch.from_numpy(session.run(["features"], {"images": x.numpy()})[0]), 32, 32)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["mean"]) == MEAN and json.loads(about["patch_size"]) == 8
    import onnx

    assert [o.version for o in onnx.load(tmp_path / "w.onnx").opset_import if not o.domain] == [20]
    assert [p.name for p in tmp_path.iterdir()] == ["w.onnx"]


@pytest.mark.parametrize("opset", [3, 99])
def test_operators_that_can_not_be_had_are_refused(weights, tmp_path, capsys, opset):
    pytest.importorskip("onnxscript")
    assert run(weights, tmp_path / "w.onnx", "onnx", "--opset", opset) == 2
    assert f"--opset {opset}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_onnx_of_any_size(weights, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert run(weights, tmp_path / "w.onnx", "onnx", "--dynamic_size") == 0
    session = onnxruntime.InferenceSession(tmp_path / "w.onnx")
    for size in ((32, 32), (32, 37), (8, 8), (96, 40), (63, 64)):
        assert_same(weights, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), *size, batch=2)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_export(weights, tmp_path, dynamic):
    assert run(weights, tmp_path / "w.pt2", "torch", *["--dynamic_size"] * dynamic) == 0
    program = torch.export.load(tmp_path / "w.pt2").module()
    for size in ((32, 32), (24, 56), (33, 130)) if dynamic else ((32, 32),):
        assert_same(weights, program, *size)


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("size", [(32, 32), (32, 37), (8, 64), (100, 44)])
def test_positions_as_matrices_are_the_interpolated_ones(size, offset):
    model, _ = build_backbone("vit_nano", 8, img_size=32, interpolate_offset=offset)
    x = torch.empty(1, 1 + (size[0] // 8) * (size[1] // 8), 192)
    torch.testing.assert_close(formats.positions_of_any_size(model, x, *size),
                               model.interpolate_pos_encoding(x, *size), rtol=1e-5, atol=1e-6)


def test_timm(weights, tmp_path):
    import timm

    assert run(weights, tmp_path / "folder", "timm") == 0
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert_same(weights, theirs, 32, 32)
    found = timm.data.resolve_model_data_config(theirs)
    assert (list(found["mean"]), found["crop_pct"], list(found["input_size"])) == (MEAN, 32 / 37, [3, 32, 32])
    theirs = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, num_classes=0, depth=4, patch_size=8, img_size=32,
        pretrained_cfg_overlay={"file": str(tmp_path / "folder/model.safetensors")}).eval()
    assert_same(weights, theirs, 32, 32)


def test_timms_own_dino_entry_takes_the_file(tmp_path):
    """The name that timm gives the published weights, with ours in their place."""
    import timm

    model, _ = build_backbone("vit_small", 16)
    torch.save(random_like(model.state_dict()), tmp_path / "w.pth")
    assert run(tmp_path / "w.pth", tmp_path / "folder", "timm") == 0
    file = str(tmp_path / "folder/model.safetensors")
    theirs = timm.create_model("vit_small_patch16_224.dino", pretrained=True, pretrained_cfg_overlay={"file": file})
    assert_same(tmp_path / "w.pth", theirs.eval(), 224, 224, batch=2)


def test_another_size_than_the_trained_one(weights, tmp_path):
    import timm

    assert run(weights, tmp_path / "folder", "timm", "--image_size", 56) == 0
    assert_same(weights, timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval(), 56, 56)


@pytest.mark.parametrize("registers, gated, scaled", [
    (0, False, True), (4, False, True), (0, True, True), (4, True, True), (0, False, False), (4, True, False)])
def test_dinov2_goes_round(tmp_path, registers, gated, scaled):
    """Registers, LayerScale, gated MLP: a DINOv2 file, exported for timm and for transformers."""
    import timm

    transformers = pytest.importorskip("transformers")
    state = dinov2_file(registers, gated=gated)
    torch.save({k: v for k, v in state.items() if scaled or ".ls" not in k}, tmp_path / "w.pth")
    assert run(tmp_path / "w.pth", tmp_path / "timm", "timm") == 0
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert_same(tmp_path / "w.pth", theirs, 56, 56)
    assert run(tmp_path / "w.pth", tmp_path / "hf", "hf") == 0
    kind = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    theirs = kind.from_pretrained(tmp_path / "hf").eval()
    assert_same(tmp_path / "w.pth", lambda x: theirs(x).last_hidden_state[:, 0], 56, 56)
    assert run(tmp_path / "w.pth", tmp_path / "w.safetensors", "safetensors") == 0
    assert_same(tmp_path / "w.pth", ours(tmp_path / "w.safetensors"), 42, 70)
    if registers:
        assert run(tmp_path / "w.pth", tmp_path / "w.pt2", "torch", "--dynamic_size") == 2


def test_hugging_face(weights, tmp_path):
    transformers = pytest.importorskip("transformers")
    results = [{"k": 20, "temperature": 0.07, "top1": {"value": 61.25, "interval": [60.0, 62.5]}, "per_class": {}}]
    command = "eval_knn.py --data_path holidays"
    report = {"weights_sha256": features.weights_hash(ours(weights)), "results": results, "command": command}
    (tmp_path / "eval_knn.json").write_text(json.dumps(report))
    more = ["--results", tmp_path / "eval_knn.json", "--training_data", "holiday\nphotos", "--license", "cc-by-4.0"]
    assert run(weights, tmp_path / "hf", "hf", *more) == 0
    theirs, again = (transformers.ViTModel.from_pretrained(tmp_path / "hf").eval() for _ in range(2))
    assert_same(weights, lambda x: theirs(x).last_hidden_state[:, 0], 32, 32)
    assert_same(weights, lambda x: theirs(x).pooler_output, 32, 32)  # by default the library makes a random pooler
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in theirs.state_dict().items())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    image = torch.full((3, 50, 80), 255, dtype=torch.uint8)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    expected = ((1 - torch.tensor(MEAN)) / torch.tensor(STD)).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(torch.as_tensor(pixels), expected, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "hf/README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n") and "holiday photos" in card
    assert f"`{command}`, in %" in card and "| 20 | 0.07 | 61.25 [60.00, 62.50] |" in card
    assert report["weights_sha256"] in card
    assert "The feature is the class token of `last_hidden_state`" in card and "`pooler_output`" in card


@pytest.mark.parametrize("args, options, method", [
    ({"method": "dinov2", "global_batch": 8}, {"method": "dinov2", "init_values": 0.1}, "DINOv2"),
    ({"method": "dinov2", "global_batch": 8}, {"method": "dinov2"}, "DINOv2"),
    (None, {"method": "dinov2", "init_values": 0.1, "num_register_tokens": 2}, "DINOv2"),  # as published
    ({"global_batch": 8}, {}, "DINO"), ({"global_batch": 8, "method": "other"}, {}, ""),
    (None, {}, ""), (None, {"init_values": 0.1}, ""),  # DeiT III has LayerScale too
    ({}, {"method": "dinov2", "init_values": 0.1}, ""),  # fine-tuned
])
def test_exports_name_the_method_that_made_the_weights(tmp_path, args, options, method):
    pytest.importorskip("transformers")
    model, _ = build_backbone("vit_nano", 8, img_size=32, **options)
    stored = {} if args is None else {"args": {"arch": "vit_nano", "patch_size": 8} | args}
    torch.save({"teacher": random_like(model.state_dict())} | stored, tmp_path / "w.pth")
    for kind, name in (("safetensors", "w.safetensors"), ("timm", "timm"), ("published", "p.pth"), ("hf", "hf")):
        assert run(tmp_path / "w.pth", tmp_path / name, kind) == 0
    assert run(tmp_path / "w.safetensors", tmp_path / "again", "hf") == 0
    about = json.loads((tmp_path / "timm/config.json").read_text())["about"]
    assert about.get("method", "") == method.lower()
    for name in ("w.pth", "w.safetensors", "timm/model.safetensors", "p.pth", "hf/model.safetensors"):
        assert backbones.load_backbone(str(tmp_path / name))[1].get("method", "") == method.lower()
    for card in ((tmp_path / name / "README.md").read_text() for name in ("hf", "again")):
        paper = {"DINOv2": "arXiv 2304.07193", "DINO": "arXiv 2104.14294"}.get(method, "Backbone")
        assert paper in card and (f", trained with {method}\n" in card if method else ", trained" not in card)
        assert ("self-supervised" in card) == bool(method)


def test_figures_of_other_weights_are_refused(weights, tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "eval_knn.json").write_text(json.dumps({"weights_sha256": "0", "results": [{"k": 1}]}))
    assert run(weights, tmp_path / "hf", "hf", "--results", tmp_path / "eval_knn.json") == 2
    assert "eval_knn.json: belongs to other weights" in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_other_networks(tmp_path, capsys):
    import timm

    for arch in ("resnet18", "xcit_nano_12_p16_224"):
        state = random_like(build_backbone(arch)[0].state_dict())
        torch.save(published_xcit(state) if "xcit" in arch else state, tmp_path / "w.pth")
        assert run(tmp_path / "w.pth", tmp_path / arch, "timm", "--image_size", 64) == 0
        theirs = timm.create_model(f"local-dir:{tmp_path / arch}", pretrained=True).eval()
        assert_same(tmp_path / "w.pth", theirs, 64, 64)
        assert run(tmp_path / "w.pth", tmp_path / f"{arch}.safetensors", "safetensors", "--image_size", 64) == 0
    capsys.readouterr()
    assert run(tmp_path / "w.pth", tmp_path / "hf", "hf") == 2
    assert "xcit_nano_12_p16_224 is no Vision Transformer; choose timm" in capsys.readouterr().err


def test_a_difference_leaves_nothing(weights, tmp_path, monkeypatch, capsys):
    def broken(model, about, path):
        theirs = formats.to_safetensors(model, about, path)
        return lambda x: theirs(x) * 1.001

    monkeypatch.setitem(formats.FORMATS, "safetensors", broken)
    assert run(weights, tmp_path / "w.safetensors", "safetensors") == 1
    error = capsys.readouterr().err
    assert "largest difference" in error and "nothing was written" in error and not list(tmp_path.iterdir())
    assert run(weights, tmp_path / "w.safetensors", "safetensors", "--tolerance", "0.1") == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_library_that_gives_no_numbers_differs(weights, tmp_path, monkeypatch, bad):
    monkeypatch.setitem(formats.FORMATS, "timm", lambda model, *_, **__: lambda x: model(x) * bad)
    assert run(weights, tmp_path / "w", "timm") == 1


def test_a_bug_keeps_its_traceback(weights, tmp_path, monkeypatch):
    def bug(*args, **options):
        raise ValueError("operands could not be broadcast")

    for module, name in ((formats, "save_tensors"), (export.backbones, "load_matching"), (export, "weights_hash")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, bug)
            with pytest.raises(ValueError, match="operands could not be broadcast") as raised:
                run(weights, tmp_path / "w.safetensors", "safetensors")
            assert raised.type is ValueError and not list(tmp_path.iterdir())


def test_a_network_that_the_exporter_does_not_support_is_refused(weights, tmp_path, monkeypatch, capsys):
    def unsupported(*args, **kwargs):
        raise RuntimeError("unsupported operator\nand a page about it")

    monkeypatch.setattr(torch.export, "export", unsupported)
    assert run(weights, tmp_path / "w.pt2", "torch") == 2 and not list(tmp_path.iterdir())
    assert "--format torch: this network can't be exported (unsupported operator); choose another" in (
        capsys.readouterr().err)


def test_sizes_that_a_network_does_not_accept_are_refused(tmp_path, capsys):
    arch = "resmlp_12_224"
    torch.save({"teacher": build_backbone(arch)[0].state_dict(), "args": {"arch": arch}}, tmp_path / "w.pth")
    assert run(tmp_path / "w.pth", tmp_path / "out", "timm", "--image_size", 100) == 2
    assert f"--image_size 100: {arch} refuses it (" in capsys.readouterr().err


def test_bad_input_is_named_in_one_line(weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    for args, message in (
        ((weights, tmp_path / "there", "timm"), "there: exists; remove it"),
        ((weights, tmp_path / "w.bin", "onnx"), "w.bin: the name must end in .onnx"),
        ((weights, tmp_path / "w.safetensors", "timm"), "w.safetensors: --format timm writes a folder; give a name"),
        ((weights, tmp_path / "w.pth", "hf"), "w.pth: --format hf writes a folder"),
        ((weights, tmp_path / "w.onnx", "published"), "w.onnx: the name must end in .pth"),
        ((weights, tmp_path / "w", "timm", "--mean", "0.5"), "--mean 0.5: 1 value(s) for 3 channel(s)"),
        ((weights, tmp_path / "w", "timm", "--dynamic_size"), "--dynamic_size: for --format onnx and torch"),
        ((weights, tmp_path / "w", "timm", "--results", "x.json"), "--results: for --format hf; leave it out for timm"),
        ((weights, tmp_path / "w", "hf", "--results", "x.json"), "--results x.json: not a results file"),
        ((weights, tmp_path / "w", "hf", "--license", "a: b"), "--license 'a: b': give its identifier"),
        ((weights, tmp_path / "w", "hf", "--resize_size", "3"), "--resize_size 3: smaller than the crop of 32"),
        ((weights, tmp_path / "file/w", "hf"), "file is a file; give a folder"),
        ((weights, "", "hf"), "--output '': exists"),
        (("", tmp_path / "w", "timm"), "--pretrained_weights: empty"),
        ((weights, tmp_path / "w", "timm", "--image_size", "4"), "--image_size 4: smaller than a patch of 8"),
        ((tmp_path / "absent.pth", tmp_path / "w", "timm"), "absent.pth: no such file of weights"),
        ((weights, tmp_path / "w.onnx", "onnx"), "pip install onnx onnxruntime onnxscript"),
    ):
        assert run(*args) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


@pytest.mark.slow
def test_command(weights, tmp_path):
    done = launch("export.py", "--pretrained_weights", weights, "--format", "safetensors", "--output",
                  tmp_path / "new/w.safetensors")  # fmt: skip
    assert done.returncode == 0 and "wrote" in done.stdout and (tmp_path / "new/w.safetensors").is_file()
