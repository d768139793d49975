"""A top-k and who is at its edge: the tokens whose k-th and (k + 1)-th values are close, and the experts they are of.

How dense tokens are at the edge of an expert says how far its bias must move for its load to change by one. On a CPU
one sweep over the values chooses, with the bias added on the way (native/noisy_topk.c), and a second one, over a number
for each token, finds the width and counts (native/edge.c): neither a T × E matrix nor a sort. Elsewhere torch does it
without waiting for a device.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sinkroute.kernels.backend import c_for, c_on, threads_for
from sinkroute.kernels.operations import define
from sinkroute.kernels.storage import address, readable
from sinkroute.kernels.topk import topk

__all__ = ["LEAST_WIDTH", "Edge", "edge_topk"]

LEAST_WIDTH = 1e-6


class Edge(NamedTuple):
    """What `edge_topk` returns, all without gradient.

    Attributes:
        experts_TK: (T, K) int64, as `topk` gives them.
        count_E: (E,) float64, how many tokens with a margin below `width` have each expert as their k-th or (k + 1)-th.
        width: (1,) float64, the margin below which a share of the real tokens lies, 1e-6 at least; 1 where that is
            infinite.
    """

    experts_TK: Tensor
    count_E: Tensor
    width: Tensor


def edge_topk(
    values_TE: Tensor,
    bias_E: Tensor | None,
    k: int,
    share: float,
    ties: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Edge:
    """The top-k of values + bias, and which experts the tokens with the least margins are about.

    A token's margin is its k-th value less its (k + 1)-th, in float64; that of padding is infinite. The width is the
    margin that stands, of all in ascending order, at the place share · (real tokens), rounded down, from 0.

    Args:
        values_TE: (T, E) float32 or float64 without NaN, T of 1 or more.
        bias_E: (E,), added in the dtype of the values; None: nothing.
        k: 1 to E − 1.
        share: 0 to 1.
        ties: see `topk`.
        token_mask: (T,) bool, True for real tokens. Padding gets experts as well.

    >>> values_TE = torch.tensor([[3.0, 0.0, -1.0], [2.0, 1.5, -1.0], [0.0, 0.0, 2.0], [0.0, 2.0, 1.0]])
    >>> edge = edge_topk(values_TE, None, 1, 0.5)  # the margins are 3, 0.5, 2 and 1
    >>> edge.experts_TK.flatten().tolist(), edge.width.tolist(), edge.count_E.tolist()
    ([0, 0, 2, 1], [2.0], [1.0, 2.0, 1.0])
    """
    values_TE = values_TE.detach()
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and values_TE.device.type == "cpu":
        return Edge(*torch.ops.sinkroute.edge_topk(values_TE, bias_E, k, share, ties, token_mask))
    return Edge(*_edge_topk(values_TE, bias_E, k, share, ties, token_mask))


def _edge_topk(
    values_TE: Tensor, bias_E: Tensor | None, k: int, share: float, ties: Tensor | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    bias_E = None if bias_E is None else bias_E.detach().to(values_TE.dtype)
    here = values_TE.device.type == "cpu" and readable(values_TE, bias_E, ties, token_mask)
    if here and ties is None and values_TE.dtype == torch.float32:
        values_TE = values_TE if values_TE.stride(1) == 1 else values_TE.contiguous()
        if (c := c_for(values_TE)) is not None:
            return _counted_in_c(c, *_chosen_in_c(c, values_TE, bias_E, k), token_mask, share, values_TE.shape[1])
    if bias_E is not None:
        values_TE = values_TE + bias_E
    best_TK = topk(values_TE, k + 1, ties)
    experts_TK, edge_T2 = best_TK[:, :k].contiguous(), best_TK[:, k - 1 :]
    kept_T, next_T = values_TE.gather(1, edge_T2).double().unbind(1)
    margin_T = kept_T - next_T
    if here and (c := c_on(values_TE.device)) is not None:
        margin_T = margin_T.nan_to_num_(nan=math.inf, posinf=math.inf)  # −∞ less −∞
        return _counted_in_c(c, experts_TK, best_TK[:, k].int(), margin_T, token_mask, share, values_TE.shape[1])
    return experts_TK, *_counted(edge_T2, margin_T, token_mask, share, values_TE.shape[1])


def _counted(
    edge_T2: Tensor, margin_T: Tensor, token_mask: Tensor | None, share: float, experts: int
) -> tuple[Tensor, Tensor]:
    """Counts and width by torch, on any device."""
    tokens = torch.full((1,), len(margin_T), dtype=torch.float64, device=margin_T.device)
    if token_mask is not None:
        tokens = token_mask.sum().double().view(1)
        margin_T = margin_T.masked_fill(~token_mask, math.inf)
    at = (share * tokens).long().clamp(max=len(margin_T) - 1)
    width = margin_T.sort().values[at].clamp(min=LEAST_WIDTH)
    width = torch.where(width.isfinite(), width, 1.0)  # no real token here, or none that has a choice
    near_T2 = (margin_T < width)[:, None].expand_as(edge_T2)
    count_E = torch.zeros(experts, dtype=torch.float64, device=margin_T.device)
    return count_E.scatter_add(0, edge_T2.flatten(), near_T2.flatten().double()), width


def _chosen_in_c(c: ctypes.CDLL, values_TE: Tensor, bias_E: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen (T, K), the (k + 1)-th of each token (T,) int32, and the margins (T,) float64."""
    tokens, experts = values_TE.shape
    experts_TK = torch.empty(tokens, k, dtype=torch.int64, device="cpu")
    next_T = torch.empty(tokens, dtype=torch.int32, device="cpu")
    margin_T = torch.empty(tokens, dtype=torch.float64, device="cpu")
    bias_E = None if bias_E is None else bias_E.contiguous()
    c.edge_topk(
        address(values_TE),
        tokens,
        experts,
        values_TE.stride(0),
        address(bias_E),
        k,
        *map(address, (experts_TK, next_T, margin_T)),
        threads_for(values_TE),
    )
    return experts_TK, next_T, margin_T


def _counted_in_c(
    c: ctypes.CDLL,
    experts_TK: Tensor,
    next_T: Tensor,
    margin_T: Tensor,
    token_mask: Tensor | None,
    share: float,
    experts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, k = experts_TK.shape
    real = tokens
    if token_mask is not None:
        real = int(token_mask.sum())
        margin_T.masked_fill_(~token_mask, math.inf)
    count_E = torch.zeros(experts, dtype=torch.float64, device="cpu")
    room_T = torch.empty_like(margin_T)
    width = c.edge(
        *map(address, (margin_T, experts_TK, next_T)),
        tokens,
        k,
        min(int(share * real), tokens - 1),
        LEAST_WIDTH,
        address(room_T),
        address(count_E),
    )
    return experts_TK, count_E, torch.tensor([width], dtype=torch.float64, device="cpu")


def _shape(values_TE: Tensor, bias_E: Tensor | None, k: int, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    wide_E = values_TE.new_empty(values_TE.shape[1], dtype=torch.float64)
    experts_TK = values_TE.new_empty(values_TE.shape[0], k, dtype=torch.int64)
    return experts_TK, wide_E, values_TE.new_empty(1, dtype=torch.float64)


define(
    "edge_topk(Tensor values, Tensor? bias, SymInt k, float share, Tensor? ties, Tensor? token_mask) "
    "-> (Tensor, Tensor, Tensor)",
    _edge_topk,
    _shape,
)
