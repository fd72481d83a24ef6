"""The table of docs/models.md, made of what the tests record of each model they train."""

import re
from importlib.metadata import version

_COLUMNS = ("library", "model", "attention", "taps", "layers", "error")
_rows: set[tuple[str, ...]] = set()
# What the table is written between; the rest of the page is written by hand.
_MARKS = "<!-- the table, from the tests -->", "<!-- the end of the table -->"


def note(properties):
    """Keep what a test recorded, if it is of a model."""
    if set(_COLUMNS) <= set(properties):
        shown = {**properties, "error": f"{properties['error']:.0e}"}
        _rows.add(tuple(re.sub(r",\b", ", ", str(shown[column])) for column in _COLUMNS))


def page(text):
    """Return the page, Markdown, with the table replaced.

    Args:
        text: The page as it is.
    """
    before, _, rest = text.partition(_MARKS[0])
    _, _, after = rest.partition(_MARKS[1])
    return f"{before}{_MARKS[0]}\n\n{_table()}\n\n{_MARKS[1]}{after}"


def _table():
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "x-transformers")
    )
    ordered = sorted(_rows, key=lambda row: (row[0].lower(), row[1].lower(), row[2:]))
    return "\n".join(
        (
            f"With {libraries}.",
            "",
            "| library | model | attention | tap | layers | largest error |",
            "| --- | --- | --- | --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in ordered),
        )
    )
