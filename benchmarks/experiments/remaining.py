"""What is left of the study, in an order that was set before any of it was compared."""

from __future__ import annotations

from collections.abc import Iterator

from harness.experiment import Experiment

from experiments.fixed_rates import (
    AT_LOW_RATE,
    AT_LOW_RATE_ELSEWHERE,
    AT_RATE,
    LONG_AT_RATE,
    MAIN_ARMS,
    RATE_ARMS,
    RATES,
    fixed_rates_in_order,
)
from experiments.search import CHOSEN, SEARCH, confirmation

__all__ = ["remaining_in_order"]

LOW = {e.name.removeprefix("low-rate-"): e for e in (*AT_LOW_RATE, *AT_LOW_RATE_ELSEWHERE)}
THREE, FOUR, EIGHT = slice(0, 3), slice(0, 4), slice(0, 8)
OTHER_PROJECTIONS = ("(2, 1), pooled", "(1, 2), pooled")
QK_FEW = tuple(f"plain, Q and K's rate x {factor}" for factor in (1.2, 1.5))
CHANCE = ("near-null (1.0001, 1)", "random subspace (2, 1)")


def remaining_in_order() -> Iterator[Experiment]:
    """Return parts of what is left: a few seeds of every question before more seeds of any."""
    yield few(LOW["text-help-topics"], THREE)
    yield AT_RATE[16e-3].part(MAIN_ARMS, THREE)
    yield SEARCH[0]
    if CHOSEN:
        yield few(confirmation(CHOSEN), EIGHT)
    yield SEARCH[1]
    yield few(LOW["equivalent"], FOUR)
    yield AT_RATE[1e-3].part(("plain", *QK_FEW), FOUR)
    yield few(LOW["text-python-source"], THREE)
    yield AT_RATE[1e-3].part(("plain", *CHANCE), FOUR)
    yield AT_RATE[1e-3].part(RATE_ARMS, FOUR)
    yield few(LOW["subwords"], THREE)
    yield few(LOW["paths"], FOUR)
    yield from (AT_RATE[lr].part(RATE_ARMS, THREE) for lr in RATES)
    yield AT_RATE[16e-3].part(MAIN_ARMS, EIGHT)
    yield AT_RATE[1e-3].part(("plain", *OTHER_PROJECTIONS), EIGHT)
    for d in (8, 32, 128):
        yield few(LOW[f"head-dim-{d}"], THREE)
    yield few(LOW["size-3x96"], THREE)
    yield LONG_AT_RATE[0].part(MAIN_ARMS[:3], THREE)
    yield AT_RATE[2e-3].part(("plain", *CHANCE, *OTHER_PROJECTIONS), FOUR)
    yield from (few(e, EIGHT) for e in LOW.values())
    yield from fixed_rates_in_order()
    yield from [*LONG_AT_RATE, *LOW.values(), *([confirmation(CHOSEN)] if CHOSEN else [])]


def few(e: Experiment, seeds: slice) -> Experiment:
    """Return an experiment with all of its arms on some of its seeds."""
    return e.part(e.arms, seeds)
