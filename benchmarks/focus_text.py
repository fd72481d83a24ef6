"""Training for the study of semantic focus: the study's causal decoder on a text."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from harness.optimizers import adamw
from harness.tasks import build_task
from harness.texts import Text
from harness.training import evaluate, learning_rates, train_step
from harness.trial import Trial

from spanopt.focus import Focus, focus

__all__ = ["LOSS", "train_on_text"]

LOSS, TUNING_LOSS = "loss", "tuning loss"


def train_on_text(
    seed: int,
    wrap: Any,
    lr: float = 0.004,
    kind: str | None = None,
    k: int | None = None,
    *,
    text: Text,
    steps: int = 300,
    batch: int = 8,
    length: int = 128,
) -> dict[str, float | None]:
    """Train the decoder once.

    Args:
        seed: Decides the weights and the batches.
        wrap: Puts an arm's scales on the optimizer.
        lr: Peak learning rate of AdamW, after the study's warm-up and before its cosine.
        kind: The kind of focus; ``None`` for full attention.
        k: How many keys are kept.
        text: What to train on.
        steps: Optimizer steps.
        batch: Sequences of a batch.
        length: Tokens of a sequence.

    Returns:
        ``LOSS``, by which arms are compared, and ``TUNING_LOSS``, by which rates are chosen: in
        nats per character, on two halves of the validation text. Infinite if training diverged.
    """
    trial = Trial(seed=seed, lr=lr, steps=steps, batch=batch, length=length)
    torch.manual_seed(seed)
    task = build_task(trial, text)
    (optimizer,) = adamw(task.model, trial)
    scheduler = learning_rates(optimizer, trial)
    wrapped = wrap(optimizer, task.model)
    rng = np.random.default_rng(seed)
    task.model.train()
    with nullcontext() if kind is None else focus(task.model, Focus(k, kind)):
        for _ in range(steps):
            train_step(task, task.batch(rng), [wrapped], trial)
            scheduler.step()
        losses = {name: evaluate(task, part, []) for name, part in task.splits.items()}
    tuning, reporting = (losses[name] for name in ("tuning", "reporting"))
    missing = float("inf")
    return {
        LOSS: missing if reporting is None else reporting,
        TUNING_LOSS: missing if tuning is None else tuning,
    }
