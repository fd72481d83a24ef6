"""Functions that train, for tests of the comparison: a tiny attention model and pure arithmetic."""

import math
import os

import torch
from torch import nn


class Toy(nn.Module):
    """Attention over random tokens that finds the one like the first."""

    def __init__(self, width=8):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def train(seed, wrap, lr=1e-2, steps=12, weight_decay=0.1):
    """Train a tiny model to return the average of the tokens like each token."""
    torch.manual_seed(seed)
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    optimizer = wrap(optimizer, model)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = loss_of(model, torch.randn(4, 10, 8, generator=draws))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = torch.randn(64, 10, 8, generator=torch.Generator().manual_seed(1234))
    with torch.no_grad():
        return {"loss": loss_of(model, held_out).item(), "steps taken": steps}


def loss_of(model, x):
    like = (x @ x.mT).softmax(-1)
    return (model(x) - like @ x).pow(2).mean()


def simulated(seed, wrap, lr=1.0, steps=100):
    """Return a loss that depends on the arm, the rate and chance by a formula, without training."""
    torch.manual_seed(seed)
    model = Toy()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    if wrap.arm.held:
        loss_of(model, torch.randn(2, 10, 8)).backward()
        optimizer.step()
    draws = torch.Generator().manual_seed(seed)
    shared, own = torch.randn(2, generator=draws).tolist()
    scale = wrap.arm.layers.get("*")
    helps = 0.02 + 0.001 * own if scale is not None and scale.parallel == 2.0 else 0.0
    rate = 0.1 * math.log2(lr) ** 2
    return 2.0 * (1 + 0.1 * shared) * (1 - helps) + rate


def dies(seed, wrap):
    """Take the process down with one seed in one arm."""
    if seed == 1 and wrap.arm.scales is not None:
        os._exit(3)
    return simulated(seed, wrap)


def killed_at(seed, wrap):
    """Train, slowly enough that the process can be killed on the way."""
    return train(seed, wrap, steps=60)
