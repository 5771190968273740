"""Sinkhorn-Knopp: assignments that use all prototypes equally (SwAV, arXiv 2006.09882; DINOv2, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import parallel
from method.targets import Targets, at_least_float32, parts, with_samples


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, temp: float, iterations: int = 3) -> Targets:
    """Targets q = diag(u) exp(scores / temp) diag(v) from scores (n, K) of this process.

    Repeats `iterations` times, over the rows of all processes, of which each may pass another number, also none:

        1. scale each prototype so that it has the same sum over all samples
        2. scale each sample so that it has the sum one over the prototypes

    With a = log v, step 1 subtracts from a[k] the logarithm of prototype k's sum, and step 2 is a softmax over the
    prototypes of scores / temp + a. Factors common to all prototypes cancel in step 2: the divisions by K, by the
    number of samples and by the total sum, which the paper's algorithm has, change nothing. Nothing overflows or
    vanishes in float32 at any scale of the scores: after step 1 a prototype's sum cannot fall below 1 / (n K).

    With gradient accumulation, the samples are those of a micro-batch.
    """
    if iterations < 1:
        raise ValueError(f"iterations: {iterations}; Sinkhorn-Knopp needs at least one")
    scores = scores.detach()
    prototypes = -log_sums(scores, temp)
    for _ in range(iterations - 1):
        sums = torch.zeros_like(prototypes)
        for first, last in parts(*scores.shape, scores.device):
            x = at_least_float32(scores[first:last]) / temp
            sums += F.softmax(x.add_(prototypes), dim=1).sum(0)
        prototypes -= parallel.sum_over_processes(sums).log_()
    return with_samples(scores, temp, prototypes)


def log_sums(scores: Tensor, temp: float) -> Tensor:
    """(K,) log sum_n exp(scores[n, k] / temp), over the rows of all processes."""
    result = torch.full_like(at_least_float32(scores[:0]).sum(0), -torch.inf)
    for first, last in parts(*scores.shape, scores.device):
        result = torch.logaddexp(result, (at_least_float32(scores[first:last]) / temp).logsumexp(0))
    if parallel.world_size() == 1:
        return result
    largest = parallel.max_over_processes(result)
    return largest + parallel.sum_over_processes((result - largest).exp_()).log_()
