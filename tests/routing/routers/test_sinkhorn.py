"""S-BASE: experts from the plan, weights from the softmax."""

import numpy as np
import ot
import pytest
import torch

import sinkroute


def biased_scores(tokens, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.randn(tokens, experts, generator=generator) + torch.randn(experts, generator=generator)
    return scores_TE.double()


def sinkhorn_router(experts, top_k, **options):
    return sinkroute.create_router("sinkhorn", num_experts=experts, top_k=top_k, **options)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("reg", [0.3, 1.0])
def test_experts_are_the_largest_entries_of_pots_plan(reg, top_k):
    scores_TE = biased_scores(60, 5)
    oracle = ot.sinkhorn(
        np.full(60, 1 / 60),
        np.full(5, 1 / 5),
        -scores_TE.numpy(),
        reg,
        method="sinkhorn_log",
        numItermax=20_000,
        stopThr=1e-12,
    )
    largest = -np.sort(-oracle * 60, axis=1)
    assert (largest[:, :-1] - largest[:, 1:]).min() > 1e-7, "a tie would make this test a toss-up"
    routes = sinkhorn_router(5, top_k, reg=reg, tol=1e-10)(scores_TE)
    assert routes.experts.tolist() == np.argsort(-oracle, axis=1)[:, :top_k].tolist()


def test_the_plan_chooses_otherwise_than_the_scores():
    scores_TE = biased_scores(60, 5)
    balanced, plain = sinkhorn_router(5, 1)(scores_TE), sinkhorn_router(5, 1).eval()(scores_TE)
    assert not torch.equal(balanced.experts, plain.experts)
    assert balanced.load.max() < plain.load.max() and balanced.load.min() > plain.load.min()


@pytest.mark.parametrize(("top_k", "norm_topk"), [(1, None), (2, None), (2, False)])
def test_weights_and_gradient_are_those_of_the_softmax_at_the_chosen(top_k, norm_topk):
    ours, plain = biased_scores(20, 5).requires_grad_(), biased_scores(20, 5).requires_grad_()
    routes = sinkhorn_router(5, top_k, norm_topk=norm_topk)(ours)
    weights_TK = plain.softmax(1).gather(1, routes.experts)
    if norm_topk is None and top_k > 1:
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    torch.testing.assert_close(routes.weights, weights_TK, rtol=1e-12, atol=0)
    gradient_TK = torch.randn(20, top_k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (routes.weights * gradient_TK).sum().backward()
    (weights_TK * gradient_TK).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-12)
    assert ours.grad.abs().sum() > 0


def test_a_solver_cut_short_says_so():
    routes = sinkhorn_router(5, 1, reg=0.05, max_passes=2)(biased_scores(60, 5))
    assert routes.plan_passes == 2 and routes.plan_error > 1e-2
