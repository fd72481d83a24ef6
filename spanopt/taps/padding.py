"""Finding padding masks among the arguments of modules."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["NotedMasks", "is_padding_name", "padding_masks"]

# An argument whose name contains one of these parts is usually a padding mask.
_PARTS = ("pad", "attention_mask", "attn_mask")
_OF = (
    *("", "input_", "src_", "source_", "tgt_", "target_", "encoder_", "decoder_"),
    *("key_", "pixel_", "sequence_", "seq_", "text_", "token_", "valid_"),
)
_NAMES = frozenset(f"{of}mask" for of in _OF)


class NotedMasks:
    """The padding masks in the last call of a module.

    Attributes:
        masks: What :func:`padding_masks` found.
    """

    def __init__(self) -> None:
        self.masks: list[Tensor] = []


def is_padding_name(name: str) -> bool:
    """Return whether an argument of this name and of shape (batch, length) is a padding mask.

    Example:
        >>> is_padding_name("src_key_padding_mask"), is_padding_name("loss_mask")
        (True, False)
    """
    return name in _NAMES or any(part in name for part in _PARTS)


def padding_masks(arguments: Iterable[tuple[str, object]]) -> list[Tensor]:
    """Return the padding masks among the arguments of a module.

    Args:
        arguments: Their names and values.

    Returns:
        The arguments of shape ``(batch, length)`` whose name is usual for a padding mask.

    Example:
        >>> import torch
        >>> mask = torch.ones(2, 5)
        >>> len(padding_masks([("attention_mask", mask), ("x", mask)]))
        1
    """
    return [
        x
        for name, x in arguments
        if isinstance(x, Tensor) and x.ndim == 2 and is_padding_name(name)
    ]
