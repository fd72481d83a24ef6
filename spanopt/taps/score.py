"""Score tap: layers that call ``torch.nn.functional.scaled_dot_product_attention``.

It sees the true Q and K: after rotary embedding, QK-norm and the split into heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from spanopt.taps.tap import Tap

__all__ = ["HANDLERS"]


def _scaled_dot_product_attention(
    tap: Tap, func: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
) -> Any:
    tap.observe(query, key)
    return func(tap.query.on(query), tap.key.on(key), *args, **kwargs)


HANDLERS = [(F.scaled_dot_product_attention, _scaled_dot_product_attention)]
