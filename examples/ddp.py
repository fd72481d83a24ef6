"""Train a decoder on text with DistributedDataParallel; run again, it goes on where it ended.

torchrun --nproc-per-node 2 examples/ddp.py --steps 200
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from decoder import Decoder, Text
from torch.nn.parallel import DistributedDataParallel

from spanopt import SpanScaledOptimizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--checkpoint", type=Path, default=Path("runs/ddp.pt"))
args = parser.parse_args()

device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
dist.init_process_group()  # nccl on GPUs, gloo without
rank, processes = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
model = DistributedDataParallel(Decoder().to(device))
optimizer = SpanScaledOptimizer(
    torch.optim.AdamW(model.parameters(), lr=1e-3), model, {"*": (2.0, 1.0)}
)
step = 0
if args.checkpoint.exists():
    state = torch.load(args.checkpoint, map_location=device)
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])  # the scales too
    step = state["step"]

text = Text(device)
while step < args.steps:
    inputs, targets = text.batch(seed=step * processes + rank)
    loss = Decoder.loss(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    if rank == 0:
        print(f"step {step:4}  loss {loss.item():.4f}", flush=True)

if rank == 0:
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, args.checkpoint)
dist.destroy_process_group()
