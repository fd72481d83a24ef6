"""The statistics of a comparison, held against simulated truths."""

import math

import numpy as np
import pytest
from scipy import stats

from spanopt.compare.grid import Grid
from spanopt.compare.sequential import MIXTURE, at_any_time, evidence, half_width
from spanopt.compare.statistics import adjusted, compared, seeds_missing

TIMES = 1000


def losses_with(change, spread, shape, rng):
    """Draw losses of a baseline and of an arm with a known mean change in per cent."""
    baseline = rng.normal(2.0, 0.3, shape)
    return baseline * (1 + (change + spread * rng.normal(size=shape)) / 100), baseline


def within(share, nominal, deviations=4.0):
    return abs(share - nominal) < deviations * math.sqrt(nominal * (1 - nominal) / TIMES)


def test_intervals_of_a_known_effect_have_nominal_coverage():
    rng = np.random.default_rng(0)
    arm, baseline = losses_with(-0.5, 0.8, (TIMES, 10), rng)
    changes = [compared(a, b) for a, b in zip(arm, baseline, strict=True)]
    assert within(np.mean([c.low <= -0.5 <= c.high for c in changes]), 0.95)


def test_adjusted_p_values_have_nominal_false_positives():
    """Of tables of five arms that do nothing, one in twenty has a small adjusted p-value."""
    rng = np.random.default_rng(1)
    arms, baseline = losses_with(0.0, 0.8, (TIMES, 5, 10), rng)
    changes = 100 * (arms / baseline - 1)
    p_values = stats.ttest_1samp(changes, 0.0, axis=-1).pvalue
    first = compared(arms[0, 0], baseline[0, 0])
    assert first.p == pytest.approx(p_values[0, 0])
    found = np.mean([min(adjusted(row)) < 0.05 for row in p_values])
    assert within(found, 0.05)


def test_sequential_intervals_cover_the_truth_at_every_look_together():
    """Plain intervals that are looked at again and again do not."""
    rng = np.random.default_rng(2)
    values = rng.normal(-0.5, 0.8, (TIMES, 60))
    n = np.arange(2, 61)
    means = np.cumsum(values, 1)[:, 1:] / n
    spreads = np.stack([values[:, :k].std(1, ddof=1) for k in n], 1)
    always = np.array([half_width(1.0, k) for k in n]) * spreads
    plain = stats.t.ppf(0.975, n - 1) / np.sqrt(n) * spreads
    missed = [np.mean((np.abs(means + 0.5) > half).any(1)) for half in (always, plain)]
    assert missed[0] <= 0.05
    assert missed[1] > 0.15


def test_a_comparison_stopped_when_narrow_or_clear_keeps_its_error_rate():
    rng = np.random.default_rng(3)
    arm, baseline = losses_with(0.0, 0.8, (150, 40), rng)
    false = 0
    for a, b in zip(arm, baseline, strict=True):
        for n in range(2, 41, 2):
            change = at_any_time(a[:n], b[:n])
            if change.p < 0.05 or change.high - change.low < 0.6:
                break
        false += change.p < 0.05
    assert false / 150 <= 0.05


def test_the_sequential_interval_is_the_means_that_are_not_rejected():
    values = np.random.default_rng(4).normal(0.3, 1.0, 15)
    half = half_width(values.std(ddof=1), 15)
    for side in (-1, 1):
        edge = values.mean() + side * half
        assert evidence(values - edge) == pytest.approx(math.log(20))
    assert evidence(values - values.mean()) == pytest.approx(-math.log(1 + 15 * MIXTURE) / 2)


def test_the_sequential_evidence_is_the_bayes_factor_of_its_mixture():
    """Numerically: the likelihood of t under effects drawn from the mixture, over that of none."""
    values = np.random.default_rng(5).normal(0.5, 1.0, 12)
    t = values.mean() / values.std(ddof=1) * math.sqrt(12)
    effects = np.linspace(-6, 6, 4001)
    prior = stats.norm.pdf(effects, scale=math.sqrt(MIXTURE))
    mixed = np.trapezoid(stats.nct.pdf(t, 11, effects * math.sqrt(12)) * prior, effects)
    assert evidence(values) == pytest.approx(math.log(mixed / stats.t.pdf(t, 11)), abs=1e-3)


def test_sequential_p_values_never_rise_with_more_seeds():
    arm, baseline = losses_with(-0.5, 0.8, 30, np.random.default_rng(6))
    p_values = [at_any_time(arm[:n], baseline[:n]).p for n in range(2, 31)]
    assert p_values == sorted(p_values, reverse=True)
    assert p_values[-1] < 0.05


def test_equal_losses_are_no_change():
    for compare in (compared, at_any_time):
        change = compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
        assert (change.mean, change.p, change.seeds) == (0.0, 1.0, 3)


def test_pairs_without_a_result_are_left_out_and_counted():
    for compare in (compared, at_any_time):
        change = compare([1.0, None, 3.0, 4.1], [1.1, 2.0, None, 4.0])
        assert (change.seeds, change.diverged) == (2, 2)
        assert math.isnan(compare([None, 1.0], [1.0, 1.0]).mean)


def test_the_seeds_that_are_still_needed_are_about_right():
    change = compared([1.01, 0.98, 1.0, 1.02, 0.99], [1.0] * 5)
    more = seeds_missing(change, 0.5)
    n = change.seeds + more
    half = lambda n: stats.t.ppf(0.975, n - 1) * change.spread / math.sqrt(n)  # noqa: E731
    assert half(n) <= 0.5 < half(n - 1)
    assert seeds_missing(change, 50.0) == 0


def search(grid, loss):
    losses = {}
    while wanted := grid.wanted(losses):
        losses |= {value: loss(value) for value in wanted}
    return losses


@pytest.mark.parametrize("best", [2e-5, 1e-3, 3e-3, 0.2])
def test_a_grid_is_extended_until_its_best_value_is_inside(best):
    grid = Grid([1e-3, 2e-3, 6e-3], extensions=8)
    losses = search(grid, lambda value: math.log(value / best) ** 2)
    assert grid.is_inside(losses)
    found = grid.best(losses)
    assert found == min(grid.points, key=lambda value: abs(math.log(value / best)))


def test_a_grid_that_never_gets_inside_says_so():
    grid = Grid([1e-3, 2e-3], extensions=2)
    losses = search(grid, lambda value: value)
    assert (grid.best(losses), grid.is_inside(losses)) == (2.5e-4, False)


@pytest.mark.parametrize("values", [[], [2.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
def test_a_grid_that_is_none_is_refused(values):
    with pytest.raises(ValueError, match="positive numbers in ascending order"):
        Grid(values)
