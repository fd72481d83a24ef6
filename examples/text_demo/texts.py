"""The text: where it comes from, its two parts, and its characters as numbers."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from text_demo.errors import UserError, one_line
from text_demo.options import Config

__all__ = ["Data", "dataset_text", "default_text", "encode", "file_text"]

HELD_OUT = 0.1
VALIDATION_WINDOWS = 64
DATASETS = {
    "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
}


@dataclass(frozen=True)
class Data:
    """Encoded text: training characters, the fixed validation windows, and what identifies it."""

    train: Tensor
    windows: Tensor
    vocabulary: int
    digest: str

    def batch(self, config: Config, rng: np.random.Generator) -> Tensor:
        """Draw training windows of ``length + 1`` characters."""
        starts = rng.integers(0, len(self.train) - config.length, config.batch)
        return self.train[torch.from_numpy(starts)[:, None] + torch.arange(config.length + 1)]


def split(text: str) -> tuple[str, str]:
    """Split a text by position: the last tenth is for validation."""
    cut = round(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def default_text() -> tuple[str, str]:
    """Return Python's own help topics, English text that every Python ships."""
    from pydoc_data.topics import topics

    return split("\n".join(topics.values()))


def file_text(path: Path) -> tuple[str, str]:
    """Read a UTF-8 file."""
    try:
        return split(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def dataset_text(name: str) -> tuple[str, str]:
    """Load a Hugging Face dataset, NAME or NAME:CONFIG, with its own validation split if any."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError("--dataset needs the package datasets: pip install datasets") from error
    path, _, config = DATASETS.get(name.lower(), name).partition(":")
    try:
        splits = datasets.load_dataset(path, config or None)
    except Exception as error:  # the hub, the network and the loaders each raise their own kinds
        raise UserError(f"cannot load the dataset {name}: {one_line(error)}") from error
    texts = {
        key: dataset_column(name, splits[key]) for key in ("train", "validation") if key in splits
    }
    if "train" not in texts:
        raise UserError(f"the dataset {name} has no split named train, only {', '.join(splits)}")
    if "validation" in texts:
        return texts["train"], texts["validation"]
    return split(texts["train"])


def dataset_column(name: str, rows: Any) -> str:
    """Join the column ``text`` of one split."""
    if "text" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UserError(f"the dataset {name} has no column named text, only {columns}")
    return "\n".join(rows["text"])


def encode(train: str, validation: str, length: int) -> Data:
    """Number the characters and lay out the validation windows, evenly spaced."""
    for name, part in (("training", train), ("validation", validation)):
        if len(part) <= length:
            raise UserError(
                f"the text is too short: its {name} part has {len(part)} characters,"
                f" --length {length} needs at least {length + 1}"
            )
    raw = (train + validation).encode("utf-32-le")
    alphabet, codes = np.unique(np.frombuffer(raw, dtype=np.uint32), return_inverse=True)
    tokens = torch.from_numpy(codes.astype(np.int64))
    held_out = tokens[len(train) :]
    count = min(VALIDATION_WINDOWS, len(held_out) // (length + 1))
    starts = torch.linspace(0, len(held_out) - length - 1, count).long()
    windows = held_out[starts[:, None] + torch.arange(length + 1)]
    digest = hashlib.sha256(len(train).to_bytes(8, "little") + raw).hexdigest()
    return Data(tokens[: len(train)], windows, len(alphabet), digest)
