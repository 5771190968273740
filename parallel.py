"""Distributed start-up (torchrun, Slurm, submitit or a single process), rank and device, and collectives.

Without a process group, every function behaves as in a run of one process.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")

TIMEOUT_MINUTES = 10  # the other processes end this long after a process dies or hangs


class Refused(ValueError):
    """Bad input. The message is one line with the flag, the value and the remedy; the script exits with code 2."""

    def __init__(self, reason: object) -> None:
        super().__init__(" ".join(str(reason).split()))


class Stopped(RuntimeError):
    """Work that can't continue for a reason outside its code. The message is one line; the script exits with code 1.

    `say`: whether this process prints the message; all processes may stop for the same reason.
    """

    def __init__(self, reason: object, say: bool = True) -> None:
        self.say = say
        super().__init__(" ".join(str(reason).split()))


def import_optional(module: str, needed_by: str, package: str) -> ModuleType:
    """The module of an optional package. Raises Refused with the pip command if it isn't installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refused(f"{needed_by} needs {package}: pip install {package}") from error


@contextmanager
def refusing(where: str, remedy: str) -> Iterator[None]:
    """Turns an OSError in the block, of a file or folder of the user's, into Refused."""
    try:
        yield
    except OSError as error:
        raise Refused(f"{where}: {error.strerror or error}; {remedy}") from error


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def say(line: str) -> None:
    """Print a line on rank 0 only."""
    if is_main():
        print(line, flush=True)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def sum_over_processes(x: Tensor, operation: str = "SUM") -> Tensor:
    """Elementwise sum of a tensor over all processes (all-reduce), or another operation of `dist.ReduceOp`."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, getattr(dist.ReduceOp, operation))
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    """Elementwise mean of a tensor over all processes (all-reduce)."""
    return x if world_size() == 1 else sum_over_processes(x) / world_size()


def max_over_processes(x: Tensor) -> Tensor:
    """Elementwise maximum of a tensor over all processes (all-reduce)."""
    return sum_over_processes(x, "MAX")


def group_device(device: torch.device | str) -> torch.device:
    """The device that tensors must be on for collectives: the process's GPU with NCCL, else `device`."""
    if world_size() > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


def gather(x: Tensor) -> Tensor:
    """Concatenates the rows of all processes in rank order; each must pass the same number of rows (all-gather)."""
    if world_size() == 1:
        return x
    here = x.to(group_device(x.device)).contiguous()
    parts = [torch.empty_like(here) for _ in range(world_size())]
    dist.all_gather(parts, here)
    return torch.cat(parts).to(x.device)


def gather_objects(value) -> list:
    """A list of every process's value in rank order, for small Python objects (all-gather)."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(make: Callable):
    """Calls `make()` on rank 0 and returns its result, or raises its ValueError or OSError, on every process.

    All processes must call it. `make` may run longer than the time-out of collectives: it runs in a thread while the
    processes synchronize every ten seconds.
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
    """[work(0), ..., work(n - 1)] on every process, with the work split: process r of W computes r, r + W, ...

    Results must be small Python objects. A ValueError or OSError on one process is raised on all of them; otherwise
    the others would wait for it.
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
    """torch.distributed's environment variables, as torchrun, Slurm or submitit define them; {} for a single process.

    Slurm's variables are read only in a step that srun started (SLURM_STEP_ID). The shell of a batch script has a task
    number too, but its other tasks do not exist, and the process would wait for them forever.

    Raises:
        Refused: a variable is missing, not a whole number, or out of range.
    """
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        size = whole_number("WORLD_SIZE", "torchrun", 1)
        variables = {"RANK": whole_number("RANK", "torchrun", 0, size - 1), "WORLD_SIZE": size}
        # Launchers that start one process per host do not set LOCAL_RANK.
        variables["LOCAL_RANK"] = whole_number("LOCAL_RANK", "torchrun", 0, size - 1) if "LOCAL_RANK" in env else 0
        if dist_url == "env://":
            variables["MASTER_ADDR"] = required("MASTER_ADDR", "torchrun")
            variables["MASTER_PORT"] = whole_number("MASTER_PORT", "torchrun", 1, 65535)
        return {name: str(value) for name, value in variables.items()}
    if "SLURM_STEP_ID" in env:
        return tasks_environment("srun", SLURM, required("SLURM_STEP_NODELIST", "srun"))
    if "SUBMITIT_LOCAL_JOB_ID" in env:
        return tasks_environment("submitit", SUBMITIT_LOCAL, "127.0.0.1")
    return {}


# Names of the variables that hold the rank, the world size, the local rank and the job's number.
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID")
SUBMITIT_LOCAL = tuple(f"SUBMITIT_LOCAL_{name}" for name in ("GLOBALID", "NTASKS", "LOCALID", "JOB_ID"))


def tasks_environment(launcher: str, names: tuple[str, ...], hosts: str) -> dict[str, str]:
    """torch.distributed's variables from a launcher that numbers its tasks but sets no master address or port."""
    rank, world_size, local_rank, job = names
    size = whole_number(world_size, launcher, 1)
    if size == 1:
        return {}
    # All tasks of a step must compute the same port, other steps on the host another one. Below the ephemeral ports.
    port = 10000 + (whole_number(job, launcher) + 1009 * int(os.environ.get("SLURM_STEP_ID", "0"))) % 20000
    return {
        "RANK": str(whole_number(rank, launcher, 0, size - 1)),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(whole_number(local_rank, launcher, 0, size - 1)),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or first_slurm_host(hosts),
        "MASTER_PORT": str(whole_number("MASTER_PORT", launcher, 1, 65535) if "MASTER_PORT" in os.environ else port),
    }


def required(name: str, launcher: str) -> str:
    """The value of an environment variable that must be set because others of its launcher are."""
    if not os.environ.get(name):
        raise Refused(f"the variable {name} is not set, but others of {launcher} are: start with {launcher}, or "
                      "unset RANK, WORLD_SIZE and SLURM_STEP_ID to run a single process")
    return os.environ[name]


def whole_number(name: str, launcher: str, low: int = 0, high: int = sys.maxsize) -> int:
    text = required(name, launcher)
    if not text.isdecimal() or not low <= int(text) <= high:
        bounds = f"from {low} to {high}" if high < sys.maxsize else f"of at least {low}"
        raise Refused(f"the variable {name} is {text!r} instead of a whole number {bounds}: start with {launcher}")
    return int(text)


def first_slurm_host(nodelist: str) -> str:
    """First host of a list such as `node[03-07,12],login` (node03)."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodelist).split(",")[0]


def named_device(name: str) -> torch.device:
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise Refused(f"--device {name}: not a device; use auto, cpu, cuda, cuda:N or mps")
    return torch.device(name)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps` -> the device of this process; `auto` never means mps (docs/systems.md).
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = named_device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise Refused(f"--device {name}: torch finds no Apple GPU; use --device cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise Refused(f"--device {name}: torch finds no CUDA device; use --device cpu")
    if device.index is not None and local_rank > 0:
        raise Refused(f"--device {name}: several processes on this host would share that GPU; use --device cuda")
    index = device.index if device.index is not None else 0 if sees_own_gpu() else local_rank
    if index >= torch.cuda.device_count():
        raise Refused(f"--device {name}: GPU {index} does not exist, this host has {torch.cuda.device_count()}; "
                      "start fewer processes per host")
    return torch.device("cuda", index)


def sees_own_gpu() -> bool:
    """Whether Slurm bound one GPU to this task; it is number 0 then, whatever the local rank."""
    env = os.environ
    own = ("SLURM_GPUS_PER_TASK" in env or "gpu" in env.get("SLURM_TRES_PER_TASK", "")
           or env.get("SLURM_GPU_BIND", "none") != "none")
    return own and torch.cuda.device_count() == 1


def start(device: str = "auto", dist_url: str = "env://", timeout_minutes: float = TIMEOUT_MINUTES) -> torch.device:
    """Initialize the process group, if a launcher started several processes, and return this process's device.

    Args:
        timeout_minutes: time-out of collectives; the other processes end this long after one dies or hangs.

    Raises:
        Refused: a variable is missing, the port is taken, or the device does not exist.
    """
    env = launch_environment(dist_url)
    chosen = pick_device(device, int(env.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if chosen.type == "mps" and int(env.get("WORLD_SIZE", "1")) > 1:
        raise Refused(f"--device {device} with {env['WORLD_SIZE']} processes: torch has no collectives for Apple GPUs; "
                      "start one process, or use --device cpu")
    if not env or dist.is_initialized():
        return chosen
    importlib.import_module("torch.distributed.nn")  # imported later, its default arguments would keep the group alive
    os.environ.update(env)
    flag = "" if dist_url == "env://" else f"--dist_url {dist_url}"
    where = dist_url if flag else f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    if address := re.fullmatch(r"(?:tcp://)?([^/]+):([0-9]{1,5})", where):
        refuse_unusable_address(address[1], int(address[2]), listens=env["RANK"] == "0", flag=flag)
    if where.startswith("file://") and not os.access(os.path.dirname(where.removeprefix("file://")), os.W_OK):
        raise Refused(f"{flag}: its folder can't be written to; give a file in a folder that all processes can write")
    try:
        timeout = timedelta(minutes=timeout_minutes)
        store, rank, world_size = next(
            dist.rendezvous(dist_url, int(env["RANK"]), int(env["WORLD_SIZE"]), timeout=timeout))
        # After torchrun restarts the processes of a node, its store still holds the old processes' addresses. With
        # several nodes the restart counts may differ; there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives a new store.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world_size, timeout=timeout)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise Refused(f"--dist_url {dist_url}: no process group of {env['WORLD_SIZE']} at {where} ({reason}); check "
                      "that all processes run and can reach this address") from error
    return chosen


def refuse_unusable_address(host: str, port: int, listens: bool, flag: str = "") -> None:
    """Refuses an unknown host or a port in use, which torch reports in pages of text or only after the time-out."""
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
    """A one-line reason if a data-loading worker died or can't hand its batches over, else None.

    torch raises the death of a worker from a signal handler, anywhere in the main thread; if the worker died while it
    sent a batch, a ConnectionError or EOFError comes first. The handler is removed here: it would raise again, with a
    traceback, while the loader shuts down.
    """
    broken = isinstance(error, (ConnectionError, EOFError))
    last = (str(error).strip().splitlines() or [""])[-1]  # what a worker raised comes with its traceback before it
    files = "Too many open files" in last
    memory = isinstance(error, RuntimeError) and "shared memory" in last
    if not broken and not files and not memory and not last.startswith("DataLoader worker"):
        return None
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    what = " ".join(last.split()).removeprefix("RuntimeError: ").removesuffix(".")
    if broken:
        what = f"a DataLoader worker died ({what or 'its connection was reset'})"
    remedy = "usually memory ran out: lower --num_workers or give the job more memory"
    if files:
        remedy = "raise the limit of open files (ulimit -n) or lower --num_workers"
    elif memory:
        remedy = "give the container more shared memory (docker run --shm-size) or lower --num_workers"
    return f"{what}; {remedy}, then start again"


def stop() -> None:
    """Leave the process group. Modules that use it (DistributedDataParallel) must not be used any more.

    The group's threads end when its last reference is gone. A thread that still has to free a tensor of the last
    collective while the interpreter shuts down would abort the process after all its work is done.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # DistributedDataParallel is in a reference cycle, which also holds the group
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Exit at once, without shutting the interpreter down, if the process group can't be released (see `stop`).

    That is the case with sharded tensors: torch caches their mesh, which holds the group and its threads.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


DISK = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE", "EFBIG")} - {None}


def full_disk(error: Exception) -> str | None:
    """A one-line reason if the error says that a disk is full, read-only or not available, else None."""
    what = ""
    signs = ("inline_container", "iostream error")  # how torch.save reports a failed write
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs):
        error, what = error.__context__, "a file could not be written: the disk is full, or a limit is reached"
    if getattr(error, "errno", None) in DISK:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return what and f"{what}; free space or repair the disk and start again" or None
