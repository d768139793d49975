"""What the top-k of C + g gives to every expert: the pass of `transport.balanced_topk`."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sinkroute.kernels import native
from sinkroute.kernels.backend import c_for, threads_for
from sinkroute.kernels.rows import Rows
from sinkroute.kernels.storage import address
from sinkroute.kernels.topk import largest

__all__ = ["NEAREST", "Choice", "choose", "choose_with_edges"]

NEAREST = 16  # distances that are kept for every expert, also in choice.c


class Choice(NamedTuple):
    """The top-k of C + g, on the device of the logits.

    Attributes:
        bias_E: (E,) float64, g.
        experts_TK: (T, K) int64, descending, of equal values the lower expert first; 0 to K − 1 for masked rows.
        loads_E: (E,) int64, how many real tokens have each expert.
        step_E: (E,) float64, what added to an expert's g would give it its target, if the others stayed as they are.
            Where that takes more than 16 tokens it is in proportion; 0 where nothing is known.
        near_E: (E,) of the working dtype, how far the 16th nearest token is from coming to the expert, or leaving it
            where it has too many; inf where there are fewer.
    """

    bias_E: Tensor
    experts_TK: Tensor
    loads_E: Tensor
    step_E: Tensor
    near_E: Tensor


def choose(rows: Rows, k: int, bias_E: Tensor, target_E: Tensor, limit_E: Tensor | None = None) -> Choice:
    """Choose for every real token the k largest of C + bias, rounded to the working dtype, without a T × E matrix.

    Every real token must have k experts above −inf.

    Args:
        rows: logits, cost and mask.
        k: experts per token.
        bias_E: (E,) float64.
        target_E: (E,) float64, the loads to be reached.
        limit_E: (E,) distances beyond which the nearest tokens need not be known, to save time; None for all.

    Example:
        >>> import torch
        >>> rows = Rows(torch.tensor([[3.0, 1.0], [3.0, 0.0], [2.0, 1.0]]))
        >>> choice = choose(rows, 1, torch.tensor([0.0, 1.5]), torch.tensor([1.0, 2.0]))
        >>> choice.experts_TK.flatten().tolist(), choice.loads_E.tolist(), choice.step_E.tolist()
        ([0, 0, 1], [2, 1], [-1.0, 1.0])
    """
    return choose_with_edges(rows, k, bias_E, target_E, limit_E)[0]


def choose_with_edges(
    rows: Rows, k: int, bias_E: Tensor, target_E: Tensor, limit_E: Tensor | None = None
) -> tuple[Choice, Tensor]:
    """`choose`, and what it knows of both sides of every expert's edge.

    Returns:
        The choice, and (2, NEAREST, E) of the working dtype, ascending: how far the nearest tokens are from leaving an
        expert, and from coming to it. Where there are fewer, inf or what `limit_E` says.
    """
    if (c := c_for(rows.logits_TE)) is not None:
        return _choose_in_c(c, rows, k, bias_E, target_E, limit_E)
    device, dtype, (tokens, experts) = rows.logits_TE.device, rows.dtype, rows.logits_TE.shape
    narrow_E = bias_E.to(dtype)
    experts_TK = torch.empty(tokens, k, dtype=torch.int64, device=device)
    loads_E = torch.zeros(experts, dtype=torch.int64, device=device)
    # For every expert the tokens nearest to leaving it, and those nearest to coming.
    sides_2NE = torch.full((2, NEAREST, experts), math.inf, dtype=dtype, device=device)
    for part in rows.parts():
        shifted_RE = rows.cost_TE(part) + narrow_E
        top_RK, chosen_RK = largest(shifted_RE, min(k + 1, experts))
        experts_TK[part] = chosen_RK[:, :k]
        if rows.token_mask is not None:
            mask_R = rows.token_mask[part]
            experts_TK[part][~mask_R] = torch.arange(k, device=device)
            shifted_RE, top_RK, chosen_RK = shifted_RE[mask_R], top_RK[mask_R], chosen_RK[mask_R]
        loads_E += chosen_RK[:, :k].reshape(-1).bincount(minlength=experts)
        if k < experts:
            leave_RE = torch.full_like(shifted_RE, math.inf)
            leave_RE.scatter_(1, chosen_RK[:, :k], top_RK[:, :k] - top_RK[:, k:])
            come_RE = (top_RK[:, k - 1, None] - shifted_RE).scatter_(1, chosen_RK[:, :k], math.inf)
            for side_NE, distance_RE in zip(sides_2NE, (leave_RE, come_RE), strict=True):
                both_ER = torch.cat([side_NE, distance_RE]).T.contiguous()
                side_NE[:] = both_ER.topk(NEAREST, dim=1, largest=False, sorted=True).values.T
    surplus_E = loads_E - target_E.round().long()
    nearest_NE = torch.where(surplus_E > 0, sides_2NE[0], sides_2NE[1]).double()
    wanted_E = surplus_E.abs()
    at_1E = wanted_E.clamp(1, NEAREST - 1)[None]
    between_E = 0.5 * (nearest_NE.gather(0, at_1E - 1) + nearest_NE.gather(0, at_1E))[0]
    step_E = torch.where(wanted_E < NEAREST, between_E, nearest_NE[-1] * (wanted_E / NEAREST))
    step_E = torch.where((wanted_E > 0) & step_E.isfinite(), -step_E * surplus_E.sign(), 0)
    return Choice(bias_E, experts_TK, loads_E, step_E, nearest_NE[-1].to(dtype)), sides_2NE


def _choose_in_c(
    c: ctypes.CDLL, rows: Rows, k: int, bias_E: Tensor, target_E: Tensor, limit_E: Tensor | None
) -> tuple[Choice, Tensor]:
    tokens, experts = rows.logits_TE.shape
    # Names for what an address is taken of, so that it lives as long as the call.
    narrow_E, wide_E = bias_E.to(rows.dtype), target_E.double().contiguous()
    limit_E = None if limit_E is None else limit_E.float()
    experts_TK = torch.empty(tokens, k, dtype=torch.int64, device="cpu")
    loads_E = torch.zeros(experts, dtype=torch.int64, device="cpu")
    step_E = torch.empty(experts, dtype=torch.float64, device="cpu")
    near_E = torch.empty(experts, dtype=torch.float32, device="cpu")
    threads = threads_for(rows.logits_TE)
    workspace = np.empty((1 + threads) * 2 * experts * NEAREST, np.float32)
    c.choose(
        native.Rows.of(rows),
        address(narrow_E),
        k,
        address(wide_E),
        address(limit_E),
        *map(address, (experts_TK, loads_E, step_E, near_E)),
        workspace.ctypes.data,
        threads,
    )
    # The kernel merges what its threads found into the first of their places.
    sides_2EN = torch.from_numpy(workspace[: 2 * experts * NEAREST]).view(2, experts, NEAREST)
    return Choice(bias_E, experts_TK, loads_E, step_E, near_E), sides_2EN.transpose(1, 2)
