"""Long runs, threads, processes and failures: nothing grows, nothing is left, nothing is mixed up.

A short part of each runs with the other tests, all of it with ``--soak``.
"""

import copy
import gc
import os
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from compare import assert_same_training as assert_same
from compare import snapshot
from forms import ATTENTION
from models import Decoder, Reference, loss_of, tokens
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from spanopt import SpanScale, SpanScaledOptimizer, SpanScheduler
from spanopt.schedules import cosine
from spanopt.taps.calls import live_taps, thread

SCALE = SpanScale(query=(3.0, 0.5), key=(0.5, 2.0))


OF = {f"blocks.{i}.attn": {"query": (3.0, 0.5), "key": (0.5, 2.0)} for i in range(2)}


def live_tensors():
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_over_many_steps_nothing_grows_and_nothing_is_left(options, soak):
    model = Decoder(**options)
    before = snapshot(model)
    gc.collect()
    optimizer = SpanScaledOptimizer(AdamW(model.parameters(), lr=1e-3), model, SCALE)
    scheduler = SpanScheduler(optimizer, cosine(100))
    hooked, taps = snapshot(model), len(live_taps)
    process, batch, marks = psutil.Process(), tokens(), []
    steps = 5000 if soak else 200
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model(batch), batch).backward()
        optimizer.step()
        scheduler.step()
        if step % (steps // 5) == steps // 10:
            marks.append((live_tensors(), process.memory_info().rss))
    tensors, resident = zip(*marks, strict=True)
    assert tensors[-1] <= tensors[1]
    # What the allocator keeps settles in the first part of the run.
    assert resident[-1] - resident[1] < 4e6
    assert snapshot(model) == hooked
    assert len(live_taps) == taps
    assert thread.calls.innermost is None
    assert torch.overrides._get_current_function_mode_stack() == []
    optimizer.detach()
    assert snapshot(model) == before


def test_wrapping_again_and_again_leaves_nothing(soak):
    model, batch = Decoder(), tokens()
    before, marks = snapshot(model), []
    for step in range(500 if soak else 50):
        optimizer = SpanScaledOptimizer(AdamW(model.parameters(), lr=1e-3), model, SCALE)
        loss_of(model(batch), batch).backward()
        optimizer.step()
        if step % 2:
            optimizer.detach()
        del optimizer
        model.zero_grad()
        if step % 10 == 9:
            marks.append((live_tensors(), len(live_taps)))
            assert snapshot(model) == before
    assert len(set(marks[1:])) == 1


def trained(model, of=None, steps=60, **options):
    """Train a model, wrapped, or a reference of it with the oracle's gradients."""
    if of is None:
        optimizer = SpanScaledOptimizer(AdamW(model.parameters(), lr=1e-2), model, SCALE)
    else:
        model = Reference(model, of)
        optimizer = AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randint(11, (3, 9), generator=generator)
        optimizer.zero_grad()
        loss_of(model(batch), batch).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kinds", [("score", "score"), ("score", "packed"), ("softmax", "packed")])
def test_two_models_trained_in_two_threads_end_as_in_one(kinds, soak):
    models = [Decoder(**ATTENTION[kind]) for kind in kinds]
    alone = [trained(copy.deepcopy(model)) for model in models]
    for _ in range(10 if soak else 2):
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(trained, [copy.deepcopy(model) for model in models]))
        for one, other in zip(alone, together, strict=True):
            for x, y in zip(one, other, strict=True):
                assert torch.equal(x, y)


class Text(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        return torch.randint(11, (9,), generator=torch.Generator().manual_seed(i))


def test_workers_of_a_data_loader_change_nothing():
    model = Decoder().double()
    ends = []
    for workers in (0, 2):
        twin = copy.deepcopy(model)
        optimizer = SpanScaledOptimizer(AdamW(twin.parameters(), lr=1e-2), twin, SCALE)
        for _ in range(2):
            for batch in DataLoader(Text(), batch_size=6, num_workers=workers):
                optimizer.zero_grad()
                loss_of(twin(batch), batch).backward()
                optimizer.step()
        ends.append(list(twin.parameters()))
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_trains_a_wrapped_model_on_its_own():
    model = Decoder()
    optimizer = SpanScaledOptimizer(AdamW(model.parameters(), lr=1e-2), model, SCALE)
    reader, writer = os.pipe()
    before = [p.clone() for p in model.parameters()]
    pid = os.fork()
    if pid == 0:  # forward passes only, as autograd's threads don't survive a fork
        logits = model(torch.zeros(1, 9, dtype=torch.long))
        model.blocks[0]["attn"].register_forward_hook(lambda *_: None)
        os.write(writer, b"ok" if torch.isfinite(logits).all() and logits.grad_fn else b"no")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 2) == b"ok"
    assert all(torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))
    assert len(model.blocks[0]["attn"]._forward_hooks) == 1
    assert optimizer.hooks.sites


class Failure(Exception):
    pass


def fail(*args):
    raise Failure


def in_forward(model, optimizer, batch):
    handle = model.blocks[1]["mlp"].register_forward_pre_hook(fail)
    return handle, lambda: model(batch)


def in_the_layer(model, optimizer, batch):
    handle = model.blocks[1]["attn"].k_proj.register_forward_hook(fail)
    return handle, lambda: model(batch)


def in_a_hook_of_the_layer(model, optimizer, batch):
    handle = model.blocks[0]["attn"].register_forward_hook(fail)
    return handle, lambda: model(batch)


def in_a_hook_before_the_layer(model, optimizer, batch):
    handle = model.blocks[0]["attn"].register_forward_pre_hook(fail)
    return handle, lambda: model(batch)


def in_backward(model, optimizer, batch):
    def raising(module, args, output):
        output.register_hook(fail)

    handle = model.blocks[0]["norm"].register_forward_hook(raising)
    return handle, lambda: loss_of(model(batch), batch).backward()


def in_the_step(model, optimizer, batch):
    handle = optimizer.optimizer.register_step_pre_hook(fail)
    loss_of(model(batch), batch).backward()
    return handle, optimizer.step


def in_a_closure(model, optimizer, batch):
    handle = model.register_forward_hook(fail)
    return handle, lambda: optimizer.step(lambda: model(batch))


@pytest.mark.parametrize(
    "where",
    [
        in_forward,
        in_the_layer,
        in_a_hook_of_the_layer,
        in_a_hook_before_the_layer,
        in_backward,
        in_the_step,
        in_a_closure,
    ],
    ids=lambda where: where.__name__,
)
@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_after_an_exception_the_next_steps_are_right(where, options):
    model = Decoder(**options).double()
    if where is in_the_layer and not hasattr(model.blocks[1]["attn"], "k_proj"):
        pytest.skip("nn.MultiheadAttention calls no module")
    expected = trained(copy.deepcopy(model), steps=3)
    optimizer = SpanScaledOptimizer(AdamW(model.parameters(), lr=1e-2), model, SCALE)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        batch = torch.randint(11, (3, 9), generator=generator)
        optimizer.zero_grad()
        handle, fails = where(model, optimizer, batch)
        with pytest.raises(Failure):
            fails()
        handle.remove()
        assert torch.overrides._get_current_function_mode_stack() == []
        optimizer.zero_grad()
        loss_of(model(batch), batch).backward()
        optimizer.step()
    for x, y in zip(expected, model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_long_run_ends_where_it_does_on_the_oracles_gradients(soak):
    model = Decoder().double()
    steps = 200 if soak else 30
    there = copy.deepcopy(model)
    trained(model, steps=steps)
    trained(there, of=OF, steps=steps)
    assert_same(model, Reference(there, OF), 1e-6)
