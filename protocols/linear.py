"""Linear classifiers on frozen features, many settings in one pass (DINO, arXiv 2104.14294, section 4.1, appendix F).

A sweep of learning rates x blocks x pooling costs one backbone pass: every setting is a choice of columns of what the
pass gave. Shapes: B images, D width, n last blocks, C classes, S settings.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parallel
from vision_transformer import VisionTransformer
from weights import checkpoints


class Setting(NamedTuple):
    """One classifier of a sweep."""

    lr: float  # for a batch of 256
    n_last_blocks: int  # whose class tokens it sees
    avgpool_patchtokens: bool  # and the mean of the last block's patch tokens


def is_setting(found: object) -> bool:
    """Whether what a file holds is a Setting's fields and values."""
    return (isinstance(found, Mapping) and found.keys() == set(Setting._fields)
            and all(isinstance(value, int | float) for value in found.values())
            and isinstance(found["n_last_blocks"], int) and found["n_last_blocks"] >= 0)


def settings_of(lrs: Sequence[float], blocks: Sequence[int], pools: Sequence[bool]) -> list[Setting]:
    return [Setting(lr, n, pool) for n, pool, lr in itertools.product(blocks, pools, lrs)]


# ---- What the classifiers see ----


def probe_features(model: nn.Module, n: int) -> Callable[[Tensor], Tensor]:
    """Pictures -> (B, (n + 1) D): the class tokens of a ViT's last n blocks, then the mean of its last patch tokens.

    Other networks have no blocks to choose from: (B, D), their features.
    """
    if not isinstance(model, VisionTransformer):
        return model

    def forward(x: Tensor) -> Tensor:
        tokens = model.get_intermediate_layers(x, n)  # n of (B, 1 + patches, D)
        return torch.cat([*(t[:, 0] for t in tokens), tokens[-1][:, 1:].mean(1)], 1)

    return forward


def columns(features: Tensor, most_blocks: int, n: int, avgpool: bool) -> Tensor:
    """What a setting sees of `probe_features(model, most_blocks)`: (B, n D), or (B, (n + 1) D) with the mean."""
    width = features.shape[1] // (most_blocks + 1)
    cls = features[:, (most_blocks - n) * width : most_blocks * width]
    if not avgpool:
        return cls
    mean = features[:, most_blocks * width :]
    if n == 1:  # interleaved: the published classifiers of one block and the mean were trained so
        return torch.stack([cls, mean], 2).flatten(1)
    return torch.cat([cls, mean], 1)


class Heads(nn.Module):
    """One linear classifier a setting: weights from N(0, 0.01^2), biases 0.

    Args:
        width: of the features of one block, D; blocks: most blocks of the settings, or 0 for a network without.
    """

    def __init__(self, settings: Sequence[Setting], width: int, blocks: int, n_classes: int) -> None:
        super().__init__()
        self.settings, self.blocks = list(settings), blocks
        sizes = [width * (s.n_last_blocks + s.avgpool_patchtokens) if blocks else width for s in settings]
        self.heads = nn.ModuleList(nn.Linear(size, n_classes) for size in sizes)
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, features: Tensor) -> list[Tensor]:
        """(B, (blocks + 1) D) -> S logits (B, C). Heads that see the same columns share one matrix product."""
        groups: dict[tuple, list[int]] = {}
        for i, s in enumerate(self.settings):
            groups.setdefault((s.n_last_blocks, s.avgpool_patchtokens) if self.blocks else (), []).append(i)
        logits: list[Tensor] = [features] * len(self.settings)
        for seen, members in groups.items():
            x = columns(features, self.blocks, *seen) if seen else features
            weight = torch.cat([self.heads[i].weight for i in members])
            bias = torch.cat([self.heads[i].bias for i in members])
            for i, rows in zip(members, F.linear(x, weight, bias).chunk(len(members), 1), strict=True):
                logits[i] = rows
        return logits


# ---- Training ----


def build_optimizer(heads: Heads, batch_size: int) -> torch.optim.SGD:
    """SGD, momentum 0.9, no weight decay; each head with its learning rate x batch / 256 (the linear rule)."""
    groups = [{"params": head.parameters(), "lr": s.lr * batch_size / 256}
              for s, head in zip(heads.settings, heads.heads, strict=True)]
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.SGD(groups, lr=0, momentum=0.9, foreach=True)


def train_epoch(
    heads: Heads, optimizer: torch.optim.Optimizer, epoch: int, epochs: int, batches: Iterable[tuple[Tensor, Tensor]]
) -> Tensor:
    """One epoch over (features, labels) of whole global batches; the learning rates follow a half cosine by epoch.

    The heads' losses are summed: no head's gradient depends on another's.

    Returns:
        (S,) mean training loss of each head.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    total, n = 0, 0
    for features, labels in batches:
        losses = torch.stack([F.cross_entropy(logits, labels) for logits in heads(features)])
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimizer.step()
        total, n = total + losses.detach() * len(labels), n + len(labels)
    return total / n


def unfinished(path: Path, run: Mapping) -> dict | None:
    """What a run that was stopped left in `path`, under "run" what it is; None where there is no file.

    Raises:
        ValueError: it is of another run than `run`, in one line that says what differs.
    """
    if not path.is_file():
        return None
    state = checkpoints.read(path, object)
    before = state.get("run") if isinstance(state, Mapping) else None
    if before != run:
        changed = ", ".join(k for k in run if isinstance(before, Mapping) and before.get(k) != run[k])
        raise ValueError(f"--output_dir {path.parent}: {path.name} there is of another run"
                         + (f" (other {changed})" if changed else "") + "; remove it, or choose another folder")
    parallel.say(f"going on after epoch {state['epoch']} of {path}")
    return state


def read_classifier(path: str | os.PathLike) -> dict:
    """A file of this project or a published one: {"weight", "bias"} and, where it says them, "classes" and "setting".

    Raises:
        FileNotFoundError, ValueError: no such file, or no classifier in it, in one line.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--linear_weights {path}: no such file; train one first")
    loaded = checkpoints.read(path, object)
    loaded = loaded if isinstance(loaded, Mapping) else {}
    state = {k.removeprefix("module.").removeprefix("linear."): v for k, v in loaded.get("state_dict", loaded).items()}
    if not all(isinstance(state.get(name), Tensor) for name in ("weight", "bias")):
        raise ValueError(f"--linear_weights {path}: holds no linear.weight and linear.bias; give a linear.pth")
    about = {k: loaded[k] for k in ("classes", "setting") if loaded.get(k) is not None}
    if "setting" in about and not is_setting(about["setting"]):
        raise ValueError(f"--linear_weights {path}: its setting does not hold {', '.join(Setting._fields)}; give a "
                         "linear.pth as it was written")
    return {"weight": state["weight"], "bias": state["bias"]} | about


@torch.no_grad()
def predict(heads: Heads, features: Tensor, batch_size: int = 1024) -> Tensor:
    """(N, ...) features on the CPU -> (S, N, min(5, C)) classes, the best first."""
    device = heads.heads[0].weight.device
    ranks = min(5, heads.heads[0].out_features)
    parts = [torch.stack([logits.topk(ranks).indices for logits in heads(rows.to(device))])
             for rows in features.split(batch_size)]
    return torch.cat(parts, 1).cpu()


def logistic_regression(
    train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], test: Tensor, strengths: Sequence[float]
) -> tuple[Tensor, float, list[float]]:
    """scikit-learn's L2-regularized logistic regression on standardized features, its C chosen by validation.

    Args:
        train, held: (N, D) features and (N,) labels; the first fits, the second chooses, both together fit again.
        test: (M, D) features. strengths: the values of C, inverse strengths of the regularization.

    Returns:
        (M, min(5, C)) classes of the test images, the best first; the chosen C; accuracy of each C on `held` in %.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ValueError("--logreg needs scikit-learn: pip install scikit-learn") from error

    def fit(c: float, x: Tensor, y: Tensor):
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(x.numpy(), y.numpy())

    accuracies = [100 * float(fit(c, *train).score(held[0].numpy(), held[1].numpy())) for c in strengths]
    best = strengths[max(range(len(strengths)), key=lambda i: accuracies[i])]  # the strongest of equal ones
    model = fit(best, torch.cat([train[0], held[0]]), torch.cat([train[1], held[1]]))
    scores = torch.from_numpy(model.predict_log_proba(test.numpy()))
    ranked = scores.topk(min(5, scores.shape[1])).indices
    return torch.from_numpy(model.classes_)[ranked], best, accuracies
