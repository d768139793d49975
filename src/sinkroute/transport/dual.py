"""The dual in E variables, by L-BFGS with the diagonal of the Hessian: few passes where Sinkhorn needs thousands.

Eliminating the T row constraints leaves a smooth convex problem in the potentials g. With the mass m_i of row i,
p_i(g) = softmax((C_i + g) / ξ) and s(g) = Σ_i m_i p_i(g):

    min_g  F(g) = Σ_i m_i ξ log Σ_j exp((C_ij + g_j) / ξ) − Σ_j t_j g_j
    ∇F     = s(g) − t
    ∇²F    = (1/ξ) Lap(Pᵀ diag(m) P),      diagonal (s_j − q_j) / ξ  with  q_j = Σ_i m_i p_ij²

One pass over the logits gives s and q, E numbers each; everything else here is arithmetic on such vectors. Sinkhorn is
the step g_j ← g_j + ξ log(t_j / s_j): to first order it divides the gradient by s_j / ξ instead of (s_j − q_j) / ξ. As
ξ → 0 rows become one-hot, q_j → s_j, and the two drift apart by any factor; that is why it stalls.

1. Start from the better of two guesses, made and compared on a sample of rows: minus the column means, which takes out
   any bias of the experts, or minus the quantile that would give each expert its share if it alone could choose.
2. L-BFGS (Nocedal & Wright, *Numerical Optimization*, algorithm 7.4) from H₀ = diag(ξ / (s − q)), at most MEMORY pairs.
   Far from balance: Sinkhorn steps. A step is at most `reach` long, which grows while the slope hardly changes along
   steps that were cut, and shrinks when one overshoots. F is convex along a line, so slopes alone tell where to stop.
3. If the error has not halved in PATIENCE passes, the problem is nearly degenerate (clusters of like tokens, logits far
   apart in units of ξ): follow the solution down from a ξ at which it is easy, a factor ANNEAL at a time.

It stops at max_j |s_j / t_j − 1| ≤ tol, or returns the best g seen and how good it is.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from sinkroute.kernels import tuning
from sinkroute.kernels.column_sums import make_pass
from sinkroute.kernels.search import search_on_device
from sinkroute.transport.problem import Problem, Solution, refuse_bad_logits

__all__ = ["dual"]

MAX_PASSES = 200


def dual(problem: Problem, *, tol: float, max_passes: int | None, init_E: torch.Tensor | None) -> Solution:
    """Minimise the dual by L-BFGS, in at most 200 passes by default; returns the best potentials seen.

    The column error is that of the returned potentials. Passes over the sample of the start count by their share. On
    a GPU with Triton the whole search runs there, in at most 20 passes by default.
    """
    found = search_on_device(
        problem,
        problem.target_E,
        problem.positive_E,
        problem.reg,
        tol=tol,
        max_passes=max_passes,
        init_E=init_E,
        reduce=problem.reduce,
    )
    if found is not None:
        return Solution(*found)
    search = _Search(problem, MAX_PASSES if max_passes is None else max_passes)
    with np.errstate(all="ignore"):
        search.run(tol, None if init_E is None else init_E.double().cpu().numpy())
    if problem.logits_TE.device.type == "cpu" and not math.isfinite(search.best_error):
        refuse_bad_logits(problem)
    like_E = problem.target_E
    return Solution(
        torch.from_numpy(search.of_all_experts(np.nan_to_num(search.best_A))).to(like_E),
        like_E.new_tensor(search.honest_error()),
        math.ceil(search.spent - 1e-9),
    )


class Balance(NamedTuple):
    """What a pass tells: s / t and (s − q) / t, (A,), and the largest |s / t − 1|, NaN if one of the sums is."""

    ratios_A: np.ndarray
    curvature_A: np.ndarray
    error: float


class _Search:
    """The state of one solve, in NumPy vectors over the A experts with mass."""

    def __init__(self, problem: Problem, budget: int) -> None:
        self.problem, self.budget, self.spent = problem, budget, 0.0
        self.rows = make_pass(problem)
        target_E = problem.target_E.double().cpu().numpy()
        self.active = None if target_E.all() else np.flatnonzero(target_E)
        self.target_A = self.of_active(target_E)
        self.weight_A = self.target_A * (len(self.target_A) / add(self.target_A))  # gradients are in mean targets
        self.best_A, self.best_error = np.zeros_like(self.target_A), math.inf

    def run(self, tol: float, init_E: np.ndarray | None) -> None:
        reg, self.precision = self.problem.reg, 0.02 * tol
        if init_E is not None:
            self.descend(level(self.of_active(init_E)), reg, tol, patience=tuning.PATIENCE, give_up_at=tuning.FAR_ABOVE)
            if self.best_error <= tol or self.spent >= self.budget:
                return
        start_A, spread = self.start()
        self.descend(start_A, reg, tol, patience=tuning.PATIENCE)
        if self.best_error <= tol:
            return
        stages = max(0, math.ceil(math.log(max(spread / reg, 1), tuning.ANNEAL)) - 1) if math.isfinite(spread) else 0
        point_A = start_A
        for stage in range(stages, 0, -1):
            point_A = self.descend(
                point_A, reg * tuning.ANNEAL**stage, tuning.ANNEAL_TOLERANCE, passes=tuning.ANNEAL_PASSES
            )
        self.descend(point_A if stages else self.best_A, reg, tol)

    def honest_error(self) -> float:
        """The error of the best potentials, or what arithmetic cannot tell from balance, if that is more."""
        least_share = float(np.minimum.reduce(self.target_A) / add(self.target_A))
        # Beyond |g| / ξ ≈ 1e11 float64 cannot place (C + g) / ξ; exponentials have a floor of 2e-19.
        rounding = 4 * np.finfo(np.float64).eps * largest(self.best_A) / self.problem.reg
        error = max(self.best_error, min(rounding, 1 / least_share), 3e-19 / least_share)
        return math.inf if math.isnan(error) or math.isnan(self.best_error) else error

    def of_active(self, x_E: np.ndarray) -> np.ndarray:
        return x_E if self.active is None else x_E[..., self.active]

    def of_all_experts(self, potentials_A: np.ndarray) -> np.ndarray:
        if self.active is None:
            return potentials_A
        potentials_E = np.full(len(self.problem.target_E), -np.inf)
        potentials_E[self.active] = potentials_A
        return potentials_E

    def over_ranks(self, x: np.ndarray) -> np.ndarray:
        reduce = self.problem.reduce
        if reduce is None:
            return x
        return reduce(torch.from_numpy(x).to(self.problem.logits_TE.device)).double().cpu().numpy()

    def evaluate(self, point_A: np.ndarray, reg: float) -> Balance:
        """A pass over all rows on all ranks; remembers the best potentials for the ξ that was asked for."""
        self.spent += 1
        sums_2E = self.over_ranks(self.rows.column_sums(self.of_all_experts(point_A), reg, self.precision))
        ratios_A, squares_A = self.of_active(sums_2E) / self.target_A
        error = largest(ratios_A - 1)
        # NaN is taken too if it is all there is: it tells of bad logits.
        if reg == self.problem.reg and (error < self.best_error or not math.isfinite(self.best_error)):
            self.best_error, self.best_A = error, point_A
        return Balance(ratios_A, ratios_A - squares_A, error)

    # -- where to start -------------------------------------------------------------------------------------------

    def start(self) -> tuple[np.ndarray, float]:
        """The better of two guesses, and how far apart the costs of an expert are: the ξ at which all is easy."""
        problem = self.problem
        tokens, experts = problem.logits_TE.shape
        step = max(1, tokens // max(tuning.SAMPLE_AT_LEAST, tuning.SAMPLE_PER_EXPERT * experts))
        sample = problem.every(step)
        rows = make_pass(sample)
        real = sample.count()
        share_E = problem.target_E.double().cpu().numpy()
        share_E = share_E / add(share_E)
        ranks_E = np.minimum(np.maximum(np.rint(share_E * real), 1), max(real, 1)).astype(np.int64)
        means_E, quantiles_E = rows.column_ranks(ranks_E)
        quantiles_E = np.where(np.isfinite(quantiles_E), quantiles_E, means_E)
        if problem.reduce is not None:
            # Every rank has its own sample: take the average guess, weighted by real rows.
            means_E, quantiles_E, reals_E = self.over_ranks(
                np.stack([means_E * real, quantiles_E * real, np.full(experts, float(real))])
            )
            reals_E = np.maximum(reals_E, 1)
            means_E, quantiles_E = means_E / reals_E, quantiles_E / reals_E
        means_A, quantiles_A = self.of_active(means_E), self.of_active(quantiles_E)
        spread = float(np.maximum.reduce(quantiles_A - means_A))
        guesses = [level(-means_A), level(-quantiles_A)]
        # Ranks hold different numbers of tokens but must agree on what is left: there it counts in full.
        cost = 2 / step if problem.reduce is None else 2
        if self.spent + cost + 1 > self.budget:
            return guesses[1], spread
        self.spent += cost
        distances = []
        for guess_A in guesses:
            sums_2E = self.over_ranks(rows.column_sums(self.of_all_experts(guess_A), problem.reg, 0.02))
            ratios_A = self.of_active(sums_2E)[0] / self.target_A
            ratios_A *= len(ratios_A) / add(ratios_A * self.weight_A)
            distances.append(largest(np.log(np.maximum(ratios_A, 1e-30))))
        return guesses[int(distances[1] <= distances[0])], spread

    # -- descent --------------------------------------------------------------------------------------------------

    def descend(
        self,
        point_A: np.ndarray,
        reg: float,
        tol: float,
        *,
        passes: float = math.inf,
        patience: float = math.inf,
        give_up_at: float = math.inf,
    ) -> np.ndarray:
        """L-BFGS at this ξ until `tol`, for at most so many passes; returns the last point.

        `patience`: stop when the error has not halved in so many passes. `give_up_at`: return at once if s / t at the
        first point is above this, or below its inverse.
        """
        last = min(self.spent + passes, float(self.budget))
        if self.spent + 1 > last:
            return point_A
        now = self.evaluate(point_A, reg)
        least, most = np.minimum.reduce(now.ratios_A), np.maximum.reduce(now.ratios_A)
        if not (most <= give_up_at and least >= 1 / give_up_at):
            return point_A
        gradient_A = (now.ratios_A - 1) * self.weight_A
        pairs: deque[tuple[np.ndarray, np.ndarray, float]] = deque(maxlen=tuning.MEMORY)
        reach = tuning.REACH * reg
        halved, halved_at = now.error, self.spent
        while now.error > tol and self.spent + 1 <= last and self.spent - halved_at < patience:
            if least < tuning.FAR_BELOW or most > tuning.FAR_ABOVE:
                direction_A = -reg * np.log(np.maximum(now.ratios_A, 1e-30))
            else:
                curvature_A = np.maximum(now.curvature_A, 1e-3 * np.maximum(now.ratios_A, 1e-30)) * self.weight_A
                direction_A = lbfgs_direction(gradient_A, pairs, reg / curvature_A)
            direction_A = level(direction_A)
            slope = float(gradient_A @ direction_A)
            if not slope < 0:
                pairs.clear()
                direction_A = level(-reg * gradient_A)
                slope = float(gradient_A @ direction_A)
                if not slope < 0:
                    break
            length = largest(direction_A)
            cut = length > reach
            if cut:
                direction_A *= reach / length
                slope *= reach / length
            fraction = 1.0
            while True:
                step_A = fraction * direction_A
                trial_A = point_A + step_A
                now = self.evaluate(trial_A, reg)
                trial_gradient_A = (now.ratios_A - 1) * self.weight_A
                change_A = trial_gradient_A - gradient_A
                bend = float(step_A @ change_A)
                if bend > 1e-12 * math.sqrt(float(step_A @ step_A) * float(change_A @ change_A)):
                    pairs.append((step_A, change_A, bend))
                trial_slope = float(trial_gradient_A @ direction_A)
                if not trial_slope > 0.9 * -slope or now.error <= tol or self.spent + 1 > last:
                    break
                # Overshot: to where the slope would vanish if it were linear.
                fraction *= max(0.1, slope / (slope - trial_slope))
                reach = max(reach / 2, reg)
            if cut and trial_slope < 0.5 * slope:
                reach *= 2
            point_A, gradient_A = trial_A, trial_gradient_A
            least, most = np.minimum.reduce(now.ratios_A), np.maximum.reduce(now.ratios_A)
            if now.error <= halved / 2:
                halved, halved_at = now.error, self.spent
        return point_A


# The methods of arrays do the same in two to three times the time, which tells where E is small.
add = np.add.reduce


def largest(x_A: np.ndarray) -> float:
    """max |x|, NaN if one is."""
    return float(np.maximum.reduce(np.abs(x_A)))


def level(x_A: np.ndarray) -> np.ndarray:
    """Without the part that moves all potentials alike, which changes nothing."""
    without_A: np.ndarray = x_A - add(x_A) / len(x_A)
    return without_A


def lbfgs_direction(
    gradient_A: np.ndarray, pairs: deque[tuple[np.ndarray, np.ndarray, float]], inverse_A: np.ndarray
) -> np.ndarray:
    """−H ∇F by the two-loop recursion, from H₀ = γ diag(inverse) with γ from the newest pair."""
    q_A: np.ndarray = gradient_A.copy()
    weights = []
    for step_A, change_A, bend in reversed(pairs):
        weight = float(step_A @ q_A) / bend
        weights.append(weight)
        q_A -= weight * change_A
    if pairs:
        _, change_A, bend = pairs[-1]
        inverse_A = inverse_A * (bend / float(change_A @ (inverse_A * change_A)))
    q_A *= inverse_A
    for (step_A, change_A, bend), weight in zip(pairs, reversed(weights), strict=True):
        q_A += (weight - float(change_A @ q_A) / bend) * step_A
    return -q_A
