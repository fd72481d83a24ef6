"""The page docs/models.md, made of what the tests record of each model they train."""

import re
from importlib.metadata import version

_COLUMNS = ("library", "model", "attention", "taps", "layers", "error")
_rows: set[tuple[str, ...]] = set()


def note(properties):
    """Keep what a test recorded, if it is of a model."""
    if set(_COLUMNS) <= set(properties):
        shown = {**properties, "error": f"{properties['error']:.0e}"}
        _rows.add(tuple(re.sub(r",\b", ", ", str(shown[column])) for column in _COLUMNS))


def page():
    """Return the page, as Markdown."""
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "x-transformers")
    )
    lines = [
        "# Models that were tested",
        "",
        "`make models-table` generates this page from the tests. Each row was built from a",
        "small config with random weights, wrapped, and trained for five steps. The forward",
        "outputs equalled those of the bare model bit for bit, and the gradients of all",
        "parameters were compared with a reference that takes Q and K its own way and projects",
        "with an SVD. The error is the largest difference relative to the largest number in the",
        "same parameter's gradient.",
        "",
        f"With {libraries}.",
        "",
        "| library | model | attention | tap | layers | largest error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    ordered = sorted(_rows, key=lambda row: (row[0].lower(), row[1].lower(), row[2:]))
    lines += [f"| {' | '.join(row)} |" for row in ordered]
    lines += [
        "",
        "DeBERTa-v2: the content-to-content Q and K are rescaled, the products with relative",
        "positions are not. Of any other model, `python -m spanopt inspect` tells before training",
        "whether it can be scaled.",
    ]
    return "\n".join(lines) + "\n"
