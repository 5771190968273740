"""Progress lines of work that may take long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import TypeVar

import parallel

Item, Result = TypeVar("Item"), TypeVar("Result")
FIRST, MOST = 3.0, 60.0  # seconds to the first line; between two lines at most


def progress(items: Iterable[Item], total: int, what: str, size: int = 1, first: float = FIRST) -> Iterator[Item]:
    """Yield the items, and say `what: 256 of 3000, eta 0:01:10` after `first` seconds, then ever less often.

    Each line comes after twice the time of the one before, within a minute of it. Work of a few seconds says nothing.
    Only the first process prints; nothing is printed if `what` is empty.

    Args:
        total: of what is counted (images, frames, epochs); 0: unknown, then lines have no eta.
        size: how many of them an item holds.
    """
    started, due = time.monotonic(), first
    for done, item in enumerate(items, 1):
        yield item
        passed = time.monotonic() - started
        if what and passed >= due and (done * size < total or not total):
            due = min(2 * passed, passed + MOST)
            left = f" of {total}, eta {duration(passed / (done * size) * total - passed)}" if total else ""
            parallel.say(f"{what}: {done * size}{left}")


def map_shared(work: Callable[[int], Result], total: int, what: str) -> list[Result]:
    """`parallel.map_shared(work, total)` with progress lines."""
    steps = progress(repeat(None), total, what, size=parallel.world_size())

    def counted(i: int) -> Result:
        next(steps)
        return work(i)

    return parallel.map_shared(counted, total)


def duration(seconds: float) -> str:
    """H:MM:SS."""
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
