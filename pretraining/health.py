"""Statistics of one step that show whether a run learns, and the detection of collapse.

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
    """Statistics of one step, over the images of this process.

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
    """A warning with flags to try if these values of `health` show a collapse, else None.

    There are two kinds of collapse (section 5.3): centring alone leads to the uniform output, sharpening alone to a
    single prototype. Low entropy is no collapse as long as images are assigned to different prototypes.
    """
    if entropy > 0.995 * ln_k:
        return ("collapse to the uniform output (entropy = ln K): the teacher gives every image the same output; try a "
                "lower --teacher_temp and --warmup_teacher_temp, or --norm_last_layer true")
    if entropy < 0.01 * ln_k and prototypes_used < 1.5:
        return ("collapse to one prototype (entropy = 0): the teacher assigns every image to it; try a higher "
                "--teacher_temp, a lower --lr, or --freeze_last_layer 1 or more")
    return None
