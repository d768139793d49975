"""Which experts get one token more, where the choices are no multiple of the experts.

`balanced_topk` gives the best assignment for its loads, ⌊n/E⌋ or ⌈n/E⌉ each, but not the best of those loads: that the
rest goes to these experts and not to others may cost something. A chain of moves j → … → l takes a choice from expert j
and gives one to expert l; with

    loss_jl = min over the tokens that have j and not l of (C_ij − C_il)

as lengths, the cheapest chain from an expert that has one more to one that has not is a shortest path. As long as it is
negative it raises the sum. As the assignment is the best for its loads there are no negative cycles, and when no
negative chain is left, no loads ⌊n/E⌋ or ⌈n/E⌉ have a better one (successive shortest paths).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkroute._operations import define
from sinkroute._values import readable

__all__ = ["best_rounding"]


@torch.no_grad()
def best_rounding(scores_TE: Tensor, experts_TK: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """The assignment with the largest sum whose loads are the mean, rounded up or down.

    Args:
        scores_TE: (T, E), finite where the token is real.
        experts_TK: (T, K) int64, distinct experts of each token; the best assignment with its loads, which are the
            mean, rounded up or down.
        token_mask: (T,) bool, True for real tokens; others keep what they have.

    Returns:
        (T, K) int64.

    >>> best_rounding(torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([[2]])).tolist()
    [[1]]
    """
    if not readable(scores_TE, experts_TK, token_mask):
        return torch.ops.sinkroute.best_rounding(scores_TE.detach(), experts_TK, token_mask)
    return _best_rounding(scores_TE, experts_TK, token_mask)


def _best_rounding(scores_TE: Tensor, experts_TK: Tensor, token_mask: Tensor | None) -> Tensor:
    tokens, experts = scores_TE.shape
    real = tokens if token_mask is None else int(token_mask.sum())
    if real * experts_TK.shape[1] % experts == 0:
        return experts_TK
    # From token to token: nothing for an accelerator. Float64 holds differences of float32 numbers, so ties are ties.
    device, cost_TE = experts_TK.device, scores_TE.detach().double().cpu()
    has_TE = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, experts_TK.cpu(), True)
    if token_mask is not None:
        cost_TE, has_TE = cost_TE[token_mask.cpu()], has_TE[token_mask.cpu()]
    enough = 1e-13 * (1 + cost_TE.abs().max().item())
    load_E = has_TE.sum(0)
    least = int(load_E.min())
    loss_EE, token_EE = torch.empty(experts, experts, dtype=torch.float64), torch.zeros(experts, experts).long()
    stale = set(range(experts))
    while True:
        for j in stale:
            loss_EE[j], token_EE[j] = _cheapest_moves(cost_TE, has_TE, j)
        chain = _shortest_chain(loss_EE, load_E > least, load_E == least, enough)
        if not chain:
            break
        moves = [(int(token_EE[j, i]), j, i) for j, i in chain]
        for token, j, i in moves:
            has_TE[token, j], has_TE[token, i] = False, True
        load_E[chain[-1][0]] -= 1
        load_E[chain[0][1]] += 1
        stale = {j for _, j, _ in moves}
        for token, _, i in moves:
            for m in has_TE[token].nonzero().flatten().tolist():
                if m != i and token_EE[m, i] == token:  # it was the one that would have moved there
                    stale.add(m)
                # From its new expert it can move on, from its others to the one that it has left.
                own_E = (cost_TE[token, m] - cost_TE[token]).masked_fill(has_TE[token], math.inf)
                token_EE[m] = torch.where(own_E < loss_EE[m], token, token_EE[m])
                loss_EE[m] = torch.minimum(own_E, loss_EE[m])
    chosen_TK = has_TE.nonzero()[:, 1].view(-1, experts_TK.shape[1]).to(device)
    if token_mask is None:
        return chosen_TK
    return experts_TK.masked_scatter(token_mask[:, None], chosen_TK)


def _cheapest_moves(cost_TE: Tensor, has_TE: Tensor, j: int) -> tuple[Tensor, Tensor]:
    """What it costs least to move a choice from expert j to each expert (E,), and by which token (E,)."""
    token_N = has_TE[:, j].nonzero().flatten()
    if len(token_N) == 0:
        return torch.full((cost_TE.shape[1],), math.inf, dtype=cost_TE.dtype), torch.zeros(cost_TE.shape[1]).long()
    loss_NE = cost_TE[token_N, j, None] - cost_TE[token_N]
    least_E, at_E = loss_NE.masked_fill(has_TE[token_N], math.inf).min(0)
    return least_E, token_N[at_E]


def _shortest_chain(loss_EE: Tensor, from_E: Tensor, to_E: Tensor, enough: float) -> list[tuple[int, int]]:
    """The moves (expert, next expert) of the shortest chain from `from_E` to `to_E`, last first; [] unless negative."""
    distance_E = torch.where(from_E, 0.0, math.inf).double()
    before_E = torch.full_like(distance_E, -1).long()
    for _ in range(len(distance_E)):  # Bellman–Ford
        shortest_E, by_E = (distance_E[:, None] + loss_EE).min(0)
        shorter_E = shortest_E < distance_E - enough
        if not shorter_E.any():
            break
        distance_E, before_E = torch.where(shorter_E, shortest_E, distance_E), torch.where(shorter_E, by_E, before_E)
    at = int(torch.where(to_E, distance_E, math.inf).argmin())
    if not (to_E[at] and distance_E[at] < -enough):
        return []
    chain: list[tuple[int, int]] = []
    while before_E[at] >= 0:
        chain.append((int(before_E[at]), at))
        at = int(before_E[at])
    return chain


define(
    "best_rounding(Tensor scores, Tensor experts, Tensor? token_mask) -> Tensor",
    lambda scores, experts, token_mask: _best_rounding(scores, experts, token_mask).clone(),  # no argument itself
    lambda scores, experts, token_mask: torch.empty_like(experts),
)
