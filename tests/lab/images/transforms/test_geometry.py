"""Resizing, cropping, flipping and moving, against what Pillow does when told the box, and by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from sinkroute.lab.images.transforms.crop import random_resized_crop, resized_crop_box
from sinkroute.lab.images.transforms.flip import random_flip
from sinkroute.lab.images.transforms.pad_crop import pad_crop
from sinkroute.lab.images.transforms.pixels import to_pil, to_tensor
from sinkroute.lab.images.transforms.resize import center_crop, central_part, resize, resize_short
from sinkroute.lab.images.transforms.scaling import normalise, scale


def generator(seed=0):
    return np.random.default_rng(seed)


def numbered(height, width):
    """Pixel (y, x) holds 16 y + x."""
    return Image.fromarray((16 * np.arange(height)[:, None] + np.arange(width)).astype(np.uint8))


def noise(height, width, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(generator().integers(256, size=shape, dtype=np.uint8))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pixels_survive_the_way_to_a_tensor_and_back(mode):
    image = noise(5, 7, mode)
    tensor = to_tensor(image)
    assert tensor.shape == (len(mode), 5, 7)
    assert tensor.dtype == torch.uint8
    assert np.array_equal(to_pil(tensor), image)
    # Channel, row, column.
    assert tensor[0, 2, 3].item() == np.array(image).reshape(5, 7, -1)[2, 3, 0]


def test_a_tensor_does_not_share_memory_with_its_image():
    image = noise(4, 4, "L")
    before = image.copy()
    to_tensor(image).zero_()
    assert image == before


def test_two_channels_are_no_image():
    with pytest.raises(ValueError, match="image: expected 1 or 3 channels, got 2"):
        to_pil(torch.zeros(2, 4, 4, dtype=torch.uint8))


def test_scaling_wants_bytes():
    with pytest.raises(TypeError, match=r"images: expected uint8 pixels, got torch\.float32"):
        scale(torch.zeros(3))


def test_each_channel_has_its_own_mean_and_deviation():
    images = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 4)
    found = normalise(images, (0.5, 0.25, 0), (0.5, 0.5, 2))
    # (0 − 0.5) / 0.5, (0.5 − 0.25) / 0.5, (1 − 0) / 2
    assert torch.allclose(found, torch.tensor([-1.0, 0.5, 0.5]).reshape(1, 3, 1, 1).expand(2, 3, 4, 4))


def test_resizing_is_pillows_bicubic_filter():
    image = noise(20, 30)
    assert resize(image, (13, 9)) == image.resize((13, 9), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [((500, 375), 256, (341, 256)), ((375, 500), 256, (256, 341)), ((8, 8), 16, (16, 16))],
)
def test_the_shorter_side_is_resized_and_the_longer_follows_rounded_down(size, short, expected):
    # 500 · 256 / 375 = 341.33
    assert resize_short(Image.new("RGB", size), short).size == expected


def test_the_middle_is_cut_out():
    # 4 of 6 columns: 1 left out on each side; 4 of 8 rows: 2.
    assert np.array_equal(center_crop(numbered(8, 6), 4), np.array(numbered(8, 6))[2:6, 1:5])


def test_a_crop_larger_than_the_image_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match="cannot cut 9 × 9 pixels out of 10 × 8; resize the image first"):
        center_crop(Image.new("L", (10, 8)), 9)


def test_evaluation_resizes_to_256_and_cuts_224():
    image = noise(300, 400)
    # 400 · 256 / 300 = 341.33; (341 − 224) / 2 = 58.5, to the even side 58; (256 − 224) / 2 = 16.
    expected = image.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 58 + 224, 16 + 224))
    assert central_part(image, 224) == expected


def test_without_margin_an_image_of_that_size_stays_as_it_is():
    image = noise(224, 224)
    assert central_part(image, 224, margin=False) == image


def test_resized_crops_have_uniform_areas_and_log_uniform_ratios():
    width, height, keyed = 4000, 3000, generator()
    boxes = np.array([resized_crop_box(width, height, keyed, 0.08) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= width and bottom.max() <= height
    share = (right - left) * (bottom - top) / (width * height)
    log_ratio = np.log((right - left) / (bottom - top))
    assert share.min() == pytest.approx(0.08, abs=0.005)
    assert np.abs(log_ratio).max() == pytest.approx(math.log(4 / 3), abs=0.005)
    # Large parts do not fit at every ratio, so only the smaller ones are uniform: quarters of [0.08, 0.48].
    small = share[share < 0.48]
    assert np.histogram(small, bins=4, range=(0.08, 0.48))[0] / len(small) == pytest.approx([0.25] * 4, abs=0.04)
    assert np.histogram(log_ratio[share < 0.48], bins=4)[0] / len(small) == pytest.approx([0.25] * 4, abs=0.04)
    # Places: the left edge is uniform over what is left of the width.
    free = width - (right - left)[share < 0.48]
    assert (left[share < 0.48] / free).mean() == pytest.approx(0.5, abs=0.03)


def test_where_no_crop_fits_the_central_part_of_the_nearest_ratio_is_taken():
    # All of 1000 × 100 would need a height of at least 274 at ratio 4/3: 10 draws fail; 133 columns in the middle.
    assert resized_crop_box(1000, 100, generator(), min_area=0.99) == (433, 0, 566, 100)
    assert resized_crop_box(100, 1000, generator(), min_area=0.99) == (0, 433, 100, 566)


def test_a_resized_crop_is_the_box_resized_by_pillow():
    image = noise(50, 70)
    box = resized_crop_box(70, 50, generator(4), 0.2)
    expected = image.resize((24, 24), Image.Resampling.BICUBIC, box=box)
    assert random_resized_crop(image, 24, generator(4), 0.2) == expected
    assert expected.size == (24, 24)


def test_a_flip_mirrors_left_and_right_with_its_probability():
    image, keyed = numbered(3, 4), generator()
    mirrored = np.array(image)[:, ::-1]
    flips = [np.array_equal(random_flip(image, 0.3, keyed), mirrored) for _ in range(2000)]
    assert np.mean(flips) == pytest.approx(0.3, abs=0.03)
    assert random_flip(image, 0, keyed) == image


def test_a_moved_image_is_a_crop_of_the_padded_one():
    image = torch.arange(1, 31, dtype=torch.uint8).reshape(1, 5, 6)
    padded = np.pad(image[0].numpy(), 2)
    crops = {padded[top : top + 5, left : left + 6].tobytes() for top in range(5) for left in range(5)}
    keyed = generator()
    found = {pad_crop(image, 2, keyed)[0].numpy().tobytes() for _ in range(400)}
    assert found == crops


def test_padding_beyond_the_image_may_leave_only_black():
    image = torch.ones(1, 2, 2, dtype=torch.uint8)
    keyed = generator()
    sums = {int(pad_crop(image, 3, keyed).sum()) for _ in range(300)}
    assert sums == {0, 1, 2, 4}
