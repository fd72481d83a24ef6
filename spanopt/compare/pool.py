"""Pools that run trials, in this process or in several processes that end with this one."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

__all__ = ["Here", "process_pool", "run_pending"]

T = TypeVar("T", bound=Hashable)


class Here(Executor):
    """An executor that runs functions at once, in this process."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function and return its outcome. An interrupt from the keyboard is raised."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def process_pool(
    workers: int,
    start: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    threads: int | None = 1,
    devices: Sequence[str] = (),
) -> ProcessPoolExecutor:
    """Return a pool of processes.

    Args:
        workers: The number of processes.
        start: The function that each process runs first. It must be importable.
        arguments: The arguments of ``start``.
        threads: How many threads PyTorch uses in each process; ``None`` leaves the number as it is.
        devices: Values of ``CUDA_VISIBLE_DEVICES``. Each process gets one, in turn.
    """
    context = multiprocessing.get_context("spawn")
    turns = context.Queue()
    for number in range(workers):
        turns.put(devices[number % len(devices)] if devices else None)
    initial = (turns, threads, start, arguments)
    return ProcessPoolExecutor(workers, context, _start, initial)


def _start(turns: Any, threads: int | None, start: Callable[..., None], arguments: Any) -> None:
    device = turns.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    if threads is not None:
        torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(*arguments)


def _end_with_parent() -> None:
    """End this process when the one that started it ends or is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_pending(
    pending: Callable[[], Sequence[T]],
    run: Callable[[T], Any],
    keep: Callable[[T, Future[Any]], None],
    pool: Executor,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, left: None,
) -> None:
    """Run trials until none is pending.

    Args:
        pending: A function that returns the trials that can be run now, the most wanted first.
            Trials in progress may be among them.
        run: A function that runs a trial. In a pool of processes it must be importable.
        keep: A function that takes a trial and its outcome. The trial is then no longer pending.
            An exception that it raises ends the run.
        pool: The executor that runs the trials.
        workers: How many trials run at once.
        progress: A function that is told how many trials are done and how many are left, as far
            as is known.
    """
    running: dict[Future[Any], T] = {}
    done = 0
    try:
        while True:
            todo = [trial for trial in pending() if trial not in running.values()]
            progress(done, len(todo) + len(running))
            for trial in todo[: workers - len(running)]:
                running[pool.submit(run, trial)] = trial
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            # Trials that have a result are kept first, since a failed one may end the run.
            for future in sorted(finished, key=lambda future: future.exception() is not None):
                keep(running.pop(future), future)
                done += 1
    finally:
        for future in running:
            future.cancel()
