"""Installing taps on a model without an optimizer: :func:`attach`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from spanopt.hooks import SpanHooks
from spanopt.plan import ProjectionLike, QKModules, Request, Scales, plan
from spanopt.renaming import renamed
from spanopt.sites import unwrap

__all__ = ["attach", "install"]


@renamed(projections="qk_modules")
def attach(
    model: nn.Module,
    scales: Scales = None,
    *,
    ridge: float | None = None,
    on_missing: str = "error",
    qk_modules: QKModules = None,
    example_inputs: Any = None,
    parameters: Iterable[Tensor] | None = None,
    projection: ProjectionLike = "span",
    preserve_norm: bool | Mapping[str, bool] = False,
) -> SpanHooks:
    """Rescale the attention gradients of a model by span, without an optimizer.

    For frameworks that build their own optimizer; otherwise use
    :class:`~spanopt.SpanScaledOptimizer`. Forward values do not change. The hooks stay on the model
    until :meth:`SpanHooks.remove`, whether or not the returned object is kept.

    While hooks are on any model of this process,
    ``torch._dynamo.config.skip_nnmodule_hook_guards`` is false, and code that was compiled before
    is dropped. Compiled code that knows nothing of the hooks would pass them by.

    Args:
        model: Any module with attention layers that :func:`~spanopt.find_attention` finds.
        scales: Scales by layer name or pattern, see :func:`~spanopt.scale.resolve_scales`; one
            :class:`~spanopt.SpanScale` for all. Left out it is ``{"*": SpanScale()}``, which
            changes nothing until the scales are edited, and says so in a warning.
        ridge: What is added to the Gram matrix of Q or K, relative to its trace: a number of at
            least 0. ``None`` is the dtype's default, see
            :func:`~spanopt.projection.default_ridge`.
        on_missing: What to do about a layer that was asked for and turns out not to be scaled:
            ``"error"``, ``"warn"`` or ``"ignore"``.
        qk_modules: Which modules return Q and K, for layers whose attention can't be seen, such as
            one in a kernel of its own. A dict by layer name or pattern:
            ``{"blocks.0.attn": {"query": "wq", "key": "wk", "num_heads": 8}}``. See
            :func:`~spanopt.taps.layouts.read_layouts` for fused outputs.
        example_inputs: Inputs for one forward pass that checks now what only a forward pass can
            tell: a tuple of positional arguments, a dict of keyword arguments, or one argument.
            Random state and the values of buffers are restored after it.
        parameters: What will be trained. When given, a scaled layer that has trainable parameters
            and none of them here is an error.
        projection: What counts as the parallel part: the name of a setup of :mod:`spanopt.setups`
            or a function of that kind, for all layers or by layer name or pattern.
        preserve_norm: Whether a rescaled gradient gets the norm of the given one, for each sequence
            and head. One flag for all layers, or flags by layer name or pattern.

    Returns:
        The hooks.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: No attention layer, a key that matches none, a bad scale or ridge, or a layer
            that another attachment scales already.
        UnscaledLayerError: With ``example_inputs``, a layer that calls no attention.

    Example:
        >>> import torch
        >>> from spanopt import SpanScale
        >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
        >>> x = torch.randn(5, 1, 8)
        >>> with attach(model, {"*": SpanScale(parallel=2.0, violation=1.0)}):
        ...     model(x, x, x)[0].sum().backward()
    """
    request = Request(scales, ridge, on_missing, qk_modules, projection, preserve_norm)
    return install(model, request, example_inputs=example_inputs, parameters=parameters)


def install(
    model: nn.Module,
    request: Request,
    *,
    example_inputs: Any = None,
    parameters: Iterable[Tensor] | None = None,
) -> SpanHooks:
    """Install the taps that a request asks for: what :func:`attach` does with its arguments.

    Args:
        model: Any module with attention layers.
        request: What the user asks for.
        example_inputs: Inputs for one forward pass: a tuple of positional arguments, a dict of
            keyword arguments, or one argument. ``None`` for no forward pass.
        parameters: What will be trained; ``None`` if that is not known.

    Returns:
        The hooks.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: No attention layer, a key that matches none, a bad scale or ridge, or a layer
            that another attachment scales already. Nothing is installed then.
        UnscaledLayerError: With ``example_inputs``, a layer that calls no attention.

    Example:
        >>> from spanopt import SpanScale
        >>> hooks = install(nn.TransformerEncoderLayer(8, nhead=2), Request(SpanScale(2.0)))
        >>> hooks.unseen()
        ['self_attn']
    """
    layers = plan(model, request, parameters=parameters)
    hooks = SpanHooks(request.on_missing, unwrap(model))
    try:
        hooks.add(layers)
        if example_inputs is not None:
            hooks.probe(model, example_inputs)
    except BaseException:
        hooks.remove()
        raise
    return hooks
