"""Training for the study of semantic focus: the paper's encoder on a task, until it is learnt."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from focus_tasks import TASKS
from torch import Tensor, nn
from torch.nn import functional as F

from spanopt import SpanMonitor, SpanScaledOptimizer
from spanopt.focus import Focus, focus

__all__ = ["ACCURACY", "SCORE", "STEPS", "measure", "train"]

STEPS, ACCURACY, SCORE = "steps to 95 %", "accuracy", "tuning score"
MEASURES = ("dispersion", "top_dispersion", "separation", "jacobian", "lambda_w", "lambda_x")


class Encoder(nn.Module):
    """The paper's encoder: norm first, without parameters in the norms, and mean pooling."""

    def __init__(
        self, tokens: int, classes: int, length: int, width: int, blocks: int, dropout: float = 0.01
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.head = nn.Linear(width, classes)
        for weight in (self.embed.weight, self.head.weight):
            nn.init.uniform_(weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)
        angles = torch.arange(length)[:, None] * torch.exp(
            torch.arange(0, width, 2) * (-math.log(1e4) / width)
        )
        positions = torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)
        self.register_buffer("positions", positions)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(blocks))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits, shape (batch, classes)."""
        x = self.embed(tokens)
        x = self.drop(x * x.shape[-1] ** 0.5 + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Block(nn.Module):
    """One layer of the encoder."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.Dropout(dropout), nn.ReLU(), nn.Linear(width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after the layer, shape (batch, length, width)."""
        x = x + self.drop(self.attention(F.layer_norm(x, x.shape[-1:])))
        return x + self.drop(self.mlp(F.layer_norm(x, x.shape[-1:])))


class Attention(nn.Module):
    """Attention with one head."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention's output, shape (batch, length, width)."""
        q, k, v = (project(x)[:, None] for project in (self.q, self.k, self.v))
        dropout = self.dropout if self.training else 0.0
        return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)[:, 0])


def train(
    seed: int,
    wrap: Any,
    lr: float = 0.1,
    kind: str | None = None,
    k: int | None = None,
    *,
    task: str = "even-pairs",
    cap: int = 1500,
    every: int = 25,
    dropout: float = 0.01,
    length: int = 40,
    width: int = 64,
    blocks: int = 5,
    examples: int = 5000,
    held_out: int = 500,
    optimizer: str = "sgd",
) -> dict[str, float]:
    """Train once, until 95 % of the held-out sequences are right or the cap is reached.

    Args:
        seed: Decides the weights, the sequences and the batches.
        wrap: Puts an arm's scales on the optimizer.
        lr: Learning rate; times 0.9995 after each epoch.
        kind: The kind of focus; ``None`` for full attention.
        k: How many keys are kept.
        task: One of ``TASKS``.
        cap: The most steps.
        every: Steps between evaluations.
        length: Tokens of a sequence.
        width: Width of the model.
        blocks: Number of layers.
        examples: Sequences to train on.
        held_out: Sequences to evaluate on.
        optimizer: ``"sgd"`` or ``"adamw"``.

    Returns:
        ``STEPS``: the steps until 95 %, or the cap. ``reached``: 1 or 0. ``ACCURACY``: on held-out
        sequences at the end. ``SCORE``, by which rates are chosen: the steps, or, for a run that
        does not get there, the cap times 1 plus what its accuracy lacks.
    """
    spec = TASKS[task]
    torch.manual_seed(seed)
    model = Encoder(spec.tokens, spec.classes, length, width, blocks, dropout)
    x, y = drawn(task, examples, length, 2 * seed)
    unseen = drawn(task, held_out, length, 2 * seed + 1)
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    wrapped = wrap(kinds[optimizer](model.parameters(), lr=lr), model)
    batches = torch.Generator().manual_seed(seed)
    step, accuracy = 0, 0.0
    with nullcontext() if kind is None else focus(model, Focus(k, kind)):
        while step < cap and accuracy < 0.95:
            for batch in torch.randperm(examples, generator=batches).split(25):
                wrapped.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                wrapped.step()
                step += 1
                if step % every == 0 or step == cap:
                    accuracy = accuracy_of(model, *unseen)
                    if accuracy >= 0.95 or step == cap:
                        break
            for group in wrapped.param_groups:
                group["lr"] *= 0.9995
    reached = accuracy >= 0.95
    score = step if reached else cap * (1 + 0.95 - accuracy)
    return {STEPS: float(step), "reached": float(reached), ACCURACY: accuracy, SCORE: score}


@functools.lru_cache(maxsize=64)
def drawn(task: str, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw sequences of a task; the same ones are drawn once, as arms share them."""
    return TASKS[task].sample(count, length, seed)


def accuracy_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return which share of sequences is put into the right class."""
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(-1) == y).double().mean().item()
    model.train()
    return right


def measure(
    function: Callable[..., Any], seed: int, lr: float, *, keys: int, every: int
) -> list[dict[str, Any]]:
    """Train with full attention, and return the measures of scores at some steps.

    Args:
        function: Trains, when it is called with a seed, a wrapper of optimizers and a rate.
        seed: As in the comparison.
        lr: The rate at which full attention was compared.
        keys: How many keys focus would keep.
        every: Steps between measures.

    Returns:
        A row for each measured step and layer, with means over heads of ``MEASURES``.
    """
    monitors: list[SpanMonitor] = []

    def wrap(optimizer: Any, model: nn.Module) -> Any:
        wrapped = SpanScaledOptimizer(optimizer, model, {"*": (1.0, 1.0)})
        monitors.append(SpanMonitor(wrapped, every=every, scores=True, keys=keys))
        return wrapped

    function(seed, wrap, lr)
    monitors[0].close()
    heads: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in monitors[0].rows:
        if row["side"] == "query" and all(row[name] is not None for name in MEASURES):
            heads.setdefault((row["step"], row["layer"]), []).append(row)
    return [
        {"seed": seed, "step": step, "layer": layer}
        | {name: round(statistics.fmean(row[name] for row in rows), 4) for name in MEASURES}
        for (step, layer), rows in heads.items()
    ]
