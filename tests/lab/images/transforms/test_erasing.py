"""Random erasing: how often, how much, where, and with what."""

import numpy as np
import pytest
import torch

from sinkroute.lab.images.transforms.erasing import erase_, erasing_box


def test_rectangles_have_uniform_areas_and_log_uniform_ratios():
    keyed = np.random.default_rng(0)
    boxes = np.array([erasing_box(3000, 3000, keyed) for _ in range(4000)])
    top, left, bottom, right = boxes.T
    assert boxes.min() >= 0 and boxes.max() <= 3000
    share = (bottom - top) * (right - left) / 9e6
    log_ratio = np.log((bottom - top) / (right - left))
    assert share.min() == pytest.approx(0.02, abs=0.005)
    assert share.max() <= 0.334
    assert np.abs(log_ratio).max() == pytest.approx(np.log(1 / 0.3), abs=0.02)
    # At this least ratio, 0.3, everything up to an area of 0.3 fits.
    assert np.histogram(share, bins=4, range=(0.02, 0.3))[0] / (share < 0.3).sum() == pytest.approx(
        [0.25] * 4, abs=0.03
    )
    assert np.histogram(log_ratio, bins=4)[0] / 4000 == pytest.approx([0.25] * 4, abs=0.03)
    assert (top / (3000 - (bottom - top))).mean() == pytest.approx(0.5, abs=0.02)


def test_a_rectangle_is_smaller_than_the_image_in_both_directions():
    keyed = np.random.default_rng(0)
    boxes = [erasing_box(8, 8, keyed) for _ in range(500)]
    assert all(0 < box[2] - box[0] < 8 and 0 < box[3] - box[1] < 8 for box in boxes if box is not None)


def test_where_nothing_fits_nothing_is_erased():
    assert erasing_box(1, 1, np.random.default_rng(0)) is None
    image = torch.ones(3, 1, 1)
    erase_(image, 1.0, np.random.default_rng(0))
    assert torch.equal(image, torch.ones(3, 1, 1))


def test_one_in_four_images_is_erased_in_one_rectangle_of_all_channels():
    keyed, erased = np.random.default_rng(0), 0
    for _ in range(1000):
        image = torch.full((3, 12, 16), 7.0)
        erase_(image, 0.25, keyed)
        changed = image != 7
        if changed.any():
            erased += 1
            rows, columns = changed[0].any(1).nonzero()[:, 0], changed[0].any(0).nonzero()[:, 0]
            box = torch.zeros(12, 16, dtype=torch.bool)
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
            assert (changed == box).all()
    assert erased / 1000 == pytest.approx(0.25, abs=0.04)


def test_each_pixel_gets_its_own_standard_normal_value():
    keyed, values = np.random.default_rng(0), []
    for _ in range(100):
        image = torch.full((3, 32, 32), 100.0)
        erase_(image, 1.0, keyed)
        values.append(image[image != 100])
    noise = torch.cat(values)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert len(noise.unique()) > 0.99 * len(noise)
