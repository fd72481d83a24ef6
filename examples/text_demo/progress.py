"""The progress bar."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from text_demo.resuming import ARMS, Run

__all__ = ["Display"]


class Display:
    """The progress bar over all seeds; without a terminal, a line at every evaluation."""

    def __init__(self, run: Run, console: Console) -> None:
        text = TextColumn("{task.description}")
        left = TimeRemainingColumn(elapsed_when_finished=True)
        self.progress = Progress(BarColumn(20), text, left, console=console, refresh_per_second=4)
        total = run.config.seeds * run.config.steps
        self.task = self.progress.add_task("", total=total, completed=run.steps_done())

    def show(self, run: Run, training: Mapping[str, float], done: int) -> None:
        """Show the training losses of the latest batch, the speed and the time left."""
        config, record = run.config, run.records[-1]
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in training.items())
        recent = [seconds for name in ARMS for seconds in record.seconds[name][-20:]]
        speed = config.batch * config.length / statistics.fmean(recent) if recent else 0.0
        status = f"seed {len(run.records)}/{config.seeds}: {losses}, {speed:,.0f} characters/s"
        completed = (len(run.records) - 1) * config.steps + done
        self.progress.update(self.task, completed=completed, description=status)
        if record.steps[-1] == done and not self.progress.console.is_terminal:
            print(f"step {done}/{config.steps}, {status}", flush=True)
