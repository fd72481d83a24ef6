"""How the time that span scaling adds grows with layers, heads and tokens.

A wrapped and a plain training step take turns; what is shown is the median of their differences,
and that for each layer, head and 1,000 tokens, which does not rise where growth is linear.

    python benchmarks/growth.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from speed.arms import steps
from speed.cases import Case
from speed.measure import add_options, in_turns, quartiles, start, write

BASE = Case("base", "decoder", width=256, heads=4, length=256, batch=2, layers=4)
SWEEPS = {
    "layers": [replace(BASE, layers=n) for n in (2, 4, 8, 16, 32, 48)],
    "heads": [replace(BASE, heads=n, width=64 * n) for n in (1, 2, 4, 8, 16)],
    "tokens": [replace(BASE, length=n, batch=1) for n in (128, 256, 512, 1024, 2048)],
}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Measure one model.

    Args:
        case: The model.
        rounds: Pairs of steps.

    Returns:
        ``ms`` of a plain step, ``added`` milliseconds (the median of the paired differences), and
        ``each``, the quartiles of the microseconds that are added for each layer, head and 1,000
        tokens.
    """
    times = in_turns(steps(case), rounds)
    added = times["wrapped"] - times["plain"]
    units = case.layers * case.heads * case.batch * case.length / 1000
    return {
        "layers": case.layers,
        "heads": case.heads,
        "tokens": case.batch * case.length,
        "ms": 1e3 * quartiles(times["plain"])[1],
        "added": 1e3 * quartiles(added)[1],
        "each": [1e6 * x / units for x in quartiles(added)],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sweeps", nargs="*", choices=[*SWEEPS, []], metavar="SWEEP")
    add_options(parser, rounds=25)
    options = parser.parse_args(argv)
    start(options)
    rows = []
    for sweep in options.sweeps or SWEEPS:
        for case in SWEEPS[sweep]:
            row = {"sweep": sweep, **measure(case, options.rounds)}
            low, middle, high = row["each"]
            print(
                f"{sweep:7s} {row['layers']:3d} layers, {row['heads']:2d} heads, "
                f"{row['tokens']:5d} tokens: plain {row['ms']:7.1f} ms, added {row['added']:6.2f} "
                f"ms, {middle:.0f} us ({low:.0f} to {high:.0f}) a layer, head and 1,000 tokens",
                flush=True,
            )
            rows.append(row)
    write(options, rows)


if __name__ == "__main__":
    main()
