"""Noisy top-k gating: against slow loops in float64, by hand, and where there is nothing to balance."""

import math

import pytest
import torch

import sinkroute
from sinkroute.routing.routers.noisy import smooth_load_loss


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def noisy_router(experts, top_k, noise_TE=None, **options):
    """A noisy router, with this noise instead of a drawn one if it is given."""
    router = sinkroute.create_router("noisy", num_experts=experts, top_k=top_k, **options)
    if noise_TE is not None:
        router.draw_normal = lambda reference: noise_TE.to(reference.dtype)
    return router


def normal_cdf(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def cv_squared(amounts):
    mean = sum(amounts) / len(amounts)
    return sum((a - mean) ** 2 for a in amounts) / len(amounts) / mean**2


def slow(rows, noise, experts, top_k, importance_coefficient, load_coefficient, normalise=True):
    """Chosen experts, weights and loss of rows of 2·E numbers, one token and one expert at a time."""
    chosen, weights, importance, load = [], [], [0.0] * experts, [0.0] * experts
    for row, eps in zip(rows, noise, strict=True):
        width = [math.log1p(math.exp(raw)) + 0.01 for raw in row[experts:]]
        h = [row[e] + width[e] * eps[e] for e in range(experts)]
        best = sorted(range(experts), key=lambda e: -h[e])[:top_k]
        total = sum(math.exp(h[e]) for e in (best if normalise else range(experts)))
        chosen.append(best)
        weights.append([math.exp(h[e]) / total for e in best])
        for e, w in zip(best, weights[-1], strict=True):
            importance[e] += w
        for e in range(experts):
            others = sorted((h[j] for j in range(experts) if j != e), reverse=True)
            load[e] += normal_cdf((row[e] - others[top_k - 1]) / width[e]) if top_k < experts else 1.0
    loss = importance_coefficient * cv_squared(importance) + load_coefficient * cv_squared(load)
    return chosen, weights, loss


@pytest.mark.parametrize("top_k", [1, 2, 4, 5])
def test_routes_and_loss_are_those_of_a_slow_loop(top_k):
    logits_TX, noise_TE = random(12, 10), random(12, 5, seed=1)
    routes = noisy_router(5, top_k, noise_TE)(logits_TX)
    chosen, weights, loss = slow(logits_TX.tolist(), noise_TE.tolist(), 5, top_k, 0.1, 0.1, normalise=top_k > 1)
    assert routes.experts.tolist() == chosen and routes.branch == "softmax"
    torch.testing.assert_close(routes.weights, torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=0)
    assert routes.aux_loss.item() == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_the_gradient_of_the_loss_is_that_of_finite_differences_of_the_slow_loop(coefficients):
    logits_TX, noise_TE, step = random(4, 10), random(4, 5, seed=1), 1e-5
    logits_TX.requires_grad_()
    options = dict(zip(("importance_coefficient", "load_coefficient"), coefficients, strict=True))
    noisy_router(5, 2, noise_TE, **options)(logits_TX).aux_loss.backward()
    rows, expected = logits_TX.tolist(), []
    for token in range(4):
        for column in range(10):
            ends = []
            for move in (step, -step):
                moved = [list(row) for row in rows]
                moved[token][column] += move
                ends.append(slow(moved, noise_TE.tolist(), 5, 2, *coefficients)[2])
            expected.append((ends[0] - ends[1]) / (2 * step))
    expected_TX = torch.tensor(expected, dtype=torch.float64).view(4, 10)
    torch.testing.assert_close(logits_TX.grad, expected_TX, rtol=1e-6, atol=1e-8)
    assert (logits_TX.grad[:, 5:].abs().sum() > 0).item()


def test_the_weights_teach_logits_and_widths():
    # h = z + width · ε, so dh/dz = 1 and dh/draw = ε · sigmoid(raw); of the weights p of two, dp_1/dh_1 = p_1 p_2.
    logits_TX = torch.tensor([[2.0, 1.0, -9.0, 0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    noise_TE = torch.tensor([[0.5, -1.0, 0.0]], dtype=torch.float64)
    routes = noisy_router(3, 2, noise_TE)(logits_TX)
    routes.weights[0, 0].backward()
    first, second = routes.weights[0].tolist()
    slope = first * second
    expected = [slope, -slope, 0, slope * 0.5 * 0.5, -slope * -1.0 / (1 + math.exp(-1)), 0]
    torch.testing.assert_close(logits_TX.grad, torch.tensor([expected], dtype=torch.float64))


def test_loss_worked_by_hand():
    # No noise is drawn, all widths are 1 (0.01 + 0.99), both tokens have logits (1, 0), top-1. An expert's threshold is
    # the other's logit: chances Φ(1) = 0.841345, Φ(−1) = 0.158655: CV² = (0.341345/0.5)² = 0.466065.
    # All weight is on expert 0: CV² = 1.
    raw = math.log(math.expm1(0.99))
    logits_TX = torch.tensor([[1.0, 0.0, raw, raw]] * 2, dtype=torch.float64)
    router = noisy_router(2, 1, torch.zeros(2, 2))
    assert router(logits_TX).aux_loss.item() == pytest.approx(0.1 * 1 + 0.1 * 0.466065, rel=1e-6)


def test_an_expert_is_expected_as_often_as_new_noise_of_its_own_brings_it_among_the_best():
    # Draw one expert's noise anew 40,000 times, all others kept: how often is it among the two best?
    clean_TE, width_TE = random(1, 4), 0.3 + random(1, 4, seed=1).abs()
    noisy_TE = clean_TE + width_TE * random(1, 4, seed=2)
    shares = []
    for expert in range(4):
        drawn_DE = noisy_TE.repeat(40_000, 1)
        drawn_DE[:, expert] = clean_TE[0, expert] + width_TE[0, expert] * random(40_000, seed=3 + expert)
        shares.append((drawn_DE.topk(2).indices == expert).any(1).double().mean().item())
    assert smooth_load_loss(clean_TE, noisy_TE, width_TE, 2).item() == pytest.approx(cv_squared(shares), abs=0.02)


def test_logits_alone_get_a_width_of_ln_2_and_a_hundredth():
    logits_TE, noise_TE = random(6, 4), random(6, 4, seed=1)
    routes = noisy_router(4, 2, noise_TE)(logits_TE)
    values = (logits_TE + (math.log(2) + 0.01) * noise_TE).topk(2)
    assert torch.equal(routes.experts, values.indices)
    torch.testing.assert_close(routes.weights, torch.softmax(values.values, 1))


def test_noise_is_drawn_anew_by_step_and_micro_batch_and_repeats_for_the_same():
    router, seen = noisy_router(8, 2), {}
    for step, micro_batch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        sinkroute.set_step(router, step, micro_batch)
        experts_TK = router(torch.zeros(50, 16)).experts
        assert torch.equal(seen.setdefault((step, micro_batch), experts_TK), experts_TK)
    first, *others = seen.values()
    assert len(others) == 2 and not any(torch.equal(first, other) for other in others)


def test_the_gate_gives_logits_and_widths_and_starts_at_zero():
    gate = noisy_router(6, 2).make_gate(10)
    assert gate.weight.shape == (12, 10) and gate.bias is None and not gate.weight.any()


def test_resetting_the_gate_makes_it_zero_again():
    layer = sinkroute.MoE(6, 8, 4, 2, "noisy", gate_bias=True)
    torch.nn.init.ones_(layer.gate.weight)
    torch.nn.init.ones_(layer.gate.bias)
    layer.gate.reset_parameters()
    assert not layer.gate.weight.any() and not layer.gate.bias.any()


def test_an_untrained_gate_loads_experts_evenly_and_learns_from_the_weights():
    router = noisy_router(4, 2, importance_coefficient=0, load_coefficient=0)
    gate = router.make_gate(3)
    routes = router(gate(random(4000, 3, dtype=torch.float32)))
    assert (routes.load - 2000).abs().max() < 160  # 5 standard deviations of a count of 4000 halves
    (routes.weights * routes.experts).sum().backward()
    assert (gate.weight.grad.abs().sum(1) > 0).all()


def test_serving_looks_at_the_logits_only():
    logits_TX = random(20, 12, dtype=torch.float32)
    served = noisy_router(6, 2).eval()(logits_TX)
    plain = sinkroute.create_router("softmax", num_experts=6, top_k=2)(logits_TX[:, :6])
    assert torch.equal(served.experts, plain.experts) and torch.equal(served.weights, plain.weights)
    assert served.aux_loss is None


@pytest.mark.parametrize("garbage", [0.0, 7.0, float("nan")])
def test_padding_is_in_no_loss(garbage):
    logits_TX, noise_TE, mask = random(9, 8), random(9, 4, seed=1), torch.arange(9) % 3 != 1
    padded = torch.where(mask[:, None], logits_TX, garbage).requires_grad_()
    alone = logits_TX[mask].requires_grad_()
    routes, expected = noisy_router(4, 2, noise_TE)(padded, mask), noisy_router(4, 2, noise_TE[mask])(alone)
    torch.testing.assert_close(routes.aux_loss, expected.aux_loss, rtol=1e-12, atol=0)
    assert torch.equal(routes.load, expected.load) and torch.equal(routes.experts[mask], expected.experts)
    routes.aux_loss.backward()
    expected.aux_loss.backward()
    torch.testing.assert_close(padded.grad[mask], alone.grad, rtol=1e-10, atol=1e-14)
    assert not padded.grad[~mask].any()


@pytest.mark.parametrize("raw", [-1e4, 1e4])
def test_widths_of_any_size_leave_loss_and_gradient_finite(raw):
    logits_TX = torch.cat([random(10, 4, dtype=torch.float32), torch.full((10, 4), raw)], 1).requires_grad_()
    loss = noisy_router(4, 2)(logits_TX).aux_loss
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits_TX.grad).all()


def test_where_every_expert_is_chosen_only_the_weights_can_be_uneven():
    logits_TX = random(8, 6)
    losses = [noisy_router(3, 3, load_coefficient=c)(logits_TX).aux_loss.item() for c in (0.0, 0.1, 100.0)]
    assert losses[0] == losses[1] == losses[2] > 0


def test_descending_the_loss_balances_the_load():
    router, logits_TE = noisy_router(4, 1), random(400, 4, dtype=torch.float32)
    bias_E = torch.tensor([3.0, 0.0, 0.0, 0.0], requires_grad=True)
    before = router(logits_TE + bias_E).load.max()
    for step in range(80):
        sinkroute.set_step(router, step)
        (gradient,) = torch.autograd.grad(router(logits_TE + bias_E).aux_loss, bias_E)
        bias_E = (bias_E - 2.0 * gradient).detach().requires_grad_()
    assert before > 300 and router(logits_TE + bias_E).load.max() < 150  # of 400 tokens; even is 100


@pytest.mark.parametrize("name", ["importance_coefficient", "load_coefficient"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_coefficient_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a finite number of 0 or more, got {value}; 0\.1 is the pub"):
        noisy_router(4, 2, **{name: value})


def test_groups_are_refused():
    with pytest.raises(ValueError, match=r"top_groups=1 of groups=2: NoisyRouter cannot keep a token's experts"):
        noisy_router(4, 2, groups=2, top_groups=1)


def test_a_layer_with_this_router_trains_its_gate():
    layer = sinkroute.MoE(d_model=6, d_hidden=8, num_experts=4, top_k=2, router="noisy")
    out = layer(random(10, 6, dtype=torch.float32))
    (out.square().sum() + layer.routes.aux_loss).backward()
    assert layer.gate.weight.shape == (8, 6) and (layer.gate.weight.grad.abs().sum(1) > 0).all()
