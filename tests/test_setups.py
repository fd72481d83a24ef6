"""Each projection setup against its formula by NumPy, with an SVD."""

import numpy as np
import pytest
import torch
from oracle import rescaled

from spanopt.projection import orthonormal, project
from spanopt.setups import SETUPS

SHAPES = [(9, 4), (3, 9, 4), (2, 3, 9, 4), (2, 3, 4, 7)]


def orth(x):
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u[:, s > 1e-9 * max(s.max(initial=0), 1e-300)]


def by_span(g, q, k):
    return orth(q) @ (orth(q).T @ g)


def by_cross(g, q, k):
    return orth(k) @ (orth(k).T @ g)


def by_oblique(g, q, k):
    onto, along = orth(q), orth(k)
    u, c, vt = np.linalg.svd(along.T @ onto)
    weights = np.diag(c / (c**2 + 1 / 256))
    return onto @ (vt.T[:, : len(c)] @ weights @ u[:, : len(c)].T) @ (along.T @ g)


def by_radial(g, q, k):
    sizes = (q**2).sum(1, keepdims=True)
    return np.where(sizes > 0, (g * q).sum(1, keepdims=True) / np.where(sizes > 0, sizes, 1) * q, 0)


def by_feature(g, q, k):
    _, s, vt = np.linalg.svd(k)
    energy = np.cumsum(s**2)
    r = int(np.searchsorted(energy, 0.9 * energy[-1] * (1 - 1e-12))) + 1
    return g @ vt[:r].T @ vt[:r]


ORACLES = {
    "span": by_span,
    "cross": by_cross,
    "oblique": by_oblique,
    "radial": by_radial,
    "feature": by_feature,
}


def per_matrix(oracle, *tensors):
    """Apply an oracle to each matrix of tensors (..., N, d)."""
    flat = [x.reshape(-1, *x.shape[-2:]).numpy() for x in tensors]
    parts = np.stack([oracle(*matrices) for matrices in zip(*flat, strict=True)])
    return torch.as_tensor(parts).reshape(tensors[0].shape)


def inputs(shape):
    return (torch.randn(shape, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_a_setup_equals_its_formula(name, shape):
    g, q, k = inputs(shape)
    actual = SETUPS[name](g, q, k)
    torch.testing.assert_close(actual, per_matrix(ORACLES[name], g, q, k), rtol=1e-9, atol=1e-11)
    single = SETUPS[name](*(x.float() for x in (g, q, k)))
    assert single.dtype == torch.float32
    assert (single - actual).abs().max() < 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_the_pooled_setup_is_one_span_over_the_batch(masked):
    g, q, k = inputs((3, 2, 5, 4))
    mask = torch.rand(3, 1, 5) < 0.7 if masked else None
    actual = SETUPS["pooled"](g, q, k, mask=mask)
    real = torch.ones(3, 1, 5, dtype=torch.bool) if mask is None else mask
    for head in range(2):
        rows, basis = ((x[:, head] * real[:, 0, :, None]).flatten(0, 1).numpy() for x in (g, q))
        expected = torch.as_tensor(by_span(rows, basis, None)).view(3, 5, 4)
        torch.testing.assert_close(actual[:, head], expected, rtol=1e-9, atol=1e-11)
    for shape in ((5, 4), (1, 2, 5, 4)):
        g, q, k = inputs(shape)
        torch.testing.assert_close(SETUPS["pooled"](g, q, k), project(q, g))


@pytest.mark.parametrize("name", SETUPS)
def test_padding_changes_nothing_and_gets_nothing(name):
    g, q, k = inputs((2, 3, 9, 4))
    mask = torch.arange(9) < 6
    mask = mask.expand(2, 1, 9)
    junk = torch.randn(2, 3, 3, 4, dtype=torch.float64) * 100
    padded = [torch.cat([x[..., :6, :], junk], dim=-2) for x in (g, q)]
    # Features are those of the other side, whose padding is cut off by its own mask.
    other = k[..., :6, :] if name == "feature" else torch.cat([k[..., :6, :], junk], dim=-2)
    actual = SETUPS[name](*padded, other, mask=mask)
    alone = SETUPS[name](*(x[..., :6, :] for x in (g, q, k)))
    torch.testing.assert_close(actual[..., :6, :], alone, rtol=1e-9, atol=1e-11)
    assert not actual[..., 6:, :].any()


# The properties that hold for a setup; those of the span hold for all that follow it.
PROJECTORS = ("span", "cross", "radial", "feature", "pooled")
OF_A_SUBSPACE = ("span", "cross", "oblique", "pooled")


@pytest.mark.parametrize("name", SETUPS)
def test_a_setup_is_linear_and_finite_for_degenerate_tensors(name):
    g, q, k = inputs((2, 3, 9, 4))
    other = torch.randn_like(g)
    setup = SETUPS[name]
    together = setup(2 * g - other, q, k)
    torch.testing.assert_close(together, 2 * setup(g, q, k) - setup(other, q, k))
    for basis in (q * 0, torch.cat([q[..., :2], q[..., :2]], -1)):
        for one, two in ((basis, k), (q, basis), (basis, basis)):
            assert torch.isfinite(setup(g, one, two)).all()
    assert not torch.isfinite(setup(g * torch.nan, q, k)).any()


@pytest.mark.parametrize("name", PROJECTORS)
def test_projectors_are_idempotent_symmetric_and_pythagorean(name):
    g, q, k = inputs((2, 3, 9, 4))
    other = torch.randn_like(g)
    setup = SETUPS[name]
    parallel = setup(g, q, k)
    torch.testing.assert_close(setup(parallel, q, k), parallel)
    torch.testing.assert_close((other * parallel).sum(), (setup(other, q, k) * g).sum())
    total = parallel.square().sum() + (g - parallel).square().sum()
    torch.testing.assert_close(total, g.square().sum())


@pytest.mark.parametrize("name", OF_A_SUBSPACE)
def test_what_goes_by_the_column_space_is_the_same_for_any_basis_of_it(name):
    g, q, k = inputs((2, 3, 9, 4))
    mixed = torch.randn(3, 4, 4, dtype=torch.float64)  # one for each head, as pooling asks for
    torch.testing.assert_close(
        SETUPS[name](g, q @ mixed, k @ mixed), SETUPS[name](g, q, k), rtol=1e-6, atol=1e-8
    )


def test_the_oblique_part_is_bounded_and_nearly_the_spans_where_the_spans_agree():
    g, q, k = inputs((4, 9, 4))
    largest = max(
        torch.linalg.vector_norm(SETUPS["oblique"](torch.randn_like(g), q, k))
        / torch.linalg.vector_norm(g)
        for _ in range(50)
    )
    assert 1 < largest < 8
    same = SETUPS["oblique"](g, q, q @ torch.randn(4, 4, dtype=torch.float64))
    torch.testing.assert_close(same, project(q, g) / (1 + 1 / 256), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["cross", "oblique"])
def test_a_setup_that_needs_as_many_keys_as_queries_says_so(name):
    g, q, _ = inputs((2, 9, 4))
    with pytest.raises(ValueError, match=f"'{name}' needs queries and keys of equal number"):
        SETUPS[name](g, q, torch.randn(2, 8, 4))


def test_an_orthonormal_basis_spans_the_same():
    g, q, _ = inputs((2, 9, 4))
    u = orthonormal(q)
    torch.testing.assert_close(u.mT @ u, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    torch.testing.assert_close(u @ (u.mT @ g), project(q, g))
    deficient = torch.cat([q[..., :2], q[..., :2]], -1)
    u = orthonormal(deficient)
    torch.testing.assert_close(u @ (u.mT @ g), project(deficient, g))
    expected = torch.as_tensor(rescaled(g.numpy(), q.numpy(), 1.0, 0.0))
    torch.testing.assert_close(orthonormal(q) @ (orthonormal(q).mT @ g), expected)
