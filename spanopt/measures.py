"""What is measured of the gradients of Q and K in one optimizer step."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spanopt.node import Method, rescale_tokens
from spanopt.shards import is_spread
from spanopt.taps.watcher import Watched

__all__ = ["MEASURES", "Sample", "means", "unmeasured"]

MEASURES = (
    "parallel_energy",
    "violation_energy",
    "parallel_share",
    "chance_share",
    "effective_rank",
    "condition",
    "cosine",
    "norm_before",
    "norm_after",
    "entropy",
)
# Attention weights that are computed at once, to measure their entropy.
_CHUNK = 2**24
_NO_GRADIENT = "no gradient of Q and K was seen: compiled code ran, or nothing there is trained"


def _contained(measure: Callable[..., None]) -> Callable[..., None]:
    """Have a method of :class:`Sample` note its exceptions, which must not end a backward pass."""

    @functools.wraps(measure)
    def contained(self: Sample, subject: Watched | str, *args: Any, **kwargs: Any) -> None:
        layer, side = (subject, None) if isinstance(subject, str) else subject[:2]
        try:
            with torch.no_grad():
                measure(self, subject, *args, **kwargs)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            self.failed(layer, side, f"{type(error).__name__}: {reason}")

    return contained


class Sample:
    """What one optimizer step shows; a :class:`~spanopt.taps.watcher.Watcher`.

    Values stay on the device until :meth:`rows` is called. What can't be measured is noted, and
    raises nothing.
    """

    def __init__(self) -> None:
        self._sides: dict[tuple[str, str], list[dict[str, Tensor]]] = defaultdict(list)
        self._entropies: dict[str, list[Tensor]] = defaultdict(list)
        self._merged: set[tuple[str, str]] = set()
        self._failures: dict[tuple[str, str | None], list[str]] = defaultdict(list)
        self._ran: set[str] = set()

    @_contained
    def gradients(self, watched: Watched, given: Tensor, rescaled: Tensor) -> None:
        """Measure a gradient, see :meth:`spanopt.taps.watcher.Watcher.gradients`."""
        name = watched.layer, watched.side
        if watched.x.numel() == 0:
            self.failed(*name, "the batch or the sequence is empty")
            return
        measured = _measured(watched, given, rescaled)
        if watched.x.ndim < 4:
            self._merged.add(name)
        self._sides[name].append(measured)

    @_contained
    def scores(
        self,
        layer: str,
        query: Tensor,
        key: Tensor,
        real: Tensor | None,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Compute attention weights, see :meth:`spanopt.taps.watcher.Watcher.scores`."""
        if is_spread(query) or 0 in (query.numel(), key.numel()):
            return
        with torch.autocast(query.device.type, enabled=False):
            entropies = _score_entropies(query, key, mask, is_causal, scale, enable_gqa)
            self._note_entropies(layer, entropies, real)

    @_contained
    def weights(self, layer: str, weights: Tensor, real: Tensor | None) -> None:
        """Take attention weights, see :meth:`spanopt.taps.watcher.Watcher.weights`."""
        if weights.numel():
            self._note_entropies(layer, _entropies(_float(weights)), real)

    def failed(self, layer: str, side: str | None, reason: str) -> None:
        """Note what was not measured, see :meth:`spanopt.taps.watcher.Watcher.failed`."""
        self._failures[layer, side].append(reason)

    def ran(self, layer: str) -> None:
        """Note that attention ran, see :meth:`spanopt.taps.watcher.Watcher.ran`."""
        self._ran.add(layer)

    def _note_entropies(self, layer: str, entropies: Tensor, real: Tensor | None) -> None:
        """Take the entropies of queries, shape (..., H, N)."""
        if real is not None:
            entropies = torch.where(real.to(entropies.device), entropies, math.nan)
        self._entropies[layer].append(_by_head(entropies[..., None]).nanmean((0, 2, 3)))

    def rows(self, step: int, layers: list[str]) -> list[dict[str, Any]]:
        """Return the rows of the step, in the order of the layers.

        Args:
            step: Number of the step.
            layers: Names of the layers.

        Returns:
            One row for each layer, side and head. A side that could not be measured has one row
            whose ``"problem"`` says why. The list is empty if there was no backward pass.
        """
        rows = []
        for layer in layers:
            of_layer = []
            for side in ("query", "key"):
                of_layer += self._side_rows(step, layer, side)
            if not of_layer and layer in self._ran:
                of_layer.append(_row(step, layer, None, None, {}, [_NO_GRADIENT]))
            rows += of_layer
        return rows

    def _side_rows(self, step: int, layer: str, side: str) -> list[dict[str, Any]]:
        calls = self._sides.get((layer, side), [])
        failures = list(dict.fromkeys(self._failures.get((layer, side), [])))
        if not calls:
            return [_row(step, layer, side, None, {}, failures)] if failures else []
        if side == "query":
            failures += [f"entropy: {x}" for x in dict.fromkeys(self._failures[layer, None])]
        columns = {name: _stacked([call[name] for call in calls]) for name in calls[0]}
        heads = len(calls[0]["parallel_energy"])
        entropies = self._entropies.get(layer, []) if side == "query" else []
        if entropies and len(entropies[0]) == heads:
            columns["entropy"] = _stacked(entropies)
        return [
            _row(
                step,
                layer,
                side,
                None if (layer, side) in self._merged else head,
                {name: values[head] for name, values in columns.items()},
                failures,
            )
            for head in range(heads)
        ]


def _row(
    step: int,
    layer: str,
    side: str | None,
    head: int | None,
    values: dict[str, list[float]],
    problems: list[str],
) -> dict[str, Any]:
    """Return a row of averages over backward passes, with finite numbers and ``None`` only."""
    averages: dict[str, float | None] = {}
    problems = [*problems]
    for name, of_calls in values.items():
        finite = [value for value in of_calls if math.isfinite(value)]
        averages[name] = math.fsum(finite) / len(finite) if finite else None
        if not finite:
            problems.append(f"{name} is {of_calls[0]}")
        elif len(finite) < len(of_calls):
            left_out = len(of_calls) - len(finite)
            problems.append(f"{name} leaves out {left_out} of {len(of_calls)} backward passes")
    parallel, violation = averages.get("parallel_energy"), averages.get("violation_energy")
    if parallel is not None and violation is not None:
        if parallel + violation > 0:
            averages["parallel_share"] = parallel / (parallel + violation)
        else:
            problems.append("the gradient is zero")
    row: dict[str, Any] = {"step": step, "layer": layer, "side": side, "head": head}
    row |= {measure: averages.get(measure) for measure in MEASURES}
    row["problem"] = "; ".join(problems) or None
    return row


def unmeasured(step: int, layers: list[str], error: Exception) -> list[dict[str, Any]]:
    """Return the rows of a step of which nothing could be measured, one for each layer.

    Args:
        step: Number of the step.
        layers: Names of the layers.
        error: What was raised.
    """
    reason = f"{type(error).__name__}: {error}"
    return [_row(step, layer, None, None, {}, [reason]) for layer in layers]


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean over heads of every measure, by names such as a dashboard shows.

    Args:
        rows: The rows of one step.

    Returns:
        The means by ``"span/<layer>/<side>/<measure>"``, without those that have no value.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for row, measure in itertools.product(rows, MEASURES):
        if row[measure] is not None:
            layer = row["layer"] or "model"
            values[f"span/{layer}/{row['side']}/{measure}"].append(row[measure])
    return {name: math.fsum(heads) / len(heads) for name, heads in values.items()}


def _measured(watched: Watched, given: Tensor, rescaled: Tensor) -> dict[str, Tensor]:
    """Return every measure of a gradient but the entropy, each of shape (H,)."""
    mask = watched.mask
    if mask is not None:
        mask = _by_head(mask.expand(watched.x.shape[:-1])[..., None])[..., 0]
    x, given, rescaled = (_by_head(_float(t.detach())) for t in (watched.x, given, rescaled))
    other = None if watched.other is None else _by_head(_float(watched.other))
    method = Method(watched.method.ridge, watched.method.setup)
    one, nothing = x.new_ones(()), x.new_zeros(())
    parallel = rescale_tokens(given, x, one, nothing, method, mask, watched.documents, other=other)
    energies = (t.square().sum((0, 2, 3)) for t in (parallel, given - parallel))
    before, after = (torch.linalg.vector_norm(t, dim=(0, 2, 3)) for t in (given, rescaled))
    singular = _singular_values(x if mask is None else torch.where(mask[..., None], x, 0))
    weights = singular / singular.sum(-1, keepdim=True)
    rank = torch.special.entr(weights).sum(-1).exp()
    measured = {}
    if method.setup == "span" and watched.documents is None:
        real_tokens = x.new_ones(x.shape[:-1]) if mask is None else mask.to(x.dtype)
        tokens = real_tokens.sum(-1).clamp(min=1)  # (B, H)
        measured["chance_share"] = (tokens.clamp(max=x.shape[-1]) / tokens).mean(0)
    return measured | {
        **dict(zip(("parallel_energy", "violation_energy"), energies, strict=True)),
        "effective_rank": rank.nanmean(0),
        "condition": (singular[..., 0] / singular[..., -1]).nanmedian(0).values,
        "cosine": (given * rescaled).sum((0, 2, 3)) / (before * after),
        "norm_before": before,
        "norm_after": after,
    }


def _singular_values(x: Tensor) -> Tensor:
    """Return the singular values, NaN for a matrix that is not finite, of which none are taken."""
    finite = x.isfinite().all(-1).all(-1)[..., None]  # (B, H, 1)
    singular = torch.linalg.svdvals(torch.where(finite[..., None], x, 0))
    return torch.where(finite, singular, math.nan)


def _score_entropies(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Return the entropies (..., H, N) of the weights that the attention call computes."""
    query, key = query.detach(), key.detach()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = query.shape[-2], key.shape[-2]
    size = max(1, _CHUNK // max(1, query.shape[:-2].numel() * keys))
    parts = []
    for first in range(0, queries, size):
        part = _float(query[..., first : first + size, :]) @ _float(key).mT * scale
        if is_causal:
            rows = torch.arange(first, first + part.shape[-2], device=part.device)
            future = rows[:, None] < torch.arange(keys, device=part.device)
            part = part.masked_fill(future, -math.inf)
        if mask is not None:
            rows_of = mask if mask.shape[-2] == 1 else mask[..., first : first + size, :]
            part = _masked(part, rows_of)
        parts.append(_entropies(part.softmax(-1)))
    return torch.cat(parts, -1)


def _by_head(x: Tensor) -> Tensor:
    """Return (B, H, N, d) for (B, ..., N, d), and (B, 1, N, d) where heads are not told apart."""
    if x.ndim < 4:
        return x.reshape(-1, 1, *x.shape[-2:])
    return x.flatten(1, -3)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _entropies(weights: Tensor) -> Tensor:
    return torch.special.entr(weights).sum(-1)


def _stacked(values: list[Tensor]) -> list[list[float]]:
    """Return for each head its values in the backward passes."""
    heads: list[list[float]] = torch.stack(values, -1).tolist()
    return heads


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
