"""The search of `transport.dual` on a GPU: the host launches passes and steps, a fixed number, and reads nothing back.

Every pass is one kernel (`fused`), everything between two passes another (`steps.step`), and what is found stays in GPU
memory. Once the search is done the kernels still to come return at once; that is why the default limit is small. A CUDA
graph may hold all of it.

With ranks, the sums go through `reduce` in between, and a sum costs as much when the search is done: so the host waits
now and then to see whether it is, unless it captures a graph. Of the default limit that makes 4 + 4n calls, n from 1,
and 22 at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sinkroute.kernels import tuning
from sinkroute.kernels.gpu import steps
from sinkroute.kernels.gpu.fused import PROGRAMS, FusedPass, block_of
from sinkroute.kernels.rows import Rows

__all__ = ["MAX_PASSES", "search"]

MAX_PASSES = 20
NUMBERS_PER_TILE = 16384  # in the kernels of `steps`
WARPS = 8
LOOK_EVERY = 4  # passes, over ranks


def search(
    all_rows: Rows,
    target_E: Tensor,
    positive_E: Tensor,
    reg: float,
    *,
    tol: float,
    max_passes: int | None,
    init_E: Tensor | None,
    reduce: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials (E,), their column error and the passes, 0-d tensors on the device; at most 20 passes by default."""
    limit = MAX_PASSES if max_passes is None else max_passes
    tokens, experts = all_rows.logits_TE.shape
    sample_rows = max(tuning.SAMPLE_AT_LEAST, tuning.SAMPLE_PER_EXPERT * experts)
    sample = all_rows.every(max(1, math.ceil(tokens / sample_rows)))
    # Ranks hold different numbers of tokens but must launch alike: there the two passes over the sample count in full.
    share = sample.logits_TE.shape[0] / max(tokens, 1) if reduce is None else 1.0
    compare = 1 + 2 * share <= limit
    spent = 2 * share if compare else 0.0

    block_E = block_of(experts)
    block_P = min(PROGRAMS, NUMBERS_PER_TILE // block_E)
    vectors = target_E.new_empty(steps.VECTORS, experts)
    numbers = target_E.new_empty(steps.NUMBERS)
    reg_now, done, trial_E = numbers[steps.REG.value :], numbers[steps.DONE.value :], vectors[steps.TRIAL.value]
    asked = {"reg": reg, "tol": float(tol)}
    shape = {"experts": experts, "BLOCK_P": block_P, "BLOCK_E": block_E, "num_warps": WARPS}

    def over_ranks(partials_P2E: Tensor) -> Tensor:
        if reduce is None:
            return partials_P2E
        return reduce(partials_P2E.sum(dim=0, dtype=target_E.dtype))[None]

    with torch.cuda.device_of(all_rows.logits_TE):
        guesses_2E = _guesses(sample, target_E, reduce)
        by_mean = by_quantile = None
        programs = 0
        if compare:
            rows = FusedPass(sample)
            asked_reg = torch.full_like(target_E[:1], reg)
            masked_2E = torch.where(positive_E, guesses_2E, -math.inf)
            by_mean, by_quantile = (over_ranks(rows.column_sums(guess_E, asked_reg)) for guess_E in masked_2E)
            programs = len(by_mean)
        steps.begin[(1,)](
            guesses_2E,
            by_mean,
            by_quantile,
            None if init_E is None else init_E.to(target_E).contiguous(),
            target_E,
            positive_E.view(torch.uint8),
            vectors,
            numbers,
            programs=programs,
            spent=spent,
            **asked,
            **shape,
        )
        rows = FusedPass(all_rows)
        for passes in range(math.floor(limit - spent + 1e-9)):
            if reduce is not None and passes and passes % LOOK_EVERY == 0 and _is_done(done):
                break
            partials = over_ranks(rows.column_sums(trial_E, reg_now, done))
            steps.step[(1,)](partials, target_E, vectors, numbers, programs=len(partials), **asked, **shape)
    return vectors[steps.BEST.value], numbers[steps.COLUMN_ERROR.value], numbers[steps.PASSES.value]


def _is_done(done: Tensor) -> bool:
    """Whether the search has ended: the same on all ranks, which have added up the same. A capture cannot look."""
    captures = done.is_cuda and torch.cuda.is_current_stream_capturing()
    return not captures and bool(done[0] != 0)


def _guesses(sample: Rows, target_E: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(2, E) float64: minus the means and minus the quantiles of the columns of the sample, averaged over the ranks."""
    # The softmax cost is a matrix here, of the sample only.
    cost_SE = sample.logits_TE if sample.cost == "linear" else sample.cost_TE()
    rows, experts = cost_SE.shape
    guesses_2E, real = target_E.new_empty(2, experts), target_E.new_empty(1)
    mask, mass = sample.token_mask, sample.token_mass
    block_S, block_E = block_of(rows), block_of(experts)
    block_C = max(1, min(block_E, NUMBERS_PER_TILE // 2 // block_S))
    steps.guess[(math.ceil(experts / block_C),)](
        cost_SE,
        None if mask is None else mask.view(torch.uint8),
        mass,
        target_E,
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
    if reduce is None:
        return guesses_2E
    # Every rank has its own sample: take the average guess, weighted by real rows.
    weighted_3E = reduce(torch.cat([guesses_2E * real, real.expand(1, experts)]))
    return weighted_3E[:2] / weighted_3E[2].clamp(min=1)
