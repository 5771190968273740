import copy
import io
import json
from functools import partial

import numpy as np
import pytest
import torch
from golden_weights import GOLDEN, fill, rs
from torch import nn

import vision_transformer as vits
from vision_transformer import Block, DINOHead, Mlp, VisionTransformer, build_backbone

TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, qkv_bias=True)


@pytest.mark.parametrize(
    "name, arch, patch, seed, size",
    [
        ("vit_small_patch16_224x224", "vit_small", 16, 11, (224, 224)),
        ("vit_tiny_patch16_96x96", "vit_tiny", 16, 12, (96, 96)),
        ("vit_tiny_patch8_64x48", "vit_tiny", 8, 13, (64, 48)),
    ],
)
def test_published_figures(name, arch, patch, seed, size):
    golden = np.load(GOLDEN / f"{name}.npz")
    model = fill(build_backbone(arch, patch)[0]).eval()
    x = rs(seed, 2, 3, *size)
    with torch.no_grad():
        np.testing.assert_allclose(model(x), golden["cls"], rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(model.get_last_selfattention(x)[:, :, 0], golden["attn_cls"], rtol=1e-9)
        inter = torch.stack(model.get_intermediate_layers(x, 4))[:, :, :3]
        np.testing.assert_allclose(inter, golden["inter"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small", "vit_base"])
@pytest.mark.parametrize("patch", [8, 16])
def test_published_names_and_shapes(arch, patch):
    shapes = json.loads((GOLDEN / "backbone_state_dict_shapes.json").read_text())[f"{arch}_patch{patch}"]
    with torch.device("meta"):
        model = vits.VITS[arch](patch)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == shapes


@pytest.mark.parametrize("use_bn", [False, True])
def test_published_head_names_and_shapes(use_bn):
    shapes = json.loads((GOLDEN / "head_state_dict_shapes.json").read_text())
    with torch.device("meta"):
        head = DINOHead(384, 65536, use_bn=use_bn)
    expected = shapes["DINOHead(384, 65536, use_bn=True)" if use_bn else "DINOHead(384, 65536)"]
    assert {k: list(v.shape) for k, v in head.state_dict().items()} == expected


def test_published_head_figure():
    head = fill(DINOHead(48, 64, hidden_dim=96, bottleneck_dim=32))
    np.testing.assert_allclose(head(rs(21, 5, 48)).detach(), np.load(GOLDEN / "dino_head.npz")["out"], rtol=1e-9)


def test_head_starts_with_unit_prototypes_and_copies():
    head = DINOHead(48, 64, hidden_dim=96, bottleneck_dim=32, norm_last_layer=True)
    assert not head.last_layer.weight_g.requires_grad and torch.all(head.last_layer.weight_g == 1)
    assert DINOHead(48, 64, norm_last_layer=False).last_layer.weight_g.requires_grad
    x = torch.randn(2, 48)
    torch.testing.assert_close(copy.deepcopy(head)(x), head(x))
    assert "weight" in dict(DINOHead(48, 64, nlayers=1).mlp.named_parameters())


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (33, 47), (8, 8), (64, 64)])
def test_any_height_and_width(size):
    model = VisionTransformer(**TINY, num_register_tokens=2, init_values=1e-5).eval()
    x = torch.randn(2, 3, *size)
    rows, columns = size[0] // 8, size[1] // 8
    features = model.forward_features(x)
    assert features.patch_tokens.shape == (2, rows, columns, 48) and features.registers.shape == (2, 2, 48)
    torch.testing.assert_close(features.cls_token, model(x))
    assert model.get_last_selfattention(x).shape == (2, 3, rows * columns + 3, rows * columns + 3)
    cropped = x[:, :, : rows * 8, : columns * 8]  # the remainder at the right and bottom edge is not covered
    if size[0] != size[1]:
        torch.testing.assert_close(model(x), model(cropped))


@pytest.mark.parametrize("size", [(32, 32), (37, 21)], ids=["square", "with a remainder"])
@pytest.mark.parametrize("registers", [0, 3])
def test_patches_as_a_matrix_product_equal_the_convolution(size, registers):
    """Tokens, and the gradients of every parameter; images that need a gradient take the convolution."""
    torch.manual_seed(0)
    model = VisionTransformer(**TINY, num_register_tokens=registers).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    results = []
    for x in (images, images.clone().requires_grad_()):
        assert model.patch_embed.is_matrix_product(x) is not x.requires_grad
        model.zero_grad()
        tokens = model.prepare_tokens(x)
        tokens.square().sum().backward()
        results.append([tokens.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == 5 + bool(registers)
    for product, convolution in zip(*results, strict=True):
        torch.testing.assert_close(product, convolution, rtol=1e-12, atol=1e-12)


def test_what_observes_or_replaces_the_patch_embedding_is_called():
    model, x = VisionTransformer(**TINY), torch.zeros(1, 3, 32, 32)
    calls = []
    model.patch_embed.proj.register_forward_hook(lambda *_: calls.append(1))
    model.prepare_tokens(x)
    assert calls == [1]


def test_patch_grid_follows_the_picture():
    model = VisionTransformer(**TINY).eval()
    x = torch.zeros(1, 3, 32, 48)
    y = x.clone()
    y[..., 8:16, 40:48] = 1.0  # row 1, column 5
    changed = (model.patch_embed(y) - model.patch_embed(x)).abs().sum(-1).unflatten(1, (4, 6))[0]
    assert changed.nonzero().tolist() == [[1, 5]]


def test_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match="7 x 32 pixels is smaller than one patch of 8"):
        VisionTransformer(**TINY)(torch.zeros(1, 3, 7, 32))


def test_weights_asked_for_equal_the_fused_path():
    model = VisionTransformer(**TINY).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused, seen = model(x), []
    hook = model.blocks[1].attn.attn_drop.register_forward_hook(lambda m, i, o: seen.append(o))
    torch.testing.assert_close(model(x), fused, rtol=1e-12, atol=1e-12)
    hook.remove()
    torch.testing.assert_close(seen[0].sum(-1), torch.ones_like(seen[0].sum(-1)))
    torch.testing.assert_close(model.get_attention_maps(x, [1, -1])[0], seen[0])
    maps = model.get_attention_maps(x, [2, 0])
    torch.testing.assert_close(maps[0], model.get_last_selfattention(x))
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        model.get_attention_maps(x, [3])


def test_attention_called_by_hand_gives_the_weights():
    """As code written for the published models unpacks it."""
    attention = VisionTransformer(**TINY).blocks[0].attn
    _, weights = attention(torch.randn(2, 5, 48))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))


def test_attention_hook_reads_the_weights():
    model, seen = VisionTransformer(**TINY).eval(), []
    model.blocks[0].attn.register_forward_hook(lambda m, i, o: seen.append(o[1]))
    model(torch.randn(1, 3, 32, 32))
    assert seen[0].shape == (1, 3, 17, 17)


@pytest.mark.parametrize("registers, scale", [(0, None), (2, 0.5)])
def test_class_token_alone_is_the_class_token(registers, scale):
    """Forward and backward, and hooks of the last block see one token: that is, the rest was not computed."""
    torch.manual_seed(0)
    model = VisionTransformer(**TINY, num_register_tokens=registers, init_values=scale).double()
    x, seen, found = torch.randn(2, 3, 40, 24, dtype=torch.float64), [], []
    model.blocks[-1].mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    for alone in (False, True):
        out = model(x, class_token_only=alone)
        found.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert seen == [1 + registers + 5 * 3, 1]


def test_checkpointed_blocks_keep_their_inputs_alone_and_compute_the_same():
    model = VisionTransformer(**TINY, drop_path_rate=0.5).double().train()
    x, found, kept = torch.randn(4, 3, 32, 32, dtype=torch.float64), [], {False: [], True: []}
    for enable, sizes in kept.items():
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)  # of stochastic depth, which must draw the same twice
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            out = model(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    assert sum(kept[True]) < 0.5 * sum(kept[False])


def kept_and_gradients(model, x, dtype=None):
    """Numbers that autograd keeps between forward and backward, and the gradients of all parameters."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = model(x)
    return sum(sizes), torch.autograd.grad(out.float().square().sum(), list(model.parameters()))


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "num_classes": 7}, {"init_values": 0.5}])
def test_checkpointed_layers_keep_no_norm_and_no_gelu_and_compute_the_same(options):
    model = VisionTransformer(**TINY | options).double().train()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    n, gradients = kept_and_gradients(model, x)
    model.set_grad_checkpointing(layers=True)
    fewer, found = kept_and_gradients(model, x)
    torch.testing.assert_close(found, gradients, rtol=1e-12, atol=1e-15)
    tokens, width, blocks = 4 * 17, 48, 3
    weights = sum(b.mlp.fc1.weight.numel() + b.mlp.fc2.weight.numel() for b in model.blocks)
    assert n - fewer >= tokens * 6 * width * blocks - weights
    model.set_grad_checkpointing(False)
    assert kept_and_gradients(model, x)[0] == n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpointed_layers_under_autocast(dtype):
    model = VisionTransformer(**TINY).train()
    x = torch.randn(4, 3, 32, 32)
    _, gradients = kept_and_gradients(model, x, dtype)
    model.set_grad_checkpointing(layers=True)
    _, found = kept_and_gradients(model, x, dtype)
    for a, b in zip(found, gradients, strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= 0.002 * b.norm() + 1e-6


def test_checkpointed_layers_leave_what_is_observed_or_replaced_alone():
    """A hook sees what it saw without; another layer in a pair's place is called."""
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    model = VisionTransformer(**TINY).train()
    found = {False: [], True: []}
    for layers, seen in found.items():
        model.set_grad_checkpointing(layers, layers=layers)
        handles = []
        for module in (model.blocks[0].attn, model.blocks[1].mlp, model.blocks[1].norm1, model.blocks[2].mlp.act,
                       model.blocks[2].attn.qkv, model.blocks[2].mlp.drop):
            hook = lambda m, given, out, seen=seen: seen.append(given[0].detach())  # noqa: E731
            handles.append(module.register_forward_hook(hook))
        model(x)
        for handle in handles:
            handle.remove()
    assert len(found[False]) == 7
    torch.testing.assert_close(found[True], found[False])
    model.blocks[0].mlp.act = torch.nn.ReLU()
    out = model(x)
    model.set_grad_checkpointing(False)
    torch.testing.assert_close(out, model(x))


def test_changed_stride_gives_a_dense_grid():
    model = VisionTransformer(**TINY).eval()
    model.patch_embed.proj.stride = (4, 4)
    assert model.forward_features(torch.randn(1, 3, 32, 40)).patch_tokens.shape == (1, 7, 9, 48)


def test_classifier_channels_and_drop_path():
    model = VisionTransformer(**TINY, num_classes=7, in_chans=5, drop_path_rate=0.5)
    assert model(torch.randn(2, 5, 32, 32)).shape == (2, 7)
    assert [getattr(b.drop_path, "drop_prob", 0.0) for b in model.blocks] == [0.0, 0.25, 0.5]
    kept = vits.drop_path(torch.ones(4000, 3), 0.25, training=True)
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3]) and abs(kept.mean() - 1) < 0.05
    assert torch.all(kept == kept[:, :1])  # a sample is dropped whole


def test_survives_copy_pickle_half_and_trace():
    model = VisionTransformer(**TINY).eval()
    x = torch.randn(2, 3, 32, 32)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x), rtol=1e-4, atol=1e-5)
    assert copy.deepcopy(model).bfloat16()(torch.randn(1, 3, 24, 40).bfloat16()).dtype == torch.bfloat16
    model.patch_embed = torch.nn.Identity()  # a part of other code
    assert copy.deepcopy(model).img_size == model.img_size


@pytest.mark.parametrize(
    "arch, width",
    [
        ("resnet18", 512), ("resnet50", 2048), ("vgg11", 4096), ("squeezenet1_1", 512), ("densenet121", 1024),
        ("mobilenet_v3_small", 1024), ("convnext_tiny", 768), ("efficientnet_b0", 1280), ("swin_t", 768),
        ("googlenet", 1024),
    ],
)  # fmt: skip
def test_torchvision_networks(arch, width):
    with torch.device("meta"):
        model, embed_dim = build_backbone(arch)
        assert embed_dim == width
        if arch != "swin_t":
            assert model(torch.zeros(2, 3, 224, 224)).shape == (2, width)


@pytest.mark.parametrize("arch", ["swin_t", "convnext_tiny"])
def test_stochastic_depth_of_torchvision_networks_is_what_is_asked_for(arch):
    from torchvision.ops import StochasticDepth

    for rate in (0.0, 0.3):
        rates = [m.p for m in build_backbone(arch, drop_path_rate=rate)[0].modules() if isinstance(m, StochasticDepth)]
        assert rates[0] == 0 and rates[-1] == rate and rates == sorted(rates) and len(rates) > 10


def test_resnet_has_published_names_and_takes_channels():
    model, _ = build_backbone("resnet18", in_chans=1)
    assert not any(k.startswith("fc.") for k in model.state_dict())
    assert model.eval()(torch.zeros(2, 1, 64, 64)).shape == (2, 512)


@pytest.mark.parametrize(
    "arch, width",
    [("xcit_small_12_p16", 384), ("xcit_medium_24_p8", 512), ("vit_small_patch16_224", 384), ("resnet26", 2048)],
)
def test_timm_networks(arch, width):
    with torch.device("meta"):
        model, embed_dim = build_backbone(arch, drop_path_rate=0.1)
    assert embed_dim == width


def test_resnet_with_the_stem_for_small_images():
    """Four times the side of the plain network's feature maps, the plain names, and one more channel if asked."""
    plain, small = (build_backbone(arch, in_chans=4)[0] for arch in ("resnet18", "resnet18_cifar"))
    assert small.conv1.weight.shape == (64, 4, 3, 3) and plain.state_dict().keys() == small.state_dict().keys()
    sides = []
    for network in (plain, small):
        network.layer4.register_forward_hook(lambda module, args, out: sides.append(out.shape[-1]))
        network(torch.zeros(2, 4, 64, 64))
    assert sides == [2, 8]
    with pytest.raises(ValueError, match="--arch vgg11_cifar"):
        build_backbone("vgg11_cifar")


def test_timm_vit_takes_small_crops():
    model, width = build_backbone("vit_tiny_patch16_224")
    assert model.eval()(torch.zeros(1, 3, 96, 96)).shape == (1, width)


def test_unknown_name_lists_the_near_ones():
    with pytest.raises(ValueError, match="--arch vit_smal: no such network; .*vit_small"):
        build_backbone("vit_smal")


def test_mlp_and_block_take_the_published_arguments():
    """Mlp(in, hidden, out, act, drop); Block(..., drop_path, act, norm, ...), as client code calls them."""
    mlp = Mlp(8, 12, 4, nn.ReLU, 0.0)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    hidden = (x @ mlp.fc1.weight.T + mlp.fc1.bias).clamp(min=0)
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)
    assert Mlp(8)(x).shape == x.shape and Mlp(8).fc1.weight.shape == (8, 8)

    block = Block(8, 2, 4.0, True, None, 0.0, 0.0, 0.0, nn.ReLU, partial(nn.LayerNorm, eps=1e-6))
    assert isinstance(block.mlp.act, nn.ReLU) and block.norm1.eps == 1e-6 and block.mlp.fc1.weight.shape == (32, 8)
    assert isinstance(Block(dim=8, num_heads=2, act_layer=nn.SiLU, norm_layer=nn.LayerNorm).mlp.act, nn.SiLU)
    block.recomputes_layers = True
    expected = copy.deepcopy(block).requires_grad_(False)(x)
    torch.testing.assert_close(block(x.requires_grad_()), expected)


def test_layers_of_dino_keep_their_published_form():
    """A list of all tokens; the options of DINOv2 that would change this are refused."""
    model, x = VisionTransformer(**TINY, num_register_tokens=2).eval(), torch.randn(2, 3, 32, 40)
    layers = model.get_intermediate_layers(x, 5)
    assert isinstance(layers, list) and [t.shape for t in layers] == [(2, 1 + 2 + 20, 48)] * 3
    torch.testing.assert_close(layers[-1][:, 0], model(x))
    torch.testing.assert_close(model.norm(model.get_intermediate_layers(x, [1], norm=False)[0]), layers[1])
    for option in ("reshape", "return_class_token"):
        with pytest.raises(ValueError, match=f'{option}: .* method="dinov2"'):
            model.get_intermediate_layers(x, 1, **{option: True})


def test_torch_compile_makes_one_graph():
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list):
        graphs.append([getattr(node.target, "__name__", "") for node in graph.graph.nodes])
        return graph.forward

    network, x = VisionTransformer(**TINY), torch.randn(2, 3, 32, 32)
    expected = network(x)
    network.compile(backend=record, dynamic=False)
    torch.testing.assert_close(network(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        network(x, class_token_only=True)
    assert len(graphs) == 2 and all("linear" in names for names in graphs)  # nothing breaks a graph in two
