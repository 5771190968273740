"""Ends at once after its last collective, while gloo's threads, which are slow here, still hold the tensors.

Asserts that none of those threads is left. A thread that finds Python's interpreter gone ends the process with SIGABRT.
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import parallel
from pretraining import sharding


class Slow:
    """Gives other threads the time in which Python's end takes the interpreter down."""

    def __del__(self, sleep=time.sleep):
        sleep(0.5)


def gloo_threads() -> list[int]:
    return [int(p.parent.name) for p in Path("/proc/self/task").glob("*/comm") if p.read_text().startswith("pt_gloo")]


def collectives(kind: str) -> None:
    wrapped = torch.nn.Linear(4, 4)
    if kind == "fsdp":
        sharding.fully_shard(wrapped, mesh=sharding.init_device_mesh("cpu", (2,)))
    else:
        wrapped = DistributedDataParallel(wrapped)
    wrapped(torch.ones(2, 4)).sum().backward()
    assert gloo_threads()
    for thread in os.listdir("/proc/self/task"):  # all on one core, where whoever waits for them goes first
        os.sched_setaffinity(int(thread), {sorted(os.sched_getaffinity(0))[-1]})
    for thread in gloo_threads():
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    for _ in range(3):
        parallel.mean_over_processes(torch.ones(3))


if __name__ == "__main__":
    parallel.start("cpu")
    torch.is_slow = Slow()
    collectives(sys.argv[1])
    parallel.stop()
    if sys.argv[1] == "fsdp":
        parallel.leave(0)
    assert not gloo_threads()
