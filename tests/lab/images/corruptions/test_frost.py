"""Frost: made-up ice has the photographs' statistics; photographs are cropped and scaled."""

import numpy as np
import pytest
from PIL import Image

from sinkroute.lab.images.corruptions import corrupt
from sinkroute.lab.images.corruptions.frost import _needles, frost


def draws(seed=0):
    return np.random.default_rng(seed)


def test_made_up_ice_has_the_level_contrast_and_tint_of_the_photographs():
    # Mean over the five photographs, made outside of this project: RGB 0.572, 0.656, 0.702; deviation of luma 0.105.
    black = np.zeros((48, 48, 3))
    ice = np.stack([frost(black, draws(seed), 0, 1, 1) for seed in range(100)])
    assert ice.mean(axis=(0, 1, 2)) == pytest.approx([0.572, 0.656, 0.702], abs=0.03)
    assert (ice @ [0.299, 0.587, 0.114]).std(axis=(1, 2)).mean() == pytest.approx(0.105, abs=0.02)
    assert ice.min() >= 0 and ice.max() <= 1


def test_made_up_ice_has_the_spectrum_of_the_photographs():
    # Their power falls as frequency ** -1.24 to -1.87 between 3 and 80 waves across 224 pixels.
    side = 224
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side) * side, np.fft.fftfreq(side) * side))
    rings = np.rint(frequency).astype(int).ravel()
    slopes = []
    for seed in range(4):
        power = np.abs(np.fft.fft2(_needles(draws(seed), side, side))) ** 2
        means = np.bincount(rings, power.ravel()) / np.bincount(rings)
        slopes.append(np.polyfit(np.log(np.arange(3, 80)), np.log(means[3:80]), 1)[0])
    assert -1.9 < np.mean(slopes) < -1.2


def test_the_picture_and_the_ice_are_weighed():
    x = draws().random((16, 16, 3))
    ice = frost(np.zeros_like(x), draws(), 0, 1, 1)
    assert frost(x, draws(), 0.7, 0.5, 1) == pytest.approx(0.7 * x + 0.5 * ice)


def test_grey_pictures_get_the_lumas_of_the_ice():
    ice = frost(np.zeros((16, 16, 3)), draws(), 0, 1, 1)
    grey = frost(np.zeros((16, 16, 1)), draws(), 0, 1, 1)
    assert grey[..., 0] == pytest.approx(ice @ [0.299, 0.587, 0.114])


@pytest.fixture
def folder(tmp_path):
    """A photograph whose red is its row and whose green is its column, 60 rows by 90 columns, and a text."""
    rows, columns = np.mgrid[:60, :90]
    Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)).save(tmp_path / "ice.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_a_photograph_is_cropped_at_a_random_place(folder):
    tops, lefts = set(), set()
    for seed in range(200):
        crop = np.rint(frost(np.zeros((50, 80, 3)), draws(seed), 0, 1, 1, folder=folder) * 255)
        assert crop.shape == (50, 80, 3)
        assert np.array_equal(crop[..., 0] - crop[0, 0, 0], np.mgrid[:50, :80][0])
        assert np.array_equal(crop[..., 1] - crop[0, 0, 1], np.mgrid[:50, :80][1])
        tops.add(int(crop[0, 0, 0]))
        lefts.add(int(crop[0, 0, 1]))
    assert tops == lefts == set(range(11))


def test_a_photograph_is_scaled_for_small_pictures(folder):
    # A fifth of 90 columns: neighbours are about five old columns apart.
    crop = frost(np.zeros((8, 8, 3)), draws(), 0, 1, 0.2, folder=folder) * 255
    assert np.diff(crop[0, :, 1]).mean() == pytest.approx(5, abs=0.5)


def test_a_photograph_is_enlarged_for_large_pictures(folder):
    crop = frost(np.zeros((120, 100, 3)), draws(), 0, 1, 1, folder=folder) * 255
    assert crop[:, 0, 0].min() == pytest.approx(0, abs=1)
    assert crop[:, 0, 0].max() == pytest.approx(59, abs=1)


def test_every_photograph_of_the_folder_is_drawn(tmp_path):
    for number, suffix in enumerate((".png", ".jpg", ".JPEG")):
        Image.new("RGB", (20, 20), (100 * number,) * 3).save(tmp_path / f"{number}{suffix}")
    found = {
        round(
            float(
                frost(np.zeros((8, 8, 1)), draws(seed), 0, 1, 1, folder=tmp_path).max() * 255,
            )
        )
        for seed in range(30)
    }
    assert found == {0, 100, 200}


def test_a_folder_without_photographs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder: expected photographs of frost .*, found none in"):
        corrupt("frost", np.zeros((8, 8, 3), dtype=np.uint8), 1, seed=0, folder=tmp_path / "nowhere")
