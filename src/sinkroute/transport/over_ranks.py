"""Balanced top-k for tokens that are spread over ranks: one bias for all, and loads that are balanced over all.

Each rank counts what its tokens choose, and what is known of all is a sum. So the search is that of one process
(`search`), with three numbers of every expert summed in each pass: its load, and how many tokens are within a distance
h of leaving it, and of coming to it. All ranks have the same h, from the sums before; where a rank has more than the 16
tokens that are looked for it has them in proportion. The step of an expert with n choices too many is n h / N, N being
the sum of its side: that of all tokens, and no mean of what the ranks would do by themselves.

What the search leaves is moved within each rank: the loads of all are gathered once, every rank finds the same quotas
for all (`quotas`), and repairs its own choice to these. The bias that is returned is that of the search.

What is sent, as gathered from every rank in float64: FACTS numbers; 3 E for a start, unless one is given; 3 E a pass,
at most SAMPLE_PASSES + FULL_PASSES of them; E loads; and where logits of −inf forbid experts, E loads once more. Every
decision is made of what was gathered. Where all ranks have few tokens, or forbidden experts keep a rank from its
quotas, the logits are gathered instead and every rank balances all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sinkroute.kernels.choose import NEAREST, Choice, choose_with_edges
from sinkroute.kernels.rows import COSTS, wide_dtype
from sinkroute.transport.loads import bounds, one_sided, repaired
from sinkroute.transport.problem import Problem
from sinkroute.transport.quotas import quotas
from sinkroute.transport.ranks import Gathering, added, refusals
from sinkroute.transport.search import Tokens, column_quantiles, cost_extent, search, within_reach

__all__ = ["CALLS", "FACTS", "Rank", "balance_over_ranks", "refuse_to_ranks"]

SAMPLE_PASSES, FULL_PASSES = 16, 16  # at most; the first over samples of all sizes together
KEPT = 0.015  # how far loads may be from their targets with the bias of all, which the repair does not better
LEVELS = 6  # of samples at most: every 16**6-th token
WIDER, BISECTIONS = 4, 30  # of the start
AIM = 64  # tokens, at least, that the width about an expert's edge is to hold
FEW = 64  # tokens of each rank, whose logits are no longer than the passes would be
# Parts of the first message: 0 or 1 for refused; what must agree; what is added up or compared.
AGREED = ("k", "the number of experts", "tol", "cost", "the dtype's bits", "expert_mass", "init")
UNSHOWN = ("cost", "expert_mass", "init")  # sums that stand for them
FACTS = 1 + len(AGREED) + 4 + LEVELS + 1
# Calls of all_gather: facts, a start, passes, loads, and, where experts are forbidden, loads again and the logits.
CALLS = 2 + SAMPLE_PASSES + FULL_PASSES + 3


Found = tuple[Tensor, Tensor, int, int]
"""Experts (T, K), the bias (E,), passes and moves."""


class Rank(NamedTuple):
    """One of the ranks: what all of them give, (ranks, *shape), and its place there."""

    gather: Gathering
    number: int


def balance_over_ranks(
    problem: Problem,
    k: int,
    tol: float,
    init_E: Tensor | None,
    forbids: bool,
    rank: Rank,
    alone: Callable[[Problem, int, float, Tensor | None], Found],
) -> Found:
    """The experts of this rank's tokens and the bias of all, as `balanced_topk` returns them. A collective call.

    Args:
        problem: this rank's part, its `target_E` of sum 1.
        k, tol: as in `balanced_topk`.
        init_E: (E,) float64, a bias to start from.
        forbids: whether a token of this rank may have an expert at −inf.
        rank: this one.
        alone: the same for one process, from a problem whose `target_E` are tokens.

    Raises:
        ValueError: on all ranks: one has refused its arguments, or they do not agree.
    """
    message = _Message(problem, rank)
    facts_RF = message.gather(_facts(problem, k, tol, init_E, forbids))
    if facts_RF[:, 0].any():
        told = "its error says which"
        if problem.logits_TE.device.type == "cpu":
            told = refusals(message.sum)
        raise ValueError(f"another rank refused its arguments, here they are right; {told}")
    facts = _Facts(facts_RF)
    if not facts.real_R.any():
        return alone(replace(problem, target_E=0 * problem.target_E), k, tol, init_E)
    if facts.rows_R.max() <= FEW:
        return _together(problem, k, tol, init_E, facts, message, alone)
    target_E = k * facts.real_R.sum() * problem.target_E.cpu().double()
    tokens = _TokensOfAll(problem, k, facts, message)
    choice, passes = search(tokens, k, target_E, None if init_E is None else init_E.cpu().double())
    bias_E = choice.bias_E.masked_fill(target_E == 0, 0)
    bias_E = (bias_E - bias_E.sum() / (target_E > 0).sum()).masked_fill(target_E == 0, -math.inf)
    here = choice._replace(
        loads_E=_loads(problem, choice.experts_TK), bias_E=bias_E.to(problem.logits_TE.device, copy=True)
    )
    loads_RE = message.gather(here.loads_E).long()
    limits = (x.numpy() for x in one_sided(bias_E, target_E, tol))
    lower_RE, upper_RE = quotas(loads_RE.numpy(), facts.real_R.long().numpy(), *limits)
    lower_E, upper_E = (torch.from_numpy(x[rank.number]).to(here.loads_E) for x in (lower_RE, upper_RE))
    here, moves = repaired(problem, here, lower_E, upper_E, False)
    if facts.forbids:
        loads_E = message.gather(here.loads_E).sum(0).long()
        if (loads_E > bounds(target_E, tol)[1]).any():
            return _together(problem, k, tol, bias_E, facts, message, alone)
    largest = torch.finfo(problem.dtype).max
    bias_E = bias_E.clamp(-largest, largest).masked_fill(target_E == 0, -math.inf)
    return here.experts_TK, bias_E.to(problem.logits_TE.device, problem.dtype), passes, moves


def refuse_to_ranks(logits_TE: object, gather: Gathering, error: BaseException | None) -> None:
    """Tell the ranks in `balance_over_ranks`, which wait for this one, that it has refused its arguments.

    Args:
        logits_TE: which this rank was given, whatever they are; of tensors the device counts.
        gather: as of the `Rank`.
        error: that this rank is about to raise; on a CPU the others tell it in theirs.
    """
    device = torch.device("cpu")
    if isinstance(logits_TE, Tensor) and not logits_TE.is_meta:
        device = logits_TE.device
    gather(torch.ones(FACTS, dtype=wide_dtype(device), device=device))
    if device.type == "cpu":
        refusals(lambda x: added(gather(x)), error)


class _Message:
    """What is sent, from where the logits are; what comes back is on the CPU, where all is decided."""

    def __init__(self, problem: Problem, rank: Rank) -> None:
        self._gather, self.rank, self._like = rank.gather, rank.number, problem.target_E

    def gather(self, x: Tensor) -> Tensor:
        """(ranks, *shape) float64."""
        return self._gather(x.to(self._like)).cpu().double()

    def raw(self, x: Tensor) -> Tensor:
        """(ranks, *shape) of the dtype of `x`."""
        return self._gather(x.to(self._like.device)).cpu()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, float64, in their order."""
        return added(self.gather(x))


def _facts(problem: Problem, k: int, tol: float, init_E: Tensor | None, forbids: bool) -> Tensor:
    """(FACTS,) what the others have to know of this rank's part."""
    like, logits_TE, mask = problem.target_E, problem.logits_TE, problem.token_mask
    experts = logits_TE.shape[1]
    cost = list(COSTS).index(problem.cost)
    # Of another mass or start nearly every other sum is another.
    weights_E = torch.arange(1, experts + 1, dtype=like.dtype, device=like.device).sqrt()
    start = math.nan if init_E is None else (init_E * weights_E).sum()
    agreed = [k, experts, tol, cost, torch.finfo(logits_TE.dtype).bits, (like * weights_E).sum(), start]
    extent = cost_extent(problem) or (math.inf, -math.inf)
    steps = [_TokensOfAll.finer**level for level in range(LEVELS + 1)]
    counts = [len(logits_TE[::step]) if mask is None else mask[::step].sum() for step in steps]
    return torch.stack([torch.as_tensor(x).to(like) for x in [0, *agreed, forbids, len(logits_TE), *extent, *counts]])


class _Facts:
    """What was told of all ranks.

    Attributes:
        forbids: whether a token of any has an expert at −inf.
        rows_R, real_R: tokens, and those that are not masked.
        counts_L: how many of these every 16**l-th one makes.
        extent: the least and the largest cost.

    Raises:
        ValueError: what must agree does not.
    """

    def __init__(self, facts_RF: Tensor) -> None:
        first = 1 + len(AGREED)
        for name, said_R in zip(AGREED, facts_RF[:, 1:first].T, strict=True):
            said = said_R.nan_to_num(math.inf).tolist()
            if len(set(said)) > 1:
                shown = "" if name in UNSHOWN else f", got {said} by rank"
                raise ValueError(f"{name} must be the same on all ranks of process_group{shown}; pass the same on all")
        forbids_R, self.rows_R, lows_R, highs_R, *counts_LR = facts_RF[:, first:].T
        self.forbids, self.real_R = bool(forbids_R.any()), counts_LR[0]
        self.extent = float(lows_R.min()), float(highs_R.max())
        self.counts_L = [int(counts_R.sum()) for counts_R in counts_LR]


class _TokensOfAll(Tokens):
    """Those of all ranks: counted here, and summed."""

    sampled_load, finer = 32, 16  # fewer passes over samples, as each costs a message

    def __init__(self, problem: Problem, k: int, facts: _Facts, message: _Message) -> None:
        super().__init__(problem, k)
        self._facts, self._message, self._samples = facts, message, SAMPLE_PASSES

    def rows(self) -> int:
        return int(self._facts.rows_R.sum())

    def count(self, step: int) -> int:
        return self._facts.counts_L[round(math.log(step, self.finer))]

    def start(self, target_E: Tensor) -> Tensor:
        """Minus the cost that expert j's share of all tokens is above.

        A rank tells two costs of each column, above which are its share of the rank's tokens and four times as many;
        between and beyond them logarithms of shares are taken to be linear in the cost.
        """
        share_E, like_E = target_E / target_E.sum() * self._k, target_E.to(self._problem.target_E)
        high_E, low_E = (column_quantiles(self._problem, self._k * part, like_E) for part in (1, WIDER))
        high_RE, low_RE = self._message.gather(torch.stack([high_E, low_E])).unbind(1)
        weights_R1 = (self._facts.real_R / self._facts.real_R.sum())[:, None]
        rate_RE = math.log(WIDER) / (high_RE - low_RE).clamp(min=1e-3 * (high_RE.abs() + low_RE.abs()) + 1e-30)
        lower_E, upper_E = low_RE.amin(0), high_RE.amax(0)
        for _ in range(BISECTIONS):
            middle_E = (lower_E + upper_E) / 2
            above_RE = (share_E * (rate_RE * (high_RE - middle_E)).exp()).clamp(max=1)
            more_E = (weights_R1 * above_RE).sum(0) > share_E
            lower_E, upper_E = torch.where(more_E, middle_E, lower_E), torch.where(more_E, upper_E, middle_E)
        width_E = share_E / (weights_R1 * rate_RE * above_RE).sum(0)
        self._width_E = width_E.nan_to_num(math.inf).clamp(max=self._span())
        return torch.where(target_E > 0, -lower_E, 0)

    def plausible(self, init_E: Tensor) -> Tensor:
        self._width_E = torch.full_like(init_E, self._span() / 8)
        return within_reach(init_E, self._facts.extent if self._span() else None)

    def _span(self) -> float:
        """Between the least and the largest cost; 0 where there is none."""
        low, high = self._facts.extent
        return max(high - low, 0)

    def enough(self, step: int, target_E: Tensor) -> tuple[float, Tensor]:
        enough, far_E = super().enough(step, target_E)
        return 2 * enough, far_E if step > 1 else (KEPT * target_E).clamp(min=1)

    def passes(self, step: int) -> int:
        return FULL_PASSES if step == 1 else self._samples

    def choose(self, step: int, bias_E: Tensor, target_E: Tensor, limit_E: Tensor | None) -> Choice:
        self._samples -= step > 1
        device = self._problem.logits_TE.device
        rows = self._problem if step == 1 else self._problem.every(step)
        width_E = self._width_E if limit_E is None else limit_E
        here, edges_2NE = choose_with_edges(rows, self._k, bias_E.to(device), target_E.to(device), width_E.to(device))
        loads_E, leave_E, come_E = self._message.sum(
            torch.stack([here.loads_E.to(width_E), *_tokens_within(edges_2NE, width_E)])
        )
        surplus_E = loads_E - target_E.round()
        near_E = torch.where(surplus_E > 0, leave_E, come_E)
        # Where nobody is within the width the bias may move as far, and a wider one is looked at next.
        widths_E = torch.where(near_E > 0, surplus_E.abs() / near_E, 1)
        step_E = -surplus_E.sign() * width_E * widths_E
        width_E = width_E * (surplus_E.abs().clamp(min=AIM) / near_E).clamp(1 / 16, 4)
        return here._replace(bias_E=bias_E, loads_E=loads_E, step_E=step_E, near_E=width_E / 4)


def _tokens_within(edges_2NE: Tensor, width_E: Tensor) -> Tensor:
    """How many tokens are within `width_E` of leaving and of coming, (2, E); of more than are known in proportion."""
    edges_2NE = edges_2NE.to(width_E)
    known_2E = (edges_2NE < width_E).sum(dim=1).to(width_E)
    return torch.where(known_2E < NEAREST, known_2E, NEAREST * width_E / edges_2NE[:, -1])


def _loads(problem: Problem, experts_TK: Tensor) -> Tensor:
    mask = problem.token_mask
    chosen_N = (experts_TK if mask is None else experts_TK[mask]).flatten()
    return chosen_N.bincount(minlength=problem.logits_TE.shape[1])


def _together(
    problem: Problem,
    k: int,
    tol: float,
    init_E: Tensor | None,
    facts: _Facts,
    message: _Message,
    alone: Callable[[Problem, int, float, Tensor | None], Found],
) -> Found:
    """Every rank balances the tokens of all, and keeps its part of what comes out."""
    rows, here = int(facts.rows_R.max()), len(problem.logits_TE)
    mask = problem.token_mask
    real_T = torch.ones(here, dtype=torch.bool) if mask is None else mask.cpu()
    # Into one matrix, whose last column says which rows are real.
    sent_TX = torch.zeros(rows, problem.logits_TE.shape[1] + 1, dtype=problem.dtype)
    sent_TX[:here][real_T, :-1] = problem.logits_TE.cpu()[real_T].to(problem.dtype)
    sent_TX[:here, -1] = real_T
    all_NX = message.raw(sent_TX).flatten(0, 1)
    logits_NE, mask_N = all_NX[:, :-1].contiguous(), all_NX[:, -1] > 0
    whole = replace(
        problem,
        logits_TE=logits_NE,
        token_mask=None if mask_N.all() else mask_N,
        target_E=problem.target_E.cpu() * facts.real_R.sum(),
        positive_E=problem.positive_E.cpu(),
    )
    experts_NK, bias_E, passes, moves = alone(whole, k, tol, init_E)
    first, device = message.rank * rows, problem.logits_TE.device
    return experts_NK[first : first + here].to(device), bias_E.to(device), passes, moves
