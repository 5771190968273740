"""Events that end a run early: signals, lost processes, memory or disk full."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist

import parallel

TO_BE_CONTINUED = 75  # exit code of a run that saved and stopped on request; EX_TEMPFAIL in sysexits.h


class Requests:
    """Requests to stop or save, from signals or the clock; all processes follow them after the same step.

    SIGTERM, SIGINT and SIGUSR1 ask the run to save and stop; a second SIGINT ends the process immediately. The clock
    of rank 0 requests a checkpoint every `save_minutes`.

    A single process checks for requests after every step. Several processes exchange their requests about once a
    second, because the exchange synchronizes the host with the GPU. In each exchange they agree on the step of the
    next one, from the time per step of the slowest process.
    """

    SECONDS = 1.0  # between exchanges; launchers kill processes about 30 s after a signal
    MOST_STEPS = 1000

    def __init__(self, device: torch.device, save_minutes: float = 0) -> None:
        self.device, self.save_seconds = device, 60 * save_minutes
        self.stop = False
        self.saved = self.talked = time.monotonic()
        self.step = self.next_step = 0
        self.listen(self.ask)

    def listen(self, answer: Callable) -> None:
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):  # SIGUSR1 exists on POSIX only
                signal.signal(getattr(signal, name), answer)

    def ask(self, number: int, frame) -> None:
        if self.stop and number == signal.SIGINT:  # not KeyboardInterrupt: the code that it interrupts may catch it
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.stop = True

    def finish(self) -> None:
        """Call it when all is saved: from here on a signal, also one that came before, calls `leave` at once."""
        self.listen(self.leave)
        if self.stop:
            self.leave()

    def leave(self, number: int = 0, frame=None) -> NoReturn:
        raise SystemExit(TO_BE_CONTINUED)

    def agreed(self, step: int) -> tuple[bool, bool]:
        """After `step` steps: (whether to stop, whether the clock requests a checkpoint), equal on all processes."""
        if parallel.world_size() > 1 and step < self.next_step:
            return False, False
        now, stop = time.monotonic(), self.stop
        due = parallel.is_main() and 0 < self.save_seconds <= now - self.saved
        if parallel.world_size() > 1:
            pace = (now - self.talked) / max(step - self.step, 1)
            stop, due, pace = parallel.max_over_processes(
                torch.tensor([stop, due, pace], dtype=torch.float64, device=self.device)).tolist()
            self.step, self.talked = step, now
            self.next_step = step + min(max(int(self.SECONDS / max(pace, 1e-9)), 1), self.MOST_STEPS)
        if due:
            self.saved = now
        return bool(stop), bool(due)


# ---- Errors of torch and the operating system as one line ----


def explain(error: Exception, output_dir: str) -> parallel.Stopped | str | None:
    """Why a run stopped, if the cause lies outside its code; None for a bug."""
    if reason := parallel.worker_death(error) or out_of_memory(error):
        return reason
    if reason := lost_process(error):
        # Two processes print the line, because one of them may be the lost one.
        return parallel.Stopped(f"{reason}; start again to continue from the last checkpoint in {output_dir}",
                                parallel.rank() < 2)
    return None


def lost_process(error: Exception) -> str | None:
    """A line if another process of the run has ended or does not answer, else None."""
    if parallel.world_size() == 1 or not isinstance(error, RuntimeError) or not (
            isinstance(error, dist.DistError) or "/gloo/" in str(error)):
        return None
    reason = str(error).splitlines()[0]
    if "imed out" in reason:
        return f"another process of the run does not answer ({reason}): it hangs, or needs a longer --dist_timeout"
    return f"another process of the run has ended ({reason}); its own message says why"


# Messages of NumPy, torch and Python for sizes that they can't count.
TOO_LARGE = ("Maximum allowed size exceeded", "array is too big", "Overflow when unpacking long",
             "Storage size calculation overflowed", "index-sized integer")


def out_of_memory(error: Exception) -> str | None:
    """A line if memory of the device or the host ran out, else None."""
    what = str(error).splitlines()[0] if str(error) else "MemoryError"
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # messages of the host, CUDA and cuBLAS
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not (
            isinstance(error, RuntimeError) and any(sign in what for sign in signs)
            or any(sign in what for sign in TOO_LARGE)):
        return None
    return (f"memory ran out ({what[:200]}): lower --batch_size_per_gpu, the size or number of crops, --out_dim, "
            "--epochs or --steps, choose a smaller --arch, or give --grad_checkpointing")
