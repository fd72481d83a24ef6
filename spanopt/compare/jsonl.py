"""Append-only files with one JSON object per line, which survive a killed process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["append_line", "read_lines"]


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Read every whole line of a file.

    Args:
        path: The file.

    Yields:
        The number of the line, from 1, and the object in it. A last line without a newline is left
        out: a process was killed while writing it.

    Raises:
        ValueError: A line is not JSON.
    """
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not a result: {error!r}") from error


def append_line(path: Path, record: Any) -> None:
    """Add a record to a file. It is on disk when this returns.

    Args:
        path: The file. The file and its folder are made if they are missing.
        record: A value that JSON can hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        _cut_unfinished_line(file)
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_unfinished_line(file: BinaryIO) -> None:
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    if whole < end:
        file.truncate(whole)
