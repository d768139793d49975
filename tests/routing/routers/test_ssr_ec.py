"""SSR-EC: experts choose by the columns of the plan."""

import pytest
import torch

import sinkroute


def ssr_ec(experts=5, top_k=2, **options):
    return sinkroute.create_router("ssr-ec", num_experts=experts, top_k=top_k, probability=1, noise=0, **options)


def scores(tokens=100, experts=5):
    logits_TE = torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return logits_TE + torch.linspace(0, 2, experts)


@pytest.mark.parametrize(("cost", "reg"), [("linear", 0.5), ("softmax", 0.1)])
def test_each_expert_has_the_largest_entries_of_its_column(cost, reg):
    routes = ssr_ec(cost=cost)(scores())
    plan_TE = sinkroute.solve(scores(), reg, cost=cost).matrix()
    weights_TE = torch.zeros(100, 5, dtype=torch.float64).scatter(1, routes.experts, routes.weights)
    for expert in range(5):
        best = plan_TE[:, expert].topk(40).indices  # 100 · 2 / 5
        assert set(best.tolist()) == set(weights_TE[:, expert].nonzero().flatten().tolist())
    assert routes.load.tolist() == [40] * 5
    sums_T = weights_TE.sum(1)
    assert torch.all((sums_T - 1).abs().lt(1e-9) | (sums_T == 0))
    kept_TE = plan_TE * (weights_TE > 0)
    expected_TE = kept_TE / kept_TE.sum(1, keepdim=True).clamp(min=1e-20)
    torch.testing.assert_close(weights_TE, expected_TE, rtol=1e-6, atol=1e-9)


def test_tokens_may_have_more_or_fewer_experts_than_k():
    routes = ssr_ec()(scores())
    counts_T = (routes.weights > 0).sum(1)
    assert counts_T.max() > 2 and counts_T.min() < 2 and int(counts_T.sum()) == 200
    assert routes.experts.shape[1] == counts_T.max()


def test_between_sinkhorn_steps_it_is_plain_topk():
    router = sinkroute.create_router("ssr-ec", num_experts=5, top_k=2, probability=0, noise=0)
    plain = sinkroute.create_router("softmax", num_experts=5, top_k=2)
    assert torch.equal(router(scores()).experts, plain(scores()).experts)


def test_padding_is_taken_by_no_expert():
    mask = torch.arange(100) % 4 != 0
    routes = ssr_ec()(scores(), mask)
    assert routes.load.tolist() == [30] * 5 and not routes.weights[~mask].any()


def test_a_layer_adds_up_what_the_experts_took():
    layer = sinkroute.MoE(8, 16, 5, 2, router=ssr_ec()).double()
    x_TD = torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y_TD = layer(x_TD)
    weights_TE = torch.zeros(30, 5, dtype=torch.float64).scatter(1, layer.routes.experts, layer.routes.weights)
    ends = torch.tensor([30], dtype=torch.int32)
    expected_TD = torch.zeros_like(y_TD)
    for expert in range(5):
        one = sinkroute.MoE(8, 16, 1, 1).double().experts
        with torch.no_grad():
            one.w_in.copy_(layer.experts.w_in[expert : expert + 1])
            one.w_out.copy_(layer.experts.w_out[expert : expert + 1])
        expected_TD = expected_TD + weights_TE[:, expert, None] * one(x_TD, ends)
    torch.testing.assert_close(y_TD, expected_TD)
    y_TD.sum().backward()
    assert torch.isfinite(x_TD.grad).all()
