"""Measures of attention scores, against NumPy and against the authors' formulas."""

import math

import numpy as np
import pytest
import torch
from models import Decoder, loss_of, tokens
from monitored import Attention, one_step
from torch import nn

from spanopt import SpanMonitor, SpanScaledOptimizer
from spanopt.sample import means
from spanopt.scores import (
    SCORE_MEASURES,
    lambda_w,
    lambda_x,
    largest_eigenvalue,
    measure_scores,
)
from spanopt.scores_reading import reading_of

K = 3


def by_numpy(scores, real=None):
    """The measures of one head's scores (B, N, M), query by query."""
    width, top, gap, jacobian = [], [], [], []
    counts = np.zeros((scores.shape[0], scores.shape[2]))
    seen, wide = counts.astype(bool), np.zeros(len(scores))
    for b, i in np.ndindex(scores.shape[:2]):
        row = scores[b, i]
        keys = np.flatnonzero(row > -9e3)
        if not len(keys) or (real is not None and not real[b, i]):
            continue
        best = keys[np.argsort(-row[keys])]
        width.append(row[best[0]] - row[best[-1]])
        p = np.exp(row[keys] - row[best[0]])
        p /= p.sum()
        jacobian.append(np.linalg.eigvalsh(np.diag(p) - np.outer(p, p))[-1])
        if len(keys) > K:
            top.append(row[best[0]] - row[best[K - 1]])
            gap.append(row[best[K - 1]] - row[best[K]])
            counts[b, best[:K]] += 1
            seen[b, keys] = True
            wide[b] += 1
    of_keys = counts[seen]
    ds, dh, gap = np.quantile(width, 0.95), np.quantile(top, 0.95), np.quantile(gap, 0.05)
    beta = np.quantile(of_keys, 0.95) / K
    return {
        "dispersion": ds,
        "top_dispersion": dh,
        "separation": gap,
        "unchosen": (of_keys == 0).mean(),
        "popular": np.mean(counts.max(1)[wide > 0] / wide[wide > 0]),
        "sink_ratio": beta,
        "jacobian": np.mean(jacobian),
        "lambda_w": dh / ds + np.log(2 * (1 + 1 / gap)) / ds,
        "lambda_x": dh / ds
        + np.log(ds * (1 + beta) * (1 + 1 / gap) + beta) / ds
        - np.log(ds + 1) / ds,
    }


def sample(length=20):
    torch.manual_seed(0)
    return torch.randn(2, 4, length, length, dtype=torch.float64) * 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [3, 20])
def test_every_measure_is_that_of_numpy_in_chunks_of_any_size(chunk, masked):
    scores, real = sample(), None
    if masked:
        scores = scores.masked_fill(~torch.ones(20, 20).tril().bool(), -math.inf)
        real = torch.ones(2, 1, 20, dtype=torch.bool)
        real[1, 0, 15:] = False
        scores[1, ..., 15:] = -math.inf
    measured = measure_scores(scores.split(chunk, -2), K, real)
    assert tuple(measured) == SCORE_MEASURES
    for head in range(4):
        of_real = None if real is None else real[:, 0].numpy()
        expected = by_numpy(scores[:, head].numpy(), of_real)
        for name, value in expected.items():
            assert measured[name][head].item() == pytest.approx(value, rel=1e-7), name


def test_the_conditions_are_those_of_the_authors_formulas():
    # 75th percentiles of ListOps and Even Pairs in bounds-lhs.py, and what its formulas give.
    for delta, top, gap, beta in ((8.61, 3.51, 0.016, 1), (2.03, 1.03, 0.009, 6)):
        c1, c2, ratio = top / delta, gap / delta, beta / 5
        w = c1 + np.log(2 * (1 + 1 / (delta * c2))) / delta
        x = c1 + np.log(delta * (1 + ratio) * (1 + 1 / (delta * c2)) + ratio) / delta
        x -= np.log(delta + 1) / delta
        numbers = [torch.tensor(value, dtype=torch.float64) for value in (delta, top, gap, ratio)]
        assert lambda_w(*numbers[:3]).item() == pytest.approx(w)
        assert lambda_x(*numbers).item() == pytest.approx(x)


@pytest.mark.parametrize(
    "weights", [[1.0], [0.5, 0.5], [1.0, 0.0, 0.0], [0.7, 0.2, 0.1], [0.25] * 4]
)
def test_the_largest_eigenvalue_is_that_of_the_jacobian(weights):
    p = torch.tensor([weights], dtype=torch.float64)
    expected = torch.linalg.eigvalsh(p[0].diag() - p.T @ p)[-1]
    assert largest_eigenvalue(p).item() == pytest.approx(expected.item(), abs=1e-8)


def test_sequences_of_too_few_keys_are_said_to_be_so():
    measured = measure_scores([sample(3)], K)
    assert measured["separation"].isnan().all()
    assert measured["dispersion"].isfinite().all()


@pytest.mark.parametrize("kind", ["causal", "score", "softmax"])
def test_the_monitor_measures_the_scores_of_each_head_in_every_form(kind):
    torch.manual_seed(0)
    model = Attention(kind).double()
    x = torch.randn(3, 11, 16, dtype=torch.float64)
    for side in ("query", "key"):
        model.kept[side] = None
    monitor = one_step(model, lambda: model(x).pow(2).sum(), scores=True, keys=K)
    q, k = (torch.as_tensor(model.kept[side]) for side in ("query", "key"))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if kind == "causal" else 0.3)
    if kind == "causal":
        scores = scores.masked_fill(~torch.ones(11, 11).tril().bool(), -math.inf)
    for row in monitor.rows:
        if row["side"] == "key":
            assert row["dispersion"] is None
            continue
        expected = by_numpy(scores[:, row["head"]].numpy())
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-6), name
        assert row["problem"] is None


def test_without_scores_rows_are_as_before_and_with_them_only_longer():
    torch.manual_seed(0)
    model, batch = Decoder(), tokens(length=12)

    def loss():
        return loss_of(model(batch), batch)

    plain = one_step(model, loss).rows
    longer = one_step(model, loss, scores=True).rows
    for row, other in zip(plain, longer, strict=True):
        assert not set(SCORE_MEASURES) & set(row)
        assert {name: other[name] for name in row} == row
        assert set(other) == {*row, *SCORE_MEASURES}


def test_tables_dashboards_and_pictures_have_the_measures():
    class Writer:
        def __init__(self):
            self.names = set()

        def add_scalar(self, name, value, step):
            self.names.add(name)

    writer = Writer()
    model, batch = Decoder(), tokens(length=12)
    loss = lambda: loss_of(model(batch), batch)  # noqa: E731
    monitor = one_step(model, loss, scores=True, writer=writer)
    assert {f"span/blocks.0.attn/query/{name}" for name in SCORE_MEASURES} <= writer.names
    assert set(means(monitor.rows)) == writer.names
    assert set(SCORE_MEASURES) <= set(monitor.to_pandas().columns)
    axes = monitor.plot("lambda_w").axes
    assert any("condition on weights" in one.get_ylabel() for one in axes)
    assert "could pay" in monitor.reading() or "not known to pay" in monitor.reading()
    other = one_step(model, loss)
    with pytest.raises(ValueError, match="scores=True"):
        other.reading()
    with pytest.raises(ValueError, match="scores=True"):
        other.plot("lambda_w")


def test_too_few_keys_are_a_problem_in_the_rows():
    model, batch = Decoder(), tokens(length=6)
    with pytest.warns(UserWarning, match="no query sees more than 8 keys"):
        monitor = one_step(model, lambda: loss_of(model(batch), batch), scores=True)
    row = monitor.rows[0]
    assert row["separation"] is None
    assert row["dispersion"] > 0
    assert row["problem"] == "scores: no query sees more than 8 keys"


@pytest.mark.parametrize("keys", [0, True, 2.0])
def test_a_number_of_keys_that_is_none_is_refused(keys):
    model = nn.MultiheadAttention(8, 2)
    optimizer = SpanScaledOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, (2.0, 1.0))
    with pytest.raises(ValueError, match="keys must be a whole number above 0"):
        SpanMonitor(optimizer, scores=True, keys=keys)


def test_the_sentence_names_layers_of_the_last_step():
    def row(step, layer, w, x):
        return {"step": step, "layer": layer, "head": 0, "lambda_w": w, "lambda_x": x}

    rows = [row(0, "a", 2, 2), row(5, "a", 0.5, 0.5), row(5, "b", 0.9, 0.2), row(5, "c", 0.5, 1.5)]
    rows.append({**row(5, "a", None, None), "side": "key"})
    assert reading_of(rows, 8) == (
        "step 5: focus on 8 keys could pay in layers a and b (lambda_w and lambda_x are below 1); "
        "not in layer c"
    )
    assert "not known to pay in any layer" in reading_of(rows[:1], 8)
