"""The inspection of a model: which of its attention layers can be scaled, before any training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from spanopt.errors import what_was_seen
from spanopt.guessing import guess_inputs
from spanopt.installing import attach
from spanopt.scale import SpanScale
from spanopt.sites import AttentionSite, find_attention, unwrap
from spanopt.table import aligned, collapsed, described

__all__ = ["InspectedLayer", "Inspection", "inspect_model"]


@dataclass(frozen=True)
class InspectedLayer:
    """An attention layer and whether it can be scaled.

    Attributes:
        name: Its qualified name in the model.
        class_name: Name of its class.
        tap: How Q and K are reached, see :class:`~spanopt.AttentionSite`; ``None`` if not known.
        heads: Number of query heads; ``None`` if not known.
        kv_heads: Number of key heads; ``None`` if not known.
        head_dim: Head dimension; ``None`` if not known.
        trains: Whether its query and key parameters require gradients: ``"yes"``, ``"no"`` or
            ``"some"``.
        missed: Why it would not be scaled; ``None`` if it would be.
    """

    name: str
    class_name: str
    tap: str | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    trains: str
    missed: str | None


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` found.

    Attributes:
        layers: The attention layers.
        note: Why the inspection is not complete; ``None`` if it is.
        verified: Whether a forward pass has shown the result. If not, the result is only a guess
            from the model's code.

    Example:
        >>> inspect_model(nn.TransformerEncoderLayer(8, nhead=2)).ok
        True
    """

    layers: tuple[InspectedLayer, ...]
    note: str | None
    verified: bool = True

    @property
    def ok(self) -> bool:
        """Return whether a forward pass has shown attention layers, all of which can be scaled."""
        return self.verified and bool(self.layers) and not any(x.missed for x in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Return ``ok``, ``verified``, ``note`` and ``layers`` as a dict, for programs."""
        return {
            "ok": self.ok,
            "verified": self.verified,
            "note": self.note,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        rows = [(*described(layer), layer.trains, self._scaled(layer)) for layer in self.layers]
        head = ("layer", "class", "tap", "heads", "head dim", "Q/K train", "scaled")
        table = f"{aligned([head, *collapsed(rows)])}\n\n" if rows else ""
        count = len(self.layers)
        if self.verified:
            scaled = sum(layer.missed is None for layer in self.layers)
            summary = f"{scaled} of {count} attention layers can be scaled"
        else:
            summary = f"unverified: {count} attention layers found, none seen in a forward pass"
        return f"{table}{summary}" + (f". {self.note}" if self.note else "")

    def _scaled(self, layer: InspectedLayer) -> str:
        if not self.verified:
            return "unverified" if layer.missed is None else f"unverified: {layer.missed}"
        return "yes" if layer.missed is None else f"no: {layer.missed}"


def inspect_model(model: nn.Module, example_inputs: Any = None) -> Inspection:
    """Find a model's attention layers, and check in a forward pass whether they can be scaled.

    Args:
        model: Any module. It is left as it was.
        example_inputs: Inputs for the forward pass: a tuple of positional arguments, a dict of
            keyword arguments, or one argument. By default some are made up.

    Returns:
        The layers, and for each that would not be scaled the reason. The result is not
        ``verified`` if no forward pass could be made.

    Example:
        >>> print(inspect_model(nn.TransformerEncoderLayer(8, nhead=2)))
        layer      class               tap     heads  head dim  Q/K train  scaled
        self_attn  MultiheadAttention  packed  2      4         yes        yes
        <BLANKLINE>
        1 of 1 attention layers can be scaled
    """
    sites = find_attention(model)
    if not sites:
        return Inspection((), f"No attention layer was found in {type(model).__name__}")
    error: Exception | None = None
    attempts = [example_inputs]
    if example_inputs is None:
        try:
            with torch.random.fork_rng():
                attempts = list(guess_inputs(unwrap(model)))
        except Exception as caught:
            attempts, error = [], caught
    for inputs in attempts:
        with attach(model, SpanScale(2.0, 1.0), on_missing="ignore") as hooks:
            try:
                hooks.probe(model, inputs)
            except Exception as caught:
                error = error or caught
                continue
            seen = [
                _inspected(site, _why_missed(site, hooks.has_run(site)))
                for site in hooks.sites
                if hooks.is_attention(site)
            ]
            return Inspection(tuple(seen), None)
    missed = "not known without a forward pass"
    unseen = tuple(
        _inspected(site, None if site.tap in ("packed", "score") else missed) for site in sites
    )
    return Inspection(unseen, _why_unverified(example_inputs, error), verified=False)


def _why_unverified(example_inputs: Any, error: Exception | None) -> str:
    """Say why no forward pass could be made, and what to do."""
    cause = "no guess fits it"
    if error is not None:
        cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if example_inputs is not None:
        return (
            f"The inputs that were given (those that the factory returned) fail in the model's "
            f"forward pass: {cause}"
        )
    return (
        f"No forward pass could be made with inputs that were made up ({cause}). Give the inputs: "
        "have the factory return (model, inputs)"
    )


def _inspected(site: AttentionSite, missed: str | None) -> InspectedLayer:
    return InspectedLayer(
        name=site.name,
        class_name=site.class_name,
        tap=site.tap,
        heads=site.heads,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        trains=_trains(site),
        missed=missed,
    )


def _why_missed(site: AttentionSite, has_run: bool) -> str | None:
    if site.query_length:
        return None
    if not has_run:
        return "it did not run in this forward pass"
    if site.lost_at is None and not site.takes_softmax:
        return (
            "it called no attention that can be seen and took no softmax; if it is linear "
            "attention or a recurrence, scale it with None; for flex_attention or another kernel, "
            "pass qk_modules={...}"
        )
    return f"it {what_was_seen(site)}; pass qk_modules={{...}}"


def _trains(site: AttentionSite) -> str:
    parameters = list(site.query_key_parameters())
    training = sum(parameter.requires_grad for parameter in parameters)
    return "no" if not training else "yes" if training == len(parameters) else "some"
