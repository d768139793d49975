"""Every check of an argument of `solve` and `balanced_topk`, once: from what a user passed to a `Problem`."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from sinkroute._errors import unknown_name
from sinkroute.kernels.rows import COSTS, wide_dtype, working_dtype
from sinkroute.kernels.storage import holds_values, plain
from sinkroute.transport.problem import Problem, Reduction
from sinkroute.transport.ranks import over_all_ranks

__all__ = [
    "as_masses",
    "check_k",
    "check_logits_form",
    "check_number",
    "check_problem",
    "full_precision",
    "make_problem",
    "starting_potentials",
]


def make_problem(
    logits_TE: Tensor,
    reg: float = 1.0,
    cost: str = "linear",
    token_mask: Tensor | None = None,
    token_mass: Tensor | None = None,
    expert_mass: Tensor | Sequence[float] | None = None,
    reduce: Reduction | None = None,
) -> Problem:
    """Check the arguments of `solve` (see there for their meaning and for what is raised) and hold them.

    The logits are not looked at here: that would be another pass. Solvers call `refuse_bad_logits` when they find
    that something is wrong, or first of all.
    """
    return over_all_ranks(check_problem(logits_TE, reg, cost, token_mask, token_mass, expert_mass), reduce)


def check_problem(
    logits_TE: Tensor,
    reg: float,
    cost: str,
    token_mask: Tensor | None,
    token_mass: Tensor | None,
    expert_mass: Tensor | Sequence[float] | None,
) -> Problem:
    """What one process can tell of its part of a problem. The targets are shares of 1 still; see `over_all_ranks`."""
    if not isinstance(cost, str) or cost not in COSTS:
        raise unknown_name("cost", cost, COSTS)
    logits_TE = plain("logits_TE", logits_TE.detach())
    dtype = working_dtype(logits_TE.dtype)
    _check_reg(reg, dtype)
    mask = _checked_mask(plain("token_mask", token_mask, logits_TE), logits_TE)
    mass_T = _checked_token_mass(plain("token_mass", token_mass, logits_TE), mask, logits_TE, dtype)
    if mass_T is not None:
        mask = mass_T > 0
    share_E = _checked_mass(expert_mass, logits_TE)
    return Problem(
        logits_TE=logits_TE,
        cost=cost,
        reg=float(reg),
        token_mask=mask,
        token_mass=mass_T,
        target_E=share_E,
        positive_E=share_E > 0,
    )


def full_precision(logits_TE: Tensor) -> AbstractContextManager[None]:
    """Without autocast: mixed precision is for the model, a product in bfloat16 would spoil the column sums."""
    # The meta device has none.
    return nullcontext() if logits_TE.is_meta else torch.autocast(logits_TE.device.type, enabled=False)


def starting_potentials(problem: Problem, init: Tensor | None) -> Tensor | None:
    """`init` as potentials (E,) float64 to start from, 0 where it is not finite; None where there is none."""
    init = plain("init", init, problem.logits_TE)
    if init is None:
        return None
    if not isinstance(init, Tensor):
        raise TypeError(f"init must be a tensor of shape (E,), got {type(init).__name__}; pass plan.potentials")
    _refuse_complex("init", init)
    _check_length("init", init, len(problem.target_E), "experts", "(E,)")
    given_E = init.detach().to(problem.target_E)
    largest = torch.finfo(problem.dtype).max / 64
    return torch.where(given_E.abs() <= largest, given_E, 0)


def _refuse_complex(name: str, x: Tensor) -> None:
    if x.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}; pass {name}.real")


def _check_length(name: str, x: Tensor, length: int, of: str, wanted: str) -> None:
    if x.shape != (length,):
        raise ValueError(f"{name} has shape {tuple(x.shape)} but there are {length} {of}; it must be {wanted}")


def check_number(name: str, value: object) -> None:
    """Raise unless `value` is a finite number above 0: TypeError for another type, ValueError for another value."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}; of a tensor give .item()")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def check_k(k: int, experts: int) -> None:
    """Raise unless `k` is an int from 1 to the number of experts: TypeError or ValueError."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 1 <= k <= experts:
        raise ValueError(f"k must be 1 to {experts}, the number of experts, got {k}")


def check_logits_form(logits_TE: Tensor) -> Tensor:
    """The logits, `plain`. Raise unless they are a floating-point tensor (T, E) with E ≥ 1."""
    if not isinstance(logits_TE, Tensor):
        raise TypeError(f"logits_TE must be a torch.Tensor, got {type(logits_TE).__name__}")
    logits_TE = plain("logits_TE", logits_TE)
    if logits_TE.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"logits_TE must be floating-point of 16, 32 or 64 bits, got {logits_TE.dtype}; call logits_TE.float()"
        )
    if logits_TE.ndim != 2:
        raise ValueError(
            f"logits_TE must have 2 dimensions (tokens, experts), got shape {tuple(logits_TE.shape)}; "
            "flatten batch and sequence first: logits.flatten(0, -2)"
        )
    if logits_TE.shape[1] == 0:
        raise ValueError(f"logits_TE must have at least one expert, got shape {tuple(logits_TE.shape)}")
    return logits_TE


def _check_reg(reg: float, dtype: torch.dtype) -> None:
    check_number("reg", reg)
    lowest, highest = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 1024
    if not lowest <= reg <= highest:
        raise ValueError(f"reg={reg} is outside {lowest:.3g} to {highest:.3g}, the range that {dtype} can work with")


def _checked_mask(token_mask: Tensor | None, logits_TE: Tensor) -> Tensor | None:
    if token_mask is None:
        return None
    if not isinstance(token_mask, Tensor) or token_mask.dtype != torch.bool:
        kind = token_mask.dtype if isinstance(token_mask, Tensor) else type(token_mask).__name__
        raise TypeError(f"token_mask must be a bool tensor (True = real token), got {kind}; call token_mask.bool()")
    _check_length("token_mask", token_mask, logits_TE.shape[0], "tokens", "(T,): flatten it like the logits")
    return token_mask.to(logits_TE.device)


def _checked_token_mass(
    token_mass: Tensor | None, mask: Tensor | None, logits_TE: Tensor, dtype: torch.dtype
) -> Tensor | None:
    if token_mass is None:
        return None
    if not isinstance(token_mass, Tensor):
        raise TypeError(f"token_mass must be a tensor of shape (T,), got {type(token_mass).__name__}")
    _refuse_complex("token_mass", token_mass)
    _check_length("token_mass", token_mass, logits_TE.shape[0], "tokens", "(T,)")
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
    mass_T = token_mass.detach().to(logits_TE.device, dtype)
    return mass_T if mask is None else torch.where(mask, mass_T, 0)


def as_masses(expert_mass: Tensor | Sequence[float], logits_TE: Tensor) -> Tensor:
    """Relative capacities as a `plain` tensor.

    Raises:
        TypeError: no real numbers.
    """
    if isinstance(expert_mass, Tensor):
        _refuse_complex("expert_mass", expert_mass)
        return plain("expert_mass", expert_mass, logits_TE)
    try:
        if np.iscomplexobj(expert_mass):  # torch would drop the imaginary parts
            raise TypeError("complex numbers")
        return torch.tensor(expert_mass, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"expert_mass must be a tensor or a sequence of numbers, got {reprlib.repr(expert_mass)} ({error}); pass "
            "one relative capacity for each expert"
        ) from None


def _checked_mass(expert_mass: Tensor | Sequence[float] | None, logits_TE: Tensor) -> Tensor:
    """The share of the tokens for each expert: (E,) float64 (float32 where a device has no other), sums to 1."""
    experts, device = logits_TE.shape[1], logits_TE.device
    dtype = wide_dtype(device)
    if expert_mass is None:
        return torch.full((experts,), 1 / experts, dtype=dtype, device=device)
    mass_E = as_masses(expert_mass, logits_TE)
    # Before any arithmetic: a quotient in bfloat16 would be another target.
    mass_E = mass_E.detach().to(wide_dtype(mass_E.device))
    _check_length("expert_mass", mass_E, experts, "experts", "(E,), one relative capacity for each expert")
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
