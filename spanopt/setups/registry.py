"""The registry of projection setups: what a setup is, how it is declared and how it is found."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["SETUPS", "Setup", "SetupFunction", "carried", "setup"]

SetupFunction = Callable[..., Tensor]
"""``(grad, basis, other, *, ridge=None, mask=None)``: the parallel part P g of a gradient g.

``grad`` and ``basis`` (Q for a gradient of Q, K for one of K) have the shape ``(..., N, d)``.
``other`` is the other side's tensor, K or Q, shape ``(..., M, d)``, or ``None``. ``ridge`` is the
relative ridge or ``None``. ``mask`` is boolean, broadcastable to ``(..., N)``, true at real tokens,
or ``None``. The result has the shape and dtype of ``grad`` and is linear in it.
"""

_Function = TypeVar("_Function", bound=SetupFunction)
_SIGNATURE = "(grad, basis, other, *, ridge=None, mask=None)"
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Setup:
    """A rule for what counts as the parallel part of a gradient.

    Calling it returns the parallel part P g of a gradient g. The rest, g - P g, is the violation.

    Args:
        name: Name of the setup, for errors and for the argument ``projection=``.
        function: Computes the parallel part: see :data:`SetupFunction`.
        needs_other: Whether the function reads the other side. If so, it always gets it.
        equal_lengths: Whether there must be as many queries as keys.

    Example:
        >>> import torch
        >>> nothing = Setup("nothing", lambda g, x, other, **_: 0 * g, needs_other=False)
        >>> nothing(torch.ones(1, 2), torch.ones(1, 2))
        tensor([[0., 0.]])
    """

    name: str
    function: SetupFunction
    needs_other: bool = True
    equal_lengths: bool = False
    key: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Text can be passed out of compiled code, and functions cannot: see `carried`.
        object.__setattr__(self, "key", f"{self.name} {next(_numbers)}")
        _carried[self.key] = self

    def __call__(
        self,
        grad: Tensor,
        basis: Tensor,
        other: Tensor | None = None,
        *,
        ridge: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the parallel part of a gradient.

        Args:
            grad: Gradient of the basis, shape ``(..., N, d)``.
            basis: Q or K, shape ``(..., N, d)``.
            other: The other side, K or Q, shape ``(..., M, d)``.
            ridge: Relative ridge; ``None`` for the dtype's default.
            mask: Boolean, broadcastable to ``(..., N)``, true at real tokens.

        Returns:
            The parallel part, with the shape and dtype of ``grad``.

        Raises:
            ValueError: The other side is needed and not given, or must have as many tokens and
                does not.
        """
        if self.needs_other and other is None:
            raise ValueError(f"the projection {self.name!r} {_NEEDS_OTHER}")
        if self.equal_lengths and other is not None and basis.shape[:-1] != other.shape[:-1]:
            raise ValueError(
                f"the projection {self.name!r} needs queries and keys of equal number, got "
                f"{tuple(basis.shape)} and {tuple(other.shape)}"
            )
        return self.function(grad, basis, other, ridge=ridge, mask=mask)

    def check_other(self, other: Tensor | None, where: str) -> None:
        """Refuse a missing other side if the setup needs it.

        Args:
            other: The other side, or ``None``.
            where: The layer or the call, for the error.

        Raises:
            ValueError: The other side is needed and not given.
        """
        if self.needs_other and other is None:
            raise ValueError(f"{where}: the projection {self.name!r} {_NEEDS_OTHER}")

    @classmethod
    def of(cls, value: str | Setup | SetupFunction) -> Setup:
        """Return the setup that a user's argument stands for.

        Args:
            value: The name of a registered setup, a setup, or a function. A function counts as
                needing the other side. ``Setup(name, function, needs_other=False)`` says that it
                does not.

        Returns:
            The setup. The setup of a function is not registered: it lives as long as it is used.

        Raises:
            TypeError: ``value`` is none of these.
            ValueError: No setup has this name.

        Example:
            >>> Setup.of(lambda grad, basis, other, *, ridge=None, mask=None: 0 * grad).name
            'spanopt.setups.registry.<lambda>'
        """
        if isinstance(value, Setup):
            return value
        if isinstance(value, str):
            if value not in SETUPS:
                raise ValueError(
                    f"no projection is named {value!r}: there are {', '.join(SETUPS)}; or pass a "
                    f"function {_SIGNATURE}"
                )
            return SETUPS[value]
        if not callable(value):
            raise TypeError(
                f"a projection is one of {', '.join(SETUPS)} or a function {_SIGNATURE}, "
                f"got {value!r}"
            )
        for known in SETUPS.values():
            if known.function is value:
                return known
        own = getattr(value, "__qualname__", type(value).__qualname__)
        return cls(f"{getattr(value, '__module__', '')}.{own}", value)

    def __deepcopy__(self, memo: Any) -> Setup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if SETUPS.get(self.name) is self:
            return Setup.of, (self.name,)
        return Setup, (self.name, self.function, self.needs_other, self.equal_lengths)


_NEEDS_OTHER = "needs the other side's tensor, which was not given"

SETUPS: dict[str, Setup] = {}
"""The registered setups by name."""

# All setups by key. A setup is here as long as something else keeps it alive.
_carried: weakref.WeakValueDictionary[str, Setup] = weakref.WeakValueDictionary()


def carried(key: str) -> Setup:
    """Return the setup, registered or not, that has this ``key``.

    Args:
        key: The attribute ``key`` of a setup that is still in use.
    """
    return _carried[key]


def setup(
    name: str, *, needs_other: bool, equal_lengths: bool = False
) -> Callable[[_Function], _Function]:
    """Register a function as a projection setup, which ``projection=`` then takes by name.

    Args:
        name: The name.
        needs_other: Whether the function reads the other side: K for a gradient of Q.
        equal_lengths: Whether there must be as many queries as keys.

    Returns:
        A decorator, which returns the function unchanged.

    Raises:
        ValueError: A setup of this name is registered already.

    Example:
        >>> import torch
        >>> @setup("last token", needs_other=False)
        ... def last_token(grad, basis, other, *, ridge=None, mask=None):
        ...     return grad * (torch.arange(grad.shape[-2]) == grad.shape[-2] - 1)[:, None]
        >>> SETUPS.pop("last token")(torch.ones(2, 1), torch.ones(2, 1)).flatten()
        tensor([0., 1.])
    """

    def register(function: _Function) -> _Function:
        if name in SETUPS:
            raise ValueError(f"a projection is named {name!r} already: choose another name")
        SETUPS[name] = Setup(name, function, needs_other, equal_lengths)
        return function

    return register
