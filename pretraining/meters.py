"""Running means that stay on the device until they are read, and a clock for speed and waiting time."""

from __future__ import annotations

import time

import torch
from torch import Tensor

import parallel


class Meters:
    """Means over steps. Only `means` synchronizes with the device."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def update(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64 if not isinstance(value, Tensor) else None).detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean of each value over its updates and over the processes; one synchronization."""
        if not self.sums:
            return {}
        device = next((s.device for s in self.sums.values() if s.device.type != "cpu"), torch.device("cpu"))
        sums = torch.stack([s.float().to(device) for s in self.sums.values()])
        means = parallel.mean_over_processes(sums / torch.tensor(list(self.counts.values()), device=device))
        return dict(zip(self.sums, means.tolist(), strict=True))

    def state_dict(self) -> dict:
        return {"sums": {k: v.cpu() for k, v in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.sums = {k: v.to(device, copy=True) for k, v in state["sums"].items()}
        self.counts = dict(state["counts"])


def averaged(states: list[dict]) -> dict:
    """One state of Meters with the mean of `states`, for a run that resumes with another number of processes."""
    sums = {k: sum(state["sums"][k] for state in states) / len(states) for k in states[0]["sums"]}
    return {"sums": sums, "counts": states[0]["counts"]}


class Clock:
    """Speed since the last `read`: seconds per step, and the fraction of time spent waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def next(self, iterator):
        """next(iterator), counted as waiting time."""
        started = time.perf_counter()
        item = next(iterator)
        self.waited += time.perf_counter() - started
        return item

    def read(self) -> tuple[float, float]:
        """(seconds per step, fraction of time spent waiting for data); then resets."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        seconds, waiting = elapsed / max(self.steps, 1), self.waited / elapsed
        self.reset()
        return seconds, waiting
