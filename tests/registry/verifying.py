"""Comparing one model of the registry with a reference that knows nothing of spanopt.

The reference is a copy of the model in which the function that takes Q and K, PyTorch's
``scaled_dot_product_attention`` or the model's own ``eager_attention_forward``, gets them with
hooks of the NumPy oracle. Of a layer that calls neither they are on its first product.
"""

import contextlib
import copy
import re
import sys
import traceback
from unittest.mock import patch

import torch
from inputs import candidates
from models import oracle_hook
from products import first_products, running
from shrinking import shrink
from torch import nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from spanopt import SpanScale, UnscaledLayerError, attach, find_attention

QUERY, KEY = (2.0, 0.5), (0.6, 1.5)
LARGEST = 40e6
AUTOS = ("MODEL", "MODEL_FOR_PRETRAINING", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MULTIMODAL_LM")
"""Which class of a config is built: that of the first of these that has one."""


class NotBuiltError(Exception):
    """The registry's model can't be made or run, whatever spanopt does."""


def every_type():
    """Return the names of all configs of which the registry has a model."""
    names = {n for auto in AUTOS for n in getattr(modeling_auto, f"{auto}_MAPPING_NAMES")}
    return sorted(names)


def class_of(config):
    for auto in AUTOS:
        mapping = getattr(modeling_auto, f"{auto}_MAPPING")
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    raise NotBuiltError("no model class")


def build(name, attention):
    """Return a small model in float64 and inputs on which it runs, with weights far from zero."""
    reasons = []
    for widths in (True, False):
        try:
            config = CONFIG_MAPPING[name]()
            shrink(config, widths)
            config._attn_implementation = attention
            made = class_of(config)
            with torch.device("meta"):
                size = sum(p.numel() for p in made(copy.deepcopy(config)).parameters())
            if size > LARGEST:
                raise NotBuiltError(f"{size / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = made(config).double().eval()
            if model.config._attn_implementation != attention:
                raise NotBuiltError(f"has no {attention} attention")
        except Exception as error:  # any error, of any model
            reasons.append(reason_of(error))
            continue
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        for given in candidates(model):
            try:
                loss_of(model, given).backward()
            except Exception as error:
                reasons.append(reason_of(error))
                continue
            model.zero_grad()
            return model, given
        reasons.append("no inputs are known for it")
    raise NotBuiltError("; ".join(dict.fromkeys(reasons))[:400])


def reason_of(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def tensors(output):
    """Yield the floating-point tensors of a model's output."""
    values = output.values() if isinstance(output, dict) else output
    for value in [output] if isinstance(output, torch.Tensor) else values:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and value.grad_fn is not None:
                yield value
        elif isinstance(value, (tuple, list, dict)):
            yield from tensors(value)


def loss_of(model, given):
    """Return one number that every output has a part in, and fail where that is not finite."""
    torch.manual_seed(1)
    outputs = list(tensors(model(**given)))
    generator = torch.Generator().manual_seed(2)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        / x.numel() ** 0.5
        for x in outputs
    )
    if not outputs or not loss.isfinite():
        raise NotBuiltError("its outputs are not finite" if outputs else "it has no outputs")
    return loss


def gradients(model, given):
    model.zero_grad()
    loss = loss_of(model, given)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def difference(actual, expected):
    """Return the largest difference of a parameter's gradients, relative to the largest in them.

    A gradient that is nearly zero counts as a thousandth of the largest of all.
    """
    if actual.keys() != expected.keys():
        return float("inf")
    floor = 1e-3 * max((value.abs().max().item() for value in expected.values()), default=0.0)
    return max(
        (actual[name] - value).abs().max().item() / max(value.abs().max().item(), floor, 1e-30)
        for name, value in expected.items()
    )


@contextlib.contextmanager
def patched(model, attention, wrap):
    """Put ``wrap(function, first)`` in place of the attention functions that a model calls.

    ``first`` is the place of Q among the arguments.
    """
    with contextlib.ExitStack() as stack:
        name = "scaled_dot_product_attention"
        stack.enter_context(patch.object(F, name, wrap(getattr(F, name), 0)))
        if attention == "eager":
            name = "eager_attention_forward"
            for file in sorted({type(m).__module__ for m in model.modules()}):
                eager = getattr(sys.modules[file], name, None)
                if eager is not None:
                    stack.enter_context(patch.object(sys.modules[file], name, wrap(eager, 1)))
        yield


def layers_that_call(model, attention, given):
    """Return the attention layers in whose forward pass an attention function is called."""
    callers = set()
    with running(model) as layers:

        def wrap(function, first):
            def call(*args, **kwargs):
                callers.update(layers[-1:])
                return function(*args, **kwargs)

            return call

        with patched(model, attention, wrap), torch.no_grad():
            torch.manual_seed(1)
            model(**given)
    return callers


@contextlib.contextmanager
def oracle(model, attention, given, calls, left_alone=()):
    """Put oracle hooks on the Q and K that reach the model's attention functions or products.

    Products in the layers with the names ``left_alone`` get none.
    """

    def wrap(function, first):
        def call(*args, **kwargs):
            args = list(args)
            for name, place, pair in (("query", first, QUERY), ("key", first + 1, KEY)):
                if name in kwargs:
                    kwargs[name] = oracle_hook(kwargs[name] * 1.0, *pair)
                else:
                    args[place] = oracle_hook(args[place] * 1.0, *pair)
            calls.append(function)
            return function(*args, **kwargs)

        return call

    callers = layers_that_call(model, attention, given)
    for name in left_alone:
        callers.update(model.get_submodule(name).modules())
    with patched(model, attention, wrap), first_products(model, callers, QUERY, KEY, calls):
        yield callers


def sites_that_run(model, given):
    """Return the names of the attention layers, and of those that a forward pass reaches."""
    sites, reached = find_attention(model), set()
    handles = [
        site.module.register_forward_pre_hook(lambda *_, name=site.name: reached.add(name))
        for site in sites
    ]
    with torch.no_grad():
        torch.manual_seed(1)
        model(**given)
    for handle in handles:
        handle.remove()
    return [site.name for site in sites], reached


def verify(name, attention):
    """Return what came of one model: a dict with "outcome" and what belongs to it.

    The outcomes are "verified"; "no attention" (none is found, and none was called);
    "not compared" (no reference could be made); "refused" (an error of spanopt, with its text);
    "broken" (an error of another kind); "wrong" (other gradients, without an error); "not built".
    """
    try:
        model, given = build(name, attention)
    except NotBuiltError as error:
        return {"outcome": "not built", "why": str(error)}
    row, calls = {"class": type(model).__name__, "inputs": ", ".join(given)}, []
    try:
        reference = copy.deepcopy(model)
        forward, plain = gradients(model, given)
        again = difference(gradients(model, given)[1], plain)
    except Exception as error:  # by itself, as of a model that keeps tensors from call to call
        return {**row, "outcome": "not built", "why": f"does not run twice: {reason_of(error)}"}
    if again > 1e-9:
        return {**row, "outcome": "not built", "why": "its gradients differ between two runs"}
    try:
        with oracle(reference, attention, given, calls) as callers:
            _, expected = gradients(reference, given)
        names, reached = sites_that_run(model, given)
    except Exception as error:
        return {
            **row,
            "outcome": "broken",
            "why": reason_of(error),
            "trace": traceback.format_exc(),
        }
    row["layers"] = len(reached)
    if not reached:
        if calls:
            return {**row, "outcome": "wrong", "why": "attention is called and no layer is found"}
        return {**row, "outcome": "no attention"}
    scale = SpanScale(query=QUERY, key=KEY)
    scales = {"*": scale, **{name: None for name in names if name not in reached}}
    while True:
        try:
            with attach(model, scales) as hooks:
                scaled_forward, actual = gradients(model, given)
                hooks.check()
                taps = {site.tap for site in hooks.sites if site.name in reached}
                row["taps"] = ", ".join(sorted(map(str, taps)))
        except UnscaledLayerError as error:
            row["refused"] = " ".join(str(error).split())
            # The error says which layers to leave alone; the others are compared.
            named = re.findall(r"'([^']*)' \(", str(error).split("; scaled:")[0])
            missing = [name for name in named if scales.get(name, scale) is not None]
            scales |= dict.fromkeys(missing, None)
            if not missing or all(scales.get(name, scale) is None for name in reached):
                return {**row, "outcome": "refused"}
        except Exception as error:
            ours = "spanopt" in traceback.extract_tb(error.__traceback__)[-1].filename
            ours = ours and isinstance(error, (ValueError, TypeError, RuntimeError))
            why = " ".join(str(error).split())
            if ours:
                return {**row, "outcome": "refused", "refused": f"{type(error).__name__}: {why}"}
            trace = traceback.format_exc()
            return {
                **row,
                "outcome": "broken",
                "why": f"{type(error).__name__}: {why}",
                "trace": trace,
            }
        else:
            break
    left_alone = [name for name in reached if scales.get(name, scale) is None]
    if left_alone:
        with oracle(reference, attention, given, calls, left_alone):
            _, expected = gradients(reference, given)
    if not torch.equal(scaled_forward, forward):
        return {**row, "outcome": "wrong", "why": "the forward pass has other values"}
    row["changes"], row["error"] = difference(plain, expected), difference(actual, expected)
    if not calls or row["changes"] < 1e-4:
        return {**row, "outcome": "not compared", "why": "no reference of it changes the gradients"}
    if not row["error"] <= 1e-2 * min(row["changes"], 1.0):  # one that is no number is wrong too
        # One that returns its weights multiplies inside of PyTorch, where no hooks are put.
        parts = (reference.get_submodule(name) for name in reached)
        if any(isinstance(x, nn.MultiheadAttention) and x not in callers for x in parts):
            why = "an nn.MultiheadAttention that returns its weights has no reference here"
            return {**row, "outcome": "not compared", "why": why}
        return {**row, "outcome": "wrong", "why": "the gradients are not the reference's"}
    return {**row, "outcome": "verified"}
