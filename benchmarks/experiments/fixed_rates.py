"""The source's figure: comparisons at fixed rates, from far below plain's best to above it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from harness.experiment import NEAR_NULL, Experiment
from harness.texts import OTHER_TEXTS
from harness.trial import Trial

from experiments.base import FACTORS, HALF, scaled

__all__ = [
    "AT_LOW_RATE",
    "AT_LOW_RATE_ELSEWHERE",
    "AT_RATE",
    "LONG_AT_RATE",
    "MAIN_ARMS",
    "RATES",
    "RATE_ARMS",
    "fixed_rates_in_order",
]

# Plain's best rate is 0.011.
LOW_RATES = (1e-3, 2e-3)
RATES = tuple(5e-4 * 2**n for n in range(6))
RATE_ARMS = {
    "plain": HALF,
    "(2, 1)": scaled(2, 1, HALF),
    "uniform (2, 2)": scaled(2, 2, HALF),
    "(1, 2)": scaled(1, 2, HALF),
    "near-null (1.0001, 1)": scaled(NEAR_NULL, 1, HALF),
    "(2, 1), pooled": scaled(2, 1, HALF, projection="pooled"),
    "(1, 2), pooled": scaled(1, 2, HALF, projection="pooled"),
    "(2, 1), feature": scaled(2, 1, HALF, projection="feature"),
    "random subspace (2, 1)": scaled(2, 1, HALF, projection="random"),
    "(3, 1)": scaled(3, 1, HALF),
    "(1, 0.5)": scaled(1, 0.5, HALF),
    "uniform (0.5, 0.5)": scaled(0.5, 0.5, HALF),
}
MAIN_ARMS = ("plain", "(2, 1)", "uniform (2, 2)", "(1, 2)")
# The control that says what a gain is worth: plain training at a somewhat higher rate.
RATE_FACTORS = (1.02, 1.05, 1.1, 1.2, 1.5)
ALL_RATES = {f"plain, rate x {factor:g}": factor for factor in RATE_FACTORS}
QK_RATES = {f"plain, Q and K's rate x {factor:g}": factor for factor in RATE_FACTORS}


def at_rate(lr: float, name: str = "rate", steps: int = 300, seeds: int = 16) -> Experiment:
    """Return the comparison at one fixed rate, with the equivalent-rate control at low ones."""
    base = replace(HALF, steps=steps)
    arms = {arm: replace(trial, steps=steps) for arm, trial in RATE_ARMS.items()}
    factors: dict[str, float] = {}
    if steps == HALF.steps and lr in LOW_RATES:
        # The learning rate is set with the seed; until then it tells these arms from plain.
        arms |= {arm: replace(base, lr=factor * lr) for arm, factor in ALL_RATES.items()}
        arms |= {arm: replace(base, qk_lr=factor) for arm, factor in QK_RATES.items()}
        factors = ALL_RATES
    if steps != HALF.steps:
        kept = (*MAIN_ARMS, "(2, 1), pooled", "(1, 2), pooled")
        arms = {arm: arms[arm] for arm in kept}
    return Experiment(
        f"{name}-{lr:g}",
        f"Does it help at a fixed learning rate of {lr:g}, for {steps} steps?",
        arms,
        "plain",
        (lr,),
        tuple(range(200, 200 + seeds)),
        lr_factor=factors,
    )


AT_RATE = {lr: at_rate(lr) for lr in RATES}
LONG_AT_RATE = [at_rate(lr, "long-rate", steps=2400, seeds=8) for lr in LOW_RATES]


def fixed_rates_in_order() -> Iterator[Experiment]:
    """Return parts of the comparisons at fixed rates, in an order that was set beforehand.

    What tells most comes first: low rates, the main arms and their control, half of the seeds.
    """
    pooled = ["(2, 1), pooled", "(1, 2), pooled"]
    low = [AT_RATE[lr] for lr in LOW_RATES]
    halves = (slice(0, 8), slice(8, 16))
    for half in halves:
        for arms in (MAIN_ARMS, [*ALL_RATES], pooled, [*QK_RATES]):
            for e in low:
                yield e.part([*dict.fromkeys(["plain", *arms])], half)
    rest = [AT_RATE[lr] for lr in (4e-3, 5e-4, 8e-3, 16e-3)]
    for half in halves:
        yield from (e.part(MAIN_ARMS, half) for e in rest)
    yield from (e.part(RATE_ARMS, slice(0, 8)) for e in (*low, *rest))
    yield from AT_RATE.values()


def at_low_rate(name: str, question: str, arms: dict[str, Trial], seeds: int = 8) -> Experiment:
    """Return a comparison at the lowest of the low rates, on seeds of its own."""
    lrs = LOW_RATES[:1]
    seeds_here = tuple(range(500, 500 + seeds))
    return Experiment(f"low-rate-{name}", question, arms, next(iter(arms)), lrs, seeds_here)


def three_arms(base: Trial) -> dict[str, Trial]:
    """Return plain, (2, 1) and its control for another model or task."""
    return {"plain": base, "(2, 1)": scaled(2, 1, base), "uniform (2, 2)": scaled(2, 2, base)}


EQUIVALENT = 1.07  # by what factor (2, 1) is worth a higher rate, see docs/evidence.md
AT_EQUIVALENT = replace(HALF, lr=EQUIVALENT * LOW_RATES[0])
AT_LOW_RATE = [
    replace(
        at_low_rate(
            "equivalent",
            "At an equal equivalent rate, is anything left, and do the two add up?",
            {
                f"plain, rate x {EQUIVALENT}": AT_EQUIVALENT,
                "(2, 1)": scaled(2, 1, HALF),
                f"(2, 1), rate x {EQUIVALENT}": scaled(2, 1, AT_EQUIVALENT),
            },
            seeds=16,
        ),
        lr_factor={
            f"plain, rate x {EQUIVALENT}": EQUIVALENT,
            f"(2, 1), rate x {EQUIVALENT}": EQUIVALENT,
        },
    ),
    at_low_rate(
        "paths",
        "By which way does it act at a low rate?",
        {"plain": HALF}
        | {
            f"{name} to the {path} only": scaled(a, b, HALF, path=path)
            for name, a, b in (("(2, 1)", 2, 1), ("uniform (2, 2)", 2, 2))
            for path in ("weights", "inputs")
        },
    ),
    at_low_rate(
        "grid",
        "Which pair of scales at a low rate?",
        {"(1, 1)": HALF}
        | {
            f"({a:g}, {b:g})": scaled(a, b, HALF)
            for a in FACTORS
            for b in FACTORS
            if (a, b) != (1.0, 1.0)
        },
        seeds=3,
    ),
]
AT_LOW_RATE_ELSEWHERE = [
    *(
        at_low_rate(
            f"head-dim-{d}",
            f"Does it help at a low rate with heads of dimension {d}?",
            three_arms(replace(HALF, width=128, heads=128 // d, batch=4)),
        )
        for d in (8, 32, 128)
    ),
    at_low_rate(
        "subwords",
        "Does it help at a low rate on subwords?",
        three_arms(replace(HALF, task="subwords")),
    ),
    *(
        at_low_rate(
            f"size-{layers}x{width}",
            f"Does it help at a low rate with {layers} layers of width {width}?",
            three_arms(replace(HALF, layers=layers, width=width, heads=width // 32)),
        )
        for layers, width in ((3, 96), (4, 128))
    ),
    *(
        at_low_rate(
            f"text-{name.lower().replace(' ', '-')}",
            f"Does it help at a low rate on another text, {name}?",
            {arm: replace(RATE_ARMS[arm], text=name) for arm in MAIN_ARMS},
        )
        for name in OTHER_TEXTS
    ),
]
