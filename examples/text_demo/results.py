"""What came out: the table, the picture, and a sentence that says what they show."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from text_demo.resuming import ARMS, Record, Run, write_atomically

__all__ = ["read_result", "report"]


def read_result(plain: Sequence[float], span: Sequence[float]) -> str:
    """Say in one line what the final validation losses, one pair a seed, do and do not show."""
    seeds = len(plain)
    diverged = [
        f"{name} diverged in {count} of {seeds} seeds"
        for name, losses in (("plain training", plain), ("span-scaled training", span))
        if (count := sum(not math.isfinite(loss) for loss in losses))
    ]
    if diverged:
        return f"No comparison: {' and '.join(diverged)} (loss not finite); try a lower --lr."
    changes = percent_changes(plain, span)
    mean = statistics.fmean(changes)
    if seeds == 1:
        return (
            f"Span scaling changed the validation loss by {mean:+.2f} % in the only seed: "
            "one seed says nothing about spread, so no conclusion."
        )
    if max(map(abs, changes)) < 0.005:
        return f"No difference: in all {seeds} seeds both arms end within 0.005 % of each other."
    spread = statistics.stdev(changes)
    figures = f"mean {mean:+.2f} %, standard deviation over {seeds} seeds {spread:.2f} %"
    if abs(mean) < spread:
        return f"The difference is inside the seeds' spread ({figures}): no conclusion."
    if min(changes) <= 0 <= max(changes):
        return f"The seeds do not agree on the sign of the change ({figures}): no conclusion."
    verb = "lowered" if mean < 0 else "raised"
    return (
        f"Span scaling {verb} the validation loss in all {seeds} seeds ({figures}); "
        f"by chance alone all would agree 1 time in {2 ** (seeds - 1)}."
    )


def percent_changes(plain: Sequence[float], span: Sequence[float]) -> list[float]:
    """Return the change from plain to span-scaled of each pair, in per cent."""
    return [100 * (b / a - 1) for a, b in zip(plain, span, strict=True)]


def ratio_quartiles(records: Sequence[Record]) -> list[float]:
    """Return the quartiles of the step times' ratio, span-scaled to plain, over paired steps."""
    pairs = [zip(r.seconds["plain"], r.seconds["span"], strict=True) for r in records]
    ratios = [span / plain for pair in pairs for plain, span in pair]
    return np.percentile(ratios, [25, 50, 75]).tolist() if ratios else [math.nan] * 3


def summary(run: Run) -> dict[str, Any]:
    """Gather the results; the losses are exact."""
    plain, span = ([r.losses[name][-1] for r in run.records] for name in ARMS)
    changes = percent_changes(plain, span)
    rows = [
        {
            "seed": seed,
            "plain": plain[seed],
            "span": span[seed],
            "change_percent": changes[seed],
            "step_time_ratio": ratio_quartiles([record])[1],
            "curves": {"steps": record.steps, **record.losses},
        }
        for seed, record in enumerate(run.records)
    ]
    low, median, high = ratio_quartiles(run.records)
    return {
        "config": run.identity(),
        "seeds": rows,
        "mean_change_percent": statistics.fmean(changes),
        "step_time_ratio": {"median": median, "quartiles": [low, high]},
        "reading": read_result(plain, span),
    }


def result_table(results: dict[str, Any]) -> Table:
    """Lay the results out, one row a seed."""
    config = results["config"]
    table = Table(
        title=f"Validation loss (nats per character) after {config['steps']} steps of "
        f"{config['optimizer']}\nparallel {config['parallel']:g}, "
        f"violation {config['violation']:g}"
    )
    for column in ("seed", "plain", "span-scaled", "change", "step time ratio"):
        table.add_column(column, justify="right")
    for row in results["seeds"]:
        losses = (f"{row['plain']:.4f}", f"{row['span']:.4f}")
        change, ratio = f"{row['change_percent']:+.2f} %", f"{row['step_time_ratio']:.3f}"
        table.add_row(str(row["seed"]), *losses, change, ratio)
    table.add_section()
    time_ratio = results["step_time_ratio"]
    low, high = time_ratio["quartiles"]
    ratio = f"{time_ratio['median']:.3f} ({low:.3f} to {high:.3f})"
    table.add_row("mean", "", "", f"{results['mean_change_percent']:+.2f} %", ratio)
    table.caption = "step time ratio: span-scaled to plain, median of paired steps (quartiles)"
    return table


def plot(records: Sequence[Record]) -> bytes:
    """Draw the validation curves of both arms, and their difference, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 12, "axes.grid": True, "grid.alpha": 0.3})
    figure, (top, bottom) = plt.subplots(
        2, figsize=(8, 6.5), dpi=150, sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    steps = records[0].steps
    curves = {name: np.array([record.losses[name] for record in records]) for name in ARMS}
    change = 100 * (curves["span"] / curves["plain"] - 1)
    lines = [
        (top, curves["plain"], "#4477AA", "-", "plain"),
        (top, curves["span"], "#EE6677", "--", "span-scaled"),
        (bottom, change, "#228833", "-", "span-scaled against plain"),
    ]
    for axes, values, color, style, label in lines:
        axes.plot(steps, values.T, color=color, linestyle=style, linewidth=0.8, alpha=0.5)
        mean = f"{label}, mean of {len(records)} seeds" if len(records) > 1 else label
        axes.plot(steps, values.mean(0), color=color, linestyle=style, linewidth=2, label=mean)
        axes.legend(loc="best")
    bottom.axhline(0, color="black", linewidth=0.8)
    top.set_ylabel("validation loss\n(nats per character)")
    bottom.set_ylabel("change (%)")
    bottom.set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def report(run: Run, console: Console) -> None:
    """Write results.json and curves.png; print the table and its reading."""
    results = summary(run)
    # JSON has no NaN: a loss that is not finite becomes null
    exact = json.loads(json.dumps(results), parse_constant=lambda _: None)
    write_atomically(run.out / "curves.png", plot(run.records))
    write_atomically(run.out / "results.json", json.dumps(exact, indent=1).encode())
    console.print(result_table(results))
    console.print(results["reading"], highlight=False, soft_wrap=True)
    written = f"Written: {run.out / 'results.json'}, {run.out / 'curves.png'}"
    console.print(written, highlight=False, soft_wrap=True)
