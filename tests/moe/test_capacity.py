"""A layer with a capacity against a slow loop over tokens and experts, and what it leaves alone."""

from fractions import Fraction

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import sinkroute
from sinkroute.moe.capacity import millionths, places, within_capacity

D, HIDDEN, E, K = 6, 5, 4, 2


def make(capacity=None, *, top_k=K, router="softmax", dtype=torch.float64, experts=E, **options):
    torch.manual_seed(0)
    return sinkroute.MoE(D, HIDDEN, experts, top_k, router, capacity=capacity, **options).to(dtype)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kept_by_a_loop(choices, capacity, tokens, experts=E, top_k=K):
    """Of choices (token, place, expert, weight), the (token, place) that are kept: expert by expert, best first."""
    most = -(-capacity * top_k * tokens // experts)
    kept = set()
    for expert in range(experts):
        mine = sorted((c for c in choices if c[2] == expert), key=lambda c: (-c[3], c[0], c[1]))
        kept |= {(token, place) for token, place, _, _ in mine[: int(most)]}
    return kept


def by_a_loop(layer, x_TD, gradient_TD, capacity, real):
    """Output, gradient of x and of all weights, place by place, and how many places went without their expert."""
    weights = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    x_TD = x_TD.detach().clone().requires_grad_()
    routed = {}
    for token in real:
        scores_E = torch.softmax(weights["gate.weight"] @ x_TD[token], 0)
        best = sorted(range(E), key=lambda expert: -scores_E[expert].item())[:K]
        total = sum(scores_E[expert] for expert in best)
        routed[token] = [(expert, scores_E[expert] / total) for expert in best]
    choices = [(t, k, e, w.item()) for t, places in routed.items() for k, (e, w) in enumerate(places)]
    kept = kept_by_a_loop(choices, capacity, len(real))
    rows = []
    for token in range(len(x_TD)):
        y_D = torch.zeros_like(x_TD[token])
        for place, (expert, weight) in enumerate(routed.get(token, [])):
            if (token, place) in kept:
                gate, up = (weights["experts.w_in"][expert] @ x_TD[token]).chunk(2)
                hidden = gate / (1 + torch.exp(-gate)) * up
                y_D = y_D + weight * (weights["experts.w_out"][expert] @ hidden)
        rows.append(y_D)
    y_TD = torch.stack(rows)
    y_TD.backward(gradient_TD)
    return y_TD.detach(), x_TD.grad, {n: w.grad for n, w in weights.items()}, len(choices) - len(kept)


@pytest.mark.parametrize("real", [range(13), (0, 1, 3, 4, 8, 9, 12)], ids=["all real", "with padding"])
@pytest.mark.parametrize("capacity", [Fraction(1, 2), Fraction(1), Fraction(5, 4)])
def test_output_and_gradients_are_those_of_a_loop_that_drops_the_lowest_weights(capacity, real):
    layer, x_TD, gradient_TD = make(float(capacity)), random(13, D) + 2, random(13, D, seed=1)
    mask = torch.zeros(13, dtype=torch.bool)
    mask[list(real)] = True
    x = x_TD.clone().requires_grad_()
    y = layer(x, None if mask.all() else mask)
    y.backward(gradient_TD)
    their_y, their_x, their_weights, dropped = by_a_loop(layer, x_TD, gradient_TD, capacity, list(real))
    assert dropped > 0 and int(layer.dropped) == dropped
    torch.testing.assert_close(y.detach(), their_y, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad, their_x, rtol=1e-9, atol=1e-12)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, their_weights[name], rtol=1e-9, atol=1e-12)


def test_an_expert_takes_the_even_share_times_the_capacity_rounded_up():
    assert places(millionths(1), 512, num_experts=16, top_k=2) == 64
    assert places(millionths(1.25), 512, num_experts=16, top_k=2) == 80
    assert places(millionths(1), 5, num_experts=4, top_k=2) == 3  # 2.5
    assert places(millionths(1), 0, num_experts=4, top_k=2) == 0
    assert places(millionths(1.1), 100, num_experts=10, top_k=1) == 11  # and not the 12 of floats
    assert make(1.1).capacity == 1.1


def test_equal_weights_are_kept_in_the_order_of_the_tokens():
    experts_TK = torch.tensor([[1], [0], [1], [1], [1]])
    kept_TK = within_capacity(experts_TK, torch.ones(5, 1), 2, num_experts=2)
    assert kept_TK.flatten().tolist() == [True, True, True, False, False]


def test_padding_and_what_is_no_choice_take_no_place():
    experts_TK = torch.tensor([[0, 0], [0, 1]])
    chosen_TK = torch.tensor([[False, False], [True, False]])
    kept_TK = within_capacity(experts_TK, torch.tensor([[0.9, 0.9], [0.1, 0.9]]), 1, 2, chosen_TK)
    assert kept_TK.tolist() == [[False, False], [True, False]]


def test_the_other_experts_of_a_token_keep_their_weights():
    layer, free = make(0.5), make()
    x = random(1, D).expand(8, D).contiguous()  # all alike: two experts have room for 2 each, 1/2 · 2 · 8 / 4
    y = layer(x)
    torch.testing.assert_close(y[:2], free(x)[:2])
    assert not y[2:].any() and int(layer.dropped) == 12


def test_a_token_that_one_expert_has_no_room_for_gets_the_output_of_the_other():
    layer = make(1.0)  # room for 2 of 4 tokens
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(E, D))
    # Expert 0 is wanted by all, least by the last two, whose other experts are 2 and 3.
    x = torch.tensor([[4.0, 1, 0, 0, 1, 2], [3.0, 1, 0, 0, 2, 1], [2.0, 0, 1.5, 0, 1, 1], [2.0, 0, 0, 1.5, 1, 1]])
    y = layer(x.double())
    alone = torch.arange(2, 4)
    outputs = layer.experts(x.double()[alone], torch.tensor([0, 0, 1, 2], dtype=torch.int32))
    weight = 1 / (1 + 2.718281828459045**0.5)  # softmax of 2 and 1.5, the second
    torch.testing.assert_close(y[2:], weight * outputs)
    assert int(layer.dropped) == 2


def test_the_routes_stay_what_the_router_chose():
    layer, free, x = make(0.5), make(), random(32, D) + 1
    layer(x), free(x)
    assert torch.equal(layer.routes.experts, free.routes.experts)
    assert torch.equal(layer.routes.weights, free.routes.weights)
    assert torch.equal(layer.routes.load, free.routes.load)
    assert layer.dropped.dtype == torch.int64 and layer.dropped.ndim == 0 and free.dropped is None


def test_serving_drops_nothing():
    layer, free, x = make(0.5).eval(), make().eval(), random(32, D) + 1
    torch.testing.assert_close(layer(x), free(x), rtol=0, atol=0)
    assert layer.dropped is None


def test_room_for_all_changes_no_bit():
    layer, free, x = make(float(E)), make(), random(32, D) + 1
    torch.testing.assert_close(layer(x), free(x), rtol=0, atol=0)
    assert int(layer.dropped) == 0


def test_a_pass_without_real_tokens_drops_nothing():
    layer = make(1.0)
    assert layer(random(0, D)).shape == (0, D) and int(layer.dropped) == 0
    assert not layer(random(3, D), torch.zeros(3, dtype=torch.bool)).any() and int(layer.dropped) == 0


@pytest.mark.parametrize("router", ["expert-choice", "ssr-s", "ssr-dual", "quantile"])
def test_no_expert_takes_more_than_its_places_whatever_the_router(router):
    options = {"ssr-s": {"probability": 1.0}}.get(router, {})
    layer, x = make(0.75, router=router, router_options=options, dtype=torch.float32), random(40, D).float() + 0.5
    sinkroute.set_step(layer, 0)
    layer(x)
    routes = layer.routes
    most = 15  # 3/4 · 2 · 40 / 4
    excess = (routes.load - most).clamp(min=0).sum()
    assert int(excess) > 0 and int(layer.dropped) == int(excess)


def test_exact_balance_drops_nothing_at_capacity_one():
    layer = make(1.0, router="ssr-dual", router_options={"exact": True}, dtype=torch.float32)
    free = make(1.0, dtype=torch.float32)
    x = random(64, D).float() + 1
    sinkroute.set_step(layer, 0)
    layer(x), free(x)
    assert int(layer.dropped) == 0 < int(free.dropped)


def test_sub_tokens_of_a_multi_head_mixture_share_the_places():
    torch.manual_seed(0)
    layer = sinkroute.MultiHeadMoE(8, 2, HIDDEN, E, K, "softmax", capacity=0.5)
    layer(random(10, 8, dtype=torch.float32) + 1)
    assert int(layer.dropped) == int((layer.routes.load - 5).clamp(min=0).sum()) > 0  # 1/2 · 2 · 20 / 4


def test_activation_checkpointing_gives_the_same_gradients():
    layer, x = make(0.5), (random(16, D) + 1).requires_grad_()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_it_is_one_graph_with_the_numbers_of_eager_mode(masked):
    layer, x = make(0.5), random(16, D) + 1
    mask = torch.arange(16) < 11 if masked else None
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, mask), layer(x, mask))
    compiled(x, mask)
    assert int(layer.dropped) > 0
    torch._dynamo.reset()


def test_fake_tensors_pass_through():
    with FakeTensorMode():
        layer = sinkroute.MoE(D, HIDDEN, E, K, "softmax", capacity=0.5)
        assert layer(torch.empty(16, D)).shape == (16, D)


def test_gradients_of_functional_calls_are_those_of_backward():
    layer, x = make(0.5), random(16, D) + 1
    layer(x).square().sum().backward()
    found = grad(lambda p: functional_call(layer, p, (x,)).square().sum())(dict(layer.named_parameters()))
    assert all(torch.allclose(found[name], parameter.grad) for name, parameter in layer.named_parameters())


@pytest.mark.parametrize("capacity", [0, -1.0, float("nan"), float("inf")])
def test_a_capacity_that_is_no_share_is_refused(capacity):
    with pytest.raises(ValueError, match=f"capacity must be a finite number above 0, got {capacity}"):
        make(capacity)


@pytest.mark.parametrize("capacity", ["1.25", True])
def test_a_capacity_that_is_no_number_is_refused(capacity):
    with pytest.raises(TypeError, match=f"capacity must be a number or None, got {capacity!r}"):
        make(capacity)


def test_the_description_says_the_capacity():
    assert "capacity=1.25" in repr(make(1.25)) and "capacity" not in repr(make())
