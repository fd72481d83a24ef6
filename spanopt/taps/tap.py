"""The tap of one attention layer: what the nodes on its Q and K are made with."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from spanopt.rescaling import Rescaling
from spanopt.scale import SpanScale
from spanopt.setups import SPAN
from spanopt.sites import AttentionSite
from spanopt.taps.calls import GivenTokens
from spanopt.taps.focusing import Focusing, focusing_of
from spanopt.taps.judging import Verdict
from spanopt.taps.masks import Read
from spanopt.taps.mode import Handler, LayerMode
from spanopt.taps.real import Tokens, real_tokens
from spanopt.taps.refusals import check_heads, refuse, refuse_vmap
from spanopt.taps.telling import Watcher
from spanopt.taps.verdicts import Verdicts

__all__ = ["Handler", "Tap"]


class Tap(LayerMode):
    """Holds what the nodes of one attention layer need: its scales, its tokens and its watcher.

    Attributes:
        rescaling: How gradients are rescaled, without the factors.
        query: How the gradient of Q is rescaled. When the user edits scales, this object is
            replaced and never changed, so a backward pass keeps what its forward pass had.
        key: How the gradient of K is rescaled. It is replaced in the same way.
        verdicts: What the layer's attention masks tell about padding.
        watcher: The object that is told of Q, K and their gradients: see :meth:`watching`.
        focus: The choice of keys that the layer's queries keep; ``None`` if they keep all.
        held: Whether a schedule moves the scales: see :meth:`spanopt.SpanHooks.hold`.
    """

    query: Rescaling
    key: Rescaling

    def __init__(
        self,
        site: AttentionSite,
        scale: SpanScale,
        rescaling: Rescaling,
        handlers: Mapping[str, Handler],
    ) -> None:
        super().__init__(site, handlers)
        self.rescaling = rescaling
        self.watcher: Watcher | None = None
        self.focus: Focusing | None = focusing_of.get(site.module)
        self.held = False
        self.verdicts: Verdicts = Verdicts(site.name)
        self.set_scale(scale)

    def set_scale(self, scale: SpanScale) -> None:
        """Take other scales, from the next forward pass on.

        Args:
            scale: The scales.

        Raises:
            ValueError: The number of per-head values is not the layer's number of heads, or a
                factor is not finite in the dtype of its parameters. The scales are then left
                unchanged.
        """
        first = next(self.site.module.parameters(), None)
        dtype = None if first is None else first.dtype
        device = torch.device("cpu") if first is None or first.is_meta else first.device
        self.verdicts.count_on(device)
        query, key = (
            self.rescaling.with_numbers(scale.side(side), device, held=self.held)
            for side in ("query", "key")
        )
        if self.site.heads is not None:
            check_heads(self.site.name, "query", query.factors, self.site.heads)
            check_heads(self.site.name, "key", key.factors, self.site.kv_heads)
        for side, rescaling in (("query", query), ("key", key)):
            rescaling.check_range(dtype, f"layer {self.site.name!r}, {side} side")
        self.query, self.key = query, key

    def watching(self) -> Watcher | None:
        """Return the watcher to tell of Q, K and their gradients now, if there is one.

        Compiled code tells nobody, since no Python runs in it. It does not read the attribute
        either, so that nothing is recompiled when a watcher comes or goes.
        """
        if torch.compiler.is_compiling() or self.watcher is None:
            return None
        call = self.current_call()
        return None if call is not None and call.unmeasured else self.watcher

    def forget_tokens(self) -> None:
        """Forget the tokens and masks of past forward passes, say after an optimizer step."""
        super().forget_tokens()
        self.verdicts.forget()

    def observe(self, query: Tensor, key: Tensor, tap: str) -> None:
        """Note the Q and K of an attention call, before the nodes are put on them.

        Args:
            query: Shape ``(..., H, N, d)``.
            key: Shape ``(..., H', M, d)``.
            tap: Name of the tap that reached them.

        Raises:
            TypeError: A tensor is nested, sparse or complex, or is batched by ``torch.vmap``.
            ValueError: The number of per-head values is not the number of heads.
        """
        self.site.tap = tap
        refuse(self.site, query=query, key=key)
        refuse_vmap(self.site.name, query, key)
        # In 3 dimensions, heads are merged into the batch and cannot be told apart.
        heads, kv_heads = (math.prod(x.shape[1:-2]) if x.ndim > 3 else 0 for x in (query, key))
        self.mark(
            tap,
            heads,
            kv_heads,
            query.shape[-1],
            (query.shape[-2], key.shape[-2]),
        )

    def tokens(
        self, query: Tensor, key: Tensor, read: Read, self_attention: bool
    ) -> tuple[Tokens, Tokens]:
        """Return the real tokens of Q and K, as their nodes take them.

        Args:
            query: Shape ``(..., N, d)``.
            key: Shape ``(..., M, d)``.
            read: What the attention masks show.
            self_attention: Whether queries and keys are the same tokens.

        Returns:
            The tokens for the query's node and for the key's. What :func:`spanopt.token_mask`
            says takes precedence over the attention masks.

        Raises:
            ValueError: ``token_mask`` was given a mask of another shape, or the attention mask
                does not tell which tokens are real.
        """
        given = self.given()
        if given is None and not read:
            return Tokens(), Tokens()
        verdict = None
        if given is None or None in given:
            sizes = query.shape[-2], key.shape[-2]
            verdict = self.judged(read, *sizes, self_attention)
        return real_tokens(query, key, verdict, given, self.site.name)

    def judged(self, read: Read, n: int, m: int, self_attention: bool) -> Verdict | None:
        """Find the real tokens from the attention masks.

        Args:
            read: What the masks show.
            n: Number of queries.
            m: Number of keys.
            self_attention: Whether queries and keys are the same tokens.

        Raises:
            ValueError: The masks do not tell which tokens are real, and this can be read
                without waiting for a device. A layer that is only measured raises nothing; the
                rest of its call is not measured.
        """
        verdict = self.verdicts.judged(read, n, m, self_attention)
        if verdict is None:
            return None
        if self.query.projects() or self.key.projects():
            self.verdicts.refuse_unclear(verdict)
            return verdict
        watcher = self.watching()
        if watcher is not None:
            self.verdicts.leave_unmeasured(verdict, self.current_call(), watcher)
        return verdict

    def given(self) -> GivenTokens:
        """Return the tokens of queries and keys that :func:`spanopt.token_mask` gives.

        Raises:
            ValueError: They tell several documents apart, and the setup is not ``"span"``.
        """
        call = self.current_call()
        given = None if call is None else call.given
        if given is None or self.rescaling.setup is SPAN:
            return given
        if any(tokens is not None and tokens.documents is not None for tokens in given):
            raise ValueError(
                f"layer {self.site.name!r}: token_mask gives several documents, which only "
                f"projection='span' takes apart, not {self.rescaling.setup.name!r}"
            )
        return given

    def projects(self, *tensors: Tensor) -> bool:
        """Return whether a node on one of these needs the real tokens, to project or to measure."""
        project = self.query.projects() or self.key.projects() or self.watching() is not None
        return project and any(x.requires_grad for x in tensors) and torch.is_grad_enabled()

    def is_idle(self) -> bool:
        """Return whether the layer needs no node."""
        return self.query.mode == self.key.mode == "identity" and self.watching() is None

    def mark(
        self,
        tap: str,
        heads: int,
        kv_heads: int,
        head_dim: int,
        lengths: tuple[int, int],
    ) -> None:
        """Note that an attention call was made.

        Args:
            tap: Name of the tap that saw it.
            heads: Number of query heads.
            kv_heads: Number of key heads.
            head_dim: Size d of a head.
            lengths: Number of queries and of keys.

        Raises:
            ValueError: The number of per-head values is not the number of heads.
        """
        check_heads(self.site.name, "query", self.query.factors, heads)
        check_heads(self.site.name, "key", self.key.factors, kv_heads)
        self.account.called = True
        site = self.site
        site.tap = tap
        site.heads, site.kv_heads, site.head_dim = heads or 1, kv_heads or 1, head_dim
        site.query_length, site.key_length = lengths
        if torch.is_grad_enabled():
            self.account.seen = True
            call = self.current_call()
            if call is not None:
                call.seen = True
