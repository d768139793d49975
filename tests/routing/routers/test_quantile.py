"""Quantile balancing: by hand, against plain loops over tokens and experts, and what it is for."""

import math

import pytest
import torch

import sinkroute
from sinkroute.routing.metrics import max_violation

SIGMOID = {"scope": "batch", "score": "sigmoid"}
both_scopes = pytest.mark.parametrize("options", [{}, SIGMOID], ids=["micro-batch", "batch"])


def quantile_router(experts, top_k, **options):
    return sinkroute.create_router("quantile", num_experts=experts, top_k=top_k, **options)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def after_step(router, *micro_batches, masks=None):
    """The bias after one more step of these micro-batches."""
    sinkroute.set_step(router, router.state.current + 1)
    for part, logits_TE in enumerate(micro_batches):
        sinkroute.set_step(router, router.step, part)
        router(logits_TE, None if masks is None else masks[part])
    sinkroute.end_step(router)
    return router.state.bias_E.double()


def exact_bias(scores_TE, bias_E, top_k):
    """−β of one micro-batch: β_j the (n+1)-th largest of s_tj − α_t, n = T·K/E, before it is centred."""
    tokens, experts = scores_TE.shape
    assert tokens * top_k % experts == 0
    alphas = [sorted((row + bias_E).tolist(), reverse=True)[top_k] for row in scores_TE]
    columns = [[scores_TE[t, j].item() - alphas[t] for t in range(tokens)] for j in range(experts)]
    return torch.tensor([-sorted(column, reverse=True)[tokens * top_k // experts] for column in columns]).double()


def binned_bias(scores_TE, bias_E, top_k, bins=1000):
    """The pooled quantile from a histogram, one expert and one token after another, before it is centred."""
    tokens, experts = scores_TE.shape
    low, high = bias_E.min().item() - 1, bias_E.max().item() + 1
    result = []
    for expert in range(experts):
        histogram = [0] * bins
        for row in scores_TE:
            needed = sorted((row + bias_E).tolist(), reverse=True)[top_k] - row[expert].item()
            histogram[min(max(math.floor((needed - low) * bins / (high - low)), 0), bins - 1)] += 1
        target = tokens * top_k / experts
        before, place = 0, 0
        while before + histogram[place] < max(math.ceil(target), 1):
            before, place = before + histogram[place], place + 1
        result.append(low + (place + min(max((target - before) / histogram[place], 0), 1)) * (high - low) / bins)
    return torch.tensor(result, dtype=torch.float64)


def test_a_step_worked_by_hand():
    # E = 2, K = 1, b = 0: α_t is the lesser score, here expert 1's 0. Expert 0 needs −4, −3, −2, −1, expert 1 needs 0;
    # n = 2 and the third smallest are −2 and 0, centred −1 and 1. Two tokens more, (5, 0) and (0, 7), make that
    # −5 −4 −3 −2 −1 0 and −7 0 0 0 0 0; n = 3 and the fourth smallest are −2 and 0 again.
    logits_TE = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    assert after_step(quantile_router(2, 1), logits_TE).tolist() == [-1.0, 1.0]
    more_TE = torch.cat([logits_TE, torch.tensor([[5.0, 0.0], [0.0, 7.0]])])
    assert after_step(quantile_router(2, 1), more_TE).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(24, 6, 2), (8, 4, 3), (12, 4, 1)])
def test_three_steps_are_those_of_a_plain_loop(tokens, experts, top_k, score):
    router, bias_E = quantile_router(experts, top_k, score=score), torch.zeros(experts, dtype=torch.float64)
    for step in range(3):
        batches = [random(tokens, experts, seed=10 * step + part) for part in range(3)]
        expected_E = torch.stack([exact_bias(logits_TE, bias_E, top_k) for logits_TE in batches]).mean(0)
        bias_E = (expected_E - expected_E.mean()).float().double()  # the router keeps float32
        torch.testing.assert_close(after_step(router, *batches), bias_E, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(24, 6, 2), (7, 4, 3), (3, 8, 1)])
def test_three_steps_of_the_whole_batch_are_those_of_a_plain_loop(tokens, experts, top_k):
    router, bias_E = quantile_router(experts, top_k, **SIGMOID), torch.zeros(experts, dtype=torch.float64)
    for step in range(3):
        batches = [random(tokens, experts, seed=10 * step + part) for part in range(3)]
        expected_E = binned_bias(torch.cat(batches).sigmoid(), bias_E, top_k)
        bias_E = (expected_E - expected_E.mean()).float().double()
        torch.testing.assert_close(after_step(router, *batches), bias_E, rtol=0, atol=1e-7)


def test_the_bins_find_the_exact_quantile_up_to_their_width():
    logits_TE, zero_E = random(600, 6), torch.zeros(6, dtype=torch.float64)
    exact_E = exact_bias(logits_TE.sigmoid(), zero_E, 2)
    bias_E = after_step(quantile_router(6, 2, **SIGMOID), logits_TE)
    # A bin is 2/1000 wide; a neighbour in a column of 600 is about as far; the mean is off by as much.
    torch.testing.assert_close(bias_E, exact_E - exact_E.mean(), rtol=0, atol=8e-3)


@both_scopes
def test_the_bias_balances_the_batch_that_it_is_made_for(options):
    logits_TE = random(1200, 6) + torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -2.0])
    router = quantile_router(6, 2, **options)
    sinkroute.set_step(router, 0)
    assert max_violation(router(logits_TE).load) > 1
    for _ in range(12):
        after_step(router, logits_TE)
    assert max_violation(router(logits_TE).load) < 0.03


@both_scopes
def test_the_bias_chooses_but_does_not_weigh(options):
    router = quantile_router(4, 2, **options)
    logits_TE = random(9, 4).requires_grad_()
    router.state.bias_E.copy_(torch.tensor([0.0, 0.0, 9.0, 9.0]))
    routes = router(logits_TE)
    chosen_TK = logits_TE.detach().gather(1, routes.experts)
    share = torch.softmax(chosen_TK, 1) if not options else chosen_TK.sigmoid() / chosen_TK.sigmoid().sum(1, True)
    assert set(routes.experts.flatten().tolist()) == {2, 3}
    torch.testing.assert_close(routes.weights.detach(), share)
    routes.weights[:, 0].sum().backward()
    assert logits_TE.grad[:, 2:].abs().sum() > 0 and not logits_TE.grad[:, :2].any()


@both_scopes
def test_serving_chooses_by_the_bias_too_and_leaves_it_alone(options):
    router = quantile_router(4, 1, **options)
    router.state.bias_E.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    router.eval()
    bias_E = after_step(router, random(8, 4))
    assert router(random(8, 4)).load.tolist() == [0, 0, 8, 0]
    assert bias_E.tolist() == [0.0, 0.0, 9.0, 0.0]


@both_scopes
def test_ema_is_the_share_of_the_old_bias_that_stays(options):
    logits_TE, start_E = random(12, 4), torch.tensor([0.5, -0.5, 0.25, -0.25])
    results = []
    for ema in (0.0, 0.75):
        router = quantile_router(4, 2, ema=ema, **options)
        router.state.bias_E.copy_(start_E)
        results.append(after_step(router, logits_TE))
    torch.testing.assert_close(results[1], 0.75 * start_E.double() + 0.25 * results[0], rtol=0, atol=1e-7)


@both_scopes
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_masked_tokens_are_in_no_quantile(options, top_k):
    logits_TE, mask = random(40, 4), torch.arange(40) % 5 < 2
    padded, alone = quantile_router(4, top_k, **options), quantile_router(4, top_k, **options)
    for _ in range(2):
        masked_E = after_step(padded, logits_TE, masks=[mask])
        assert torch.equal(masked_E, after_step(alone, logits_TE[mask]))


@both_scopes
@pytest.mark.parametrize("tokens", [0, 4])
def test_a_micro_batch_without_real_tokens_takes_no_part(options, tokens):
    batches = random(8, 4), random(tokens, 4)
    masks = [None, torch.zeros(tokens, dtype=torch.bool)]
    expected_E = after_step(quantile_router(4, 1, **options), batches[0])
    assert torch.equal(after_step(quantile_router(4, 1, **options), *batches, masks=masks), expected_E)
    router = quantile_router(4, 1, **options)
    after_step(router, batches[0])
    assert torch.equal(after_step(router, batches[1], masks=masks[1:]), expected_E)


def test_between_whole_numbers_of_tokens_the_quantile_is_on_a_straight_line():
    # n = 3 · 1/2 = 1.5: half-way between the second and the third smallest, −3 and −2 for expert 0, and 0 for expert 1.
    logits_TE = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    assert after_step(quantile_router(2, 1), logits_TE).tolist() == [-1.25, 1.25]


@both_scopes
def test_with_every_expert_chosen_there_is_nothing_to_balance(options):
    assert after_step(quantile_router(3, 3, **options), random(6, 3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 1.0}, r"ema must be a finite number of 0 or more and below 1, got 1\.0"),
        ({"ema": float("nan")}, "ema must be a finite number of 0 or more and below 1, got nan"),
        ({"scope": "global"}, "unknown scope 'global'"),
        ({"scope": "batch"}, "scope=\"batch\" counts scores from 0 to 1.*got score='softmax'"),
        ({"groups": 2, "top_groups": 1}, "top_groups=1 of groups=2.*or all groups"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quantile_router(4, 2, **options)
