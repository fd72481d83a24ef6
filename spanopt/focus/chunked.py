"""The forward and the backward pass of attention to chosen keys, in chunks of queries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spanopt.focus.choosing import (
    FORBIDDEN,
    chosen,
    kept_scores,
    may_be_none,
    own_scores,
    spread,
    width_of,
)
from spanopt.focus.spec import Keeping

__all__ = ["backward", "computed_in", "forward", "saved_width"]


def computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype in which scores and weights are computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def saved_width(keeping: Keeping, keys: int, device: torch.device) -> int:
    """Return how many weights of each query are saved for the backward pass.

    There are none for the kind ``"gradient"``, and none on an accelerator, where finding out
    whether they are all of the weights would wait for the device.
    """
    if keeping.kind == "gradient" or device.type != "cpu":
        return 0
    return width_of(keeping, keys)


# Values are fetched one by one if at most one in so many keys is chosen (measured on a CPU).
_SPARSE = 16


class Settings(NamedTuple):
    """The settings of a call, which are the same for all of its chunks."""

    keeping: Keeping
    leading: list[int]
    is_causal: bool
    scale: float
    chunk: int
    queries: int
    keys: int

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Yield for each chunk its first query, the query after its last, and a number of keys.

        Keys from that number on are closed to all queries of the chunk.
        """
        kind, k, always = self.keeping.kind, self.keeping.k, self.keeping.always
        for first in range(0, self.queries, self.chunk):
            last = min(first + self.chunk, self.queries)
            seen = self.keys
            if self.is_causal and kind in ("top", "window", "gradient"):
                seen = min(seen, max(last, k + len(always), always[-1] + 1 if always else 0))
            yield first, last, seen

    def scores(
        self, q: Tensor, k: Tensor, mask: Tensor | None, first: int, last: int, seen: int
    ) -> Tensor:
        """Return the scores of a chunk with their masks, shape (rows, n, seen)."""
        scores = torch.bmm(q[:, first:last] * self.scale, k[:, :seen].mT)
        if self.is_causal:
            row = torch.arange(first, last, device=q.device)[:, None]
            scores.masked_fill_(row < torch.arange(seen, device=q.device), -math.inf)
        if mask is not None:
            part = self.part(mask, first, last, seen)
            by_row = scores.view(*self.leading, last - first, seen)
            if mask.dtype == torch.bool:
                by_row.masked_fill_(~part, -math.inf)
            else:
                by_row += part
        return scores

    def part(self, mask: Tensor, first: int, last: int, seen: int) -> Tensor:
        """Return the part of a mask that is for a chunk."""
        mask = mask if mask.shape[-2] == 1 else mask[..., first:last, :]
        return mask if mask.shape[-1] == 1 else mask[..., :seen]

    def is_simple(self, own: Tensor) -> bool:
        """Return whether the chosen keys of a chunk have all of its weights, which are then saved.

        They have not if a query keeps all keys, which is always so for the kind ``"gradient"``.
        """
        if not saved_width(self.keeping, self.keys, own.device):
            return False
        return not bool((own.amax(-1) <= FORBIDDEN).any())

    def has_weights(self, weights: Tensor) -> bool:
        """Return whether :meth:`is_simple` was true for a chunk, from its saved weights."""
        return weights.shape[-1] > 0 and not bool((weights[..., 0] < 0).any())

    def is_sparse(self, seen: int) -> bool:
        """Return whether so few keys are chosen that it pays to fetch their values one by one."""
        return _SPARSE * width_of(self.keeping, self.keys) <= seen

    def places(self, positions: Tensor, seen: int) -> Tensor:
        """Return where chosen keys are in the keys of all rows; any place may stand for no key."""
        rows = torch.arange(len(positions), device=positions.device)[:, None, None]
        return positions.clamp(max=seen - 1) + rows * self.keys

    def multipliers(self, part: Tensor, positions: Tensor, seen: int) -> Tensor:
        """Return the multipliers of dropout for a chunk's weights, shape (rows, n, seen)."""
        if self.keeping.kind == "gradient":
            return part[..., :seen]
        return spread(part, positions, seen, may_be_none(self.keeping), 1.0)

    def weights(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Return the attention weights of a chunk."""
        kept, best = kept_scores(scores, positions, may_be_none(self.keeping))
        weights = (scores if self.keeping.kind == "gradient" else kept).softmax(-1)
        # A query to which all keys are closed gets zeros. PyTorch's attention does the same.
        return weights.masked_fill_((best == -math.inf) & weights[..., :1].isnan(), 0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    multipliers: Tensor | None,
    leading: Sequence[int],
    kind: str,
    of_each: int,
    always: Sequence[int],
    is_causal: bool,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the positions of the chosen keys, and their weights.

    The weights have the last dimension :func:`saved_width`. Those of a chunk are negative if the
    backward pass has to compute them again.
    """
    keeping = Keeping(kind, of_each, tuple(always))
    n, m = q.shape[1], k.shape[1]
    settings = Settings(keeping, [*leading], is_causal, scale, chunk, n, m)
    none = may_be_none(keeping)
    out = q.new_empty(len(q), n, v.shape[-1])
    all_positions = q.new_empty(len(q), n, width_of(keeping, m), dtype=torch.int32)
    saved = saved_width(keeping, m, q.device)
    all_weights = q.new_empty(len(q), n, saved, dtype=computed_in(q))
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(computed_in(q)).contiguous() for x in (q, k, v))
        for first, last, seen in settings.chunks():
            scores = settings.scores(q, k, mask, first, last, seen)
            positions = chosen(scores, keeping, first, n, m)
            all_positions[:, first:last] = positions
            part = None if multipliers is None else multipliers[:, first:last]
            own = own_scores(scores, positions, none)
            if settings.is_simple(own):
                own = own.softmax(-1)
                all_weights[:, first:last] = own
                own = own if part is None else own * part
                if settings.is_sparse(seen):
                    out[:, first:last] = _weighted(own, v, settings.places(positions, seen))
                    continue
                weights = spread(own, positions, seen, none)
            else:
                all_weights[:, first:last] = -1
                weights = settings.weights(scores, positions)
                if part is not None:
                    weights = weights * settings.multipliers(part, positions, seen)
            out[:, first:last] = torch.bmm(weights, v[:, :seen])
    return out, all_positions, all_weights


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    multipliers: Tensor | None,
    all_positions: Tensor,
    all_weights: Tensor,
    leading: Sequence[int],
    kind: str,
    of_each: int,
    always: Sequence[int],
    is_causal: bool,
    scale: float,
    chunk: int,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, and of the mask if ``with_mask``."""
    keeping = Keeping(kind, of_each, tuple(always))
    n, m = q.shape[1], k.shape[1]
    settings = Settings(keeping, [*leading], is_causal, scale, chunk, n, m)
    none = may_be_none(keeping)
    dtypes = [x.dtype for x in (q, k, v)]
    with torch.autocast(q.device.type, enabled=False):
        grad, q, k, v = (x.to(computed_in(q)).contiguous() for x in (grad, q, k, v))
        of_q, of_k, of_v = (torch.zeros_like(x) for x in (q, k, v))
        of_mask = torch.zeros_like(mask) if mask is not None and with_mask else q.new_zeros(0)
        for first, last, seen in settings.chunks():
            positions = all_positions[:, first:last].long()
            weights = all_weights[:, first:last]
            part = None if multipliers is None else multipliers[:, first:last]
            given = grad[:, first:last]
            simple = settings.has_weights(weights)
            sparse = simple and settings.is_sparse(seen)
            places = settings.places(positions, seen) if sparse else positions
            if sparse:
                # Both are faster than their plainer forms, v[places] and the transposed product.
                own = v.view(-1, v.shape[-1]).index_select(0, places.flatten())
                by_query = own.view(*places.shape, -1).mT
                of_weights = torch.matmul(given[:, :, None], by_query)[:, :, 0]
            else:
                of_weights = torch.bmm(given, v[:, :seen].mT)
            if simple and not sparse:
                of_weights = of_weights.gather(-1, positions.clamp(max=seen - 1))
            elif not simple:
                scores = settings.scores(q, k, mask, first, last, seen)
                weights = settings.weights(scores, positions)
                part = None if part is None else settings.multipliers(part, positions, seen)
            dropped = weights if part is None else weights * part
            of_weights = of_weights if part is None else of_weights * part
            of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
            if sparse:
                _add_outer(of_v, dropped, given, places)
                of_q[:, first:last] = _weighted(of_scores, k, places) * scale
                _add_outer(of_k, of_scores * scale, q[:, first:last], places)
                if mask is None or not with_mask:
                    continue
            if simple:
                dropped = spread(dropped, positions, seen, none)
                of_scores = spread(of_scores, positions, seen, none)
            elif kind == "gradient":
                kept, _ = kept_scores(scores, positions, none)
                of_scores = torch.where(kept > -math.inf, of_scores, 0)
            if not sparse:
                of_v[:, :seen] += torch.bmm(dropped.mT, given)
                of_q[:, first:last] = torch.bmm(of_scores, k[:, :seen]) * scale
                of_k[:, :seen] += torch.bmm(of_scores.mT, q[:, first:last]) * scale
            if mask is not None and with_mask:
                of_part = settings.part(of_mask, first, last, seen)
                by_row = of_scores.reshape(*leading, last - first, seen)
                of_part += by_row.sum_to_size(of_part.shape).to(of_part.dtype)
    of_q, of_k, of_v = (x.to(dtype) for x, dtype in zip((of_q, of_k, of_v), dtypes, strict=True))
    return of_q, of_k, of_v, of_mask


def _weighted(weights: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """Return weighted sums, shape (rows, n, d), of the keys' rows in x, shape (rows, M, d)."""
    bags = torch.nn.functional.embedding_bag(
        places.flatten(0, 1),
        x.view(-1, x.shape[-1]),
        per_sample_weights=weights.reshape(-1, weights.shape[-1]),
        mode="sum",
    )
    return bags.view(*places.shape[:2], -1)


def _add_outer(x: Tensor, weights: Tensor, by: Tensor, places: Tensor) -> None:
    """Add to the row of each chosen key in x the query's row of ``by`` times the key's weight."""
    outer = weights[..., None] * by[:, :, None]
    x.view(-1, x.shape[-1]).index_add_(0, places.flatten(), outer.flatten(0, 2))
