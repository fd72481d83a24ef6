"""The study's experiments, declared before they were run, in groups."""

from __future__ import annotations

from dataclasses import replace

from harness.experiment import Experiment

from experiments.base import PLAIN, main_arms
from experiments.fixed_rates import AT_LOW_RATE, AT_LOW_RATE_ELSEWHERE, AT_RATE, LONG_AT_RATE
from experiments.primary import CONFIRMATION, CONTROLS, PRIMARY, SHARES
from experiments.search import CHOSEN, SEARCH, confirmation
from experiments.settings import (
    HEAD_DIMS,
    LENGTHS,
    MUON_CONFIRMATION,
    OPTIMIZERS,
    PROTOTYPES,
    SIZES,
    SUBWORDS,
    TASKS,
)
from experiments.variants import GRID, PATHS, PLACES, RIVALS, SETUPS, TIME

__all__ = ["EXPERIMENTS", "GROUPS", "QUICK"]

QUICK = Experiment(
    "quick",
    "A small part, at one learning rate, in minutes.",
    arms=main_arms(replace(PLAIN, steps=200)),
    baseline="plain",
    lrs=(16e-3,),
    seeds=tuple(range(6)),
)

GROUPS = {
    "primary": [PRIMARY, CONFIRMATION, CONTROLS, SHARES, PATHS, SUBWORDS],
    "grid": [GRID, PLACES, TIME, SETUPS],
    "head-dim": [*HEAD_DIMS, *LENGTHS],
    "optimizers": OPTIMIZERS,
    "muon": [MUON_CONFIRMATION],
    "rivals": [RIVALS],
    "tasks": TASKS,
    "sizes": [*SIZES[:1], *PROTOTYPES, *SIZES[1:]],
    "rates": [*AT_RATE.values()],
    "long-rates": LONG_AT_RATE,
    "low-rate": AT_LOW_RATE,
    "low-rate-elsewhere": AT_LOW_RATE_ELSEWHERE,
    "search": [*SEARCH, *([confirmation(CHOSEN)] if CHOSEN else [])],
}
EXPERIMENTS = {experiment.name: experiment for group in GROUPS.values() for experiment in group}
