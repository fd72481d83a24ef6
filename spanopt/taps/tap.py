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
from spanopt.taps.masks import Read, Verdict
from spanopt.taps.mode import Handler, LayerMode
from spanopt.taps.real import Tokens, real_tokens
from spanopt.taps.refusals import check_heads, refuse, refuse_vmap
from spanopt.taps.telling import Watcher
from spanopt.taps.verdicts import Verdicts

__all__ = ["Handler", "Tap"]


class Tap(LayerMode):
    """Puts nodes on Q and K of one attention layer: its scales, its tokens, and who is told.

    Attributes:
        rescaling: How gradients are rescaled, beside the factors.
        query: How those of the query side are. It is replaced, never changed, when the user edits
            scales: a backward pass under way keeps what its forward pass had.
        key: How those of the key side are.
        verdicts: What the layer's attention masks tell of padding.
        watcher: Who is told of Q, K and their gradients: see :meth:`watching`.
        focus: Which keys the layer's queries keep; ``None`` if all of them.
        held: Set when the scales are moved by a schedule: see :meth:`spanopt.SpanHooks.hold`.
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
                factor is not finite in the dtype of its parameters. The scales are then as they
                were.
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
        """Return who is told of Q, K and their gradients, just now.

        In compiled code it is nobody, as no Python is left there that could tell. There the
        attribute is not read, so that nothing is compiled anew when somebody comes or goes.
        """
        if torch.compiler.is_compiling() or self.watcher is None:
            return None
        call = self.current_call()
        return None if call is not None and call.unmeasured else self.watcher

    def forget_tokens(self) -> None:
        """Forget the tokens and masks of past forward passes, as after an optimizer step."""
        super().forget_tokens()
        self.verdicts.forget()

    def observe(self, query: Tensor, key: Tensor, tap: str) -> None:
        """Note the Q and K of an attention call, before the nodes are put on them.

        Args:
            query: Shape ``(..., H, N, d)``.
            key: Shape ``(..., H', M, d)``.
            tap: Name of the tap that reached them.

        Raises:
            TypeError: A nested, sparse or complex tensor, or one of ``torch.vmap``.
            ValueError: The number of per-head values is not the number of heads.
        """
        self.site.tap = tap
        refuse(self.site, query=query, key=key)
        refuse_vmap(self.site.name, query, key)
        # Without a dimension for them, heads are merged into the batch and can't be told apart.
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
            For the query and the key node. What :func:`spanopt.token_mask` says goes before what
            the attention masks tell.

        Raises:
            ValueError: ``token_mask`` was given a mask of another shape, or the attention mask
                does not tell which tokens are real.
        """
        given = self.given()
        verdict = None
        if given is None or None in given:
            sizes = query.shape[-2], key.shape[-2]
            verdict = self.judged(read, *sizes, self_attention)
        return real_tokens(query, key, verdict, given, self.site.name)

    def judged(self, read: Read, n: int, m: int, self_attention: bool) -> Verdict | None:
        """Tell real tokens by the attention masks.

        Args:
            read: What the masks show.
            n: Number of queries.
            m: Number of keys.
            self_attention: Whether queries and keys are the same tokens.

        Raises:
            ValueError: The masks do not tell, and that can be read at once. In a layer that is
                only measured nothing more is measured then.
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
            ValueError: They are of several documents, and the projection is not the span's.
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
        """Whether a node on one of these will project, which is when real tokens matter."""
        project = self.query.projects() or self.key.projects() or self.watching() is not None
        return project and any(x.requires_grad for x in tensors) and torch.is_grad_enabled()

    def is_idle(self) -> bool:
        """Whether no node is needed."""
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
