"""Variants of the method: paths, pairs of scales, places, setups, and other wrappers."""

from __future__ import annotations

from dataclasses import replace

from harness.experiment import Experiment

from experiments.base import FACTORS, HALF, HALF_SEEDS, LRS, at_plains_rate, scaled

__all__ = ["GRID", "PATHS", "PLACES", "RIVALS", "SETUPS", "TIME"]

PATHS_CLIPPED = {
    "(2, 1)": scaled(2, 1, HALF),
    "(2, 1) to the weights only": scaled(2, 1, HALF, path="weights"),
    "(2, 1) to the inputs only": scaled(2, 1, HALF, path="inputs"),
    "uniform (2, 2)": scaled(2, 2, HALF),
    "uniform (2, 2) to the weights only": scaled(2, 2, HALF, path="weights"),
    "uniform (2, 2) to the inputs only": scaled(2, 2, HALF, path="inputs"),
}
PATHS_UNCLIPPED = {
    "(2, 1), no clipping": scaled(2, 1, HALF, clip=0.0),
    "uniform (2, 2), no clipping": scaled(2, 2, HALF, clip=0.0),
}
PATHS = at_plains_rate(
    "paths",
    "By which way does the scaled gradient act: weights, earlier layers, or clipping?",
    PATHS_CLIPPED | {"plain, no clipping": replace(HALF, clip=0.0)} | PATHS_UNCLIPPED,
    baselines=dict.fromkeys(PATHS_UNCLIPPED, "plain, no clipping"),
)

GRID = at_plains_rate(
    "grid",
    "Which pair of scales?",
    {
        f"({a:g}, {b:g})": scaled(a, b, HALF)
        for a in FACTORS
        for b in FACTORS
        if (a, b) != (1.0, 1.0)
    },
    plain="(1, 1)",
    seeds=HALF_SEEDS[:3],
)

MOVED = {
    "query only": scaled(2, 1, HALF, side="query"),
    "key only": scaled(2, 1, HALF, side="key"),
    "first layer only": scaled(2, 1, HALF, where="first"),
    "last layer only": scaled(2, 1, HALF, where="last"),
    "scales warmed up": scaled(2, 1, HALF, scale_schedule="warm-up"),
    "scales decaying": scaled(2, 1, HALF, scale_schedule="decay"),
}
PLACES = at_plains_rate(
    "places",
    "Does it matter on which side, in which layer and when?",
    {"(2, 1)": scaled(2, 1, HALF)} | {f"(2, 1), {name}": trial for name, trial in MOVED.items()},
)
# A wrapped step took 1.3 times as long as a plain one in the primary comparison.
TIME = at_plains_rate(
    "time",
    "Does it help in the same time?",
    {
        "(2, 1)": scaled(2, 1, HALF),
        "(2, 1), 300 / 1.3 steps": scaled(2, 1, HALF, steps=231),
    },
)

SETUPS = at_plains_rate(
    "setups",
    "Does another notion of the parallel part do better?",
    {
        f"({a:g}, {b:g}), {setup}": scaled(a, b, HALF, projection=setup)
        for setup in ("span", "cross", "oblique", "radial", "feature", "pooled")
        for a, b in ((2, 1), (1, 0.5))
    },
)

RIVALS = Experiment(
    "rivals",
    "How does it compare with other wrappers and optimizers?",
    arms={
        "plain": HALF,
        "(2, 1)": scaled(2, 1, HALF),
        "uniform (2, 2)": scaled(2, 2, HALF),
        "Lookahead": replace(HALF, optimizer="Lookahead"),
        "OrthoGrad": replace(HALF, optimizer="OrthoGrad"),
        "schedule-free AdamW": replace(HALF, optimizer="AdamWScheduleFree"),
        "Muon": replace(HALF, optimizer="Muon"),
    },
    baseline="plain",
    lrs=LRS,
    seeds=HALF_SEEDS,
)
