"""How a model's attention layers are found before any forward pass."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from spanopt.traits import attention_calls, quietly, traits_of

__all__ = ["AttentionSite", "find_attention", "is_inside", "named_modules", "unwrap"]

# fmt: off
_FILLERS = {
    "proj", "projection", "lin", "linear", "layer", "to", "w", "c", "fc", "net", "dense", "conv",
    "transform", "attn", "in", "a", "b",
}
# fmt: on
_QUERY = {"q", "query", "queries"}
_KEY = {"k", "key", "keys", "kv"}
_FUSED = {"qkv", "kqv", "qk", "querykeyvalue"}
# The names under which wrappers keep the module: torch.compile, FSDP1, activation checkpointing.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(eq=False)
class AttentionSite:
    """One attention layer of a model.

    Attributes:
        name: Its qualified name in the model; ``""`` is the model itself.
        module: The layer.
        tap: How Q and K are reached: ``"packed"`` (``nn.MultiheadAttention``), ``"score"`` (a call
            of ``scaled_dot_product_attention``), ``"softmax"`` (attention written out by hand) or
            ``"projection"`` (the outputs of modules that the user names). It is ``None`` where
            only the first forward pass can tell.
        certain: Whether it is surely attention. If it is not, the layer was found only because its
            code multiplies matrices and takes a softmax. Such a layer is dropped if its forward
            pass shows no attention.
        asked: Whether the user asked to scale it by its own name, not by a pattern. Such a layer is
            never dropped.
        heads: Number of query heads; ``None`` until the first forward pass tells.
        kv_heads: Number of key heads; ``None`` until the first forward pass tells.
        head_dim: Head dimension d; ``None`` until the first forward pass tells.
        query_length: Number of queries N in the last forward pass; ``None`` before the first.
        key_length: Number of keys M in the last forward pass; ``None`` before the first.
        takes_softmax: Whether the last forward pass showed a softmax; ``None`` before the first.
        lost_at: The operation, such as ``"cumsum"``, at which the tap lost track of a matrix
            product before any softmax; ``None`` if none was lost.

    Example:
        >>> from torch import nn
        >>> site, = find_attention(nn.TransformerEncoderLayer(16, nhead=4))
        >>> site.name, site.class_name, site.tap, site.heads
        ('self_attn', 'MultiheadAttention', 'packed', 4)
    """

    name: str
    module: nn.Module
    tap: str | None
    certain: bool = True
    asked: bool = False
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    query_length: int | None = None
    key_length: int | None = None
    takes_softmax: bool | None = None
    lost_at: str | None = None

    @property
    def class_name(self) -> str:
        """Name of the layer's class."""
        return _class_of(self.module).__name__

    def query_key_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the query and key projections, fused ones included.

        If no name tells which they are, yield all parameters of the layer.

        Example:
            >>> site, = find_attention(nn.MultiheadAttention(8, num_heads=2))
            >>> [tuple(parameter.shape) for parameter in site.query_key_parameters()]
            [(24, 8), (24,)]
        """
        wanted = {*_QUERY, *_KEY, *_FUSED}
        named = [
            parameter
            for name, parameter in self.module.named_parameters()
            if any(_normalised(part) in wanted for part in name.split("."))
            or (self.tap == "packed" and name.startswith(("in_proj", "bias_k")))
        ]
        yield from named or self.module.parameters()

    def __repr__(self) -> str:
        return (
            f"AttentionSite(name={self.name!r}, class={self.class_name}, tap={self.tap!r}, "
            f"heads={self.heads}, head_dim={self.head_dim})"
        )


def find_attention(model: nn.Module) -> list[AttentionSite]:
    """Return the attention layers of a model, in the order of ``model.named_modules()``.

    A module is an attention layer when one of these holds:

    1. it is an ``nn.MultiheadAttention``;
    2. its own code calls ``scaled_dot_product_attention``. Its own code is its ``forward``, the
       methods of its class, and the plain functions and registries of functions that these refer
       to. Submodules are not read;
    3. it owns a query and a key projection by name (``q_proj`` and ``k_proj``, ``to_q`` and
       ``to_kv``, ``query`` and ``key``, ``wq`` and ``wk``, a fused ``qkv`` or ``c_attn``, ...). If
       its first forward pass calls no attention that can be seen, that is an error;
    4. its own code multiplies matrices and takes a softmax. It must also own at least two modules
       with parameters, or none, or one linear layer with more outputs than inputs. Such a layer is
       not ``certain`` before the first forward pass.

    A layer of the third or fourth kind that contains another one with projections is left out,
    since it is only a wrapper. A layer without projections inside one of the third kind is left
    out, since it is a part of that one. A module that is used twice appears once. Modules inside
    ``torch.compile`` and data-parallel wrappers are found. Their names are those without the
    wrapper.

    Args:
        model: Any module.

    Returns:
        The sites, empty when there are none.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from torch import nn
        >>> [site.name for site in find_attention(nn.TransformerDecoderLayer(8, nhead=2))]
        ['self_attn', 'multihead_attn']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    traits: dict[type, frozenset[str]] = {}
    found: dict[str, tuple[nn.Module, str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reading attributes of modules may warn
        for name, module in named_modules(model):
            kind = _kind(module, traits)
            if kind is not None:
                found[name] = (module, kind)
    kept = {
        name: (module, kind)
        for name, (module, kind) in found.items()
        if not _only_wraps_another(name, module, kind, found, traits)
    }
    return [
        _site(name, module, kind, traits)
        for name, (module, kind) in kept.items()
        if not _is_part_of_another(name, module, kept)
    ]


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model with their names, without the names of wrappers.

    Args:
        model: A module, wrapped or not.

    Returns:
        Pairs such as ``model.named_modules()`` yields. A name may come twice: first with the
        wrapper, last with the module inside it.

    Example:
        >>> import torch
        >>> [name for name, _ in named_modules(nn.Sequential(torch.compile(nn.Linear(2, 2))))]
        ['', '0', '0']
    """
    for name, module in unwrap(model).named_modules():
        yield ".".join(part for part in name.split(".") if part not in _WRAPPED), module


def is_inside(name: str, outer: str) -> bool:
    """Return whether a module lies inside another, by their qualified names.

    Example:
        >>> is_inside("blocks.0.attn", "blocks.0"), is_inside("blocks.0", "blocks.0")
        (True, False)
    """
    return name != outer and (outer == "" or name.startswith(f"{outer}."))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``, data-parallel and checkpointing wrappers.

    Args:
        model: A module, wrapped or not.

    Returns:
        The innermost module.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> unwrap(torch.compile(layer)) is layer
        True
    """
    while True:
        inner = next((model._modules[name] for name in _WRAPPED if name in model._modules), None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _class_of(module: nn.Module) -> type:
    """Return the class that has the module's code. FSDP2 makes a subclass, which is skipped."""
    classes = type(module).__mro__
    return next(c for c in classes if not (c.__module__ or "").startswith("torch.distributed."))


def _kind(module: nn.Module, traits: dict[type, frozenset[str]]) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        return "packed"
    cls = _class_of(module)
    if cls not in traits:
        own = (cls.__module__ or "").partition(".")[0] != "torch"
        traits[cls] = traits_of(cls) if own else frozenset()
    if "call" in traits[cls] or not attention_calls().isdisjoint(map(id, vars(module).values())):
        return "call"
    if _owns_projections(module):
        return "projections"
    return "product" if _multiplies_by_hand(module, traits[cls]) else None


def _multiplies_by_hand(module: nn.Module, traits: frozenset[str]) -> bool:
    children = list(module.children())
    softmax = "softmax" in traits or any(isinstance(child, nn.Softmax) for child in children)
    if "product" not in traits or not softmax:
        return False
    # Q and K come from two projections, or from one that widens its input, or from outside.
    for child in list(children):
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            children += child.children()
    owners = sum(_may_project(child) for child in children)
    owners += sum(p is not None and p.ndim > 1 for p in module._parameters.values())
    fused = (isinstance(x, nn.Linear) and x.out_features > x.in_features for x in children)
    return owners != 1 or any(fused)


def _site(
    name: str, module: nn.Module, kind: str, traits: dict[type, frozenset[str]]
) -> AttentionSite:
    if isinstance(module, nn.MultiheadAttention):
        heads, head_dim = module.num_heads, module.head_dim
        return AttentionSite(name, module, "packed", heads=heads, kv_heads=heads, head_dim=head_dim)
    by_hand = _multiplies_by_hand(module, traits[_class_of(module)])
    tap = "softmax" if by_hand else None
    if kind == "call":
        tap = None if by_hand else "score"
    return AttentionSite(name, module, tap, certain=kind != "product")


def _is_part_of_another(
    name: str, module: nn.Module, found: dict[str, tuple[nn.Module, str]]
) -> bool:
    return not _may_project(module) and any(
        kind == "projections" and is_inside(name, outer) for outer, (_, kind) in found.items()
    )


def _only_wraps_another(
    name: str,
    module: nn.Module,
    kind: str,
    found: dict[str, tuple[nn.Module, str]],
    traits: dict[type, frozenset[str]],
) -> bool:
    if kind in ("packed", "call"):
        return False
    if kind == "projections" and _multiplies_by_hand(module, traits[_class_of(module)]):
        return False
    return any(
        is_inside(inner, name)
        and _may_project(other)
        and (kind == "product" or inner_kind != "product")
        for inner, (other, inner_kind) in found.items()
    )


def _may_project(module: nn.Module) -> bool:
    """Return whether a module has a matrix that could compute Q and K from its input."""
    weights = (
        quietly(getattr, part, "weight", None)
        for part in module.modules()
        if not isinstance(part, nn.Embedding)
    )
    packed = any(isinstance(part, nn.MultiheadAttention) for part in module.modules())
    return packed or any(isinstance(x, Tensor) and x.ndim == 2 for x in weights)


def _owns_projections(module: nn.Module) -> bool:
    names = {
        _normalised(name)
        for owned in (module._modules, module._parameters)
        for name, value in owned.items()
        if value is not None
    }
    return bool(names & _FUSED) or bool(names & _QUERY and names & _KEY)


@functools.lru_cache(maxsize=1024)
def _normalised(name: str) -> str:
    """Reduce ``q_proj``, ``to_q``, ``wq``, ``q_proj_weight``, ``Wqkv`` to their letters."""
    words = re.sub(r"_?weights?$", "", name.lower()).split("_")
    words = [re.sub(r"^to(?=quer|key)", "", word) for word in words]
    if words == ["c", "attn"]:  # GPT-2's fused projection
        return "qkv"
    joined = "".join(word for word in words if word not in _FILLERS)
    joined = re.sub(r"^(q|k|kv|qkv)s$", r"\1", joined)
    return joined[1:] if joined in {"wq", "wk", "wqkv", "wkv"} else joined
