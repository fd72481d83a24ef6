"""Rescaling: everything that turns a gradient g of Q or K into g'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spanopt.mathematics.magnitudes import inverse_power, largest_entries
from spanopt.projection import rescale, rescale_by_document
from spanopt.scale import Factor
from spanopt.setups import SPAN, Setup
from spanopt.setups.registry import carried

__all__ = ["Rescaling"]


@dataclass(eq=False)
class Rescaling:
    """How the gradients of one side of a layer are rescaled: ``g' = rescaling(g, x)``.

    The object is never changed. So a backward pass uses what its forward pass had.

    Attributes:
        setup: What counts as the parallel part.
        ridge: Relative ridge of the projection; ``None`` for the dtype's default.
        preserve_norm: Whether g' gets the norm of g, for each sequence and head.
        factors: Parallel and violation: two numbers or tensors of shape ``()`` or ``(H,)``, or one
            tensor of shape ``(2,)`` or ``(2, H)``. One tensor saves time under ``torch.compile``.
        mode: ``"identity"`` (both factors are 1), ``"uniform"`` (they are equal, and nothing is
            projected), ``"parallel"`` (no violation is left) or ``"general"``.
        unfit: The dtypes in which a factor is not finite, each with a text that names the factor.

    Example:
        >>> g, q = torch.tensor([[3.0], [1.0], [5.0]]), torch.tensor([[1.0], [1.0], [0.0]])
        >>> Rescaling(factors=(2.0, 1.0))(g, q).round(decimals=4).squeeze(-1)
        tensor([5., 3., 5.])
    """

    setup: Setup = SPAN
    ridge: float | None = None
    preserve_norm: bool = False
    factors: Any = (1.0, 1.0)
    mode: str = "general"
    unfit: tuple[tuple[torch.dtype, str], ...] = ()

    def with_numbers(
        self, numbers: tuple[Factor, Factor], device: torch.device, *, held: bool = False
    ) -> Rescaling:
        """Return the same rescaling with other factors, in a new tensor.

        Args:
            numbers: Parallel and violation: for each one number, or one number per head.
            device: The device of the layer's gradients.
            held: Whether to project even where the factors are equal.
        """
        parallel, violation = numbers
        mode = "general"
        held = held or (self.preserve_norm and parallel != 1)
        if parallel == violation and not held:
            mode = "identity" if parallel == 1 else "uniform"
        elif violation == 0 and not held:
            mode = "parallel"
        dtype = torch.float32 if device.type == "mps" else torch.float64
        with torch.inference_mode(False):  # these tensors outlive an inference mode around this
            values = [torch.tensor(factor, dtype=dtype, device=device) for factor in numbers]
            factors = torch.stack(torch.broadcast_tensors(*values))
        return replace(self, factors=factors, mode=mode, unfit=unfit_dtypes(numbers))

    def projects(self) -> bool:
        """Return whether this rescaling needs a projection."""
        return self.mode in ("parallel", "general")

    def check_range(self, dtype: torch.dtype | None, where: str) -> None:
        """Refuse factors that are not finite in the dtype of the gradients.

        Args:
            dtype: The dtype of the gradients.
            where: Layer and side, for the error.

        Raises:
            ValueError: A factor is not finite.
        """
        for unfit, factor in self.unfit:
            if unfit == dtype:
                raise ValueError(
                    f"{where}: {factor} is not finite in {dtype}, the dtype of its gradients, "
                    f"which ends at {torch.finfo(unfit).max:.3g}: choose a smaller factor"
                )

    def __call__(
        self,
        grad: Tensor,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        other: Tensor | None = None,
        total: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Return the rescaled gradient.

        Args:
            grad: Gradient of ``x``, shape ``(..., H, N, d)``.
            x: Q or K, with the shape of ``grad``.
            mask: Boolean, broadcastable to ``(..., H, N)``, true at real tokens.
            documents: Given in place of ``mask`` if each document has its own span: integers, shape
                ``(T, L)``, the positions of the tokens of T documents; see
                :func:`spanopt.projection.rescale_by_document`.
            other: The other side, shape ``(..., H, M, d)``, where the setup needs it.
            total: Adds up a tensor over the processes that share the tokens of the same sequences;
                see :func:`spanopt.rescale`.

        Raises:
            ValueError: The setup needs the other side, and it is not given.
        """
        if self.mode == "identity":
            return grad
        parallel, violation = self.used_factors()
        if self.mode == "uniform":
            return multiplied(grad, parallel)
        factors: dict[str, Any] = {"parallel": parallel, "violation": violation}
        if self.setup is not SPAN:
            of_span = self.setup(grad, x, other, ridge=self.ridge, mask=mask)
            scaled = multiplied(of_span, parallel - violation)
            if isinstance(violation, Tensor) or violation != 0:
                scaled = scaled + multiplied(grad, violation)
        elif documents is None:
            scaled = rescale(grad, x, ridge=self.ridge, mask=mask, total=total, **factors)
        else:
            scaled = rescale_by_document(grad, x, documents, ridge=self.ridge, **factors)
        return _with_norm_of(grad, scaled) if self.preserve_norm else scaled

    def parallel_part(self, grad: Tensor, x: Tensor, **options: Any) -> Tensor:
        """Return the parallel part of a gradient, whatever the factors are.

        Args:
            grad: Gradient of ``x``, shape ``(..., H, N, d)``.
            x: Q or K, with the shape of ``grad``.
            **options: ``mask``, ``documents`` and ``other``, as in a call of this object.
        """
        return Rescaling(self.setup, self.ridge, factors=(1.0, 0.0))(grad, x, **options)

    def or_else(self, other: Rescaling, condition: Tensor, heads: int) -> Rescaling:
        """Return this rescaling where a condition holds, and otherwise another of the same layer.

        Args:
            other: The rescaling of the layer's other side.
            condition: Boolean, shape ``()``.
            heads: Number of heads of the gradient. Per-head values of another number belong to the
                side that is not chosen.
        """
        assert isinstance(self.factors, Tensor)
        assert isinstance(other.factors, Tensor)
        one, two = (
            factors if factors.ndim == 1 or factors.shape[1] == heads else factors[:, 0]
            # A model may be on the meta device. Scales never are.
            for factors in (x.to(condition.device) for x in (self.factors, other.factors))
        )
        if one.ndim != two.ndim:
            one, two = (x if x.ndim > 1 else x[:, None] for x in (one, two))
        mode = self.mode
        if mode != other.mode:
            mode = "general" if self.projects() or other.projects() else "uniform"
        factors = torch.where(condition, one, two)
        return Rescaling(self.setup, self.ridge, self.preserve_norm, factors, mode)

    def pack(self) -> tuple[Any, ...]:
        """Return tensors, numbers and text from which :meth:`unpack` makes this rescaling again.

        A function that ``torch.compile`` does not trace takes no other values.
        """
        rest = self.factors, self.mode, self.unfit
        return (self.setup.key, self.ridge, self.preserve_norm, *rest)

    @classmethod
    def unpack(cls, packed: tuple[Any, ...]) -> Rescaling:
        """Return the rescaling that :meth:`pack` was called on.

        Args:
            packed: The result of :meth:`pack`. The rescaling must still be alive.
        """
        key, *rest = packed
        return cls(carried(key), *rest)

    def used_factors(self) -> tuple[Any, Any]:
        """Return parallel and violation, which is the number 0 if no violation is left."""
        parallel, violation = self.pair()
        return parallel, 0.0 if self.mode == "parallel" else violation

    def pair(self) -> tuple[Any, Any]:
        """Return parallel and violation."""
        if isinstance(self.factors, Tensor):
            parallel, violation = self.factors.unbind()
            return parallel, violation
        return self.factors


def unfit_dtypes(numbers: tuple[Factor, Factor]) -> tuple[tuple[torch.dtype, str], ...]:
    """Return the dtypes in which a factor is not finite, each with a text that names the factor.

    The difference of the factors, which multiplies the parallel part, is checked too. It is checked
    in the dtype that is computed in, which for half precision is float32.

    Args:
        numbers: Parallel and violation: for each one number, or one number per head.

    Example:
        >>> unfit_dtypes((1e5, 1.0))
        ((torch.float16, 'parallel = 100000.0'),)
    """
    parallel, violation = (x if isinstance(x, tuple) else (x,) for x in numbers)
    heads = max(len(parallel), len(violation))
    pairs = [(parallel[i % len(parallel)], violation[i % len(violation)]) for i in range(heads)]
    unfit = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        computed = torch.finfo(torch.promote_types(dtype, torch.float32)).max
        for one, two in pairs:
            texts = {f"parallel = {one}": one, f"violation = {two}": two}
            large = [text for text, x in texts.items() if abs(x) > torch.finfo(dtype).max]
            if not large and not abs(one - two) <= computed:
                large = [f"parallel - violation = {one} - {two}"]
            if large:
                unfit.append((dtype, large[0]))
                break
    return tuple(unfit)


def multiplied(grad: Tensor, factor: float | Tensor) -> Tensor:
    """Multiply a gradient by a factor.

    Args:
        grad: Shape ``(..., H, N, d)``.
        factor: A number, or a tensor of shape ``()`` or ``(H,)``.

    Returns:
        The product, in the dtype of ``grad``.

    Example:
        >>> multiplied(torch.ones(2, 1, 1), torch.tensor([2.0, 3.0])).flatten()
        tensor([2., 3.])
    """
    if isinstance(factor, Tensor) and factor.ndim:
        factor = factor[..., None, None].to(grad.device)
    return (grad * factor).to(grad.dtype)


def _with_norm_of(grad: Tensor, scaled: Tensor) -> Tensor:
    """Give each matrix (N, d) of a rescaled gradient the norm that it had before."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    grad_dtype, grad, scaled = grad.dtype, grad.to(dtype), scaled.to(dtype)
    # Powers of two keep the squares of the entries within the range of the dtype.
    one, other = (inverse_power(largest_entries(x)) for x in (grad.detach(), scaled.detach()))
    scaled = scaled * other
    before, after = (
        torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (grad * one, scaled)
    )
    return (scaled * (before / torch.where(after == 0, 1, after)) / one).to(grad_dtype)
