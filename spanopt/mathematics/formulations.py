"""The formulation of the projection that a device gets: the place where one is chosen."""

from __future__ import annotations

import os

from torch import Tensor

from spanopt.mathematics import fused, mixed, whitening
from spanopt.mathematics.spans import Total

__all__ = ["FORMULATIONS", "combined", "get_formulation", "set_formulation"]

FORMULATIONS = {
    "auto": "mixed on a GPU, for bfloat16 and float16; otherwise plain",
    "plain": "float32 or float64 throughout; on every device and for every dtype",
    "mixed": "operands of products in bfloat16 or float16, as given, and sums in float32",
    "fused": "a Triton kernel that keeps all d x d matrices on the chip",
}
"""The formulations by name. All of them compute the same, up to rounding."""

_VARIABLE = "SPANOPT_FORMULATION"


def set_formulation(name: str) -> None:
    """Force a formulation of the projection, for the whole process.

    The environment variable ``SPANOPT_FORMULATION`` does the same before the first import.
    Compiled code is compiled anew when this changes.

    Args:
        name: ``"auto"``, the default: ``"mixed"`` on a GPU where Q and its gradient are bfloat16
            or float16, otherwise ``"plain"``. ``"plain"``: float32 or float64 throughout.
            ``"mixed"``: operands of products in bfloat16 or float16, as given, and sums in
            float32. ``"fused"``: a Triton kernel. Where a forced one can't be had, the call that
            needs it is an error that says why.

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

    The arguments have been checked. Nothing here or below may wait for the device.

    Args:
        basis: Q, shape ``(..., N, d)``. It counts as a constant.
        x: Shape ``(..., N, m)``. The result is differentiable in it.
        ridge: As the user gave it; ``None`` for the dtype's default, which is also the least.
        mask: Boolean, broadcastable to ``(..., N)``, true at real tokens, or ``None`` if all are.
        factor: In the dtype computed in, shape ``()`` or ``(H, 1, 1)``; ``None`` for 1.
        rest: In the dtype computed in, shape ``()`` or ``(H, 1, 1)``; ``None`` for 0, also where
            ``x`` is not finite.
        total: See :func:`spanopt.rescale`.

    Returns:
        A new tensor with the shape and dtype of ``x``.

    Raises:
        RuntimeError: A formulation is forced that can't be had for these tensors.
    """
    name = _forced[0]
    if name == "auto":
        name = _best(basis, x, total)
    elif name != "plain":
        reason = (fused if name == "fused" else mixed).why_not(basis, x, total)
        if reason:
            raise RuntimeError(
                f"the formulation {name!r} is forced and can't be had: {reason}; "
                "set_formulation('auto') takes another one there"
            )
    if name == "fused":
        return fused.combined(basis, x, ridge=ridge, mask=mask, factor=factor, rest=rest)
    if name == "mixed":
        return mixed.combined(basis, x, ridge=ridge, mask=mask, factor=factor, rest=rest)
    return whitening.combined(
        basis, x, ridge=ridge, mask=mask, factor=factor, rest=rest, total=total
    )


def _best(basis: Tensor, x: Tensor, total: Total | None) -> str:
    """Return the name of the formulation that the tensors get of themselves.

    ``"fused"`` is to be asked for, until its kernels have been run on a card.
    """
    return "mixed" if basis.is_cuda and not mixed.why_not(basis, x, total) else "plain"


_forced = ["auto"]
set_formulation(os.environ.get(_VARIABLE, "auto"))
