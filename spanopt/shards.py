"""Nodes on a Q or K that is spread over several processes, as a ``DTensor``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

__all__ = ["Spread", "is_context_parallel", "is_spread", "on_shards"]

_attention = F.scaled_dot_product_attention


class Spread(NamedTuple):
    """Processes that have parts of the same sequences.

    Attributes:
        mesh: A device mesh.
        dims: The dimensions of the mesh along which tokens are spread.
    """

    mesh: Any
    dims: tuple[int, ...]

    def total(self, part: Tensor, operation: str = "sum") -> Tensor:
        """Return the sum, or the largest, of the values of all processes.

        Args:
            part: This process's value.
            operation: ``"sum"`` or ``"max"``.
        """
        from torch.distributed.tensor import DTensor, Partial, Replicate

        spread = [
            Partial(operation) if i in self.dims else Replicate() for i in range(self.mesh.ndim)
        ]
        whole = DTensor.from_local(part, self.mesh, spread, run_check=False)
        whole = whole.redistribute(placements=[Replicate()] * self.mesh.ndim)
        # Each process then uses its own tokens, so double backward must also sum over processes.
        return whole.to_local(grad_placements=spread)


def is_spread(x: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``.

    Example:
        >>> import torch
        >>> is_spread(torch.ones(2, 1))
        False
    """
    return type(x).__name__ == "DTensor"  # isinstance() would need an import


def is_context_parallel() -> bool:
    """Return whether ``torch.distributed.tensor.experimental.context_parallel`` is active.

    It replaces ``scaled_dot_product_attention`` by its own function, which makes a ``DTensor`` of
    each process's part of the sequences. Other libraries replace it for other reasons.

    Example:
        >>> is_context_parallel()
        False
    """
    attention = F.scaled_dot_product_attention
    return attention is not _attention and attention.__module__.startswith("torch.distributed")


def on_shards(
    node: Callable[..., Tensor],
    x: Tensor,
    factors: tuple[float | Tensor, ...],
    mask: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Put a node on the part of Q or K that this process has.

    If batch or heads are spread, each process rescales its own part. If tokens are spread, the
    processes sum their d x d matrices. Spread features are gathered. With documents, a spread
    batch and spread tokens are gathered too.

    Args:
        node: Called as ``node(local, factors, mask, documents, spread)``, where ``spread`` is
            ``None`` if every process has all tokens.
        x: Shape ``(..., H, N, d)``.
        factors: Numbers, or tensors of shape ``()`` or ``(H,)``, the same on all processes.
        mask: Boolean, broadcastable to ``(..., N)``, true at real tokens; ``None`` if all are
            real. It is a ``DTensor``, or the same tensor on all processes.
        documents: Positions of each document's tokens, one row per document, the same on all
            processes; ``None`` for one span over all tokens.

    Returns:
        What the node returns, as a ``DTensor`` with the layout that the node's input had.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(x, DTensor)
    mesh, ndim = x.device_mesh, x.ndim
    fixed = {ndim - 1} if documents is None else {0, ndim - 2, ndim - 1}
    layout = [p if type(p) is Shard and p.dim not in fixed else Replicate() for p in x.placements]
    x = x.redistribute(placements=layout)

    def local(value: Any, first: int) -> Any:
        """Return this process's part of a value with the dimensions of x from ``first`` on."""
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if not isinstance(value, DTensor):
            value = DTensor.from_local(value, mesh, run_check=False)
        own = {i for i, size in enumerate(value.shape, first) if size == x.shape[i]}
        placements = [
            Shard(p.dim - first) if isinstance(p, Shard) and p.dim in own else Replicate()
            for p in layout
        ]
        return value.redistribute(placements=placements).to_local()

    by_token = tuple(i for i, p in enumerate(layout) if p == Shard(ndim - 2))
    result = node(
        x.to_local(),
        tuple(local(factor, ndim - 3) for factor in factors),
        None if mask is None else local(mask, ndim - 1 - mask.ndim),
        documents.full_tensor() if isinstance(documents, DTensor) else documents,
        Spread(mesh, by_token) if by_token else None,
    )
    return DTensor.from_local(
        result, mesh, layout, run_check=False, shape=x.shape, stride=x.stride()
    )
