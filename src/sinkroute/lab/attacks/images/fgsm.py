"""FGSM: one step of ε along the sign of the gradient (Goodfellow et al., arXiv 1412.6572, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from sinkroute.lab.attacks.images.ball import Ball
from sinkroute.lab.attacks.images.classifier import Predict, ascent_direction

__all__ = ["fgsm"]


def fgsm(predict: Predict, images: Tensor, labels: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """x' = x + ε · sign ∇ cross-entropy, clipped to the ball. Nothing is random.

    >>> images = torch.full((1, 1, 1, 2), 0.5)
    >>> def predict(x):  # the second class is the brighter left half
    ...     return torch.stack([x[:, 0, 0, 1], x[:, 0, 0, 0]], dim=1)
    >>> ball = Ball.around(images, epsilon=25.5)
    >>> fgsm(predict, images, torch.tensor([1]), ball, torch.Generator()).flatten().tolist()
    [0.4000000059604645, 0.6000000238418579]
    """
    direction = ascent_direction(predict, images, labels)
    return ball.project(images + ball.epsilon * ball.unit * direction)
