"""Every constant of every severity, against what the published scripts make of the same picture.

Mean absolute changes from `ImageNet-C/create_c/make_{imagenet,tinyimagenet,cifar}_c.py` of
https://github.com/hendrycks/robustness, run with NumPy 1.23, scikit-image 0.18.3, OpenCV 4.11 and Pillow 9.5, their
random draws replaced by those of our generators and ImageMagick's motion blur by that of imagecorruptions 1.1.2.
Impulse noise draws from scikit-image, and frost needs photographs: they are not in the table.
"""

import numpy as np
import pytest

from sinkroute.lab.images.corruptions import corrupt

# Corruption -> side of the picture -> mean absolute change at severities 1 to 5.
PUBLISHED = {
    "gaussian_noise": {
        224: (15.61, 22.6, 32.22, 43.69, 57.8),
        64: (8.03, 15.65, 22.39, 27.35, 32.04),
        32: (7.87, 11.85, 15.71, 17.24, 19.05),
    },
    "shot_noise": {
        224: (16.43, 24.42, 33.82, 49.84, 61.88),
        64: (8.42, 12.73, 17.71, 22.55, 30.42),
        32: (5.93, 8.22, 12.75, 14.87, 17.6),
    },
    "defocus_blur": {
        224: (20.78, 26.61, 36.23, 41.75, 42.91),
        64: (6.03, 7.54, 11.42, 17.26, 20.44),
        32: (1.56, 3.71, 5.62, 7.12, 10.69),
    },
    "glass_blur": {
        224: (23.19, 24.78, 39.86, 38.58, 41.16),
        64: (10.77, 13.8, 21.76, 22.62, 32.06),
        32: (10.74, 11.39, 12.08, 20.35, 19.95),
    },
    "motion_blur": {
        224: (21.27, 32.8, 44.09, 37.6, 44.13),
        64: (6.36, 11.41, 14.56, 22.83, 23.67),
        32: (6.41, 11.69, 14.51, 19.58, 21.01),
    },
    "zoom_blur": {
        224: (33.79, 38.35, 39.21, 41.16, 41.57),
        64: (11.99, 17.36, 21.62, 26.38, 30.47),
        32: (10.46, 12.25, 14.98, 17.6, 20.54),
    },
    "snow": {
        224: (42.33, 66.6, 67.87, 80.49, 93.86),
        64: (38.7, 41.97, 59.21, 69.81, 80.58),
        32: (10.86, 23.16, 27.19, 35.95, 58.06),
    },
    "fog": {
        224: (46.4, 51.17, 55.25, 54.24, 51.92),
        64: (21.61, 31.1, 36.33, 44.77, 48.93),
        32: (13.02, 22.77, 28.84, 37.95, 45.78),
    },
    "brightness": {
        224: (14.98, 24.01, 28.81, 32.57, 35.1),
        64: (14.97, 23.92, 28.72, 32.57, 35.02),
        32: (7.4, 14.99, 21.17, 24.16, 29.19),
    },
    "contrast": {
        224: (40.82, 47.62, 54.42, 61.23, 64.63),
        64: (41.15, 48.01, 54.87, 61.71, 65.14),
        32: (16.93, 33.86, 40.64, 47.41, 57.56),
    },
    "elastic_transform": {
        224: (60.16, 59.23, 30.4, 42.85, 46.22),
        64: (46.65, 45.19, 25.77, 27.85, 22.89),
        32: (39.2, 31.54, 16.02, 25.3, 16.65),
    },
    "pixelate": {
        224: (8.73, 5.58, 15.24, 20.64, 21.29),
        64: (0.63, 4.17, 6.73, 10.8, 6.65),
        32: (2.64, 2.97, 1.07, 9.65, 6.48),
    },
    "jpeg_compression": {
        224: (20.38, 22.51, 23.97, 25.33, 27.4),
        64: (15.43, 15.76, 16.02, 16.66, 20.79),
        32: (13.09, 14.9, 15.45, 15.8, 16.24),
    },
    "speckle_noise": {
        224: (14.12, 18.28, 29.63, 36.65, 45.77),
        64: (13.98, 18.46, 21.89, 25.53, 29.39),
        32: (5.9, 9.53, 11.3, 14.14, 18.2),
    },
    "gaussian_blur": {
        224: (12.53, 24.28, 32.54, 37.43, 42.08),
        64: (3.95, 8.65, 12.12, 15.31, 18.21),
        32: (1.73, 5.68, 7.45, 8.96, 11.6),
    },
    "spatter": {
        224: (0.45, 5.46, 7.95, 9.07, 15.85),
        64: (0.67, 3.57, 6.43, 4.92, 7.79),
        32: (0.81, 2.64, 7.29, 1.22, 5.19),
    },
    "saturate": {
        224: (47.56, 61.23, 20.93, 26.23, 26.98),
        64: (47.69, 61.41, 20.65, 26.08, 26.73),
        32: (47.16, 60.71, 16.14, 21.99, 24.04),
    },
}


def picture(side):
    """Waves, a ramp and a chess board: (side, side, 3)."""
    rows, columns = np.mgrid[:side, :side]
    waves = 128 + 100 * np.sin(rows / 7) * np.cos(columns / 5)
    board = 20 + 200 * ((rows // 6 + columns // 9) % 2)
    return np.stack([waves, 255 * columns / side, board], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("side", [224, 64, 32])
@pytest.mark.parametrize("name", PUBLISHED)
def test_each_severity_changes_the_picture_as_much_as_the_published_script(name, side):
    clean = picture(side)
    changes = [np.abs(corrupt(name, clean, severity, seed=0) - clean.astype(float)).mean() for severity in range(1, 6)]
    # Flat areas whose value is whole but for rounding are cut to one below it, or not.
    assert changes == pytest.approx(PUBLISHED[name][side], rel=0.02, abs=0.11)
