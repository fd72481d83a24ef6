"""One training run, described so that it can be repeated."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Trial"]


@dataclass(frozen=True)
class Trial:
    """All that decides the outcome of a run, apart from the text and the version of PyTorch.

    Two trials that differ only in how attention's gradients are scaled start from the same weights
    and see the same batches.

    Attributes:
        seed: Of the initial weights and of the batches.
        lr: Peak learning rate of AdamW, or of whatever ``optimizer`` is.
        qk_lr: Factor on that rate for the weights of Q and K alone.
        parallel: Factor of the parallel span.
        violation: Factor of the span violation. With both 1 nothing is wrapped.
        side: ``"both"``, ``"query"`` or ``"key"``: what is scaled.
        where: ``"all"``, ``"first"`` or ``"last"`` layer.
        path: Where the scaled gradient goes on to: ``"both"``, the ``"weights"`` of the query and
            key projections only, or their ``"inputs"`` only. The other gets the plain gradient.
        projection: A setup of ``spanopt.setups``; ``"random"``: a random subspace, a new one each
            time; ``"spectral"``: the span, each direction weighed by its singular value over the
            largest one; or ``"random-input"``: the span of a random projection of the layer's
            input, the same projection throughout, where Q is a trained one.
        preserve_norm: Whether each scaled gradient gets its norm back.
        monitored: Whether the gradients are measured, 30 times in the run; this changes nothing.
        scale_schedule: ``"constant"``, ``"warm-up"`` (from the identity, over the first third),
            ``"decay"`` (to the identity, over the whole run), or ``"early-10"`` for the scales in
            the first 10 per cent of the steps and the identity afterwards.
        clip: Norm to which the gradient is clipped; 0 for no clipping.
        lr_schedule: ``"cosine"`` (after a linear warm-up over a tenth of the steps) or
            ``"constant"``.
        optimizer: A name of ``harness.optimizers``.
        task: A name of ``harness.tasks``.
        model: ``"rotary"`` or ``"learned"``: the decoder's positions.
        steps: Optimizer steps.
        batch: Sequences in a batch.
        length: Tokens in a sequence, N.
        layers: Transformer blocks.
        width: Their width, D.
        heads: Attention heads; d = width / heads.
        ridge: Of the projection; ``None`` for the library's default.
        by_share: Whether the parallel factor of each head is its measured parallel share over the
            share of chance, between 1 and ``parallel``, measured every 25 steps.
        separate: Whether Q, K and V have a matrix each, in place of one for all three.
        text: ``"given"``, or a name of ``harness.texts.OTHER_TEXTS``.
    """

    seed: int = 0
    lr: float = 8e-3
    parallel: float = 1.0
    violation: float = 1.0
    side: str = "both"
    where: str = "all"
    path: str = "both"
    projection: str = "span"
    preserve_norm: bool = False
    monitored: bool = False
    scale_schedule: str = "constant"
    clip: float = 1.0
    lr_schedule: str = "cosine"
    optimizer: str = "AdamW"
    task: str = "characters"
    model: str = "rotary"
    steps: int = 600
    batch: int = 8
    length: int = 128
    layers: int = 2
    width: int = 64
    heads: int = 2
    qk_lr: float = 1.0
    ridge: float | None = None
    by_share: bool = False
    separate: bool = False
    text: str = "given"

    @property
    def scaled(self) -> bool:
        """Whether anything is done to attention's gradients."""
        return (self.parallel, self.violation) != (1.0, 1.0)

    @property
    def in_model(self) -> bool:
        """Whether the model itself rescales the gradients, in place of the wrapper."""
        return self.scaled and (self.path != "both" or self.projection == "random-input")

    @property
    def key(self) -> str:
        """What identifies it among results."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def read(cls, values: dict[str, Any]) -> Trial:
        """Make one of a record, in which settings that did not exist yet have their defaults."""
        return cls(**values)
