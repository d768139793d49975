"""SMEBU: a clamped and smoothed bias update by hand and by a plain NumPy loop, and when it moves."""

import math

import numpy as np
import pytest
import torch

import sinkroute
from sinkroute.routing.metrics import max_violation


def make(experts=8, top_k=2, **options):
    return sinkroute.create_router("smebu", num_experts=experts, top_k=top_k, **options)


def batch(seed, tokens=256, experts=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    popularity_E = torch.randn(experts, dtype=dtype, generator=torch.Generator().manual_seed(99))
    return torch.randn(tokens, experts, dtype=dtype, generator=generator) + popularity_E


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


def test_two_steps_worked_by_hand():
    # Loads (3, 1), mean 2: violations ∓1/2, moves ∓tanh(1) with κ = 2 and λ = 1. A quarter stays of the move before.
    router, move = make(2, 1, update_rate=1.0, momentum=0.25), math.tanh(1)
    logits_TE = torch.tensor([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    sinkroute.set_step(router, 0)
    router(logits_TE)
    assert router.state.bias_E.tolist() == [0, 0]  # not before the step is over
    sinkroute.end_step(router)
    assert router.state.bias_E.tolist() == pytest.approx([-0.75 * move, 0.75 * move])
    # With b = ∓0.571 all choose expert 1: violations 1 and −1.
    sinkroute.set_step(router, 1)
    assert router(logits_TE).load.tolist() == [0, 4]
    sinkroute.end_step(router)
    second = 0.25 * -0.75 * move + 0.75 * math.tanh(2)
    assert router.state.momentum_E.tolist() == pytest.approx([second, -second], abs=1e-6)
    assert router.state.bias_E.tolist() == pytest.approx([second - 0.75 * move, 0.75 * move - second], abs=1e-6)


def by_the_rule(steps, experts, top_k, rate, beta, kappa, score):
    """Biases after every step, and all choices: steps are lists of micro-batches."""
    bias, momentum, biases, choices = np.zeros(experts), np.zeros(experts), [], []
    for parts in steps:
        load = np.zeros(experts)
        for logits in parts:
            s = 1 / (1 + np.exp(-logits)) if score == "sigmoid" else np.exp(logits)
            s = s if score == "sigmoid" else s / s.sum(1, keepdims=True)
            chosen = np.argsort(-(s + bias), axis=1, kind="stable")[:, :top_k]
            choices.append(np.sort(chosen, axis=1))
            np.add.at(load, chosen, 1)
        move = rate * np.tanh(kappa * (load.mean() - load) / load.mean())
        momentum = beta * momentum + (1 - beta) * (move - move.mean())
        bias = bias + momentum
        biases.append(bias)
    return biases, choices


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("rate", "beta", "kappa"), [(5e-4, 0.5, 2.0), (0.02, 0.9, 0.5), (0.01, 0.0, 5.0)])
def test_steps_of_two_micro_batches_are_those_of_the_rule(score, rate, beta, kappa):
    steps = [[batch(2 * step, 60), batch(2 * step + 1, 90)] for step in range(25)]
    biases, choices = by_the_rule([[x.numpy() for x in parts] for parts in steps], 8, 2, rate, beta, kappa, score)
    router, choices = make(score=score, update_rate=rate, momentum=beta, slope=kappa), iter(choices)
    for step, parts in enumerate(steps):
        for part, logits_TE in enumerate(parts):
            sinkroute.set_step(router, step, part)
            assert np.array_equal(router(logits_TE).experts.sort().values, next(choices))
        sinkroute.end_step(router)
        np.testing.assert_allclose(router.state.bias_E, biases[step], rtol=0, atol=1e-6)


def test_the_defaults_are_the_papers():
    router = make()
    assert (router.update_rate, router.momentum, router.slope) == (5e-4, 0.5, 2.0)


def test_the_bias_balances_a_skewed_gate_and_serves():
    router = make(score="sigmoid", update_rate=0.02)
    first, *_, last = train(router, [batch(seed) for seed in range(100)])
    unseen_TE = batch(1000, 4096)
    served = max_violation(router.eval()(unseen_TE).load)
    assert first > 1 and last < 0.5 and served < 0.25 < 1 < max_violation(make(score="sigmoid").eval()(unseen_TE).load)


def test_near_balance_it_moves_less_than_loss_free():
    # Loads (51, 49), violation 1/50: tanh(0.04) of the rate against the whole of it.
    logits_TE = torch.tensor([[9.0, 0.0]]).repeat(51, 1), torch.tensor([[0.0, 9.0]]).repeat(49, 1)
    moved = {}
    for name, options in (("smebu", {"momentum": 0.0}), ("loss-free", {})):
        router = sinkroute.create_router(name, num_experts=2, top_k=1, update_rate=0.5, **options)
        train(router, [torch.cat(logits_TE)])
        moved[name] = router.state.bias_E[1].item()
    assert moved == {"smebu": pytest.approx(0.5 * math.tanh(0.04)), "loss-free": 0.5}


def test_the_update_does_not_depend_on_how_many_tokens_there_are():
    few, many = make(), make()
    train(few, [batch(step) for step in range(5)])
    train(many, [batch(step).repeat(7, 1) for step in range(5)])
    assert torch.equal(few.state.bias_E, many.state.bias_E) and few.state.bias_E.any()


def test_the_bias_chooses_and_does_not_weigh():
    router = make(2, 1)
    router.state.bias_E.copy_(torch.tensor([-0.5, 0.0]))
    routes = router(torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log())
    assert routes.experts.tolist() == [[0], [1]]
    torch.testing.assert_close(routes.weights, torch.tensor([[0.8], [0.4]]))


def test_evaluation_moves_nothing():
    router = make()
    train(router, [batch(0), batch(1)])
    before = values_of(router)
    for step in range(2, 5):
        sinkroute.set_step(router.eval(), step)
        router(batch(step))
    assert all(torch.equal(value, before[name]) for name, value in values_of(router).items())


def test_padding_is_in_no_load():
    padded, short = make(), make()
    for step in range(6):
        logits_TE, mask = batch(step), torch.arange(256) % 3 != 0
        sinkroute.set_step(padded, step)
        sinkroute.set_step(short, step)
        padded(torch.where(mask[:, None], logits_TE, torch.nan), mask)
        short(logits_TE[mask])
    sinkroute.end_step(padded), sinkroute.end_step(short)
    assert torch.equal(padded.state.bias_E, short.state.bias_E) and short.state.bias_E.any()


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_step_without_real_tokens_moves_neither_bias_nor_momentum(tokens):
    router = make()
    train(router, [batch(0), batch(1)])
    before = values_of(router)
    sinkroute.set_step(router, 2)
    router(batch(2, tokens), torch.zeros(tokens, dtype=torch.bool))
    sinkroute.end_step(router)
    assert all(torch.equal(value, before[name]) for name, value in values_of(router).items())


def test_a_resumed_run_goes_on_bit_for_bit():
    whole, first, second = make(), make(), make()
    train(whole, [batch(seed) for seed in range(12)])
    train(first, [batch(seed) for seed in range(5)])
    second.load_state_dict(first.state_dict())
    train(second, [batch(seed) for seed in range(5, 12)], start=5)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_it_balances_within_groups():
    router = make(groups=4, top_groups=2, score="sigmoid", update_rate=0.02)
    before, *_, after = train(router, [batch(seed, 512) for seed in range(150)])
    assert after < before / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_rate": -0.1}, r"update_rate must be a finite number of 0 or more, got -0\.1"),
        ({"momentum": 1.0}, r"momentum must be a finite number of 0 or more and below 1, got 1\.0"),
        ({"slope": 0.0}, r"slope must be a finite number above 0, got 0\.0"),
        ({"slope": float("inf")}, r"slope must be a finite number above 0, got inf"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
