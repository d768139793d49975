"""Area under the precision-recall curve, and out-of-distribution detection by the largest softmax probability.

The measure of ImageNet-O (Hendrycks et al. 2019, arXiv 1907.07174): images of unknown classes are the positive ones,
and the score of an image is the negative of its largest probability.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["average_precision", "detection_aupr"]


def average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """Σ (R_n − R_{n−1}) P_n over the distinct scores from high to low, P and R being precision and recall there.

    Args:
        positive: (N,) bool, at least one True.
        scores: (N,) float, high for positive; equal scores are one step of the sum.

    Raises:
        ValueError: none is positive, or a score is not finite.

    >>> average_precision(np.array([True, False, True]), np.array([3.0, 2.0, 1.0]))  # 1/2 · 1 + 1/2 · 2/3
    0.8333333333333333
    """
    if not positive.any():
        raise ValueError("positive: expected at least one True, got none")
    if not np.isfinite(scores).all():
        raise ValueError("scores: expected finite numbers, got NaN or infinity")
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of each run of equal scores
    precision = hits[last] / (last + 1)
    recall = hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def detection_aupr(known_NV: Tensor, unknown_MV: Tensor) -> float:
    """How well the largest probability tells images of unknown classes from those of known ones: AUPR, in [0, 1].

    Args:
        known_NV: (N, V) logits of images of known classes, over the V classes in question.
        unknown_MV: (M, V) logits of images of unknown classes.
    """
    scores = [-torch.softmax(logits.double(), 1).amax(1).cpu().numpy() for logits in (known_NV, unknown_MV)]
    positive = np.repeat([False, True], [len(known_NV), len(unknown_MV)])
    return average_precision(positive, np.concatenate(scores))
