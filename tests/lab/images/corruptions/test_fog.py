"""Fog: the smallest height map by hand, and the brightness it keeps."""

import numpy as np
import pytest

from sinkroute.lab.images.corruptions.fog import fog, plasma


class Chosen:
    def __init__(self, values):
        self.values = list(values)
        self.ranges = []

    def uniform(self, low, high, shape):
        self.ranges.append((high, shape))
        return np.full(shape, self.values.pop(0))


def test_the_smallest_map_is_made_of_one_square_and_two_diamonds():
    # Corner 0; middle 0 + 100 * 0.1 = 10; each diamond (10 + 10 + 0 + 0) / 4 + 100 * its draw: 5 + 15 and 5 - 5.
    assert plasma(Chosen([0.1, 0.15, -0.05]), 2, 3.0) == pytest.approx(np.array([[0, 1], [0, 0.5]]))


def test_noise_falls_with_the_scale():
    chosen = Chosen(np.linspace(0, 1, 9))
    plasma(chosen, 8, 2.0)
    assert chosen.ranges == [(high, (count, count)) for high, count in ((100, 1), (50, 2), (25, 4)) for _ in range(3)]


def slow_plasma(generator, side, smoothness):
    """Point by point, each draw of a step made at once as in the fast one."""
    heights = np.zeros((side, side))
    step, roughness = side, 100.0
    while step >= 2:
        half, places = step // 2, range(0, side, step)
        noise = roughness * generator.uniform(-roughness, roughness, (len(places),) * 2)
        for i, row in enumerate(places):
            for j, column in enumerate(places):
                corners = [heights[(row + a) % side, (column + b) % side] for a in (0, step) for b in (0, step)]
                heights[row + half, column + half] = np.mean(corners) + noise[i, j]
        for down, across in ((0, half), (half, 0)):
            noise = roughness * generator.uniform(-roughness, roughness, (len(places),) * 2)
            made = {}
            for i, row in enumerate(places):
                for j, column in enumerate(places):
                    y, x = row + down, column + across
                    ring = [
                        heights[(y + a) % side, (x + b) % side]
                        for a, b in ((-half, 0), (half, 0), (0, -half), (0, half))
                    ]
                    made[y, x] = np.mean(ring) + noise[i, j]
            for place, height in made.items():
                heights[place] = height
        step, roughness = half, roughness / smoothness
    heights -= heights.min()
    return heights / heights.max()


@pytest.mark.parametrize("side", [2, 8, 32])
def test_the_map_is_that_made_point_by_point(side):
    expected = slow_plasma(np.random.default_rng(3), side, 1.7)
    assert plasma(np.random.default_rng(3), side, 1.7) == pytest.approx(expected)


def test_fog_scales_by_the_brightest_value_and_the_density():
    # Brightest 0.5, density 1.5: (x + 1.5 * map) * 0.5 / 2.
    x = np.zeros((8, 8, 3))
    x[0, 0] = 0.5
    heights = plasma(np.random.default_rng(0), 8, 2.0)[..., None]
    assert fog(x, np.random.default_rng(0), 1.5, 2.0) == pytest.approx((x + 1.5 * heights) * 0.25)


def test_an_oblong_picture_gets_a_part_of_the_map_of_its_longer_side():
    heights = plasma(np.random.default_rng(0), 32, 2.0)[:9, :20, None]
    assert fog(np.ones((9, 20, 1)), np.random.default_rng(0), 1.0, 2.0) == pytest.approx((1 + heights) / 2)


def test_a_black_picture_stays_black():
    assert not fog(np.zeros((8, 8, 3)), np.random.default_rng(0), 1.5, 2.0).any()
