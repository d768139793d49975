"""What the dual method promises beyond what every solver does: few passes, 1e-6 in float32, no copies of the logits."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from sinkroute.kernels import native, tuning
from sinkroute.transport import solve

GRID = list(itertools.product([1.0, 0.5, 0.1, 0.05, 0.01], [1.0, 4.0], [0.0, 2.0], ["linear", "softmax"]))


def random_logits(tokens, experts, scale=1.0, bias=0.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    noise_TE = torch.randn(tokens, experts, generator=generator)
    return (scale * noise_TE + bias * torch.randn(experts, generator=generator)).to(dtype)


def clustered_logits(tokens=2000, experts=16):
    """Eight kinds of tokens, alike within each: at small ξ the experts of different kinds share hardly a token."""
    generator = torch.Generator().manual_seed(1)
    centres = 4 * torch.randn(8, experts, generator=generator)
    return centres[torch.arange(tokens) % 8] + 0.1 * torch.randn(tokens, experts, generator=generator)


def error_float64(plan):
    shifted_TE = (plan.cost.double().numpy() + plan.potentials.numpy()) / plan.reg
    p_TE = np.exp(shifted_TE - shifted_TE.max(1, keepdims=True))
    p_TE /= p_TE.sum(1, keepdims=True)
    return np.abs(p_TE.sum(0) * p_TE.shape[1] / p_TE.shape[0] - 1).max()


@pytest.mark.parametrize(("tol", "mean", "most"), [(1e-3, 7, 20), (1e-6, 10, 25)])
def test_the_grid_is_solved_in_few_passes_and_to_what_was_asked(tol, mean, most):
    passes = []
    for reg, scale, bias, cost in GRID:
        plan = solve(random_logits(4096, 16, scale, bias), reg, cost, tol=tol)
        assert plan.converged and plan.method == "dual"
        assert error_float64(plan) <= tol * 1.01 + (1e-7 if cost == "linear" else 2e-7)
        passes.append(plan.passes)
    assert np.mean(passes) <= mean and max(passes) <= most


def test_a_warm_start_takes_three_passes_or_so():
    passes = []
    for reg, scale, bias, cost in GRID:
        logits_TE = random_logits(4096, 16, scale, bias)
        drifted_TE = logits_TE + 0.05 * scale * torch.randn(logits_TE.shape, generator=torch.Generator().manual_seed(9))
        init_E = solve(logits_TE, reg, cost, tol=1e-3).potentials
        plan = solve(drifted_TE, reg, cost, tol=1e-3, init=init_E)
        assert plan.converged
        passes.append(plan.passes)
    assert np.mean(passes) <= 4


def test_a_useless_warm_start_costs_one_pass():
    logits_TE = random_logits(4096, 16)
    cold = solve(logits_TE)
    for init_E in (1e4 * torch.randn(16, generator=torch.Generator().manual_seed(2)), torch.full((16,), math.nan)):
        plan = solve(logits_TE, init=init_E)
        assert plan.converged and plan.passes <= cold.passes + 2


@pytest.mark.parametrize("mass", [None, [1.0, 2.0, 0.5, 1.0, 3.0, 0.0]])
@pytest.mark.parametrize("reg", [1.0, 0.2])
def test_the_potentials_are_those_that_a_general_optimiser_finds(mass, reg):
    logits_TE = random_logits(60, 6, 2.0, seed=3, dtype=torch.float64)
    weights_T = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 0.5
    plan = solve(logits_TE, reg, token_mass=weights_T, expert_mass=mass, tol=1e-10)
    share_E = np.full(6, 1 / 6) if mass is None else np.array(mass) / np.sum(mass)
    used = share_E > 0
    logits, target = logits_TE.numpy()[:, used], share_E[used] * weights_T.sum().item()

    def objective(g):
        x = (logits + g) / reg
        lse = np.logaddexp.reduce(x, axis=1)
        p = np.exp(x - lse[:, None])
        return (weights_T.numpy() * reg * lse).sum() - target @ g, weights_T.numpy() @ p - target

    found = minimize(objective, np.zeros(used.sum()), jac=True, method="BFGS", options={"gtol": 1e-9})
    assert plan.converged
    np.testing.assert_allclose(plan.potentials.numpy()[used], found.x - found.x.mean(), atol=1e-6)
    assert (plan.potentials.numpy()[~used] == -np.inf).all()


def test_where_descent_stalls_the_solution_is_followed_down_from_a_larger_reg(monkeypatch):
    logits_TE = random_logits(2000, 64, seed=1)
    logits_TE[:1800] = logits_TE[0]
    plan = solve(logits_TE, 0.001, tol=1e-3)
    assert plan.converged and plan.passes <= 100 and error_float64(plan) <= 1e-3
    monkeypatch.setattr(tuning, "ANNEAL", math.inf)
    assert not solve(logits_TE, 0.001, tol=1e-3).converged


@pytest.mark.parametrize("max_passes", [1, 2, 5, 30, 45])
def test_the_budget_holds_in_every_stage_and_the_best_is_returned(max_passes):
    plan = solve(clustered_logits(), 0.005, tol=1e-9, max_passes=max_passes)
    assert plan.passes <= max_passes and not plan.converged
    assert plan.column_error.item() == pytest.approx(error_float64(plan), rel=1e-3)


def test_more_passes_are_never_worse():
    errors = [solve(clustered_logits(), 0.01, tol=1e-9, max_passes=n).column_error.item() for n in range(20, 60, 4)]
    assert errors == sorted(errors, reverse=True)


def test_identical_tokens_are_shared_evenly():
    plan = solve(random_logits(1, 8, 5.0).expand(1000, 8), 0.01, tol=1e-6)
    torch.testing.assert_close(plan.matrix(), torch.full((1000, 8), 1 / 8), rtol=1e-5, atol=0)


def test_a_forbidden_expert_gets_nothing_of_that_token_and_the_balance_holds():
    logits_TE = random_logits(500, 8, seed=5)
    logits_TE[torch.rand(500, 8, generator=torch.Generator().manual_seed(6)) < 0.3] = -math.inf
    logits_TE[:, 0] = random_logits(500, 1, seed=7)[:, 0]
    for cost in ("linear", "softmax"):
        plan = solve(logits_TE, 0.1, cost, tol=1e-5)
        matrix_TE = plan.matrix()
        assert plan.converged and (matrix_TE[logits_TE == -math.inf] == 0).all()
        torch.testing.assert_close(matrix_TE.sum(0), torch.full((8,), 500 / 8), rtol=1e-4, atol=0)


def test_an_expert_that_no_token_may_have_is_told_honestly():
    logits_TE = random_logits(50, 4)
    logits_TE[:, 2] = -math.inf
    plan = solve(logits_TE)
    assert not plan.converged and plan.column_error == 1 and plan.potentials.isfinite().all()


def test_logits_beyond_what_float64_can_place_are_not_said_to_be_balanced():
    plan = solve(torch.tensor([[3e38, -3e38, 0, 1], [1, 2, 3e38, -3e38]]), 1.0)
    assert not plan.converged and plan.potentials.isfinite().all() and plan.matrix().isfinite().all()


@pytest.mark.parametrize("offset", [1e4, 1e6, 1e8])
def test_the_error_is_honest_where_some_tokens_have_logits_of_another_size(offset):
    logits_TE = random_logits(20_000, 8, bias=1.0)
    logits_TE[torch.arange(20_000) % 97 == 5] += offset
    plan = solve(logits_TE, 1.0, tol=1e-4)
    assert plan.converged and plan.column_error.item() == pytest.approx(error_float64(plan), rel=0.1, abs=1e-6)


@pytest.mark.parametrize(("size", "reg"), [(5e37, 1.0), (1.0, 1e-20)])
def test_finite_logits_never_give_nan(size, reg):
    plan = solve(size * random_logits(64, 8), reg)
    assert plan.potentials.isfinite().all() and not plan.column_error.isnan() and not plan.converged


def test_a_share_too_small_for_the_exponentials_is_not_said_to_be_met():
    assert not solve(random_logits(500, 4), expert_mass=[1e-18, 1, 1, 1]).converged


def test_a_compiled_function_may_call_it():
    logits_TE = random_logits(64, 8)
    compiled = torch.compile(lambda x: solve(2 * x, 0.1).potentials * 2, backend="eager")
    assert torch.equal(compiled(logits_TE), solve(2 * logits_TE, 0.1).potentials * 2)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize("kernels", ["1", "0"])
def test_memory_does_not_grow_with_the_tokens(cost, kernels):
    if kernels == "1" and native.load() is None:
        pytest.skip(native.status())
    code = f"""
import resource, torch
from sinkroute.transport import solve
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
logits_TE = torch.randn(200_000, 64, generator=torch.Generator().manual_seed(0))
mask_T = torch.arange(200_000) % 7 != 0
solve(logits_TE[:5000], 0.1, {cost!r}, token_mask=mask_T[:5000], tol=1e-6)
before = peak()
assert solve(logits_TE, 0.1, {cost!r}, token_mask=mask_T, tol=1e-6).converged
print(peak() - before)
"""
    environment = os.environ | {
        "SINKROUTE_NATIVE": kernels,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 8
