"""What attention masks tell of padding: right, or refused; never a guess."""

import copy
import math
import pickle
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import (
    PATTERNS,
    Sample,
    causal,
    closed,
    documents,
    everything,
    full,
    left,
    prefix,
    random_keys,
    right,
    shared,
    sliding,
    strictly_causal,
    top_k,
    window,
)
from models import gradients
from oracle import rescaled
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from spanopt import SpanMonitor, SpanScale, SpanScaledOptimizer, attach, token_mask
from spanopt.mathematics import spans
from spanopt.taps import judging, once, verdicts
from spanopt.taps import masks as rule

pytestmark = pytest.mark.filterwarnings("ignore:.*mismatched key_padding_mask and attn_mask.*")

LENGTH, LENGTHS, WIDTH, HEADS = 10, (9, 6, 7), 6, 2
SCALES = {"query": (2.0, 0.5), "key": (3.0, 1.0)}
SCALE = SpanScale(*SCALES["query"], key=SCALES["key"])


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask)


def by_hand(q, k, v, mask):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -1e9)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    """Attention with one head dimension, (B, H, N, d), by one of the functions above."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def heads(self, x):
        return [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)]

    def forward(self, x, allowed):
        return self.attend(*self.heads(x), allowed).transpose(1, 2).flatten(-2)


class Packed(nn.MultiheadAttention):
    def __init__(self, need_weights=False):
        super().__init__(WIDTH, HEADS, batch_first=True)
        nn.init.normal_(self.in_proj_bias)
        self.need_weights = need_weights

    def heads(self, x):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in qkv]

    def forward(self, x, allowed):
        n = x.shape[1]
        if allowed is None:
            return super().forward(x, x, x, need_weights=self.need_weights)[0]
        allowed = allowed.expand(len(x), HEADS, n, n).flatten(0, 1)
        mask = ~allowed if allowed.dtype == torch.bool else allowed
        return super().forward(x, x, x, need_weights=self.need_weights, attn_mask=mask)[0]


class Model(nn.Module):
    """Takes a padding mask that only its own code uses, as the models of libraries do."""

    def __init__(self, layer):
        super().__init__()
        self.attn = layer

    def forward(self, x, allowed, attention_mask=None):
        return self.attn(x, allowed)

    def reference(self, x, allowed, real):
        """Compute the same by plain mathematics, with oracle hooks on Q and K of real tokens."""
        q, k, v = (y * 1.0 for y in self.attn.heads(x))
        for side, y in (("query", q), ("key", k)):
            y.register_hook(lambda g, side=side, y=y: of_oracle(g, y, SCALES[side], real))
        out = by_hand(q, k, v, allowed).transpose(1, 2).flatten(-2)
        return self.attn.out_proj(out) if isinstance(self.attn, Packed) else out


def of_oracle(grad, x, scales, real):
    mask = None if real is None else real[:, None].expand(x.shape[:-1]).numpy()
    return torch.from_numpy(rescaled(grad.numpy(), x.detach().numpy(), *scales, mask))


KINDS = {
    "sdpa": lambda: Attention(sdpa),
    "packed": Packed,
    "packed with weights": lambda: Packed(need_weights=True),
    "by hand": lambda: Attention(by_hand),
}


class Case(NamedTuple):
    """A mask, and whether its values tell its real tokens."""

    sample: Sample
    told: bool
    told_with_mask: bool = True
    """Whether they do once the model is called with a mask of the real tokens."""


def alibi():
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return -distance.abs() * torch.tensor([0.5, 8.0], dtype=torch.float64)[:, None, None]


PADDED = right(LENGTHS, LENGTH)
ALIKE = right((7, 7, 7), LENGTH)
NUMBERS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0], [1] * 5 + [2] * 2 + [0] * 3])
CASES = {
    # Real tokens that a pattern closes.
    "strictly causal": Case(shared(strictly_causal(LENGTH)), True),
    "strictly causal, the first sees itself": Case(
        shared(PATTERNS["first_sees_itself"](LENGTH)), True
    ),
    "strictly causal, one sequence": Case(shared(strictly_causal(LENGTH), 1), True),
    "every fourth": Case(shared(PATTERNS["strided"](LENGTH)), False, False),
    "every fourth, causal": Case(shared(PATTERNS["causal_strided"](LENGTH)), False, False),
    "random keys": Case(random_keys(3, LENGTH), False, False),
    "top-k": Case(top_k(3, LENGTH), False, False),
    "a suffix that only reads": Case(
        Sample(closed(full(LENGTH), ALIKE).allowed, everything(3, LENGTH)), False, False
    ),
    # Padding.
    "right": Case(closed(full(LENGTH), PADDED), True),
    "left": Case(closed(full(LENGTH), left(LENGTHS, LENGTH)), True),
    "right, queries too": Case(closed(full(LENGTH), ALIKE, rows=True), True),
    "right, causal": Case(closed(causal(LENGTH), PADDED), True),
    "left, causal": Case(closed(causal(LENGTH), left(LENGTHS, LENGTH)), True),
    "right, sliding window": Case(closed(sliding(LENGTH), PADDED), True),
    "left, window": Case(closed(window(LENGTH), left(LENGTHS, LENGTH)), True),
    "right, prefix": Case(closed(prefix(LENGTH), PADDED), True),
    "documents": Case(documents(NUMBERS), True),
    "an empty sequence": Case(closed(full(LENGTH), right((9, 4, 0), LENGTH)), True),
    "one sequence": Case(closed(full(LENGTH), PADDED[2:]), False),
    "one sequence, causal": Case(closed(causal(LENGTH), PADDED[2:]), False),
    "the same everywhere": Case(closed(full(LENGTH), ALIKE), False),
    "in the middle": Case(closed(full(LENGTH), PADDED ^ PADDED.roll(4, 1)), False),
    # Both.
    "right, strictly causal": Case(closed(strictly_causal(LENGTH), PADDED), False),
    "left, strictly causal": Case(closed(strictly_causal(LENGTH), left((9, 8, 7), LENGTH)), False),
    "top-k of the real": Case(
        Sample(top_k(3, LENGTH).allowed & PADDED[:, None, None], PADDED), False, False
    ),
    # Nothing closed.
    "causal": Case(shared(causal(LENGTH)), True),
    "window": Case(shared(window(LENGTH)), True),
    "prefix": Case(shared(prefix(LENGTH)), True),
    "ALiBi": Case(Sample(alibi().expand(3, -1, -1, -1), everything(3, LENGTH)), True),
}


def inputs(sample):
    x = torch.randn(len(sample.real), LENGTH, WIDTH, dtype=torch.float64)
    allowed = sample.allowed
    # A query without any key has no output to speak of.
    sees = sample.real
    if allowed.dtype == torch.bool:
        sees = sees & allowed.any(1).any(-1).expand(sees.shape)
    return x, sees


def added(allowed):
    if allowed.dtype != torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e9)


def of(model, y, sees):
    return gradients(model, y[sees].pow(3).sum())


@pytest.mark.parametrize("form", ["boolean", "added"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_each_mask_is_right_or_refused(case, kind, form):
    (allowed, real), told, told_with_mask = CASES[case]
    x, sees = inputs(CASES[case].sample)
    boolean = form == "boolean" and allowed.dtype == torch.bool
    if kind.startswith("packed") and boolean and not allowed.any(-1).all():
        pytest.skip("NaN without hooks: nn.MultiheadAttention has queries without any key")
    model = Model(KINDS[kind]()).double()
    mask = allowed if boolean else added(allowed)
    expected = of(model, model.reference(x, added(allowed), real), sees)
    wrong = of(
        model, model.reference(x, added(allowed), real ^ (torch.arange(LENGTH) % 3 == 0)), sees
    )
    with attach(model, SCALE):
        for given, is_told in ((), told), ((real.long(),), told or told_with_mask):
            if is_told:
                actual = of(model, model(x, mask, *given), sees)
                assert_close(actual, expected)
            else:
                with pytest.raises(ValueError, match=r"'attn': .* mask closes .*token_m"):
                    model(x, mask, *given)
        with token_mask(real):
            actual = of(model, model(x, mask), sees)
            assert_close(actual, expected)
    size = max(value.abs().max() for value in expected.values())
    assert max((wrong[name] - expected[name]).abs().max() for name in expected) > 1e-3 * size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["every fourth", "one sequence", "right"])
def test_what_is_only_measured_is_not_measured_under_an_unclear_mask(case, kind):
    (allowed, real), told, _ = CASES[case]
    x, sees = inputs(CASES[case].sample)
    model = Model(KINDS[kind]()).double()
    sgd = SGD(model.parameters(), lr=0.0)
    optimizer = SpanScaledOptimizer(sgd, model, {"*": SpanScale(1.0, 1.0)})
    with SpanMonitor(optimizer, every=1) as monitor:
        of(model, model(x, added(allowed)), sees)
        optimizer.step()
        with token_mask(real):
            of(model, model(x, added(allowed)), sees)
        optimizer.step()
    measured = [row for row in monitor.rows if row["step"] == 1 or told]
    assert len(measured) == (4 * HEADS if told else 2 * HEADS)
    for row in measured:
        assert row["problem"] is None
        assert row["parallel_share"] is not None
    unmeasured = [row for row in monitor.rows if row not in measured]
    assert [row["side"] for row in unmeasured] == ([] if told else ["query", "key"])
    for row in unmeasured:
        assert row["parallel_share"] is row["entropy"] is row["head"] is None
        assert "layer 'attn': the attention mask closes keys" in row["problem"]
        assert "token_mask" in row["problem"]


# Where values can't be read at once: in compiled code and on accelerators.

DEFERRED = ["strictly causal", "every fourth, causal", "right, causal", "one sequence"]


def train(model, run, x, mask, given, sees):
    """Return the gradients of a step of training, or ``None`` if it was refused."""
    optimizer = SpanScaledOptimizer(SGD(model.parameters(), lr=0.1), model, {"*": SCALE})
    try:
        found = of(model, run(x, mask, *given), sees)
        before = [p.detach().clone() for p in model.parameters()]
        try:
            optimizer.step()
        except ValueError as error:
            assert "layer 'attn': the attention mask closes tokens to all others" in str(error)  # noqa: PT017
            assert all(map(torch.equal, before, model.parameters()))
            return None
        return found
    finally:
        optimizer.detach()


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *(("sdpa", case) for case in DEFERRED[:2]),
        *(pytest.param("sdpa", case, marks=pytest.mark.long) for case in DEFERRED[2:]),
        *(("packed", case) for case in DEFERRED[2:]),
        *(("by hand", case) for case in DEFERRED[2:]),
    ],
)
def test_each_mask_is_right_or_refused_by_the_step_in_compiled_code(kind, case):
    (allowed, real), told, _ = CASES[case]
    x, sees = inputs(CASES[case].sample)
    model = Model(KINDS[kind]()).double()
    backend = "aot_eager" if kind == "sdpa" else "eager"
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    mask = added(allowed)
    for masks in ((), (real.long(),)):
        expected = of(model, model.reference(x, mask, real), sees)
        actual = train(model, compiled, x, mask, masks, sees)
        assert (actual is not None) == (told or (bool(masks) and case == "one sequence"))
        if actual is not None:
            assert_close(actual, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["sdpa", "packed", "by hand"])
def test_each_mask_is_right_or_refused_by_the_step_without_reading_it(case, kind, monkeypatch):
    (allowed, real), told, _ = CASES[case]
    x, sees = inputs(CASES[case].sample)
    for module in (rule, verdicts, spans):
        monkeypatch.setattr(module, "can_be_read", lambda x: False)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: pytest.fail("waits for the device"))
    model = Model(KINDS[kind]()).double()
    expected = of(model, model.reference(x, added(allowed), real), sees)
    with attach(model, SCALE) as hooks:
        actual = of(model, model(x, added(allowed)), sees)
        monkeypatch.undo()
        if told:
            assert_close(actual, expected)
            hooks.check()
        else:
            with pytest.raises(ValueError, match=r"layer 'attn': .* closes tokens .*token_mask"):
                hooks.check()
        hooks.forget()
        of(model, model(x, None), sees)
        hooks.check()  # of the next step nothing is wrong


def test_compiled_code_that_is_refused_is_not_compiled_again():
    sample = CASES["one sequence"].sample
    x, sees = inputs(sample)
    model = Model(KINDS["sdpa"]()).double()
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with attach(model, SCALE) as hooks:
        for _ in range(3):
            of(model, compiled(x, sample.allowed), sees)
            with pytest.raises(ValueError, match="token_mask"):
                hooks.check()
        assert counter.frame_count == 1
    torch.compiler.reset()


# What is given beside the mask.


def test_a_layer_that_is_told_its_padding_takes_the_rest_of_the_mask_for_a_pattern():
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    x, real = torch.randn(3, LENGTH, WIDTH, dtype=torch.float64), right((9, 6, 10), LENGTH)
    pattern = PATTERNS["causal_strided"](LENGTH)

    def run(x, pattern, real, padded=None):
        out, _ = module(x, x, x, key_padding_mask=padded, attn_mask=~pattern)
        return gradients(module, out[real].pow(3).sum())

    with attach(module, SCALE):
        actual = run(x, pattern, real, ~real)
        with token_mask(real):
            assert_close(actual, run(x, pattern, real, ~real), 1e-12)
        with pytest.raises(ValueError, match="keys 1, 2, 3, 5, 6, 7, 9 of 10 in sequence 0 of 1"):
            run(x, pattern, real)
        run(x, pattern, real, torch.zeros_like(real))  # nothing is padding, it is told


NAMES = {
    "attention_mask": True,
    "padding_mask": True,
    "src_key_padding_mask": True,
    "mask": True,
    "loss_mask": False,
    "token_type_ids": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_padding_masks_by_name(name):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Model(Attention(sdpa))

        def forward(self, x, allowed, **kwargs):
            return self.inner(x, allowed)

    model, sample = Outer().double(), CASES["one sequence"].sample
    x, sees = inputs(sample)
    for mask in (sample.real, ~sample.real, sample.real.double(), added(sample.real)):
        with attach(model, SCALE):
            if NAMES[name]:
                with token_mask(sample.real):
                    expected = of(model, model(x, sample.allowed), sees)
                actual = of(model, model(x, sample.allowed, **{name: mask}), sees)
                assert_close(actual, expected, 1e-12)
            else:
                with pytest.raises(ValueError, match=r"layer 'inner.attn': .*token_mask"):
                    model(x, sample.allowed, **{name: mask})


def test_a_padding_mask_of_other_tokens_tells_nothing():
    model, sample = Model(Attention(sdpa)).double(), CASES["one sequence"].sample
    x, _ = inputs(sample)
    with attach(model, SCALE):
        for other in (right((6,), LENGTH), everything(1, LENGTH), right((7,), LENGTH + 1)):
            with pytest.raises(ValueError, match="keys 7, 8, 9 of 10 in sequence 0 of 1"):
                model(x, sample.allowed, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_runs_again_in_the_backward_pass_goes_by_the_same_padding_mask(reentrant):
    class Checkpointed(Model):
        def forward(self, x, allowed, attention_mask=None):
            return torch.utils.checkpoint.checkpoint(self.attn, x, allowed, use_reentrant=reentrant)

    model, sample = Checkpointed(Attention(sdpa)).double(), CASES["one sequence"].sample
    x, sees = inputs(sample)
    x.requires_grad_()
    expected = of(model, model.reference(x, added(sample.allowed), sample.real), sees)
    with attach(model, SCALE):
        loss = model(x, sample.allowed, sample.real)[sees].pow(3).sum()
        with torch.no_grad():
            model(x, sample.allowed, everything(1, LENGTH))
        assert_close(gradients(model, loss), expected)


def test_copies_and_pickles_of_the_model_note_no_masks():
    model = Model(Attention(sdpa)).double()
    with attach(model, SCALE):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert not model._forward_pre_hooks
    sample = CASES["one sequence"].sample
    x, _ = inputs(sample)
    for copied in copies:
        copied(x, sample.allowed, sample.real)
        with attach(copied, SCALE):
            copied(x, sample.allowed, sample.real)
        assert not copied._forward_pre_hooks


def test_a_mask_that_is_changed_in_place_is_read_again():
    model, sample = Model(Attention(sdpa)).double(), CASES["right"].sample
    x, sees = inputs(sample)
    mask = everything(3, LENGTH)[:, None, None]
    with attach(model, SCALE):
        of(model, model(x, mask), sees)
        mask.copy_(sample.allowed[..., :1, :])
        expected = of(model, model.reference(x, added(mask), sample.real), sees)
        assert_close(of(model, model(x, mask), sees), expected)


def test_layers_that_share_a_mask_read_it_once(monkeypatch):
    read = []
    model = nn.ModuleList(Model(Attention(sdpa)) for _ in range(3)).double()
    x, _ = inputs(CASES["right"].sample)
    monkeypatch.setattr(once, "allowed", lambda mask: read.append(mask) or mask)
    with attach(model, SCALE):
        for layer in model:
            x = layer(x, CASES["right"].sample.allowed)
    assert len(read) == 1


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 1, 0, 0), (1, 1, 1, 1), (2, 1, 1, 3)])
def test_masks_of_any_size_are_judged_without_reading_them(shape, monkeypatch):
    monkeypatch.setattr(rule, "can_be_read", lambda x: False)
    batch, _, n, m = shape
    for value in (False, True):
        seen = rule.read(torch.full(shape, value), 4)
        for padding in ([], [torch.ones(batch, m)], [torch.ones(2 * batch, m)]):
            for n_queries in {n, m}:
                verdict = judging.judge(seen, n_queries, m, self_attention=True, padding=padding)
                assert verdict.keys.shape[1] == m
                assert verdict.refused.shape == ()


# Queries and keys of two sequences.

CROSS = {
    "padded keys": (None, right((5, 10, 6), LENGTH), True),
    "padded queries and keys": (left(LENGTHS, LENGTH), right((5, 10, 6), LENGTH), True),
    "keys padded alike": (None, right((6, 6, 6), LENGTH), False),
    "queries padded alike": (right((6, 6, 6), LENGTH), None, False),
    "every fourth key": (None, (torch.arange(LENGTH) % 4 == 0).expand(3, -1), False),
    "nothing closed": (None, None, True),
}


@pytest.mark.parametrize("case", CROSS)
def test_keys_of_cross_attention_are_padding_or_refused(case):
    queries, keys, told = CROSS[case]
    shown = [everything(3, LENGTH) if side is None else side for side in (queries, keys)]
    seen = rule.read(shown[0][:, None, :, None] & shown[1][:, None, None], 4)
    verdict = judging.judge(seen, LENGTH, LENGTH, self_attention=False)
    if verdict is None:
        assert case == "nothing closed"
    else:
        assert bool(verdict.refused) != told
        given = judging.judge(seen, LENGTH, LENGTH, self_attention=False, padding=shown)
        assert not given.refused
        for actual, expected in ((given.queries, shown[0]), (given.keys, shown[1])):
            assert torch.equal(actual.expand(3, -1), expected)


# The rule under generated masks.


@st.composite
def samples(draw):
    """Draw a pattern and padding, and whether the mask shows more than the pattern alone does."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(6, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    name = draw(st.sampled_from([*PATTERNS, "random keys", "random", "top-k"]))
    if name == "random keys":
        pattern = random_keys(batch, length, generator).allowed
    elif name == "random":
        pattern = torch.rand(batch, 1, length, length, generator=generator) < 0.6
    elif name == "top-k":
        pattern = top_k(batch, length, generator=generator).allowed
    else:
        pattern = PATTERNS[name](length).expand(batch, 1, length, length)
    side = draw(st.sampled_from(["none", "right", "left", "alike", "holes"]))
    lengths = draw(st.lists(st.integers(4, length), min_size=batch, max_size=batch))
    if side == "none":
        real = everything(batch, length)
    elif side == "holes":
        real = torch.rand(batch, length, generator=generator) < 0.7
        real[:, :4] = True
    else:
        lengths = lengths[:1] * batch if side == "alike" else lengths
        real = (left if side == "left" else right)(lengths, length)
    return name, pattern, closed(pattern, real, rows=draw(st.booleans()))


def looks_padded(allowed):
    """Return whether a mask that closes real tokens is that of padding, entry for entry."""
    keys = allowed.any(1).any(-2)
    open_keys = [row.nonzero().flatten() for row in keys]
    runs = all(len(x) == 0 or len(x) == x[-1] - x[0] + 1 for x in open_keys)
    alone = keys[:, None, :, None] & keys[:, None, None]
    return runs and bool(((allowed & alone).any(-1) | ~keys[:, None]).all())


def check_rule(case):
    name, pattern, (allowed, real) = case
    length = real.shape[1]
    if name.startswith(("random", "top-k")) and looks_padded(allowed):
        return
    seen = rule.read(allowed, 4)
    same_as_pattern = bool((allowed == pattern).all())
    for padding, truth in (([], real), ([real], real)):
        verdict = judging.judge(seen, length, length, self_attention=True, padding=padding)
        if verdict is not None and verdict.refused:
            continue
        actual = everything(1, length) if verdict is None else verdict.keys
        if same_as_pattern and not padding:
            truth = everything(1, length)  # padding that the mask does not show
        elif verdict is None or (same_as_pattern and torch.equal(actual, everything(1, length))):
            continue
        wrong = actual ^ truth
        if not padding:  # what takes no part at all is taken for padding
            wrong = wrong & (allowed.any(1).any(-1) | allowed.any(1).any(-2))
        assert not wrong.any(), (name, actual, real)


@given(samples())
def test_generated_masks_are_right_or_refused(case):
    check_rule(case)


def test_many_generated_masks_are_right_or_refused(soak):
    settings(max_examples=10_000 if soak else 300)(given(samples())(check_rule))()
