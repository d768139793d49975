"""Loads into their bounds by the cheapest chains of moves: the repair of `balanced_topk`.

A chain j → l → m moves one token from expert j to l and another one from l to m. With length

    loss_jl = min over the tokens of j that may move to l of (C_ij − C_il),        loss_jl + g_j − g_l ≥ 0,

the cheapest way to change the loads by one unit is a shortest path between experts (successive shortest paths; the
bias g serves as the prices that keep every length non-negative). Every assignment on the way is the best there is for
its loads, and when no path is left, no assignment has loads inside the bounds.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

from sinkroute._values import address
from sinkroute.transport import native
from sinkroute.transport.choice import Choice
from sinkroute.transport.passes.compiled import served_by_kernels
from sinkroute.transport.problem import COSTS, Problem

__all__ = ["repair"]


def repair(problem: Problem, choice: Choice, lower_E: Tensor, upper_E: Tensor) -> int:
    """Move loads above `upper` down, as far as possible, then those below `lower` up, as far as possible.

    Args:
        problem: scores on the CPU, cost and mask.
        choice: on the CPU; experts, loads and bias are changed in place, such that the new experts are among the k
            largest of C + bias, in ties with those that they took the place of. A load that stays above `upper`
            cannot get below. The rest is of no more use.
        lower_E, upper_E: (E,) int64, bounds of the loads.

    Returns:
        How often a token changed its expert.
    """
    if not served_by_kernels(problem.scores_TE):
        return _Repair(problem, choice).run(lower_E.numpy(), upper_E.numpy())
    kernels = native.load()
    assert kernels is not None
    described = native.Scores.of(problem.scores_TE, problem.cost == "softmax", problem.token_mask)
    tensors = lower_E, upper_E, choice.experts_TK, choice.margin_TK, choice.loads_E, choice.bias_E
    kernels.repair.restype = ctypes.c_int64
    moves: int = kernels.repair(
        ctypes.byref(described),
        ctypes.c_int64(choice.experts_TK.shape[1]),
        *(ctypes.c_void_p(address(x)) for x in tensors),
    )
    if moves < 0:
        raise MemoryError(f"no memory for the lists of {choice.experts_TK.numel()} choices; route fewer at a time")
    return moves


class _Repair:
    """The same without the kernels.

    `loss_EE[j, i]` is the length of j → i before prices, `token_EE` whose it is, `many_EE` whether others have it too.
    """

    def __init__(self, problem: Problem, choice: Choice) -> None:
        self.problem = problem
        self.experts_TK, self.loads_E = choice.experts_TK.numpy(), choice.loads_E.numpy()
        self.bias_E = choice.bias_E.numpy()
        experts = len(self.loads_E)
        self.loss_EE = np.full((experts, experts), math.inf)
        self.token_EE = np.zeros((experts, experts), dtype=np.int64)
        self.many_EE = np.zeros((experts, experts), dtype=np.bool_)
        self.stale_E = np.ones(experts, dtype=np.bool_)  # rows of these three that must be looked up anew
        mask = problem.token_mask
        self.real_T1 = np.ones((len(self.experts_TK), 1), np.bool_) if mask is None else mask.numpy()[:, None]

    def run(self, lower_E: np.ndarray, upper_E: np.ndarray) -> int:
        """See `repair`."""
        moves = 0
        for aim_E, is_open in ((upper_E, np.greater), (lower_E, np.less)):
            while is_open(self.loads_E, aim_E).any():
                chain = self.cheapest_chain(self.loads_E > aim_E, self.loads_E < aim_E)
                if not chain:
                    break
                start, end = chain[-1][0], chain[0][1]
                units = min(aim_E[end] - self.loads_E[end], self.loads_E[start] - aim_E[start])
                # Equal losses move together: with many equal tokens one at a time would take for ever.
                tied = [self.tied(*arc, units) for arc in chain]
                units = min(map(len, tied))
                for arc, tokens_N in zip(chain, tied, strict=True):
                    self.move(tokens_N[:units], *arc)
                moves += units * len(chain)
                self.loads_E[start] -= units
                self.loads_E[end] += units
        return moves

    def cheapest_chain(self, from_E: np.ndarray, to_E: np.ndarray) -> list[tuple[int, int]]:
        """The moves (expert, next expert) of the cheapest chain from one of `from_E` to one of `to_E`, last first.

        Empty where there is none. The bias becomes the prices for which all its moves have length 0.
        """
        for j in self.stale_E.nonzero()[0]:
            self.look_up(int(j))
        with np.errstate(invalid="ignore"):  # −inf − −inf: between two experts without mass
            length_EE = self.loss_EE + (self.bias_E[:, None] - self.bias_E)
        length_EE = np.where(np.isnan(length_EE), math.inf, length_EE).clip(min=0)
        distance_E = np.where(from_E, 0, math.inf)
        before_E = np.full(len(distance_E), -1)
        while True:  # Bellman–Ford: as many rounds as the longest of the cheapest chains has moves
            through_EE = distance_E[:, None] + length_EE
            shortest_E = through_EE.min(axis=0)
            shorter_E = shortest_E < distance_E
            if not shorter_E.any():
                break
            before_E = np.where(shorter_E, through_EE.argmin(axis=0), before_E)
            distance_E = np.where(shorter_E, shortest_E, distance_E)
        at = int(np.where(to_E, distance_E, math.inf).argmin())
        if not to_E[at] or distance_E[at] == math.inf:
            return []
        self.bias_E += np.minimum(distance_E, distance_E[at])
        chain = []
        while before_E[at] >= 0:
            chain.append((int(before_E[at]), at))
            at = int(before_E[at])
        return chain

    def losses(self, tokens_N: np.ndarray, j: int) -> np.ndarray:
        """C_nj − C_ni of tokens of j for every expert i, (N, E); inf where they have i or must not."""
        scores_NE = self.problem.scores_TE[torch.from_numpy(tokens_N)].to(self.problem.dtype)
        costs_NE = COSTS[self.problem.cost](scores_NE).numpy()
        losses_NE = costs_NE[:, j, None] - costs_NE
        np.put_along_axis(losses_NE, self.experts_TK[tokens_N], math.inf, axis=1)
        return losses_NE

    def tokens_of(self, j: int) -> np.ndarray:
        """The real tokens that have expert j."""
        return ((self.experts_TK == j) & self.real_T1).any(axis=1).nonzero()[0]

    def look_up(self, j: int) -> None:
        """Fill the row of expert j."""
        tokens_N = self.tokens_of(j)
        self.loss_EE[j], self.stale_E[j] = math.inf, False
        if len(tokens_N):
            losses_NE = self.losses(tokens_N, j)
            self.loss_EE[j], self.token_EE[j] = losses_NE.min(axis=0), tokens_N[losses_NE.argmin(axis=0)]
            self.many_EE[j] = (losses_NE == self.loss_EE[j]).sum(axis=0) > 1

    def tied(self, j: int, i: int, wanted: int) -> np.ndarray:
        """Up to `wanted` tokens of j that lose least when they move to i, and all the same."""
        if wanted == 1 or not self.many_EE[j, i]:
            return self.token_EE[j, i : i + 1]
        tokens_N = self.tokens_of(j)
        return tokens_N[self.losses(tokens_N, j)[:, i] == self.loss_EE[j, i]][:wanted]

    def move(self, tokens_N: np.ndarray, j: int, i: int) -> None:
        """Move tokens from j to i."""
        for token in tokens_N:
            self.experts_TK[token, self.experts_TK[token] == j] = i
        self.stale_E[j] = True
        for m in np.unique(self.experts_TK[tokens_N]):
            if m != i and np.isin(self.token_EE[m, i], tokens_N):
                self.stale_E[m] = True
            if self.stale_E[m]:
                continue
            # Those of m can move to j again, those of i to all others.
            having_N = tokens_N[(self.experts_TK[tokens_N] == m).any(axis=1)]
            losses_NE = self.losses(having_N, int(m))
            least_E = losses_NE.min(axis=0)
            better_E = least_E < self.loss_EE[m]
            self.many_EE[m] |= least_E <= self.loss_EE[m]
            self.loss_EE[m] = np.where(better_E, least_E, self.loss_EE[m])
            self.token_EE[m] = np.where(better_E, having_N[losses_NE.argmin(axis=0)], self.token_EE[m])
