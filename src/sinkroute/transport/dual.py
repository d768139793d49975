"""The dual in E variables, by L-BFGS with the diagonal of the Hessian: few passes where Sinkhorn needs thousands.

Eliminating the T row constraints leaves a smooth convex problem in the potentials g. With the mass m_i of row i,
p_i(g) = softmax((C_i + g) / ξ) and s(g) = Σ_i m_i p_i(g):

    min_g  F(g) = Σ_i m_i ξ log Σ_j exp((C_ij + g_j) / ξ) − Σ_j t_j g_j
    ∇F     = s(g) − t
    ∇²F    = (1/ξ) Lap(Pᵀ diag(m) P),      diagonal (s_j − q_j) / ξ  with  q_j = Σ_i m_i p_ij²

One pass over the scores gives s and q, E numbers each; everything else here is arithmetic on such vectors. Sinkhorn is
the step g_j ← g_j + ξ log(t_j / s_j): to first order it divides the gradient by s_j / ξ instead of (s_j − q_j) / ξ. As
ξ → 0 rows become one-hot, q_j → s_j, and the two drift apart by any factor; that is why it stalls.

1. Start from the better of two guesses, made and compared on a sample of rows: minus the column means, which takes out
   any bias of the experts, or minus the quantile that would give each expert its share if it alone could choose.
2. L-BFGS (Nocedal & Wright, *Numerical Optimization*, algorithm 7.4) from H₀ = diag(ξ / (s − q)), at most MEMORY pairs.
   Far from balance: Sinkhorn steps. A step is at most `reach` long, which grows while the slope hardly changes along
   steps that were cut, and shrinks when one overshoots. F is convex along a line, so slopes alone tell where to stop.
3. If the error has not halved in PATIENCE passes, the problem is nearly degenerate (clusters of like tokens, scores far
   apart in units of ξ): follow the solution down from a ξ at which it is easy, a factor ANNEAL at a time.

It stops at max_j |s_j / t_j − 1| ≤ tol, or returns the best g seen and how good it is.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import torch

from sinkroute.transport import device
from sinkroute.transport.passes import make_pass
from sinkroute.transport.problem import Problem, Solution, refuse_bad_scores

__all__ = ["dual"]

MAX_PASSES = 200
SAMPLE_AT_LEAST, SAMPLE_PER_EXPERT = 512, 16  # rows
MEMORY = 10
REACH = 30.0  # of a first step, in units of ξ
FAR_BELOW, FAR_ABOVE = 0.1, 8.0  # s / t outside: far from balance
PATIENCE = 10  # passes in which the error must halve
ANNEAL, ANNEAL_TOLERANCE, ANNEAL_PASSES = 4.0, 0.3, 12


def dual(problem: Problem, *, tol: float, max_passes: int | None, init_E: torch.Tensor | None) -> Solution:
    """Minimise the dual by L-BFGS, in at most 200 passes by default; returns the best potentials seen.

    The column error is that of the returned potentials. Passes over the sample of the start count by their share. On
    a GPU with Triton the whole search runs there, in at most 20 passes by default (`device`).
    """
    if device.serves(problem):
        try:
            return device.device_dual(problem, tol=tol, max_passes=max_passes, init_E=init_E)
        except Exception as error:  # whatever it is that Triton lacks on this machine
            device.without_triton(error)
    search = _Search(problem, MAX_PASSES if max_passes is None else max_passes)
    with np.errstate(all="ignore"):
        search.run(tol, None if init_E is None else init_E.double().cpu().numpy())
    if problem.scores_TE.device.type == "cpu" and not math.isfinite(search.best_error):
        refuse_bad_scores(problem)
    # What float64 cannot tell of (C + g) / ξ: beyond |g| / ξ ≈ 1e11 a balance to 1e-4 is no more than luck.
    rounding = 4 * np.finfo(np.float64).eps * float(np.abs(search.best_E[search.active_E]).max()) / problem.reg
    like_E = problem.target_E
    return Solution(
        torch.from_numpy(search.centred(search.best_E)).to(like_E),
        like_E.new_tensor(max(search.best_error, rounding)),
        math.ceil(search.spent - 1e-9),
    )


class _Search:
    """The state of one solve, in NumPy vectors over the experts with mass."""

    def __init__(self, problem: Problem, budget: int) -> None:
        self.problem, self.budget, self.spent = problem, budget, 0.0
        self.rows = make_pass(problem)
        self.target_E = problem.target_E.double().cpu().numpy()
        self.active_E = self.target_E > 0
        self.all_active = bool(self.active_E.all())
        # How large costs are, where that is known; what float32 loses of them must be nothing beside the tolerance.
        self.size, self.tol = math.inf, math.inf
        self.best_error = math.inf
        self.best_E = np.where(self.active_E, 0.0, -np.inf)

    def run(self, tol: float, init_E: np.ndarray | None) -> None:
        reg, self.tol = self.problem.reg, tol
        if init_E is not None:
            self.descend(self.centred(init_E), reg, tol, patience=PATIENCE, give_up_at=FAR_ABOVE)
            if self.best_error <= tol or self.spent >= self.budget:
                return
        start_E, spread = self.start()
        self.descend(start_E, reg, tol, patience=PATIENCE)
        if self.best_error <= tol:
            return
        stages = max(0, math.ceil(math.log(max(spread / reg, 1), ANNEAL)) - 1) if math.isfinite(spread) else 0
        point_E = start_E
        for stage in range(stages, 0, -1):
            point_E = self.descend(point_E, reg * ANNEAL**stage, ANNEAL_TOLERANCE, passes=ANNEAL_PASSES)
        self.descend(point_E if stages else self.best_E, reg, tol)

    # -- one evaluation -------------------------------------------------------------------------------------------

    def evaluate(self, potentials_E: np.ndarray, reg: float) -> tuple[np.ndarray, np.ndarray]:
        """s and q of all rows on all ranks; remembers the best potentials for the ξ that was asked for."""
        self.spent += 1
        wide = 6e-8 * self.size / reg > 0.01 * self.tol
        sums_E, squares_E = self.over_ranks(self.rows.column_sums(potentials_E, reg, wide))
        if reg == self.problem.reg:
            error = self.error(sums_E)
            if error < self.best_error or not math.isfinite(self.best_error):
                self.best_error, self.best_E = error, potentials_E
        return sums_E, squares_E

    def error(self, sums_E: np.ndarray) -> float:
        """max |s / t − 1| over the experts with mass; NaN if one of the sums is."""
        if self.all_active:
            return float(np.abs(sums_E / self.target_E - 1).max())
        return float(np.abs(sums_E[self.active_E] / self.target_E[self.active_E] - 1).max())

    def over_ranks(self, x: np.ndarray) -> np.ndarray:
        reduce = self.problem.reduce
        if reduce is None:
            return x
        return reduce(torch.from_numpy(x).to(self.problem.scores_TE.device)).double().cpu().numpy()

    def centred(self, potentials_E: np.ndarray) -> np.ndarray:
        if self.all_active:
            return potentials_E - potentials_E.mean()
        return np.where(self.active_E, potentials_E - potentials_E[self.active_E].mean(), -np.inf)

    # -- where to start -------------------------------------------------------------------------------------------

    def start(self) -> tuple[np.ndarray, float]:
        """The better of two guesses, and how far apart the costs of an expert are: the ξ at which all is easy."""
        problem = self.problem
        tokens, experts = problem.scores_TE.shape
        step = max(1, tokens // max(SAMPLE_AT_LEAST, SAMPLE_PER_EXPERT * experts))
        sample = problem.every(step)
        rows = make_pass(sample)
        real = len(sample.scores_TE) if sample.token_mask is None else int(sample.token_mask.sum())
        share_E = self.target_E / self.target_E.sum()
        ranks_E = np.clip(np.rint(share_E * real), 1, max(real, 1)).astype(np.int64)
        means_E, quantiles_E = rows.column_ranks(ranks_E)
        quantiles_E = np.where(np.isfinite(quantiles_E), quantiles_E, means_E)
        if problem.reduce is not None:
            # Every rank has its own sample: take the average guess, weighted by real rows.
            means_E, quantiles_E, reals_E = self.over_ranks(
                np.stack([means_E * real, quantiles_E * real, np.full(experts, float(real))])
            )
            means_E, quantiles_E = means_E / reals_E, quantiles_E / reals_E
        spread = float((quantiles_E - means_E)[self.active_E].max())
        self.size = float(np.abs([means_E, quantiles_E]).max() + np.abs(quantiles_E).max())
        guesses = [self.centred(-means_E), self.centred(-quantiles_E)]
        # Ranks hold different numbers of tokens but must agree on what is left: there it counts in full.
        cost = 2 / step if problem.reduce is None else 2
        if self.spent + cost + 1 > self.budget:
            return guesses[1], spread
        self.spent += cost
        distances = []
        for guess_E in guesses:
            sums_E = self.over_ranks(rows.column_sums(guess_E, problem.reg, False))[0][self.active_E]
            ratios_E = sums_E / sums_E.sum() / share_E[self.active_E]
            distances.append(float(np.abs(np.log(np.maximum(ratios_E, 1e-30))).max()))
        return guesses[int(distances[1] <= distances[0])], spread

    # -- descent --------------------------------------------------------------------------------------------------

    def descend(
        self,
        point_E: np.ndarray,
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
            return point_E
        sums_E, squares_E = self.evaluate(point_E, reg)
        ratios_E = self.ratios(sums_E)
        if not (ratios_E.max() <= give_up_at and ratios_E.min() >= 1 / give_up_at):
            return point_E
        unit = self.target_E.sum() / self.active_E.sum()  # gradients in units of the mean target
        gradient_E = self.gradient(sums_E, unit)
        pairs: deque[tuple[np.ndarray, np.ndarray, float]] = deque(maxlen=MEMORY)
        reach = REACH * reg
        halved, halved_at = self.error(sums_E), self.spent
        while self.error(sums_E) > tol and self.spent + 1 <= last and self.spent - halved_at < patience:
            if ratios_E.min() < FAR_BELOW or ratios_E.max() > FAR_ABOVE:
                direction_E = -reg * np.log(np.maximum(ratios_E, 1e-30))
            else:
                curvature_E = np.maximum(sums_E - squares_E, 1e-3 * np.maximum(sums_E, 1e-30)) / (unit * reg)
                direction_E = lbfgs_direction(gradient_E, pairs, 1 / curvature_E)
            direction_E = self.level(direction_E)
            slope = float(gradient_E @ direction_E)
            if not slope < 0:
                pairs.clear()
                direction_E = self.level(-reg * gradient_E)
                slope = float(gradient_E @ direction_E)
                if not slope < 0:
                    break
            length = float(np.abs(direction_E).max())
            cut = length > reach
            if cut:
                direction_E *= reach / length
                slope *= reach / length
            fraction = 1.0
            while True:
                trial_E = point_E + fraction * direction_E
                sums_E, squares_E = self.evaluate(trial_E, reg)
                trial_gradient_E = self.gradient(sums_E, unit)
                step_E, change_E = fraction * direction_E, trial_gradient_E - gradient_E
                bend = float(step_E @ change_E)
                if bend > 1e-12 * math.sqrt(float(step_E @ step_E) * float(change_E @ change_E)):
                    pairs.append((step_E, change_E, bend))
                trial_slope = float(trial_gradient_E @ direction_E)
                if not trial_slope > 0.9 * -slope or self.error(sums_E) <= tol or self.spent + 1 > last:
                    break
                # Overshot: to where the slope would vanish if it were linear.
                fraction *= max(0.1, slope / (slope - trial_slope))
                reach = max(reach / 2, reg)
            if cut and trial_slope < 0.5 * slope:
                reach *= 2
            point_E, gradient_E, ratios_E = trial_E, trial_gradient_E, self.ratios(sums_E)
            if self.error(sums_E) <= halved / 2:
                halved, halved_at = self.error(sums_E), self.spent
        return point_E

    def ratios(self, sums_E: np.ndarray) -> np.ndarray:
        """s / t, 1 for experts without mass."""
        return sums_E / self.target_E if self.all_active else np.where(self.active_E, sums_E / self.target_E, 1.0)

    def gradient(self, sums_E: np.ndarray, unit: float) -> np.ndarray:
        """(s − t) / unit, 0 for experts without mass."""
        gradient_E = (sums_E - self.target_E) / unit
        return gradient_E if self.all_active else np.where(self.active_E, gradient_E, 0.0)

    def level(self, direction_E: np.ndarray) -> np.ndarray:
        """Without the part that moves all potentials alike, which changes nothing."""
        if self.all_active:
            return direction_E - direction_E.mean()
        return np.where(self.active_E, direction_E - direction_E[self.active_E].mean(), 0.0)


def lbfgs_direction(
    gradient_E: np.ndarray, pairs: deque[tuple[np.ndarray, np.ndarray, float]], inverse_E: np.ndarray
) -> np.ndarray:
    """−H ∇F by the two-loop recursion, from H₀ = γ diag(inverse) with γ from the newest pair."""
    q_E = gradient_E.copy()
    weights = []
    for step_E, change_E, bend in reversed(pairs):
        weight = float(step_E @ q_E) / bend
        weights.append(weight)
        q_E -= weight * change_E
    if pairs:
        _, change_E, bend = pairs[-1]
        inverse_E = inverse_E * (bend / float(change_E @ (inverse_E * change_E)))
    q_E *= inverse_E
    for (step_E, change_E, bend), weight in zip(pairs, reversed(weights), strict=True):
        q_E += (weight - float(change_E @ q_E) / bend) * step_E
    return -q_E
