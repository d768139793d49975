"""Routers and bias updates against those of torchtitan, on the CPU and one rank."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sinkroute

titan_moe = pytest.importorskip("torchtitan.models.common.moe")
titan_linear = pytest.importorskip("torchtitan.models.common.linear")
titan_optimizer = pytest.importorskip("torchtitan.components.optimizer.optimizer")

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


def random(tokens, experts, seed=0):
    """Logits of which some experts get more than others, the same ones for every seed."""
    popular_E = torch.randn(experts, generator=torch.Generator().manual_seed(99))
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) + popular_E


def router_config(experts, top_k, **options):
    gate = titan_linear.Linear.Config(in_features=experts, out_features=experts, bias=False)
    return titan_moe.TokenChoiceTopKRouter.Config(num_experts=experts, gate=gate, top_k=top_k, **options)


def titan(experts, top_k, **options):
    router = router_config(experts, top_k, **options).build()
    router.gate = nn.Identity()  # what is routed are the logits
    return router


def peer(router, bias_E=None):
    def route(logits_TE):
        weights_TK, experts_TK, scores_TE = (x.flatten(0, 1) for x in router(logits_TE[None], bias_E))
        weights_TE = torch.zeros_like(scores_TE).scatter(1, experts_TK, weights_TK)
        return weights_TE, torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, experts_TK, True), None

    return route


@pytest.mark.parametrize("norm_topk", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_weights_are_those_of_torchtitan(agree, score, top_k, norm_topk):
    router = sinkroute.create_router(
        "softmax", num_experts=8, top_k=top_k, score=score, norm_topk=norm_topk, route_scale=2.5
    )
    agree(router, peer(titan(8, top_k, score_func=score, route_norm=norm_topk, route_scale=2.5)), random(60, 8))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_choices_within_groups_are_those_of_torchtitan(agree, score):
    options = {"score": score, "groups": 4, "top_groups": 2}
    router = sinkroute.create_router("softmax", num_experts=16, top_k=3, **options)
    theirs = titan(16, 3, score_func=score, route_norm=True, num_expert_groups=4, num_limited_groups=2)
    routes = agree(router, peer(theirs), random(60, 16))
    plain = sinkroute.create_router("softmax", num_experts=16, top_k=3, score=score)(random(60, 16))
    assert not torch.equal(routes.load, plain.load), "the groups forbid nothing here"


class NoExperts(nn.Module):
    """In the place of the experts: what is tested is what the layer counts before it asks them."""

    def forward(self, x_BLD, *_):
        return torch.zeros_like(x_BLD)


def titan_layer(experts, top_k, rate, **options):
    """torchtitan's own MoE layer, whose forward pass counts, and its own update before the optimiser's step."""
    config = titan_moe.MoE.Config(
        num_experts=experts,
        routed_experts=SimpleNamespace(build=NoExperts),
        router=router_config(experts, top_k, **options),
        load_balance_coeff=rate,
    )
    moe = config.build()
    moe.router.gate = nn.Identity()
    block = nn.Module()
    block.moe_enabled, block.moe = True, moe
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": block})
    updates = []
    titan_optimizer.register_moe_load_balancing_hook(
        SimpleNamespace(register_step_pre_hook=updates.append),
        [model],
        SimpleNamespace(get_optional_mesh=lambda name: None, ep_enabled=False, tp=1),
    )
    (update,) = updates
    return moe, update


@pytest.mark.parametrize("groups", [1, 4])
def test_the_bias_and_what_it_chooses_stay_those_of_torchtitan_over_several_steps(agree, groups):
    # torchtitan takes the mean out of every change, which the published rule does not (arXiv 2408.15664, algorithm 1).
    # One number added to all biases chooses the same, within groups too, where each sums two of them: only the numbers
    # in a checkpoint differ.
    limits = {"groups": 4, "top_groups": 2} if groups > 1 else {}
    their_limits = {"num_expert_groups": 4, "num_limited_groups": 2} if groups > 1 else {}
    ours = sinkroute.create_router("loss-free", num_experts=16, top_k=4, score="sigmoid", update_rate=0.02, **limits)
    moe, update = titan_layer(16, 4, 0.02, route_norm=True, **their_limits)
    most = []
    for step in range(20):
        for micro_batch in range(2):
            sinkroute.set_step(ours, step, micro_batch)
            logits_TE = random(64, 16, seed=micro_batch)
            most.append(agree(ours, peer(moe.router, moe.expert_bias_E), logits_TE).load.max().item())
            moe(logits_TE[None])
        sinkroute.end_step(ours)
        update()
        torch.testing.assert_close(ours.state.bias_E - ours.state.bias_E.mean(), moe.expert_bias_E, rtol=0, atol=1e-6)
    assert most[-1] < 0.7 * most[0], "the bias has balanced nothing"
    agree(ours.eval(), peer(moe.eval().router, moe.expert_bias_E), random(64, 16, seed=5))


def test_evaluation_between_two_steps_counts_in_neither():
    ours = sinkroute.create_router("loss-free", num_experts=16, top_k=4, score="sigmoid")
    moe, update = titan_layer(16, 4, 1e-3)
    sinkroute.set_step(ours, 0)
    for training, seed in ((True, 0), (False, 1)):
        ours.train(training)(random(64, 16, seed))
        moe.train(training)(random(64, 16, seed)[None])
    sinkroute.end_step(ours)
    update()
    torch.testing.assert_close(ours.state.bias_E - ours.state.bias_E.mean(), moe.expert_bias_E, rtol=0, atol=1e-8)
