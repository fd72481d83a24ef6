import pytest
import torch
from models import Decoder, ScoreAttention, loss_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.optim import SGD

from spanopt import SpanScaledOptimizer, find_attention


def names(model):
    return [site.name for site in find_attention(model)]


def test_a_decoders_layers_are_named_in_order():
    assert names(Decoder(layers=3)) == [f"blocks.{i}.attn" for i in range(3)]


def test_an_encoder_and_a_decoder_layer_are_found_inside_nn_transformer():
    model = nn.Transformer(8, 2, 1, 1, batch_first=True)
    assert names(model) == [
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]
    assert {site.tap for site in find_attention(model)} == {"packed"}


def helper(q):
    return F.scaled_dot_product_attention(q, q, q)


class Direct(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Alias(nn.Module):
    def forward(self, x):
        return sdpa(x, x, x)


class ThroughMethod(nn.Module):
    def forward(self, x):
        return self.attend(x)

    def attend(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class ThroughFunction(nn.Module):
    def forward(self, x):
        return helper(x)


class ThroughClosure(nn.Module):
    def forward(self, x):
        def inner(y):
            return sdpa(y, y, y)

        return inner(x)


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return helper(x)


class Inherited(Direct):
    pass


class Static(nn.Module):
    @staticmethod
    def attend(x):
        return sdpa(x, x, x)

    def forward(self, x):
        return self.attend(x)


class Gated(Direct):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(2, 2)

    def forward(self, x):
        return self.gate(x) * super().forward(x)


class GatedByName(Direct):
    def forward(self, x):
        return Direct.forward(self, x) * 2


class ImportedInside(nn.Module):
    def forward(self, x):
        from torch.nn.functional import scaled_dot_product_attention as attend

        return attend(x, x, x)


class ByGetattr(nn.Module):
    def forward(self, x):
        return getattr(F, "scaled_dot_product_attention")(x, x, x)  # noqa: B009


REGISTRY = {"fast": sdpa}


class FromRegistry(nn.Module):
    def forward(self, x):
        return REGISTRY["fast"](x, x, x)


class InstanceAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = sdpa

    def forward(self, x):
        return self.attend(x, x, x)


class PackedFunction(nn.Module):
    def forward(self, x):
        return F.multi_head_attention_forward(x, x, x)


@pytest.mark.parametrize(
    "cls",
    [
        Direct,
        Alias,
        ThroughMethod,
        ThroughFunction,
        ThroughClosure,
        Decorated,
        Inherited,
        Static,
        Gated,
        GatedByName,
        ImportedInside,
        ByGetattr,
        FromRegistry,
        InstanceAttribute,
        PackedFunction,
    ],
)
def test_a_layer_is_found_by_the_attention_call_in_its_code(cls):
    model = nn.Sequential(nn.Linear(2, 2), cls())
    (site,) = find_attention(model)
    assert (site.name, site.tap, site.class_name) == ("1", "score", cls.__name__)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Direct()
        self.mlp = nn.Linear(2, 2)

    def forward(self, x):
        return self.mlp(self.attn(x))

    def unused(self, x):
        return sdpa(x, x, x)


def test_what_only_contains_a_layer_or_never_reaches_the_call_is_not_one():
    assert names(Block()) == ["attn"]
    assert names(nn.Sequential(nn.Linear(2, 2), nn.TransformerEncoderLayer(4, 2).linear1)) == []


class Replaces(Direct):
    """Calls a child's forward by name, not its own base class's."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(2, 2)

    def forward(self, x):
        return self.child.forward(x)


def test_a_class_that_replaces_an_attention_forward_is_not_one():
    assert names(nn.Sequential(Replaces())) == []


def owner(**children):
    module = nn.Module()
    for name, size in children.items():
        module.add_module(name, nn.Linear(4, size))
    return module


@pytest.mark.parametrize(
    "children",
    [
        ("q_proj", "k_proj", "v_proj"),
        ("to_q", "to_k", "to_v"),
        ("to_q", "to_kv"),
        ("query", "key", "value"),
        ("wq", "wk", "wv"),
        ("W_q", "W_k"),
        ("q_lin", "k_lin"),
        ("linear_q", "linear_k"),
        ("q", "k", "v"),
        ("qkv",),
        ("Wqkv",),
        ("to_qkv",),
        ("qkv_proj",),
        ("c_attn",),
        ("query_key_value",),
        ("queries", "keys", "values"),
        ("toqueries", "tokeys", "tovalues"),
        ("c_q", "c_k", "c_v"),
        ("q_a_proj", "q_b_proj", "kv_b_proj"),
        ("attn_qkv",),
        ("in_proj_qkv",),
        ("kqv",),
        ("to_qk", "to_v"),
        ("query_conv", "key_conv"),
    ],
)
def test_a_layer_is_found_by_the_projections_it_owns(children):
    assert names(nn.Sequential(owner(**dict.fromkeys(children, 4)))) == ["0"]


@pytest.mark.parametrize("children", [("key", "value"), ("query",), ("in_proj",), ("conv", "fc")])
def test_other_modules_are_not_taken_for_attention(children):
    assert names(nn.Sequential(owner(**dict.fromkeys(children, 4)))) == []


def test_projections_that_are_bare_parameters_count_too():
    module = nn.Module()
    module.qkv_weight = nn.Parameter(torch.zeros(12, 4))
    assert names(module) == [""]


def test_a_part_without_parameters_belongs_to_the_layer_with_the_projections():
    layer = owner(to_q=4, to_k=4)
    layer.add_module("attend", Direct())
    assert names(nn.Sequential(layer)) == ["0"]


class Core(nn.Module):
    """An attention call with parameters of its own."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def forward(self, q, k, v):
        return sdpa(q, k, v, attn_mask=self.extra(q @ k.mT))


class CoreByHand(Core):
    def forward(self, q, k, v):
        return self.extra(q @ k.mT).softmax(-1) @ v


EXTRAS = {
    "talking heads": lambda: nn.Conv2d(2, 2, 1),
    "relative bias": lambda: nn.Embedding(8, 2),
    "scale": lambda: nn.LayerNorm(8),
    "nothing": lambda: nn.Identity(),
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("core", [Core, CoreByHand])
def test_a_core_with_parameters_belongs_to_the_layer_with_the_projections(core, extra):
    layer = owner(to_q=4, to_k=4, to_v=4)
    layer.add_module("attend", nn.Sequential(core(EXTRAS[extra]())))
    assert names(nn.Sequential(layer, nn.Linear(4, 4))) == ["0"]


class FusedByHand(nn.Module):
    """One projection by a name that says nothing, and none of the output, as in DeBERTa."""

    def __init__(self, size):
        super().__init__()
        self.in_proj = nn.Linear(4, size)

    def forward(self, x):
        q, k, v = self.in_proj(x).expand(*x.shape[:-1], 12).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


def test_one_projection_that_makes_queries_and_keys_at_once_is_enough():
    model = nn.Sequential(FusedByHand(12), nn.Linear(4, 4))
    (site,) = find_attention(model)
    assert (site.name, site.tap, site.certain) == ("0", "softmax", False)
    assert names(nn.Sequential(FusedByHand(1), nn.Linear(4, 4))) == []


def test_a_wrapper_with_projection_names_gives_way_to_the_layer_inside():
    wrapper = owner(query=4, key=4)
    wrapper.add_module("attn", nn.MultiheadAttention(4, 2))
    assert names(nn.Sequential(wrapper)) == ["0.attn"]


def test_a_module_used_twice_appears_once():
    layer = ScoreAttention()
    assert names(nn.ModuleList([layer, layer])) == ["0"]


def test_compiled_and_data_parallel_wrappers_are_looked_through():
    model = Decoder(layers=1)
    assert names(torch.compile(model)) == ["blocks.0.attn"]
    assert names(nn.DataParallel(model)) == ["blocks.0.attn"]
    model.blocks[0]["attn"] = torch.compile(model.blocks[0]["attn"])
    assert names(model) == ["blocks.0.attn"]


def test_the_layers_module_is_the_one_that_runs():
    model = Decoder(layers=1)
    (site,) = find_attention(torch.compile(model))
    assert site.module is model.blocks[0]["attn"]


class Raising:
    """An object all of whose attributes raise."""

    def __getattr__(self, name):
        raise RuntimeError(f"{name} can't be told outside of a request")


class RaisingRegistry(dict):
    def values(self):
        raise RuntimeError("not filled yet")


class Incomparable:
    def __eq__(self, other):
        raise RuntimeError("can't be compared")

    __hash__ = None


class OfClasses(nn.Module):
    """Has attributes by the names of torch's own odd modules, and uses these too."""

    classes = ("cat", "dog")

    def __init__(self):
        super().__init__()
        self.ops, self._classes = torch.ops, torch.classes

    def forward(self, x):
        torch.classes.load_library(self.classes)
        return self.ops.aten.softmax(sdpa(x, x, x))


class OfPackages(nn.Module):
    backend, functional = torch, torch.nn

    def __init__(self):
        super().__init__()
        self.F, self.nn = F, nn

    def forward(self, x):
        x = self.backend.relu(x) + self.nn.functional.relu(x)
        return self.F.scaled_dot_product_attention(x, x, x)


class OfProperties(nn.Module):
    @property
    def head_dim(self):
        raise RuntimeError("not built yet")

    def forward(self, x):
        return sdpa(x, x, x) * self.head_dim


class OfDescriptors(nn.Module):
    class Descriptor:
        def __get__(self, instance, owner):
            raise RuntimeError("not built yet")

    size = Descriptor()

    def forward(self, x):
        return sdpa(x, x, x) * self.size


def of_raising_objects():
    proxy, registry = Raising(), RaisingRegistry(attend=sdpa)

    class OfRaisingObjects(nn.Module):
        def __init__(self):
            super().__init__()
            self.proxy, self.other = proxy, Incomparable()

        def forward(self, x):
            return sdpa(x, x, x) * proxy.scale + self.proxy.bias + registry["attend"](x, x, x)

    return OfRaisingObjects()


class OfInstance(nn.Module):
    def __init__(self):
        super().__init__()
        self.forward = sdpa


ODD = [
    OfClasses,
    OfPackages,
    OfProperties,
    OfDescriptors,
    of_raising_objects,
    OfInstance,
]


@pytest.mark.parametrize("build", ODD)
def test_odd_attributes_are_no_obstacle(build):
    assert names(nn.ModuleDict({"layer": build(), "head": nn.Linear(2, 2)})) == ["layer"]


def test_projections_without_a_size_yet_are_no_obstacle():
    layer = nn.Module()
    layer.q_proj, layer.k_proj = nn.LazyLinear(4), nn.LazyLinear(4)
    layer.attend = Core(nn.Conv2d(2, 2, 1))
    assert names(nn.Sequential(layer)) == ["0"]


def test_wrappers_inside_a_model_are_looked_through():
    model = Decoder()
    names = [site.name for site in find_attention(model)]
    model.blocks[0] = nn.ModuleDict(
        {name: checkpoint_wrapper(part) for name, part in model.blocks[0].items()}
    )
    model.blocks[1]["attn"] = torch.compile(model.blocks[1]["attn"])
    assert [site.name for site in find_attention(model)] == names
    optimizer = SpanScaledOptimizer(SGD(model.parameters()), model, {"blocks.0.attn": (2, 1)})
    batch = torch.zeros(2, 5, dtype=torch.long)
    loss_of(model(batch), batch).backward()
    optimizer.step()


def test_a_class_that_fully_shard_puts_before_a_layers_own_is_looked_through():
    class Unnamed(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    class FSDPModule:
        __module__ = "torch.distributed.fsdp"

    layer = Unnamed()
    layer.__class__ = type(
        "FSDPUnnamed", (FSDPModule, Unnamed), {"__module__": "torch.distributed.fsdp._fully_shard"}
    )
    (site,) = find_attention(nn.Sequential(layer))
    assert (site.class_name, site.tap) == ("Unnamed", "score")
