"""Example inputs for a model, made up from its code and its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["guess_inputs"]

_IDS = ("ids", "input_ids", "idx", "token", "tokens", "token_ids")
_IMAGE_SIZES = (224, 32, 28)


def guess_inputs(model: nn.Module) -> Iterator[Any]:
    """Make up inputs that a model may take.

    Args:
        model: A model.

    Returns:
        Candidates, best first: dicts of keyword arguments, or tuples of positional ones.

    Example:
        >>> inputs = next(guess_inputs(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))))
        >>> inputs[0].dtype, tuple(inputs[0].shape)
        (torch.int64, (2, 8))
    """
    if hasattr(model, "main_input_name") and hasattr(model, "config"):
        yield _pretrained_inputs(model)
    required = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    device = next((p.device for p in model.parameters()), None)
    ids = torch.zeros(2, 8, dtype=torch.long, device=device)
    if required and required[0] in _IDS:
        yield (ids,) * len(required)
    for x in _guess_tensors(model, ids):
        yield (x,) * max(1, len(required))


def _guess_tensors(model: nn.Module, ids: Tensor) -> Iterator[Tensor]:
    """Yield what the first module of each kind takes, in the order of modules; ids come last."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    options: Any = {"dtype": dtype, "device": ids.device}
    yielded = set()
    for module in model.modules():
        kind = _kind(module)
        if kind is None or kind in yielded:
            continue
        yielded.add(kind)
        channels: Any = getattr(module, "in_channels", None)
        if kind == "ids":
            yield ids
        elif kind == "image":
            for size in _IMAGE_SIZES:
                yield torch.zeros(2, channels, size, size, **options)
        elif kind == "signal":
            yield torch.zeros(2, channels, 64, **options)
        else:
            yield torch.randn(2, 8, _width(module), **options)
    if "ids" not in yielded:
        yield ids


def _kind(module: nn.Module) -> str | None:
    """Return the kind of input that a module with its own parameters takes; ``None`` if unknown."""
    if next(module.parameters(recurse=False), None) is None:
        return None
    if isinstance(module, nn.Embedding):
        return "ids"
    if isinstance(module, nn.Conv2d):
        return "image"
    if isinstance(module, nn.Conv1d):
        return "signal"
    return None if _width(module) is None else "features"


def _width(module: nn.Module) -> Any:
    """Return the number of features that a module takes; ``None`` if unknown."""
    for name in ("in_features", "embed_dim", "normalized_shape"):
        width = getattr(module, name, None)
        if width is not None:
            return width[-1] if isinstance(width, tuple) else width
    return None


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
