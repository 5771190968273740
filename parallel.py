"""Start-up from torchrun, Slurm or a single process; rank, world size, device; the few collectives the scripts need.

Every function works without a process group, as one process of one.
"""

from __future__ import annotations

import os
import subprocess
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT_MINUTES = 10  # a rank that died or hangs ends the others after this long


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def mean_over_processes(x: Tensor) -> Tensor:
    """Mean of a tensor over the processes, elementwise; every process gets it."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world_size()


def max_over_processes(x: Tensor) -> Tensor:
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def gather(x: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks; every process gives the same number of rows."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def gather_objects(value) -> list:
    """A small Python value of every process, in the order of their ranks; every process gets the list."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def launch_environment() -> dict[str, str]:
    """torch.distributed's variables of this process: given by torchrun, or read from Slurm's; empty when alone.

    Slurm's variables count only inside a step that srun started (SLURM_STEP_ID): a batch script's own shell has
    a task number too, and would wait for ever for the other tasks.
    """
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [n for n in names if n not in env]
        if missing:
            raise ValueError(f"the variable {missing[0]} is not set though others of torch.distributed are; "
                             "start with torchrun, or unset RANK and WORLD_SIZE")
        return {n: env[n] for n in names} | {"LOCAL_RANK": env.get("LOCAL_RANK", "0")}
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_NTASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "MASTER_ADDR": env.get("MASTER_ADDR") or first_slurm_host(env["SLURM_JOB_NODELIST"]),
            # A port all tasks of this job agree on and its neighbours on the host do not share.
            "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + int(env["SLURM_JOB_ID"]) % 20000),
        }
    return {}


def first_slurm_host(nodelist: str) -> str:
    """First host of a list such as node[03-07,12]; scontrol expands it."""
    if "[" not in nodelist:
        return nodelist.split(",")[0]
    done = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> the device of this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device; use --device cpu")
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: GPU {index} does not exist, this host has {torch.cuda.device_count()}; "
                         "start fewer processes a host")
    return torch.device("cuda", index)


def start(device: str = "auto", dist_url: str = "env://") -> torch.device:
    """Join the other processes, if there are any, and return this process's device.

    Raises:
        ValueError: a missing variable, a port that is taken or a device that does not exist, in one line.
    """
    env = launch_environment()
    chosen = pick_device(device, int(env.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not env or dist.is_initialized():
        return chosen
    os.environ.update(env)
    try:
        timeout = timedelta(minutes=TIMEOUT_MINUTES)
        store, rank, world_size = next(
            dist.rendezvous(dist_url, int(env["RANK"]), int(env["WORLD_SIZE"]), timeout=timeout))
        # When torchrun restarts the processes of a node, its store still has the addresses of those that are gone.
        # On several nodes the counts may differ: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives a new store.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world_size, timeout=timeout)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}" if dist_url == "env://" else dist_url
        reason = str(error).splitlines()[0]
        raise ValueError(f"--dist_url {dist_url}: no process group at {where} ({reason}); "
                         "is the port taken? set MASTER_PORT to a free one") from error
    return chosen


def stop() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
