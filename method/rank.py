"""RankMe: the number of dimensions that a set of features uses."""

import torch
from torch import Tensor


def effective_rank(features: Tensor) -> Tensor:
    """RankMe (Garrido et al. 2023, equation 1): exp of the entropy of the singular values of (n, D) features."""
    s = torch.linalg.svdvals(features.float())
    p = s / s.sum().clamp_min(1e-12) + 1e-7
    return torch.exp(-(p * p.log()).sum())
