"""The formulation of the projection that a device gets: the place where one is chosen."""

from __future__ import annotations

from torch import Tensor

from spanopt.mathematics import whitening
from spanopt.mathematics.spans import Total

__all__ = ["combined"]


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
    """
    return whitening.combined(
        basis, x, ridge=ridge, mask=mask, factor=factor, rest=rest, total=total
    )
