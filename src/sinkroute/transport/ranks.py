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
from sinkroute.transport.collectives import all_gather
from sinkroute.transport.problem import Problem, Reduction

__all__ = ["Gathering", "added", "gather_over_ranks", "over_all_ranks", "refusals", "sum_over_ranks", "withdrawn"]

TEXT = 400  # bytes of an error that other ranks are told

Gathering = Callable[[Tensor], Tensor]
"""A tensor of every rank, (ranks, *shape), in the order of the ranks."""


def over_all_ranks(problem: Problem, reduce: Reduction | None) -> Problem:
    """The problem of all ranks, from this one's part of `check_problem`: with `reduce`, the first collective.

    Raises:
        ValueError: on a CPU, another rank refused its arguments (`withdrawn`).
    """
    total = _total_mass(problem, reduce)
    if reduce is not None and not isinstance(total, Tensor) and math.isnan(total):
        raise ValueError(f"another rank refused its arguments, here they are right; {refusals(reduce)}")
    empty = not isinstance(total, Tensor) and total == 0
    return replace(problem, target_E=problem.target_E * total, empty=empty, reduce=reduce)


def withdrawn(logits_TE: object, reduce: Reduction, error: BaseException | None) -> Problem | None:
    """Tell the ranks that wait in their first collective that this one has refused its arguments, by this error.

    On an accelerator nobody looks at the total: the others go on, to a plan that has not converged. Returned is a
    problem without tokens, for this rank to solve along with them; None where they know already.
    """
    device = torch.device("cpu")
    if isinstance(logits_TE, Tensor) and not logits_TE.is_meta:
        device = logits_TE.device
    dtype = wide_dtype(device)
    total = reduce(torch.full((), math.nan, dtype=dtype, device=device))
    if device.type == "cpu":
        refusals(reduce, error)
        return None
    if not isinstance(logits_TE, Tensor) or logits_TE.ndim == 0:
        return None
    experts = logits_TE.shape[-1]
    share_E = torch.full((experts,), 1 / max(experts, 1), dtype=dtype, device=device)
    return Problem(
        torch.empty(0, experts, device=device), reg=1.0, target_E=share_E * total, positive_E=share_E > 0, reduce=reduce
    )


def refusals(reduce: Reduction, error: BaseException | None = None) -> str:
    """What ranks say that have refused what they were given. All call it once they know that one has; on a CPU.

    Args:
        reduce: the sum over the ranks.
        error: that this rank is about to raise; None: it waits for others.

    >>> refusals(lambda x: x, ValueError("reg must be above 0, got -1"))
    'rank 0 says: ValueError: reg must be above 0, got -1'
    """
    said = torch.zeros(1 + TEXT, dtype=torch.float64, device="cpu")
    if error is not None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        text = f"rank {rank} says: {type(error).__name__}: {error}".encode()[:TEXT]
        said[0] = 1
        said[1 : 1 + len(text)] = torch.tensor(list(text), dtype=said.dtype)
    count, *numbers = reduce(said).tolist()
    if count != 1:  # their texts are added up
        return f"the errors of {count:.0f} ranks say why"
    return bytes(map(int, numbers)).rstrip(b"\0").decode(errors="ignore")


def sum_over_ranks(group: dist.ProcessGroup) -> Reduction:
    """The sum over a process group, in the order of the ranks: the same bits whatever the network does."""
    return lambda x: added(all_gather(x, group))


def added(parts_R: Tensor) -> Tensor:
    """The sum over the first dimension, in its order."""
    total = parts_R[0]
    for part in parts_R[1:]:
        total = total + part
    return total


def gather_over_ranks(group: dist.ProcessGroup) -> Gathering:
    """What every rank of a process group gives."""
    return lambda x: all_gather(x, group)


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
