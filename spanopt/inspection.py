"""Telling, before any training, which attention layers of a model can be scaled and which not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spanopt.errors import what_was_seen
from spanopt.installing import attach
from spanopt.scale import SpanScale
from spanopt.sites import AttentionSite, find_attention, unwrap
from spanopt.table import aligned, described

__all__ = ["InspectedLayer", "Inspection", "guess_inputs", "inspect_model"]


@dataclass(frozen=True)
class InspectedLayer:
    """An attention layer and whether it can be scaled.

    Attributes:
        name: Its qualified name in the model.
        class_name: Name of its class.
        tap: How Q and K are reached, see :class:`~spanopt.AttentionSite`; ``None`` if not known.
        heads: Number of query heads, ``None`` if not known.
        kv_heads: Number of key heads, likewise.
        head_dim: Size of a head, likewise.
        trains: Whether its query and key parameters require gradients: ``"yes"``, ``"no"`` or
            ``"some"``.
        missed: Why it would not be scaled; ``None`` if it would.
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
        note: What keeps the inspection from being complete, ``None`` if nothing does.

    Example:
        >>> inspect_model(nn.TransformerEncoderLayer(8, nhead=2)).ok
        True
    """

    layers: tuple[InspectedLayer, ...]
    note: str | None

    @property
    def ok(self) -> bool:
        """Whether there is attention, and all of it can be scaled."""
        return bool(self.layers) and all(layer.missed is None for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Return what a program reads: ``ok``, ``note`` and ``layers``."""
        return {"ok": self.ok, "note": self.note, "layers": [asdict(x) for x in self.layers]}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "class", "tap", "heads", "head dim", "Q/K train", "scaled")
        ]
        for x in self.layers:
            scaled = "yes" if x.missed is None else f"no: {x.missed}"
            rows.append((*described(x), x.trains, scaled))
        scaled_layers = sum(x.missed is None for x in self.layers)
        summary = f"{scaled_layers} of {len(self.layers)} attention layers can be scaled"
        table = f"{aligned(rows)}\n\n" if self.layers else ""
        return f"{table}{summary}" + (f". {self.note}" if self.note else "")


def inspect_model(model: nn.Module, example_inputs: Any = None) -> Inspection:
    """Find the attention layers of a model and see in a forward pass whether they can be scaled.

    Args:
        model: Any module. It is as before afterwards.
        example_inputs: As in :func:`spanopt.attach`; by default :func:`guess_inputs` makes some.

    Returns:
        The layers, and why any of them would be missed.

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
    cause = f"{type(error).__name__}: {error}" if error else "no inputs could be made up for it"
    note = (
        "No forward pass could be made, so this is what the code looks like, not what it does "
        f"({cause}). Give the inputs: have the factory return (model, inputs)"
    )
    missed = "not known without a forward pass"
    return Inspection(
        tuple(
            _inspected(site, None if site.tap in ("packed", "score") else missed) for site in sites
        ),
        note,
    )


def guess_inputs(model: nn.Module) -> Iterator[Any]:
    """Make up inputs that a model may take.

    Args:
        model: A model.

    Returns:
        Candidates, best first, as :func:`spanopt.attach` takes them.

    Example:
        >>> [inputs] = guess_inputs(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)))
        >>> inputs[0].dtype, tuple(inputs[0].shape)
        (torch.int64, (2, 8))
    """
    if hasattr(model, "main_input_name") and hasattr(model, "config"):
        yield _pretrained_inputs(model)
    required = [
        parameter
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    for x in _guess_tensors(model):
        yield (x,) * max(1, len(required))


def _guess_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield what the first module with parameters takes."""
    first = next((x for x in model.modules() if any(True for _ in x.parameters(False))), None)
    device = next((p.device for p in model.parameters()), None)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if isinstance(first, nn.Embedding):
        yield torch.zeros(2, 8, dtype=torch.long, device=device)
    elif isinstance(first, nn.Conv2d):
        for size in (224, 32, 28):
            yield torch.zeros(2, first.in_channels, size, size, dtype=dtype, device=device)
    elif isinstance(first, nn.Conv1d):
        yield torch.zeros(2, first.in_channels, 64, dtype=dtype, device=device)
    else:
        for name in ("in_features", "embed_dim", "normalized_shape"):
            width = getattr(first, name, None)
            if width is not None:
                width = width[-1] if isinstance(width, tuple) else width
                yield torch.randn(2, 8, width, dtype=dtype, device=device)
                break


def _pretrained_inputs(model: Any) -> dict[str, Tensor]:
    """Return inputs for a model of the transformers library."""
    config, device, dtype = model.config, model.device, model.dtype
    ids = torch.ones(2, 8, dtype=torch.long, device=device)
    name = model.main_input_name
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(vision, "num_channels", 3)
        pixels = torch.zeros(2, channels, height, width, dtype=dtype, device=device)
        inputs = {name: pixels}
    elif name == "input_features":
        length = 2 * getattr(config, "max_source_positions", 128)
        features = torch.zeros(2, config.num_mel_bins, length, dtype=dtype, device=device)
        inputs = {name: features}
    elif name == "input_values":
        inputs = {name: torch.randn(2, 4000, dtype=dtype, device=device)}
    taken = inspect.signature(model.forward).parameters
    if "pixel_values" in taken and hasattr(config, "vision_config") and name == "input_ids":
        size, channels = config.vision_config.image_size, config.vision_config.num_channels
        inputs["pixel_values"] = torch.zeros(2, channels, size, size, dtype=dtype, device=device)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = ids
    return inputs


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
