"""The search for a setting that wins at tuned rates: candidates, their controls and the rule.

The protocol was declared before anything of it was run. Every arm is tuned by itself and compared
with plain on seeds that took part in nothing else. A candidate is chosen if its mean change is
below zero and below that of its control. What is chosen is confirmed on 16 further seeds and
another text, with the rates tuned again on four seeds. It wins if its interval against plain is
below zero, and its interval against its control as well. ``CHOSEN`` is what the rule chose; it is
empty until the search has been run.
"""

from __future__ import annotations

from dataclasses import replace

from harness.experiment import NEAR_NULL, Experiment
from harness.trial import Trial

from experiments.base import HALF, LRS, scaled
from experiments.settings import OPTIMIZER_LRS

__all__ = ["CHOSEN", "SEARCH", "confirmation"]

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
SEEDS = tuple(range(300, 308))
TUNING_SEEDS = (1100, 1101)


def with_optimizer(name: str, base: Trial, lrs: tuple[float, ...]) -> Experiment:
    """Return the search with another optimizer, where (2, 1) is the candidate."""
    return Experiment(
        name,
        f"Does (2, 1) help {base.optimizer} at tuned rates?",
        {"plain": base, "(2, 1)": scaled(2, 1, base), UNIFORM: scaled(2, 2, base)},
        "plain",
        lrs,
        SEEDS,
        TUNING_SEEDS,
    )


SEARCH = [
    Experiment(
        "search-adamw",
        "Is there a setting that wins with AdamW at tuned rates?",
        {"plain": HALF, **CONTROLS, **CANDIDATES},
        "plain",
        LRS,
        SEEDS,
        TUNING_SEEDS,
        lr_of={"near-null (1.0001, 1)": "plain"},
    ),
    with_optimizer("search-sgd", replace(HALF, optimizer="SGD"), OPTIMIZER_LRS["SGD"]),
    with_optimizer(
        "search-muon-separate",
        replace(HALF, optimizer="Muon", separate=True),
        OPTIMIZER_LRS["Muon"],
    ),
]
CHOSEN: tuple[str, ...] = ()


def control_of(arm: str) -> str:
    """Return the name of the control that a candidate of the first search is held against."""
    return CONTROL_OF.get(arm, UNIFORM)


def confirmation(chosen: tuple[str, ...]) -> Experiment:
    """Return the comparison that confirms or refutes what was chosen, to be run on another text.

    Args:
        chosen: Names of candidates of the search with AdamW.
    """
    first = SEARCH[0]
    names = dict.fromkeys(["plain", *(name for arm in chosen for name in (arm, control_of(arm)))])
    return Experiment(
        "search-confirmation",
        "Does what the search chose hold on fresh seeds and another text?",
        {name: first.arms[name] for name in names},
        "plain",
        LRS,
        tuple(range(400, 416)),
        tuple(range(1200, 1204)),
    )
