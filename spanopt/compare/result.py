"""The object that ``compare`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spanopt.compare.arms import PLAIN
from spanopt.compare.design import Design
from spanopt.compare.drawing import forest, save
from spanopt.compare.reading import Reader
from spanopt.compare.statistics import Change
from spanopt.compare.store import Store
from spanopt.table import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison"]


class Comparison:
    """Arms compared with plain training. ``print`` shows the table and its meaning in words.

    Args:
        design: What was compared.
        store: The results.
        margin: The smallest change of interest, in per cent.

    Attributes:
        seeds: The seeds on which every arm was run.
        changes: The change of each arm against plain training.
        equal_time: The change of each arm that was also trained in the time of plain training.
        adjusted_p: p-values, adjusted for the number of arms and uniform controls by Benjamini and
            Hochberg's procedure.
        readings: The meaning of the comparison, in sentences.
    """

    def __init__(self, design: Design, store: Store, margin: float) -> None:
        reader = Reader(design, store, margin)
        self._design, self._store = design, store
        self.seeds: tuple[int, ...] = design.complete(store)
        self.changes: Mapping[str, Change] = reader.changes
        self.equal_time: Mapping[str, Change] = reader.equal_time
        self.adjusted_p: Mapping[str, float] = reader.adjusted_p
        self.readings: list[str] = reader.readings()

    def values(self) -> dict[str, float | None]:
        """Return the tuned value of each arm; ``None`` if nothing was tuned."""
        return {arm: self._design.best(arm, self._store) for arm in self._design.arms}

    def losses(self, arm: str) -> list[float | None]:
        """Return the metric of an arm on each seed; ``None`` where a trial gave no number.

        Args:
            arm: The name of the arm.

        Raises:
            KeyError: There is no such arm.
        """
        if arm not in self._design.arms:
            raise KeyError(f"no arm is named {arm!r}, only {', '.join(self._design.arms)}")
        seeds = tuple(seed for seed in self.seeds if seed in self._design.seeds_of(arm))
        return self._design.losses(arm, seeds, self._store)

    def trials(self) -> list[dict[str, Any]]:
        """Return every trial with its result, as they are stored."""
        return [{"trial": t.record(), "result": dict(r)} for t, r in self._store.results()]

    def table(self) -> str:
        """Return the comparison as a table of plain text."""
        sequential = self._design.until is not None
        interval = "95 % interval, any time" if sequential else "95 % interval"
        head = ["arm", "mean", "change, %", interval, "seeds", "p", "adjusted p"]
        tuned = self._design.grid is not None
        rows = [self._row(PLAIN, None)]
        rows += [self._row(arm, change) for arm, change in self.changes.items()]
        rows += [self._row(arm, change, True) for arm, change in self.equal_time.items()]
        if tuned:
            head.insert(1, "value")
        return aligned([head, *rows])

    def _row(self, arm: str, change: Change | None, equal_time: bool = False) -> list[str]:
        design = self._design
        seeds = tuple(seed for seed in self.seeds if seed in design.seeds_of(arm))
        losses = design.losses(arm, seeds, self._store, equal_time=equal_time)
        known = [loss for loss in losses if loss is not None]
        cells = [f"{arm}, equal time" if equal_time else arm]
        if design.grid is not None:
            value = design.best(arm, self._store)
            cells.append("" if value is None else f"{value:.3g}")
        cells.append(f"{sum(known) / len(known):.5g}" if known else "")
        if change is None:
            return [*cells, "", "", str(len(known)), "", ""]
        if change.diverged:
            pairs = "1 pair" if change.diverged == 1 else f"{change.diverged} pairs"
            cells[0] += f" ({pairs} without a result)"
        p = self.adjusted_p.get(arm)
        cells += [
            f"{change.mean:+.2f}",
            f"{change.low:+.2f} to {change.high:+.2f}",
            str(change.seeds),
            f"{change.p:.2g}",
        ]
        return [*cells, "" if p is None or equal_time else f"{p:.2g}"]

    def __str__(self) -> str:
        return "\n".join([self.table(), "", *self.readings])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the change of each arm with its interval.

        Args:
            path: Where to save the picture; the suffix says the format. By default nowhere.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ValueError: No arm has two pairs of results.
        """
        better = "above" if self._design.larger_is_better else "below"
        label = (
            f"change against plain training, % ({better} 0 is better); "
            f"{len(self.seeds)} paired seeds, 95 % interval"
        )
        shown = {arm: c for arm, c in self.changes.items() if c.seeds >= 2}
        shown |= {f"{arm}, equal time": c for arm, c in self.equal_time.items() if c.seeds >= 2}
        if not shown:
            raise ValueError("no arm has two pairs of results, so there is nothing to draw")
        figure = forest(shown, label, larger_is_better=self._design.larger_is_better)
        if path is not None:
            save(figure, Path(path))
        return figure
