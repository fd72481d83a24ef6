"""A callback for the ``Trainer`` of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerCallback

from spanopt.hooks import SpanHooks
from spanopt.integrations.run import MakeSchedule, Run
from spanopt.plan import ProjectionLike, QKModules, Request, Scales
from spanopt.renaming import renamed
from spanopt.scale import SpanScale
from spanopt.scheduler import SpanScheduler

__all__ = ["SpanScaledCallback"]


class SpanScaledCallback(TrainerCallback, ExportableState):
    """Train a ``Trainer``'s model on span-scaled attention gradients, whatever optimizer it makes.

    The hooks are put on the model when training begins and taken off when it ends. If an exception
    ends the training, they stay on, since the ``Trainer`` tells no callback of it. They then go
    when the callback is used again or dropped, or when :meth:`remove` is called. Use the callback
    as a context manager to take them off at once, also after an exception.

    The ``Trainer``'s checkpoints hold scales and schedule, which are restored on resuming.
    ``restore_callback_states_from_checkpoint`` is not needed for that. It does not work together
    with ``schedule``, since it makes new callbacks from a file, which can't hold a function.

    Args:
        scales: Scales by layer name or pattern, or one :class:`~spanopt.SpanScale` for all layers.
        schedule: A function of the number of optimizer steps in the run. It returns a schedule, or
            schedules by layer, for a :class:`~spanopt.SpanScheduler`, which steps with the
            optimizer.
        ridge: Relative ridge of every projection; ``None`` means the default of the dtype.
        on_missing: What to do if a layer that was asked for was not scaled since the last
            optimizer step: ``"error"`` (before anything is updated), ``"warn"`` or ``"ignore"``.
        qk_modules: The modules that return Q and K in layers whose attention can't be seen, by
            layer name or pattern: ``{"blocks.0.attn": {"query": "wq", "key": "wk",
            "num_heads": 8}}``.
        example_inputs: Inputs for one forward pass that checks the layers when training begins: a
            tuple of positional arguments, a dict of keyword arguments, or one argument.
        parameters: The parameters that will be trained. If they are given, it is an error that a
            scaled layer has trainable parameters but none of them is among these.
        projection: The setup, which says what counts as the parallel part: a name in
            :mod:`spanopt.setups` or a function, for all layers or by layer name or pattern.
        preserve_norm: Whether a rescaled gradient keeps its norm, for each sequence and head. Give
            one flag for all layers, or a dict by layer name or pattern.

    Raises:
        TypeError: ``schedule`` is not a function. All else is checked when training begins.

    Example:
        >>> from spanopt import linear
        >>> callback = SpanScaledCallback(
        ...     {"*": (2.0, 1.0)}, schedule=lambda steps: linear(steps // 10)
        ... )
        >>> with callback:  # doctest: +SKIP
        ...     Trainer(model, arguments, train_dataset=dataset, callbacks=[callback]).train()
    """

    saved: dict[str, Any] | None = None
    """Set by a Trainer that makes the callback again. The callback reads it from the state."""

    @renamed(projections="qk_modules")
    def __init__(
        self,
        scales: Scales = None,
        schedule: MakeSchedule | None = None,
        *,
        ridge: float | None = None,
        on_missing: str = "error",
        qk_modules: QKModules = None,
        example_inputs: Any = None,
        parameters: Iterable[Tensor] | None = None,
        projection: ProjectionLike = "span",
        preserve_norm: bool | Mapping[str, bool] = False,
    ) -> None:
        # The Trainer keeps these dicts in its checkpoints, where later changes must not appear.
        if isinstance(qk_modules, Mapping):
            qk_modules = {layer: dict(spec) for layer, spec in qk_modules.items()}
        request = Request(scales, ridge, on_missing, qk_modules, projection, preserve_norm)
        self._run = Run(request, schedule, example_inputs=example_inputs, parameters=parameters)

    @property
    def hooks(self) -> SpanHooks | None:
        """The :class:`~spanopt.SpanHooks` on the model, while it trains."""
        return self._run.hooks

    @property
    def scheduler(self) -> SpanScheduler | None:
        """The :class:`~spanopt.SpanScheduler`, while it trains and if there is a schedule."""
        return self._run.scheduler

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Install the hooks, and set the scales of the checkpoint from which training resumes.

        Args:
            args: The ``TrainingArguments``.
            state: The ``TrainerState``.
            control: The ``TrainerControl``.
            **kwargs: Among them the ``model``.

        Raises:
            TypeError: An argument of the callback is of the wrong type.
            ValueError: No attention layer, a key that matches no layer, a layer that is scaled
                already, or a second callback of this class. Also a checkpoint of other layers, or
                one of a run with a schedule if this callback has none.

        Example:
            >>> from transformers import TrainerControl, TrainerState
            >>> from torch import nn
            >>> model = nn.TransformerEncoderLayer(8, nhead=2)
            >>> callback = SpanScaledCallback(SpanScale(2.0))
            >>> callback.on_train_begin(None, TrainerState(), TrainerControl(), model=model)
            >>> callback.hooks.unseen()
            ['self_attn']
        """
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name, {})
        if not isinstance(saved, dict):
            raise ValueError(
                f"a Trainer takes one {name}, which may have scales for many layers: its "
                "checkpoints can't tell two of them apart"
            )
        # At step 0 this state is from a run that failed, not from a checkpoint.
        resumed = saved.get("attributes", {}).get("saved") if state.global_step else None
        self._run.begin(kwargs["model"], state.max_steps, resumed)
        # The Trainer saves only callbacks that its state names, and an old checkpoint may lack it.
        state.stateful_callbacks[name] = self.state()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that every layer that was asked for was scaled since the last optimizer step.

        Args:
            args: The ``TrainingArguments``.
            state: The ``TrainerState``.
            control: The ``TrainerControl``.
            **kwargs: Not used.

        Raises:
            UnscaledLayerError: A layer was not scaled, and ``on_missing`` is ``"error"``.

        Example:
            >>> SpanScaledCallback().on_pre_optimizer_step(None, None, None)
        """
        self._run.check()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the scales for the next step.

        Args:
            args: The ``TrainingArguments``.
            state: The ``TrainerState``.
            control: The ``TrainerControl``.
            **kwargs: Among them the ``optimizer``, which tells whether it skipped the step.

        Example:
            >>> SpanScaledCallback().on_optimizer_step(None, None, None)
        """
        self._run.stepped(getattr(kwargs.get("optimizer"), "step_was_skipped", False))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off the model.

        Args:
            args: The ``TrainingArguments``.
            state: The ``TrainerState``.
            control: The ``TrainerControl``.
            **kwargs: Not used.

        Example:
            >>> SpanScaledCallback().on_train_end(None, None, None)
        """
        self.remove()

    def state(self) -> dict[str, Any]:
        """Return what the ``Trainer`` saves: the callback's arguments, and its present scales.

        Returns:
            A dict of values that JSON can hold.

        Example:
            >>> SpanScaledCallback({"*": (3.0, 1.0)}).state()["args"]["scales"]["*"]["parallel"]
            3.0
        """
        return {
            "args": _plain(self._run.request),
            "attributes": {"saved": self._run.state()},
        }

    def remove(self) -> None:
        """Take the hooks off the model now. Calling it twice is harmless.

        Example:
            >>> SpanScaledCallback().remove()
        """
        self._run.end()

    def __enter__(self) -> SpanScaledCallback:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _plain(request: Request) -> dict[str, Any]:
    """Return a request as a dict of numbers, strings, lists, dicts and ``None``."""
    scales: Any = request.scales
    if scales is not None:
        scales = scales if isinstance(scales, Mapping) else {"*": scales}
        scales = {
            key: None if scale is None else SpanScale.of(scale).fields()
            for key, scale in scales.items()
        }
    projection: Any = request.projection
    if isinstance(projection, Mapping):
        projection = {key: _name(value) for key, value in projection.items()}
    else:
        projection = _name(projection)
    return {**vars(request), "scales": scales, "projection": projection}


def _name(projection: Any) -> str:
    """Return the name of a setup. A function gets a name that is refused when it is read back."""
    return projection if isinstance(projection, str) else f"the function {projection!r}"
