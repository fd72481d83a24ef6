"""What attention masks tell about padding, and when they must be refused.

A key that is closed to every query in every head may be padding. It may also be a real token that
the pattern of attention leaves out. The values of a mask do not always tell the two apart.
:func:`judge` counts a token as padding only if nothing contradicts that. If nothing tells, its
verdict is that the mask must be refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spanopt.taps.masks import Read, Shown, allowed

__all__ = ["Verdict", "judge"]


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

    Each mask is judged by itself. A token is padding if any mask says so. A mask that was computed
    from scores closes tokens that are padding only if a padding mask of the model closes them. What
    a mask closes and a later function may have opened again is refused. In self-attention the
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
        >>> from spanopt.taps.masks import read
        >>> open_keys = torch.tensor([[[[True, True, True]]], [[[True, True, False]]]])
        >>> judge(read(open_keys, 4), 3, 3, self_attention=True).keys.tolist()
        [[True, True, True], [True, True, False]]
        >>> bool(judge(read(open_keys[1:], 4), 3, 3, self_attention=True).refused)
        True
    """
    padding = list(padding)
    result: Verdict | None = None
    for shown in read:
        if shown.chosen:
            verdict = _of_chosen(shown, n, m, self_attention, padding)
        elif self_attention and shown.diagonal is not None and n == m:
            verdict = _of_one_sequence(shown, n, padding)
        else:
            verdict = _of_two_sequences(shown, n, m, padding)
        if shown.doubt is not False:
            closed = ~(verdict.queries.all() & verdict.keys.all())
            verdict = Verdict(*verdict[:2], verdict.refused | (shown.doubt & closed))
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


def _of_chosen(
    shown: Shown, n: int, m: int, self_attention: bool, padding: Sequence[Tensor]
) -> Verdict:
    """Judge a mask that was computed from scores: only the model's padding masks tell padding."""
    keys = _within(shown.columns.expand(len(shown.columns), m), padding)
    queries = keys
    if not (self_attention and n == m):
        queries = _within(shown.rows.expand(len(shown.rows), n), padding)
    return Verdict(queries, keys, keys.new_zeros(()))


def _within(real: Tensor, padding: Sequence[Tensor]) -> Tensor:
    """Return which tokens are real by the padding masks that close no open token: ``(B, L)``."""
    result = torch.ones_like(real)
    for given in padding:
        if _fits(given, real):
            for one in _open(given):
                one = _repeated(one, len(real))
                result = _and(result, one | (~one & real).any())
    return result


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
