"""The implicit gradient against finite differences and against autograd through many unrolled iterations."""

import pytest
import torch

from sinkroute.transport import solve

TOKENS, EXPERTS = 9, 4


def scores(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, EXPERTS, dtype=dtype, generator=generator).requires_grad_()


def implicit_plan(scores_TE, reg=0.4, cost="linear", **options):
    return solve(scores_TE, reg, cost, tol=1e-13, max_passes=5000, differentiable=True, **options)


def unrolled_matrix(scores_TE, reg, cost, mass_E, passes=3000):
    cost_TE = scores_TE if cost == "linear" else scores_TE.softmax(1)
    target_E = TOKENS * mass_E / mass_E.sum()
    log_v_E = torch.zeros(EXPERTS, dtype=scores_TE.dtype)
    for _ in range(passes):
        log_rows_TE = (cost_TE / reg + log_v_E).log_softmax(1)
        log_v_E = log_v_E + target_E.log() - log_rows_TE.logsumexp(0)
    return (cost_TE / reg + log_v_E).softmax(1)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize("output", ["matrix", "potentials", "topk", "entries"])
def test_gradient_is_that_of_finite_differences(cost, output):
    mask_T = torch.arange(TOKENS) != 3

    def run(scores_TE):
        plan = implicit_plan(scores_TE, cost=cost, token_mask=mask_T, expert_mass=[1.0, 2.0, 1.5, 1.0])
        return {
            "matrix": plan.matrix,
            "potentials": lambda: plan.potentials,
            "topk": lambda: plan.topk(2)[0],
            "entries": lambda: plan.topk(2, normalise=False)[0],
        }[output]()

    assert torch.autograd.gradcheck(run, (scores(),), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(("cost", "reg"), [("linear", 0.3), ("linear", 1.0), ("softmax", 0.1)])
@pytest.mark.parametrize("mass", [[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 0.5]])
def test_gradient_is_that_of_unrolled_iterations(cost, reg, mass):
    scores_TE = scores(seed=1)
    upstream_TE = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mass_E = torch.tensor(mass, dtype=torch.float64)
    matrix_TE = implicit_plan(scores_TE, reg, cost, expert_mass=mass_E).matrix()
    expected_TE = unrolled_matrix(scores_TE, reg, cost, mass_E, passes=600)
    torch.testing.assert_close(matrix_TE, expected_TE, rtol=1e-6, atol=1e-9)
    (gradient_TE,) = torch.autograd.grad(matrix_TE, scores_TE, upstream_TE)
    (expected_gradient_TE,) = torch.autograd.grad(expected_TE, scores_TE, upstream_TE)
    torch.testing.assert_close(gradient_TE, expected_gradient_TE, rtol=1e-5, atol=1e-8)


def test_an_expert_without_mass_takes_no_part_in_the_gradient():
    scores_TE = scores(seed=3)
    matrix_TE = implicit_plan(scores_TE, expert_mass=[1.0, 0.0, 1.0, 1.0]).matrix()
    upstream_TE = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (gradient_TE,) = torch.autograd.grad(matrix_TE, scores_TE, upstream_TE)
    kept = [0, 2, 3]
    fewer_TE = scores_TE.detach()[:, kept].requires_grad_()
    (expected_TE,) = torch.autograd.grad(implicit_plan(fewer_TE).matrix(), fewer_TE, upstream_TE[:, kept])
    torch.testing.assert_close(gradient_TE[:, kept], expected_TE)
    assert (gradient_TE[:, 1] == 0).all()


def test_column_sums_of_a_differentiable_plan_have_no_gradient():
    # They are what the constraint fixes, whatever the scores.
    scores_TE = scores(seed=5)
    weights_E = torch.arange(1.0, EXPERTS + 1, dtype=torch.float64)
    (gradient_TE,) = torch.autograd.grad((implicit_plan(scores_TE).matrix().sum(0) * weights_E).sum(), scores_TE)
    torch.testing.assert_close(gradient_TE, torch.zeros_like(gradient_TE), rtol=0, atol=1e-10)


def test_experts_without_a_common_token_leave_the_gradient_finite():
    # Two blocks whose tokens never go to the other's experts: the Laplacian has a second null vector.
    scores_TE = torch.tensor([[0.0, 0.1, -9.0, -9.0], [0.1, 0.0, -9.0, -9.0]]) * 1e3
    scores_TE = torch.cat([scores_TE, scores_TE.flip(1)]).requires_grad_()
    plan = solve(scores_TE, reg=1e2, differentiable=True)
    (plan.matrix() ** 2).sum().backward()
    assert plan.converged and scores_TE.grad.isfinite().all() and scores_TE.grad.abs().max() > 0


def test_gradients_reach_half_precision_scores():
    scores_TE = scores(seed=6, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = solve(scores_TE, 0.4, "softmax", differentiable=True)
        loss = (plan.topk(2)[0] ** 2).sum()
        loss.backward()
    expected_TE = scores_TE.detach().double().requires_grad_()
    (implicit_plan(expected_TE, 0.4, "softmax").topk(2)[0] ** 2).sum().backward()
    assert scores_TE.grad.dtype == torch.bfloat16
    torch.testing.assert_close(scores_TE.grad.double(), expected_TE.grad, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_without_differentiable_nothing_carries_a_gradient(cost):
    plan = solve(scores(), cost=cost)
    outputs = [plan.potentials, plan.cost, plan.column_error, plan.matrix(), plan.topk(2)[0]]
    assert not any(x.requires_grad for x in outputs)


def test_differentiable_without_gradient_mode_is_the_same_plan():
    scores_TE = scores()
    with torch.no_grad():
        plan = solve(scores_TE, differentiable=True)
    assert not plan.matrix().requires_grad
    assert torch.equal(plan.potentials, solve(scores_TE).potentials)


def test_a_second_derivative_is_refused():
    scores_TE = scores()
    (gradient_TE,) = torch.autograd.grad((implicit_plan(scores_TE).matrix() ** 2).sum(), scores_TE, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient_TE.sum().backward()


def test_differentiable_across_ranks_is_refused():
    with pytest.raises(NotImplementedError, match=r"differentiable=True .* process_group"):
        solve(scores(), differentiable=True, process_group=object())
