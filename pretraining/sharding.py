"""Sharded networks (FSDP2): parameters, gradients and optimizer state are split over the processes.

Checkpoints hold unsharded tensors, so a run may resume under DistributedDataParallel, or the other way round. torch's
`distributed.checkpoint.state_dict` is not used because it keys the optimizer's state by parameter names, while
published checkpoints key it by numbers.
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
    """Shard the parameters of a MultiCropWrapper, or of another module with a backbone and heads, in place.

    Each transformer block is one unit, so blocks are gathered one at a time. The backbone and each head are units too,
    because `utils.losses` calls the teacher's separately. Parameters are communicated in float32, under autocast too.
    """
    # FSDP warns because the backbone returns the class token as a view; nothing writes to it in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    mesh = init_device_mesh(device.type, (parallel.world_size(),))
    for module in (*getattr(network.backbone, "blocks", ()), *network.children()):
        # By default, a root module stays gathered until its backward pass, which the teacher does not have.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def whole(state, keep: bool = True):
    """A state_dict with sharded tensors replaced by whole ones on the CPU. Call on all processes.

    With keep=False, sharded tensors become None on this process, which only takes part in the communication.
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
    """An unsharded copy of a network; `make` builds the module that is filled. Call on all processes."""
    with torch.random.fork_rng(devices=[]):
        network = make()
    network.load_state_dict(whole(sharded.state_dict()))
    return network


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded like `like` (if that is a DTensor); no communication."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load(network: nn.Module, state: dict[str, Tensor]) -> None:
    """network.load_state_dict, from unsharded tensors."""
    own = network.state_dict()
    network.load_state_dict({k: part_of(v, own[k]) if k in own else v for k, v in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """optimizer.load_state_dict, from unsharded tensors, which are copied.

    State with its parameter's shape is sharded alike first, so that a device never holds all of it.
    """
    numbers, parameters = ([p for group in groups for p in group["params"]]
                           for groups in (state["param_groups"], optimizer.param_groups))
    by_number = dict(zip(numbers, parameters, strict=True))

    def own(value: object, parameter: Tensor) -> object:
        if not isinstance(value, Tensor):
            return value
        if value.shape != parameter.shape:
            return value.clone()
        part = part_of(value, parameter)
        return value.to(parameter.device, copy=True) if part is value else part

    own_state = {number: {name: own(value, by_number[number]) for name, value in values.items()}
                 for number, values in state["state"].items()}
    optimizer.load_state_dict(state | {"state": own_state})
