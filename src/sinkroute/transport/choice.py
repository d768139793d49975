"""What the top-k of C + g gives to every expert: the pass of `balanced_topk`."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sinkroute._values import address
from sinkroute.transport import native
from sinkroute.transport.largest import largest
from sinkroute.transport.passes.chunked import chunks
from sinkroute.transport.passes.compiled import served_by_kernels, threads_for
from sinkroute.transport.problem import Problem, cost_matrix

__all__ = ["Choice", "choose"]


class Choice(NamedTuple):
    """The top-k of C + g, on the device of the scores.

    Attributes:
        bias_E: (E,) float64, g.
        experts_TK: (T, K) int64, descending, of equal ones the lower first; masked rows have experts 0 to K − 1.
        margin_TK: (T, K) of the working dtype, how far each is ahead of the best that is not chosen.
        loads_E: (E,) int64, how many real tokens have each expert.
        nearness_E: (E,) of the working dtype, the geometric mean of the margin of the K-th, over the tokens for which
            the expert is the K-th or the next, and not tied; 0 where there are none.
    """

    bias_E: Tensor
    experts_TK: Tensor
    margin_TK: Tensor
    loads_E: Tensor
    nearness_E: Tensor


def choose(problem: Problem, k: int, bias_E: Tensor) -> Choice:
    """Choose for every real token the k largest of C + bias, rounded to the working dtype, without a T × E matrix.

    Every real token must have k experts above −inf.

    Example:
        >>> import torch
        >>> from sinkroute.transport.problem import make_problem
        >>> scores_TE = torch.tensor([[3.0, 1.0], [3.0, 0.0], [2.0, 1.0]])
        >>> problem = make_problem(scores_TE, 1.0, "linear", None, None, None, None)
        >>> choice = choose(problem, 1, torch.tensor([0.0, 1.5]))
        >>> choice.experts_TK.flatten().tolist(), choice.margin_TK.flatten().tolist(), choice.loads_E.tolist()
        ([0, 0, 1], [0.5, 1.5, 0.5], [2, 1])
    """
    scores_TE, dtype = problem.scores_TE, problem.dtype
    tokens, experts = scores_TE.shape
    narrow_E = bias_E.to(dtype)
    experts_TK = torch.empty(tokens, k, dtype=torch.int64, device=scores_TE.device)
    margin_TK = torch.empty(tokens, k, dtype=dtype, device=scores_TE.device)
    loads_E = torch.zeros(experts, dtype=torch.int64, device=scores_TE.device)
    logs_E, seen_E = torch.zeros(2, experts, dtype=dtype, device=scores_TE.device)
    if served_by_kernels(scores_TE):
        kernels = native.load()
        assert kernels is not None
        described = native.Scores.of(scores_TE, problem.cost == "softmax", problem.token_mask)
        nearness_E = torch.empty(experts, dtype=torch.float32, device="cpu")
        out = (ctypes.c_void_p(address(x)) for x in (experts_TK, margin_TK, loads_E, nearness_E))
        kernels.choose(
            ctypes.byref(described),
            ctypes.c_void_p(address(narrow_E)),
            ctypes.c_int64(k),
            *out,
            ctypes.c_int64(threads_for(scores_TE)),
        )
        return Choice(bias_E, experts_TK, margin_TK, loads_E, nearness_E)
    for rows in chunks(tokens, experts):
        mask_R = None if problem.token_mask is None else problem.token_mask[rows]
        shifted_RE = cost_matrix(scores_TE[rows], problem.cost, mask_R) + narrow_E
        top_RK, chosen_RK = largest(shifted_RE, min(k + 1, experts))
        experts_TK[rows] = chosen_RK[:, :k]
        margin_TK[rows] = top_RK[:, :k] - (top_RK[:, k:] if k < experts else -math.inf)
        if mask_R is not None:
            experts_TK[rows][~mask_R] = torch.arange(k, device=scores_TE.device)
            top_RK, chosen_RK = top_RK[mask_R], chosen_RK[mask_R]
        loads_E += chosen_RK[:, :k].reshape(-1).bincount(minlength=experts)
        if k < experts:
            gap_R = top_RK[:, k - 1] - top_RK[:, k]
            telling_R = (gap_R > 0) & gap_R.isfinite()  # a tie says nothing about the scale
            log_R = torch.where(telling_R, gap_R, 1).log()
            for column_R in (chosen_RK[:, k - 1], chosen_RK[:, k]):
                logs_E.index_add_(0, column_R, log_R)
                seen_E.index_add_(0, column_R, telling_R.to(dtype))
    return Choice(bias_E, experts_TK, margin_TK, loads_E, torch.where(seen_E > 0, (logs_E / seen_E).exp(), 0))
