"""Errors about layers that were asked for and not scaled; each message is built in one place."""

from __future__ import annotations

from collections.abc import Iterable

from spanopt.sites import AttentionSite

__all__ = ["BY_HAND", "UnscaledLayerError", "no_attention_called", "not_scaled_since_step"]

BY_HAND = (
    "To say where Q and K are, pass qk_modules={layer: {'query': ..., 'key': ..., 'num_heads': "
    "...}} with the names of the modules whose outputs they are; or write "
    "q = spanopt.span_node(q, parallel, violation), and the same for k, in the layer's forward, "
    "which then needs no scale here"
)


class UnscaledLayerError(RuntimeError):
    """A layer that was asked for was not scaled: its Q and K were not seen.

    Example:
        >>> import torch, spanopt
        >>> class Linear(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv = torch.nn.Linear(4, 12)
        ...     def forward(self, x):
        ...         q, k, v = self.qkv(x).chunk(3, -1)
        ...         return q @ (k.mT @ v)
        >>> spanopt.attach(Linear(), {"": (2.0, 1.0)}, example_inputs=torch.randn(2, 3, 4))
        Traceback (most recent call last):
        ...
        spanopt.errors.UnscaledLayerError: not scaled: layer '' (Linear); scaled: none. ...
    """


def no_attention_called(
    missing: Iterable[AttentionSite], scaled: Iterable[AttentionSite]
) -> UnscaledLayerError:
    """Return the error about layers that have run and called no attention that can be seen.

    Args:
        missing: The layers that are not scaled.
        scaled: The layers that are.
    """
    missing = list(missing)
    return UnscaledLayerError(
        f"not scaled: layer{'s' if len(missing) > 1 else ''} {_listed(missing)}; scaled: "
        f"{_listed(scaled)}. A layer that is not scaled called no attention that can be seen: "
        "neither torch.nn.functional.scaled_dot_product_attention nor "
        "multi_head_attention_forward, nor a product of Q and K that a softmax is taken of. "
        "flex_attention and other kernels can't be seen into. "
        f"{BY_HAND}. If a layer is to be left alone, give it the scale None; if it skips "
        "attention on purpose, pass on_missing='warn' or 'ignore'"
    )


def not_scaled_since_step(
    missing: Iterable[str], scaled: Iterable[AttentionSite]
) -> UnscaledLayerError:
    """Return the error about layers whose Q and K were not seen since the last optimizer step.

    Args:
        missing: The names of the layers that are not scaled.
        scaled: The layers that are.
    """
    missing = list(missing)
    return UnscaledLayerError(
        f"not scaled since the last step: layer{'s' if len(missing) > 1 else ''} "
        f"{', '.join(map(repr, missing))} (scaled: {_listed(scaled)}). Q and K were not seen "
        "in a forward pass with gradients. If a layer was skipped or is frozen on purpose, "
        "pass on_missing='warn' or 'ignore', or scale it with None; if its forward was called "
        "directly, call the module instead; if it checkpoints its attention with "
        "use_reentrant=True, use False, or checkpoint the layer as a whole; if its attention "
        f"is in a function with a backward of its own, it can't be seen there. {BY_HAND}"
    )


def _listed(sites: Iterable[AttentionSite]) -> str:
    return ", ".join(f"{site.name!r} ({site.class_name})" for site in sites) or "none"
