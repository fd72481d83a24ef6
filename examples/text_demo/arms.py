"""The two trainings that are compared: a model and its optimizer, and one step of it."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spanopt import SpanScale, SpanScaledOptimizer
from text_demo.errors import UserError, one_line
from text_demo.model import Decoder
from text_demo.optimizers import find_optimizer, needs_closure, needs_second_order
from text_demo.options import Config
from text_demo.resuming import ARMS

__all__ = ["Arm", "build_arm", "build_arms", "evaluate", "restore", "train_step"]

CLIP = 1.0


@dataclass
class Arm:
    """One of the two trainings that are compared."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    needs_closure: bool
    second_order: bool
    loss: float = 0.0  # of the latest batch; once it is not finite the arm trains no further

    @property
    def trains(self) -> bool:
        """Whether the arm has not diverged."""
        return math.isfinite(self.loss)

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the training depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss": self.loss,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss = state["loss"]


def build_arm(name: str, model: Decoder, config: Config) -> Arm:
    """Give a model its optimizer; the arm "span" wraps it."""
    cls = find_optimizer(config.optimizer)
    options = {} if config.lr is None else {"lr": config.lr}
    optimizer = cls(model.parameters(), **options)  # type: ignore[arg-type]
    if name == "span":
        scale = SpanScale(parallel=config.parallel, violation=config.violation)
        optimizer = SpanScaledOptimizer(optimizer, model, scales={"*": scale})
    return Arm(model, optimizer, needs_closure(cls), needs_second_order(cls))


def build_arms(config: Config, vocabulary: int, seed: int) -> dict[str, Arm]:
    """Build both arms from the same initial weights."""
    torch.manual_seed(seed)
    initial = Decoder(vocabulary, config)
    return {name: build_arm(name, copy.deepcopy(initial), config) for name in ARMS}


def restore(arms: dict[str, Arm], states: dict[str, Any]) -> None:
    """Go on from the states of a checkpoint."""
    for name, arm in arms.items():
        try:
            arm.load_state(states[name])
        except Exception as error:  # a state that fits in another way raises another kind
            message = f"the checkpoint does not fit the arm {name}: {one_line(error)}"
            raise UserError(message) from error


def train_step(arm: Arm, windows: Tensor) -> None:
    """Take one optimizer step, unless the arm has diverged."""

    def closure() -> Tensor:
        arm.optimizer.zero_grad()
        loss = arm.model.loss(windows)
        loss.backward(create_graph=arm.second_order)
        nn.utils.clip_grad_norm_(arm.model.parameters(), CLIP)
        return loss

    # Of the attention kernels only this one can be differentiated twice.
    twice = sdpa_kernel(SDPBackend.MATH) if arm.second_order else contextlib.nullcontext()
    with twice:
        if arm.needs_closure:
            arm.loss = arm.optimizer.step(closure).item()  # type: ignore
            return
        arm.loss = closure().item()
        if arm.trains:
            arm.optimizer.step()


@torch.no_grad()
def evaluate(arm: Arm, windows: Tensor) -> float:
    """Return the validation loss in nats per character, NaN for an arm that has diverged."""
    if not arm.trains:
        return math.nan
    arm.model.eval()
    losses = [arm.model.loss(part).item() * len(part) for part in windows.split(16)]
    arm.model.train()
    return math.fsum(losses) / len(windows)
