"""What attention masks show about padding, and when they must be refused.

A key that is closed to every query in every head may be padding. It may also be a real token that
the pattern of attention leaves out. The values of a mask do not always tell the two apart.
:func:`judge` counts a token as padding only if nothing contradicts that. If nothing tells, its
verdict is that the mask must be refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Read",
    "Shown",
    "Verdict",
    "allowed",
    "allowed_by_fill",
    "both",
    "can_be_read",
    "judge",
    "read",
    "transposed",
]

# A term that is added to a score forbids attention if it is at most this. Usual terms are -inf, the
# dtype's minimum, -1e9 and -1e4, which bfloat16 rounds.
_FORBIDDING = -9e3


class Shown(NamedTuple):
    """What one attention mask shows of a score matrix (N, M), over all heads.

    Attributes:
        rows: Which queries see any key: boolean, shape ``(B, N)``.
        columns: Which keys are seen by any query: boolean, shape ``(B, M)``.
        diagonal: For which i query i sees key i: boolean, shape ``(B, N)``; ``None`` if the matrix
            is not square.
        above: Whether any query sees a key of a higher index: boolean, no dimension.
        below: Whether any query sees a key of a lower index: boolean, no dimension.

    Any dimension may have size 1. Its one entry then holds for all.
    """

    rows: Tensor
    columns: Tensor
    diagonal: Tensor | None
    above: Tensor
    below: Tensor


Read: TypeAlias = "tuple[Shown, ...]"
"""What each mask of one score matrix shows."""


def allowed(mask: Tensor) -> Tensor:
    """Return where a mask allows attention.

    Args:
        mask: Boolean, true where attention is allowed; or numbers that are added to the scores.

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
        value: The new value of these scores.

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


def read(allowed: Tensor, ndim: int) -> Read:
    """Return what a mask shows.

    Args:
        allowed: Where attention is allowed: boolean, broadcastable to the scores, so of the shape
            ``(B, ..., N, M)`` or ``(N, M)``.
        ndim: Number of dimensions of the scores.

    Returns:
        What the mask shows. The result is empty if the values can be read at once, and every query
        and every key is open.

    Example:
        >>> import torch
        >>> causal = torch.ones(3, 3, dtype=torch.bool).tril()
        >>> read(causal, ndim=4)
        ()
        >>> read(causal & torch.tensor([True, True, False]), ndim=4)[0].columns
        tensor([[ True,  True, False]])
    """
    allowed = allowed[(None,) * (max(ndim, 3) - allowed.ndim)]
    if allowed.ndim > 3:
        allowed = allowed.flatten(1, -3)
        allowed = allowed[:, 0] if allowed.shape[1] == 1 else allowed.any(1)
    known = can_be_read(allowed)
    if known and allowed.stride(-2) == 0:  # a mask of keys, expanded over the queries
        allowed = allowed[:, :1]
    rows, columns = allowed.any(-1), allowed.any(-2)
    if known and bool(rows.all()) and bool(columns.all()):
        return ()
    n, m = allowed.shape[-2:]
    if 1 in (n, m):  # a mask of the keys alone, or of the queries alone
        anything = allowed.any()
        diagonal = columns if n == 1 else rows
        return (Shown(rows, columns, diagonal, anything, anything),)
    square = allowed.diagonal(dim1=-2, dim2=-1) if n == m else None
    if known and (square is None or bool(square[:, 1:].any())):
        above = below = torch.ones((), dtype=torch.bool)  # not strictly causal
    else:
        above, below = allowed.triu(1).any(), allowed.tril(-1).any()
    return (Shown(rows, columns, square, above, below),)


def can_be_read(x: Tensor) -> bool:
    """Return whether the values of a tensor can be read now without waiting for a device."""
    eager = not torch.compiler.is_compiling() and type(x) is Tensor
    return eager and x.device.type == "cpu"


def transposed(read: Read) -> Read:
    """Return what the same masks show when queries and keys change places."""
    turned = [Shown(one.columns, one.rows, one.diagonal, one.below, one.above) for one in read]
    return tuple(turned)


def both(a: Read, b: Read) -> Read:
    """Return what two sets of masks on the same scores show together.

    Example:
        >>> both((), ())
        ()
    """
    return (*a, *b)


class Verdict(NamedTuple):
    """Which tokens are real according to the masks.

    Attributes:
        queries: Boolean, true at real queries: shape ``(B, N)``.
        keys: Boolean, true at real keys: shape ``(B, M)``.
        refused: Whether tokens are closed and nothing tells if they are padding: boolean, no
            dimension.
    """

    queries: Tensor
    keys: Tensor
    refused: Tensor


def judge(
    read: Read, n: int, m: int, *, self_attention: bool, padding: Iterable[Tensor] = ()
) -> Verdict | None:
    """Tell padding from real tokens that a pattern of attention closes.

    Each mask is judged by itself. A token is padding if any mask says so. In self-attention the
    first of these rules that applies says what is padding:

    1. A padding mask of the model closes the same keys: padding is what that mask says.
    2. The mask is strictly causal, and only the last key and the first query are closed: nothing
       is padding.
    3. Every open token sees itself and is seen. Also, the queries of the closed keys are closed
       too, or the open keys are one run that differs between the sequences of the batch. No
       padding mask of the model closes only some of the closed keys. Then these are padding.

    In cross-attention keys and queries are judged separately, by rule 1 and the runs of rule 3.

    Args:
        read: What the masks show.
        n: Number of queries.
        m: Number of keys.
        self_attention: Whether queries and keys are the same tokens.
        padding: Padding masks that the model was called with; see :mod:`spanopt.taps.padding`.

    Returns:
        The verdict; ``None`` where no mask closes anything.

    Example:
        >>> import torch
        >>> open_keys = torch.tensor([[[[True, True, True]]], [[[True, True, False]]]])
        >>> judge(read(open_keys, 4), 3, 3, self_attention=True).keys.tolist()
        [[True, True, True], [True, True, False]]
        >>> bool(judge(read(open_keys[1:], 4), 3, 3, self_attention=True).refused)
        True
    """
    padding = list(padding)
    result: Verdict | None = None
    for shown in read:
        if self_attention and shown.diagonal is not None and n == m:
            verdict = _of_one_sequence(shown, n, padding)
        else:
            verdict = _of_two_sequences(shown, n, m, padding)
        if result is None:
            result = verdict
            continue
        queries, keys = _and(result.queries, verdict.queries), _and(result.keys, verdict.keys)
        result = Verdict(queries, keys, result.refused | verdict.refused)
    return result


def _of_one_sequence(shown: Shown, n: int, padding: Sequence[Tensor]) -> Verdict:
    """Judge a mask of self-attention.

    Everything is computed as tensors, so that nothing waits for a device. ``strict`` tells whether
    the mask is strictly causal; the first token may still see itself. ``unexplained`` tells
    whether more is closed than a strictly causal mask closes. ``regular`` tells whether all open
    tokens are seen and see themselves.
    """
    assert shown.diagonal is not None
    queries, keys, own = (x.expand(len(x), n) for x in (shown.rows, shown.columns, shown.diagonal))
    position = torch.arange(n, device=keys.device)
    strict = ~shown.above & ~(own & (position > 0)).any()
    # The last key has no later query, and the first query no earlier key.
    excused = strict & (position == n - 1)
    unexplained = (~keys & ~excused).any() | (~queries & ~(strict & (position == 0))).any()
    regular = ~(queries & keys & ~own).any() & ~(keys & ~queries).any()
    told = ~(~keys & queries).any() | (_are_runs(keys) & _differ(keys))
    by_value = keys | ~unexplained
    given = _agreeing(keys, excused, padding)
    real = torch.where(given.agree, given.real, by_value)
    clear = given.agree | (regular & told & ~given.fewer)
    return Verdict(real, real, unexplained & ~clear)


def _of_two_sequences(shown: Shown, n: int, m: int, padding: Sequence[Tensor]) -> Verdict:
    """Judge a mask whose queries and keys are not the same tokens, as in cross-attention."""
    queries = shown.rows.expand(len(shown.rows), n)
    keys = shown.columns.expand(len(shown.columns), m)
    # If a sequence has no open key, its closed queries tell nothing.
    seeing = queries | ~keys.any(-1, keepdim=True)
    sides = []
    for real in (seeing, keys):
        given = _agreeing(real, torch.zeros_like(real[:1]), padding)
        refused = ~real.all() & ~(_are_runs(real) & _differ(real)) & ~given.agree
        sides.append((torch.where(given.agree, given.real, real), refused))
    return Verdict(sides[0][0], sides[1][0], sides[0][1] | sides[1][1])


class _Given(NamedTuple):
    """What padding masks say about the tokens that an attention mask closes.

    Attributes:
        real: The tokens that are real by every padding mask that agrees: shape ``(B, L)``.
        agree: Whether any padding mask agrees: boolean, no dimension.
        fewer: Whether any closes only some of these tokens and no others: boolean, no dimension.
    """

    real: Tensor
    agree: Tensor
    fewer: Tensor


def _agreeing(real: Tensor, excused: Tensor, padding: Sequence[Tensor]) -> _Given:
    """Compare an attention mask with padding masks.

    A padding mask agrees with an attention mask if both close the same tokens. A token that is
    excused may be open in the padding mask and closed in the attention mask.

    Args:
        real: Where the attention mask is open: shape ``(B, L)``.
        excused: Where the attention mask may be closed for another reason: broadcastable to
            ``(B, L)``.
        padding: Shapes ``(batch, length)``.
    """
    result, agree, fewer = torch.ones_like(real), real.new_zeros(()), real.new_zeros(())
    for given in padding:
        if not _fits(given, real):
            continue
        for one in _open(given):
            one = _repeated(one, len(real))
            others = (~one & real).any()
            different = ((one != real) & ~excused).any() | others
            result = _and(result, one | different)
            agree = agree | ~different
            fewer = fewer | (different & ~others & ~one.all())
    return _Given(result, agree, fewer)


def _open(mask: Tensor) -> list[Tensor]:
    """Return the possible readings of a padding mask: booleans that are true at real tokens.

    In a boolean mask either value may stand for padding. A mask of floating-point numbers may be 1
    at real tokens, or may be added to scores.
    """
    if mask.dtype == torch.bool:
        return [mask, ~mask]
    return [mask > 0, allowed(mask)] if mask.dtype.is_floating_point else [mask > 0]


def _are_runs(real: Tensor) -> Tensor:
    """Return whether the real tokens of every sequence are one run."""
    starts = (real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, :1].sum(-1)
    return (starts < 2).all()


def _differ(real: Tensor) -> Tensor:
    """Return whether the sequences of the batch differ in their real tokens."""
    return (real != real[:1]).any()


def _fits(given: Tensor, real: Tensor) -> bool:
    """Return whether a padding mask fits these tokens; the batch may contain the heads."""
    if given.shape[1] != real.shape[1] or given.device != real.device or not len(given):
        return False
    return len(real) == 1 or len(real) % len(given) == 0


def _repeated(x: Tensor, rows: int) -> Tensor:
    """Repeat each row, so that each head that was merged into the batch has a row."""
    return x.repeat_interleave(rows // len(x), dim=0) if 1 < len(x) < rows else x


def _and(a: Tensor, b: Tensor) -> Tensor:
    """Return where both are true. One of them may have a row for each head, and the other not."""
    rows = max(len(a), len(b))
    return _repeated(a, rows) & _repeated(b, rows)
