"""Three training steps of the reference network in float64 on this process's share of the batch, saved."""

import sys

import torch
from test_utils import golden_crops, golden_networks
from torch.nn.parallel import DistributedDataParallel

import parallel
import utils


def main(out: str) -> None:
    rank, world = parallel.rank(), parallel.world_size()
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    student, teacher = golden_networks()
    wrapped = DistributedDataParallel(student) if world > 1 else student
    loss_fn = utils.DINOLoss(64, 5, 0.04, 0.04, 0, 2)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student), lr=2e-3, fused=True)
    losses, grads = [], {}
    for it in range(3):
        crops = golden_crops(7, it, 3, share)
        loss = loss_fn(wrapped(crops), teacher(crops[:2]), 0)
        optimizer.zero_grad()
        loss.backward()
        grads = {f"grad/{k}": p.grad.clone() for k, p in student.named_parameters() if p.grad is not None}
        utils.clip_gradients(student, 0.3)
        optimizer.step()
        utils.ema_update(student, teacher, 0.9)
        losses.append(parallel.mean_over_processes(loss.detach()))
    result = {"loss": torch.stack(losses), "center": loss_fn.center, **grads}
    result |= {f"student/{k}": v for k, v in student.state_dict().items()}
    result |= {f"teacher/{k}": v for k, v in teacher.state_dict().items()}
    if parallel.is_main():
        torch.save(result, out)


if __name__ == "__main__":
    parallel.start("cpu")
    main(sys.argv[1])
    parallel.stop()
