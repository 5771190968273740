"""Linear classifiers on frozen features, all settings in one pass (DINO, arXiv 2104.14294, section 4.1, appendix F).

A sweep over learning rates, blocks and pooling costs one backbone pass, because the input of every setting is a subset
of the columns of the same features.

Shapes: B images, D width, n last blocks, C classes, S settings.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parallel
from parallel import Refused, import_optional
from protocols.features import images_hash
from protocols.progress import duration, progress
from protocols.splits import Task
from vision_transformer import VisionTransformer
from weights import checkpoints, layouts

SELECTIONS = {
    "best": "the epoch with the highest accuracy on the test set, as published",
    "held_out": "the epoch with the highest accuracy on the held-out images",
    "last": "the last epoch",
}
UNSTATED = ("data", "mean", "std", "value_range")  # what older files of unfinished runs don't say


class Setting(NamedTuple):
    """One classifier of a sweep."""

    lr: float  # peak, for a batch of 256
    n_last_blocks: int  # blocks whose class tokens are its input; 0 for a network without blocks
    avgpool_patchtokens: bool  # add the mean of the last block's patch tokens


class Training(NamedTuple):
    """How classifiers are trained. Every lr x n_last_blocks x avgpool_patchtokens is a setting."""

    lrs: Sequence[float] = (1e-3,)  # peak, for a batch of 256
    n_last_blocks: Sequence[int] = (4,)
    avgpool_patchtokens: Sequence[bool] = (False,)
    epochs: int = 100
    views: int = 0  # random crops per image whose features are cached and trained on in turn; 0: new crops every epoch
    num_labels: int = 0  # outputs of the classifier; 0: as many as classes
    val_freq: int = 1  # epochs between progress lines and, where an epoch is selected, between validations
    seed: int = 0
    batch_size: int = 128  # per process
    num_workers: int = 10  # per process
    select_epoch: str = "last"  # a key of SELECTIONS: whose classifier is reported
    interpolation: str = "bilinear"  # of the random crops, as published; or bicubic


def is_setting(value: object) -> bool:
    """Whether a value from a file has the fields and types of a Setting."""
    return (isinstance(value, Mapping) and value.keys() == set(Setting._fields)
            and all(isinstance(field, int | float) for field in value.values())
            and isinstance(value["n_last_blocks"], int) and value["n_last_blocks"] >= 0)


def sweep(training: Training, has_blocks: bool = True) -> list[Setting]:
    """All combinations; for a network without the blocks of a ViT, one setting per learning rate."""
    inputs = itertools.product(training.n_last_blocks, training.avgpool_patchtokens) if has_blocks else [(0, False)]
    return [Setting(lr, n, avgpool) for n, avgpool in inputs for lr in training.lrs]


# ---- The classifiers and their input ----


def probe_features(model: nn.Module, n: int) -> Callable[[Tensor], Tensor]:
    """A function images -> (B, (n + 1) D): class tokens of a ViT's last n blocks, and the mean of its patch tokens.

    For networks without such blocks, the network itself: images -> (B, D).
    """
    if not isinstance(model, VisionTransformer):
        return model

    first_patch = 1 + model.num_register_tokens

    def forward(x: Tensor) -> Tensor:
        tokens = model.block_outputs(x, n)  # n of (B, 1 + registers + patches, D)
        return torch.cat([*(t[:, 0] for t in tokens), tokens[-1][:, first_patch:].mean(1)], 1)

    return forward


def interleaves(model: nn.Module) -> bool:
    """Whether classifiers of one block and the mean take the two interleaved, as DINO's published ones do.

    DINOv2's take first the class token, then the mean.
    """
    return getattr(model, "method", "dino") == "dino"


def columns(features: Tensor, most_blocks: int, n: int, avgpool: bool, interleaved: bool = True) -> Tensor:
    """A setting's input, out of `probe_features(model, most_blocks)`: (B, n D), or (B, (n + 1) D) with the mean.

    Class tokens of the last n blocks, the oldest first, then the mean. Features of a network without such blocks
    (most_blocks = 0) are returned as they are.

    Args:
        interleaved: see `interleaves`.
    """
    if not most_blocks:
        return features
    width = features.shape[1] // (most_blocks + 1)
    cls = features[:, (most_blocks - n) * width : most_blocks * width]
    if not avgpool:
        return cls
    mean = features[:, most_blocks * width :]
    if n == 1 and interleaved:
        return torch.stack([cls, mean], 2).flatten(1)
    return torch.cat([cls, mean], 1)


class Heads(nn.Module):
    """One linear classifier per setting, with weights from N(0, 0.01^2) and biases 0.

    Args:
        width: of the features of one block, D.
        blocks: maximum of n_last_blocks over the settings; 0 for a network without blocks.
        interleaved: see `interleaves`.
    """

    def __init__(
        self, settings: Sequence[Setting], width: int, blocks: int, n_classes: int, interleaved: bool = True
    ) -> None:
        super().__init__()
        self.settings, self.blocks, self.interleaved = list(settings), blocks, interleaved
        sizes = [width * (s.n_last_blocks + s.avgpool_patchtokens) if blocks else width for s in settings]
        self.heads = nn.ModuleList(nn.Linear(size, n_classes) for size in sizes)
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, features: Tensor) -> list[Tensor]:
        """(B, (blocks + 1) D) -> S logits (B, C). Heads with the same input share one matrix product."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for i, s in enumerate(self.settings):
            groups.setdefault((s.n_last_blocks, s.avgpool_patchtokens), []).append(i)
        logits: list[Tensor] = [features] * len(self.settings)
        for (n, avgpool), members in groups.items():
            x = columns(features, self.blocks, n, avgpool, self.interleaved)
            weight = torch.cat([self.heads[i].weight for i in members])
            bias = torch.cat([self.heads[i].bias for i in members])
            for i, rows in zip(members, F.linear(x, weight, bias).chunk(len(members), 1), strict=True):
                logits[i] = rows
        return logits


class BestEpochs(nn.Module):
    """Copies of the heads as they were at their own best validated epoch, the first among equals."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = copy.deepcopy(heads).requires_grad_(False)
        self.register_buffer("right", torch.full((len(heads.heads),), -1))  # hits of each head
        self.register_buffer("epoch", torch.zeros(len(heads.heads), dtype=torch.long))

    def update(self, heads: Heads, right: Sequence[int], epoch: int) -> None:
        """Keep the heads whose hits `right`, (S,), exceed those of all epochs before."""
        for i, hits in enumerate(right):
            if hits > self.right[i]:
                self.heads.heads[i].load_state_dict(heads.heads[i].state_dict())
                self.right[i], self.epoch[i] = hits, epoch


def is_validated(epoch: int, training: Training) -> bool:
    """Whether the published script validates after this epoch; epochs count from 1."""
    return (epoch - 1) % training.val_freq == 0 or epoch == training.epochs


# ---- Training ----


def build_optimizer(heads: Heads, batch_size: int) -> torch.optim.SGD:
    """SGD with momentum 0.9 and no weight decay; each head's peak learning rate is lr x batch_size / 256.

    Args:
        batch_size: of all processes.
    """
    groups = [{"params": head.parameters(), "peak": s.lr * batch_size / 256}
              for s, head in zip(heads.settings, heads.heads, strict=True)]
    return torch.optim.SGD(groups, lr=0, momentum=0.9, foreach=True)


def train_epoch(
    heads: Heads, optimizer: torch.optim.Optimizer, epoch: int, epochs: int, batches: Iterable[tuple[Tensor, Tensor]]
) -> Tensor:
    """One epoch over (features, labels) of global batches; the learning rates follow half a cosine over the epochs.

    The heads' losses are summed, which leaves the gradient of each head as if it were trained alone.

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


# ---- Runs that can be resumed: of linear classifiers, and of fine-tuning ----


def train(
    path: Path, run: Mapping, modules: Mapping[str, nn.Module | torch.optim.Optimizer],
    epoch_losses: Callable[[int], Tensor], training: Training, save_freq: int = 1,
) -> Tensor:
    """Train for `training.epochs` epochs, or resume a stopped run. All processes call this.

    Args:
        path: file for the state of the unfinished run: run, epoch, loss, and the state of every module.
        run: plain values that the stopped run and the one that resumes it must have in common; see `run_of`.
        modules: what training changes, by its name in the file.
        epoch_losses: trains one epoch, given its number, and returns the (S,) mean losses of the settings.
        save_freq: epochs between two writes of the file.

    Returns:
        (S,) losses of the last epoch.

    Raises:
        Refused: `path` is unreadable or belongs to another run, or no loss is finite.
    """
    state = unfinished(path, run)
    if state:
        for name, module in modules.items():
            module.load_state_dict(state[name])
    losses, before, started = state.get("loss"), state.get("epoch", 0), time.monotonic()
    for done in range(before + 1, training.epochs + 1):
        losses = epoch_losses(done - 1).cpu()
        if not losses.isfinite().any():  # a sweep continues without the settings that diverged
            raise Refused(f"--lr {min(training.lrs):g}: the loss is no longer finite; lower it")
        if is_validated(done, training):
            eta = (time.monotonic() - started) / (done - before) * (training.epochs - done)
            parallel.say(f"epoch {done}/{training.epochs}: training loss {loss_range(losses)}, eta {duration(eta)}")
        if parallel.is_main() and (done % save_freq == 0 or done == training.epochs):
            states = {name: module.state_dict() for name, module in modules.items()}
            checkpoints.save({"run": run, "epoch": done, "loss": losses} | states, path)
    parallel.barrier()
    return losses


def loss_range(losses: Tensor) -> str:
    """The least and the largest finite loss, and how many are not finite; one of them at least is."""
    finite = losses[losses.isfinite()]
    return (f"{finite.min():.4f}" + (f" to {finite.max():.4f}" if len(finite) > 1 else "")
            + (f", {len(losses) - len(finite)} of {len(losses)} not finite" if len(finite) < len(losses) else ""))


def is_finite(layer: nn.Module) -> bool:
    """Whether its training has not diverged: a loss that isn't finite leaves weights that are not."""
    return all(bool(values.isfinite().all()) for values in layer.state_dict().values())


def run_of(about: Mapping, task: Task, training: Training) -> dict:
    """What a stopped run and the one that resumes it must have in common, whatever they train; plain values.

    Args:
        about: of the network.
    """
    network = {k: about.get(k) for k in ("weights_sha256", "resize_size", "crop_size", "precision")}
    network |= {k: about[k] for k in ("network_options",) if k in about}
    network |= {k: list(about[k]) for k in ("mean", "std")}
    parts = [part for part in (task.train, task.held, task.test) if part]
    data = hashlib.sha256("".join(f"{images_hash(part)} {part.labels.tolist()}" for part in parts).encode())
    return network | {"data": data.hexdigest(), "epochs": training.epochs, "seed": training.seed,
                      "images": len(task.train), "classes": list(task.classes),
                      "batch": training.batch_size * parallel.world_size()}


def unfinished(path: Path, run: Mapping, unit: str = "epoch") -> dict:
    """The state that a stopped run left in `path`, {} if there is no file; see `train`.

    Args:
        unit: what the run counts, a key of the state.
    """
    if not path.is_file():
        return {}
    try:
        state = checkpoints.read(path, object)
    except (layouts.BadFile, OSError) as error:
        raise Refused(f"--output_dir {path.parent}: {error}; remove it, or choose another folder") from error
    before = state.get("run") if isinstance(state, Mapping) else None
    if isinstance(before, Mapping):
        before = {k: run[k] for k in UNSTATED if k in run} | before
    if before != run:
        keys = dict.fromkeys([*run, *before]) if isinstance(before, Mapping) else ()
        changed = ", ".join(k for k in keys if before.get(k) != run.get(k))
        raise Refused(f"--output_dir {path.parent}: {path.name} belongs to another run"
                      + (f" (different {changed})" if changed else "") + "; remove it, or choose another folder")
    parallel.say(f"resuming after {unit} {state[unit]} of {path}")
    return state


# ---- Trained classifiers ----


def read_classifier(path: str | os.PathLike) -> dict:
    """A classifier of this project or a published one.

    Returns:
        {"weight": (C, D), "bias": (C,)} and, where the file has them, "classes" (names), "setting" (a Setting) and
        "interleaved" (see `interleaves`).

    Raises:
        Refused: no such file, or no classifier in it.
    """
    if not os.path.isfile(path):
        raise Refused(f"--linear_weights {path}: no such file; train one first")
    try:
        content = checkpoints.read(path, object)
        content = content if isinstance(content, Mapping) else {}
        classifier = layouts.linear_classifier(content, str(path))
    except (layouts.BadFile, OSError) as error:
        raise Refused(f"--linear_weights {error}; give a linear.pth") from error
    about = {k: content[k] for k in ("classes", "setting", "interleaved") if content.get(k) is not None}
    names = about.get("classes", [])
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not texts or len(set(names)) < len(names) or len(names) > len(classifier.bias):
        raise Refused(f"--linear_weights {path}: its classes are not a list of different names, at most one for each "
                      f"of its {len(classifier.bias)} outputs; give a linear.pth as it was written")
    if not isinstance(about.get("interleaved", True), bool):
        raise Refused(f"--linear_weights {path}: its entry interleaved is {about['interleaved']!r}, not true or false; "
                      "give a linear.pth as it was written")
    if "setting" in about:
        if not is_setting(about["setting"]):
            raise Refused(f"--linear_weights {path}: its setting does not hold {', '.join(Setting._fields)}; give a "
                          "linear.pth as it was written")
        about["setting"] = Setting(**about["setting"])
    return {"weight": classifier.weight.detach(), "bias": classifier.bias.detach()} | about


@torch.no_grad()
def predict(heads: Heads, features: Tensor, batch_size: int = 1024) -> Tensor:
    """(N, ...) features on the CPU -> (S, N, min(5, C)) classes, best first."""
    device = heads.heads[0].weight.device
    ranks = min(5, heads.heads[0].out_features)
    parts = [torch.stack([logits.topk(ranks).indices for logits in heads(rows.to(device))])
             for rows in features.split(batch_size)]
    return torch.cat(parts, 1).cpu()


def logistic_regression(
    train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], test: Tensor, strengths: Sequence[float]
) -> tuple[Tensor, float, list[float]]:
    """scikit-learn's L2-regularized logistic regression on standardized features, with C chosen on held-out images.

    Args:
        train, held: (N, D) features and (N,) labels. Models are fitted to `train` and compared on `held`; the best
            one is fitted again to both.
        test: (M, D) features.
        strengths: the values of C, the inverse strength of the regularization.

    Returns:
        (M, min(5, C)) classes of the test images, best first; the chosen C; accuracy of each C on `held` in %.

    Raises:
        Refused: scikit-learn is not installed.
    """
    import_optional("sklearn", "--logreg", "scikit-learn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit(c: float, x: Tensor, y: Tensor):
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(x.numpy(), y.numpy())

    accuracies = [100 * float(fit(c, *train).score(held[0].numpy(), held[1].numpy()))
                  for c in progress(strengths, len(strengths), "strengths of the regularization")]
    best = strengths[max(range(len(strengths)), key=lambda i: accuracies[i])]  # the strongest regularization among ties
    model = fit(best, torch.cat([train[0], held[0]]), torch.cat([train[1], held[1]]))
    scores = torch.from_numpy(model.predict_log_proba(test.numpy()))
    ranked = scores.topk(min(5, scores.shape[1])).indices
    return torch.from_numpy(model.classes_)[ranked], best, accuracies
