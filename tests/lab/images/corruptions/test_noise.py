"""Noise: means and spreads of many values."""

import numpy as np
import pytest

from sinkroute.lab.images.corruptions.noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise

GREY = np.full((200, 200, 3), 0.4)


def draws():
    return np.random.default_rng(0)


def test_gaussian_noise_has_the_given_deviation_and_no_bias():
    noise = gaussian_noise(GREY, draws(), 0.2) - GREY
    assert noise.mean() == pytest.approx(0, abs=0.002)
    assert noise.std() == pytest.approx(0.2, rel=0.01)


def test_channels_are_noisy_independently():
    noise = gaussian_noise(GREY, draws(), 0.2) - GREY
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02


def test_shot_noise_has_the_variance_of_counted_photons():
    # A Poisson count of mean 0.4 * 10 has variance 4, as a share of 10 photons 0.04.
    noisy = shot_noise(GREY, draws(), 10)
    assert noisy.mean() == pytest.approx(0.4, rel=0.01)
    assert noisy.var() == pytest.approx(0.04, rel=0.02)
    assert np.allclose(noisy * 10, np.rint(noisy * 10))


def test_impulse_noise_makes_half_of_its_share_black_and_half_white():
    noisy = impulse_noise(GREY, draws(), 0.3)
    assert (noisy == 0).mean() == pytest.approx(0.15, rel=0.03)
    assert (noisy == 1).mean() == pytest.approx(0.15, rel=0.03)
    assert (noisy == 0.4).mean() == pytest.approx(0.7, rel=0.01)


def test_speckle_noise_is_in_proportion_to_the_value():
    noisy = speckle_noise(GREY, draws(), 0.5)
    assert noisy.std() == pytest.approx(0.4 * 0.5, rel=0.01)
    assert np.array_equal(speckle_noise(np.zeros((8, 8, 1)), draws(), 0.5), np.zeros((8, 8, 1)))
