"""Time of a whole training step with span scaling, as a ratio to the same step without it.

Each model is trained by AdamW, once plain and once wrapped. The two take turns in one process, step
by step, and the ratio is that of each pair of neighbours, so a machine that is slow for a while is
slow for both. Beside it stands the bound: the floating-point operations of the projections over
those of the step.

    python benchmarks/overhead.py                          # every model, not compiled
    python benchmarks/overhead.py "decoder N=512" --compile
    python benchmarks/overhead.py demo --profile           # where the time goes
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from speed.cases import Case, Setting, add_cases, build, chosen, training_step
from speed.measure import add_options, in_turns, quartiles, start, write
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from spanopt import SpanScale, SpanScaledOptimizer

LR = 1e-4
SCALES = SpanScale(2.0, 1.0)


def wrapped(setting: Setting) -> SpanScaledOptimizer:
    """Return AdamW around a model, wrapped."""
    adamw = torch.optim.AdamW(setting.model.parameters(), lr=LR)
    return SpanScaledOptimizer(adamw, setting.model, SCALES)


def arms(case: Case, compiled: bool) -> dict[str, Callable[[], None]]:
    """Return a training step of a model, plain and wrapped."""
    settings = {name: build(case) for name in ("plain", "wrapped")}
    optimizers: dict[str, Any] = {
        "plain": torch.optim.AdamW(settings["plain"].model.parameters(), lr=LR),
        "wrapped": wrapped(settings["wrapped"]),
    }
    if compiled:
        for setting in settings.values():
            setting.model.compile()
    return {name: training_step(settings[name], optimizers[name]) for name in settings}


def step_flops(case: Case) -> int:
    """Count the floating-point operations of a plain training step, the optimizer's left out."""
    setting = build(case)
    with FlopCounterMode(display=False) as counter:
        setting.loss().backward()
    return counter.get_total_flops()


def measure(case: Case, compiled: bool, rounds: int) -> dict[str, Any]:
    """Measure one model.

    Args:
        case: The model.
        compiled: Whether it is compiled.
        rounds: Pairs of steps.

    Returns:
        ``ms`` of a plain step (the median); first quartile, median and third quartile of the
        ``ratio``; the ratio that counting operations gives, ``least`` at 6 N d^2 a head and
        ``bound`` at the 10 N d^2 that are computed; and the ``target``.
    """
    times = in_turns(arms(case, compiled), rounds)
    flops = step_flops(case)
    return {
        "case": case.name,
        "compiled": compiled,
        "length": case.length,
        "ms": 1e3 * quartiles(times["plain"])[1],
        "ratio": quartiles(times["wrapped"] / times["plain"]),
        "least": 1 + case.projection_flops(6) / flops,
        "bound": 1 + case.projection_flops(10) / flops,
        "target": case.target,
    }


def show_profile(case: Case) -> None:
    """Print the operations that take the most time, for a plain and for a wrapped step."""
    for name, step in arms(case, compiled=False).items():
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(10):
                step()
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15)
        print(f"{case.name}, {name}, 10 steps\n{table}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_cases(parser)
    parser.add_argument("--compile", action="store_true", help="compile both models")
    parser.add_argument("--profile", action="store_true", help="print a profile in place of times")
    add_options(parser, rounds=15)
    options = parser.parse_args(argv)
    cases = chosen(parser, options.cases)
    start(options)
    if options.profile:
        for case in cases:
            show_profile(case)
        return
    rows = []
    for case in cases:
        # Small steps are short and noisy, and there can be more of them.
        rounds = options.rounds * (10 if case.width < 256 else 1)
        row = measure(case, options.compile, rounds)
        low, middle, high = row["ratio"]
        print(
            f"{case.name:16s} plain {row['ms']:8.1f} ms, wrapped / plain {middle:.3f} "
            f"(quartiles {low:.3f} to {high:.3f}), by flops {row['least']:.3f} at least, "
            f"{row['bound']:.3f} as computed, target {row['target']:.2f}",
            flush=True,
        )
        rows.append(row)
    write(options, rows)


if __name__ == "__main__":
    main()
