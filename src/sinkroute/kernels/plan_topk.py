"""The last pass of a plan: the K best experts of every row under given potentials, and what they weigh."""

from __future__ import annotations

import torch
from torch import Tensor

from sinkroute.kernels import native
from sinkroute.kernels.backend import c_for, threads_for, triton_for
from sinkroute.kernels.operations import define, uncompiled
from sinkroute.kernels.rows import Rows, working_dtype
from sinkroute.kernels.storage import address, readable
from sinkroute.kernels.topk import largest

__all__ = ["plan_topk"]


@uncompiled
def plan_topk(rows: Rows, potentials_E: Tensor, reg: float, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Weights (T, K) and experts (T, K) as `Plan.topk` describes them; without gradient, without a T × E matrix.

    >>> rows = Rows(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> plan_topk(rows, torch.zeros(2), 1.0, 1, normalise=True)[1].tolist()
    [[0], [1]]
    """
    if readable(rows.logits_TE, rows.token_mask, rows.token_mass, potentials_E):
        return _plan_topk(rows, potentials_E, reg, k, normalise)
    weights_TK, experts_TK = torch.ops.sinkroute.plan_topk(
        rows.logits_TE, rows.cost, rows.token_mask, rows.token_mass, potentials_E, reg, k, normalise
    )
    return weights_TK, experts_TK


def _plan_topk(rows: Rows, potentials_E: Tensor, reg: float, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    logits_TE = rows.logits_TE
    if triton_for(logits_TE):
        # Triton comes with torch for GPUs only.
        from sinkroute.kernels.gpu.fused import MAX_K, fused_topk

        if k <= MAX_K:
            return fused_topk(rows, potentials_E, reg, k, normalise)
    weights_TK, experts_TK = found = _empty(logits_TE, k)
    if (c := c_for(logits_TE)) is not None:
        wide_E = potentials_E.double().contiguous()
        at = (address(experts_TK), address(weights_TK))
        c.topk(native.Rows.of(rows), address(wide_E), reg, k, normalise, *at, threads_for(logits_TE))
        return found
    wide = torch.promote_types(rows.dtype, potentials_E.dtype)
    for part in rows.parts():
        above_RE = rows.cost_TE(part).to(wide) + potentials_E.to(wide)
        above_RE -= above_RE.amax(dim=1, keepdim=True)
        # Order before the division by reg: after it distinct entries may underflow to ties. Equal is what is equal in
        # the working dtype, as in the kernels, or routes would depend on the layout of the logits in memory.
        top_RK, experts_RK = largest(above_RE.to(rows.dtype), k)
        top_RK = top_RK.to(wide)
        # Relative to the best, which is 0, or to all experts.
        total_R1 = 0 if normalise else (above_RE / reg).logsumexp(dim=1, keepdim=True)
        weights_RK = (top_RK / reg).softmax(dim=1) if normalise else (top_RK / reg - total_R1).exp()
        if rows.token_mass is not None and not normalise:
            weights_RK *= rows.token_mass[part, None]
        if rows.token_mask is not None:
            mask_R1 = rows.token_mask[part, None]
            weights_RK = weights_RK.masked_fill(~mask_R1, 0)
            experts_RK = torch.where(mask_R1, experts_RK, torch.arange(k, device=experts_RK.device))
        weights_TK[part], experts_TK[part] = weights_RK, experts_RK
    return found


def _empty(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape, dtype = (logits_TE.shape[0], k), working_dtype(logits_TE.dtype)
    return logits_TE.new_empty(shape, dtype=dtype), logits_TE.new_empty(shape, dtype=torch.int64)


define(
    "plan_topk(Tensor logits, str cost, Tensor? token_mask, Tensor? token_mass, Tensor potentials, float reg, "
    "SymInt k, bool normalise) -> (Tensor, Tensor)",
    lambda logits_TE, cost, token_mask, token_mass, *rest: _plan_topk(
        Rows(logits_TE, cost, token_mask, token_mass), *rest
    ),
    lambda logits_TE, cost, token_mask, token_mass, potentials_E, reg, k, normalise: _empty(logits_TE, k),
)
