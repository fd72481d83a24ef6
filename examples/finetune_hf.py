"""Fine-tune a language model of transformers on the paragraphs of a text file.

    python examples/finetune_hf.py --model gpt2 --text book.txt --out runs/tuned

The model is a name on the Hugging Face hub or a folder. Paragraphs differ in length, so batches are
padded. Spans are those of the real tokens: the attention mask that the model gets says which.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spanopt import SpanScaledOptimizer

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="gpt2", help="a name on the hub, or a folder")
parser.add_argument("--text", type=Path, required=True, help="paragraphs with empty lines between")
parser.add_argument("--out", type=Path, default=Path("runs/tuned"), help="where the model goes")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=256, help="tokens of a paragraph that are kept")
parser.add_argument("--lr", type=float, default=5e-5)
args = parser.parse_args()

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model)
model.to(device)  # type: ignore[arg-type]

paragraphs = [part.strip() for part in args.text.read_text(encoding="utf-8").split("\n\n")]
paragraphs = [part for part in paragraphs if len(part) > 20]
held_out, training = paragraphs[::10], [p for i, p in enumerate(paragraphs) if i % 10]


def batches(texts: list[str]) -> list[dict[str, torch.Tensor]]:
    """Return padded batches; labels leave the padding out."""
    made = []
    for start in range(0, len(texts), args.batch):
        batch = tokenizer(
            texts[start : start + args.batch],
            truncation=True,
            max_length=args.length,
            padding=True,
            return_tensors="pt",
        ).to(device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        made.append({**batch, "labels": labels})
    return made


@torch.no_grad()
def held_out_loss() -> float:
    """Return the mean loss of the paragraphs that are not trained on."""
    model.eval()
    losses = [model(**batch).loss.item() for batch in batches(held_out)]
    model.train()
    return sum(losses) / len(losses)


optimizer = SpanScaledOptimizer(
    torch.optim.AdamW(model.parameters(), lr=args.lr), model, scales={"*": (2.0, 1.0)}
)
print(optimizer.hooks)  # which layers are scaled, and by what
print(f"before: loss {held_out_loss():.4f}")
for epoch in range(args.epochs):
    order = torch.randperm(len(training)).tolist()
    for batch in batches([training[i] for i in order]):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"after epoch {epoch + 1}: loss {held_out_loss():.4f}")

optimizer.detach()  # what is saved is a plain model
model.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)
