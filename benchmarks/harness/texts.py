"""The texts that the study trains on, and their tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

__all__ = ["OTHER_TEXTS", "Text", "characters", "subwords", "text_of", "windows"]

SUBWORDS = 1024
PACKAGES = ("asyncio", "concurrent/futures", "email", "http", "importlib", "json", "logging")


@dataclass(frozen=True)
class Text:
    """A text to train on and one to validate on.

    Attributes:
        name: What reports call it.
        train: The first.
        validation: The second. Its first half is the tuning split, its second the reporting split.
    """

    name: str
    train: str
    validation: str

    @property
    def digest(self) -> str:
        """SHA-256 of both."""
        both = f"{len(self.train)}:{self.train}{self.validation}"
        return hashlib.sha256(both.encode()).hexdigest()

    @classmethod
    def default(cls) -> Text:
        """Return Python's own help topics, English text that every Python ships."""
        from pydoc_data.topics import topics

        return cls.split("Python's help topics", "\n".join(topics.values()))

    @classmethod
    def source(cls) -> Text:
        """Return the source text of some packages of Python's standard library."""
        folder = Path(json.__file__).parents[1]
        paths = sorted(path for name in PACKAGES for path in (folder / name).glob("*.py"))
        return cls.split("Python's source", "".join(p.read_text(encoding="utf-8") for p in paths))

    @classmethod
    def split(cls, name: str, text: str) -> Text:
        """Split a text by position: the last fifth is for validation."""
        cut = round(len(text) * 0.8)
        return cls(name, text[:cut], text[cut:])

    @classmethod
    def read(cls, name: str, train: Path, validation: Path | None) -> Text:
        """Read one UTF-8 file and split it, or two."""
        text = train.read_text(encoding="utf-8")
        if validation is None:
            return cls.split(name, text)
        return cls(name, text, validation.read_text(encoding="utf-8"))


@lru_cache(maxsize=4)
def characters(text: Text) -> tuple[Tensor, Tensor, int]:
    """Number the characters: of the training text, of the validation text, and how many."""
    raw = np.frombuffer((text.train + text.validation).encode("utf-32-le"), dtype=np.uint32)
    alphabet, codes = np.unique(raw, return_inverse=True)
    tokens = torch.from_numpy(codes.astype(np.int64))
    return tokens[: len(text.train)], tokens[len(text.train) :], len(alphabet)


def windows(tokens: Tensor, count: int, size: int) -> Tensor:
    """Cut evenly spaced windows out of a text, shape (count, size)."""
    if len(tokens) < size:
        raise ValueError(f"the text is too short: {len(tokens)} tokens, at least {size} are needed")
    count = min(count, len(tokens) // size)
    starts = torch.linspace(0, len(tokens) - size, count).long()
    return tokens[starts[:, None] + torch.arange(size)]


@lru_cache(maxsize=4)
def subwords(text: Text, size: int = SUBWORDS) -> tuple[Tensor, Tensor, int]:
    """Tokenise by byte-pair encoding learnt from the training text, as :func:`characters`."""
    tokenizer = ByteLevelBPETokenizer()
    options = {"vocab_size": size, "min_frequency": 2, "show_progress": False}
    tokenizer.train_from_iterator([text.train], **options)
    train, validation = (
        torch.tensor(tokenizer.encode(part).ids) for part in (text.train, text.validation)
    )
    return train, validation, tokenizer.get_vocab_size()


# Texts that every Python comes with, for trials that do not use the one that the study was given.
OTHER_TEXTS: dict[str, Callable[[], Text]] = {
    "help topics": lru_cache(maxsize=1)(Text.default),
    "Python source": lru_cache(maxsize=1)(Text.source),
}


def text_of(name: str, given: Text) -> Text:
    """Return the text that a trial names: the one that the study was given, or another one."""
    if name == "given":
        return given
    if name not in OTHER_TEXTS:
        raise ValueError(f"no text is named {name!r}, only 'given', {', '.join(OTHER_TEXTS)}")
    return OTHER_TEXTS[name]()
