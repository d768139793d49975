"""Estimates, paired tests, corrections for their number, what they could tell, and the trend of a gain over sizes.

Runs of one seed share data order and initial weights, so methods are compared by the differences of runs that share a
seed: d_s = y_s(method) − y_s(reference). Intervals are Student's, mean ± t(0.975, n − 1) · s / √n. The test is the
paired t-test. Beside it stands the sign-flip test, which assumes no normal distribution: under the hypothesis of no
difference each d_s may as well have had the other sign, so p is the share of the choices of signs whose mean is at
least as far from 0 (Fisher, The Design of Experiments, 1935, § 21). p-values of a family are corrected by Holm's
step-down procedure (Scandinavian Journal of Statistics 6, 1979), which holds the probability of any false finding in
the family at 5 %, whatever the dependence between the tests. Methods are called equivalent within a margin by two
one-sided t-tests (Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15, 1987).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = [
    "LEVEL", "POWER", "Blocks", "Estimate", "Paired", "Trend", "blocks", "detectable", "holm", "paired", "power",
    "sign_flip", "smallest_effect", "trend", "verdict",
]  # fmt: skip

LEVEL = 0.05
POWER = 0.8
"""What a test finds in four of five studies if it is there: the usual power."""
_MOST_FLIPPED = 12  # 2^12 choices of signs are few; of more seeds so many are drawn, with a fixed seed
_DRAWN = 9999


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds with half of its 95 % interval; `half` is None for one seed, which tells nothing of it."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """
        >>> Estimate.of([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.303
        Estimate(mean=2.0, half=2.484..., n=3)
        >>> Estimate.of([1.0]).half is None
        True
        """
        n = len(values)
        if not n:
            raise ValueError("values is empty; an estimate needs at least one number")
        mean = float(np.mean(values))
        if n == 1 or not math.isfinite(mean):
            return cls(mean, None, n)
        return cls(mean, _t975(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n), n)

    def text(self, digits: int, sign: bool = False) -> str:
        """
        >>> Estimate(1.23456, 0.01, 3).text(3), Estimate(-0.5, None, 1).text(2, sign=True)
        ('1.235 ± 0.010', '-0.50')
        """
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"


@dataclass(frozen=True)
class Paired:
    """Differences to the reference over the seeds that both have.

    Attributes:
        difference: their mean and interval, not corrected for the number of comparisons.
        p: of the paired t-test, two-sided; None for one seed.
        p_flip: of the sign-flip test, exact for up to 12 seeds; None for one seed.
        detectable: the true difference that one test at 5 % finds with a power of 80 %, by the scatter of these pairs.
        p_equivalent: of the hypothesis that the methods differ by the margin or more; None without a margin.
    """

    difference: Estimate
    p: float | None
    p_flip: float | None
    detectable: float | None = None
    p_equivalent: float | None = None


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


@dataclass(frozen=True)
class Blocks:
    """The two-way model of M methods on the same n seeds; it takes the residual to scatter alike in all methods.

    Attributes:
        residual: standard deviation of what neither the method nor the seed explains.
        freedom: its degrees of freedom, (M − 1)(n − 1).
        half: half of the 95 % interval of a difference of two methods, by this residual; not corrected.
        of_seeds: share of the variance within methods that the seeds explain: what pairing by seed takes away.
        p: of the hypothesis that all methods are alike (F-test).
    """

    residual: float
    freedom: int
    half: float
    of_seeds: float
    p: float


def paired(differences: Sequence[float], margin: float | None = None) -> Paired:
    """Interval and tests of differences that are paired by seed; with a margin, also that of equivalence.

    >>> paired([1.0, 2.0, 3.0]).p_flip  # of 8 choices of signs, +++ and --- are as far from 0
    0.25
    """
    from scipy import stats

    found = Estimate.of(differences)
    if found.n < 2:
        return Paired(found, None, None)
    if np.ptp(differences) == 0:  # runs that cannot differ, such as those of one method under two names
        same = None if margin is None else float(abs(found.mean) >= margin)
        return Paired(found, float(found.mean == 0), sign_flip(differences), 0.0, same)
    apart = None
    if margin is not None:
        sides = ((-margin, "greater"), (margin, "less"))
        apart = max(float(stats.ttest_1samp(differences, edge, alternative=side).pvalue) for edge, side in sides)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    least = detectable(found.n) * float(np.std(differences, ddof=1))
    return Paired(found, p, sign_flip(differences), least, apart)


def blocks(values: Sequence[Sequence[float]]) -> Blocks | None:
    """The two-way model of values (M, n): a row for each method, a column for each seed; None below two of either.

    >>> blocks([[1.0, 2.0, 3.0], [2.0, 3.0, 4.1]])
    Blocks(residual=0.0408..., freedom=2, half=0.143..., of_seeds=0.999..., p=0.0010...)
    """
    from scipy import stats

    y_MS = np.asarray(values, dtype=float)
    if y_MS.ndim != 2 or min(y_MS.shape) < 2:
        return None
    methods, seeds = y_MS.shape
    within_MS = y_MS - y_MS.mean(1, keepdims=True)
    residual_MS = within_MS - within_MS.mean(0, keepdims=True)
    freedom = (methods - 1) * (seeds - 1)
    left, all_within = float(np.sum(residual_MS**2)), float(np.sum(within_MS**2))
    between = seeds * float(np.sum((y_MS.mean(1) - y_MS.mean()) ** 2)) / (methods - 1)
    scatter = left / freedom
    return Blocks(
        residual=math.sqrt(scatter),
        freedom=freedom,
        half=_t975(freedom) * math.sqrt(2 * scatter / seeds),
        of_seeds=1 - left / all_within if all_within else 0.0,
        p=float(stats.f.sf(between / scatter, methods - 1, freedom)) if scatter else float(between == 0),
    )


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the sign-flip test; of n seeds it cannot be below 2 / 2^n.

    >>> sign_flip([1.0, -1.0])
    1.0
    """
    from scipy import stats

    exact = len(differences) <= _MOST_FLIPPED
    # In units of the largest: scipy calls sums equal that differ by less than a rounding error of the observed one.
    values = np.round(np.asarray(differences, dtype=float) / (np.max(np.abs(differences)) or 1.0), 12)
    found = stats.permutation_test(
        (values,), lambda x, axis: np.round(np.mean(x, axis=axis), 11), permutation_type="samples", vectorized=True,
        n_resamples=math.inf if exact else _DRAWN, random_state=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: those below 0.05 are together wrong with a probability of 5 % at most.

    >>> holm([0.01, 0.04, 0.03])  # 3 · 0.01; 2 · 0.03; 0.04, but not below the one before
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    out = np.empty(len(p))
    out[order] = np.minimum(1.0, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return [float(value) for value in out]


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


def power(effect: float, n: int, level: float = LEVEL) -> float:
    """How often a two-sided paired t-test of n differences tells a true difference of `effect` standard deviations.

    >>> round(power(1.0, 10), 3)
    0.803
    """
    from scipy import stats

    edge, shift = stats.t.ppf(1 - level / 2, n - 1), effect * math.sqrt(n)
    # The lower tail as the upper one of -T: scipy's distribution function is NaN far out.
    return float(stats.nct.sf(edge, n - 1, shift) + stats.nct.sf(edge, n - 1, -shift))


@cache
def detectable(n: int, level: float = LEVEL, wanted: float = POWER) -> float:
    """The difference, in standard deviations, that n seeds tell with the power `wanted`.

    >>> round(detectable(3), 2)
    3.26
    """
    return smallest_effect(lambda effect: power(effect, n, level), wanted)


def smallest_effect(power_of: Callable[[float], float], wanted: float) -> float:
    """Where a power that grows with the effect reaches what is wanted."""
    from scipy import optimize

    most = 1.0
    while power_of(most) < wanted:
        most *= 2
    return float(optimize.brentq(lambda size: power_of(size) - wanted, 1e-9, most))


def trend(x: Sequence[float], gains: Sequence[float]) -> Trend | None:
    """The line through gains over x; None for fewer than two different x.

    >>> line = trend([20, 21, 22, 23], [1.0, 2.0, 3.0, 4.0])
    >>> line.slope.mean, line.at(30)[0]
    (1.0, 11.0)
    """
    from scipy import stats

    n = len(x)
    if len(set(x)) < 2:
        return None
    line = stats.linregress(x, gains)
    slope, intercept, x_mean = float(line.slope), float(line.intercept), float(np.mean(x))
    spread = float(np.sum((np.asarray(x) - x_mean) ** 2))
    if n == 2:
        return Trend(Estimate(slope, None, n), intercept, x_mean, spread, None, n, None)
    half = _t975(n - 2) * float(line.stderr)
    residual = float(line.stderr) * math.sqrt(spread)
    return Trend(Estimate(slope, half, n), intercept, x_mean, spread, residual, n, float(line.pvalue))


def _t975(freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))
