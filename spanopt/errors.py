"""Errors about layers that were asked for and not scaled. Their messages are built here."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from spanopt.declarations import names
from spanopt.patterns import pattern_for
from spanopt.sites import AttentionSite

__all__ = [
    "BY_HAND",
    "UnscaledLayerError",
    "no_attention_called",
    "not_scaled_since_step",
    "unclear_mask",
    "what_was_seen",
]

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
    missing, scaled = list(missing), list(scaled)
    return UnscaledLayerError(
        f"not scaled: layer{'s' if len(missing) > 1 else ''} {_listed(missing)}; scaled: "
        f"{_listed(scaled)}. {_seen_in(missing)}{_advice(missing, scaled)}. If a layer skips "
        "attention on purpose, pass on_missing='warn' or 'ignore'"
    )


def what_was_seen(site: AttentionSite) -> str:
    """Return what the last forward pass of a layer did instead of attention that can be seen.

    Args:
        site: A layer that has run and is not scaled.

    Returns:
        The rest of a sentence that starts with the name of the layer.

    Example:
        >>> from torch import nn
        >>> what_was_seen(AttentionSite("attn", nn.Identity(), None, lost_at="pad"))
        'multiplied what may be Q and K, and their product was lost ... a softmax: at pad'
    """
    if site.lost_at is not None:
        return (
            "multiplied what may be Q and K, and their product was lost on its way to a softmax: "
            f"at {site.lost_at}"
        )
    if site.takes_softmax:
        return (
            "called no attention that can be seen: it took a softmax of what is no product of Q "
            "and K by matmul, bmm, baddbmm or einsum"
        )
    of_torch = ["scaled_dot_product_attention", "multi_head_attention_forward"]
    registered = [name for name in names() if name not in of_torch]
    return (
        "called no attention that can be seen: neither torch.nn.functional."
        f"{' nor '.join([*of_torch, *registered])}, and it took no softmax"
    )


def not_scaled_since_step(
    missing: Iterable[AttentionSite],
    scaled: Iterable[AttentionSite],
    past: Iterable[tuple[str, str]] = (),
) -> UnscaledLayerError:
    """Return the error about layers that were not scaled since the last optimizer step.

    Args:
        missing: The layers that are not scaled, or not in all that they computed.
        scaled: The layers that are.
        past: Pairs of a layer whose Q and K were seen, by name, and of how its gradients went past
            the hooks nevertheless: ``"lost"``, ``"missed"``, ``"direct"`` or ``"around"``.
    """
    missing, scaled, past = list(missing), list(scaled), list(past)
    never = [site for site in missing if site.query_length is None]
    ran = [site for site in never if site.takes_softmax is not None]
    partly = {name for name, _ in past}
    unseen = [site.name for site in missing if site.name not in partly]
    ways = [
        f"{', '.join(repr(name) for name, kind in past if kind == way)}: {text}"
        f"{_lost_at(missing) if way == 'lost' else ''}. "
        for way, text in _PAST.items()
        if any(kind == way for _, kind in past)
    ]
    if unseen and past:
        ways.append(f"{', '.join(map(repr, unseen))}: ")
    if unseen:
        ways.append("Q and K were not seen in a forward pass with gradients. ")
    return UnscaledLayerError(
        f"not scaled since the last step: layer{'s' if len(missing) > 1 else ''} "
        f"{', '.join(repr(site.name) for site in missing)} (scaled: {_listed(scaled)}). "
        f"{''.join(ways)}{_seen_in(ran)}If a layer was skipped or "
        "is frozen on purpose, pass on_missing='warn' or 'ignore', or scale it with None; if its "
        "forward was called directly, call the module instead; if it checkpoints its attention "
        "with use_reentrant=True, use False, or checkpoint the layer as a whole; if its attention "
        "is in a function with a backward of its own, it can't be seen there. "
        f"{_advice(missing, scaled)}"
    )


_PAST = {
    "lost": (
        "Q and K were seen in a part of its attention only, and those of another part were "
        "multiplied and lost on the way to a softmax"
    ),
    "missed": (
        "Q and K were seen in some of its calls only, and a backward pass went through another "
        "call, as with an attention kernel of its own for some inputs"
    ),
    "direct": "its forward was called directly, past the hooks, beside calls of the module",
    "around": (
        "it got gradients, and no backward pass went through the calls in which Q and K were seen, "
        "as after a forward pass whose result is dropped and one past the hooks"
    ),
}


def _lost_at(sites: list[AttentionSite]) -> str:
    operations = sorted({site.lost_at for site in sites if site.lost_at is not None})
    return f": at {', '.join(operations)}" if operations else ""


def _advice(missing: list[AttentionSite], scaled: list[AttentionSite]) -> str:
    """Return advice about layers. If none took a softmax, it first says to leave them alone."""
    pattern = pattern_for([site.name for site in missing], [site.name for site in scaled])
    alone = f"give it the scale None: scales={{..., {pattern!r}: None}}"
    if any(site.takes_softmax is not False for site in missing):
        return f"{BY_HAND}. If a layer is to be left alone, {alone}"
    return (
        "If such a layer is no softmax attention, but linear attention or a recurrence, "
        f"{alone}. If its attention is in flex_attention or another kernel, that can't be seen "
        f"into. {BY_HAND}"
    )


def _seen_in(sites: list[AttentionSite]) -> str:
    """Return a sentence for each kind of layer about what it did in its last forward pass."""
    kinds: dict[tuple[str, str], int] = {}
    for site in sites:
        kind = site.class_name, what_was_seen(site)
        kinds[kind] = kinds.get(kind, 0) + 1
    return "".join(
        f"{'Each' if count > 1 else 'The'} {class_name} {seen}. "
        for (class_name, seen), count in kinds.items()
    )


def unclear_mask(
    layers: Iterable[str], keys: Tensor | None = None, queries: Tensor | None = None
) -> ValueError:
    """Return the error about attention masks that do not tell which tokens are real.

    Args:
        layers: The names of the layers.
        keys: Where keys are open to any query: boolean, shape ``(B, M)``; ``None`` if not known.
        queries: Where queries see any key: boolean, shape ``(B, N)``; ``None`` if not known.
    """
    layers = list(layers)
    seen = "tokens"
    for side, real in (("keys", keys), ("queries", queries)):
        if real is not None and not bool(real.all()):
            row = int((~real).any(-1).nonzero()[0])
            closed = (~real[row]).nonzero().flatten().tolist()
            some = ", ".join(map(str, closed[:8])) + (", ..." if len(closed) > 8 else "")
            seen = f"{side} {some} of {real.shape[1]} in sequence {row} of {len(real)}"
            break
    return ValueError(
        f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(repr, layers))}: the attention mask "
        f"closes {seen} to all others, and nothing tells whether they are padding or real tokens "
        "that the pattern of attention leaves out. Say which tokens are real: "
        "with spanopt.token_mask(mask): around the forward pass, where mask has the shape "
        "(batch, length) and is true at real tokens; it is all true where there is no padding. "
        "A padding mask (batch, length) that the model is called with as attention_mask, "
        "padding_mask or the like tells too, if it closes the same tokens"
    )


def _listed(sites: Iterable[AttentionSite]) -> str:
    return ", ".join(f"{site.name!r} ({site.class_name})" for site in sites) or "none"
