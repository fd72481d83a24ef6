"""Train a small GPT-2 on real text in a loop with Accelerate.

    python examples/accelerate_loop.py runs/accelerate 40

It takes a folder for the checkpoint, where it goes on if there is one, and the number of steps.
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from spanopt import SpanScale, SpanScaledOptimizer, SpanScheduler
from spanopt.schedules import linear

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
length, accumulate = 64, 2
torch.manual_seed(0)
text = torch.tensor([*"\n".join(topics.values()).encode()])
windows = text[torch.randint(len(text) - length, (2000, 1)) + torch.arange(length)]
loader = DataLoader(TensorDataset(windows), batch_size=8)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
)
optimizer = SpanScaledOptimizer(
    torch.optim.AdamW(model.parameters(), lr=3e-3), model, {"*": SpanScale(2.0, 1.0)}
)
scales = SpanScheduler(optimizer, linear(10))  # from the identity to (2, 1) in 10 steps
rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)

accelerator = Accelerator(gradient_accumulation_steps=accumulate)
model, optimizer, rates, loader = accelerator.prepare(model, optimizer, rates, loader)
accelerator.register_for_checkpointing(scales)
if folder.exists():
    accelerator.load_state(folder)
taken = scales.state_dict()["step"]
for (batch,) in skip_first_batches(loader, taken * accumulate):
    if taken == steps:
        break
    with accelerator.accumulate(model):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:  # the others see to it themselves
        scales.step()
        taken += 1
        print(f"step {taken}: loss {loss:.3f}")
accelerator.save_state(folder)
