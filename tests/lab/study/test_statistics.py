"""Statistics against scipy and against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sinkroute.lab.study.statistics import Estimate, blocks, detectable, holm, paired, power, sign_flip, trend, verdict

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("n", [2, 3, 5, 12, 40])
def test_the_interval_is_students(n: int) -> None:
    values = RANDOM.normal(3, 2, n)
    found = Estimate.of(list(values))
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_one_value_has_no_interval_and_no_test() -> None:
    found = paired([0.3])
    assert (found.difference.half, found.p, found.p_flip) == (None, None, None)
    with pytest.raises(ValueError, match="values is empty"):
        Estimate.of([])


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_paired_test_is_scipys(n: int) -> None:
    one, other = RANDOM.normal(0, 1, n), RANDOM.normal(0.5, 1, n)
    found = paired(list(one - other))
    assert found.p == pytest.approx(stats.ttest_rel(one, other).pvalue)


@pytest.mark.parametrize("n", [2, 3, 6, 9])
def test_the_sign_flip_test_is_scipys_permutation_test(n: int) -> None:
    values = RANDOM.normal(0.4, 1, n)
    theirs = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=math.inf)
    assert sign_flip(list(values)) == pytest.approx(theirs.pvalue)


def test_with_five_seeds_the_sign_flip_test_cannot_reach_the_level() -> None:
    assert sign_flip([1.0, 1.1, 0.9, 1.2, 0.8]) == 2 / 32


def test_of_many_seeds_signs_are_drawn_and_the_same_ones_each_time() -> None:
    values = list(RANDOM.normal(0.3, 1, 14))
    exact = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=math.inf).pvalue
    assert sign_flip(values) == sign_flip(values)
    # Twice a share of 9999 draws, within four of its standard deviations.
    assert sign_flip(values) == pytest.approx(exact, abs=8 * math.sqrt(exact / 2 * (1 - exact / 2) / 9999))


def test_two_methods_are_equivalent_when_the_90_per_cent_interval_lies_within_the_margin() -> None:
    values = RANDOM.normal(0.02, 0.05, 9)
    low, high = stats.t.interval(0.9, 8, loc=values.mean(), scale=stats.sem(values))
    edge = max(abs(low), abs(high))
    assert (
        paired(list(values), margin=1.001 * edge).p_equivalent < 0.05 < paired(list(values), edge / 1.001).p_equivalent
    )
    assert paired([0.5, 0.5], margin=0.6).p_equivalent == 0.0
    assert paired([0.5, 0.5], margin=0.4).p_equivalent == 1.0


def test_a_true_difference_that_is_detectable_is_found_in_four_of_five_studies() -> None:
    draws = np.random.default_rng(0).standard_normal((20000, 5)) + detectable(5)
    assert (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.012)
    assert power(0.0, 5) == pytest.approx(0.05)
    scatter = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert paired(scatter).detectable == pytest.approx(detectable(5) * np.std(scatter, ddof=1))


def test_signs_that_give_equal_sums_count_as_equal() -> None:
    # 0.1 + 0.2 − 0.3 is above 0 in binary, so 0.01 more is above 0.01 less than nothing: in decimals both are 0.01,
    # and no choice of signs is nearer to 0.
    assert sign_flip([0.1, 0.2, -0.3, 0.01]) == 1.0


def test_differences_without_spread_are_sure_or_nothing() -> None:
    assert paired([0.0, 0.0, 0.0]).p == 1.0
    assert paired([0.5, 0.5, 0.5]).p == 0.0


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04 → 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    """Its definition: a hypothesis falls when Bonferroni rejects every set of hypotheses that holds it."""
    p = list(RANDOM.uniform(0, 0.3, 5))
    sets = [[i for i in range(5) if mask >> i & 1] for mask in range(1, 32)]
    slow = [max(min(1.0, len(each) * min(p[j] for j in each)) for each in sets if i in each) for i in range(5)]
    assert holm(p) == pytest.approx(slow)


def test_the_verdict_follows_the_corrected_p_and_the_direction() -> None:
    assert verdict(-1.0, 0.049, lower_is_better=True) == "better"
    assert verdict(-1.0, 0.049, lower_is_better=False) == "worse"
    assert verdict(1.0, 0.049, lower_is_better=True) == "worse"
    assert verdict(-1.0, 0.05, lower_is_better=True) == "not distinguishable"
    assert verdict(-1.0, None, lower_is_better=True) == "one seed"


def test_the_trend_is_scipys_regression() -> None:
    x = np.repeat([17.0, 18.0, 19.5, 21.0], 3)
    y = 0.1 - 0.02 * x + RANDOM.normal(0, 0.05, 12)
    found, theirs = trend(list(x), list(y)), stats.linregress(x, y)
    assert (found.slope.mean, found.intercept) == pytest.approx((theirs.slope, theirs.intercept))
    assert found.slope.half == pytest.approx(stats.t.ppf(0.975, 10) * theirs.stderr)
    assert found.p == pytest.approx(theirs.pvalue)


def test_the_bands_are_those_of_the_normal_equations() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 5.0, 8.0]), np.array([1.0, 2.5, 2.0, 4.0, 9.0])
    design = np.stack([np.ones(5), x], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    beta = inverse @ design.T @ y
    variance = ((y - design @ beta) ** 2).sum() / 3
    at = np.array([1.0, 30.0])
    lever = at @ inverse @ at
    value, line, pair = trend(list(x), list(y)).at(30.0)
    assert value == pytest.approx(at @ beta)
    assert line == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(variance * lever))
    assert pair == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(variance * (1 + lever)))


def test_a_trend_needs_two_sizes_and_an_interval_three_points() -> None:
    assert trend([3.0, 3.0], [1.0, 2.0]) is None
    found = trend([3.0, 4.0], [1.0, 2.0])
    assert found.at(5.0) == (3.0, None, None)
    assert found.slope.half is None


def test_two_methods_in_blocks_are_a_paired_t_test() -> None:
    y = np.random.default_rng(3).normal(size=(2, 7)) + np.arange(7)
    found, pair = blocks(y), paired(list(y[0] - y[1]))
    assert found is not None and found.freedom == 6
    assert found.p == pytest.approx(pair.p)
    assert found.half == pytest.approx(pair.difference.half)


@pytest.mark.parametrize(("methods", "seeds"), [(2, 2), (6, 24), (5, 3)])
def test_the_two_way_model_is_least_squares_on_methods_and_seeds(methods: int, seeds: int) -> None:
    random = np.random.default_rng(methods)
    y = 0.02 * random.normal(size=(methods, 1)) + random.normal(size=seeds) + 0.1 * random.normal(size=(methods, seeds))
    which = [(m, s) for m in range(methods) for s in range(seeds)]

    def left(columns: list[list[float]]) -> float:
        design, answer = np.array(columns).T, y.ravel()
        return float(np.sum((answer - design @ np.linalg.lstsq(design, answer, rcond=None)[0]) ** 2))

    of_methods = [[float(m == each) for m, _ in which] for each in range(methods)]
    of_seeds = [[float(s == each) for _, s in which] for each in range(1, seeds)]
    both, only_methods, only_seeds = (
        left(of_methods + of_seeds),
        left(of_methods),
        left([[1.0] * len(which), *of_seeds]),
    )
    found = blocks(y)
    assert found is not None and found.freedom == (methods - 1) * (seeds - 1)
    assert found.residual == pytest.approx(math.sqrt(both / found.freedom))
    assert found.of_seeds == pytest.approx(1 - both / only_methods)
    ratio = (only_seeds - both) / (methods - 1) / (both / found.freedom)
    assert found.p == pytest.approx(stats.f.sf(ratio, methods - 1, found.freedom))


def test_the_interval_of_the_two_way_model_holds_the_truth_in_19_of_20_studies() -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(400):
        found = blocks(y := random.normal(size=(5, 4)) + random.normal(size=4))
        assert found is not None
        held += abs(y[0].mean() - y[1].mean()) <= found.half
    assert 0.92 <= held / 400 <= 0.98


def test_one_method_or_one_seed_has_no_two_way_model() -> None:
    assert blocks([[1.0, 2.0]]) is None
    assert blocks([[1.0], [2.0]]) is None
    assert blocks([]) is None
    same = blocks([[1.0, 2.0], [1.0, 2.0]])
    assert same is not None and (same.residual, same.half, same.of_seeds, same.p) == (0.0, 0.0, 1.0, 1.0)
