"""Measuring time in turns, and memory by counting."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = [
    "add_options",
    "conditions",
    "counting_saved",
    "in_turns",
    "live_bytes",
    "quartiles",
    "start",
    "three",
    "write",
]


def add_options(parser: argparse.ArgumentParser, rounds: int | None = None) -> None:
    """Add the options that all benchmarks have; that of rounds where there are any."""
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="measured (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results here, as JSON")


def start(options: argparse.Namespace) -> None:
    """Prepare for measuring: threads and seed."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)


def in_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 3
) -> dict[str, np.ndarray]:
    """Call functions in turns, in an order that is drawn anew in each round.

    Args:
        steps: The functions by name.
        rounds: How often each is measured.
        warm_up: How often each is called before.

    Returns:
        For each its times in seconds, shape ``(rounds,)``: those of one round are neighbours in
        time, so a machine that is slow for a while is slow for all of them. With one thread they
        are that thread's time on a CPU, which leaves out what other processes take.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    names = list(steps)
    times = {name: np.zeros(rounds) for name in names}
    order = np.random.default_rng(0)
    for turn in range(-warm_up, rounds):
        for name in order.permutation(names).tolist():
            begin = clock()
            steps[name]()
            if turn >= 0:
                times[name][turn] = clock() - begin
    return times


def quartiles(values: np.ndarray | Sequence[float]) -> list[float]:
    """Return first quartile, median and third quartile."""
    return [float(x) for x in np.percentile(values, [25, 50, 75])]


def three(values: Sequence[float], digits: int = 3) -> str:
    """Return median and quartiles."""
    low, middle, high = values
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


@contextmanager
def counting_saved(parameters: Iterable[Tensor] = ()) -> Iterator[dict[int, int]]:
    """Count what is saved for backward, but for parameters: bytes by storage, each once."""
    saved: dict[int, int] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield saved


def live_bytes() -> int:
    """Return the bytes of all tensors that Python can reach, storages counted once."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if type(x) in (Tensor, nn.Parameter):  # others stand for some of these
            with suppress(RuntimeError):  # sparse ones and the like have no storage
                storage = x.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def conditions() -> dict[str, str]:
    """Return the day, the instructions of the CPU and the version of torch."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def write(options: argparse.Namespace, rows: Any) -> None:
    """Write results and what they were measured with, if asked to.

    Rows of cases that a file has already and that were not measured now are kept.
    """
    if options.out is None:
        return
    record = {
        **conditions(),
        "threads": options.threads,
        "rounds": getattr(options, "rounds", None),
        "rows": rows,
    }
    if getattr(options, "cases", None) and options.out.exists():
        before = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
        new = {row["case"]: row for row in rows}
        kept = [new.pop(row["case"], row) for row in before]
        record["rows"] = [*kept, *new.values()]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
