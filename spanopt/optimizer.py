"""The optimizer wrapper: a ``torch.optim.Optimizer`` that owns the hooks on a model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any, overload

from torch import Tensor, nn
from torch.optim import Optimizer

from spanopt.arrivals import Arrivals
from spanopt.checkpoint import extended, load_into
from spanopt.groups import SpanGroup
from spanopt.hooks import SpanHooks
from spanopt.installing import install
from spanopt.plan import ProjectionLike, QKModules, Request, Scales
from spanopt.proxy import OptimizerProxy
from spanopt.renaming import renamed

__all__ = ["SpanScaledOptimizer"]


class _Lease:
    """An object that a wrapper and its shallow copies share; the hooks go when it is freed."""


class SpanScaledOptimizer(OptimizerProxy):
    """Wrap an optimizer so that it trains on span-scaled attention gradients.

    At every attention layer of ``model``, the gradients of Q and K are split into the parallel part
    and the violation. Each is multiplied by its factor, and their sum replaces the gradient. The
    forward pass, the model's code and the optimizer's update rule stay as they are.

    ``param_groups``, ``state`` and ``defaults`` are the wrapped optimizer's own objects. Any other
    attribute that this class lacks is read from the wrapped optimizer and set on it. The hooks stay
    on the model until :meth:`detach`, or until the wrapper is dropped: keep it in a variable.

    Args:
        optimizer: The optimizer to wrap, of ``torch.optim``, torch-optimizer, or any other with
            that interface.
        model: The model whose attention layers are scaled.
        scales: Scales by layer name or pattern, see :func:`~spanopt.scale.resolve_scales`, or one
            :class:`~spanopt.SpanScale` for all layers. The default is ``{"*": SpanScale()}``. It
            changes nothing until ``span_groups`` are edited, and a warning says so.
        ridge: What is added to the Gram matrix of Q or K, relative to its trace: a number of at
            least 0. By default it is ``None``, which means the default ridge of the dtype: see
            :func:`~spanopt.projection.default_ridge`.
        on_missing: What to do at a step if a layer that was asked for was not scaled in the
            backward passes since the last step: ``"error"`` (the default), ``"warn"`` or
            ``"ignore"``.
        qk_modules: The modules that return Q and K in layers whose attention can't be seen, by
            layer name or pattern: ``{"blocks.0.attn": {"query": "wq", "key": "wk",
            "num_heads": 8}}``. By default none are named, and attention is seen in all layers.
        example_inputs: Inputs for a forward pass that checks, before anything is trained, what
            only a forward pass can tell: a tuple of positional arguments, a dict of keyword
            arguments, or one argument. By default no such pass is made.
        projection: The setup, which says what counts as the parallel part: a name in
            :mod:`spanopt.setups` (``"span"`` by default) or a function. Give one for all layers,
            or a dict by layer name or pattern.
        preserve_norm: Whether a rescaled gradient keeps the norm that it had before, for each
            sequence and head. Give one flag for all layers, or a dict by layer name or pattern.
            By default the norm may change.

    Attributes:
        optimizer: The wrapped optimizer.
        hooks: The :class:`~spanopt.SpanHooks` on the model.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: The model has no attention layer; a key matches no layer; a scale or the ridge
            is not a finite number; a layer is scaled already; or none of a layer's trainable
            parameters is in ``optimizer``. Nothing is installed then.

    Source: "Scaling Bidirectional Spans and Span Violations in Attention Mechanism"
    (arXiv 2512.13033). ``docs/method.md`` says how this project reads it.

    Example:
        >>> import torch
        >>> from spanopt import SpanScale
        >>> model = torch.nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16)
        >>> optimizer = SpanScaledOptimizer(
        ...     torch.optim.AdamW(model.parameters(), lr=3e-4),
        ...     model,
        ...     scales={"*": SpanScale(parallel=2.0, violation=1.0)},
        ... )
        >>> model(torch.randn(5, 3, 8)).pow(2).mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    @renamed(projections="qk_modules")
    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        scales: Scales = None,
        *,
        ridge: float | None = None,
        on_missing: str = "error",
        qk_modules: QKModules = None,
        example_inputs: Any = None,
        projection: ProjectionLike = "span",
        preserve_norm: bool | Mapping[str, bool] = False,
    ) -> None:
        request = Request(scales, ridge, on_missing, qk_modules, projection, preserve_norm)
        self._wrap(optimizer, model, request, example_inputs)

    def _wrap(
        self, optimizer: Optimizer, model: nn.Module, request: Request, example_inputs: Any = None
    ) -> None:
        self._adopt(optimizer, model, request)
        self.hooks: SpanHooks = install(
            model, request, example_inputs=example_inputs, parameters=self._parameters()
        )
        # The hooks go when the wrapper is dropped, for example when a notebook cell runs again.
        weakref.finalize(self._lease, self.hooks.remove)

    def _adopt(self, optimizer: Optimizer, model: nn.Module, request: Request) -> None:
        """Set the attributes that every wrapper has, attached or detached."""
        self._stand_for(optimizer)
        self.model = model
        self._request = request
        self._arrivals = Arrivals()
        self._lease = _Lease()

    def _unhook(self) -> None:
        self.hooks = SpanHooks(self._request.on_missing)

    @property
    def _attached(self) -> bool:
        return bool(self.hooks.sites)

    @property
    def span_groups(self) -> list[SpanGroup]:
        """The scales: an editable dict for each scaled layer. The next forward pass uses the edits.

        Example:
            >>> import torch
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> sgd = torch.optim.SGD(model.parameters())
            >>> optimizer = SpanScaledOptimizer(sgd, model, (2.0, 1.0))
            >>> for group in optimizer.span_groups:
            ...     group["parallel"] = 1.5
        """
        return self.hooks.groups

    @overload
    def step(self, closure: None = None, **kwargs: Any) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any], **kwargs: Any) -> Any: ...

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step of the wrapped optimizer.

        Args:
            *args: Positional arguments of the wrapped ``step``, such as a closure.
            **kwargs: Keyword arguments of the wrapped ``step``.

        Returns:
            What the wrapped ``step`` returns: the closure's loss, or ``None``.

        Raises:
            UnscaledLayerError: A backward pass has run since the last step, and a layer that was
                asked for was not scaled in it. Nothing has been updated.

        Example:
            >>> import torch
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> sgd = torch.optim.SGD(model.parameters())
            >>> optimizer = SpanScaledOptimizer(sgd, model, (2.0, 1.0))
            >>> optimizer.step()  # no backward pass yet, nothing to do
        """
        return self._step_with_hooks(*args, **kwargs)

    # torch.optim.Optimizer would add the global step hooks, but the wrapped step runs them already.
    step.hooked = True  # type: ignore[attr-defined]

    def _note_step(self) -> None:
        """Forget which layers were seen before this step, and mark the gradients that it used."""
        self.hooks.forget()
        self._arrivals.mark(self._parameters())

    def _check_step(self) -> None:
        self.hooks.check_step(self._parameters(), self._arrivals.has_come)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clear the gradients, as the wrapped optimizer does.

        Args:
            *args: Positional arguments of the wrapped ``zero_grad``.
            **kwargs: Keyword arguments of the wrapped ``zero_grad``.

        Example:
            >>> import torch
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> sgd = torch.optim.SGD(model.parameters())
            >>> optimizer = SpanScaledOptimizer(sgd, model, (2.0, 1.0))
            >>> optimizer.zero_grad(set_to_none=True)
        """
        self.hooks.drop_stale()
        self.optimizer.zero_grad(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer.

        The model may have got new attention layers since it was wrapped. Those whose parameters
        are now in the optimizer are scaled from now on, as ``scales`` says. The hooks are taken
        off layers that the model no longer has.

        Args:
            param_group: A dict. Its ``"params"`` is a tensor or an iterable of tensors. Its other
                entries are options of the wrapped optimizer for them.

        Raises:
            ValueError: A new layer can't be scaled, for a reason for which making the wrapper
                raises this error; or another scaled layer has its name. Nothing is added then.

        Example:
            >>> import torch
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> sgd = torch.optim.SGD(model.parameters())
            >>> optimizer = SpanScaledOptimizer(sgd, model, (2.0, 1.0))
            >>> optimizer.add_param_group({"params": torch.nn.Linear(2, 2).parameters()})
            >>> len(optimizer.param_groups)
            2
        """
        if not self._attached:
            self.optimizer.add_param_group(param_group)
            return
        given: Any = param_group["params"]
        if not isinstance(given, (Tensor, set)):
            given = param_group["params"] = list(given)
        new = [given] if isinstance(given, Tensor) else list(given)
        # Parameters may come with their names.
        added = [x[1] if isinstance(x, tuple) else x for x in new]
        with self.hooks.following(self.model, self._request, [*self._parameters(), *added]):
            self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict, with two more entries.

        ``"span_groups"`` holds the scales. ``"span_parameters"`` holds names and shapes of the
        parameters, by which :meth:`load_state_dict` recognises the model. Without these two
        entries, it is the state dict of the wrapped optimizer alone.

        Returns:
            Only tensors, numbers, strings, lists, dicts and ``None``, if that holds for the state
            dict of the wrapped optimizer.

        Example:
            >>> import torch
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> sgd = torch.optim.SGD(model.parameters())
            >>> optimizer = SpanScaledOptimizer(sgd, model, (2.0, 1.0))
            >>> optimizer.state_dict()["span_groups"]
            [{'name': '', 'parallel': 2.0, 'violation': 1.0, 'query': None, 'key': None}]
        """
        if self._is_front:
            return self.optimizer.state_dict()
        return self._save_with_hooks(lambda: extended(self.optimizer, self.span_groups, self.model))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the wrapped optimizer's state and the scales.

        Args:
            state_dict: What :meth:`state_dict` returned. If it comes from the bare optimizer, the
                scales stay as they are.

        Raises:
            ValueError: It is not a state dict, or it is one of another model or optimizer; the
                message then lists what differs. Optimizer and scales stay as they were.

        Example:
            >>> import torch
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> bare = torch.optim.SGD(model.parameters())
            >>> optimizer = SpanScaledOptimizer(bare, model, (2.0, 1.0))
            >>> optimizer.load_state_dict(bare.state_dict())
        """
        if self._is_front:
            self.optimizer.load_state_dict(state_dict)  # type: ignore[arg-type]
            return
        groups = self.span_groups if self._attached else None

        def load(changed: dict[str, Any]) -> None:
            load_into(self.optimizer, changed, self.model, groups, self.hooks.set_scales)

        self._load_with_hooks(state_dict, load)

    def detach(self) -> Optimizer:
        """Take the hooks off the model.

        Returns:
            The wrapped optimizer.

        Example:
            >>> import torch
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> bare = torch.optim.SGD(model.parameters())
            >>> SpanScaledOptimizer(bare, model, (2.0, 1.0)).detach() is bare
            True
        """
        if self._is_front:
            detached: Optimizer = self.optimizer.detach()  # type: ignore[attr-defined]
            return detached
        self.hooks.remove()
        self._unhook()
        return self.optimizer

    def __getstate__(self) -> dict[str, Any]:
        now = {group["name"]: group.scale for group in self.span_groups}
        return {
            "optimizer": self.optimizer,
            "model": self.model,
            "request": self._request.with_scales(now),
            "attached": self._attached,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.pop("attached"):
            self._wrap(**state)
        else:
            self._adopt(**state)
            self._unhook()

    def __copy__(self) -> SpanScaledOptimizer:
        """Return a wrapper of a shallow copy of the wrapped optimizer.

        Both share parameter groups and state, as copies of a ``torch.optim.Optimizer`` do. They
        also share the hooks on the model. These are removed when the last of them is dropped.
        """
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        if not self._is_front:
            copied._adopt(copy.copy(self.optimizer), self.model, self._request)
            copied.__dict__.update(_arrivals=copy.copy(self._arrivals), _lease=self._lease)
        return copied

    def __repr__(self) -> str:
        if self._is_front:
            return repr(self.optimizer)
        state = "" if self._attached else ", detached"
        return f"{type(self).__name__}{state} (\n{self.hooks!r}\n{self.optimizer!r}\n)"
