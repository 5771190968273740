"""Start-up from torchrun, Slurm, submitit or alone; rank, world size, device; the few collectives the scripts need.

Every function works without a process group, as one process of one.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")

TIMEOUT_MINUTES = 10  # a rank that died or hangs ends the others after this long


class Refused(ValueError):
    """Bad input, in one line that names the flag, the value and the remedy: exit code 2, nothing written."""

    def __init__(self, reason: object) -> None:
        super().__init__(" ".join(str(reason).split()))


class Stopped(RuntimeError):
    """Work that can't go on for a reason outside its code, in one line: exit code 1. `say`: whether this process
    prints it, where all of them stop for one reason."""

    def __init__(self, reason: object, say: bool = True) -> None:
        self.say = say
        super().__init__(" ".join(str(reason).split()))


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def say(line: str) -> None:
    """Print a line once, by rank 0."""
    if is_main():
        print(line, flush=True)


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


def group_device(device: torch.device | str) -> torch.device:
    """Where tensors lie for collectives: on `device`, but with NCCL, which knows nothing else, on the process's GPU."""
    if world_size() > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


def gather(x: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks; every process gives the same number of rows."""
    if world_size() == 1:
        return x
    here = x.to(group_device(x.device)).contiguous()
    parts = [torch.empty_like(here) for _ in range(world_size())]
    dist.all_gather(parts, here)
    return torch.cat(parts).to(x.device)


def gather_objects(value) -> list:
    """A small Python value of every process, in the order of their ranks; every process gets the list."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(make: Callable):
    """`make()` of rank 0 on every process, and its ValueError or OSError too; all processes call it.

    It may take longer than collectives may wait: while it runs in a thread, the processes meet again and again.
    """
    if world_size() == 1:
        return make()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(make) if is_main() else None
        while not gather_objects(future is not None and bool(wait([future], 10).done))[0]:
            pass
    error = future.exception() if future else None
    if error and not isinstance(error, (ValueError, OSError)):
        raise error
    result = [None, error] if error or not future else [future.result(), None]
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


def map_shared(work: Callable[[int], Result], n: int) -> list[Result]:
    """[work(0), ..., work(n - 1)], each item computed by one of the processes; all of them get the whole list.

    Process r of W takes items r, r + W, ... An item is a small Python value; a ValueError or OSError that ends the
    work of one process is raised in all of them, so that none waits for ever.
    """
    mine, error = [], None
    try:
        for i in range(rank(), n, world_size()):
            mine.append(work(i))
    except (ValueError, OSError) as raised:
        error = raised
    parts = gather_objects((mine, error))
    for _, raised in parts:
        if raised is not None:
            raise raised
    return [parts[i % len(parts)][0][i // len(parts)] for i in range(n)]


def launch_environment(dist_url: str = "env://") -> dict[str, str]:
    """torch.distributed's variables of this process, from torchrun, Slurm or submitit; empty when it is alone.

    Slurm's count only inside a step that srun started (SLURM_STEP_ID): a batch script's own shell has a task number
    too, and would wait for ever for the other tasks.

    Raises:
        Refused: a variable that is missing, not a whole number or out of range, in one line.
    """
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        size = whole_number("WORLD_SIZE", "torchrun", 1)
        found = {"RANK": whole_number("RANK", "torchrun", 0, size - 1), "WORLD_SIZE": size}
        # Launchers that start one process a host leave LOCAL_RANK out.
        found["LOCAL_RANK"] = whole_number("LOCAL_RANK", "torchrun", 0, size - 1) if "LOCAL_RANK" in env else 0
        if dist_url == "env://":
            found["MASTER_ADDR"] = required("MASTER_ADDR", "torchrun")
            found["MASTER_PORT"] = whole_number("MASTER_PORT", "torchrun", 1, 65535)
        return {name: str(value) for name, value in found.items()}
    if "SLURM_STEP_ID" in env:
        return tasks_environment("srun", SLURM, required("SLURM_STEP_NODELIST", "srun"))
    if "SUBMITIT_LOCAL_JOB_ID" in env:
        return tasks_environment("submitit", SUBMITIT_LOCAL, "127.0.0.1")
    return {}


# Variables of a task's number, how many there are, its number on its host, and the job's number.
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID")
SUBMITIT_LOCAL = tuple(f"SUBMITIT_LOCAL_{name}" for name in ("GLOBALID", "NTASKS", "LOCALID", "JOB_ID"))


def tasks_environment(launcher: str, names: tuple[str, ...], hosts: str) -> dict[str, str]:
    """torch.distributed's variables from those of a launcher that numbers its tasks but names no place to meet."""
    rank, world_size, local_rank, job = names
    size = whole_number(world_size, launcher, 1)
    if size == 1:
        return {}
    # A port all tasks of this step agree on and its neighbours on the host do not share; below the outgoing ones.
    port = 10000 + (whole_number(job, launcher) + 1009 * int(os.environ.get("SLURM_STEP_ID", "0"))) % 20000
    return {
        "RANK": str(whole_number(rank, launcher, 0, size - 1)),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(whole_number(local_rank, launcher, 0, size - 1)),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or first_slurm_host(hosts),
        "MASTER_PORT": str(whole_number("MASTER_PORT", launcher, 1, 65535) if "MASTER_PORT" in os.environ else port),
    }


def required(name: str, launcher: str) -> str:
    """A variable of the environment that must be there when its kin are."""
    if not os.environ.get(name):
        raise Refused(f"the variable {name} is not set though others of {launcher} are: start with {launcher}, or "
                         "unset RANK, WORLD_SIZE and SLURM_STEP_ID to run alone")
    return os.environ[name]


def whole_number(name: str, launcher: str, low: int = 0, high: int = sys.maxsize) -> int:
    text = required(name, launcher)
    if not text.isdecimal() or not low <= int(text) <= high:
        bounds = f"from {low} to {high}" if high < sys.maxsize else f"of at least {low}"
        raise Refused(f"the variable {name} is {text!r} instead of a whole number {bounds}: start with {launcher}")
    return int(text)


def first_slurm_host(nodelist: str) -> str:
    """First host of a list such as `node[03-07,12],login`: of every bracket its first item."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodelist).split(",")[0]


def named_device(name: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise Refused(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N")
    return torch.device(name)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> the device of this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = named_device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise Refused(f"--device {name}: torch sees no CUDA device; use --device cpu")
    if device.index is not None and local_rank > 0:
        raise Refused(f"--device {name}: several processes of this host would share that GPU; use --device cuda")
    index = device.index if device.index is not None else 0 if sees_own_gpu() else local_rank
    if index >= torch.cuda.device_count():
        raise Refused(f"--device {name}: GPU {index} does not exist, this host has {torch.cuda.device_count()}; "
                         "start fewer processes a host")
    return torch.device("cuda", index)


def sees_own_gpu() -> bool:
    """Whether Slurm shows this task one GPU, its own: number 0 then, whatever the task's number on the host is."""
    env = os.environ
    own = ("SLURM_GPUS_PER_TASK" in env or "gpu" in env.get("SLURM_TRES_PER_TASK", "")
           or env.get("SLURM_GPU_BIND", "none") != "none")
    return own and torch.cuda.device_count() == 1


def start(device: str = "auto", dist_url: str = "env://", timeout_minutes: float = TIMEOUT_MINUTES) -> torch.device:
    """Join the other processes, if there are any, and return this process's device.

    Args:
        timeout_minutes: of each collective: a process that died or hangs ends the others after this long.

    Raises:
        Refused: a missing variable, a port that is taken or a device that does not exist, in one line.
    """
    env = launch_environment(dist_url)
    chosen = pick_device(device, int(env.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not env or dist.is_initialized():
        return chosen
    importlib.import_module("torch.distributed.nn")  # later, its default arguments would keep the group for ever
    os.environ.update(env)
    flag = "" if dist_url == "env://" else f"--dist_url {dist_url}"
    where = dist_url if flag else f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    if found := re.fullmatch(r"(?:tcp://)?([^/]+):([0-9]{1,5})", where):
        refuse_unusable_address(found[1], int(found[2]), listens=env["RANK"] == "0", flag=flag)
    if where.startswith("file://") and not os.access(os.path.dirname(where.removeprefix("file://")), os.W_OK):
        raise Refused(f"{flag}: its folder can't be written to; give a file in one that all processes can")
    try:
        timeout = timedelta(minutes=timeout_minutes)
        store, rank, world_size = next(
            dist.rendezvous(dist_url, int(env["RANK"]), int(env["WORLD_SIZE"]), timeout=timeout))
        # When torchrun restarts the processes of a node, its store still has the addresses of those that are gone.
        # On several nodes the counts may differ: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives a new store.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world_size, timeout=timeout)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise Refused(f"--dist_url {dist_url}: no process group of {env['WORLD_SIZE']} at {where} ({reason}); "
                         "do all processes run, and can they reach that place?") from error
    return chosen


def refuse_unusable_address(host: str, port: int, listens: bool, flag: str = "") -> None:
    """What torch would say in a page, or only after its time-out: a host nobody knows, a port that is taken."""
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        where = flag or f"MASTER_ADDR {host}"
        raise Refused(f"{where}: {error.strerror}; give a name or address of the first host") from error
    if not listens or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun itself listens there
        return
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        where = flag or f"MASTER_PORT {port}"
        raise Refused(f"{where}: {os.strerror(error.errno)}; give a free port") from error


def worker_death(error: Exception) -> str | None:
    """One line when it says that a loader's worker died; torch raises that wherever the main thread stands.

    A batch that the worker had handed over half-way breaks the connection to it before that. From here on torch
    raises no more: it would while the loader is taken down, with a traceback.
    """
    broken = isinstance(error, (ConnectionError, EOFError))
    if not broken and not str(error).startswith("DataLoader worker"):
        return None
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    what = " ".join(str(error).split()).removesuffix(".")
    what = f"a DataLoader worker died ({what or 'its connection was reset'})" if broken else what
    return f"{what}; most often memory ran out: lower --num_workers or give the job more, then start again"


def stop() -> None:
    """Leave the process group. What computes with it (DistributedDataParallel, say) must be out of use.

    With the last reference to the group its threads end. One that lived on, and still had a tensor of the last
    collective to free when Python takes the interpreter down, would abort a process that has done its work.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # DistributedDataParallel refers to itself, and to the group
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process as sys.exit does, but leave Python up, for a group that can't be given up.

    Such is one of sharded tensors: torch's caches keep their mesh, which keeps the group and its threads (see `stop`).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
