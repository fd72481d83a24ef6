"""Experiments, and which trials they still need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from harness.store import Store
from harness.trial import Trial

__all__ = ["NEAR_NULL", "TUNING_SEEDS", "Experiment"]

TUNING_SEEDS = (1000, 1001)
EXTENSIONS = 3  # of a learning-rate grid, at each end
NEAR_NULL = 1.0001


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared on the same seeds.

    The learning rate of an arm is chosen on the tuning split by the mean over ``tuning_seeds``,
    from a grid of factors of 2 that is extended until its best value is not at an end, and halved
    to factors of the square root of 2 around it; or it is that of another arm, see ``lr_of``. Then
    every arm is trained at its rate on ``seeds``, which took no part in that, and compared on the
    reporting split.

    Attributes:
        name: Of its file of results.
        question: What it asks.
        arms: Trials by name; their seed and learning rate are set here.
        baseline: Name of the arm that others are compared with.
        lrs: The grid, in ascending order by factors of 2; a single one is not tuned.
        seeds: What arms are compared on.
        tuning_seeds: What learning rates are chosen on.
        lr_of: For an arm that is not tuned by itself, the arm whose rate it takes.
        baselines: For an arm that is compared with another one than ``baseline``, that one.
        fewer: For an arm that is compared on the first of ``seeds`` only, how many.
        lr_factor: For an arm that trains at a multiple of its learning rate, the factor.
    """

    name: str
    question: str
    arms: Mapping[str, Trial]
    baseline: str
    lrs: tuple[float, ...]
    seeds: tuple[int, ...] = tuple(range(10))
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    lr_of: Mapping[str, str] = field(default_factory=dict)
    baselines: Mapping[str, str] = field(default_factory=dict)
    fewer: Mapping[str, int] = field(default_factory=dict)
    lr_factor: Mapping[str, float] = field(default_factory=dict)

    def part(self, arms: Iterable[str], seeds: slice) -> Experiment:
        """Return the same experiment with some arms and some seeds only, to be run first."""
        return replace(self, arms={arm: self.arms[arm] for arm in arms}, seeds=self.seeds[seeds])

    def baseline_of(self, arm: str) -> str:
        """Return the name of the arm that one is compared with."""
        return self.baselines.get(arm, self.baseline)

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Return the seeds that an arm is compared on."""
        return self.seeds[: self.fewer.get(arm)]

    def sweep(self, arm: str, lr: float) -> list[Trial]:
        """Return the trials that tell how good a learning rate is for an arm."""
        return [replace(self.arms[arm], lr=lr, seed=seed) for seed in self.tuning_seeds]

    def swept(self, arm: str, store: Store) -> dict[float, float]:
        """Return the mean loss on the tuning split at every rate that has been run for an arm.

        A rate at which a run diverged has an infinite one.
        """
        losses = {}
        for lr in self.grid():
            results = [store.get(trial) for trial in self.sweep(arm, lr)]
            known = [result["tuning"] for result in results if result is not None]
            if None in known:  # one that diverged is enough to tell
                losses[lr] = math.inf
            elif len(known) == len(results):
                losses[lr] = math.fsum(known) / len(known)
        return losses

    def grid(self) -> list[float]:
        """Return every learning rate that may be tried, each other one a step of refinement."""
        count = len(self.lrs) - 1 + 2 * EXTENSIONS
        coarse = self.lrs[0] / 2**EXTENSIONS
        return [float(f"{coarse * 2 ** (n / 2):.4g}") for n in range(2 * count + 1)]

    def wanted_lrs(self, arm: str, store: Store) -> list[float]:
        """Return the rates that an arm still has to be tried at."""
        losses = self.swept(arm, store)
        missing = [lr for lr in self.lrs if lr not in losses]
        if missing:
            return missing
        grid = self.grid()
        best = grid.index(min(losses, key=lambda lr: losses[lr]))
        for step in (2, 1):  # the neighbours of the best one, and then those half as far
            beside = [grid[n] for n in (best - step, best + step) if 0 <= n < len(grid)]
            if best % 2 == 0 and any(lr not in losses for lr in beside):
                return [lr for lr in beside if lr not in losses]
        return []

    def best_lr(self, arm: str, store: Store) -> float | None:
        """Return the learning rate chosen for an arm, ``None`` while it is not known."""
        factor = self.lr_factor.get(arm)
        if factor is not None:
            return float(f"{factor * self.lrs[0]:.6g}")
        arm = self.lr_of.get(arm, arm)
        if len(self.lrs) == 1:
            return self.lrs[0]
        if self.wanted_lrs(arm, store):
            return None
        losses = self.swept(arm, store)
        return min(losses, key=lambda lr: losses[lr])

    def comparison(self, arm: str, lr: float) -> list[Trial]:
        """Return the trials by which an arm is compared."""
        return [replace(self.arms[arm], lr=lr, seed=seed) for seed in self.seeds_of(arm)]

    def pending(self, store: Store) -> list[Trial]:
        """Return the trials that can be run now, the most wanted first."""
        return [trial for trial in dict.fromkeys(self._wanted(store)) if store.get(trial) is None]

    def _wanted(self, store: Store) -> Iterator[Trial]:
        known: dict[str, float | None] = {}
        for arm in self.arms:
            known[arm] = self.best_lr(arm, store)
            if known[arm] is None and arm not in self.lr_of:
                for lr in self.wanted_lrs(arm, store):
                    yield from self.sweep(arm, lr)
        for seed in self.seeds:
            for arm, rate in known.items():
                if rate is not None and seed in self.seeds_of(arm):
                    yield replace(self.arms[arm], lr=rate, seed=seed)

    def size(self) -> int:
        """Return how many trials it takes, as far as can be told beforehand."""
        tuned = 0 if len(self.lrs) == 1 else len(self.arms) - len(self.lr_of)
        compared = sum(len(self.seeds_of(arm)) for arm in self.arms)
        return tuned * len(self.lrs) * len(self.tuning_seeds) + compared
