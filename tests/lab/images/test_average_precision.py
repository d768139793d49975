"""Average precision against scikit-learn, and detection of unknown classes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from sinkroute.lab.images.average_precision import average_precision, detection_aupr


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_it_is_that_of_scikit_learn_with_many_equal_scores(rows):
    positive = np.array([row[0] for row in rows] + [True])
    scores = np.array([row[1] for row in rows] + [0], dtype=float)
    assert average_precision(positive, scores) == pytest.approx(average_precision_score(positive, scores), abs=1e-12)


def test_it_is_that_of_scikit_learn_on_many_scores():
    keyed = np.random.default_rng(0)
    positive, scores = keyed.random(5000) < 0.1, keyed.normal(size=5000)
    scores[positive] += 1
    assert average_precision(positive, scores) == pytest.approx(average_precision_score(positive, scores), abs=1e-12)


def test_equal_scores_give_the_share_of_positives():
    assert average_precision(np.array([True, False, False, True]), np.ones(4)) == 0.5


def test_perfect_scores_give_1():
    assert average_precision(np.array([True, True, False]), np.array([3.0, 2.0, 1.0])) == 1


def test_no_positive_is_refused():
    with pytest.raises(ValueError, match="positive: expected at least one True"):
        average_precision(np.zeros(3, dtype=bool), np.arange(3.0))


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="scores: expected finite numbers"):
        average_precision(np.ones(2, dtype=bool), np.array([0, np.nan]))


def test_unknown_images_are_the_positive_ones_and_uncertainty_is_the_score():
    # Largest probabilities: known σ(4) and 1/2, unknown σ(2) and σ(1): from the least certain on: known, unknown,
    # unknown, known; precision at the unknown ones 1/2 and 2/3.
    known = torch.tensor([[4.0, 0.0], [1.0, 1.0]])
    unknown = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert detection_aupr(known, unknown) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_detection_is_scikit_learns_average_precision_of_minus_the_largest_probability():
    keyed = torch.Generator().manual_seed(0)
    known, unknown = torch.randn(300, 7, generator=keyed) * 3, torch.randn(100, 7, generator=keyed)
    scores = -torch.cat([known, unknown]).softmax(1).amax(1)
    positive = np.arange(400) >= 300
    assert detection_aupr(known, unknown) == pytest.approx(average_precision_score(positive, scores), abs=1e-6)
