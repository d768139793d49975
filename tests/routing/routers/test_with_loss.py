"""GShard's router: it balances first choices, and sends every token to all its experts."""

import pytest
import torch

import sinkroute


def gshard_router(experts, top_k, **options):
    return sinkroute.create_router("gshard", num_experts=experts, top_k=top_k, **options)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_token_visits_all_its_experts_with_weights_that_sum_to_1():
    routes = gshard_router(6, 2)(random(50, 6))
    plain = sinkroute.create_router("softmax", num_experts=6, top_k=2)(random(50, 6))
    assert torch.equal(routes.experts, plain.experts) and torch.equal(routes.weights, plain.weights)
    assert int(routes.load.sum()) == 100
    torch.testing.assert_close(routes.weights.sum(1), torch.ones(50))


def test_no_loss_when_serving():
    assert gshard_router(6, 2).eval()(random(50, 6)).aux_loss is None


def test_descending_the_loss_balances_first_choices():
    router, logits_TE = gshard_router(4, 2, coefficient=1.0), random(400, 4)
    bias_E = torch.tensor([2.0, 0.0, 0.0, 0.0], requires_grad=True)
    first = [torch.bincount(router(logits_TE + bias_E).experts[:, 0], minlength=4).max()]
    for _ in range(60):
        (gradient,) = torch.autograd.grad(router(logits_TE + bias_E).aux_loss, bias_E)
        bias_E = (bias_E - 0.5 * gradient).detach().requires_grad_()
    first.append(torch.bincount(router(logits_TE + bias_E).experts[:, 0], minlength=4).max())
    assert first[0] > 280 and first[1] < 160  # of 400 tokens; even is 100


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_coefficient_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=rf"coefficient must be a finite number of 0 or more, got {value}; 0\.01 is"):
        gshard_router(4, 2, coefficient=value)
