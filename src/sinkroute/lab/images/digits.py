"""The 1797 handwritten digits inside scikit-learn: 8 × 8 pixels of 17 grey levels, the smallest images there are.

Source: the test set of "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sinkroute.lab.images.data import ImageData, split_images

__all__ = ["DIGITS_SHA256", "load_digits"]

DIGITS_SHA256 = "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"


def load_digits(path: str | Path | None = None, size: int | None = None) -> ImageData:
    """The digits inside scikit-learn, levels 0 to 16 spread over 0 to 255; split by `split_images`.

    Args:
        path: Must be None; the images are part of a package.
        size: Rows and columns to resize to; None: 8.

    Raises:
        ValueError: `path` is given.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if path is not None:
        raise ValueError(f"path: images 'digits' ship inside scikit-learn and take no path, got {str(path)!r}")
    try:
        import sklearn
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "images 'digits' are a part of scikit-learn, and scikit-learn is not installed; "
            'cure: pip install "sinkroute[lab]"'
        ) from error
    raw = datasets.load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    return split_images("digits", f"scikit-learn {sklearn.__version__}", images, raw.target, size, DIGITS_SHA256)
