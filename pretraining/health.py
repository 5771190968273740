"""Statistics of one step that show whether a run learns, and the detection of collapse.

Shapes: B images per process and micro-batch, K prototypes, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import parallel
from method import targets
from method.koleo import nearest_distances
from method.rank import effective_rank
from method.targets import Targets
from utils import DINOLoss


@torch.no_grad()
def health(
    teacher_output: Tensor, features: Tensor, loss: Tensor, dino_loss: DINOLoss, epoch: int
) -> dict[str, Tensor]:
    """Statistics of one step of DINO, over the images of this process.

    Args:
        teacher_output: (2 B, K), the teacher's output before centring.
        features: (2 B, D), the teacher's backbone features of the same crops.
        loss: loss of the step.
        dino_loss: provides the centre and the temperature.

    Returns:
        entropy: mean entropy of the teacher's probabilities in nats; ln K if uniform, 0 if one-hot.
        kl: loss - entropy, the mean KL divergence from teacher to student.
        center_norm: L2 norm of the centre.
        feature_std: standard deviation over the batch of the L2-normalized features, times sqrt(D); 1 if they are
            spread evenly over the sphere, 0 if they are all equal.
        feature_rank: effective rank (RankMe) of the centred features, at most min(2 B, D).
        prototypes_used: number of distinct prototypes with the highest probability for a crop, at most 2 B.
    """
    entropy, used = of_rows(dino_loss.targets(teacher_output, epoch))
    return {"entropy": entropy, "kl": loss.detach() - entropy, "center_norm": dino_loss.center.norm(),
            **of_features(features), "prototypes_used": used}


@torch.no_grad()
def health_dinov2(parts: Mapping, losses_at_start: Mapping[str, float]) -> dict[str, Tensor]:
    """Statistics of one step of DINOv2, over the images of this process.

    Args:
        parts: of `method.dinov2.losses`.
        losses_at_start: {dino, ibot}: value of each term for a student whose output is uniform: the weight of the term
            times ln K, and for ibot times the share of crops with a mask.

    Returns:
        dino_left, ibot_left: terms as a fraction of `losses_at_start`; a term that stays at 1 or above has not begun
            to learn. Left out, with its KL divergence, if the weight of the term is 0.
        entropy, kl, prototypes_used: as `health`, of class tokens.
        student_prototypes_used: in distillation, the number of distinct prototypes to which the student gives a crop's
            highest score.
        patch_entropy, patch_kl, patch_prototypes_used: of the patches in the iBOT loss; left out if no process has any.
            patch_kl is approximate: the loss is a mean over crops, the entropy a mean over patches.
        neighbour_distance: mean distance of a crop's normalized feature to the nearest of the process's other images,
            which KoLeo enlarges: 0 if all are equal, sqrt(2) if they are orthogonal. Left out for a single image.
        feature_std, feature_rank: as `health`.
        patch_rank: effective rank of as many patch tokens, one of each global crop.

        The features are those of the teacher, in distillation of the student.
    """
    class_targets, patch_targets = parts["class_targets"], parts["patch_targets"]
    features = parts["features"]
    values = of_features(features)
    values["patch_rank"] = of_features(parts["patch_features"])["feature_rank"]
    values["entropy"], values["prototypes_used"] = of_rows(class_targets)
    if "student_prototypes" in parts:
        used = torch.zeros(class_targets.scores.shape[1], device=features.device)
        values["student_prototypes_used"] = used.index_fill_(0, parts["student_prototypes"], 1.0).sum()
    if len(features) > 2:  # one image has no neighbour
        values["neighbour_distance"] = torch.cat([nearest_distances(crop) for crop in features.chunk(2)]).mean()
    if losses_at_start["dino"]:
        values["dino_left"] = (parts["dino_global"] + parts["dino_local"]) / losses_at_start["dino"]
        values["kl"] = values["dino_left"] * math.log(class_targets.scores.shape[1]) - values["entropy"]
    # All processes must return the same names. One without patches counts in none of the means over processes.
    has_patches = len(patch_targets.scores) > 0
    share = parallel.mean_over_processes(features.new_tensor(float(has_patches), dtype=torch.float32))
    if share > 0:
        of_patches = of_rows(patch_targets) if has_patches else (torch.zeros_like(share), torch.zeros_like(share))
        values["patch_entropy"], values["patch_prototypes_used"] = (value / share for value in of_patches)
        if losses_at_start["ibot"]:
            values["ibot_left"] = parts["ibot"] / losses_at_start["ibot"]
            values["patch_kl"] = values["ibot_left"] * math.log(patch_targets.scores.shape[1]) - values["patch_entropy"]
    return values


def of_rows(q: Tensor | Targets) -> tuple[Tensor, Tensor]:
    """Mean entropy in nats of rows of probabilities, and the number of distinct prototypes with a row's highest one."""
    scores = q.scores if isinstance(q, Targets) else q
    entropy, used = 0.0, torch.zeros(scores.shape[1], device=scores.device)
    for first, last in targets.parts(*scores.shape, scores.device):
        rows = q.rows(first, last) if isinstance(q, Targets) else q[first:last]
        entropy = entropy - (rows * rows.clamp_min(1e-30).log()).sum()
        used.index_fill_(0, rows.argmax(-1), 1.0)
    return entropy / len(scores), used.sum()


def of_features(features: Tensor) -> dict[str, Tensor]:
    """Spread of features (n, D): see `health`."""
    x = features.float()
    return {"feature_std": F.normalize(x, dim=-1).std(0).mean() * math.sqrt(x.shape[1]),
            "feature_rank": effective_rank(x - x.mean(0))}


UNIFORM = "a lower --teacher_temp and --warmup_teacher_temp, or --norm_last_layer true"
ONE = "a higher --teacher_temp, a lower --lr, or --freeze_last_layer 1 or more"
FEW = "a higher --warmup_teacher_temp for the first epochs (--warmup_teacher_temp_epochs), or a lower --lr"


FEWEST_ROWS = 8  # of features, for their effective rank to tell a collapse
FEWEST_PATCHES = 32  # likewise of patch tokens, of which many may be of an even background


def collapse(
    entropy: float, ln_k: float, prototypes_used: float, uniform: str = UNIFORM, one: str = ONE, what: str = "image",
    rows: float = math.inf, warming_up: bool = False,
) -> str | None:
    """A warning with flags to try if these values of `health` show a collapse of the targets, else None.

    There are two kinds (section 5.3): centring alone leads to the uniform output, sharpening alone to a single
    prototype. Low entropy is no collapse as long as images are assigned to different prototypes.

    Args:
        uniform, one: remedies against each kind.
        what: what is assigned to prototypes.
        rows: global crops that were compared; the two of one image should be assigned to the same prototype.
        warming_up: whether the learning rate's warm-up is not over. A new network may give all images almost the same
            output, as with LayerScale 1e-5.
    """
    if entropy > 0.995 * ln_k:
        return None if warming_up else (
            f"collapse to the uniform output (entropy = ln K): the teacher gives every {what} the same output; try "
            f"{uniform}")
    if entropy < 0.01 * ln_k and prototypes_used < 1.5 and rows > 2:
        return f"collapse to one prototype (entropy = 0): the teacher assigns every {what} to it; try {one}"
    return None


def few_directions(feature_rank: float, prototypes_used: float, rows: int, network: str = "teacher",
                   what: str = "features", things: str = "images") -> str | None:
    """A warning if these values of `health` show the third kind of collapse, else None: class tokens vary in one or two
    directions and share a few prototypes, at an entropy between those of the other two kinds.

    With presets/shapes.txt, --lr 0.008 and some seeds: rank 1.8 and 2 prototypes; healthy runs there keep 6 and 5.

    Args:
        prototypes_used: 0 if the rank alone is to tell, as with targets that use all prototypes evenly.
        rows: global crops that were compared. The rank of few is low by itself.
        network: whose class tokens these are.
        what, things: what has that rank, and what it tells apart.
    """
    if rows >= FEWEST_ROWS and feature_rank < 2.5 and prototypes_used < 4:
        return (f"collapse to few directions (effective rank of the {what} {feature_rank:.1f}): the {network} tells "
                f"only two or three groups of {things} apart; try {FEW}")
    return None


def few_directions_dinov2(
    means: Mapping[str, float], sinkhorn: bool, rows: int, warming_up: bool, network: str = "teacher"
) -> str | None:
    """`few_directions` of class tokens where Sinkhorn-Knopp hides it, and of patch tokens.

    With Sinkhorn-Knopp healthy runs keep a rank of 5.7 or more, and in the first 110 steps of presets/dinov2_shapes.txt
    one of 27 or more of patch tokens. Not judged in the learning rate's warm-up, where the rank is mostly that of the
    network's first weights.

    Args:
        means: of `health_dinov2`.
        warming_up: as `collapse`.
    """
    if warming_up:
        return None
    line = few_directions(means["feature_rank"], 0, rows, network) if sinkhorn else None
    if line is None and "ibot_left" in means and rows >= FEWEST_PATCHES:  # patch tokens are trained
        line = few_directions(means["patch_rank"], 0, rows, network, "patch tokens", "patches")
    return line
