"""Draw the floors of the package and what imports what: docs/architecture.png.

The floors are those of ``tests/test_floors.py``, which holds the imports to them, and the arrows
are read from the import statements. An arrow that a chain of others implies is left out. Nothing
in the picture is placed by hand.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from harness.shades import save_both  # noqa: E402

PACKAGE = "spanopt"


def floors() -> list[list[str]]:
    """Return the modules of each floor, the highest floor first."""
    source = (ROOT / "tests" / "test_floors.py").read_text(encoding="utf-8")
    (lines,) = re.findall(r'^FLOORS = """\n(.*?)^"""', source, re.MULTILINE | re.DOTALL)
    return [[x for x in line.split() if x != "__init__"] for line in lines.splitlines()]


def imports(modules: list[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of modules of which the first imports the second."""
    for module in modules:
        path = ROOT / PACKAGE / module
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        names = {name for file in files for name in _imported(ast.parse(file.read_text()))}
        for other in modules:
            full = f"{PACKAGE}.{other}"
            if other != module and any(n == full or n.startswith(full + ".") for n in names):
                yield module, other


def reduced(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the arrows that no chain of others implies."""
    below: dict[str, set[str]] = {}

    def reached(name: str) -> set[str]:
        if name not in below:
            direct = {there for here, there in arrows if here == name}
            below[name] = direct.union(*map(reached, direct))
        return below[name]

    direct = {here: {there for x, there in arrows if x == here} for here, _ in arrows}
    return {
        (here, there)
        for here, there in arrows
        if not any(there in reached(other) for other in direct[here] - {there})
    }


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def draw() -> Figure:
    """Draw the picture."""
    rows = [row for row in floors() if row]
    width = max(map(len, rows))
    figure = Figure(figsize=(1.9 * width + 0.5, 0.4 * len(rows) + 0.3))
    axes, ink = figure.subplots(), rcParams["text.color"]
    place = {}
    for y, row in enumerate(rows):
        for i, name in enumerate(row):
            place[name] = (width / 2 + (i - (len(row) - 1) / 2), -float(y))
    for source, target in sorted(reduced(set(imports(list(place))))):
        (x, y), (u, v) = place[source], place[target]
        arrow = FancyArrowPatch(
            (x, y - 0.3),
            (u, v + 0.32),
            arrowstyle="-|>",
            mutation_scale=7,
            color="#5b8fc7",
            alpha=0.6,
            linewidth=0.9,
            connectionstyle=f"arc3,rad={0.15 if abs(y - v) > 1 else 0}",
        )
        axes.add_patch(arrow)
    for name, (x, y) in place.items():
        box = FancyBboxPatch(
            (x - 0.36, y - 0.28),
            0.72,
            0.56,
            boxstyle="round,pad=0.02",
            facecolor=rcParams["axes.facecolor"],
            edgecolor=ink,
            linewidth=1,
            zorder=3,
        )
        axes.add_patch(box)
        axes.text(x, y, name, ha="center", va="center", fontsize=9, zorder=4)
    axes.set_xlim(0, width + 0.0)
    axes.set_ylim(-len(rows) + 0.4, 0.5)
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    return figure


if __name__ == "__main__":
    save_both(draw, ROOT / "docs" / "architecture.png", dpi=160)
