"""Token masks: the user says which tokens are real where the attention call does not show it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor

from spanopt.taps.calls import live_taps, thread
from spanopt.taps.real import Tokens

__all__ = ["token_mask"]

Masks: TypeAlias = "Tensor | Mapping[str, Tensor | tuple[Tensor | None, Tensor | None]]"


@contextlib.contextmanager
def token_mask(masks: Masks) -> Iterator[None]:
    """Say which tokens are real, for the forward passes inside the ``with`` block.

    Spans are then those of the real tokens. The token mask takes precedence over the attention
    mask. It is needed where the attention mask does not tell which tokens are real:

    - attention without a mask, if only the loss knows the padding;
    - padded queries in cross-attention;
    - several documents packed into one sequence;
    - masks that are refused, since they may show padding or only a pattern of attention.

    Args:
        masks: One mask for the queries and keys of all layers, or a dict from layer names or
            patterns to masks. A value of the dict is one mask for both sides, or a pair
            ``(queries, keys)``. ``None`` in a pair leaves that side to the attention mask. An exact
            name beats a pattern, and a later pattern beats an earlier one. A mask has the shape
            ``(B, L)``: B sequences of L tokens. A boolean mask is true at real tokens. A mask of
            integers is 0 at padding, and elsewhere it holds the number of the token's document,
            counted from 1. Each document gets a span of its own.

    Raises:
        TypeError: A mask is not a tensor, or it holds neither booleans nor integers.
        ValueError: A mask has another number of dimensions or negative values, or a key of the
            dict matches no layer. The forward pass raises this error if a layer's Q or K has
            another number of sequences or tokens than the mask.

    Example:
        >>> import torch
        >>> from spanopt import attach
        >>> model = torch.nn.MultiheadAttention(8, num_heads=2, batch_first=True)
        >>> x = torch.randn(2, 4, 8)
        >>> real = torch.tensor([[True, True, True, False], [True, True, False, False]])
        >>> with attach(model, {"*": (2.0, 1.0)}), token_mask(real):
        ...     model(x, x, x)[0][real].sum().backward()
    """
    names = {tap.site.name for tap in live_taps if not tap.removed}
    before = thread.tokens
    thread.tokens = {**(before or {}), **_by_name(masks, names)}
    try:
        yield
    finally:
        thread.tokens = before


def _by_name(masks: Masks, names: set[str]) -> dict[str, tuple[Tokens | None, Tokens | None]]:
    """Return the tokens of queries and keys for each layer that a mask is given for."""
    if not isinstance(masks, Mapping):
        tokens = _tokens(masks)
        return dict.fromkeys(names, (tokens, tokens))
    result = {}
    for pattern, value in sorted(masks.items(), key=lambda item: item[0] in names):
        matched = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if names and not matched:
            raise ValueError(
                f"token_mask: {pattern!r} matches none of the attention layers {sorted(names)}"
            )
        if isinstance(value, tuple):
            if len(value) != 2:
                raise ValueError(
                    f"token_mask: {pattern!r} must be given one mask or (queries, keys), got a "
                    f"tuple of {len(value)}"
                )
            sides = tuple(None if mask is None else _tokens(mask) for mask in value)
        else:
            sides = (_tokens(value),) * 2
        result.update(dict.fromkeys(matched, (sides[0], sides[1])))
    return result


def _tokens(mask: Tensor) -> Tokens:
    """Check a mask, and return its tokens."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"a token mask must be a tensor, got {type(mask).__name__}")
    if mask.ndim != 2:
        raise ValueError(f"a token mask must be (batch, length), got the shape {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return Tokens(mask)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"a token mask must be boolean, true at real tokens, or an integer, 0 at padding and "
            f"otherwise the number of the document; got {mask.dtype}"
        )
    low, high = (int(x) for x in torch.aminmax(mask)) if mask.numel() else (0, 0)
    if low < 0:
        raise ValueError(
            f"documents in a token mask are numbered from 1, and padding is 0; got {low}"
        )
    return Tokens(mask > 0, _positions(mask, high) if high > 1 else None)


def _positions(documents: Tensor, count: int) -> Tensor:
    """Return the positions of each document's tokens: one row per document.

    Rows are filled up at the end with ``documents.numel()``, which is not a valid position.
    """
    numbers = documents.long() + torch.arange(len(documents), device=documents.device)[:, None] * (
        count + 1
    )
    flat, real = numbers.flatten(), documents.flatten() > 0
    position = real.nonzero().squeeze(-1)
    number, order = flat[position].sort(stable=True)
    _, row, lengths = number.unique_consecutive(return_inverse=True, return_counts=True)
    within = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
    result = torch.full(
        (len(lengths), int(lengths.max())), documents.numel(), device=documents.device
    )
    result[row, within] = position[order]
    return result
