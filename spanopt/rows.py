"""Rows as lines of JSON, in a file that stays readable after a crash in the middle of a line."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["RowFile", "read_rows"]


class RowFile:
    """A file to which rows are appended, each as one line of strict JSON.

    Args:
        path: The path of the file, which is created if it is missing.

    Attributes:
        waiting: Lines that could not be written yet.

    Raises:
        OSError: The file can't be written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path = Path(path)
        self.waiting: list[str] = []
        with open(self.path, "ab"):
            pass

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows that are waiting, and then these.

        Args:
            rows: Dicts of finite numbers, strings and ``None``.

        Raises:
            OSError: They can't be written. They then wait for the next call, and what was written
                of them is cut off the file again if that is possible.
        """
        self.waiting += [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        if not self.waiting:
            return
        with open(self.path, "a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            text = "".join(self.waiting).encode()
            if end and _last_byte(file, end) != b"\n":
                text = b"\n" + text  # a crash left the previous line unfinished
            try:
                written = file.write(text)
                while written < len(text):
                    written += file.write(text[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
        self.waiting = []


def _last_byte(file: Any, end: int) -> bytes:
    file.seek(end - 1)
    byte: bytes = file.read(1)
    return byte


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a file that :class:`RowFile` wrote.

    Args:
        path: The path of the file.

    Returns:
        The rows. A line that a crash left unfinished is left out, and a warning names it.

    Raises:
        OSError: The file can't be read.
    """
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            rows.append(_parsed(line))
        except ValueError:
            warnings.warn(
                f"line {number} of {path} is no row, as after a crash in the middle of writing "
                f"it, and is left out: {line[:40]!r}",
                stacklevel=3,
            )
    return rows


def _parsed(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a row")
    return row
