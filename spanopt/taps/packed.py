"""Packed tap: ``nn.MultiheadAttention`` and the layers that contain it.

``torch.nn.functional.multi_head_attention_forward`` hides its Q and K: seen from a function mode it
is one call. So a copy of that function runs in its place, which does not offer itself to function
modes again, and an inner mode puts the nodes on the score product inside: on the arguments of
``scaled_dot_product_attention``, or of the first batched matrix product when weights are needed.
There Q and K are complete, ``bias_k`` and the zero row of ``add_zero_attn`` included.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spanopt.taps.tap import SideScale, Tap

__all__ = ["HANDLERS"]

_transparent = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
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
    bound = _SIGNATURE.bind(*args, **kwargs).arguments
    heads = bound["num_heads"]
    sources = [bound[name] for name in _SOURCES if bound.get(name) is not None]
    tap.refuse_vmap(*sources)
    trains = any(source.requires_grad for source in sources)
    tap.mark(heads, heads, bound["embed_dim_to_check"] // heads, trains)
    if tap.query.mode == tap.key.mode == "identity":
        return func(*args, **kwargs)
    return _forward(*tap.query, *tap.key, heads, *args, **kwargs)


@torch.compiler.allow_in_graph
def _forward(*args: Any, **kwargs: Any) -> Any:
    # torch.compile takes tensors and numbers across this border, so the scales come unpacked.
    query, key, (heads, *rest) = SideScale(*args[:4]), SideScale(*args[4:8]), args[8:]
    with _ScoreProduct(query, key, heads):
        return _transparent(*rest, **kwargs)


class _ScoreProduct(TorchFunctionMode):
    """Puts nodes on the first score product that is made."""

    def __init__(self, query: SideScale, key: SideScale, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.heads = query, key, heads
        self.done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.done:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.done = True
            query, key, *rest = args
            return func(self.query.on(query), self.key.on(key), *rest, **kwargs)
        if func is torch.bmm or func is torch.baddbmm:
            self.done = True
            *bias, query, key = args
            product = (self._split(self.query, query), self._split(self.key, key.mT).mT)
            return func(*bias, *product)  # type: ignore[call-overload]
        return func(*args, **kwargs)

    def _split(self, scale: SideScale, x: Tensor) -> Tensor:
        """Put the node on (batch * heads, N, d)."""
        return scale.on(x.unflatten(0, (x.shape[0] // self.heads, self.heads))).flatten(0, 1)


HANDLERS = [(F.multi_head_attention_forward, _multi_head_attention_forward)]
