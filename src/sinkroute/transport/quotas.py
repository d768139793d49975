"""What each rank is to do so that the loads of all come within their bounds: whole numbers only, the same on all ranks.

Rank r has T_r tokens and made L_rj choices of expert j. Wanted are numbers near L that it can reach without the others,

    0 ≤ q_rj ≤ T_r,    Σ_j q_rj = k T_r,    lower_j ≤ Σ_r q_rj ≤ upper_j,

and any q with the first two is the loads of some choice of k distinct experts for each of its tokens. A choice too many
at one expert goes to one with room along a path j → r → l: in rank r a token changes from j to l. Where no rank can do
that alone, several can, each with a part of a longer path. Such flows exist whenever Σ_j lower_j ≤ k T ≤ Σ_j upper_j
and no upper_j is above T, as q_rj = T_r t_j / T shows for t between the bounds. What room is left in the bounds then is
shared by tokens, so that a rank moves no token for which there is no need.
"""

from __future__ import annotations

import numpy as np

__all__ = ["quotas"]


def quotas(
    loads_RE: np.ndarray, tokens_R: np.ndarray, lower_E: np.ndarray, upper_E: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds for the loads of each rank, which it can keep, and which keep those of all within `lower` and `upper`.

    Args:
        loads_RE: (R, E) int64, how many choices of each expert each rank has made; no more than its tokens.
        tokens_R: (R,) int64.
        lower_E, upper_E: (E,) int64; there are loads between them whose sum is that of `loads_RE`.

    Returns:
        (R, E) int64 twice, the lower and the upper bounds.

    >>> lower_RE, upper_RE = quotas(np.array([[4, 0], [3, 1]]), np.array([4, 4]), np.array([4, 4]), np.array([4, 4]))
    >>> lower_RE.tolist(), upper_RE.tolist()
    ([[2, 2], [2, 2]], [[2, 2], [2, 2]])
    """
    upper_E = np.minimum(upper_E, tokens_R.sum())
    aim_E = _aims(loads_RE.sum(0), lower_E, upper_E)
    near_RE = _moved(loads_RE, tokens_R, aim_E)
    tokens_RE = np.broadcast_to(tokens_R[:, None], loads_RE.shape)
    below_RE, above_RE = _shares(tokens_RE, aim_E - lower_E), _shares(tokens_RE, upper_E - aim_E)
    return np.maximum(near_RE - below_RE, 0), np.minimum(near_RE + above_RE, tokens_RE)


def _aims(loads_E: np.ndarray, lower_E: np.ndarray, upper_E: np.ndarray) -> np.ndarray:
    """The loads brought within their bounds, and where that changes their sum, further ones with room."""
    aim_E = loads_E.clip(lower_E, upper_E)
    missing = int(loads_E.sum() - aim_E.sum())
    room_E = upper_E - aim_E if missing > 0 else aim_E - lower_E
    aim_E += np.sign(missing) * _shares(room_E[:, None], np.array([abs(missing)]))[:, 0]
    return aim_E


def _shares(weights_NM: np.ndarray, whole_M: np.ndarray) -> np.ndarray:
    """Whole numbers (N, M) in proportion to the weights of each column, with sums `whole_M`.

    No share is above its weight where the whole is not above their sum.
    """
    ends_NM = weights_NM.cumsum(0)
    if int(ends_NM.max(initial=0)) * int(whole_M.max(initial=0)) >= 2**46:
        ends_NM = ends_NM.astype(object)  # integers of any length
    sums_M = np.maximum(ends_NM[-1], 1)
    # Rounded up from another fraction in each column, or what is left over would always go to the same row.
    above_M = np.arange(1, len(whole_M) + 1) * 40503 % 65536 * sums_M // 65536
    ends_NM = ((ends_NM * whole_M + above_M) // sums_M).astype(np.int64)
    shares_NM: np.ndarray = np.diff(ends_NM, axis=0, prepend=0)
    return shares_NM


def _moved(loads_RE: np.ndarray, tokens_R: np.ndarray, aim_E: np.ndarray) -> np.ndarray:
    """Loads of the ranks with the sums `aim_E`, near those that they have."""
    now_RE: np.ndarray = loads_RE.copy()
    surplus_E = now_RE.sum(0) - aim_E
    # At first each expert with too many gives them up in proportion to the loads, and those that a rank gives up so
    # go where they are missing, in proportion to that.
    gives_RE = _shares(now_RE, surplus_E.clip(min=0))
    missing_E = (-surplus_E).clip(min=0)
    for rank, given_E in enumerate(gives_RE):
        room_E = np.minimum(tokens_R[rank] - now_RE[rank], missing_E)
        wanted = int(given_E.sum())
        if wanted > room_E.sum():
            continue
        taken_E = _shares(room_E[:, None], np.array([wanted]))[:, 0]
        now_RE[rank] += taken_E - given_E
        missing_E -= taken_E
    while _one_path(now_RE, tokens_R, now_RE.sum(0) - aim_E):
        pass
    return now_RE


def _one_path(now_RE: np.ndarray, tokens_R: np.ndarray, surplus_E: np.ndarray) -> bool:
    """Move choices along one of the shortest paths from an expert with too many to one with too few, if there is one.

    Breadth first, over experts and ranks in turns.
    """
    if not (surplus_E > 0).any():
        return False
    ranks, experts = now_RE.shape
    from_R, from_E = np.full(ranks, -1), np.full(experts, -1)  # the expert, or the rank, before on the path
    seen_R, seen_E = np.zeros(ranks, bool), surplus_E > 0
    front_N = seen_E.nonzero()[0]
    while True:
        gives_RN = (now_RE[:, front_N] > 0) & ~seen_R[:, None]
        new_N = gives_RN.any(1).nonzero()[0]
        from_R[new_N] = front_N[gives_RN[new_N].argmax(1)]
        seen_R[new_N] = True
        takes_NE = (now_RE[new_N] < tokens_R[new_N, None]) & ~seen_E
        front_N = takes_NE.any(0).nonzero()[0]
        if not len(front_N):
            return False
        from_E[front_N] = new_N[takes_NE[:, front_N].argmax(0)]
        seen_E[front_N] = True
        ends_N = front_N[surplus_E[front_N] < 0]
        if len(ends_N):
            break
    expert, path, count = int(ends_N[0]), [], int(-surplus_E[ends_N[0]])
    while from_E[expert] >= 0:
        rank, to = int(from_E[expert]), expert
        expert = int(from_R[rank])
        path.append((rank, expert, to))
        count = min(count, int(now_RE[rank, expert]), int(tokens_R[rank] - now_RE[rank, to]))
    count = min(count, int(surplus_E[expert]))
    for rank, expert, to in path:
        now_RE[rank, expert] -= count
        now_RE[rank, to] += count
    return True
