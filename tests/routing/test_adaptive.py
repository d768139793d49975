"""Adaptive firing: hysteresis, the moving average, and what is measured."""

import pytest
import torch

import sinkroute
from sinkroute.routing.adaptive import Adaptive

# Two experts, one choice per token: the load (a, b) has MaxVio |a − b| / (a + b).
RULE = Adaptive(high=0.6, low=0.3, floor=0.0, ceiling=1.0, decay=0.5)


def router(rule=RULE, **options):
    return sinkroute.create_router("ssr-l", num_experts=2, top_k=1, probability=rule, noise=0, **options)


def batch(first, second):
    """Tokens that prefer expert 0, and tokens that prefer expert 1."""
    return torch.tensor([[1.0, 0.0]] * first + [[0.0, 1.0]] * second).view(-1, 2)


def train(router, loads, start=0):
    """A step per load; returns whether each was a Sinkhorn step."""
    fired = []
    for step, load in enumerate(loads, start):
        sinkroute.set_step(router, step)
        fired.append(router(batch(*load)).branch == "sinkhorn")
    sinkroute.end_step(router)
    return fired


def test_it_fires_above_high_and_stops_below_low():
    # ema: 0.8 | 0.8 + 0.0 = 0.4 | 0.4 → 0.2 + 0 = 0.2 | 0.1 + 0.4 = 0.5 | 0.25 + 0.4 = 0.65
    # firing after each step: yes (0.8 > 0.6), still (0.4 ≥ 0.3), no (0.2), still not (0.5 < 0.6), yes (0.65)
    loads = [(9, 1), (5, 5), (5, 5), (9, 1), (9, 1), (5, 5)]
    assert train(router(), loads) == [False, True, True, False, False, True]


def test_what_is_measured_on_a_sinkhorn_step_is_the_gate_and_not_the_plan():
    # Were it the plan's balanced loads, firing would cure itself at once.
    tested = router()
    assert train(tested, [(9, 1)] * 8) == [False] + [True] * 7
    assert float(tested.state.max_vio) == pytest.approx(0.8)


def test_micro_batches_are_measured_together():
    tested = router()
    for part, load in enumerate([(10, 0), (0, 10)]):  # each collapsed, together balanced
        sinkroute.set_step(tested, 0, part)
        tested(batch(*load))
    sinkroute.end_step(tested)
    assert float(tested.state.max_vio) == 0 and not tested.state.firing


def test_a_step_without_tokens_measures_nothing():
    tested = router()
    train(tested, [(9, 1), (0, 0)])
    assert float(tested.state.max_vio) == pytest.approx(0.8)


def test_evaluation_is_not_measured():
    tested = router()
    sinkroute.set_step(tested, 0)
    tested.eval()(batch(9, 1))
    sinkroute.end_step(tested)
    assert float(tested.state.max_vio) == -1


def test_floor_and_ceiling_bound_the_rate():
    rule = Adaptive(high=0.6, low=0.3, floor=0.1, ceiling=0.4)
    tested = router(rule)
    assert tested.probability_now == 0.1
    train(tested, [(9, 1)])
    sinkroute.set_step(tested, 1)
    assert tested.probability_now == 0.4


def test_it_resumes_with_the_same_steps():
    loads = [(9, 1), (6, 4), (5, 5), (9, 1), (8, 2), (5, 5), (5, 5), (5, 5), (9, 1), (9, 1)]
    whole, first, second = router(), router(), router()
    expected = train(whole, loads)
    before = train(first, loads[:4])
    second.load_state_dict(first.state_dict())
    assert before + train(second, loads[4:], start=4) == expected


def test_text_is_read():
    assert router("adaptive(high=0.6, low=0.3, floor=0, ceiling=1, decay=0.5)").firing.rule == RULE
    assert router("adaptive").firing.rule == Adaptive()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adaptive(hihg=1)", "unknown part of adaptive: 'hihg'; did you mean 'high'"),
        ("adaptive(high=much)", "high of adaptive must be a number, got 'much'"),
        ("adaptive(low=2, high=1)", "0 <= low <= high, got low=2.0, high=1.0"),
        ("adaptive(floor=0.5, ceiling=0.1)", "0 <= floor <= ceiling <= 1, got floor=0.5, ceiling=0.1"),
        ("adaptive(decay=1)", "decay must be 0 or more and below 1, got 1.0"),
        ("adaptive 3", "cannot read 'adaptive 3'"),
    ],
)
def test_what_does_not_fit_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        router(text)
