"""Backbones for torch.hub, with the published weights, your own, or random ones.

    model = torch.hub.load("/path/to/this/folder", "dino_vits16", source="local")
    model = torch.hub.load("/path/to/this/folder", "dino_vits16", source="local", weights="output/run/checkpoint.pth")
    model = torch.hub.load("/path/to/this/folder", "dino", source="local", weights="output/shapes/checkpoint.pth")

Every entry takes `pretrained` (False: random weights), `weights` (a file or URL instead of the published one, in any
layout that weights/layouts.py knows; a full checkpoint gives its teacher) and the options of the network; `dino`
takes only the last two and reads the network from the file.
"""

import importlib.machinery as _machinery
import importlib.util as _util
import os as _os
import sys as _sys
import zlib as _zlib
from pathlib import Path as _Path

dependencies = ["torch", "numpy"]

_FOLDER = _Path(__file__).resolve().parent


def _load_module(name):
    """Load a module of this folder, such as weights/layouts, even if the process has another module of that name.

    The module is loaded by path and must import nothing else of this folder, so nothing here becomes importable.
    It is registered in sys.modules under a name private to this folder. The exception is vision_transformer: it keeps
    its plain name if the process has no other module of that name, so that a pickled model can be loaded by a process
    with this folder on its path.
    """
    path = _FOLDER / f"{name}.py"
    plain, private = name.replace("/", "."), f"_dino_{_zlib.crc32(str(_FOLDER).encode()):08x}_{name.replace('/', '_')}"
    for key in (plain, private):
        file = getattr(_sys.modules.get(key), "__file__", None)
        if file and _Path(file).resolve() == path:
            return _sys.modules[key]
    elsewhere = [p for p in _sys.path if _Path(p or ".").resolve() != _FOLDER]
    taken = "/" in name or name in _sys.modules or _machinery.PathFinder.find_spec(name, elsewhere)
    key = private if taken else plain
    spec = _util.spec_from_file_location(key, path)
    module = _util.module_from_spec(spec)
    _sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del _sys.modules[key]
        raise
    return module


def _described(weights):
    """Path of a file or URL of weights, and what layouts.describe says of its teacher."""
    layouts, published = _load_module("weights/layouts"), _load_module("weights/published")
    vision_transformer, url = _load_module("vision_transformer"), _os.fspath(weights)
    path = published.fetch(url) if "://" in url else _os.path.expanduser(url)
    try:
        loaded = layouts.read(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to download it again" if "://" in url else str(error)) from error
    state = layouts.backbone_state(loaded, "teacher", path)
    ours = (*vision_transformer.VITS, *vision_transformer.XCITS)
    try:
        config = layouts.network_config(loaded, path, vision_transformer.is_network)
        return path, layouts.describe(layouts.stored_args(loaded), state, ours, vision_transformer.is_network, config,
                                      layouts.is_training(loaded, "teacher", path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _filled(name, path, model, state):
    """The model with the tensors of a file; a classifier asked for with `num_classes` may keep its random ones."""
    layouts, own = _load_module("weights/layouts"), model.state_dict()
    if problems := layouts.misfit(own, state, optional=("head.weight", "head.bias")):
        raise ValueError(f"{name}: {path} does not hold this network's weights: {problems}; give another file")
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    return model


# Options of the published entries of DINOv2 that have one value here.
_FIXED = {"block_chunks": 0, "proj_bias": True, "ffn_bias": True}


def _make(name, pretrained, weights, kwargs):
    vision_transformer, published = _load_module("vision_transformer"), _load_module("weights/published")
    network = published.PUBLISHED[name]
    for option in _FIXED.keys() & kwargs.keys() if name.startswith("dinov2") else ():
        if (value := kwargs.pop(option)) != _FIXED[option]:
            raise ValueError(f"{name}: {option}={value}: these networks have {_FIXED[option]} only; leave it out")
    kwargs = {"patch_size": network.patch_size} | kwargs
    if weights == "LVD142M":  # how the published entries of DINOv2 name their weights
        weights = None
    if not pretrained and not weights:
        return vision_transformer.build_backbone(network.arch, **network.options | kwargs)[0]
    path, described = _described(weights or network.url)
    aliases = (None, network.arch, network.arch.replace("vit_", "deit_"), vision_transformer.XCITS.get(network.arch))
    if described.arch not in aliases:
        raise ValueError(f"{name}: {path} holds the weights of a {described.arch}, not of a {network.arch}")
    options = {k: v for k, v in network.options.items() if k != "init_values"}  # of LayerScale: as in the file
    options |= described.options
    model, _ = vision_transformer.build_backbone(network.arch, **options | kwargs)
    return _filled(name, path, model, described.state)


def dino(weights, **kwargs):
    """The backbone in any file of weights of this project, or in any layout of weights/layouts.py.

    Architecture, patch size, channels and the rest are read from the file; `arch` and `patch_size` name them for
    networks that it does not tell. Mean and std for the images: `weights.load_backbone` in this folder returns them.
    """
    path, described = _described(weights)
    arch = described.arch or kwargs.get("arch")
    if arch is None:
        raise ValueError(f"dino: {path} does not tell its network; give arch=..., a name of timm or torchvision")
    options = described.options | {k: v for k, v in kwargs.items() if k != "arch"}
    model, _ = _load_module("vision_transformer").build_backbone(arch, **options)
    return _filled("dino", path, model, described.state)


def dino_vits16(pretrained=True, weights=None, **kwargs):
    """ViT-S/16, (B, 3, height, width) -> (B, 384). ImageNet-1k: 20-NN 74.5 %, linear 77.0 %."""
    return _make("dino_vits16", pretrained, weights, kwargs)


def dino_vits8(pretrained=True, weights=None, **kwargs):
    """ViT-S/8, (B, 3, height, width) -> (B, 384). ImageNet-1k: 20-NN 78.3 %, linear 79.7 %."""
    return _make("dino_vits8", pretrained, weights, kwargs)


def dino_vitb16(pretrained=True, weights=None, **kwargs):
    """ViT-B/16, (B, 3, height, width) -> (B, 768). ImageNet-1k: 20-NN 76.1 %, linear 78.2 %."""
    return _make("dino_vitb16", pretrained, weights, kwargs)


def dino_vitb8(pretrained=True, weights=None, **kwargs):
    """ViT-B/8, (B, 3, height, width) -> (B, 768). ImageNet-1k: 20-NN 77.4 %, linear 80.1 %."""
    return _make("dino_vitb8", pretrained, weights, kwargs)


def dino_xcit_small_12_p16(pretrained=True, weights=None, **kwargs):
    """XCiT-S12/16 (needs timm), (B, 3, height, width) -> (B, 384). ImageNet-1k: 20-NN 76.0 %, linear 77.8 %."""
    return _make("dino_xcit_small_12_p16", pretrained, weights, kwargs)


def dino_xcit_small_12_p8(pretrained=True, weights=None, **kwargs):
    """XCiT-S12/8 (needs timm), (B, 3, height, width) -> (B, 384). ImageNet-1k: 20-NN 77.1 %, linear 79.2 %."""
    return _make("dino_xcit_small_12_p8", pretrained, weights, kwargs)


def dino_xcit_medium_24_p16(pretrained=True, weights=None, **kwargs):
    """XCiT-M24/16 (needs timm), (B, 3, height, width) -> (B, 512). ImageNet-1k: 20-NN 76.4 %, linear 78.8 %."""
    return _make("dino_xcit_medium_24_p16", pretrained, weights, kwargs)


def dino_xcit_medium_24_p8(pretrained=True, weights=None, **kwargs):
    """XCiT-M24/8 (needs timm), (B, 3, height, width) -> (B, 512). ImageNet-1k: 20-NN 77.9 %, linear 80.3 %."""
    return _make("dino_xcit_medium_24_p8", pretrained, weights, kwargs)


def dino_resnet50(pretrained=True, weights=None, **kwargs):
    """ResNet-50 (needs torchvision), (B, 3, height, width) -> (B, 2048). ImageNet-1k: 20-NN 67.5 %, linear 75.3 %."""
    return _make("dino_resnet50", pretrained, weights, kwargs)


def dinov2_vits14(pretrained=True, weights=None, **kwargs):
    """ViT-S/14, (B, 3, height, width) -> (B, 384). ImageNet-1k: k-NN 79.0 %, linear 81.1 %."""
    return _make("dinov2_vits14", pretrained, weights, kwargs)


def dinov2_vitb14(pretrained=True, weights=None, **kwargs):
    """ViT-B/14, (B, 3, height, width) -> (B, 768). ImageNet-1k: k-NN 82.1 %, linear 84.5 %."""
    return _make("dinov2_vitb14", pretrained, weights, kwargs)


def dinov2_vitl14(pretrained=True, weights=None, **kwargs):
    """ViT-L/14, (B, 3, height, width) -> (B, 1024). ImageNet-1k: k-NN 83.5 %, linear 86.3 %."""
    return _make("dinov2_vitl14", pretrained, weights, kwargs)


def dinov2_vitg14(pretrained=True, weights=None, **kwargs):
    """ViT-g/14, (B, 3, height, width) -> (B, 1536). ImageNet-1k: k-NN 83.5 %, linear 86.5 %."""
    return _make("dinov2_vitg14", pretrained, weights, kwargs)


def dinov2_vits14_reg(pretrained=True, weights=None, **kwargs):
    """ViT-S/14 with 4 registers, (B, 3, height, width) -> (B, 384). ImageNet-1k: k-NN 79.1 %, linear 80.9 %."""
    return _make("dinov2_vits14_reg", pretrained, weights, kwargs)


def dinov2_vitb14_reg(pretrained=True, weights=None, **kwargs):
    """ViT-B/14 with 4 registers, (B, 3, height, width) -> (B, 768). ImageNet-1k: k-NN 82.0 %, linear 84.6 %."""
    return _make("dinov2_vitb14_reg", pretrained, weights, kwargs)


def dinov2_vitl14_reg(pretrained=True, weights=None, **kwargs):
    """ViT-L/14 with 4 registers, (B, 3, height, width) -> (B, 1024). ImageNet-1k: k-NN 83.8 %, linear 86.7 %."""
    return _make("dinov2_vitl14_reg", pretrained, weights, kwargs)


def dinov2_vitg14_reg(pretrained=True, weights=None, **kwargs):
    """ViT-g/14 with 4 registers, (B, 3, height, width) -> (B, 1536). ImageNet-1k: k-NN 83.7 %, linear 87.1 %."""
    return _make("dinov2_vitg14_reg", pretrained, weights, kwargs)
