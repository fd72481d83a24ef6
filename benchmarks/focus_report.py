"""docs/focus.md from the results: tables, numbers and a figure, filled into a text.

python benchmarks/focus_report.py
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from focus_cost import memory_table, time_table
from focus_study import MEASURED_SEEDS, RESULTS, STUDIES, Study, measures
from focus_training import ACCURACY, STEPS
from harness.placeholders import filled
from harness.shades import save_both
from matplotlib import rcParams
from matplotlib.figure import Figure

from spanopt.compare.arms import PLAIN
from spanopt.compare.drawing import COLOURS, markdown
from spanopt.compare.statistics import Change, compared
from spanopt.compare.store import Store

__all__ = ["Outcome", "Report", "write_page"]

TEMPLATE = Path(__file__).parent / "focus.in.md"
DOCS = Path(__file__).parent.parent / "docs"
FIGURE = "focus-steps.png"
FULL = "full attention"
_PLACEHOLDER = re.compile(r"\[\[([\w-]+)(?: ([\w-]+)(?: \| ([^\]]+))?)?\]\]")


class Outcome:
    """What was measured for one arm of a study, on the seeds that have been run.

    Attributes:
        lr: The learning rate that was chosen for the arm.
        metrics: What each run returned, by seed.
        change: The change of the study's metric against full attention, on the seeds of both.
    """

    def __init__(self, lr: float, metrics: Mapping[int, Mapping[str, Any]], change: Change) -> None:
        self.lr, self.metrics, self.change = lr, metrics, change

    def values(self, name: str) -> list[float]:
        """Return a number of each run."""
        return [row[name] for row in self.metrics.values()]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the steps; a censored run has the cap."""
        low, middle, high = statistics.quantiles(self.values(STEPS), n=4, method="inclusive")
        return low, middle, high

    @property
    def censored(self) -> int:
        """The number of runs that did not reach 95 %."""
        return sum(reached < 0.5 for reached in self.values("reached"))


def outcomes(study: Study, store: Store) -> dict[str, Outcome]:
    """Return the outcome of each arm that has been run on two seeds or more, plain ones first."""
    design = study.design()
    metrics: dict[str, dict[int, Mapping[str, Any]]] = {}
    for arm in design.arms:
        if not design.is_known(arm, store):
            continue
        results = {seed: design.result(arm, seed, store) for seed in study.design().seeds}
        metrics[arm] = {s: r["metrics"] for s, r in results.items() if r and r.get("metrics")}
    return _outcomes(metrics, {arm: design.best(arm, store) for arm in metrics}, study.metric)


def _outcomes(
    metrics: Mapping[str, Mapping[int, Mapping[str, Any]]], lrs: Mapping[str, Any], metric: str
) -> dict[str, Outcome]:
    found = {}
    plain = metrics.get(PLAIN, {})
    for arm, of_arm in metrics.items():
        if len(of_arm) < 2:
            continue
        both = [seed for seed in of_arm if seed in plain]
        change = compared(*([rows[s][metric] for s in both] for rows in (of_arm, plain)))
        found[arm] = Outcome(lrs[arm], of_arm, change)
    return found


def rates(study: Study, store: Store) -> str:
    """Return the table of mean steps on the seeds of tuning, by arm and rate."""
    design = study.design()
    swept = {arm: design.swept(arm, store) for arm in design.arms if design.is_known(arm, store)}
    values = sorted({lr for of_arm in swept.values() for lr in of_arm})
    rows = []
    for arm in swept:
        cells = []
        for lr in values:
            trials = [store.get(trial) for trial in design.sweep(arm, lr)]
            metrics = [trial["metrics"] for trial in trials if trial]
            reached = sum(row["reached"] > 0.5 for row in metrics)
            mean = f"{statistics.fmean(row[STEPS] for row in metrics):.0f}" if metrics else ""
            cells.append(mean if reached == len(metrics) else f"> {mean}" if reached else "-")
        rows.append([_named(arm), *cells])
    return markdown(["arm", *(f"{lr:g}" for lr in values)], rows)


def earlier(out: Path) -> dict[str, Outcome]:
    """Return what an earlier comparison measured, with 20 tokens and 5 keys; see the page."""
    losses: dict[tuple[str, float], list[float]] = {}
    for row in _lines(out / "even-pairs-tuning.jsonl"):
        of_value = losses.setdefault((row["trial"]["arm"], row["trial"]["value"]), [])
        of_value.append(row["result"]["metrics"][STEPS])
    metrics: dict[str, dict[int, dict[str, Any]]] = {}
    for row in _lines(out / "even-pairs.jsonl"):
        if not row["trial"]["again"]:
            of_arm = metrics.setdefault(row["trial"]["arm"], {})
            of_arm[row["trial"]["seed"]] = row["result"]["metrics"]
    lrs = {}
    for arm in metrics:
        tried = {lr: statistics.fmean(x) for (name, lr), x in losses.items() if name == arm}
        lrs[arm] = min(tried, key=lambda lr: tried[lr])
    return _outcomes(metrics, lrs, STEPS)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def conditions(rows: list[dict[str, Any]]) -> tuple[float, float | None]:
    """Say how often plain training meets the paper's conditions.

    Args:
        rows: Of a study's measures, a record for each seed.

    Returns:
        The share of measured layers and steps at which lambda_w and lambda_x are both below 1; and
        the median over seeds of the first step at which a layer meets both, ``None`` if half of the
        seeds have none.
    """
    met = [[max(x["lambda_w"], x["lambda_x"]) < 1 for x in row["rows"]] for row in rows]
    firsts = []
    for row, of_seed in zip(rows, met, strict=True):
        steps = [x["step"] for x, holds in zip(row["rows"], of_seed, strict=True) if holds]
        firsts.append(min(steps, default=10**9))
    share = statistics.fmean(holds for of_seed in met for holds in of_seed)
    first = statistics.median(firsts)
    return share, first if first < 10**9 else None


def _named(arm: str) -> str:
    return FULL if arm == PLAIN else f"full attention, {arm}" if arm == "(2, 1)" else arm


def _percent(change: Change) -> str:
    digits = 1 if max(abs(change.low), abs(change.high)) < 10 else 0
    mean, low, high = (f"{x:+.{digits}f}" for x in (change.mean, change.low, change.high))
    return f"{mean} % ({low} to {high})"


class Report:
    """Fills results into a text.

    Placeholders are ``[[table STUDY]]``, ``[[rates STUDY]]``, ``[[conditions]]``, ``[[missing]]``,
    ``[[cost]]``, ``[[memory]]`` and, inside a sentence, ``[[change STUDY | ARM]]``,
    ``[[between STUDY | ARM against ARM]]``, ``[[median STUDY | ARM]]``,
    ``[[censored STUDY | ARM]]``, ``[[lr STUDY | ARM]]``, ``[[seeds STUDY]]``, ``[[cap STUDY]]`` and
    ``[[measured]]``. ``earlier`` is a comparison that is no study.

    Args:
        out: The folder of results.
    """

    def __init__(self, out: Path = RESULTS) -> None:
        self.out = out
        self.found: dict[str, dict[str, Outcome]] = {}
        for study in STUDIES.values():
            if (out / study.name / "trials.jsonl").exists():
                of_study = outcomes(study, study.store(out))
                if PLAIN in of_study and len(of_study) > 1:
                    self.found[study.name] = of_study
        self.found["earlier"] = earlier(out)

    def page(self, template: str) -> str:
        """Return the text with every placeholder filled in.

        Raises:
            ValueError: A placeholder that names nothing, or that there are no results for.
        """
        return filled(template, _PLACEHOLDER, self._fill)

    def _fill(self, match: re.Match[str]) -> str:
        kind, name, arm = match.groups()
        kinds: dict[str, Callable[[], str]] = {
            "table": lambda: self.table(name),
            "conditions": self.conditions,
            "missing": self.missing,
            "rates": lambda: rates(STUDIES[name], STUDIES[name].store(self.out)),
            "cost": time_table,
            "memory": memory_table,
            "lr": lambda: f"{self.found[name][arm].lr:g}",
            "measured": lambda: str(MEASURED_SEEDS),
            "between": lambda: _percent(self.between(name, *arm.split(" against "))),
            "change": lambda: _percent(self.found[name][arm].change),
            "median": lambda: f"{self.found[name][arm].quartiles[1]:.0f}",
            "censored": lambda: str(self.found[name][arm].censored),
            "seeds": lambda: str(self.seeds(name)),
            "cap": lambda: str(STUDIES[name].cap),
        }
        if kind not in kinds:
            raise ValueError(f"no placeholder is named {kind!r}, only {', '.join(kinds)}")
        try:
            return kinds[kind]()
        except KeyError as error:
            raise ValueError(f"{match[0]}: there is no result of {error}") from error

    def between(self, name: str, arm: str, other: str) -> Change:
        """Compare two arms on the seeds of both."""
        mine, others = (self.found[name][x].metrics for x in (arm, other))
        both = [seed for seed in mine if seed in others]
        metric = STUDIES[name].metric
        return compared(*([x[seed][metric] for seed in both] for x in (mine, others)))

    def seeds(self, name: str) -> int:
        """Return the number of seeds on which every arm with a result was compared."""
        return min(outcome.change.seeds for outcome in self.found[name].values())

    def table(self, name: str) -> str:
        """Return a study's arms as a Markdown table, or that they have not been run."""
        if name in STUDIES and name not in self.found:
            return "It was not run, or not far enough to be compared."
        of_study = self.found[name]
        on_text = name in STUDIES and STUDIES[name].task == "text"
        head = ["arm", "learning rate", "loss: median" if on_text else "steps to 95 %: median"]
        head[2] += " (quartiles)"
        head += [] if on_text else ["censored", "accuracy at the end"]
        head += ["change, %", "95 % interval", "seeds"]
        rows = []
        for arm, outcome in of_study.items():
            metric = STUDIES[name].metric if name in STUDIES else STEPS
            digits = 3 if on_text else 0
            values = outcome.values(metric)
            low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
            row = [_named(arm), f"{outcome.lr:g}"]
            row.append(f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
            if not on_text:
                row.append(f"{outcome.censored} of {len(values)}")
                row.append(f"{statistics.median(outcome.values(ACCURACY)):.2f}")
            change, digits = outcome.change, 1 if on_text else 0
            row.append("" if arm == PLAIN else f"{change.mean:+.{digits}f}")
            interval = f"{change.low:+.{digits}f} to {change.high:+.{digits}f}"
            row.append("" if arm == PLAIN else interval)
            rows.append([*row, str(change.seeds)])
        return markdown(head, rows)

    def conditions(self) -> str:
        """Return the table of measures of plain training beside what focus on the top keys did."""
        rows = []
        for study in STUDIES.values():
            measured = measures(study, self.out)
            if not measured or study.name not in self.found:
                continue
            share, first = conditions(measured)
            top = self.found[study.name].get(f"top {study.keys}")
            last = [x for row in measured for x in row["rows"] if x["step"] == _last(row)]
            means = [
                f"{statistics.fmean(x[name] for x in last):.2f}"
                for name in ("lambda_w", "lambda_x")
            ]
            rows.append(
                [
                    study.name,
                    f"{100 * share:.0f} %",
                    "never" if first is None else f"{first:.0f}",
                    *means,
                    "" if top is None else _percent(top.change),
                ]
            )
        head = ["study", "conditions met", "first at step", "lambda_w at the end"]
        head += ["lambda_x at the end", "change with the top keys"]
        return markdown(head, rows)

    def missing(self) -> str:
        """Return the list of what was declared and has not been run, or not in full."""
        lines = []
        for study in STUDIES.values():
            of_study = self.found.get(study.name, {})
            absent = [arm for arm in study.design().arms if arm not in of_study]
            if PLAIN in absent or len(of_study) < 2:
                lines.append(f"- `{study.name}`: not run, or not far enough to be compared.")
                continue
            seeds = min(len(outcome.metrics) for outcome in of_study.values())
            parts = [f"{seeds} of {study.seeds} seeds"] if seeds < study.seeds else []
            parts += [f"no result of {', '.join(absent)}"] if absent else []
            if parts:
                lines.append(f"- `{study.name}`: {'; '.join(parts)}.")
        return "\n".join(lines) or "All that was declared was run."

    def figure(self) -> Figure:
        """Draw the steps of every run, by study and arm."""
        names = [n for n in self.found if n in STUDIES and STUDIES[n].task != "text"]
        names.append("earlier")
        figure = Figure(figsize=(9, 0.7 + 2.1 * len(names)), layout="constrained")
        for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
            of_study = self.found[name]
            for row, outcome in enumerate(of_study.values()):
                runs = [*zip(outcome.values(STEPS), outcome.values("reached"), strict=True)]
                for reached, marker in ((1, "o"), (0, "x")):
                    x = [steps for steps, there in runs if (there > 0.5) == reached]
                    axes.plot(x, [row] * len(x), marker, color=COLOURS[reached == 0], alpha=0.6)
                ink = rcParams["axes.edgecolor"]
                axes.plot([outcome.quartiles[1]] * 2, [row - 0.35, row + 0.35], color=ink)
            axes.set_yticks(range(len(of_study)), [_named(arm) for arm in of_study])
            axes.set_ylim(len(of_study) - 0.5, -0.5)
            axes.set_xlim(left=0)
            axes.grid(axis="x", alpha=0.3)
            axes.set_title(TITLES.get(name, name), loc="left", fontsize=10)
        axes.set_xlabel(
            "steps to 95 %: a dot for each run, a cross at the cap if it is not reached"
        )
        return figure


TITLES = {"earlier": "even-pairs, AdamW, 20 tokens and 5 keys (an earlier comparison)"}


def _last(row: Mapping[str, Any]) -> int:
    return max(x["step"] for x in row["rows"])


def write_page(out: Path = RESULTS, docs: Path = DOCS) -> None:
    """Write the page and its figure, for light and for dark pages."""
    report = Report(out)
    page = report.page(TEMPLATE.read_text(encoding="utf-8"))
    save_both(report.figure, docs / FIGURE)
    (docs / "focus.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write_page()
