"""The GPU's pass over the logits: on a GPU if there is one, else by Triton's interpreter, which must be asked for."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from sinkroute.kernels.rows import Rows
from sinkroute.transport.checks import make_problem
from sinkroute.transport.problem import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton is imported already, without TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from sinkroute.kernels.gpu.fused import FusedPass, fused_topk  # noqa: E402, the interpreter first

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def problem(logits_TE: Tensor, reg: float, cost: str = "linear", **arguments: object) -> Problem:
    options = {"token_mask": None, "token_mass": None, "expert_mass": None, "reduce": None, **arguments}
    return make_problem(logits_TE, reg, cost, **options)  # type: ignore[arg-type]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def sums(problem: Problem, potentials_E: Tensor) -> np.ndarray:
    partials = FusedPass(problem).column_sums(potentials_E, torch.full_like(problem.target_E[:1], problem.reg))
    return partials.double().sum(dim=0).cpu().numpy()


def reference(logits_TE: Tensor, cost: str, mass_T: np.ndarray, potentials_E: Tensor, reg: float) -> np.ndarray:
    """Sums and squares (2, E) in float64 from the start; rows of mass 0 left out."""
    rows_RE = logits_TE.double().cpu().numpy()[mass_T > 0]
    if cost == "softmax":
        e_RE = np.exp(rows_RE - rows_RE.max(axis=1, keepdims=True))
        rows_RE = np.where(np.isinf(rows_RE), rows_RE, e_RE / e_RE.sum(axis=1, keepdims=True))
    x_RE = (rows_RE + potentials_E.cpu().numpy()) / reg
    p_RE = np.exp(x_RE - x_RE.max(axis=1, keepdims=True))
    p_RE /= p_RE.sum(axis=1, keepdims=True)
    mass_R1 = mass_T[mass_T > 0, None]
    return np.stack([(mass_R1 * p_RE).sum(axis=0), (mass_R1 * p_RE**2).sum(axis=0)])


def check(found: np.ndarray, expected: np.ndarray, relative: float = 1e-6) -> None:
    np.testing.assert_allclose(found, expected, rtol=relative, atol=1e-7 * expected.max())


@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize(
    ("tokens", "experts"),
    [(1, 1), (1, 3), (5, 2), (5, 1000), (100, 7), (100, 16), (1000, 64), (100, 100), (1000, 128), (40, 1024), (0, 4)],
)
def test_sums_and_squares_of_every_shape(tokens: int, experts: int, cost: str) -> None:
    logits_TE, potentials_E = gaussian(tokens, experts), gaussian(experts, seed=1).double()
    expected = reference(logits_TE, cost, np.ones(tokens), potentials_E, 0.5) if tokens else np.zeros((2, experts))
    check(sums(problem(logits_TE, 0.5, cost), potentials_E), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    logits_TE, potentials_E = gaussian(300, 24).to(dtype), gaussian(24, seed=1).double()
    expected = reference(logits_TE, "linear", np.ones(300), potentials_E, 0.3)
    check(sums(problem(logits_TE, 0.3), potentials_E), expected, 1e-13 if dtype == torch.float64 else 1e-6)


def test_rows_split_over_more_programs_than_can_run_at_once() -> None:
    logits_TE, potentials_E = gaussian(1100, 1024), gaussian(1024, seed=1).double()
    partials = FusedPass(problem(logits_TE, 0.5)).column_sums(potentials_E, torch.full_like(potentials_E[:1], 0.5))
    assert len(partials) == 128
    expected = reference(logits_TE, "linear", np.ones(1100), potentials_E, 0.5)
    check(partials.double().sum(dim=0).cpu().numpy(), expected)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_masks_and_masses_hide_what_a_row_holds(cost: str) -> None:
    logits_TE, potentials_E = gaussian(200, 12), gaussian(12, seed=1).double()
    mask = gaussian(200, seed=2) > 0
    mass_T = gaussian(200, seed=3).abs()
    logits_TE[~mask] = float("nan")
    for given, mass in ((None, mask.double()), (mass_T, torch.where(mask, mass_T, 0).double())):
        expected = reference(logits_TE, cost, mass.cpu().numpy(), potentials_E, 0.4)
        check(sums(problem(logits_TE, 0.4, cost, token_mask=mask, token_mass=given), potentials_E), expected)


def test_any_strides() -> None:
    potentials_E = gaussian(20, seed=1).double()
    wide = gaussian(130, 70)
    mask = gaussian(390, seed=2)[::3] > 0
    for logits_TE in (wide[:, 5:25], wide[:, :40:2], gaussian(20, 130).T, wide[:, :1].expand(130, 20)):
        expected = reference(logits_TE, "linear", mask.double().cpu().numpy(), potentials_E, 0.5)
        check(sums(problem(logits_TE, 0.5, token_mask=mask), potentials_E), expected)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_forbidden_experts_and_experts_without_mass(cost: str) -> None:
    logits_TE, potentials_E = gaussian(300, 10), gaussian(10, seed=1).double()
    logits_TE[gaussian(300, 10, seed=2) > 1] = -torch.inf
    logits_TE[:, :2] = gaussian(300, 2, seed=3)
    potentials_E[7] = -torch.inf
    found = sums(problem(logits_TE, 0.5, cost), potentials_E)
    check(found, reference(logits_TE, cost, np.ones(300), potentials_E, 0.5))
    assert (found[:, 7] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_bad_logits_make_every_sum_nan(bad: float | None, cost: str) -> None:
    logits_TE = gaussian(50, 6)
    if bad is None:
        logits_TE[20] = -torch.inf
    else:
        logits_TE[20, 3] = bad
    assert np.isnan(sums(problem(logits_TE, 0.5, cost), gaussian(6, seed=1).double())).all()


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("where", ["columns", "rows", "potentials"])
def test_the_size_of_logits_and_potentials_costs_no_digits(size: float, where: str) -> None:
    logits_TE, potentials_E = gaussian(500, 32), gaussian(32, seed=1).double()
    if where == "columns":  # taken off again by the potentials
        potentials_E = potentials_E * size
        logits_TE = (logits_TE - potentials_E).float()
    elif where == "rows":
        logits_TE = logits_TE + size * gaussian(500, 1, seed=2)
    else:
        potentials_E = potentials_E + size
    expected = reference(logits_TE, "linear", np.ones(500), potentials_E, 1.0)
    np.testing.assert_allclose(sums(problem(logits_TE, 1.0), potentials_E), expected, rtol=1e-6)


@pytest.mark.parametrize("reg", [1e-5, 1e-3, 1.0])
def test_no_mass_is_lost_to_the_size_of_the_logits_over_reg(reg: float) -> None:
    logits_TE, zeros_E = 6e4 + 0.06 * gaussian(40, 4), gaussian(4, seed=1).double() * 1e-3
    np.testing.assert_allclose(sums(problem(logits_TE, reg), zeros_E)[0].sum(), 40, rtol=1e-5)
    weights_TK, _ = fused_topk(Rows(logits_TE, "linear", None, None), zeros_E, reg, 4, False)
    torch.testing.assert_close(weights_TK.sum(1), torch.ones_like(weights_TK[:, 0]))


def test_the_same_bits_at_every_run() -> None:
    logits_TE, potentials_E = gaussian(700, 48), gaussian(48, seed=1).double()
    first = sums(problem(logits_TE, 0.1), potentials_E)
    assert (first == sums(problem(logits_TE, 0.1), potentials_E)).all()


def test_nothing_is_done_once_done() -> None:
    rows = FusedPass(problem(gaussian(10, 4), 0.5))
    potentials_E = gaussian(4, seed=1).double()
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN, so that it shows what is written
    try:
        skipped, done = rows.column_sums(potentials_E, one, one), rows.column_sums(potentials_E, one, 0 * one)
    finally:
        torch.use_deterministic_algorithms(False)
    assert skipped.isnan().all()
    assert torch.equal(done, rows.column_sums(potentials_E, one))


def topk_reference(
    logits_TE: Tensor, cost: str, potentials_E: Tensor, reg: float, k: int, normalise: bool
) -> tuple[Tensor, Tensor]:
    cost_TE = logits_TE.double()
    if cost == "softmax":
        cost_TE = cost_TE.softmax(dim=1).masked_fill(logits_TE == -torch.inf, -torch.inf)
    shifted_TE = (cost_TE + potentials_E) / reg
    top_TK, experts_TK = shifted_TE.topk(k, dim=1)
    return (top_TK.softmax(dim=1) if normalise else shifted_TE.softmax(dim=1).gather(1, experts_TK)), experts_TK


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 1, 1), (300, 3, 3), (100, 100, 8), (50, 1000, 16), (0, 4, 2)])
def test_topk(tokens: int, experts: int, k: int, cost: str, normalise: bool) -> None:
    logits_TE, potentials_E = gaussian(tokens, experts), gaussian(experts, seed=1).double()
    weights_TK, experts_TK = fused_topk(Rows(logits_TE, cost, None, None), potentials_E, 0.5, k, normalise)
    expected = topk_reference(logits_TE, cost, potentials_E, 0.5, k, normalise)
    assert weights_TK.dtype == torch.float32 and experts_TK.dtype == torch.int64
    assert torch.equal(experts_TK, expected[1])
    torch.testing.assert_close(weights_TK.double(), expected[0], rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_topk_of_every_dtype_and_stride(dtype: torch.dtype) -> None:
    logits_TE, potentials_E = gaussian(30, 80).to(dtype).T[:, 2:22], gaussian(20, seed=1).double()
    weights_TK, experts_TK = fused_topk(Rows(logits_TE, "linear", None, None), potentials_E, 0.5, 3, True)
    expected = topk_reference(logits_TE, "linear", potentials_E, 0.5, 3, True)
    assert weights_TK.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(experts_TK, expected[1])
    torch.testing.assert_close(weights_TK.double(), expected[0], rtol=2e-6, atol=0)


@pytest.mark.parametrize("normalise", [True, False])
def test_topk_of_rows_without_mass_and_of_forbidden_experts(normalise: bool) -> None:
    logits_TE, potentials_E = gaussian(6, 5), gaussian(5, seed=1).double()
    mask = torch.tensor([True, False, True, True, True, True], device=DEVICE)
    mass_T = torch.tensor([1.0, 1.0, 0.0, 0.5, 3.0, 1.0], device=DEVICE)
    logits_TE[1] = torch.nan
    logits_TE[3, 1:] = -torch.inf
    logits_TE[5] = torch.nan  # a token that counts: no weights, but experts that exist
    for given in (None, torch.where(mask, mass_T, 0)):
        weights_TK, experts_TK = fused_topk(Rows(logits_TE, "linear", mask, given), potentials_E, 0.5, 3, normalise)
        assert (weights_TK[1] == 0).all() and ((weights_TK[2] == 0).all() or given is None)
        assert experts_TK[3].tolist() == [0, 1, 2]
        factor = 1.0 if normalise or given is None else 0.5
        assert weights_TK[3].tolist() == [factor, 0, 0]
        assert ((experts_TK >= 0) & (experts_TK < 5)).all()
        expected, experts_K = topk_reference(logits_TE[4:5], "linear", potentials_E, 0.5, 3, normalise)
        torch.testing.assert_close(
            weights_TK[4:5].double(), expected * (1 if normalise or given is None else 3), rtol=2e-6, atol=0
        )
        assert torch.equal(experts_TK[4:5], experts_K)


def test_topk_takes_the_lower_expert_of_a_tie_and_orders_before_it_divides() -> None:
    logits_TE = torch.tensor([[1.0, 2.0, 2.0, 0.0], [1e-30, 2e-30, 0.0, 3e-30]], device=DEVICE)
    zeros_E = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    _, experts_TK = fused_topk(Rows(logits_TE, "linear", None, None), zeros_E, 1e20, 3, True)
    assert experts_TK.tolist() == [[1, 2, 0], [3, 1, 0]]
