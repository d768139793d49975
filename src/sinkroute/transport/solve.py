"""The entrance: check the problem, run a solver from the registry, wrap what it found into a `Plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sinkroute._errors import unknown_name
from sinkroute.kernels.operations import define, uncompiled
from sinkroute.kernels.rows import wide_dtype, working_dtype
from sinkroute.kernels.storage import has_tangent, is_watched, plain, readable
from sinkroute.transport.checks import (
    as_masses,
    check_logits_form,
    check_number,
    check_problem,
    full_precision,
    make_problem,
    starting_potentials,
)
from sinkroute.transport.dual import dual
from sinkroute.transport.implicit import potentials_of_logits
from sinkroute.transport.naive import naive
from sinkroute.transport.plan import Plan
from sinkroute.transport.problem import Problem, Reduction, Solution
from sinkroute.transport.ranks import over_all_ranks, sum_over_ranks, withdrawn
from sinkroute.transport.sinkhorn import sinkhorn

__all__ = ["AUTO", "SOLVERS", "Solver", "leave", "list_solvers", "solve"]


class Solver(Protocol):
    """A solver: from a problem to a `Solution`, in at most `max_passes` (None: its own default).

    `init_E`, if any, are finite potentials to start from.
    """

    def __call__(self, problem: Problem, *, tol: float, max_passes: int | None, init_E: Tensor | None) -> Solution: ...


SOLVERS: dict[str, Solver] = {"dual": dual, "sinkhorn": sinkhorn, "naive": naive}
AUTO = "dual"


def list_solvers() -> list[str]:
    """Names that `solve` takes as `method`, besides "auto".

    >>> "sinkhorn" in list_solvers()
    True
    """
    return sorted(SOLVERS)


@uncompiled
def solve(
    logits_TE: Tensor,
    reg: float = 0.1,
    cost: str = "linear",
    *,
    token_mask: Tensor | None = None,
    token_mass: Tensor | None = None,
    expert_mass: Tensor | Sequence[float] | None = None,
    method: str = "auto",
    tol: float = 1e-4,
    max_passes: int | None = None,
    init: Tensor | None = None,
    differentiable: bool = False,
    process_group: dist.ProcessGroup | None = None,
    reduce: Reduction | None = None,
) -> Plan:
    """Solve the balanced routing problem of arXiv 2511.08972: every token spends its mass, experts share it as asked.

        argmax <Π, C> − ξ <Π, log Π>   s.t.   Π 1 = token_mass,   Πᵀ 1 = Σ token_mass · expert_mass / Σ expert_mass

    The answer is Π_ij = m_i softmax_j((C_ij + g_j) / ξ) with one potential g_j for each expert. A solver that runs out
    of passes is no error: look at `plan.converged` and `plan.column_error`.

    Args:
        logits_TE: (T, E) in float16, bfloat16, float32 or float64. float64 is worked on in float64, all else in float32
            with float64 potentials and sums. T may be 0, and smaller than E. −inf forbids an expert to a token.
        reg: ξ > 0, the weight of the entropy, in units of the cost. Small is sharp and takes more passes.
        cost: "linear" for C = logits, "softmax" for C = softmax of each row of the logits.
        token_mask: (T,) bool, True = real token. What the logits of the others hold (even NaN) is ignored.
        token_mass: (T,) mass ≥ 0 of each token, for tokens that count more or less than others; None for 1.
        expert_mass: (E,) relative capacities ≥ 0 of any scale, at least one above 0; None for equal ones. An expert
            with 0 gets nothing and potential −inf.
        method: a name of `list_solvers()`, or "auto", which is "dual".
        tol: stop when no column sum is off its target by more than this fraction. "dual" reaches 1e-6 with float32
            logits; the float32 potentials of the other methods set a floor of about 1e-7 · |C| / ξ.
        max_passes: cap on the passes over the logits; None for the method's own: 200 for "dual" (20 on a GPU, where
            no host looks on), 1000 for "sinkhorn", 100 for "naive".
        init: (E,) potentials to start from, such as `plan.potentials` of the step before; entries that are not finite
            start from 0.
        differentiable: True makes `plan.matrix()` and `plan.topk()` differentiable in the logits, by implicit
            differentiation at the solution; twice, on one rank. The gradient's error is that of the column sums times
            a factor that grows as `reg` falls: take `tol=1e-6` at `reg` of 0.01 and below. False: no gradient at all.
        process_group: ranks that hold different tokens of one problem. Column sums and total mass are taken over all
            of them, every rank gets the same potentials and its own rows. A rank may have no tokens. All other
            arguments, and E, must agree between the ranks. With `differentiable` the loss is the sum of the ranks'
            losses, as DistributedDataParallel takes it; every rank must have logits that require a gradient and run
            backward through the plan, with several plans in the same order, or the others wait for it: where a rank's
            loss does not use the plan, add `0 * plan.topk(1)[0].sum()`.
        reduce: instead of `process_group`, the sum over the ranks as a function of yours, for tokens spread over more
            than one group: takes a float64 tensor, returns its sum, the same bits on every rank.

    Returns:
        A `Plan`.

    Raises:
        TypeError: logits, mask, masses, init, reg, tol or max_passes of a wrong type or dtype; a tensor that stands for
            something else, such as a `MaskedTensor` or a `DTensor`.
        NotImplementedError: `process_group` or `reduce` under a tracer or `torch.func`; `differentiable` in
            forward-mode differentiation.
        ValueError: a wrong shape, an unknown name, a number out of range, or logits of a real token that are NaN, +inf
            or all −inf (names the first). Values are checked on the CPU only: a check on an accelerator would make
            the host wait for it; there bad logits give a plan with `converged` False.

    Example:
        >>> import torch
        >>> logits_TE = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 1.0], [3.0, 2.0]])  # all prefer expert 0
        >>> plan = solve(logits_TE, reg=0.5)
        >>> plan.matrix().sum(dim=0).round(decimals=3).tolist()
        [2.0, 2.0]
        >>> bool(plan.converged), bool(plan.column_error <= 1e-4)
        (True, True)
        >>> plan.topk(1)[1].flatten().tolist()
        [0, 0, 1, 1]
    """
    if process_group is not None:
        if reduce is not None:
            raise ValueError("process_group and reduce say the same thing in two ways; give one of them")
        reduce = sum_over_ranks(process_group)
    if reduce is not None and is_watched():
        raise NotImplementedError(
            "process_group and reduce are not for torch.func, torch.jit.trace, make_fx or a dispatch mode: they would "
            "not see what the ranks tell each other; solve outside of it, or for this rank alone"
        )
    name = AUTO if method == "auto" else method
    try:
        logits_TE = check_logits_form(logits_TE)
        if method not in ("auto", *SOLVERS):
            raise unknown_name("method", method, ["auto", *SOLVERS])
        _check_budget(tol, max_passes)
        tol = float(tol)
        mass_E = None if expert_mass is None else as_masses(expert_mass, logits_TE)
        with full_precision(logits_TE):
            alone = check_problem(logits_TE, reg, cost, token_mask, token_mass, mass_E)
            init_E = starting_potentials(alone, init)
        here = readable(alone.logits_TE, alone.token_mask, alone.token_mass, alone.target_E, init_E)
        if reduce is not None and not here:
            raise TypeError(
                f"logits_TE of type {type(logits_TE).__name__} on {logits_TE.device} holds no numbers that ranks could "
                "add up; leave process_group and reduce out, or pass real tensors"
            )
        wants_gradient = differentiable and torch.is_grad_enabled()
        if wants_gradient and has_tangent(logits_TE):
            raise NotImplementedError(
                "differentiable=True gives derivatives by backward only, and logits_TE carries a tangent (forward-mode "
                "differentiation, torch.func.jvp or jacfwd); take torch.func.vjp or jacrev, or differentiable=False"
            )
    except Exception as error:
        if reduce is not None:  # the others wait for this rank
            leave(logits_TE, reduce, error, name, tol=tol, max_passes=max_passes)
        raise
    with full_precision(logits_TE):
        problem = over_all_ranks(alone, reduce)
        with torch.no_grad():
            if here:
                found = _found(problem, name, tol, max_passes, init_E)
            else:
                masks = plain("token_mask", token_mask), plain("token_mass", token_mass)
                asked = (alone.logits_TE, name, problem.reg, cost, *masks, mass_E, init_E, tol, max_passes)
                found = Solution(*torch.ops.sinkroute.solve(*asked))
        with_gradient = wants_gradient and logits_TE.requires_grad
        potentials_E = found.potentials_E
        if with_gradient:
            potentials_E = potentials_of_logits(logits_TE, potentials_E, problem)
    return Plan(
        potentials=potentials_E,
        logits=logits_TE if with_gradient else problem.logits_TE,
        cost_name=cost,
        reg=problem.reg,
        token_mask=problem.token_mask,
        token_mass=problem.token_mass,
        method=name,
        column_error=found.column_error,
        converged=found.column_error <= tol,
        pass_count=found.passes,
    )


def _found(problem: Problem, name: str, tol: float, max_passes: int | None, init_E: Tensor | None) -> Solution:
    if problem.empty:
        zeros_E = torch.zeros_like(problem.target_E).masked_fill(~problem.positive_E, -math.inf)
        return Solution(zeros_E, zeros_E.new_zeros(()), 0)
    return SOLVERS[name](problem, tol=tol, max_passes=max_passes, init_E=init_E)


def leave(
    logits_TE: object,
    reduce: Reduction,
    error: BaseException | None,
    method: str = AUTO,
    *,
    tol: object = None,
    max_passes: object = None,
) -> None:
    """Take part in what the other ranks do in `solve` although this one has nothing to solve; then it may raise.

    Args:
        logits_TE: which this rank was given, whatever they are; an accelerator's tell of its device and of E.
        reduce: as of `solve`.
        error: that this rank is about to raise; on a CPU the others tell it in theirs.
        method, tol, max_passes: as the other ranks have them.
    """
    rest = withdrawn(logits_TE, reduce, error)
    if rest is not None:
        tol = tol if isinstance(tol, float) else 1e-4
        limit = max_passes if isinstance(max_passes, int) else None
        SOLVERS.get(method, dual)(rest, tol=tol, max_passes=limit, init_E=None)


# -- as one operation: for tracers, for `torch.func`, for tensors without values ----------------------------------


def _solve(
    logits_TE: Tensor,
    method: str,
    reg: float,
    cost: str,
    token_mask: Tensor | None,
    token_mass: Tensor | None,
    expert_mass: Tensor | None,
    init: Tensor | None,
    tol: float,
    max_passes: int | None,
) -> tuple[Tensor, ...]:
    problem = make_problem(logits_TE, reg, cost, token_mask, token_mass, expert_mass)
    found = _found(problem, method, tol, max_passes, starting_potentials(problem, init))
    results = found.potentials_E, found.column_error, torch.as_tensor(found.passes, device=logits_TE.device)
    return tuple(x.to(like.dtype) for x, like in zip(results, _solution_like(logits_TE, method), strict=True))


def _solution_like(logits_TE: Tensor, method: str, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(logits_TE.device)
    return (
        logits_TE.new_empty(logits_TE.shape[1], dtype=wide if method == "dual" else working_dtype(logits_TE.dtype)),
        logits_TE.new_empty((), dtype=wide),
        logits_TE.new_empty((), dtype=torch.int64),
    )


define(
    "solve(Tensor logits, str method, float reg, str cost, Tensor? token_mask, Tensor? token_mass, "
    "Tensor? expert_mass, Tensor? init, float tol, int? max_passes) -> (Tensor, Tensor, Tensor)",
    _solve,
    _solution_like,
)


def _check_budget(tol: float, max_passes: int | None) -> None:
    check_number("tol", tol)
    if max_passes is None:
        return
    if isinstance(max_passes, bool) or not isinstance(max_passes, int):
        raise TypeError(f"max_passes must be an int or None, got {type(max_passes).__name__}")
    if max_passes < 1:
        raise ValueError(f"max_passes must be at least 1, got {max_passes}")
