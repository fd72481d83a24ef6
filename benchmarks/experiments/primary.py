"""The first comparison at tuned rates, its confirmation, its controls and the shares."""

from __future__ import annotations

from dataclasses import replace

from harness.experiment import NEAR_NULL, Experiment

from experiments.base import FROZEN, LRS, PLAIN, scaled

__all__ = ["CONFIRMATION", "CONTROLS", "PRIMARY", "SHARES"]

PRIMARY = Experiment(
    "primary",
    "Do scaled spans help a causal language model, and is it their geometry that does?",
    arms={
        "plain": PLAIN,
        FROZEN: scaled(0, 0),
        "(2, 1)": scaled(2, 1),
        "uniform (2, 2)": scaled(2, 2),
        "near-null (1.0001, 1)": scaled(NEAR_NULL, 1),
        "(1.5, 1)": scaled(1.5, 1),
        "(3, 1)": scaled(3, 1),
        "(1, 0.5)": scaled(1, 0.5),
        "(1, 0): span only": scaled(1, 0),
        "(1, 2): violation amplified": scaled(1, 2),
        "(0, 1): violation only": scaled(0, 1),
        "uniform (1.5, 1.5)": scaled(1.5, 1.5),
        "uniform (3, 3)": scaled(3, 3),
        "uniform (0.5, 0.5)": scaled(0.5, 0.5),
        "random subspace (2, 1)": scaled(2, 1, projection="random"),
        "(2, 1), norm preserved": scaled(2, 1, preserve_norm=True),
    },
    baseline="plain",
    lrs=LRS,
    lr_of={"near-null (1.0001, 1)": "plain"},
)

# What looked promising in the primary comparison, beside (2, 1): on seeds that took
# no part in choosing them, with learning rates that are tuned on three times as many as there.
CONFIRMATION = Experiment(
    "confirmation",
    "Does what looked promising hold on fresh seeds?",
    arms={
        name: PRIMARY.arms[name]
        for name in ("plain", "(2, 1)", "uniform (1.5, 1.5)", "(2, 1), norm preserved")
    },
    baseline="plain",
    lrs=(8e-3, 16e-3),
    seeds=tuple(range(100, 116)),
    tuning_seeds=tuple(range(1000, 1006)),
)

CONTROLS = Experiment(
    "controls",
    "Is it the span that trains well by itself, or any subspace of its size?",
    arms={
        "plain": PLAIN,
        "(1, 0): span only": scaled(1, 0),
        "(1, 0), random subspace": scaled(1, 0, projection="random"),
        "(0, 1): violation only": scaled(0, 1),
        "(0, 1), random subspace": scaled(0, 1, projection="random"),
        "(1, 0), random projection of the input": scaled(1, 0, projection="random-input"),
        "(0, 1), random projection of the input": scaled(0, 1, projection="random-input"),
    },
    baseline="plain",
    lrs=LRS,
)

SHARES = Experiment(
    "shares",
    "How much of the gradient is in the span?",
    arms={"plain": replace(PLAIN, monitored=True)},
    baseline="plain",
    lrs=(16e-3,),
    seeds=(0, 1, 2),
)
