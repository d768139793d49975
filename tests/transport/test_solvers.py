"""Solvers against oracles that are not ours, and the ways in which they may fail."""

import math

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from sinkroute.transport import list_solvers, solve
from sinkroute.transport import sinkhorn as sinkhorn_module


def biased_logits(tokens, experts, seed, dtype=torch.float32):
    """Gaussian logits plus a Gaussian bias for each expert: some experts are wanted by nearly every token."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, generator=generator) + torch.randn(experts, generator=generator)
    return logits_TE.to(dtype)


def column_error_float64(plan):
    """Largest relative deviation of a column sum from T / E, from the potentials alone, in NumPy."""
    shifted_TE = (plan.cost.double().numpy() + plan.potentials.double().numpy()) / plan.reg
    matrix_TE = np.exp(shifted_TE - shifted_TE.max(1, keepdims=True))
    matrix_TE /= matrix_TE.sum(1, keepdims=True)
    tokens, experts = matrix_TE.shape
    return np.abs(matrix_TE.sum(0) / (tokens / experts) - 1).max()


@pytest.mark.parametrize("method", list_solvers())
@pytest.mark.parametrize(("cost", "reg"), [("linear", 0.2), ("linear", 1.0), ("softmax", 0.05), ("softmax", 0.5)])
@pytest.mark.parametrize(("tokens", "experts"), [(40, 5), (3, 7)])
def test_plan_is_that_of_pot(method, cost, reg, tokens, experts):
    logits_TE = biased_logits(tokens, experts, seed=tokens, dtype=torch.float64)
    plan = solve(logits_TE, reg, cost, method=method, tol=1e-9, max_passes=20_000)
    assert plan.converged and plan.method == method
    oracle = ot.sinkhorn(
        np.full(tokens, 1 / tokens),
        np.full(experts, 1 / experts),
        -(logits_TE if cost == "linear" else logits_TE.softmax(1)).numpy(),
        reg,
        method="sinkhorn_log",
        numItermax=20_000,
        stopThr=1e-12,
    )
    np.testing.assert_allclose(plan.matrix().numpy(), oracle * tokens, atol=1e-7)


def test_plan_with_unequal_masses_is_that_of_pot():
    logits_TE = biased_logits(30, 4, seed=9, dtype=torch.float64)
    mass_E = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    plan = solve(logits_TE, 0.3, expert_mass=mass_E, tol=1e-9)
    rows_T = np.full(30, 1 / 30)
    oracle = ot.sinkhorn(rows_T, mass_E.numpy() / 10, -logits_TE.numpy(), 0.3, method="sinkhorn_log", stopThr=1e-12)
    np.testing.assert_allclose(plan.matrix().numpy(), oracle * 30, atol=1e-7)


def test_small_reg_tends_to_the_best_balanced_assignment():
    experts, copies = 4, 6
    logits_TE = biased_logits(experts * copies, experts, seed=3, dtype=torch.float64)
    plan = solve(logits_TE, reg=0.02, tol=1e-3, max_passes=20_000)
    rows, seats = linear_sum_assignment(np.tile(logits_TE.numpy(), copies), maximize=True)
    assert plan.converged
    assert plan.topk(1)[1].flatten().tolist() == (seats[np.argsort(rows)] % experts).tolist()


@pytest.mark.parametrize(("reg", "fewest", "most"), [(0.5, 9, 16), (2.0, 3, 6)])
def test_iterations_of_the_published_study_are_reproduced(reg, fewest, most):
    # Linear cost, Gaussian logits with expert bias, 3072 × 16, to 1e-4: about 12 at ξ = 0.5 and 4 at ξ = 2.
    plan = solve(biased_logits(3072, 16, seed=0), reg, method="sinkhorn")
    assert plan.converged
    assert fewest <= plan.passes <= most


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_naive_and_log_domain_agree_pass_by_pass(cost):
    logits_TE = biased_logits(50, 6, seed=4, dtype=torch.float64)
    for passes in (1, 2, 7):
        plans = [solve(logits_TE, 0.3, cost, method=m, max_passes=passes, tol=1e-15) for m in ("naive", "sinkhorn")]
        torch.testing.assert_close(plans[0].potentials, plans[1].potentials)
        torch.testing.assert_close(plans[0].column_error, plans[1].column_error)


def test_naive_overflows_above_88_where_the_log_domain_does_not():
    logits_TE = biased_logits(64, 8, seed=5)
    logits_TE[0, 0] = 89.0  # exp(89) is above the largest float32
    failed = solve(logits_TE, reg=1.0, method="naive")
    assert failed.column_error.isnan() and not failed.converged
    assert failed.matrix().isnan().any()
    plan = solve(logits_TE, reg=1.0, method="sinkhorn")
    assert plan.converged and plan.matrix().isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("reg", [1.2e-38, 1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("mass", [None, [1.0, 0.0, 1e-6, 1.0]])
def test_sinkhorn_is_never_nan(size, reg, mass):
    logits_TE = size * biased_logits(16, 4, seed=6)
    plan = solve(logits_TE, reg, expert_mass=mass, method="sinkhorn", max_passes=20)
    assert plan.column_error.isfinite() and not plan.potentials.isnan().any()
    matrix_TE, (weights_TK, _) = plan.matrix(), plan.topk(2)
    torch.testing.assert_close(matrix_TE.sum(1), torch.ones(16))
    torch.testing.assert_close(weights_TK.sum(1), torch.ones(16))


@pytest.mark.parametrize("method", list_solvers())
@pytest.mark.parametrize("max_passes", [1, 3])
def test_running_out_of_passes_is_told_honestly(method, max_passes):
    plan = solve(biased_logits(200, 8, seed=7), reg=0.1, method=method, max_passes=max_passes)
    assert not plan.converged and plan.passes == max_passes
    assert plan.column_error.item() == pytest.approx(column_error_float64(plan), rel=1e-4)


def test_the_best_potentials_seen_are_returned():
    # Float32 cannot reach 1e-12: errors wander, and the answer must not be the last of them.
    logits_TE = biased_logits(500, 8, seed=8)
    errors = [solve(logits_TE, method="sinkhorn", tol=1e-12, max_passes=n).column_error for n in range(200, 206)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", list_solvers())
def test_a_solution_as_warm_start_takes_one_pass(method):
    logits_TE = biased_logits(100, 8, seed=10)
    cold = solve(logits_TE, 0.5, method=method)
    warm = solve(logits_TE, 0.5, method=method, init=cold.potentials + 3.0, tol=2e-4)
    assert cold.passes > 2 and warm.passes == 1
    torch.testing.assert_close(warm.matrix(), cold.matrix(), rtol=1e-4, atol=1e-5)


def test_a_warm_start_that_is_not_finite_starts_from_zero():
    logits_TE = biased_logits(100, 4, seed=11)
    init_E = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    assert torch.equal(solve(logits_TE, init=init_E).potentials, solve(logits_TE).potentials)


def test_float64_stays_float64_and_all_else_is_float32_but_for_the_potentials():
    logits_TE = biased_logits(20, 4, seed=12)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        plan = solve(logits_TE.to(dtype))
        assert {plan.cost.dtype, plan.matrix().dtype, plan.topk(2)[0].dtype} == {torch.float32}
        assert plan.potentials.dtype == torch.float64 and plan.logits.dtype == dtype
    plan = solve(logits_TE.double(), tol=1e-12, expert_mass=torch.ones(4))
    assert {plan.potentials.dtype, plan.matrix().dtype, plan.column_error.dtype} == {torch.float64}
    assert plan.converged and plan.topk(2)[1].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_count_as_their_float32_values(dtype):
    logits_TE = biased_logits(60, 6, seed=13).to(dtype)
    assert torch.equal(solve(logits_TE).potentials, solve(logits_TE.float()).potentials)


@pytest.mark.parametrize("method", list_solvers())
def test_mixed_precision_does_not_touch_the_solver(method):
    logits_TE = biased_logits(60, 6, seed=14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = solve(logits_TE, 0.5, method=method)
    assert torch.equal(inside.potentials, solve(logits_TE, 0.5, method=method).potentials)


def test_checking_every_few_passes_ends_at_the_first_check_after_convergence(monkeypatch):
    # What an accelerator does, done here: passes go up to the next multiple of 8, the answer is as good.
    logits_TE = biased_logits(300, 8, seed=15)
    exact = solve(logits_TE, 0.5, method="sinkhorn")
    monkeypatch.setattr(sinkhorn_module, "CHECK_EVERY_CPU", 8)
    rare = solve(logits_TE, 0.5, method="sinkhorn")
    assert rare.passes == math.ceil(exact.passes / 8) * 8
    assert rare.converged and rare.column_error <= exact.column_error


def test_a_plan_prints_in_one_line():
    assert (
        repr(solve(torch.zeros(3, 2), method="sinkhorn"))
        == "Plan(tokens=3, experts=2, reg=0.1, method='sinkhorn', passes=1)"
    )
