"""Generate pages: the API reference, one page per object in groups; the examples; the changelog."""

from __future__ import annotations

import ast
from pathlib import Path

import mkdocs_gen_files

GROUPS = {
    "Training": [
        "spanopt.SpanScaledOptimizer",
        "spanopt.attach",
        "spanopt.SpanHooks",
        "spanopt.SpanScale",
        "spanopt.SpanGroup",
        "spanopt.token_mask",
    ],
    "Schedules": [
        "spanopt.SpanScheduler",
        "spanopt.linear",
        "spanopt.cosine",
        "spanopt.constant",
        "spanopt.piecewise",
        "spanopt.chained",
    ],
    "Looking": [
        "spanopt.SpanMonitor",
        "spanopt.find_attention",
        "spanopt.AttentionSite",
    ],
    "Mathematics": [
        "spanopt.project",
        "spanopt.decompose",
        "spanopt.rescale",
        "spanopt.span_node",
        "spanopt.projection.set_formulation",
    ],
    "Frameworks": [
        "spanopt.integrations.transformers.SpanScaledCallback",
        "spanopt.integrations.lightning.SpanScaledCallback",
    ],
    "Comparing": [
        "spanopt.compare.compare",
        "spanopt.compare.Comparison",
        "spanopt.compare.Arm",
    ],
    "Extending": [
        "spanopt.taps.register",
        "spanopt.setups.setup",
        "spanopt.setups.Setup",
    ],
    "Semantic focus": [
        "spanopt.focus.focus",
        "spanopt.focus.Focus",
        "spanopt.focus.FocusHooks",
        "spanopt.focus.focused_attention",
    ],
    "Errors": ["spanopt.UnscaledLayerError", "spanopt.focus.UnfocusedLayerError"],
}

# Classes of which a part is in a base class of this package.
INHERITING = {"spanopt.SpanHooks"}


def page_of(path: str) -> str:
    """Return the file of an object's page, relative to the reference."""
    return path.removeprefix("spanopt.").replace(".", "-") + ".md"


def write_reference() -> None:
    """Write a page for each object, their index, and their order in the navigation."""
    index, order = ["# Reference", ""], ["- [Reference](index.md)"]
    for group, paths in GROUPS.items():
        index += [f"## {group}", ""]
        order.append(f"- {group}")
        for path in paths:
            name = path.removeprefix("spanopt.").rpartition(".")[2]
            index.append(f"- [`{path}`]({page_of(path)})")
            order.append(f"    - [{name}]({page_of(path)})")
            options = "    options: {inherited_members: true}\n" if path in INHERITING else ""
            _write(f"reference/{page_of(path)}", f"::: {path}\n{options}")
        index.append("")
    _write("reference/index.md", "\n".join(index))
    _write("reference/SUMMARY.md", "\n".join(order))


def write_examples() -> None:
    """Write a page for each example, with its code, and their order in the navigation."""
    order = []
    for path in sorted(Path("examples").glob("*.py")):
        code = path.read_text(encoding="utf-8")
        title = (ast.get_docstring(ast.parse(code)) or path.stem).splitlines()[0]
        order.append(f"- [{path.name}]({path.stem}.md)")
        text = f"# {path.name}\n\n{title}\n\n```python\n{code}```\n"
        _write(f"examples/{path.stem}.md", text)
    _write("examples/SUMMARY.md", "\n".join(order))


def _write(page: str, text: str) -> None:
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)


write_reference()
write_examples()
_write("changelog.md", Path("CHANGELOG.md").read_text(encoding="utf-8"))
