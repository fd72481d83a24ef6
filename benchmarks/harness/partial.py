"""Comparisons at fixed learning rates, reported as far as they have been run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure

from harness.experiment import Experiment
from spanopt.compare.drawing import COLOURS, markdown
from spanopt.compare.planning import Results
from spanopt.compare.reading import in_words
from spanopt.compare.statistics import Change, compared

__all__ = ["between", "by_arm", "by_rate", "by_setting", "drawn_by_rate", "missing", "worth"]

SMALL = 1.2  # factors of the rate up to which the gain grows with their logarithm


def losses(e: Experiment, arm: str, store: Results) -> dict[int, float | None]:
    """Return an arm's losses on the reporting split, by the seeds that have been run."""
    if arm not in e.arms:
        raise LookupError(f"{e.name} has no arm {arm!r}")
    rate = e.best(arm, store)
    if rate is None:  # it has not been chosen yet
        return {}
    found = {trial.seed: store.get(trial) for trial in e.comparison(arm, rate)}
    return {seed: result["reporting"] for seed, result in found.items() if result is not None}


def between(e: Experiment, arm: str, other: str, store: Results) -> Change:
    """Compare two arms on the seeds that both have been run on."""
    mine, others = losses(e, arm, store), losses(e, other, store)
    seeds = [seed for seed in mine if seed in others]
    return compared([mine[s] for s in seeds], [others[s] for s in seeds])


def worth(e: Experiment, arm: str, factors: Mapping[str, float], store: Results) -> list[float]:
    """Return by which factor plain training's rate would have to rise for an arm's gain.

    The gain of plain training at a higher rate is close to proportional to the logarithm of the
    factor while that is small. Its slope is fitted through the origin, to the means over seeds.

    Args:
        e: The experiment.
        arm: The arm.
        factors: The factor of each arm that is plain training at a higher rate.
        store: The results.

    Returns:
        The factor, and both ends of its 95 % interval, that of the arm's own change.

    Raises:
        LookupError: What it takes has not been run.
    """
    points = [
        (math.log(factor), between(e, name, e.baseline, store).mean)
        for name, factor in factors.items()
        if factor <= SMALL
    ]
    change = between(e, arm, e.baseline, store)
    if math.isnan(change.mean) or any(math.isnan(gain) for _, gain in points):
        raise LookupError(f"{arm!r} and the rates that it is held against have not been run")
    slope = math.fsum(x * y for x, y in points) / math.fsum(x * x for x, _ in points)
    ends = [math.exp(value / slope) for value in (change.mean, change.low, change.high)]
    return [ends[0], *sorted(ends[1:])]


def by_rate(experiments: Sequence[Experiment], store: Results, fewest: int = 3) -> str:
    """Return the change of each arm at each rate as a Markdown table, with the number of seeds.

    Args:
        experiments: One at each rate.
        store: The results.
        fewest: With fewer pairs of seeds than this, a cell stays empty.
    """
    arms = [*dict.fromkeys(arm for e in experiments for arm in e.arms if arm != e.baseline)]
    rows = []
    for arm in arms:
        cells = [cell(e, arm, store, fewest) for e in experiments]
        if any(cells):
            rows.append([arm, *cells])
    return markdown(["arm", *(f"at {e.lrs[0]:g}" for e in experiments)], rows)


def by_arm(e: Experiment, store: Results) -> str:
    """Return the change of each arm of one comparison as a Markdown table, the best arm first."""
    changes = {arm: between(e, arm, e.baseline, store) for arm in e.arms if arm != e.baseline}
    known = sorted(
        (arm for arm in changes if changes[arm].seeds >= 3), key=lambda a: changes[a].mean
    )
    rows = [[arm, in_words(changes[arm]), str(changes[arm].seeds)] for arm in known]
    return markdown(["arm", f"change against {e.baseline}", "seeds"], rows)


def by_setting(experiments: Sequence[Experiment], store: Results) -> str:
    """Return the change of each arm in each setting as a Markdown table, one setting a row.

    A setting is left out until some arm has three pairs of seeds.
    """
    arms = [*dict.fromkeys(arm for e in experiments for arm in e.arms if arm != e.baseline)]
    rows = [[e.name, *(cell(e, arm, store) for arm in arms)] for e in experiments]
    return markdown(["setting", *arms], [row for row in rows if any(row[1:])])


def cell(e: Experiment, arm: str, store: Results, fewest: int = 3) -> str:
    """Return an arm's change and how many pairs it is of; nothing with fewer than ``fewest``."""
    if arm not in e.arms:
        return ""
    change = between(e, arm, e.baseline, store)
    return f"{in_words(change)}, {change.seeds} seeds" if change.seeds >= fewest else ""


def missing(experiments: Sequence[Experiment], store: Results) -> str:
    """Return a Markdown list of what has not been run; nothing if all of it has."""
    lines, untouched = [], []
    for e in experiments:
        left = {arm: len(e.seeds_of(arm)) - len(losses(e, arm, store)) for arm in e.arms}
        total = sum(left.values())
        if total == sum(len(e.seeds_of(arm)) for arm in e.arms):
            untouched.append(f"{e.name} ({e.size()})")
        elif total:
            arms = [arm for arm in left if left[arm] == len(e.seeds_of(arm))]
            names = ", ".join(f"`{arm}`" for arm in arms)
            none = f"; no run of {names}" if arms else ""
            lines.append(f"- {e.name}: {total} of {e.size()} runs are left{none}.")
    if untouched:
        lines.append(
            f"- Not one arm has been compared in {', '.join(untouched)}. In brackets: runs."
        )
    return "\n".join(lines)


def drawn_by_rate(
    experiments: Sequence[Experiment],
    arms: Sequence[str],
    store: Results,
    best: float | None = None,
) -> Figure:
    """Draw the change of arms over the learning rate, with an interval at each point.

    Args:
        experiments: One at each rate.
        arms: The arms to draw. One with fewer than three pairs of seeds at a rate has no point.
        store: The results.
        best: The best rate of plain training, which is marked.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes: Any = figure.subplots()
    shown: set[float] = set()
    for number, (arm, colour) in enumerate(zip(arms, COLOURS, strict=False)):
        found = {e.lrs[0]: between(e, arm, e.baseline, store) for e in experiments if arm in e.arms}
        found = {lr: change for lr, change in sorted(found.items()) if change.seeds >= 3}
        if not found:
            continue
        shown |= found.keys()
        # Side by side, so that intervals do not hide each other.
        x = [lr * 2 ** (0.06 * (number - (len(arms) - 1) / 2)) for lr in found]
        means = [change.mean for change in found.values()]
        reach = [
            [c.mean - c.low for c in found.values()],
            [c.high - c.mean for c in found.values()],
        ]
        seeds = sorted({change.seeds for change in found.values()})
        of = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
        label = f"{arm} ({of} seeds)"
        axes.errorbar(x, means, reach, color=colour, marker="o", capsize=3, label=label)
    axes.axhline(0, color=rcParams["axes.edgecolor"], linewidth=0.8)
    if best is not None:
        label = f"plain's best rate, {best:.2g}"
        axes.axvline(best, color=rcParams["axes.edgecolor"], linestyle=":", label=label)
    axes.set_xscale("log", base=2)
    ticks = sorted(shown)
    axes.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
    axes.minorticks_off()
    axes.set(xlabel="peak learning rate", ylabel="change of the loss, % (below 0 is better)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    return figure
