"""A pass over the logits, by every backend, against NumPy in float64."""

import math

import numpy as np
import pytest
import torch

from sinkroute.kernels import native
from sinkroute.kernels.column_sums import NativePass, Pass, make_pass
from sinkroute.transport import solve
from sinkroute.transport.checks import make_problem

needs_compiler = pytest.mark.skipif(native.load() is None, reason=native.status())
BACKENDS = [Pass, pytest.param(lambda rows: NativePass(rows, native.load()), marks=needs_compiler)]


def problem_of(logits_TE, cost="linear", mask_T=None, mass_T=None, reg=0.1):
    return make_problem(logits_TE, reg, cost, mask_T, mass_T, None, None)


def random_logits(tokens, experts, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(tokens, experts, generator=generator)).to(dtype)


def reference(problem, potentials_E, reg):
    """Rows of the plan, in float64 but for the cost, which is what `Plan.cost` gives."""
    shifted_TE = (problem.cost_TE().double().numpy() + potentials_E) / reg
    p_TE = np.exp(shifted_TE - shifted_TE.max(1, keepdims=True))
    p_TE /= p_TE.sum(1, keepdims=True)
    mass_T = np.ones(len(p_TE))
    if problem.token_mask is not None:
        mass_T = problem.token_mask.double().numpy()
    if problem.token_mass is not None:
        mass_T = problem.token_mass.double().numpy()
    return p_TE, mass_T[:, None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "experts"), [(1, 1), (5, 2), (1, 40), (300, 16), (1100, 3), (700, 100), (40, 1000), (2100, 64)]
)
def test_column_sums_are_those_of_float64(backend, cost, dtype, tokens, experts):
    problem = problem_of(random_logits(tokens, experts, dtype, scale=2.0), cost)
    potentials_E = np.random.default_rng(1).normal(size=experts)
    p_TE, _ = reference(problem, potentials_E, 0.3)
    for precision in (1.0, 0.0):
        sums_2E = backend(problem).column_sums(potentials_E, 0.3, precision)
        np.testing.assert_allclose(sums_2E, [p_TE.sum(0), (p_TE**2).sum(0)], rtol=1e-5, atol=1e-6)
    # What rounding is left is that of the cost, where that is a softmax, of the exponential and of a row's sum.
    np.testing.assert_allclose(sums_2E[0], p_TE.sum(0), rtol=3e-6 if cost == "softmax" else 1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [0.0, 1e3, -1e6])
def test_exact_sums_lose_no_digits_to_the_size_of_logits_and_potentials(backend, shift):
    logits_TE = random_logits(400, 8, scale=10.0)
    potentials_E = np.random.default_rng(2).normal(size=8) * 20 + shift
    problem = problem_of(logits_TE, reg=1e-3)
    p_TE, _ = reference(problem, potentials_E, 1e-3)
    np.testing.assert_allclose(
        backend(problem).column_sums(potentials_E, 1e-3, 0.0)[0], p_TE.sum(0), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_potentials_far_above_the_logits_do_not_overflow(backend):
    # In float32 1e9 + C is off by dozens of C: the maximum is wrong by more than an exponential can bear.
    logits_TE = random_logits(50, 6, scale=5.0)
    potentials_E = np.array([1e9, 1e9 + 3, 1e9 - 2, 1e9, 1e9 + 1, 1e9])
    for precision in (1e9, 0.0):
        sums_2E = backend(problem_of(logits_TE)).column_sums(potentials_E, 0.01, precision)
        assert sums_2E[0].sum() == pytest.approx(50, rel=1e-6)
    p_TE, _ = reference(problem_of(logits_TE), potentials_E, 0.01)
    np.testing.assert_allclose(sums_2E[0], p_TE.sum(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_masks_masses_forbidden_experts_and_strides(backend, cost):
    wide_TE = random_logits(260, 14, seed=3)
    logits_TE = wide_TE[::2, 1:12]  # rows 28 apart, columns 1
    logits_TE[4, 3] = logits_TE[7, :10] = -math.inf
    mask_T = torch.arange(130) % 5 != 1
    logits_TE[~mask_T] = math.nan
    mass_T = torch.rand(130, generator=torch.Generator().manual_seed(4))
    potentials_E = np.random.default_rng(5).normal(size=11)
    for mass in (None, mass_T):
        problem = problem_of(logits_TE, cost, mask_T, mass)
        p_TE, mass_T1 = reference(problem, potentials_E, 0.2)
        sums_2E = backend(problem).column_sums(potentials_E, 0.2, 0.0)
        np.testing.assert_allclose(sums_2E, [(mass_T1 * p_TE).sum(0), (mass_T1 * p_TE**2).sum(0)], rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize("bad", [[math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0], [-math.inf] * 3])
def test_logits_that_no_plan_can_be_made_of_give_nan(backend, cost, bad):
    logits_TE = random_logits(20, 3)
    logits_TE[11] = torch.tensor(bad)
    for precision in (1.0, 0.0):
        assert np.isnan(backend(problem_of(logits_TE, cost)).column_sums(np.zeros(3), 0.5, precision)[0]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_column_means_and_quantiles(backend, cost):
    logits_TE = random_logits(200, 7, seed=6)
    logits_TE[3, 2] = -math.inf
    mask_T = torch.arange(200) % 4 != 0
    logits_TE[~mask_T] = math.nan
    ranks_E = np.array([1, 2, 40, 150, 7, 9, 1])
    problem = problem_of(logits_TE, cost, mask_T)
    means_E, quantiles_E = backend(problem).column_ranks(ranks_E)
    columns_TE = problem.cost_TE()[mask_T].double().numpy()
    ordered_TE = -np.sort(-columns_TE, axis=0)
    np.testing.assert_allclose(quantiles_E, ordered_TE[ranks_E - 1, np.arange(7)], rtol=1e-6)
    np.testing.assert_allclose(means_E, np.nanmean(np.where(np.isfinite(columns_TE), columns_TE, np.nan), 0), rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_far_from_the_others_are_as_precise_as_was_asked(backend):
    logits_TE = random_logits(3000, 8)
    logits_TE[::7] += 1e7  # float32 would lose the potentials beside such logits
    potentials_E = np.linspace(-1, 1, 8)
    p_TE, _ = reference(problem_of(logits_TE), potentials_E, 0.5)
    sums_2E = backend(problem_of(logits_TE)).column_sums(potentials_E, 0.5, 1e-5)
    np.testing.assert_allclose(sums_2E[0], p_TE.sum(0), rtol=2e-5)


@needs_compiler
def test_threads_do_not_change_a_bit(monkeypatch):
    problem = problem_of(random_logits(20_000, 24))
    assert isinstance(make_pass(problem), NativePass)
    sums = []
    for threads in (1, 2, 3):
        monkeypatch.setattr("sinkroute.kernels.column_sums.threads_for", lambda logits, n=threads: n)
        sums.append(make_pass(problem).column_sums(np.linspace(0, 1, 24), 0.1, 1.0))
    assert all(np.array_equal(x, sums[0]) for x in sums)


def test_without_a_compiler_torch_does_the_work(monkeypatch):
    logits_TE = random_logits(500, 12)
    expected = solve(logits_TE, tol=1e-6)
    monkeypatch.setattr(native, "load", lambda: None)
    assert type(make_pass(problem_of(logits_TE))) is Pass
    plan = solve(logits_TE, tol=1e-6)
    torch.testing.assert_close(plan.matrix(), expected.matrix(), rtol=1e-4, atol=1e-5)
    assert torch.equal(plan.topk(2)[1], expected.topk(2)[1])
