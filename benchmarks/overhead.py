"""Time of a whole training step with span scaling, as a ratio to the same step without it.

Each model is trained by AdamW, once plain and once wrapped. The two take turns in one process, step
by step, and the ratio is that of neighbours, so a machine that is slow for a while is slow for
both. Beside it stand the same ratio of a second plain model, which is noise, and what counting
floating-point operations gives.

    python benchmarks/overhead.py                          # every model, not compiled
    python benchmarks/overhead.py "decoder N=512" --compile
    python benchmarks/overhead.py demo --profile           # where the time goes
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from speed.arms import steps
from speed.cases import Case, add_cases, build, chosen
from speed.measure import add_options, conditions, in_turns, quartiles, start, write
from torch.profiler import ProfilerActivity, profile


def measure(case: Case, compiled: bool, rounds: int) -> dict[str, Any]:
    """Measure one model.

    Args:
        case: The model.
        compiled: Whether it is compiled.
        rounds: How often each takes a step.

    Returns:
        ``ms`` of a plain step (the median); first quartile, median and third quartile of the
        ``ratio`` and of the ``noise``, the ratio of a second plain model; the ratios that counting
        operations gives, with ``one_solve`` and as ``computed``; the ``target``; and when and on
        what it was measured.
    """
    torch.compiler.reset()  # the code of one case is no good for the next one's shapes
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        times = in_turns(steps(case, compiled=compiled), rounds)
    weights = sum(p.numel() for p in build(case).model.parameters() if p.ndim == 2)
    flops = case.step_flops(weights)
    return {
        "case": case.name,
        "compiled": compiled,
        "length": case.length,
        "rounds": rounds,
        "ms": 1e3 * quartiles(times["plain"])[1],
        "ratio": quartiles(times["wrapped"] / times["plain"]),
        "noise": quartiles(times["again"] / times["plain"]),
        "one_solve": 1 + case.projection_flops(one_solve=True) / flops,
        "computed": 1 + case.projection_flops(one_solve=False) / flops,
        "target": case.target_of(compiled=compiled),
        **conditions(),
    }


def show_profile(case: Case) -> None:
    """Print the operations that take the most time, for a plain and for a wrapped step."""
    for name, step in steps(case).items():
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
    add_options(parser, rounds=11)
    options = parser.parse_args(argv)
    cases = chosen(parser, options.cases)
    start(options)
    if options.profile:
        for case in cases:
            show_profile(case)
        return
    rows = []
    for case in cases:
        rounds = options.rounds * (10 if case.small else 1)
        row = measure(case, options.compile, rounds)
        low, middle, high = row["ratio"]
        print(
            f"{case.name:16s} plain {row['ms']:8.1f} ms, wrapped / plain {middle:.3f} "
            f"(quartiles {low:.3f} to {high:.3f}), noise {row['noise'][1]:.3f}, by flops "
            f"{row['computed']:.3f}, target {row['target']:.3f}",
            flush=True,
        )
        rows.append(row)
    write(options, rows)


if __name__ == "__main__":
    main()
