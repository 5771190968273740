"""Mean, std, channels and image size of the images, from every place that stores them."""

import importlib
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_layouts import random_like

import evaluate
import export
from imagesets.sources import open_images
from parallel import Refused
from protocols import features
from vision_transformer import build_backbone
from weights import backbones

MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]
SCRIPTS = ("eval_knn", "eval_linear", "eval_segmentation", "eval_video_segmentation", "eval_copy_detection",
           "eval_image_retrieval", "evaluate", "extract_features", "visualize_attention", "export", "main_dino",
           "eval_semantic", "eval_depth")


def checkpoint(folder, in_chans=3, name="checkpoint.pth", **args):
    model, _ = build_backbone("vit_nano", 8, img_size=32, in_chans=in_chans)
    folder.mkdir(parents=True, exist_ok=True)
    args = {"arch": "vit_nano", "patch_size": 8, "global_crops_size": 32, "in_chans": in_chans} | args
    torch.save({"teacher": random_like(model.state_dict()), "args": args}, folder / name)
    return str(folder / name)


def plain(folder, in_chans=3, **beside):
    """A state dict alone, with configurations beside it: {name without .json: content}."""
    folder.mkdir(parents=True, exist_ok=True)
    state = build_backbone("vit_nano", 8, img_size=32, in_chans=in_chans)[0].state_dict()
    torch.save(random_like(state), folder / "w.pth")
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder / "w.pth")


def rgb_images(folder, count=6):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    return open_images(str(folder))


# ---- Exports of a run, evaluated from there ----


@pytest.mark.parametrize("kind, output, file, with_metadata", [
    ("hf", "out", "out/model.safetensors", True), ("hf", "out", "out/model.safetensors", False),
    ("timm", "out", "out/model.safetensors", True), ("timm", "out", "out/model.safetensors", False),
    ("safetensors", "out.safetensors", "out.safetensors", True), ("published", "out.pth", "out.pth", True)])
def test_an_export_has_the_features_of_the_run(tmp_path, kind, output, file, with_metadata):
    """Also where another program has written the tensors again, without metadata, beside the configuration files."""
    pytest.importorskip("transformers")
    path = checkpoint(tmp_path / "run", mean=MEAN, std=STD)
    args = ["--pretrained_weights", path, "--format", kind, "--output", str(tmp_path / output)]
    assert export.main(export.get_args_parser().parse_args(args)) == 0
    exported = str(tmp_path / file)
    if not with_metadata:
        from safetensors.torch import load_file, save_file

        tensors = load_file(exported)
        save_file(tensors, exported, {"format": "pt"})
    images = rgb_images(tmp_path / "images")
    ours, theirs = (features.network_features(features.load_network(p), images) for p in (path, exported))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert features.load_network(exported).about["crop_size"] == 32


def test_the_published_format_is_a_plain_state_dict(tmp_path):
    """A ViT and an XCiT: what torch.load gives fits the network strictly; XCiT under the published code's names."""
    path = checkpoint(tmp_path / "run", mean=MEAN, std=STD)
    args = ["--pretrained_weights", path, "--format", "published", "--output", str(tmp_path / "vit.pth")]
    assert export.main(export.get_args_parser().parse_args(args)) == 0
    model, _ = build_backbone("vit_nano", 8, img_size=32)
    model.load_state_dict(torch.load(tmp_path / "vit.pth", weights_only=True), strict=True)
    expected = torch.load(path, weights_only=True)["teacher"]
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())

    from test_layouts import published_xcit

    state = random_like(build_backbone("xcit_nano_12_p16_224")[0].state_dict())
    torch.save(state, tmp_path / "timm.pth")
    args = ["--pretrained_weights", str(tmp_path / "timm.pth"), "--format", "published", "--image_size", "32",
            "--output", str(tmp_path / "xcit.pth")]  # fmt: skip
    assert export.main(export.get_args_parser().parse_args(args)) == 0
    written, theirs = torch.load(tmp_path / "xcit.pth", weights_only=True), published_xcit(state)
    assert written.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in written.items())


# ---- Files of other programs ----


def test_files_of_other_programs(tmp_path):
    """Mean and std of intensities in [0, 1], whatever scale the configuration has."""
    half = [0.5, 0.5, 0.5]
    processor = {"image_mean": half, "image_std": half, "do_normalize": True, "do_rescale": True}
    for name, beside, mean, std, size in (
        ("hf", {"preprocessor_config": processor | {"size": 64}, "config": {"model_type": "vit"}}, half, half, 64),
        ("hf_crop", {"preprocessor_config": processor | {
            "size": {"shortest_edge": 72}, "crop_size": {"height": 48, "width": 48}}}, half, half, 48),
        ("hf_no_crop", {"preprocessor_config": processor | {
            "do_center_crop": False, "size": {"height": 64, "width": 64}, "crop_size": 48}}, half, half, 64),
        ("hf_bytes", {"preprocessor_config": {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51] * 3}},
         half, [0.2] * 3, 224),
        ("hf_signed", {"preprocessor_config": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3,
                                               "image_std": [1.0] * 3}}, half, half, 224),
        ("hf_off", {"preprocessor_config": {"do_normalize": False}}, [0.0] * 3, [1.0] * 3, 224),
        ("hf_5", {"processor_config": {"image_processor": processor}}, half, half, 224),
        ("timm", {"config": {"architecture": "x", "pretrained_cfg": {
            "mean": MEAN, "std": STD, "input_size": [3, 56, 56]}}}, MEAN, STD, 56),
        ("timm_old", {"config": {"architecture": "x", "mean": MEAN, "std": STD, "input_size": [3, 56, 56]}},
         MEAN, STD, 56),
        ("both", {"preprocessor_config": processor, "config": {"mean": MEAN, "std": STD, "image_size": 40}},
         half, half, 40),
    ):
        model, info = backbones.load_backbone(plain(tmp_path / name, **beside))
        np.testing.assert_allclose([info["mean"], info["std"]], [mean, std], err_msg=name)
        assert info["global_crops_size"] == size and not model.training, name


def test_transformers_and_ours_normalize_alike(tmp_path):
    """The library's own image processor against our transform, with a configuration that it wrote."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.BitImageProcessor(do_resize=False, do_center_crop=False, image_mean=[0.2, 0.5, 0.7],
                                               image_std=[0.3, 0.2, 0.4], rescale_factor=1 / 200)
    path = plain(tmp_path)
    processor.save_pretrained(tmp_path)
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    theirs = torch.as_tensor(np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0]))
    info = backbones.load_backbone(path)[1]
    mean, std = (torch.tensor(info[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close((image / 255 - mean) / std, theirs.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ViT", "Bit", "DeiT", "CLIP", "Beit"])
def test_what_a_processors_file_lacks_is_the_librarys_default(tmp_path, kind):
    """The library reads the same file, and its output is compared with ours."""
    transformers = pytest.importorskip("transformers")
    path = plain(tmp_path, preprocessor_config={"image_processor_type": f"{kind}ImageProcessor", "size": 8})
    options = {"do_resize": False, "do_center_crop": False}
    theirs = getattr(transformers, f"{kind}ImageProcessor").from_pretrained(tmp_path)
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    expected = torch.as_tensor(np.asarray(theirs(images=image, return_tensors="np", **options)["pixel_values"][0]))
    info = backbones.load_backbone(path)[1]
    mean, std = (torch.tensor(info[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close((image / 255 - mean) / std, expected.float(), rtol=1e-4, atol=1e-4)


def test_a_default_that_is_not_known_is_refused(tmp_path):
    path = plain(tmp_path, preprocessor_config={"image_processor_type": "MyImageProcessor"})
    with pytest.raises(Refused, match="mean of MyImageProcessor, which is not stated.*processor_config.json.*--mean"):
        backbones.load_backbone(path)
    assert backbones.load_backbone(path, mean=MEAN, std=STD)[1]["mean"] == tuple(MEAN)


@pytest.mark.parametrize("content", [{"do_normalize": False}, {"image_processor_type": "MyImageProcessor"}])
def test_init_from_says_any_form_of_mean(tmp_path, capsys, content):
    path = plain(tmp_path, preprocessor_config=content)
    backbones.load_weights_into(build_backbone("vit_nano", 8, img_size=32)[0], path)
    assert "preprocessor_config.json" in capsys.readouterr().out


def test_metadata_of_a_safetensors_file(tmp_path):
    from safetensors.torch import save_file

    state = random_like(build_backbone("vit_nano", 8, img_size=32)[0].state_dict())
    save_file(state, tmp_path / "w.safetensors", {"mean": json.dumps(MEAN), "std": json.dumps(STD), "author": "me"})
    info = backbones.load_backbone(str(tmp_path / "w.safetensors"))[1]
    assert info["mean"] == tuple(MEAN) and info["std"] == tuple(STD)


# ---- Which is used, and what is said ----


@pytest.mark.parametrize("size, used", [(64.0, 64), (True, None), (0, None), ({"shortest_edge": -8}, None)])
def test_a_stored_image_size_that_is_none_is_refused(tmp_path, size, used):
    path = plain(tmp_path / "w", preprocessor_config={"size": size})
    if used or size is True:  # whole numbers in floating point count; what is no number is not stated
        assert backbones.load_backbone(path)[1]["global_crops_size"] == (used or 224)
        return
    with pytest.raises(Refused, match=r"^--pretrained_weights.*w\.pth: .*preprocessor_config.json"):
        backbones.load_backbone(path)


@pytest.mark.parametrize("beside, stored", [
    ({"config": {"crop_pct": 0.9, "input_size": [3, 32, 32]}}, 35),
    ({"config": {"pretrained_cfg": {"crop_pct": 1.0, "input_size": [3, 32, 32]}}}, 32),
    ({"preprocessor_config": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}}, 40),
    ({"preprocessor_config": {"size": {"height": 32, "width": 32}}}, 32),  # squashed, nothing is cropped
    ({"config": {"crop_pct": 0.875, "input_size": [3, 32, 32]}}, None),  # the published evaluations' own
    ({"config": {"crop_pct": 1.4, "input_size": [3, 32, 32]}}, None),  # --resize_size would be below the crop
    ({"preprocessor_config": {"do_resize": False, "crop_size": 32, "size": 99}}, None), ({}, None),
])  # fmt: skip
def test_another_size_before_the_crop_is_said_with_its_flag(tmp_path, beside, stored, capsys):
    path = plain(tmp_path / "w", **beside)
    assert features.load_network(path, crop_size=32, resize_size=0).about["resize_size"] == 37
    said = capsys.readouterr().out
    assert f"--resize_size {stored}" in said if stored else "--resize_size" not in said
    features.load_network(path, crop_size=32, resize_size=stored or 40)  # given
    features.load_network(path, crop_size=32)  # of a script that doesn't crop
    assert "--resize_size" not in capsys.readouterr().out


@pytest.mark.parametrize("beside, stored", [
    ({"config": {"pretrained_cfg": {"interpolation": "bilinear"}}}, "bilinear"),
    ({"preprocessor_config": {"resample": 2}}, "bilinear"), ({"preprocessor_config": {"resample": 3}}, None),
    ({"preprocessor_config": {"resample": [2]}}, None), ({}, None)])
def test_another_interpolation_is_said(tmp_path, beside, stored, capsys):
    features.load_network(plain(tmp_path / "w", **beside), crop_size=32, resize_size=0)
    said = [line for line in capsys.readouterr().out.splitlines() if "bicubic" in line]
    assert (len(said) == 1 and f"config.json says {stored}" in said[0]) if stored else not said


def test_flags_beat_the_file_which_beats_its_neighbours_which_beat_the_default(tmp_path, capsys):
    other = {"image_mean": [0.9] * 3, "image_std": [0.9] * 3}
    path = checkpoint(tmp_path, mean=MEAN, std=STD)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(other))
    info = backbones.load_backbone(path, mean=[0.1, 0.2, 0.3])[1]
    assert info["mean"] == (0.1, 0.2, 0.3) and info["std"] == tuple(STD)
    said = capsys.readouterr().out
    assert "mean 0.1 0.2 0.3 (--mean)" in said and "std 0.5 0.25 0.2 (stored in checkpoint.pth)" in said
    about = features.load_network(path, std=[0.1] * 3).about  # what every report holds
    assert about["mean"] == MEAN and about["std"] == [0.1] * 3
    assert about["normalization"] == {"mean": "stored in checkpoint.pth", "std": "--std"}
    assert backbones.load_backbone(checkpoint(tmp_path))[1]["mean"] == (0.9,) * 3
    assert f"mean 0.9 0.9 0.9 ({tmp_path}/preprocessor_config.json)" in capsys.readouterr().out
    assert backbones.load_backbone(plain(tmp_path / "alone"))[1]["mean"] == (0.485, 0.456, 0.406)
    assert "mean 0.485 0.456 0.406 (ImageNet's, the default" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_that_takes_weights_has_the_flags(script):
    required = {"eval_video_segmentation": ["--data_path", "x"], "eval_copy_detection": ["--data_path", "x"],
                "extract_features": ["--data_path", "x", "--output", "x"],
                "export": ["--pretrained_weights", "x", "--format", "hf", "--output", "x"]}.get(script, [])
    args = importlib.import_module(script).get_args_parser().parse_args(
        [*required, "--mean", "0.5", "0.25", "--std", "0.1", "0.2", "--in_chans", "2"])
    assert (args.mean, args.std, args.in_chans) == ([0.5, 0.25], [0.1, 0.2], 2)
    source = (ROOT / f"{script}.py").read_text()
    assert script == "main_dino" or "mean=args.mean" in source or "network_values(args)" in source


def test_numbers_that_do_not_fit_the_channels_are_refused_in_one_line(tmp_path):
    four, grey = plain(tmp_path / "four", 4), plain(tmp_path / "grey", 1)
    wrong = checkpoint(tmp_path / "wrong", 4, mean=MEAN, std=STD)
    rgb = plain(tmp_path / "rgb")
    zero = checkpoint(tmp_path / "zero", mean=MEAN, std=[0.5, 0, 0.5])
    broken = plain(tmp_path / "broken", preprocessor_config='{"image_mean": [0.5')
    textual = plain(tmp_path / "text", config={"mean": "half", "std": STD})
    for weights, options, words in (
        (four, {}, ("four/w.pth", "4 channel", "--mean", "--std")), (grey, {}, ("grey/w.pth", "1 channel", "--mean")),
        (four, {"mean": [0.5] * 4}, ("four/w.pth", "std", "--std")),
        (four, {"mean": [0.5] * 3, "std": [0.5] * 4}, ("--mean 0.5 0.5 0.5", "4 channel")),
        (rgb, {"mean": [0.5], "std": [0.5]}, ("--mean 0.5", "3 channel", "--mean with 3")),
        (rgb, {"in_chans": 4}, ("--in_chans 4", "3 channel", "leave it out")),
        (wrong, {}, ("wrong/checkpoint.pth", "4 channel", "--mean")), (zero, {}, ("zero/checkpoint.pth", "--std")),
        (broken, {}, ("preprocessor_config.json", "repair")), (textual, {}, ("config.json", "half", "--mean")),
        ("", {"in_chans": 4}, ("--in_chans 4", "--mean", "--std")),
    ):
        with pytest.raises(Refused) as refused:
            backbones.load_backbone(weights, **options)
        assert all(word in str(refused.value) for word in words), str(refused.value)
        assert "\n" not in str(refused.value)
    for weights, channels in ((four, 4), (grey, 1)):
        assert backbones.load_backbone(weights, mean=[0.5] * channels, std=[0.5] * channels)[1]["in_chans"] == channels


@pytest.mark.parametrize("field, value", [
    ("value_range", "x"), ("value_range", 8.0), ("value_range", [1, 2, 3]), ("value_range", [2, 1]),
    ("value_range", [None, 1]), ("value_range", torch.ones(3)), ("value_range", []), ("value_range", [0, float("nan")]),
    ("mean", "x"), ("mean", [True] * 3), ("mean", torch.ones(3)), ("std", [None, 1, 1]), ("std", {"a": 1}),
    ("arch", 5), ("arch", ["vit_nano"]), ("arch", torch.ones(3)), ("arch", ""),
    ("global_crops_size", 8.5), ("global_crops_size", "32"), ("global_crops_size", [32, 32]),
    ("interpolate_offset", "x"), ("interpolate_antialias", "false"), ("interpolate_offset", float("nan")),
])
def test_a_stored_value_that_is_none_is_refused_by_its_field(tmp_path, field, value):
    path = checkpoint(tmp_path, **{field: value})
    with pytest.raises(Refused, match=rf"^--pretrained_weights .*checkpoint\.pth: .*{field}") as refused:
        backbones.load_backbone(path)
    assert "\n" not in str(refused.value)
    if field not in ("mean", "std", "value_range"):  # which the hub doesn't read
        with pytest.raises(ValueError, match=field):
            torch.hub.load(str(ROOT), "dino", source="local", weights=path)


@pytest.mark.parametrize("field, value", [
    ("patch_size", "8"), ("in_chans", -1), ("in_chans", [3]), ("patch_size", True)])
def test_a_stored_value_that_the_tensors_contradict_is_not_used(tmp_path, field, value):
    """The tensors of a Vision Transformer show both; those of a network of timm show neither."""
    path = checkpoint(tmp_path)
    content = torch.load(path, weights_only=True)
    content["args"][field] = value
    torch.save(content, path)
    info = backbones.load_backbone(path)[1]
    assert (info["patch_size"], info["in_chans"]) == (8, 3)
    model, _ = build_backbone("resnet10t", 32)
    torch.save({"teacher": model.state_dict(), "args": {"arch": "resnet10t", field: value}}, tmp_path / "timm.pth")
    with pytest.raises(Refused, match=rf"^--pretrained_weights .*timm\.pth: .*{field}"):
        backbones.load_backbone(str(tmp_path / "timm.pth"))


@pytest.mark.parametrize("metadata, field", [
    ({"mean": "0.5,0.5,0.5", "std": json.dumps(STD)}, "mean"), ({"arch": "vit_nano"}, "arch")])
def test_metadata_that_are_no_json_are_named(tmp_path, metadata, field):
    from safetensors.torch import save_file

    state = random_like(build_backbone("vit_nano", 8, img_size=32)[0].state_dict())
    save_file(state, tmp_path / "w.safetensors", metadata)
    with pytest.raises(Refused, match=rf"^--pretrained_weights .*w\.safetensors: .*{field}"):
        backbones.load_backbone(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name, content", [
    ("preprocessor_config", {"rescale_factor": None}), ("preprocessor_config", {"rescale_factor": {}}),
    ("preprocessor_config", {"image_mean": [True] * 3}), ("config", {"std": True})])
def test_a_configuration_with_a_value_that_is_none_is_refused(tmp_path, name, content):
    with pytest.raises(Refused, match=rf"w\.pth.*{name}|{name}.*w\.pth"):
        backbones.load_backbone(plain(tmp_path / "w", **{name: content}))


# ---- Baselines ----


def test_the_baselines_of_evaluate(tmp_path):
    mean, std = [0.1, 0.2, 0.3, 0.4], [0.5] * 4
    path = checkpoint(tmp_path, 4, mean=mean, std=std)
    networks = evaluate.load_networks(evaluate.get_args_parser().parse_args(
        ["--pretrained_weights", path, "--baselines", "--device", "cpu"]))
    assert list(networks) == ["this network", "untrained", "raw pixels"]
    for network in networks.values():
        assert network.info["in_chans"] == 4 and network.info["mean"] == tuple(mean)
        assert network.info["std"] == tuple(std)
    assert networks["untrained"].forward.pos_embed.shape == (1, 17, 192)  # made for images of 32 x 32
    assert networks["untrained"].about["crop_size"] == 32


@pytest.mark.parametrize("in_chans", [1, 4])
def test_baselines_see_the_images_of_the_network(tmp_path, in_chans):
    mean, std = [0.25] * in_chans, [0.5] * in_chans
    path = checkpoint(tmp_path / "run", in_chans, mean=mean, std=std)
    network = features.load_network(path)
    untrained = features.untrained(network, 3)
    torch.manual_seed(3)
    expected = build_backbone("vit_nano", 8, in_chans=in_chans, img_size=32)[0].state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in untrained.forward.state_dict().items())
    assert untrained.info == network.info and untrained.about["weights"] is None
    assert untrained.about["weights_sha256"] != network.about["weights_sha256"]

    pixels = features.pixel_network("cpu", network.reading, network.info["mean"], network.info["std"])
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    arrays = [rng.integers(0, 256, (32, 32, 4), np.uint8) for _ in range(3)]
    for i, array in enumerate(arrays):
        Image.fromarray(array[..., 0] if in_chans == 1 else array).save(tmp_path / f"images/{i}.png")
    computed = features.network_features(pixels, open_images(str(tmp_path / "images"), None, in_chans))
    naive = np.stack([((a[..., :in_chans] / 255 - 0.25) / 0.5).transpose(2, 0, 1).ravel() for a in arrays])
    np.testing.assert_allclose(computed, naive, atol=1e-5)
