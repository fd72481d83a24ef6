"""Train a decoder on text with fully_shard (FSDP2); run again, it goes on where it ended.

torchrun --nproc-per-node 2 examples/fsdp.py --steps 200
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from decoder import Decoder, Text
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from spanopt import SpanScaledOptimizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--checkpoints", type=Path, default=Path("runs/fsdp"))
args = parser.parse_args()

device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
dist.init_process_group()  # nccl on GPUs, gloo without
rank, processes = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
model = Decoder().to(device)
for layer in model.body.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = SpanScaledOptimizer(
    torch.optim.AdamW(model.parameters(), lr=1e-3), model, {"*": (2.0, 1.0)}
)
step = max((int(path.name) for path in args.checkpoints.glob("*")), default=0)
if step:
    parts, state = get_state_dict(model, optimizer)  # without the scales, which the hooks have
    saved = {"model": parts, "optimizer": state, "spans": optimizer.hooks}
    dcp.load(saved, checkpoint_id=args.checkpoints / str(step))
    set_state_dict(model, optimizer, model_state_dict=parts, optim_state_dict=state)

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

parts, state = get_state_dict(model, optimizer)
saved = {"model": parts, "optimizer": state, "spans": optimizer.hooks}
dcp.save(saved, checkpoint_id=args.checkpoints / str(step))
dist.barrier()  # gloo's threads let go of the last tensors while Python still runs
dist.destroy_process_group()
