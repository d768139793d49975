"""What the attacks ask of a classifier: its logits, checked, and which way an image must go to be misread."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Predict", "ascent_direction", "checked_logits", "margin"]

Predict = Callable[[Tensor], Tensor]
"""(B, C, H, W) float32 pixels -> (B, N) logits."""


def checked_logits(predict: Predict, images: Tensor, labels: Tensor) -> Tensor:
    """`predict(images)` in float32.

    Raises:
        ValueError: the logits are not (B, N) with N of 2 or more, not finite, or a label is N or more.
    """
    logits_BN = predict(images)
    if logits_BN.ndim != 2 or len(logits_BN) != len(images) or logits_BN.shape[1] < 2:
        raise ValueError(
            f"predict: expected logits of shape ({len(images)}, classes) with 2 classes or more, "
            f"got {tuple(logits_BN.shape)}"
        )
    classes = logits_BN.shape[1]
    if labels.max() >= classes:
        raise ValueError(f"labels: predict knows the classes 0 to {classes - 1}, got a label {int(labels.max())}")
    wrong_B = ~logits_BN.isfinite().all(dim=1)
    if wrong_B.any():
        raise ValueError(
            f"predict: the logits of {int(wrong_B.sum())} of {len(images)} images are NaN or infinite (first: image "
            f"{int(wrong_B.nonzero()[0])}); an attack on them would mean nothing. Check the model's weights; to leave "
            "classes out, index the logits instead of filling in −inf"
        )
    return logits_BN.float()


def ascent_direction(predict: Predict, images: Tensor, labels: Tensor) -> Tensor:
    """The sign of the gradient of each image's cross-entropy, (B, C, H, W) of −1, 0 and 1.

    Cross-entropy is softplus(m) of the log-odds of an error, m = log Σ_{j≠y} exp(z_j) − z_y, so both have gradients of
    the same sign. That of m is taken: cross-entropy's own loses the right class's part to rounding once the model is
    sure (p_y rounds to 1 in float32 for m < −17), and an image would seem robust that is not.

    No parameter's `.grad` is touched, and it works where gradients are switched off.

    Raises:
        ValueError: `checked_logits` refuses, the logits do not depend on the images, or the gradient is not finite.
    """
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        logits_BN = checked_logits(predict, leaf, labels)
        if not logits_BN.requires_grad:
            raise ValueError(
                "predict: its logits have no gradient for the images; take torch.no_grad, torch.inference_mode and "
                "detach out of it, or attack with 'spsa', which needs none"
            )
        others_BN = logits_BN.scatter(1, labels[:, None], -torch.inf)
        log_odds_B = others_BN.logsumexp(dim=1) - logits_BN.gather(1, labels[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(log_odds_B.sum(), leaf)
    if not gradient.isfinite().all():
        raise ValueError("predict: the gradient of its logits for the images is NaN or infinite; 'spsa' needs none")
    return gradient.sign()


def margin(predict: Predict, images: Tensor, labels: Tensor) -> Tensor:
    """By how much each right class's logit exceeds the highest other one, (B,); negative where the image is misread.

    >>> logits = torch.tensor([[1.0, 3.0, 0.0], [1.0, 3.0, 0.0]])
    >>> margin(lambda images: logits, torch.zeros(2, 1, 1, 1), torch.tensor([1, 0])).tolist()
    [2.0, -2.0]
    """
    logits_BN = checked_logits(predict, images, labels)
    others_BN = logits_BN.scatter(1, labels[:, None], -torch.inf)
    return logits_BN.gather(1, labels[:, None])[:, 0] - others_BN.amax(dim=1)
