"""Draw the floors of the package and what imports what: docs/architecture.png.

The floors are the ``layers`` contract in ``pyproject.toml`` that ``lint-imports`` checks, and the
arrows are read from the import statements. Nothing in the picture is placed by hand.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = "spanopt"


def floors() -> list[list[str]]:
    """Return the modules of each floor, the highest floor first, from the contract."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (c for c in settings["contracts"] if c["type"] == "layers")
    return [
        [name.strip("() ").removeprefix(f"{PACKAGE}.") for name in re.split(r"[|:]", layer)]
        for layer in contract["layers"]
    ]


def imports(modules: list[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of modules of which the first imports the second."""
    for module in modules:
        path = ROOT / PACKAGE / Path(*module.split("."))
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        names = {name for file in files for name in _imported(ast.parse(file.read_text()))}
        for other in modules:
            full = f"{PACKAGE}.{other}"
            if other != module and any(n == full or n.startswith(full + ".") for n in names):
                yield module, other


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def draw(path: Path) -> None:
    """Draw the picture into a file."""
    rows = floors()
    width = max(map(len, rows))
    figure, axes = plt.subplots(figsize=(1.75 * width + 0.5, 0.85 * len(rows) + 0.3))
    place = {}
    for y, row in enumerate(rows):
        for i, name in enumerate(row):
            place[name] = (width / 2 + (i - (len(row) - 1) / 2), -float(y))
    for source, target in imports(list(place)):
        (x, y), (u, v) = place[source], place[target]
        arrow = FancyArrowPatch(
            (x, y - 0.2),
            (u, v + 0.24),
            arrowstyle="-|>",
            mutation_scale=7,
            color="#0072b2",
            alpha=0.28,
            linewidth=0.9,
            connectionstyle=f"arc3,rad={0.12 if abs(y - v) > 1 else 0}",
        )
        axes.add_patch(arrow)
    for name, (x, y) in place.items():
        box = FancyBboxPatch(
            (x - 0.42, y - 0.2),
            0.84,
            0.4,
            boxstyle="round,pad=0.02",
            facecolor="white",
            edgecolor="#444444",
            linewidth=1,
            zorder=3,
        )
        axes.add_patch(box)
        axes.text(x, y, name.replace(".", ".\n"), ha="center", va="center", fontsize=8, zorder=4)
    axes.set_xlim(0, width + 0.0)
    axes.set_ylim(-len(rows) + 0.4, 0.5)
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=160, facecolor="white")


if __name__ == "__main__":
    draw(ROOT / "docs" / "architecture.png")
