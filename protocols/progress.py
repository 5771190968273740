"""Progress lines of evaluations, with the time left."""

from __future__ import annotations

import time
from datetime import timedelta

import parallel

FIRST, EVERY = 3.0, 20.0  # seconds before the first line, and between lines


class Progress:
    """Counts items and prints on rank 0 how many are done and when the rest will be.

    The first line comes after 3 seconds, so short work prints none, and further ones every 20 seconds.

    Args:
        total: number of items.
        what: their name in the plural.
    """

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.count = total, what, 0
        self.started = time.monotonic()
        self.due = self.started + FIRST

    def done(self, items: int = 1) -> None:
        self.count = min(self.count + items, self.total)
        now = time.monotonic()
        if now < self.due or self.count == self.total:
            return
        self.due = now + EVERY
        left = (now - self.started) / self.count * (self.total - self.count)
        parallel.say(f"{self.count} of {self.total} {self.what}  eta {timedelta(seconds=round(left))}")
