"""SSR-B: loads within 1 % on every Sinkhorn step, of all such choices the one with the largest scores."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import sinkroute
from sinkroute.routing.metrics import max_violation


def ssr_b(experts, top_k, **options):
    return sinkroute.create_router("ssr-b", num_experts=experts, top_k=top_k, probability=1, noise=0, **options)


@settings(deadline=None, max_examples=40)
@given(
    experts=st.integers(2, 16),
    top_k=st.integers(1, 4),
    cost=st.sampled_from(["linear", "softmax"]),
    skew=st.floats(0, 6),
    seed=st.integers(0, 2**32),
)
def test_the_load_of_every_sinkhorn_step_is_balanced(experts, top_k, cost, skew, seed):
    top_k = min(top_k, experts)
    logits_TE = torch.randn(1600, experts, generator=torch.Generator().manual_seed(seed))
    logits_TE = logits_TE + torch.linspace(0, skew, experts)
    routes = ssr_b(experts, top_k, cost=cost)(logits_TE)
    assert routes.branch == "sinkhorn" and max_violation(routes.load) <= 0.01 + 1e-9 + experts / (1600 * top_k)
    assert all(len(set(row)) == top_k for row in routes.experts.tolist())


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_at_tolerance_0_it_is_the_best_assignment_there_is(cost):
    logits_TE = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0, 0, 0])
    routes = ssr_b(4, 1, cost=cost, balance_tol=0.0)(logits_TE)
    cost_TE = (logits_TE.softmax(1) if cost == "softmax" else logits_TE).double().numpy()
    rows, columns = linear_sum_assignment(np.repeat(cost_TE, 15, axis=1), maximize=True)  # 15 places per expert
    best = np.repeat(cost_TE, 15, axis=1)[rows, columns].sum()
    found = cost_TE[np.arange(60), routes.experts[:, 0].numpy()].sum()
    assert routes.load.tolist() == [15] * 4 and found == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_the_plan_weighs_and_the_best_expert_comes_first(cost):
    logits_TE = torch.randn(500, 6, generator=torch.Generator().manual_seed(1))
    routes = ssr_b(6, 2, cost=cost)(logits_TE)
    plan = sinkroute.solve(logits_TE, {"linear": 0.5, "softmax": 0.1}[cost], cost=cost)
    chosen_TK = plan.matrix().gather(1, routes.experts)
    torch.testing.assert_close(routes.weights, chosen_TK / chosen_TK.sum(1, keepdim=True), rtol=2e-4, atol=1e-6)
    assert (routes.weights.diff(dim=1) <= 1e-6).all()


def test_padding_takes_no_place():
    logits_TE, mask = torch.randn(400, 4) + torch.tensor([3.0, 0, 0, 0]), torch.arange(400) % 2 == 0
    load_E = ssr_b(4, 2)(logits_TE, mask).load
    assert int(load_E.sum()) == 400 and load_E.max() <= 101


def test_identical_tokens_are_shared_out_where_a_plan_would_send_all_to_the_same():
    logits_TE = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(400, 1)
    assert ssr_b(4, 1)(logits_TE).load.max() <= 101
    by_plan = sinkroute.create_router("ssr-l", num_experts=4, top_k=1, probability=1, noise=0)
    assert by_plan(logits_TE).load.max() == 400


def test_a_wrong_tolerance_or_cost_is_refused_when_the_router_is_made():
    with pytest.raises(ValueError, match="tol must be"):
        ssr_b(4, 1, balance_tol=-0.1)
    with pytest.raises(ValueError, match="unknown cost 'sofmax'; did you mean 'softmax'"):
        ssr_b(4, 1, cost="sofmax")
