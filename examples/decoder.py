"""A small decoder over bytes, and text for it: what ddp.py and fsdp.py train."""

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

LENGTH, WIDTH, BATCH = 64, 64, 8


class Decoder(nn.Module):
    """A transformer that predicts the next byte at every position; it knows nothing of spanopt."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        future = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=x.device)
        return self.head(self.body(self.bytes(x) + self.positions.weight, mask=future))

    @staticmethod
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats per byte."""
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Text:
    """Python's own help topics, English text that every Python ships."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = torch.tensor(list("\n".join(topics.values()).encode()), device=device)

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """Draw inputs and targets, the same ones whenever the seed is the same."""
        random = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.bytes) - LENGTH, (BATCH, 1), generator=random)
        windows = self.bytes[(starts + torch.arange(LENGTH + 1)).to(self.bytes.device)]
        return windows[:, :-1], windows[:, 1:]
