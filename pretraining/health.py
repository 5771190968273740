"""Whether a run learns, from the tensors of one step.

Shapes: B images per process and micro-batch, K prototypes, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from method.rank import effective_rank
from utils import DINOLoss


@torch.no_grad()
def health(
    teacher_output: Tensor, features: Tensor, loss: Tensor, dino_loss: DINOLoss, epoch: int
) -> dict[str, Tensor]:
    """Figures of one step, of this process's images only.

    Args:
        teacher_output: (2 B, K), before centring. features: (2 B, D), the teacher's, of the same crops.
        loss: the step's loss. dino_loss: for its centre and temperature.

    Returns:
        entropy: mean entropy of the teacher's output in nats: ln K when it is uniform, 0 when one-hot.
        kl: loss - entropy, the mean divergence of the student from the teacher.
        center_norm: L2 norm of the centre.
        feature_std: standard deviation over the images of the L2-normalized features, times sqrt(D): 1 when they
            are spread evenly over the sphere, 0 when they are all the same.
        feature_rank: RankMe of the centred features, at most min(2 B, D).
        prototypes_used: number of prototypes that are some image's first choice, at most 2 B.
    """
    q = dino_loss.targets(teacher_output, epoch)
    entropy = -(q * q.clamp_min(1e-30).log()).sum(-1).mean()
    x = features.float()
    first_choice = torch.zeros(q.shape[1], device=q.device).index_fill_(0, q.argmax(-1), 1.0)
    return {
        "entropy": entropy,
        "kl": loss.detach() - entropy,
        "center_norm": dino_loss.center.norm(),
        "feature_std": F.normalize(x, dim=-1).std(0).mean() * math.sqrt(x.shape[1]),
        "feature_rank": effective_rank(x - x.mean(0)),
        "prototypes_used": first_choice.sum(),
    }


def collapse(entropy: float, ln_k: float, prototypes_used: float) -> str | None:
    """The collapse that these figures of `health` show, with the flags to try; None when there is none.

    DINO avoids two collapses by balance (section 5.3): centring alone drifts to the uniform output, sharpening alone
    to a single prototype. A sharp output is healthy as long as images choose different prototypes.
    """
    if entropy > 0.995 * ln_k:
        return ("collapse to the uniform output (entropy = ln K): the teacher gives every image the same output; try a "
                "lower --teacher_temp and --warmup_teacher_temp, or --norm_last_layer true")
    if entropy < 0.01 * ln_k and prototypes_used < 1.5:
        return ("collapse to one prototype (entropy = 0): the teacher assigns every image to it; try a higher "
                "--teacher_temp, a lower --lr, or --freeze_last_layer 1 or more")
    return None
