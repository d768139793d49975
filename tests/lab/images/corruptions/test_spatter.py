"""Spatter: its drops, and the steps of its light, each by hand or by a slow definition."""

import numpy as np
import pytest

from sinkroute.lab.images.corruptions.spatter import _distance, _edges, _equalised, _relief, spatter

WATER = (0.65, 0.3, 2, 0.68, 0.5, False)
MUD = (0.65, 0.3, 1, 0.65, 1.5, True)


def draws(seed=0):
    return np.random.default_rng(seed)


def test_water_adds_a_pale_turquoise_of_at_most_the_strength():
    x = np.zeros((64, 64, 3))
    drops = spatter(x, draws(), *WATER)
    assert drops.max() == pytest.approx(0.5 * 238 / 255)
    wet = drops[..., 1] > 0
    assert 0.05 < wet.mean() < 0.6
    assert drops[wet][:, 0] == pytest.approx(drops[wet][:, 1] * 175 / 238)
    assert np.array_equal(drops[..., 1], drops[..., 2])


def test_mud_covers_with_brown():
    x = np.ones((64, 64, 3))
    muddy = spatter(x, draws(), *MUD)
    covered = muddy[..., 0] < 1
    share = (1 - muddy[covered][:, 0]) / (1 - 63 / 255)
    assert covered.any() and not covered.all()
    assert share.min() >= 0.8 - 1e-9 and share.max() <= 1 + 1e-9
    assert muddy[covered][:, 2] == pytest.approx(1 - share + share * 20 / 255)


@pytest.mark.parametrize("parameters", [WATER, MUD])
def test_grey_pictures_get_the_lumas_of_the_drops(parameters):
    colour = spatter(np.full((48, 48, 3), 0.3), draws(), *parameters)
    grey = spatter(np.full((48, 48, 1), 0.3), draws(), *parameters)
    assert grey[..., 0] == pytest.approx(colour @ [0.299, 0.587, 0.114])


def test_without_a_drop_the_picture_stays():
    x = draws().random((16, 16, 3))
    assert np.array_equal(spatter(x, draws(), 0.1, 0.01, 1, 0.7, 0.6, False), x)


def test_a_flat_area_has_no_light():
    assert not _relief(np.full((16, 16), 200.0)).any()


def test_the_edges_of_a_square_are_its_outline():
    picture = np.zeros((12, 12))
    picture[4:8, 4:8] = 200
    edges = _edges(picture, 50, 150)
    assert edges[4:8, 3:5].any(axis=1).all()  # along the left side
    assert not edges[:, [0, 1, 10, 11]].any() and not edges[[0, 1, 10, 11]].any()


def test_a_step_has_its_edge_on_one_side_only():
    picture = np.zeros((9, 10))
    picture[:, 5:] = 100
    # |dx| is 400 in columns 4 and 5: the first of equals is above the one before and not below the one after.
    edges = _edges(picture, 50, 150)
    assert np.flatnonzero(edges[4]).tolist() == [4]
    assert np.flatnonzero(_edges(picture.T, 50, 150)[:, 4]).tolist() == [4]


def test_weak_edges_count_where_they_touch_a_strong_one():
    picture = np.zeros((20, 12))
    picture[:10, 6:] = 20  # |dx| 80: weak
    picture[10:, 6:] = 60  # |dx| 240: strong
    assert _edges(picture, 50, 150)[2, 5]
    picture[10:, 6:] = 20
    assert not _edges(picture, 50, 150).any()


def test_distances_are_the_shortest_paths_of_king_and_knight():
    # From one corner: steps of 1 along a row, 1.4 along a diagonal, 2.1969 as a chess knight.
    edges = np.zeros((8, 8), dtype=bool)
    edges[0, 0] = True
    found = _distance(edges)
    assert found[0, :4] == pytest.approx([0, 1, 2, 3])
    assert [found[1, 1], found[2, 1], found[1, 2], found[3, 1]] == pytest.approx([1.4, 2.1969, 2.1969, 3.1969])
    assert [found[3, 2], found[4, 4], found[7, 5]] == pytest.approx([3.5969, 5.6, 3 * 1.4 + 2 * 2.1969])


def test_equalising_spreads_what_is_there_over_all_values():
    # 4 of 8 are the smallest; then come 2, 1 and 1 of the other 4.
    values = np.array([3, 3, 3, 3, 7, 7, 9, 12], dtype=np.uint8)
    assert _equalised(values).tolist() == [0, 0, 0, 0, 128, 128, 191, 255]
    assert _equalised(np.full(4, 7, dtype=np.uint8)).tolist() == [7] * 4
