"""The layers of linear depth (DINOv2, arXiv 2304.07193, section 7.4): tokens, bins of depth, losses.

Shapes: B images, D width, n blocks, K bins, h x w patches. Depth is in metres, 0 where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protocols import tokens
from protocols.features import PIXELS, Network

BINS, UPSAMPLING = 256, 4
LEAST_WEIGHT = 0.1  # of a bin, before the weights are divided by their sum
EPSILON = 0.001  # metres, added before logarithms
MEAN_WEIGHT = 0.15  # of the squared mean of the log error, beside its variance
SCALE_STEPS = 100  # first steps, which fit the scale alone
GRADIENT_SCALES = (1, 2, 4, 8)  # distances of the pixels of a grid
PUBLISHED_BLOCKS = {(24, 4): (4, 11, 17, 23)}  # by depth of the network and n, where they are not spaced evenly


# ---- Tokens ----


def spaced_blocks(depth: int, n: int) -> tuple[int, ...]:
    """Numbers of n evenly spaced blocks, the last one among them; of four of 24, the published ones."""
    return PUBLISHED_BLOCKS.get((depth, n)) or tuple(depth * (k + 1) // n - 1 for k in range(n))


def depth_tokens(network: Network, images: Tensor, counts: Sequence[int]) -> dict[int, Tensor]:
    """Each patch token with the class token beside it, of n spaced blocks, without the network's last norm.

    Returns:
        {n: (B, 2 n D, h, w)} for each n of `counts`; (B, n D, h, w) for networks without a class token.
    """
    if network.about["arch"] == PIXELS:
        return {1: tokens.patch_tokens(network, images)[0]}
    blocks = {n: spaced_blocks(tokens.block_count(network), n) for n in counts}
    wanted = sorted(set().union(*blocks.values()))
    joined = {}
    for block, (maps, class_token) in zip(wanted, tokens.block_tokens(network, images, wanted, norm=False),
                                          strict=True):
        beside = [] if class_token is None else [class_token[:, :, None, None].expand_as(maps)]
        joined[block] = torch.cat([maps, *beside], 1)
    return {n: torch.cat([joined[block] for block in blocks[n]], 1) for n in counts}


# ---- The layer ----


class DepthLayer(nn.Module):
    """Tokens (B, width, h, w) -> depth (B, 1, 4 h, 4 w): the mean of K depths, spaced evenly from least to largest.

    The weights of the K depths are relu(x) + 0.1 of K linear functions x of the tokens, divided by their sum
    (AdaBins, arXiv 2011.14141). As published, the tokens are upsampled by four before the linear layer; here its K
    outputs are, which is the same and cheaper where K < width.

    Args:
        batch_norm: normalize the tokens, which keeps one learning rate right for tokens of any size. Not published.
    """

    def __init__(self, width: int, least: float, largest: float, batch_norm: bool = True, bins: int = BINS) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.linear = nn.Conv2d(width, bins, 1)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("sums", torch.stack([torch.linspace(least, largest, bins), torch.ones(bins)]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.norm(x))
        x = F.interpolate(x, scale_factor=UPSAMPLING, mode="bilinear", align_corners=False).relu()
        # Both sums over the K maps in one product: these maps are large, and reading them takes the time.
        sums = F.conv2d(x, self.sums[:, :, None, None], LEAST_WEIGHT * self.sums.sum(1))
        return sums[:, :1] / sums[:, 1:]


# ---- Losses ----


def log_errors(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """log(p + eps) - log(d + eps), 0 where there is no depth, and where there is one: (B, height, width) each."""
    valid = truth > 0
    error = (predicted[:, 0] + EPSILON).log() - (truth + EPSILON).log()
    return error.where(valid, 0), valid


def sig_loss(predicted: Tensor, truth: Tensor, scale_only: bool = False) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2) of the log errors g of all pixels with a depth; 0 without any.

    Args:
        predicted: (B, 1, height, width).
        truth: (B, height, width).
        scale_only: leave the variance out.
    """
    error, valid = log_errors(predicted, truth)
    g = error[valid]
    if not len(g):
        return predicted.sum() * 0
    mean = MEAN_WEIGHT * g.mean().square()
    return (mean if scale_only or len(g) == 1 else g.var() + mean).clamp(min=1e-12).sqrt()


def gradient_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """How much the log error changes between neighbours: sum(|dg/dx| + |dg/dy|) / number of pixels with a depth.

    The sum over grids of every 1st, 2nd, 4th and 8th pixel (MegaDepth, arXiv 1804.00607, equation 4). Both pixels of
    a pair must have a depth. Arguments as in `sig_loss`.
    """
    error, valid = log_errors(predicted, truth)
    total = predicted.sum() * 0
    for step in GRADIENT_SCALES:
        g, known = error[:, ::step, ::step], valid[:, ::step, ::step]
        for axis in (1, 2):
            count = g.shape[axis] - 1
            change = (g.narrow(axis, 1, count) - g.narrow(axis, 0, count)).abs()
            both = known.narrow(axis, 1, count) & known.narrow(axis, 0, count)
            total = total + (change * both).sum() / known.sum().clamp(min=1)
    return total


def depth_loss(predicted: Tensor, truth: Tensor, step: int, steps: int, gradient_weight: float = 0.0) -> Tensor:
    """SigLoss, of which the first 100 steps, or the first tenth of a short run, fit the scale alone."""
    loss = sig_loss(predicted, truth, scale_only=step < min(SCALE_STEPS, steps // 10))
    return loss + gradient_weight * gradient_loss(predicted, truth) if gradient_weight else loss
