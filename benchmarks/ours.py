"""The project's training step on given tensors: the loop of main_dino.py without data loading and logging."""

from __future__ import annotations

import bench  # noqa: F401 - finds the project
import torch
from kinds import UPDATE

import utils
from pretraining import networks
from vision_transformer import DINOHead, build_backbone


class Trainer:
    """Has the arguments and the parameter names of naive.Trainer.

    `compiled`: a mode of torch.compile, or "". `checkpointed`: "layers", "blocks" or "".
    """

    def __init__(self, arch="vit_small", patch=16, size=224, k=65536, device="cpu", dtype=None, local=8,
                 drop_path=0.1, compiled="", checkpointed="") -> None:
        def build(rate: float) -> utils.MultiCropWrapper:
            backbone, width = build_backbone(arch, patch, rate, img_size=size)
            return utils.MultiCropWrapper(backbone, DINOHead(width, k)).to(device)

        self.student, self.teacher = build(drop_path), build(0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        if checkpointed:
            self.student.backbone.set_grad_checkpointing(layers=checkpointed == "layers")
        if compiled:
            networks.compile_networks(compiled, self.student, *self.teacher.children())
        self.dino_loss = utils.DINOLoss(k, 2 + local, 0.04, 0.04, 0, 1).to(device)
        self.optimizer = torch.optim.AdamW(utils.get_params_groups(self.student), lr=1e-4, weight_decay=0.04,
                                           fused=True)
        self.device, self.dtype = device, dtype

    def losses(self, crops: list[torch.Tensor], forward=None, kept=None
               ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """crops: [(2B, 3, g, g), (LB, 3, l, l)] -> what utils.losses returns.

        Args:
            forward: the wrapped student of a distributed run; default: the student.
            kept: patches of the global crops that the student sees; None: all.
        """
        with torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype is not None):
            return utils.losses(forward or self.student, self.teacher, crops, self.dino_loss, 0, kept)

    def step(self, crops: list[torch.Tensor], momentum: float = 0.996, forward=None, kept=None) -> torch.Tensor:
        """One optimizer step. Returns the loss, on the device."""
        loss, parts = self.losses(crops, forward, kept)
        loss.backward()
        with torch.profiler.record_function(UPDATE):
            utils.clip_gradients(self.student, 3.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            utils.ema_update(self.student, self.teacher, momentum)
        self.dino_loss.update_center(parts["teacher_output"])
        return loss.detach()
