"""The published weights of DINO and DINOv2: addresses, accuracies, and download.

Imports nothing of the project, because hubconf.py loads it alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

BASE = "https://dl.fbaipublicfiles.com"


class Published(NamedTuple):
    """A pretrained backbone and its accuracies on the ImageNet-1k validation set, in %."""

    arch: str
    patch_size: int
    path: str  # of the backbone's file, below BASE
    knn_top1: float  # of DINO 20-NN; of DINOv2 the k is not stated
    linear_top1: float
    options: Mapping[str, object] = MappingProxyType({})  # further arguments of build_backbone

    @property
    def url(self) -> str:
        return f"{BASE}/{self.path}"


def _dino(arch: str, patch_size: int, short: str, knn_top1: float, linear_top1: float) -> Published:
    """A network of arXiv 2104.14294."""
    file = f"dino_{short}_pretrain"
    return Published(arch, patch_size, f"dino/{file}/{file}.pth", knn_top1, linear_top1)


def _dinov2(arch: str, short: str, knn_top1: float, linear_top1: float, registers: int = 0) -> Published:
    """A network of arXiv 2304.07193 or, with registers, 2309.16588; the accuracies are those of its model card."""
    file = f"dinov2/{short}/{short}" + (f"_reg{registers}" if registers else "")
    options = {"img_size": 518, "init_values": 1.0, "method": "dinov2"}
    if registers:
        options |= {"num_register_tokens": registers, "interpolate_antialias": True, "interpolate_offset": 0.0}
    return Published(arch, 14, f"{file}_pretrain.pth", knn_top1, linear_top1, MappingProxyType(options))


PUBLISHED = {
    "dino_vits16": _dino("vit_small", 16, "deitsmall16", 74.5, 77.0),
    "dino_vits8": _dino("vit_small", 8, "deitsmall8", 78.3, 79.7),
    "dino_vitb16": _dino("vit_base", 16, "vitbase16", 76.1, 78.2),
    "dino_vitb8": _dino("vit_base", 8, "vitbase8", 77.4, 80.1),
    "dino_xcit_small_12_p16": _dino("xcit_small_12_p16", 16, "xcit_small_12_p16", 76.0, 77.8),
    "dino_xcit_small_12_p8": _dino("xcit_small_12_p8", 8, "xcit_small_12_p8", 77.1, 79.2),
    "dino_xcit_medium_24_p16": _dino("xcit_medium_24_p16", 16, "xcit_medium_24_p16", 76.4, 78.8),
    "dino_xcit_medium_24_p8": _dino("xcit_medium_24_p8", 8, "xcit_medium_24_p8", 77.9, 80.3),
    "dino_resnet50": _dino("resnet50", 16, "resnet50", 67.5, 75.3),
    "dinov2_vits14": _dinov2("vit_small", "dinov2_vits14", 79.0, 81.1),
    "dinov2_vitb14": _dinov2("vit_base", "dinov2_vitb14", 82.1, 84.5),
    "dinov2_vitl14": _dinov2("vit_large", "dinov2_vitl14", 83.5, 86.3),
    "dinov2_vitg14": _dinov2("vit_giant2", "dinov2_vitg14", 83.5, 86.5),
    "dinov2_vits14_reg": _dinov2("vit_small", "dinov2_vits14", 79.1, 80.9, 4),
    "dinov2_vitb14_reg": _dinov2("vit_base", "dinov2_vitb14", 82.0, 84.6, 4),
    "dinov2_vitl14_reg": _dinov2("vit_large", "dinov2_vitl14", 83.8, 86.7, 4),
    "dinov2_vitg14_reg": _dinov2("vit_giant2", "dinov2_vitg14", 83.7, 87.1, 4),
}

# URL -> SHA-256 of the file. None are known for the published files; releases of this project add theirs.
SHA256: dict[str, str] = {}


def fetch(url: str, folder: str | os.PathLike | None = None) -> Path:
    """Download a file, unless it is already in torch.hub's folder of checkpoints, and check its SHA-256 if known.

    Published files keep their names, so that copies downloaded by other code are used. For other addresses the name
    includes a hash of the address, so that `a/checkpoint.pth` and `b/checkpoint.pth` stay apart.

    Raises:
        OSError: the download failed; the message says what to do without a network.
        ValueError: the file's SHA-256 is not the one in the table.
    """
    folder = Path(folder or Path(torch.hub.get_dir()) / "checkpoints")
    name = url.split("?")[0].rstrip("/").rsplit("/", 1)[-1]
    if url not in [p.url for p in PUBLISHED.values()]:
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    path = folder / name
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, ValueError) as error:
            raise OSError(f"{url} can't be downloaded ({error}); without a network, download it elsewhere and give its "
                          "path as weights=..., or pass pretrained=False for random weights") from error
    if url in SHA256 and (digest := sha256(path)) != SHA256[url]:
        raise ValueError(f"{path}: SHA-256 {digest} instead of {SHA256[url]}; remove the file to download it again")
    return path


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
