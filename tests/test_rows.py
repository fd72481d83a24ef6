"""The file of rows outlives a full disk and a crash in the middle of a line."""

import json
import resource
import signal

import pytest
import torch
from monitored import (
    Attention,
    D,
    H,
    N,
    decoder,
    train,
)
from torch import nn

from spanopt import SpanMonitor, SpanScale, SpanScaledOptimizer


@pytest.fixture
def small_files():
    """Give a function that limits the size of files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_the_file_has_every_row(tmp_path):
    path = tmp_path / "run.jsonl"
    _, monitor = train(decoder(), True, path=path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == monitor.rows
    more = train(decoder(), True, steps=1, path=path)[1].rows
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == monitor.rows + more


def test_a_file_that_cannot_be_written_is_known_before_training(tmp_path):
    model = decoder()
    optimizer = SpanScaledOptimizer(
        torch.optim.AdamW(model.parameters()), model, SpanScale(2.0, 1.0)
    )
    with pytest.raises(OSError, match="nowhere"):
        SpanMonitor(optimizer, path=tmp_path / "nowhere" / "run.jsonl")
    assert all(tap.watcher is None for tap in optimizer.hooks._taps)
    assert not optimizer._optimizer_step_post_hooks


def test_rows_wait_for_a_disk_that_is_full(tmp_path, small_files):
    path = tmp_path / "run.jsonl"
    model = Attention("score")
    optimizer = SpanScaledOptimizer(torch.optim.SGD(model.parameters()), model, {"*": (2.0, 1.0)})
    sizes = []

    def train_on_a_full_disk():
        for limit in (10**6, 4000, 4000, 10**6):
            small_files(limit)
            model(torch.randn(2, N, D)).pow(2).sum().backward()
            optimizer.step()
            sizes.append(path.stat().st_size)

    with SpanMonitor(optimizer, every=1, path=path) as monitor:
        with pytest.warns(UserWarning, match=r"run\.jsonl could not be written to.*wait") as caught:
            train_on_a_full_disk()
    assert len(caught) == 1
    assert 0 < sizes[0] == sizes[1] == sizes[2] < 4000  # nothing half written is left
    assert SpanMonitor.read(path) == monitor.rows
    assert len(monitor.rows) == 4 * 2 * H


def test_rows_that_never_got_to_disk_are_counted():
    model = Attention("score")
    optimizer = SpanScaledOptimizer(torch.optim.SGD(model.parameters()), model, {"*": (2.0, 1.0)})
    monitor = SpanMonitor(optimizer, path="/dev/full")
    model(torch.randn(2, N, D)).pow(2).sum().backward()
    with pytest.warns(UserWarning, match="/dev/full could not be written to: .*No space left"):
        optimizer.step()
    with pytest.warns(UserWarning, match=f"{2 * H} rows could not be written to /dev/full"):
        monitor.close()
    assert len(monitor.rows) == 2 * H


def test_rows_are_strict_json(tmp_path):
    """A Q of rank 1 has no finite condition number, and zero gradients no cosine."""

    def refuse(token):
        raise AssertionError(token)

    model = Attention("score")
    nn.init.ones_(model.q.weight)
    nn.init.zeros_(model.q.bias)
    path = tmp_path / "run.jsonl"
    optimizer = SpanScaledOptimizer(torch.optim.SGD(model.parameters()), model, {"*": (2.0, 1.0)})
    monitor = SpanMonitor(optimizer, path=path)
    (0 * model(torch.zeros(2, N, D))).sum().backward()
    with pytest.warns(UserWarning, match="not fully measured"):
        optimizer.step()
    monitor.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == monitor.rows
    row = monitor.rows[0]
    assert row["cosine"] is row["condition"] is row["parallel_share"] is None
    assert "condition is nan; cosine is nan" in row["problem"]
    assert "the gradient is zero" in row["problem"]


def test_a_torn_line_is_left_out_and_what_follows_starts_a_new_one(tmp_path):
    path = tmp_path / "run.jsonl"
    first = train(decoder(), True, steps=1, path=path)[1].rows
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.warns(UserWarning, match=f"line {len(first)} of .*run.jsonl is no row"):
        assert SpanMonitor.read(path) == first[:-1]
    second = train(decoder(), True, steps=1, path=path)[1].rows
    with pytest.warns(UserWarning, match="is no row"):
        assert SpanMonitor.read(path) == first[:-1] + second
