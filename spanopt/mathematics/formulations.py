"""Choosing the formulation: the way in which the projection is computed on a device."""

from __future__ import annotations

import os

from torch import Tensor

from spanopt.mathematics import fused, mixed, whitening
from spanopt.mathematics.spans import Total

__all__ = ["FORMULATIONS", "combined", "formulation_of", "get_formulation", "set_formulation"]

FORMULATIONS = {
    "auto": "mixed on a GPU, for bfloat16 and float16; otherwise plain",
    "plain": "float32 or float64 throughout; on every device and for every dtype",
    "mixed": "operands of products in bfloat16 or float16, as given, and sums in float32",
    "fused": "a Triton kernel that keeps all d x d matrices on the chip",
}
"""The formulations by name. All of them give the same result up to rounding."""

_VARIABLE = "SPANOPT_FORMULATION"


def set_formulation(name: str) -> None:
    """Force a formulation of the projection, for the whole process.

    The environment variable ``SPANOPT_FORMULATION`` does the same if it is set before the first
    import. Compiled code is compiled anew when the formulation changes.

    Args:
        name: The name of the formulation:

            - ``"auto"``, the default: ``"mixed"`` on a GPU where Q and its gradient are bfloat16 or
              float16, otherwise ``"plain"``;
            - ``"plain"``: float32 or float64 throughout;
            - ``"mixed"``: operands of products in bfloat16 or float16, as given, and sums in
              float32;
            - ``"fused"``: a Triton kernel.

            If tensors cannot be computed in the forced way, the call that needs it raises an error
            that says why.

    Raises:
        ValueError: There is no formulation of this name.

    Example:
        >>> before = get_formulation()
        >>> set_formulation("plain")
        >>> get_formulation()
        'plain'
        >>> set_formulation(before)
    """
    if name not in FORMULATIONS:
        raise ValueError(f"no formulation is named {name!r}: there are {', '.join(FORMULATIONS)}")
    _forced[0] = name


def get_formulation() -> str:
    """Return the formulation that :func:`set_formulation` forced, or ``"auto"``."""
    return _forced[0]


def combined(
    basis: Tensor,
    x: Tensor,
    *,
    ridge: float | None,
    mask: Tensor | None,
    factor: Tensor | None = None,
    rest: Tensor | None = None,
    total: Total | None = None,
) -> Tensor:
    """Return ``factor * P x + rest * x``, in the formulation for the device of the tensors.

    The arguments must have been checked. This function, and what it calls, must not wait for the
    device.

    Args:
        basis: Q, shape ``(..., N, d)``. It counts as a constant.
        x: Shape ``(..., N, m)``. The result is differentiable in it.
        ridge: The ridge as the user gave it; ``None`` for the dtype's default. A smaller ridge is
            replaced by the default.
        mask: Boolean, broadcastable to ``(..., N)``, true at real tokens, or ``None`` if all are.
        factor: In the dtype computed in, shape ``()`` or ``(H, 1, 1)``; ``None`` for 1.
        rest: In the dtype computed in, shape ``()`` or ``(H, 1, 1)``. With ``None`` nothing is
            added, even where ``x`` is not finite.
        total: See :func:`spanopt.rescale`.

    Returns:
        A new tensor with the shape and dtype of ``x``.

    Raises:
        RuntimeError: A formulation is forced that cannot be used for these tensors.
    """
    name = formulation_of(basis, x, total)
    if name == "fused":
        return fused.combined(basis, x, ridge=ridge, mask=mask, factor=factor, rest=rest)
    if name == "mixed":
        return mixed.combined(basis, x, ridge=ridge, mask=mask, factor=factor, rest=rest)
    return whitening.combined(
        basis, x, ridge=ridge, mask=mask, factor=factor, rest=rest, total=total
    )


def formulation_of(basis: Tensor, x: Tensor, total: Total | None = None) -> str:
    """Return the name of the formulation that tensors get: the forced one, or the best.

    ``"fused"`` is used only if it is forced, until its kernels have been run on a GPU.

    Args:
        basis: As in :func:`combined`.
        x: As in :func:`combined`.
        total: As in :func:`combined`.

    Raises:
        RuntimeError: A formulation is forced that cannot be used for these tensors.
    """
    name = _forced[0]
    if name == "auto":
        return "mixed" if basis.is_cuda and not mixed.why_not(basis, x, total) else "plain"
    if name != "plain":
        reason = (fused if name == "fused" else mixed).why_not(basis, x, total)
        if reason:
            raise RuntimeError(
                f"the formulation {name!r} is forced and can't be had: {reason}; "
                "set_formulation('auto') takes another one there"
            )
    return name


_forced = ["auto"]
set_formulation(os.environ.get(_VARIABLE, "auto"))
