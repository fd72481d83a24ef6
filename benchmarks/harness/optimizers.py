"""The optimizers that the study trains with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import schedulefree
import torch
import torch_optimizer
from torch import nn

from harness.trial import Trial

__all__ = ["OPTIMIZERS", "build_optimizers", "scheduled"]

WEIGHT_DECAY = 0.01
# Muon takes the matrices of the blocks; AdamW, at a rate of its own, the rest.
MUON_ADAMW_LR = 8e-3


def adamw(model: nn.Module, trial: Trial) -> list[Any]:
    """Return AdamW, with the betas that go with the model."""
    betas = (0.9, 0.999) if trial.model == "learned" else (0.9, 0.95)
    return [
        torch.optim.AdamW(model.parameters(), lr=trial.lr, betas=betas, weight_decay=WEIGHT_DECAY)
    ]


def muon(model: nn.Module, trial: Trial) -> list[Any]:
    """Return Muon for the matrices inside the blocks, and AdamW for everything else."""
    inside = {name: p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2}
    rest = [p for name, p in model.named_parameters() if name not in inside]
    return [
        torch.optim.Muon(inside.values(), lr=trial.lr, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=MUON_ADAMW_LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY),
    ]


def of(cls: Any, **options: Any) -> Callable[[nn.Module, Trial], list[Any]]:
    """Return a function that makes an optimizer of a class."""
    return lambda model, trial: [cls(model.parameters(), lr=trial.lr, **options)]


def around_adamw(cls: Any) -> Callable[[nn.Module, Trial], list[Any]]:
    """Return a function that makes a wrapper around AdamW."""
    return lambda model, trial: [cls(adamw(model, trial)[0])]


OPTIMIZERS: dict[str, Callable[[nn.Module, Trial], list[Any]]] = {
    "AdamW": adamw,
    "SGD": of(torch.optim.SGD, momentum=0.9),
    "Muon": muon,
    "Lamb": of(torch_optimizer.Lamb, betas=(0.9, 0.95)),
    "AdaBelief": of(torch_optimizer.AdaBelief, betas=(0.9, 0.95)),
    "RAdam": of(torch_optimizer.RAdam, betas=(0.9, 0.95)),
    "Lookahead": around_adamw(torch_optimizer.Lookahead),
    "OrthoGrad": around_adamw(pytorch_optimizer.OrthoGrad),
    "AdamWScheduleFree": lambda model, trial: [
        schedulefree.AdamWScheduleFree(
            model.parameters(),
            lr=trial.lr,
            betas=(0.9, 0.95),
            weight_decay=WEIGHT_DECAY,
            warmup_steps=trial.steps // 10,
        )
    ],
}
# These have a schedule of their own.
UNSCHEDULED = {"AdamWScheduleFree"}


def build_optimizers(trial: Trial, model: nn.Module) -> list[Any]:
    """Return the trial's optimizers; the first has the parameters of the attention layers."""
    if trial.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"no optimizer of the study is named {trial.optimizer!r}, only {', '.join(OPTIMIZERS)}"
        )
    return OPTIMIZERS[trial.optimizer](model, trial)


def scheduled(trial: Trial, optimizers: list[Any]) -> list[torch.optim.Optimizer]:
    """Return the optimizers whose learning rates are to be scheduled: those inside wrappers."""
    if trial.optimizer in UNSCHEDULED:
        return []
    return [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
