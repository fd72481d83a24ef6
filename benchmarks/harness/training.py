"""Running one trial."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.optimizers import build_optimizers, scheduled
from harness.tasks import Task, build_task
from harness.texts import Text
from harness.trial import Trial
from harness.wrapping import ByShare, scale_schedulers, wrap
from spanopt import SpanMonitor

__all__ = ["run_trial"]

WARM_UP = 0.1
POINTS = 12  # on the curve
MEASUREMENTS = 30
MEASURES = ["parallel_share", "chance_share", "effective_rank", "condition"]


def run_trial(trial: Trial, text: Text) -> dict[str, Any]:
    """Train one model.

    Args:
        trial: What to train and how.
        text: What to train on.

    Returns:
        ``tuning`` and ``reporting``, the final losses on the two splits of the validation data, in
        the task's unit and ``None`` if training diverged; ``curve``, pairs of a step and the loss
        on part of the reporting split; ``seconds`` of training, without evaluation; and
        ``step_ms``, the median time of a step.
    """
    torch.manual_seed(trial.seed)
    task = build_task(trial, text)
    optimizers = build_optimizers(trial, task.model)
    stepped: list[Any] = [*optimizers]
    schedulers = [learning_rates(x, trial) for x in scheduled(trial, optimizers)]
    if (trial.scaled and not trial.in_model) or trial.monitored:
        # the first one has the parameters of the attention layers
        stepped[0] = wrap(optimizers[0], task.model, trial)
        schedulers += scale_schedulers(stepped[0], trial)
    if trial.qk_lr != 1.0:
        raise_qk_rate(optimizers[0], task.model, trial)
    averaged = [optimizer for optimizer in optimizers if hasattr(optimizer, "eval")]
    for optimizer in averaged:
        optimizer.train()
    by_share = None
    if trial.by_share:
        by_share = ByShare(stepped[0], trial.parallel)
    monitor = None
    if trial.monitored:
        monitor = SpanMonitor(stepped[0], every=max(1, trial.steps // MEASUREMENTS))
    rng = np.random.default_rng(trial.seed)
    task.model.train()
    seconds, curve = [], []
    every = math.ceil(trial.steps / POINTS)
    for step in range(1, trial.steps + 1):
        batch = task.batch(rng)
        start = time.perf_counter()
        loss = train_step(task, batch, stepped, trial)
        for scheduler in schedulers:
            scheduler.step()
        if by_share is not None:
            by_share.step()
        value = loss.item()
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(value):
            break
        if step % every == 0 and step < trial.steps:
            curve.append((step, evaluate(task, task.probe, averaged)))
    losses = {name: evaluate(task, part, averaged) for name, part in task.splits.items()}
    result: dict[str, Any] = {
        **losses,
        "curve": curve,
        "seconds": round(sum(seconds), 3),
        "step_ms": round(1e3 * statistics.median(seconds), 3),
    }
    if monitor is not None:
        monitor.close()
        result["monitor"] = measured(monitor)
    return result


def measured(monitor: SpanMonitor) -> list[dict[str, Any]]:
    """Return the mean over heads of what was measured, by step, layer and side."""
    table = monitor.to_pandas().groupby(["step", "layer", "side"], sort=False)
    return table[MEASURES].mean().round(5).reset_index().to_dict("records")


def train_step(task: Task, batch: Any, optimizers: list[Any], trial: Trial) -> Tensor:
    """Take one optimizer step and return the loss of the batch."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = task.loss(task.model, batch)
    loss.backward()
    if trial.clip:
        nn.utils.clip_grad_norm_(task.model.parameters(), trial.clip)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def learning_rates(optimizer: torch.optim.Optimizer, trial: Trial) -> Any:
    """Return the learning-rate scheduler of an optimizer."""
    warm_up = max(1, round(WARM_UP * trial.steps))

    def factor(step: int) -> float:
        if trial.lr_schedule == "constant":
            return 1.0
        return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / trial.steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def raise_qk_rate(optimizer: torch.optim.Optimizer, model: nn.Module, trial: Trial) -> None:
    """Give the rows of Q and K in each ``qkv`` layer a rate of their own.

    AdamW's update, weight decay included, is proportional to its rate. So the change that a step
    made to these rows is multiplied afterwards, which is the same as a rate multiplied before.
    """
    if trial.optimizer != "AdamW":
        raise ValueError(f"qk_lr is exact for AdamW alone, not for {trial.optimizer}")
    rows = [
        parameter[: 2 * trial.width]
        for name, parameter in model.named_parameters()
        if name.endswith(("qkv.weight", "qkv.bias"))
    ]
    if not rows:
        raise ValueError(f"no layer of task {trial.task!r} is named qkv")
    before: list[Tensor] = []

    def keep(*_: Any) -> None:
        before[:] = [row.detach().clone() for row in rows]

    @torch.no_grad()
    def multiply(*_: Any) -> None:
        for row, old in zip(rows, before, strict=True):
            row.add_(row - old, alpha=trial.qk_lr - 1)

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(multiply)


@torch.no_grad()
def evaluate(task: Task, data: Any, averaged: list[Any]) -> float | None:
    """Return the mean loss on validation data, ``None`` if it is not finite."""
    task.model.eval()
    for optimizer in averaged:  # schedule-free evaluates at an average of the weights
        optimizer.eval()
    loss = task.validate(task.model, data)
    for optimizer in averaged:
        optimizer.train()
    task.model.train()
    return loss if math.isfinite(loss) else None
