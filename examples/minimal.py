"""The smallest training script: two lines of it are spanopt's.

python examples/minimal.py
"""

import torch
from torch import nn

from spanopt import SpanScaledOptimizer

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, batch_first=True)
model = nn.Sequential(nn.Embedding(16, 32), layer, nn.Linear(32, 25))
bare = torch.optim.AdamW(model.parameters(), lr=3e-3)
optimizer = SpanScaledOptimizer(bare, model, scales=(2.0, 1.0))  # (parallel, violation)

for step in range(100):
    tokens = torch.randint(16, (16, 24))
    wanted = (tokens[:, :, None] == tokens[:, None]).sum(2)  # how often does each occur?
    loss = nn.functional.cross_entropy(model(tokens).mT, wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 or step == 99:
        print(f"step {step}: loss {loss.item():.3f}")
