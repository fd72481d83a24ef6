"""The identity at the heart of the library.

Rescaling the gradients at the Q and K tensors is the two-sided decomposition of the score gradient
G = dL/dS, pushed through the chain rule dL/dQ = G K / sqrt(d), dL/dK = G^T Q / sqrt(d). Here G is
formed by autograd from real softmax attention, and decomposed by brute force.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracle import FourWay, four_way, projector, rescaled
from torch import Tensor

from spanopt.node import span_node

pytestmark = pytest.mark.oldest

TOLERANCE = 1e-10
HEADS = (2, 3)


class Case(NamedTuple):
    """Shapes of one attention call: N queries, M keys, head dimension d."""

    n: int
    m: int
    d: int
    causal: bool = False
    repeated: bool = False


CASES = {
    "causal": Case(18, 18, 4, causal=True),
    "bidirectional": Case(18, 18, 4),
    "more keys than queries": Case(11, 20, 4),
    "more queries than keys": Case(20, 11, 4),
    "fewer queries than features": Case(3, 14, 6),
    "fewer keys than features": Case(14, 3, 6),
    "one query": Case(1, 9, 4),
    "repeated tokens": Case(18, 18, 4, causal=True, repeated=True),
}


class Attention(NamedTuple):
    """One attention call, and its loss."""

    q: Tensor
    k: Tensor
    v: Tensor
    target: Tensor
    causal: bool

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT / q.shape[-1] ** 0.5

    def loss(self, scores: Tensor) -> Tensor:
        if self.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        return ((scores.softmax(-1) @ self.v - self.target) ** 2).sum()

    def score_gradient(self) -> np.ndarray:
        scores = self.scores(self.q, self.k).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(scores), scores)
        return gradient.numpy()

    def gradients(
        self, query: tuple[float, float], key: tuple[float, float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gradients at Q and K with (parallel, violation) on each side."""
        q, k = self.q.clone().requires_grad_(), self.k.clone().requires_grad_()
        q_seen = span_node(q, *(torch.tensor(x, dtype=torch.float64) for x in query))
        k_seen = span_node(k, *(torch.tensor(x, dtype=torch.float64) for x in key))
        at_q, at_k = torch.autograd.grad(self.loss(self.scores(q_seen, k_seen)), (q, k))
        return at_q.numpy(), at_k.numpy()

    def plain_gradients(self) -> tuple[np.ndarray, np.ndarray]:
        q, k = self.q.clone().requires_grad_(), self.k.clone().requires_grad_()
        at_q, at_k = torch.autograd.grad(self.loss(self.scores(q, k)), (q, k))
        return at_q.numpy(), at_k.numpy()

    def at_q(self, G: np.ndarray) -> np.ndarray:
        """dL/dQ of a score gradient G."""
        return G @ self.k.numpy() / self.k.shape[-1] ** 0.5

    def at_k(self, G: np.ndarray) -> np.ndarray:
        """dL/dK of a score gradient G."""
        return G.swapaxes(-1, -2) @ self.q.numpy() / self.q.shape[-1] ** 0.5

    def parts(self) -> FourWay:
        """The four parts of G, each (batch, heads, N, M)."""
        G, q, k = self.score_gradient(), self.q.numpy(), self.k.numpy()
        parts = [four_way(G[i], q[i], k[i]) for i in np.ndindex(HEADS)]
        return FourWay(*(np.reshape(part, G.shape) for part in zip(*parts, strict=True)))


@pytest.fixture(params=CASES)
def attention(request: pytest.FixtureRequest) -> Attention:
    case = CASES[request.param]
    generator = torch.Generator().manual_seed(0)

    def normal(tokens: int) -> Tensor:
        x = torch.randn(*HEADS, tokens, case.d, dtype=torch.float64, generator=generator)
        return x[..., torch.arange(tokens) % 3, :] if case.repeated else x

    return Attention(normal(case.n), normal(case.m), normal(case.m), normal(case.n), case.causal)


def assert_equal(result: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(result, expected, rtol=0, atol=TOLERANCE)


SCALES = [(2.0, 1.0), (1.0, 0.5), (1.0, 0.0), (0.0, 1.0), (3.0, -1.0)]


def test_the_four_parts_add_up_to_the_score_gradient(attention: Attention) -> None:
    assert_equal(np.sum(attention.parts(), axis=0), attention.score_gradient())


def test_the_four_parts_are_orthogonal_to_each_other(attention: Attention) -> None:
    parts = attention.parts()
    for i, left in enumerate(parts):
        for right in parts[:i]:
            assert_equal((left * right).sum((-1, -2)), np.zeros(HEADS))


def test_the_violation_on_both_sides_reaches_neither_queries_nor_keys(
    attention: Attention,
) -> None:
    order_2 = attention.parts().order_2
    assert_equal(attention.at_q(order_2), np.zeros(attention.q.shape))
    assert_equal(attention.at_k(order_2), np.zeros(attention.k.shape))


def test_each_one_sided_violation_reaches_its_own_side_alone(attention: Attention) -> None:
    parts = attention.parts()
    at_q, at_k = attention.plain_gradients()
    assert_equal(attention.at_q(parts.key_violation), np.zeros(attention.q.shape))
    assert_equal(attention.at_k(parts.query_violation), np.zeros(attention.k.shape))
    assert_equal(attention.at_q(parts.order_0 + parts.query_violation), at_q)
    assert_equal(attention.at_k(parts.order_0 + parts.key_violation), at_k)


@pytest.mark.parametrize(("query", "key"), list(zip(SCALES, SCALES[1:] + SCALES[:1], strict=True)))
def test_nodes_scale_order_0_and_the_violation_of_their_own_side(
    attention: Attention, query: tuple[float, float], key: tuple[float, float]
) -> None:
    parts = attention.parts()
    at_q, at_k = attention.gradients(query, key)
    assert_equal(at_q, attention.at_q(query[0] * parts.order_0 + query[1] * parts.query_violation))
    assert_equal(at_k, attention.at_k(key[0] * parts.order_0 + key[1] * parts.key_violation))


@pytest.mark.parametrize("order_2", [0.0, -7.0])
@pytest.mark.parametrize("scales", SCALES)
def test_equal_scales_on_both_sides_are_one_modified_score_gradient(
    attention: Attention, scales: tuple[float, float], order_2: float
) -> None:
    """G' = a order_0 + b (both order-1 parts) + anything times order 2."""
    a, b = scales
    parts = attention.parts()
    modified = (
        a * parts.order_0 + b * (parts.query_violation + parts.key_violation)
    ) + order_2 * parts.order_2
    at_q, at_k = attention.gradients(scales, scales)
    assert_equal(at_q, attention.at_q(modified))
    assert_equal(at_k, attention.at_k(modified))


@pytest.mark.parametrize(("query", "key"), [(0.5, 3.0), (0.0, 1.0)])
def test_violations_may_differ_between_the_sides_of_one_modified_score_gradient(
    attention: Attention, query: float, key: float
) -> None:
    """The two order-1 parts are separate, so only a shared parallel scale is needed for one G'."""
    parts = attention.parts()
    modified = 2 * parts.order_0 + query * parts.query_violation + key * parts.key_violation
    at_q, at_k = attention.gradients((2.0, query), (2.0, key))
    assert_equal(at_q, attention.at_q(modified))
    assert_equal(at_k, attention.at_k(modified))


def test_different_parallel_scales_have_no_score_gradient_behind_them() -> None:
    """Any G has <Q, dL/dQ> = <K, dL/dK>, both being <S, G>; these two gradients break it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, target = torch.randn(
        4, *HEADS, 18, 4, dtype=torch.float64, generator=generator
    ).unbind()
    attention = Attention(q, k, v, target, causal=True)

    def gap(query: tuple[float, float], key: tuple[float, float]) -> np.ndarray:
        at_q, at_k = attention.gradients(query, key)
        return abs((q.numpy() * at_q).sum((-1, -2)) - (k.numpy() * at_k).sum((-1, -2)))

    assert gap((2.0, 1.0), (2.0, 0.5)).max() < TOLERANCE
    assert gap((2.0, 1.0), (1.0, 1.0)).min() > 1e-3


def test_the_oracle_rescales_the_gradients_as_the_nodes_do(attention: Attention) -> None:
    at_q, at_k = attention.gradients((2.0, 0.5), (3.0, 0.0))
    plain_q, plain_k = attention.plain_gradients()
    assert_equal(at_q, rescaled(plain_q, attention.q.numpy(), 2.0, 0.5))
    assert_equal(at_k, rescaled(plain_k, attention.k.numpy(), 3.0, 0.0))


def test_the_oracle_agrees_with_the_normal_equations() -> None:
    rng = np.random.default_rng(0)
    Q = rng.standard_normal((12, 4))
    assert_equal(projector(Q), Q @ np.linalg.inv(Q.T @ Q) @ Q.T)
    assert_equal(projector(np.zeros((5, 2))), np.zeros((5, 5)))
    assert_equal(projector(np.ones((3, 2))), np.full((3, 3), 1 / 3))


def test_the_oracle_takes_the_span_of_real_tokens_alone() -> None:
    rng = np.random.default_rng(0)
    Q, g = rng.standard_normal((2, 3, 9, 2)), rng.standard_normal((2, 3, 9, 2))
    mask = np.arange(9) < 7
    result = rescaled(g, Q, [2.0, 1.0, 0.0], 0.5, mask)
    for i, a in np.ndenumerate(np.broadcast_to([2.0, 1.0, 0.0], (2, 3))):
        assert_equal(result[i][7:], 0.5 * g[i][7:])
        assert_equal(result[i][:7], rescaled(g[i][:7], Q[i][:7], a, 0.5))
