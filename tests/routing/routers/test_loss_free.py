"""Loss-free balancing: algorithm 1 by hand and by a plain loop, and when the bias moves."""

import pytest
import torch

import sinkroute
from sinkroute.routing.metrics import max_violation


def loss_free_router(experts, top_k, **options):
    return sinkroute.create_router("loss-free", num_experts=experts, top_k=top_k, **options)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_a_step_worked_by_hand():
    # Loads (3, 1, 0, 0), mean 1: b = 0.5 · sign(1 − load) = (−0.5, 0, 0.5, 0.5).
    router = loss_free_router(4, 1, update_rate=0.5)
    logits_TE = torch.tensor([[9.0, 0, 0, 0], [9.0, 0, 0, 0], [9.0, 0, 0, 0], [0, 9.0, 0, 0]])
    sinkroute.set_step(router, 0)
    router(logits_TE)
    assert router.state.bias_E.tolist() == [0, 0, 0, 0]  # not before the step is over
    sinkroute.end_step(router)
    assert router.state.bias_E.tolist() == [-0.5, 0.0, 0.5, 0.5]


def test_the_bias_chooses_and_does_not_weigh():
    # Scores (0.8, 0.2) and (0.6, 0.4), bias (−0.5, 0): 0.3 > 0.2, but 0.1 < 0.4. Weights are the scores themselves.
    router = loss_free_router(2, 1)
    router.state.bias_E.copy_(torch.tensor([-0.5, 0.0]))
    routes = router(torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log())
    assert routes.experts.tolist() == [[0], [1]]
    torch.testing.assert_close(routes.weights, torch.tensor([[0.8], [0.4]]))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_forty_steps_are_those_of_algorithm_1(score):
    experts, top_k, rate = 6, 2, 0.01
    router = loss_free_router(experts, top_k, update_rate=rate, score=score)
    bias = [0.0] * experts
    for step in range(40):
        logits_TE = random(30, experts, seed=step) + torch.tensor([1.5, 1.0, 0.0, 0.0, 0.0, -1.0])
        sinkroute.set_step(router, step)
        routes = router(logits_TE)
        scores_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
        load = [0] * experts
        for token, row in enumerate(scores_TE.tolist()):
            chosen = sorted(range(experts), key=lambda e: row[e] + bias[e], reverse=True)[:top_k]
            assert set(chosen) == set(routes.experts[token].tolist())
            for expert in chosen:
                load[expert] += 1
        assert routes.load.tolist() == load
        mean = sum(load) / experts
        bias = [b + rate * ((mean > n) - (mean < n)) for b, n in zip(bias, load, strict=True)]
        sinkroute.end_step(router)
        torch.testing.assert_close(router.state.bias_E, torch.tensor(bias), rtol=0, atol=1e-6)


def test_the_bias_balances_what_would_collapse():
    router = loss_free_router(4, 1, update_rate=0.005, score="sigmoid")
    logits_TE = random(400, 4) + torch.tensor([3.0, 0.0, 0.0, 0.0])
    violation = [max_violation(router(logits_TE).load).item()]
    for step in range(150):
        sinkroute.set_step(router, step)
        violation.append(max_violation(router(logits_TE).load).item())
    assert violation[0] > 2 and violation[-1] < 0.2


def test_the_micro_batches_of_a_step_make_one_update_from_the_load_of_all():
    # Expert 0 is busy in three micro-batches, by 2 : 1; expert 1 in the last, by 9 : 0. In all 6 : 12.
    router = loss_free_router(2, 1)
    to_first, to_second = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
    mixed_TE = torch.cat([to_first, to_first, to_second])
    for part, logits_TE in enumerate([mixed_TE, mixed_TE, mixed_TE, to_second.expand(9, 2)]):
        sinkroute.set_step(router, 0, part)
        router(logits_TE)
        assert router.state.bias_E.tolist() == [0, 0]
    sinkroute.set_step(router, 1)
    assert router.state.bias_E.tolist() == pytest.approx([0.001, -0.001])


def test_evaluation_chooses_by_the_bias_and_does_not_move_it():
    router = loss_free_router(3, 1).eval()
    router.state.bias_E.copy_(torch.tensor([0.0, 2.0, 0.0]))
    for step in range(3):
        sinkroute.set_step(router, step)
        assert router(random(8, 3)).load.tolist() == [0, 8, 0]
    assert router.state.bias_E.tolist() == [0, 2, 0]


def test_evaluation_between_the_micro_batches_of_a_step_changes_nothing():
    biases = []
    for evaluate in (False, True):
        router = loss_free_router(3, 1)
        for step in range(4):
            sinkroute.set_step(router, step)
            router.train()(random(9, 3, seed=step))
            if evaluate:
                router.eval()(random(50, 3, seed=9))
        sinkroute.end_step(router)
        biases.append(router.state.bias_E)
    assert torch.equal(*biases) and biases[0].any()


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_step_without_real_tokens_is_no_update(tokens):
    router = loss_free_router(3, 1)
    router.state.bias_E.copy_(torch.tensor([0.25, 0.0, -0.25]))
    sinkroute.set_step(router, 0)
    router(random(tokens, 3), torch.zeros(tokens, dtype=torch.bool))
    sinkroute.end_step(router)
    assert router.state.bias_E.tolist() == [0.25, 0.0, -0.25]


def test_balanced_loads_are_no_update():
    router = loss_free_router(2, 1)
    sinkroute.set_step(router, 0)
    router(torch.tensor([[9.0, 0.0], [0.0, 9.0]]))
    sinkroute.end_step(router)
    assert router.state.bias_E.tolist() == [0, 0]


def test_a_shift_of_all_biases_changes_no_choice():
    logits_TE, bias_E = random(50, 6), random(6, seed=1).float()
    routes = []
    for shift in (0.0, 3.0):
        router = loss_free_router(6, 2, groups=3, top_groups=2)
        router.state.bias_E.copy_(bias_E + shift)
        routes.append(router(logits_TE).experts)
    assert torch.equal(*routes)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_rate_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=rf"update_rate must be a finite number of 0 or more, got {value}"):
        loss_free_router(4, 2, update_rate=value)
