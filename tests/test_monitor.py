"""SpanMonitor measures what the formulas say, changes nothing, and costs nothing in between."""

import gc
import json
import math
import resource
import signal
import sys

import numpy as np
import pytest
import torch
from models import Decoder
from oracle import projector
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spanopt import SpanMonitor, SpanScale, SpanScaledOptimizer, measures, token_mask

B, N, D, H = 3, 11, 16, 4


class Attention(nn.Module):
    """Attention in several spellings, which keeps its Q, K and their gradients on request."""

    def __init__(self, kind, kv_heads=H):
        super().__init__()
        self.kind, self.kv_heads = kind, kv_heads
        self.q = nn.Linear(D, D)
        self.kv = nn.Linear(D, 2 * kv_heads * (D // H))
        self.kept = {}

    def keep(self, name, x):
        if name in self.kept:
            self.kept[name] = x.detach().numpy().copy()
            x.register_hook(lambda g: self.kept.update({f"{name}_grad": g.numpy().copy()}))
        return x

    def forward(self, x, mask=None, padding_mask=None):
        split = lambda y, h: y.unflatten(-1, (h, -1)).transpose(1, 2)  # noqa: E731
        q = split(self.q(x), H)
        k, v = (split(part, self.kv_heads) for part in self.kv(x).chunk(2, -1))
        q, k = self.keep("query", q * 1.0), self.keep("key", k * 1.0)
        if self.kind == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if self.kind == "score":
            return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        scores = q @ k.mT * 0.3
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v


def expected(model, heads, side, scale):
    """Return the measures of each head, in NumPy, from what the unhooked model kept."""
    x, g = model.kept[side], model.kept[f"{side}_grad"]
    rows = []
    for h in range(heads):
        inside = np.stack([projector(x[b, h]) @ g[b, h] for b in range(len(x))])
        outside = g[:, h] - inside
        scaled = scale[0] * inside + scale[1] * outside
        sigma = np.linalg.svd(x[:, h], compute_uv=False)
        p = sigma / sigma.sum(-1, keepdims=True)
        before, after = np.linalg.norm(g[:, h]), np.linalg.norm(scaled)
        energy = (inside**2).sum(), (outside**2).sum()
        rows.append(
            {
                "parallel_energy": energy[0],
                "violation_energy": energy[1],
                "parallel_share": energy[0] / sum(energy),
                "chance_share": x.shape[-1] / x.shape[-2],
                "effective_rank": np.exp(-(p * np.log(p)).sum(-1)).mean(),
                "condition": np.median(sigma[:, 0] / sigma[:, -1]),
                "cosine": (g[:, h] * scaled).sum() / (before * after),
                "norm_before": before,
                "norm_after": after,
            }
        )
    return rows


def entropies(model, causal, scale, mask=None):
    q, k = (torch.from_numpy(model.kept[side]) for side in ("query", "key"))
    scores = q @ k.repeat_interleave(H // k.shape[1], 1).mT * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    w = scores.softmax(-1)
    return -torch.where(w > 0, w * w.log(), 0).sum(-1).mean((0, 2))


def close(rows, expected):
    for row, right in zip(rows, expected, strict=True):
        for name, value in right.items():
            assert row[name] == pytest.approx(value, rel=1e-9), name


def alike(rows, others, rel=1e-8):
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            is_number = isinstance(value, float)
            assert other[name] == (pytest.approx(value, rel=rel) if is_number else value), name


def one_step(model, loss, scales=SpanScale(2.0, 1.0), **options):  # noqa: B008
    optimizer = SpanScaledOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, scales)
    with SpanMonitor(optimizer, **options) as monitor:
        loss().backward()
        optimizer.step()
    optimizer.detach()
    return monitor


@pytest.mark.parametrize("scales", [(3.0, 0.5), (2.0, 2.0), (1.0, 1.0)])
@pytest.mark.parametrize(
    ("kind", "kv_heads"), [("causal", 2), ("score", H), ("by hand", H)], ids=lambda x: str(x)
)
def test_the_measures_are_the_formulas(kind, kv_heads, scales):
    model = Attention(kind, kv_heads).double()
    x = torch.randn(B, N, D, dtype=torch.float64)
    weight = torch.randn(B, H, N, D // H, dtype=torch.float64)
    model.kept = {"query": None, "key": None}
    (model(x) * weight).sum().backward()
    plain = dict(model.kept)
    model.kept = {}
    monitor = one_step(model, lambda: (model(x) * weight).sum(), {"*": scales})
    model.kept = plain
    query, key = monitor.rows[:H], monitor.rows[H:]
    close(query, expected(model, H, "query", scales))
    close(key, expected(model, kv_heads, "key", scales))
    right = entropies(model, kind == "causal", 0.5 if kind == "causal" else 0.3)
    assert [row["entropy"] for row in query] == pytest.approx(right.tolist(), rel=1e-9)
    assert {row["entropy"] for row in key} == {None}
    assert [row["head"] for row in monitor.rows] == [*range(H), *range(kv_heads)]


def packed_and_named(need_weights):
    """Return the same attention as packed and with named projections."""
    packed = nn.MultiheadAttention(D, H, batch_first=True).double()

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.wq, self.wk, self.wv = (nn.Linear(D, D).double() for _ in range(3))
            parts = self.wq, self.wk, self.wv
            for part, weight in zip(parts, packed.in_proj_weight.chunk(3), strict=True):
                part.weight.data.copy_(weight)
                nn.init.zeros_(part.bias)

        def forward(self, x):
            split = lambda y: y.unflatten(-1, (H, -1)).transpose(1, 2)  # noqa: E731
            y = F.scaled_dot_product_attention(*(split(w(x)) for w in (self.wq, self.wk, self.wv)))
            return F.linear(y.transpose(1, 2).flatten(2), packed.out_proj.weight)

    named = Named()
    call = lambda x: packed(x, x, x, need_weights=need_weights)[0]  # noqa: E731
    return packed, call, named


@pytest.mark.parametrize("need_weights", [True, False])
def test_every_tap_measures_the_same(need_weights):
    packed, call, named = packed_and_named(need_weights)
    x = torch.randn(B, N, D, dtype=torch.float64)
    a = one_step(packed, lambda: call(x).pow(2).sum(), {"*": (2.0, 1.0)})
    spec = {"": {"query": "wq", "key": "wk", "num_heads": H}}
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(named.parameters()), named, {"*": (2.0, 1.0)}, qk_modules=spec
    )
    with SpanMonitor(optimizer) as b:
        named(x).pow(2).sum().backward()
        optimizer.step()
    for row in a.rows:  # attention can't be seen where projections are named
        assert (row.pop("entropy") is None) == (row["side"] == "key")
        if need_weights and row["side"] == "query":  # Q is divided by sqrt(d) before the product
            for name, power in {"energy": 1, "norm": 0.5}.items():
                row.update({key: x / (D / H) ** power for key, x in row.items() if name in key})
    assert {row.pop("entropy") for row in b.rows} == {None}
    alike(a.rows, b.rows)


def test_merged_heads_are_one_row():
    class Merged(Attention):
        def forward(self, x):
            q, k, v = (y.flatten(0, 1) for y in torch.randn(1) * 0 + self.parts(x))
            return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)

        def parts(self, x):
            k, v = self.kv(x).chunk(2, -1)
            return torch.stack((self.q(x), k, v)).unflatten(-1, (H, -1)).transpose(2, 3)

    model = Merged("merged")
    monitor = one_step(model, lambda: model(torch.randn(B, N, D)).pow(2).sum())
    assert [(row["side"], row["head"]) for row in monitor.rows] == [("query", None), ("key", None)]
    assert 0 < monitor.rows[0]["entropy"] < math.log(N)


@pytest.mark.parametrize("kind", ["score", "by hand"])
def test_padding_is_left_out(kind):
    model = Attention(kind).double()
    x = torch.randn(1, N, D, dtype=torch.float64)
    padded = torch.cat((x, 9 * torch.randn(1, 5, D, dtype=torch.float64)), 1)
    real = torch.arange(N + 5) < N

    def by_mask():
        return model(padded, real[None, None, None], real[None])[:, :, :N].pow(2).sum()

    def given():
        with token_mask(real[None]):
            return model(padded, real[None, None, None])[:, :, :N].pow(2).sum()

    bare = one_step(model, lambda: model(x).pow(2).sum())
    alike(bare.rows, one_step(model, by_mask).rows)
    alike(bare.rows, one_step(model, given).rows)


def decoder(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Decoder(**kwargs)


def train(model, monitored, steps=5, scales=None, every=2, loss=None, **options):
    optimizer = SpanScaledOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2), model, scales or {"*": (2.0, 1.0)}
    )
    monitor = SpanMonitor(optimizer, every, **options) if monitored else None
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = torch.randint(11, (2, 12), generator=rng)
        model(tokens).square().mean().backward()
        optimizer.step()
    if monitor is not None:
        monitor.close()
    return optimizer, monitor


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


def test_pandas_has_every_row():
    pytest.importorskip("pandas")
    _, monitor = train(decoder(), True)
    table = monitor.to_pandas()
    assert len(table) == len(monitor.rows)
    share = table.groupby(["layer", "side"]).parallel_share.mean()
    assert ((share > 0) & (share < 1)).all()


def test_tensorboard_has_the_mean_over_heads(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        _, monitor = train(decoder(), True, writer=writer)
    reader = events.EventAccumulator(str(tmp_path)).Reload()
    row = monitor.rows[0]
    of_layer = [r for r in monitor.rows if (r["layer"], r["side"]) == (row["layer"], "query")]
    for measure in ("parallel_share", "entropy"):
        logged = reader.Scalars(f"span/{row['layer']}/query/{measure}")
        for event in logged:
            values = [r[measure] for r in of_layer if r["step"] == event.step]
            assert event.value == pytest.approx(sum(values) / len(values), rel=1e-6)
        assert [event.step for event in logged] == [0, 2, 4]
    assert f"span/{row['layer']}/key/entropy" not in reader.Tags()["scalars"]


class Run:
    """Takes what a run of Weights & Biases takes."""

    def __init__(self):
        self.summary, self.metrics = {}, {}

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, data):
        self.summary.update(data)


@pytest.mark.parametrize("real", [False, True])
def test_weights_and_biases_has_the_mean_over_heads(real, tmp_path):
    wandb = pytest.importorskip("wandb") if real else None
    run = wandb.init(mode="offline", dir=tmp_path, settings={"silent": True}) if real else Run()
    _, monitor = train(decoder(), True, run=run)
    summary = dict(run.summary)
    if real:
        run.finish()
    else:
        assert run.metrics == {"span/*": "span/step"}
    layer = monitor.rows[0]["layer"]
    last = [r for r in monitor.rows if (r["layer"], r["side"], r["step"]) == (layer, "key", 4)]
    mean = sum(row["condition"] for row in last) / len(last)
    assert summary[f"span/{layer}/key/condition"] == pytest.approx(mean)
    assert summary["span/step"] == 4


def test_the_picture_is_labelled(tmp_path):
    pytest.importorskip("matplotlib")
    _, monitor = train(decoder(), True)
    figure = monitor.plot(path=tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 10_000
    layers = list(dict.fromkeys(row["layer"] for row in monitor.rows))
    heatmap, lines = figure.axes[:2]
    assert [label.get_text() for label in heatmap.get_yticklabels()] == layers
    assert heatmap.get_images()[0].get_array().shape == (len(layers), 3)
    for i, layer in enumerate(layers):
        rows = [r for r in monitor.rows if (r["layer"], r["side"]) == (layer, "query")]
        shares = [r["parallel_share"] for r in rows if r["step"] == 2]
        assert lines.get_lines()[i].get_ydata()[1] == pytest.approx(np.mean(shares))
    assert lines.get_ylabel() == "parallel share"
    assert lines.get_xlabel() == heatmap.get_xlabel() == "optimizer step"


def test_a_picture_of_nothing_is_an_error():
    model = decoder()
    optimizer = SpanScaledOptimizer(
        torch.optim.AdamW(model.parameters()), model, SpanScale(2.0, 1.0)
    )
    with SpanMonitor(optimizer) as monitor, pytest.raises(ValueError, match="nothing has been"):
        monitor.plot()


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


# --- what can't be measured or written ends no step ----------------------------------------------


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


def packed():
    return nn.TransformerEncoderLayer(D, H, 16, batch_first=True)


KINDS = {
    "score": lambda: Attention("score"),
    "by hand": lambda: Attention("by hand"),
    "packed": packed,
}


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


@pytest.fixture
def small_files():
    """Give a function that limits the size of files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


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


def test_a_writer_or_a_run_that_is_closed_is_named_once():
    class Closed:
        def define_metric(self, *_, **__):
            pass

        def add_scalar(self, *_):
            raise ValueError("I/O operation on closed file")

        log = add_scalar

    with pytest.warns(UserWarning, match="closed file") as caught:
        _, monitor = train(decoder(), True, writer=Closed(), run=Closed())
    assert [str(warning.message).partition(":")[2][:10] for warning in caught] == [
        " writer ta",
        " run takes",
    ]
    assert {row["step"] for row in monitor.rows} == {0, 2, 4}


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


# --- several monitors, compiled code, and its stances --------------------------------------------


@pytest.fixture
def stance():
    """Give the stance of torch.compile, which every test must leave in force."""
    before = torch._dynamo.eval_frame._stance
    yield before
    assert torch._dynamo.eval_frame._stance is before


def optimizer_of(model):
    return SpanScaledOptimizer(torch.optim.AdamW(model.parameters()), model, SpanScale(2.0, 1.0))


def take_step(call, optimizer):
    optimizer.zero_grad()
    call(torch.randint(11, (2, 12))).square().mean().backward()
    optimizer.step()


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


# --- what is shown -------------------------------------------------------------------------------


def test_the_repr_says_what_it_does(stance):
    optimizer = optimizer_of(decoder())
    with SpanMonitor(optimizer, every=5) as monitor:
        assert repr(monitor) == "SpanMonitor(of AdamW, every=5, from step 0, 0 rows)"
    assert repr(monitor) == "SpanMonitor(of AdamW, every=5, closed, 0 rows)"


def test_every_column_can_be_drawn():
    pytest.importorskip("matplotlib")
    _, monitor = train(decoder(), True)
    measured = [name for name in monitor.rows[0] if name not in ("step", "layer", "side", "head")]
    for column in measured[:-1]:
        figure = monitor.plot(column)
        assert figure.axes[1].get_lines()[0].get_ydata()[0] == pytest.approx(
            np.mean([r[column] for r in monitor.rows[:4]])
        )
    with pytest.raises(ValueError, match=r"no column is named 'shares.png'; .* pass path="):
        monitor.plot("shares.png")


def test_rows_with_problems_can_be_drawn_and_put_in_tables():
    pytest.importorskip("matplotlib")
    pandas = pytest.importorskip("pandas")
    _, monitor = train(decoder(), True)
    for row in monitor.rows[: len(monitor.rows) // 3]:
        row.update(dict.fromkeys(measures.MEASURES), problem="made up")
    assert monitor.plot("condition") is not None
    assert pandas.api.types.is_float_dtype(monitor.to_pandas().condition)
