"""How a trial scales the gradients of attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from harness.trial import Trial
from spanopt import SpanMonitor, SpanScale, SpanScaledOptimizer, SpanScheduler, find_attention
from spanopt.schedules import linear

__all__ = ["ByShare", "random_subspace", "scale_schedulers", "spectral", "wrap"]


def wrap(optimizer: torch.optim.Optimizer, model: nn.Module, trial: Trial) -> SpanScaledOptimizer:
    """Wrap an optimizer as the trial says."""
    pair, same = (trial.parallel, trial.violation), (1.0, 1.0)
    scale = SpanScale(
        query=pair if trial.side in ("both", "query") else same,
        key=pair if trial.side in ("both", "key") else same,
    )
    names = [site.name for site in find_attention(model)]
    chosen = {"all": names, "first": names[:1], "last": names[-1:]}[trial.where]
    return SpanScaledOptimizer(
        optimizer,
        model,
        scales={name: scale if name in chosen else None for name in names},
        ridge=trial.ridge,
        projection=OWN_SETUPS.get(trial.projection, trial.projection),
        preserve_norm=trial.preserve_norm,
    )


def random_subspace(
    grad: Tensor,
    basis: Tensor,
    other: Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project onto a random subspace of the dimension that the span has, a new one each time."""
    directions, _ = torch.linalg.qr(torch.randn_like(basis))
    return directions @ (directions.mT @ grad)


def spectral(
    grad: Tensor,
    basis: Tensor,
    other: Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project onto the span, each direction weighed by its singular value over the largest one."""
    directions, sizes, _ = torch.linalg.svd(basis.float(), full_matrices=False)
    weights = sizes / sizes[..., :1].clamp_min(torch.finfo(sizes.dtype).tiny)
    return ((directions * weights.unsqueeze(-2)) @ (directions.mT @ grad.float())).to(grad.dtype)


OWN_SETUPS: dict[str, Any] = {"random": random_subspace, "spectral": spectral}


def scale_schedulers(optimizer: SpanScaledOptimizer, trial: Trial) -> Iterable[SpanScheduler]:
    """Return the scheduler of the scales, if they move."""
    if trial.scale_schedule == "warm-up":
        yield SpanScheduler(optimizer, linear(trial.steps // 3))
    if trial.scale_schedule == "decay":
        yield SpanScheduler(optimizer, lambda step: max(0.0, 1 - step / trial.steps))
    kind, _, share = trial.scale_schedule.partition("-")
    if kind == "early":
        end = trial.steps * int(share) / 100
        yield SpanScheduler(optimizer, lambda step: 1.0 if step < end else 0.0)


class ByShare:
    """Set the parallel factor of each head to its parallel share over the share of chance.

    Args:
        optimizer: The wrapped optimizer.
        most: The largest factor; the smallest is 1.
        every: Steps from one measurement to the next.
    """

    def __init__(self, optimizer: SpanScaledOptimizer, most: float, every: int = 25) -> None:
        self.optimizer, self.most = optimizer, most
        self.monitor = SpanMonitor(optimizer, every=every)
        self._used = 0

    def step(self) -> None:
        """Set the factors by what the last step measured, if it measured anything."""
        factors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        new = self.monitor.rows[self._used :]
        self._used += len(new)
        for row in new:
            share, chance = row["parallel_share"], row["chance_share"]
            factor = 1.0 if share is None else min(max(share / chance, 1.0), self.most)
            factors[row["layer"]][row["side"]].append(factor)
        for group in self.optimizer.span_groups:
            if group["name"] in factors:
                group.update({s: (f, 1.0) for s, f in factors[group["name"]].items()})
