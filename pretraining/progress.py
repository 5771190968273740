"""The lines of a run on the console: printed, or on a terminal the latest one live under a bar."""

from __future__ import annotations

import sys


class Lines:
    """Lines that stay, and lines that the next one replaces when stdout is a terminal and `rich` is installed.

    Nothing is drawn between the lines, so no thread runs beside the training. Whatever else is printed meanwhile,
    warnings too, appears above the bar and stays.
    """

    def __init__(self, total: int, console=None) -> None:
        """`total`: steps of the run. `console`: a rich.console.Console in place of stdout, for tests."""
        self.total, self.live = total, None
        self.console = console or terminal()

    def passing(self, line: str, done: int) -> None:
        """A line that holds until the next one; `done` of the steps are over."""
        if self.console is None:
            print(line, flush=True)
            return
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if self.live is None:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
            self.console.show_cursor(True)  # a kill must not leave the terminal without one
        rows = Table.grid(expand=True)
        rows.add_row(ProgressBar(self.total, done))
        rows.add_row(Text(line))
        self.live.update(rows, refresh=True)

    def lasting(self, line: str) -> None:
        if self.live is None:
            print(line, flush=True)
        else:
            self.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Take the bar away and give the cursor back. Closing twice is fine."""
        if self.live is not None:
            self.live.stop()
            self.live = None


def terminal():
    """rich's console when stdout is a terminal that can redraw a line, else None."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console()
    return console if console.is_terminal and not console.is_dumb_terminal else None
