"""Plain top-k against plain formulas and against the models that are served with it."""

import numpy as np
import pytest
import torch
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

import sinkroute


def softmax_router(experts, top_k, **options):
    return sinkroute.create_router("softmax", num_experts=experts, top_k=top_k, **options)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def routed_by_a_loop(logits_TE, top_k, renormalise):
    """Indices and weights by the textbook, one token at a time, in NumPy float64."""
    experts, weights = [], []
    for row in logits_TE.double().numpy():
        chosen = sorted(range(len(row)), key=lambda expert: -row[expert])[:top_k]
        probability = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        picked = probability[chosen]
        experts.append(chosen)
        weights.append(picked / picked.sum() if renormalise else picked)
    return experts, np.array(weights)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("experts", "top_k", "norm_topk", "renormalise"),
    [
        (6, 2, None, True),
        (6, 2, False, False),
        (6, 1, None, False),
        (6, 1, True, True),
        (5, 5, None, True),
        (1, 1, None, False),
    ],
)
def test_experts_and_weights_are_those_of_a_plain_loop(experts, top_k, norm_topk, renormalise, training):
    logits_TE = random(40, experts, dtype=torch.float64)
    routes = softmax_router(experts, top_k, norm_topk=norm_topk).train(training)(logits_TE)
    chosen, weights = routed_by_a_loop(logits_TE, top_k, renormalise)
    assert routes.experts.tolist() == chosen and routes.branch == "softmax" and routes.aux_loss is None
    np.testing.assert_allclose(routes.weights.numpy(), weights, rtol=1e-12)


@pytest.mark.parametrize("norm_topk", [True, False])
def test_gradient_of_the_weights_is_that_of_finite_differences(norm_topk):
    logits_TE = random(4, 5, dtype=torch.float64).requires_grad_()
    router = softmax_router(5, 2, norm_topk=norm_topk)
    assert torch.autograd.gradcheck(lambda logits: router(logits).weights, (logits_TE,))


def test_a_single_expert_per_token_keeps_the_gradient_of_the_gate_alive():
    # One token, scores (ln 3, 0): its weight is p = 3/4, with dp/dz = p(1 − p) = 3/16 and −3/16.
    logits_TE = torch.tensor([[3.0, 1.0]]).log().requires_grad_()
    routes = softmax_router(2, 1)(logits_TE)
    routes.weights.sum().backward()
    torch.testing.assert_close(routes.weights.detach(), torch.tensor([[0.75]]))
    torch.testing.assert_close(logits_TE.grad, torch.tensor([[3 / 16, -3 / 16]]))


def routed_by_transformers(module, x_TD, gradient_TK):
    logits_TE, weights_TK, experts_TK = module(x_TD)
    (weights_TK * gradient_TK).sum().backward()
    return logits_TE.detach(), experts_TK, weights_TK.detach(), module.weight.grad


def routed_by_us(router, gate_ED, x_TD, gradient_TK):
    gate_ED = gate_ED.detach().clone().requires_grad_()
    routes = router(x_TD @ gate_ED.t())
    (routes.weights * gradient_TK).sum().backward()
    return routes.experts, routes.weights.detach(), gate_ED.grad


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (16, 4)])
def test_routes_and_gate_gradient_are_those_of_mixtral(experts, top_k):
    config = MixtralConfig(hidden_size=12, num_local_experts=experts, num_experts_per_tok=top_k)
    module = MixtralTopKRouter(config)
    module.weight.data = random(experts, 12, seed=1)
    x_TD, gradient_TK = random(50, 12), random(50, top_k, seed=2)
    _, their_experts, their_weights, their_gradient = routed_by_transformers(module, x_TD, gradient_TK)
    experts_TK, weights_TK, gradient = routed_by_us(softmax_router(experts, top_k), module.weight, x_TD, gradient_TK)
    assert torch.equal(experts_TK, their_experts)
    torch.testing.assert_close(weights_TK, their_weights, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_topk", [True, False])
def test_routes_and_gate_gradient_are_those_of_olmoe(norm_topk):
    config = OlmoeConfig(hidden_size=12, num_experts=8, num_experts_per_tok=3, norm_topk_prob=norm_topk)
    module = OlmoeTopKRouter(config)
    module.weight.data = random(8, 12, seed=1)
    x_TD, gradient_TK = random(50, 12), random(50, 3, seed=2)
    _, their_experts, their_weights, their_gradient = routed_by_transformers(module, x_TD, gradient_TK)
    router = softmax_router(8, 3, norm_topk=norm_topk)
    experts_TK, weights_TK, gradient = routed_by_us(router, module.weight, x_TD, gradient_TK)
    assert torch.equal(experts_TK, their_experts)
    torch.testing.assert_close(weights_TK, their_weights, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_topk", [True, False])
def test_scores_far_apart_give_weights_without_nan_and_a_gradient(norm_topk):
    # exp(−200) is 0 in float32: the weights are 1 and 0, and a quotient of probabilities might have been 0/0.
    logits_TE = torch.tensor([[0.0, -200.0, -400.0], [1e4, -1e4, 0.0]], requires_grad=True)
    routes = softmax_router(3, 2, norm_topk=norm_topk)(logits_TE)
    routes.weights.sum().backward()
    assert routes.experts.tolist() == [[0, 1], [0, 2]]
    assert routes.weights.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert torch.isfinite(logits_TE.grad).all()
