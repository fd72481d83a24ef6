"""What the study's experiments are built from: base trials, arms and kinds of comparison."""

from __future__ import annotations

from dataclasses import replace

from harness.experiment import TUNING_SEEDS, Experiment
from harness.trial import Trial

__all__ = [
    "FACTORS",
    "FROZEN",
    "HALF",
    "HALF_SEEDS",
    "LRS",
    "PLAIN",
    "at_plains_rate",
    "elsewhere",
    "main_arms",
    "scaled",
]

PLAIN = Trial()
FROZEN = "(0, 0): Q and K frozen"
FACTORS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # of the grids
LRS = (4e-3, 8e-3, 16e-3, 32e-3)


def scaled(parallel: float, violation: float, base: Trial = PLAIN, **changes: object) -> Trial:
    """Return a trial with scaled gradients."""
    return replace(base, parallel=parallel, violation=violation, **changes)  # type: ignore[arg-type]


def main_arms(base: Trial) -> dict[str, Trial]:
    """Return the arms that are compared in every other setting."""
    return {
        "plain": base,
        FROZEN: scaled(0, 0, base),
        "(2, 1)": scaled(2, 1, base),
        "uniform (2, 2)": scaled(2, 2, base),
    }


# What follows is asked of runs of half the length, at the rate that is best for plain there, which
# favours plain if anything. In return, chance in the choice of the rate does not tell arms apart.
HALF = replace(PLAIN, steps=300)
HALF_SEEDS = tuple(range(8))
HALF_TUNING_SEEDS = tuple(range(1000, 1004))


def at_plains_rate(
    name: str,
    question: str,
    arms: dict[str, Trial],
    plain: str = "plain",
    **options: object,
) -> Experiment:
    """Return a comparison with the plain runs of half the length, at their best rate."""
    arms = {plain: HALF} | arms
    settings: dict[str, object] = {
        "lrs": LRS,
        "seeds": HALF_SEEDS,
        "tuning_seeds": HALF_TUNING_SEEDS,
        "lr_of": {arm: plain for arm in arms if arm != plain},
    }
    return Experiment(name, question, arms, plain, **settings | options)  # type: ignore[arg-type]


def elsewhere(
    name: str,
    question: str,
    base: Trial,
    lrs: tuple[float, ...] = LRS[1:],
    *,
    seeds: int = len(HALF_SEEDS),
    control: bool = True,
) -> Experiment:
    """Return the comparison of (2, 1) with plain in another setting, at plain's best rate there.

    Q and K frozen show on three seeds whether attention matters there; the control is uniform
    amplification.
    """
    arms = main_arms(base)
    if not control:
        del arms["uniform (2, 2)"]
    return Experiment(
        name,
        question,
        arms,
        "plain",
        lrs,
        tuple(range(seeds)),
        TUNING_SEEDS[:1],
        lr_of={arm: "plain" for arm in arms if arm != "plain"},
        fewer={FROZEN: 3},
    )
