"""The function ``compare``: it makes a plan, runs trials in a pool, and stores their results."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from spanopt.compare.arms import CONTROLS, ArmLike, with_controls
from spanopt.compare.design import Design
from spanopt.compare.grid import Grid
from spanopt.compare.pool import Here, process_pool, run_pending
from spanopt.compare.progress import Progress
from spanopt.compare.result import Comparison
from spanopt.compare.store import Store
from spanopt.compare.trial import Task, Trial

__all__ = ["compare"]

EXTENSIONS = 8  # values that may be added to a grid at each end
TUNING_SEEDS = (1_000_000, 1_000_001)
MOST_SEEDS = 100  # with until=
HOPELESS = 3  # after so many trials the comparison is given up, if all have failed
_task: Task


def compare(
    train: Callable[..., Any],
    arms: Mapping[str, ArmLike],
    seeds: int | Iterable[int] | None = None,
    *,
    tune: Mapping[str, Sequence[float]] | None = None,
    tuning_seeds: Iterable[int] = TUNING_SEEDS,
    steps: int | None = None,
    controls: Iterable[str] = CONTROLS,
    metric: str | None = None,
    tuning_metric: str | None = None,
    larger_is_better: bool = False,
    until: float | None = None,
    margin: float = 0.5,
    out: str | Path | None = None,
    workers: int = 1,
    retry: bool = False,
    progress: bool = True,
) -> Comparison:
    """Train arms on the same seeds and compare them with plain training.

    Args:
        train: ``train(seed, wrap, ...)`` trains once and returns the validation loss, or a dict of
            several numbers. It puts ``wrap`` around its optimizer: ``optimizer = wrap(optimizer,
            model)``. All its random numbers come from ``seed``, so that arms see the same batches.
        arms: What to compare, by name: scales by layer name or pattern, one (parallel, violation)
            pair for all layers, or an :class:`~spanopt.compare.Arm`.
        seeds: The number of seeds, which then count from 0, or the seeds themselves. By default 10,
            or at most 100 with ``until``.
        tune: The name of one argument of ``train``, such as ``"lr"``, and at least two values of
            it in ascending order. Each arm is trained at the value that is best for it. More
            values are added until the best one is not at an end.
        tuning_seeds: The seeds on which values are chosen. They take no part in the comparison.
        steps: The number of steps, which is given to ``train`` as ``steps``. Each arm is then also
            trained for fewer steps if its steps are slower, so that it takes plain training's time.
        controls: Which of ``"near-null"``, ``"uniform"`` and ``"frozen"`` are trained too.
        metric: The name of the number that is compared; by default the first one that ``train``
            returns. It must be above 0, since changes are in per cent.
        tuning_metric: The name of the number by which values are chosen; by default ``metric``.
        larger_is_better: Whether a larger metric is better.
        until: Run more seeds until every interval is at most this many per cent wide. The intervals
            and p-values are then those of a sequential method, valid at any number of seeds.
        margin: The smallest change of interest, in per cent. It decides no test, only words. If no
            change is found and the interval stays within the margin, the report says "no difference
            larger than". If the interval reaches further, it says "no conclusion yet".
        out: A folder for results. If a comparison was killed, the same call continues it there.
            Only the trials that were in progress are lost.
        workers: How many trials run at once. If there are several, each runs in its own process,
            which sees one CUDA device if there are any.
        retry: Whether trials that raised an error before are run again.
        progress: Whether progress is shown on the terminal.

    Returns:
        The comparison, which can be printed, and drawn with ``plot``.

    Raises:
        ImportError: SciPy, rich or matplotlib is missing.
        TypeError: ``train`` does not take the arguments that it would be given.
        ValueError: An argument is not valid, several processes can't import ``train``, or ``out``
            has results of other settings.
        RuntimeError: All of the first trials failed.

    Example:
        >>> def train(seed, wrap):
        ...     model = torch.nn.MultiheadAttention(8, num_heads=2)
        ...     optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=1e-2), model)
        ...     for _ in range(4):
        ...         x = torch.randn(6, 1, 8)
        ...         loss = (model(x, x, x)[0] - x).pow(2).mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        ...     return loss.item()
        >>> result = compare(train, {"(2, 1)": (2, 1)}, seeds=3, progress=False)
        >>> [*result.changes]
        ['(2, 1)', 'uniform (2, 2)', 'near-null (1.0001, 1)', 'frozen Q and K']
    """
    _check_packages()
    named = with_controls(arms, controls)
    tuned, grid = _tuned(tune)
    design = Design(
        named,
        _seeds(seeds, MOST_SEEDS if until is not None else 10),
        tuple(tuning_seeds) if grid else (),
        grid,
        metric,
        tuning_metric,
        larger_is_better,
        steps,
        until,
    )
    _check(design, workers, margin)
    task = Task(train, named.all, tuned, metric, steps is not None)
    task.check()
    if workers > 1:
        _check_importable(train)
    store = Store(None if out is None else Path(out), _settings(task, design))
    if retry:
        store.forget_errors()
    with ExitStack() as stack:
        shown = stack.enter_context(Progress(design, store)) if progress else None
        _run(design, task, store, workers, shown)
    return Comparison(design, store, margin)


def _run(design: Design, task: Task, store: Store, workers: int, shown: Progress | None) -> None:
    """Run the pending trials.

    When a process dies, the trials in progress run again, one at a time. This shows which of them
    killed it. A trial has failed if its process dies while the trial runs alone.
    """
    suspects: set[Trial] = set()
    alone = False

    def keep(trial: Trial, outcome: Future[Any]) -> None:
        error = outcome.exception()
        if isinstance(error, BrokenProcessPool) and not alone:
            suspects.add(trial)
            raise error
        if error is None:
            store.keep(trial, outcome.result())
        else:
            store.keep(trial, {"error": f"{type(error).__name__}: {error}"})
        suspects.discard(trial)
        _check_hope(store)
        if isinstance(error, BrokenProcessPool):
            raise error

    def pending() -> list[Trial]:
        todo = design.pending(store)
        return [trial for trial in todo if trial in suspects] if alone else todo

    while True:
        running = 1 if alone else workers
        with _pool(task, workers, running) as pool:
            run = task.run if workers == 1 else run_in_worker
            show = shown.show if shown else lambda done, left: None
            try:
                run_pending(pending, run, keep, pool, running, show)
            except BrokenProcessPool:
                alone = bool(suspects)
                continue
        if not alone:
            return
        alone = False


def _pool(task: Task, workers: int, running: int) -> Executor:
    if workers == 1:
        return Here()
    threads = max(1, multiprocessing.cpu_count() // workers)
    devices = [str(n) for n in range(torch.cuda.device_count())]
    return process_pool(running, start_worker, (task,), threads=threads, devices=devices)


def start_worker(task: Task) -> None:
    """Store the task that all trials of a new process share."""
    global _task
    _task = task


def run_in_worker(trial: Trial) -> dict[str, Any]:
    """Run a trial in a process of the pool."""
    return _task.run(trial)


def _check_hope(store: Store) -> None:
    results = [result for _, result in store.results()]
    if len(results) >= HOPELESS and all("error" in result for result in results):
        last = results[-1]
        raise RuntimeError(
            f"all of the first {len(results)} trials failed, the last one with:\n"
            f"{last.get('traceback', last['error'])}"
        )


def _check_packages() -> None:
    missing = [x for x in ("scipy", "rich", "matplotlib") if importlib.util.find_spec(x) is None]
    if missing:
        raise ImportError(
            f"spanopt.compare needs {', '.join(missing)}, which is not installed: install spanopt "
            "with its extra: pip install '.[compare]' in a clone"
        )


def _tuned(tune: Mapping[str, Sequence[float]] | None) -> tuple[str | None, Grid | None]:
    if tune is None:
        return None, None
    if len(tune) != 1:
        raise ValueError(
            f"tune takes one argument and its values, got {', '.join(tune) or 'none'}; "
            "fix the others with functools.partial"
        )
    ((name, values),) = tune.items()
    if name in ("seed", "wrap", "steps"):
        raise ValueError(f"{name!r} is given to train() by the comparison and can't be tuned")
    if len(values) < 2:
        raise ValueError(f"tune[{name!r}] needs at least two values, got {values!r}")
    return name, Grid(values, EXTENSIONS)


def _seeds(seeds: int | Iterable[int] | None, default: int) -> tuple[int, ...]:
    if seeds is None:
        seeds = default
    return tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)


def _check(design: Design, workers: int, margin: float) -> None:
    if len(set(design.seeds)) < len(design.seeds) or len(design.seeds) < 2:
        raise ValueError(f"a comparison needs two different seeds or more, got {design.seeds}")
    both = set(design.seeds) & set(design.tuning_seeds)
    if both:
        raise ValueError(f"seeds and tuning_seeds share {sorted(both)}; choose others to tune on")
    if design.grid and not design.tuning_seeds:
        raise ValueError("tuning needs seeds of its own, and tuning_seeds is empty")
    if design.steps is not None and design.steps < 1:
        raise ValueError(f"steps must be at least 1, got {design.steps}")
    if design.until is not None and design.until <= 0:
        raise ValueError(f"until is a width in per cent above 0, got {design.until}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if margin <= 0:
        raise ValueError(f"margin is a change in per cent above 0, got {margin}")


def _check_importable(train: Callable[..., Any]) -> None:
    """Check that other processes can import the function that trains."""
    try:
        pickle.dumps(train)
    except Exception as error:
        reason = str(error)
    else:
        inner = getattr(train, "func", train)  # functools.partial has the function as func
        main = sys.modules["__main__"]
        in_notebook = inner.__module__ == "__main__" and not hasattr(main, "__file__")
        if not in_notebook:
            return
        reason = "it is defined in a notebook or at the prompt"
    raise ValueError(
        f"workers > 1 takes a train() that other processes can import: {reason}. Put it at the top "
        "level of a module, or leave workers at 1"
    )


def _settings(task: Task, design: Design) -> dict[str, Any]:
    """Return the settings on which results depend, as far as they are known."""
    train = getattr(task.train, "func", task.train)
    try:
        source = hashlib.sha256(inspect.getsource(train).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        source = None
    name = getattr(train, "__qualname__", type(train).__qualname__)
    return {
        "train": f"{train.__module__}:{name}",
        "source of train": source,
        "arguments": {k: repr(v) for k, v in getattr(task.train, "keywords", {}).items()},
        "arms": {name: arm.describe() for name, arm in design.named.all.items()},
        "seeds": list(design.seeds),
        "tune": {task.tuned: design.grid.values} if task.tuned and design.grid else None,
        "tuning seeds": list(design.tuning_seeds),
        "metric": design.metric,
        "tuning metric": design.tuning_metric,
        "larger is better": design.larger_is_better,
        "steps": design.steps,
        "until": design.until,
        "torch": torch.__version__,
    }
