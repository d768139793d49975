"""The three kernels, besides the pass, that keep a whole solve on the GPU: guess, begin, step.

    guess   minus the mean and minus the quantile of each column of a sample, in both of which the search may start
    begin   chooses between them and writes the state of the search
    step    what the search does between two passes: reads the sums, writes the potentials that the next pass is to try

The search is a state machine whose state lies in GPU memory: E-vectors of float64 (rows of `vectors`, by the names
below) and float64 numbers. `begin` and `step` are one program each. What they compute is described in
`transport.dual`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Kernels are Triton, which only looks like Python; their types come with the call.
from __future__ import annotations

import math

import triton
import triton.language as tl

from sinkroute.kernels import tuning

__all__ = ["BEST", "COLUMN_ERROR", "DONE", "NUMBERS", "PASSES", "REG", "TRIAL", "VECTORS", "begin", "guess", "step"]

MEMORY = tl.constexpr(tuning.MEMORY)
REACH = tl.constexpr(tuning.REACH)
FAR_BELOW, FAR_ABOVE = tl.constexpr(tuning.FAR_BELOW), tl.constexpr(tuning.FAR_ABOVE)
PATIENCE = tl.constexpr(tuning.PATIENCE)
LOG_ANNEAL = tl.constexpr(math.log(tuning.ANNEAL))
ANNEAL_TOLERANCE, ANNEAL_PASSES = tl.constexpr(tuning.ANNEAL_TOLERANCE), tl.constexpr(tuning.ANNEAL_PASSES)
FLOAT64_EPSILON = tl.constexpr(2.0**-52)

# Rows of `vectors` (VECTORS, E). The pass reads TRIAL. Potentials are −inf, all else is 0 for experts without mass.
TRIAL, POINT, GRADIENT, DIRECTION, BEST, START, STEPS = map(tl.constexpr, range(7))
CHANGES = tl.constexpr(6 + tuning.MEMORY)
VECTORS = 6 + 2 * tuning.MEMORY

# Places in `numbers` (NUMBERS,).
REG = tl.constexpr(0)  # ξ of this descent
DONE = tl.constexpr(1)  # 1: nothing is left to do
BEST_ERROR = tl.constexpr(2)
PASSES = tl.constexpr(3)  # SPENT, rounded up
SPENT = tl.constexpr(4)  # passes, with those over the sample by their share
LAST = tl.constexpr(5)  # the value of SPENT at which this descent ends
TOL = tl.constexpr(6)  # of this descent
PHASE = tl.constexpr(7)
STAGE = tl.constexpr(8)  # of annealing: ξ is 4^STAGE times the one asked for
STAGES = tl.constexpr(9)  # how many annealing takes
FIRST = tl.constexpr(10)  # 1: TRIAL is the first point of a descent
REACH_NOW = tl.constexpr(11)
FRACTION = tl.constexpr(12)  # of DIRECTION, that TRIAL is away from POINT
SLOPE = tl.constexpr(13)  # at POINT, along DIRECTION
CUT = tl.constexpr(14)  # 1: DIRECTION was cut to REACH_NOW
PUSHED = tl.constexpr(15)  # pairs of this descent; pair n lies in row n mod MEMORY
HALVED = tl.constexpr(16)  # the error that the next half is measured against
HALVED_AT = tl.constexpr(17)  # SPENT when it was reached
COLUMN_ERROR = tl.constexpr(18)  # BEST_ERROR, or what float64 cannot tell of (C + g) / ξ where that is more
BENDS = tl.constexpr(19)  # of the pairs
NUMBERS = 19 + tuning.MEMORY

# Values of PHASE, in this order; each is a descent, ANNEAL one for each stage.
WARM, MAIN, ANNEAL, FINAL = map(tl.constexpr, (0.0, 1.0, 2.0, 3.0))


@triton.jit
def guess(
    cost,
    token_mask,
    token_mass,
    target,
    guesses,
    real,
    rows,
    experts,
    row_stride,
    column_stride,
    mask_stride,
    mass_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """guesses (2, E): minus the mean of a column's finite costs (rows, E), and minus its target-share quantile.

    real (1,): how many of the rows count. One program does BLOCK_C columns.
    """
    every_E = tl.arange(0, BLOCK_E)
    total = tl.sum(tl.load(target + every_E, mask=every_E < experts, other=0.0))
    columns_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_C = columns_C < experts
    rows_S = tl.arange(0, BLOCK_S)
    real_S = rows_S < rows
    if token_mask is not None:
        real_S &= tl.load(token_mask + rows_S.to(tl.int64) * mask_stride, mask=real_S, other=0) != 0
    if token_mass is not None:
        real_S &= tl.load(token_mass + rows_S.to(tl.int64) * mass_stride, mask=real_S, other=0.0) > 0
    count = tl.sum(real_S.to(tl.int32)).to(tl.float64)
    at_SC = rows_S.to(tl.int64)[:, None] * row_stride + columns_C.to(tl.int64)[None, :] * column_stride
    cost_SC = tl.load(cost + at_SC, mask=real_S[:, None] & inside_C[None, :], other=float("-inf")).to(tl.float32)
    finite_SC = tl.abs(cost_SC) < float("inf")
    sum_C = tl.sum(tl.where(finite_SC, cost_SC, 0.0).to(tl.float64), axis=0)
    mean_C = sum_C / tl.maximum(tl.sum(finite_SC.to(tl.int32), axis=0), 1)
    # The rank-th largest, bit by bit: the largest key that at least `rank` keys reach. Keys are ordered like the costs.
    rank_C = tl.floor(tl.load(target + columns_C, mask=inside_C, other=0.0) / total * count + 0.5)
    rank_C = tl.maximum(rank_C, 1.0)
    # No `~` of unsigned numbers: the interpreter of Triton 3.7 has none.
    bits_SC = cost_SC.to(tl.uint32, bitcast=True)
    keys_SC = tl.where(bits_SC >= 0x80000000, bits_SC ^ 0xFFFFFFFF, bits_SC | 0x80000000)
    key_C = tl.zeros((BLOCK_C,), tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate_C = key_C | bit
        reached_C = tl.sum((keys_SC >= candidate_C[None, :]).to(tl.int32), axis=0)
        key_C = tl.where(reached_C.to(tl.float64) >= rank_C, candidate_C, key_C)
        bit = bit >> 1
    quantile_C = (
        tl.where(key_C >= 0x80000000, key_C ^ 0x80000000, key_C ^ 0xFFFFFFFF)
        .to(tl.float32, bitcast=True)
        .to(tl.float64)
    )
    quantile_C = tl.where(tl.abs(quantile_C) < float("inf"), quantile_C, mean_C)
    tl.store(guesses + columns_C, -mean_C, mask=inside_C)
    tl.store(guesses + experts + columns_C, -quantile_C, mask=inside_C)
    tl.store(real, count, mask=tl.program_id(0) == 0)


@triton.jit
def _total(partials, programs, experts, columns_E, BLOCK_P: tl.constexpr):
    """Sums and squares, (E,) float64 each, of partials (programs, 2, E), in a fixed order."""
    sums_E = tl.zeros(columns_E.shape, tl.float64)
    squares_E = tl.zeros(columns_E.shape, tl.float64)
    for first in range(0, programs, BLOCK_P):
        programs_P = first + tl.arange(0, BLOCK_P)
        wanted_PE = (programs_P < programs)[:, None] & (columns_E < experts)[None, :]
        at_PE = partials + programs_P[:, None] * 2 * experts + columns_E[None, :]
        # Both loads before both sums: one program alone waits long for memory.
        sums_PE = tl.load(at_PE, mask=wanted_PE, other=0.0)
        squares_PE = tl.load(at_PE + experts, mask=wanted_PE, other=0.0)
        sums_E += tl.sum(sums_PE.to(tl.float64), axis=0)
        squares_E += tl.sum(squares_PE.to(tl.float64), axis=0)
    return sums_E, squares_E


@triton.jit
def _row(vectors, row, experts, columns_E):
    """Where the numbers of a row of `vectors` lie."""
    return vectors + experts * row + columns_E


@triton.jit
def _level(x_E, active_E):
    """x minus its mean over the experts in `active_E`, 0 for the others."""
    mean = tl.sum(tl.where(active_E, x_E, 0.0)) / tl.maximum(tl.sum(active_E.to(tl.int32)), 1)
    return tl.where(active_E, x_E - mean, 0.0)


@triton.jit
def _distance(sums_E, target_E):
    """The largest |log| of an expert's share of the sums over its share of the target."""
    share_E = sums_E / tl.sum(tl.where(target_E > 0, sums_E, 0.0)) * tl.sum(target_E)
    log_E = tl.log(tl.maximum(share_E / target_E, 1e-30))
    return tl.max(tl.where(target_E > 0, tl.abs(log_E), 0.0))


@triton.jit
def begin(
    guesses,
    by_mean,
    by_quantile,
    init,
    target,
    positive,
    vectors,
    numbers,
    programs,
    experts,
    spent: tl.float64,
    reg: tl.float64,
    tol: tl.float64,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The state before the first pass: at `init`, if any, else at the better guess.

    by_mean and by_quantile: partials (programs, 2, E) of the sample at the guesses; None to take the quantile unseen.
    """
    columns_E, places = tl.arange(0, BLOCK_E), tl.arange(0, 32)
    inside_E = columns_E < experts
    target_E = tl.load(target + columns_E, mask=inside_E, other=0.0)
    positive_E = tl.load(positive + columns_E, mask=inside_E, other=0) != 0
    mean_E = tl.load(guesses + columns_E, mask=inside_E, other=0.0)
    start_E = tl.load(guesses + experts + columns_E, mask=inside_E, other=0.0)
    # How far apart the costs of an expert are: at a ξ like this all is easy.
    spread = tl.max(tl.where(target_E > 0, mean_E - start_E, 0.0))
    if by_mean is not None:
        mean_sums_E, _ = _total(by_mean, programs, experts, columns_E, BLOCK_P)
        quantile_sums_E, _ = _total(by_quantile, programs, experts, columns_E, BLOCK_P)
        by_quantile_off, by_mean_off = _distance(quantile_sums_E, target_E), _distance(mean_sums_E, target_E)
        start_E = tl.where(by_quantile_off <= by_mean_off, start_E, mean_E)
    start_E = tl.where(positive_E, _level(start_E, positive_E), float("-inf"))
    tl.store(_row(vectors, START, experts, columns_E), start_E, mask=inside_E)
    trial_E = start_E
    phase = tl.full((), MAIN, tl.float64)
    if init is not None:
        init_E = tl.load(init + columns_E, mask=inside_E, other=0.0)
        trial_E = tl.where(positive_E, _level(init_E, positive_E), float("-inf"))
        phase = tl.full((), WARM, tl.float64)
    tl.store(_row(vectors, TRIAL, experts, columns_E), trial_E, mask=inside_E)
    tl.store(_row(vectors, BEST, experts, columns_E), trial_E, mask=inside_E)
    xi, spent_now = tl.full((), reg, tl.float64), tl.full((), spent, tl.float64)
    stages = tl.maximum(tl.ceil(tl.log(tl.maximum(spread / xi, 1.0)) / LOG_ANNEAL) - 1, 0.0)
    state = tl.where(places == REG, xi, 0.0)
    state = tl.where(places == TOL, tl.full((), tol, tl.float64), state)
    state = tl.where((places == BEST_ERROR) | (places == COLUMN_ERROR), float("inf"), state)
    state = tl.where(places == SPENT, spent_now, state)
    state = tl.where(places == LAST, float("inf"), state)
    state = tl.where(places == PHASE, phase, state)
    state = tl.where(places == STAGES, stages, state)
    state = tl.where(places == FIRST, 1.0, state)
    tl.store(numbers + places, state, mask=places < BENDS)


@triton.jit
def _lbfgs(gradient_E, inverse_E, vectors, numbers, pushed, experts, columns_E):
    """−H ∇F by the two-loop recursion over the last MEMORY of `pushed` pairs, from H₀ = γ diag(inverse)."""
    inside_E = columns_E < experts
    places = tl.arange(0, 16)
    weights = tl.zeros((16,), tl.float64)
    q_E = gradient_E
    count = tl.minimum(pushed, MEMORY)
    for back in range(count):
        place = (pushed - 1 - back) % MEMORY
        step_E = tl.load(_row(vectors, place + STEPS, experts, columns_E), mask=inside_E, other=0.0)
        change_E = tl.load(_row(vectors, place + CHANGES, experts, columns_E), mask=inside_E, other=0.0)
        weight = tl.sum(step_E * q_E) / tl.load(numbers + BENDS + place)
        weights = tl.where(places == place, weight, weights)
        q_E -= weight * change_E
    if pushed > 0:
        newest = (pushed - 1) % MEMORY
        change_E = tl.load(_row(vectors, newest + CHANGES, experts, columns_E), mask=inside_E, other=0.0)
        scale = tl.load(numbers + BENDS + newest) / tl.sum(change_E * inverse_E * change_E)
        inverse_E = inverse_E * scale
    q_E *= inverse_E
    for ahead in range(count):
        place = (pushed - count + ahead) % MEMORY
        step_E = tl.load(_row(vectors, place + STEPS, experts, columns_E), mask=inside_E, other=0.0)
        change_E = tl.load(_row(vectors, place + CHANGES, experts, columns_E), mask=inside_E, other=0.0)
        weight = tl.sum(tl.where(places == place, weights, 0.0))
        q_E += (weight - tl.sum(change_E * q_E) / tl.load(numbers + BENDS + place)) * step_E
    return -q_E


@triton.jit
def _start_descent(phase, stage, vectors, numbers, spent, experts, columns_E, reg, tol):
    """The state at the first point of the descent after `phase`, wherever that starts."""
    stages = tl.load(numbers + STAGES)
    into_anneal = ((phase == MAIN) & (stages > 0)) | ((phase == ANNEAL) & (stage > 1))
    next_phase = tl.where(phase == WARM, MAIN, tl.where(into_anneal, ANNEAL, FINAL))
    next_stage = tl.where(into_anneal, tl.where(phase == MAIN, stages, stage - 1), 0.0)
    # Without annealing, the last descent goes on from the best.
    row = tl.where(phase == ANNEAL, POINT, tl.where((phase == WARM) | into_anneal, START, BEST))
    inside_E = columns_E < experts
    from_E = tl.load(_row(vectors, row, experts, columns_E), mask=inside_E, other=0.0)
    tl.store(_row(vectors, TRIAL, experts, columns_E), from_E, mask=inside_E)
    tl.store(numbers + PHASE, next_phase)
    tl.store(numbers + STAGE, next_stage)
    tl.store(numbers + REG, tl.exp(next_stage * LOG_ANNEAL) * reg)
    tl.store(numbers + TOL, tl.where(into_anneal, ANNEAL_TOLERANCE, tol))
    tl.store(numbers + LAST, tl.where(into_anneal, spent + ANNEAL_PASSES, float("inf")))
    tl.store(numbers + FIRST, 1.0)


@triton.jit
def step(
    partials,
    target,
    vectors,
    numbers,
    programs,
    experts,
    reg: tl.float64,
    tol: tl.float64,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """From the sums at TRIAL, partials (programs, 2, E), to the next TRIAL, or DONE."""
    if tl.load(numbers + DONE) != 0:
        return
    columns_E = tl.arange(0, BLOCK_E)
    inside_E = columns_E < experts
    target_E = tl.load(target + columns_E, mask=inside_E, other=0.0)
    trial_E = tl.load(_row(vectors, TRIAL, experts, columns_E), mask=inside_E, other=0.0)
    point_E = tl.load(_row(vectors, POINT, experts, columns_E), mask=inside_E, other=0.0)
    gradient_E = tl.load(_row(vectors, GRADIENT, experts, columns_E), mask=inside_E, other=0.0)
    direction_E = tl.load(_row(vectors, DIRECTION, experts, columns_E), mask=inside_E, other=0.0)
    xi, descent_tol = tl.load(numbers + REG), tl.load(numbers + TOL)
    best_error, spent, last = tl.load(numbers + BEST_ERROR), tl.load(numbers + SPENT) + 1, tl.load(numbers + LAST)
    phase, stage = tl.load(numbers + PHASE), tl.load(numbers + STAGE)
    reach, fraction = tl.load(numbers + REACH_NOW), tl.load(numbers + FRACTION)
    slope, cut = tl.load(numbers + SLOPE), tl.load(numbers + CUT)
    halved, halved_at = tl.load(numbers + HALVED), tl.load(numbers + HALVED_AT)
    pushed, is_first = tl.load(numbers + PUSHED).to(tl.int32), tl.load(numbers + FIRST) != 0
    sums_E, squares_E = _total(partials, programs, experts, columns_E, BLOCK_P)
    # Threads may hold copies of the same number: none may write the state while another has yet to read it.
    tl.debug_barrier()

    active_E = target_E > 0
    unit = tl.sum(target_E) / tl.maximum(tl.sum(active_E.to(tl.int32)), 1)
    ratios_E = tl.where(active_E, sums_E / target_E, 1.0)
    off_E = tl.abs(ratios_E - 1)
    # A maximum passes over NaN; bad logits must not look balanced.
    error = tl.max(tl.where(off_E == off_E, off_E, float("inf")))
    lowest, highest = tl.min(ratios_E), tl.max(ratios_E)
    trial_gradient_E = tl.where(active_E, (sums_E - target_E) / unit, 0.0)
    if (stage == 0) & ((error < best_error) | (best_error == float("inf"))):
        best_error = error
        largest = tl.max(tl.where(active_E, tl.abs(trial_E), 0.0))
        tl.store(numbers + BEST_ERROR, error)
        tl.store(numbers + COLUMN_ERROR, tl.maximum(error, largest * (4 * FLOAT64_EPSILON) / xi))
        tl.store(_row(vectors, BEST, experts, columns_E), trial_E, mask=inside_E)

    moved = not is_first
    pushed = tl.where(moved, pushed, 0)
    reach = tl.where(moved, reach, xi * REACH)
    step_E, change_E = fraction * direction_E, trial_gradient_E - gradient_E
    bend = tl.sum(step_E * change_E)
    if moved & (bend > 1e-12 * tl.sqrt(tl.sum(step_E * step_E) * tl.sum(change_E * change_E))):
        place = pushed % MEMORY
        tl.store(_row(vectors, place + STEPS, experts, columns_E), step_E, mask=inside_E)
        tl.store(_row(vectors, place + CHANGES, experts, columns_E), change_E, mask=inside_E)
        tl.store(numbers + BENDS + place, bend)
        pushed += 1
    trial_slope = tl.sum(trial_gradient_E * direction_E)
    overshot = moved & (trial_slope > -0.9 * slope) & (error > descent_tol) & (spent + 1 <= last)
    if overshot:
        # To where the slope would vanish if it were linear.
        fraction *= tl.maximum(0.1, slope / (slope - trial_slope))
        reach = tl.maximum(reach / 2, xi)
        tl.store(_row(vectors, TRIAL, experts, columns_E), point_E + fraction * direction_E, mask=inside_E)
    elif moved & (cut != 0) & (trial_slope < 0.5 * slope):
        reach *= 2
    # The pairs are read again below, by other threads than wrote them.
    tl.debug_barrier()
    tl.store(numbers + SPENT, spent)
    tl.store(numbers + PASSES, tl.ceil(spent - 1e-9))
    tl.store(numbers + FIRST, 0.0)

    if not overshot:
        bad_start = is_first & (phase == WARM) & ((highest > FAR_ABOVE) | (lowest * FAR_ABOVE < 1))
        if is_first | (error <= halved / 2):
            halved, halved_at = error, spent
        stalled = (phase <= MAIN) & (spent - halved_at >= PATIENCE)
        ended = bad_start | stalled | (spent + 1 > last) | (error <= descent_tol) | (error == float("inf"))
        if not ended:
            if (lowest < FAR_BELOW) | (highest > FAR_ABOVE):
                direction_E = -xi * tl.log(tl.maximum(ratios_E, 1e-30))
            else:
                curvature_E = tl.maximum(sums_E - squares_E, 1e-3 * tl.maximum(sums_E, 1e-30)) / (unit * xi)
                direction_E = _lbfgs(trial_gradient_E, 1 / curvature_E, vectors, numbers, pushed, experts, columns_E)
            direction_E = _level(direction_E, active_E)
            slope = tl.sum(trial_gradient_E * direction_E)
            if not (slope < 0):
                pushed *= 0
                direction_E = _level(-xi * trial_gradient_E, active_E)
                slope = tl.sum(trial_gradient_E * direction_E)
            ended = not (slope < 0)
        # The point of a descent that ends is where annealing goes on.
        tl.store(_row(vectors, POINT, experts, columns_E), trial_E, mask=inside_E)
        if ended:
            if (best_error <= tol) | (phase == FINAL):
                tl.store(numbers + DONE, 1.0)
            else:
                tl.debug_barrier()
                _start_descent(phase, stage, vectors, numbers, spent, experts, columns_E, reg, tol)
        else:
            length = tl.max(tl.abs(direction_E))
            shrink = tl.minimum(1.0, reach / length)
            direction_E *= shrink
            slope *= shrink
            cut = (length > reach).to(tl.float64)
            fraction = tl.full((), 1.0, tl.float64)
            tl.store(_row(vectors, GRADIENT, experts, columns_E), trial_gradient_E, mask=inside_E)
            tl.store(_row(vectors, DIRECTION, experts, columns_E), direction_E, mask=inside_E)
            tl.store(_row(vectors, TRIAL, experts, columns_E), trial_E + direction_E, mask=inside_E)
    tl.store(numbers + REACH_NOW, reach)
    tl.store(numbers + FRACTION, fraction)
    tl.store(numbers + SLOPE, slope)
    tl.store(numbers + CUT, cut)
    tl.store(numbers + HALVED, halved)
    tl.store(numbers + HALVED_AT, halved_at)
    tl.store(numbers + PUSHED, pushed.to(tl.float64))
