"""Verify models of the registry: ``python run.py TYPE:ATTENTION ...``.

Prints one line of JSON for each. Each has 30 s of processor time. ``python run.py --page FILE``
verifies all of them in several processes and writes the page. It keeps the rows it has in
``--rows FILE``: with ``--resume`` an interrupted run goes on from there, ``--again OUTCOME``
verifies once more what had that outcome, and ``--only-page`` writes the page of what there is.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
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
    """Yield the rows of the cases as they come; one that ended the process is "crashed"."""
    left = list(cases)
    while left:
        command = [sys.executable, __file__, *left]
        with tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=errors) as run:
                for line in run.stdout:
                    left.pop(0)
                    yield json.loads(line)
            errors.seek(0)
            said = errors.read()[-300:]
        if left:
            name, attention = left.pop(0).rsplit(":", 1)
            why = f"exit status {run.returncode}: {said}"
            yield {"type": name, "attention": attention, "outcome": "crashed", "why": why}


def every_case():
    """Return all cases; both ways of attention of a model are in one process."""
    from verifying import every_type

    return [f"{name}:{attention}" for name in every_type() for attention in ("sdpa", "eager")]


def versions():
    return {name: metadata.version(name) for name in ("torch", "transformers")}


def kept_rows(path, again):
    """Return the rows of an interrupted run, without those of the outcomes to verify again."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
    header, *rows = map(json.loads, whole.splitlines() or ["{}"])
    if header != versions():
        sys.exit(f"{path} is of {header}, and here are {versions()}: leave --resume out")
    return [row for row in rows if row["outcome"] not in again]


def verify_all(path, kept, workers):
    """Verify what is not among the rows that are kept, adding each row to the file; return all."""
    rows, every = list(kept), every_case()
    done = {f"{row['type']}:{row['attention']}" for row in rows}
    cases = [case for case in every if case not in done]
    chunks = [cases[i : i + CHUNK] for i in range(0, len(cases), CHUNK)]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")  # no moment in which rows are lost
    beside.write_text("".join(json.dumps(line) + "\n" for line in (versions(), *rows)))
    beside.replace(path)
    lock = threading.Lock()
    with path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(workers) as pool:

        def verify_chunk(chunk):
            for row in verify_in_a_process(chunk):
                with lock:
                    print(json.dumps(row), file=file, flush=True)
                    rows.append(row)
                    if len(rows) % CHUNK == 0:
                        print(f"{len(rows)} of {len(every)}", file=sys.stderr, flush=True)

        list(pool.map(verify_chunk, chunks))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="TYPE:ATTENTION")
    parser.add_argument("--page", type=Path, help="verify all models and write this page")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=Path, default=Path("runs/registry.jsonl"))
    parser.add_argument("--resume", action="store_true", help="keep the rows of that file")
    parser.add_argument("--again", nargs="+", default=[], metavar="OUTCOME")
    parser.add_argument("--only-page", action="store_true", help="of the rows in that file")
    given = parser.parse_args()
    if given.page is None:
        return verify_here(given.cases)
    from page import page

    keep = given.resume or given.again or given.only_page
    kept = kept_rows(given.rows, given.again) if keep else []
    rows = kept if given.only_page else verify_all(given.rows, kept, given.workers)
    given.page.write_text(page(rows, len(every_case())), encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
