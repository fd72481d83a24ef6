"""Measuring what span scaling does to a model's gradients while it trains."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spanopt.node import Method, rescale_tokens
from spanopt.optimizer import SpanScaledOptimizer
from spanopt.taps.watcher import Watched

__all__ = ["SpanMonitor"]

_MEASURES = (
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


class SpanMonitor:
    """Measure the gradients of Q and K at every scaled layer, every so many optimizer steps.

    Nothing changes in what is trained. Between the steps that are measured it costs nothing; in one
    that is, singular values and attention weights are computed beside the training, and what
    ``torch.compile`` has compiled runs eagerly: close the monitor when training is over.

    Rows are for one layer, side and head, in a batch of the process; where a step has several
    backward passes they are averaged. Q and K are what attention multiplies: some layers divide Q
    by sqrt(d) before. Under ``GradScaler`` gradients are times its scale.

    ``step``
        Number of the optimizer step, from 0.
    ``layer``, ``side``, ``head``
        Name of the layer; ``"query"`` or ``"key"``; number of the head, ``None`` where heads are
        merged into the batch and can't be told apart.
    ``parallel_energy``, ``violation_energy``
        Squared norm of the parallel part of the gradient, and of the rest, in the sum over the
        batch; the gradient is the one before scaling. What is parallel is what the layer's
        ``projection`` says.
    ``parallel_share``
        The first over the sum of both.
    ``chance_share``
        The parallel share that a gradient of random direction would have: the dimension of the span
        over the number of tokens, d / N where N > d. ``None`` unless ``projection`` is the span's.
    ``effective_rank``
        exp of the entropy of the singular values of Q (or K), scaled to add up to 1 (Roy and
        Vetterli, 2007): between 1 and d. Mean over the batch.
    ``condition``
        Largest over smallest singular value of Q (or K). Median over the batch.
    ``cosine``
        Between the gradient before and after scaling.
    ``norm_before``, ``norm_after``
        Their Frobenius norms.
    ``entropy``
        Of a query's attention weights, in nats, mean over queries; on the query side only, and
        ``None`` where attention can't be seen (``qk_modules=``).

    Args:
        optimizer: A wrapped optimizer. The monitor is told of its steps until :meth:`close`.
        every: Measure the first step, and then every so many.
        path: A JSONL file to which each row is appended as one line.
        writer: A ``torch.utils.tensorboard.SummaryWriter``, for the mean over heads.
        run: A run of Weights & Biases, as ``wandb.init`` returns it, likewise.
        start: Number of the first step, where training is resumed.

    Attributes:
        rows: What was measured, as dicts, such as ``pandas.DataFrame`` takes.

    Raises:
        TypeError: ``optimizer`` is not a :class:`~spanopt.SpanScaledOptimizer`.
        ValueError: ``every`` is not a whole number above 0.

    Example:
        >>> model = torch.nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = SpanScaledOptimizer(sgd, model, {"*": (2.0, 1.0)})
        >>> with SpanMonitor(optimizer, every=2) as monitor:
        ...     for _ in range(4):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(16, 3, 8)).pow(2).mean().backward()
        ...         optimizer.step()
        >>> [(row["step"], row["side"], row["head"]) for row in monitor.rows][:3]
        [(0, 'query', 0), (0, 'query', 1), (0, 'key', 0)]
        >>> len(monitor.rows)
        8
    """

    def __init__(
        self,
        optimizer: SpanScaledOptimizer,
        every: int = 100,
        *,
        path: str | Path | None = None,
        writer: Any = None,
        run: Any = None,
        start: int = 0,
    ) -> None:
        if not isinstance(optimizer, SpanScaledOptimizer):
            raise TypeError(
                "SpanMonitor measures a wrapped optimizer, a SpanScaledOptimizer, got "
                f"{type(optimizer).__name__}"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number above 0, got {every!r}")
        self.rows: list[dict[str, Any]] = []
        self._optimizer = optimizer
        self._every = every
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._path.touch()  # what can't be written to is known before training
        self._writer = writer
        self._run = run
        if run is not None:
            run.define_metric("span/*", step_metric="span/step")
        self._step = start
        self._next = start
        self._sample: _Sample | None = None
        self._handle = optimizer.register_step_post_hook(self._after_step)
        # Dropped without close(), it must not leave compiled code running eagerly.
        self._stances: list[Any] = []
        weakref.finalize(self, _restore, self._stances)
        self._arm()

    def _arm(self) -> None:
        self._sample = _Sample()
        self._optimizer.hooks.watch(self._sample)
        # Compiled code has no Python in it that could be told anything.
        self._stances.append(torch.compiler.set_stance("force_eager"))

    def _disarm(self) -> None:
        self._optimizer.hooks.watch(None)
        self._sample = None
        _restore(self._stances)

    def _after_step(self, *_: Any) -> None:
        step, self._step = self._step, self._step + 1
        if self._sample is not None:
            if not self._optimizer.hooks.groups:
                self.close()  # detached: there is nothing to measure
                return
            rows = self._sample.rows(step, [site.name for site in self._optimizer.hooks.sites])
            if not rows:
                return  # no backward pass yet
            self._disarm()
            self._report(rows)
            self._next = step + self._every
        if self._step >= self._next:
            self._arm()

    def _report(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        if self._writer is None and self._run is None:
            return
        step = rows[0]["step"]
        means = _means(rows)
        if self._writer is not None:
            for name, value in means.items():
                self._writer.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log({**means, "span/step": step})

    def to_pandas(self) -> Any:
        """Return :attr:`rows` as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.

        Example:
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> sgd = torch.optim.SGD(model.parameters())
            >>> optimizer = SpanScaledOptimizer(sgd, model, {"*": (2.0, 1.0)})
            >>> x = torch.randn(16, 3, 8)
            >>> monitor = SpanMonitor(optimizer)
            >>> model(x, x, x)[0].pow(2).mean().backward()
            >>> optimizer.step()
            >>> table = monitor.to_pandas()
            >>> table.groupby("side").parallel_share.mean().index.to_list()
            ['key', 'query']
            >>> monitor.close()
        """
        return _module("pandas", "to_pandas()").DataFrame(self.rows)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the parallel share of the gradients: layers by steps, and a line for each layer.

        Args:
            path: Where to save the picture, in the format that its suffix says.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: Nothing has been measured yet.

        Example:
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> sgd = torch.optim.SGD(model.parameters())
            >>> optimizer = SpanScaledOptimizer(sgd, model, {"*": (2.0, 1.0)})
            >>> x = torch.randn(16, 3, 8)
            >>> monitor = SpanMonitor(optimizer)
            >>> model(x, x, x)[0].pow(2).mean().backward()
            >>> optimizer.step()
            >>> figure = monitor.plot()  # monitor.plot("shares.png") saves it too
            >>> monitor.close()
        """
        if not self.rows:
            raise ValueError("nothing has been measured yet: take an optimizer step first")
        figure = _drawn(self.rows)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def close(self) -> None:
        """Stop measuring. What was measured stays; doing it twice is harmless.

        Example:
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> sgd = torch.optim.SGD(model.parameters())
            >>> optimizer = SpanScaledOptimizer(sgd, model, {"*": (2.0, 1.0)})
            >>> x = torch.randn(16, 3, 8)
            >>> monitor = SpanMonitor(optimizer)
            >>> model(x, x, x)[0].pow(2).mean().backward()
            >>> optimizer.step()
            >>> monitor.close()  # on leaving a with block it is closed too
            >>> len(monitor.rows)
            4
        """
        self._handle.remove()
        self._next = math.inf  # type: ignore[assignment]
        if self._sample is not None:
            self._disarm()

    def __enter__(self) -> SpanMonitor:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def _restore(stances: list[Any]) -> None:
    """Have ``torch.compile`` act as before."""
    while stances:
        stances.pop().__exit__(None, None, None)


def _module(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"SpanMonitor.{what} needs {package}: pip install {package}") from error


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean over heads of every measure, by a name such as a dashboard shows."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for measure in _MEASURES:
            if row[measure] is not None:
                layer = row["layer"] or "model"
                values[f"span/{layer}/{row['side']}/{measure}"].append(row[measure])
    return {name: _average(of_heads) for name, of_heads in values.items()}


class _Sample:
    """What one step shows; a :class:`~spanopt.taps.watcher.Watcher`.

    Values stay on the device until the step is over.
    """

    def __init__(self) -> None:
        self._sides: dict[tuple[str, str], list[dict[str, Tensor]]] = defaultdict(list)
        self._entropies: dict[str, list[Tensor]] = defaultdict(list)
        self._merged: set[tuple[str, str]] = set()

    @torch.no_grad()
    def gradients(self, watched: Watched, given: Tensor, rescaled: Tensor) -> None:
        """Measure a gradient, see :meth:`spanopt.taps.watcher.Watcher.gradients`."""
        name = watched.layer, watched.side
        if watched.x.ndim < 4:
            self._merged.add(name)
        self._sides[name].append(_measured(watched, given, rescaled))

    @torch.no_grad()
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
        self._note_entropies(layer, torch.cat(parts, -1), real)

    @torch.no_grad()
    def weights(self, layer: str, weights: Tensor, real: Tensor | None) -> None:
        """Take attention weights, see :meth:`spanopt.taps.watcher.Watcher.weights`."""
        self._note_entropies(layer, _entropies(_float(weights)), real)

    def _note_entropies(self, layer: str, entropies: Tensor, real: Tensor | None) -> None:
        """Take the entropies of queries, shape (..., H, N)."""
        if real is not None:
            entropies = torch.where(real.to(entropies.device), entropies, math.nan)
        self._entropies[layer].append(_by_head(entropies[..., None]).nanmean((0, 2, 3)))

    def rows(self, step: int, layers: list[str]) -> list[dict[str, Any]]:
        """Return the rows of the step, by layer and side; none if there was no backward pass."""
        rows = []
        for layer, side in itertools.product(layers, ("query", "key")):
            calls = self._sides.get((layer, side))
            if calls is None:
                continue
            columns = {name: _mean([call[name] for call in calls]) for name in calls[0]}
            parallel, violation = columns["parallel_energy"], columns["violation_energy"]
            columns["parallel_share"] = parallel / (parallel + violation)
            entropies = self._entropies.get(layer, []) if side == "query" else []
            if entropies and entropies[0].shape == parallel.shape:
                columns["entropy"] = _mean(entropies)
            values = {name: column.tolist() for name, column in columns.items()}
            for head in range(len(parallel)):
                row: dict[str, Any] = {"step": step, "layer": layer, "side": side}
                row["head"] = None if (layer, side) in self._merged else head
                for measure in _MEASURES:
                    row[measure] = values[measure][head] if measure in values else None
                rows.append(row)
        return rows


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
    real = x if mask is None else x * mask[..., None]
    singular = torch.linalg.svdvals(real)  # (B, H, min(N, d))
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


def _by_head(x: Tensor) -> Tensor:
    """Return (B, H, N, d) for (B, ..., N, d), and (B, 1, N, d) where heads are not told apart."""
    if x.ndim < 4:
        return x.reshape(-1, 1, *x.shape[-2:])
    return x.flatten(1, -3)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _entropies(weights: Tensor) -> Tensor:
    return torch.special.entr(weights).sum(-1)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _drawn(rows: list[dict[str, Any]]) -> Any:
    """Draw the parallel share by layer and step."""
    matplotlib = _module("matplotlib", "plot()")
    figures = importlib.import_module("matplotlib.figure")
    shares: dict[str, dict[tuple[str, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        shares[row["side"]][row["layer"], row["step"]].append(row["parallel_share"])
    limit = min(1.0, 1.2 * max(_average(heads) for of in shares.values() for heads in of.values()))
    chances = {row["chance_share"] for row in rows}
    chance = [*chances] if len(chances) == 1 and None not in chances else []
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    steps = sorted({row["step"] for row in rows})
    sides = [side for side in ("query", "key") if side in shares]
    height = 1.6 + len(sides) * max(1.8, 0.16 * len(layers))
    figure = figures.Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(len(sides), 2, squeeze=False, width_ratios=(1.15, 1))
    colours = matplotlib.colormaps["plasma"]
    for (heatmap, lines), side in zip(axes, sides, strict=True):
        of_side = shares[side]
        means = [[_average(of_side.get((layer, step), [])) for step in steps] for layer in layers]
        limits = {"vmin": 0, "vmax": limit}
        image = heatmap.imshow(
            means, aspect="auto", origin="lower", interpolation="nearest", **limits
        )
        places = range(0, len(steps), max(1, len(steps) // 6))
        heatmap.set_xticks(places, [str(steps[i]) for i in places])
        named = range(0, len(layers), max(1, len(layers) // 12))
        heatmap.set_yticks(named, [layers[i] or "(model)" for i in named])
        heatmap.set(title=f"{side}, by layer", xlabel="optimizer step")
        figure.colorbar(image, ax=heatmap, label="parallel share")
        for i, (layer, values) in enumerate(zip(layers, means, strict=True)):
            colour = colours(0.85 * i / max(1, len(layers) - 1))
            lines.plot(steps, values, marker=".", color=colour, label=layer or "(model)")
        if chance:
            lines.axhline(chance[0], color="black", linestyle=":", label="by chance")
        lines.set(title=f"{side}, mean over heads", xlabel="optimizer step", ylim=(0, limit))
        lines.set_ylabel("parallel share")
        if len(layers) <= 8:
            lines.legend(fontsize="small")
    figure.suptitle("Share of the gradient's energy that is in the parallel span")
    return figure


def _average(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
