"""Exact nearest-neighbour search in bounded memory on any number of processes, and weighted k-NN classification.

DINO (arXiv 2104.14294), section 4.1 and appendix; Wu et al. 2018 (arXiv 1805.01978), section 3.4.

Shapes: N training images (the bank), M test images (the queries), D width, K the largest k, C classes, W processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import parallel
from parallel import Refused
from protocols import scores
from protocols.progress import progress
from utils import at_least_float32

# ---- Search: the K nearest training images of each test image ----

# Memory, whatever the size of the sets: a normalized copy of this process's part of the bank, ROWS x COLUMNS
# similarities (128 MiB in float32), and at most as much again for the candidates among them.
ROWS, COLUMNS = 512, 65_536
GROUP = 32  # neighbouring columns whose maximum `top_by_groups` compares


def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int,
    metric: str = "cosine",
    exclude: Tensor | None = None,
    device: torch.device | str | None = None,
    rows: int = ROWS,
    columns: int = COLUMNS,
    what: str = "neighbours",
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of `bank` for each query, by exhaustive search; most similar first, ties by row number.

    Exact up to rounding: a matrix product may give two copies of a row similarities that differ in the last digit,
    and these do not count as ties.

    Several processes share the search: each searches its part of the bank, then the results are merged. All of them
    call this with the same arguments and get the same result.

    Args:
        queries: (M, D). bank: (N, D). Any floating type; computed in float32, or float64 for float64.
        metric: "cosine"; or "l2", where the similarity is -|q - x|^2 / (2 s^2) with s^2 the mean squared norm of the
            bank. For vectors of one norm, this is the cosine minus 1.
        exclude: (M,) int64, a row of the bank that is not a candidate for the query (the query itself, in
            leave-one-out); -1 excludes none.
        device: where to search, by default where the bank is. Under NCCL every process searches on its GPU.
        rows, columns: queries and rows of the bank compared at a time.
        what: the name of the work on progress lines; "" prints none.

    Returns:
        similarity (M, K) and row (M, K) on the CPU. K is k, or the number of candidates if that is smaller.

    Raises:
        Refused: features that are not finite, or a bank without candidates.
        ValueError: features of other shapes.
    """
    check_features(queries, bank)
    k = min(k, len(bank) - int(exclude is not None and bool((exclude >= 0).any())))
    if k < 1:
        raise Refused("--data_path: a single image has no neighbours but itself; give at least two images")
    place = embedding(bank, metric, parallel.group_device(device or bank.device))
    share = -(-len(bank) // parallel.world_size())
    start = share * parallel.rank()
    keys = place(bank[start : start + share])  # (n, D), this process's part; n = 0 is possible
    offsets = -keys.square().sum(1) / 2 if metric == "l2" else None
    buffer = keys.new_empty(min(rows, len(queries)) * padded(min(columns, len(keys))))
    nearest_rows = []
    for first in progress(range(0, len(queries), rows), len(queries), what, rows):
        x = place(queries[first : first + rows])
        best = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        for c in range(0, len(keys), columns):
            block = keys[c : c + columns]
            similarity = buffer[: len(x) * padded(len(block))].view(len(x), -1)
            compare(x, block, None if offsets is None else offsets[c : c + columns], similarity)
            if exclude is not None:
                hide(similarity, exclude[first : first + rows].to(x.device) - start - c, len(block))
            values, index = top_by_groups(similarity, k)
            best = merge(best, (values, index + start + c), k)
        values, index = merge_over_processes(best, k)
        values = values - x.square().sum(1, keepdim=True) / 2 if metric == "l2" else values
        nearest_rows.append((values.cpu(), index.cpu()))
    similarities, indices = zip(*nearest_rows, strict=True)
    return torch.cat(similarities), torch.cat(indices)


def check_features(queries: Tensor, bank: Tensor) -> None:
    for name, x in (("training", bank), ("test", queries)):
        if x.ndim != 2 or len(x) == 0:
            raise ValueError(f"{name} features have shape {tuple(x.shape)}: (images, width) expected, images > 0")
        bad = sum(int((~torch.isfinite(part).all(1)).sum()) for part in x.split(COLUMNS))
        if bad:
            raise Refused(f"{bad} of {len(x)} {name} features are not finite; give other --pretrained_weights, "
                          "--load_features or --features")
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(f"test features have width {queries.shape[1]}, training features {bank.shape[1]}")


def embedding(bank: Tensor, metric: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that moves (n, D) features to the device and scales them so that similarity is an inner product.

    For "l2" it is one up to the offsets that `nearest` adds.
    """
    dtype = at_least_float32(bank[:1]).dtype
    if metric == "cosine":
        return lambda x: F.normalize(x.to(device, dtype), dim=1)
    if metric != "l2":
        raise ValueError(f"metric {metric!r}: expected cosine or l2")
    # Centred, which leaves distances as they are: far from 0, |q - x|^2 would be a difference of large numbers.
    center = bank.mean(0, dtype=torch.float64)
    scale = torch.stack([x.double().square().sum() for x in bank.split(COLUMNS)]).sum().div(len(bank)).sqrt()
    center, scale = center.to(device, dtype), scale.clamp_min(1e-12).to(device, dtype)
    return lambda x: (x.to(device, dtype) - center) / scale


def padded(n: int) -> int:
    return -(-n // GROUP) * GROUP


def compare(x: Tensor, block: Tensor, offsets: Tensor | None, out: Tensor) -> None:
    """Write the similarities of (m, D) queries and (n, D) rows to `out` (m, padded(n)), without new memory."""
    out[:, len(block) :] = -torch.inf
    if offsets is None:
        torch.mm(x, block.T, out=out[:, : len(block)])
    else:
        torch.addmm(offsets, x, block.T, out=out[:, : len(block)])


def hide(similarity: Tensor, column: Tensor, n: int) -> None:
    inside = ((column >= 0) & (column < n)).nonzero().squeeze(1)
    similarity[inside, column[inside]] = -torch.inf


def top_by_groups(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`top` of rows whose length is a multiple of GROUP: the same result in a fraction of the time.

    The k largest entries lie in the k groups of adjacent columns with the largest maxima: if one of them lay in
    another group, the k maxima would all come before it. So the long rows are read once, for the maxima, and the
    selection works on two short lists.
    """
    groups = x.unflatten(1, (-1, GROUP))
    if groups.shape[1] <= 2 * k:
        return top(x, k)
    chosen = top(groups.amax(2), k)[1].sort(dim=1)[0]  # (m, k) groups, ascending, so that ties stay in order
    candidates = groups.gather(1, chosen.unsqueeze(2).expand(-1, -1, GROUP)).flatten(1)
    values, at = top(candidates, k)
    return values, chosen.gather(1, at // GROUP) * GROUP + at % GROUP


def top(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the k largest entries of each row, descending, ties by column: a stable sort's first k.

    torch.topk does not define which of equal entries it returns, nor their order. Rows with ties, usually few, are
    selected again with a stable sort.
    """
    k = min(k, x.shape[1])
    values, where = x.topk(min(k + 1, x.shape[1]), dim=1)
    equal = values[:, 1:] == values[:, :-1]
    rows = equal.any(1).nonzero().squeeze(1)
    if len(rows):
        at_cut = rows[equal[rows, k - 1 :].any(1)]  # the k-th entry equals the next: sort the whole row
        if len(at_cut):
            order = x[at_cut].sort(dim=1, descending=True, stable=True)
            values[at_cut], where[at_cut] = order[0][:, : k + 1], order[1][:, : k + 1]
        by_place, order = where[rows].sort(dim=1)
        values[rows], order = values[rows].gather(1, order).sort(dim=1, descending=True, stable=True)
        where[rows] = by_place.gather(1, order)
    return values[:, :k], where[:, :k]


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of two lists (values, rows), where all rows of the second come after those of the first."""
    if not one[0].shape[1]:
        return other
    values, where = top(torch.cat([one[0], other[0]], 1), k)
    return values, torch.cat([one[1], other[1]], 1).gather(1, where)


def merge_over_processes(best: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    if parallel.world_size() == 1:
        return best
    values, index = best
    missing = (0, k - values.shape[1])  # fewer than k rows in this process: fill up with losers
    values, index = F.pad(values, missing, value=-torch.inf), F.pad(index, missing, value=-1)
    values, index = (
        parallel.gather(part).unflatten(0, (parallel.world_size(), -1)).transpose(0, 1).flatten(1)  # (m, W K)
        for part in (values, index)
    )
    values, where = top(values, k)
    return values, index.gather(1, where)


# ---- Votes ----

VOTES = 1 << 20  # images x classes at a time, few enough for the processor's cache


def vote(
    similarity: Tensor, labels: Tensor, ks: Sequence[int], temperatures: Sequence[float], num_classes: int
) -> Tensor:
    """Classes ranked by the votes of the k nearest neighbours,

        votes[c] = sum over j <= k of [label_j = c] exp(similarity_j / T).

    Classes with equal votes (or none) are ranked by their number. Computed on the CPU in float64, where the order of
    a sum is defined, so that the result does not depend on the device.

    Args:
        similarity, labels: (M, K) of the neighbours, nearest first. ks: at most K.

    Returns:
        (temperatures, ks, M, min(5, C)) classes, best first.
    """
    ranks = min(5, num_classes)
    ranked = torch.empty(len(temperatures), len(ks), len(labels), ranks, dtype=torch.int64)
    rows = max(1, VOTES // num_classes)
    ascending = sorted(range(len(ks)), key=lambda i: ks[i])
    for first in range(0, len(labels), rows):
        s, near = similarity[first : first + rows].double(), labels[first : first + rows]
        for t, temperature in enumerate(temperatures):
            weights = ((s - s[:, :1]) / temperature).exp()  # a common factor changes no rank, and prevents overflow
            votes, counted = torch.zeros(len(s), num_classes, dtype=torch.float64), 0
            for i in ascending:  # the neighbours within a smaller k have voted
                votes.scatter_add_(1, near[:, counted : ks[i]], weights[:, counted : ks[i]])
                counted = ks[i]
                ranked[t, i, first : first + rows] = largest(votes, ranks)
    return ranked


def largest(votes: Tensor, n: int) -> Tensor:
    """Columns of the n largest entries of each row, ties by column."""
    rest, columns = votes.clone(), []
    for _ in range(n):
        columns.append(rest.argmax(1))  # the first of equal entries
        rest.scatter_(1, columns[-1][:, None], -1.0)
    return torch.stack(columns, 1)


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float] = (0.07,),
    num_classes: int = 1000,
    **how,
) -> Tensor:
    """Ranked classes of the test images for every k and T from one search; further arguments go to `nearest`.

    Returns:
        (temperatures, ks, M, min(5, C)) classes, best first. A k larger than the training set means all of it.
    """
    similarity, index = nearest(test_features, train_features, max(ks), **how)
    ks = [min(k, index.shape[1]) for k in ks]
    return vote(similarity, train_labels.cpu()[index], ks, temperatures, num_classes)


def knn_classifier(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int,
    T: float,
    num_classes: int = 1000,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in % of weighted k-NN with cosine similarity.

    Args:
        train_features, test_features: (N, D) and (M, D), normalized here. train_labels, test_labels: (N,) and (M,).
        k: number of neighbours; larger than the training set means all of it.
        T: temperature of the weights exp(cosine / T).
        num_classes: labels below it are classes even without a training image; larger labels are further classes.
        device: where to search, by default where the training features are.
    """
    classes = torch.cat([torch.arange(num_classes), train_labels.cpu()]).unique()
    voters = torch.searchsorted(classes, train_labels.cpu())
    ranked = knn_predict(train_features, voters, test_features, [k], [T], len(classes), device=device)[0, 0]
    top1, top5 = scores.hits(classes[ranked], test_labels, min(k, len(train_features)))
    return 100 * top1.double().mean().item(), 100 * top5.double().mean().item()
