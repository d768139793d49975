"""A pass on a GPU: one Triton kernel that reads every logit once and writes nothing but sums.

Programs, one to a multiprocessor, go through tiles of rows and keep their sums in registers; what they write,
(programs, 2, E), is added in a fixed order by whoever reads it. No atomics: the same bits at every run.

The shift (C + g) / ξ must not cost digits where |C| is 10⁴ ξ and more, and float64 for every logit would take longer
than the memory. So g travels as two float32, and what float32 loses of C + g is put back once the row's maximum is off
(Dekker's Fast2Sum). For float64 logits the same code runs in float64.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Kernels are Triton, which only looks like Python; their types come with the call.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkroute.kernels.rows import Rows

__all__ = ["MAX_K", "PROGRAMS", "FusedPass", "block_of", "fused_topk"]

PROGRAMS = 128  # at most, and one to a multiprocessor; more would make their sums long to add up
BYTES_PER_TILE = 32768  # of logits in the working dtype: 16 float32 a thread, and room for three tiles on their way
WARPS = 16
MAX_K = 16
NUMBERS_PER_TOPK_TILE, TOPK_WARPS = 2048, 4  # little work a program: many of them, to hide the latency of the sweeps

LN2 = tl.constexpr(0.6931471805599453)
FORBIDDEN = tl.constexpr(-3e38)  # stands for −inf where −inf has to be told from something else


@triton.jit
def _cost_tile(logits, rows_R, columns_E, real_R, experts, row_stride, column_stride, SOFTMAX: tl.constexpr, DTYPE):
    """C (R, E) of the rows in DTYPE, from logits of 0 where a row is not real."""
    inside_RE = real_R[:, None] & (columns_E < experts)[None, :]
    at_RE = rows_R.to(tl.int64)[:, None] * row_stride + columns_E.to(tl.int64)[None, :] * column_stride
    cost_RE = tl.load(logits + at_RE, mask=inside_RE, other=0.0).to(DTYPE)
    if SOFTMAX:
        logit_RE = tl.where((columns_E < experts)[None, :], cost_RE, float("-inf"))
        e_RE = tl.exp2((logit_RE - tl.max(logit_RE, axis=1)[:, None]) / LN2)
        # A forbidden expert stays forbidden: its softmax, 0, would be a cost like another.
        cost_RE = tl.where(logit_RE == float("-inf"), logit_RE, e_RE / tl.sum(e_RE, axis=1)[:, None])
    return cost_RE


@triton.jit
def _split_potentials(potentials, columns_E, experts, reg, DTYPE):
    """g (E,), float64, as the sum of two DTYPE: a multiple of a power of 2 near reg, and the rest; −inf in padding."""
    wide_E = tl.load(potentials + columns_E, mask=columns_E < experts, other=float("-inf"))
    unit = (reg.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    high_E = (tl.floor(wide_E * (1 / unit) + 0.5) * unit).to(DTYPE)
    rest_E = wide_E - high_E.to(tl.float64)
    return high_E, tl.where(wide_E == float("-inf"), 0.0, rest_E).to(DTYPE)


@triton.jit
def _above_top(cost_RE, high_E, low_E, scale):
    """C + g minus its row maximum, times scale (R, E), to the last digit near the maximum."""
    sum_RE = cost_RE + high_E[None, :]
    # What rounding took is exact although C may be larger than g, because g is a multiple of C's last digit.
    lost_RE = cost_RE - (sum_RE - high_E[None, :])
    # NaN where C or g is −inf: no `maximum`, which takes NaN, not the number, in the interpreter of Triton before 3.9.
    # Where C is NaN or +inf, the difference below is NaN too.
    rest_RE = lost_RE * scale + (low_E * scale)[None, :]
    rest_RE = tl.where(rest_RE > FORBIDDEN, rest_RE, FORBIDDEN)
    above_RE = (sum_RE - tl.max(sum_RE, axis=1)[:, None]) * scale + rest_RE
    # The maximum of sums is as coarse as they are; over a small reg what is left of it would overflow.
    return above_RE - tl.max(above_RE, axis=1)[:, None]


@triton.jit
def _column_sums(
    logits,
    token_mask,
    token_mass,
    potentials,
    reg,
    done,
    partials,
    tokens,
    experts,
    row_stride,
    column_stride,
    mask_stride,
    mass_stride,
    SOFTMAX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """This program's share of Σ_i m_i p_ij and Σ_i m_i p_ij², to partials (programs, 2, E).

    potentials (E,) and reg (1,) are float64; done (1,), if any, says that the sums are no longer wanted.
    """
    if done is not None:  # noqa: SIM102, known when compiled; the other is not
        if tl.load(done) != 0:
            return
    DTYPE: tl.constexpr = partials.dtype.element_ty
    columns_E = tl.arange(0, BLOCK_E)
    xi = tl.load(reg)
    high_E, low_E = _split_potentials(potentials, columns_E, experts, xi, DTYPE)
    inverse = (1 / (xi * LN2)).to(DTYPE)
    sums_RE = tl.zeros((BLOCK_R, BLOCK_E), DTYPE)
    squares_RE = tl.zeros((BLOCK_R, BLOCK_E), DTYPE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, BLOCK_R), tl.num_programs(0), num_stages=3):
        rows_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        real_R = rows_R < tokens
        if token_mask is not None:
            real_R &= tl.load(token_mask + rows_R.to(tl.int64) * mask_stride, mask=real_R, other=0) != 0
        if token_mass is not None:
            mass_R = tl.load(token_mass + rows_R.to(tl.int64) * mass_stride, mask=real_R, other=0.0).to(DTYPE)
            # What a row without mass holds, even NaN, must not reach the sums: 0 · NaN is NaN.
            real_R &= mass_R > 0
        cost_RE = _cost_tile(
            logits, rows_R, columns_E, real_R, experts, row_stride, column_stride, SOFTMAX=SOFTMAX, DTYPE=DTYPE
        )
        e_RE = tl.exp2(_above_top(cost_RE, high_E, low_E, inverse))
        p_RE = e_RE * tl.where(real_R, 1 / tl.sum(e_RE, axis=1), 0.0)[:, None]
        if token_mass is not None:
            share_RE = p_RE * mass_R[:, None]
        else:
            share_RE = p_RE
        sums_RE += share_RE
        squares_RE += share_RE * p_RE
    at_E = partials + tl.program_id(0) * 2 * experts + columns_E
    tl.store(at_E, tl.sum(sums_RE, axis=0), mask=columns_E < experts)
    tl.store(at_E + experts, tl.sum(squares_RE, axis=0), mask=columns_E < experts)


@triton.jit
def _topk(
    logits,
    token_mask,
    token_mass,
    potentials,
    reg: tl.float64,
    weights_out,
    experts_out,
    tokens,
    experts,
    row_stride,
    column_stride,
    mask_stride,
    mass_stride,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """weights_out (tokens, K) and experts_out (tokens, K) of `fused_topk`, in K sweeps over a tile in registers."""
    DTYPE: tl.constexpr = weights_out.dtype.element_ty
    columns_E, places_K = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    rows_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = rows_R < tokens
    real_R = inside_R
    if token_mask is not None:
        real_R &= tl.load(token_mask + rows_R.to(tl.int64) * mask_stride, mask=inside_R, other=0) != 0
    if token_mass is not None:
        mass_R = tl.load(token_mass + rows_R.to(tl.int64) * mass_stride, mask=inside_R, other=0.0).to(DTYPE)
        real_R &= mass_R > 0
    cost_RE = _cost_tile(
        logits, rows_R, columns_E, real_R, experts, row_stride, column_stride, SOFTMAX=SOFTMAX, DTYPE=DTYPE
    )
    xi = tl.full((), reg, tl.float64)
    high_E, low_E = _split_potentials(potentials, columns_E, experts, xi, DTYPE)
    above_RE = _above_top(cost_RE, high_E, low_E, 1.0)
    inverse = (1 / (xi * LN2)).to(DTYPE)
    # Forbidden experts come after all others and before those already taken; NaN is never equal to the largest.
    rest_RE = tl.where(above_RE > FORBIDDEN, above_RE, FORBIDDEN)
    rest_RE = tl.where((columns_E < experts)[None, :], rest_RE, float("-inf"))
    top_RK = tl.full((BLOCK_R, BLOCK_K), float("-inf"), DTYPE)
    best_RK = tl.zeros((BLOCK_R, BLOCK_K), tl.int64)
    for place in tl.static_range(K):
        largest_R, best_R = tl.max(rest_RE, axis=1, return_indices=True)
        here_1K = (places_K == place)[None, :]
        top_RK = tl.where(here_1K, largest_R[:, None], top_RK)
        best_RK = tl.where(here_1K, best_R[:, None].to(tl.int64), best_RK)
        rest_RE = tl.where(columns_E[None, :] == best_R[:, None], float("-inf"), rest_RE)
    if NORMALISE:
        weights_RK = tl.exp2((top_RK - tl.max(top_RK, axis=1)[:, None]) * inverse)
        weights_RK = weights_RK / tl.sum(weights_RK, axis=1)[:, None]
    else:
        weights_RK = tl.exp2(top_RK * inverse) / tl.sum(tl.exp2(above_RE * inverse), axis=1)[:, None]
        if token_mass is not None:
            weights_RK = weights_RK * mass_R[:, None]
    weights_RK = tl.where(real_R[:, None], weights_RK, 0.0)
    best_RK = tl.where(real_R[:, None], best_RK, places_K.to(tl.int64)[None, :])
    at_RK = rows_R.to(tl.int64)[:, None] * K + places_K[None, :]
    wanted_RK = inside_R[:, None] & (places_K < K)[None, :]
    tl.store(weights_out + at_RK, weights_RK, mask=wanted_RK)
    tl.store(experts_out + at_RK, best_RK, mask=wanted_RK)


def block_of(numbers: int) -> int:
    """`numbers` rounded up to a power of 2, at least 2."""
    power: int = triton.next_power_of_2(numbers)
    return max(2, power)


def programs_of(device: torch.device) -> int:
    """How many programs run at once."""
    if device.type != "cuda":
        return PROGRAMS
    return min(PROGRAMS, torch.cuda.get_device_properties(device).multi_processor_count)


class FusedPass:
    """Column sums of one problem's rows by the kernel above; nothing here waits for the GPU.

    float32 exponentials and sums within a program, float64 for float64 logits; see `Pass` for what is summed.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows, (tokens, experts) = rows, rows.logits_TE.shape
        self._block_E = block_of(experts)
        self._block_R = BYTES_PER_TILE // rows.dtype.itemsize // self._block_E
        self._programs = max(1, min(programs_of(rows.logits_TE.device), triton.cdiv(tokens, self._block_R)))
        self._tensors, self._sizes = _arguments(rows)

    def column_sums(self, potentials_E: Tensor, reg: Tensor, done: Tensor | None = None) -> Tensor:
        """(programs, 2, E), to be added over the programs: parts of Σ_i m_i p_ij and Σ_i m_i p_ij².

        NaN where a logit is NaN or +inf, or a whole row −inf. Unspecified where `done` is not 0.

        Args:
            potentials_E: (E,) float64, −inf for an expert without mass.
            reg: 1 number, float64.
            done: 1 number, float64; the kernel returns at once where it is not 0.
        """
        logits_TE = self._rows.logits_TE
        partials_P2E = logits_TE.new_empty((self._programs, 2, logits_TE.shape[1]), dtype=self._rows.dtype)
        with torch.cuda.device_of(logits_TE):
            _column_sums[(self._programs,)](
                *self._tensors,
                potentials_E,
                reg,
                done,
                partials_P2E,
                *self._sizes,
                SOFTMAX=self._rows.cost == "softmax",
                BLOCK_R=self._block_R,
                BLOCK_E=self._block_E,
                num_warps=WARPS,
            )
        return partials_P2E


def fused_topk(rows: Rows, potentials_E: Tensor, reg: float, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Weights (T, K) and experts (T, K) of `Plan.topk`, for k ≤ MAX_K; ties go to the lower expert."""
    tokens, experts = rows.logits_TE.shape
    weights_TK = rows.logits_TE.new_empty((tokens, k), dtype=rows.dtype)
    experts_TK = rows.logits_TE.new_empty((tokens, k), dtype=torch.int64)
    block_E = block_of(experts)
    block_R = max(1, NUMBERS_PER_TOPK_TILE // block_E)
    if tokens == 0:
        return weights_TK, experts_TK
    tensors, sizes = _arguments(rows)
    with torch.cuda.device_of(rows.logits_TE):
        _topk[(triton.cdiv(tokens, block_R),)](
            *tensors,
            potentials_E.double().contiguous(),
            float(reg),
            weights_TK,
            experts_TK,
            *sizes,
            K=k,
            SOFTMAX=rows.cost == "softmax",
            NORMALISE=normalise,
            BLOCK_R=block_R,
            BLOCK_E=block_E,
            BLOCK_K=block_of(k),
            num_warps=TOPK_WARPS,
        )
    return weights_TK, experts_TK


def _arguments(rows: Rows) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """Rows as both kernels take them: logits, mask and mass; then T, E and the strides of all three."""
    logits_TE, mass_T = rows.logits_TE, rows.token_mass
    # A mass of 0 already says that a token is masked.
    mask_T = None if rows.token_mask is None or mass_T is not None else rows.token_mask.view(torch.uint8)
    strides = (0 if x is None else x.stride(0) for x in (mask_T, mass_T))
    return (logits_TE, mask_T, mass_T), (*logits_TE.shape, *logits_TE.stride(), *strides)
