"""The results of a comparison on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spanopt.compare.jsonl import append_line, read_lines
from spanopt.compare.trial import Trial

__all__ = ["Store"]


class Store:
    """The results of trials: in memory, and in a folder if there is one.

    ``trials.jsonl`` has one result per line. ``settings.json`` has the settings of the comparison.

    Args:
        folder: The folder, which is made if it is missing; ``None`` keeps results in memory only.
        settings: All settings on which results depend, as values that JSON can hold.

    Raises:
        ValueError: The folder has results of other settings, or a line that is not a result.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = None if folder is None else folder / "trials.jsonl"
        self._results: dict[Trial, dict[str, Any]] = {}
        if folder is None or self._path is None:
            return
        _check_settings(folder, settings)
        if self._path.exists():
            for number, record in read_lines(self._path):
                try:
                    self._results[Trial(**record["trial"])] = record["result"]
                except (KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self._path}, line {number}, is not a result: {error!r}"
                    ) from error

    def get(self, trial: Trial) -> dict[str, Any] | None:
        """Return the result of a trial; ``None`` if it has not been run."""
        return self._results.get(trial)

    def keep(self, trial: Trial, result: dict[str, Any]) -> None:
        """Keep a result. With a folder, it is on disk when this returns."""
        if self._path is not None:
            append_line(self._path, {"trial": trial.record(), "result": result})
        self._results[trial] = result

    def results(self) -> Iterator[tuple[Trial, dict[str, Any]]]:
        """Return every trial and its result, in the order in which they ended."""
        return iter(self._results.items())

    def forget_errors(self) -> None:
        """Forget trials that raised an error, so that they run again. The file keeps them."""
        self._results = {t: r for t, r in self._results.items() if "error" not in r}


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        differing = list(_differences(known, settings))
        if differing:
            raise ValueError(
                f"{folder} has results of other settings: {'; '.join(differing[:5])}. "
                "Choose another folder with out="
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _differences(known: Any, new: Any, name: str = "") -> Iterator[str]:
    """Say in which entries two settings differ."""
    if isinstance(known, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*known, *new]):
            where = f"{name}[{key!r}]" if name else key
            if key not in new:
                yield f"{where} is there and was not asked for now"
            elif key not in known:
                yield f"{where} was asked for now and is not there"
            else:
                yield from _differences(known[key], new[key], where)
    elif known != new:
        yield f"{name} was {known!r} and is now {new!r}"
