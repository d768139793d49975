"""The Switch loss: by hand, against transformers, and where there is nothing to balance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import sinkroute
from sinkroute.routing.losses.load_balance import load_balance_loss


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def load_balance_router(experts, top_k, **options):
    return sinkroute.create_router("load-balance", num_experts=experts, top_k=top_k, **options)


def test_loss_and_gradient_worked_by_hand():
    # Two tokens with scores (ln 3, 0): p = (3/4, 1/4) for both, all choices go to expert 0: f = (1, 0).
    # loss = 2 · 1 · 3/4 = 1.5. Gradient, with f fixed: 2 · dP_0/dz = 2 · (1/2) · p_0 p_1 = 3/16 and −3/16 per token.
    logits_TE = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log().requires_grad_()
    loss = load_balance_loss(logits_TE, torch.tensor([2, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(1.5)
    torch.testing.assert_close(logits_TE.grad, torch.tensor([[3 / 16, -3 / 16], [3 / 16, -3 / 16]]))


def test_the_router_scales_the_loss_by_its_coefficient():
    logits_TE = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
    assert load_balance_router(2, 1)(logits_TE).aux_loss.item() == pytest.approx(0.015)  # 0.01 unless told
    assert load_balance_router(2, 1, coefficient=0.2)(logits_TE).aux_loss.item() == pytest.approx(0.3)
    assert load_balance_router(2, 1, coefficient=0)(logits_TE).aux_loss.item() == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.lists(st.integers(0, 100), min_size=8, max_size=8).filter(any))
def test_even_scores_cost_1_whatever_the_load(tokens, load):
    assert load_balance_loss(torch.zeros(tokens, 8), torch.tensor(load)).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_full_collapse_costs_experts_over_k(top_k):
    # All tokens take the same K experts, each with score 1/K: 8 · Σ_K (1/K)(1/K) = 8/K.
    logits_TE = torch.full((20, 8), -1e4)
    logits_TE[:, :top_k] = 0
    loss = load_balance_router(8, top_k, coefficient=1.0)(logits_TE).aux_loss
    assert loss.item() == pytest.approx(8 / top_k)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_loss_and_gradient_are_those_of_transformers_over_k(top_k, masked):
    # transformers' f is the share of tokens, which sums to K; ours is the share of choices, which sums to 1.
    ours, theirs = random(30, 8).requires_grad_(), random(30, 8).requires_grad_()
    mask = torch.arange(30) % 4 != 1 if masked else None
    loss = load_balance_router(8, top_k, coefficient=1.0)(ours, mask).aux_loss
    their_loss = load_balancing_loss_func((theirs,), 8, top_k, None if mask is None else mask.long().view(2, 15))
    loss.backward()
    their_loss.backward()
    torch.testing.assert_close(loss * top_k, their_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad * top_k, theirs.grad, rtol=1e-4, atol=1e-7)


def test_float64_scores_give_a_loss_with_all_their_digits():
    logits_TE = random(7, 3, dtype=torch.float64)
    load = [3, 3, 1]  # sevenths: no float has them exactly, and float32 has only seven digits of them
    expected = 0.0
    for expert in range(3):
        scores = [math.exp(row[expert]) / sum(map(math.exp, row)) for row in logits_TE.tolist()]
        expected += 3 * load[expert] / 7 * sum(scores) / 7
    loss = load_balance_loss(logits_TE, torch.tensor(load))
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_a_real_token_loss_and_gradient_are_0(tokens):
    logits_TE = random(tokens, 4).requires_grad_()
    routes = load_balance_router(4, 2)(logits_TE, torch.zeros(tokens, dtype=torch.bool))
    routes.aux_loss.backward()
    assert routes.aux_loss.item() == 0 and torch.equal(logits_TE.grad, torch.zeros(tokens, 4))


def test_no_loss_when_serving():
    assert load_balance_router(4, 2).eval()(random(3, 4)).aux_loss is None


def test_descending_the_loss_balances_the_load():
    bias_E = torch.tensor([2.0, 0.0, 0.0, 0.0], requires_grad=True)
    router, scores_TE = load_balance_router(4, 1, coefficient=1.0), random(400, 4)
    before = router(scores_TE + bias_E).load.max()
    for _ in range(60):
        (gradient,) = torch.autograd.grad(router(scores_TE + bias_E).aux_loss, bias_E)
        bias_E = (bias_E - 0.5 * gradient).detach().requires_grad_()
    assert before > 280 and router(scores_TE + bias_E).load.max() < 160  # of 400 tokens; even is 100


def test_sigmoid_scores_are_taken_over_their_sum():
    # Sigmoids 3/4 and 1/4 … and 1/2 and 1/2: P = (5/8, 3/8). Load (2, 0): 2 · 1 · 5/8. Softmax: P = (7/10, 3/10).
    logits_TE = torch.tensor([[math.log(3), -math.log(3)], [0.0, 0.0]], requires_grad=True)
    loss = load_balance_loss(logits_TE, torch.tensor([2, 0]), score="sigmoid")
    loss.backward()
    assert loss.item() == pytest.approx(1.25)
    assert load_balance_loss(logits_TE, torch.tensor([2, 0])).item() == pytest.approx(1.4)
    # With a = σ_1/(σ_1 + σ_2): da/dz_1 = a (1 − a)(1 − σ_1), da/dz_2 = −a (1 − a)(1 − σ_2); times 2 · 1/2.
    expected = [[3 / 16 * 1 / 4, -3 / 16 * 3 / 4], [1 / 4 * 1 / 2, -1 / 4 * 1 / 2]]
    torch.testing.assert_close(logits_TE.grad, torch.tensor(expected))


def test_sigmoids_that_underflow_leave_loss_and_gradient_finite():
    # Their ratio is e : 1 : e⁻¹; in float32 all three are 0.
    logits_TE = torch.tensor([[-200.0, -201.0, -202.0]], requires_grad=True)
    loss = load_balance_loss(logits_TE, torch.tensor([1, 0, 0]), score="sigmoid")
    loss.backward()
    assert loss.item() == pytest.approx(3 * math.e / (math.e + 1 + 1 / math.e), rel=1e-5)
    assert torch.isfinite(logits_TE.grad).all() and logits_TE.grad[0, 0] > 0.5
