"""What is true, in float64: the error of a plan, of potentials, and of every iteration of plain Sinkhorn."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .clock import MOST_ITERATIONS

CHUNK = 1 << 17
"""Elements worked on at once: one MiB of float64 stays in the cache."""


def plan_error(plan_TE: Tensor) -> float:
    """Largest relative deviation of a row or column sum, NaN included, of a plan of any total mass."""
    tokens, experts = plan_TE.shape
    rows_T, columns_E = plan_TE.sum(dim=1, dtype=torch.float64), plan_TE.sum(dim=0, dtype=torch.float64)
    mass = columns_E.sum()
    deviations = torch.cat([rows_T * (tokens / mass) - 1, columns_E * (experts / mass) - 1])
    error = float(deviations.abs().max())
    return error if math.isfinite(error) else math.nan


def potentials_error(logits_TE: Tensor, cost: str, reg: float, potentials_E: Tensor) -> float:
    """Largest relative deviation of a column sum of softmax((C + g) / ξ), all of it in float64."""
    tokens, experts = logits_TE.shape
    potentials_E = potentials_E.double()
    columns_E = torch.zeros(experts, dtype=torch.float64)
    for chunk_TE in logits_TE.split(max(1, CHUNK // experts)):
        cost_TE = chunk_TE.double() if cost == "linear" else chunk_TE.double().softmax(dim=1)
        shifted_TE = cost_TE.add_(potentials_E)
        shifted_TE -= shifted_TE.amax(dim=1, keepdim=True)
        columns_E += shifted_TE.div_(reg).softmax(dim=1).sum(dim=0)
    return float((columns_E * (experts / tokens) - 1).abs().max())


class Count(NamedTuple):
    """Iterations to a tolerance, and whether they were counted or extrapolated."""

    iterations: int
    counted: bool


@dataclass(frozen=True)
class Sinkhorn:
    """Errors of plain Sinkhorn: `errors[n - 1]` after n times columns, then rows."""

    errors: list[float]

    def count(self, tol: float) -> Count:
        """Iterations to an error of `tol`.

        The rate at the end of the record is the slowest so far and later ones are slower still: an extrapolated number
        is too small, in favour of the peers.
        """
        for iteration, error in enumerate(self.errors, start=1):
            if error <= tol:
                return Count(iteration, True)
        steps = max(1, len(self.errors) // 4)
        last, before = self.errors[-1], self.errors[-1 - steps] if len(self.errors) > steps else math.inf
        if not last < before < math.inf:
            return Count(len(self.errors) + 1, False)
        return Count(len(self.errors) + math.ceil(steps * math.log(last / tol) / math.log(before / last)), False)


def sinkhorn_errors(cost_TE: Tensor, reg: float, tol: float, seconds: float) -> Sinkhorn:
    """Run plain Sinkhorn from u = 1 in float64 until the error is `tol` or the time is over.

    Scalings v stand in for potentials, with the kernel rebuilt around the potentials before v could overflow: a pass is
    then two products with a stored matrix instead of T · E exponentials.
    """
    begin = time.perf_counter()
    tokens, experts = cost_TE.shape
    target = tokens / experts
    logits_TE = cost_TE.double() / reg
    log_v_E = -logits_TE.logsumexp(dim=0)
    kernel_TE, v_E = _kernel(logits_TE, log_v_E), torch.ones(experts, dtype=torch.float64)
    rows = max(1, CHUNK // experts)
    errors: list[float] = []
    while len(errors) < MOST_ITERATIONS:
        sums_E = torch.zeros_like(v_E)
        for chunk_TE in kernel_TE.split(rows):
            sums_E += (1 / (chunk_TE @ v_E)) @ chunk_TE
        sums_E *= v_E
        errors.append(float((sums_E / target - 1).abs().max()))
        if errors[-1] <= tol or time.perf_counter() - begin > seconds:
            break
        v_E *= target / sums_E
        if float(v_E.log().abs().max()) > 150:
            log_v_E = log_v_E + v_E.log()
            kernel_TE, v_E = _kernel(logits_TE, log_v_E), torch.ones_like(v_E)
    return Sinkhorn(errors)


def _kernel(logits_TE: Tensor, log_v_E: Tensor) -> Tensor:
    exponents_TE = logits_TE + log_v_E
    exponents_TE -= exponents_TE.amax(dim=1, keepdim=True)
    # e^-600 can grow to e^-300 of its row before the kernel is rebuilt: nothing; denormals would take twice the time.
    return exponents_TE.clamp_(min=-600).exp_()
