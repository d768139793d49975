"""Colour against the standard library's hue, saturation and value, and contrast by hand."""

import colorsys

import numpy as np
import pytest

from sinkroute.lab.images.corruptions.colour import brightness, contrast, saturate

COLOURS = np.concatenate(
    [np.random.default_rng(0).random((30, 3)), np.eye(3), 1 - np.eye(3), [[0.5, 0.5, 0.5], [0, 0, 0]]]
)


def through_hsv(change):
    return np.array([colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*colour))) for colour in COLOURS])[None]


@pytest.mark.parametrize("amount", [0.05, 0.3, 0.5])
def test_brightness_adds_to_the_value(amount):
    expected = through_hsv(lambda hue, saturation, value: (hue, saturation, min(value + amount, 1)))
    assert brightness(COLOURS[None], None, amount) == pytest.approx(expected)


@pytest.mark.parametrize(("factor", "offset"), [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)])
def test_saturate_changes_the_saturation(factor, offset):
    expected = through_hsv(lambda hue, saturation, value: (hue, min(saturation * factor + offset, 1), value))
    assert saturate(COLOURS[None], None, factor, offset) == pytest.approx(expected)


def test_brightness_of_grey_adds_to_it():
    assert brightness(np.array([[[0.0], [0.5], [0.9]]]), None, 0.3)[0, :, 0] == pytest.approx([0.3, 0.8, 1])


def test_a_grey_picture_has_no_saturation_to_change():
    grey = np.random.default_rng(0).random((8, 8, 1))
    assert np.array_equal(saturate(grey, None, 20, 0.2), grey)


def test_contrast_draws_each_channel_towards_its_own_mean():
    # Means 0.5 and 0.2; distances to them are halved.
    x = np.array([[[0.0, 0.2], [1.0, 0.2]]])
    assert contrast(x, None, 0.5).ravel() == pytest.approx([0.25, 0.2, 0.75, 0.2])
