"""Attention in the three forms in which models write it, for a decoder's layers."""

from torch import nn


def by_hand(width, heads):
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

        def forward(self, x):
            q, k, v = (
                project(x).unflatten(-1, (heads, -1)).transpose(1, 2)
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
            return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2)

    return ByHand()


def packed(width, heads):
    class Packed(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    return Packed(width, heads, batch_first=True)


ATTENTION = {"score": {}, "softmax": {"attention": by_hand}, "packed": {"attention": packed}}
