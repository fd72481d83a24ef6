"""Finding layers that were asked for and not scaled, or not scaled in every call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from spanopt.errors import (
    UnscaledLayerError,
    no_attention_called,
    not_scaled_since_step,
    unclear_mask,
)
from spanopt.taps.calls import thread
from spanopt.taps.module_hooks import no_hook
from spanopt.taps.tap import Tap

__all__ = [
    "CheckCalled",
    "check_called",
    "note_ways_around",
    "unclear_masks",
    "unscaled",
    "unscaled_error",
]


def unscaled(taps: Sequence[Tap]) -> list[Tap]:
    """Return the taps whose layer was not scaled since the last step, or not in every call.

    Args:
        taps: The taps of all scaled layers.
    """
    missing = [tap for tap in taps if tap.account.is_attention() and not tap.account.is_complete()]
    if not missing and not any(tap.account.seen for tap in taps):
        return list(taps)  # nothing was scaled, although any of the layers may be attention
    return missing


def unscaled_error(taps: Sequence[Tap], missing: Sequence[Tap]) -> UnscaledLayerError:
    """Return the error about taps from :func:`unscaled`.

    Args:
        taps: The taps of all scaled layers.
        missing: The taps whose layers were not scaled.
    """
    return not_scaled_since_step(
        [tap.site for tap in missing],
        [tap.site for tap in taps if tap.account.is_complete()],
        [(tap.site.name, way) for tap in taps for way in tap.account.ways_past()],
    )


def note_ways_around(taps: Sequence[Tap], has_come: Callable[[nn.Parameter], bool]) -> None:
    """Note the layers that got gradients, but not through the calls that were seen.

    Args:
        taps: The taps of all scaled layers.
        has_come: Returns whether a parameter has got a gradient since the last step. It is called
            only for layers that no backward pass went through in a call that was seen.
    """
    waiting = [tap for tap in taps if tap.account.waiting and not tap.account.passed]
    if not waiting:
        return
    owners = Counter(p for tap in taps for p in set(tap.site.module.parameters()))
    for tap in waiting:
        parameters = tap.site.query_key_parameters()
        tap.account.around = any(owners[p] == 1 and has_come(p) for p in parameters)


def unclear_masks(taps: Sequence[Tap]) -> ValueError | None:
    """Return the error about attention masks that did not tell which tokens are real, if any.

    This waits for the device, so it should be called once a step.

    Args:
        taps: The taps of all scaled layers.
    """
    deferred = [tap for tap in taps if tap.verdicts.deferred]
    if not deferred:
        return None
    device = deferred[0].verdicts.unclear.device
    unclear = torch.cat([tap.verdicts.unclear.to(device) for tap in deferred]).tolist()
    names = [tap.site.name for tap, count in zip(deferred, unclear, strict=True) if count]
    return unclear_mask(names) if names else None


class CheckCalled:
    """A forward hook on the whole model. It refuses layers that have run without attention."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = taps

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        """Check the layers after a forward pass with gradients."""
        if torch.is_grad_enabled() or thread.probing:
            check_called(self.taps)

    def __reduce__(self) -> tuple[Any, ...]:
        return no_hook, ()


def check_called(taps: Sequence[Tap], only_entered: bool = True) -> None:
    """Refuse layers that have called no attention that can be seen.

    Args:
        taps: The taps of all scaled layers.
        only_entered: Whether to ignore layers that have not run.

    Raises:
        UnscaledLayerError: There is such a layer.
    """
    missing = [
        tap.site
        for tap in taps
        if not tap.account.called
        and tap.account.is_attention()
        and (tap.account.entered or not only_entered)
    ]
    if missing:
        raise no_attention_called(missing, [tap.site for tap in taps if tap.account.called])
