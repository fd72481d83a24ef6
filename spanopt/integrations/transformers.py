"""For the ``Trainer`` of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback

from spanopt.attach import SpanHooks
from spanopt.integrations.attachment import Attachment, MakeSchedule, Scales
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
        scales: As in :class:`~spanopt.SpanScaledOptimizer`.
        schedule: From the number of optimizer steps in the run to a schedule, or schedules by
            layer, of a :class:`~spanopt.SpanScheduler`. It takes a step with the optimizer.
        ridge: As in :func:`~spanopt.project`.
        on_missing: What to do when a layer that was asked for was not scaled since the last
            optimizer step: ``"error"``, before anything is updated, ``"warn"`` or ``"ignore"``.
        projections: As in :func:`~spanopt.attach`.

    Raises:
        TypeError: A schedule that is no function. All else is checked when training begins.

    Example:
        >>> from spanopt.scheduler import linear
        >>> callback = SpanScaledCallback(
        ...     {"*": (2.0, 1.0)}, schedule=lambda steps: linear(steps // 10)
        ... )
        >>> with callback:  # doctest: +SKIP
        ...     Trainer(model, arguments, train_dataset=dataset, callbacks=[callback]).train()
    """

    saved: dict[str, Any] | None = None
    """Set by a Trainer that makes the callback anew; what counts is its own state."""

    def __init__(
        self,
        scales: Scales = None,
        schedule: MakeSchedule | None = None,
        *,
        ridge: float | None = None,
        on_missing: str = "error",
        projections: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if projections is not None:
            projections = {layer: dict(spec) for layer, spec in projections.items()}
        self._attachment = Attachment(
            scales, schedule, ridge=ridge, on_missing=on_missing, projections=projections
        )

    @property
    def hooks(self) -> SpanHooks | None:
        """The :class:`~spanopt.SpanHooks` on the model, while it trains."""
        return self._attachment.hooks

    @property
    def scheduler(self) -> SpanScheduler | None:
        """The :class:`~spanopt.SpanScheduler`, while it trains and if there is a schedule."""
        return self._attachment.scheduler

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Install the hooks, and go on with the scales of the checkpoint that is resumed.

        Args:
            args: The ``TrainingArguments``.
            state: The ``TrainerState``.
            control: The ``TrainerControl``.
            **kwargs: With the ``model``.

        Raises:
            TypeError: As in :func:`~spanopt.attach`.
            ValueError: As in :func:`~spanopt.attach`, a second callback of this class, or a
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
        self._attachment.begin(kwargs["model"], state.max_steps, resumed)
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
        self._attachment.check()

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
        self._attachment.stepped(getattr(kwargs.get("optimizer"), "step_was_skipped", False))

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
            "args": {"scales": _plain(self._attachment.scales), **self._attachment.options},
            "attributes": {"saved": self._attachment.state()},
        }

    def remove(self) -> None:
        """Take the hooks off the model now. Doing it twice is harmless.

        Example:
            >>> SpanScaledCallback().remove()
        """
        self._attachment.end()

    def __enter__(self) -> SpanScaledCallback:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _plain(scales: Scales) -> dict[str, Any] | None:
    if scales is None:
        return None
    scales = {"*": scales} if isinstance(scales, SpanScale) else scales
    return {
        key: None if scale is None else SpanScale.of(scale).fields()
        for key, scale in scales.items()
    }
