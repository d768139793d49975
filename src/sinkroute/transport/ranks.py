"""One problem whose tokens are spread over ranks: the sums over all of them, and how a rank that refuses says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from sinkroute.kernels.rows import wide_dtype
from sinkroute.kernels.storage import holds_values
from sinkroute.transport.problem import Problem, Reduction

__all__ = ["Gathering", "added", "gather_over_ranks", "over_all_ranks", "sum_over_ranks", "withdrawn"]

Gathering = Callable[[Tensor], Tensor]
"""A tensor of every rank, (ranks, *shape), in the order of the ranks."""


def over_all_ranks(problem: Problem, reduce: Reduction | None) -> Problem:
    """The problem of all ranks, from this one's part of `check_problem`: with `reduce`, the first collective.

    Raises:
        ValueError: on a CPU, another rank refused its arguments (`withdrawn`).
    """
    total = _total_mass(problem, reduce)
    if reduce is not None and not isinstance(total, Tensor) and math.isnan(total):
        raise ValueError("another rank refused its arguments, its error says which; here they are right")
    empty = not isinstance(total, Tensor) and total == 0
    return replace(problem, target_E=problem.target_E * total, empty=empty, reduce=reduce)


def withdrawn(logits_TE: object, reduce: Reduction) -> Problem | None:
    """Tell the ranks that wait in their first collective that this one has refused its arguments.

    On an accelerator nobody looks at the total: the others go on, to a plan that has not converged. Returned is a
    problem without tokens, for this rank to solve along with them; None where they know already.
    """
    device = torch.device("cpu")
    if isinstance(logits_TE, Tensor) and not logits_TE.is_meta:
        device = logits_TE.device
    dtype = wide_dtype(device)
    total = reduce(torch.full((), math.nan, dtype=dtype, device=device))
    if device.type == "cpu" or not isinstance(logits_TE, Tensor) or logits_TE.ndim == 0:
        return None
    experts = logits_TE.shape[-1]
    share_E = torch.full((experts,), 1 / max(experts, 1), dtype=dtype, device=device)
    return Problem(
        torch.empty(0, experts, device=device), reg=1.0, target_E=share_E * total, positive_E=share_E > 0, reduce=reduce
    )


def sum_over_ranks(group: dist.ProcessGroup) -> Reduction:
    """The sum over a process group, in the order of the ranks: the same bits whatever the network does."""

    gather = gather_over_ranks(group)

    return lambda x: added(gather(x))


def added(parts_R: Tensor) -> Tensor:
    """The sum over the first dimension, in its order."""
    total = parts_R[0]
    for part in parts_R[1:]:
        total = total + part
    return total


def gather_over_ranks(group: dist.ProcessGroup) -> Gathering:
    """What every rank of a process group gives."""

    def gather(x: Tensor) -> Tensor:
        gathered = x.new_empty((dist.get_world_size(group), *x.shape))
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group=group)
        return gathered

    return gather


def _total_mass(problem: Problem, reduce: Reduction | None) -> Tensor | float:
    """Σ m_i over all ranks: a float where it is known without waiting for an accelerator."""
    logits_TE, dtype = problem.logits_TE, problem.target_E.dtype
    if problem.token_mass is not None:
        # In parts: a sum that widens makes a wide copy of all.
        total = torch.stack([part.sum(dtype=dtype) for part in problem.token_mass.split(1 << 17)]).sum()
    elif problem.token_mask is not None:
        total = problem.token_mask.count_nonzero().to(dtype)
    elif reduce is None:
        return float(logits_TE.shape[0])
    else:
        total = torch.full((), logits_TE.shape[0], dtype=dtype, device=logits_TE.device)
    if reduce is not None:
        total = reduce(total)
    elif logits_TE.shape[0] == 0:
        return 0.0
    # A rank without tokens on an accelerator does not look either: the others, which do not, would wait for it.
    return float(total) if total.device.type == "cpu" and holds_values(total) else total
