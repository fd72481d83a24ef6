"""Running the trials of experiments, two at a time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.experiment import Experiment
from harness.store import Store
from harness.tasks import Text
from harness.training import run_trial
from harness.trial import Trial

__all__ = ["run_experiments"]

_text: Text


def _start(text: Text) -> None:
    global _text
    torch.set_num_threads(1)
    _text = text
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave no worker behind when the study is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


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
    context = multiprocessing.get_context("spawn")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    with (
        ProcessPoolExecutor(workers, context, _start, (text,)) as pool,
        Progress(*columns, console=console, speed_estimate_period=3600) as progress,
    ):
        for experiment in experiments:
            _run_experiment(experiment, store, text, workers, pool, progress)


def _run_experiment(
    experiment: Experiment,
    store: Store,
    text: Text,
    workers: int,
    pool: ProcessPoolExecutor,
    progress: Progress,
) -> None:
    bar = progress.add_task(experiment.name)
    running: dict[Future[dict[str, Any]], Trial] = {}
    done = 0
    try:
        while True:
            pending = experiment.pending(store)
            progress.update(bar, completed=done, total=done + max(len(pending), len(running)))
            for trial in pending:
                if len(running) < workers and trial not in running.values():
                    running[pool.submit(_run, trial)] = trial
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                trial = running.pop(future)
                store.append(experiment.name, trial, text, _result(future, trial))
                done += 1
    finally:
        for future in running:
            future.cancel()


def _result(future: Future[dict[str, Any]], trial: Trial) -> dict[str, Any]:
    try:
        return future.result()
    except Exception as error:
        raise RuntimeError(f"a run failed: {error!r}; it was {trial}") from error
