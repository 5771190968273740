"""What may end a run before its time: signals, and processes that are lost."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

import parallel

TO_BE_CONTINUED = 75  # exit code of a run that was asked to stop and saved; sysexits.h calls it "try again"


class Requests:
    """What signals and the clock ask of a run, which all processes must do after the same step.

    SIGTERM, SIGINT and SIGUSR1 ask it to save and stop; a second SIGINT stops it at once. Every `save_minutes` the
    clock of rank 0 asks for a checkpoint.

    One process answers after every step. Several compare notes about once a second, because on a GPU that makes the
    host wait for the device: with their notes they agree, from the slowest one's time, on the step of the next talk.
    """

    SECONDS = 1.0  # between talks; a launcher's grace is 30 s or so
    MOST_STEPS = 1000

    def __init__(self, device: torch.device, save_minutes: float = 0) -> None:
        self.device, self.save_seconds = device, 60 * save_minutes
        self.stop = False
        self.saved = self.talked = time.monotonic()
        self.step = self.next_step = 0
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):  # Windows has no SIGUSR1
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


def lost_process(error: RuntimeError) -> str | None:
    """One line when an error says that another process of the run has ended or does not answer."""
    if parallel.world_size() == 1 or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
        return None
    reason = str(error).splitlines()[0]
    if "imed out" in reason:
        return f"another process of the run does not answer ({reason}): it hangs, or needs a longer --dist_timeout"
    return f"another process of the run has ended ({reason}); its own message says why"
