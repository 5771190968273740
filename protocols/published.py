"""Names of the published evaluation scripts and of utils.py, for code that imports them: a few lines on top of ours.

This project doesn't call them itself. docs/published_names.md lists what differs, and the names that are left out.

Shapes: N images, D width, B images per batch, Q queries, M database images, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parallel
from protocols import linear, retrieval
from weights.backbones import load_weights_into

# ---- Weights ----


def load_pretrained_weights(
    model: nn.Module, pretrained_weights: str | os.PathLike, checkpoint_key: str | None = "teacher",
    model_name: str | None = None, patch_size: int | None = None,
) -> None:
    """Copy the weights in a file, in any layout of docs/weights.md, into a backbone; nothing is ever downloaded.

    Args:
        model_name, patch_size: ignored; the published function chooses a file to download by them.

    Raises:
        Refused: no such file, or it doesn't hold exactly the tensors of the backbone.
    """
    load_weights_into(model, os.fspath(pretrained_weights), checkpoint_key or "teacher")


# ---- Features ----


@torch.no_grad()
def extract_features(
    model: nn.Module, data_loader: Iterable, use_cuda: bool = True, multiscale: bool = False
) -> Tensor | None:
    """Features (N, D) of a data loader's images, on rank 0; None on other processes.

    Args:
        data_loader: yields (images (B, C, h, w), their numbers (B,)); it has a `dataset` of N images.
        use_cuda: keep the features on the model's device, else on the CPU.
        multiscale: see `multi_scale`.
    """
    device, features = next(model.parameters()).device, None
    for images, index in data_loader:
        images = images.to(device, non_blocking=True)
        rows = parallel.gather(multi_scale(images, model) if multiscale else model(images).clone())
        index = parallel.gather(index.to(device))
        if features is None:
            features = rows.new_zeros(len(data_loader.dataset), rows.shape[1], device=device if use_cuda else "cpu")
        features[index.to(features.device)] = rows.to(features.device)
    return features if parallel.is_main() else None


def multi_scale(samples: Tensor, model: nn.Module) -> Tensor:
    """(B, C, h, w) -> (B, D): the mean of the features at scales 1, 1/sqrt(2) and 1/2 (bilinear), over its L2 norm.

    As published, the norm is that of the whole batch: only for B = 1 does each row have norm 1.
    """
    features = model(samples).clone()
    for scale in (2**-0.5, 0.5):
        features += model(F.interpolate(samples, scale_factor=scale, mode="bilinear", align_corners=False))
    return features / features.norm()


def __getattr__(name: str) -> type:
    if name != "ReturnIndexDataset":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchvision.datasets import ImageFolder  # takes seconds to import, so only for code that asks for the class

    class ReturnIndexDataset(ImageFolder):
        """A folder of class folders; item i is (image, i)."""

        def __getitem__(self, i: int) -> tuple:
            return super().__getitem__(i)[0], i

    # Under its own name, where loading workers of other start methods and pickle look for it.
    ReturnIndexDataset.__module__, ReturnIndexDataset.__qualname__ = __name__, name
    globals()[name] = ReturnIndexDataset
    return ReturnIndexDataset


# ---- Linear classifier ----


class LinearClassifier(nn.Module):
    """(B, ...) -> (B, C): a linear layer on flattened features, with weights from N(0, 0.01^2) and biases 0."""

    def __init__(self, dim: int, num_labels: int = 1000) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


@torch.no_grad()
def validate_network(
    val_loader: Iterable, model: nn.Module, linear_classifier: nn.Module, n: int, avgpool: bool
) -> dict[str, float]:
    """Loss, acc1 and, from five classes on, acc5 (in %) of a classifier, over the images of all processes.

    Args:
        val_loader: yields (images (B, C, h, w), labels (B,)).
        linear_classifier: a LinearClassifier, or DistributedDataParallel around one.
        n: blocks of a Vision Transformer whose class tokens are the input.
        avgpool: add the mean of the patch tokens to the input.
    """
    linear_classifier.eval()
    device, features = next(linear_classifier.parameters()).device, linear.probe_features(model, n)
    # loss, right, right among five, images; Apple GPUs have no float64
    sums = torch.zeros(4, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for images, labels in val_loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = linear_classifier(linear.columns(features(images), n if features is not model else 0, n, avgpool))
        loss = F.cross_entropy(logits, labels, reduction="sum")
        right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums += torch.stack([loss, right[:, 0].sum(), right.sum(), torch.tensor(len(labels), device=device)])
    loss, top1, top5, count = (parallel.mean_over_processes(sums)).tolist()
    figures = {"loss": loss / count, "acc1": 100 * top1 / count}
    return figures | ({"acc5": 100 * top5 / count} if logits.shape[1] >= 5 else {})


# ---- Retrieval ----


def compute_map(
    ranks: np.ndarray, gnd: Sequence[Mapping], kappas: Sequence[int] = ()
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Mean average precision of revisited Oxford and Paris.

    Args:
        ranks: (M, Q); column q has the database's rows for query q, best first.
        gnd: for each query "ok", its relevant rows, and perhaps "junk", rows to take out of the ranking.
        kappas: values of k of the mean precision at k.

    Returns:
        The mean over the queries that have a relevant row, average precision (Q,), mean precision at each k, and the
        precisions (Q, len(kappas)). Queries without a relevant row have NaN.
    """
    aps, prs = np.full(len(gnd), np.nan), np.full((len(gnd), len(kappas)), np.nan)
    for q, truth in enumerate(gnd):
        if len(truth["ok"]):
            positions = retrieval.relevant_ranks(ranks[:, q], truth["ok"], truth.get("junk", ()))
            aps[q] = retrieval.average_precision_trapezoid(positions)
            prs[q] = [retrieval.precision_at(positions, k) for k in kappas]
    return float(np.nanmean(aps)), aps, np.nanmean(prs, axis=0), prs


class PCA:
    """Projection on the `dim` directions of largest variance, each divided by its variance to the power `whit`.

    0.5 whitens, 0 only projects. `mean`, if it is set, is subtracted first.
    """

    def __init__(self, dim: int = 256, whit: float = 0.5) -> None:
        self.dim, self.whit, self.mean = dim, whit, None

    def train_pca(self, cov: np.ndarray) -> None:
        """Learn from a covariance matrix (D, D); variances are raised to 1e-5 of the largest."""
        variances, directions = np.linalg.eigh(cov)
        variances = variances.clip(variances[-1] * 1e-5)[::-1][: self.dim]
        self.dvt = (directions[:, ::-1][:, : self.dim] / variances**self.whit).T  # (dim, D)

    def apply(self, x: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """(N, D) -> (N, dim), an array or a tensor as it is given."""
        if isinstance(x, Tensor):
            return torch.from_numpy(self.apply(x.cpu().numpy())).to(x)
        return (x if self.mean is None else x - np.asarray(self.mean)) @ self.dvt.T
