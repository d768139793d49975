"""SMoE-Dropout: a gate that never changes, and experts that become more."""

import copy
import warnings

import pytest
import torch

import sinkroute


def make(experts=16, top_k=2, **options):
    return sinkroute.create_router("smoe-dropout", num_experts=experts, top_k=top_k, **options)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_k_grows_as_in_the_released_code():
    # There: k = round((k_max − k_min) · step / steps) + k_min, within the two.
    router, logits_TE = make(), random(3, 16)
    for step in range(0, 321, 3):
        sinkroute.set_step(router, step, total_steps=300)
        k = min(round(14 * step / 300) + 2, 16)
        routes = router(logits_TE)
        assert router.k_now == routes.experts.shape[1] == k
        assert int(routes.load.sum()) == 3 * k
    assert k == 16


def test_experts_are_the_topk_and_weights_a_softmax_over_them():
    router, logits_TE = make(8, training_k=3), random(10, 8)
    routes = router(logits_TE)
    values, experts_TK = logits_TE.topk(3)
    assert torch.equal(routes.experts, experts_TK)
    torch.testing.assert_close(routes.weights, values.exp() / values.exp().sum(1, keepdim=True))
    assert routes.chosen is None and routes.aux_loss is None


@pytest.mark.parametrize(("training_k", "ks"), [("linear(4, 8, 10)", (4, 6, 8)), ("piecewise(0: 1, 5: 5)", (1, 5, 5))])
def test_a_schedule_of_ones_own_needs_no_length_of_training(training_k, ks):
    router = make(8, training_k=training_k)
    for step, k in zip((0, 5, 10), ks, strict=True):
        sinkroute.set_step(router, step)
        assert router.k_now == k


def test_a_training_whose_length_nobody_told_stays_at_top_k_with_one_warning():
    router = make()
    with pytest.warns(UserWarning, match=r"top_k=2 .*total_steps=\.\.\.\), or give the router training_k") as caught:
        sinkroute.set_step(router, 0)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 10):
            sinkroute.set_step(router, step)
            assert router(random(3, 16)).experts.shape == (3, 2)
    sinkroute.set_step(router, 100, total_steps=200)  # told at last
    assert router.k_now == 9


def test_a_schedule_that_was_asked_for_is_refused_without_a_length_before_anything_moves():
    model = torch.nn.ModuleList([make(training_k=3), make(training_k="linear(4, 8)")])
    with pytest.raises(ValueError, match=r"tell the length of training: sinkroute\.set_step\(model, step, total_steps"):
        sinkroute.set_step(model, 7)
    assert model[0].step == 0
    sinkroute.set_step(model, 7, total_steps=14)
    assert [router.k_now for router in model] == [3, 6]


def test_a_function_that_leaves_the_bounds_is_refused_at_the_step_where_it_does():
    router = make(training_k=lambda step: 15 + step)
    sinkroute.set_step(router, 1)
    with pytest.raises(ValueError, match=r"training_k must be between 1 and 16, got 17"):
        sinkroute.set_step(router, 2)


def test_resetting_the_gate_gives_it_its_values_again():
    for layer in (None, 3):
        gate = make(layer=layer).make_gate(5)
        before = copy.deepcopy(gate.state_dict())
        for parameter in gate.parameters():
            parameter.data.fill_(float("nan"))
        gate.reset_parameters()
        assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())
        assert list(before) == ["weight", "bias"] and isinstance(gate, torch.nn.Linear)


@pytest.mark.parametrize("training_k", [0, 17, "linear(0, 8)", float("nan")])
def test_a_k_that_cannot_be_is_refused(training_k):
    with pytest.raises(ValueError, match=r"training_k must be between 1 and 16, got"):
        make(training_k=training_k)


@pytest.mark.parametrize("serving_top_k", [0, 17])
def test_a_serving_k_that_cannot_be_is_refused(serving_top_k):
    with pytest.raises(ValueError, match=r"serving_top_k must be an integer (from 1 to 16|of 1 or more), got"):
        make(serving_top_k=serving_top_k)


def test_serving_takes_top_k_experts_or_as_many_as_it_is_told_whatever_the_step():
    logits_TE = random(5, 16)
    for options, k in (({}, 2), ({"serving_top_k": 16}, 16), ({"serving_top_k": 1}, 1)):
        router = make(**options)
        sinkroute.set_step(router, 7, total_steps=10)
        assert router.eval()(logits_TE).experts.shape == (5, k)


def test_masked_tokens_have_weight_0_at_any_width():
    router, mask = make(8, training_k=5), torch.tensor([True, False, True])
    routes = router(random(3, 8), mask)
    assert not routes.weights[1].any() and int(routes.load.sum()) == 10 and int(routes.chosen.sum()) == 10


def test_the_gate_is_not_trained_but_the_experts_are():
    layer = sinkroute.MoE(8, 4, 4, 2, "smoe-dropout")
    assert not any(parameter.requires_grad for parameter in layer.gate.parameters())
    before = copy.deepcopy(layer.gate.state_dict())
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    layer(random(6, 8)).sum().backward()
    optimiser.step()
    assert all(torch.equal(value, before[name]) for name, value in layer.gate.state_dict().items())
    assert layer.experts.w_in.grad.any()


def test_the_gate_is_drawn_from_seed_and_layer_within_the_bounds_of_a_linear_map():
    gates = {key: make(layer=key[0], seed=key[1]).make_gate(25) for key in ((0, 0), (1, 0), (0, 1))}
    weights = [gate.weight for gate in gates.values()]
    assert not any(torch.equal(weights[i], weights[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(make(layer=0).make_gate(25).weight, gates[0, 0].weight)
    values = torch.cat([weights[0].flatten(), gates[0, 0].bias])
    assert 0.19 < values.max() <= 0.2 and -0.2 <= values.min() < -0.19 and values.mean().abs() < 0.02


def test_gates_of_a_router_without_a_layer_differ_and_follow_the_seed_of_torch():
    torch.manual_seed(3)
    first, second = make().make_gate(5).weight, make().make_gate(5).weight
    torch.manual_seed(3)
    assert torch.equal(make().make_gate(5).weight, first) and not torch.equal(first, second)
