"""Three training steps of DINOv2's reference network in float64 on this process's share of the batch, saved."""

import sys

import torch
from dinov2_figures import figures, mask, network, rs
from torch.nn.parallel import DistributedDataParallel

import parallel
import utils
from method import dinov2
from method.dinov2 import DINOv2Loss
from method.groups import parameter_groups, set_lr_and_wd


def main(out: str, centering: str) -> None:
    config, _ = figures("train_sinkhorn_untied.npz")
    rank, world = parallel.rank(), parallel.world_size()
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    student, teacher = network(config), network(config).requires_grad_(False)
    wrapped = DistributedDataParallel(student) if world > 1 else student
    objective = DINOv2Loss(64, 48, centering, koleo_all_processes=True).double()
    optimizer = torch.optim.AdamW(parameter_groups(dict(student.named_children()), 0.9))
    result, grads = {}, {}
    for step in range(3):
        crops = [rs(10 * step + i, 4, 3, size, size)[share] for i, size in enumerate((56, 56, 28, 28, 28))]
        masks = mask(step, 8, 64, 0.3)
        if centering == "centering":
            masks = torch.stack([m.roll(i) for i, m in enumerate(masks[:1].expand(8, -1))])
        masks = masks.unflatten(0, (2, 4))[:, share].flatten(0, 1)
        loss, parts = dinov2.losses(wrapped, teacher, [torch.cat(crops[:2]), torch.cat(crops[2:])], masks, objective,
                                    0.05)
        optimizer.zero_grad()
        loss.backward()
        grads = {f"grad/{k}": p.grad.clone() for k, p in student.named_parameters()}
        for part in student.children():
            utils.clip_gradients(part, 0.3, per_tensor=False)
        set_lr_and_wd(optimizer, 2e-3, 0.1, 2e-3)
        optimizer.step()
        utils.ema_update(student, teacher, 0.9)
        objective.update_centers(parts)
        for name in ("loss", "dino_local", "dino_global", "ibot", "koleo"):
            result[f"{name}{step}"] = parallel.mean_over_processes(parts[name])
    result |= {f"centre/{k}": v for k, v in objective.state_dict().items()}
    result |= grads | {f"student/{k}": v for k, v in student.state_dict().items()}
    if parallel.is_main():
        torch.save(result, out)


if __name__ == "__main__":
    parallel.start("cpu")
    main(*sys.argv[1:])
    parallel.stop()
