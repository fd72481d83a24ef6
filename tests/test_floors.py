"""The order of the floors: an import goes down the list only, wherever in a file it is written."""

import ast
from pathlib import Path

import pytest

import spanopt

ROOT = Path(spanopt.__file__).parent

# From the top down. Names on one line do not import each other; the name of a package stands for
# all that is in it.
FLOORS = """
    __main__
    compare
    __init__
    integrations
    monitor
    reports lifetime
    sample picture
    measures scores scores_reading rows inspection
    guessing figures
    scheduler
    schedules optimizer
    checkpoint arrivals proxy
    installing
    hooks renaming
    scaled_layers focus
    unscaled placement probing
    plan table tokens
    taps
    compiling errors
    pair
    node
    rescaling
    setups
    projection shards groups
    mathematics sites
    traits scale
    patterns declarations importing
"""
FLOOR = {name: i for i, line in enumerate(FLOORS.strip().splitlines()) for name in line.split()}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in ROOT.rglob("*.py")}


# The mathematics, which import nothing else of the library, and their public face.
PURE = sorted(name for name in MODULES if name.split(".")[0] in ("mathematics", "projection"))
# What a module may import of the library, and of torch, at most.
ONLY = {
    **{name: set(PURE) for name in PURE},
    "shards": set(),
    "compiling": set(),
    "patterns": set(),
    "declarations": set(),
    "importing": set(),
}
# What a module knows by way of others only.
NEVER = {
    "optimizer": {"taps", "integrations", "lightning"},
    "monitor": {"taps", "hooks", "plan", "node"},
    "node": {"scale", "sites"},
    "sites": {"scale"},
}


def imports(source):
    """Return the full names that a file imports anywhere, with those that may be modules."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [x for x in names if x.removeprefix("spanopt.") in MODULES]
            found += modules if len(modules) == len(names) else [node.module, *modules]
    return found


def own_imports(name):
    """Return the modules of the library that one of them imports."""
    found = set()
    for full in imports(MODULES[name].read_text(encoding="utf-8")):
        if full == "spanopt":
            found.add("__init__")
        elif full.startswith("spanopt."):
            found.add(full.removeprefix("spanopt."))
    return found


def floor_of(name):
    return name.split(".")[0]


def test_every_module_has_a_floor_and_every_floor_a_module():
    assert {floor_of(name) for name in MODULES} == set(FLOOR)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name):
    here = floor_of(name)
    for other in own_imports(name):
        there = floor_of(other)
        assert here == there or FLOOR[here] < FLOOR[there], f"{name} imports {other}"


@pytest.mark.parametrize(
    "package", ["compare", "focus", "integrations", "mathematics", "setups", "taps"]
)
def test_within_a_package_no_imports_go_round(package):
    inside = {name: own_imports(name) for name in MODULES if floor_of(name) == package}
    done = set()

    def visit(name, path):
        assert name not in path, f"a circle: {' imports '.join((*path, name))}"
        if name not in done:
            for other in inside.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in inside:
        visit(name, ())


@pytest.mark.parametrize("name", ONLY)
def test_the_mathematics_and_the_lowest_floors_import_torch_alone(name):
    assert own_imports(name) <= ONLY[name]
    standard = {"__future__", "collections", "contextlib", "typing", "math", "importlib", "sys"}
    standard |= {"types", "weakref", "fnmatch", "re", "difflib", "dataclasses", "itertools"}
    standard |= {"os", "functools", "pathlib"}
    if name in ("mathematics.fused", "mathematics.triton_kernels"):
        standard.add("triton")  # where it is first needed: see tests/mathematics/test_triton.py
    others = {full.split(".")[0] for full in imports(MODULES[name].read_text(encoding="utf-8"))}
    assert others - {"spanopt", "torch"} <= standard


@pytest.mark.parametrize("name", NEVER)
def test_what_a_module_must_not_know(name):
    full = imports(MODULES[name].read_text(encoding="utf-8"))
    known = {floor_of(x.removeprefix("spanopt.")) for x in full}
    assert known.isdisjoint(NEVER[name])


def test_an_import_that_goes_up_is_found():
    """A wrong import, in a function too, is seen by what the tests above rest on."""
    source = "def f():\n    from spanopt.hooks import SpanHooks\n    from spanopt.taps import tap\n"
    assert imports(source) == ["spanopt.hooks", "spanopt.taps.tap"]
    assert FLOOR["hooks"] < FLOOR["taps"] < FLOOR["node"] < FLOOR["patterns"]
