"""Every optimizer of PyTorch's own test tables, in every configuration that these have, wrapped.

Each trains a small attention model. The bare optimizer trains a twin whose gradients are rescaled
by the same hooks: the parameters must stay equal bit for bit, and differ from plain training.
"""

import contextlib
import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("expecttest", reason="PyTorch's test tables need expecttest")
from torch.testing._internal import common_optimizers
from wrapping import Around, attend

from spanopt import SpanScale, SpanScaledOptimizer, attach

SCALES = {"*": SpanScale(2.0, 0.5, key=(0.6, 1.5))}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
INFOS = common_optimizers.optim_db


class Attention(nn.Module):
    """Attention over looked-up or projected tokens, with a query bias where 1-D weights may be."""

    def __init__(self, sparse=False, bias=True):
        super().__init__()
        layer = (
            (lambda: nn.Embedding(11, 8, sparse=True))
            if sparse
            else (lambda: nn.Linear(11, 8, bias=bias))
        )
        self.sparse = sparse
        self.q_proj, self.k_proj, self.v_proj = layer(), layer(), layer()

    def forward(self, tokens):
        x = tokens if self.sparse else F.one_hot(tokens, 11).to(self.q_proj.weight.dtype)
        q, k, v = (p(x).unflatten(-1, (2, 4)).mT for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.mT.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)


def model_for(info, device):
    torch.manual_seed(0)
    return Attention(info.only_supports_sparse_grads, bias=info.name != "Muon").to(device)


def tokens(step, device):
    return torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(step)).to(device)


def configurations():
    for device in DEVICES:
        for info in INFOS:
            kinds = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs(
                device, torch.float32, info
            )
            for number, given in enumerate(kinds):
                # The tables that lend lr as a tensor lend the same one to every test.
                made = (info, copy.deepcopy(given.kwargs), device)
                flags = [f for f in ("foreach", "fused", "differentiable") if given.kwargs.get(f)]
                yield pytest.param(*made, id="-".join([device, info.name, str(number), *flags]))


def optimizer_of(info, kwargs, model):
    return info.optim_cls(list(model.parameters()), **copy.deepcopy(kwargs))


def train(model, optimizer, device, steps=3, first=0, scheduler=None, scaler=None):
    """Take steps; return the parameters, or the error that the first of them raises."""
    line_searches = isinstance(unwrapped(optimizer), torch.optim.LBFGS)
    # The loss has no maximum, and L-BFGS would go on to parameters that are not finite.
    upside_down = line_searches and optimizer.param_groups[0].get("maximize", False)
    for step in range(first, first + steps):
        batch = tokens(step, device)

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = (-100 if upside_down else 100) * model(batch).square().sum()
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        if line_searches:
            loss = optimizer.step(closure)
        else:
            loss = closure()
            try:
                optimizer.step() if scaler is None else scaler.step(optimizer)
            except (RuntimeError, AssertionError) as error:
                return type(error), str(error)
        if scaler is not None:
            scaler.update()
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(loss.detach())
        elif scheduler is not None:
            scheduler.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def unwrapped(optimizer):
    return getattr(optimizer, "optimizer", optimizer)


def same(actual, expected):
    if isinstance(expected, tuple):
        return actual == expected
    return isinstance(actual, list) and all(map(torch.equal, actual, expected))


def three_ways(info, kwargs, device, **options):
    """Train wrapped; bare, on the gradients of the same hooks; and plainly."""
    model = model_for(info, device)
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    results = []
    with attach(twin, SCALES):
        bare = optimizer_of(info, kwargs, twin)
        wrapped = SpanScaledOptimizer(optimizer_of(info, kwargs, model), model, SCALES)
        for one, of in ((model, wrapped), (twin, bare), (plain, optimizer_of(info, kwargs, plain))):
            made = {name: make(of) for name, make in options.items()}
            results.append(train(one, of, device, **made))
    return *results, wrapped, bare


def test_the_tables_are_there():
    assert len(INFOS) >= 14
    assert len(list(configurations())) > 150


@pytest.mark.parametrize(("info", "kwargs", "device"), list(configurations()))
def test_parameters_are_those_of_the_bare_optimizer_on_rescaled_gradients(info, kwargs, device):
    actual, expected, plain, wrapped, _ = three_ways(info, kwargs, device)
    assert same(actual, expected)
    if isinstance(expected, tuple):
        # What the bare optimizer does not do for a model's parameters.
        assert kwargs.get("differentiable") or kwargs.get("capturable"), expected
        return
    # A step that depends on the signs of gradients alone may be the same.
    if info.name != "Rprop":
        assert not same(actual, plain)
    # A state dict carries on where the run ended, also through a file.
    file = io.BytesIO()
    torch.save(wrapped.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(wrapped.model)
    wrapped_again = SpanScaledOptimizer(optimizer_of(info, kwargs, resumed), resumed, SCALES)
    wrapped_again.load_state_dict(torch.load(file, weights_only=False))
    assert same(
        train(resumed, wrapped_again, device, first=3, steps=2),
        train(wrapped.model, wrapped, device, first=3, steps=2),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_learning_rates_are_scheduled_as_for_the_bare_optimizer(info, device):
    for makers in info.scheduler_inputs:
        for make in makers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a scheduler that steps after its last epoch
                actual, expected, _, wrapped, bare = three_ways(info, {}, device, scheduler=make)
            assert same(actual, expected)
            assert [g["lr"] for g in wrapped.param_groups] == [g["lr"] for g in bare.param_groups]


SCALED = [
    pytest.param(info, device, fused, id=f"{device}-{info.name}{'-fused' * fused}")
    for device in DEVICES
    for info in INFOS
    for fused in (False, True)
    if (not fused or device in info.supports_fused_on) and not info.step_requires_closure
]


@pytest.mark.parametrize(("info", "device", "fused"), SCALED)
def test_a_grad_scaler_steps_and_skips_as_with_the_bare_optimizer(info, device, fused):
    kwargs, ends = {"fused": True} if fused else {}, []
    for initial in (4.0, 1e38):  # the second overflows
        scalers = []

        def scaler(_, initial=initial, scalers=scalers):
            scalers.append(torch.amp.GradScaler(device, initial))
            return scalers[-1]

        actual, expected, plain, _, _ = three_ways(info, kwargs, device, scaler=scaler)
        assert same(actual, expected)
        # Of a skipped step alone the scale is lowered.
        lowered = [scaler.get_scale() < initial for scaler in scalers]
        assert lowered == [initial > 4.0] * 3
        if initial == 4.0 and info.name != "Rprop":
            assert not same(actual, plain)
        ends.append(actual)
    assert same(ends[1], list(model_for(info, device).parameters()))


def errors():
    for device in DEVICES:
        for info in INFOS:
            for given in info.optim_error_inputs_func(device, torch.float32):
                name = given.optimizer_error_input.desc
                yield pytest.param(info, given, device, id=f"{device}-{info.name}-{name}")


def parameters_of(given, model):
    params = given.optimizer_error_input.params
    return list(model.parameters()) if params is None else params


@pytest.mark.parametrize(("info", "given", "device"), list(errors()))
def test_what_the_bare_optimizer_refuses_is_refused_in_the_same_words(info, given, device):
    model = model_for(info, device)
    params, kwargs = parameters_of(given, model), given.optimizer_error_input.kwargs
    raised = (
        pytest.warns(given.error_type, match=given.error_regex)
        if issubclass(given.error_type, Warning)
        else pytest.raises(given.error_type, match=given.error_regex)
    )
    if given.error_on is common_optimizers.OptimizerErrorEnum.STEP_ERROR:
        bare = info.optim_cls(params, **kwargs)
        for param in params:
            param.requires_grad_()  # so that the layer has something to train
        wrapped = SpanScaledOptimizer(bare, Around(bare), SCALES)
        attend(wrapped.model)
        with raised:
            wrapped.step()
        return
    # At construction, before there is anything to wrap; then as a group that is added.
    with raised:
        bare = info.optim_cls(params, **kwargs)
        SpanScaledOptimizer(bare, Around(bare), SCALES)
    if issubclass(given.error_type, Warning) or not info.supports_param_groups:
        return
    ends, groups = [], params if isinstance(params, list) else [params]
    added = groups[0] if groups and isinstance(groups[0], dict) else {"params": params, **kwargs}
    for wrap in (lambda x, _: x, lambda x, of: SpanScaledOptimizer(x, of, SCALES)):
        one = model_for(info, device)
        optimizer = wrap(info.optim_cls(list(one.parameters())), one)
        before = len(optimizer.param_groups)
        try:
            with contextlib.suppress(UserWarning):
                optimizer.add_param_group(dict(added))
        except Exception as error:  # any error that the bare one raises
            ends.append((type(error), str(error)))
            assert len(optimizer.param_groups) == before
        else:
            ends.append("added")
    assert ends[0] == ends[1]
