"""Does span scaling help? Arms trained on the same seeds, and compared.

    python benchmarks/study.py run                  # all experiments, in order; resumes
    python benchmarks/study.py run primary grid     # some of them
    python benchmarks/study.py run remaining        # a few seeds of what is left, then more
    python benchmarks/study.py list                 # what there is, and what is left to run
    python benchmarks/study.py table primary        # its comparison, as a table
    python benchmarks/study.py report               # docs/evidence.md from the results
    python benchmarks/study.py quick                # a small part, in minutes

Learning rates are chosen on seeds and on a half of the validation text that take no part in the
comparison: for each arm by itself in the first comparisons, for plain alone in most later ones.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments import EXPERIMENTS, GROUPS, QUICK
from experiments.base import FACTORS
from experiments.fixed_rates import AT_RATE, fixed_rates_in_order
from experiments.primary import CONFIRMATION, PRIMARY, SHARES
from experiments.remaining import remaining_in_order
from experiments.settings import SETTINGS
from experiments.variants import GRID, PATHS, RIVALS
from harness.experiment import Experiment
from harness.partial import drawn_by_rate
from harness.report import Report
from harness.runner import run_experiments
from harness.shades import save_both
from harness.store import Store
from harness.texts import Text
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from speed.measure import three

RESULTS = Path(__file__).parent / "results"
TEMPLATE = Path(__file__).parent / "evidence.in.md"
DOCS = Path(__file__).parent.parent / "docs"
LATER = ("rates", "long-rates", "low-rate", "low-rate-elsewhere", "search")
# What is run in parts, in an order of its own.
ORDERED: dict[str, Callable[[], Iterator[Experiment]]] = {
    "rates": fixed_rates_in_order,
    "remaining": remaining_in_order,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="say what there is, and how much of it has been run")
    for name, text in {
        "run": "run experiments; what has been run is not run again",
        "table": "print the tables of experiments that have been run",
        "quick": "run a small part from the start, and print its table",
    }.items():
        command = commands.add_parser(name, help=text)
        if name != "quick":
            command.add_argument(
                "names",
                nargs="*",
                metavar="NAME",
                help="of a group or an experiment, see list; all of them by default",
            )
        if name == "table":
            continue
        command.add_argument("--text", type=Path, metavar="FILE", help="a text to split in two")
        command.add_argument("--train-text", type=Path, metavar="FILE", help="with --valid-text")
        command.add_argument("--valid-text", type=Path, metavar="FILE")
        command.add_argument("--text-name", metavar="NAME", help="what reports call the text")
        command.add_argument("--workers", type=int, default=2, help="runs at once (%(default)s)")
    commands.add_parser("report", help="write docs/evidence.md and its pictures")
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="results")
    args = parser.parse_args(argv)
    if args.command in ("run", "quick"):
        if args.text and (args.train_text or args.valid_text):
            parser.error("--text goes without --train-text and --valid-text")
        if (args.train_text is None) != (args.valid_text is None):
            parser.error("--train-text and --valid-text go together")
        if args.workers < 1:
            parser.error("--workers must be at least 1")
    if args.command in ("run", "table"):
        known = [*GROUPS, *EXPERIMENTS, *(ORDERED if args.command == "run" else ())]
        unknown = [name for name in args.names if name not in known]
        if unknown:
            names = ", ".join(dict.fromkeys(known))
            parser.error(f"no group or experiment is named {unknown[0]!r}, only {names}")
    return args


def text_of(args: argparse.Namespace) -> Text:
    """Read the text that was asked for."""
    train = args.text or args.train_text
    if train is None:
        return Text.default()
    return Text.read(args.text_name or train.name, train, args.valid_text)


def to_run(names: Sequence[str]) -> list[Experiment]:
    """Return what to run for groups and experiments by name, parts of an experiment included."""
    found: list[Experiment] = []
    for name in names or GROUPS:
        found += ORDERED[name]() if name in ORDERED else chosen([name])
    return found


def chosen(names: Sequence[str]) -> list[Experiment]:
    """Return the experiments of groups and experiments by name."""
    found: list[Experiment] = []
    for name in names or GROUPS:
        found += GROUPS[name] if name in GROUPS else [EXPERIMENTS[name]]
    return found


def list_experiments(store: Store) -> None:
    """Print the experiments."""
    table = Table("group", "experiment", "runs", "left")
    for group, experiments in GROUPS.items():
        for experiment in experiments:
            left = len(experiment.pending(store))
            table.add_row(group, experiment.name, f"about {experiment.size()}", str(left))
    Console().print(table)


def run_quick(args: argparse.Namespace) -> None:
    """Run the small part and print its table."""
    text = text_of(args)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        run_experiments([QUICK], store, text, args.workers)
        report = Report({"quick": [QUICK]}, store)
        print(f"{text.name}, {len(QUICK.seeds)} paired seeds, 200 steps:\n")
        print(report.table(QUICK))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    args = parse(argv)
    try:
        if args.command == "quick":
            run_quick(args)
            return 0
        store = Store(args.out)
        if args.command == "list":
            list_experiments(store)
        elif args.command == "report":
            write_report(store)
        elif args.command == "table":
            report = Report(GROUPS, store)
            for experiment in chosen(args.names):
                print(f"{experiment.name}: {experiment.question}\n\n{report.table(experiment)}\n")
        else:
            text = text_of(args)
            store.check_text(text)
            run_experiments(to_run(args.names), store, text, args.workers)
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130
    return 0


def write_report(store: Store, docs: Path = DOCS) -> None:
    """Write the page and its pictures."""
    groups = GROUPS | {"remaining": [e for name in LATER for e in GROUPS[name]]}
    report = Report(groups, store, {RIVALS.name: step_times()})
    page = report.page(TEMPLATE.read_text(encoding="utf-8"))
    for name, draw in FIGURES.items():
        if f"(evidence-{name}.png)" in page:
            save_both(functools.partial(draw, report), docs / f"evidence-{name}.png")
    (docs / "evidence.md").write_text(page, encoding="utf-8")


def step_times() -> dict[str, dict[str, str]]:
    """Return the rivals' step times over plain's, as peers.py measured them, by model and arm."""
    rows = json.loads((RESULTS / "speed" / "peers.json").read_text(encoding="utf-8"))["rows"]
    times: dict[str, dict[str, str]] = {}
    for row in rows:
        arm = "(2, 1)" if row["peer"] == "span-scaled AdamW" else row["peer"]
        times.setdefault(f"step / plain's, {row['case']}", {})[arm] = three(row["ratio"])
    return times


DRAWN = ["(2, 1)", "uniform (2, 2)", "(1, 2)", "(2, 1), pooled", "plain, rate x 1.1"]
FIGURES: dict[str, Callable[[Report], Figure]] = {
    "primary": lambda report: report.forest(PRIMARY),
    "rates": lambda report: report.rates(
        PRIMARY, ["plain", "(2, 1)", "(1.5, 1)", "uniform (2, 2)", "(1, 0): span only"]
    ),
    "confirmation": lambda report: report.forest(CONFIRMATION),
    "paths": lambda report: report.forest(PATHS),
    "shares": lambda report: report.shares(SHARES),
    "grid": lambda report: report.heatmap(GRID, FACTORS),
    "fixed-rates": lambda report: drawn_by_rate(
        [*AT_RATE.values()], DRAWN, report.store, report.lr(PATHS, "plain")
    ),
    "settings": lambda report: report.forest_of_settings(SETTINGS, ["(2, 1)", "uniform (2, 2)"]),
}


if __name__ == "__main__":
    sys.exit(main())
