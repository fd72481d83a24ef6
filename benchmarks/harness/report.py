"""The page of results: a text with tables, figures and numbers filled in."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure

from harness.experiment import Experiment
from harness.partial import between, by_arm, by_rate, by_setting, missing, worth
from harness.placeholders import filled
from harness.store import Store
from spanopt.compare.drawing import COLOURS, draw_interval, forest, markdown
from spanopt.compare.reading import in_words
from spanopt.compare.statistics import Change, adjusted, compared

__all__ = ["Report"]

_PLACEHOLDER = re.compile(r"\[\[([\w-]+) ([\w.-]+)(?: \| ([^\]]+))?\]\]")
OFF_SCALE = 8.0  # per cent


class Report:
    """Fills results into a text.

    Placeholders are ``[[table NAME]]``, ``[[settings GROUP]]``, ``[[figure NAME | CAPTION]]``,
    for comparisons that may not be complete ``[[rates GROUP]]``, ``[[arms NAME]]``,
    ``[[elsewhere GROUP]]`` and ``[[missing GROUP]]``, and, inside a sentence,
    ``[[so-far NAME | ARM]]``, ``[[between NAME | ARM against ARM]]``, ``[[worth NAME | ARM]]``,
    ``[[change NAME | ARM]]``, ``[[loss NAME | ARM]]``, ``[[lr NAME | ARM]]``,
    ``[[time NAME | ARM]]``, ``[[steps NAME | ARM]]`` and ``[[seeds NAME]]``.

    Args:
        groups: Experiments by the name of their group.
        store: Their results.
        columns: What tables show besides: for an experiment's name, for the head of each column,
            the cells by arm.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[Experiment]],
        store: Store,
        columns: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
    ) -> None:
        self.groups = groups
        self.columns = columns or {}
        self.experiments = {e.name: e for experiments in groups.values() for e in experiments}
        self.store = store

    def page(self, template: str) -> str:
        """Return the text with every placeholder filled in.

        Args:
            template: The text.

        Raises:
            ValueError: A placeholder that names nothing, or that there are no results for.
        """
        return filled(template, _PLACEHOLDER, self._fill)

    def _fill(self, match: re.Match[str]) -> str:
        kind, name, arm = match.groups()
        kinds: dict[str, Callable[[], str]] = {
            "table": lambda: self.table(self._experiment(name)),
            "settings": lambda: self.settings(self._group(name)),
            "steps": lambda: self.steps_to(self._experiment(name), arm),
            "figure": lambda: f"![{arm}](evidence-{name}.png)",
            "change": lambda: in_words(self.change(self._experiment(name), arm)),
            "loss": lambda: f"{self.loss(self._experiment(name), arm):.4f}",
            "lr": lambda: f"{self.lr(self._experiment(name), arm):.2g}",
            "time": lambda: f"{self.time_ratio(self._experiment(name), arm):.2f}",
            "rates": lambda: by_rate(self._group(name), self.store),
            "arms": lambda: by_arm(self._experiment(name), self.store),
            "elsewhere": lambda: by_setting(self._group(name), self.store),
            "missing": lambda: missing(self._group(name), self.store),
            "so-far": lambda: self._so_far(self._experiment(name), arm),
            "between": lambda: self._so_far(self._experiment(name), *arm.split(" against ")),
            "worth": lambda: self._worth(self._experiment(name), arm),
            "seeds": lambda: str(len(self._experiment(name).seeds)),
        }
        if kind not in kinds:
            raise ValueError(f"no placeholder is named {kind!r}, only {', '.join(kinds)}")
        try:
            return kinds[kind]()
        except LookupError as error:
            raise ValueError(f"{match[0]}: {error}") from error

    def _experiment(self, name: str) -> Experiment:
        if name not in self.experiments:
            raise LookupError(f"no experiment is named {name!r}")
        return self.experiments[name]

    def _group(self, name: str) -> Sequence[Experiment]:
        if name not in self.groups:
            raise LookupError(f"no group is named {name!r}")
        return self.groups[name]

    def _so_far(self, experiment: Experiment, arm: str, other: str | None = None) -> str:
        change = between(experiment, arm, other or experiment.baseline, self.store)
        if math.isnan(change.mean):
            raise LookupError(f"{arm!r} has not been run")
        return in_words(change)

    def _worth(self, experiment: Experiment, arm: str) -> str:
        factor, low, high = worth(experiment, arm, experiment.lr_factor, self.store)
        return f"{factor:.2f} ({low:.2f} to {high:.2f})"

    def lr(self, experiment: Experiment, arm: str) -> float:
        """Return the learning rate that an arm was compared at."""
        if arm not in experiment.arms:
            raise LookupError(f"{experiment.name} has no arm {arm!r}")
        lr = experiment.best(arm, self.store)
        if lr is None:
            raise LookupError(f"the learning rate of {arm!r} has not been chosen yet")
        return lr

    def results(self, experiment: Experiment, arm: str) -> list[dict[str, Any]]:
        """Return the results by which an arm is compared, in the order of seeds."""
        trials = experiment.comparison(arm, self.lr(experiment, arm))
        results = [self.store.get(trial) for trial in trials]
        missing = sum(result is None for result in results)
        if missing:
            raise LookupError(f"{missing} runs of {arm!r} are missing")
        return [result for result in results if result is not None]

    def losses(self, experiment: Experiment, arm: str) -> list[float | None]:
        """Return an arm's losses on the reporting split."""
        return [result["reporting"] for result in self.results(experiment, arm)]

    def pairs(
        self, experiment: Experiment, arm: str
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return the results of an arm and its baseline, on the seeds that both have."""
        baseline = self.results(experiment, experiment.baseline_of(arm))
        return list(zip(self.results(experiment, arm), baseline, strict=False))

    def loss(self, experiment: Experiment, arm: str) -> float:
        """Return an arm's mean loss on the reporting split, NaN if a run diverged."""
        losses = [math.nan if x is None else x for x in self.losses(experiment, arm)]
        return math.fsum(losses) / len(losses)

    def change(self, experiment: Experiment, arm: str) -> Change:
        """Compare an arm with its baseline."""
        pairs = self.pairs(experiment, arm)
        mine, baseline = ([result["reporting"] for result in x] for x in zip(*pairs, strict=True))
        return compared(mine, baseline)

    def time_ratio(self, experiment: Experiment, arm: str) -> float:
        """Return the median ratio of an arm's step time to its baseline's, over seeds.

        For arms that were run together only, two runs at a time.
        """
        return statistics.median(
            mine["step_ms"] / baseline["step_ms"] for mine, baseline in self.pairs(experiment, arm)
        )

    def steps_to(self, experiment: Experiment, arm: str) -> str:
        """Return how many steps an arm takes to its baseline's loss at the curve's last point."""
        pairs = self.pairs(experiment, arm)
        curve, baseline = (mean_curve(results) for results in zip(*pairs, strict=True))
        last_step, goal = baseline[-1]
        before = (0, math.inf)
        for step, loss in curve:
            if loss <= goal:
                if before[1] == math.inf:
                    return str(step)
                share = (before[1] - goal) / (before[1] - loss)
                return str(round(before[0] + share * (step - before[0])))
            before = (step, loss)
        return f"> {last_step}"

    def table(self, experiment: Experiment) -> str:
        """Return the comparison as a Markdown table."""
        others = [arm for arm in experiment.arms if arm != experiment.baseline_of(arm)]
        changes = {arm: self.change(experiment, arm) for arm in others}
        adjusted_p = adjusted([change.p for change in changes.values()])
        head = ["arm", "learning rate", "loss", "change, %", "95 % interval", "sd"]
        head += ["seeds", "p", "adjusted p"]
        columns = self.columns.get(experiment.name, {})
        rows = []
        p_of = dict(zip(changes, adjusted_p, strict=True))
        for arm in experiment.arms:
            cells = [arm, f"{self.lr(experiment, arm):.2g}", f"{self.loss(experiment, arm):.4f}"]
            if arm in changes:
                change = changes[arm]
                cells += [
                    f"{change.mean:+.2f}",
                    f"{change.low:+.2f} to {change.high:+.2f}",
                    f"{change.spread:.2f}",
                    f"{change.seeds}",
                    f"{change.p:.2g}",
                    f"{p_of[arm]:.2g}",
                ]
                if change.diverged:
                    cells[0] += f" ({change.diverged} diverged)"
            else:
                cells += ["", "", "", str(len(experiment.seeds)), "", ""]
            rows.append([*cells, *(column.get(arm, "") for column in columns.values())])
        return markdown([*head, *columns], rows)

    def settings(self, experiments: Sequence[Experiment]) -> str:
        """Return comparisons of the same arms in many settings, one a row, as a Markdown table."""
        arms = list(dict.fromkeys(arm for e in experiments for arm in e.arms if arm != e.baseline))
        main = "(2, 1)"
        p_values = adjusted([self.change(e, main).p for e in experiments])
        head = ["setting", "learning rate", "plain's loss", *arms, "seeds", f"adjusted p of {main}"]
        rows = []
        for e, p in zip(experiments, p_values, strict=True):
            cells = [e.name, f"{self.lr(e, e.baseline):.2g}", f"{self.loss(e, e.baseline):.4f}"]
            for arm in arms:
                cells.append(in_words(self.change(e, arm)) if arm in e.arms else "")
            rows.append([*cells, str(len(e.seeds)), f"{p:.2g}"])
        return markdown(head, rows)

    def forest_of_settings(self, experiments: Sequence[Experiment], arms: Sequence[str]) -> Figure:
        """Draw the change by some arms in many settings, with intervals."""
        near: dict[str, dict[str, Change]] = {}
        far: list[str] = []
        for e in experiments:
            changes = {arm: self.change(e, arm) for arm in arms if arm in e.arms}
            if all(max(-x.low, x.high) < OFF_SCALE for x in changes.values()):
                near[e.name] = changes
            else:
                far += [f"{e.name}, {arm}: {in_words(x)}" for arm, x in changes.items()]
        figure = Figure(figsize=(8, 1.2 + 0.32 * len(near)), layout="constrained")
        axes = figure.subplots()
        for number, (arm, colour) in enumerate(zip(arms, COLOURS, strict=False)):
            for row, changes in enumerate(near.values()):
                change, y = changes.get(arm), row + 0.3 * (number - (len(arms) - 1) / 2)
                if change is not None:
                    draw_interval(axes, change, y, colour, arm)
        axes.axvline(0, color=rcParams["axes.edgecolor"], linewidth=0.8)
        axes.set_yticks(range(len(near)), [*near])
        axes.set_ylim(len(near) - 0.5, -0.5)
        text = "change of validation loss, % (below 0 is better); 95 % interval"
        axes.set_xlabel("\n".join([text, *(f"not shown: {line}" for line in far)]))
        axes.grid(axis="x", alpha=0.3)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys())
        return figure

    def forest(self, experiment: Experiment) -> Figure:
        """Draw every arm's change with its interval."""
        arms = [arm for arm in experiment.arms if arm != experiment.baseline_of(arm)]
        changes = {arm: self.change(experiment, arm) for arm in arms}
        near = {arm: change for arm, change in changes.items() if abs(change.mean) < OFF_SCALE}
        far = [f"{arm} {x.mean:+.1f} %" for arm, x in changes.items() if arm not in near]
        seeds = len(experiment.seeds)
        text = (
            f"change of validation loss, % (below 0 is better); {seeds} paired seeds, 95 % interval"
        )
        return forest(near, "\n".join([text, *(f"not shown: {arm}" for arm in far)]))

    def heatmap(self, experiment: Experiment, factors: Sequence[float]) -> Figure:
        """Draw the change over a grid of parallel by violation."""
        figure = Figure(figsize=(6.4, 5), layout="constrained")
        axes = figure.subplots()
        base = self.loss(experiment, experiment.baseline)
        values = [
            [100 * (self.loss(experiment, f"({a:g}, {b:g})") / base - 1) for a in factors]
            for b in factors
        ]
        limit = 3.0
        image = axes.imshow(values, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                colour = "white" if abs(value) > 0.7 * limit else "black"
                axes.text(x, y, f"{value:+.1f}", ha="center", va="center", color=colour)
        labels = [f"{factor:g}" for factor in factors]
        axes.set_xticks(range(len(factors)), labels)
        axes.set_yticks(range(len(factors)), labels)
        axes.set(xlabel="parallel", ylabel="violation")
        label = f"change of validation loss, % (mean of {len(experiment.seeds)} seeds)"
        figure.colorbar(image, ax=axes, label=label, extend="both")
        return figure

    def shares(self, experiment: Experiment) -> Figure:
        """Draw the parallel share of the gradients over the steps."""
        rows = [
            row
            for result in self.results(experiment, experiment.baseline)
            for row in result["monitor"]
        ]
        layers = sorted({row["layer"] for row in rows})
        steps = sorted({row["step"] for row in rows})
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        for axes, side in zip(figure.subplots(1, 2, sharey=True), ("query", "key"), strict=True):
            for number, (layer, colour) in enumerate(zip(layers, COLOURS, strict=False), 1):
                of_layer = [row for row in rows if (row["layer"], row["side"]) == (layer, side)]
                shares = {step: [] for step in steps}  # type: dict[int, list[float]]
                for row in of_layer:
                    shares[row["step"]].append(row["parallel_share"])
                means = [math.fsum(shares[step]) / len(shares[step]) for step in steps]
                low, high = ([f(shares[step]) for step in steps] for f in (min, max))
                axes.plot(steps, means, color=colour, label=f"layer {number}")
                axes.fill_between(steps, low, high, color=colour, alpha=0.2)
            chance, ink = rows[0]["chance_share"], rcParams["axes.edgecolor"]
            axes.axhline(chance, color=ink, linestyle=":", label="by chance")
            axes.set(title=side, xlabel="optimizer step")
            axes.legend(fontsize="small")
        top = max(row["parallel_share"] for row in rows)
        figure.axes[0].set(ylabel="parallel share of the energy", ylim=(0, 1.05 * top))
        return figure

    def rates(self, experiment: Experiment, arms: Sequence[str]) -> Figure:
        """Draw the loss on the tuning split over the learning rate."""
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for arm, colour in zip(arms, COLOURS, strict=False):
            losses = experiment.swept(arm, self.store)
            shown = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
            axes.plot([*shown], [*shown.values()], marker="o", color=colour, label=arm)
        axes.set_xscale("log", base=2)
        axes.set_xticks([*shown], [f"{lr:.2g}" for lr in shown], minor=False)
        axes.set(xlabel="peak learning rate", ylabel="validation loss, nats")
        axes.grid(alpha=0.3)
        axes.legend()
        return figure


def mean_curve(results: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return the validation loss over the steps, mean over runs."""
    curves = [dict(result["curve"]) for result in results]
    steps = [step for step in curves[0] if all(curve.get(step) for curve in curves)]
    return [(step, math.fsum(curve[step] for curve in curves) / len(curves)) for step in steps]
