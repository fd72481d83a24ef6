"""Train a GPT-2 from random weights on a text of your own, in a loop as people write it.

    python examples/gpt2_pretrain.py --text book.txt --steps 2000 --out runs/gpt2

The loop has what such loops have: weight decay for matrices only, a warm-up and a cosine, gradient
accumulation, clipping, bfloat16 on a GPU, an evaluation now and then, and a checkpoint. Run it
again and it goes on. Bytes are the tokens, so that nothing has to be downloaded.
"""

import argparse
import math
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from spanopt import SpanScaledOptimizer

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--text", type=Path, required=True, help="a text file")
parser.add_argument("--out", type=Path, default=Path("runs/gpt2"), help="where the checkpoint goes")
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--batch", type=int, default=8, help="sequences in a micro-batch")
parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in a step")
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--lr", type=float, default=6e-4)
parser.add_argument(
    "--parallel", type=float, default=2.0, help="1 together with --violation 1: plain"
)
parser.add_argument("--violation", type=float, default=1.0, help="scale of the rest")
parser.add_argument("--eval-every", type=int, default=200)
parser.add_argument("--compile", action="store_true", help="compile the model")
args = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
mixed = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
torch.manual_seed(0)

text = torch.tensor([*args.text.read_bytes()])
training, validation = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def draw(source: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a micro-batch that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(source) - args.length, (args.batch, 1), generator=generator)
    return source[starts + torch.arange(args.length)].to(device)


config = GPT2Config(
    vocab_size=256,
    n_positions=args.length,
    n_embd=args.width,
    n_layer=args.layers,
    n_head=args.heads,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
)
model = GPT2LMHeadModel(config)
model.to(device)  # type: ignore[arg-type]
matrices = [p for p in model.parameters() if p.ndim >= 2]
vectors = [p for p in model.parameters() if p.ndim < 2]
groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
optimizer = SpanScaledOptimizer(
    torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95)),
    model,
    scales=(args.parallel, args.violation),
)
print(optimizer.hooks)  # which layers are scaled, and by what
forward = torch.compile(model) if args.compile else model


def rate(step: int) -> float:
    """Return the factor on the learning rate: up for a tenth of the steps, then down a cosine."""
    warm_up = max(1, args.steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, args.steps - warm_up)))


schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
step, checkpoint = 0, args.out / "checkpoint.pt"
if checkpoint.exists():
    state = torch.load(checkpoint, map_location=device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])  # with the scales
    schedule.load_state_dict(state["schedule"])
    step = state["step"]
    print(f"going on from step {step}")

while step < args.steps:
    for part in range(args.accumulate):
        windows = draw(training, seed=step * args.accumulate + part)
        with mixed:
            loss = forward(input_ids=windows, labels=windows).loss / args.accumulate
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    step += 1
    if step % args.eval_every == 0 or step == args.steps:
        model.eval()
        with torch.no_grad(), mixed:
            unseen = [draw(validation, seed) for seed in range(8)]
            losses = [model(input_ids=x, labels=x).loss.item() for x in unseen]
        model.train()
        print(f"step {step}: validation loss {sum(losses) / 8:.4f}, gradient norm {norm:.2f}")
        args.out.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"schedule": schedule.state_dict(), "step": step}, checkpoint)
