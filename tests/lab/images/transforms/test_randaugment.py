"""RandAugment: each operation against Pillow or by hand, the draws by statistics."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from sinkroute.lab.images.policy import Policy, parse_policy
from sinkroute.lab.images.transforms import randaugment as module
from sinkroute.lab.images.transforms.randaugment import OPERATIONS, randaugment

RECIPE = parse_policy("rand-m9-mstd0.5-inc1")
GREY = (117,)
COLOUR = (124, 116, 104)


def noise(height=24, width=32, channels=3):
    shape = (height, width, channels)[: 2 if channels == 1 else 3]
    return Image.fromarray(np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8))


def smooth(height=40, width=48):
    """A grey image that interpolation can follow."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray((128 + 60 * np.sin(x / 7) + 50 * np.cos(y / 6)).astype(np.uint8))


def pixels(image):
    return np.array(image).astype(int)


def test_there_are_the_15_operations_of_the_growing_set():
    assert sorted(OPERATIONS) == sorted(
        [
            "AutoContrast",
            "Equalize",
            "Invert",
            "Rotate",
            "Posterize",
            "Solarize",
            "SolarizeAdd",
            "Color",
            "Contrast",
            "Brightness",
            "Sharpness",
            "ShearX",
            "ShearY",
            "TranslateX",
            "TranslateY",
        ]
    )


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("signed", [-1.0, -0.9, 0.9, 1.0])
def test_every_operation_keeps_size_and_mode(name, channels, signed):
    image = noise(channels=channels)
    found = OPERATIONS[name](image, signed, COLOUR[:channels])
    assert (found.size, found.mode) == (image.size, image.mode)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("AutoContrast", "Equalize", "Invert")])
def test_an_operation_at_magnitude_0_changes_little_or_nothing(name):
    image = noise()
    found = OPERATIONS[name](image, 0.0, COLOUR)
    # Posterize keeps 4 bits of 8 even then.
    expected = pixels(image) // 16 * 16 if name == "Posterize" else pixels(image)
    assert np.array_equal(pixels(found), expected)


def test_invert_is_255_minus():
    assert np.array_equal(pixels(OPERATIONS["Invert"](noise(), 0.9, COLOUR)), 255 - pixels(noise()))


def test_auto_contrast_stretches_to_the_whole_range():
    image = Image.fromarray(np.arange(50, 150, dtype=np.uint8).reshape(10, 10))
    # (v − 50) · 255 / 99, truncated by Pillow.
    expected = (np.arange(100) * 255 / 99).reshape(10, 10)
    assert np.abs(pixels(OPERATIONS["AutoContrast"](image, 0.9, GREY)) - expected).max() <= 1


def test_equalize_makes_the_histogram_flat():
    skewed = Image.fromarray((np.random.default_rng(0).random((64, 64)) ** 3 * 255).astype(np.uint8))
    found = pixels(OPERATIONS["Equalize"](skewed, 0.9, GREY))
    assert np.histogram(found, bins=4, range=(0, 256))[0] / 4096 == pytest.approx([0.25] * 4, abs=0.06)


@pytest.mark.parametrize(("signed", "bits"), [(0.0, 4), (0.2, 4), (0.5, 2), (-0.5, 2), (0.9, 1), (1.0, 0)])
def test_posterize_keeps_fewer_bits_the_greater_the_magnitude(signed, bits):
    step = 2 ** (8 - bits)
    assert np.array_equal(pixels(OPERATIONS["Posterize"](noise(), signed, COLOUR)), pixels(noise()) // step * step)


@pytest.mark.parametrize(("signed", "threshold"), [(0.5, 128), (-0.5, 128), (0.9, 26), (1.0, 0)])
def test_solarize_inverts_more_the_greater_the_magnitude(signed, threshold):
    # 256 − ⌊256 · 0.9⌋ = 256 − 230 = 26
    before = pixels(noise())
    expected = np.where(before < threshold, before, 255 - before)
    assert np.array_equal(pixels(OPERATIONS["Solarize"](noise(), signed, COLOUR)), expected)


def test_solarize_add_brightens_what_is_dark():
    before = pixels(noise())
    # ⌊110 · 0.9⌋ = 99
    expected = np.where(before < 128, before + 99, before)
    assert np.array_equal(pixels(OPERATIONS["SolarizeAdd"](noise(), 0.9, COLOUR)), expected)


@pytest.mark.parametrize("signed", [-0.9, -0.3, 0.9])
def test_brightness_multiplies(signed):
    expected = np.clip(pixels(noise()) * (1 + 0.9 * signed), 0, 255)
    assert np.abs(pixels(OPERATIONS["Brightness"](noise(), signed, COLOUR)) - expected).max() <= 1


@pytest.mark.parametrize("signed", [-0.9, 0.9])
def test_contrast_spreads_around_the_mean_luma(signed):
    mean = int(np.array(noise().convert("L")).mean() + 0.5)
    expected = np.clip(mean + (pixels(noise()) - mean) * (1 + 0.9 * signed), 0, 255)
    assert np.abs(pixels(OPERATIONS["Contrast"](noise(), signed, COLOUR)) - expected).max() <= 1


@pytest.mark.parametrize("signed", [-0.9, 0.9])
def test_color_spreads_around_the_luma_of_each_pixel(signed):
    luma = pixels(noise().convert("L"))[:, :, None]
    expected = np.clip(luma + (pixels(noise()) - luma) * (1 + 0.9 * signed), 0, 255)
    assert np.abs(pixels(OPERATIONS["Color"](noise(), signed, COLOUR)) - expected).max() <= 1


def test_color_leaves_a_grey_image_alone():
    assert OPERATIONS["Color"](noise(channels=1), 0.9, GREY) == noise(channels=1)


@pytest.mark.parametrize("signed", [-0.9, 0.9])
def test_sharpness_spreads_around_the_smoothed_image(signed):
    before = pixels(smooth()).astype(float)
    # Pillow's SMOOTH filter: the centre counts 5 of 13, each neighbour 1.
    kernel = np.ones((3, 3))
    kernel[1, 1] = 5
    blurred = np.round(ndimage.convolve(before, kernel / 13))
    expected = np.clip(blurred + (before - blurred) * (1 + 0.9 * signed), 0, 255)
    found = pixels(OPERATIONS["Sharpness"](smooth(), signed, GREY))
    assert np.abs(found - expected)[1:-1, 1:-1].max() <= 1


@pytest.mark.parametrize(("name", "axis"), [("TranslateX", 1), ("TranslateY", 0)])
@pytest.mark.parametrize("signed", [-1.0, 1.0])
def test_translation_moves_by_up_to_45_percent_of_the_side_and_fills(name, axis, signed):
    image = noise(40, 60)
    moved = -int(signed * 0.45 * image.size[1 - axis])  # 27 of 60 columns, 18 of 40 rows
    assert abs(moved) == {1: 27, 0: 18}[axis]
    expected = np.roll(pixels(image), moved, axis)
    # What wrapped around is filled instead; bicubic interpolation at whole pixels changes nothing.
    gap = slice(0, moved) if moved > 0 else slice(moved, None)
    expected[(slice(None), gap) if axis == 1 else gap] = COLOUR
    assert np.array_equal(pixels(OPERATIONS[name](image, signed, COLOUR)), expected)


@pytest.mark.parametrize(("name", "matrix"), [("ShearX", [[1, 0], [0.27, 1]]), ("ShearY", [[1, 0.27], [0, 1]])])
def test_shearing_reads_each_row_or_column_from_a_place_further_along(name, matrix):
    # In (row, column): the column read is x + 0.3 · 0.9 · y, or the row y + 0.27 · x, at the centres of the pixels.
    offset = np.array([0.5, 0.5]) @ (np.array(matrix).T - np.eye(2))
    expected = ndimage.affine_transform(
        pixels(smooth()).astype(float), np.array(matrix), offset, order=3, mode="nearest"
    )
    found = pixels(OPERATIONS[name](smooth(), 0.9, GREY))
    inside = found[2:24, 2:24] - expected[2:24, 2:24]
    assert np.abs(inside).max() <= 3
    assert found[-1, -1] == GREY[0]


def test_rotation_turns_about_the_middle_against_the_clock():
    found = pixels(OPERATIONS["Rotate"](smooth(41, 41), 0.9, GREY))
    expected = ndimage.rotate(pixels(smooth(41, 41)).astype(float), 27, reshape=False, order=3, mode="nearest")
    y, x = np.mgrid[:41, :41]
    middle = (y - 20) ** 2 + (x - 20) ** 2 < 17**2
    assert np.abs(found - expected)[middle].max() <= 3
    assert found[0, 0] == GREY[0]


def record(monkeypatch):
    """Replace every operation by one that notes its name and argument."""
    calls = []
    for name in OPERATIONS:
        monkeypatch.setitem(
            module.OPERATIONS, name, lambda image, signed, fill, name=name: calls.append((name, signed)) or image
        )
    return calls


def test_two_operations_are_drawn_and_each_is_done_half_the_time(monkeypatch):
    calls, keyed = record(monkeypatch), np.random.default_rng(0)
    counts = []
    for _ in range(4000):
        before = len(calls)
        randaugment(noise(2, 2), RECIPE, keyed, COLOUR)
        counts.append(len(calls) - before)
    assert np.bincount(counts) / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    names, times = np.unique([name for name, _ in calls], return_counts=True)
    assert len(names) == 15
    assert times / len(calls) == pytest.approx([1 / 15] * 15, abs=0.015)


def test_magnitudes_are_normal_around_9_and_end_at_10(monkeypatch):
    calls, keyed = record(monkeypatch), np.random.default_rng(0)
    for _ in range(6000):
        randaugment(noise(2, 2), RECIPE, keyed, COLOUR)
    signed = np.array([signed for _, signed in calls]) * 10
    assert (signed < 0).mean() == pytest.approx(0.5, abs=0.03)
    magnitudes = np.abs(signed)
    assert magnitudes.max() == 10
    # Φ(−1), Φ(0), Φ(1) of N(9, 0.5); above 10 lies 1 − Φ(2) = 0.0228.
    assert [(magnitudes < bound).mean() for bound in (8.5, 9, 9.5)] == pytest.approx([0.159, 0.5, 0.841], abs=0.02)
    assert (magnitudes == 10).mean() == pytest.approx(0.0228, abs=0.007)


def test_without_deviation_the_magnitude_is_that_of_the_policy(monkeypatch):
    calls = record(monkeypatch)
    randaugment(noise(2, 2), Policy(7, 0, 50), np.random.default_rng(0), COLOUR)
    assert {abs(signed) for _, signed in calls} == {0.7}


def test_the_same_key_gives_the_same_image():
    one, two = (randaugment(noise(), RECIPE, np.random.default_rng(5), COLOUR) for _ in range(2))
    assert one == two
    assert any(randaugment(noise(), RECIPE, np.random.default_rng(seed), COLOUR) != one for seed in range(5))
