"""Routers and their losses against DeepSpeed's gates, on the CPU. Its capacity is set so that nothing is dropped."""

import os

import pytest
import torch

import sinkroute

os.environ.setdefault("DS_ACCELERATOR", "cpu")
gates = pytest.importorskip("deepspeed.moe.sharded_moe")

EXPERTS = 8


def random(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, EXPERTS, generator=generator) + torch.randn(EXPERTS, generator=generator)


def peer(gate):
    """A gate's weights stand in (tokens, experts, places)."""

    def route(logits_TE):
        loss, weights_TEC, chosen_TEC, _ = gate(logits_TE)
        return weights_TEC.sum(2), chosen_TEC.any(2), loss

    return route


def top1(logits_TE, real_T=None):
    return gates.top1gating(logits_TE, EXPERTS, 0, used_token=real_T, use_rts=False)


def top2(logits_TE):
    return gates.top2gating(logits_TE, EXPERTS, 0, top2_2nd_expert_sampling=False)


def test_the_first_choices_weight_and_loss_are_those_of_deepspeed(agree):
    agree(
        sinkroute.create_router("load-balance", num_experts=EXPERTS, top_k=1, coefficient=1.0), peer(top1), random(60)
    )


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_weights_and_loss_of_several_choices_are_those_of_deepspeed(agree, top_k):
    router = sinkroute.create_router("load-balance", num_experts=EXPERTS, top_k=top_k, coefficient=1.0)
    agree(router, peer(lambda logits_TE: gates.topkgating(logits_TE, top_k, EXPERTS, 0)), random(60))


def test_two_choices_weights_and_gshards_loss_are_those_of_deepspeed(agree):
    # Of two choices it counts the first only, as GShard's algorithm 1 does; of three and more all (see above).
    agree(sinkroute.create_router("gshard", num_experts=EXPERTS, top_k=2, coefficient=1.0), peer(top2), random(60))


@pytest.mark.parametrize(("method", "top_k"), [("gshard", 1), ("gshard", 2), ("load-balance", 3)])
def test_tokens_and_the_gates_gradient_are_routed_as_by_deepspeeds_whole_gate(method, top_k):
    tokens_TD = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    options = {"use_rts": False, "top2_2nd_expert_sampling": False}
    theirs = gates.TopKGate(16, EXPERTS, top_k, capacity_factor=EXPERTS, min_capacity=0, **options)
    ours = torch.nn.Linear(16, EXPERTS, bias=False)
    ours.load_state_dict(theirs.wg.state_dict())

    loss, weights_TEC, _, load_E = theirs(tokens_TD)
    routes = sinkroute.create_router(method, num_experts=EXPERTS, top_k=top_k, coefficient=1.0)(ours(tokens_TD))
    assert torch.equal(routes.load, load_E)
    (loss + weights_TEC.sum(2).square().sum()).backward()
    (routes.aux_loss + routes.weights.square().sum()).backward()
    torch.testing.assert_close(ours.weight.grad, theirs.wg.weight.grad, rtol=1e-4, atol=1e-6)


def test_padding_has_no_part_in_our_loss_and_half_a_part_in_deepspeeds():
    # DeepSpeed does not count what padding chooses, but does count it among the tokens and its scores in the mean: with
    # even scores and every second token padding its loss is 1/2. A loss of 1 is even, whatever is padding: ours.
    mask = torch.arange(60) % 2 == 0
    router = sinkroute.create_router("load-balance", num_experts=EXPERTS, top_k=1, coefficient=1.0)
    assert router(torch.zeros(60, EXPERTS), mask).aux_loss.item() == pytest.approx(1.0)
    assert top1(torch.zeros(60, EXPERTS), mask)[0].item() == pytest.approx(0.5)
