"""The transport problem: what is asked of a solver, checked once, in one place.

A solver sees a `Problem`: the scores (T, E) as they came, the name of the cost C, the entropy weight ξ, the mass m_i of
every row and the column sums to reach,

    target_j = Σ m_i · mass_j / Σ mass,

over all ranks. It gives back a `Solution`: potentials g and how far the column sums of
`m_i softmax_j((C_ij + g_j) / ξ)` are from the targets at exactly these potentials.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sinkroute._errors import NonFiniteScores, unknown_name
from sinkroute._values import holds_values, plain

__all__ = [
    "COSTS",
    "Problem",
    "Reduction",
    "Solution",
    "as_masses",
    "check_number",
    "check_problem",
    "check_scores_form",
    "full_precision",
    "make_problem",
    "over_all_ranks",
    "refuse_bad_scores",
    "starting_potentials",
    "sum_over_ranks",
    "withdrawn",
]

Reduction = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks that share the tokens; the same bits on every rank."""


def _softmax_cost(scores_TE: Tensor) -> Tensor:
    # The softmax of −inf is 0, a cost like another; a forbidden expert has to stay forbidden.
    return scores_TE.softmax(dim=1).masked_fill(scores_TE == -math.inf, -math.inf)


COSTS: dict[str, Callable[[Tensor], Tensor]] = {"linear": lambda scores_TE: scores_TE, "softmax": _softmax_cost}


class Solution(NamedTuple):
    """What a solver returns: potentials (E,), the 0-d column error at these potentials, the passes over the cost."""

    potentials_E: Tensor
    column_error: Tensor
    passes: int | Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """A checked transport problem; `make_problem` builds it. Kernels read its tensors: all are `plain`.

    Attributes:
        scores_TE: (T, E) of any floating-point dtype, not copied: rows without mass may hold anything.
        cost: a name of `COSTS`.
        reg: ξ > 0, representable in the working dtype.
        token_mask: (T,) bool, True = real token with mass; None when all are.
        token_mass: (T,) of the working dtype, 0 for masked tokens; None when all real tokens have mass 1.
        target_E: (E,) float64 column sums to reach, over all ranks.
        positive_E: (E,) bool, the experts with mass; the others get potential −inf.
        empty: no token has mass, on any rank.
        reduce: the sum over the ranks that share the tokens; None for this process alone.
    """

    scores_TE: Tensor
    cost: str
    reg: float
    token_mask: Tensor | None
    token_mass: Tensor | None
    target_E: Tensor
    positive_E: Tensor
    empty: bool
    reduce: Reduction | None

    @property
    def dtype(self) -> torch.dtype:
        """What plans and weights are made of: float64 for float64 scores, float32 for all others."""
        return torch.promote_types(self.scores_TE.dtype, torch.float32)

    def cost_TE(self) -> Tensor:
        """The cost as a matrix of the working dtype, rows of masked tokens from scores of 0."""
        return cost_matrix(self.scores_TE, self.cost, self.token_mask)

    def every(self, step: int) -> Problem:
        """The same problem on every `step`-th row, without copying; targets stay those of all rows."""
        mask_T, mass_T = (None if x is None else x[::step] for x in (self.token_mask, self.token_mass))
        return replace(self, scores_TE=self.scores_TE[::step], token_mask=mask_T, token_mass=mass_T)

    def centre(self, potentials_E: Tensor) -> Tensor:
        """Shift potentials to mean 0 over the experts with mass: the plan does not depend on their level."""
        share_E = torch.where(self.positive_E, potentials_E, 0) / self.positive_E.sum()
        return potentials_E - share_E.sum()

    def column_error(self, log_sums_E: Tensor) -> Tensor:
        """Largest |column sum / target − 1| over experts with mass, 0-d, from the logarithms of the column sums."""
        deviation_E = torch.expm1(log_sums_E - self.target_E.log())
        return torch.where(self.positive_E, deviation_E, 0).abs().amax()

    def over_ranks(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks."""
        return x if self.reduce is None else self.reduce(x)


def cost_matrix(scores_TE: Tensor, cost: str, token_mask: Tensor | None) -> Tensor:
    """C (T, E) in float32, or float64 for float64 scores; rows of masked tokens from scores of 0."""
    clean_TE = scores_TE.to(torch.promote_types(scores_TE.dtype, torch.float32))
    if token_mask is not None:
        # NaN in a masked row must not reach any arithmetic: 0 · NaN is NaN, in values and in gradients.
        clean_TE = torch.where(token_mask[:, None], clean_TE, 0)
    return COSTS[cost](clean_TE)


def make_problem(
    scores_TE: Tensor,
    reg: float,
    cost: str,
    token_mask: Tensor | None,
    token_mass: Tensor | None,
    expert_mass: Tensor | Sequence[float] | None,
    reduce: Reduction | None,
) -> Problem:
    """Check the arguments of `solve` (see there for their meaning and for what is raised) and hold them.

    Scores are not looked at here: that would be a pass of its own. Solvers call `refuse_bad_scores` when they find
    that something is wrong, or first of all.
    """
    return over_all_ranks(check_problem(scores_TE, reg, cost, token_mask, token_mass, expert_mass), reduce)


def check_problem(
    scores_TE: Tensor,
    reg: float,
    cost: str,
    token_mask: Tensor | None,
    token_mass: Tensor | None,
    expert_mass: Tensor | Sequence[float] | None,
) -> Problem:
    """What one process can tell of its part of a problem. The targets are shares of 1 still; see `over_all_ranks`."""
    if not isinstance(cost, str) or cost not in COSTS:
        raise unknown_name("cost", cost, COSTS)
    scores_TE = plain("scores_TE", scores_TE.detach())
    dtype = torch.promote_types(scores_TE.dtype, torch.float32)
    _check_reg(reg, dtype)
    mask = _checked_mask(plain("token_mask", token_mask, scores_TE), scores_TE)
    mass_T = _checked_token_mass(plain("token_mass", token_mass, scores_TE), mask, scores_TE, dtype)
    if mass_T is not None:
        mask = mass_T > 0
    share_E = _checked_mass(expert_mass, scores_TE)
    return Problem(
        scores_TE=scores_TE,
        cost=cost,
        reg=float(reg),
        token_mask=mask,
        token_mass=mass_T,
        target_E=share_E,
        positive_E=share_E > 0,
        empty=False,
        reduce=None,
    )


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


def withdrawn(scores_TE: object, reduce: Reduction) -> Problem | None:
    """Tell the ranks that wait in their first collective that this one has refused its arguments.

    On an accelerator nobody looks at the total: the others go on, to a plan that has not converged. Returned is a
    problem without tokens, for this rank to solve along with them; None where they know already.
    """
    device = torch.device("cpu")
    if isinstance(scores_TE, Tensor) and not scores_TE.is_meta:
        device = scores_TE.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = reduce(torch.full((), math.nan, dtype=dtype, device=device))
    if device.type == "cpu" or not isinstance(scores_TE, Tensor) or scores_TE.ndim == 0:
        return None
    alone = check_problem(torch.empty(0, scores_TE.shape[-1], device=device), 1.0, "linear", None, None, None)
    return replace(alone, target_E=alone.target_E * total, reduce=reduce)


def sum_over_ranks(group: dist.ProcessGroup) -> Reduction:
    """The sum over a process group, in the order of the ranks: the same bits whatever the network does."""

    def reduce(x: Tensor) -> Tensor:
        gathered = x.new_empty((dist.get_world_size(group), *x.shape))
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group=group)
        total = gathered[0]
        for part in gathered[1:]:
            total = total + part
        return total

    return reduce


def full_precision(scores_TE: Tensor) -> AbstractContextManager[None]:
    """Without autocast: mixed precision is for the model, a product in bfloat16 would spoil the column sums."""
    # The meta device has none.
    return nullcontext() if scores_TE.is_meta else torch.autocast(scores_TE.device.type, enabled=False)


def starting_potentials(problem: Problem, init: Tensor | None) -> Tensor | None:
    """`init` as potentials (E,) float64 to start from, 0 where it is not finite; None where there is none."""
    init = plain("init", init, problem.scores_TE)
    if init is None:
        return None
    if not isinstance(init, Tensor):
        raise TypeError(f"init must be a tensor of shape (E,), got {type(init).__name__}; pass plan.potentials")
    _refuse_complex("init", init)
    if init.shape != problem.target_E.shape:
        raise ValueError(
            f"init has shape {tuple(init.shape)} but there are {len(problem.target_E)} experts; it must be (E,)"
        )
    given_E = init.detach().to(problem.target_E)
    largest = torch.finfo(problem.dtype).max / 64
    return torch.where(given_E.abs() <= largest, given_E, 0)


def _refuse_complex(name: str, x: Tensor) -> None:
    if x.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}; pass {name}.real")


def check_number(name: str, value: object) -> None:
    """Raise unless `value` is a finite number above 0: TypeError for another type, ValueError for another value."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}; of a tensor give .item()")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def check_scores_form(scores_TE: Tensor) -> Tensor:
    """The scores, `plain`. Raise unless they are a floating-point tensor (T, E) with E ≥ 1."""
    if not isinstance(scores_TE, Tensor):
        raise TypeError(f"scores_TE must be a torch.Tensor, got {type(scores_TE).__name__}")
    scores_TE = plain("scores_TE", scores_TE)
    if scores_TE.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"scores_TE must be floating-point of 16, 32 or 64 bits, got {scores_TE.dtype}; call scores_TE.float()"
        )
    if scores_TE.ndim != 2:
        raise ValueError(
            f"scores_TE must have 2 dimensions (tokens, experts), got shape {tuple(scores_TE.shape)}; "
            "flatten batch and sequence first: scores.flatten(0, -2)"
        )
    if scores_TE.shape[1] == 0:
        raise ValueError(f"scores_TE must have at least one expert, got shape {tuple(scores_TE.shape)}")
    return scores_TE


def _check_reg(reg: float, dtype: torch.dtype) -> None:
    check_number("reg", reg)
    lowest, highest = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 1024
    if not lowest <= reg <= highest:
        raise ValueError(f"reg={reg} is outside {lowest:.3g} to {highest:.3g}, the range that {dtype} can work with")


def refuse_bad_scores(problem: Problem) -> None:
    """Raise `NonFiniteScores`, naming the first score that no plan can be made of, if there is one.

    NaN and +inf are refused, and rows that are −inf wherever an expert has mass. −inf alone is a forbidden expert. With
    `problem.reduce` a collective: all ranks raise if one does. Not called for accelerators: there bad scores give a
    plan that has not converged.
    """
    error = _bad_scores(problem)
    if problem.reduce is not None:
        # All ranks or none: whoever goes on would wait for the others.
        bad = torch.tensor(float(error is not None), dtype=problem.target_E.dtype, device=problem.target_E.device)
        if bool(problem.reduce(bad)) and error is None:
            error = NonFiniteScores(
                "scores on another rank are NaN, +inf or −inf throughout; its error names the first"
            )
    if error is not None:
        raise error


def _bad_scores(problem: Problem) -> NonFiniteScores | None:
    scores_TE = problem.scores_TE
    real_T1 = torch.ones_like(scores_TE[:, :1], dtype=torch.bool)
    if problem.token_mask is not None:
        real_T1 = problem.token_mask[:, None]
    bad = ((scores_TE.isnan() | (scores_TE == math.inf)) & real_T1).nonzero()
    if len(bad):
        token, expert = bad[0].tolist()
        return NonFiniteScores(
            f"scores_TE[{token}, {expert}] is {scores_TE[token, expert].item()}; scores of real tokens must be finite, "
            "or −inf for an expert that the token must not have: mask padding with token_mask, or look for divergence "
            "upstream (lower the learning rate, clip gradients)"
        )
    allowed_TE = (scores_TE > -math.inf) & problem.positive_E
    forbidden = (~allowed_TE.any(dim=1, keepdim=True) & real_T1).nonzero()
    if len(forbidden):
        return NonFiniteScores(
            f"all scores of token {forbidden[0, 0].item()} are −inf, or its other experts have an expert_mass of 0, so "
            "that no expert is left for it; leave at least one, or mask the token with token_mask"
        )
    return None


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


def _checked_token_mass(
    token_mass: Tensor | None, mask: Tensor | None, scores_TE: Tensor, dtype: torch.dtype
) -> Tensor | None:
    if token_mass is None:
        return None
    if not isinstance(token_mass, Tensor):
        raise TypeError(f"token_mass must be a tensor of shape (T,), got {type(token_mass).__name__}")
    _refuse_complex("token_mass", token_mass)
    if token_mass.shape != scores_TE.shape[:1]:
        raise ValueError(
            f"token_mass has shape {tuple(token_mass.shape)} but there are {scores_TE.shape[0]} tokens; it must be (T,)"
        )
    if not token_mass.dtype.is_floating_point or token_mass.dtype.itemsize == 1:
        token_mass = token_mass.to(dtype)  # of some of these torch finds no largest
    if token_mass.device.type == "cpu" and holds_values(token_mass) and token_mass.numel():
        low, high = (float(x) for x in token_mass.detach().aminmax())
        if not 0 <= low <= high <= 1e30:
            wide_T = token_mass.detach().double()  # as the bound is: 1e30 itself is more in float32
            at = int((~((wide_T >= 0) & (wide_T <= 1e30))).nonzero()[0])
            raise ValueError(
                f"token_mass[{at}] is {token_mass[at].item()}; masses must be finite, not negative and at most 1e30"
            )
        if 0 < high < 1e-30:
            raise ValueError(f"the largest token_mass is {high}, too small for float32; scale token_mass up")
    mass_T = token_mass.detach().to(scores_TE.device, dtype)
    return mass_T if mask is None else torch.where(mask, mass_T, 0)


def as_masses(expert_mass: Tensor | Sequence[float], scores_TE: Tensor) -> Tensor:
    """Relative capacities as a `plain` tensor.

    Raises:
        TypeError: no real numbers.
    """
    if isinstance(expert_mass, Tensor):
        _refuse_complex("expert_mass", expert_mass)
        return plain("expert_mass", expert_mass, scores_TE)
    try:
        if np.iscomplexobj(expert_mass):  # torch would drop the imaginary parts
            raise TypeError("complex numbers")
        return torch.tensor(expert_mass, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"expert_mass must be a tensor or a sequence of numbers, got {reprlib.repr(expert_mass)} ({error}); pass "
            "one relative capacity for each expert"
        ) from None


def _checked_mass(expert_mass: Tensor | Sequence[float] | None, scores_TE: Tensor) -> Tensor:
    """The share of the tokens for each expert: (E,) float64 (float32 where a device has no other), sums to 1."""
    experts, device = scores_TE.shape[1], scores_TE.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if expert_mass is None:
        return torch.full((experts,), 1 / experts, dtype=dtype, device=device)
    mass_E = as_masses(expert_mass, scores_TE)
    # Before any arithmetic: a quotient in bfloat16 would be another target.
    mass_E = mass_E.detach().to(torch.float32 if mass_E.device.type == "mps" else torch.float64)
    if mass_E.shape != (experts,):
        raise ValueError(
            f"expert_mass has shape {tuple(mass_E.shape)} but there are {experts} experts; it must be (E,), one "
            "relative capacity for each expert"
        )
    if (
        mass_E.device.type == "cpu"
        and holds_values(mass_E)
        and not (mass_E.isfinite().all() and (mass_E >= 0).all() and mass_E.any())
    ):
        raise ValueError(
            f"expert_mass must be finite, not negative and positive for at least one expert, got {mass_E.tolist()}"
        )
    mass_E = (mass_E / mass_E.max()).to(device, dtype)  # the sum of any scale must not overflow
    return mass_E / mass_E.sum()


def _total_mass(problem: Problem, reduce: Reduction | None) -> Tensor | float:
    """Σ m_i over all ranks: a float where it is known without waiting for an accelerator."""
    scores_TE, dtype = problem.scores_TE, problem.target_E.dtype
    if problem.token_mass is not None:
        # In parts: a sum that widens makes a wide copy of all.
        total = torch.stack([part.sum(dtype=dtype) for part in problem.token_mass.split(1 << 17)]).sum()
    elif problem.token_mask is not None:
        total = problem.token_mask.count_nonzero().to(dtype)
    elif reduce is None:
        return float(scores_TE.shape[0])
    else:
        total = torch.full((), scores_TE.shape[0], dtype=dtype, device=scores_TE.device)
    if reduce is not None:
        total = reduce(total)
    elif scores_TE.shape[0] == 0:
        return 0.0
    # A rank without tokens on an accelerator does not look either: the others, which do not, would wait for it.
    return float(total) if total.device.type == "cpu" and holds_values(total) else total
