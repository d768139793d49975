"""Balanced top-k: exactly k experts for every token, and a load for every expert that is balanced in whole tokens.

The top-k of a balanced plan is not balanced: the plan balances the sum of its entries, not who is chosen. Wanted is

    max Σ_i Σ_{j chosen by i} C_ij    s.t.    every token chooses k distinct experts, expert j is chosen t_j times,

a b-matching. Its linear-programming dual has one price per expert, the bias g:

    D(g) = Σ_i [sum of the k largest of C_i + g] − Σ_j t_j g_j,    subgradient: counts − t,

and when the top-k of C + g has the right counts, it is the best assignment there is. It is found in two steps:

1. `_search`, with passes that count: each tells for every expert how far its g is from where the expert would have t_j
   tokens if all others stayed as they are. Experts take a share of that step, which grows while they stay on their side
   of the aim and falls when they cross it; on a sample of the tokens first, then on all.
2. `repair`: what is still too much leaves by the cheapest chains of moves. That is exact, needs no breaking of ties,
   and ends with loads inside the bounds wherever there is an assignment that has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkroute._errors import require_numbers
from sinkroute.kernels.choose import Choice, choose
from sinkroute.kernels.column_sums import make_pass
from sinkroute.kernels.operations import define, uncompiled
from sinkroute.kernels.repair import repair
from sinkroute.kernels.rows import working_dtype
from sinkroute.kernels.storage import plain, readable
from sinkroute.transport.checks import (
    as_masses,
    check_k,
    check_logits_form,
    full_precision,
    make_problem,
    starting_potentials,
)
from sinkroute.transport.problem import Problem, refuse_bad_logits

__all__ = ["BalancedTopK", "balanced_topk"]

SAMPLED_LOAD = 16  # choices per expert in the smallest sample
PASSES = 16  # at most, over a sample as over all
# Surpluses, as shares of the choices. Sampling alone makes sqrt(experts / choices) times some tenths.
SAMPLE_ENOUGH = 0.15
# Below, a further pass would cost more than the moves that it saves; the second per expert and choice.
ENOUGH, ENOUGH_PER_EXPERT = 0.0005, 0.1
FAR, AT_LEAST_FAR = 0.25, 4  # of a load from its target, as a share of it, and in tokens
# Experts answer to each other's steps. The share of its step that an expert takes grows while it is short of the aim or
# beyond it, and falls when it changes sides; that of all falls when the surplus grows.
LONGER, SHORTER = 1.2, 0.5
WORSE = 1.05


class _ExpertsAndBias(NamedTuple):
    experts: Tensor
    bias: Tensor


class BalancedTopK(_ExpertsAndBias):
    """What `balanced_topk` returns, a named tuple of two: `experts_TK, bias_E = balanced_topk(...)`.

    Attributes:
        experts: (T, K) int64, the experts of every token, in no order; 0 to K − 1 for masked tokens.
        bias: (E,) float32, or float64 for float64 logits: the experts of each token are the K largest of C + bias, up
            to ties. Mean 0 over the experts with mass; −inf for an expert without. Start the next call from it.
        passes: how often all tokens were counted. A 0-d tensor where a tracer or a transform of `torch.func` looks on.
        moves: how often the repair gave a token another expert; a 0-d tensor as well.
    """

    passes: int | Tensor
    moves: int | Tensor

    def __new__(cls, experts: Tensor, bias: Tensor, passes: int | Tensor = 0, moves: int | Tensor = 0) -> BalancedTopK:
        self = super().__new__(cls, experts, bias)
        self.passes, self.moves = passes, moves
        return self

    def __getnewargs__(self) -> tuple[Tensor, Tensor, int | Tensor, int | Tensor]:
        return self.experts, self.bias, self.passes, self.moves


@uncompiled
def balanced_topk(
    logits_TE: Tensor,
    k: int,
    tol: float = 0.01,
    *,
    cost: str = "linear",
    token_mask: Tensor | None = None,
    expert_mass: Tensor | Sequence[float] | None = None,
    init: Tensor | None = None,
) -> BalancedTopK:
    """Choose k distinct experts for every token so that loads are balanced and the chosen logits are largest.

    With target t_j = k · T_real · mass_j / Σ mass, every load comes within `tol` of its target,

        (1 − tol) t_j ≤ load_j ≤ (1 + tol) t_j,    so that MaxVio = max_j load_j / t_j − 1 ≤ tol,

    or is t_j rounded up or down, where that is further. Of all assignments with the same loads it is one with
    the largest sum of C, and the slack is used where it raises that sum: with tol=0 it is the largest for the targets,
    rounded as is best; with more it is larger. Forbidden experts may leave a load below (1 − tol) t_j, never one above
    the upper bound. Nothing is random: the same logits give the same experts. The logits get no gradient.

    Time goes into some passes over the logits and into moving single tokens; without the compiled kernels the latter
    can take seconds. Ctrl-C is served within a second.

    Args:
        logits_TE: (T, E) logits of any floating-point dtype. −inf forbids an expert to a token.
        k: experts per token, 1 to E.
        tol: largest relative deviation of a load from its target, ≥ 0. 0 asks for the targets, rounded.
        cost: "linear" to maximise the sum of the logits, "softmax" that of each row's softmax.
        token_mask: (T,) bool, True = real token. What the logits of the others hold (even NaN) is ignored; they get
            experts 0 to k − 1, which count for nothing.
        expert_mass: (E,) relative capacities ≥ 0 of any scale; None for equal ones. An expert with 0 is not chosen. No
            expert may get more than 1/k of the sum: it can take a token only once.
        init: (E,) bias to start from, such as that of the call before; entries that are not finite start from 0.

    Returns:
        `(experts_TK, bias_E)` with the attributes of `BalancedTopK`.

    Raises:
        TypeError: an argument of a wrong type or dtype, or a tensor that stands for something else, such as a
            `MaskedTensor` or a `DTensor`.
        ValueError: a wrong shape, an unknown name, a number out of range, a token with fewer than k experts that are
            allowed, an expert that would have to take tokens twice, or −inf in so many places that no assignment
            has loads within `tol`.
        NonFiniteLogits: a logit of a real token is NaN or +inf (names the first). A ValueError.

    Example:
        >>> import torch
        >>> logits_TE = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 1.0], [3.0, 2.0]])  # all prefer expert 0
        >>> experts_TK, bias_E = balanced_topk(logits_TE, k=1)
        >>> experts_TK.flatten().tolist()
        [0, 0, 1, 1]
    """
    logits_TE = check_logits_form(logits_TE)
    _check_numbers(logits_TE, k, tol)
    tol = float(tol)
    mask = plain("token_mask", token_mask, logits_TE)
    mass_E = None if expert_mass is None else as_masses(expert_mass, logits_TE)
    init = plain("init", init, logits_TE)
    if not readable(logits_TE, mask, mass_E, init):
        with torch.no_grad(), full_precision(logits_TE):  # what can be refused without looking at numbers
            starting_potentials(make_problem(logits_TE, 1.0, cost, mask, expert_mass=mass_E), init)
        found = torch.ops.sinkroute.balanced_topk(logits_TE.detach(), k, tol, cost, mask, mass_E, init)
        return BalancedTopK(*found)
    return BalancedTopK(*_balanced_topk(logits_TE, k, tol, cost, mask, mass_E, init))


def _balanced_topk(
    logits_TE: Tensor,
    k: int,
    tol: float,
    cost: str,
    token_mask: Tensor | None,
    expert_mass: Tensor | None,
    init: Tensor | None,
) -> tuple[Tensor, Tensor, int, int]:
    with torch.no_grad(), full_precision(logits_TE):
        problem = make_problem(logits_TE, 1.0, cost, token_mask, expert_mass=expert_mass)
        init_E = starting_potentials(problem, init)
        _check(problem, k, tol)
        target_E = k * problem.target_E
        choice, passes = _search(problem, k, target_E, init_E)
        choice, moves = _into_bounds(problem, choice, target_E, tol)
        largest = torch.finfo(problem.dtype).max
        bias_E = problem.centre(choice.bias_E).clamp(-largest, largest).to(problem.dtype)
        bias_E = bias_E.masked_fill(~problem.positive_E, -math.inf)
    return choice.experts_TK, bias_E, passes, moves


def _operation(logits_TE: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(x, device=logits_TE.device) for x in _balanced_topk(logits_TE, *args))


def _shape(logits_TE: Tensor, k: int, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = logits_TE.new_empty((), dtype=torch.int64)
    bias_E = logits_TE.new_empty(logits_TE.shape[1], dtype=working_dtype(logits_TE.dtype))
    return logits_TE.new_empty(logits_TE.shape[0], k, dtype=torch.int64), bias_E, count, torch.empty_like(count)


define(
    "balanced_topk(Tensor logits, SymInt k, float tol, str cost, Tensor? token_mask, Tensor? expert_mass, "
    "Tensor? init) -> (Tensor, Tensor, Tensor, Tensor)",
    _operation,
    _shape,
)


def _check_numbers(logits_TE: Tensor, k: int, tol: float) -> None:
    check_k(k, logits_TE.shape[1])
    require_numbers(tol=tol)
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol must be a finite number, at least 0, got {tol}")


def _check(problem: Problem, k: int, tol: float) -> None:
    logits_TE = problem.logits_TE
    if not problem.target_E.any():
        return
    low, high = logits_TE.aminmax()
    if not high < math.inf:  # also where it is NaN; perhaps in a masked row only
        refuse_bad_logits(problem)
    share_E = problem.target_E / problem.target_E.sum()
    if k * share_E.max() > 1 + 1e-9:
        most = int(share_E.argmax())
        raise ValueError(
            f"expert_mass gives expert {most} a share of {share_E[most].item():.3g}, but with k={k} distinct experts "
            f"per token none can have more than 1/{k} of the choices; lower expert_mass[{most}] or k"
        )
    if -math.inf < low and problem.positive_E.all():
        return
    for part in problem.parts():
        allowed_R = ((logits_TE[part] > -math.inf) & problem.positive_E).sum(dim=1)
        if problem.token_mask is not None:
            allowed_R = allowed_R.masked_fill(~problem.token_mask[part], k)
        if (allowed_R < k).any():
            token = int((allowed_R < k).nonzero()[0])
            raise ValueError(
                f"k={k}, but logits_TE[{part.start + token}] allows {int(allowed_R[token])} experts (logits above "
                "−inf, expert_mass above 0); lower k, allow more, or mask the token with token_mask"
            )


def _bounds(target_E: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest load (E,) int64 within tol of the target, which never exclude the target rounded."""
    # What float32 masses make of a whole number is meant to be that number. In all it is less than one choice, or no
    # loads within the bounds might have the right sum.
    rounding = (1e-7 * target_E).clamp(max=0.1 / len(target_E))
    lower_E = torch.minimum(((1 - tol) * target_E - rounding).ceil(), (target_E + rounding).floor())
    upper_E = torch.maximum(((1 + tol) * target_E + rounding).floor(), (target_E - rounding).ceil())
    return lower_E.clamp(min=0).long(), upper_E.clamp(max=2**53).long()  # whatever tol is


def _within(loads_E: Tensor, lower_E: Tensor, upper_E: Tensor) -> bool:
    return bool(((lower_E <= loads_E) & (loads_E <= upper_E)).all())


def _search(problem: Problem, k: int, target_E: Tensor, init_E: Tensor | None) -> tuple[Choice, int]:
    """A choice of nearly the right loads, and how often all tokens were looked at."""
    if not target_E.any():
        start_E = torch.zeros_like(target_E).masked_fill(~problem.positive_E, -math.inf)
        return choose(problem, k, start_E, target_E), 1
    limit_E = None
    if init_E is not None:
        bias_E = _plausible(problem, init_E)
    else:
        tokens, experts = problem.logits_TE.shape
        bias_E = _column_quantiles(problem, k, target_E)
        levels = int(math.log(max(1, tokens * k / (experts * SAMPLED_LOAD)), 4))
        for level in range(levels, 0, -1):
            sample = problem.every(4**level)
            real = sample.count()
            if real == 0:
                continue
            sampled_E = target_E * (real * k / target_E.sum())
            enough = SAMPLE_ENOUGH * math.sqrt(experts / (real * k))
            choice, _ = _descend(sample, k, sampled_E, bias_E, limit_E, enough)
            bias_E, limit_E = choice.bias_E, 4 * choice.near_E
    enough = ENOUGH + ENOUGH_PER_EXPERT * len(target_E) / float(target_E.sum())
    return _descend(problem, k, target_E, bias_E, limit_E, enough)


def _descend(
    problem: Problem, k: int, target_E: Tensor, bias_E: Tensor, limit_E: Tensor | None, enough: float
) -> tuple[Choice, int]:
    """The choice with the least surplus that was met on the way from this bias, and the passes."""
    positive_E = target_E > 0
    least, side_E = math.inf, None
    share_E = torch.ones_like(target_E)
    for passes in range(1, PASSES + 1):  # noqa: B007, how many there were is returned
        # With the largest at 0, float32 resolves the small differences between the experts that few tokens want.
        bias_E = (bias_E - bias_E[positive_E].max()).masked_fill(~positive_E, -math.inf)
        choice = choose(problem, k, bias_E, target_E, limit_E)
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
            close = bool(((choice.loads_E - target_E).abs() <= (FAR * target_E).clamp(min=AT_LEAST_FAR)).all())
        if (least <= enough and close) or not at.step_E.any():
            break
        bias_E = at.bias_E + share_E * at.step_E
    return best, passes


def _into_bounds(problem: Problem, choice: Choice, target_E: Tensor, tol: float) -> tuple[Choice, int]:
    """The choice with every load within tol of its target, and the moves that took; an error where none can be."""
    lower_E, upper_E = _bounds(target_E, tol)
    # A load above its target raises the sum where the price is low, as all want the expert, and one below where it is
    # high. Only there may the repair leave it, unless too much is forbidden for that.
    wanted_E = problem.centre(choice.bias_E) < 0
    floor_E, ceiling_E = _bounds(target_E, 0)
    one_sided = torch.where(wanted_E, floor_E, lower_E), torch.where(wanted_E, upper_E, ceiling_E)
    # To whole numbers, the best of them, where no other loads are allowed.
    rounds = bool((upper_E > lower_E).any() & (upper_E - lower_E <= 1).all())
    choice, moves = _repaired(problem, choice, *one_sided, rounds)
    if not _within(choice.loads_E, lower_E, upper_E):
        choice, more = _repaired(problem, choice, lower_E, upper_E, rounds)
        moves += more
    above_E = choice.loads_E - upper_E
    if (above_E > 0).any():
        worst = int(above_E.argmax())
        raise ValueError(
            f"tol={tol} cannot be kept: expert {worst} has a load of {int(choice.loads_E[worst])} and may have "
            f"{int(upper_E[worst])}, but its tokens are allowed (logits above −inf) no expert with room; raise tol "
            "or expert_mass, or allow more"
        )
    return choice, moves


def _repaired(problem: Problem, choice: Choice, lower_E: Tensor, upper_E: Tensor, rounds: bool) -> tuple[Choice, int]:
    """The choice with its loads inside the bounds, as far as possible, and the moves that took."""
    if _within(choice.loads_E, lower_E, upper_E) and not rounds:
        return choice, 0
    # The repair goes from token to token, which is nothing for an accelerator.
    mask, device = problem.token_mask, choice.bias_E.device
    here = replace(problem, logits_TE=problem.logits_TE.cpu(), token_mask=None if mask is None else mask.cpu())
    changed = Choice(*(x.cpu() for x in choice))._replace(bias_E=choice.bias_E.cpu().double())
    moves = repair(here, changed, lower_E.cpu(), upper_E.cpu(), rounds=rounds)
    bias_E = changed.bias_E.to(choice.bias_E.dtype)
    return Choice(*(x.to(device) for x in changed._replace(bias_E=bias_E))), moves


def _plausible(problem: Problem, init_E: Tensor) -> Tensor:
    """A start whose differences are not far beyond those of the costs: there the costs would be lost to rounding."""
    cost_SE = problem.every(max(1, len(problem.logits_TE) // 1024)).cost_TE()
    if len(cost_SE) == 0:
        return torch.zeros_like(init_E)
    low, high = map(float, cost_SE.aminmax())
    if not math.isfinite(high - low):  # what is masked may hold anything
        finite_N = cost_SE[cost_SE.isfinite()]
        if len(finite_N) == 0:
            return torch.zeros_like(init_E)
        low, high = map(float, finite_N.aminmax())
    reach = 4 * (high - low)
    return (init_E - init_E.median()).clamp(-reach, reach)


def _column_quantiles(problem: Problem, k: int, target_E: Tensor) -> Tensor:
    """Minus the cost that expert j's share of the tokens is above, (E,) float64, from a sample."""
    sample = problem.every(max(1, len(problem.logits_TE) // 1024))
    real = sample.count()
    if real == 0:
        return torch.zeros_like(target_E)
    rank_E = (real * k * target_E / target_E.sum()).long().clamp(0, real - 1) + 1
    quantile_E = torch.from_numpy(make_pass(sample).column_ranks(rank_E.cpu().numpy())[1]).to(target_E)
    return torch.where(quantile_E.isfinite(), -quantile_E, 0)
