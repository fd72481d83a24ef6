"""The places that get the rows: a file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from spanopt.rows import RowFile
from spanopt.sample import means

__all__ = ["Reports"]


class Reports:
    """The places that rows are sent to. Only :meth:`__init__` raises exceptions.

    Args:
        path: A JSONL file, or ``None``.
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or ``None``.
        run: A run of Weights & Biases, or ``None``.

    Raises:
        OSError: The file can't be written to.
    """

    def __init__(self, path: str | Path | None, writer: Any, run: Any) -> None:
        self._file = None if path is None else RowFile(path)
        self._writer = writer
        self._run = run
        self._warned: set[str] = set()
        if run is not None:
            run.define_metric("span/*", step_metric="span/step")

    def send(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Send the rows of a step to the file, and means over heads to the other places.

        Args:
            step: Number of the step.
            rows: The rows.
        """
        if self._file is not None:
            try:
                self._file.append(rows)
            except Exception as error:
                problem = f"{self._file.path} could not be written to: {error}. Rows wait for it"
                self.warn("path", problem)
        if self._writer is None and self._run is None:
            return
        values = means(rows)
        if self._writer is not None:
            try:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
            except Exception as error:
                self.warn("writer", f"writer takes no values: {type(error).__name__}: {error}")
        if self._run is not None:
            try:
                self._run.log({**values, "span/step": step})
            except Exception as error:
                self.warn("run", f"run takes no values: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Try once more to write the waiting rows, and warn if some could not be written."""
        if self._file is None or not self._file.waiting:
            return
        try:
            self._file.append([])
        except Exception as error:
            count = len(self._file.waiting)
            problem = f"{count} rows could not be written to {self._file.path}: {error}"
            self.warn("closing", problem)

    def warn(self, kind: str, problem: str) -> None:
        """Warn of a problem, but only once for each kind.

        Args:
            kind: What the problem is about.
            problem: What happened.
        """
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"SpanMonitor: {problem}. Training goes on", stacklevel=2)
