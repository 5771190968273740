"""The layers of semantic segmentation: linear classifiers of patch tokens, their loss, and k-means as a layer.

Shapes: B images, D width, n blocks, K classes, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagesets.masks import VOID
from protocols import tokens
from protocols.dense_training import TrainingCrops, batches, gathered
from protocols.features import Network
from protocols.segmentation import import_kmeans


def linear_layer(width: int, n_classes: int, dropout: float = 0.0) -> nn.Sequential:
    """Batch norm and a 1 x 1 convolution: (B, width, h, w) -> (B, K, h, w). Weights from N(0, 0.01^2), biases 0."""
    layer = nn.Sequential(nn.BatchNorm2d(width), nn.Dropout2d(dropout), nn.Conv2d(width, n_classes, 1))
    nn.init.normal_(layer[-1].weight, std=0.01)
    nn.init.zeros_(layer[-1].bias)
    return layer


def last_tokens(network: Network, images: Tensor, counts: Sequence[int]) -> dict[int, Tensor]:
    """Tokens of the last n blocks, through the last norm, concatenated: {n: (B, n D, h, w)} for each n of `counts`."""
    outputs = tokens.patch_tokens(network, images, max(counts))
    return {n: torch.cat(outputs[-n:], 1) for n in counts}


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not VOID; 0 without any.

    Args:
        logits: (B, K, height, width).
        labels: (B, height, width).
    """
    labels = labels.long()
    total = F.cross_entropy(logits, labels, ignore_index=VOID, reduction="sum")
    return total / (labels != VOID).sum().clamp(min=1)


@torch.no_grad()
def kmeans_layer(
    network: Network, crops: TrainingCrops, n_classes: int, batch_size: int, num_workers: int, images: int = 512,
    most_tokens: int = 20_000, seed: int = 0,
) -> nn.Conv2d:
    """k-means of patch tokens as a layer: clusters in place of classes, of which each gets the class it overlaps most.

    There are as many clusters as classes, matched one to one so that the sum of their IoU on the training images is
    largest. The score of a cluster with centre c is 2 c x - |c|^2, which is largest for the nearest centre.
    """
    from scipy.optimize import linear_sum_assignment  # scikit-learn needs scipy too

    steps = -(-min(images, len(crops.images.items)) // batch_size)
    maps, labels = [], []
    for image, label in batches(crops, steps, batch_size, num_workers):
        maps.append(gathered(tokens.patch_tokens(network, image.to(network.device))[0]))
        labels.append(gathered(label.to(network.device)))
    flat = torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2).cpu() for x in maps])
    rows = np.random.default_rng(seed).permutation(len(flat))[:most_tokens]
    fitted = import_kmeans()(n_classes, n_init=3, random_state=seed).fit(flat[rows].numpy())
    centres = torch.from_numpy(fitted.cluster_centers_).float().to(network.device)
    layer = nn.Conv2d(centres.shape[1], n_classes, 1).to(network.device).requires_grad_(False)
    layer.weight.copy_(2 * centres[:, :, None, None])
    layer.bias.copy_(-centres.square().sum(1))
    overlap = torch.zeros(n_classes, VOID + 1, device=network.device)
    for x, label in zip(maps, labels, strict=True):
        clusters = tokens.upsample(layer(x), *label.shape[-2:], tokens.patch_size(network)).argmax(1)
        pairs = clusters.flatten() * (VOID + 1) + label.flatten().long()
        overlap += pairs.bincount(minlength=overlap.numel()).view_as(overlap)
    overlap = overlap[:, :n_classes].cpu().numpy()
    union = overlap.sum(1, keepdims=True) + overlap.sum(0) - overlap
    _, classes = linear_sum_assignment(-overlap / np.maximum(union, 1))
    order = torch.from_numpy(np.argsort(classes)).to(network.device)  # the cluster of class 0, 1, ...
    layer.weight.copy_(layer.weight[order])
    layer.bias.copy_(layer.bias[order])
    return layer
