"""Balanced top-k: exactly k experts for every token, and a load for every expert that is balanced in whole tokens.

What is asked for and how it is found is told in `search`, which finds the bias; `loads` moves what is left. Tokens that
are spread over ranks have one search for all, and each rank moves its part of what is left: `over_ranks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sinkroute._errors import require_numbers
from sinkroute.kernels.choose import choose
from sinkroute.kernels.operations import define, uncompiled
from sinkroute.kernels.rows import working_dtype
from sinkroute.kernels.storage import is_watched, plain, readable
from sinkroute.transport.checks import (
    as_masses,
    check_k,
    check_logits_form,
    check_problem,
    full_precision,
    make_problem,
    starting_potentials,
)
from sinkroute.transport.loads import into_bounds
from sinkroute.transport.over_ranks import Found, Rank, balance_over_ranks, refuse_to_ranks
from sinkroute.transport.problem import Problem, refuse_bad_logits
from sinkroute.transport.ranks import gather_over_ranks
from sinkroute.transport.search import Tokens, search

__all__ = ["BalancedTopK", "balanced_topk"]


class _ExpertsAndBias(NamedTuple):
    experts: Tensor
    bias: Tensor


class BalancedTopK(_ExpertsAndBias):
    """What `balanced_topk` returns, a named tuple of two: `experts_TK, bias_E = balanced_topk(...)`.

    Attributes:
        experts: (T, K) int64, the experts of every token, in no order; 0 to K − 1 for masked tokens.
        bias: (E,) float32, or float64 for float64 logits: the experts of each token are the K largest of C + bias, up
            to ties. Mean 0 over the experts with mass; −inf for an expert without. Start the next call from it. Over
            ranks it is that of the search, and the few tokens that the repair moved are not by it.
        passes: how often all tokens were counted. A 0-d tensor where a tracer or a transform of `torch.func` looks on.
        moves: how often the repair gave a token another expert (over ranks: of this rank); a 0-d tensor as well.

    >>> import sinkroute, torch
    >>> found = sinkroute.balanced_topk(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), 1)  # both prefer expert 0
    >>> found.experts.flatten()
    tensor([0, 1])
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
    process_group: dist.ProcessGroup | None = None,
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
        process_group: ranks that hold different tokens of one problem. Loads are balanced over all of them, by one bias
            that is the same on all to the bit; every rank gets the experts of the rows that it gave, and may have no
            tokens. All other arguments, E and the width of the dtype must agree. The calls of `all_gather` are some 13
            of at most max(3 E, 19) float64 numbers from each rank, and never more than 37. Where no rank has more than
            64 tokens, or forbidden experts keep a rank from doing its part, one of them gathers the logits.

    Returns:
        `(experts_TK, bias_E)` with the attributes of `BalancedTopK`.

    Raises:
        TypeError: an argument of a wrong type or dtype, or a tensor that stands for something else, such as a
            `MaskedTensor` or a `DTensor`.
        ValueError: a wrong shape, an unknown name, a number out of range, a token with fewer than k experts that are
            allowed, an expert that would have to take tokens twice, or −inf in so many places that no assignment
            has loads within `tol`.
        NonFiniteLogits: a logit of a real token is NaN or +inf (names the first). A ValueError.
        NotImplementedError: `process_group` under a tracer or `torch.func`.

    With `process_group`, what one rank refuses is an error on all of them, a ValueError where it is another's.

    Example:
        >>> import torch
        >>> logits_TE = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 1.0], [3.0, 2.0]])  # all prefer expert 0
        >>> experts_TK, bias_E = balanced_topk(logits_TE, k=1)
        >>> experts_TK.flatten().tolist()
        [0, 0, 1, 1]
    """
    if process_group is not None:
        return BalancedTopK(*_over_ranks(logits_TE, k, tol, cost, token_mask, expert_mass, init, process_group))
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
) -> Found:
    with torch.no_grad(), full_precision(logits_TE):
        problem = make_problem(logits_TE, 1.0, cost, token_mask, expert_mass=expert_mass)
        init_E = starting_potentials(problem, init)
        if problem.target_E.any():
            _check(problem, k)
        return _balance(problem, k, tol, init_E)


def _balance(problem: Problem, k: int, tol: float, init_E: Tensor | None) -> Found:
    """For one process and a problem that was checked."""
    target_E = k * problem.target_E
    if target_E.any():
        choice, passes = search(Tokens(problem, k), k, target_E, init_E)
    else:
        start_E = torch.zeros_like(target_E).masked_fill(~problem.positive_E, -math.inf)
        choice, passes = choose(problem, k, start_E, target_E), 1
    choice, moves = into_bounds(problem, choice, target_E, tol)
    largest = torch.finfo(problem.dtype).max
    bias_E = problem.centre(choice.bias_E).clamp(-largest, largest).to(problem.dtype)
    return choice.experts_TK, bias_E.masked_fill(~problem.positive_E, -math.inf), passes, moves


def _over_ranks(
    logits_TE: Tensor,
    k: int,
    tol: float,
    cost: str,
    token_mask: Tensor | None,
    expert_mass: Tensor | Sequence[float] | None,
    init: Tensor | None,
    group: dist.ProcessGroup,
) -> Found:
    if is_watched():
        raise NotImplementedError(
            "process_group is not for torch.func, torch.jit.trace, make_fx or a dispatch mode: they would not see what "
            "the ranks tell each other; choose outside of it, or for this rank alone"
        )
    rank = Rank(gather_over_ranks(group), dist.get_rank(group))
    try:
        logits_TE = check_logits_form(logits_TE)
        _check_numbers(logits_TE, k, tol)
        mask = plain("token_mask", token_mask, logits_TE)
        if not readable(logits_TE, mask):
            raise TypeError(
                f"logits_TE of type {type(logits_TE).__name__} on {logits_TE.device} holds no numbers that ranks could "
                "add up; leave process_group out, or pass real tensors"
            )
        with torch.no_grad(), full_precision(logits_TE):
            problem = check_problem(logits_TE, 1.0, cost, mask, None, expert_mass)
            init_E = starting_potentials(problem, init)
            forbids = problem.count() > 0 and _check(problem, k)
    except Exception as error:
        refuse_to_ranks(logits_TE, rank.gather, error)  # the others wait for this rank
        raise
    with torch.no_grad(), full_precision(logits_TE):
        return balance_over_ranks(problem, k, float(tol), init_E, forbids, rank, _balance)


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


def _check(problem: Problem, k: int) -> bool:
    """Whether a token may have an expert at −inf. An error where no choice can be made."""
    logits_TE = problem.logits_TE
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
        return False
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
    return True
