"""A step's rows: averages over backward passes, and what can't be measured ends no step."""

import math

import pytest
import torch
from monitored import (
    KINDS,
    Attention,
    B,
    D,
    N,
    alike,
    decoder,
    one_step,
)
from torch.utils.checkpoint import checkpoint

from spanopt import SpanMonitor, SpanScale, SpanScaledOptimizer


def parameters_after(step, model, monitored, **options):
    """Return the parameters after a training step, and what was measured."""
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, SpanScale(2.0, 1.0)
    )
    monitor = SpanMonitor(optimizer, every=1, **options) if monitored else None
    step(model, optimizer)
    if monitor is not None:
        monitor.close()
    optimizer.detach()
    return [p.detach().clone() for p in model.parameters()], monitor


def assert_monitor_changes_nothing(build, step, match):
    torch.manual_seed(0)
    bare, _ = parameters_after(step, build(), False)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=match) as caught:
        watched, monitor = parameters_after(step, build(), True)
    assert sum("SpanMonitor" in str(warning.message) for warning in caught) == 1
    for x, y in zip(bare, watched, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    return monitor


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_that_are_not_finite_are_noted_and_training_goes_on(kind, value):
    def step(model, optimizer):
        for batch in (torch.full((2, N, D), value), torch.randn(2, N, D)):
            optimizer.zero_grad()
            model(batch).pow(2).sum().backward()
            optimizer.step()

    monitor = assert_monitor_changes_nothing(KINDS[kind], step, "was not fully measured in step 0")
    assert {row["step"] for row in monitor.rows} == {0, 1}
    assert all("effective_rank is nan" in row["problem"] for row in monitor.rows)
    assert all(row["condition"] is None for row in monitor.rows)


@pytest.mark.parametrize("shape", [(0, N, D), (2, 0, D)], ids=["batch", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_or_sequence_is_noted_and_training_goes_on(kind, shape):
    def step(model, optimizer):
        model(torch.randn(shape)).pow(2).sum().backward()
        optimizer.step()

    monitor = assert_monitor_changes_nothing(KINDS[kind], step, "the batch or the sequence is emp")
    assert [(row["side"], row["head"]) for row in monitor.rows] == [("query", None), ("key", None)]
    assert all("is empty" in row["problem"] for row in monitor.rows)


def test_an_error_while_measuring_is_noted_and_training_goes_on(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory\nand more")

    def step(model, optimizer):
        model(torch.randn(2, N, D)).pow(2).sum().backward()
        optimizer.step()

    monkeypatch.setattr(torch.linalg, "svdvals", fail)
    monitor = assert_monitor_changes_nothing(KINDS["score"], step, "OutOfMemoryError: no memory")
    assert len(monitor.rows) == 2


def test_an_overflowing_step_is_skipped_under_a_grad_scaler_as_without_a_monitor():
    def step(model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for factor in (1.0, math.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(2, N, D)).pow(2).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**9

    monitor = assert_monitor_changes_nothing(KINDS["score"], step, "leaves out 1 of 2 backward")
    assert {row["step"] for row in monitor.rows} == {0, 1}  # the skipped step is none
    assert all(row["parallel_energy"] > 0 for row in monitor.rows)


def test_several_backward_passes_are_averaged_and_a_closure_may_run_often():
    model = decoder().double()
    halves = torch.randint(11, (2, 3, 12))
    measured = []
    for parts in ([0], [1], [0, 1]):
        loss = lambda p=parts: sum(model(halves[i]).square().mean() for i in p)  # noqa: E731
        rows = one_step(model, loss).rows
        measured.append([row["parallel_energy"] for row in rows])
    means = [(a + b) / 2 for a, b in zip(*measured[:2], strict=True)]
    assert measured[2] == pytest.approx(means, rel=1e-9)

    optimizer = SpanScaledOptimizer(
        torch.optim.LBFGS(model.parameters(), max_iter=3), model, SpanScale(2.0, 1.0)
    )

    def closure():
        optimizer.zero_grad()
        loss = model(halves[0]).square().mean()
        loss.backward()
        return loss

    with SpanMonitor(optimizer) as monitor:
        optimizer.step(closure)
    assert len(monitor.rows) == len(measured[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_measured_once(reentrant):
    model = Attention("causal").double()
    x = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    plain = one_step(model, lambda: model(x).pow(2).sum())
    again = lambda: checkpoint(model, x, use_reentrant=reentrant).pow(2).sum()  # noqa: E731
    alike(plain.rows, one_step(model, again).rows)
