"""What every process of test_distributed.py runs, under torchrun: cases by name, one by one.

A case trains a model that is spread over the processes and returns it with what training its twin
gives in one process, where tensor hooks call the NumPy oracle.
"""

import copy
import functools
import json
import os
import sys
import time
import traceback
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import ScoreAttention, loss_of, mha_reference, tokens
from oracle import rescaled
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from spanopt import SpanScale, SpanScaledOptimizer, UnscaledLayerError, attach
from spanopt.node import span_node, uniform_node
from spanopt.tokens import _positions as document_positions

SCALE = SpanScale(query=(2.0, 0.5), key=(3.0, 1.5))
PATIENCE = timedelta(seconds=30)
CASES = {}


class Packed(nn.MultiheadAttention):
    """Causal ``nn.MultiheadAttention`` with the interface of ``ScoreAttention``."""

    def __init__(self, width, heads):
        super().__init__(width, heads, batch_first=True)

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return super().forward(x, x, x, attn_mask=mask, need_weights=False)[0]

    def reference(self, x, **scales):
        future = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
        x = x.transpose(0, 1)
        return mha_reference(self, x, x, x, bias=future, scales=scales).transpose(0, 1)


class ByHand(ScoreAttention):
    """Attention written out."""

    def forward(self, x):
        q, k, v = self.project(x)
        y = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.out_proj(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width, heads, attention):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x, scales=None):
        attend = self.attn
        if scales is not None:
            attend = functools.partial(self.attn.reference, **scales)
        x = x + attend(self.norm(x))
        return x + self.mlp(x)


class Decoder(nn.Module):
    def __init__(self, attention=ScoreAttention, width=16, heads=4):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width, heads, attention) for _ in range(2))
        self.head = nn.Linear(width, 11)

    def forward(self, x, scales=None):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, scales)
        return self.head(x)


def case(*variants):
    """Register a case, or one for each of its variants."""

    def register(function):
        name = function.__name__
        for variant in variants:
            CASES[f"{name}-{variant}"] = functools.partial(function, variant)
        if not variants:
            CASES[name] = function
        return function

    return register


ATTENTION = {"score": ScoreAttention, "packed": Packed}


def made(attention="score", **options):
    """A model, the same on every process, and its twin for the reference."""
    torch.manual_seed(0)
    model = Decoder(ATTENTION.get(attention, attention), **options).double()
    return model, copy.deepcopy(model)


def batches(steps=2, length=9):
    torch.manual_seed(1)
    return [tokens(8, length) for _ in range(steps)]


def mine(batch):
    return batch[dist.get_rank() :: dist.get_world_size()]


def all_of(batch):
    return batch


def sgd(parameters):
    return SGD(parameters, lr=0.3, momentum=0.9)


def adamw(parameters):
    return AdamW(parameters, lr=1e-2)


def train(model, optimizer, given, part=all_of):
    for batch in given:
        optimizer.zero_grad()
        loss_of(model(part(batch)), part(batch)).backward()
        optimizer.step()


def reference(twin, given, make=sgd, scale=SCALE):
    """Train the twin on whole batches, with the oracle's hooks in place of the taps."""
    scales = {"query": scale.side("query"), "key": scale.side("key")}
    train(functools.partial(twin, scales=scales), make(twin.parameters()), given)
    return whole(twin)


def whole(model):
    """Every parameter by name, gathered from all processes."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


# Data parallel: every process has a part of each batch, and the mean of the parts is the whole.


@case("score", "packed")
def ddp(attention):
    model, twin = made(attention)
    model = DistributedDataParallel(model)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    train(model, optimizer, batches(), mine)
    return whole(model.module), reference(twin, batches())


@case()
def ddp_around_a_model_that_was_wrapped_before():
    model, twin = made()
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    train(DistributedDataParallel(model), optimizer, batches(), mine)
    return whole(model), reference(twin, batches())


@case("static_graph", "find_unused_parameters", "gradient_as_bucket_view")
def ddp_with(option):
    model, twin = made()
    model = DistributedDataParallel(model, **{option: True})
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    train(model, optimizer, batches(3), mine)
    return whole(model.module), reference(twin, batches(3))


@case()
def ddp_without_sync_between_micro_batches():
    model, twin = made()
    model = DistributedDataParallel(model)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    for batch in batches():
        optimizer.zero_grad()
        parts = mine(batch).chunk(2)
        for i, part in enumerate(parts):
            with model.no_sync() if i == 0 else nullcontext():
                (loss_of(model(part), part) / len(parts)).backward()
        optimizer.step()
    return whole(model.module), reference(twin, batches())


@case()
def ddp_with_an_optimizer_whose_state_is_sharded():
    model, twin = made()
    model = DistributedDataParallel(model)
    bare = ZeroRedundancyOptimizer(model.parameters(), AdamW, lr=1e-2)
    train(model, SpanScaledOptimizer(bare, model, SCALE), batches(), mine)
    return whole(model.module), reference(twin, batches(), adamw)


# Fully sharded: parameters too are spread over the processes.


def sharded(model, **options):
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


@case("score", "packed")
def fsdp2(attention):
    model, twin = made(attention)
    sharded(model, reshard_after_forward=True)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    train(model, optimizer, batches(), mine)
    return whole(model), reference(twin, batches())


@case("score", "packed")
def fsdp2_that_keeps_parameters_after_forward(attention):
    model, twin = made(attention)
    sharded(model, reshard_after_forward=False)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    train(model, optimizer, batches(), mine)
    return whole(model), reference(twin, batches())


@case()
def fsdp2_of_a_model_that_was_hooked_before():
    model, twin = made()
    attach(model, SCALE)
    sharded(model)
    train(model, sgd(model.parameters()), batches(), mine)
    return whole(model), reference(twin, batches())


@case("score", "packed")
def fsdp2_of_the_attention_layers_themselves(attention):
    model, twin = made(attention)
    for block in model.blocks:
        fully_shard(block.attn)
    fully_shard(model)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    train(model, optimizer, batches(), mine)
    return whole(model), reference(twin, batches())


@case()
def fsdp2_with_micro_batches():
    model, twin = made()
    sharded(model)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    for batch in batches():
        optimizer.zero_grad()
        parts = mine(batch).chunk(2)
        for i, part in enumerate(parts):
            model.set_requires_gradient_sync(i == len(parts) - 1)
            (loss_of(model(part), part) / len(parts)).backward()
        optimizer.step()
    return whole(model), reference(twin, batches())


@case()
def fsdp2_with_a_layer_that_is_skipped_is_an_error_everywhere():
    class Skipping(ScoreAttention):
        def forward(self, x):
            return x if self.skip else super().forward(x)

    model, _ = made(Skipping)
    for i, block in enumerate(model.blocks):
        block.attn.skip = i == 1
    sharded(model)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    before = whole(model)
    with pytest.raises(UnscaledLayerError, match=r"layer 'blocks\.1\.attn'"):
        train(model, optimizer, batches(1), mine)
    return whole(model), before


@case("score", "packed")
def fsdp1(attention):
    model, twin = made(attention)
    model = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    train(model, optimizer, batches(), mine)
    with FullyShardedDataParallel.summon_full_params(model):
        parameters = {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
            for name, p in model.named_parameters()
        }
    return parameters, reference(twin, batches())


@case()
def a_checkpoint_of_all_processes_is_loaded_on_half_of_them():
    directory = Path(sys.argv[1], "checkpoint")
    model, twin = made()
    expected = reference(twin, batches(3), adamw)
    sharded(model)
    optimizer = SpanScaledOptimizer(adamw(model.parameters()), model, SCALE)
    train(model, optimizer, batches(3)[:2], mine)
    dcp.save(parts_of(model, optimizer), checkpoint_id=directory)
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    dist.destroy_process_group()
    if rank >= half:
        return expected, expected
    join("half", rank, half)
    torch.manual_seed(3)
    model = sharded(Decoder().double())
    optimizer = SpanScaledOptimizer(adamw(model.parameters()), model, SpanScale(2.0, 1.0))
    state = parts_of(model, optimizer)
    dcp.load(state, checkpoint_id=directory)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert all(group.scale.side("key") == (3.0, 1.5) for group in optimizer.span_groups)
    train(model, optimizer, batches(3)[2:], mine)
    return whole(model), expected


def parts_of(model, optimizer):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "spans": optimizer.hooks,
    }


# Tensor parallel: every process has some of the heads.


def split_by_heads(model, mesh, **colwise):
    for block in model.blocks:
        columns = {f"attn.{name}_proj": ColwiseParallel(**colwise) for name in "qkv"}
        parallelize_module(
            block,
            mesh,
            {
                **columns,
                "attn.out_proj": RowwiseParallel(),
                "mlp.0": ColwiseParallel(),
                "mlp.2": RowwiseParallel(),
            },
        )
        if colwise.get("use_local_output", True):
            block.attn.heads //= mesh.size()
            block.attn.kv_heads //= mesh.size()
    return model


@case()
def tensor_parallel():
    model, twin = made()
    split_by_heads(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    train(model, optimizer, batches())
    return whole(model), reference(twin, batches())


@case()
def tensor_parallel_with_sequences_spread_between_the_attention_layers():
    model, twin = made()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    gathered = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        "blocks.*.norm": SequenceParallel(),
        "blocks.*.attn": gathered,
        **{f"blocks.*.attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "blocks.*.attn.out_proj": RowwiseParallel(output_layouts=Shard(1)),
        "blocks.*.mlp": gathered,
        "blocks.*.mlp.0": ColwiseParallel(),
        "blocks.*.mlp.2": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(model, mesh, plan)
    for block in model.blocks:
        block.attn.heads //= mesh.size()
        block.attn.kv_heads //= mesh.size()
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    train(model, optimizer, batches(length=8))
    return whole(model), reference(twin, batches(length=8))


@case()
def tensor_parallel_and_fsdp2():
    """Two by two: heads along one dimension of the mesh, batches and parameters along the other."""
    size = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (size, 2), mesh_dim_names=("data", "heads"))
    model, twin = made()
    split_by_heads(model, mesh["heads"])
    sharded(model, mesh=mesh["data"])
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    row = mesh["data"].get_local_rank()
    train(model, optimizer, batches(), lambda batch: batch[row::size])
    return whole(model), reference(twin, batches())


@case()
def tensor_parallel_with_values_for_all_heads_is_an_error():
    model, _ = made()
    split_by_heads(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    before = whole(model)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SpanScale([1.0, 2.0, 3.0, 4.0]))
    local = 4 // dist.get_world_size()
    message = rf"layer 'blocks\.0\.attn': 4 per-head values on the query side.*has {local} heads"
    with pytest.raises(ValueError, match=message):
        train(model, optimizer, batches(1))
    return whole(model), before


# Q and K that are DTensors.


# No kernel of a CPU takes a DTensor but this one, and not with is_causal.
Full = functools.partial(ScoreAttention, causal=False)
by_hand = functools.partial(sdpa_kernel, SDPBackend.MATH)


@case("one value", "values for all heads")
def dtensors_spread_over_heads(scale):
    model, twin = made(Full)
    scale = SCALE if scale == "one value" else SpanScale([1.0, 2.0, 3.0, 4.0], [0.5, 0.0, 1.0, 2.0])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split_by_heads(model, mesh, use_local_output=False)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, scale)
    with by_hand():
        train(model, optimizer, batches())
    return whole(model), reference(twin, batches(), scale=scale)


LAYOUTS = {
    "batch": [Shard(0)],
    "sequence": [Shard(1)],  # on four processes the last one has no token
    "nothing": [Replicate()],
}


@case(*LAYOUTS)
def dtensors_spread_over(what):
    model, twin = made(Full)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    distribute_module(model, mesh)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    with by_hand():
        for batch in batches():
            optimizer.zero_grad()
            logits = model(distribute_tensor(batch, mesh, LAYOUTS[what]))
            loss_of(logits.full_tensor(), batch).backward()
            optimizer.step()
    return whole(model), reference(twin, batches())


def on_padded_documents(x, grad, parallel, violation, mask=None, documents=None):
    """The oracle's rescaled gradient, document by document where there are several."""
    if documents is None:
        return rescaled(grad, x, parallel, violation, mask)
    result = rescaled(grad, x, 0.0, violation, np.zeros(x.shape[:-1], dtype=bool))
    for number in range(1, int(documents.max()) + 1):
        of_it = (documents == number)[:, None].expand(x.shape[:-1]).numpy()
        part = rescaled(grad, x, parallel, violation, of_it)
        result[of_it] = part[of_it]
    return result


NODES = {
    "batch": [Shard(0)],
    "heads": [Shard(1)],
    "tokens": [Shard(2)],
    "features": [Shard(3)],
    "summands": [Partial()],
    "heads twice": [Shard(1), Shard(1)],
    "batch and heads": [Shard(0), Shard(1)],
    "heads and tokens": [Shard(1), Shard(2)],
    "tokens and heads": [Shard(2), Shard(1)],
}


@case(*NODES)
def a_node_on(what):
    layout, size = NODES[what], dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2) if len(layout) == 2 else (size,))
    torch.manual_seed(2)
    x, grad = torch.randn(2, 3, 5, 7, 2, dtype=torch.float64)
    padding = torch.rand(3, 1, 7) < 0.7
    documents = torch.randint(3, (3, 7))
    by_head = (torch.arange(5.0), 1.0 - torch.arange(5.0))
    positions = document_positions(documents, 2)
    actual, expected = {}, {}

    def spread():
        if layout[0].is_partial():
            return DTensor.from_local(x / size, mesh, layout).detach().requires_grad_()
        return distribute_tensor(x, mesh, layout).detach().requires_grad_()

    def compare(name, node, result):
        leaf = spread()
        y = node(leaf * 1)
        (y.full_tensor() * grad).sum().backward()
        actual[name], expected[name] = leaf.grad.full_tensor(), torch.as_tensor(result)
        actual[f"{name}, forward"], expected[f"{name}, forward"] = y.full_tensor().detach(), x

    compare("numbers", lambda x: span_node(x, 2.0, 0.5), rescaled(grad, x, 2.0, 0.5))
    # Each process has numbers of another magnitude, whose squares leave the range of the dtype.
    x, ordinary = x * torch.where(torch.arange(7.0) < 3, 1e-170, 1e-172)[:, None].double(), x
    compare(
        "tiny numbers",
        lambda x: span_node(x, 2.0, 0.5),
        rescaled(grad, x * 1e170, 2.0, 0.5),
    )
    x = ordinary
    for name, mask in {"plain": padding, "spread": distribute_tensor(padding, mesh)}.items():
        compare(
            f"a {name} mask and values by head",
            functools.partial(span_node, parallel=by_head[0], violation=by_head[1], mask=mask),
            rescaled(grad, x, *by_head, padding),
        )
    compare(
        "documents",
        lambda x: span_node(x, 2.0, 0.5, documents=positions),
        on_padded_documents(x, grad, 2.0, 0.5, documents=documents),
    )
    compare(
        "equal values by head",
        lambda x: uniform_node(x, by_head[0]),
        rescaled(grad, x, by_head[0], by_head[0]),
    )
    for of, leaf in (actual, spread()), (expected, x.clone().requires_grad_()):
        y = span_node(leaf * 1, 2.0, 0.5)
        (first,) = torch.autograd.grad(summed(y.sin()), leaf, create_graph=True)
        summed(first.sin()).backward()
        of["a penalty"] = leaf.grad.full_tensor() if of is actual else leaf.grad
    return actual, expected


def summed(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).sum()


@case("tokens")
def a_compiled_node_on(what):
    torch.compiler.reset()  # automatically dynamic shapes are none that a DTensor may have
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(2)
    x, grad = torch.randn(2, 3, 5, 7, 2, dtype=torch.float64)
    leaf = distribute_tensor(x, mesh, NODES[what]).detach().requires_grad_()
    node = torch.compile(lambda x: span_node(x * 1, 2.0, 0.5), backend="aot_eager", fullgraph=True)
    (node(leaf).full_tensor() * grad).sum().backward()
    expected = torch.as_tensor(rescaled(grad, x, 2.0, 0.5))
    return {"gradient": leaf.grad.full_tensor()}, {"gradient": expected}


# Context parallel: scaled_dot_product_attention takes the local part of each sequence and makes
# DTensors of them, so that the forward pass is that of the whole sequences.


@case()
def context_parallel_attention():
    model, twin = made(Full)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = DistributedDataParallel(model)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    for batch in batches(length=8):
        part = batch.clone()
        optimizer.zero_grad()
        with by_hand(), context_parallel(mesh, buffers=[part], buffer_seq_dims=[1]):
            loss_of(model(part), part).backward()
        optimizer.step()
    return whole(model.module), reference(twin, batches(length=8))


@case("packed", "softmax")
def context_parallel_attention_that_would_stay_local_is_an_error(attention):
    model, _ = made({"packed": Packed, "softmax": ByHand}[attention])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    before = whole(model)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    (batch,) = batches(1, length=8)
    message = r"layer 'blocks\.0\.attn'.*sequence is sharded.*context_parallel"
    with context_parallel(mesh, buffers=[batch], buffer_seq_dims=[1]):
        with pytest.raises(TypeError, match=message):
            model(batch)
    optimizer.detach()
    return whole(model), before


# Where Q and K can't be told, it is an error.


@case()
def a_dtensor_in_attention_by_hand_is_an_error():
    model, _ = made(ByHand)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split_by_heads(model, mesh, use_local_output=False)
    before = whole(model)
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE)
    with pytest.raises(TypeError, match=r"layer 'blocks\.0\.attn': query is a DTensor.*to_local"):
        train(model, optimizer, batches(1))
    return whole(model), before


@case("local", "dtensor")
def a_named_projection_that_is_split_is_an_error(output):
    model, _ = made()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split_by_heads(model, mesh, use_local_output=output == "local")
    before = whole(model)
    named = {"blocks.*.attn": {"query": "q_proj", "key": "k_proj", "num_heads": 4}}
    optimizer = SpanScaledOptimizer(sgd(model.parameters()), model, SCALE, qk_modules=named)
    message = {
        "local": rf"layer 'blocks\.0\.attn': 'q_proj' returns {16 // mesh.size()} of its 16",
        "dtensor": r"layer 'blocks\.0\.attn': q_proj is a DTensor",
    }
    with pytest.raises(TypeError, match=message[output]):
        train(model, optimizer, batches(1))
    return whole(model), before


@functools.cache
def store():
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*address, is_master=False, timeout=PATIENCE)


def join(name, rank, size):
    """Join a default group of this name, so that what fails in one leaves the next in step."""
    own = dist.PrefixStore(name, store())
    dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=PATIENCE)


def run(names, directory):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    for name in names:
        start = time.perf_counter()
        try:
            join(name, rank, world)
            actual, expected = CASES[name]()
            assert actual.keys() == expected.keys(), (actual.keys(), expected.keys())
            errors = [float((actual[key] - expected[key]).abs().max()) for key in expected]
            results[name] = {"error": max(errors)}
        except Exception:
            results[name] = {"trace": traceback.format_exc()}
        results[name]["seconds"] = time.perf_counter() - start
        (directory / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
        if store().add(f"{name} done", 1) == world:
            store().set(f"{name} done by all", "")
        store().wait([f"{name} done by all"], 2 * PATIENCE)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run(sys.argv[2:] or list(CASES), Path(sys.argv[1]))
