"""Loads into their bounds by the cheapest chains of moves: the repair of `transport.balanced_topk`.

A chain j → l → m moves one token from expert j to l and another one from l to m. With the bias g and a level u_i of
every token, between what its last expert is worth and the best that it has not,

    min over its experts j of (C_ij + g_j)  ≥  u_i  ≥  max over all others l of (C_il + g_l),

taking expert j from token i costs C_ij + g_j − u_i, and giving it l costs u_i − C_il − g_l: neither is below 0. One
round of Dijkstra over experts and tokens gives every node its distance from the experts that have too much. Added to g
and u, up to where enough experts with room are reached, the distances keep both inequalities and make the shortest
paths cost nothing; as many of these as do not get into each other's way are taken (a blocking flow; of equally short
paths those of fewest moves first). This is the primal-dual method for minimum-cost flows (Ahuja, Magnanti & Orlin,
*Network Flows*, section 9.8): every assignment on the way is the best there is for its loads, and when no path is left,
no assignment has loads inside the bounds. A round costs some sweeps over the rows that it reaches and takes many
chains; one chain at a time would need a shortest path for each.

Loads that may be rounded up or down are chosen in the same way: a chain from j to l changes the sum by what its moves
cost with prices, less g_j − g_l, and rounds go on as long as one raises it.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
from torch import Tensor

from sinkroute.kernels import native
from sinkroute.kernels.backend import c_for
from sinkroute.kernels.choose import Choice
from sinkroute.kernels.rows import Rows
from sinkroute.kernels.storage import address

__all__ = ["repair"]

ROUNDING = 1e-12  # of |C + g|: what is a tie
NUMBERS_TO_KEEP = 1 << 22  # of costs, without the kernels


def repair(rows: Rows, choice: Choice, lower_E: Tensor, upper_E: Tensor, *, rounds: bool = False) -> int:
    """Move loads above `upper` down, as far as possible, then those below `lower` up, as far as possible.

    Args:
        rows: logits on the CPU, cost and mask.
        choice: on the CPU; experts, loads and bias are changed in place, such that the new experts are among the k
            largest of C + bias, in ties with those that they took the place of. A load that stays above `upper`
            cannot get below. The rest is of no more use.
        lower_E, upper_E: (E,) int64, bounds of the loads.
        rounds: whether loads are to end as those within the bounds for which the sum is largest; the bounds of an
            expert are at most 1 apart then.

    Returns:
        How often a token changed its expert.
    """
    if (c := c_for(rows.logits_TE)) is None:
        return _Repair(rows, choice).run(lower_E.numpy(), upper_E.numpy(), rounds)
    described = native.Rows.of(rows)
    tokens, k = choice.experts_TK.shape
    if tokens * k + len(choice.loads_E) >= 1 << 31:  # the kernel numbers slots, and tokens after experts
        raise ValueError(
            f"{tokens} tokens with k={k} are about 2³¹ choices or more, too many to repair; route fewer at a time"
        )
    levels_T, costs_TK = np.empty(tokens), np.empty((tokens, k), np.float32)
    near_E = choice.near_E[choice.near_E.isfinite()]
    progress = native.Progress(room=float(near_E.median()) if len(near_E) else math.inf)
    state = 0
    while state == 0:  # step by step, so that an interrupt is served in between
        state = c.repair(
            described,
            k,
            address(lower_E),
            address(upper_E),
            *map(address, (choice.experts_TK, choice.loads_E, choice.bias_E)),
            levels_T.ctypes.data,
            costs_TK.ctypes.data,
            rounds,
            progress,
        )
    if state < 0:
        raise MemoryError(f"no memory for the lists of {choice.experts_TK.numel()} choices; route fewer at a time")
    return int(progress.moves)


class _Repair:
    """The reference, for logits of any dtype. A slot is a place of `experts_TK`, flattened."""

    def __init__(self, rows: Rows, choice: Choice) -> None:
        self.rows = rows
        self.experts_TK, self.loads_E = choice.experts_TK.numpy(), choice.loads_E.numpy()
        self.bias_E = choice.bias_E.numpy()
        self.tokens, self.k = self.experts_TK.shape
        mask = rows.token_mask
        self.real_N = np.arange(self.tokens) if mask is None else mask.numpy().nonzero()[0]
        self.cost_TK = np.empty(self.experts_TK.shape)
        self.level_T = np.full(self.tokens, math.inf)
        self.kept: dict[int, np.ndarray] = {}
        self.moves = 0

    def run(self, lower_E: np.ndarray, upper_E: np.ndarray, rounds: bool) -> int:
        """See `repair`."""
        for token in self.real_N:
            self.settle(int(token))
        for aim_E, sign in ((upper_E, 1), (lower_E, -1)):
            start_E = np.zeros_like(self.bias_E)
            while open_ := int((sign * (self.loads_E - aim_E)).clip(min=0).sum()):
                if self.take_chains(self.loads_E - aim_E, start_E, (open_ + 1) // 2) is None:
                    break
        while rounds and (lower_E <= self.loads_E).all() and (self.loads_E <= upper_E).all():
            spare_E = (self.loads_E - lower_E) - (upper_E - self.loads_E)  # 1, −1, or 0 where the bounds are the same
            if not (spare_E > 0).any():
                break
            most = self.bias_E[spare_E > 0].max()
            worth = most - ROUNDING * (1 + abs(most))
            if not self.take_chains(spare_E, most - self.bias_E, math.inf, worth):
                break
        return self.moves

    def take_chains(
        self, spare_E: np.ndarray, start_E: np.ndarray, wanted: float, worth: float = math.inf
    ) -> int | None:
        """One round: how many chains were taken; None where there is no way.

        Args:
            spare_E: (E,) choices that an expert can give, or, below 0, take.
            start_E: (E,) the distance at which those that give begin.
            wanted: choices up to whose place to go.
            worth: g and distance together are less than this for those that may take.
        """
        end = self.find_distances(spare_E, start_E, wanted, worth)
        if end is None:
            return None
        before = self.loads_E.copy()
        for source in (spare_E > 0).nonzero()[0]:
            while (
                spare_E[source] > 0
                and self.distance_E[source] == start_E[source]  # not from one that another reaches sooner
                and self.take_chain(int(source), spare_E, worth, end)
            ):
                continue
        self.bias_E += np.minimum(self.distance_E, end)
        self.level_T += np.minimum(self.reach_T, end)
        return int((self.loads_E - before).clip(min=0).sum())

    def row(self, token: int) -> np.ndarray:
        """The costs of a token, (E,) float64; some are kept."""
        if (row_E := self.kept.get(token)) is None:
            row_E = self.rows.cost_TE(slice(token, token + 1))[0].double().numpy()
            if len(self.kept) * len(row_E) < NUMBERS_TO_KEEP:
                self.kept[token] = row_E
        return row_E

    def settle(self, token: int) -> None:
        """Make the k largest of C + g, in float64, the token's choice, and find its level."""
        row_E, mine_K = self.row(token), self.experts_TK[token]
        value_E = row_E + self.bias_E
        others_E = value_E.copy()
        others_E[mine_K] = -math.inf
        while True:
            at, best = value_E[mine_K].argmin(), int(others_E.argmax())
            last, other = value_E[mine_K[at]], others_E[best]
            if not other - last > 2 * ROUNDING * abs(other):  # also where last is −inf, as float32 may make it
                break
            self.loads_E[mine_K[at]] -= 1
            self.loads_E[best] += 1
            others_E[mine_K[at]], others_E[best], mine_K[at] = last, -math.inf, best
        self.level_T[token], self.cost_TK[token] = min(other, last), row_E[mine_K]

    def taking(self, expert: int, slots_N: np.ndarray) -> np.ndarray:
        """What it costs to take the expert from these slots."""
        cost_N: np.ndarray = self.cost_TK.flat[slots_N] + self.bias_E[expert] - self.level_T[slots_N // self.k]
        return cost_N.clip(min=0)

    def giving_E(self, token: int) -> np.ndarray:
        """What it costs to give the token each expert; inf for those that it has or must not have."""
        cost_E: np.ndarray = (self.level_T[token] - (self.row(token) + self.bias_E)).clip(min=0)
        cost_E[self.experts_TK[token]] = math.inf
        return cost_E

    def find_distances(self, spare_E: np.ndarray, start_E: np.ndarray, wanted: float, worth: float) -> float | None:
        """Distances from the experts that give, up to where experts can take `wanted` choices; see `take_chains`.

        Returns that distance, or that of the last which can be reached; None where there is none.
        """
        experts = len(self.loads_E)
        real_slots_N = (self.real_N[:, None] * self.k + np.arange(self.k)).ravel()
        order_N = np.argsort(self.experts_TK.flat[real_slots_N], kind="stable")
        bounds = np.concatenate([[0], np.bincount(self.experts_TK.flat[real_slots_N], minlength=experts).cumsum()])
        self.slots = [real_slots_N[order_N[bounds[j] : bounds[j + 1]]] for j in range(experts)]
        self.distance_E, self.hops_E = np.full(experts, math.inf), np.zeros(experts, np.int64)
        self.reach_T, self.hops_T = np.full(self.tokens, math.inf), np.zeros(self.tokens, np.int64)
        self.seen_T, self.dead_E = np.zeros(self.tokens, np.bool_), np.zeros(experts, np.bool_)
        self.at_E, self.to_T = np.zeros(experts, np.int64), np.zeros(self.tokens, np.int64)
        sources_N = (spare_E > 0).nonzero()[0]
        self.distance_E[sources_N] = start_E[sources_N]
        heap = [(float(start_E[source]), 0, int(source)) for source in sources_N]
        heapq.heapify(heap)
        done_E, end, last, places = np.zeros(experts, np.bool_), math.inf, None, 0
        while heap:
            distance, hops, node = heapq.heappop(heap)
            if distance > end:
                break
            if node < experts:
                if done_E[node] or (distance, hops) != (self.distance_E[node], self.hops_E[node]):
                    continue
                done_E[node] = True
                if spare_E[node] < 0 and distance + self.bias_E[node] < worth:
                    last, places = distance, places - int(spare_E[node])
                    end = distance if places >= wanted else end
                to_N = self.slots[node] // self.k
                new_N, best, fewest = distance + self.taking(node, self.slots[node]), self.reach_T, self.hops_T
                first = experts
            else:
                token = node - experts
                if self.seen_T[token] or (distance, hops) != (self.reach_T[token], self.hops_T[token]):
                    continue
                self.seen_T[token] = True
                to_N, new_N, first = np.arange(experts), distance + self.giving_E(token), 0
                best, fewest = self.distance_E, self.hops_E
            shorter_N = (new_N < best[to_N]) | ((new_N == best[to_N]) & (hops + 1 < fewest[to_N]))
            shorter_N &= (new_N <= end) & (new_N < math.inf)
            if first:
                shorter_N &= ~self.seen_T[to_N]
            for to, new in zip(to_N[shorter_N].tolist(), new_N[shorter_N].tolist(), strict=True):
                best[to], fewest[to] = new, hops + 1
                heapq.heappush(heap, (new, hops + 1, first + to))
        return last

    def take_chain(self, source: int, spare_E: np.ndarray, worth: float, end: float) -> bool:
        """Move tokens along a shortest path from `source` to an expert that can take one; False if none is left."""
        chain: list[tuple[int, int]] = []
        expert = source
        while True:
            found = self.way_on(expert, end)
            if found is None:
                self.dead_E[expert] = True
                if not chain:
                    return False
                slot, _ = chain.pop()
                expert = int(self.experts_TK.flat[slot])
                self.to_T[slot // self.k] += 1
                continue
            chain.append(found)
            expert = found[1]
            if spare_E[expert] < 0 and self.distance_E[expert] + self.bias_E[expert] < worth:
                break
        for counts_E in (self.loads_E, spare_E):
            counts_E[source] -= 1
            counts_E[expert] += 1
        self.moves += len(chain)
        for slot, to in chain:
            self.at_E[self.experts_TK.flat[slot]] += 1
            self.experts_TK.flat[slot], self.cost_TK.flat[slot] = to, self.row(slot // self.k)[to]
        return True

    def way_on(self, expert: int, end: float) -> tuple[int, int] | None:
        """The next slot of the expert on a shortest path, and the expert that its token could be given."""
        slots_N = self.slots[expert]
        for at in range(self.at_E[expert], len(slots_N)):
            self.at_E[expert] = at
            slot = int(slots_N[at])
            token = slot // self.k
            if not self.seen_T[token] or self.hops_T[token] != self.hops_E[expert] + 1:
                continue
            if self.reach_T[token] != self.distance_E[expert] + self.taking(expert, slots_N[at : at + 1])[0]:
                continue
            on_path_E = (self.reach_T[token] + self.giving_E(token) == self.distance_E) & (self.distance_E <= end)
            on_path_E &= ~self.dead_E & (self.hops_E == self.hops_T[token] + 1)
            on_path_E[: self.to_T[token]] = False
            if on_path_E.any():
                to = self.to_T[token] = int(on_path_E.argmax())
                return slot, to
            self.to_T[token] = len(on_path_E)
        self.at_E[expert] = len(slots_N)
        return None
