"""Estimates, paired tests, corrections for their number, and the trend of a gain over sizes.

Runs of one seed share data order and initial weights, so methods are compared by the differences of runs that share a
seed: d_s = y_s(method) − y_s(reference). Intervals are Student's, mean ± t(0.975, n − 1) · s / √n. The test is the
paired t-test; beside it the exact sign-flip (permutation) test, which assumes no normal distribution: under the
hypothesis of no difference each d_s may as well have had the other sign, so p is the share of the 2^n choices of signs
whose mean is at least as far from 0 (Fisher, The Design of Experiments, 1935, § 21). p-values of a family are corrected
by Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979), which holds the probability of any false
finding in the family at 5 %, whatever the dependence between the tests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LEVEL", "Estimate", "Paired", "Trend", "estimate", "holm", "paired", "sign_flip", "trend", "verdict"]

LEVEL = 0.05
_MOST_FLIPPED = 12  # 2^12 sums are few


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds with half of its 95 % interval; `half` is None for one seed, which tells nothing of it."""

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """Differences to the reference over the seeds that both have.

    Attributes:
        difference: their mean and interval, not corrected for the number of comparisons.
        p: of the paired t-test, two-sided; None for one seed.
        p_flip: of the exact sign-flip test; None for one seed, or for more than 12.
    """

    difference: Estimate
    p: float | None
    p_flip: float | None


@dataclass(frozen=True)
class Trend:
    """A straight line through gains over x = log2 of a size, by least squares.

    Attributes:
        slope: gain per doubling, with its interval.
        intercept: at x = 0.
        x_mean, x_spread: mean of x, and Σ (x − mean)².
        residual: standard deviation around the line; None without a degree of freedom.
        n: points.
        p: of the hypothesis that the slope is 0; None without a degree of freedom.
    """

    slope: Estimate
    intercept: float
    x_mean: float
    x_spread: float
    residual: float | None
    n: int
    p: float | None

    def at(self, x: float) -> tuple[float, float | None, float | None]:
        """The line at x, half of its 95 % interval there, and half of the prediction interval of a new pair.

        Both hold only as far as the line does.
        """
        value = self.intercept + self.slope.mean * x
        if self.residual is None:
            return value, None, None
        t = _t975(self.n - 2)
        lever = 1 / self.n + (x - self.x_mean) ** 2 / self.x_spread
        return value, t * self.residual * math.sqrt(lever), t * self.residual * math.sqrt(1 + lever)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half of the 95 % t-interval.

    >>> estimate([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.303
    Estimate(mean=2.0, half=2.484..., n=3)
    >>> estimate([1.0]).half is None
    True
    """
    n = len(values)
    if not n:
        raise ValueError("values is empty; an estimate needs at least one number")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    return Estimate(mean, _t975(n - 1) * _deviation(values, mean) / math.sqrt(n), n)


def paired(differences: Sequence[float]) -> Paired:
    """Interval and tests of differences that are paired by seed.

    >>> paired([1.0, 2.0, 3.0]).p_flip  # of 8 choices of signs, +++ and --- are as far from 0
    0.25
    """
    found = estimate(differences)
    if found.n < 2:
        return Paired(found, None, None)
    flip = sign_flip(differences) if found.n <= _MOST_FLIPPED else None
    return Paired(found, _p_of_mean(differences, found.mean), flip)


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the exact sign-flip test; it cannot be below 2 / 2^n.

    >>> sign_flip([1.0, -1.0])
    1.0
    """
    observed = abs(math.fsum(differences))
    # Sums that are equal but for rounding count as equal.
    least = observed - 1e-9 * math.fsum(map(abs, differences))
    flips = itertools.product((1, -1), repeat=len(differences))
    hits = sum(abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) >= least for signs in flips)
    return hits / 2 ** len(differences)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: those below 0.05 are together wrong with a probability of 5 % at most.

    >>> holm([0.01, 0.04, 0.03])  # 3 · 0.01; 2 · 0.03; 0.04, but not below the one before
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = worst
    return out


def verdict(difference: float, p_corrected: float | None, lower_is_better: bool) -> str:
    """ "better", "worse" or "not distinguishable" by a corrected p below 0.05; "one seed" where there is no test.

    >>> verdict(-0.1, 0.01, lower_is_better=True)
    'better'
    """
    if p_corrected is None:
        return "one seed"
    if p_corrected >= LEVEL or difference == 0:
        return "not distinguishable"
    return "better" if (difference < 0) == lower_is_better else "worse"


def trend(x: Sequence[float], gains: Sequence[float]) -> Trend | None:
    """The line through gains over x; None for fewer than two different x.

    >>> line = trend([20, 21, 22, 23], [1.0, 2.0, 3.0, 4.0])
    >>> line.slope.mean, line.at(30)[0]
    (1.0, 11.0)
    """
    n = len(x)
    if len(set(x)) < 2:
        return None
    x_mean, mean = math.fsum(x) / n, math.fsum(gains) / n
    spread = math.fsum((each - x_mean) ** 2 for each in x)
    slope = math.fsum((each - x_mean) * (gain - mean) for each, gain in zip(x, gains, strict=True)) / spread
    intercept = mean - slope * x_mean
    if n == 2:
        return Trend(Estimate(slope, None, n), intercept, x_mean, spread, None, n, None)
    errors = (gain - intercept - slope * each for each, gain in zip(x, gains, strict=True))
    residual = math.sqrt(math.fsum(error**2 for error in errors) / (n - 2))
    deviation = residual / math.sqrt(spread)
    half = _t975(n - 2) * deviation
    return Trend(Estimate(slope, half, n), intercept, x_mean, spread, residual, n, _two_sided(slope, deviation, n - 2))


def _p_of_mean(values: Sequence[float], mean: float) -> float:
    return _two_sided(mean, _deviation(values, mean) / math.sqrt(len(values)), len(values) - 1)


def _two_sided(value: float, deviation: float, freedom: int) -> float:
    from scipy import stats

    if deviation == 0:  # runs that cannot differ, such as those of one method under two names
        return 1.0 if value == 0 else 0.0
    return float(2 * stats.t.sf(abs(value) / deviation, freedom))


def _t975(freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


def _deviation(values: Sequence[float], mean: float) -> float:
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
