"""Progress on the terminal: trials done, time left, and the table so far."""

from __future__ import annotations

import sys
import time
from typing import Any

from spanopt.compare.arms import PLAIN
from spanopt.compare.design import Design
from spanopt.compare.store import Store

__all__ = ["Progress"]

EVERY = 30.0  # seconds between two lines, if there is no terminal to show a bar


class Progress:
    """A display of how far a comparison is.

    The intervals that it shows stay valid however often they are looked at.

    Args:
        design: What is compared.
        store: The results so far.
    """

    def __init__(self, design: Design, store: Store) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._design, self._store = design, store
        self._console = Console(file=sys.stderr)
        self._bar = Bar(
            TextColumn("trials"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=3600,
        )
        self._task = self._bar.add_task("trials")
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._said = time.monotonic()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._console.is_terminal:
            self._live.__exit__(*error)

    def show(self, done: int, left: int) -> None:
        """Show how many trials are done and how many are left, as far as is known."""
        self._bar.update(self._task, completed=done, total=done + left)
        if self._console.is_terminal:
            from rich.console import Group

            self._live.update(Group(self._table(), self._bar.get_renderable()), refresh=True)
        elif time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            print(f"{done} trials done, {left} or more left", file=sys.stderr, flush=True)

    def _table(self) -> Any:
        from rich.table import Table

        table = Table("arm", "change, %", "interval, any time", "seeds")
        for arm in self._design.arms:
            if arm != PLAIN:
                change = self._design.change(arm, self._store, any_time=True)
                known = change.seeds >= 2
                cells = (f"{change.mean:+.2f}", f"{change.low:+.2f} to {change.high:+.2f}")
                table.add_row(arm, *(cells if known else ("", "")), str(change.seeds))
        return table
