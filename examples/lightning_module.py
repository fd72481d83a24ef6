"""Train a small transformer on real text as a LightningModule.

    python examples/lightning_module.py runs/lightning 2

It takes a folder for checkpoints, where it goes on from the last one, and the number of epochs.
"""

import sys
from pydoc_data.topics import topics

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from spanopt import SpanScale, SpanScaledOptimizer

LENGTH = 64


class Model(LightningModule):
    """Predict the next byte."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2)
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the mean cross-entropy in windows of LENGTH + 1 bytes."""
        (windows,) = batch
        x = self.bytes(windows[:, :-1]) + self.positions.weight
        logits = nn.functional.linear(self.layers(x, self.mask, is_causal=True), self.bytes.weight)
        loss = nn.functional.cross_entropy(logits.mT, windows[:, 1:])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> SpanScaledOptimizer:
        """Wrap the optimizer; all else is as it was."""
        bare = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return SpanScaledOptimizer(bare, self, {"*": SpanScale(parallel=2.0, violation=1.0)})


def main(folder: str = "runs/lightning", epochs: str = "2") -> None:
    """Train."""
    torch.manual_seed(0)
    text = torch.tensor([*"\n".join(topics.values()).encode()])
    windows = text[torch.randint(len(text) - LENGTH, (320, 1)) + torch.arange(LENGTH + 1)]
    saving = ModelCheckpoint(folder, save_last=True)
    trainer = Trainer(max_epochs=int(epochs), callbacks=[saving], logger=False)
    trainer.fit(Model(), DataLoader(TensorDataset(windows), batch_size=16), ckpt_path="last")
    print(f"step {trainer.global_step}: loss {trainer.callback_metrics['loss']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
