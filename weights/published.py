"""The published DINO weights: addresses, accuracies, and download.

Imports nothing of the project, because hubconf.py loads it alone.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import torch

BASE = "https://dl.fbaipublicfiles.com/dino"


class Published(NamedTuple):
    """A pretrained backbone and its accuracies on the ImageNet-1k validation set, in % (arXiv 2104.14294)."""

    arch: str
    patch_size: int
    folder: str  # below BASE; also the stem of the backbone's file in it
    linear: str  # file of the linear classifier, in the same folder
    knn_top1: float  # 20-NN
    linear_top1: float

    @property
    def url(self) -> str:
        return f"{BASE}/{self.folder}/{self.folder}.pth"

    @property
    def full_checkpoint_url(self) -> str:
        """Student and teacher with their heads, optimizer state and flags."""
        return f"{BASE}/{self.folder}/{self.folder}_full_checkpoint.pth"

    @property
    def linear_url(self) -> str:
        return f"{BASE}/{self.folder}/{self.linear}"


def _row(arch: str, patch_size: int, short: str, knn_top1: float, linear_top1: float) -> Published:
    return Published(arch, patch_size, f"dino_{short}_pretrain", f"dino_{short}_linearweights.pth", knn_top1,
                     linear_top1)


PUBLISHED = {
    "dino_vits16": _row("vit_small", 16, "deitsmall16", 74.5, 77.0),
    "dino_vits8": _row("vit_small", 8, "deitsmall8", 78.3, 79.7),
    "dino_vitb16": _row("vit_base", 16, "vitbase16", 76.1, 78.2),
    "dino_vitb8": _row("vit_base", 8, "vitbase8", 77.4, 80.1),
    "dino_xcit_small_12_p16": _row("xcit_small_12_p16", 16, "xcit_small_12_p16", 76.0, 77.8),
    "dino_xcit_small_12_p8": _row("xcit_small_12_p8", 8, "xcit_small_12_p8", 77.1, 79.2),
    "dino_xcit_medium_24_p16": _row("xcit_medium_24_p16", 16, "xcit_medium_24_p16", 76.4, 78.8),
    "dino_xcit_medium_24_p8": _row("xcit_medium_24_p8", 8, "xcit_medium_24_p8", 77.9, 80.3),
    "dino_resnet50": _row("resnet50", 16, "resnet50", 67.5, 75.3),
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
