"""Files with the names and shapes of the published ones, made by the libraries themselves with random weights."""

import argparse
import json

import pytest
import timm
import torch
from dinov2_figures import names_of
from golden_weights import GOLDEN
from timm.models.vision_transformer import checkpoint_filter_fn as timm_vit_names
from timm.models.xcit import checkpoint_filter_fn as timm_xcit_names

import hubconf
import parallel
from parallel import Refused
from vision_transformer import build_backbone
from weights import backbones, layouts, published


def random_like(state, seed=0):
    """Weights large enough for every tensor to show in the output; running variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    filled = {}
    for name, value in state.items():
        if value.is_floating_point():
            is_scale = value.ndim == 1 and not name.endswith(("bias", "running_mean"))
            value = 0.05 * torch.randn(value.shape, generator=generator) + is_scale
        filled[name] = value
    return filled


def saved(state, tmp_path):
    torch.save(state, tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


@torch.no_grad()
def assert_same(ours, theirs, *size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.01  # else equal outputs would say nothing


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small", "vit_base"])
def test_published_shapes_name_the_network(arch):
    shapes = json.loads((GOLDEN / "backbone_state_dict_shapes.json").read_text())[f"{arch}_patch8"]
    found = layouts.recognize({k: torch.empty(v, device="meta") for k, v in shapes.items()})
    assert found.arch == arch and found.options == {"patch_size": 8, "in_chans": 3, "img_size": 224}


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_published_full_checkpoint(tmp_path, key):
    torch.manual_seed(0)
    nets = {k: build_backbone("vit_tiny", 8, img_size=32)[0] for k in ("teacher", "student")}
    head = {"head.mlp.0.weight": torch.zeros(3, 3), "head.last_layer.weight_g": torch.ones(5, 1)}
    path = saved({
        "student": {f"module.backbone.{k}": v for k, v in nets["student"].state_dict().items()}
        | {f"module.{k}": v for k, v in head.items()},
        "teacher": {f"backbone.{k}": v for k, v in nets["teacher"].state_dict().items()} | head,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="deit_tiny", patch_size=8, out_dim=65536, use_fp16=False, output_dir="x"),
    }, tmp_path)  # fmt: skip
    model, info = backbones.load_backbone(path, checkpoint_key=key)
    assert_same(model, nets[key].eval(), 32, 32)
    assert (info["arch"], info["patch_size"]) == ("deit_tiny", 8)


def published_xcit(state):
    """timm's XCiT names turned back into those of the published files, by hand."""
    published = {}
    for name, value in state.items():
        if ".attn.q." in name and name.startswith("cls_attn_blocks"):
            value = torch.cat([state[name.replace(".q.", f".{part}.")] for part in "qkv"])
            name = name.replace(".q.", ".qkv.")
        elif name.startswith("cls_attn_blocks") and (".attn.k." in name or ".attn.v." in name):
            continue
        published[name.replace("pos_embed.", "pos_embeder.")] = value
    return published


@pytest.mark.parametrize("patch", [8, 16])
def test_xcit(tmp_path, patch):
    theirs = timm.create_model(f"xcit_nano_12_p{patch}_224", num_classes=0).eval()
    published = published_xcit(random_like(theirs.state_dict()))
    assert published["pos_embeder.token_projection.weight"].shape == (128, 64, 1, 1)
    assert published["cls_attn_blocks.1.attn.qkv.weight"].shape == (384, 128)
    theirs.load_state_dict(timm_xcit_names(dict(published), theirs))
    model, info = backbones.load_backbone(saved(published, tmp_path))
    assert_same(model, theirs, 48, 64)
    assert info["arch"] == f"xcit_nano_12_p{patch}_224" and info["embed_dim"] == 128 and info["patch_size"] == patch
    again, _ = backbones.load_backbone(saved(theirs.state_dict(), tmp_path))
    assert_same(again, theirs, 48, 64)


@pytest.mark.parametrize("arch", ["xcit_small_12_p16", "xcit_medium_24_p8"])
def test_published_xcit_sizes(arch):
    with torch.device("meta"):
        state = build_backbone(arch)[0].state_dict()
    assert layouts.recognize(published_xcit(state)).arch == f"{arch}_224"


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnet(tmp_path, arch):
    import torchvision

    theirs = torchvision.models.get_model(arch).eval()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(random_like(theirs.state_dict()))
    model, info = backbones.load_backbone(saved(theirs.state_dict(), tmp_path))
    assert_same(model, theirs, 32, 32)
    assert info["arch"] == arch
    wide = {"conv1.weight": torch.empty(64, 3, 7, 7), "layer4.0.conv1.weight": torch.empty(1),
            "layer1.0.conv1.weight": torch.empty(128, 64, 1, 1)}  # fmt: skip
    assert layouts.recognize(wide).arch is None


def dinov2_file(registers=0, chunked=False, width=192, depth=4, side=4, gated=False):
    """Names and shapes of a published DINOv2 backbone."""
    hidden = (4 * width * 2 // 3 + 7) // 8 * 8
    ffn = ({"mlp.w12": (width, 2 * hidden), "mlp.w3": (hidden, width)} if gated else
           {"mlp.fc1": (width, 4 * width), "mlp.fc2": (4 * width, width)})
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, side * side + 1, width), "mask_token": (1, width),
              "patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,),
              "norm.weight": (width,), "norm.bias": (width,)}  # fmt: skip
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    for i in range(depth):
        block = f"blocks.{i // 2}.{i}." if chunked else f"blocks.{i}."
        for layer, (d_in, d_out) in {"attn.qkv": (width, 3 * width), "attn.proj": (width, width), **ffn}.items():
            shapes |= {f"{block}{layer}.weight": (d_out, d_in), f"{block}{layer}.bias": (d_out,)}
        for layer in ("norm1", "norm2"):
            shapes |= {f"{block}{layer}.weight": (width,), f"{block}{layer}.bias": (width,)}
        shapes |= {f"{block}ls1.gamma": (width,), f"{block}ls2.gamma": (width,)}
    return random_like({k: torch.empty(v) for k, v in shapes.items()})


def timm_dinov2(registers):
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    return timm.create_model(name, embed_dim=192, depth=4, num_heads=3, img_size=56, num_classes=0,
                             dynamic_img_size=True).eval()  # fmt: skip


@pytest.mark.parametrize("registers, chunked", [(0, False), (0, True), (4, False)])
def test_dinov2(tmp_path, registers, chunked):
    theirs = timm_dinov2(registers)
    theirs.load_state_dict(timm_vit_names(dinov2_file(registers), theirs))
    model, info = backbones.load_backbone(saved(dinov2_file(registers, chunked), tmp_path))
    assert_same(model, theirs, 56, 56)
    assert (info["arch"], info["patch_size"], model.num_register_tokens) == ("vit_nano", 14, registers)
    if registers:  # trained with antialiased interpolation to the grid's own size, as timm does for all
        assert_same(model, theirs, 42, 70)
    else:
        assert not model.interpolate_antialias and model.interpolate_offset == 0.1
    again, _ = backbones.load_backbone(saved(theirs.state_dict(), tmp_path))  # timm's own names
    assert_same(again, theirs, 56, 56)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_giant(registers):
    golden = names_of("state_dict_vit_giant214.json")
    shapes = golden["without_registers"] | (golden["with_4_registers_added"] if registers else {})
    recognized = layouts.recognize({k: torch.empty(v, device="meta") for k, v in shapes.items()})
    options = recognized.options
    assert recognized.arch == "vit_giant2" and options["method"] == "dinov2" and options["img_size"] == 518
    with torch.device("meta"):
        own = build_backbone(recognized.arch, **options)[0].state_dict()
    assert {k: list(v.shape) for k, v in own.items()} == shapes


@pytest.mark.parametrize("registers", [0, 4])
def test_gated_networks_of_timm(tmp_path, registers):
    """timm calls the layers of a gated MLP as those of a plain one."""
    name = "vit_giant_patch14_reg4_dinov2" if registers else "vit_giant_patch14_dinov2"
    theirs = timm.create_model(name, embed_dim=192, depth=4, num_heads=3, img_size=56, num_classes=0, mlp_ratio=16 / 3,
                               dynamic_img_size=True).eval()  # fmt: skip
    state = timm_vit_names(dinov2_file(registers, gated=True), theirs)
    theirs.load_state_dict({k.replace("w12", "fc1").replace("w3", "fc2"): v for k, v in state.items()})
    model, info = backbones.load_backbone(saved(theirs.state_dict(), tmp_path))
    assert_same(model, theirs, 56, 56)
    assert info["arch"] == "vit_nano" and "blocks.0.mlp.w12.weight" in model.state_dict()
    again, _ = backbones.load_backbone(saved(dinov2_file(registers, gated=True), tmp_path))
    assert again.method == "dinov2"


def test_mask_token_and_method(tmp_path):
    state = dinov2_file()
    model, _ = backbones.load_backbone(saved(state, tmp_path))
    assert model.method == "dinov2" and torch.equal(model.mask_token, state["mask_token"])
    del state["mask_token"]  # as timm does: the network's own stays
    other = build_backbone("vit_nano", 14, img_size=56, init_values=1.0, method="dinov2")[0]
    backbones.load_weights_into(other, saved(state, tmp_path))
    assert torch.all(other.mask_token == 0) and torch.equal(other.norm.weight, state["norm.weight"])
    dino = build_backbone("vit_nano", 8, img_size=32)[0].state_dict()
    masked = dino | {"mask_token": torch.zeros(1, 1, 192)}  # of MAE, BEiT, SimMIM
    assert backbones.load_backbone(saved(masked, tmp_path))[0].method == "dino"


OFFSET, ANTIALIAS = ({"interpolate_antialias": a, "interpolate_offset": b} for a, b in ((False, 0.1), (True, 0.0)))


@pytest.mark.parametrize("kind, expected", [
    ("run", OFFSET), ("antialiased run", ANTIALIAS), ("heads", OFFSET), ("heads of a student", OFFSET),
    ("chunked", OFFSET), ("published", ANTIALIAS)])
def test_checkpoints_of_training_interpolate_as_they_were_trained(tmp_path, monkeypatch, capsys, kind, expected):
    """Their tensors have the names of the published files with registers, which were trained in another way."""
    monkeypatch.setitem(published.PUBLISHED, "dinov2_vits14_reg", published.PUBLISHED["dinov2_vits14_reg"]._replace(
        arch="vit_nano"))
    state = dinov2_file(registers=4, chunked=kind == "chunked")
    if "run" in kind or "heads" in kind:
        state = {f"backbone.{k}": v for k, v in state.items()} | {
            f"dino_head.{k}": torch.randn(2, 2) for k in ("mlp.0.weight", "last_layer.weight_v")}
    key = "student" if "student" in kind else "teacher"
    stored = {} if "run" not in kind else {
        "args": {"arch": "vit_nano", "method": "dinov2"} | (ANTIALIAS if "anti" in kind else {})}
    path = saved({key: state} | stored, tmp_path)
    models = [backbones.load_backbone(path, checkpoint_key=key)[0]]
    if key == "teacher":
        models += [hubconf.dino(path), hubconf.dinov2_vits14_reg(weights=path)]
    for model in models:
        assert {k: getattr(model, k) for k in layouts.INTERPOLATION} == expected and model.method == "dinov2"
    size = {"patch_size": 14, "img_size": 56, "num_register_tokens": 4, "init_values": 1.0, "method": "dinov2"}
    capsys.readouterr()
    for options in (OFFSET, ANTIALIAS):  # a file that doesn't tell is read into the network of the flags, which is said
        other = build_backbone("vit_nano", **size | options)[0]
        if options == expected or not stored and kind != "published":
            backbones.load_weights_into(other, path, key, "--init_from")
            assert torch.equal(other.norm.weight, models[0].norm.weight)
            assert ("doesn't tell" in capsys.readouterr().out) == (not stored and kind != "published")
        else:
            with pytest.raises(Refused, match="interpolates position embeddings in another way"):
                backbones.load_weights_into(other, path, key, "--init_from")


def test_shards_of_a_sharded_run_are_refused(tmp_path):
    shard = {"model": {"teacher.backbone._fsdp_wrapped_module._flat_param": torch.zeros(5)}, "iteration": 3}
    with pytest.raises(Refused, match=r"--pretrained_weights .*weights.pth: .*FSDP.* give .*teacher_checkpoint.pth"):
        backbones.load_backbone(saved(shard, tmp_path))
    model = build_backbone("vit_nano", 14, img_size=56, method="dinov2")[0]
    with pytest.raises(Refused, match=r"--init_from .*FSDP.* give .*teacher_checkpoint.pth"):
        backbones.load_weights_into(model, saved(shard["model"], tmp_path), flag="--init_from")


def test_pickled_shards_are_refused(tmp_path):
    """What the published code writes: its tensors are objects of a class, which are not read."""
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    with pytest.raises(Refused, match="weights.pth: .*FSDP.* give .*teacher_checkpoint.pth"):
        backbones.load_backbone(saved({"model": {"x": TensorProperties(torch.float32)}}, tmp_path))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_timm_vits(tmp_path, name):
    theirs = timm.create_model(name, img_size=32, num_classes=10)
    theirs.load_state_dict(random_like(theirs.state_dict()))
    model, info = backbones.load_backbone(saved(theirs.state_dict(), tmp_path))
    theirs.reset_classifier(0)
    assert_same(model, theirs.eval(), 32, 32)
    assert info["arch"] == ("vit_tiny" if "tiny" in name else "vit_small")


@pytest.mark.parametrize(
    "name", ["ViTModel", "ViTForImageClassification", "Dinov2Model", "Dinov2WithRegistersModel"])
def test_hugging_face(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    mlp = {"intermediate_size": 768} if "ViT" in name else {}
    config = kind.config_class(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, image_size=32,
                               patch_size=8, layer_norm_eps=1e-6, **mlp)  # fmt: skip
    theirs = kind(config).eval()
    theirs.load_state_dict(random_like(theirs.state_dict()))
    theirs.save_pretrained(tmp_path)
    body = theirs.vit if name == "ViTForImageClassification" else theirs
    for path in (str(tmp_path / "model.safetensors"), saved(theirs.state_dict(), tmp_path)):
        model, info = backbones.load_backbone(path)
        assert_same(model, lambda x: body(x).last_hidden_state[:, 0], 32, 32)
        assert (info["arch"], info["patch_size"]) == ("vit_nano", 8)
    if "Registers" in name:
        assert_same(model, lambda x: body(x).last_hidden_state[:, 0], 24, 48)


def beside(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name, heads", [("ViTModel", 12), ("Dinov2Model", 6)])
def test_heads_of_hugging_faces_configuration(tmp_path, name, heads):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    mlp = {"intermediate_size": 768} if "ViT" in name else {}
    theirs = kind(kind.config_class(hidden_size=192, num_hidden_layers=4, num_attention_heads=heads, image_size=32,
                                    patch_size=8, layer_norm_eps=1e-6, **mlp)).eval()
    theirs.load_state_dict(random_like(theirs.state_dict()))
    theirs.save_pretrained(tmp_path)
    path = str(tmp_path / "model.safetensors")
    model, info = backbones.load_backbone(path)
    assert_same(model, lambda x: theirs(x).last_hidden_state[:, 0], 32, 32)
    assert info["arch"] == "vit_nano" and info["options"]["num_heads"] == heads
    method = {"init_values": 1.0, "method": "dinov2"} if "Dinov2" in name else {}
    other, _ = build_backbone("vit_nano", 8, img_size=32, **method)
    with pytest.raises(Refused, match=f"^--init_from {path}: .*{heads} attention heads, not 3"):
        backbones.load_weights_into(other, path, flag="--init_from")


@pytest.mark.parametrize("field, value", [
    ("hidden_act", "relu"), ("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-3), ("image_size", [16, 64]),
    ("num_attention_heads", 5), ("num_attention_heads", "3")])
def test_a_configuration_that_this_project_does_not_compute_is_refused(tmp_path, field, value):
    path = saved(build_backbone("vit_nano", 8, img_size=32)[0].state_dict(), tmp_path)
    ours = {"model_type": "vit", "num_attention_heads": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
            "image_size": [32, 32]}
    beside(ours, tmp_path)
    assert "num_heads" not in backbones.load_backbone(path)[1]["options"]
    beside(ours | {field: value}, tmp_path)
    for load in (backbones.load_backbone, lambda path: backbones.load_weights_into(
            build_backbone("vit_nano", 8, img_size=32)[0], path)):
        with pytest.raises(Refused) as raised:
            load(path)
        message = str(raised.value)
        assert message.startswith(f"--pretrained_weights {path}: ") and "config.json" in message
        assert repr(value) in message and ("attention heads" if "heads" in field else field) in message


@pytest.mark.parametrize("config", [
    {"lr": 1, "arch": "foo", "hidden_act": "relu", "num_attention_heads": 5}, {"dataset": "x", "image_size": [64, 32]},
    {"model_type": "llama", "hidden_act": "silu"}, {"architecture": "ResNet18", "num_classes": 10},
    {"architecture": "ViT", "model_args": {"num_heads": 5}}, {"image_size": [[1], [2]]},
    {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": "a"}])
def test_a_configuration_of_something_else_is_passed_over(tmp_path, config):
    """It may be of a data set, of another program, or of a network of another kind."""
    network = build_backbone("vit_nano", 8, img_size=32)[0]
    path = saved(network.state_dict(), tmp_path)
    beside(config, tmp_path)
    assert_same(backbones.load_backbone(path)[0], network.eval(), 32, 32)
    backbones.load_weights_into(build_backbone("vit_nano", 8, img_size=32)[0], path)


def test_a_file_that_names_its_network_needs_no_configuration(tmp_path):
    network = build_backbone("vit_nano", 8, img_size=32)[0]
    path = saved({"teacher": network.state_dict(), "args": {"arch": "vit_nano", "patch_size": 8}}, tmp_path)
    beside({"model_type": "vit", "num_attention_heads": 6}, tmp_path)
    assert_same(backbones.load_backbone(path)[0], network.eval(), 32, 32)
    backbones.load_weights_into(build_backbone("vit_nano", 8, img_size=32)[0], path)


@pytest.mark.parametrize("average", [["decay"], ["decay", "num_updates", "blocks.0.norm1.weight"]])
@pytest.mark.parametrize("prefix", ["backbone.", "model.", ""])
def test_a_part_of_an_average_is_no_network(tmp_path, prefix, average):
    network = build_backbone("vit_nano", 8, img_size=32)[0]
    state = {prefix + name: value for name, value in network.state_dict().items()}
    path = saved(state | {f"ema.{name}": torch.ones(1) for name in average}, tmp_path)
    assert_same(backbones.load_backbone(path)[0], network.eval(), 32, 32)


@pytest.mark.parametrize("arch, options, same_as_ours", [
    ("vit_tiny_patch16_224", {"img_size": [32, 32], "num_heads": 12}, True),
    ("vit_tiny_patch16_224", {"img_size": [32, 32], "act_layer": "relu"}, False),
    ("vit_tiny_patch16_224", {"img_size": [32, 32], "global_pool": "avg", "fc_norm": False}, False),
    ("vit_tiny_patch16_224", {"img_size": [48, 80]}, False), ("resnetblur18", {}, False),
    ("resnet18", {"act_layer": "silu"}, False), ("resnet18", {}, True)])
def test_timms_configuration(tmp_path, arch, options, same_as_ours):
    """48 x 80 pixels have 15 patches and 16 positions, as many as 4 x 4 patches without a class position."""
    theirs = timm.create_model(arch, num_classes=0, **options).eval()
    theirs.load_state_dict(random_like(theirs.state_dict()))
    path, size = saved(theirs.state_dict(), tmp_path), options.get("img_size", [32, 32])
    config = {"architecture": arch, "global_pool": theirs.global_pool if "vit" in arch else "avg",
              "model_args": options, "pretrained_cfg": {"input_size": [3, *size]}}
    for content in (config, config | {"architecture": f"{arch}.tag"}):
        beside(content, tmp_path)
        model, info = backbones.load_backbone(path)
        assert_same(model, theirs, *size)
        assert ("timm_args" in info["options"]) != same_as_ours
        assert info["arch"] == ("vit_tiny" if same_as_ours and "vit" in arch else arch)
    again, _ = build_backbone(info["arch"], **info["options"])  # the baseline without training
    assert again.state_dict().keys() == model.state_dict().keys()
    ours, _ = build_backbone("vit_tiny" if "vit" in arch else "resnet18", 16, img_size=32)
    if same_as_ours and "num_heads" not in options:
        backbones.load_weights_into(ours, path)
    else:
        with pytest.raises(Refused, match=r"^--init_from .*weights.pth: .*give others"):
            backbones.load_weights_into(ours, path, flag="--init_from")
    if "vit" in arch:
        del config["model_args"]
        beside(config, tmp_path)
        if not {"act_layer", "num_heads"} & options.keys():  # known from the rest
            assert_same(backbones.load_backbone(path)[0], theirs, *size)


def test_arguments_of_timms_networks_that_this_project_does_not_have(tmp_path):
    options = {"img_size": [32, 32], "depth": 2, "act_layer": "quick_gelu", "num_classes": 0, "in_chans": 3}
    theirs = timm.create_model("vit_base_patch16_clip_224", **options).eval()
    theirs.load_state_dict(random_like(theirs.state_dict()))
    path = saved(theirs.state_dict(), tmp_path)
    beside({"architecture": "vit_base_patch16_clip_224", "model_args": options, "pretrained_cfg": {}}, tmp_path)
    for arch in (None, "vit_base_patch16_clip_224", "vit_base_patch16_clip_224.openai"):
        assert_same(backbones.load_backbone(path, arch)[0], theirs, 32, 32)
    other, _ = build_backbone("vit_base_patch16_clip_224", timm_args={"img_size": 32, "depth": 2})
    with pytest.raises(Refused, match="act_layer quick_gelu"):
        backbones.load_weights_into(other, path)
    del options["act_layer"]
    beside({"architecture": "vit_base_patch16_clip_224", "model_args": options, "pretrained_cfg": {}}, tmp_path)
    backbones.load_weights_into(other, path)


@pytest.mark.parametrize("arch, options", [
    ("resnetblur18", {}), ("resnet18", {"act_layer": "silu"}), ("vit_tiny_patch16_224", {"num_heads": 12}),
    ("resnet18", {}), ("vit_tiny_patch16_224", {})])
def test_checkpoints_of_timms_training_script(tmp_path, arch, options):
    theirs = timm.create_model(arch, num_classes=0, **options).eval()
    theirs.load_state_dict(random_like(theirs.state_dict()))
    args = argparse.Namespace(model=arch, model_kwargs=options, gp=None, img_size=None, mean=None, num_classes=None)
    path = saved({"arch": arch, "epoch": 9, "state_dict": theirs.state_dict(), "args": args}, tmp_path)
    model, info = backbones.load_backbone(path)
    assert_same(model, theirs, 224, 224)
    assert ("timm_args" in info["options"]) == ("blur" in arch or "act_layer" in options)


def test_exports_keep_what_tensors_do_not_show(tmp_path):
    import export

    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, num_heads=12, img_size=32, depth=4).eval()
    theirs.load_state_dict(random_like(theirs.state_dict()))
    path = saved(theirs.state_dict(), tmp_path)
    beside({"model_type": "vit", "num_attention_heads": 12}, tmp_path)
    for kind, name, file in (("published", "out.pth", "out.pth"), ("timm", "timm", "timm/model.safetensors")):
        args = ["--pretrained_weights", path, "--format", kind, "--output", str(tmp_path / "out" / name)]
        (tmp_path / "out").mkdir(exist_ok=True)
        assert export.main(export.get_args_parser().parse_args(args)) == 0
        assert_same(backbones.load_backbone(str(tmp_path / "out" / file))[0], theirs, 32, 32)


def test_moco_v3s_small_network_has_twelve_heads(tmp_path):
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12, img_size=32).eval()
    theirs.load_state_dict(random_like(theirs.state_dict()))
    state = {f"module.{part}_encoder.{k}": v for part in ("base", "momentum") for k, v in theirs.state_dict().items()}
    path = saved({"arch": "vit_small", "epoch": 300, "state_dict": state}, tmp_path)
    assert_same(backbones.load_backbone(path)[0], theirs, 32, 32)
    with pytest.raises(Refused, match="12 attention heads, not 6"):
        backbones.load_weights_into(build_backbone("vit_small", img_size=32)[0], path)


def test_a_resnet_by_timms_name_is_timms(tmp_path):
    theirs = timm.create_model("resnetblur18", num_classes=0).eval()
    theirs.load_state_dict(random_like(theirs.state_dict()))
    path = saved(theirs.state_dict(), tmp_path)
    model, info = backbones.load_backbone(path, "resnetblur18")
    assert_same(model, theirs, 64, 64)
    assert info["arch"] == "resnetblur18"
    with pytest.raises(Refused, match="--arch resnetblur50: .*holds resnet18"):
        backbones.load_backbone(path, "resnetblur50")


def test_a_name_of_another_program_does_not_count(tmp_path, two_networks):
    file = {"model": two_networks[1], "args": argparse.Namespace(arch="ViT-T", patch_size=14)}
    for arch in (None, "vit_nano"):
        model, info = backbones.load_backbone(saved(file, tmp_path), arch)
        assert torch.equal(model.state_dict()["pos_embed"], two_networks[1]["pos_embed"])
        assert (info["arch"], info["patch_size"]) == ("vit_nano", 8)


def test_what_is_not_known_is_left_as_it_is():
    state = {"norm_pre.weight": torch.zeros(1), "reg_token": torch.zeros(1, 4, 8), "pos_embed": torch.zeros(1, 16, 8),
             "blocks.0.attn.qkv.weight": torch.zeros(24, 8), "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}
    found = layouts.recognize(state)
    assert found.arch is None and found.layout == "" and set(found.state) == set(state)
    assert layouts.recognize({}) == layouts.Weights("", None, {}, {})


@pytest.mark.parametrize("names, stripped", [
    (["module.backbone.neck.module.weight"], ["neck.module.weight"]),  # prefixes inside a name stay
    (["model.cls_token", "model.head.weight"], ["cls_token", "head.weight"]),
    (["model.backbone.cls_token", "model.neck.weight"], ["cls_token"]),
    (["model.weight", "norm.weight"], ["model.weight", "norm.weight"]),  # the network's own names
    (["class_token", "encoder.layers.0.weight"], ["class_token", "encoder.layers.0.weight"]),  # torchvision's ViT
    (["encoder.conv1.weight", "decoder.weight"], ["conv1.weight", "decoder.weight"]),
    (["encoder.conv1.weight", "fc.weight"], ["conv1.weight", "fc.weight"]),
])  # fmt: skip
def test_prefixes_of_wrappers(names, stripped):
    assert list(layouts.strip_prefixes({name: torch.zeros(1) for name in names})) == stripped


@pytest.mark.parametrize("prefix", ["{}_backbone.", "module.{}.backbone.", "model.{}."])
def test_student_and_teacher_in_one_flat_file_stay_apart(prefix):
    values = {"teacher": 1.0, "student": 2.0}
    state = {prefix.format(key) + "weight": torch.full((1,), value) for key, value in values.items()}
    for key, value in values.items():
        assert layouts.backbone_state(state, key) == {"weight": value}
    del state[prefix.format("teacher") + "weight"]
    with pytest.raises(layouts.BadFile, match="w.pth: no part 'teacher' in this checkpoint; it has student"):
        layouts.backbone_state(state, "teacher", "w.pth")


def test_flags_without_a_value_are_left_out():
    """timm's training script stores `mean` and `in_chans` as None."""
    assert layouts.stored_args({"args": argparse.Namespace(mean=None, arch="resnet18")}) == {"arch": "resnet18"}
    assert layouts.stored_args({"args": None}) == layouts.stored_args({}) == {}


def refused(path, **options):
    with pytest.raises(parallel.Refused) as raised:
        backbones.load_backbone(path, **options)
    message = str(raised.value)
    assert message.startswith(f"--pretrained_weights {path}") and "--arch" in message and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["cls_token", "pos_embed", "norm.weight", "patch_embed.proj.bias",
                                  "blocks.3.mlp.fc2.bias", "blocks.0.attn.qkv.bias"])  # fmt: skip
def test_every_tensor_must_come_from_the_file(tmp_path, name):
    state = build_backbone("vit_nano", 8, img_size=16)[0].state_dict()
    del state[name]
    assert f"missing: {name}" in refused(saved(state, tmp_path), arch="vit_nano", patch_size=8)


def test_whole_numbers_are_no_weights(tmp_path):
    """A quantized file, whose numbers mean something only with their scales."""
    state = build_backbone("vit_nano", 8, img_size=16)[0].state_dict()
    state["blocks.1.mlp.fc1.weight"] = (127 * state["blocks.1.mlp.fc1.weight"]).to(torch.int8)
    message = refused(saved(state, tmp_path), arch="vit_nano", patch_size=8)
    assert "not floating point: blocks.1.mlp.fc1.weight torch.int8" in message


@pytest.mark.parametrize("change, word", [
    (lambda x: x * float("nan"), "not finite: norm.weight"), (lambda x: x / 0, "not finite: norm.weight"),
    (torch.Tensor.to_sparse, "not dense: norm.weight"), (lambda x: x.to("meta"), "not dense: norm.weight")])
def test_tensors_that_hold_no_weights_are_refused(tmp_path, change, word):
    state = random_like(build_backbone("vit_nano", 8, img_size=32)[0].state_dict())
    torch.save(state | {"norm.weight": change(state["norm.weight"])}, tmp_path / "w.pth")
    assert word in refused(str(tmp_path / "w.pth"))


def test_every_tensor_of_the_file_must_be_used(tmp_path):
    state = build_backbone("vit_nano", 8, img_size=16)[0].state_dict()
    for name in ("norm_pre.weight", "blocks.0.attn.q_norm.weight", "blocks.4.norm1.weight", "ls.gamma"):
        extra = state | {name: torch.ones(192)}
        assert f"unused: {name}" in refused(saved(extra, tmp_path), arch="vit_nano", patch_size=8)
    harmless = {name: torch.ones(3) for name in (
        "mask_token", "masked_embed", "head.weight", "head_dist.bias", "pooler.dense.bias", "decoder_blocks.0.weight",
        "decoder_pos_embed")}  # fmt: skip
    backbones.load_backbone(saved(state | harmless, tmp_path), arch="vit_nano", patch_size=8)


def test_classifiers_of_the_libraries_may_be_left_over():
    for name in timm.list_models():
        classifiers = timm.get_pretrained_cfg(name).classifier or ()
        for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
            assert layouts.HEAD.match(f"{classifier}.weight"), (name, classifier)
    import torchvision

    for arch in ("vit_b_16", "squeezenet1_0", "densenet121", "googlenet", "swin_t", "convnext_tiny", "vgg11"):
        with torch.device("meta"):
            options = {"init_weights": False} if arch == "googlenet" else {}
            theirs = torchvision.models.get_model(arch, **options).state_dict()
            own = build_backbone(arch)[0].state_dict()
        state = layouts.recognize(layouts.backbone_state(theirs, "teacher")).state
        assert layouts.misfit(own, state) == "" and len(own) < len(theirs), arch


TIMM = [("vit_small_patch16_dinov3", "DINOv3"), ("deit_tiny_distilled_patch16_224", "distilled DeiT"),
        ("vit_medium_patch16_gap_240", "missing: cls_token"), ("vit_base_patch16_clip_224", "norm before"),
        ("beit_base_patch16_224", "relative positions")]  # fmt: skip


@pytest.mark.parametrize("arch, kind", TIMM)
def test_other_vits_of_timm_need_their_arch(tmp_path, arch, kind):
    torch.manual_seed(0)
    theirs = timm.create_model(arch, depth=2, num_classes=10)
    path = saved(theirs.state_dict(), tmp_path)
    assert kind in refused(path, arch="vit_small")
    with pytest.MonkeyPatch.context() as patched:  # of two blocks, which is faster
        create = timm.create_model
        patched.setattr(timm, "create_model", lambda name, **options: create(name, depth=2, **options))
        model, _ = backbones.load_backbone(path, arch=arch)
    theirs.reset_classifier(0)
    size = theirs.patch_embed.img_size
    if "distilled" in arch:
        theirs.head_dist = torch.nn.Identity()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_dinov3_and_distilled_files_of_their_authors(tmp_path):
    state = dinov2_file(registers=4)
    state |= {"storage_tokens": state.pop("register_tokens"), "rope_embed.periods": torch.ones(16)}
    del state["pos_embed"]
    message = refused(saved(state, tmp_path), arch="vit_nano", patch_size=14)
    assert "missing: pos_embed; unused: " in message and "DINOv3" in message
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", depth=4).state_dict()
    assert "distilled DeiT" in refused(saved({"model": distilled}, tmp_path), arch="vit_nano")


@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_average_pooling_of_timm(tmp_path, global_pool):
    theirs = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32, global_pool=global_pool, num_classes=0)
    path = saved(theirs.state_dict(), tmp_path)
    if global_pool == "avg":
        assert "average-pooled" in (message := refused(path)) and "timm's name for --arch" in message
    else:
        assert_same(backbones.load_backbone(path)[0], theirs.eval(), 32, 32)


@pytest.mark.parametrize("arch, options", [
    ("vit_tiny_patch16_224", {"global_pool": "avg"}), ("beit_base_patch16_224", {}), ("vit_tiny_patch16_224", {})])
def test_average_pooling_by_timms_name(tmp_path, arch, options):
    """A norm after the mean tells it; BEiT has it by default."""
    theirs = timm.create_model(arch, num_classes=0, **options).eval()
    state = random_like(theirs.state_dict())
    theirs.load_state_dict(state)
    torch.save(state, tmp_path / "w.pth")
    assert_same(backbones.load_backbone(str(tmp_path / "w.pth"), arch)[0], theirs, 224, 224)


def test_linear_classifier():
    weight, bias = torch.randn(5, 8), torch.randn(5)
    published = {"epoch": 100, "state_dict": {"module.linear.weight": weight, "module.linear.bias": bias},
                 "optimizer": {}, "best_acc": 77.0}  # fmt: skip
    x = torch.randn(3, 8)
    for loaded in (published, {"weight": weight, "bias": bias}, {"linear.weight": weight, "linear.bias": bias}):
        torch.testing.assert_close(layouts.linear_classifier(loaded)(x), x @ weight.T + bias)
    with pytest.raises(ValueError, match="w.pth: no linear classifier, .* it has cls_token"):
        layouts.linear_classifier({"cls_token": weight}, "w.pth")


def test_wrong_files_are_named(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="w.safetensors: not a readable checkpoint of plain tensors"):
        layouts.read(tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match="a folder; give the file of weights in it"):
        layouts.read(tmp_path)


def test_files_are_read_by_their_content(tmp_path, two_networks):
    from safetensors.torch import save_file

    for name in ("w.bin", "w.SAFETENSORS"):
        save_file(two_networks[0], tmp_path / name)
        assert torch.equal(layouts.read(tmp_path / name)["pos_embed"], two_networks[0]["pos_embed"])
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    (tmp_path / "index.json").write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": {"a": "b"}}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html></html>")
    for name, words in (("script.pt", "TorchScript.*state_dict"), ("index.json", "split into several.*save them as"),
                        ("config.json", "JSON.*give the file of weights"), ("pointer.pth", "git lfs pull"),
                        ("page.pth", "web page: download")):
        with pytest.raises(layouts.BadFile, match=f"{name}: .*{words}"):
            layouts.read(tmp_path / name)


def test_a_stored_timm_network_keeps_its_names(tmp_path):
    arch = "vit_small_patch14_reg4_dinov2"
    trained, _ = build_backbone(arch, depth=1)
    path = saved({"teacher": trained.state_dict(), "args": {"arch": arch}}, tmp_path)
    with pytest.raises(ValueError, match=r" of 175 tensors matched; missing: blocks.1\."):  # it has one block of twelve
        backbones.load_backbone(path)


# ---- Wrappers of other programs ----


@pytest.fixture(scope="module")
def two_networks():
    """Tensors of a student and a teacher."""
    return [random_like(build_backbone("vit_nano", 8, img_size=16)[0].state_dict(), seed) for seed in (1, 2)]


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def read_back(content, tmp_path, key="teacher"):
    return backbones.load_backbone(saved(content, tmp_path), checkpoint_key=key)[0].state_dict()["pos_embed"]


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.backbone.", "model.backbone.", "net.",
    "network.", "vit.", "trunk.", "base_model.", "feature_extractor.", "image_encoder.", "_forward_module.model.",
    "backbone._fsdp_wrapped_module.", "module.teacher.module.backbone._orig_mod.", "model.teacher_backbone.",
    "ema.", "net_ema.", "ema_model.module.", "model_ema.module.", "shadow.", "timm_model.", "visual.trunk."])
def test_files_with_prefixes_of_wrappers(tmp_path, two_networks, prefix):
    assert torch.equal(read_back(prefixed(two_networks[1], prefix), tmp_path), two_networks[1]["pos_embed"])


def test_wrappers_of_single_blocks(tmp_path, two_networks):
    """torch.compile and activation checkpointing of each block put their names in the middle."""
    for part in ("_orig_mod.", "_checkpoint_wrapped_module."):
        state = {k.replace("blocks.0.", f"blocks.0.{part}"): v for k, v in two_networks[1].items()}
        assert torch.equal(read_back(state, tmp_path), two_networks[1]["pos_embed"])


@pytest.mark.parametrize("keys", ["state_dict", "model", "model_state_dict", "network", "net", "module", "backbone",
                                  "model.state_dict", "teacher.state_dict", "state_dict.teacher", "target_encoder",
                                  "teacher_state_dict", "teacher_backbone"])
def test_entries_that_hold_the_network(tmp_path, two_networks, keys):
    content = two_networks[1]
    for key in reversed(keys.split(".")):
        content = {key: content}
    content |= {"epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1.0}]},
                "hyper_parameters": {"lr": 1.0}, "callbacks": {}}
    assert torch.equal(read_back(content, tmp_path), two_networks[1]["pos_embed"])


@pytest.mark.parametrize("student, teacher", [
    ("student_backbone.", "teacher_backbone."), ("student.backbone.", "teacher.backbone."),
    ("encoder_q.", "encoder_k."), ("module.base_encoder.", "module.momentum_encoder."),
    ("backbone.", "momentum_backbone."), ("encoder.", "target_encoder."), ("online_network.", "target_network.")])
def test_student_and_teacher_are_never_confused(tmp_path, two_networks, student, teacher):
    content = prefixed(two_networks[0], student) | prefixed(two_networks[1], teacher)
    nested = {"state_dict": content, "epoch": 3}
    entries = {student.rstrip(".").split(".")[-1]: two_networks[0], teacher.rstrip(".").split(".")[-1]: two_networks[1]}
    for file in (content, nested, *([entries] if len(entries) == 2 else [])):
        for key, state in zip(("student", "teacher"), two_networks, strict=True):
            assert torch.equal(read_back(file, tmp_path, key), state["pos_embed"])
    other = prefixed(two_networks[1], teacher)  # without the student
    for file in (other, {"state_dict": other}):
        with pytest.raises(parallel.Refused, match="no part 'student'.*it has teacher"):
            read_back(file, tmp_path, "student")


@pytest.mark.parametrize("student, teacher", [
    ("model.", "ema."), ("model.", "model_ema.module."), ("net.", "net_ema."), ("network.", "ema_model.module.")])
def test_an_average_in_a_flat_file_is_the_teacher(tmp_path, two_networks, student, teacher):
    content = prefixed(two_networks[0], student) | prefixed(two_networks[1], teacher)
    for file in (content, {"state_dict": content, "epoch": 3}):
        for key, state in zip(("student", "teacher"), two_networks, strict=True):
            assert torch.equal(read_back(file, tmp_path, key), state["pos_embed"])


def test_entries_that_are_not_known_are_named(tmp_path, two_networks):
    file = {"ema": two_networks[1], "optimizer": {"lr": 1.0}}
    with pytest.raises(parallel.Refused, match="it has ema, optimizer: name one by --checkpoint_key"):
        read_back(file, tmp_path)
    assert torch.equal(read_back(file, tmp_path, "ema"), two_networks[1]["pos_embed"])
