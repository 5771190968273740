"""What may end a run before its time."""

from __future__ import annotations

import signal

import parallel


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 ask the run to save and stop after the step; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.ask)

    def ask(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.asked = True

    def agreed(self, talk: bool) -> bool:
        """All processes must stop after the same step: they compare notes on logged steps only."""
        if parallel.world_size() == 1:
            return self.asked
        return talk and any(parallel.gather_objects(self.asked))
