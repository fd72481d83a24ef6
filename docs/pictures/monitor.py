"""Draw what the monitor shows of a small decoder: docs/monitor.png.

It trains the decoder of ``examples/decoder.py`` for 400 steps, as ``examples/monitor.py`` does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from decoder import Decoder, Text  # noqa: E402
from harness.shades import save_both  # noqa: E402

from spanopt import SpanMonitor, SpanScaledOptimizer  # noqa: E402

STEPS = 400


def watched() -> SpanMonitor:
    """Train, and return the monitor with what it has measured."""
    torch.manual_seed(0)
    model, text = Decoder(), Text(torch.device("cpu"))
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = SpanScaledOptimizer(adamw, model, {"*": (2.0, 1.0)})
    with SpanMonitor(optimizer, every=STEPS // 40) as monitor:
        for step in range(STEPS):
            inputs, targets = text.batch(step)
            loss = Decoder.loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return monitor


if __name__ == "__main__":
    save_both(watched().plot, ROOT / "docs" / "monitor.png", dpi=150)
