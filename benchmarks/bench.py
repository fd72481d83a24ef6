"""All benchmarks of time, memory and growth, and the page that shows them.

    python benchmarks/bench.py run --quick      # the main part, in minutes; results are printed
    python benchmarks/bench.py run              # all of it, into benchmarks/results/speed
    python benchmarks/bench.py report           # docs/performance.md from the results

Each benchmark is a script of its own and runs in a process of its own. Nothing else should be
running.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.placeholders import filled
from harness.shades import save_both
from matplotlib import rcParams
from matplotlib.figure import Figure
from speed.cases import CASES
from speed.measure import three

from spanopt.compare.drawing import COLOURS, markdown

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed"
GPU_RESULTS = HERE / "results" / "gpu"
TEMPLATE = HERE / "performance.in.md"
DOCS = HERE.parent / "docs"
PLACEHOLDER = re.compile(r"\[\[(\w+)(?: \| ([^\]]+))?\]\]")

# Of each result: the script, its arguments, and those of the quick run if it is a part of that.
RUNS: dict[str, tuple[str, list[str], list[str] | None]] = {
    "overhead": ("overhead.py", [], ["decoder N=512", "demo", "--rounds", "9"]),
    "compiled": ("overhead.py", ["--compile"], ["demo", "--compile", "--rounds", "9"]),
    "memory": ("memory.py", ["--rounds", "3"], ["decoder N=512", "demo", "--rounds", "3"]),
    "deep": ("memory.py", ["ViT-B/16", "padded encoder", "--layers", "12", "--rounds", "3"], None),
    "kernel": ("kernel.py", [], ["--shapes", "1", "--rounds", "3"]),
    "dispatch": ("dispatch.py", [], ["--rounds", "100"]),
    "growth": ("growth.py", [], None),
    "peers": ("peers.py", [], ["demo", "--rounds", "9"]),
    "accuracy": ("accuracy.py", [], ["--seeds", "3"]),
}


def run(names: Sequence[str], *, quick: bool) -> None:
    """Run benchmarks one after the other, and keep the results unless it is the quick run."""
    for name in names or RUNS:
        script, full, short = RUNS[name]
        arguments = short if quick else [*full, "--out", str(RESULTS / f"{name}.json")]
        if arguments is not None:
            print(f"\n{name}", flush=True)
            subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


def mebibytes(count: float) -> str:
    """Return a number of bytes in MiB."""
    return f"{count / 2**20:,.1f}"


def _cell(value: Any) -> str:
    """Return a value of a result as a table shows it."""
    if isinstance(value, list):
        return three(value)
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


class Page:
    """Fills results into a text.

    Placeholders are ``[[NAME]]`` for a table or a figure, and ``[[ratio | CASE]]``,
    ``[[compiled_ratio | CASE]]``, ``[[computed | CASE]]`` and ``[[conditions | RESULT]]`` inside a
    sentence.

    Args:
        folder: Where the results are.
        gpus: Where those of GPUs are, one file for each card.

    Raises:
        ValueError: A placeholder that names nothing.
    """

    def __init__(self, folder: Path = RESULTS, gpus: Path = GPU_RESULTS) -> None:
        self.gpus = [json.loads(x.read_text(encoding="utf-8")) for x in sorted(gpus.glob("*.json"))]
        self.results = {
            name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in RUNS
        }

    def fill(self, template: str) -> str:
        """Return the text with its placeholders filled in."""

        def value(match: re.Match[str]) -> str:
            function = getattr(self, match[1], None)
            if function is None:
                raise ValueError(f"{match[0]} names nothing")
            return str(function(match[2]) if match[2] else function())

        return filled(template, PLACEHOLDER, value)

    def rows(self, name: str) -> Any:
        """Return the rows of a result."""
        return self.results[name]["rows"]

    def conditions(self, name: str) -> str:
        """Return what a result was measured with."""
        result = self.results[name]
        threads = "one thread" if result["threads"] == 1 else f"{result['threads']} threads"
        rounds = f", {result['rounds']} rounds" if result["rounds"] else ""
        date = f", {result['date']}" if "date" in result else ""
        return f"torch {result['torch']}, {result['cpu']}, {threads}{rounds}{date}"

    def case(self, name: str, case: str) -> dict[str, Any]:
        """Return the row of a case."""
        found = [row for row in self.rows(name) if row["case"] == case]
        if not found:
            raise ValueError(f"the results of {name} have no case {case!r}")
        return found[0]

    def ratio(self, case: str) -> str:
        """Return the ratio of a case, not compiled."""
        return three(self.case("overhead", case)["ratio"])

    def computed(self, case: str) -> str:
        """Return the ratio of a case by operations, as computed."""
        return f"{self.case('overhead', case)['computed']:.2f}"

    def compiled_ratio(self, case: str) -> str:
        """Return the ratio of a case, compiled."""
        return three(self.case("compiled", case)["ratio"])

    def targets(self) -> str:
        """Return the table of limits, targets and what was measured, for both ways to run."""
        rows = []
        for name, how in (("overhead", "eager"), ("compiled", "compiled")):
            for row in self.rows(name):
                target = CASES[row["case"]].target_of(compiled=how == "compiled")
                cells = [f"{row['computed']:.3f}", f"{target:.3f}", f"{row['ratio'][1]:.3f}"]
                when = row.get("date", "before")
                rows.append([row["case"], how, *cells, f"{row['noise'][1]:.3f}", when])
        head = ["model", "", "limit", "target", "measured", "noise", "when"]
        return markdown(head, rows)

    def overhead(self) -> str:
        """Return the table of step times."""
        rows = []
        for name, how in (("overhead", "eager"), ("compiled", "compiled")):
            for row in self.rows(name):
                cells = [f"{row['ms']:,.0f} ms", three(row["ratio"]), three(row["noise"])]
                cells.append(f"{row['one_solve']:.3f}, {row['computed']:.3f}")
                rows.append([row["case"], how, *cells, row.get("cpu", self.results[name]["cpu"])])
        head = ["model", "", "plain step", "wrapped / plain", "noise", "by operations", "CPU"]
        return markdown(head, rows)

    def gpu(self) -> str:
        """Return the tables of GPUs, or a sentence that says that there are none."""
        if not self.gpus:
            return (
                "No figure from a GPU is here so far. `make bench-gpu` measures them on yours, in "
                "at most 8 minutes."
            )
        parts = []
        for card in self.gpus:
            head = list(card["rows"][0])
            rows = [[_cell(row[name]) for name in head] for row in card["rows"]]
            conditions = f"torch {card['torch']}, {card['date']}."
            conditions += "".join(f" Left out: {text}." for text in card.get("left_out", ()))
            parts += [f"### {card['card']}", conditions, markdown(head, rows)]
        return "\n\n".join(parts)

    def memory(self) -> str:
        """Return the table of memory, of all models and of some with all their layers."""
        rows = []
        for row in [*self.rows("memory"), *self.rows("deep")]:
            cells = [row["case"], str(row["layers"])]
            for name in ("saved", "left"):
                plain, wrapped = row[name]
                cells += [mebibytes(plain), f"{wrapped / plain:.4f}"]
            rows.append([*cells, mebibytes(row["peak"][0]), three(row["ratio"], 4)])
        sizes = [x for name in ("saved", "left", "peak") for x in (f"{name}, MiB", "ratio")]
        return markdown(["model", "layers", *sizes], rows)

    def kernel(self) -> str:
        """Return the table of ways to the projection."""
        rows = []
        for row in self.rows("kernel")["ways"]:
            cells = [", ".join(map(str, row["shape"])), row["dtype"], f"{row['ms']:.1f} ms"]
            cells += [three(ratio, 2) for ratio in row["ratios"].values()]
            rows.append([*cells, f"{100 * row['peak']:.0f} %"])
        names = [f"{name} / rescale" for name in self.rows("kernel")["ways"][0]["ratios"]]
        return markdown(
            ["sequences, heads, N, d", "dtype", "rescale", *names, "share of peak"],
            rows,
        )

    def setups(self) -> str:
        """Return the table of projection setups."""
        rows = [[name, three(ratio, 2)] for name, ratio in self.rows("kernel")["setups"].items()]
        return markdown(["setup", "time / that of span"], rows)

    def dispatch(self) -> str:
        """Return the table of what the wrapper itself costs."""
        own = self.rows("dispatch")["own"]["percent"]
        return markdown(
            ["part", "% of a plain step"], [[name, three(x, 2)] for name, x in own.items()]
        )

    def attaching(self) -> str:
        """Return how long attaching takes, in a sentence's words."""
        row = self.rows("dispatch")["attaching"]
        return (
            f"{row['modules']:,} modules, {row['layers']} of them attention layers, "
            f"{three(row['seconds'], 2)} s"
        )

    def growth(self, sweep: str) -> str:
        """Return the table of one sweep."""
        rows = [
            [
                str(row["layers"]),
                str(row["heads"]),
                f"{row['tokens']:,}",
                f"{row['ms']:.1f} ms",
                f"{row['added']:.2f} ms",
                three(row["each"], 0),
            ]
            for row in self.rows("growth")
            if row["sweep"] == sweep
        ]
        each = "added for each layer, head and 1,000 tokens, µs"
        return markdown(["layers", "heads", "tokens", "plain step", "added", each], rows)

    def peers(self) -> str:
        """Return the table of other wrappers and optimizers."""
        rows = [
            [
                row["case"],
                row["peer"],
                f"{row['ms']:,.1f} ms",
                three(row["ratio"]),
                f"{row['state']:.2f}",
            ]
            for row in self.rows("peers")
        ]
        head = ["model", "optimizer", "step", "/ AdamW's", "state / parameters"]
        return markdown(head, rows)

    def accuracy(self) -> str:
        """Return the table of errors by condition number."""
        head, *rows = self.rows("accuracy")
        return markdown(head, rows)


def ratio_by_length(page: Page) -> Figure:
    """Draw the ratio of a wrapped step to a plain one over the length of sequences."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes, ink = figure.subplots(), rcParams["axes.edgecolor"]
    for name, label, colour in (
        ("overhead", "eager", COLOURS[0]),
        ("compiled", "compiled", COLOURS[1]),
    ):
        rows = [row for row in page.rows(name) if row["case"].startswith("decoder N=")]
        lengths = [row["length"] for row in rows]
        low, middle, high = zip(*(row["ratio"] for row in rows), strict=True)
        axes.plot(lengths, middle, marker="o", color=colour, label=label)
        axes.fill_between(lengths, low, high, color=colour, alpha=0.2)
    axes.plot(
        lengths,
        [row["computed"] for row in rows],
        color=ink,
        linestyle=":",
        label="operations, as computed",
    )
    axes.plot(
        lengths,
        [row["one_solve"] for row in rows],
        color=ink,
        linestyle="--",
        label="operations, one solve",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set(xlabel="tokens N in a sequence (2,048 in a batch)", ylabel="wrapped / plain step")
    axes.axhline(1, color=ink, linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=4)
    axes.grid(alpha=0.3)
    return figure


FIGURES: dict[str, Callable[[Page], Figure]] = {"performance": ratio_by_length}


def write_report(docs: Path = DOCS) -> None:
    """Write the page and its picture."""
    page = Page()
    text = page.fill(TEMPLATE.read_text(encoding="utf-8"))
    (docs / "performance.md").write_text(text, encoding="utf-8")
    for name, draw in FIGURES.items():
        save_both(functools.partial(draw, page), docs / f"{name}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="run benchmarks")
    command.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}")
    command.add_argument("--quick", action="store_true", help="the main part, in minutes")
    commands.add_parser("report", help="write docs/performance.md and its picture")
    args = parser.parse_args(argv)
    if args.command == "report":
        write_report()
        return 0
    unknown = [name for name in args.names if name not in RUNS]
    if unknown:
        parser.error(f"no benchmark is named {unknown[0]!r}, only {', '.join(RUNS)}")
    try:
        run(args.names, quick=args.quick)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
