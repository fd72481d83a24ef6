"""The result of a comparison in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spanopt.compare.arms import FROZEN, NEAR_NULL, PLAIN
from spanopt.compare.design import REPEATED, Design
from spanopt.compare.statistics import Change, adjusted, seeds_missing
from spanopt.compare.store import Store

__all__ = ["LEVEL", "Reader", "in_words"]

LEVEL = 0.05
TINY = 0.01  # per cent


def in_words(change: Change) -> str:
    """Return a change with its interval as text."""
    return f"{change.mean:+.2f} % ({change.low:+.2f} to {change.high:+.2f})"


class Reader:
    """Turns the numbers of a comparison into sentences.

    Args:
        design: What was compared.
        store: The results.
        margin: The smallest change of interest, in per cent.
    """

    def __init__(self, design: Design, store: Store, margin: float) -> None:
        self.design = design
        self.store = store
        self.margin = margin
        others = [arm for arm in design.arms if arm != PLAIN]
        self.changes: dict[str, Change] = {arm: design.change(arm, store) for arm in others}
        self.equal_time: dict[str, Change] = {
            arm: design.change(arm, store, equal_time=True)
            for arm in design.named.asked
            if design.steps is not None and design.time_ratio(arm, store) is not None
        }
        family = [arm for arm in others if arm not in (NEAR_NULL, FROZEN)]
        p_values = adjusted([self.changes[arm].p for arm in family])
        self.adjusted_p: dict[str, float] = dict(zip(family, p_values, strict=True))

    def readings(self) -> list[str]:
        """Return the sentences: first about the arms, then about how far they can be trusted."""
        return [
            *(self.of_arm(arm) for arm in self.design.named.asked),
            *self.of_time(),
            *self.of_controls(),
            *self.of_repetition(),
            *self.of_values(),
            *self.of_failures(),
        ]

    def verdict(self, change: Change, p: float) -> str:
        """Return what a change shows: ``"better"``, ``"worse"``, ``"same"`` or ``"open"``."""
        if math.isnan(change.mean) or math.isnan(p):
            return "open"
        if p < LEVEL:
            better = change.mean > 0 if self.design.larger_is_better else change.mean < 0
            return "better" if better else "worse"
        return "same" if max(-change.low, change.high) <= self.margin else "open"

    def of_arm(self, arm: str) -> str:
        """Return the sentence about one arm."""
        change = self.changes[arm]
        verdict = self.verdict(change, self.adjusted_p[arm])
        if verdict == "better":
            return f"{arm} helps{self._beside_uniform(arm)}: {in_words(change)} of plain training."
        if verdict == "worse":
            return f"{arm} is worse than plain training: {in_words(change)}."
        if verdict == "same":
            limit = max(-change.low, change.high)
            return f"{arm}: no difference larger than {limit:.2g} % ({in_words(change)})."
        return f"{arm}: no conclusion yet{self._still_needed(change)}."

    def _beside_uniform(self, arm: str) -> str:
        control = self.design.named.uniform.get(arm)
        if control is None:
            return ""
        between = self.design.change(arm, self.store, against=control)
        verdict = self.verdict(between, between.p)
        if verdict == "better":
            return f", and more than {control} does ({in_words(between)})"
        if verdict == "worse":
            return f", and less than {control} does ({in_words(between)})"
        return f", and no more than {control} does, as far as these seeds tell"

    def _still_needed(self, change: Change) -> str:
        if math.isnan(change.mean):
            return f": {change.seeds} seeds gave a result in both arms"
        more = seeds_missing(change, self.margin)
        advice = f": {in_words(change)}; "
        if more > 0:
            seeds = "1 more seed" if more == 1 else f"{more} more seeds"
            advice += f"about {seeds} would tell a change of {self.margin:g} %"
        else:
            advice += f"fresh seeds would tell whether it is larger than {self.margin:g} %"
        return advice

    def of_time(self) -> Iterator[str]:
        """Say how good the arms are in the same time."""
        for arm in self.design.named.asked:
            ratio = self.design.time_ratio(arm, self.store)
            if ratio is None:
                continue
            text = f"A step of {arm} takes {ratio:.2f} times as long as a plain one"
            if arm in self.equal_time:
                yield f"{text}; in the same time the change is {in_words(self.equal_time[arm])}."
            else:
                yield f"{text}. Give steps= to compare in the same time."

    def of_controls(self) -> Iterator[str]:
        """Say what the controls show."""
        change = self.changes.get(FROZEN)
        if change is not None:
            if self.verdict(change, change.p) == "worse":
                yield f"Attention matters here: freezing Q and K costs {in_words(change)}."
            else:
                yield (
                    "Freezing Q and K does not clearly hurt here "
                    f"({in_words(change)}, {change.seeds} seeds). Then nothing can be learned "
                    "about scaling their gradients from this training."
                )
        change = self.changes.get(NEAR_NULL)
        if change is not None and not math.isnan(change.mean):
            reach = max(-change.low, change.high)
            seen = in_words(change) if reach >= TINY else f"less than {TINY:g} %"
            text = f"The near-null arm, which changes next to nothing, shows {seen}"
            if change.p < LEVEL and reach >= TINY:
                text += ": by chance alone a difference of this size comes out as clear"
            yield f"{text}."

    def of_repetition(self) -> Iterator[str]:
        """Say whether plain training, run twice, gives the same result."""
        differences = []
        for seed in self.design.seeds[:REPEATED]:
            trial = self.design.trial(PLAIN, self.design.best(PLAIN, self.store), seed)
            found = [self.store.get(t) for t in (trial, self.design.repetition(trial))]
            values = [None if r is None else self.design.metric_of(r) for r in found]
            if values[0] is not None and values[1] is not None:
                differences.append(100 * abs(values[1] / values[0] - 1))
        if differences and max(differences) == 0:
            yield "Plain training run twice with one seed gives the same result."
        elif differences:
            yield (
                "Plain training run twice with one seed differs by up to "
                f"{max(differences):.2g} %: the seed does not decide everything, and pairing by "
                "seeds removes less."
            )

    def of_values(self) -> Iterator[str]:
        """Say for which arms the best value is at an end of the values that were tried."""
        grid = self.design.grid
        for arm in self.design.arms if grid else ():
            if self.design.value_from(arm) == arm and grid is not None:
                losses = self.design.swept(arm, self.store)
                if losses and not grid.is_inside(losses):
                    best = f"{grid.best(losses):g}"
                    yield f"The best value for {arm} is at the end of all that were tried, {best}."

    def of_failures(self) -> Iterator[str]:
        """Say which trials gave no number."""
        for trial, result in self.store.results():
            if "error" in result:
                yield f"Failed: {trial.arm}, seed {trial.seed}: {result['error']}"
            elif self.design.metric_of(result) is None:
                at = "" if trial.value is None else f" at {trial.value:g}"
                yield f"Diverged: {trial.arm}{at}, seed {trial.seed}."
