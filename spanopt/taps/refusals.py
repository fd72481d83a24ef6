"""What a tap refuses: tensors that have no span in the sense of this library, and wrong counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spanopt.declarations import declared
from spanopt.shards import is_context_parallel, is_spread
from spanopt.sites import AttentionSite

__all__ = ["check_heads", "refuse", "refuse_vmap"]


def refuse(site: AttentionSite, **tensors: Tensor) -> None:
    """Refuse tensors that have no span in the sense of this library.

    Args:
        site: The layer.
        **tensors: Tensors by name.

    Raises:
        TypeError: A tensor is nested, sparse or complex, or is only a part of Q or K.
    """
    is_part = site.tap == "projection" or is_context_parallel()
    for name, x in tensors.items():
        if is_part or is_spread(x):
            _refuse_part(site, name, x)
        if x.is_nested or x.layout != torch.strided or not x.is_floating_point():
            size = "nested" if x.is_nested else tuple(x.shape)
            raise TypeError(
                f"layer {site.name!r}: the {name} tensor must be dense, strided and "
                f"real floating point, got {x.layout} {x.dtype} of size {size}; "
                "pad it to a dense tensor, or scale the layer with None"
            )


def _refuse_part(site: AttentionSite, name: str, x: Tensor) -> None:
    """Refuse one process's part of a tensor, and a DTensor where the tap cannot put a node."""
    layer = f"layer {site.name!r}"
    if is_spread(x):
        if site.tap in declared and not declared[site.tap].dtensors:
            raise TypeError(
                f"{layer}: {name} is a DTensor, which only an attention that calls "
                "torch.nn.functional.scaled_dot_product_attention may have: call that, go "
                "on with to_local() before the attention, or scale the layer with None"
            )
    elif is_context_parallel():
        raise TypeError(
            f"{layer}: the sequence is sharded by context_parallel, and {name} is a process's "
            "part of it, whose span is another: let the layer's forward call "
            "torch.nn.functional.scaled_dot_product_attention itself, which then sees the "
            "whole sequence, or scale the layer with None"
        )
    if site.tap == "projection":
        owner = site.module.get_submodule(name)
        if isinstance(owner, nn.Linear) and x.shape[-1] != owner.out_features:
            raise TypeError(
                f"{layer}: {name!r} returns {x.shape[-1]} of its {owner.out_features} "
                "features, as under tensor parallelism, and nothing tells the heads of this "
                "process: write q = spanopt.span_node(q, parallel, violation), and the same "
                "for k, in the layer's forward instead"
            )


def refuse_vmap(layer: str, *tensors: Tensor | None) -> None:
    """Refuse tensors of ``torch.vmap``, which do not show whether they have a gradient.

    Args:
        layer: Name of the layer.
        *tensors: Any tensors.

    Raises:
        TypeError: A tensor is batched by ``torch.vmap``.
    """
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if x is not None and torch._C._functorch.is_batchedtensor(x):
            raise TypeError(
                f"layer {layer!r}: its gradient can't be rescaled under torch.vmap; "
                "call the model on a batch, or take the hooks off"
            )


def check_heads(layer: str, side: str, factors: Tensor, heads: int | None) -> None:
    """Refuse per-head values whose number is not the number of heads.

    Args:
        layer: Name of the layer.
        side: ``"query"`` or ``"key"``.
        factors: Shape ``(2,)`` or ``(2, H)``.
        heads: Number of heads of that side; 0 or ``None`` if heads have no dimension.

    Raises:
        ValueError: The numbers differ.
    """
    if factors.ndim > 1 and factors.shape[1] != heads:
        raise ValueError(
            f"layer {layer!r}: {factors.shape[1]} per-head values on the {side} "
            f"side, which has {heads or 'no dimension for its'} heads; "
            f"give one number{f', or {heads} values' if heads else ''}"
        )
