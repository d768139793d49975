"""What must hold for every problem, over problems drawn by Hypothesis."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from sinkroute.kernels import native
from sinkroute.transport import solve

# reg stays above a tenth of the spread: enough passes for 1e-9 in float64, in a short test.
problems = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 24),
        "experts": st.integers(1, 8),
        "seed": st.integers(0, 2**31),
        "reg": st.sampled_from([0.4, 1.0, 5.0]),
        "cost": st.sampled_from(["linear", "softmax"]),
    }
)
few = settings(max_examples=25, deadline=None, derandomize=True)


def draw(problem):
    generator = torch.Generator().manual_seed(problem["seed"])
    shape = problem["tokens"], problem["experts"]
    return torch.randn(shape, dtype=torch.float64, generator=generator), generator


def tight(logits_TE, problem, **options):
    plan = solve(logits_TE, problem["reg"], problem["cost"], tol=1e-9, max_passes=5000, **options)
    assert plan.converged
    return plan


@few
@given(problems)
def test_rows_sum_to_one_and_columns_to_their_target_within_the_error(problem):
    logits_TE, generator = draw(problem)
    mass_E = torch.rand(problem["experts"], generator=generator) + 0.1
    plan = solve(logits_TE.float(), problem["reg"], problem["cost"], expert_mass=mass_E)
    matrix_TE = plan.matrix().double()
    torch.testing.assert_close(matrix_TE.sum(1), torch.ones(len(matrix_TE), dtype=torch.float64), rtol=0, atol=1e-6)
    deviation_E = matrix_TE.sum(0) / (len(matrix_TE) * mass_E.double() / mass_E.double().sum()) - 1
    assert plan.converged
    assert deviation_E.abs().max() == pytest.approx(plan.column_error.item(), abs=2e-6)


@few
@given(problems)
def test_a_shift_of_a_row_does_not_change_the_plan(problem):
    logits_TE, generator = draw(problem)
    shift_T = torch.randn(len(logits_TE), 1, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(tight(logits_TE + shift_T, problem).matrix(), tight(logits_TE, problem).matrix())


@few
@given(problems)
def test_a_bias_of_an_expert_goes_into_its_potential(problem):
    problem = problem | {"cost": "linear"}
    logits_TE, generator = draw(problem)
    bias_E = torch.randn(problem["experts"], dtype=torch.float64, generator=generator)
    plain, biased = tight(logits_TE, problem), tight(logits_TE + bias_E, problem)
    torch.testing.assert_close(biased.matrix(), plain.matrix(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(biased.potentials, plain.potentials - (bias_E - bias_E.mean()), rtol=1e-6, atol=1e-6)


@few
@given(problems)
def test_permuted_logits_have_the_permuted_plan(problem):
    logits_TE, generator = draw(problem)
    rows_T = torch.randperm(problem["tokens"], generator=generator)
    columns_E = torch.randperm(problem["experts"], generator=generator)
    permuted_TE = logits_TE[rows_T][:, columns_E]
    expected_TE = tight(logits_TE, problem).matrix()[rows_T][:, columns_E]
    torch.testing.assert_close(tight(permuted_TE, problem).matrix(), expected_TE, rtol=1e-6, atol=1e-7)


@few
@given(problems)
def test_masked_rows_are_as_if_removed(problem):
    logits_TE, generator = draw(problem)
    mask_T = torch.rand(problem["tokens"], generator=generator) < 0.7
    masked_TE = tight(logits_TE, problem, token_mask=mask_T).matrix()
    torch.testing.assert_close(masked_TE[mask_T], tight(logits_TE[mask_T], problem).matrix(), rtol=1e-6, atol=1e-7)
    assert (masked_TE[~mask_T] == 0).all()


@few
@given(problems, st.floats(1e-3, 1e3))
def test_the_scale_of_expert_mass_does_not_matter(problem, scale):
    logits_TE, generator = draw(problem)
    mass_E = torch.rand(problem["experts"], dtype=torch.float64, generator=generator) + 0.1
    plans = [tight(logits_TE, problem, expert_mass=m) for m in (mass_E, scale * mass_E, (scale * mass_E).tolist())]
    for plan in plans[1:]:
        torch.testing.assert_close(plan.matrix(), plans[0].matrix(), rtol=1e-6, atol=1e-6)


@few
@given(problems, st.integers(1, 8))
def test_topk_weights_descend_and_sum_to_one(problem, k):
    logits_TE, _ = draw(problem)
    k = min(k, problem["experts"])
    plan = solve(logits_TE, problem["reg"], problem["cost"])
    weights_TK, experts_TK = plan.topk(k)
    assert (weights_TK.diff(dim=1) <= 0).all()
    torch.testing.assert_close(weights_TK.sum(1), torch.ones(len(logits_TE), dtype=torch.float64))
    entries_TK, same_TK = plan.topk(k, normalise=False)
    assert torch.equal(same_TK, experts_TK)
    torch.testing.assert_close(entries_TK, plan.matrix().sort(dim=1, descending=True).values[:, :k])
    torch.testing.assert_close(weights_TK, entries_TK / entries_TK.sum(1, keepdim=True))


@few
@example(size=6e4, spread=0.06, reg=1e-5, dtype=torch.float32, seed=0, massive=False, kernels=True)
@given(
    st.sampled_from([0.0, 1.0, 6e4, 1e8, 1e20]),
    st.sampled_from([0.0, 1e-3, 0.06, 1.0, 100.0]),
    st.sampled_from([1e-5, 1e-3, 0.1, 10.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
)
def test_no_mass_is_lost_to_the_size_of_the_logits_over_reg(size, spread, reg, dtype, seed, massive, kernels):
    generator = torch.Generator().manual_seed(seed)
    logits_TE = size + spread * torch.randn(9, 5, generator=generator, dtype=torch.float64)
    mass_T = torch.rand(9, generator=generator) if massive else torch.ones(9)
    logits_TE = logits_TE.clamp(max=6e4).to(dtype) if dtype == torch.float16 else logits_TE.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not kernels:
            patch.setattr(native, "load", lambda: None)
        plan = solve(logits_TE, reg, token_mass=mass_T.to(torch.promote_types(dtype, torch.float32)), max_passes=20)
        for weights_TE in (plan.topk(5, normalise=False)[0], plan.matrix()):
            torch.testing.assert_close(weights_TE.sum(1).float(), mass_T, rtol=1e-5, atol=1e-6)
        assert (plan.topk(2)[0].sum(1) - 1).abs().max() < 1e-5


@few
@given(problems, st.integers(1, 8))
def test_topk_weights_are_the_nearest_k_sparse_distribution(problem, k):
    # The proposition of arXiv 2511.08972: KL(q ‖ Π_i) over q on any k experts is least at the top k, renormalised,
    # where it is −log Σ_{top k} Π_ij.
    logits_TE, generator = draw(problem)
    k = min(k, problem["experts"])
    plan = solve(logits_TE, problem["reg"], problem["cost"])
    row_E, weights_K, experts_K = plan.matrix()[0], *(x[0] for x in plan.topk(k))
    least = (weights_K * (weights_K / row_E[experts_K]).log()).sum()
    torch.testing.assert_close(least, -row_E[experts_K].sum().log())
    for _ in range(20):
        subset_K = torch.randperm(problem["experts"], generator=generator)[:k]
        q_K = torch.rand(k, dtype=torch.float64, generator=generator) + 1e-6
        q_K /= q_K.sum()
        assert (q_K * (q_K / row_E[subset_K]).log()).sum() >= least - 1e-12


@settings(deadline=None, max_examples=15)
@given(experts=st.integers(2, 5), k=st.integers(1, 3), reg=st.sampled_from([0.3, 0.5, 1.0]), seed=st.integers(0, 2**32))
def test_topk_weights_are_those_that_a_general_optimiser_finds_over_all_subsets(experts, k, reg, seed):
    k = min(k, experts)
    logits_TE = torch.randn(6, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plan = solve(logits_TE, reg)
    row_E = plan.matrix()[2].numpy()

    def divergence(q_K, subset):
        return float(np.sum(q_K * np.log(np.maximum(q_K, 1e-300) / row_E[list(subset)])))

    found = []
    for subset in itertools.combinations(range(experts), k):
        total = {"type": "eq", "fun": lambda q: q.sum() - 1}
        answer = minimize(
            divergence, np.full(k, 1 / k), (subset,), bounds=[(1e-9, 1)] * k, constraints=total, tol=1e-12
        )
        found.append((answer.fun, subset, answer.x))
    _, subset, best_K = min(found, key=lambda item: item[0])
    weights_K, experts_K = (x[2].numpy() for x in plan.topk(k))
    assert set(experts_K.tolist()) == set(subset)
    np.testing.assert_allclose(weights_K, np.sort(best_K)[::-1], atol=1e-4)


def test_topk_order_is_right_where_the_entries_underflow():
    # exp(−200) and exp(−300) are both 0 in float32: the matrix alone could not tell experts 1 and 2 apart.
    # One pass of Sinkhorn leaves the potentials at 0.
    logits_TE = torch.tensor([[0.0, -300.0, -200.0], [-1e30, -2e30, 0.0]])
    plan = solve(logits_TE, reg=1.0, method="sinkhorn", max_passes=1)
    weights_TK, experts_TK = plan.topk(3)
    assert experts_TK.tolist() == [[0, 2, 1], [2, 0, 1]]
    assert weights_TK.tolist() == plan.topk(3, normalise=False)[0].tolist() == [[1.0, 0.0, 0.0]] * 2
