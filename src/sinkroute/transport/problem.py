"""The transport problem: what is asked of a solver, checked once, in one place.

A solver sees a `Problem`: the cost C (T, E), the entropy weight ξ, the rows that count and the column sums to reach,

    target_j = T_real · mass_j / Σ mass,

where T_real counts the real tokens over all ranks. It gives back a `Solution`: potentials g and how far the column
sums of `softmax_j((C_ij + g_j) / ξ)` are from the targets at exactly these potentials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sinkroute._errors import NonFiniteScores, unknown_name

__all__ = ["COSTS", "Problem", "Solution", "check_number", "check_scores_form", "make_problem", "starting_potentials"]

COSTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda scores_TE: scores_TE,
    "softmax": lambda scores_TE: scores_TE.softmax(dim=1),
}


class Solution(NamedTuple):
    """What a solver returns: potentials (E,), the 0-d column error at these potentials, the passes over the cost."""

    potentials_E: Tensor
    column_error: Tensor
    passes: int


@dataclass(frozen=True, eq=False)
class Problem:
    """A checked transport problem; `make_problem` builds it.

    Attributes:
        cost_TE: (T, E) float32 or float64, finite; rows of masked tokens come from scores of 0.
        reg: ξ > 0, representable in the cost's dtype.
        token_mask: (T,) bool, True = real token; None when all are.
        target_E: (E,) column sums to reach, over all ranks.
        positive_E: (E,) bool, the experts with mass; the others get potential −inf.
        tokens: number of real tokens over all ranks.
        process_group: the ranks that share the tokens; None for this process alone.
    """

    cost_TE: Tensor
    reg: float
    token_mask: Tensor | None
    target_E: Tensor
    positive_E: Tensor
    tokens: int
    process_group: dist.ProcessGroup | None

    def centre(self, potentials_E: Tensor) -> Tensor:
        """Shift potentials to mean 0 over the experts with mass: the plan does not depend on their level."""
        share_E = torch.where(self.positive_E, potentials_E, 0) / self.positive_E.sum()
        return potentials_E - share_E.sum()

    def column_error(self, log_sums_E: Tensor) -> Tensor:
        """Largest |column sum / target − 1| over experts with mass, 0-d, from the logarithms of the column sums."""
        deviation_E = torch.expm1(log_sums_E - self.target_E.log())
        return torch.where(self.positive_E, deviation_E, 0).abs().amax()

    def over_ranks(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce `x` in place over the process group, if there is one."""
        if self.process_group is not None:
            dist.all_reduce(x, op=op, group=self.process_group)
        return x


def make_problem(
    scores_TE: Tensor,
    reg: float,
    cost: str,
    token_mask: Tensor | None,
    expert_mass: Tensor | Sequence[float] | None,
    process_group: dist.ProcessGroup | None,
) -> Problem:
    """Check the arguments of `solve` (see there for their meaning and for what is raised) and hold them."""
    if cost not in COSTS:
        raise unknown_name("cost", cost, COSTS)
    mask = _checked_mask(token_mask, scores_TE)
    # NaN in a masked row must not reach any arithmetic: 0 · NaN is NaN, in values and in gradients.
    clean_TE = scores_TE.to(torch.promote_types(scores_TE.dtype, torch.float32))
    if mask is not None:
        clean_TE = torch.where(mask[:, None], clean_TE, 0)
    _check_reg(reg, clean_TE.dtype)
    _check_scores_finite(clean_TE)
    mass_E = _checked_mass(expert_mass, clean_TE)
    tokens = _count_tokens(clean_TE, mask, process_group)
    return Problem(
        cost_TE=COSTS[cost](clean_TE),
        reg=float(reg),
        token_mask=mask,
        target_E=mass_E * tokens,
        positive_E=mass_E > 0,
        tokens=tokens,
        process_group=process_group,
    )


def starting_potentials(problem: Problem, init: Tensor | None) -> Tensor:
    """The potentials to start from (E,): `init`, 0 where it is absent or not finite, −inf for experts without mass."""
    start_E = torch.zeros_like(problem.target_E)
    if init is not None:
        if not isinstance(init, Tensor):
            raise TypeError(f"init must be a tensor of shape (E,), got {type(init).__name__}; pass plan.potentials")
        if init.shape != start_E.shape:
            raise ValueError(
                f"init has shape {tuple(init.shape)} but there are {len(start_E)} experts; it must be (E,)"
            )
        given_E = init.detach().to(start_E)
        start_E = torch.where(given_E.abs() <= _largest(start_E.dtype), given_E, start_E)
    return problem.centre(start_E.masked_fill(~problem.positive_E, -math.inf))


def check_number(name: str, value: object) -> None:
    """Raise unless `value` is a finite number above 0: TypeError for another type, ValueError for another value."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def _largest(dtype: torch.dtype) -> float:
    """The largest magnitude of a score; the rest is headroom, so that sums of a few terms do not overflow."""
    return torch.finfo(dtype).max / 64


def check_scores_form(scores_TE: Tensor) -> None:
    """Raise unless the scores are a floating-point tensor (T, E) with E ≥ 1."""
    if not isinstance(scores_TE, Tensor):
        raise TypeError(f"scores_TE must be a torch.Tensor, got {type(scores_TE).__name__}")
    if not scores_TE.is_floating_point():
        raise TypeError(f"scores_TE must have a floating-point dtype, got {scores_TE.dtype}; call scores_TE.float()")
    if scores_TE.ndim != 2:
        raise ValueError(
            f"scores_TE must have 2 dimensions (tokens, experts), got shape {tuple(scores_TE.shape)}; "
            "flatten batch and sequence first: scores.flatten(0, -2)"
        )
    if scores_TE.shape[1] == 0:
        raise ValueError(f"scores_TE must have at least one expert, got shape {tuple(scores_TE.shape)}")


def _check_reg(reg: float, dtype: torch.dtype) -> None:
    check_number("reg", reg)
    lowest, highest = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 1024
    if not lowest <= reg <= highest:
        raise ValueError(f"reg={reg} is outside {lowest:.3g} to {highest:.3g}, the range that {dtype} can work with")


def _check_scores_finite(scores_TE: Tensor) -> None:
    # Reading a value back from an accelerator would make the host wait on every call; there, bad scores
    # come back as a plan that has not converged.
    if scores_TE.device.type != "cpu" or scores_TE.numel() == 0:
        return
    largest = _largest(scores_TE.dtype)
    low, high = scores_TE.detach().aminmax()
    if -largest <= low and high <= largest:  # False for NaN, which aminmax passes on
        return
    token, expert = (~(scores_TE.abs() <= largest)).nonzero()[0].tolist()
    raise NonFiniteScores(
        f"scores_TE[{token}, {expert}] is {scores_TE[token, expert].item()}; scores of real tokens must be finite and "
        f"at most {largest:.1e} in size: mask padding with token_mask, or look for divergence upstream "
        "(lower the learning rate, clip gradients)"
    )


def _checked_mask(token_mask: Tensor | None, scores_TE: Tensor) -> Tensor | None:
    if token_mask is None:
        return None
    if not isinstance(token_mask, Tensor) or token_mask.dtype != torch.bool:
        kind = token_mask.dtype if isinstance(token_mask, Tensor) else type(token_mask).__name__
        raise TypeError(f"token_mask must be a bool tensor (True = real token), got {kind}; call token_mask.bool()")
    if token_mask.shape != scores_TE.shape[:1]:
        raise ValueError(
            f"token_mask has shape {tuple(token_mask.shape)} but there are {scores_TE.shape[0]} tokens; "
            "it must be (T,): flatten it like the scores"
        )
    return token_mask.to(scores_TE.device)


def _checked_mass(expert_mass: Tensor | Sequence[float] | None, like_TE: Tensor) -> Tensor:
    """The share of the tokens for each expert: (E,), sums to 1."""
    experts = like_TE.shape[1]
    if expert_mass is None:
        return like_TE.new_full((experts,), 1 / experts)
    mass_E = torch.as_tensor(expert_mass).detach()
    if mass_E.shape != (experts,):
        raise ValueError(
            f"expert_mass has shape {tuple(mass_E.shape)} but there are {experts} experts; it must be (E,), one "
            "relative capacity for each expert"
        )
    if mass_E.device.type == "cpu" and not (mass_E.isfinite().all() and (mass_E >= 0).all() and mass_E.any()):
        raise ValueError(
            f"expert_mass must be finite, not negative and positive for at least one expert, got {mass_E.tolist()}"
        )
    mass_E = (mass_E / mass_E.max()).to(like_TE)  # the sum of any scale must not overflow
    return mass_E / mass_E.sum()


def _count_tokens(scores_TE: Tensor, mask: Tensor | None, process_group: dist.ProcessGroup | None) -> int:
    if mask is None and process_group is None:
        return scores_TE.shape[0]
    count = torch.full((), scores_TE.shape[0], device=scores_TE.device) if mask is None else mask.sum()
    if process_group is not None:
        dist.all_reduce(count, group=process_group)
    return int(count)
