"""What is measured against each other: training steps, plain and wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spanopt import SpanScale, SpanScaledOptimizer
from speed.cases import Case, Setting, build, training_step

__all__ = ["adamw", "steps", "wrapped"]

LR = 1e-4


def adamw(setting: Setting) -> torch.optim.AdamW:
    """Return AdamW for a model."""
    return torch.optim.AdamW(setting.model.parameters(), lr=LR)


def wrapped(setting: Setting, parallel: float = 2.0, violation: float = 1.0) -> SpanScaledOptimizer:
    """Return AdamW for a model, wrapped."""
    return SpanScaledOptimizer(adamw(setting), setting.model, SpanScale(parallel, violation))


def steps(case: Case, *, compiled: bool = False) -> dict[str, Callable[[], None]]:
    """Return training steps of one model each: ``plain``, ``again`` (also plain) and ``wrapped``.

    What the second plain one differs by from the first is noise.
    """
    makers: dict[str, Callable[[Setting], Any]] = {
        "plain": adamw,
        "again": adamw,
        "wrapped": wrapped,
    }
    made = {}
    for name, make in makers.items():
        setting = build(case)
        optimizer = make(setting)
        if compiled:
            setting.model.compile()
        made[name] = training_step(setting, optimizer)
    return made
