"""Running the trials of experiments, several at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.experiment import Experiment
from harness.store import Store
from harness.texts import Text
from harness.training import run_trial
from harness.trial import Trial
from spanopt.compare.pool import process_pool, run_pending

__all__ = ["run_experiments"]

_text: Text


def _start(text: Text) -> None:
    global _text
    _text = text


def _run(trial: Trial) -> dict[str, Any]:
    return run_trial(trial, _text)


def run_experiments(
    experiments: Iterable[Experiment], store: Store, text: Text, workers: int
) -> None:
    """Run what experiments still need, one experiment after the other.

    Args:
        experiments: The experiments, in order.
        store: Where results go. What it has already is not run again.
        text: What to train on.
        workers: How many trials run at once, each on one thread.

    Raises:
        RuntimeError: A trial failed. Results so far are kept.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    with (
        process_pool(workers, _start, (text,)) as pool,
        Progress(*columns, console=console, speed_estimate_period=3600) as progress,
    ):
        for experiment in experiments:
            _run_experiment(experiment, store, text, workers, pool, progress)


def _run_experiment(
    experiment: Experiment,
    store: Store,
    text: Text,
    workers: int,
    pool: Executor,
    progress: Progress,
) -> None:
    bar = progress.add_task(experiment.name)

    def keep(trial: Trial, outcome: Future[dict[str, Any]]) -> None:
        store.append(experiment.name, trial, text, _result(outcome, trial))

    def show(done: int, left: int) -> None:
        progress.update(bar, completed=done, total=done + left)

    run_pending(lambda: experiment.pending(store), _run, keep, pool, workers, show)


def _result(future: Future[dict[str, Any]], trial: Trial) -> dict[str, Any]:
    try:
        return future.result()
    except Exception as error:
        raise RuntimeError(f"a run failed: {error!r}; it was {trial}") from error
