"""Projection tap: Q and K as the outputs of modules that the user names.

For attention that runs in a kernel no other tap can see into. It sees Q and K as projected: before
rotary embedding, QK-norm and anything else that the layer does to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spanopt.node import Method, multiplied, rescale_tokens
from spanopt.scale import SpanScale
from spanopt.setups import NEED_OTHER
from spanopt.sites import AttentionSite
from spanopt.taps.real import Tokens, given_tokens
from spanopt.taps.tap import Tap, thread
from spanopt.taps.watcher import Watched, Watcher

__all__ = ["Projection", "ProjectionTap", "owns_projections", "projections_of"]

_PARTS = {
    "query": ("query",),
    "key": ("key",),
    "qkv": ("query", "key", "value"),
    "qk": ("query", "key"),
    "kv": ("key", "value"),
}
_OPTIONS = ("num_heads", "num_kv_heads", "layout", "batch_first", "in_place")
_LAYOUTS = ("concatenated", "interleaved")


@dataclass(frozen=True)
class Projection:
    """How Q or K or both lie in the output of one module, shape ``(..., N, blocks * width * d)``.

    Attributes:
        name: The module, relative to its layer.
        module: The module.
        blocks: Number of blocks of heads: 1 where queries and keys are concatenated, the number of
            key heads where they are interleaved.
        width: Heads in a block.
        sides: ``"query"`` and ``"key"`` with the first of their heads in a block and how many.
        batch_first: Whether the output is (B, N, features), and not (N, B, features).
        in_place: Whether the layer changes the output in place, and therefore gets a copy.
    """

    name: str
    module: nn.Module
    blocks: int
    width: int
    sides: tuple[tuple[str, int, int], ...]
    batch_first: bool = True
    in_place: bool = False

    def check(self, layer: str, features: int) -> None:
        """Refuse a number of output features that is no multiple of the number of heads.

        Args:
            layer: Name of the layer.
            features: Size of the last dimension of the output.

        Raises:
            ValueError: It is none.
        """
        if features % (self.blocks * self.width):
            raise ValueError(
                f"layer {layer!r}: {self.name!r} has {features} output features, which do not "
                f"divide into the {self.blocks * self.width} heads that qk_modules={{...}} says"
            )


def projections_of(layer: str, module: nn.Module, spec: Mapping[str, Any]) -> list[Projection]:
    """Read one entry of ``qk_modules``.

    Args:
        layer: Name of the layer.
        module: The layer.
        spec: ``query`` and ``key``, or ``qkv``, or ``qk``, or ``query`` and ``kv``: names of
            modules in the layer, ``qkv``, ``qk`` and ``kv`` with several in one output.
            ``num_heads``, and ``num_kv_heads`` where there are fewer. ``layout`` of fused outputs:
            ``"concatenated"`` (all of Q, then all of K, ...; default) or ``"interleaved"`` (for
            each key head its query heads, then itself, then its value head). ``batch_first``:
            false where outputs have the shape (N, B, features); default true. ``in_place``: true
            where the layer changes the outputs in place, which then costs a copy of each; default
            false.

    Returns:
        A projection for each module.

    Raises:
        TypeError: ``spec`` is no mapping.
        ValueError: Fields that are unknown, missing or contradictory; a module that is not there;
            sizes that do not divide.

    Example:
        >>> layer = nn.Module()
        >>> layer.c_attn = nn.Linear(16, 48)
        >>> (projection,) = projections_of("attn", layer, {"qkv": "c_attn", "num_heads": 4})
        >>> projection.sides
        (('query', 0, 4), ('key', 4, 4))
    """
    if not isinstance(spec, Mapping):
        raise TypeError(
            f"qk_modules[{layer!r}] must be a dict such as "
            f'{{"query": "wq", "key": "wk", "num_heads": 8}}, got {type(spec).__name__}'
        )
    unknown = set(spec) - {*_PARTS, *_OPTIONS}
    given = [part for part in _PARTS if part in spec]
    if unknown or set(given) not in ({"query", "key"}, {"qkv"}, {"qk"}, {"query", "kv"}):
        raise ValueError(
            f"qk_modules[{layer!r}] must name 'query' and 'key', or 'qkv', or 'qk', or 'query' "
            f"and 'kv', and 'num_heads', and may have {', '.join(map(repr, _OPTIONS[1:]))}; got "
            f"{sorted(map(str, spec))}"
        )
    heads: Any = spec.get("num_heads")
    layout = spec.get("layout", "concatenated")
    kv_heads: Any = spec.get("num_kv_heads", heads)
    for count in (heads, kv_heads):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"qk_modules[{layer!r}]: num_heads and num_kv_heads must be whole numbers of at "
                f"least 1, got {heads!r} and {kv_heads!r}"
            )
    if heads % kv_heads:
        raise ValueError(
            f"qk_modules[{layer!r}]: {heads} query heads do not divide into groups for "
            f"{kv_heads} key heads"
        )
    if layout not in _LAYOUTS:
        raise ValueError(f"qk_modules[{layer!r}]: layout must be one of {_LAYOUTS}, got {layout!r}")
    batch_first, in_place = spec.get("batch_first", True), spec.get("in_place", False)
    for option, value in (("batch_first", batch_first), ("in_place", in_place)):
        if not isinstance(value, bool):
            raise ValueError(
                f"qk_modules[{layer!r}]: {option} must be True or False, got {value!r}"
            )
    if "key" in spec and spec["key"] == spec["query"]:
        raise ValueError(
            f"qk_modules[{layer!r}]: {spec['key']!r} is named as 'query' and as 'key': one tensor "
            "for both has one gradient, of which nothing tells the sides apart; write "
            "q = spanopt.span_node(q, parallel, violation) and the same for k in the layer instead"
        )
    result = []
    for part in given:
        name = spec[part]
        try:
            owner = module.get_submodule(name)
        except AttributeError as error:
            children = [child for child, _ in module.named_children()]
            raise ValueError(
                f"qk_modules[{layer!r}]: {part!r} names {name!r}, which the layer does not have; "
                f"it has {children}"
            ) from error
        blocks = kv_heads if layout == "interleaved" and len(_PARTS[part]) > 1 else 1
        sides, first = [], 0
        for side in _PARTS[part]:
            count = (heads if side == "query" else kv_heads) // blocks
            if side != "value":
                sides.append((side, first, count))
            first += count
        projection = Projection(name, owner, blocks, first, tuple(sides), batch_first, in_place)
        features = getattr(owner, "out_features", getattr(owner, "nf", None))
        if isinstance(features, int):
            projection.check(layer, features)
        result.append(projection)
    return result


def owns_projections(module: nn.Module, spec: Mapping[str, Any]) -> bool:
    """Return whether a module has the modules that one entry of ``qk_modules`` names.

    Args:
        module: Any module.
        spec: As in :func:`projections_of`.

    Example:
        >>> owns_projections(nn.MultiheadAttention(8, 2), {"query": "wq", "key": "wk"})
        False
    """
    names = {name for name, _ in module.named_modules()}
    return all(spec[part] in names for part in _PARTS if part in spec)


class ProjectionTap(Tap):
    """The tap of a layer whose Q and K are named; other taps find nothing in it.

    Attributes:
        projections: Where Q and K are.
    """

    def __init__(
        self,
        site: AttentionSite,
        scale: SpanScale,
        method: Method,
        projections: list[Projection],
    ) -> None:
        if method.setup in NEED_OTHER:
            raise ValueError(
                f"layer {site.name!r}: the projection {method.setup!r} needs queries and keys at "
                "once, which qk_modules={...} shows one by one; give it projection='span'"
            )
        self.projections = projections
        self._shapes: dict[str, torch.Size] = {}
        super().__init__(site, scale, method, {})

    def on_output(self, projection: Projection, output: Tensor) -> Tensor:
        """Put the node on a module's output.

        Args:
            projection: The module.
            output: Shape ``(..., N, features)``, or ``(N, B, features)`` where the projection is
                not ``batch_first``.

        Returns:
            A view of it, a copy where the layer changes it in place, or the output itself where
            there is nothing to do.

        Raises:
            TypeError: The output is not a dense floating-point tensor.
            ValueError: Its features do not divide into heads.
        """
        call = self.current_call()
        if call is None or not self.is_live():
            return output
        layer, name = self.site.name, projection.name
        if not isinstance(output, Tensor) or output.ndim < 2:
            raise TypeError(
                f"layer {layer!r}: {name!r} must return a tensor (..., N, features) for the "
                f"projection tap, got {type(output).__name__}"
            )
        whole = output
        self.refuse(**{name: output})
        self.refuse_vmap(output)
        projection.check(layer, output.shape[-1])
        if output.ndim > 2 and not projection.batch_first:
            output = output.transpose(0, 1)
        *batch, length, features = output.shape
        head_dim = features // (projection.blocks * projection.width)
        given = dict(zip(("query", "key"), self.given() or (None, None), strict=True))
        settings: list[Any] = []
        for side, _, count in projection.sides:
            shape = torch.Size((*batch, projection.blocks * count, length, head_dim))
            self._note(side, shape)
            scale = self.query if side == "query" else self.key
            tokens = given_tokens(given[side], shape, side, layer) or Tokens()
            settings += [*scale, *tokens]
        idle = self.watching() is None and all(mode == "identity" for mode in settings[::_PER_SIDE])
        if idle or not (output.requires_grad and torch.is_grad_enabled()):
            return whole
        thread.busy = True  # compiled code traces the backward here, where there is no call
        try:
            with self.keeping():
                result = _ProjectionNode.apply(
                    output, projection.blocks, projection.width, projection.sides, *settings
                )
        finally:
            thread.busy = False
        call.streams.follow("", result, (output,), {})
        watcher = self.watching()
        if watcher is not None:
            self._watch(watcher, projection, output.detach(), settings, result)
        if result.ndim > 2 and not projection.batch_first:
            result = result.transpose(0, 1)
        # The layer then changes a tensor of its own, and the node keeps what spans.
        return result.clone() if projection.in_place else result

    def _watch(
        self,
        watcher: Watcher,
        projection: Projection,
        output: Tensor,
        settings: list[Any],
        result: Tensor,
    ) -> None:
        """Have a watcher told of the gradients of each side."""

        def note(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
            if inputs[0] is None or outputs[0] is None:
                return
            for i, (side, first, count) in enumerate(projection.sides):
                part = projection.blocks, projection.width, first, count
                x, given, rescaled = (
                    _heads(x, *part).flatten(-4, -3) for x in (output, outputs[0], inputs[0])
                )
                tokens = settings[i * _PER_SIDE + 5 : (i + 1) * _PER_SIDE]
                watched = Watched(self.site.name, side, x, self.method, *tokens)
                watcher.gradients(watched, given, rescaled)

        assert result.grad_fn is not None
        result.grad_fn.register_hook(note)

    def _note(self, side: str, shape: torch.Size) -> None:
        """Mark the layer as seen once the shapes of both sides are known."""
        self._shapes[side] = shape
        if len(self._shapes) < 2:
            return
        query, key = self._shapes["query"], self._shapes["key"]
        self._shapes = {}
        if query[-1] != key[-1]:
            raise ValueError(
                f"layer {self.site.name!r}: the query's heads have {query[-1]} features and the "
                f"key's {key[-1]}; check num_heads and num_kv_heads in qk_modules={{...}}"
            )
        self.mark("projection", query[-3], key[-3], query[-1], (query[-2], key[-2]))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except RuntimeError as error:
            if not any(text in str(error) for text in ("_ProjectionNode", "a custom Function")):
                raise
            raise RuntimeError(
                f"layer {self.site.name!r} changes the output of a projection in place, which the "
                "projection tap has a node on: write q = q * scale in place of q *= scale, or "
                "give the layer's entry of qk_modules 'in_place': True"
            ) from error


_PER_SIDE = 7  # mode, factors, ridge, setup, preserve_norm, mask, documents


def _heads(x: Tensor, blocks: int, width: int, first: int, count: int) -> Tensor:
    """Return the heads of one side in a module's output, shape (..., blocks, count, N, d)."""
    heads = x.view(*x.shape[:-1], blocks, width, -1)[..., first : first + count, :]
    return heads.movedim(-4, -2)


class _ProjectionNode(torch.autograd.Function):
    @staticmethod
    def forward(output: Tensor, *rest: Any) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.blocks, ctx.width, ctx.sides, *settings = inputs
        ctx.settings = [settings[i : i + _PER_SIDE - 2] for i in range(0, len(settings), _PER_SIDE)]
        masks = [settings[i + 5 : i + 7] for i in range(0, len(settings), _PER_SIDE)]
        ctx.save_for_backward(x, *(mask for pair in masks for mask in pair))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *masks = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        for i, ((_, first, count), (mode, factors, *method)) in enumerate(
            zip(ctx.sides, ctx.settings, strict=True)
        ):
            if mode == "identity":
                continue
            # (..., blocks, count, N, d), of which (..., H, N, d) may be a copy.
            part, basis = (_heads(t, ctx.blocks, ctx.width, first, count) for t in (grad, x))
            parallel, violation = factors.unbind()
            mask, documents = masks[2 * i : 2 * i + 2]
            g, x_of_side = part.flatten(-4, -3), basis.flatten(-4, -3)
            if mode == "uniform":
                scaled = multiplied(g, parallel)
            else:
                violation = 0.0 if mode == "parallel" else violation
                scaled = rescale_tokens(
                    g, x_of_side, parallel, violation, Method(*method), mask, documents
                )
            part.copy_(scaled.view_as(part))
        return grad, *(None,) * (3 + _PER_SIDE * len(ctx.sides))
