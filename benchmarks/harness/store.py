"""Results on disk: append-only files of one JSON object a line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.texts import Text, text_of
from harness.trial import Trial
from spanopt.compare.jsonl import append_line, read_lines

__all__ = ["Store"]


class Store:
    """The results of all experiments, found by trial.

    One file for each experiment, ``<name>.jsonl``. What a killed run had half written is cut off
    when that experiment goes on, so nothing is lost but the trials in progress.

    Args:
        folder: Where the files are.

    Raises:
        ValueError: A line that is no result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records: dict[str, dict[str, Any]] = {}
        self.texts: dict[str, str] = {}
        for path in sorted(folder.glob("*.jsonl")):
            self._read(path)

    def _read(self, path: Path) -> None:
        for number, record in read_lines(path):
            try:
                trial = Trial.read(record["trial"])
                if trial.text == "given":
                    self.texts[record["text"]["sha256"]] = record["text"]["name"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}, is not a result: {error!r}") from error
            self._records[trial.key] = record

    def get(self, trial: Trial) -> dict[str, Any] | None:
        """Return the result of a trial, ``None`` if it has not been run."""
        record = self._records.get(trial.key)
        return None if record is None else record["result"]

    def check_text(self, text: Text) -> None:
        """Refuse to mix results of two texts that the study was given.

        Raises:
            ValueError: There are results of another text.
        """
        others = [name for digest, name in self.texts.items() if digest != text.digest]
        if others:
            raise ValueError(
                f"{self.folder} has results of another text, {others[0]!r}, and this run's is "
                f"{text.name!r}: choose another folder with --out"
            )

    def append(self, experiment: str, trial: Trial, text: Text, result: dict[str, Any]) -> None:
        """Keep a result, on disk when this returns.

        Args:
            experiment: The name of the experiment.
            trial: The trial.
            text: The text that the study was given.
            result: The trial's result.
        """
        used = text_of(trial.text, text)
        record = {
            "trial": asdict(trial),
            "text": {"name": used.name, "sha256": used.digest},
            "result": result,
        }
        append_line(self.folder / f"{experiment}.jsonl", record)
        self._records[trial.key] = record
        if trial.text == "given":
            self.texts[text.digest] = text.name
