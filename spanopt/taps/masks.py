"""Which tokens are real, as far as an attention mask tells."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Read",
    "Tokens",
    "allowed",
    "allowed_by_fill",
    "appended",
    "both",
    "by_document",
    "given_tokens",
    "read",
    "real_tokens",
]

# What is added to a score to forbid it: -inf, the dtype's minimum, -1e9, and -1e4 in bfloat16.
_FORBIDDING = -9e3

Read: TypeAlias = "tuple[Tensor, Tensor] | None"
"""Real tokens of the two sides of a score matrix as its masks tell: boolean, shapes ``(B, N)`` and
``(B, M)``, where any dimension may be 1; ``None`` where there is no mask."""


def allowed(mask: Tensor) -> Tensor:
    """Return where a mask allows attention.

    Args:
        mask: Boolean, true where attention is allowed, or a number, to be added to the scores.

    Returns:
        Boolean, shaped like ``mask``.

    Example:
        >>> import torch
        >>> allowed(torch.tensor([0.0, -1.5, -1e9, -torch.inf]))
        tensor([ True,  True, False, False])
    """
    return mask if mask.dtype == torch.bool else mask.detach() > _FORBIDDING


def allowed_by_fill(where: Tensor, value: float | Tensor) -> Tensor:
    """Return where attention is allowed once scores are overwritten.

    Args:
        where: Boolean, true where a score is overwritten.
        value: By what.

    Returns:
        Boolean, shaped like ``where``.

    Example:
        >>> import torch
        >>> allowed_by_fill(torch.tensor([True, False]), -1e9).tolist()
        [False, True]
        >>> allowed_by_fill(torch.tensor([True, False]), 0.0).tolist()
        [True, True]
    """
    if isinstance(value, Tensor):
        return ~where | allowed(value)
    return ~where if value <= _FORBIDDING else torch.ones_like(where)


def read(allowed: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """Return the queries and keys that take part in any attention.

    A key is padding when it is closed to every query in every head, a query when every key is
    closed to it. So causal masks, windows and biases count as no padding.

    Args:
        allowed: Where attention is allowed, broadcastable to the scores: ``(B, ..., N, M)`` or
            ``(N, M)``.
        ndim: Number of dimensions of the scores.

    Returns:
        Shapes ``(B, N)`` and ``(B, M)``, of size 1 where ``allowed`` is.

    Example:
        >>> import torch
        >>> causal = torch.ones(3, 3, dtype=torch.bool).tril()
        >>> padding = torch.tensor([True, True, False])
        >>> read(causal & padding, ndim=4)
        (tensor([[True, True, True]]), tensor([[ True,  True, False]]))
    """
    allowed = allowed[(None,) * (max(ndim, 3) - allowed.ndim)]
    queries, keys = allowed.any(-1), allowed.any(-2)
    if allowed.ndim > 3:
        queries, keys = (x.flatten(1, -2).any(1) for x in (queries, keys))
    return queries, keys


def both(a: Read, b: Read) -> Read:
    """Return the tokens that are real by both of two masks.

    Example:
        >>> both(None, None) is None
        True
    """
    if a is None or b is None:
        return b if a is None else a
    return _both(a[0], b[0]), _both(a[1], b[1])


def _both(a: Tensor, b: Tensor) -> Tensor:
    if 1 < len(a) < len(b):  # read after heads were merged into the batch
        a = a.repeat_interleave(len(b) // len(a), dim=0)
    elif 1 < len(b) < len(a):
        b = b.repeat_interleave(len(a) // len(b), dim=0)
    return a & b


class Tokens(NamedTuple):
    """The real tokens of Q or K.

    Attributes:
        mask: Boolean, true at real tokens: shape ``(B, L)``, or what a node takes.
        documents: Their positions by document, see
            :func:`~spanopt.projection.rescale_by_document`.
    """

    mask: Tensor | None = None
    documents: Tensor | None = None


def real_tokens(
    query: Tensor,
    key: Tensor,
    read: Read,
    *,
    self_attention: bool,
    given: tuple[Tokens | None, Tokens | None] | None = None,
    layer: str = "",
) -> tuple[Tokens, Tokens]:
    """Return the real tokens of Q and K, as their nodes take them.

    In self-attention a query is padding also when it is padding as a key.

    Args:
        query: Shape ``(B, ..., N, d)`` or ``(N, d)``.
        key: Shape ``(B, ..., M, d)`` or ``(M, d)``.
        read: As the attention mask tells, see :func:`read`.
        self_attention: Whether queries and keys are the same tokens.
        given: What is known of queries and keys otherwise, which goes before the mask.
        layer: Name of the layer, for the error.

    Returns:
        For the node of Q and that of K.

    Raises:
        ValueError: What is given is of another shape than Q or K.

    Example:
        >>> import torch
        >>> q = torch.ones(1, 2, 3, 4)
        >>> padding = torch.tensor([[True, True, False]])
        >>> real_tokens(q, q, (torch.tensor([[True]]), padding), self_attention=True)[0].mask
        tensor([[[ True,  True, False]]])
    """
    queries, keys = read or (None, None)
    if queries is not None and keys is not None and self_attention:
        queries = queries & keys[:, : query.shape[-2]]  # without keys that were appended
    of_query, of_key = given or (None, None)
    return (
        given_tokens(of_query, query.shape, "query", layer) or Tokens(_fit(queries, query.shape)),
        given_tokens(of_key, key.shape, "key", layer) or Tokens(_fit(keys, key.shape)),
    )


def appended(tokens: Tokens, count: int) -> Tokens:
    """Return tokens followed by others that are real, and of no document.

    Args:
        tokens: What is given.
        count: How many the layer appends.

    Returns:
        The longer tokens.

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
    """Return the documents given for (B, L) tokens, for a Q or K of this shape.

    Args:
        tokens: What is given.
        shape: ``(B, ..., L, d)``, ``(B * H, L, d)`` or ``(L, d)``.

    Returns:
        For the node; ``None`` where there are none or the shape is another.

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
    """Return the number of heads merged into the batch, 0 if the tokens are not of this shape."""
    assert tokens.mask is not None
    rows, length = tokens.mask.shape
    batch = shape[0] if len(shape) > 2 else 1
    if length != shape[-2] or batch % rows:
        return 0
    heads = batch // rows
    return heads if heads == 1 or len(shape) == 3 else 0


def given_tokens(tokens: Tokens | None, shape: torch.Size, side: str, layer: str) -> Tokens | None:
    """Return what is given for (B, L) tokens, as a node on a Q or K of this shape takes it.

    Args:
        tokens: What is given.
        shape: ``(B, ..., L, d)``, ``(B * H, L, d)`` or ``(L, d)``.
        side: ``"query"`` or ``"key"``, for the error.
        layer: Name of the layer, likewise.

    Returns:
        For the node; ``None`` where nothing is given.

    Raises:
        ValueError: The shape is another.

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
    """Bring (B, L), (B, 1) or (1, L) into the batch dimension that Q or K of this shape has."""
    if real is None:
        return None
    if len(shape) == 2:
        return real.any(0)
    rows, batch = len(real), shape[0]
    if rows > batch:  # heads or sequences share this Q or K
        real = real.unflatten(0, (batch, rows // batch)).any(1)
    elif 1 < rows < batch:  # heads are merged into the batch
        real = real.repeat_interleave(batch // rows, dim=0)
    return real[(slice(None), *(None,) * (len(shape) - 3))]
