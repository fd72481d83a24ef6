"""Memory of training with span scaling, against the same training without it.

Counted: the bytes that a forward pass saves for the backward pass beside the parameters, each
storage once, and those of all tensors that Python reaches after a step. Measured: the peak of the
resident set of a fresh process that takes some steps; processes take turns, and the ratio is that
of neighbours. The C library is told to give every large block back to the system, since the holes
that it keeps otherwise change the peak of equal processes by several per cent.

    python benchmarks/memory.py
    python benchmarks/memory.py "decoder N=512" --rounds 5
    python benchmarks/memory.py "ViT-B/16" --layers 12
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from speed.arms import adamw, wrapped
from speed.cases import Case, Setting, add_cases, build, chosen, training_step
from speed.measure import add_options, counting_saved, live_bytes, quartiles, start, write

ARMS = ("plain", "wrapped")
STEPS = 3


def optimizer_of(arm: str, setting: Setting) -> torch.optim.Optimizer:
    """Return the optimizer of one of the two."""
    return wrapped(setting) if arm == "wrapped" else adamw(setting)


def counted(case: Case, arm: str) -> dict[str, int]:
    """Count bytes: ``saved`` for backward, and ``left`` after a step."""
    setting = build(case)
    step = training_step(setting, optimizer_of(arm, setting))
    step()
    with counting_saved(setting.model.parameters()) as saved:
        loss = setting.loss()
    loss.backward()
    del loss
    step()
    return {"saved": sum(saved.values()), "left": live_bytes()}


def train(case: Case, arm: str) -> int:
    """Train in this process and return the peak of its resident set, in bytes."""
    setting = build(case)
    step = training_step(setting, optimizer_of(arm, setting))
    for _ in range(STEPS):
        step()
    return resident_peak()


def resident_peak() -> int:
    """Return the peak of this process's resident set, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # there ru_maxrss would be the parent's, where that is larger
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def peak_in_fresh_process(case: Case, arm: str, threads: int) -> int:
    """Return the peak of a process of its own."""
    command = [sys.executable, __file__, case.name, "--peak", arm]
    command += ["--layers", str(case.layers), "--threads", str(threads)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # of the GNU C library
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(result.stdout)


def measure(case: Case, rounds: int, threads: int) -> dict[str, Any]:
    """Measure one model.

    Args:
        case: The model.
        rounds: Pairs of processes.
        threads: Of torch.

    Returns:
        ``saved``, ``left`` and ``peak``, each in bytes for plain and wrapped; of the peak it is the
        median, and ``ratio`` has the quartiles of the paired ratios.
    """
    counts = {arm: counted(case, arm) for arm in ARMS}
    peaks = {arm: [] for arm in ARMS}  # type: dict[str, list[int]]
    for _ in range(rounds):
        for arm in ARMS:
            peaks[arm].append(peak_in_fresh_process(case, arm, threads))
    return {
        "case": case.name,
        "layers": case.layers,
        "saved": [counts[arm]["saved"] for arm in ARMS],
        "left": [counts[arm]["left"] for arm in ARMS],
        "peak": [quartiles(peaks[arm])[1] for arm in ARMS],
        "ratio": quartiles([b / a for a, b in zip(*peaks.values(), strict=True)]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_cases(parser)
    parser.add_argument("--layers", type=int, help="of the models, in place of what they have")
    parser.add_argument("--peak", choices=ARMS, help="print the peak of this process only")
    add_options(parser, rounds=5)
    options = parser.parse_args(argv)
    cases = chosen(parser, options.cases)
    if options.layers is not None:
        cases = [replace(case, layers=options.layers) for case in cases]
    start(options)
    if options.peak:
        print(train(cases[0], options.peak))
        return
    rows = []
    for case in cases:
        row = measure(case, options.rounds, options.threads)
        parts = [
            f"{name} {row[name][0] / 2**20:.1f} MiB x {row[name][1] / row[name][0]:.4f}"
            for name in ("saved", "left", "peak")
        ]
        low, middle, high = row["ratio"]
        print(
            f"{case.name:16s} {', '.join(parts)} (paired {middle:.4f}, {low:.4f} to {high:.4f})",
            flush=True,
        )
        rows.append(row)
    write(options, rows)


if __name__ == "__main__":
    main()
