"""Our corruptions against imagecorruptions', on two photographs of 224 x 224: pixel by pixel, with the same draws.

pip install --no-deps imagecorruptions==1.1.2 && pip install scikit-image opencv-python-headless "setuptools<81"

`python tests/peers/test_corruptions.py` prints the differences, a line for each corruption.
"""

import functools
import importlib.util
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sinkroute.lab.images.corruptions import corrupt, list_corruptions
from sinkroute.lab.images.corruptions.elastic import elastic_transform

theirs = pytest.importorskip("imagecorruptions")
cv2 = pytest.importorskip("cv2")

# Corruption -> the largest and the mean difference allowed, of 255. Where the mean is not near 0, many values are whole
# but for rounding: one of the two cuts them to the number below.
EXACT = {
    "gaussian_noise": (1, 0.001),
    "shot_noise": (0, 0),
    "speckle_noise": (1, 0.001),
    "defocus_blur": (1, 0.05),
    "glass_blur": (1, 0.001),
    "motion_blur": (1, 0.002),
    "zoom_blur": (1, 0.001),
    # Theirs does not round the flakes before it blurs them, and cuts what zooming makes too large at one end only.
    "snow": (2, 0.05),
    "fog": (1, 0.001),
    "brightness": (1, 0.03),
    "contrast": (0, 0),
    "pixelate": (0, 0),
    "jpeg_compression": (0, 0),
    "gaussian_blur": (1, 0.001),
    "spatter": (10, 0.01),
    "saturate": (1, 0.12),
}
# Theirs draws impulse noise from scikit-image and frost from photographs, and has another elastic transform.
OTHERS = ["impulse_noise", "frost", "elastic_transform"]


@functools.cache
def photographs():
    """China and a flower of scikit-learn: the middle 224 x 224 of 384 x 256."""
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(image).resize((384, 256)) for image in load_sample_images().images]
    return [np.asarray(picture.crop((80, 16, 304, 240))) for picture in pictures]


def repair(monkeypatch):
    """What NumPy 2 and scikit-image 0.19 took away, so that all 19 of theirs run."""
    gaussian = theirs.corruptions.gaussian

    def gaussian_of_channels(image, multichannel=False, **options):
        return gaussian(image, channel_axis=-1 if multichannel else None, **options)

    monkeypatch.setattr(theirs.corruptions, "gaussian", gaussian_of_channels)
    monkeypatch.setattr(np, "float_", np.float64, raising=False)


def corrupt_as_they_do(name, image, severity):
    """With the draws of image 0 of seed 0, which are theirs as well if they are made in the same order."""
    generator = np.random.default_rng([0, zlib.crc32(name.encode()), severity, 0])
    with pytest.MonkeyPatch.context() as monkeypatch:
        repair(monkeypatch)
        for draw in ("normal", "poisson", "uniform"):
            monkeypatch.setattr(np.random, draw, getattr(generator, draw))
        monkeypatch.setattr(np.random, "randint", generator.integers)
        return theirs.corrupt(image, corruption_name=name, severity=severity).astype(float)


def differences(name, severity):
    pairs = [
        (corrupt(name, image, severity, seed=0), corrupt_as_they_do(name, image, severity)) for image in photographs()
    ]
    return np.abs(np.stack([our - their for our, their in pairs]))


def test_all_corruptions_are_compared():
    assert sorted([*EXACT, *OTHERS]) == sorted(list_corruptions(extra=True))
    assert sorted(theirs.get_corruption_names("all")) == sorted(list_corruptions(extra=True))


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", EXACT)
def test_the_same_draws_give_the_same_picture(name, severity):
    largest, mean = EXACT[name]
    found = differences(name, severity)
    assert found.max() <= largest
    assert found.mean() <= mean


def changes(corrupted):
    """Mean absolute change and PSNR, means over photographs and draws."""
    errors = np.stack([images - image.astype(float) for images, image in zip(corrupted, photographs(), strict=True)])
    return np.abs(errors).mean(), (10 * np.log10(255**2 / (errors**2).mean(axis=(2, 3, 4)))).mean()


def changes_of_both(name, severity, draws, **options):
    ours = [[corrupt(name, image, severity, seed, **options) for seed in range(draws)] for image in photographs()]
    np.random.seed(0)  # noqa: NPY002
    their = [[theirs.corrupt(image, severity, name) for _ in range(draws)] for image in photographs()]
    return changes([np.stack(images) for images in ours]), changes([np.stack(images) for images in their])


@pytest.mark.parametrize("severity", range(1, 6))
def test_impulse_noise_changes_as_much_as_theirs(severity):
    (our_change, our_psnr), (their_change, their_psnr) = changes_of_both("impulse_noise", severity, 4)
    assert our_change == pytest.approx(their_change, rel=0.02)
    assert our_psnr == pytest.approx(their_psnr, abs=0.1)


# The level of one photograph is far from that of another: means of 40 draws have a standard error of 4 %.
@pytest.mark.parametrize("severity", range(1, 6))
def test_made_up_frost_changes_as_much_as_their_photographs_on_average(severity):
    (our_change, our_psnr), (their_change, their_psnr) = changes_of_both("frost", severity, 40)
    assert our_change == pytest.approx(their_change, rel=0.15)
    assert our_psnr == pytest.approx(their_psnr, abs=1.5)


def test_frost_of_their_photographs_changes_as_much_as_theirs():
    folder = Path(importlib.util.find_spec("imagecorruptions").origin).parent / "frost"
    # Theirs never draws the sixth photograph, and takes a crop of them a tenth larger.
    (our_change, our_psnr), (their_change, their_psnr) = changes_of_both("frost", 3, 40, folder=folder)
    assert our_change == pytest.approx(their_change, rel=0.15)
    assert our_psnr == pytest.approx(their_psnr, abs=1.5)


def test_the_affine_part_of_the_elastic_transform_is_opencvs():
    # Theirs has none. OpenCV rounds places to 1/32 of a pixel.
    image = photographs()[0]
    found = elastic_transform(image / 255, np.random.default_rng(0), 0, 0, 0.1) * 255
    corners = np.array([[112 + 74, 112 + 74], [112 + 74, 112 - 74], [112 - 74, 112 - 74]], dtype=np.float32)
    moved = corners + np.random.default_rng(0).uniform(-22.4, 22.4, (3, 2)).astype(np.float32)
    transform = cv2.getAffineTransform(corners, moved)
    expected = cv2.warpAffine(image.astype(np.float32), transform, (224, 224), borderMode=cv2.BORDER_REFLECT_101)
    assert np.abs(found - expected).max() < 4
    assert np.abs(found - expected).mean() < 0.2


if __name__ == "__main__":
    for name in EXACT:
        found = [differences(name, severity) for severity in range(1, 6)]
        print(f"{name:18s} largest {max(map(np.max, found)):3.0f}   mean {np.mean(found):.4f}")
    for name, draws in (("impulse_noise", 4), ("frost", 40)):
        for severity in range(1, 6):
            ours, their = changes_of_both(name, severity, draws)
            print(f"{name:18s} severity {severity}: change {ours[0]:5.2f} and {their[0]:5.2f}", end=", ")
            print(f"PSNR {ours[1]:5.2f} and {their[1]:5.2f} dB")
