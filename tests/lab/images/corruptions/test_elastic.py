"""Elastic transform: the affine map by its three points, and displacements pixel by pixel."""

import numpy as np
import pytest

from sinkroute.lab.images.corruptions.elastic import _affine, elastic_transform


class Chosen:
    """Gives the draws that it was given, in turn, and checks their range."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def uniform(self, low, high, size):
        draw = np.asarray(self.draws.pop(0), dtype=float)
        assert low == -high
        assert draw.shape == tuple(size)
        return draw


def still(height, width):
    return np.zeros((height, width))


def test_without_amplitude_and_skew_the_picture_stays():
    x = np.random.default_rng(0).random((12, 17, 3))
    assert elastic_transform(x, np.random.default_rng(0), 0, 0.1, 0) == pytest.approx(x)


def test_each_of_the_three_points_goes_where_it_is_moved():
    # Of 30 rows and 60 columns: the centre is (15, 30), the arms are 10 long. Points and moves are (column, row).
    moves = np.array([[1.0, 2.0], [-3.0, 0.5], [2.0, -1.0]])
    matrix, offset = _affine(Chosen(moves), 30, 60, 3.0)
    for (column, row), (right, down) in zip([(40, 25), (40, 5), (20, 5)], moves, strict=True):
        assert matrix @ [row + down, column + right] + offset == pytest.approx([row, column])


def test_moving_all_points_alike_moves_the_picture():
    x = np.random.default_rng(0).random((21, 21, 1))
    moved = elastic_transform(x, Chosen(np.tile([2.0, -1.0], (3, 1)), still(21, 21), still(21, 21)), 0, 0, 0.2)
    assert moved[:-1, 2:] == pytest.approx(x[1:, :-2])


def test_skew_is_a_share_of_the_shorter_side():
    class Widest:
        def uniform(self, low, high, size):
            assert (low, high) == (-2.0, 2.0) or (low, high) == (-1, 1)
            return np.zeros(size)

    elastic_transform(np.zeros((20, 50, 1)), Widest(), 0, 0, 0.1)


def test_displacements_are_columns_first_in_shares_of_the_side():
    # Everything is drawn one column to the right: 0.1 of 10 pixels.
    x = np.random.default_rng(0).random((10, 10, 1))
    draws = Chosen(np.zeros((3, 2)), np.ones((10, 10)), still(10, 10))
    assert elastic_transform(x, draws, 0.1, 0, 0)[:, :-1] == pytest.approx(x[:, 1:])


def test_half_a_pixel_is_the_mean_of_two():
    x = np.random.default_rng(0).random((10, 10, 1))
    draws = Chosen(np.zeros((3, 2)), still(10, 10), np.full((10, 10), 0.5))
    assert elastic_transform(x, draws, 0.1, 0, 0)[:-1] == pytest.approx((x[1:] + x[:-1]) / 2)


def test_displacements_are_smoothed_over_a_share_of_the_side():
    # Sigma is one pixel: the neighbour of a displaced one moves exp(-1/2) as far, and the ramp shows how far.
    ramp = np.tile(np.arange(20.0)[:, None], (1, 20))[..., None] / 20
    bump = still(20, 20)
    bump[10, 10] = 1
    change = (
        elastic_transform(ramp, Chosen(np.zeros((3, 2)), still(20, 20), bump), 0.05, 0.05, 0)[..., 0] - ramp[..., 0]
    )
    assert change[10, 11] / change[10, 10] == pytest.approx(np.exp(-0.5))
    assert change[10, 14] == pytest.approx(0, abs=1e-12)
