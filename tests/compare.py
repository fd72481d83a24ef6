"""Comparing gradients, parameters, states and models, for every test."""

import torch


def assert_close(actual, expected, tolerance=1e-10):
    """Compare gradients by name, relative to the largest; key biases have none (softmax)."""
    size = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        worst = (actual[name] - value).abs().max() / size
        assert worst <= tolerance, f"{name}: {worst:.1e}"


def existing_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_error(actual, expected):
    """The largest difference of any parameter's gradients, relative to the largest number in them.

    A gradient that is zero but for rounding, as a key bias has it without scaling, counts as 1e-6
    of the largest of all.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-6 * max(value.abs().max() for value in expected.values())
    errors = [
        (actual[name] - value).abs().max() / value.abs().max().clamp(min=floor)
        for name, value in expected.items()
    ]
    assert torch.stack(errors).isfinite().all()
    return max(errors).item()


def snapshot(model):
    """Everything a module holds, hooks and attributes included, for comparison by identity."""
    return {
        name: {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def same_state(first, second):
    """Whether two optimizer state dicts are equal bit for bit."""
    first, second = (torch.utils._pytree.tree_flatten(s["state"]) for s in (first, second))
    return first[1] == second[1] and all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(first[0], second[0], strict=True)
    )


def assert_same_training(model, reference, tolerance=1e-9):
    there = dict(reference.model.named_parameters())
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias") or (parameter is there[name]):
            continue
        size = there[name].abs().max()
        assert (parameter - there[name]).abs().max() <= tolerance * size, name


def values_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(actual, expected, rtol=1e-9, atol=1e-11):
    """That two dicts of tensors have the same names and values."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol)


def assert_differ(actual, expected, by=1e-4):
    """Fail where plain training would pass for the real thing."""
    assert max((actual[name] - expected[name]).abs().max() for name in actual) > by
