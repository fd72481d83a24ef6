"""What is read in the code of a module class."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spanopt.traits import quietly, traits_of


def multiplied(q, k):
    return q @ k.mT


class Product(nn.Module):
    def forward(self, x):
        return multiplied(x, x)


class Softmax(nn.Module):
    def forward(self, x):
        return self.weigh(x)

    def weigh(self, x):
        return torch.einsum("bnd,bmd->bnm", x, x).softmax(-1)


class Call(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Unused(nn.Module):
    def forward(self, x):
        return x

    def weigh(self, x):
        return (x @ x).softmax(-1)


@pytest.mark.parametrize(
    ("cls", "traits"),
    [
        (Product, {"product"}),
        (Softmax, {"product", "softmax"}),
        (Call, {"call"}),
        (Unused, set()),
        (nn.Linear, set()),
    ],
)
def test_traits_are_those_of_the_code_that_forward_reaches(cls, traits):
    assert traits_of(cls) == traits


def test_what_raises_is_nothing():
    assert quietly(lambda: 1 / 0) is None
    assert quietly(int, "3") == 3
