"""Which tokens of Q and K are real, in the form that their nodes take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spanopt.taps.judging import Verdict

__all__ = [
    "Tokens",
    "appended",
    "by_document",
    "given_tokens",
    "real_tokens",
]


class Tokens(NamedTuple):
    """The real tokens of Q or K.

    Attributes:
        mask: Boolean, true at real tokens. Its shape is ``(B, L)`` for tokens as the user gives
            them, and broadcastable to ``(B, ..., L)`` for a node. ``None`` if all are real.
        documents: Positions of tokens by document, an integer tensor of the shape ``(T, L')`` for
            T documents; see :func:`~spanopt.projection.rescale_by_document`. ``None`` if each
            sequence has one span.
    """

    mask: Tensor | None = None
    documents: Tensor | None = None


def real_tokens(
    query: Tensor,
    key: Tensor,
    verdict: Verdict | None,
    given: tuple[Tokens | None, Tokens | None] | None = None,
    layer: str = "",
) -> tuple[Tokens, Tokens]:
    """Return the real tokens of Q and K, in the form that their nodes take.

    Args:
        query: Shape ``(B, ..., N, d)`` or ``(N, d)``.
        key: Shape ``(B, ..., M, d)`` or ``(M, d)``.
        verdict: What the attention masks tell; ``None`` where they close nothing.
        given: Tokens of the queries and of the keys that the user gives, shape ``(B, L)``. A side
            that is not ``None`` takes precedence over the verdict.
        layer: Name of the layer, for the error.

    Returns:
        The real tokens for the node of Q and for the node of K.

    Raises:
        ValueError: The user's tokens and Q or K differ in the number of sequences or of tokens.

    Example:
        >>> import torch
        >>> q = torch.ones(1, 2, 3, 4)
        >>> given = Tokens(torch.tensor([[True, True, False]])), None
        >>> [tokens.mask for tokens in real_tokens(q, q, None, given)]
        [tensor([[[ True,  True, False]]]), None]
    """
    queries, keys = (None, None) if verdict is None else (verdict.queries, verdict.keys)
    of_query, of_key = given or (None, None)
    return (
        given_tokens(of_query, query.shape, "query", layer) or Tokens(_fit(queries, query.shape)),
        given_tokens(of_key, key.shape, "key", layer) or Tokens(_fit(keys, key.shape)),
    )


def appended(tokens: Tokens, count: int) -> Tokens:
    """Append tokens to each sequence that are real and belong to no document.

    Args:
        tokens: The tokens of each sequence, shape ``(B, L)``.
        count: Number of keys that the layer appends to each sequence.

    Returns:
        The tokens with the appended ones, shape ``(B, L + count)``.

    Example:
        >>> import torch
        >>> appended(Tokens(torch.tensor([[True, False]]), torch.tensor([[0, 2]])), 1)
        Tokens(mask=tensor([[ True, False,  True]]), documents=tensor([[0, 3]]))
    """
    mask, documents = tokens
    if mask is None or not count:
        return tokens
    length = mask.shape[1]
    if documents is not None:
        documents = documents + documents // length * count
    return Tokens(torch.nn.functional.pad(mask, (0, count), value=True), documents)


def by_document(tokens: Tokens, shape: torch.Size) -> Tensor | None:
    """Return the positions of documents in a Q or K of this shape.

    Args:
        tokens: The tokens of each sequence, shape ``(B, L)``.
        shape: Shape of Q or K: ``(B, ..., L, d)``, ``(B * H, L, d)`` or ``(L, d)``.

    Returns:
        The positions for the node; ``None`` if there are no documents or the shape does not fit.

    Example:
        >>> import torch
        >>> tokens = Tokens(torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 1], [2, 3]]))
        >>> by_document(tokens, torch.Size([2, 3, 8])).tolist()  # 2 heads, merged into the batch
        [[0, 1], [2, 6], [3, 4], [5, 6]]
    """
    heads = _heads(tokens, shape)
    if tokens.documents is None or not heads:
        return None
    assert tokens.mask is not None
    rows, length = tokens.mask.shape
    row, position = tokens.documents // length, tokens.documents % length
    of_head = row * heads + torch.arange(heads, device=row.device)[:, None, None]
    return (of_head * length + position).clamp(max=rows * heads * length).flatten(0, 1)


def _heads(tokens: Tokens, shape: torch.Size) -> int:
    """Return the number of heads that are merged into the batch, 0 if the shape does not fit."""
    assert tokens.mask is not None
    rows, length = tokens.mask.shape
    batch = shape[0] if len(shape) > 2 else 1
    if length != shape[-2] or batch % rows:
        return 0
    heads = batch // rows
    return heads if heads == 1 or len(shape) == 3 else 0


def given_tokens(tokens: Tokens | None, shape: torch.Size, side: str, layer: str) -> Tokens | None:
    """Bring the tokens that the user gives into the form that a node on Q or K takes.

    Args:
        tokens: The tokens of each sequence, shape ``(B, L)``; ``None`` if none are given.
        shape: Shape of Q or K: ``(B, ..., L, d)``, ``(B * H, L, d)`` or ``(L, d)``.
        side: ``"query"`` or ``"key"``, for the error.
        layer: Name of the layer, for the error.

    Returns:
        The tokens for the node; ``None`` if none are given.

    Raises:
        ValueError: The number of sequences or of tokens is not that of Q or K.

    Example:
        >>> import torch
        >>> tokens = Tokens(torch.ones(1, 3, dtype=torch.bool))
        >>> given_tokens(tokens, torch.Size([1, 2, 3, 8]), "query", "attn").mask.shape
        torch.Size([1, 1, 3])
    """
    if tokens is None or tokens.mask is None:
        return None
    if not _heads(tokens, shape):
        rows, length = tokens.mask.shape
        raise ValueError(
            f"layer {layer!r}: token_mask was given {rows} x {length} tokens, and the layer's "
            f"{side} has {shape[0] if len(shape) > 2 else 1} x {shape[-2]}; give each layer its "
            f"own, such as token_mask({{{layer!r}: (queries, keys)}})"
        )
    if tokens.documents is None:
        return Tokens(_fit(tokens.mask, shape))
    return Tokens(None, by_document(tokens, shape))


def _fit(real: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Bring a mask (B, L), (B, 1) or (1, L) into a form that broadcasts to Q or K."""
    if real is None:
        return None
    if len(shape) == 2:
        return real.any(0)
    rows, batch = len(real), shape[0]
    if rows > batch:  # several heads or sequences share this Q or K
        real = real.unflatten(0, (batch, rows // batch)).any(1)
    elif 1 < rows < batch:  # heads are merged into the batch
        real = real.repeat_interleave(batch // rows, dim=0)
    return real[(slice(None), *(None,) * (len(shape) - 3))]
