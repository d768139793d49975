"""What SSR leaves open: who weighs on Sinkhorn steps, learned noise, modes of inference."""

import math

import pytest
import torch

import sinkroute

FAMILY = ["ssr-l", "ssr-s", "ssr-b", "ssr-ec", "ssr-bias", "ssr-fold"]
every_member = pytest.mark.parametrize("name", FAMILY)


def ssr(name="ssr-l", experts=6, top_k=2, **options):
    return sinkroute.create_router(name, num_experts=experts, top_k=top_k, **options)


def scores(tokens=40, experts=6, dtype=torch.float32):
    return torch.randn(tokens, experts, dtype=dtype, generator=torch.Generator().manual_seed(3))


# -- weights on Sinkhorn steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ssr-l", "ssr-s", "ssr-b", "ssr-bias", "ssr-fold"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_by_scores_the_plan_chooses_and_the_softmax_weighs(name, top_k):
    logits_TE, oracle_TE = (scores(dtype=torch.float64).requires_grad_() for _ in range(2))
    by_plan = ssr(name, top_k=top_k, probability=1, noise=0)(logits_TE)
    routes = ssr(name, top_k=top_k, probability=1, noise=0, weights="scores")(logits_TE)
    assert routes.branch == "sinkhorn" and torch.equal(routes.experts, by_plan.experts)
    expected_TK = oracle_TE.softmax(1).gather(1, routes.experts)
    if top_k > 1:
        expected_TK = expected_TK / expected_TK.sum(1, keepdim=True)
    torch.testing.assert_close(routes.weights, expected_TK, rtol=1e-12, atol=1e-14)
    gradient_TK = scores(40, top_k, torch.float64)
    (routes.weights * gradient_TK).sum().backward()
    (expected_TK * gradient_TK).sum().backward()
    torch.testing.assert_close(logits_TE.grad, oracle_TE.grad, rtol=1e-10, atol=1e-13)
    assert oracle_TE.grad.abs().max() > 1e-2


# -- learned noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "start"), [("learned", 0.3), ("learned(1.5)", 1.5), (" learned ( 2 ) ", 2.0)])
def test_learned_noise_starts_where_it_is_told(text, start):
    router = ssr(noise=text, experts=8)
    assert router.noise_std == pytest.approx(start / 8, rel=1e-5)
    assert [name for name, _ in router.named_parameters()] == ["raw_noise"]


def test_the_gradient_of_learned_noise_is_that_of_the_noisy_scores():
    # d loss / d α = Σ d loss / d z · noise / E, and α = softplus(raw): d α / d raw = sigmoid(raw).
    router = ssr(noise="learned(1.0)", probability=0)
    logits_TE, gradient_TK = scores(), scores(40, 2)
    sinkroute.set_step(router, 3)
    noise_TE = router.draw_normal(logits_TE)
    shifted_TE = (logits_TE + noise_TE / 6).requires_grad_()
    expected = sinkroute.create_router("softmax", num_experts=6, top_k=2)(shifted_TE)
    (expected.weights * gradient_TK).sum().backward()
    (router(logits_TE).weights * gradient_TK).sum().backward()
    wanted = (shifted_TE.grad * noise_TE / 6).sum() * torch.sigmoid(router.raw_noise.detach())
    torch.testing.assert_close(router.raw_noise.grad, wanted, rtol=1e-4, atol=1e-6)
    assert wanted.abs() > 1e-3


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_learned_noise_has_a_gradient_on_every_step(probability):
    # None on Sinkhorn steps would make DistributedDataParallel refuse the step.
    router = ssr(noise="learned", probability=probability)
    router(scores().requires_grad_()).weights.square().sum().backward()
    assert router.raw_noise.grad is not None and math.isfinite(router.raw_noise.grad)


def test_learned_noise_is_not_in_evaluation():
    router = ssr(noise="learned(4)").eval()
    plain = sinkroute.create_router("softmax", num_experts=6, top_k=2)
    assert torch.equal(router(scores()).weights, plain(scores()).weights)


@pytest.mark.parametrize("text", ["learned(0)", "learned(-1)", "learned(x)", "learned(inf)", "learned 3"])
def test_learned_noise_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match="noise must be learned or learned"):
        ssr(noise=text)


# -- inference -------------------------------------------------------------------------------------------------------


@every_member
def test_inference_none_is_plain_topk(name):
    router = ssr(name, probability=1, noise=4.0).eval()
    plain = sinkroute.create_router("softmax", num_experts=6, top_k=2).eval()
    for mode in ("noise", "both", "none"):
        sinkroute.set_inference(router, mode)
    assert torch.equal(router(scores()).weights, plain(scores()).weights)


@every_member
@pytest.mark.parametrize(("mode", "probability", "noise"), [("noise", 0, 2.0), ("sinkhorn", 1, 0), ("both", 1, 2.0)])
def test_inference_modes_are_the_rules_of_training(name, mode, probability, noise):
    serving = ssr(name, probability=0.5, noise=2.0, inference=mode).eval()
    training = ssr(name, probability=probability, noise=noise)
    for router in (serving, training):
        sinkroute.set_step(router, 5)
    found, expected = serving(scores()), training(scores())
    assert torch.equal(found.experts, expected.experts) and torch.equal(found.weights, expected.weights)
    assert found.branch == expected.branch


def test_inference_does_not_change_training():
    logits_TE = scores()
    one, other = ssr(probability=0, noise=1.0), ssr(probability=0, noise=1.0, inference="both")
    assert torch.equal(one(logits_TE).weights, other(logits_TE).weights)


def test_set_inference_reaches_every_router_of_a_model():
    layers = torch.nn.ModuleList(sinkroute.MoE(8, 8, 4, 2, router=name) for name in FAMILY)
    sinkroute.set_inference(layers, "noise")
    assert all(layer.router.inference == "noise" for layer in layers)


def test_set_inference_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="unknown mode 'sinkhron'; did you mean 'sinkhorn'"):
        sinkroute.set_inference(ssr(), "sinkhron")
    plain = sinkroute.create_router("softmax", num_experts=6, top_k=2)
    with pytest.raises(ValueError, match="mode='noise' is for routers of the SSR family"):
        sinkroute.set_inference(plain, "noise")
    sinkroute.set_inference(plain, "none")  # which it does


# -- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ssr-l", "ssr-s"])
def test_on_sinkhorn_steps_too_a_token_stays_in_its_groups(name):
    routes = ssr(name, probability=1, noise=0, groups=3, top_groups=1)(scores())
    assert (routes.experts // 2).diff(dim=1).abs().max() == 0
    whole = ssr(name, probability=1, noise=0)(scores())
    assert not torch.equal(routes.experts, whole.experts)


@pytest.mark.parametrize("name", ["sinkhorn", "ssr-l", "ssr-s"])
def test_groups_are_judged_by_the_plans_entries_and_not_by_their_logarithms(name):
    # Rows of the plan are nearly one-hot; by the sums of logarithms the other group would win.
    logits_TE = torch.tensor([[8, -9, 1, 0.5], [0.5, 1, -9, 8], [1, 8, 0.5, -9], [-9, 0.5, 8, 1.0]])
    options = {} if name == "sinkhorn" else {"probability": 1, "noise": 0}
    groups = {"groups": 2, "top_groups": 1, "group_score": "top2-sum"}
    router = sinkroute.create_router(name, num_experts=4, top_k=1, **groups, **options)
    assert router(logits_TE).experts.flatten().tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("name", ["ssr-b", "ssr-ec", "ssr-bias", "ssr-fold"])
def test_members_that_choose_for_all_tokens_at_once_refuse_groups(name):
    with pytest.raises(ValueError, match=r"top_groups=1 of groups=3.*take ssr-l or ssr-s"):
        ssr(name, groups=3, top_groups=1)
    ssr(name, groups=3)  # all of them: no restriction


def test_weights_of_the_plan_sum_to_one_whatever_the_route_scale():
    routes = ssr(probability=1, noise=0, route_scale=2.5)(scores())
    torch.testing.assert_close(routes.weights.sum(1), torch.full((40,), 2.5))


# -- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_branch", ["softmax", "sinkhorn", "both"])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_learned_noise_has_a_gradient_in_whatever_branch_it_is(noise_branch, probability):
    router = ssr(noise="learned", probability=probability, noise_branch=noise_branch)
    router(scores().requires_grad_()).weights.square().sum().backward()
    assert router.raw_noise.grad is not None


def test_a_gradient_through_weights_that_are_not_the_plans_is_refused():
    with pytest.raises(ValueError, match=r"plan_gradient='full' is of the plan's weights.*give weights=.plan."):
        ssr(weights="scores", plan_gradient="full")


@pytest.mark.parametrize("name", ["ssr-b", "ssr-bias", "ssr-fold"])
@pytest.mark.parametrize(("value", "error"), [(-3, ValueError), (math.nan, ValueError), ("x", TypeError)])
def test_a_tolerance_that_is_none_is_refused_when_the_router_is_made(name, value, error):
    with pytest.raises(error, match="balance_tol must be"):
        ssr(name, balance_tol=value)


def test_what_was_decided_before_a_state_was_loaded_is_decided_again():
    rule = "adaptive(high=0.5, low=0.1, floor=0, ceiling=1)"
    trained, fresh = ssr(probability=rule, noise=0), ssr(probability=rule, noise=0)
    sinkroute.set_step(trained, 0)
    trained(scores() + torch.tensor([9.0, 0, 0, 0, 0, 0]))
    sinkroute.end_step(trained)
    sinkroute.set_step(fresh, 1)
    fresh.load_state_dict(trained.state_dict())
    assert fresh(scores()).branch == "sinkhorn"


@pytest.mark.parametrize("cost", ["l", "s"])
def test_the_literal_reading_has_noise_of_alpha_itself_on_plans_only(cost):
    literal = sinkroute.create_router(f"ssr-{cost}-literal", num_experts=8, top_k=2, noise=0.7, probability=0.0)
    plain = sinkroute.create_router("softmax", num_experts=8, top_k=2)
    logits_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for router in (literal, plain):
        sinkroute.set_step(router, 3)
    found, expected = literal(logits_TE), plain(logits_TE)
    assert torch.equal(found.experts, expected.experts) and torch.equal(found.weights, expected.weights)
    sure, told = (
        sinkroute.create_router(name, num_experts=8, top_k=2, noise=0.7, probability=1.0, **options)
        for name, options in (
            (f"ssr-{cost}-literal", {}),
            (f"ssr-{cost}", {"noise_branch": "sinkhorn", "noise_scale": "absolute"}),
        )
    )
    assert sure.noise_std == 0.7
    assert torch.equal(sure(logits_TE).weights, told(logits_TE).weights)
