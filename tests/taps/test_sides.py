"""The nodes on Q and K of an attention call: one for both where that saves time."""

import pytest
import torch

from spanopt.projection import rescale
from spanopt.rescaling import Rescaling
from spanopt.taps.real import Tokens
from spanopt.taps.sides import put_nodes

ALL = Tokens(), Tokens()
NOTHING = None, None


def rescalings(query=(2.0, 0.5), key=(0.25, 3.0)):
    cpu = torch.device("cpu")
    return Rescaling().with_numbers(query, cpu), Rescaling().with_numbers(key, cpu)


def pair(dtype=torch.float64):
    return tuple(torch.randn(2, 3, 7, 4, dtype=dtype, requires_grad=True) for _ in range(2))


class Told:
    def __init__(self):
        self.of = {}

    def gradients(self, watched, given, rescaled):
        self.of[watched.side] = watched, given, rescaled


def test_one_node_is_on_both_and_a_watcher_is_told_of_each():
    given, told = pair(), Told()
    real = torch.arange(7) < torch.tensor([7, 5])[:, None, None]
    tokens = Tokens(real), Tokens()
    q, k = put_nodes(rescalings(), given, "layer", tokens, NOTHING, told)
    assert q.grad_fn is k.grad_fn
    grads = torch.randn_like(q), torch.randn_like(k)
    torch.autograd.backward((q, k), grads)
    for at, (side, factors) in enumerate({"query": (2.0, 0.5), "key": (0.25, 3.0)}.items()):
        watched, before, after = told.of[side]
        x, mask = given[at], tokens[at].mask
        expected = rescale(grads[at], x, parallel=factors[0], violation=factors[1], mask=mask)
        torch.testing.assert_close(x.grad, expected)
        assert torch.equal(after, x.grad)
        assert torch.equal(before, grads[at])
        assert torch.equal(watched.x, x)
        assert watched.mask is mask


CASES = {
    "documents": {"tokens": (Tokens(None, torch.tensor([[0, 1, 2], [3, 4, 5]])), Tokens())},
    "results that may be changed": {"changed": True},
    "a side that is not projected": {"rescalings": rescalings(key=(2.0, 2.0))},
}


@pytest.mark.parametrize("case", CASES)
def test_each_side_has_its_own_node_with(case):
    options = {"rescalings": rescalings(), "tokens": ALL, "changed": False, **CASES[case]}
    one, tokens, changed = options["rescalings"], options["tokens"], options["changed"]
    q, k = put_nodes(one, pair(), "layer", tokens, NOTHING, None, changed=changed)
    assert q.grad_fn is not k.grad_fn
    assert q.grad_fn.name() == k.grad_fn.name() == "_RescalingNodeBackward"


def test_nodes_are_put_only_where_gradients_flow():
    given = pair()
    with torch.no_grad():
        assert put_nodes(rescalings(), given, "layer", ALL, NOTHING, None) == given
    frozen = given[0].detach()
    q, k = put_nodes(rescalings(), (frozen, given[1]), "layer", ALL, NOTHING, None)
    assert q is frozen
    assert k.grad_fn.name() == "_RescalingNodeBackward"


def test_a_factor_that_is_not_finite_in_the_dtype_is_an_error_that_names_the_side():
    huge = rescalings(key=(1e6, 1.0))
    with pytest.raises(ValueError, match=r"layer 'layer', key side: parallel = 1000000\.0"):
        put_nodes(huge, pair(torch.float16), "layer", ALL, NOTHING, None)
