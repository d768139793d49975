"""The solve of `dual` on a GPU: the host launches a fixed number of passes and steps and reads nothing back.

Every pass is one kernel (`passes.fused`), everything between two passes another (`device_kernels.step`), and what is
found stays in GPU memory. Once the search is done the kernels still to come return at once; that is why the default
limit is small. With ranks, the sums go through `problem.reduce` in between. A CUDA graph may hold all of it.
"""

from __future__ import annotations

import importlib.util
import math
import warnings

import torch
from torch import Tensor

from sinkroute.transport.problem import Problem, Solution

__all__ = ["MAX_PASSES", "device_dual", "served_by_triton", "serves", "without_triton"]

MAX_PASSES = 20
MAX_EXPERTS = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUMBERS_PER_TILE = 16384  # in the kernels here
WARPS = 8


_failed = False


def without_triton(error: Exception) -> None:
    """Leave everything to torch from now on in this process, and say why."""
    global _failed
    _failed = True
    warnings.warn(
        f"the GPU kernels of sinkroute cannot be used, torch does the work, more slowly: {error!r}. Triton needs a C "
        "compiler at run time and an NVIDIA GPU of compute capability 8.0 or newer",
        RuntimeWarning,
        stacklevel=3,
    )


def served_by_triton(scores_TE: Tensor) -> bool:
    """Whether the Triton kernels can read these scores. On a CPU, by Triton's interpreter, they run for tests only."""
    return (
        scores_TE.is_cuda
        and not _failed
        and scores_TE.dtype in DTYPES
        and scores_TE.shape[1] <= MAX_EXPERTS
        and importlib.util.find_spec("triton") is not None
    )


def serves(problem: Problem) -> bool:
    """Whether `device_dual` can do the problem."""
    return served_by_triton(problem.scores_TE)


def device_dual(problem: Problem, *, tol: float, max_passes: int | None, init_E: Tensor | None) -> Solution:
    """`dual` without a wait: in at most 20 passes by default; column error and passes are 0-d tensors on the device."""
    # Triton comes with torch for GPUs only.
    from sinkroute.transport import device_kernels as kernels
    from sinkroute.transport import dual as host
    from sinkroute.transport.passes.fused import PROGRAMS, FusedPass, block_of

    limit = MAX_PASSES if max_passes is None else max_passes
    scores_TE, target_E = problem.scores_TE, problem.target_E
    tokens, experts = scores_TE.shape
    sample_rows = max(host.SAMPLE_AT_LEAST, host.SAMPLE_PER_EXPERT * experts)
    sample = problem.every(max(1, math.ceil(tokens / sample_rows)))
    # Ranks hold different numbers of tokens but must launch alike: there the two passes over the sample count in full.
    share = sample.scores_TE.shape[0] / max(tokens, 1) if problem.reduce is None else 1.0
    compare = 1 + 2 * share <= limit
    spent = 2 * share if compare else 0.0

    block_E = block_of(experts)
    block_P = min(PROGRAMS, NUMBERS_PER_TILE // block_E)
    vectors = target_E.new_empty(kernels.VECTORS, experts)
    numbers = target_E.new_empty(kernels.NUMBERS)
    reg, done, trial_E = numbers[kernels.REG.value :], numbers[kernels.DONE.value :], vectors[kernels.TRIAL.value]
    asked = {"reg": problem.reg, "tol": float(tol)}
    shape = {"experts": experts, "BLOCK_P": block_P, "BLOCK_E": block_E, "num_warps": WARPS}

    def over_ranks(partials_P2E: Tensor) -> Tensor:
        if problem.reduce is None:
            return partials_P2E
        return problem.reduce(partials_P2E.sum(dim=0, dtype=target_E.dtype))[None]

    with torch.cuda.device_of(scores_TE):
        guesses_2E = _guesses(sample)
        by_mean = by_quantile = None
        programs = 0
        if compare:
            rows = FusedPass(sample)
            asked_reg = torch.full_like(target_E[:1], problem.reg)
            masked_2E = torch.where(problem.positive_E, guesses_2E, -math.inf)
            by_mean, by_quantile = (over_ranks(rows.column_sums(guess_E, asked_reg)) for guess_E in masked_2E)
            programs = len(by_mean)
        kernels.begin[(1,)](
            guesses_2E,
            by_mean,
            by_quantile,
            None if init_E is None else init_E.to(target_E).contiguous(),
            target_E,
            problem.positive_E.view(torch.uint8),
            vectors,
            numbers,
            programs=programs,
            spent=spent,
            **asked,
            **shape,
        )
        rows = FusedPass(problem)
        for _ in range(math.floor(limit - spent + 1e-9)):
            partials = over_ranks(rows.column_sums(trial_E, reg, done))
            kernels.step[(1,)](partials, target_E, vectors, numbers, programs=len(partials), **asked, **shape)
    return Solution(vectors[kernels.BEST.value], numbers[kernels.COLUMN_ERROR.value], numbers[kernels.PASSES.value])


def _guesses(sample: Problem) -> Tensor:
    """(2, E) float64: minus the means and minus the quantiles of the columns of the sample, averaged over the ranks."""
    from sinkroute.transport import device_kernels as kernels
    from sinkroute.transport.passes.fused import block_of

    # The softmax cost is a matrix here, of the sample only.
    cost_SE = sample.scores_TE if sample.cost == "linear" else sample.cost_TE()
    rows, experts = cost_SE.shape
    guesses_2E, real = sample.target_E.new_empty(2, experts), sample.target_E.new_empty(1)
    mask, mass = sample.token_mask, sample.token_mass
    block_S, block_E = block_of(rows), block_of(experts)
    block_C = max(1, min(block_E, NUMBERS_PER_TILE // 2 // block_S))
    kernels.guess[(math.ceil(experts / block_C),)](
        cost_SE,
        None if mask is None else mask.view(torch.uint8),
        mass,
        sample.target_E,
        guesses_2E,
        real,
        rows,
        experts,
        *cost_SE.stride(),
        0 if mask is None else mask.stride(0),
        0 if mass is None else mass.stride(0),
        BLOCK_S=block_S,
        BLOCK_C=block_C,
        BLOCK_E=block_E,
        num_warps=WARPS,
    )
    if sample.reduce is None:
        return guesses_2E
    # Every rank has its own sample: take the average guess, weighted by real rows.
    weighted_3E = sample.reduce(torch.cat([guesses_2E * real, real.expand(1, experts)]))
    return weighted_3E[:2] / weighted_3E[2].clamp(min=1)
