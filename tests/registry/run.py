"""Verify models of the registry: ``python run.py TYPE:ATTENTION ...``.

Prints one line of JSON for each. Each has 30 s of processor time. ``python run.py --page FILE``
verifies all of them in several processes and writes the page.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

SECONDS, CHUNK = 30, 24


class TimeLimit(BaseException):
    """A model took too long."""


def late(*_):
    raise TimeLimit


def verify_here(cases):
    import torch
    import transformers
    from verifying import verify

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, late)
    for case in cases:
        name, attention = case.rsplit(":", 1)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                row = verify(name, attention)
        except TimeLimit:
            row = {"outcome": "not built", "why": f"not within {SECONDS} s of processor time"}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"type": name, "attention": attention, **row}), flush=True)


def verify_in_a_process(cases):
    """Return the rows of the cases, of which one that ended the process is "crashed"."""
    rows, left = [], list(cases)
    while left:
        command = [sys.executable, __file__, *left]
        done = subprocess.run(command, capture_output=True, text=True)
        rows += map(json.loads, done.stdout.splitlines())
        left = cases[len(rows) :]
        if left:
            name, attention = left.pop(0).rsplit(":", 1)
            why = f"exit status {done.returncode}: {done.stderr[-300:]}"
            rows.append({"type": name, "attention": attention, "outcome": "crashed", "why": why})
    return rows


def every_case():
    """Return all cases; both ways of attention of a model are in one process."""
    from verifying import every_type

    return [f"{name}:{attention}" for name in every_type() for attention in ("sdpa", "eager")]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="TYPE:ATTENTION")
    parser.add_argument("--page", type=Path, help="verify all models and write this page")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    if given.page is None:
        return verify_here(given.cases)
    from page import page

    cases = every_case()
    chunks = [cases[i : i + CHUNK] for i in range(0, len(cases), CHUNK)]
    with ThreadPoolExecutor(given.workers) as pool:
        rows = []
        for made in pool.map(verify_in_a_process, chunks):
            rows += made
            print(f"{len(rows)} of {len(cases)}", file=sys.stderr, flush=True)
    given.page.write_text(page(rows), encoding="utf-8")
    given.page.with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return None


if __name__ == "__main__":
    main()
