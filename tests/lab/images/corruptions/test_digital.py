"""Pixelation by hand, and JPEG by its size."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from sinkroute.lab.images.corruptions.digital import jpeg_compression, pixelate


def test_pixels_become_means_of_boxes():
    x = np.arange(64.0).reshape(8, 8, 1) / 255
    found = pixelate(x, None, 0.5) * 255
    # The first box holds 0, 1, 8 and 9: their mean 4.5 is rounded.
    assert np.unique(found[:2, :2]).tolist() in ([4], [5])
    assert len(np.unique(found)) == 16


def test_a_side_that_does_not_divide_is_cut_down():
    # 0.65 of 8 is 5.2: five pixels a side.
    x = np.random.default_rng(0).random((8, 8, 1))
    rows = np.unique(np.rint(pixelate(x, None, 0.65) * 255)[:, 0])
    assert 5 <= len(rows) <= 8


def test_pixelation_keeps_the_sides_of_an_oblong():
    x = np.zeros((8, 30, 3))
    x[:, 16:] = 1
    assert np.array_equal(pixelate(x, None, 0.5), x)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_jpeg_is_pillows_of_the_given_quality(channels, mode):
    values = np.random.default_rng(0).integers(0, 256, (24, 16, channels), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(values.squeeze()).save(file, "JPEG", quality=15)
    expected = Image.open(file)
    assert expected.mode == mode
    assert np.array_equal(jpeg_compression(values / 255, None, 15) * 255, np.asarray(expected).reshape(values.shape))


def test_less_quality_is_further_from_the_picture():
    x = np.random.default_rng(0).random((32, 32, 3))
    errors = [((jpeg_compression(x, None, quality) - x) ** 2).mean() for quality in (80, 25, 7)]
    assert errors == sorted(errors)
