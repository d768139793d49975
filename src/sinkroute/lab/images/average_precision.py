"""Out-of-distribution detection by the largest softmax probability, as on ImageNet-O (arXiv 1907.07174)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["detection_aupr"]


def detection_aupr(known_NV: Tensor, unknown_MV: Tensor) -> float:
    """How well the largest probability tells images of unknown classes from those of known ones: AUPR, in [0, 1].

    Images of unknown classes are the positive ones; the score of an image is the negative of its largest probability.

    Args:
        known_NV: (N, V) logits of images of known classes, over the V classes in question.
        unknown_MV: (M, V) logits of images of unknown classes.

    Raises:
        ValueError: there are no images of unknown classes, or a logit is NaN.
    """
    from sklearn.metrics import average_precision_score  # late: a second of imports

    scores = torch.cat([-torch.softmax(logits.double(), 1).amax(1).cpu() for logits in (known_NV, unknown_MV)])
    if not len(unknown_MV) or not scores.isfinite().all():
        raise ValueError(
            f"expected finite logits and images of unknown classes, got {len(unknown_MV)} such images and "
            f"{int((~scores.isfinite()).sum())} scores that are not finite"
        )
    positive = np.repeat([False, True], [len(known_NV), len(unknown_MV)])
    return float(average_precision_score(positive, scores.numpy()))
