"""The implicit gradient against finite differences, unrolled iterations, another library, and where it is hardest."""

import gc
import math
import weakref

import ot
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sinkroute.transport import solve

TOKENS, EXPERTS = 9, 4
MASK_T = torch.arange(TOKENS) != 3
OUTPUTS = {
    "matrix": lambda plan: plan.matrix(),
    "topk": lambda plan: plan.topk(2)[0],
    "entries": lambda plan: plan.topk(2, normalise=False)[0],
    "potentials": lambda plan: plan.potentials,
}
PROBLEMS = {
    "plain": {},
    "mask": {"token_mask": MASK_T, "expert_mass": [1.0, 2.0, 1.5, 1.0]},
    "token mass": {"token_mass": torch.linspace(0.0, 2.0, TOKENS)},
    "all": {"token_mask": MASK_T, "token_mass": torch.linspace(0.5, 2.0, TOKENS), "expert_mass": [1.0, 0.0, 1.5, 1.0]},
}


def logits(seed=0, dtype=torch.float64, tokens=TOKENS, experts=EXPERTS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, dtype=dtype, generator=generator).requires_grad_()


def like(x, seed=7):
    """Upstream gradients for x."""
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))


def implicit_plan(logits_TE, reg=0.4, cost="linear", **options):
    return solve(logits_TE, reg, cost, **{"tol": 1e-12, "max_passes": 5000, "differentiable": True} | options)


def gradient(output, logits_TE, upstream=None):
    upstream = like(output) if upstream is None else upstream
    return torch.autograd.grad(output, logits_TE, upstream, retain_graph=True)[0]


def distance(x, expected):
    """Relative, in the Euclidean norm."""
    return float((x.double() - expected.double()).norm() / expected.double().norm())


# -- is it the gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_gradient_is_that_of_finite_differences(cost, options, output):
    def run(logits_TE):
        values = OUTPUTS[output](implicit_plan(logits_TE, cost=cost, **options))
        return values[values.isfinite()]  # not the potential of an expert without mass

    assert torch.autograd.gradcheck(run, (logits(),), eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_second_derivatives_are_those_of_finite_differences(cost, output):
    def run(logits_TE):
        return OUTPUTS[output](implicit_plan(logits_TE, cost=cost, token_mask=MASK_T))

    logits_TE = logits()
    assert torch.autograd.gradgradcheck(run, (logits_TE,), (like(run(logits_TE)).requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_forbidden_experts_have_gradient_0_and_leave_the_others_theirs(cost):
    forbidden = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    forbidden[0, 1:] = forbidden[1, 2] = forbidden[5, 0] = True
    start_TE = logits().detach().masked_fill(forbidden, -math.inf)

    def run(finite):
        return implicit_plan(start_TE.masked_scatter(~forbidden, finite), cost=cost).matrix()

    assert torch.autograd.gradcheck(run, (start_TE[~forbidden].requires_grad_(),), fast_mode=True)
    start_TE.requires_grad_()
    gradient_TE = gradient(implicit_plan(start_TE, cost=cost).matrix(), start_TE)
    assert gradient_TE.isfinite().all() and (gradient_TE[forbidden] == 0).all()


@pytest.mark.parametrize(("cost", "reg"), [("linear", 0.3), ("linear", 1.0), ("softmax", 0.1)])
@pytest.mark.parametrize("mass", [[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 0.5]])
def test_gradient_is_that_of_unrolled_iterations(cost, reg, mass):
    logits_TE = logits(seed=1)
    target_E = TOKENS * torch.tensor(mass, dtype=torch.float64) / sum(mass)
    matrix_TE = implicit_plan(logits_TE, reg, cost, expert_mass=mass).matrix()
    scaled_TE = (logits_TE if cost == "linear" else logits_TE.softmax(1)) / reg
    log_v_E = torch.zeros(EXPERTS, dtype=torch.float64)
    for _ in range(400):
        log_v_E = log_v_E + target_E.log() - (scaled_TE + log_v_E).log_softmax(1).logsumexp(0)
    expected_TE = (scaled_TE + log_v_E).softmax(1)
    torch.testing.assert_close(matrix_TE, expected_TE, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient(matrix_TE, logits_TE), gradient(expected_TE, logits_TE), rtol=1e-5, atol=1e-8)


def test_gradient_is_that_of_pot_unrolled():
    logits_TE = logits(seed=2)
    mass_T, mass_E = torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64), [1.0, 2.0, 3.0, 0.5]
    target_E = mass_T.sum() * torch.tensor(mass_E, dtype=torch.float64) / sum(mass_E)
    expected_TE = ot.sinkhorn(
        mass_T, target_E, -logits_TE, 0.5, method="sinkhorn_log", numItermax=300, stopThr=1e-14, warn=False
    )
    matrix_TE = implicit_plan(logits_TE, 0.5, token_mass=mass_T, expert_mass=mass_E).matrix()
    torch.testing.assert_close(matrix_TE, expected_TE, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient(matrix_TE, logits_TE), gradient(expected_TE, logits_TE), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("output", ["matrix", "potentials"])
def test_an_expert_without_mass_takes_no_part_in_the_gradient(output):
    logits_TE, kept = logits(seed=3), [0, 2, 3]
    values = OUTPUTS[output](implicit_plan(logits_TE, expert_mass=[1.0, 0.0, 1.0, 1.0]))
    upstream = like(values)
    gradient_TE = gradient(values, logits_TE, upstream)
    fewer_TE = logits_TE.detach()[:, kept].requires_grad_()
    expected_TE = gradient(OUTPUTS[output](implicit_plan(fewer_TE)), fewer_TE, upstream[..., kept])
    torch.testing.assert_close(gradient_TE[:, kept], expected_TE)
    assert (gradient_TE[:, 1] == 0).all()


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_masked_tokens_have_gradient_0_whatever_they_hold(cost):
    logits_TE = logits(seed=4).detach()
    logits_TE[~MASK_T] = math.nan
    logits_TE.requires_grad_()
    gradient_TE = gradient(implicit_plan(logits_TE, cost=cost, token_mask=MASK_T).matrix(), logits_TE)
    fewer_TE = logits_TE.detach()[MASK_T].requires_grad_()
    upstream_TE = like(logits_TE)[MASK_T]
    assert (gradient_TE[~MASK_T] == 0).all()
    torch.testing.assert_close(
        gradient_TE[MASK_T], gradient(implicit_plan(fewer_TE, cost=cost).matrix(), fewer_TE, upstream_TE)
    )


def test_column_sums_of_a_differentiable_plan_have_no_gradient():
    # They are what the constraint fixes, whatever the logits.
    logits_TE = logits(seed=5)
    weights_E = torch.arange(1.0, EXPERTS + 1, dtype=torch.float64)
    gradient_TE = gradient(implicit_plan(logits_TE).matrix().sum(0), logits_TE, weights_E)
    torch.testing.assert_close(gradient_TE, torch.zeros_like(gradient_TE), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("tokens", "experts"), [(3, 8), (1, 4), (5, 1), (0, 4), (2000, 150)])
def test_any_number_of_tokens_and_experts(tokens, experts):
    # Few tokens for many experts, one of either, none, and more than one chunk of rows.
    logits_TE = logits(6, tokens=tokens, experts=experts)
    upstream_E = like(logits_TE[:1].flatten() if tokens else torch.zeros(experts, dtype=torch.float64))
    gradient_TE = gradient(implicit_plan(logits_TE).potentials, logits_TE, upstream_E)
    assert gradient_TE.shape == logits_TE.shape and gradient_TE.isfinite().all()
    # Moving all logits of an expert by 1 moves its potential by −1, less the mean.
    torch.testing.assert_close(gradient_TE.sum(0), (upstream_E.mean() - upstream_E) * (tokens > 0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_gradients_reach_logits_of_any_dtype_under_autocast(cost, dtype, tolerance):
    logits_TE = logits(seed=6, dtype=torch.float64).detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights_TK = implicit_plan(logits_TE, cost=cost, tol=1e-6).topk(2)[0]
        gradient_TE = gradient(weights_TK, logits_TE)
    exact_TE = logits_TE.detach().double().requires_grad_()
    expected_TE = gradient(implicit_plan(exact_TE, cost=cost).topk(2)[0], exact_TE, like(weights_TK).double())
    assert gradient_TE.dtype == dtype
    torch.testing.assert_close(gradient_TE.double(), expected_TE, rtol=tolerance, atol=tolerance)


# -- where it is hardest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "reg", "scale"),
    [("linear", 0.01, 1.0), ("linear", 0.01, 4.0), ("linear", 0.003, 4.0), ("softmax", 0.01, 1.0)],
)
@pytest.mark.parametrize("output", ["topk", "matrix", "potentials"])
def test_float32_gradients_at_small_reg_are_those_of_float64(cost, reg, scale, output):
    logits_TE = (logits(8, torch.float32, tokens=1024, experts=32).detach() * scale).requires_grad_()
    plan = solve(logits_TE, reg, cost, tol=1e-5, differentiable=True)
    exact_TE = logits_TE.detach().double().requires_grad_()
    # From the same potentials: near a degenerate solution others, as good, have other gradients.
    exact = solve(exact_TE, reg, cost, tol=2e-5, init=plan.potentials, differentiable=True)
    assert exact.passes == 1
    values = OUTPUTS[output](plan)
    gradient_TE, upstream = gradient(values, logits_TE), like(values).double()
    expected_TE = gradient(OUTPUTS[output](exact), exact_TE, upstream)
    assert distance(gradient_TE, expected_TE) < 3e-6


@pytest.mark.parametrize("gap", [1.0, 8.0, 16.0])
def test_a_weak_joint_carries_the_whole_gradient(gap):
    # With two experts, g_0 − g_1 moves with the logits of a token as its p_0 p_1: 1e-7 of the mass at the last gap.
    logits_TE = torch.tensor([[gap, 0.0], [0.0, gap], [gap + 1, 0.0], [0.0, gap + 1]]).requires_grad_()
    plan = solve(logits_TE, reg=1.0, differentiable=True)
    shares_T = plan.matrix().detach().double().prod(dim=1)
    gradient_TE = gradient(plan.potentials[0] - plan.potentials[1], logits_TE, torch.ones((), dtype=torch.float64))
    expected_TE = (shares_T / shares_T.sum())[:, None] * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(gradient_TE.double(), expected_TE, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reg", [1.0, 0.03, 0.02, 0.015, 1e-3])
def test_gradients_stay_bounded_however_little_experts_share(dtype, reg):
    # Tokens in clusters, an expert each: what joins the experts falls from much to nothing.
    cluster_T = torch.arange(64) % 8
    logits_TE = logits(9, dtype, tokens=64, experts=8).detach() * 0.01
    logits_TE[torch.arange(64), cluster_T] += 0.5
    logits_TE.requires_grad_()
    plan = solve(logits_TE, reg, differentiable=True)
    upstream_E = like(plan.potentials)
    # Each unit of current passes at most E − 1 joints.
    bound = 7 * float(upstream_E.abs().sum())
    gradient_TE = gradient(plan.potentials, logits_TE, upstream_E)
    assert gradient_TE.isfinite().all() and gradient_TE.abs().sum() <= bound
    gradient_TE = gradient(plan.topk(2)[0], logits_TE)
    assert gradient_TE.isfinite().all() and gradient_TE.abs().max() < 10 / reg


def test_experts_without_a_common_token_are_apart():
    # Two blocks whose tokens never go to the other's experts: each has the gradient it has alone.
    block_TE = torch.tensor([[0.0, 0.1], [0.1, 0.0], [0.3, 0.0], [0.0, 0.2]])
    logits_TE = torch.full((8, 4), -math.inf)
    logits_TE[:4, :2] = logits_TE[4:, 2:] = block_TE
    logits_TE.requires_grad_()
    gradient_TE = gradient(solve(logits_TE, 0.1, tol=1e-6, differentiable=True).matrix(), logits_TE)
    block_TE.requires_grad_()
    alone_TE = solve(block_TE, 0.1, tol=1e-6, differentiable=True).matrix()
    for rows, columns in ((slice(0, 4), slice(0, 2)), (slice(4, 8), slice(2, 4))):
        expected_TE = gradient(alone_TE, block_TE, like(logits_TE)[rows, columns])
        torch.testing.assert_close(gradient_TE[rows, columns], expected_TE, rtol=1e-4, atol=1e-5)


# -- what is kept for backward ----------------------------------------------------------------------------------------


def test_beside_the_logits_only_vectors_are_kept():
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    logits_TE = logits(10, tokens=1000, experts=16)
    with saved_tensors_hooks(pack, lambda x: x):
        potentials_E = solve(logits_TE, token_mask=torch.ones(1000, dtype=torch.bool), differentiable=True).potentials
    assert kept.pop(logits_TE.untyped_storage().data_ptr()) == 8 * 16000
    assert sum(kept.values()) == 1000 + 16 * 8
    assert potentials_E.requires_grad


def test_logits_are_let_go_with_the_graph():
    gc.disable()
    try:
        logits_TE = logits()
        plan = implicit_plan(logits_TE * 1)
        alive = weakref.ref(plan.logits)
        plan.matrix().sum().backward()
        assert alive() is not None
        del plan
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("what", ["logits", "mask"])
def test_changes_in_place_before_backward_are_noticed(what):
    logits_TE, mask_T = logits() * 1, MASK_T.clone()
    plan = implicit_plan(logits_TE, token_mask=mask_T)
    with torch.no_grad():
        (logits_TE if what == "logits" else mask_T).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        plan.potentials.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_lets_the_logits_go_and_gives_the_same_gradient(reentrant):
    logits_TE = logits()
    (expected_TE,) = torch.autograd.grad((implicit_plan(logits_TE).matrix() ** 2).sum(), logits_TE)
    storages = []

    def run(logits_TE):
        inner_TE = logits_TE * 1
        storages.append(weakref.ref(inner_TE.untyped_storage()))
        return implicit_plan(inner_TE).matrix()

    matrix_TE = checkpoint(run, logits_TE, use_reentrant=reentrant)
    assert storages[0]() is None
    (matrix_TE**2).sum().backward()
    assert torch.equal(logits_TE.grad, expected_TE)


# -- with and without -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_without_differentiable_nothing_carries_a_gradient(cost):
    plan = solve(logits(), cost=cost)
    outputs = [plan.potentials, plan.cost, plan.column_error, plan.matrix(), plan.topk(2)[0]]
    assert not any(x.requires_grad for x in outputs)


def test_differentiable_without_gradient_mode_is_the_same_plan():
    logits_TE = logits()
    with torch.no_grad():
        plan = solve(logits_TE, differentiable=True)
    assert not plan.matrix().requires_grad
    assert torch.equal(plan.potentials, solve(logits_TE).potentials)


def test_differentiable_changes_no_value():
    logits_TE = logits(11, torch.float32, tokens=200, experts=8)
    plan, same = solve(logits_TE, 0.02), solve(logits_TE, 0.02, differentiable=True)
    assert torch.equal(plan.potentials, same.potentials) and torch.equal(plan.topk(3)[1], same.topk(3)[1])
    torch.testing.assert_close(plan.topk(3)[0], same.topk(3)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plan.matrix(), same.matrix(), rtol=0, atol=0)


def test_a_second_derivative_over_ranks_is_refused():
    logits_TE = logits()
    plan = implicit_plan(logits_TE, reduce=lambda x: x)
    (gradient_TE,) = torch.autograd.grad((plan.matrix() ** 2).sum(), logits_TE, retain_graph=True)
    assert gradient_TE.isfinite().all()
    with pytest.raises(NotImplementedError, match=r"differentiable=True.* over several ranks.* without create_graph"):
        torch.autograd.grad((plan.matrix() ** 2).sum(), logits_TE, create_graph=True)


def potentials_of(logits_TE):
    return solve(logits_TE, differentiable=True, tol=1e-7).potentials


def weights_of(logits_TE):
    return solve(logits_TE, differentiable=True, tol=1e-7).topk(2)[0][:, 0].sum()


def many_logits():
    return torch.randn(3, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_many_gradients_at_once_are_those_of_one_at_a_time():
    logits_TE = many_logits()[0]
    jacobian_ETE = torch.autograd.functional.jacobian(potentials_of, logits_TE)
    at_once_ETE = torch.autograd.functional.jacobian(potentials_of, logits_TE, vectorize=True)
    torch.testing.assert_close(at_once_ETE, jacobian_ETE)
    torch.testing.assert_close(torch.func.jacrev(potentials_of)(logits_TE), jacobian_ETE)
    given_TE = logits_TE.clone().requires_grad_()
    (batched_ETE,) = torch.autograd.grad(
        potentials_of(given_TE), given_TE, torch.eye(4, dtype=torch.float64), is_grads_batched=True
    )
    torch.testing.assert_close(batched_ETE, jacobian_ETE)


def test_gradients_of_many_problems_at_once_are_those_of_each():
    logits_NTE = many_logits()
    alone = [torch.func.grad(weights_of)(logits_TE) for logits_TE in logits_NTE]
    for logits_TE, gradient_TE in zip(logits_NTE, alone, strict=True):
        given_TE = logits_TE.clone().requires_grad_()
        weights_of(given_TE).backward()
        torch.testing.assert_close(gradient_TE, given_TE.grad)
    torch.testing.assert_close(torch.vmap(torch.func.grad(weights_of))(logits_NTE), torch.stack(alone))


def test_second_derivatives_by_torch_func_are_those_of_autograd():
    logits_TE = many_logits()[0]
    hessian = torch.autograd.functional.hessian(weights_of, logits_TE)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(weights_of))(logits_TE), hessian)
    torch.testing.assert_close(torch.autograd.functional.hessian(weights_of, logits_TE, vectorize=True), hessian)


@pytest.mark.parametrize("forward", [torch.func.jacfwd, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
def test_forward_mode_is_refused_by_name(forward):
    with pytest.raises(NotImplementedError, match="logits_TE carries a tangent"):
        forward(potentials_of)(many_logits()[0])


def test_a_tangent_is_not_dropped_in_silence():
    logits_TE = many_logits()[0]
    with torch.autograd.forward_ad.dual_level():
        dual_TE = torch.autograd.forward_ad.make_dual(logits_TE, logits_TE)
        with pytest.raises(NotImplementedError, match="logits_TE carries a tangent"):
            potentials_of(dual_TE)
        assert torch.equal(solve(dual_TE).potentials, solve(logits_TE).potentials)
