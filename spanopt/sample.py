"""The measures of one optimizer step's backward passes, and the rows that are made of them."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spanopt.measures import MEASURES, by_head, entropies, floating, measure, score_chunks
from spanopt.scores import SCORE_MEASURES, measure_scores
from spanopt.shards import is_spread
from spanopt.taps.telling import Watched

__all__ = ["Sample", "means", "unmeasured"]

_CHUNK = 256  # the number of queries whose log weights are computed at once
_NO_GRADIENT = "no gradient of Q and K was seen: compiled code ran, or nothing there is trained"


def _contained(measure: Callable[..., None]) -> Callable[..., None]:
    """Make a method of :class:`Sample` note its exceptions, which must not end a backward pass."""

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
    """The measures of one optimizer step; a :class:`~spanopt.taps.telling.Watcher`.

    Values stay on the device until :meth:`rows` is called. What can't be measured is noted, and
    no exception is raised.

    Args:
        keys: How many keys focus would keep, for the measures of :mod:`spanopt.scores`; ``None`` if
            scores are not measured.
    """

    def __init__(self, keys: int | None = None) -> None:
        self._keys = keys
        self._columns = MEASURES if keys is None else (*MEASURES, *SCORE_MEASURES)
        self._scores: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
        self._sides: dict[tuple[str, str], list[dict[str, Tensor]]] = defaultdict(list)
        self._entropies: dict[str, list[Tensor]] = defaultdict(list)
        self._merged: set[tuple[str, str]] = set()
        self._failures: dict[tuple[str, str | None], list[str]] = defaultdict(list)
        self._ran: set[str] = set()

    @_contained
    def gradients(self, watched: Watched, given: Tensor, rescaled: Tensor) -> None:
        """Measure a gradient, see :meth:`spanopt.taps.telling.Watcher.gradients`."""
        name = watched.layer, watched.side
        if watched.x.numel() == 0:
            self.failed(*name, "the batch or the sequence is empty")
            return
        measured = measure(watched, given, rescaled)
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
        """Compute and measure scores, see :meth:`spanopt.taps.telling.Watcher.scores`."""
        if is_spread(query) or 0 in (query.numel(), key.numel()):
            return
        with torch.autocast(query.device.type, enabled=False):
            chunks = score_chunks(query, key, mask, is_causal, scale, enable_gqa)
            self._note_scores(layer, chunks, real)

    @_contained
    def weights(self, layer: str, weights: Tensor, real: Tensor | None) -> None:
        """Measure attention weights, see :meth:`spanopt.taps.telling.Watcher.weights`."""
        if weights.numel():
            # Their logarithms are the scores, up to one constant for each row.
            chunks = floating(weights).log().split(_CHUNK, -2)
            self._note_scores(layer, chunks, real)

    def failed(self, layer: str, side: str | None, reason: str) -> None:
        """Note what was not measured, see :meth:`spanopt.taps.telling.Watcher.failed`."""
        self._failures[layer, side].append(reason)

    def ran(self, layer: str) -> None:
        """Note that attention ran, see :meth:`spanopt.taps.telling.Watcher.ran`."""
        self._ran.add(layer)

    def _note_scores(self, layer: str, chunks: Iterable[Tensor], real: Tensor | None) -> None:
        """Measure scores with their masks, in chunks of queries of shape (..., H, n, M)."""
        parts: list[Tensor] = []

        def by_heads() -> Iterator[Tensor]:
            for scores in chunks:
                parts.append(entropies(scores.softmax(-1)))
                yield by_head(scores)

        if self._keys is None:
            for _ in by_heads():
                pass
        else:
            self._scores[layer].append(measure_scores(by_heads(), self._keys, _real(real)))
        of_queries = torch.cat(parts, -1)
        if real is not None:
            of_queries = torch.where(real.to(of_queries.device), of_queries, math.nan)
        self._entropies[layer].append(by_head(of_queries[..., None]).nanmean((0, 2, 3)))

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
        scores = self._scores.get(layer, []) if side == "query" else []
        if scores and len(scores[0]["dispersion"]) == heads:
            measured = {name: _stacked([call[name] for call in scores]) for name in scores[0]}
            for name, values in measured.items():
                if any(map(math.isfinite, itertools.chain(*values))):
                    columns[name] = values
            if "separation" not in columns:
                failures.append(f"scores: no query sees more than {self._keys} keys")
        return [
            _row(
                step,
                layer,
                side,
                None if (layer, side) in self._merged else head,
                {name: values[head] for name, values in columns.items()},
                failures,
                self._columns,
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
    columns: Sequence[str] = MEASURES,
) -> dict[str, Any]:
    """Return a row of averages over backward passes. They are finite numbers or ``None``."""
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
    row |= {column: averages.get(column) for column in columns}
    row["problem"] = "; ".join(problems) or None
    return row


def unmeasured(step: int, layers: list[str], error: Exception) -> list[dict[str, Any]]:
    """Return the rows of a step in which nothing could be measured, one for each layer.

    Args:
        step: Number of the step.
        layers: Names of the layers.
        error: The exception that was raised.
    """
    reason = f"{type(error).__name__}: {error}"
    return [_row(step, layer, None, None, {}, [reason]) for layer in layers]


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean over heads of every measure, by name for a dashboard.

    Args:
        rows: The rows of one step.

    Returns:
        The means by ``"span/<layer>/<side>/<measure>"``. Measures without a value are left out.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for row, column in itertools.product(rows, (*MEASURES, *SCORE_MEASURES)):
        if row.get(column) is not None:
            layer = row["layer"] or "model"
            values[f"span/{layer}/{row['side']}/{column}"].append(row[column])
    return {name: math.fsum(heads) / len(heads) for name, heads in values.items()}


def _real(real: Tensor | None) -> Tensor | None:
    """Reshape a mask of real queries, broadcastable to (..., H, N), to (B, H or 1, N)."""
    if real is None:
        return None
    if real.ndim < 3:
        return real.reshape(-1, 1, real.shape[-1])
    return real.flatten(1, -2)


def _stacked(values: list[Tensor]) -> list[list[float]]:
    """Return a list for each head, with its values in the backward passes."""
    heads: list[list[float]] = torch.stack(values, -1).tolist()
    return heads
