"""Sharded networks (FSDP2): parameters, gradients and optimizer state, the teacher's too, are split over the processes.

Checkpoints hold whole plain tensors, so a run may continue under DistributedDataParallel and back. torch's own
`distributed.checkpoint.state_dict` gathers too, but names the optimizer's state after parameters, where checkpoints
have the published numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import parallel


def shard(network: nn.Module, device: torch.device) -> None:
    """Leave each process its part of every parameter of a MultiCropWrapper, or of another set of named networks.

    A transformer's blocks are gathered one at a time. Backbone and heads are units of their own, as `utils.losses`
    calls the teacher's one after the other. Under autocast the parameters are sent in float32.
    """
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # the class token; nobody writes to it
    mesh = init_device_mesh(device.type, (parallel.world_size(),))
    for module in (*getattr(network.backbone, "blocks", ()), *network.children()):
        # By default a root stays whole until its backward pass, and the teacher has none.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def whole(state, keep: bool = True):
    """A state_dict with plain tensors on the CPU in place of sharded ones; every process calls it.

    Where `keep` is false the process only helps the others, and gets None for each sharded tensor.
    """
    if isinstance(state, dict):
        return {k: whole(v, keep) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return [whole(v, keep) for v in state]
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if keep else None
    return state


def unsharded(sharded: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """A whole copy of a sharded network, filled into what `make` builds; every process calls it."""
    with torch.random.fork_rng(devices=[]):
        network = make()
    network.load_state_dict(whole(sharded.state_dict()))
    return network


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load(network: nn.Module, state: dict[str, Tensor]) -> None:
    """network.load_state_dict from whole tensors."""
    own = network.state_dict()
    network.load_state_dict({k: part_of(v, own[k]) if k in own else v for k, v in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """optimizer.load_state_dict from whole tensors: what has a parameter's shape is sharded like the parameter."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = part_of(value, parameter)
