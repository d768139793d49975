"""Numbers of balance, by hand and by their ranges."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkroute.routing.metrics import coefficient_of_variation, dead_experts, load_entropy, load_metrics, max_violation

COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=20)
METRICS = [max_violation, load_entropy, coefficient_of_variation, dead_experts]


def test_metrics_of_an_uneven_load_worked_by_hand():
    # Mean 4. MaxVio (8 − 4)/4 = 1. Shares ½, 0, ¼, ¼: entropy (½ ln 2 + ½ ln 4)/ln 4 = 3/4.
    # Deviations 4, −4, 0, 0: standard deviation √8, over the mean √8/4 = 0.7071. One expert idle.
    metrics = load_metrics(torch.tensor([8, 0, 4, 4]))
    assert metrics == {"max_vio": 1.0, "entropy": pytest.approx(0.75), "cv": pytest.approx(math.sqrt(0.5)), "dead": 1}


def test_collapse_onto_one_expert_is_the_worst_of_everything():
    # CV: deviations 3 · mean once, −mean three times: √((9 + 3)/4) = √3.
    metrics = load_metrics(torch.tensor([0, 40, 0, 0]))
    assert metrics == {"max_vio": 3.0, "entropy": pytest.approx(0.0), "cv": pytest.approx(math.sqrt(3)), "dead": 3}


@pytest.mark.parametrize("load", [[0, 0, 0], [7, 7, 7], [5], [0]])
def test_even_idle_and_single_loads_are_balanced(load):
    assert load_metrics(torch.tensor(load)) == {"max_vio": 0.0, "entropy": pytest.approx(1.0), "cv": 0.0, "dead": 0}


@given(COUNTS)
def test_metrics_stay_in_their_ranges(load):
    experts, metrics = len(load), load_metrics(torch.tensor(load))
    assert 0 <= metrics["max_vio"] <= experts - 1
    assert -1e-12 <= metrics["entropy"] <= 1 + 1e-12
    assert 0 <= metrics["cv"] <= math.sqrt(experts - 1) + 1e-12
    assert 0 <= metrics["dead"] <= experts - 1


@given(COUNTS, st.integers(1, 50))
def test_metrics_see_neither_the_order_of_experts_nor_the_scale(load, scale):
    before, after = load_metrics(torch.tensor(load)), load_metrics(scale * torch.tensor(load).flip(0))
    assert before["dead"] == after.pop("dead")
    for name, value in after.items():
        assert value == pytest.approx(before[name], abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_leading_dimensions_are_so_many_layers(metric):
    loads = torch.randint(0, 50, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    result = metric(loads)
    assert result.shape == (2, 3)
    layers = [[metric(loads[i, j]) for j in range(3)] for i in range(2)]
    torch.testing.assert_close(result, torch.stack([torch.stack(row) for row in layers]))


def test_leading_dimensions_may_hold_idle_and_single_experts():
    assert max_violation(torch.tensor([[0, 0], [3, 1]])).tolist() == [0.0, 0.5]
    assert load_entropy(torch.ones(4, 1)).tolist() == [1.0] * 4


def test_an_expert_is_dead_strictly_below_the_threshold():
    # Means 100: loads 1 and 0.5 are 1 % and 0.5 % of it.
    assert int(dead_experts(torch.tensor([199, 1]))) == 0
    assert int(dead_experts(torch.tensor([199.5, 0.5]))) == 1
    assert int(dead_experts(torch.tensor([150, 50]), threshold=0.6)) == 1


def test_counts_too_large_for_float32_keep_their_digits():
    # 2²⁴ and 2²⁴ + 2 have mean 2²⁴ + 1, where float32 has only even numbers. MaxVio = 1/(2²⁴ + 1).
    assert max_violation(torch.tensor([2**24, 2**24 + 2])).item() == pytest.approx(1 / (2**24 + 1), rel=1e-6)
