"""What focus costs: forward and backward of attention to chosen keys, beside PyTorch's attention.

The two take turns, and what is shown is the median of the ratios of neighbours, with quartiles.
Memory is the growth of the resident set at its peak, of a process that makes one such call.

    python benchmarks/focus_cost.py --rounds 11 --out benchmarks/results/speed/focus.json
    python benchmarks/focus_cost.py --keys 8 --lengths 1024 4096 --memory \\
        --out benchmarks/results/speed/focus-memory.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from speed.measure import add_options, in_turns, quartiles, start, three, write
from torch.nn import functional as F

from spanopt.compare.drawing import markdown
from spanopt.focus import KINDS, focused_attention
from spanopt.focus.spec import Keeping

HEADS, WIDTH = 8, 64
SPEED = Path(__file__).parent / "results" / "speed"


def calls(length: int, keeping: Keeping, causal: bool) -> dict[str, Callable[[], None]]:
    """Return one forward and backward pass of plain attention and of focus, on the same input."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, WIDTH, requires_grad=True) for _ in range(3))
    given = torch.randn(1, HEADS, length, WIDTH)

    def plain() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.autograd.grad(out, (q, k, v), given)

    def focused() -> None:
        out = focused_attention(q, k, v, keeping, is_causal=causal)
        torch.autograd.grad(out, (q, k, v), given)

    def by_hand() -> None:
        scores = q @ k.mT * WIDTH**-0.5
        if causal:
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        torch.autograd.grad(scores.softmax(-1) @ v, (q, k, v), given)

    return {"plain": plain, "focused": focused, "by hand": by_hand}


def peak_of(name: str, length: int, keeping: Keeping) -> float:
    """Return by how many MB one call raises the peak of a fresh process."""
    code = (
        "import sys; sys.argv[:] = ['focus_cost']; import focus_cost as c; "
        f"print(c.grown({name!r}, {length}, {keeping.kind!r}, {keeping.k}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def grown(name: str, length: int, kind: str, k: int) -> float:
    """Make a small call, and then one whose growth of the resident set is returned, in MB."""
    for first in (128, length):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        calls(first, Keeping(kind, k), causal=False)[name]()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def time_table() -> str:
    """Return the table of times in the results."""
    rows: dict[str, list[str]] = {}
    for row in json.loads((SPEED / "focus.json").read_text(encoding="utf-8"))["rows"]:
        of_case = rows.setdefault(f"{row['length']:,}, {row['kind']} {row['k']}", ["", ""])
        of_case[row["causal"]] = three(row["focused"], 1)
    return markdown(["tokens, keys", "full", "causal"], [[name, *x] for name, x in rows.items()])


def memory_table() -> str:
    """Return the table of memory in the results."""
    head = ["tokens", "PyTorch's kernel", "focus", "attention written out by hand"]
    rows = [
        [f"{row['length']:,}", *(f"{row[x]:,.0f} MB" for x in ("plain", "focused", "by hand"))]
        for row in json.loads((SPEED / "focus-memory.json").read_text(encoding="utf-8"))["rows"]
    ]
    return markdown(head, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["top"])
    parser.add_argument("--keys", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--memory", action="store_true", help="measure memory, not time")
    add_options(parser, rounds=15)
    options = parser.parse_args(argv)
    start(options)
    rows = []
    for length in options.lengths:
        for kind in options.kinds:
            for k in options.keys:
                for causal in (False,) if options.memory else (False, True):
                    keeping = Keeping(kind, k)
                    row = {"length": length, "kind": kind, "k": k, "causal": causal}
                    name = f"N = {length}, {kind} {k}{', causal' if causal else ''}"
                    if options.memory:
                        for arm in ("plain", "focused", "by hand"):
                            row[arm] = peak_of(arm, length, keeping)
                        print(name, *(f"{arm} {row[arm]:.1f} MB" for arm in list(row)[4:]))
                    else:
                        times = in_turns(calls(length, keeping, causal), options.rounds)
                        for arm in ("focused", "by hand"):
                            row[arm] = quartiles(times[arm] / times["plain"])
                        low, middle, high = row["focused"]
                        ms = 1e3 * quartiles(times["plain"])[1]
                        print(
                            f"{name}: plain {ms:.0f} ms, focus {middle:.2f} ({low:.2f} to "
                            f"{high:.2f}) times, by hand {row['by hand'][1]:.2f} times",
                            flush=True,
                        )
                    rows.append(row)
    write(options, rows)


if __name__ == "__main__":
    main()
