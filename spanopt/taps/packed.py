"""Packed tap: ``nn.MultiheadAttention`` and the layers that contain it.

A function mode sees ``torch.nn.functional.multi_head_attention_forward`` as one call and cannot see
the Q and K inside. The tap therefore runs a copy of that function that function modes do not
intercept. While the copy runs, an inner mode puts the nodes on the score product: on the arguments
of ``scaled_dot_product_attention``, or of the first batched matrix product if the layer returns its
weights. Q and K are complete there: they include ``bias_k`` and the zero row of ``add_zero_attn``.
"""

from __future__ import annotations

import inspect
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spanopt.compiling import in_graph
from spanopt.declarations import Declaration, declare
from spanopt.rescaling import Rescaling
from spanopt.taps.calls import taps_by_name
from spanopt.taps.masks import Read, allowed, read
from spanopt.taps.mode import keeping
from spanopt.taps.real import Tokens, appended, real_tokens
from spanopt.taps.refusals import refuse, refuse_vmap
from spanopt.taps.running import Place
from spanopt.taps.sides import other_sides, put_nodes
from spanopt.taps.tap import Tap
from spanopt.taps.telling import Watcher

__all__ = ["HANDLERS"]

_transparent = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)

_ARGUMENTS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_SOURCES = (
    "query",
    "key",
    "in_proj_weight",
    "in_proj_bias",
    "bias_k",
    "q_proj_weight",
    "k_proj_weight",
    "static_k",
)


def _multi_head_attention_forward(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    place = tap.place()
    if not place.inside:
        return func(*args, **kwargs)
    bound = {**dict(zip(_ARGUMENTS[: len(args)], args, strict=True)), **kwargs}
    query, key, heads = bound["query"], bound["key"], bound["num_heads"]
    sources = _sources(bound)
    refuse(tap.site, query=query, key=key)
    refuse_vmap(tap.site.name, *sources)
    lengths = tuple(x.shape[0] for x in (query, key))
    tap.mark("packed", heads, heads, bound["embed_dim_to_check"] // heads, lengths)
    if tap.is_idle() and tap.focus is None:
        return func(*args, **kwargs)
    same = query is key or (query.shape == key.shape and tap.is_self_attention(query, key))
    queries, keys = _real_tokens(tap, bound, same)
    keys = appended(keys, (bound["bias_k"] is not None) + bool(bound["add_zero_attn"]))
    if not torch.compiler.is_compiling():
        args, kwargs = tap.account.weights.stand_in(args, kwargs)
    # A function that torch.compile does not trace takes only tensors, numbers and text.
    of_sides = (tap.query.pack(), tuple(queries)), (tap.key.pack(), tuple(keys))
    focused = None
    if tap.focus is not None:
        tap.focus.reach(tap)
        focused = tap.unique_name, *tap.focus.signature(tap)
    told = of_sides, focused, tap.site.name, heads, tap.watching(), args, kwargs
    return _forward_in(place, *told) if place.repeated else _forward(*told)


def _sources(bound: dict[str, Any]) -> list[Tensor]:
    """Return what Q and K are computed from."""
    return [bound[name] for name in _SOURCES if bound.get(name) is not None]


def _real_tokens(tap: Tap, bound: dict[str, Any], same: bool) -> tuple[Tokens, Tokens]:
    """Return the real tokens of both sides, shape (B, N) and (B, M), without appended keys."""
    queries, keys = tap.given() or (None, None)
    query, key, padding = bound["query"], bound["key"], bound.get("key_padding_mask")
    batch = query.shape[1] if query.ndim == 3 else 1
    told: tuple[Tensor, Tensor] | None = None
    if (queries is None or keys is None) and tap.projects(*_sources(bound)):
        if padding is not None:
            # key_padding_mask alone tells what is padding. attn_mask is a pattern of attention.
            real = _open(padding)[(None,) * (2 - padding.ndim)]
            every = real.new_ones(batch, query.shape[0])
            told = real if same else every, real
        else:
            shown = _shown(bound.get("attn_mask"), batch, bound["num_heads"])
            verdict = tap.judged(shown, query.shape[0], key.shape[0], same)
            told = None if verdict is None else (verdict.queries, verdict.keys)
    if told is not None:
        of_query, of_key = (real.expand(batch, -1) for real in told)
        queries, keys = queries or Tokens(of_query), keys or Tokens(of_key)
    return queries or Tokens(), keys or Tokens()


def _open(mask: Tensor) -> Tensor:
    """Return where a mask of ``nn.MultiheadAttention`` is open: a boolean mask is false there."""
    return ~mask if mask.dtype == torch.bool else allowed(mask)


def _shown(mask: Tensor | None, batch: int, heads: int) -> Read:
    """Return what ``attn_mask`` shows, shape (N, M) or (B * H, N, M)."""
    if mask is None:
        return ()
    mask = _open(mask)
    return read(mask.unflatten(0, (batch, heads)) if mask.ndim == 3 else mask, 4)


@in_graph
def _forward(*told: Any) -> Any:
    return _forward_in(Place(True), *told)


def _forward_in(
    place: Place,
    of_sides: Any,
    focused: Any,
    layer: str,
    heads: int,
    watcher: Watcher | None,
    args: Any,
    kwargs: Any,
) -> Any:
    query, key = (_Side(Rescaling.unpack(packed), Tokens(*tokens)) for packed, tokens in of_sides)
    tap = None if focused is None else taps_by_name[focused[0]]
    with _ScoreProduct(query, key, layer, heads, watcher, place, tap):
        return _transparent(*args, **kwargs)


class _Side(NamedTuple):
    rescaling: Rescaling
    given: Tokens


class _ScoreProduct(TorchFunctionMode):
    """Puts the nodes on the first score product that it sees, and applies focus."""

    def __init__(
        self,
        query: _Side,
        key: _Side,
        layer: str,
        heads: int,
        watcher: Watcher | None,
        place: Place,
        focused: Tap | None,
    ) -> None:
        super().__init__()
        self.query = query
        self.key = key
        self.layer = layer
        self.heads = heads
        self.watcher = watcher
        self.place = place
        self.focused = focused
        self.done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.done:
            tap, self.focused = self.focused, None if func is F.softmax else self.focused
            if func is F.softmax and tap is not None and tap.focus is not None:
                scores, *rest = args
                args = (tap.focus.scores(tap, scores, -1, (-2,)), *rest)
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.done = True
            query, key, value, mask, *rest = args
            query, key, real = self._on(query, key)
            if self.watcher is not None:
                self.watcher.scores(self.layer, query, key, real, mask, *rest, **kwargs)
            tap = self.focused
            if tap is not None and tap.focus is not None:
                return tap.focus.attention(tap, func, query, key, value, mask, *rest, **kwargs)
            return func(query, key, value, mask, *rest, **kwargs)
        if func is torch.bmm or func is torch.baddbmm:
            self.done = True
            *bias, query, key = args
            by_head = (self._split(query), self._split(key.mT))
            query, key, real = self._on(*by_head)
            scores = func(*bias, query.flatten(0, 1), key.flatten(0, 1).mT)  # type: ignore[call-overload]
            if self.watcher is not None:
                weights = self._split(scores.detach()).softmax(-1)
                self.watcher.weights(self.layer, weights, real)
            return scores
        return func(*args, **kwargs)

    def _split(self, x: Tensor) -> Tensor:
        """Return (batch, heads, N, d) for (batch * heads, N, d)."""
        return x.unflatten(0, (x.shape[0] // self.heads, self.heads))

    def _on(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put nodes on Q and K, (batch, heads, N, d). Return both and the mask of real queries."""
        queries, keys = real_tokens(
            query, key, None, (self.query.given, self.key.given), self.layer
        )
        with keeping(self.place):
            rescalings = self.query.rescaling, self.key.rescaling
            others = other_sides(rescalings[0].setup, self.layer, query, key)
            query, key = put_nodes(
                rescalings, (query, key), self.layer, (queries, keys), others, self.watcher
            )
        return query, key, queries.mask


HANDLERS = {"multi_head_attention_forward": _multi_head_attention_forward}
declare(
    Declaration(
        "packed",
        "in nn.MultiheadAttention",
        HANDLERS,
        {"multi_head_attention_forward": F.multi_head_attention_forward},
        dtensors=True,
    )
)
