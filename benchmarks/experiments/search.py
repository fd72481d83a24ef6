"""The search for a setting that wins near plain's best rate: candidates, controls and the rule.

The protocol was declared before anything of it was run. First, every candidate and its control are
compared with plain on four seeds that took part in nothing else, all of them at plain's best rate.
That favours plain, if any arm. Then the rule chooses at most two candidates. A candidate can be
chosen if its mean change is below zero and below that of its control; of these the rule takes those
that are furthest ahead. What it chose is confirmed on 16 further seeds and another text, with
plain's rate tuned again there on four seeds. A candidate wins if its interval against plain is
below zero, and its interval against its control as well.

An earlier plan tuned every arm by itself, on eight seeds. It was cut to this one for time, before
anything was run. ``CHOSEN`` is what the rule chose; it is empty until the search has been run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from harness.experiment import NEAR_NULL, Experiment

from experiments.base import HALF, LRS, at_plains_rate, scaled
from experiments.settings import OPTIMIZER_LRS

__all__ = ["CHOSEN", "SEARCH", "chosen_by_rule", "confirmation"]

BEST_RATE = 0.01131  # plain's, for 300 steps: what was tuned on four seeds for the later sections
MOST_CHOSEN = 2
UNIFORM = "uniform (2, 2)"
CANDIDATES = {
    **{
        f"(2, 1) in the first {n} %": scaled(2, 1, HALF, scale_schedule=f"early-{n}")
        for n in (5, 10, 20)
    },
    "(3, 1) by measured share": scaled(3, 1, HALF, by_share=True),
    **{f"(2, 1), ridge {ridge:g}": scaled(2, 1, HALF, ridge=ridge) for ridge in (1e-3, 1e-2, 1e-1)},
    "(2, 1), spectral": scaled(2, 1, HALF, projection="spectral"),
    "(2, 1), norm preserved": scaled(2, 1, HALF, preserve_norm=True),
    "(2, 1) to the weights only": scaled(2, 1, HALF, path="weights"),
    "(1.2, 1)": scaled(1.2, 1, HALF),
}
CONTROLS = {
    "near-null (1.0001, 1)": scaled(NEAR_NULL, 1, HALF),
    UNIFORM: scaled(2, 2, HALF),
    "uniform (2, 2) in the first 20 %": scaled(2, 2, HALF, scale_schedule="early-20"),
    "uniform (2, 2) to the weights only": scaled(2, 2, HALF, path="weights"),
    "uniform (1.2, 1.2)": scaled(1.2, 1.2, HALF),
}
CONTROL_OF = {
    **{name: "uniform (2, 2) in the first 20 %" for name in CANDIDATES if "first" in name},
    "(2, 1) to the weights only": "uniform (2, 2) to the weights only",
    "(1.2, 1)": "uniform (1.2, 1.2)",
}
SEEDS = tuple(range(300, 304))
MUON = replace(HALF, optimizer="Muon", separate=True)

SEARCH = [
    Experiment(
        "search-adamw",
        "Is there a setting that wins with AdamW at plain's best rate?",
        {"plain": HALF, **CONTROLS, **CANDIDATES},
        "plain",
        (BEST_RATE,),
        SEEDS,
    ),
    at_plains_rate(
        "search-muon-separate",
        "Does (2, 1) help Muon on separate matrices for Q, K and V?",
        {"plain": MUON, "(2, 1)": scaled(2, 1, MUON), UNIFORM: scaled(2, 2, MUON)},
        lrs=OPTIMIZER_LRS["Muon"],
        seeds=SEEDS,
        tuning_seeds=(1100,),
    ),
]
CHOSEN: tuple[str, ...] = ()


def control_of(arm: str) -> str:
    """Return the name of the control that a candidate of the first search is held against."""
    return CONTROL_OF.get(arm, UNIFORM)


def chosen_by_rule(changes: Mapping[str, float]) -> tuple[str, ...]:
    """Return the candidates that the rule chooses, the one that is furthest ahead first.

    Args:
        changes: The mean change of each arm of the search with AdamW, in per cent.
    """
    ahead = {arm: min(0.0, changes[control_of(arm)]) - changes[arm] for arm in CANDIDATES}
    best_first = sorted(ahead, key=lambda arm: -math.inf if math.isnan(ahead[arm]) else -ahead[arm])
    return tuple(arm for arm in best_first if ahead[arm] > 0)[:MOST_CHOSEN]


def confirmation(chosen: tuple[str, ...]) -> Experiment:
    """Return the comparison that confirms or refutes what was chosen, on another text.

    Args:
        chosen: Names of candidates of the search with AdamW.
    """
    first = SEARCH[0]
    names = dict.fromkeys(["plain", *(name for arm in chosen for name in (arm, control_of(arm)))])
    return at_plains_rate(
        "search-confirmation",
        "Does what the search chose hold on fresh seeds and another text?",
        {name: replace(first.arms[name], text="help topics") for name in names},
        lrs=LRS[:3],
        seeds=tuple(range(400, 416)),
        tuning_seeds=tuple(range(1200, 1204)),
    )
