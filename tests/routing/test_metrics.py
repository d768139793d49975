"""Numbers of balance, by hand and by their ranges."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sinkroute.routing.metrics import (
    coefficient_of_variation,
    dead_experts,
    load_entropy,
    load_metrics,
    max_violation,
    router_entropy,
    routing_fluctuation,
    saturation,
)

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


@given(COUNTS | st.lists(st.floats(0, 1e9), min_size=1, max_size=20))
@example([0, 0, 0, 0, 0, 0, 37287])  # over the mean, which is rounded, the last is more than 7
@example([0.1] * 3)
def test_metrics_stay_in_their_ranges(load):
    experts, metrics = len(load), load_metrics(torch.tensor(load, dtype=torch.float64))
    assert 0 <= metrics["max_vio"] <= experts - 1
    assert 0 <= metrics["entropy"] <= 1
    assert 0 <= metrics["cv"] <= math.sqrt(experts - 1)
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


# -- entropy of the gate, and how routes change ----------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_router_entropy_is_that_of_each_tokens_scores(score):
    logits_TE = 3 * torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for logits, entropy in zip(logits_TE.tolist(), router_entropy(logits_TE, score).tolist(), strict=True):
        s = [math.exp(z) if score == "softmax" else 1 / (1 + math.exp(-z)) for z in logits]
        assert entropy == pytest.approx(-sum(x / sum(s) * math.log(x / sum(s)) for x in s), rel=1e-12)


def test_router_entropy_survives_scores_that_underflow():
    assert router_entropy(torch.tensor([[3e38, -3e38, 0.0]])).tolist() == [0.0]
    assert router_entropy(torch.full((1, 4), -1e4), "sigmoid").item() == pytest.approx(math.log(4))


def test_fluctuation_and_saturation_worked_by_hand():
    before, after = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[1, 0], [3, 6], [0, 1]])
    # Shared 2, 1, 0 of unions 2, 3, 4: Jaccard 1, 1/3, 0. Overlaps 1, 1/2, 0.
    assert routing_fluctuation(before, after).item() == pytest.approx(1 - 4 / 9)
    assert saturation(before, after).item() == pytest.approx(0.5)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_fluctuation_and_saturation_are_those_of_sets(top_k):
    generator = torch.Generator().manual_seed(top_k)
    a, b = (torch.rand(40, 8, generator=generator).argsort(-1)[:, :top_k] for _ in range(2))
    pairs = [(set(x), set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    jaccard = sum(len(x & y) / len(x | y) for x, y in pairs) / 40
    assert routing_fluctuation(a, b).item() == pytest.approx(1 - jaccard, abs=1e-12)
    assert saturation(a, b).item() == pytest.approx(sum(len(x & y) for x, y in pairs) / 40 / top_k, abs=1e-12)


def test_fluctuation_takes_sets_of_two_sizes_but_saturation_is_relative_to_one():
    one, two = torch.tensor([[3]]), torch.tensor([[1, 3]])
    assert routing_fluctuation(one, two).item() == 0.5
    with pytest.raises(ValueError, match=r"experts \(1, 1\) and final_experts \(1, 2\) must have the same K"):
        saturation(one, two)


def test_without_tokens_nothing_has_changed():
    nobody = torch.empty(0, 2, dtype=torch.int64)
    assert routing_fluctuation(nobody, nobody) == 0 and saturation(nobody, nobody) == 1


def test_leading_dimensions_of_choices_are_so_many_layers():
    a, b = torch.tensor([[[0], [1]], [[0], [1]]]), torch.tensor([[[0], [1]], [[0], [2]]])
    assert routing_fluctuation(a, b).tolist() == [0.0, 0.5] and saturation(a, b).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("compare", [routing_fluctuation, saturation])
def test_choices_of_other_tokens_are_refused(compare):
    with pytest.raises(ValueError, match=r"got \(2, 1\) and \(3, 1\); route the same probe batch"):
        compare(torch.zeros(2, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="must be"):
        compare(torch.zeros(2), torch.zeros(2))
