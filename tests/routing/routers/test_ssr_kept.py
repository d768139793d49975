"""SSR-Bias and SSR-Fold: what is made of a plan's potentials when its step is over."""

import copy

import pytest
import torch

import sinkroute
from sinkroute.routing.fold import GateFold
from sinkroute.routing.metrics import max_violation

both = pytest.mark.parametrize("name", ["ssr-bias", "ssr-fold"])


OF_PLAN = {"balance": "plan", "weights": "plan"}


def make(name, experts=4, top_k=1, **options):
    options = {"probability": "piecewise(0: 1, 1: 0)", "noise": 0} | options  # a plan at step 0, none after it
    return sinkroute.create_router(name, num_experts=experts, top_k=top_k, **options)


def skewed(tokens=800, experts=4, seed=0):
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return logits_TE + torch.linspace(0, 2, experts)


def bind(router, gate):
    """Have the router fold into a plain gate, and see what that is given."""
    link = GateFold(router, gate, "weight")
    router.links.append(link)
    gate.register_forward_pre_hook(lambda _, args: link.see(args[0]))


def take_step(router, *batches, step=0):
    for part, batch in enumerate(batches):
        sinkroute.set_step(router, step, part)
        routes = router(batch)
    sinkroute.end_step(router)
    return routes


# -- the bias --------------------------------------------------------------------------------------------------------


def test_the_potentials_of_the_plan_are_the_bias_of_the_next_step():
    router = make("ssr-bias", **OF_PLAN)
    take_step(router, skewed())
    plan = sinkroute.solve(skewed(), 0.5)
    torch.testing.assert_close(router.state.bias_E, plan.potentials.float(), rtol=1e-4, atol=1e-4)


def test_the_bias_chooses_and_does_not_weigh():
    router = make("ssr-bias", top_k=2)
    take_step(router, skewed())
    logits_TE = skewed(seed=1).requires_grad_()
    sinkroute.set_step(router, 1)
    routes = router(logits_TE)
    assert routes.branch == "softmax"
    biased_TE = logits_TE.detach() + router.state.bias_E
    assert torch.equal(routes.experts, biased_TE.topk(2).indices)
    torch.testing.assert_close(routes.weights, logits_TE.gather(1, routes.experts).softmax(1))
    (routes.weights[:, 0]).sum().backward()
    assert logits_TE.grad.abs().max() > 1e-2


@pytest.mark.parametrize(("balance", "most"), [("plan", 0.35), ("load", 0.15)])
def test_the_steps_between_are_balanced_on_other_tokens(balance, most):
    router = make("ssr-bias", experts=8, balance=balance)
    take_step(router, skewed(4000, 8))
    plain = sinkroute.create_router("softmax", num_experts=8, top_k=1)(skewed(4000, 8, seed=1)).load
    sinkroute.set_step(router, 1)
    load_E = router(skewed(4000, 8, seed=1)).load
    assert max_violation(load_E) < most < 1 < max_violation(plain)


def test_balanced_loads_leave_the_bias_that_makes_them():
    router = make("ssr-bias", balance="load", probability=1)
    routes = take_step(router, skewed())
    assert routes.load.max() <= 202
    again = (skewed() + router.state.bias_E).topk(1).indices.flatten().bincount(minlength=4)
    assert again.max() <= 204  # the same choices, but for ties and float32


def test_the_bias_moves_by_its_rate():
    whole, part = (make("ssr-bias", probability=1, rate=rate, **OF_PLAN) for rate in (1.0, 0.25))
    for router in (whole, part):
        take_step(router, skewed())
    torch.testing.assert_close(part.state.bias_E, 0.25 * whole.state.bias_E)
    before = part.state.bias_E.clone()
    take_step(part, skewed(seed=5), step=1)
    target = sinkroute.solve(skewed(seed=5), 0.5).potentials.float()
    torch.testing.assert_close(part.state.bias_E, 0.75 * before + 0.25 * target, rtol=1e-3, atol=1e-3)


@both
def test_micro_batches_count_by_their_tokens(name):
    router = make(name, probability=1, **OF_PLAN)
    gate = router.make_gate(3) if name == "ssr-fold" else None
    take_step(router, skewed(300, seed=1), skewed(100, seed=2))
    one, other = (sinkroute.solve(skewed(n, seed=s), 0.5).potentials.float() for n, s in ((300, 1), (100, 2)))
    found = router.state.bias_E if gate is None else gate.bias.detach()
    torch.testing.assert_close(found, 0.75 * one + 0.25 * other, rtol=1e-3, atol=1e-3)


def test_a_step_without_a_plan_leaves_the_bias():
    router = make("ssr-bias")
    take_step(router, skewed())
    before = router.state.bias_E.clone()
    for step in range(1, 4):
        take_step(router, skewed(seed=step), step=step)
    assert torch.equal(router.state.bias_E, before) and before.abs().max() > 0.1


@both
def test_a_plan_over_no_token_is_not_remembered(name):
    router = make(name, probability=1)
    gate = router.make_gate(3)
    take_step(router, skewed(0))
    assert not (router.state.bias_E if name == "ssr-bias" else gate.bias).any()


def test_serving_is_with_the_bias_or_plain():
    with_bias, plain = make("ssr-bias", top_k=2), make("ssr-bias", top_k=2, serve_with="plain")
    for router in (with_bias, plain):
        take_step(router, skewed())
        router.eval()
    softmax = sinkroute.create_router("softmax", num_experts=4, top_k=2).eval()
    logits_TE = skewed(seed=3)
    assert torch.equal(plain(logits_TE).experts, softmax(logits_TE).experts)
    assert torch.equal(with_bias(logits_TE).experts, (logits_TE + with_bias.state.bias_E).topk(2).indices)


def test_on_the_scores_the_plan_is_that_of_the_scores_and_the_bias_chooses_after_them():
    router = make("ssr-bias", top_k=2, score="sigmoid", bias_on="scores", **OF_PLAN)
    routes = take_step(router, skewed())
    plan = sinkroute.solve(skewed().sigmoid(), 0.1)
    torch.testing.assert_close(routes.weights, plan.topk(2)[0].float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(router.state.bias_E, plan.potentials.float(), rtol=1e-3, atol=1e-3)
    logits_TE = skewed(seed=1)
    biased_TE = logits_TE.sigmoid() + router.state.bias_E
    sinkroute.set_step(router, 1)
    for mode in (True, False):
        routes = router.train(mode)(logits_TE)
        assert torch.equal(routes.experts, biased_TE.topk(2).indices)
        chosen_TK = logits_TE.sigmoid().gather(1, routes.experts)
        torch.testing.assert_close(routes.weights, chosen_TK / chosen_TK.sum(1, keepdim=True))


def test_on_the_scores_balanced_loads_stay_between_plans():
    options = {"experts": 8, "balance": "load", "score": "sigmoid", "bias_on": "scores"}
    router = make("ssr-bias", **options)
    take_step(router, skewed(4000, 8))
    sinkroute.set_step(router, 1)
    plain = sinkroute.create_router("softmax", num_experts=8, top_k=1)(skewed(4000, 8, seed=1)).load
    assert max_violation(router(skewed(4000, 8, seed=1)).load) < 0.2 < 1 < max_violation(plain)


def test_on_the_scores_noise_is_on_the_logits():
    noisy = make("ssr-bias", top_k=2, score="sigmoid", bias_on="scores", noise=4.0, probability=0.0)
    sinkroute.set_step(noisy, 3)
    logits_TE = skewed()
    disturbed_TE = logits_TE + noisy.noise_std * noisy.draw_normal(logits_TE)
    routes = noisy(logits_TE)
    assert torch.equal(routes.experts, disturbed_TE.sigmoid().topk(2).indices)
    assert not torch.equal(routes.experts, logits_TE.topk(2).indices)


def test_a_bias_of_the_scores_cannot_be_folded_into_a_gate():
    with pytest.raises(ValueError, match="cannot move into the gate"):
        make("ssr-bias", bias_on="scores").fold_into(torch.nn.Linear(8, 4))
    with pytest.raises(ValueError, match="bias_on"):
        make("ssr-bias", bias_on="score")


def test_folded_into_the_gate_the_choices_stay():
    layer = sinkroute.MoE(8, 8, 4, 2, router=make("ssr-bias", top_k=2))
    x_TD = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    sinkroute.set_step(layer, 0)
    layer(x_TD)
    sinkroute.end_step(layer)
    layer.eval()(x_TD)
    before = layer.routes
    assert layer.router.state.bias_E.abs().max() > 0.01
    layer.router.fold_into(layer.gate)
    assert not layer.router.state.bias_E.any()
    served = sinkroute.MoE(8, 8, 4, 2, router="softmax").eval()
    served.gate = copy.deepcopy(layer.gate)
    served(x_TD)
    assert torch.equal(served.routes.experts.sort(1).values, before.experts.sort(1).values)


# -- the fold --------------------------------------------------------------------------------------------------------


def test_folding_balances_the_gate_itself():
    layer = sinkroute.MoE(8, 8, 4, 1, router=make("ssr-fold", balance="load"))
    with torch.no_grad():
        layer.gate.bias.copy_(torch.tensor([0.6, 0.2, 0.0, -0.4]))
    x_TD = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    layer.eval()(x_TD)
    before = max_violation(layer.routes.load)
    layer.train()
    sinkroute.set_step(layer, 0)
    layer(x_TD)
    sinkroute.end_step(layer)
    layer.eval()(x_TD)
    assert before > 0.5 and max_violation(layer.routes.load) < 0.05
    # Plain top-k of the gate's own scores, with nothing beside the weights.
    plain = sinkroute.create_router("softmax", num_experts=4, top_k=1).eval()
    assert torch.equal(layer.routes.experts, plain(layer.gate(x_TD)).experts)


def test_nothing_moves_before_the_step_is_over():
    # A repetition of the forward pass (activation checkpointing) must meet the same gate.
    layer = sinkroute.MoE(8, 8, 4, 1, router=make("ssr-fold"))
    sinkroute.set_step(layer, 0)
    layer(torch.randn(50, 8))
    assert not layer.gate.bias.any()
    sinkroute.set_step(layer, 1)
    assert layer.gate.bias.any()


def test_a_copy_of_a_layer_moves_its_own_gate():
    layer = sinkroute.MoE(8, 8, 4, 1, router=make("ssr-fold"))
    twin = copy.deepcopy(layer)
    sinkroute.set_step(twin, 0)
    twin(torch.randn(50, 8))
    sinkroute.end_step(twin)
    assert twin.gate.bias.any() and not layer.gate.bias.any()


def test_the_gate_is_not_twice_in_the_state_dict():
    layer = sinkroute.MoE(8, 8, 4, 1, router=make("ssr-fold"))
    assert [key for key in layer.state_dict() if "gate" in key] == ["gate.weight", "gate.bias"]
    assert sum(parameter is layer.gate.bias for parameter in layer.parameters()) == 1


def test_without_a_gate_it_says_so():
    with pytest.warns(UserWarning, match=r"no gate to add them to; use router\.make_gate"):
        take_step(make("ssr-fold"), skewed())


def gate_without_bias(shared, width=16, experts=4, seed=0):
    """A gate, and tokens of which `shared` is the common part."""
    generator = torch.Generator().manual_seed(seed)
    gate = torch.nn.Linear(width, experts, bias=False)
    common_D = torch.randn(width, generator=generator)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(experts, width, generator=generator) / width**0.5)
    return gate, torch.randn(2000, width, generator=generator) + shared * common_D


def test_without_a_bias_the_weight_moves_along_the_mean_token():
    router = make("ssr-fold", top_k=2, **OF_PLAN)
    gate, x_TD = gate_without_bias(shared=2.0)
    bind(router, gate)
    before_ED, logits_TE = gate.weight.detach().clone(), gate(x_TD).detach()
    sinkroute.set_step(router, 0)
    router(gate(x_TD))
    sinkroute.end_step(router)
    mean_D = x_TD.double().mean(0)
    along_T = x_TD.double() @ mean_D / mean_D.square().sum()
    direction_D = mean_D / mean_D.square().sum() / along_T.square().mean()
    potentials_E = sinkroute.solve(logits_TE, 0.5).potentials
    expected_ED = before_ED + torch.outer(potentials_E, direction_D)
    torch.testing.assert_close(gate.weight.double(), expected_ED, rtol=1e-4, atol=1e-4)


def test_moved_along_the_mean_token_the_gate_is_balanced_on_other_tokens():
    router = make("ssr-fold", probability=1, balance="load")
    gate, x_TD = gate_without_bias(shared=2.0)
    bind(router, gate)
    before = max_violation(gate(x_TD[1000:]).topk(1).indices.flatten().bincount(minlength=4))
    for step in range(3):
        sinkroute.set_step(router, step)
        router(gate(x_TD[:1000]))
    sinkroute.end_step(router)
    after = max_violation(gate(x_TD[1000:]).topk(1).indices.flatten().bincount(minlength=4))
    assert after < 0.25 < 1 < before


def moved_by(parts, masks=None, seed=0):
    """How far the tokens' logits move, in all, when a plain gate is given these micro-batches in one step."""
    gate, _ = gate_without_bias(0.0, seed=seed)
    before_ED, router = gate.weight.detach().clone(), make("ssr-fold", probability=1)
    bind(router, gate)
    for part, x in enumerate(parts):
        sinkroute.set_step(router, 0, part)
        router(gate(x) + torch.tensor([1.0, 0, 0, 0]), None if masks is None else masks[part])
    sinkroute.end_step(router)
    return gate.weight.detach() - before_ED


def test_micro_batches_with_other_means_move_the_weight_no_farther_than_one():
    _, x_TD = gate_without_bias(0.0)
    x_TD = x_TD - x_TD.mean(0) + 0.01
    order = (x_TD @ torch.ones(16)).argsort()  # two halves whose means point in opposite directions
    whole, halves = moved_by([x_TD]), moved_by([x_TD[order[:1000]], x_TD[order[1000:]]])
    reach = (x_TD @ halves.T).abs().max()
    assert reach < 0.2 and halves.norm() < 3 * whole.norm()


def test_padding_may_be_anything_to_a_weight_that_moves():
    _, x_TD = gate_without_bias(2.0)
    mask_T = torch.arange(2000) < 1500
    expected = moved_by([x_TD[:1500]])
    found = moved_by([torch.where(mask_T[:, None], x_TD, torch.tensor(float("nan")))], [mask_T])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["potentials", "token"])
def test_a_pass_that_failed_on_a_device_does_not_touch_the_gate(name):
    gate, x_TD = gate_without_bias(2.0)
    before_ED, router = gate.weight.detach().clone(), make("ssr-fold", probability=1)
    bind(router, gate)
    sinkroute.set_step(router, 0)
    router(gate(x_TD))
    router.state.sums[name].fill_(float("nan"))
    sinkroute.end_step(router)
    assert torch.equal(gate.weight.detach(), before_ED)


def test_a_weight_that_is_nowhere_is_not_moved_in_silence():
    gate, x_TD = gate_without_bias(2.0)
    router = make("ssr-fold", probability=1)
    bind(router, gate)
    sinkroute.set_step(router, 0)
    router(gate(x_TD))
    gate.to("meta")
    with pytest.raises(RuntimeError, match="on the meta device between passes"):
        sinkroute.end_step(router)


def test_a_layer_with_a_plain_gate_balances_it():
    torch.manual_seed(0)
    router = make("ssr-fold", top_k=2, experts=8, probability=1, balance="load", gate="plain")
    layer = sinkroute.MoE(16, 8, 8, 2, router=router)
    assert list(layer.gate.state_dict()) == ["weight"]
    x_TD = torch.randn(4000, 16) + 2 * torch.randn(16)
    loads = []
    for step in range(3):
        loads.append(max_violation(layer.gate(x_TD).topk(2).indices.flatten().bincount(minlength=8)))
        sinkroute.set_step(layer, step)
        layer(x_TD)
        sinkroute.end_step(layer)
    after = max_violation(layer.gate(x_TD).topk(2).indices.flatten().bincount(minlength=8))
    assert after < 0.3 < 1 < loads[0]


def test_where_tokens_have_nothing_in_common_the_weight_hardly_moves():
    _, x_TD = gate_without_bias(0.0)
    felt_TE = x_TD @ moved_by([x_TD]).T
    assert felt_TE.std(0).max() < 0.2


def test_micro_batches_and_masks_count_in_the_mean_token():
    gate, x_TD = gate_without_bias(shared=1.0)
    start_ED = gate.weight.detach().clone()
    for parts in ([x_TD[:1200]], [x_TD[:800], x_TD[800:]]):
        with torch.no_grad():
            gate.weight.copy_(start_ED)
        router = make("ssr-fold", probability=1)
        bind(router, gate)
        for part, x in enumerate(parts):
            sinkroute.set_step(router, 0, part)
            mask_T = torch.arange(len(x)) < (800 if part == 0 else 400)
            router(gate(torch.where(mask_T[:, None], x, torch.full_like(x, 1e3))), mask_T)
        assert router.state.token.allclose(
            x_TD[: 1200 if len(parts) > 1 else 800].double().sum(0), rtol=1e-4, atol=1e-2
        )
        gate._forward_pre_hooks.clear()


@pytest.mark.parametrize("gate", [torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(3, 5), torch.nn.Identity()])
def test_a_gate_for_other_experts_is_refused(gate):
    with pytest.raises(ValueError, match=r"gate must have a bias of shape \(4,\)"):
        GateFold(make("ssr-fold"), gate, "bias" if getattr(gate, "bias", None) is not None else "weight")


# -- both ------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, "rate must be a finite number above 0 and at most 1, got 0"),
        ({"rate": 1.5}, "rate must be a finite number above 0 and at most 1, got 1.5"),
        ({"balance": "loads"}, "unknown balance 'loads'; did you mean 'load'"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


def test_serve_with_is_one_of_two():
    with pytest.raises(ValueError, match="unknown serve_with 'bais'; did you mean 'bias'"):
        make("ssr-bias", serve_with="bais")


@both
def test_it_can_be_adaptive_as_well(name):
    router = make(name, probability="adaptive(high=0.5, low=0.1, floor=0, ceiling=1)")
    router.make_gate(3)
    fired = [take_step(router, skewed(), step=step).branch for step in range(3)]
    # The gate of ssr-bias is measured with its bias: balanced after one plan. That of ssr-fold has no tokens to change.
    assert fired[:2] == ["softmax", "sinkhorn"]


# -- the first plan --------------------------------------------------------------------------------------------------


def branches(router, steps, batch=skewed):
    return [take_step(router, batch(seed=step), step=step).branch for step in steps]


@both
def test_the_first_step_has_a_plan_however_small_its_probability(name):
    router = make(name, probability=1e-9)
    router.make_gate(3)
    assert branches(router, range(3)) == ["sinkhorn", "softmax", "softmax"]
    assert router.state.plans == 1


@both
def test_no_plan_comes_first_where_the_probability_is_zero(name):
    router = make(name, probability="piecewise(0: 0, 2: 1e-9)")
    router.make_gate(3)
    assert branches(router, range(4)) == ["softmax", "softmax", "sinkhorn", "softmax"]
    assert branches(make("ssr-bias", probability=0), range(2)) == ["softmax", "softmax"]


def test_the_first_plan_waits_for_a_step_with_tokens():
    router = make("ssr-bias", probability=1e-9)
    for step in range(2):
        take_step(router, skewed(0), step=step)
    assert branches(router, (2, 3)) == ["sinkhorn", "softmax"]


def test_all_micro_batches_of_the_first_step_have_a_plan_and_a_repetition_has_it_too():
    router = make("ssr-bias", probability=1e-9)
    found = []
    for part in (0, 1, 0):
        sinkroute.set_step(router, 0, part)
        found.append(router(skewed(seed=part)).branch)
    assert found == ["sinkhorn"] * 3
    sinkroute.set_step(router, 1)
    assert router(skewed()).branch == "softmax"


@pytest.mark.parametrize("resumed_at", [0, 1, 7], ids=["the step again", "the next step", "a later step"])
def test_a_run_that_is_resumed_has_no_plan_at_its_first_step(resumed_at):
    router, resumed = make("ssr-bias", probability=1e-9), make("ssr-bias", probability=1e-9)
    take_step(router, skewed())
    resumed.load_state_dict(router.state_dict())
    assert branches(resumed, [resumed_at]) == ["softmax"]


def test_a_state_without_a_plan_that_is_loaded_has_its_first_plan_yet():
    router, fresh = make("ssr-bias", probability=1e-9), make("ssr-bias", probability=1e-9)
    assert branches(router, range(2)) == ["sinkhorn", "softmax"]
    router.load_state_dict(fresh.state_dict())
    assert branches(router, range(2)) == ["sinkhorn", "softmax"]
    router.state.reset_parameters()
    assert branches(router, range(2)) == ["sinkhorn", "softmax"]


@both
def test_the_defaults_are_loads_the_gates_own_weights_and_no_noise(name):
    options = sinkroute.create_router(name, num_experts=8, top_k=2).options
    assert (options.balance, options.weights, options.noise, options.probability) == ("load", "scores", 0, 0.08)


def test_the_papers_routers_keep_the_papers_defaults():
    for name in ("ssr-l", "ssr-s"):
        options = sinkroute.create_router(name, num_experts=8, top_k=2).options
        assert (options.weights, options.noise, options.probability) == ("plan", 0.3, 0.001)
