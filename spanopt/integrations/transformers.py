"""For the ``Trainer`` of transformers."""

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

    The hooks go on the model when training begins and come off when it ends. An exception in
    training leaves them on, since the ``Trainer`` tells no callback of it, until the callback is
    used again, :meth:`remove` is called, or the callback is dropped; as a context manager it takes
    them off there and then.

    Scales and schedule are saved in the ``Trainer``'s checkpoints and restored on resuming.
    ``restore_callback_states_from_checkpoint`` is not needed for that, and does not go with
    ``schedule``: it makes callbacks anew from what a file can hold.

    Args:
        scales: Scales by layer name or pattern, or one :class:`~spanopt.SpanScale` for all layers.
        schedule: From the number of optimizer steps in the run to a schedule, or schedules by
            layer, of a :class:`~spanopt.SpanScheduler`. It takes a step with the optimizer.
        ridge: Relative ridge of every projection; ``None`` for the dtype's default.
        on_missing: What to do when a layer that was asked for was not scaled since the last
            optimizer step: ``"error"``, before anything is updated, ``"warn"`` or ``"ignore"``.
        qk_modules: Where Q and K are in layers whose attention can't be seen, by layer name or
            pattern: ``{"blocks.0.attn": {"query": "wq", "key": "wk", "num_heads": 8}}``.
        example_inputs: Inputs for one forward pass that checks the layers when training begins: a
            tuple of positional arguments, a dict of keyword arguments, or one argument.
        parameters: What will be trained. When given, a scaled layer that has trainable parameters
            and none of them here is an error.
        projection: What counts as the parallel part: the name of a setup of
            :mod:`spanopt.setups` or a function of that kind, for all layers or by layer name or
            pattern.
        preserve_norm: Whether a rescaled gradient keeps its norm, for each sequence and head; for
            all layers or by layer name or pattern.

    Raises:
        TypeError: A schedule that is no function. All else is checked when training begins.

    Example:
        >>> from spanopt import linear
        >>> callback = SpanScaledCallback(
        ...     {"*": (2.0, 1.0)}, schedule=lambda steps: linear(steps // 10)
        ... )
        >>> with callback:  # doctest: +SKIP
        ...     Trainer(model, arguments, train_dataset=dataset, callbacks=[callback]).train()
    """

    saved: dict[str, Any] | None = None
    """Set by a Trainer that makes the callback anew; what counts is its own state."""

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
        # The Trainer keeps the dicts in its checkpoints: a later change must not reach them.
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
        """Install the hooks, and go on with the scales of the checkpoint that is resumed.

        Args:
            args: The ``TrainingArguments``.
            state: The ``TrainerState``.
            control: The ``TrainerControl``.
            **kwargs: With the ``model``.

        Raises:
            TypeError: An argument of the callback is of the wrong type.
            ValueError: No attention layer, a key that matches none, a layer that is scaled already,
                a second callback of this class, or a
                checkpoint of other layers, or with a schedule when there is none here.

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
        # At step 0 this is no checkpoint's, but what a run that failed has left.
        resumed = saved.get("attributes", {}).get("saved") if state.global_step else None
        self._run.begin(kwargs["model"], state.max_steps, resumed)
        # The Trainer saves no callback that the checkpoint it goes on from does not know.
        state.stateful_callbacks[name] = self.state()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that every layer asked for was scaled since the last optimizer step.

        Args:
            args: The ``TrainingArguments``.
            state: The ``TrainerState``.
            control: The ``TrainerControl``.
            **kwargs: Not used.

        Raises:
            UnscaledLayerError: One was not, and ``on_missing`` is ``"error"``.

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
            **kwargs: With the ``optimizer``, which tells whether it skipped the step.

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
        """Return what the ``Trainer`` saves: how to make this again, and the scales just now.

        Returns:
            What JSON can hold.

        Example:
            >>> SpanScaledCallback({"*": (3.0, 1.0)}).state()["args"]["scales"]["*"]["parallel"]
            3.0
        """
        return {
            "args": _plain(self._run.request),
            "attributes": {"saved": self._run.state()},
        }

    def remove(self) -> None:
        """Take the hooks off the model now. Doing it twice is harmless.

        Example:
            >>> SpanScaledCallback().remove()
        """
        self._run.end()

    def __enter__(self) -> SpanScaledCallback:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _plain(request: Request) -> dict[str, Any]:
    """Return what was asked for as numbers, strings, lists, dicts and ``None``."""
    scales: Any = request.scales
    if scales is not None:
        scales = {"*": scales} if isinstance(scales, SpanScale) else scales
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
    """Return the name of a setup; that of a function is one that is refused when it is read."""
    return projection if isinstance(projection, str) else f"the function {projection!r}"
