"""Expert choice against a loop over experts, and what tokens get that nobody, or everybody, takes."""

import numpy as np
import pytest
import torch

import sinkroute


def make(experts, top_k=2, **options):
    return sinkroute.create_router("expert-choice", num_experts=experts, top_k=top_k, **options)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_a_loop(logits_TE, capacity_factor, slope_TE, real):
    """(T, E) weights by the textbook in float64, and the gradient of Σ slope · weight."""
    values = logits_TE.double().numpy()
    exponentials = np.exp(values - values.max(1, keepdims=True))
    p = exponentials / exponentials.sum(1, keepdims=True)
    taken = np.zeros_like(p)
    experts = range(p.shape[1])
    ranked = [sorted(real, key=lambda token: -p[token, expert]) for expert in experts]
    in_all = max(len(experts), int(len(real) * capacity_factor + 1e-9))
    size = min(len(real), in_all // len(experts))
    sizes = [size for _ in experts]
    if size < len(real):  # the rest goes to the experts whose next token is the best
        for expert in sorted(experts, key=lambda expert: -p[ranked[expert][size], expert])[: in_all % len(experts)]:
            sizes[expert] += 1
    for expert in experts:
        taken[ranked[expert][: sizes[expert]], expert] = 1
    upstream = slope_TE.double().numpy() * taken
    return taken * p, p * (upstream - (upstream * p).sum(1, keepdims=True))


def spread(routes, experts):
    """Weights as (T, E)."""
    return torch.zeros(len(routes.weights), experts, dtype=routes.weights.dtype).scatter_add(
        1, routes.experts, routes.weights
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "capacity_factor"),
    [(24, 4, 2, None), (25, 4, 1, None), (24, 6, 2, 1.25), (3, 6, 2, None), (1, 4, 1, None), (9, 3, 3, None)],
)
def test_weights_and_gradient_are_those_of_a_loop_over_experts(tokens, experts, top_k, capacity_factor, masked):
    logits_TE, slope_TE = random(tokens, experts).requires_grad_(), random(tokens, experts, seed=1)
    mask = torch.arange(tokens) % 3 != 1 if masked else None
    routes = make(experts, top_k, capacity_factor=capacity_factor)(logits_TE, mask)
    (spread(routes, experts) * slope_TE).sum().backward()
    real = range(tokens) if mask is None else mask.nonzero().flatten().tolist()
    weights, gradient = by_a_loop(logits_TE.detach(), capacity_factor or top_k, slope_TE, real)
    np.testing.assert_allclose(spread(routes, experts).detach().numpy(), weights, rtol=1e-12)
    np.testing.assert_allclose(logits_TE.grad.numpy(), gradient, rtol=1e-9, atol=1e-15)
    assert routes.load.tolist() == (weights > 0).sum(0).tolist()
    assert int(routes.load.max() - routes.load.min()) <= 1
    assert routes.branch == "expert-choice"


def test_a_token_that_two_experts_take_and_one_that_none_does_worked_by_hand():
    # Each of three experts takes 3 · 1 / 3 = 1 token: the largest of its column.
    p = torch.tensor([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]])
    routes = make(3, 1)(p.log())
    assert routes.chosen.tolist() == [[True, True], [False, False], [True, False]]
    assert routes.experts[0].tolist() == [0, 1] and routes.experts[2, 0] == 2
    torch.testing.assert_close(routes.weights, torch.tensor([[0.5, 0.4], [0, 0], [0.6, 0]]))
    assert routes.load.tolist() == [1, 1, 1]


def test_loads_are_equal_where_all_logits_are():
    routes = make(4, 2)(torch.zeros(8, 4))
    assert routes.load.tolist() == [4, 4, 4, 4]


def test_places_beyond_a_tokens_experts_are_no_choice():
    routes = make(4, 1)(random(16, 4, dtype=torch.float32))
    assert routes.chosen.sum() == routes.load.sum() == 16
    assert torch.equal(routes.chosen, routes.weights > 0)
    assert all(len(set(row)) == len(row) for row in routes.experts.tolist())


def test_no_tokens_and_nothing_but_padding_are_no_error():
    for logits_TE, mask in ((torch.zeros(0, 4), None), (torch.full((3, 4), torch.nan), torch.zeros(3).bool())):
        routes = make(4)(logits_TE, mask)
        assert routes.load.tolist() == [0] * 4 and not routes.weights.any() and routes.weights.shape[1] == 2


def test_bfloat16_logits_get_the_routes_of_their_values():
    half = random(30, 6, dtype=torch.bfloat16)
    routes, expected = make(6)(half), make(6)(half.float())
    assert torch.equal(routes.experts, expected.experts) and torch.equal(routes.weights, expected.weights)


def test_normalised_weights_sum_to_1_where_there_are_any():
    routes = make(4, 1, norm_topk=True)(random(16, 4))
    sums = routes.weights.sum(1)
    torch.testing.assert_close(sums, routes.chosen.any(1).double())
    assert 0 < sums.sum() < 16  # some tokens have no expert


def test_serving_is_the_choice_of_the_tokens_with_weights_that_are_not_normalised():
    routes = make(2).eval()(torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log())
    assert routes.experts.tolist() == [[0, 1], [1, 0]]
    torch.testing.assert_close(routes.weights, torch.tensor([[0.75, 0.25], [0.75, 0.25]]))
    assert make(2, 1).eval()(torch.tensor([[2.0, 0.0]] * 4)).load.tolist() == [4, 0]


@pytest.mark.parametrize("value", [0, -1, 4.5, float("nan")])
def test_a_capacity_that_no_expert_can_have_is_refused(value):
    message = r"capacity_factor must be (a finite number above 0|above 0 and at most num_experts=4), got"
    with pytest.raises(ValueError, match=message):
        make(4, capacity_factor=value)
