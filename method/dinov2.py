"""The loss of DINOv2 (arXiv 2304.07193, section 4): `losses`, and the network and targets that it needs.

Shapes: B images, L local crops, V = 2 + L views, N patches of a global crop, D width, K prototypes for class tokens and
K' for patches, n patches on which the iBOT loss is taken, in all 2 B global crops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import parallel
from method.ibot import patch_loss
from method.koleo import koleo
from method.masking import masks_weight
from method.pairs import class_loss
from method.sinkhorn import sinkhorn_knopp
from method.targets import Center, Targets, at_least_float32, centred, parts


class Outputs(NamedTuple):
    class_scores: Tensor  # (V B, K), or (2 B, K) of the teacher
    patch_scores: Tensor  # (n, K')
    class_tokens: Tensor  # (2 B, D), of the global crops, before the head
    patch_sample: Tensor  # (2 B, D), without gradients, a patch token of each global crop, at places all over the crops


class BackboneAndHeads(nn.Module):
    """A Vision Transformer, a head for its class tokens, and one for its patch tokens.

    Args:
        ibot_head: None: the first head serves both ("tied" heads).
    """

    def __init__(self, backbone: nn.Module, dino_head: nn.Module, ibot_head: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone, self.dino_head, self.ibot_head = backbone, dino_head, ibot_head

    def forward(
        self, crops: Sequence[Tensor], masks: Tensor | None, positions: Tensor, kept: Tensor | None = None
    ) -> Outputs:
        """[(2B, C, g, g), (LB, C, l, l)], crop-major -> the outputs of the two heads.

        Args:
            masks: (2B, N) bool, patches of the global crops that are replaced by the mask token; None: none.
            positions: (n,) indices into the 2 B N patches, or those that are kept, whose tokens go to the patch head.
            kept: (2B, m) indices of the patches of the global crops that are kept; None: all.
        """
        dropping = {} if kept is None else {"kept": kept}
        tokens = self.backbone(list(crops), [masks, *[None] * (len(crops) - 1)], all_tokens=True, **dropping)
        first_patch = 1 + self.backbone.num_register_tokens
        all_patches = tokens[0][:, first_patch:]  # (2 B, N, D)
        patches = all_patches.flatten(0, 1)[positions]  # (n, D)
        patch_head = self.dino_head if self.ibot_head is None else self.ibot_head
        class_tokens = torch.cat([group[:, 0] for group in tokens])  # (V B, D)
        crop = torch.arange(len(all_patches), device=all_patches.device)
        sample = all_patches.detach()[crop, crop * all_patches.shape[1] // len(crop)]
        return Outputs(self.dino_head(class_tokens), patch_head(patches), tokens[0][:, 0], sample)


class DINOv2Loss(nn.Module):
    """Settings of `losses`, how the teacher's scores become targets, and the state of that, the two centres.

    Args:
        out_dim, ibot_out_dim: K, K'.
        centering: how the teacher's scores become targets: "centering" as in DINO, or "sinkhorn_knopp".
        dino_weight, ibot_weight, koleo_weight: factors of the three losses.
        koleo_all_processes: see `koleo.nearest_distances`.
        mask_student: replace the masked patches of the student's crops by the mask token. False for distillation.
        all_patches: take the iBOT loss on all patches, instead of the masked ones.
        student_temp: temperature of the student's softmax, for class tokens and patches.
        center_momentum: of both centres.
        sinkhorn_iterations: of Sinkhorn-Knopp.
    """

    def __init__(
        self,
        out_dim: int,
        ibot_out_dim: int,
        centering: str = "centering",
        dino_weight: float = 1.0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        koleo_all_processes: bool = False,
        mask_student: bool = True,
        all_patches: bool = False,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        sinkhorn_iterations: int = 3,
    ) -> None:
        super().__init__()
        self.centering, self.student_temp, self.sinkhorn_iterations = centering, student_temp, sinkhorn_iterations
        self.dino_weight, self.ibot_weight, self.koleo_weight = dino_weight, ibot_weight, koleo_weight
        self.koleo_all_processes, self.mask_student, self.all_patches = koleo_all_processes, mask_student, all_patches
        self.dino_loss = Center(1, out_dim, momentum=center_momentum)
        self.ibot_patch_loss = Center(1, 1, ibot_out_dim, momentum=center_momentum)

    def targets(self, teacher: Outputs, temp: float) -> tuple[Targets, Targets]:
        """The teacher's probabilities for class tokens (2 B, K) and patches (n, K'), never in one matrix."""
        if self.centering == "sinkhorn_knopp":
            return (sinkhorn_knopp(teacher.class_scores, temp, self.sinkhorn_iterations),
                    sinkhorn_knopp(teacher.patch_scores, temp, self.sinkhorn_iterations))
        return (centred(teacher.class_scores, self.dino_loss.center, temp),
                centred(teacher.patch_scores, self.ibot_patch_loss.center, temp))

    def update_centers(self, parts: Mapping) -> None:
        """Move the centres by a step's `class_mean` and `patch_mean`; its own targets were made with the old ones."""
        if self.centering == "centering":
            self.dino_loss.update(parts["class_mean"])
            self.ibot_patch_loss.update(parts["patch_mean"])


def losses(
    student: nn.Module, teacher: BackboneAndHeads, crops: Sequence[Tensor], masks: Tensor, objective: DINOv2Loss,
    teacher_temp: float, kept: Tensor | None = None,
) -> tuple[Tensor, dict]:
    """The loss of a micro-batch. Changes neither the networks nor the centres.

        loss = dino_weight dino + ibot_weight ibot + koleo_weight (koleo(crop 0) + koleo(crop 1))

    Args:
        student: a BackboneAndHeads, or its DistributedDataParallel.
        crops: [(2B, C, g, g), (LB, C, l, l)], normalized and crop-major.
        masks: (2B, N) bool. It stays on the CPU: finding its indices there does not wait for the device.
        kept: (2B, m) ascending indices of the patches of the global crops that the student sees, the masked ones among
            them, on the CPU too; None: all.

    Returns:
        The loss to differentiate, and a dict of detached parts: the terms `dino_global`, `dino_local`, `ibot` and
        `koleo`, which add up to `loss`; `class_targets` and `patch_targets`; `features` (2B, D), class tokens of the
        teacher, and in distillation, where it is frozen, of the student, with `student_prototypes` (2B,), each crop's
        prototype of the highest score; `patch_features` (2B, D), the same network's patch tokens, one of each global
        crop; with centring `class_mean` (1, K) and `patch_mean` (1, K'), means of the teacher's scores, None if there
        are no patches.
    """
    dtype, device = at_least_float32(crops[0][:0]).dtype, crops[0].device
    chosen = torch.ones_like(masks) if objective.all_patches else masks
    positions = positions_of(chosen).to(device, non_blocking=True)
    weights = masks_weight(chosen, dtype).to(device, non_blocking=True)
    with torch.no_grad():
        teacher_out = teacher(crops[:1], None, positions)
    class_targets, patch_targets = objective.targets(teacher_out, teacher_temp)
    dropping = ()
    if kept is not None:
        positions = positions_of(chosen.gather(1, kept)).to(device, non_blocking=True)
        dropping = (kept.to(device, non_blocking=True),)
    out = student(crops, masks.to(device, non_blocking=True) if objective.mask_student else None, positions, *dropping)

    dino, pairs = class_loss(out.class_scores, class_targets, objective.student_temp)
    ibot = patch_loss(out.patch_scores, patch_targets, weights, len(crops[0]), objective.student_temp)
    # One image has no neighbour. The term stays in the graph, which keeps all processes' collectives the same.
    spread = sum(koleo(tokens, objective.koleo_all_processes) for tokens in out.class_tokens.chunk(2))
    spread = spread * (objective.koleo_weight if has_neighbours(crops, objective) else 0.0)
    loss = objective.dino_weight * dino + objective.ibot_weight * ibot + spread
    trained = {"features": teacher_out.class_tokens, "patch_features": teacher_out.patch_sample}
    if not objective.mask_student:
        trained = {
            "features": out.class_tokens.detach(), "patch_features": out.patch_sample,
            "student_prototypes": out.class_scores[: len(crops[0])].detach().argmax(-1)}
    means = {} if objective.centering != "centering" else {
        "class_mean": mean_of_rows(teacher_out.class_scores), "patch_mean": mean_of_rows(teacher_out.patch_scores)}
    return loss, trained | means | {
        "loss": loss.detach(),
        "dino_global": objective.dino_weight * pairs["global"], "dino_local": objective.dino_weight * pairs["local"],
        "ibot": objective.ibot_weight * ibot.detach(), "koleo": spread.detach(),
        "class_targets": class_targets, "patch_targets": patch_targets,
    }


def positions_of(chosen: Tensor) -> Tensor:
    """(2B, N) bool -> indices of the chosen ones among the 2 B N."""
    return chosen.flatten().nonzero().squeeze(1)


def has_neighbours(crops: Sequence[Tensor], objective: DINOv2Loss) -> bool:
    """Whether KoLeo compares an image with another one, of this process or, if it looks there, of the others."""
    return len(crops[0]) > 2 or (objective.koleo_all_processes and parallel.world_size() > 1)


def mean_of_rows(scores: Tensor) -> Tensor | None:
    """(n, K) -> (1, K) in float32 or float64, part by part: no float32 copy of the matrix is made."""
    if not len(scores):
        return None
    dtype = at_least_float32(scores[:0]).dtype
    return sum(scores[first:last].sum(0, keepdim=True, dtype=dtype)
               for first, last in parts(*scores.shape, scores.device)) / len(scores)
