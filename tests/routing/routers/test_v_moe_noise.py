"""The router of V-MoE: against slow loops in float64, by hand, and its noise."""

import math

import pytest
import torch

import sinkroute


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def v_moe_router(experts, top_k, noise_TE=None, **options):
    """A router, with this noise of variance 1 instead of a drawn one if it is given."""
    router = sinkroute.create_router("v-moe-noise", num_experts=experts, top_k=top_k, **options)
    if noise_TE is not None:
        router.draw_normal = lambda reference: noise_TE.to(reference.dtype)
    return router


def normal_cdf(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def cv_squared(amounts):
    mean = sum(amounts) / len(amounts)
    return sum((a - mean) ** 2 for a in amounts) / len(amounts) / mean**2


def slow(rows, noise, top_k, importance_coefficient, load_coefficient):
    """Chosen experts, their weights among all scores, and the loss, one token and one expert at a time."""
    experts = len(rows[0])
    chosen, weights, importance, load = [], [], [0.0] * experts, [0.0] * experts
    for z, eps in zip(rows, noise, strict=True):
        h = [z[e] + eps[e] / experts for e in range(experts)]
        best = sorted(range(experts), key=lambda e: -h[e])[:top_k]
        chosen.append(best)
        weights.append([math.exp(h[e]) / sum(map(math.exp, h)) for e in best])
        for e in range(experts):
            importance[e] += math.exp(z[e]) / sum(map(math.exp, z))
            load[e] += 1 - normal_cdf((h[best[-1]] - z[e]) / (1 / experts))
    return chosen, weights, importance_coefficient * cv_squared(importance) + load_coefficient * cv_squared(load)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_routes_and_loss_are_those_of_a_slow_loop(top_k):
    logits_TE, noise_TE = 0.3 * random(12, 5), random(12, 5, seed=1)
    routes = v_moe_router(5, top_k, noise_TE, norm_topk=False)(logits_TE)
    chosen, weights, loss = slow(logits_TE.tolist(), noise_TE.tolist(), top_k, 0.005, 0.005)
    assert routes.experts.tolist() == chosen and routes.branch == "softmax"
    torch.testing.assert_close(routes.weights, torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=0)
    assert routes.aux_loss.item() == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_the_gradient_of_the_loss_is_that_of_finite_differences_of_the_slow_loop(coefficients):
    logits_TE, noise_TE, step = 0.3 * random(4, 5), random(4, 5, seed=1), 1e-5
    logits_TE.requires_grad_()
    options = dict(zip(("importance_coefficient", "load_coefficient"), coefficients, strict=True))
    v_moe_router(5, 2, noise_TE, **options)(logits_TE).aux_loss.backward()
    rows, expected = logits_TE.tolist(), []
    for token in range(4):
        for column in range(5):
            ends = []
            for move in (step, -step):
                moved = [list(row) for row in rows]
                moved[token][column] += move
                ends.append(slow(moved, noise_TE.tolist(), 2, *coefficients)[2])
            expected.append((ends[0] - ends[1]) / (2 * step))
    expected_TE = torch.tensor(expected, dtype=torch.float64).view(4, 5)
    torch.testing.assert_close(logits_TE.grad, expected_TE, rtol=1e-6, atol=1e-8)


def test_loss_worked_by_hand():
    # No noise is drawn; two experts, so its width is 1/2; both tokens have logits (1/2, 0), top-1. The threshold is
    # 1/2: chances Φ(0) = 0.5 and Φ(−1) = 0.158655: mean 0.329328, CV² = (0.170672/0.329328)² = 0.268578.
    # Scores 0.622459, 0.377541: CV² = (0.122459/0.5)² = 0.059985.
    router = v_moe_router(2, 1, torch.zeros(2, 2))
    loss = router(torch.tensor([[0.5, 0.0]] * 2, dtype=torch.float64)).aux_loss
    assert loss.item() == pytest.approx(0.005 * 0.268578 + 0.005 * 0.059985, rel=1e-5)


@pytest.mark.parametrize("experts", [2, 10])
def test_the_noise_has_a_standard_deviation_of_1_over_the_experts(experts):
    # With two equal logits and a third far away, weights p of two experts tell h_1 − h_2 = ln p/(1−p), std √2/E.
    logits_TE = torch.full((20_000, experts), -50.0)
    logits_TE[:, :2] = 0
    routes = v_moe_router(experts, 2)(logits_TE)
    difference = torch.logit(routes.weights.gather(1, routes.experts.argsort(1))[:, 0].double())
    assert difference.std().item() == pytest.approx(math.sqrt(2) / experts, rel=0.03)
    assert abs(difference.mean().item()) < 5 * math.sqrt(2) / experts / math.sqrt(20_000)


def test_noise_is_drawn_anew_by_step_and_micro_batch_and_repeats_for_the_same():
    router, seen = v_moe_router(8, 2), {}
    for step, micro_batch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        sinkroute.set_step(router, step, micro_batch)
        experts_TK = router(torch.zeros(50, 8)).experts
        assert torch.equal(seen.setdefault((step, micro_batch), experts_TK), experts_TK)
    first, *others = seen.values()
    assert len(others) == 2 and not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("garbage", [0.0, 7.0, float("nan")])
def test_padding_is_in_no_loss(garbage):
    logits_TE, noise_TE, mask = random(9, 4), random(9, 4, seed=1), torch.arange(9) % 3 != 1
    padded = torch.where(mask[:, None], logits_TE, garbage).requires_grad_()
    alone = logits_TE[mask].requires_grad_()
    routes, expected = v_moe_router(4, 2, noise_TE)(padded, mask), v_moe_router(4, 2, noise_TE[mask])(alone)
    torch.testing.assert_close(routes.aux_loss, expected.aux_loss, rtol=1e-12, atol=0)
    assert torch.equal(routes.load, expected.load) and torch.equal(routes.experts[mask], expected.experts)
    routes.aux_loss.backward()
    expected.aux_loss.backward()
    torch.testing.assert_close(padded.grad[mask], alone.grad, rtol=1e-10, atol=1e-14)
    assert not padded.grad[~mask].any()


def test_descending_the_loss_balances_the_load():
    router = v_moe_router(4, 1, importance_coefficient=0.5, load_coefficient=0.5)
    logits_TE = random(400, 4, dtype=torch.float32)
    bias_E = torch.tensor([2.0, 0.0, 0.0, 0.0], requires_grad=True)
    before = router(logits_TE + bias_E).load.max()
    for step in range(60):
        sinkroute.set_step(router, step)
        (gradient,) = torch.autograd.grad(router(logits_TE + bias_E).aux_loss, bias_E)
        bias_E = (bias_E - 0.5 * gradient).detach().requires_grad_()
    assert before > 280 and router(logits_TE + bias_E).load.max() < 150  # of 400 tokens; even is 100


@pytest.mark.parametrize("name", ["importance_coefficient", "load_coefficient"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_coefficient_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a finite number of 0 or more, got {value}; 0\.005 is the"):
        v_moe_router(4, 2, **{name: value})


def test_groups_are_refused():
    with pytest.raises(ValueError, match=r"top_groups=1 of groups=2: VMoENoiseRouter cannot keep a token's experts"):
        v_moe_router(4, 2, groups=2, top_groups=1)
