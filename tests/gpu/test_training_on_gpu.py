"""Training on a GPU: graphs, streams, capturable optimizers, mixed precision, and no waiting."""

import copy

import pytest
import torch
from models import Decoder, loss_of, tokens

from spanopt import SpanScaledOptimizer
from spanopt.projection import set_formulation
from spanopt.setups import SETUPS

DEVICE = "cuda"
SCALES = {"*": (2.0, 0.5)}
NO_VIOLATION = {"*": (2.0, 0.0)}


def wrapped(model, scales=SCALES, **options):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, **options)
    return SpanScaledOptimizer(optimizer, model, scales)


def decoder(**options):
    torch.manual_seed(0)
    return Decoder(width=64, **options).to(DEVICE)


def run(model, optimizer, batch, steps=3):
    """Take some steps and return the losses, which were not waited for on the way."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(batch), batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_a_model_on_a_gpu_gets_the_gradients_of_the_cpu():
    """The CPU's are tested against the oracle."""
    batch, gradients = tokens(), []
    for device in ("cpu", DEVICE):
        model = decoder().to(device)
        wrapped(model)
        loss_of(model(batch.to(device)), batch.to(device)).backward()
        gradients.append([p.grad.cpu() for p in model.parameters()])
    for on_cpu, on_gpu in zip(*gradients, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scales", [SCALES, NO_VIOLATION], ids=["both", "no violation"])
@pytest.mark.parametrize("setup", sorted(set(SETUPS) - {"feature"}))
def test_cuda_says_that_nothing_waits(setup, scales):
    model = decoder()
    optimizer = SpanScaledOptimizer(
        torch.optim.AdamW(model.parameters()), model, scales, projection=setup
    )
    batch = tokens().to(DEVICE)
    run(model, optimizer, batch, steps=2)  # Triton compiles, and libraries make their handles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(model(batch), batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("formulation", ["auto", "mixed"])
def test_mixed_precision_trains_alike_in_every_formulation(dtype, formulation):
    """The plain one is tested against the oracle, and they are too, by themselves."""
    batch, models = tokens(8, 40).to(DEVICE), []
    for name in ("plain", formulation):
        set_formulation(name)
        model = decoder()
        optimizer = wrapped(model)
        scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16, init_scale=2.0**10)
        with torch.autocast(DEVICE, dtype):
            loss = loss_of(model(batch).float(), batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        models.append({name: p.grad.clone() for name, p in model.named_parameters()})
        scaler.step(optimizer)
        scaler.update()
        assert all(p.isfinite().all() for p in model.parameters())
    for name, plain in models[0].items():
        if not name.endswith("k_proj.bias"):  # whose gradient is zero
            assert (models[1][name] - plain).norm() <= 0.03 * plain.norm(), name


def test_a_loss_scale_that_is_too_large_is_noticed():
    model = decoder()
    optimizer = wrapped(model)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**60, growth_interval=1000)
    batch = tokens().to(DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        loss = loss_of(model(batch).float(), batch)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**60
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_are_those_of_eager_code(mode):
    """``reduce-overhead`` records CUDA graphs and plays them from the third step on."""
    losses = []
    for compiled in (False, True):
        model = decoder()
        optimizer = wrapped(model)
        if compiled:
            model.compile(mode=mode, fullgraph=True)
        losses.append(run(model, optimizer, tokens().to(DEVICE), steps=6))
        optimizer.span_groups[0]["parallel"] = 3.0  # which the recorded graph reads
        losses[-1] = torch.cat([losses[-1], run(model, optimizer, tokens().to(DEVICE), steps=6)])
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scales", [SCALES, NO_VIOLATION], ids=["both", "no violation"])
def test_a_whole_step_is_captured_with_a_capturable_optimizer(scales):
    batch = tokens().to(DEVICE)
    model = decoder()
    expected = run(model, wrapped(model, scales, capturable=True), batch, steps=8)

    model = decoder()
    optimizer = wrapped(model, scales, capturable=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        losses = list(run(model, optimizer, batch, steps=3))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        loss = loss_of(model(batch), batch)
        loss.backward()
        optimizer.step()
    for _ in range(5):
        graph.replay()
        losses.append(loss.clone())
    torch.testing.assert_close(torch.stack(losses), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("formulation", ["auto", "plain"])
def test_side_streams_are_kept_to(formulation):
    set_formulation(formulation)
    batch = tokens(4, 500).to(DEVICE)
    model = decoder()
    expected = run(model, wrapped(model), batch)
    model = decoder()
    optimizer = wrapped(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # work on another stream would not wait for this one
        losses = run(model, optimizer, batch)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_a_model_on_a_second_gpu_is_scaled_there():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    losses = []
    for device in ("cuda:0", "cuda:1"):
        model = decoder().to(device)
        losses.append(run(model, wrapped(model), tokens().to(device)).cpu())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
