"""The trials that a comparison still needs: tuning first, then all arms on one seed at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

from spanopt.compare.grid import Grid

__all__ = ["Plan", "Results"]

T = TypeVar("T", bound=Hashable)


class Results(Protocol):
    """The results of trials, as a plan sees them."""

    def get(self, trial: Any) -> Mapping[str, Any] | None:
        """Return the result of a trial; ``None`` if it has not been run."""


class Plan(ABC, Generic[T]):
    """Arms that are compared on the same seeds, each at a tuned value of one hyperparameter.

    The value of an arm is chosen by the mean loss over the seeds ``tuning``. It comes from a grid
    that is extended until its best value is not at an end. Then every arm is trained at its value
    on ``seeds``, which take no part in the choice.

    Attributes:
        arms: The arms by name.
        seeds: The seeds on which arms are compared.
    """

    arms: Mapping[str, Any]
    seeds: tuple[int, ...]

    @property
    @abstractmethod
    def tuning(self) -> tuple[int, ...]:
        """The seeds on which values are chosen."""

    @property
    @abstractmethod
    def values(self) -> Grid | None:
        """The grid of values; ``None`` if nothing is tuned."""

    @abstractmethod
    def trial(self, arm: str, value: float | None, seed: int) -> T:
        """Return the trial of an arm at a value, with a seed."""

    @abstractmethod
    def tuning_loss(self, result: Mapping[str, Any]) -> float | None:
        """Return the loss by which values are chosen; ``None`` if the trial gave none."""

    def value_from(self, arm: str) -> str:
        """Return the arm whose tuned value this arm takes: by default itself."""
        return arm

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Return the seeds on which an arm is compared."""
        return self.seeds

    def sweep(self, arm: str, value: float) -> list[T]:
        """Return the trials that tell how good a value is for an arm."""
        return [self.trial(arm, value, seed) for seed in self.tuning]

    def swept(self, arm: str, store: Results) -> dict[float, float]:
        """Return the mean tuning loss at every value that has been run for an arm.

        The loss is infinite at a value where a trial gave none.
        """
        losses = {}
        for value in self.values.points if self.values else ():
            results = [store.get(trial) for trial in self.sweep(arm, value)]
            known = [self.tuning_loss(result) for result in results if result is not None]
            numbers = [loss for loss in known if loss is not None]
            if len(numbers) < len(known):  # one diverged trial is enough
                losses[value] = math.inf
            elif len(known) == len(results):
                losses[value] = math.fsum(numbers) / len(numbers)
        return losses

    def wanted_values(self, arm: str, store: Results) -> list[float]:
        """Return the values at which an arm still has to be tried."""
        return self.values.wanted(self.swept(arm, store)) if self.values else []

    def is_known(self, arm: str, store: Results) -> bool:
        """Return whether the value of an arm has been chosen."""
        return not self.wanted_values(self.value_from(arm), store)

    def best(self, arm: str, store: Results) -> float | None:
        """Return the value chosen for an arm; ``None`` if it is not yet known or not tuned."""
        arm = self.value_from(arm)
        if self.values is None or self.wanted_values(arm, store):
            return None
        return self.values.best(self.swept(arm, store))

    def comparison(self, arm: str, value: float | None) -> list[T]:
        """Return the trials with which an arm is compared."""
        return [self.trial(arm, value, seed) for seed in self.seeds_of(arm)]

    def pending(self, store: Results) -> list[T]:
        """Return the trials that can be run now, the most wanted first."""
        return [trial for trial in dict.fromkeys(self.wanted(store)) if store.get(trial) is None]

    def wanted(self, store: Results) -> Iterator[T]:
        """Return every trial that is known to be needed, in order, also those already run."""
        known: dict[str, float | None] = {}
        for arm in self.arms:
            if self.is_known(arm, store):
                known[arm] = self.best(arm, store)
            elif self.value_from(arm) == arm:
                for wanted in self.wanted_values(arm, store):
                    yield from self.sweep(arm, wanted)
        for seed in self.seeds:
            for arm, value in known.items():
                if seed in self.seeds_of(arm):
                    yield self.trial(arm, value, seed)
