"""The last pass: the K best experts of every row under given potentials, and what they weigh."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sinkroute._operations import define
from sinkroute._uncompiled import uncompiled
from sinkroute._values import address, readable
from sinkroute.transport import native
from sinkroute.transport.device import served_by_triton
from sinkroute.transport.largest import largest
from sinkroute.transport.passes.chunked import chunks
from sinkroute.transport.passes.compiled import served_by_kernels, threads_for
from sinkroute.transport.problem import cost_matrix

__all__ = ["topk_rows"]


@uncompiled
def topk_rows(
    scores_TE: Tensor,
    cost: str,
    token_mask: Tensor | None,
    token_mass: Tensor | None,
    potentials_E: Tensor,
    reg: float,
    k: int,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    """Weights (T, K) and experts (T, K) as `Plan.topk` describes them; without gradient, without a T × E matrix."""
    if not readable(scores_TE, token_mask, token_mass, potentials_E):
        return torch.ops.sinkroute.plan_topk(scores_TE, cost, token_mask, token_mass, potentials_E, reg, k, normalise)
    return _topk_rows(scores_TE, cost, token_mask, token_mass, potentials_E, reg, k, normalise)


def _topk_rows(
    scores_TE: Tensor,
    cost: str,
    token_mask: Tensor | None,
    token_mass: Tensor | None,
    potentials_E: Tensor,
    reg: float,
    k: int,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    if served_by_triton(scores_TE):
        # Triton comes with torch for GPUs only.
        from sinkroute.transport.passes.fused import MAX_K, fused_topk

        if k <= MAX_K:
            return fused_topk(scores_TE, cost, token_mask, token_mass, potentials_E, reg, k, normalise)
    tokens, experts = scores_TE.shape
    dtype = torch.promote_types(scores_TE.dtype, torch.float32)
    weights_TK = torch.empty(tokens, k, dtype=dtype, device=scores_TE.device)
    experts_TK = torch.empty(tokens, k, dtype=torch.int64, device=scores_TE.device)
    if served_by_kernels(scores_TE):
        kernels = native.load()
        assert kernels is not None
        described = native.Scores.of(scores_TE, cost == "softmax", token_mask, token_mass)
        wide_E = potentials_E.double().contiguous()
        kernels.topk(
            ctypes.byref(described),
            address(wide_E),
            reg,
            k,
            normalise,
            address(experts_TK),
            address(weights_TK),
            threads_for(scores_TE),
        )
        return weights_TK, experts_TK
    wide = torch.promote_types(dtype, potentials_E.dtype)
    for rows in chunks(tokens, experts):
        mask_R = None if token_mask is None else token_mask[rows]
        above_RE = cost_matrix(scores_TE[rows], cost, mask_R).to(wide) + potentials_E.to(wide)
        above_RE -= above_RE.amax(dim=1, keepdim=True)
        # Order before the division by reg: after it distinct entries may underflow to ties. Equal is what is equal in
        # the working dtype, as in the kernels, or routes would depend on the layout of the scores in memory.
        top_RK, experts_RK = largest(above_RE.to(dtype), k)
        top_RK = top_RK.to(wide)
        # Relative to the best, which is 0, or to all experts.
        total_R1 = 0 if normalise else (above_RE / reg).logsumexp(dim=1, keepdim=True)
        weights_RK = (top_RK / reg).softmax(dim=1) if normalise else (top_RK / reg - total_R1).exp()
        if token_mass is not None and not normalise:
            weights_RK *= token_mass[rows, None]
        if mask_R is not None:
            weights_RK = weights_RK.masked_fill(~mask_R[:, None], 0)
            experts_RK = torch.where(mask_R[:, None], experts_RK, torch.arange(k, device=experts_RK.device))
        weights_TK[rows], experts_TK[rows] = weights_RK, experts_RK
    return weights_TK, experts_TK


def _topk_like(
    scores_TE: Tensor,
    cost: str,
    token_mask: Tensor | None,
    token_mass: Tensor | None,
    potentials_E: Tensor,
    reg: float,
    k: int,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    shape = (scores_TE.shape[0], k)
    dtype = torch.promote_types(scores_TE.dtype, torch.float32)
    return scores_TE.new_empty(shape, dtype=dtype), scores_TE.new_empty(shape, dtype=torch.int64)


define(
    "plan_topk(Tensor scores, str cost, Tensor? token_mask, Tensor? token_mass, Tensor potentials, float reg, "
    "SymInt k, bool normalise) -> (Tensor, Tensor)",
    _topk_rows,
    _topk_like,
)
