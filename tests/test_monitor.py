"""SpanMonitor changes nothing, stops when it should, and leaves compiled code as it was."""

import gc
import sys

import pytest
import torch
from monitored import (
    D,
    H,
    decoder,
    optimizer_of,
    take_step,
    train,
)
from torch import nn

from spanopt import SpanMonitor, SpanScale, SpanScaledOptimizer


@pytest.mark.parametrize("scales", [(2.0, 1.0), (2.0, 2.0), (1.0, 1.0)])
def test_training_is_bit_for_bit_the_same(scales):
    bare, watched = decoder(), decoder()
    train(bare, False, scales={"*": scales})
    train(watched, True, scales={"*": scales})
    for x, y in zip(bare.parameters(), watched.parameters(), strict=True):
        assert torch.equal(x, y)


def test_steps_in_between_are_not_watched():
    model = decoder()
    optimizer = SpanScaledOptimizer(
        torch.optim.AdamW(model.parameters()), model, SpanScale(2.0, 1.0)
    )
    with SpanMonitor(optimizer, every=3, start=30) as monitor:
        watched = []
        for _ in range(7):
            model(torch.randint(11, (2, 12))).square().mean().backward()
            watched.append(all(tap.watcher is not None for tap in optimizer.hooks._taps))
            optimizer.step()
    assert watched == [True, False, False] * 2 + [True]
    assert sorted({row["step"] for row in monitor.rows}) == [30, 33, 36]
    assert all(tap.watcher is None for tap in optimizer.hooks._taps)


def test_a_compiled_model_is_measured_and_not_compiled_again():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = decoder()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = SpanScaledOptimizer(
        torch.optim.AdamW(model.parameters()), model, SpanScale(2.0, 1.0)
    )
    counts = []
    with SpanMonitor(optimizer, every=3) as monitor:
        for _ in range(7):
            compiled(torch.randint(11, (2, 12))).square().mean().backward()
            optimizer.step()
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == 0  # measured, so eager
    assert counts[1] > 0
    assert counts[1:] == [counts[1]] * 6
    assert sorted({row["step"] for row in monitor.rows}) == [0, 3, 6]
    # and what compiles after the monitor is closed does so again
    torch._dynamo.reset()
    compiled(torch.randint(11, (2, 12)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > counts[1]


def test_pandas_has_every_row():
    pytest.importorskip("pandas")
    _, monitor = train(decoder(), True)
    table = monitor.to_pandas()
    assert len(table) == len(monitor.rows)
    share = table.groupby(["layer", "side"]).parallel_share.mean()
    assert ((share > 0) & (share < 1)).all()


@pytest.mark.parametrize("name", ["pandas", "matplotlib"])
def test_a_missing_library_is_named(name, monkeypatch):
    _, monitor = train(decoder(), True)
    for module in [key for key in sys.modules if key.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        monitor.to_pandas() if name == "pandas" else monitor.plot()


def test_a_detached_optimizer_ends_it():
    model = decoder()
    optimizer = SpanScaledOptimizer(
        torch.optim.AdamW(model.parameters()), model, SpanScale(2.0, 1.0)
    )
    stance = torch._dynamo.eval_frame._stance
    monitor = SpanMonitor(optimizer)
    optimizer.detach()
    model(torch.randint(11, (2, 12))).square().mean().backward()
    optimizer.step()
    assert monitor.rows == []
    assert torch._dynamo.eval_frame._stance is stance
    monitor.close()


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_bad_intervals_are_errors(every):
    optimizer, _ = train(decoder(), False, steps=1)
    with pytest.raises(ValueError, match="every must be a whole number above 0"):
        SpanMonitor(optimizer, every)


def test_a_bare_optimizer_is_an_error():
    with pytest.raises(TypeError, match="a SpanScaledOptimizer, got SGD"):
        SpanMonitor(torch.optim.SGD(decoder().parameters()))


def test_layers_that_come_later_are_measured():
    model = nn.ModuleList([nn.TransformerEncoderLayer(D, H, 16, batch_first=True)])
    optimizer = SpanScaledOptimizer(
        torch.optim.AdamW(model.parameters()), model, SpanScale(2.0, 1.0)
    )
    with SpanMonitor(optimizer, every=1) as monitor:
        model.append(nn.TransformerEncoderLayer(D, H, 16, batch_first=True))
        optimizer.add_param_group({"params": list(model[1].parameters())})
        for _ in range(2):
            x = torch.randn(2, 9, D)
            for layer in model:
                x = layer(x)
            x.pow(2).mean().backward()
            optimizer.step()
    assert {row["layer"] for row in monitor.rows} == {"0.self_attn", "1.self_attn"}


@pytest.fixture
def stance():
    """Give the stance of torch.compile, which every test must leave in force."""
    before = torch._dynamo.eval_frame._stance
    yield before
    assert torch._dynamo.eval_frame._stance is before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_monitors_close_in_any_order(order, stance):
    torch._dynamo.reset()
    models = [decoder(0), decoder(1)]
    calls = [torch.compile(model, backend="aot_eager") for model in models]
    optimizers = [optimizer_of(model) for model in models]
    monitors = [SpanMonitor(optimizer, every=1) for optimizer in optimizers]
    for call, optimizer in zip(calls, optimizers, strict=True):
        take_step(call, optimizer)
    monitors[order[0]].close()
    take_step(calls[order[1]], optimizers[order[1]])
    monitors[order[1]].close()
    assert torch._dynamo.eval_frame._stance is stance
    steps = [{row["step"] for row in monitor.rows} for monitor in monitors]
    assert steps[order[0]] == {0}
    assert steps[order[1]] == {0, 1}
    assert not any(row["problem"] for monitor in monitors for row in monitor.rows)


def test_two_monitors_of_one_optimizer_measure_the_same(stance):
    model = decoder()
    optimizer = optimizer_of(model)
    with SpanMonitor(optimizer, every=2) as first, SpanMonitor(optimizer, every=1) as second:
        for _ in range(3):
            take_step(model, optimizer)
    assert first.rows == [row for row in second.rows if row["step"] != 1]
    assert len({row["step"] for row in second.rows}) == 3


@pytest.mark.parametrize("name", ["fail_on_recompile", "eager_on_recompile", "force_eager"])
def test_the_users_stance_is_in_force_again_after_a_measured_step(name, stance):
    model = decoder()
    optimizer = optimizer_of(model)
    with torch.compiler.set_stance(name):
        users = torch._dynamo.eval_frame._stance
        with SpanMonitor(optimizer, every=2) as monitor:
            assert torch._dynamo.eval_frame._stance.stance == "force_eager"
            take_step(model, optimizer)
            assert torch._dynamo.eval_frame._stance is users
            take_step(model, optimizer)
        assert torch._dynamo.eval_frame._stance is users
    assert {row["step"] for row in monitor.rows} == {0}


def test_a_stance_that_is_set_back_after_the_monitor_is_closed_leaves_nothing_eager(stance):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = decoder()
    call = torch.compile(model, backend="aot_eager")
    optimizer = optimizer_of(model)
    monitor = SpanMonitor(optimizer)
    with torch.compiler.set_stance("default"):
        with pytest.warns(UserWarning, match="compiled code ran"):
            take_step(call, optimizer)
        monitor.close()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    take_step(call, optimizer)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    with SpanMonitor(optimizer):
        take_step(call, optimizer)
    torch._dynamo.eval_frame._stance = stance  # the wrapper that set_stance put back is harmless


def test_a_step_in_code_that_is_compiled_in_spite_of_the_monitor_is_noted(stance):
    torch._dynamo.reset()
    model = decoder()
    call = torch.compile(model, backend="aot_eager")
    optimizer = optimizer_of(model)
    take_step(call, optimizer)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with SpanMonitor(optimizer, every=1) as monitor:
        with torch.compiler.set_stance("fail_on_recompile"):
            with pytest.warns(UserWarning, match="compiled code ran"):
                take_step(call, optimizer)
        take_step(call, optimizer)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    first = [row for row in monitor.rows if row["step"] == 0]
    assert [row["layer"] for row in first] == [site.name for site in optimizer.hooks.sites]
    assert all("compiled code ran" in row["problem"] for row in first)
    assert all(row["parallel_share"] for row in monitor.rows if row["step"] == 1)


def test_a_monitor_that_is_dropped_stops(stance, tmp_path):
    model = decoder()
    optimizer = optimizer_of(model)
    monitor = SpanMonitor(optimizer, every=1, path=tmp_path / "run.jsonl")
    take_step(model, optimizer)
    rows = monitor.rows
    del monitor
    gc.collect()
    assert torch._dynamo.eval_frame._stance is stance
    take_step(model, optimizer)
    assert {row["step"] for row in rows} == {0}
    assert not optimizer._optimizer_step_post_hooks
    assert all(tap.watcher is None for tap in optimizer.hooks._taps)


def test_a_monitor_that_is_dropped_before_it_measured_anything_says_so(stance):
    optimizer = optimizer_of(decoder())
    with pytest.warns(UserWarning, match="keep it in a variable"):
        SpanMonitor(optimizer)


def test_a_dropped_optimizer_leaves_nothing_eager(stance):
    optimizer = optimizer_of(decoder())
    monitor = SpanMonitor(optimizer)
    del optimizer
    gc.collect()
    assert torch._dynamo.eval_frame._stance is stance
    monitor.close()


def test_the_repr_says_what_it_does(stance):
    optimizer = optimizer_of(decoder())
    with SpanMonitor(optimizer, every=5) as monitor:
        assert repr(monitor) == "SpanMonitor(of AdamW, every=5, from step 0, 0 rows)"
    assert repr(monitor) == "SpanMonitor(of AdamW, every=5, closed, 0 rows)"
