"""Mean corruption error: a classifier's errors under corruption, as a share of another's.

With E the error of the model and A that of the baseline, each summed over the severities s of a corruption c,

    mCE          = mean over c of  E_c / A_c                                    * 100 %
    relative mCE = mean over c of  (E_c - S E_clean) / (A_c - S A_clean)        * 100 %    with S severities

https://arxiv.org/abs/1903.12261, section 4. All errors here are in %, as everywhere in results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["ALEXNET", "ALEXNET_CLEAN", "mce", "mean_corruption_error", "relative_mce"]

Errors = Mapping[str, float | Sequence[float]]
"""Corruption -> its error in %: one number a severity, or their mean."""

ALEXNET: dict[str, float] = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
"""Top-1 errors of AlexNet on ImageNet-C in %, means over the severities: the published normalisers of mCE."""

ALEXNET_CLEAN = 43.45
"""Top-1 error in % of the same AlexNet, torchvision's, on ImageNet's validation images, as torchvision states it."""


def mce(errors: Errors, baseline: Errors = ALEXNET) -> float:
    """Mean corruption error in %: 100 is as good as the baseline, less is better.

    Args:
        errors: of the model, for every corruption of `baseline`; others are not looked at.
        baseline: the errors to compare with. AlexNet's hold for ImageNet-C only; give those of a plain model on the
            same images for another data set, or use `mean_corruption_error`.

    Raises:
        ValueError: a corruption is missing, an error is outside [0, 100], or one of the baseline is 0.

    >>> mce({"fog": [10, 20, 30], "snow": 50}, baseline={"fog": 40, "snow": 50})
    75.0
    """
    return float(100 * np.mean([_error(errors, name) / _divisor(name, _error(baseline, name)) for name in baseline]))


def relative_mce(
    errors: Errors, clean_error: float, baseline: Errors = ALEXNET, baseline_clean: float = ALEXNET_CLEAN
) -> float:
    """Relative mean corruption error in %: how much the error grows under corruption, against the baseline's growth.

    Args:
        errors: As for `mce`.
        clean_error: of the model on the images as they are, in %.
        baseline: As for `mce`.
        baseline_clean: of the baseline on the images as they are, in %.

    Raises:
        ValueError: As `mce`; or a corruption does not raise the baseline's error.

    >>> relative_mce({"fog": 30}, 10, baseline={"fog": 60}, baseline_clean=20)
    50.0
    """
    ratios = [
        (_error(errors, name) - _checked("clean_error", clean_error))
        / _divisor(name, _error(baseline, name) - _checked("baseline_clean", baseline_clean))
        for name in baseline
    ]
    return float(100 * np.mean(ratios))


def mean_corruption_error(errors: Errors) -> float:
    """Mean error in %, over severities and then over corruptions: for data without a published baseline.

    Raises:
        ValueError: `errors` is empty, or an error is outside [0, 100].

    >>> mean_corruption_error({"fog": [10, 20, 30], "snow": 50})
    35.0
    """
    if not errors:
        raise ValueError("errors: expected at least one corruption, got none")
    return float(np.mean([_error(errors, name) for name in errors]))


def _error(errors: Errors, name: str) -> float:
    if name not in errors:
        raise ValueError(f"errors: expected one for every corruption of the baseline, got none for {name!r}")
    values = np.atleast_1d(np.asarray(errors[name], dtype=float))
    if not values.size:
        raise ValueError(f"errors: expected one number a severity for {name!r}, got none")
    for value in values:
        _checked(name, value)
    return float(values.mean())


def _checked(name: str, value: float) -> float:
    if not 0 <= value <= 100:
        raise ValueError(f"{name}: expected an error in % from 0 to 100, got {value:g}")
    return value


def _divisor(name: str, value: float) -> float:
    if value <= 0:
        raise ValueError(f"baseline: expected an error above 0 (above the clean one, if relative) for {name!r}")
    return value
