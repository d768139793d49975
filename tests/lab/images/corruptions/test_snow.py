"""Snow: the whitening by hand, and flakes that fall."""

import numpy as np
import pytest

from sinkroute.lab.images.corruptions.snow import snow


def without_flakes(x_HWC, kept):
    return snow(x_HWC, np.random.default_rng(0), -9.0, 0.1, 1, 0.5, 8, 3, kept)


def test_a_picture_is_whitened_in_part():
    # Luma of (0.2, 0.4, 0.6) is 0.363; white is 1.5 * that + 0.5 = 1.0445. 0.8 x + 0.2 * 1.0445.
    x = np.tile([0.2, 0.4, 0.6], (8, 8, 1))
    assert without_flakes(x, 0.8)[0, 0] == pytest.approx([0.3689, 0.5289, 0.6889])


def test_a_grey_picture_is_whitened_by_its_own_value():
    assert without_flakes(np.full((8, 8, 1), 0.1), 0.5)[0, 0, 0] == pytest.approx(0.05 + 0.5 * 0.65)


def flakes(seed=0, mean=0.3, threshold=0.6, flake=2, side=64):
    return snow(np.zeros((side, side, 1)), np.random.default_rng(seed), mean, 0.3, flake, threshold, 10, 4, 1.0)[..., 0]


def test_flakes_fall_on_both_halves_alike():
    fallen = flakes()
    assert fallen.max() > 0
    assert fallen == pytest.approx(fallen[::-1, ::-1])


def test_flakes_are_longer_down_than_across():
    fallen = flakes(side=200)
    assert np.abs(np.diff(fallen, axis=0)).mean() < np.abs(np.diff(fallen, axis=1)).mean()


def test_a_lower_threshold_gives_more_snow():
    assert flakes(threshold=0.4).mean() > flakes(threshold=0.8).mean()


def test_flakes_are_in_steps_of_a_256th():
    steps = flakes() * 255
    assert steps == pytest.approx(np.rint(steps))
