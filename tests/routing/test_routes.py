"""The contract of `Routes`, which every router has to keep for every batch."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sinkroute
from sinkroute.routing.registry import router_options


@st.composite
def batches(draw):
    tokens, experts = draw(st.integers(0, 12)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))  # 0: all scores are equal
    logits_TE = scale * torch.randn(tokens, experts, generator=generator)
    mask = draw(st.none() | st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    return logits_TE, None if mask is None else torch.tensor(mask, dtype=torch.bool), draw(st.integers(1, experts))


@pytest.mark.parametrize("norm_topk", [None, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("softmax", "load-balance", "z-loss", "sinkhorn")),
        *((name, {}) for name in ("base", "xmoe", "stable-moe", "smoe-dropout", "hash")),
        *((name, {}) for name in ("gshard", "noisy", "v-moe-noise")),
        *((name, {}) for name in ("global-load-balance", "loss-free", "quantile")),
        *((name, {"probability": p, "noise": 1.0}) for name in ("ssr-l", "ssr-s") for p in (0.0, 1.0)),
    ],
)
@settings(deadline=None, max_examples=25)
@given(batch=batches())
def test_routes_keep_their_contract(name, options, norm_topk, batch):
    logits_TE, mask, top_k = batch
    tokens, experts = logits_TE.shape
    router = sinkroute.create_router(name, num_experts=experts, top_k=top_k, norm_topk=norm_topk, **options)
    routes = router(logits_TE, mask)
    real = torch.ones(tokens, dtype=torch.bool) if mask is None else mask
    assert routes.experts.dtype == routes.load.dtype == torch.int64 and routes.weights.dtype == torch.float32
    assert routes.experts.shape == routes.weights.shape == (tokens, top_k) and routes.load.shape == (experts,)
    assert all(len(set(row)) == top_k and set(row) <= set(range(experts)) for row in routes.experts.tolist())
    counted = [int((routes.experts[real] == expert).sum()) for expert in range(experts)]
    assert routes.load.tolist() == counted and sum(counted) == top_k * int(real.sum())
    assert not routes.weights[~real].any() and (routes.weights >= 0).all() and (routes.weights <= 1 + 1e-5).all()
    if router.norm_topk:
        torch.testing.assert_close(routes.weights.sum(1), real.float(), rtol=0, atol=1e-5)
    by_plan = name == "sinkhorn" or options.get("probability") == 1.0
    assert routes.branch == ("sinkhorn" if by_plan else "assignment" if name == "base" else "softmax")
    assert routes.chosen is None if mask is None else torch.equal(routes.chosen, mask[:, None].expand(tokens, top_k))
    assert (routes.plan_error is not None) == (routes.plan_passes is not None) == by_plan
    if not by_plan or "probability" in router_options(name):  # S-BASE orders by the plan and weighs by the softmax
        assert (routes.weights.diff(dim=1) <= 1e-6).all()


@pytest.mark.parametrize("name", ["load-balance", "z-loss", "gshard", "noisy", "v-moe-noise"])
def test_an_auxiliary_loss_is_a_number_with_a_gradient(name):
    logits_TE = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routes = sinkroute.create_router(name, num_experts=3, top_k=1)(logits_TE)
    routes.aux_loss.backward()
    assert routes.aux_loss.shape == () and logits_TE.grad.abs().sum() > 0


def test_a_plan_reports_its_error_and_passes():
    logits_TE = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    routes = sinkroute.create_router("sinkhorn", num_experts=4, top_k=1, tol=1e-3)(logits_TE)
    plan = sinkroute.solve(logits_TE, 1.0, tol=1e-3)
    assert routes.plan_error == plan.column_error <= 1e-3 and routes.plan_passes == plan.passes > 1


def test_routes_cannot_be_changed():
    routes = sinkroute.create_router("softmax", num_experts=3, top_k=1)(torch.zeros(2, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        routes.branch = "sinkhorn"
