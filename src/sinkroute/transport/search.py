"""The bias with which the top-k of C + g has nearly the right loads, by passes that count.

The top-k of a balanced plan is not balanced: the plan balances the sum of its entries, not who is chosen. Wanted is

    max Σ_i Σ_{j chosen by i} C_ij    s.t.    every token chooses k distinct experts, expert j is chosen t_j times,

a b-matching. Its linear-programming dual has one price per expert, the bias g:

    D(g) = Σ_i [sum of the k largest of C_i + g] − Σ_j t_j g_j,    subgradient: counts − t,

and when the top-k of C + g has the right counts, it is the best assignment there is. It is found in two steps:

1. Here, with passes that count: each tells for every expert how far its g is from where the expert would have t_j
   tokens if all others stayed as they are. Experts take a share of that step, which grows while they stay on their side
   of the aim and falls when they cross it; on a sample of the tokens first, then on all.
2. `loads`: what is still too much leaves by the cheapest chains of moves. That is exact, needs no breaking of ties, and
   ends with loads inside the bounds wherever there is an assignment that has them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkroute.kernels.choose import Choice, choose
from sinkroute.kernels.column_sums import make_pass
from sinkroute.transport.problem import Problem

__all__ = ["PASSES", "Tokens", "column_quantiles", "cost_extent", "search", "within_reach"]

PASSES = 16  # at most, over a sample as over all
# Surpluses, as shares of the choices. Sampling alone makes sqrt(experts / choices) times some tenths.
SAMPLE_ENOUGH = 0.15
# The second per expert and choice.
ENOUGH, ENOUGH_PER_EXPERT = 0.0005, 0.1
FAR, AT_LEAST_FAR = 0.25, 4  # of a load from its target, as a share of it, and in tokens
# Experts answer to each other's steps. The share of its step that an expert takes grows while it is short of the aim or
# beyond it, and falls when it changes sides; that of all falls when the surplus grows.
LONGER, SHORTER = 1.2, 0.5
WORSE = 1.05


class Tokens:
    """The tokens of a problem, as they are counted; those of several ranks are counted alike (`over_ranks`)."""

    sampled_load = 16  # choices per expert in the smallest sample
    finer = 4  # times as large is the next sample

    def __init__(self, problem: Problem, k: int) -> None:
        self._problem, self._k = problem, k

    def rows(self) -> int:
        """How many tokens there are, with what is masked."""
        return len(self._problem.logits_TE)

    def count(self, step: int) -> int:
        """How many of every `step`-th token are real."""
        return self._problem.every(step).count()

    def start(self, target_E: Tensor) -> Tensor:
        """A bias (E,) float64 from little of the tokens."""
        return -column_quantiles(self._problem, self._k, target_E)

    def plausible(self, init_E: Tensor) -> Tensor:
        """A start not far beyond the costs, which would be lost to rounding there."""
        return within_reach(init_E, cost_extent(self._problem))

    def passes(self, step: int) -> int:
        """How often every `step`-th token may be counted."""
        return PASSES

    def enough(self, step: int, target_E: Tensor) -> tuple[float, Tensor]:
        """The surplus, as a share of the choices, and how far a load may be from its target, (E,), to look no further.

        Of all tokens that is where a further pass would cost more than the moves that it saves.
        """
        choices, far_E = float(target_E.sum()), (FAR * target_E).clamp(min=AT_LEAST_FAR)
        if step > 1:
            return SAMPLE_ENOUGH * math.sqrt(len(target_E) / choices), far_E
        return ENOUGH + ENOUGH_PER_EXPERT * len(target_E) / choices, far_E

    def choose(self, step: int, bias_E: Tensor, target_E: Tensor, limit_E: Tensor | None) -> Choice:
        """What every `step`-th token chooses with this bias; see `kernels.choose`."""
        rows = self._problem if step == 1 else self._problem.every(step)
        return choose(rows, self._k, bias_E, target_E, limit_E)


def search(tokens: Tokens, k: int, target_E: Tensor, init_E: Tensor | None) -> tuple[Choice, int]:
    """A choice of nearly the right loads, and how often all tokens were looked at.

    Args:
        tokens: that choose.
        k: experts per token.
        target_E: (E,) float64, the loads to be reached; not all 0.
        init_E: (E,) float64, a bias to start from.
    """
    limit_E = None
    if init_E is not None:
        bias_E = tokens.plausible(init_E)
    else:
        bias_E = tokens.start(target_E)
        most = tokens.rows() * k / (len(target_E) * tokens.sampled_load)
        for level in range(int(math.log(max(1, most), tokens.finer)), 0, -1):
            step = tokens.finer**level
            real = tokens.count(step)
            if real == 0 or tokens.passes(step) == 0:
                continue
            choice, _ = _descend(tokens, step, target_E * (real * k / target_E.sum()), bias_E, limit_E)
            bias_E, limit_E = choice.bias_E, 4 * choice.near_E
    return _descend(tokens, 1, target_E, bias_E, limit_E)


def _descend(tokens: Tokens, step: int, target_E: Tensor, bias_E: Tensor, limit_E: Tensor | None) -> tuple[Choice, int]:
    """The choice with the least surplus that was met on the way from this bias, and the passes."""
    positive_E = target_E > 0
    least, side_E = math.inf, None
    share_E = torch.ones_like(target_E)
    enough, far_E = tokens.enough(step, target_E)
    for passes in range(1, tokens.passes(step) + 1):  # noqa: B007, how many there were is returned
        # With the largest at 0, float32 resolves the small differences between the experts that few tokens want.
        bias_E = (bias_E - bias_E[positive_E].max()).masked_fill(~positive_E, -math.inf)
        choice = tokens.choose(step, bias_E, target_E, limit_E)
        surplus = float((choice.loads_E - target_E).clamp(min=0).sum() / target_E.sum())
        limit_E = 4 * choice.near_E
        if surplus <= WORSE * least:
            turn_E = choice.step_E.sign() * (0 if side_E is None else side_E)
            share_E = torch.where(turn_E < 0, SHORTER * share_E, torch.where(turn_E > 0, LONGER * share_E, share_E))
            share_E, side_E = share_E.clamp(max=1), choice.step_E.sign()
            at = choice
        else:
            share_E = SHORTER * share_E
        if surplus < least:
            best, least = choice, surplus
            # One expert that is far off takes the repair as long as many that are not.
            close = bool(((choice.loads_E - target_E).abs() <= far_E).all())
        if (least <= enough and close) or not at.step_E.any():
            break
        bias_E = at.bias_E + share_E * at.step_E
    return best, passes


def cost_extent(problem: Problem) -> tuple[float, float] | None:
    """The least and the largest finite cost of a sample; None where there is none."""
    cost_SE = problem.every(max(1, len(problem.logits_TE) // 1024)).cost_TE()
    if len(cost_SE) == 0:
        return None
    low, high = map(float, cost_SE.aminmax())
    if not math.isfinite(high - low):  # what is masked may hold anything
        finite_N = cost_SE[cost_SE.isfinite()]
        if len(finite_N) == 0:
            return None
        low, high = map(float, finite_N.aminmax())
    return low, high


def within_reach(init_E: Tensor, extent: tuple[float, float] | None) -> Tensor:
    """A start about 0, and not further from there than what makes up for all differences of costs."""
    if extent is None:
        return torch.zeros_like(init_E)
    reach = 4 * (extent[1] - extent[0])
    return (init_E - init_E.median()).clamp(-reach, reach)


def column_quantiles(problem: Problem, k: int, target_E: Tensor) -> Tensor:
    """The cost that expert j's share of the tokens is above, (E,) float64, from a sample; 0 where there is none."""
    sample = problem.every(max(1, len(problem.logits_TE) // 1024))
    real = sample.count()
    if real == 0:
        return torch.zeros_like(target_E)
    rank_E = (real * k * target_E / target_E.sum()).long().clamp(0, real - 1) + 1
    quantile_E = torch.from_numpy(make_pass(sample).column_ranks(rank_E.cpu().numpy())[1]).to(target_E)
    return torch.where(quantile_E.isfinite(), quantile_E, 0)
