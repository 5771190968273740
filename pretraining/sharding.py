"""Networks shared out over the processes (FSDP2): parameters, gradients, optimizer state and the teacher alike.

Checkpoints don't know: they hold whole plain tensors, so a run may go on under DistributedDataParallel and back.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import parallel


def shard(network: nn.Module, device: torch.device) -> None:
    """Leave each process its part of every parameter of a MultiCropWrapper.

    A transformer's blocks are gathered one at a time. Backbone and head are units of their own, as the loop calls
    the teacher's one after the other. Under autocast the parameters travel in float32.
    """
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # the class token; nobody writes to it
    mesh = init_device_mesh(device.type, (parallel.world_size(),))
    for module in (*getattr(network.backbone, "blocks", ()), network.backbone, network.head):
        # By default a root stays whole until its backward pass, and the teacher has none.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def whole(state, keep: bool = True):
    """A state_dict with plain tensors on the CPU in place of shared ones; every process calls it.

    Where `keep` is false, only the others are helped: the shared tensors come out as None.
    """
    if isinstance(state, dict):
        return {k: whole(v, keep) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return [whole(v, keep) for v in state]
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if keep else None
    return state


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, shared out as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load(network: nn.Module, state: dict[str, Tensor]) -> None:
    """network.load_state_dict from whole tensors."""
    own = network.state_dict()
    network.load_state_dict({k: part_of(v, own[k]) if k in own else v for k, v in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """optimizer.load_state_dict from whole tensors: what has a parameter's shape is shared out as it is."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = part_of(value, parameter)
