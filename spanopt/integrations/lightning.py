"""A callback for the ``Trainer`` of Lightning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from spanopt.hooks import SpanHooks
from spanopt.integrations.run import MakeSchedule, Run
from spanopt.plan import ProjectionLike, QKModules, Request, Scales
from spanopt.renaming import renamed
from spanopt.scheduler import SpanScheduler

__all__ = ["SpanScaledCallback"]


class SpanScaledCallback(Callback):
    """Train a ``LightningModule`` on span-scaled attention gradients, without changing its code.

    If you wrote the module, you can instead return a :class:`~spanopt.SpanScaledOptimizer` from
    ``configure_optimizers``. The callback is for modules that others wrote, and for scales that
    follow a schedule, which Lightning itself does not support. Lightning's checkpoints then hold
    scales and schedule. The hooks stay on the module from the start of training to its end, also
    if it ends by an exception. They work in automatic and in manual optimization.

    Args:
        scales: Scales by layer name or pattern, or one :class:`~spanopt.SpanScale` for all layers.
            Layers have their names in the ``LightningModule``.
        schedule: A function of the number of optimizer steps in the run. It returns a schedule, or
            schedules by layer, for a :class:`~spanopt.SpanScheduler`, which steps with the
            optimizer. The number is ``estimated_stepping_batches``, which counts each batch as a
            step in manual optimization.
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
        TypeError: ``schedule`` is not a function. All else is checked when training starts.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from spanopt import linear
        >>> callback = SpanScaledCallback(
        ...     {"*": (2.0, 1.0)}, schedule=lambda steps: linear(steps // 10)
        ... )
        >>> Trainer(max_steps=100, callbacks=[callback]).fit(module, data)  # doctest: +SKIP
    """

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
        request = Request(scales, ridge, on_missing, qk_modules, projection, preserve_norm)
        self._run = Run(request, schedule, example_inputs=example_inputs, parameters=parameters)
        self._loaded: dict[str, Any] | None = None
        self._last: dict[str, Any] = {}
        self._handle: Any = None

    @property
    def hooks(self) -> SpanHooks | None:
        """The :class:`~spanopt.SpanHooks` on the module, while it trains."""
        return self._run.hooks

    @property
    def scheduler(self) -> SpanScheduler | None:
        """The :class:`~spanopt.SpanScheduler`, while it trains and if there is a schedule."""
        return self._run.scheduler

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a checkpoint that was loaded for another run, such as a run of validation.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: The stage that begins.

        Example:
            >>> callback = SpanScaledCallback({"*": (2.0, 1.0)})
            >>> Trainer(callbacks=[callback]).fit(module, data)  # doctest: +SKIP
        """
        self._loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the hooks, and set the scales of the checkpoint from which training resumes.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            TypeError: An argument of the callback is of the wrong type.
            ValueError: No attention layer, a key that matches no layer, a layer that is scaled
                already, or more than one optimizer. Also a checkpoint of other layers, or one of a
                run with a schedule if this callback has none.

        Example:
            >>> callback = SpanScaledCallback({"*": (2.0, 1.0)})
            >>> Trainer(callbacks=[callback]).fit(module, data)  # doctest: +SKIP
        """
        if len(trainer.optimizers) != 1:
            raise ValueError(
                "SpanScaledCallback can't tell which of several optimizers trains which layer, got "
                f"{len(trainer.optimizers)}: wrap each in a SpanScaledOptimizer, with scales for "
                "its layers, in configure_optimizers"
            )
        steps: Any = trainer.estimated_stepping_batches
        self._run.begin(pl_module, steps, self._loaded)
        # The hook counts no steps that a GradScaler skips, and all of several steps in one batch.
        self._handle = trainer.optimizers[0].register_step_post_hook(
            lambda *arguments: self._run.stepped()
        )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check that every layer that was asked for was scaled since the last optimizer step.

        Args:
            trainer: The trainer.
            pl_module: The module.
            optimizer: The optimizer.

        Raises:
            UnscaledLayerError: A layer was not scaled, and ``on_missing`` is ``"error"``.

        Example:
            >>> callback = SpanScaledCallback({"*": (2.0, 1.0)})
            >>> Trainer(callbacks=[callback]).fit(module, data)  # doctest: +SKIP
        """
        self._run.check()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the hooks off the module.

        Args:
            trainer: The trainer.
            pl_module: The module.
            exception: The exception that ends the training.

        Example:
            >>> callback = SpanScaledCallback({"*": (2.0, 1.0)})
            >>> Trainer(callbacks=[callback]).fit(module, data)  # doctest: +SKIP
        """
        self.remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off the module.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: The stage that has ended.

        Example:
            >>> callback = SpanScaledCallback({"*": (2.0, 1.0)})
            >>> Trainer(callbacks=[callback]).fit(module, data)  # doctest: +SKIP
        """
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return scales and schedule for a checkpoint: of this run, or else of the last one.

        Returns:
            Numbers, strings, lists, dicts and ``None`` only.

        Example:
            >>> SpanScaledCallback().state_dict()
            {}
        """
        return self._run.state() or self._last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the scales and the schedule of a checkpoint for the next run.

        Args:
            state_dict: From :meth:`state_dict`.

        Example:
            >>> callback = SpanScaledCallback()
            >>> callback.load_state_dict(callback.state_dict())
        """
        self._loaded = dict(state_dict)

    def remove(self) -> None:
        """Take the hooks off the module now. Calling it twice is harmless.

        Example:
            >>> SpanScaledCallback().remove()
        """
        self._last = self.state_dict()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._run.end()
