"""Detection of unknown classes, by hand and by scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from sinkroute.lab.images.average_precision import detection_aupr


def test_logits_that_are_no_numbers_and_no_unknown_images_are_refused():
    with pytest.raises(ValueError, match="got 2 such images and 1 scores that are not finite"):
        detection_aupr(torch.zeros(3, 2), torch.tensor([[0.0, 1.0], [0.0, float("nan")]]))
    with pytest.raises(ValueError, match="got 0 such images"):
        detection_aupr(torch.zeros(3, 2), torch.zeros(0, 2))


def test_equal_probabilities_give_the_share_of_unknown_images():
    assert detection_aupr(torch.zeros(3, 2), torch.zeros(1, 2)) == 0.25


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
