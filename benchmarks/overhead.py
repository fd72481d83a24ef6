"""Time of a whole training step with span scaling, as a ratio to the same step without it.

A stack of GPT-like decoder blocks is trained by AdamW, once plain and once wrapped. The two take
turns in one process, step by step, and the ratio is that of each pair of neighbours, so a machine
that is slow for a while is slow for both. Beside it stands the bound: the floating-point
operations of the projections over those of the step.

    python benchmarks/overhead.py --threads 2
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spanopt import SpanScaledOptimizer


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor
) -> Callable[[], None]:
    """Return a function that takes one training step: forward, backward, update."""

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def paired_times(first: Callable[[], None], second: Callable[[], None], pairs: int) -> np.ndarray:
    """Run the two in turn and return their times in seconds, shape (pairs, 2)."""
    times = np.zeros((pairs, 2))
    for pair in range(pairs):
        for column in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter()
            (first, second)[column]()
            times[pair, column] = time.perf_counter() - start
    return times


def flops_bound(width: int, heads: int, length: int) -> tuple[float, float]:
    """Return the projections' share of a training step's floating-point operations.

    Per layer and token the step costs 72 D^2, and 12 N D for attention (6 N D where it is causal);
    the projection of one head costs 6 d^2 with one Gram matrix and one solve, the least that any
    method needs, and 10 d^2 as computed here, for Q and for K.
    """
    d = width // heads
    step = 72 * width**2 + 6 * length * width
    return tuple(2 * heads * cost * d**2 / step for cost in (6, 10))  # type: ignore[return-value]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=768, help="model width D")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--length", type=int, default=512, help="tokens N per sequence")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=21, help="measured pairs of steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile both models")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    plain = nn.Sequential(*(Block(options.width, options.heads) for _ in range(options.layers)))
    scaled = copy.deepcopy(plain)
    x = torch.randn(options.batch, options.length, options.width)
    steps = []
    for model, wrap in ((plain, False), (scaled, True)):
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if wrap:
            optimizer = SpanScaledOptimizer(optimizer, model)
        if options.compile:
            model.compile()
        steps.append(training_step(model, optimizer, x))
    paired_times(steps[0], steps[1], 3)
    times = paired_times(steps[0], steps[1], options.pairs)

    ratios = times[:, 1] / times[:, 0]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    least, ours = flops_bound(options.width, options.heads, options.length)
    print(
        f"D = {options.width}, {options.heads} heads, N = {options.length}, "
        f"batch {options.batch}, {options.layers} layers, {options.threads} thread(s), "
        f"{'compiled' if options.compile else 'eager'}\n"
        f"plain step       {np.median(times[:, 0]) * 1e3:8.1f} ms (median)\n"
        f"wrapped / plain  {middle:8.3f} median of {options.pairs} pairs, "
        f"quartiles {low:.3f} to {high:.3f}, range {ratios.min():.3f} to {ratios.max():.3f}\n"
        f"bound by flops   {1 + least:8.3f} at 6 N d^2 per head, "
        f"{1 + ours:.3f} at the 10 N d^2 computed"
    )


if __name__ == "__main__":
    main()
