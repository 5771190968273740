"""What may end a run early: signals, lost processes, full memory and disks."""

from __future__ import annotations

import errno
import os
import signal
import time

import torch
import torch.distributed as dist

import parallel

TO_BE_CONTINUED = 75  # exit code of a run that was asked to stop and has saved; "try again" in sysexits.h


class Requests:
    """Requests of signals and of the clock, which all processes must follow after the same step.

    SIGTERM, SIGINT and SIGUSR1 ask the run to save and stop; a second SIGINT stops it at once. Every `save_minutes`
    the clock of rank 0 asks for a checkpoint.

    A single process answers after every step. Several processes exchange their requests about once a second, because
    on a GPU an exchange makes the host wait for the device; in each they agree, from the slowest process's time, on
    the step of the next one.
    """

    SECONDS = 1.0  # between exchanges; launchers allow about 30 s
    MOST_STEPS = 1000

    def __init__(self, device: torch.device, save_minutes: float = 0) -> None:
        self.device, self.save_seconds = device, 60 * save_minutes
        self.stop = False
        self.saved = self.talked = time.monotonic()
        self.step = self.next_step = 0
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):  # SIGUSR1 is POSIX's
                signal.signal(getattr(signal, name), self.ask)

    def ask(self, number: int, frame) -> None:
        if self.stop and number == signal.SIGINT:  # an exception could be swallowed by whatever it interrupts
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.stop = True

    def agreed(self, step: int) -> tuple[bool, bool]:
        """After `step` steps: whether to stop, and whether to save for the clock. All processes get the same."""
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


# ---- What torch and the system say, in one line ----


def explain(error: Exception, output_dir: str) -> parallel.Stopped | str | None:
    """Why a run stopped, if the reason lies outside its code; None for a bug."""
    if reason := parallel.worker_death(error) or out_of_memory(error) or full_disk(error):
        return reason
    if reason := lost_process(error):
        # Two processes print it, as one of them may be the one that is lost.
        return parallel.Stopped(f"{reason}; start again to continue from the last checkpoint in {output_dir}",
                                parallel.rank() < 2)
    return None


def lost_process(error: Exception) -> str | None:
    """When another process of the run has ended, or does not answer."""
    if parallel.world_size() == 1 or not isinstance(error, RuntimeError) or not (
            isinstance(error, dist.DistError) or "/gloo/" in str(error)):
        return None
    reason = str(error).splitlines()[0]
    if "imed out" in reason:
        return f"another process of the run does not answer ({reason}): it hangs, or needs a longer --dist_timeout"
    return f"another process of the run has ended ({reason}); its own message says why"


def out_of_memory(error: Exception) -> str | None:
    """When memory ran out, of the device or of the host."""
    what = str(error).splitlines()[0] if str(error) else "MemoryError"
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # the host's, CUDA's own, cuBLAS's
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not (
            isinstance(error, RuntimeError) and any(sign in what for sign in signs)):
        return None
    return (f"memory ran out ({what[:200]}): lower --batch_size_per_gpu, the size or number of crops, --out_dim, "
            "--epochs or --steps, choose a smaller --arch, or give --grad_checkpointing")


DISK = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE", "EFBIG")} - {None}


def full_disk(error: Exception) -> str | None:
    """When a disk is full, read-only or gone."""
    return f"{error}; free space, or mend the disk, and start again" if getattr(error, "errno", None) in DISK else None
