"""Console lines of a run: printed, or on a terminal updated in place below a progress bar."""

from __future__ import annotations

import sys


class Lines:
    """Prints permanent lines and progress lines.

    If stdout is a terminal and `rich` is installed, each progress line replaces the previous one below a bar. The bar
    is redrawn only with a line, so no thread is needed. Everything else that is printed, such as warnings, appears
    above the bar.
    """

    def __init__(self, total: int, console=None) -> None:
        """`total`: steps of the run. `console`: a rich.console.Console to use instead of stdout, for tests."""
        self.total, self.live = total, None
        self.console = console or terminal()

    def passing(self, line: str, done: int) -> None:
        """Show a progress line, after `done` steps."""
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
            self.console.show_cursor(True)  # otherwise a killed run would leave the cursor hidden
        rows = Table.grid(expand=True)
        rows.add_row(ProgressBar(self.total, done))
        rows.add_row(Text(line))
        self.live.update(rows, refresh=True)

    def lasting(self, line: str) -> None:
        """Print a permanent line."""
        if self.live is None:
            print(line, flush=True)
        else:
            self.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Remove the bar. May be called twice."""
        if self.live is not None:
            self.live.stop()
            self.live = None


def terminal():
    """A rich console if stdout is a terminal that can redraw lines and rich is installed, else None."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console()
    return console if console.is_terminal and not console.is_dumb_terminal else None
