"""Does semantic focus help? The setting of the paper, with a learning rate tuned for each arm.

    python benchmarks/focus_study.py even-pairs --out runs/even-pairs

The setting is that of the authors' scripts (github.com/rithram/spartan): an encoder with one head,
mean pooling and plain SGD, sequences of 40 tokens, 5,000 to train on. What is measured is the
number of optimizer steps until 95 % of held-out sequences are right. A run that does not get there
counts as the cap on steps, and is reported as censored. A run that is killed goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from focus_tasks import TASKS
from torch import Tensor, nn
from torch.nn import functional as F

from spanopt import SpanMonitor, SpanScaledOptimizer
from spanopt.compare import Arm, Comparison, compare
from spanopt.focus import Focus, focus

METRIC = "steps to 95 %"
ARMS = {
    "top 5": ("top", 5),
    "top 9": ("top", 9),
    "window 5": ("window", 5),
    "window 9": ("window", 9),
    "block 5": ("block", 5),
    "block 9": ("block", 9),
    "gradient 5": ("gradient", 5),
}


class Encoder(nn.Module):
    """The paper's encoder: norm first, without parameters in the norms, and mean pooling."""

    def __init__(self, tokens: int, classes: int, length: int, width: int, blocks: int) -> None:
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
        self.drop = nn.Dropout(0.01)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits, shape (batch, classes)."""
        x = self.embed(tokens)
        x = self.drop(x * x.shape[-1] ** 0.5 + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Block(nn.Module):
    """One layer of the encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.Dropout(0.01), nn.ReLU(), nn.Linear(width, width)
        )
        self.drop = nn.Dropout(0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after the layer, shape (batch, length, width)."""
        x = x + self.drop(self.attention(F.layer_norm(x, x.shape[-1:])))
        return x + self.drop(self.mlp(F.layer_norm(x, x.shape[-1:])))


class Attention(nn.Module):
    """Attention with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention's output, shape (batch, length, width)."""
        q, k, v = (project(x)[:, None] for project in (self.q, self.k, self.v))
        dropout = 0.01 if self.training else 0.0
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
        The steps until 95 %, or the cap; whether it was reached (1 or 0 plus a tiny number, as
        :func:`spanopt.compare.compare` takes numbers above 0); the accuracy at the end.
    """
    spec = TASKS[task]
    torch.manual_seed(seed)
    model = Encoder(spec.tokens, spec.classes, length, width, blocks)
    sets = [spec.sample(n, length, 2 * seed + i) for i, n in enumerate((examples, held_out))]
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    wrapped = wrap(kinds[optimizer](model.parameters(), lr=lr), model)
    batches = torch.Generator().manual_seed(seed)
    step, accuracy = 0, 0.0
    with nullcontext() if kind is None else focus(model, Focus(k, kind)):
        while step < cap:
            for batch in torch.randperm(examples, generator=batches).split(25):
                x, y = (part[batch] for part in sets[0])
                wrapped.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                wrapped.step()
                step += 1
                if step % every == 0 or step == cap:
                    accuracy = _accuracy(model, *sets[1])
                    if accuracy >= 0.95 or step >= cap or not math.isfinite(accuracy):
                        break
            if accuracy >= 0.95 or step >= cap:
                break
            for group in wrapped.param_groups:
                group["lr"] *= 0.9995
    reached = float(accuracy >= 0.95)
    return {METRIC: float(step), "reached": reached + 1e-9, "accuracy": accuracy + 1e-9}


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(-1) == y).double().mean().item()
    model.train()
    return right


def measure(task: str, seed: int, lr: float, **settings: Any) -> list[dict[str, Any]]:
    """Train with full attention and return the measures of scores, every few steps."""
    monitors: list[SpanMonitor] = []

    def wrap(optimizer: Any, model: nn.Module) -> Any:
        wrapped = SpanScaledOptimizer(optimizer, model, {"*": (1.0, 1.0)})
        monitors.append(SpanMonitor(wrapped, every=settings.get("every", 25), scores=True, keys=5))
        return wrapped

    train(seed, wrap, lr, task=task, **settings)
    monitors[0].close()
    return monitors[0].rows


def summary(result: Comparison) -> list[dict[str, Any]]:
    """Return for each arm its rate, the quartiles of its steps, and how many runs are censored."""
    rows = []
    trials = result.trials()
    for arm, lr in result.values().items():
        of_arm = [
            row["result"]["metrics"]
            for row in trials
            if row["trial"]["arm"] == arm
            and row["trial"]["value"] == lr
            and row["trial"]["seed"] in result.seeds
            and not row["trial"]["again"]
            and "metrics" in row["result"]
        ]
        steps = [metrics[METRIC] for metrics in of_arm]
        if not steps:
            continue
        low, middle, high = statistics.quantiles(steps, n=4) if len(steps) > 1 else steps * 3
        change = result.changes.get(arm)
        rows.append(
            {
                "arm": arm,
                "lr": lr,
                "quartiles": [low, middle, high],
                "censored": sum(metrics["reached"] < 0.5 for metrics in of_arm),
                "seeds": len(steps),
                "change": None if change is None else [change.mean, change.low, change.high],
                "accuracy": statistics.median(metrics["accuracy"] for metrics in of_arm),
            }
        )
    return rows


def as_text(rows: list[dict[str, Any]]) -> str:
    """Return the summary as a table in Markdown."""
    lines = [
        "| arm | learning rate | steps to 95 %: median (quartiles) | censored | change, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, middle, high = (f"{x:.0f}" for x in row["quartiles"])
        change = ""
        if row["change"] is not None:
            mean, least, most = row["change"]
            change = f"{mean:+.0f} ({least:+.0f} to {most:+.0f})"
        lines.append(
            f"| {row['arm']} | {row['lr']:g} | {middle} ({low} to {high}) | "
            f"{row['censored']} of {row['seeds']} | {change} |"
        )
    return "\n".join(lines)


def run(
    task: str,
    out: Path,
    *,
    arms: list[str],
    seeds: int,
    rates: list[float],
    progress: bool = True,
    span: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Compare the arms on a task and write the summary beside the trials.

    Args:
        task: One of ``TASKS``.
        out: The folder of the trials.
        arms: Names in ``ARMS``.
        seeds: How many seeds.
        rates: The learning rates to begin with.
        progress: Whether progress is shown.
        span: Whether span scaling by (2, 1) is compared too, alone and with each arm.
        **settings: Further arguments of :func:`train`.
    """
    chosen = {arm: Arm(params=dict(zip(("kind", "k"), ARMS[arm], strict=True))) for arm in arms}
    if span:
        chosen |= {
            f"{name} and (2, 1)": Arm((2, 1), params=arm.params) for name, arm in chosen.items()
        }
        chosen["(2, 1)"] = Arm((2, 1))
    result = compare(
        functools.partial(train, task=task, **settings),
        chosen,
        seeds,
        tune={"lr": rates},
        controls=(),
        metric=METRIC,
        out=out,
        progress=progress,
    )
    rows = summary(result)
    (out / "summary.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the trials")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--cap", type=int, default=1500, help="the most steps of a run")
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations")
    parser.add_argument("--held-out", type=int, default=500, help="sequences to evaluate on")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--span", action="store_true", help="span scaling by (2, 1) too")
    given = vars(parser.parse_args())
    print(as_text(run(given.pop("task"), given.pop("out"), **given)))


if __name__ == "__main__":
    main()
