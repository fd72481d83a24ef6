"""Does span scaling help this model? Train it with and without, on the same seeds, and compare.

    python examples/compare.py runs/compare 10 100

It takes a folder for results, where it goes on when it was interrupted, the number of seeds, and
the number of steps of each training run. With 10 seeds and 100 steps it takes 5 to 10 minutes.
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from spanopt.compare import Wrap, compare

LENGTH = 64
TEXT = torch.tensor([*"\n".join(topics.values()).encode()])
TRAIN, VALIDATION = TEXT[: len(TEXT) * 4 // 5], TEXT[len(TEXT) * 4 // 5 :]


class Model(nn.Module):
    """Predict the next byte."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2)
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def loss(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy in windows of LENGTH + 1 bytes."""
        x = self.bytes(windows[:, :-1]) + self.positions.weight
        logits = nn.functional.linear(self.layers(x, self.mask, is_causal=True), self.bytes.weight)
        return nn.functional.cross_entropy(logits.mT, windows[:, 1:])


def draw(text: Tensor, count: int, seed: int) -> Tensor:
    """Draw windows that are the same for the same seed."""
    starts = torch.randint(
        len(text) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed)
    )
    return text[starts + torch.arange(LENGTH + 1)]


def train(seed: int, wrap: Wrap, lr: float = 2e-3, steps: int = 100) -> dict[str, float]:
    """Train once: everything random comes from the seed, and wrap() puts the scales on."""
    torch.manual_seed(seed)
    model = Model()
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=lr), model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for batch in draw(TRAIN, 8 * steps, seed).split(8):
        optimizer.zero_grad()
        model.loss(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        # What the rate is chosen on takes no part in the comparison.
        return {
            "loss": model.loss(draw(VALIDATION, 64, 1)).item(),
            "tuning": model.loss(draw(VALIDATION, 64, 2)).item(),
        }


def main(folder: str = "runs/compare", seeds: str = "10", steps: str = "100") -> None:
    """Compare, print and draw."""
    result = compare(
        train,
        arms={"(2, 1)": {"*": (2, 1)}},
        seeds=int(seeds),
        tune={"lr": [2e-3, 4e-3]},
        tuning_metric="tuning",
        steps=int(steps),
        out=folder,
    )
    print(result)
    result.plot(Path(folder) / "arms.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
