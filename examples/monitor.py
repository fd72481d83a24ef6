"""Train a small decoder on real text and draw what share of its gradients is in the parallel span.

    python examples/monitor.py runs/monitor.png 400

It takes the picture's path and the number of steps.
"""

import sys

import torch
from decoder import Decoder, Text

from spanopt import SpanMonitor, SpanScaledOptimizer

path, steps = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model, text = Decoder(), Text(torch.device("cpu"))
optimizer = SpanScaledOptimizer(
    torch.optim.AdamW(model.parameters(), lr=3e-3), model, {"*": (2.0, 1.0)}
)
with SpanMonitor(optimizer, every=max(1, steps // 40)) as monitor:
    for step in range(steps):
        inputs, targets = text.batch(step)
        loss = Decoder.loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(monitor.to_pandas().groupby(["layer", "side"]).tail(1).round(3).to_string(index=False))
monitor.plot(path=path)
