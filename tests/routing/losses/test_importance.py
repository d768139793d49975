"""The importance loss: by hand, against scipy, and where there is nothing to balance."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sinkroute
from sinkroute.routing.losses.importance import cv_squared, importance_loss

amounts = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_loss_and_gradient_worked_by_hand():
    # Two tokens with scores (3/4, 1/4): importances 1.5 and 0.5, mean 1, CV² = 0.25. With d = P_1 − P_2 it is d²;
    # per token dd/dz = (1/2) · 2 p_1 p_2 = 3/16, so the gradient is 2 · (1/2) · 3/16 and its negative.
    logits_TE = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log().requires_grad_()
    loss = importance_loss(logits_TE)
    loss.backward()
    assert loss.item() == pytest.approx(0.25)
    torch.testing.assert_close(logits_TE.grad, torch.tensor([[3 / 16, -3 / 16]] * 2))


def test_even_scores_cost_nothing_and_full_collapse_costs_experts_minus_1():
    assert importance_loss(torch.zeros(5, 8)).item() == 0
    assert importance_loss(torch.tensor([[0.0, -1e4, -1e4, -1e4]] * 5)).item() == pytest.approx(3)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_loss_and_gradient_are_those_of_a_slow_loop(score):
    def slow(rows):
        importance = [0.0] * 5
        for z in rows:
            s = [math.exp(x) if score == "softmax" else 1 / (1 + math.exp(-x)) for x in z]
            for expert in range(5):
                importance[expert] += s[expert] / sum(s)
        return scipy.stats.variation(importance) ** 2  # std over mean

    logits_TE, step, expected = random(3, 5).requires_grad_(), 1e-5, []
    loss = importance_loss(logits_TE, score=score)
    loss.backward()
    assert loss.item() == pytest.approx(slow(logits_TE.tolist()), rel=1e-12)
    for token in range(3):
        for expert in range(5):
            moved = [logits_TE.tolist(), logits_TE.tolist()]
            moved[0][token][expert] += step
            moved[1][token][expert] -= step
            expected.append((slow(moved[0]) - slow(moved[1])) / (2 * step))
    torch.testing.assert_close(
        logits_TE.grad, torch.tensor(expected, dtype=torch.float64).view(3, 5), rtol=1e-6, atol=1e-9
    )


@settings(deadline=None, max_examples=60)
@given(amounts)
def test_the_squared_coefficient_of_variation_is_that_of_scipy(values):
    ours = cv_squared(torch.tensor(values, dtype=torch.float64)).item()
    assert ours == pytest.approx(scipy.stats.variation(values) ** 2, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])  # their squares are no float32
def test_the_size_of_all_amounts_does_not_matter(scale):
    assert cv_squared(scale * torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)


def test_masked_tokens_do_not_count():
    logits_TE = torch.tensor([[3.0, 1.0], [1.0, 9.0], [3.0, 1.0]]).log()
    assert importance_loss(logits_TE, torch.tensor([True, False, True])).item() == pytest.approx(0.25)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("name", ["softmax", "noisy", "v-moe-noise"])
def test_without_a_real_token_loss_and_gradient_are_0(name, tokens):
    logits_TE = random(tokens, 4).requires_grad_()
    router = sinkroute.create_router(name, num_experts=4, top_k=2, losses={"importance": 1.0})
    routes = router(logits_TE, torch.zeros(tokens, dtype=torch.bool))
    routes.aux_loss.backward()
    assert routes.aux_loss.item() == 0
    assert torch.equal(logits_TE.grad, torch.zeros(tokens, 4, dtype=torch.float64))
