"""References of layers that call no attention function: oracle hooks on their first product.

The rule knows nothing of softmaxes: of the products of two activations that an attention layer
takes in its own forward pass, the first is that of queries and keys. Layers of another order are
in ``PLACES``.
"""

import contextlib

import torch
from models import oracle_hook
from torch import nn
from torch.overrides import TorchFunctionMode

# By class of layer: which of its products of activations are of Q and K, where not the first alone.
PLACES = {
    "ConvBertSelfAttention": (2,),  # after that of its convolution kernels
    "FalconAttention": (2,),  # after its fused projection, which multiplies by a transposed weight
    "LiltSelfAttention": (1, 2),  # of text and of layout, whose scores are added both ways
    "ProphetNetNgramSelfAttention": (1, 3),  # of the main stream, and of those that predict
}
# Classes of layers with a softmax over the queries, which therefore count as the keys.
INVERTED = {"GroupViTAssignAttention"}
MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
ADDED = (torch.baddbmm, torch.Tensor.baddbmm)


def hooked(x, letters, features, batch, pair):
    """Return an operand of a product, with an oracle hook on each of its matrices.

    Args:
        x: The operand.
        letters: One for each dimension.
        features: Those that are summed over.
        batch: Those of which each index has a matrix of its own; all others are tokens.
        pair: The factors.
    """
    kinds = [
        [letter for letter in letters if letter in batch],
        [letter for letter in letters if letter not in batch and letter not in features],
        [letter for letter in letters if letter in features],
    ]
    order = [*kinds[0], *kinds[1], *kinds[2]]
    moved = x.permute([letters.index(letter) for letter in order])
    leading, tokens = (moved.shape[: len(kinds[0])], moved.shape[len(kinds[0]) :][: len(kinds[1])])
    matrices = moved.reshape(*leading, tokens.numel(), -1) * 1.0
    same = oracle_hook(matrices, *pair).reshape(moved.shape)
    return same.permute([order.index(letter) for letter in letters])


class Products(TorchFunctionMode):
    """Puts oracle hooks on the operands of the product of Q and K of each layer that runs."""

    def __init__(self, query, key, calls):
        super().__init__()
        self.query, self.key, self.calls = query, key, calls
        self.running, self.products = [], {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if self.running:
            at = 1 if function in ADDED else 0
            if at and kwargs:
                names = [name for name in ("batch1", "batch2") if name in kwargs]
                args = (*args, *(kwargs.pop(name) for name in names))
            if function in MATMULS or at:
                q, k = args[at : at + 2]
                batch = "abcdefgh"[: max(q.ndim, k.ndim) - 2]
                left, right = (batch[len(batch) + 2 - x.ndim :] for x in (q, k))
                pair = self.operands(q, k, f"{left}xz", f"{right}zy", "z", batch)
                args = (*args[:at], *pair, *args[at + 2 :])
            elif function is torch.einsum and "." not in args[0]:
                operands = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
                equation, output = args[0].replace(" ", "").split("->")
                if len(operands) == 2:
                    left, right = equation.split(",")
                    shared = set(left) & set(right)
                    features, batch = shared - set(output), shared & set(output)
                    operands = self.operands(*operands, left, right, features, batch)
                args = (args[0], *operands)
        return function(*args, **kwargs)

    def operands(self, q, k, left, right, features, batch):
        """Return two operands, hooked if this is the product of Q and K."""
        if any(isinstance(x, nn.Parameter) or x.grad_fn is None for x in (q, k)):
            return q, k
        layer = self.running[-1]
        self.products[layer] = self.products.get(layer, 0) + 1
        if layer is None or self.products[layer] not in PLACES.get(type(layer).__name__, (1,)):
            return q, k
        self.calls.append(q)
        pairs = [self.query, self.key]
        if type(layer).__name__ in INVERTED:
            pairs.reverse()
        return (
            hooked(q, left, features, batch, pairs[0]),
            hooked(k, right, features, batch, pairs[1]),
        )


@contextlib.contextmanager
def running(model, entered=lambda layer: layer):
    """Yield the list of the attention layers that run just now, the innermost last.

    Args:
        model: Any model. Its attention layers are those with a class named so, other than a whole
            layer of an encoder or a decoder.
        entered: Called with each layer that begins to run; what it returns is in the list.
    """
    stack, handles = [], []

    def enter(layer, *_):
        stack.append(entered(layer))

    def leave(*_):
        stack.pop()

    for module in model.modules():
        kind = type(module).__name__.lower()
        if "atten" in kind and not kind.endswith("coderlayer"):
            handles += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave, always_call=True),
            ]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def first_products(model, callers, query, key, calls):
    """Put oracle hooks on the first product of each attention layer.

    Args:
        model: The model.
        callers: The layers that call an attention function, which are left alone.
        query: Factors of the queries' side.
        key: Factors of the keys' side.
        calls: Gets an entry for each product with hooks.
    """
    mode = Products(query, key, calls)

    def entered(layer):
        mode.products.pop(layer, None)
        return None if layer in callers else layer

    with running(model, entered) as mode.running, mode:
        yield
