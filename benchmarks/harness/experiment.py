"""Experiments, and which trials they still need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from harness.trial import Trial
from spanopt.compare.grid import Grid
from spanopt.compare.planning import Plan, Results

__all__ = ["NEAR_NULL", "TUNING_SEEDS", "Experiment"]

TUNING_SEEDS = (1000, 1001)
EXTENSIONS = 3  # of a learning-rate grid, at each end
NEAR_NULL = 1.0001


@dataclass(frozen=True)
class Experiment(Plan[Trial]):
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

    @property
    def tuning(self) -> tuple[int, ...]:
        """The seeds that learning rates are chosen on."""
        return self.tuning_seeds

    @property
    def values(self) -> Grid:
        """The grid of learning rates."""
        return Grid(self.lrs, EXTENSIONS, refine=True)

    def value_from(self, arm: str) -> str:
        """Return the arm whose learning rate this one takes."""
        return self.lr_of.get(arm, arm)

    def trial(self, arm: str, value: float | None, seed: int) -> Trial:
        """Return the trial of an arm at a learning rate, with a seed."""
        assert value is not None
        return replace(self.arms[arm], lr=value, seed=seed)

    def tuning_loss(self, result: Mapping[str, Any]) -> float | None:
        """Return the loss on the tuning split."""
        loss: float | None = result["tuning"]
        return loss

    def best(self, arm: str, store: Results) -> float | None:
        """Return the learning rate of an arm, ``None`` while it is not known."""
        factor = self.lr_factor.get(arm)
        if factor is not None:
            return float(f"{factor * self.lrs[0]:.6g}")
        return super().best(arm, store)

    def size(self) -> int:
        """Return how many trials it takes, as far as can be told beforehand."""
        tuned = 0 if len(self.lrs) == 1 else len(self.arms) - len(self.lr_of)
        compared = sum(len(self.seeds_of(arm)) for arm in self.arms)
        return tuned * len(self.lrs) * len(self.tuning_seeds) + compared
