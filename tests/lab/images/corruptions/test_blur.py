"""Blur: kernels by hand, and glass against its definition pixel by pixel."""

import numpy as np
import pytest

from sinkroute.lab.images.corruptions._filters import gaussian_filter
from sinkroute.lab.images.corruptions.blur import (
    _disc,
    _displaced,
    defocus_blur,
    glass_blur,
    motion_blur,
    zoom_blur,
)


def draws(seed=0):
    return np.random.default_rng(seed)


def test_a_sharp_disc_of_radius_2_has_13_equal_pixels():
    kernel = _disc(2, 0.01)
    assert kernel.shape == (5, 5)
    assert (kernel > 0).sum() == 13
    assert kernel[kernel > 0] == pytest.approx(np.full(13, 1 / 13))
    assert kernel[0, 2] > 0 and kernel[0, 0] == 0


def test_a_disc_below_one_pixel_is_its_own_edge_blur():
    # Weights exp(-1 / (2 * 0.4²)) = 0.0439 beside 1, in rows and in columns.
    line = np.array([0.0439, 1, 0.0439]) / 1.0879
    assert _disc(0.3, 0.4) == pytest.approx(np.outer(line, line), abs=1e-4)


@pytest.mark.parametrize(("radius", "side"), [(3, 9), (6, 15), (8, 17), (10, 21)])
def test_large_discs_have_their_edge_blur_inside_the_published_square(radius, side):
    assert _disc(radius, 0.5).shape == (side if radius in (8, 10) else 2 * radius + 3,) * 2


def test_discs_that_touch_the_square_weigh_a_little_more_than_one():
    # Of 197 pixels the outermost row of radius 8 has 1, the next 7. Beside 1 a tap weighs exp(-2), of a sum of 1.2707:
    # mirrored, the blur adds 0.1065 * 7 / 197 at each of four sides in place of losing 0.1065 * 1 / 197.
    assert _disc(6, 0.5).sum() == pytest.approx(1)
    assert _disc(8, 0.5).sum() == pytest.approx(1 + 4 * 0.1065 * (7 - 1) / 197, abs=1e-4)


def test_defocus_turns_a_point_into_the_disc():
    x = np.zeros((41, 41, 1))
    x[20, 20] = 1
    found = defocus_blur(x, draws(), 4, 0.5)[..., 0]
    kernel = _disc(4, 0.5)
    reach = len(kernel) // 2
    assert found[20 - reach : 21 + reach, 20 - reach : 21 + reach] == pytest.approx(kernel, abs=1e-12)


def test_defocus_mirrors_the_picture_at_its_border():
    from scipy import ndimage

    x = draws().random((24, 30, 3))
    kernel = _disc(3, 0.5)
    expected = np.stack([ndimage.correlate(x[..., channel], kernel, mode="mirror") for channel in range(3)], axis=-1)
    assert defocus_blur(x, draws(), 3, 0.5) == pytest.approx(expected, abs=1e-12)


def test_motion_blur_draws_its_angle_from_minus_45_to_45_degrees():
    class Angles:
        def uniform(self, low, high):
            assert (low, high) == (-45, 45)
            return 0.0

    x = np.tile(np.arange(10.0)[:, None, None], (1, 10, 1))
    assert motion_blur(x, Angles(), 3, 2.0) == pytest.approx(x)


def slowly_displaced(generator, height, width, reach):
    """As the published script: from the last pixel to the first, take the value that a neighbour has by now."""
    origin = np.arange(height * width).reshape(height, width)
    for row in range(height - reach, reach, -1):
        for column in range(width - reach, reach, -1):
            across, down = generator.integers(-reach, reach, size=2)
            origin[row, column] = origin[row + down, column + across]
    return origin.ravel()


@pytest.mark.parametrize(("height", "width", "reach"), [(8, 8, 1), (12, 30, 2), (60, 40, 4)])
def test_glass_displaces_pixels_in_turn(height, width, reach):
    for seed in range(5):
        expected = slowly_displaced(draws(seed), height, width, reach)
        assert np.array_equal(_displaced(draws(seed), height, width, reach), expected)


def test_glass_blurs_before_and_after():
    x = draws().random((20, 20, 3))
    between = np.floor(gaussian_filter(x, 0.8) * 255 + 1e-6) / 255
    moved = between.reshape(-1, 3)[slowly_displaced(draws(), 20, 20, 2)].reshape(x.shape)
    assert glass_blur(x, draws(), 0.8, 2, 1) == pytest.approx(gaussian_filter(moved, 0.8))


def test_glass_in_two_rounds_displaces_twice():
    x = draws().random((20, 20, 3))
    generator = draws()
    moved = (np.floor(x * 255 + 1e-6) / 255).reshape(-1, 3)
    for _ in range(2):
        moved = moved[slowly_displaced(generator, 20, 20, 2)]
    assert glass_blur(x, draws(), 0.0, 2, 2) == pytest.approx(moved.reshape(x.shape))


def test_zoom_blur_is_the_mean_of_the_picture_twice_and_its_enlargements():
    # arange(1, 1.11, 0.01) has, by rounding, 12 numbers: 1 to 1.11. The corner of a ramp is moved inwards by each.
    ramp = np.tile(np.arange(224.0)[:, None], (1, 224))[..., None]
    firsts = [(224 - int(np.ceil(224 / factor))) // 2 for factor in 1 + np.arange(1, 12) * (1.01 - 1)]
    found = zoom_blur(ramp, draws(), 1.11, 0.01)[0, 0, 0]
    assert found == pytest.approx(sum(firsts) / 13, abs=0.5)
    assert zoom_blur(np.ones((16, 16, 1)), draws(), 1.31, 0.03) == pytest.approx(np.ones((16, 16, 1)))
