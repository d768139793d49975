"""Selective Sinkhorn Routing: which branch, what noise, what the plan decides, and what the gate learns from it."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sinkroute
from sinkroute.routing.ranks import Ranks

FORMS = [("ssr-l", "linear"), ("ssr-s", "softmax")]
every_form = pytest.mark.parametrize(("name", "cost"), FORMS)


def ssr(name="ssr-s", experts=6, top_k=2, **options):
    return sinkroute.create_router(name, num_experts=experts, top_k=top_k, **options)


def scores(tokens=40, experts=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, experts, generator=generator) + torch.randn(experts, generator=generator)).to(dtype)


def branches(router, steps):
    logits_TE, taken = torch.zeros(1, router.num_experts), []
    for step in steps:
        sinkroute.set_step(router, step)
        taken.append(router(logits_TE).branch)
    return taken


# -- the branch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["step", "layer"])
@pytest.mark.parametrize("probability", [0.01, 0.3])
def test_the_share_of_sinkhorn_steps_is_the_probability(probability, draw):
    taken = branches(ssr(experts=2, noise=0, probability=probability, draw=draw), range(3000))
    # Binomial: five standard deviations are 5 √(3000 p (1 − p)), 27 of 30 for p = 0.01 and 125 of 900 for p = 0.3.
    deviation = math.sqrt(3000 * probability * (1 - probability))
    assert abs(taken.count("sinkhorn") - 3000 * probability) < 5 * deviation


@pytest.mark.parametrize(
    ("probability", "branch"), [(0.0, "softmax"), (0, "softmax"), (1.0, "sinkhorn"), (1, "sinkhorn")]
)
def test_probabilities_0_and_1_are_never_and_always(probability, branch):
    assert set(branches(ssr(experts=2, probability=probability), range(200))) == {branch}


def test_the_branch_of_a_step_depends_on_the_seed_and_the_step_alone():
    once, again = (branches(ssr(probability=0.5), range(64)) for _ in range(2))
    assert once == again
    assert branches(ssr(probability=0.5), reversed(range(64))) == once[::-1]
    assert branches(ssr(probability=0.5, seed=1), range(64)) != once


def test_drawn_per_step_all_layers_and_micro_batches_agree():
    layers = [ssr(probability=0.5, layer=layer) for layer in range(3)]
    for step in range(20):
        taken = set()
        for router in layers:
            for micro_batch in range(2):
                sinkroute.set_step(router, step, micro_batch)
                taken.add(router(torch.zeros(1, 6)).branch)
        assert len(taken) == 1


def test_drawn_per_layer_layers_and_micro_batches_differ():
    taken = {}
    for layer, micro_batch in ((0, 0), (1, 0), (0, 1)):
        router = ssr(probability=0.5, draw="layer", layer=layer)
        taken[layer, micro_batch] = []
        for step in range(64):
            sinkroute.set_step(router, step, micro_batch)
            taken[layer, micro_batch].append(router(torch.zeros(1, 6)).branch)
    assert taken[0, 0] != taken[1, 0] != taken[0, 1] != taken[0, 0]


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_routing_neither_reads_nor_moves_the_global_generator(probability):
    router, results = ssr(probability=probability, noise=1.0), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(router(scores()))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0].experts, results[1].experts)
    assert torch.equal(results[0].weights, results[1].weights)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_recomputation_in_the_backward_pass_takes_the_same_routes(probability, use_reentrant):
    router, seen = ssr(probability=probability, noise=1.0, plan_gradient="weights"), []
    sinkroute.set_step(router, 3)

    def loss_of(logits_TE):
        routes = router(logits_TE)
        seen.append(routes.experts)
        return (routes.weights**2).sum()

    plain, recomputed = scores().requires_grad_(), scores().requires_grad_()
    loss_of(plain).backward()
    # Without the saved state of the global generators, which could hide a draw from them.
    checkpoint(loss_of, recomputed, use_reentrant=use_reentrant, preserve_rng_state=False).backward()
    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    assert torch.equal(plain.grad, recomputed.grad) and plain.grad.abs().sum() > 0


# -- noise -----------------------------------------------------------------------------------------------------------


def measured_std(router, probability):
    """Standard deviation of the noise on equal scores of many tokens, from the weights of all experts of a token.

    Softmax branch: ln w = n − const per token. Sinkhorn branch: reg · ln w = n + g − const per token. Noise less its
    mean over the token's E experts (and over the T tokens) has variance σ² (1 − 1/E) (σ² (1 − 1/E)(1 − 1/T)).
    """
    tokens, experts = 4000, router.num_experts
    routes = router(torch.zeros(tokens, experts, dtype=torch.float64))
    log_TE = torch.zeros(tokens, experts, dtype=torch.float64).scatter(1, routes.experts, routes.weights.log())
    noise_TE = log_TE - log_TE.mean(1, keepdim=True)
    if probability == 1:
        noise_TE = router.reg * (noise_TE - noise_TE.mean(0))
    return (noise_TE.pow(2).mean() / (1 - 1 / experts)).sqrt().item()


@every_form
@pytest.mark.parametrize("probability", [0.0, 1.0])
@pytest.mark.parametrize(("scale", "std"), [("per-expert", 0.4 / 8), ("absolute", 0.4)])
def test_noise_is_as_strong_as_asked(name, cost, probability, scale, std):
    router = ssr(name, experts=8, top_k=8, noise=0.4, noise_scale=scale, probability=probability)
    # 28000 free numbers: the standard deviation is off by 1/√56000 = 0.4 %; five of them.
    assert measured_std(router, probability) == pytest.approx(std, rel=0.021)


@pytest.mark.parametrize(
    ("probability", "noise_branch", "noisy"),
    [(0.0, "softmax", True), (0.0, "sinkhorn", False), (1.0, "softmax", False), (1.0, "sinkhorn", True)],
)
@every_form
def test_noise_is_in_the_named_branch_only(name, cost, probability, noise_branch, noisy):
    routes = ssr(name, probability=probability, noise=3.0, noise_branch=noise_branch)(scores())
    both = ssr(name, probability=probability, noise=3.0)(scores())
    quiet = ssr(name, probability=probability, noise=0)(scores())
    assert torch.equal(routes.weights, (both if noisy else quiet).weights)
    assert torch.equal(routes.experts, (both if noisy else quiet).experts)
    assert not torch.equal(both.experts, quiet.experts)


@pytest.mark.parametrize("probability", [0.0, 1.0])
@pytest.mark.parametrize("change", [{"step": 2}, {"layer": 1}, {"micro_batch": 1}, {"seed": 1}, {"rank": 1}])
def test_noise_differs_with_every_part_of_its_key_and_repeats_with_the_same(monkeypatch, change, probability):
    def route(step=1, layer=0, micro_batch=0, seed=0, rank=0):
        monkeypatch.setattr(Ranks, "rank", rank)
        router = ssr(probability=probability, noise=1.0, seed=seed, layer=layer)
        sinkroute.set_step(router, step, micro_batch)
        return router(scores()).weights

    assert torch.equal(route(), route())
    assert not torch.equal(route(), route(**change))


def test_a_router_draws_anew_at_every_step_and_again_at_the_same():
    router, weights = ssr(probability=0.0, noise=1.0), []
    for step in (1, 2, 1):
        sinkroute.set_step(router, step)
        weights.append(router(scores()).weights)
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


def test_noise_moves_neither_gradient_nor_scale_of_the_scores():
    # The noisy scores are z + n: their weights have the gradient of softmax at z + n, and nothing else.
    clean = scores(dtype=torch.float64).requires_grad_()
    router = ssr(probability=0.0, noise=1.0)
    shifted = (clean.detach() + router.noise_std * router.draw_normal(clean)).requires_grad_()
    routes, expected = router(clean), sinkroute.create_router("softmax", num_experts=6, top_k=2)(shifted)
    (routes.weights**2).sum().backward()
    (expected.weights**2).sum().backward()
    assert torch.equal(routes.experts, expected.experts)
    torch.testing.assert_close(clean.grad, shifted.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["ssr-l", "ssr-s", "ssr-b", "ssr-bias", "ssr-fold"])
@pytest.mark.parametrize(("noise", "noise_scale"), [(0.3, "per-expert"), (2.0, "absolute"), ("learned", "per-expert")])
@pytest.mark.parametrize(
    ("score", "top_k", "norm_topk"), [("softmax", 2, True), ("sigmoid", 3, True), ("sigmoid", 1, False)]
)
def test_noise_drawn_for_few_routes_as_noise_on_all_scores(name, noise, noise_scale, score, top_k, norm_topk):
    options = {"noise": noise, "noise_scale": noise_scale, "score": score, "norm_topk": norm_topk, "probability": 0}
    router, gradient_TK = ssr(name, 40, top_k, **options), scores(300, top_k, seed=4)
    sinkroute.set_step(router, 3)
    if name == "ssr-bias":
        router.state.bias_E.copy_(torch.linspace(-1, 1, 40))
    few_TE, all_TE = (scores(300, 40).requires_grad_() for _ in range(2))
    routes, expected = router(few_TE), router.topk(router.with_noise(all_TE))
    assert torch.equal(routes.experts, expected.experts) and torch.equal(routes.weights, expected.weights)
    (routes.weights * gradient_TK).sum().backward()
    learned = [parameter.grad.clone() for parameter in router.parameters()]
    router.zero_grad()
    (expected.weights * gradient_TK).sum().backward()
    assert torch.equal(few_TE.grad, all_TE.grad) and few_TE.grad.abs().max() > 1e-2
    for one, parameter in zip(learned, router.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-7)


# -- the plan --------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("reg", [0.05, 0.5])
@pytest.mark.parametrize(("top_k", "norm_topk"), [(1, None), (2, None), (3, False)])
@pytest.mark.parametrize("plan_gradient", ["none", "weights", "full"])
def test_routes_without_noise_are_the_largest_entries_of_the_plan(name, cost, reg, top_k, norm_topk, plan_gradient):
    router = ssr(name, top_k=top_k, norm_topk=norm_topk, reg=reg, probability=1, noise=0, plan_gradient=plan_gradient)
    routes, plan = router(scores()), sinkroute.solve(scores(), reg, cost=cost)
    weights_TK, experts_TK = plan.topk(top_k, normalise=norm_topk is None and top_k > 1)
    assert torch.equal(routes.experts, experts_TK) and routes.plan_passes == plan.passes
    torch.testing.assert_close(routes.weights, weights_TK, rtol=1e-5, atol=1e-7)


@every_form
def test_the_plan_balances_the_load(name, cost):
    quiet = ssr(name, probability=1, noise=0, top_k=1)
    logits_TE = scores(600) + torch.tensor([2.0, 0, 0, 0, 0, 0])
    plain, balanced = quiet.eval()(logits_TE).load, quiet.train()(logits_TE).load
    assert plain.max() > 200 and balanced.max() < 150  # of 600 tokens; even is 100


def weights_by_unrolling(logits_TE, cost, reg, experts_TK, normalise, passes=1500):
    """The textbook's u and v, every iteration on the tape: float64 weights of the given experts."""
    cost_TE = logits_TE.softmax(1) if cost == "softmax" else logits_TE
    kernel_TE = (cost_TE / reg).exp()
    tokens, experts = cost_TE.shape
    v_E = torch.ones(experts, dtype=torch.float64)
    for _ in range(passes):
        v_E = (tokens / experts) / (kernel_TE.t() @ (1 / (kernel_TE @ v_E)))
    plan_TE = kernel_TE * v_E / (kernel_TE @ v_E)[:, None]
    chosen_TK = plan_TE.gather(1, experts_TK)
    return chosen_TK / chosen_TK.sum(1, keepdim=True) if normalise else chosen_TK


@every_form
@pytest.mark.parametrize(("top_k", "normalise"), [(1, False), (2, True), (2, False)])
def test_the_full_gradient_is_that_of_an_unrolled_solver(name, cost, top_k, normalise):
    ours, unrolled = (scores(12, dtype=torch.float64).requires_grad_() for _ in range(2))
    router = ssr(
        name, top_k=top_k, norm_topk=normalise, reg=0.4, probability=1, noise=0, plan_gradient="full", tol=1e-12
    )
    routes = router(ours)
    expected_TK = weights_by_unrolling(unrolled, cost, 0.4, routes.experts, normalise)
    torch.testing.assert_close(routes.weights, expected_TK, rtol=1e-9, atol=1e-11)
    gradient_TK = torch.randn(12, top_k, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (routes.weights * gradient_TK).sum().backward()
    (expected_TK * gradient_TK).sum().backward()
    assert unrolled.grad.abs().max() > 1e-2
    torch.testing.assert_close(ours.grad, unrolled.grad, rtol=1e-6, atol=1e-8)


@every_form
def test_the_full_gradient_with_noise_and_a_mask_is_that_of_finite_differences(name, cost):
    router = ssr(name, reg=0.4, probability=1, noise=1.0, plan_gradient="full", tol=1e-12, max_passes=5000)
    mask = torch.tensor([True, True, False, True, True, True])
    logits_TE = scores(6, dtype=torch.float64).requires_grad_()
    sinkroute.set_step(router, 1)
    assert torch.autograd.gradcheck(lambda logits: router(logits, mask).weights, (logits_TE,), eps=1e-6, atol=1e-5)


@every_form
@pytest.mark.parametrize(("top_k", "normalise"), [(1, False), (2, True), (2, False)])
def test_the_gradient_through_the_weights_holds_the_potentials_fixed(name, cost, top_k, normalise):
    ours, oracle = (scores(dtype=torch.float64).requires_grad_() for _ in range(2))
    router = ssr(name, top_k=top_k, norm_topk=normalise, reg=0.3, probability=1, noise=0, plan_gradient="weights")
    routes = router(ours)
    cost_TE = oracle.softmax(1) if cost == "softmax" else oracle
    potentials_E = sinkroute.solve(oracle.detach(), 0.3, cost=cost).potentials
    chosen_TK = ((cost_TE + potentials_E) / 0.3).softmax(1).gather(1, routes.experts)
    if normalise:
        chosen_TK = chosen_TK / chosen_TK.sum(1, keepdim=True)
    gradient_TK = torch.randn(40, top_k, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (routes.weights * gradient_TK).sum().backward()
    (chosen_TK * gradient_TK).sum().backward()
    assert oracle.grad.abs().max() > 1e-2
    torch.testing.assert_close(ours.grad, oracle.grad, rtol=1e-9, atol=1e-11)


@every_form
@pytest.mark.parametrize("top_k", [1, 2])
def test_without_plan_gradient_the_gate_gets_a_gradient_of_zeros_rather_than_none(name, cost, top_k):
    # None would make DistributedDataParallel refuse the step: "parameters that were not used in producing loss".
    logits_TE = scores().requires_grad_()
    ssr(name, top_k=top_k, probability=1)(logits_TE).weights.square().sum().backward()
    assert torch.equal(logits_TE.grad, torch.zeros_like(logits_TE))


@pytest.mark.parametrize("plan_gradient", ["weights", "full"])
def test_a_single_expert_per_token_keeps_the_gradient_of_the_gate_alive(plan_gradient):
    logits_TE = scores().requires_grad_()
    ssr(top_k=1, probability=1, plan_gradient=plan_gradient)(logits_TE).weights.sum().backward()
    assert logits_TE.grad.abs().max() > 1e-3


@pytest.mark.parametrize("plan_gradient", ["none", "weights", "full"])
def test_a_cost_far_beyond_what_exp_can_hold_gives_finite_weights_and_gradients(plan_gradient):
    # C/ξ = 1e36/1e-3 = 1e39 overflows float32 itself, let alone exp.
    logits_TE = (1e36 * torch.tensor([[1.0, -1.0, 0.5], [0.9, 0.1, -1.0], [1.0, 0.2, 0.3]])).requires_grad_()
    router = ssr("ssr-l", experts=3, reg=1e-3, probability=1, noise=0, plan_gradient=plan_gradient, max_passes=50)
    routes = router(logits_TE)
    routes.weights[:, 0].sum().backward()
    assert torch.isfinite(routes.weights).all() and torch.isfinite(logits_TE.grad).all()
