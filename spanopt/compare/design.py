"""The plan of a comparison: arms, controls, repetitions, and runs in equal time."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spanopt.compare.arms import FROZEN, NEAR_NULL, PLAIN, Arms
from spanopt.compare.grid import Grid
from spanopt.compare.planning import Plan, Results
from spanopt.compare.sequential import at_any_time, width
from spanopt.compare.statistics import Change, compared
from spanopt.compare.trial import Trial

__all__ = ["Design"]

REPEATED = 2  # seeds on which plain training is run twice
FROZEN_SEEDS = 5  # few are enough: the effect is large if attention matters
TIMED = 3  # seeds on which the time of a step is measured


@dataclass(frozen=True)
class Design(Plan[Trial]):
    """Which trials a comparison needs, and what each arm's losses are.

    Attributes:
        named: The arms and their controls.
        seeds: The seeds on which arms are compared; with ``until``, perhaps only the first of them.
        tuning_seeds: The seeds on which values are chosen.
        grid: The values of the tuned argument; ``None`` if nothing is tuned.
        metric: The name of the number that is compared; ``None`` means the first one.
        tuning_metric: The name of the number by which values are chosen; ``None`` means ``metric``.
        larger_is_better: Whether a larger metric is better. Changes are computed in the same way;
            only tuning and the words of the report turn around.
        steps: The number of steps that the user's function is asked to take; ``None`` if it is not
            told.
        until: The width of the intervals, in per cent, at which the comparison ends.
    """

    named: Arms
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...] = ()
    grid: Grid | None = None
    metric: str | None = None
    tuning_metric: str | None = None
    larger_is_better: bool = False
    steps: int | None = None
    until: float | None = None

    @property
    def arms(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The arms by name."""
        return self.named.all

    @property
    def tuning(self) -> tuple[int, ...]:
        """The seeds on which values are chosen."""
        return self.tuning_seeds

    @property
    def values(self) -> Grid | None:
        """The grid of values."""
        return self.grid

    def value_from(self, arm: str) -> str:
        """Return the arm whose tuned value this arm takes: near-null and frozen take plain's."""
        return PLAIN if arm in (NEAR_NULL, FROZEN) else arm

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Return the seeds on which an arm is compared."""
        return self.seeds[:FROZEN_SEEDS] if arm == FROZEN else self.seeds

    def trial(self, arm: str, value: float | None, seed: int) -> Trial:
        """Return the trial of an arm at a value, with a seed."""
        tuned = value if self.grid is not None else None
        return Trial(arm, seed, tuned, self.steps)

    def metric_of(self, result: Mapping[str, Any], name: str | None = None) -> float | None:
        """Return a metric of a result; ``None`` if it has none."""
        metrics = result.get("metrics")
        if not metrics:
            return None
        name = name or self.metric
        return metrics.get(name) if name else next(iter(metrics.values()))

    def tuning_loss(self, result: Mapping[str, Any]) -> float | None:
        """Return the loss by which values are chosen."""
        value = self.metric_of(result, self.tuning_metric)
        return None if value is None else -value if self.larger_is_better else value

    def wanted(self, store: Results) -> Iterator[Trial]:
        """Return every trial that is known to be needed, in order."""
        last = self.stopped_at(store)
        seeds = self.seeds if last is None else self.seeds[:last]
        for trial in super().wanted(store):
            if trial.seed not in self.seeds:
                yield trial  # a trial of the tuning
            elif trial.seed in seeds:
                if trial.arm == PLAIN and trial.seed in self.seeds[:REPEATED]:
                    yield trial
                    yield self.repetition(trial)
                else:
                    yield trial
        for seed in seeds:
            for arm in self.named.asked:
                shorter = self.equal_time(arm, seed, store)
                if shorter is not None:
                    yield shorter

    def repetition(self, trial: Trial) -> Trial:
        """Return the trial that repeats a trial."""
        return Trial(trial.arm, trial.seed, trial.value, trial.steps, again=1)

    def time_ratio(self, arm: str, store: Results) -> float | None:
        """Return the time of a step of an arm, divided by that of plain training.

        It is the median over the first seeds. It is ``None`` until they have been run, and if the
        optimizer does not tell its steps.
        """
        ratios = []
        for seed in self.seeds[:TIMED]:
            mine, plain = (self.result(name, seed, store) for name in (arm, PLAIN))
            if mine is None or plain is None:
                return None
            if mine.get("step_ms") and plain.get("step_ms"):
                ratios.append(mine["step_ms"] / plain["step_ms"])
        return statistics.median(ratios) if ratios else None

    def equal_time(self, arm: str, seed: int, store: Results) -> Trial | None:
        """Return the trial of an arm that takes as long as plain training; ``None`` if unknown."""
        ratio = self.time_ratio(arm, store)
        if self.steps is None or ratio is None:
            return None
        steps = min(self.steps, max(1, round(self.steps / ratio)))
        return Trial(arm, seed, self.best(arm, store), steps)

    def result(self, arm: str, seed: int, store: Results) -> Mapping[str, Any] | None:
        """Return the result with which an arm is compared on a seed; ``None`` if there is none."""
        if not self.is_known(arm, store):
            return None
        return store.get(self.trial(arm, self.best(arm, store), seed))

    def complete(self, store: Results) -> tuple[int, ...]:
        """Return the first seeds, as far as every arm has been run on them."""
        done = []
        for seed in self.seeds:
            arms = [arm for arm in self.arms if seed in self.seeds_of(arm)]
            if any(self.result(arm, seed, store) is None for arm in arms):
                break
            done.append(seed)
        return tuple(done)

    def stopped_at(self, store: Results) -> int | None:
        """Return how many seeds were enough for ``until``; ``None`` while more are needed."""
        if self.until is None:
            return None
        judged = [*self.named.asked, *self.named.uniform.values()]
        done = self.complete(store)
        losses = {arm: self.losses(arm, done, store) for arm in (PLAIN, *judged)}
        for count in range(2, len(done) + 1):
            plain = losses[PLAIN][:count]
            if all(width(losses[arm][:count], plain) <= self.until for arm in judged):
                return count
        return None

    def losses(
        self, arm: str, seeds: tuple[int, ...], store: Results, *, equal_time: bool = False
    ) -> list[float | None]:
        """Return the metric of an arm on each seed; ``None`` where there is none."""
        found = []
        for seed in seeds:
            trial = self.equal_time(arm, seed, store) if equal_time else None
            result = store.get(trial) if trial else self.result(arm, seed, store)
            found.append(None if result is None else self.metric_of(result))
        return found

    def change(
        self,
        arm: str,
        store: Results,
        against: str = PLAIN,
        *,
        seeds: tuple[int, ...] | None = None,
        equal_time: bool = False,
        any_time: bool = False,
    ) -> Change:
        """Compare an arm with another on the seeds that have been run.

        Args:
            arm: The arm.
            store: The results.
            against: The other arm.
            seeds: The seeds; by default those on which every arm has been run.
            equal_time: Whether the arm gets as much time as the other, not as many steps.
            any_time: Whether the interval stays valid however often it is looked at. With
                ``until`` it always does.
        """
        seeds = self.complete(store) if seeds is None else seeds
        seeds = tuple(s for s in seeds if s in self.seeds_of(arm) and s in self.seeds_of(against))
        mine = self.losses(arm, seeds, store, equal_time=equal_time)
        other = self.losses(against, seeds, store)
        sequential = any_time or self.until is not None
        return at_any_time(mine, other) if sequential else compared(mine, other)
