"""Means over steps that stay on the device until they are read, and the clock beside them."""

from __future__ import annotations

import time

import torch
from torch import Tensor

import parallel


class Meters:
    """Means over steps. Nothing waits for the device before `means`."""

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
        """Mean of each value over its updates and over the processes; waits for the device once."""
        if not self.sums:
            return {}
        device = next((s.device for s in self.sums.values() if s.device.type != "cpu"), torch.device("cpu"))
        sums = torch.stack([s.to(device, torch.float32) for s in self.sums.values()])
        means = parallel.mean_over_processes(sums / torch.tensor(list(self.counts.values()), device=device))
        return dict(zip(self.sums, means.tolist(), strict=True))

    def state_dict(self) -> dict:
        return {"sums": {k: v.cpu() for k, v in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.sums = {k: v.to(device) for k, v in state["sums"].items()}
        self.counts = dict(state["counts"])


def averaged(states: list[dict]) -> dict:
    """One state of Meters for each process of a run that continues on another number of processes: the same mean."""
    sums = {k: sum(state["sums"][k] for state in states) / len(states) for k in states[0]["sums"]}
    return {"sums": sums, "counts": states[0]["counts"]}


class Clock:
    """Speed since the last reading: seconds per step, and the share of them spent waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def next(self, iterator):
        """next(iterator), timed as waiting."""
        started = time.perf_counter()
        item = next(iterator)
        self.waited += time.perf_counter() - started
        return item

    def read(self) -> tuple[float, float]:
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        seconds, waiting = elapsed / max(self.steps, 1), self.waited / elapsed
        self.reset()
        return seconds, waiting
