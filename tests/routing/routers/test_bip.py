"""BIP: prices of tokens and experts by hand and by a plain NumPy loop, what they balance, and what is kept of them."""

import itertools

import numpy as np
import pytest
import torch

import sinkroute
from sinkroute.routing.metrics import max_violation

BOTH_STARTS = pytest.mark.parametrize("warm_start", [True, False], ids=["warm", "from 0"])


def make(experts=8, top_k=2, **options):
    return sinkroute.create_router("bip", num_experts=experts, top_k=top_k, **options)


def batch(seed, tokens=256, experts=8, skew=1.0):
    generator = torch.Generator().manual_seed(seed)
    popularity_E = torch.randn(experts, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    return torch.randn(tokens, experts, dtype=torch.float64, generator=generator) + skew * popularity_E


def train(router, batches, start=0):
    """MaxVio of every step, one batch a step."""
    found = []
    for step, logits_TE in enumerate(batches, start):
        sinkroute.set_step(router, step)
        found.append(max_violation(router.train()(logits_TE).load).item())
    sinkroute.end_step(router)
    return found


def values_of(router):
    return {name: value.clone() for name, value in router.state.state_dict().items() if "saved" not in name}


def test_a_pass_worked_by_hand():
    # Scores of expert 0: .9 .8 .7 .6; p are those of expert 1: .1 .2 .3 .4. s − p: .8 .6 .4 .2, and 0 for expert 1.
    # A share is 2 tokens, the third largest: q = (.4, 0). With it token 3 turns to expert 1, .2 against .4.
    router = make(2, 1, iterations=1)
    routes = router(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.69, 0.31], [0.6, 0.4]], dtype=torch.float64).log())
    assert routes.potentials.tolist() == pytest.approx([-0.38, 0.0])
    assert routes.experts[[0, 1, 3]].tolist() == [[0], [0], [1]]
    torch.testing.assert_close(routes.weights[[0, 3]].flatten(), torch.tensor([0.9, 0.4], dtype=torch.float64))


def scores_of(logits, score):
    s = 1 / (1 + np.exp(-logits)) if score == "sigmoid" else np.exp(logits)
    return s if score == "sigmoid" else s / s.sum(1, keepdims=True)


def prices(s, q, top_k, iterations):
    """The paper's updates, by sorting."""
    tokens, experts = s.shape
    assert top_k * tokens % experts == 0
    for _ in range(iterations):
        p = np.maximum(0, np.sort(s - q, axis=1)[:, ::-1][:, top_k])
        q = np.maximum(0, np.sort(s - p[:, None], axis=0)[::-1][top_k * tokens // experts])
    return q


@BOTH_STARTS
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_steps_of_two_micro_batches_are_those_of_the_rule(score, iterations, warm_start):
    router, kept = make(score=score, iterations=iterations, warm_start=warm_start), np.zeros(8)
    for step in range(8):
        total = np.zeros(8)
        for part, tokens in enumerate((60, 100)):
            logits_TE = batch(2 * step + part, tokens)
            s = scores_of(logits_TE.numpy(), score)
            q = prices(s, kept * warm_start, 2, iterations)
            sinkroute.set_step(router, step, part)
            routes = router(logits_TE)
            np.testing.assert_allclose(-routes.potentials, q, rtol=0, atol=1e-12)
            # Not who is chosen: prices are where a token is level with another, but for the last digit.
            chosen = np.take_along_axis(s - q, routes.experts.numpy(), 1)
            np.testing.assert_allclose(chosen, np.sort(s - q, axis=1)[:, :-3:-1], rtol=0, atol=1e-12)
            total += tokens * q
        sinkroute.end_step(router)
        np.testing.assert_allclose(-router.state.bias_E, total / 160, rtol=0, atol=1e-7)
        kept = -router.state.bias_E.double().numpy()  # which is float32


def test_no_iteration_makes_the_dual_larger():
    logits_TE, found = batch(0), []
    s = scores_of(logits_TE.numpy(), "softmax")
    for iterations in range(1, 12):
        q = -make(iterations=iterations)(logits_TE).potentials.numpy()
        p = np.maximum(0, np.sort(s - q, axis=1)[:, ::-1][:, 2])
        found.append(2 * p.sum() + 64 * q.sum() + np.maximum(0, s - p[:, None] - q).sum())
    assert all(later <= before + 1e-9 for before, later in itertools.pairwise(found))
    assert found[-1] < found[0]


def test_a_skewed_gate_is_balanced_from_the_first_step():
    options = {"iterations": 50, "warm_start": False}
    assert max(train(make(**options), [batch(seed) for seed in range(8)])) < 0.1
    assert train(make(iterations=50, score="sigmoid"), [batch(0)])[0] < 0.1
    assert max_violation(make().eval()(batch(0)).load) > 0.7


def test_kept_prices_balance_with_few_iterations_after_some_steps():
    first, *_, last = train(make(score="sigmoid"), [batch(seed) for seed in range(12)])
    alone = train(make(score="sigmoid", warm_start=False), [batch(seed) for seed in range(12)])[-1]
    assert last < 0.1 < min(first, alone)


def test_kept_prices_of_a_softmax_that_is_sure_of_itself_lose_the_balance_and_others_do_not():
    batches = [batch(seed, 512, experts=16, skew=1.5) for seed in range(12)]
    kept, anew = (train(make(16, iterations=14, warm_start=warm), batches) for warm in (True, False))
    assert kept[0] < 0.1 and min(kept[4:]) > 0.3
    assert max(anew) < 0.1


@BOTH_STARTS
def test_what_is_served_is_the_last_prices_and_moves_nothing(warm_start):
    router = make(score="sigmoid", iterations=20, warm_start=warm_start)
    train(router, [batch(seed, 1024) for seed in range(10)])
    before, unseen_TE = values_of(router), batch(1000, 4096)
    sinkroute.set_step(router.eval(), 10)
    routes = router(unseen_TE)
    expected_TK = (unseen_TE.sigmoid() + router.state.bias_E).topk(2).indices
    assert torch.equal(routes.experts, expected_TK)
    assert max_violation(routes.load) < 0.25 < 1 < max_violation(make(score="sigmoid").eval()(unseen_TE).load)
    assert all(torch.equal(value, before[name]) for name, value in values_of(router).items())


def test_prices_are_never_below_0_and_raise_no_score():
    router = make()
    train(router, [batch(seed) for seed in range(5)])
    assert (router.state.bias_E <= 0).all() and router.state.bias_E.any()


def test_weights_are_the_scores_of_the_chosen_and_their_gradient_is_of_these_alone():
    logits_TE = batch(0).requires_grad_()
    routes = make()(logits_TE)
    torch.testing.assert_close(routes.weights, logits_TE.gather(1, routes.experts).softmax(1))
    routes.weights[:, 0].sum().backward()
    chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, routes.experts, True)
    assert logits_TE.grad[chosen_TE].all() and not logits_TE.grad[~chosen_TE].any()


@BOTH_STARTS
def test_padding_has_no_price_and_takes_no_place(warm_start):
    padded, short = make(warm_start=warm_start), make(warm_start=warm_start)
    for step in range(6):
        logits_TE, mask = batch(step), torch.arange(256) % 3 != 0
        sinkroute.set_step(padded, step)
        sinkroute.set_step(short, step)
        found = padded(torch.where(mask[:, None], logits_TE, torch.nan), mask)
        assert torch.equal(found.experts[mask], short(logits_TE[mask]).experts)
    sinkroute.end_step(padded), sinkroute.end_step(short)
    assert torch.equal(padded.state.bias_E, short.state.bias_E) and short.state.bias_E.any()


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_micro_batch_without_real_tokens_takes_no_part(tokens):
    alone, beside, mask = make(), make(), torch.zeros(tokens, dtype=torch.bool)
    for router in (alone, beside):
        sinkroute.set_step(router, 0)
        router(batch(0))
    sinkroute.set_step(beside, 0, 1)
    assert beside(batch(1, tokens), mask).load.sum() == 0
    for router in (alone, beside):
        sinkroute.end_step(router)
    assert torch.equal(alone.state.bias_E, beside.state.bias_E) and alone.state.bias_E.any()
    sinkroute.set_step(beside, 1)  # and a whole step without any
    beside(batch(1, tokens), mask)
    sinkroute.end_step(beside)
    assert torch.equal(alone.state.bias_E, beside.state.bias_E)


@BOTH_STARTS
def test_a_resumed_run_goes_on_bit_for_bit(warm_start):
    whole, first, second = (make(warm_start=warm_start) for _ in range(3))
    train(whole, [batch(seed) for seed in range(12)])
    train(first, [batch(seed) for seed in range(5)])
    second.load_state_dict(first.state_dict())
    train(second, [batch(seed) for seed in range(5, 12)], start=5)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_between_whole_numbers_of_tokens_a_price_is_on_a_straight_line():
    # 3 tokens, shares of 1.5: s − p of expert 0 are .8 .6 .4, half-way between the second and the third.
    routes = make(2, 1, iterations=1)(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]], dtype=torch.float64).log())
    assert routes.potentials.tolist() == pytest.approx([-0.5, 0.0])


@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize("tokens", [1, 3])
def test_few_or_identical_tokens_leave_prices_finite(tokens, top_k):
    router = make(top_k=top_k)
    train(router, [torch.full((tokens, 8), 0.5)] * 3 + [batch(seed, tokens) for seed in range(3)])
    assert router.state.bias_E.isfinite().all()
    assert top_k < 8 or not router.state.bias_E.any()  # every token has every expert: nothing to balance


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"iterations": 0}, ValueError, "iterations must be an integer of 1 or more, got 0"),
        ({"iterations": 2.5}, TypeError, r"iterations .*2\.5"),
        ({"warm_start": "no"}, TypeError, "warm_start .*'no'"),
        ({"groups": 2, "top_groups": 1}, ValueError, "top_groups=1 of groups=2.*or all groups"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
