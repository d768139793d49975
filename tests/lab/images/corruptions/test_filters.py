"""Filters on a single bright pixel, and zooming by hand."""

import numpy as np
import pytest

from sinkroute.lab.images.corruptions._filters import directional_blur, gaussian_filter, zoom_in


def point(side, row, column):
    x = np.zeros((side, side))
    x[row, column] = 1
    return x


def test_the_normal_blur_weighs_by_distance_and_keeps_the_sum():
    blurred = gaussian_filter(point(21, 10, 10), 1.5)
    assert blurred.sum() == pytest.approx(1)
    assert blurred[10, 12] / blurred[10, 10] == pytest.approx(np.exp(-4 / (2 * 1.5**2)))
    assert blurred[10, 17] == 0  # 4 sigma is 6 pixels


def test_the_normal_blur_does_not_mix_channels():
    x = np.stack([point(9, 4, 4), np.zeros((9, 9))], axis=-1)
    assert not gaussian_filter(x, 1.0)[..., 1].any()


def test_a_smear_to_the_right_takes_its_values_from_there():
    # Taps 0 to 4 of weights exp(-k² / 2) : 1, 0.6065, 0.1353, 0.0111, 0.0003, of sum 1.7533.
    blurred = directional_blur(point(9, 4, 6), 2, 1.0, 0.0)
    assert blurred[4] == pytest.approx(np.array([0, 0, 0.0003, 0.0111, 0.1353, 0.6065, 1, 0, 0]) / 1.7533, abs=1e-4)
    assert blurred[[3, 5]].sum() == 0


def test_a_smear_downwards_takes_its_values_from_below():
    blurred = directional_blur(point(9, 6, 4), 2, 1.0, 90.0)
    assert blurred[5, 4] == pytest.approx(0.6065 / 1.7533, abs=1e-4)
    assert blurred[7, 4] == 0


def test_a_smear_along_the_diagonal_steps_by_the_nearest_pixels():
    # 0, 0.71, 1.41, 2.12, 2.83 steps right and down: 0, 1, 1, 2, 3 pixels.
    blurred = directional_blur(point(9, 6, 6), 2, 1.0, 45.0)
    found = [blurred[6 - step, 6 - step] * 1.7533 for step in range(4)]
    assert found == pytest.approx([1, 0.6065 + 0.1353, 0.0111, 0.0003], abs=1e-4)


@pytest.mark.parametrize("angle", [-135.0, -90.0, -45.0, 0.0, 30.0])
def test_a_smear_longer_than_the_picture_keeps_a_flat_one_flat(angle):
    assert directional_blur(np.full((8, 8, 3), 0.25), 20, 15.0, angle) == pytest.approx(np.full((8, 8, 3), 0.25))


def test_the_border_goes_on_outside_of_a_smear():
    ramp = np.tile(np.arange(5.0), (5, 1))
    assert directional_blur(ramp, 3, 100.0, 0.0)[0, 4] == pytest.approx(4)


def test_zooming_by_one_changes_nothing():
    x = np.random.default_rng(0).random((11, 14, 3))
    assert np.array_equal(zoom_in(x, 1.0), x)


def test_zooming_by_two_shows_the_middle_half_with_means_between():
    # Pixels 2 to 5 of 8 become 8, their ends being the ends: one pixel is 3 / 7 of an old one.
    ramp = np.tile(np.arange(8.0), (8, 1))
    assert zoom_in(ramp, 2.0)[3] == pytest.approx(2 + np.arange(8) * 3 / 7)
    assert zoom_in(ramp.T, 2.0)[:, 3] == pytest.approx(2 + np.arange(8) * 3 / 7)


def test_what_zooming_makes_too_large_is_cut_at_both_ends():
    # 20 / 1.5 is 13.3, so pixels 3 to 16 become 21, of which the first 20 are kept.
    ramp = np.tile(np.arange(20.0), (20, 1))
    assert zoom_in(ramp, 1.5)[0] == pytest.approx(3 + np.arange(20) * 13 / 20)


@pytest.mark.parametrize("factor", [1.01, 1.07, 1.3, 2.5, 4.5])
@pytest.mark.parametrize("shape", [(8, 8), (28, 31), (224, 100)])
def test_zooming_is_that_of_scipy_on_the_middle(shape, factor):
    from scipy import ndimage

    x = np.random.default_rng(0).random(shape)
    cropped = [int(np.ceil(side / factor)) for side in shape]
    middle = tuple(
        slice((side - crop) // 2, (side - crop) // 2 + crop) for side, crop in zip(shape, cropped, strict=True)
    )
    enlarged = ndimage.zoom(x[middle], factor, order=1)
    kept = tuple(
        slice((large - side) // 2, (large - side) // 2 + side)
        for side, large in zip(shape, enlarged.shape, strict=True)
    )
    assert zoom_in(x, factor) == pytest.approx(enlarged[kept], abs=1e-9)
